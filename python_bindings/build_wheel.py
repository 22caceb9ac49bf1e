"""Build the wheel that carries the native libraries and programs, and the wheel of the stock llama_cpp binding.

    python python_bindings/build_wheel.py                    # what `make wheels` runs: dispatch profile, into dist/
    pip install --find-links dist blockffn                   # then compiles nothing

The libraries of build/<profile>/bin find each other by $ORIGIN, so they and the programs lie in one folder of the
package, blockffn/native/bin. A wheel holds no links: every library is stored once, under its SONAME. auditwheel names
the oldest glibc that they run on, which the wheel is tagged with; without it the tag is that of this machine's Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISPATCH = ROOT / "build" / "dispatch" / "bin"
STAGE = ROOT / "build" / "wheel"
PACKAGES = ("python_bindings", "convert", "eval", "training")
FILES = ("pyproject.toml", "README.md", "LICENSE")
BINDING = "libllama.so"  # the name that the binding loads

SETUP = '''\
"""Marks the wheel as one for this platform: it carries native libraries, but no Python extension module."""

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"bdist_wheel": PlatformWheel}, distclass=PlatformDistribution)
'''


def native_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield (file, name in the wheel) for every library and program of a build."""
    names: dict[Path, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if ".so" in path.name or path.name.startswith("llama-"):
            names.setdefault(path.resolve(), []).append(path.name)
    for file, aliases in names.items():
        sonames = [name for name in aliases if re.search(r"\.so\.\d+$", name)]
        yield file, sonames[0] if sonames else min(aliases, key=len)
        if BINDING in aliases and sonames:
            yield file, BINDING


def openmp_library(folder: Path) -> Path | None:
    """Return the OpenMP runtime that the build links to: a clean machine may have none."""
    output = subprocess.run(["ldd", str(folder / BINDING)], capture_output=True, text=True, check=False).stdout
    match = re.search(r"libgomp\.so\.1 => (\S+)", output)
    return Path(match[1]) if match else None


def stage(built: Path, folder: Path) -> None:
    """Copy the sources, and the libraries and programs in `built`, to `folder`, ready for setuptools."""
    if not (built / BINDING).exists():
        sys.exit(f"error: {built / BINDING} is missing: run `make BUILD_PROFILE=dispatch setup`")
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "build_wheel.py")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, symlinks=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    (folder / "setup.py").write_text(SETUP)
    native = folder / "python_bindings" / "native" / "bin"
    native.mkdir(parents=True)
    for file, name in native_files(built):
        shutil.copy(file, native / name)
        strip(native / name)
    openmp = openmp_library(built)
    if openmp is not None:
        shutil.copy(openmp, native / openmp.name)


def strip(file: Path) -> None:
    """Drop the symbols that nothing needs at run time, where binutils are there."""
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-unneeded", str(file)], check=True)


def pip_wheel(source: Path, out: Path, backend: str, environment: dict[str, str] | None = None) -> None:
    """Build one wheel; the build backend comes from this environment when it is there, else from the package index."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if importlib.util.find_spec(backend) is not None:
        command.append("--no-build-isolation")
    command += ["--wheel-dir", str(out), str(source)]
    run = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        sys.exit(f"{run.stdout}{run.stderr}error: no wheel of {source.name}: see above")


def tagged(wheel: Path) -> Path:
    """Give a wheel the tag of the oldest glibc that its libraries run on; return its new name."""
    if importlib.util.find_spec("auditwheel") is None:
        return wheel
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r'"(manylinux_\d+_\d+_\w+)"', " ".join(shown.split()))
    if match is None:
        sys.exit(f"{shown}error: auditwheel names no glibc for {wheel.name}")
    command = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", match[1], str(wheel)]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    return wheel.with_name(name)


def main() -> None:
    """Build both wheels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bin", type=Path, default=DISPATCH, help="what to pack (default: build/dispatch/bin)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheels (default: dist)")
    parser.add_argument("--stage", type=Path, default=STAGE, help="folder to work in (default: build/wheel)")
    parser.add_argument("--only-blockffn", action="store_true", help="not the llama_cpp binding")
    args = parser.parse_args()
    stage(args.bin, args.stage)
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("blockffn-*.whl"):
        old.unlink()
    pip_wheel(args.stage, args.out, "setuptools")
    tagged(*args.out.glob("blockffn-*.whl"))
    if not args.only_blockffn:
        (source,) = (ROOT / "build" / "download").glob("llama_cpp_python-*.tar.gz")
        pip_wheel(source, args.out, "scikit_build_core", {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"})
    for wheel in sorted(args.out.glob("*.whl")):
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        print(f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB  sha256 {digest}")


if __name__ == "__main__":
    main()
