"""Link the packages under the names they are installed as, for mypy, which cannot follow an editable install.

python tests/mypy_tree.py    # build/mypy/blockffn/{...python_bindings..., convert, eval, training}
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "mypy"


def link() -> None:
    """Make the links anew; a link costs nothing, so there is no state to check."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "blockffn"
    package.mkdir(parents=True)
    for entry in (ROOT / "python_bindings").iterdir():
        if entry.suffix == ".py" or (entry / "__init__.py").exists():
            (package / entry.name).symlink_to(entry)
    for name in ("convert", "eval", "training"):
        (package / name).symlink_to(ROOT / name)


if __name__ == "__main__":
    link()
