"""patches/tree.py on a small made-up upstream: fetch, apply, refresh, and every message a user can meet."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "patches" / "tree.py"
SOURCE = "".join(f"line {i}\n" for i in range(40))
PATCH = """first: change line 3

diff --git a/src/one.c b/src/one.c
--- a/src/one.c
+++ b/src/one.c
@@ -1,5 +1,5 @@
 line 0
 line 1
-line 2
+line two
 line 3
 line 4
"""
SECOND = """second: change line 20

diff --git a/src/one.c b/src/one.c
--- a/src/one.c
+++ b/src/one.c
@@ -19,5 +19,5 @@ line 17
 line 18
 line 19
-line 20
+line twenty
 line 21
 line 22
"""


@pytest.fixture
def tree(tmp_path: Path) -> ModuleType:
    """The script, looking at a repository in tmp_path with an archive of two files and one patch."""
    spec = importlib.util.spec_from_file_location("tree_under_test", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROOT = tmp_path
    module.PATCHES = tmp_path / "patches"
    module.BUILD = tmp_path / "build"
    module.PRISTINE = module.BUILD / "pristine"
    module.TREE = module.BUILD / "src" / "llama.cpp"
    module.APPLIED = module.BUILD / "src" / "patched-files"
    (module.BUILD / "download").mkdir(parents=True)
    module.PATCHES.mkdir()
    archive = module.BUILD / "download" / "made_up-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("src/one.c", "src/two.c"):
            data = SOURCE.encode()
            info = tarfile.TarInfo(f"made_up-1.0/vendor/x/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    write_upstream(module, module.sha256(archive))
    (module.PATCHES / "0001-first.patch").write_text(PATCH)
    (module.PATCHES / "series").write_text("0001-first.patch\n")
    return module


def write_upstream(module: ModuleType, sha256: str) -> None:
    text = f"package = made-up\nversion = 1.0\nsha256 = {sha256}\ntree = vendor/x\n"
    (module.PATCHES / "UPSTREAM").write_text(text)


def test_apply_patches_the_tree_and_a_second_call_touches_nothing(tree: ModuleType) -> None:
    tree.fetch()
    tree.apply()
    one, two = tree.TREE / "src/one.c", tree.TREE / "src/two.c"
    assert "line two" in one.read_text() and two.read_text() == SOURCE
    times = one.stat().st_mtime_ns, two.stat().st_mtime_ns
    tree.fetch()
    tree.apply()
    assert times == (one.stat().st_mtime_ns, two.stat().st_mtime_ns)


def test_changed_and_removed_patches_apply_cleanly(tree: ModuleType) -> None:
    tree.fetch()
    tree.apply()
    (tree.PATCHES / "0001-first.patch").write_text(PATCH.replace("line two", "line deux"))
    tree.apply()
    assert "line deux" in (tree.TREE / "src/one.c").read_text()
    (tree.PATCHES / "0001-first.patch").unlink()
    (tree.PATCHES / "series").write_text("")
    tree.apply()
    assert (tree.TREE / "src/one.c").read_text() == SOURCE


def test_refresh_gives_an_edit_to_the_last_patch_of_its_file(tree: ModuleType) -> None:
    (tree.PATCHES / "0002-second.patch").write_text(SECOND)
    (tree.PATCHES / "series").write_text("0001-first.patch\n0002-second.patch\n")
    tree.fetch()
    tree.apply()
    one = tree.TREE / "src/one.c"
    one.write_text(one.read_text().replace("line 30", "line thirty"))
    tree.refresh(None, [])
    first = (tree.PATCHES / "0001-first.patch").read_text()
    second = (tree.PATCHES / "0002-second.patch").read_text()
    assert first.startswith("first: change line 3\n") and "+line two" in first and "thirty" not in first
    assert second.startswith("second: change line 20\n") and "+line thirty" in second and "+line twenty" in second
    tree.apply()
    assert "line thirty" in one.read_text() and "line two\n" in one.read_text()


def test_refresh_takes_a_new_file_into_a_new_patch(tree: ModuleType) -> None:
    tree.fetch()
    tree.apply()
    (tree.TREE / "src/two.c").write_text(SOURCE.replace("line 7", "line seven"))
    tree.refresh("0002-new.patch", ["src/two.c"])
    assert "+line seven" in (tree.PATCHES / "0002-new.patch").read_text()
    assert tree.series()[-1].name == "0002-new.patch"


def test_wrong_hash(tree: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tree.BUILD / "download" / "made_up-1.0.tar.gz"

    def serve_damaged(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / archive.name).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0)

    archive.write_bytes(b"damaged on disk")
    monkeypatch.setattr(tree.subprocess, "run", serve_damaged)
    with pytest.raises(tree.TreeError, match=r"made_up-1.0.tar.gz: expected sha256 .* found .*do not use it"):
        tree.fetch()
    assert not tree.PRISTINE.exists() and not archive.exists()


def test_download_fails(tree: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree.BUILD / "download" / "made_up-1.0.tar.gz").unlink()
    monkeypatch.setattr(tree.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    with pytest.raises(tree.TreeError, match=r"could not download made-up==1\.0"):
        tree.fetch()


def test_patch_that_does_not_apply_leaves_the_tree_alone(tree: ModuleType) -> None:
    tree.fetch()
    tree.apply()
    before = (tree.TREE / "src/one.c").read_text()
    (tree.PATCHES / "0001-first.patch").write_text(PATCH.replace("-line 2", "-line 2000"))
    with pytest.raises(tree.TreeError, match=r"patches/0001-first.patch does not apply(.|\n)*make refresh-patches"):
        tree.apply()
    assert (tree.TREE / "src/one.c").read_text() == before


@pytest.mark.parametrize(
    ("listed", "message"),
    [("0001-first.patch\n0009-gone.patch\n", "no such file in patches"), ("", "does not list 0001-first.patch")],
)
def test_series_and_files_must_agree(tree: ModuleType, listed: str, message: str) -> None:
    (tree.PATCHES / "series").write_text(listed)
    with pytest.raises(tree.TreeError, match=message):
        tree.series()


def test_missing_git_is_one_message(tree: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree.fetch()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(tree.TreeError, match="git is missing"):
        tree.apply()


def test_command_line_prints_one_line_and_exits_1(tmp_path: Path) -> None:
    copy = tmp_path / "patches" / "tree.py"
    copy.parent.mkdir()
    copy.write_text(SCRIPT.read_text())
    run = subprocess.run([sys.executable, str(copy), "apply"], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and "Traceback" not in run.stderr


def test_missing_compiler_is_one_message(tmp_path: Path) -> None:
    """The Makefile's own check, run with a PATH that holds a shell and nothing that compiles."""
    root = SCRIPT.parent.parent
    for tool in ("sh", "mkdir", "touch", "tail", "test", "nproc"):
        found = subprocess.run(["which", tool], capture_output=True, text=True, check=False).stdout.strip()
        if found:
            (tmp_path / tool).symlink_to(found)
    make = subprocess.run(["which", "make"], capture_output=True, text=True, check=True).stdout.strip()
    out = tmp_path / "out"
    run = subprocess.run(
        [
            make,
            "-C",
            str(root),
            f"OUT={out}",
            f"{out}/build.ninja",
            "--assume-old=tree",
            "--assume-old=.venv/.installed",
        ],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0 and "no C++17 compiler" in run.stdout + run.stderr


@pytest.mark.parametrize("patch", sorted(SCRIPT.parent.glob("*.patch")), ids=lambda path: path.stem)
def test_every_patch_says_why_it_is_needed_and_whether_upstream_gets_it(patch: Path) -> None:
    header = patch.read_text().partition("diff --git ")[0]
    subject, _, reason = header.partition("\n\n")
    assert 10 < len(subject) < 120 and "Needed " in reason and "Upstream: " in reason


@pytest.fixture
def check_upstream(tree: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """patches/check_upstream.py on the made-up upstream."""
    monkeypatch.setitem(sys.modules, "tree", tree)
    spec = importlib.util.spec_from_file_location("check_under_test", SCRIPT.with_name("check_upstream.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_release(tree: ModuleType, version: str, files: dict[str, str]) -> None:
    with tarfile.open(tree.BUILD / "download" / f"made_up-{version}.tar.gz", "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"made_up-{version}/vendor/x/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))


def test_other_release_is_judged_hunk_by_hunk(
    tree: ModuleType, check_upstream: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hunk that does not fit hides neither the others of its patch nor the patches after it."""
    more = SECOND.partition("@@")
    (tree.PATCHES / "0001-first.patch").write_text(PATCH + more[1] + more[2])
    (tree.PATCHES / "0002-third.patch").write_text(SECOND.replace("one.c", "two.c"))
    (tree.PATCHES / "0003-gone.patch").write_text(PATCH.replace("one.c", "three.c"))
    (tree.PATCHES / "series").write_text("0001-first.patch\n0002-third.patch\n0003-gone.patch\n")
    write_release(tree, "1.1", {"src/one.c": SOURCE.replace("line 1\n", "other\n"), "src/two.c": "new line\n" + SOURCE})
    assert check_upstream.check("1.1") == 2
    assert capsys.readouterr().out.splitlines() == [
        "0001-first.patch: does not fit (2 hunks)",
        "    src/one.c: hunk at line 1",
        "0002-third.patch: applies (1 hunks)",
        "0003-gone.patch: does not fit (1 hunks)",
        "    src/three.c: no such file",
        "made-up 1.1: 1 of 3 patches apply",
    ]
    assert not tree.TREE.exists()


def test_the_pinned_release_applies(tree: ModuleType, check_upstream: ModuleType) -> None:
    assert check_upstream.check("1.0") == 0


def test_release_that_cannot_be_had(
    tree: ModuleType, check_upstream: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tree.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    monkeypatch.setattr(sys, "argv", ["check_upstream.py", "9.9"])
    assert check_upstream.main() == 1
    assert "could not download made-up==9.9" in capsys.readouterr().err
