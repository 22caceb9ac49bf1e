"""Apply the patches to another release of the upstream package and say, patch by patch, what does not fit.

    python patches/check_upstream.py 0.3.35      # make check-upstream VERSION=0.3.35

Each hunk is tried on its own, after what fits of the patches before it, so that one that does not fit hides none of the
others. Exit code 1 if one does not, or if the release cannot be had. Nothing is built: a patch that applies may still
not compile.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import tree


def unpack(archive: Path, folder: str, names: set[str], target: Path) -> None:
    """Unpack the files `names` of the llama.cpp inside the package, which lies in `folder` there."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2].removeprefix(f"{folder}/")
            file = tar.extractfile(member) if name in names else None
            if file is not None:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(file.read())


def try_patch(patch: Path, folder: Path) -> list[str]:
    """Apply what fits of a patch in `folder`; return the files that are missing and the hunks that do not fit."""
    problems, exclude = [], []
    text = patch.read_text()
    for name in tree.touched(patch):
        if f"--- a/{name}\n" in text and not (folder / name).exists():
            problems.append(f"{name}: no such file")
            exclude.append(f"--exclude={name}")
    command = ["git", "apply", "--reject", "--whitespace=nowarn", *exclude, str(patch)]
    run = subprocess.run(command, cwd=folder, env=tree.plain_environment(folder), text=True, capture_output=True)
    failed = re.findall(r"^error: patch failed: (\S+):(\d+)$", run.stderr, flags=re.MULTILINE)
    problems += [f"{name}: hunk at line {line}" for name, line in failed]
    if run.returncode != 0 and not failed:
        problems.append(run.stderr.strip())
    return problems


def check(version: str) -> int:
    """Print one line per patch, and its problems; return how many patches have some."""
    pinned = tree.read_upstream()
    upstream = pinned if version == pinned["version"] else {**pinned, "version": version}
    if upstream is not pinned:
        del upstream["sha256"]
    archive = tree.download(upstream, tree.BUILD / "download")
    patches = tree.series()
    bad = 0
    with tempfile.TemporaryDirectory(dir=tree.BUILD) as temporary:
        folder = Path(temporary)
        unpack(archive, upstream["tree"], {name for patch in patches for name in tree.touched(patch)}, folder)
        for patch in patches:
            problems = try_patch(patch, folder)
            hunks = len(re.findall(r"^@@", patch.read_text(), flags=re.MULTILINE))
            bad += bool(problems)
            print(f"{patch.name}: {'does not fit' if problems else 'applies'} ({hunks} hunks)")
            print("".join(f"    {problem}\n" for problem in problems), end="")
    print(f"{upstream['package']} {version}: {len(patches) - bad} of {len(patches)} patches apply")
    return bad


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("version", help="of the package in patches/UPSTREAM, for example 0.3.35")
    try:
        return int(check(parser.parse_args().version) > 0)
    except (tree.TreeError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
