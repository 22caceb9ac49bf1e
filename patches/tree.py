"""Fetch the pinned upstream source, apply our patches, and write edits of the patched tree back into the patches.

    python patches/tree.py fetch     # pip download, sha256 check, unpack to build/pristine
    python patches/tree.py apply     # build/src/llama.cpp = pristine tree + patches/series
    python patches/tree.py refresh   # edits made in build/src/llama.cpp -> patches/NNNN-*.patch
    python patches/tree.py refresh --into 0007-name.patch FILE...   # files that no patch touches yet

Only files whose content changes are rewritten, so that an incremental build compiles what a patch really changed.
Needs nothing but the standard library, pip and git.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
BUILD = ROOT / "build"
PRISTINE = BUILD / "pristine"
TREE = BUILD / "src" / "llama.cpp"
APPLIED = BUILD / "src" / "patched-files"  # the files that the patches touched when they were last applied


class TreeError(Exception):
    """One clear message for the user."""


def read_upstream() -> dict[str, str]:
    """Return the `name = value` pairs of patches/UPSTREAM."""
    lines = (PATCHES / "UPSTREAM").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if line.strip() and not line.startswith("#"))
    return {name.strip(): value.strip() for name, value in pairs}


def series() -> list[Path]:
    """Return the patches of patches/series in order; every patch file must be listed and every line must exist."""
    lines = (line.split("#")[0].strip() for line in (PATCHES / "series").read_text().splitlines())
    listed = [PATCHES / line for line in lines if line]
    for path in listed:
        if not path.is_file():
            raise TreeError(f"patches/series lists {path.name}, but there is no such file in patches/")
    unlisted = {path.name for path in PATCHES.glob("*.patch")} - {path.name for path in listed}
    if unlisted:
        raise TreeError(f"patches/series does not list {', '.join(sorted(unlisted))}: add or delete them")
    return listed


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(upstream: dict[str, str], folder: Path) -> Path:
    """Return the source package in `folder`, from pip where it is missing; checked where `upstream` has its hash."""
    expected = upstream.get("sha256")
    pattern = f"{upstream['package'].replace('-', '_')}-{upstream['version']}.tar.gz"
    archive = folder / pattern
    if archive.exists() and expected not in (None, sha256(archive)):
        print(f"{archive.relative_to(ROOT)} is damaged (another sha256): fetching it again", flush=True)
        archive.unlink()
    if archive.exists():
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    what = f"{upstream['package']}=={upstream['version']}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        run = subprocess.run([*command, "--no-binary", ":all:", "--dest", temporary, what], check=False)
        found = Path(temporary) / pattern
        if run.returncode != 0 or not found.exists():
            raise TreeError(f"pip could not download {what}: is the Python package index reachable?")
        if expected not in (None, sha256(found)):
            raise TreeError(
                f"{pattern}: expected sha256 {expected} (patches/UPSTREAM), found {sha256(found)}; "
                "the package index serves another file, do not use it"
            )
        found.replace(archive)
    return archive


def fetch() -> None:
    """Download, check and unpack the upstream source into build/pristine. A second call does nothing."""
    upstream = read_upstream()
    stamp = PRISTINE / ".sha256"
    if stamp.exists() and stamp.read_text() == upstream["sha256"]:
        return
    archive = download(upstream, BUILD / "download")
    shutil.rmtree(PRISTINE, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary, tarfile.open(archive) as tar:
        tar.extractall(temporary, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        (unpacked,) = Path(temporary).iterdir()
        (unpacked / upstream["tree"] / ".git").unlink(missing_ok=True)  # points to a repository that is not there
        (unpacked / ".sha256").write_text(upstream["sha256"])
        unpacked.rename(PRISTINE)


def touched(patch: Path) -> list[str]:
    """Return the files that a patch changes, relative to the tree."""
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), flags=re.MULTILINE)


def plain_environment(folder: Path) -> dict[str, str]:
    """Return the environment in which git is a plain patch tool in `folder`: paths mean what the patch says."""
    return {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent), "LC_ALL": "C"}


def git(*arguments: str, cwd: Path, ok: tuple[int, ...] = (0,)) -> str:
    """Run git as a plain patch tool."""
    environment = plain_environment(cwd)
    try:
        run = subprocess.run(["git", *arguments], cwd=cwd, env=environment, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise TreeError("git is missing: install it (Debian and Ubuntu: apt-get install git)") from None
    if run.returncode not in ok:
        raise TreeError(run.stderr.strip() or f"git {arguments[0]} failed")
    return run.stdout


def copy_file(name: str, source: Path, target: Path) -> None:
    """Make target/name equal to source/name (absent where it is absent there), leaving equal files untouched."""
    here, there = source / name, target / name
    if not here.exists():
        there.unlink(missing_ok=True)
    elif not there.exists() or here.read_bytes() != there.read_bytes():
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(here, there)


def apply_patch(patch: Path, folder: Path) -> None:
    """Apply one patch in `folder`."""
    try:
        git("apply", "--whitespace=nowarn", str(patch), cwd=folder)
    except TreeError as error:
        version = read_upstream()["version"]
        raise TreeError(
            f"patches/{patch.name} does not apply to {version} after the patches before it:\n{error}\n"
            "mend the patch, or edit build/src/llama.cpp and run `make refresh-patches`"
        ) from None


def pristine_tree() -> Path:
    """Return the folder of the unpatched llama.cpp."""
    return PRISTINE / read_upstream()["tree"]


def apply() -> None:
    """Bring build/src/llama.cpp to pristine + series; only files whose content differs are written."""
    pristine, patches = pristine_tree(), series()
    before = set(APPLIED.read_text().split()) if APPLIED.exists() else set()
    files = sorted({name for patch in patches for name in touched(patch)})
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        scratch = Path(temporary) / "tree"
        scratch.mkdir()
        for name in files:
            copy_file(name, pristine, scratch)
        for patch in patches:
            apply_patch(patch, scratch)
        if not TREE.exists():
            TREE.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(pristine, Path(temporary) / "new", symlinks=True)
            (Path(temporary) / "new").rename(TREE)
        for name in sorted(before - set(files)):
            copy_file(name, pristine, TREE)
        for name in files:
            copy_file(name, scratch, TREE)
    APPLIED.write_text("\n".join(files) + "\n")


def refresh(into: str | None, added: list[str]) -> None:
    """Write the state of build/src/llama.cpp back into the patches.

    A file's edits go to the last patch of the series that touches it; `into` adds files that none touches.
    """
    patches = series() if into is None or (PATCHES / into).exists() else [*series(), PATCHES / into]
    names = {patch: touched(patch) if patch.exists() else [] for patch in patches}
    if into is not None:
        names[PATCHES / into] += [name for name in added if name not in names[PATCHES / into]]
    last = {name: patch for patch in patches for name in names[patch]}
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        a, b = Path(temporary) / "a", Path(temporary) / "b"
        for name in last:
            copy_file(name, pristine_tree(), a)
            copy_file(name, pristine_tree(), b)
        for patch in patches:
            if patch.exists():
                apply_patch(patch, b)
            for name in names[patch]:
                if last[name] == patch:
                    copy_file(name, TREE, b)
            write_patch(patch, git("diff", "--no-index", "--no-color", "a", "b", cwd=Path(temporary), ok=(0, 1)))
            for name in names[patch]:
                copy_file(name, b, a)
    if into is not None and into not in (PATCHES / "series").read_text():
        with (PATCHES / "series").open("a") as file:
            file.write(into + "\n")


def write_patch(patch: Path, diff: str) -> None:
    """Replace the diff of a patch, keeping the header that says why."""
    old = patch.read_text() if patch.exists() else f"{patch.stem}: say here why this change is needed.\n\n"
    header = old.split("diff --git ", 1)[0]
    text = header + re.sub(r"^(diff --git|---|\+\+\+) (.*)$", _strip_doubled_prefix, diff, flags=re.MULTILINE)
    text = re.sub(r"^index .*\n", "", text, flags=re.MULTILINE)
    if text != old:
        patch.write_text(text)
        print(f"refreshed patches/{patch.name}")


def _strip_doubled_prefix(match: re.Match[str]) -> str:
    return f"{match[1]} {match[2].replace('a/a/', 'a/').replace('b/b/', 'b/')}"


def main() -> int:
    """Command line; exit code 1 with one message when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=["fetch", "apply", "refresh"])
    parser.add_argument("--into", metavar="PATCH", help="refresh: the patch that takes FILEs")
    parser.add_argument("files", nargs="*", metavar="FILE", help="refresh: files of the tree that no patch touches yet")
    arguments = parser.parse_intermixed_args()
    try:
        if arguments.action == "fetch":
            fetch()
        elif arguments.action == "apply":
            fetch()
            apply()
        else:
            refresh(arguments.into, arguments.files)
    except (TreeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
