"""Text files that appear whole or not at all.

>>> from blockffn.whole_file import write_text
>>> write_text(Path("table.md"), "| arm | loss |\\n")
"""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 beside `path`, then give it the name. Raises OSError where it fails, and leaves nothing."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
