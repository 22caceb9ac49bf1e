"""The wheel carries everything: installed into a clean environment, it runs a model there without compiling."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from blockffn import backends as cpu_backends
from blockffn import library

VARIANTS = cpu_backends.variants(library.directory())
ROOT = Path(__file__).resolve().parent.parent
CLEAN = {name: value for name, value in os.environ.items() if not re.match("BLOCKFFN_|LLAMA_CPP_|BUILD_|PYTHON", name)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in BLOCKFFN_WHEELS (`make test-wheels`), else one of the libraries that the tests run on."""
    if "BLOCKFFN_WHEELS" in os.environ:
        return next(Path(os.environ["BLOCKFFN_WHEELS"]).glob("blockffn-*.whl"))
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, str(ROOT / "python_bindings" / "build_wheel.py"), "--bin", str(library.directory())]
    command += ["--out", str(folder / "dist"), "--stage", str(folder / "stage"), "--only-blockffn"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel; other packages are lent by the one that runs the tests."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, str(wheel)], check=True, env=CLEAN)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command in the clean environment and return its output."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=CLEAN, cwd=cwd, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_name_and_content(wheel: Path) -> None:
    assert re.fullmatch(r"blockffn-[\d.]+-py3-none-(many)?linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for needed in ("libllama.so", "llama-quantize", "llama-server"):
            assert f"blockffn/native/bin/{needed}" in names
        backends = {f"libggml-cpu-{name}.so" for name in VARIANTS} or {"libggml-cpu.so.0"}
        assert {Path(name).name for name in names if "/libggml-cpu" in name} == backends
        for package in ("blockffn/cli.py", "blockffn/commands/run.py", "blockffn/convert/cli.py"):
            assert package in names
        assert not any("test" in name or "build_wheel" in name or name.endswith(".pyc") for name in names)
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    assert modes["blockffn/native/bin/llama-quantize"] & 0o111


def test_runs_in_a_clean_environment(clean: Path, stock_model: Path, tmp_path: Path) -> None:
    code = "import blockffn, sys; print(blockffn.__file__); print(blockffn.library.directory())"
    module, libraries = run(clean / "python", "-c", code, cwd=tmp_path).split()
    site = clean.parent / "lib"
    assert Path(module).is_relative_to(site) and Path(libraries).is_relative_to(site)
    text = run(clean / "blockffn", "run", "-m", stock_model, "-p", "abc", "-n", "8", "-t", "1", cwd=tmp_path)
    assert len(text) > 1


def test_programs_find_their_libraries(clean: Path, stock_model: Path, tmp_path: Path) -> None:
    run(clean / "blockffn", "quantize", stock_model, "small.gguf", "Q8_0", cwd=tmp_path)
    assert "Q8_0" in run(clean / "blockffn", "inspect", "small.gguf", cwd=tmp_path)


def test_no_library_outside_the_package(clean: Path, stock_model: Path, tmp_path: Path) -> None:
    """Neither the build folder nor a second copy is mapped."""
    code = f"""
import blockffn, re
llm = blockffn.Llama({str(stock_model)!r}, n_threads=1)
llm.create_completion("a", max_tokens=1)
import llama_cpp._ggml
maps = {{line.split()[-1] for line in open("/proc/self/maps") if re.search("lib(llama|ggml|gomp)", line)}}
print("\\n".join(sorted(maps)))
"""
    mapped = [Path(line) for line in run(clean / "python", "-c", code, cwd=tmp_path).split()]
    assert all(path.is_relative_to(clean.parent) for path in mapped)
    kinds = [re.sub(r"cpu-\w+", "cpu", path.name.split(".")[0]) for path in mapped]
    assert sorted(kinds) == sorted(set(kinds)) and {"libllama", "libggml", "libggml-cpu"} <= set(kinds)
