"""Every package resolves for tools that only read files: through committed links, without a build."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = {
    "typings/blockffn": "python_bindings",
    "python_bindings/convert": "convert",
    "python_bindings/eval": "eval",
    "python_bindings/training": "training",
}


@pytest.mark.parametrize(("link", "folder"), LINKS.items())
def test_links(link: str, folder: str) -> None:
    path = ROOT / link
    assert path.is_symlink() and not path.readlink().is_absolute() and path.resolve() == ROOT / folder


def test_every_package_is_installed_and_linked() -> None:
    """A folder of modules that pyproject.toml does not list would work here and be missing from the wheel."""
    folders = {
        path.parent.relative_to(ROOT)
        for top in ("python_bindings", "convert", "eval", "training")
        for path in (ROOT / top).rglob("*.py")
        if "build" not in path.parts and not any(parent.is_symlink() for parent in path.parents)
    }
    names = {
        ".".join(("blockffn", *folder.parts)).replace("blockffn.python_bindings", "blockffn") for folder in folders
    }
    listed = (ROOT / "pyproject.toml").read_text()
    assert {name for name in names if f'    "{name}",\n' not in listed} == set()
    for name in names:
        assert (ROOT / "typings" / Path(*name.split("."))).is_dir()
