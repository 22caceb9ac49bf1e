"""patches/0001: the AMX tile configuration reaches memory before ldtilecfg reads it.

Runs on any x86-64 machine: the patched function is compiled for a CPU with AMX and its instructions are read; executing
it needs AMX. tests/test_programs.py evaluates Q4_0 batches under the native profile, which does execute it there.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "build/src/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"


def tile_config_function() -> str:
    """Return the struct and the function of the patched source as a file that compiles alone."""
    text = SOURCE.read_text()
    struct = re.search(r"struct tile_config_t\s*\{.*?\n\};", text, flags=re.DOTALL)
    function = re.search(r"inline void ggml_tile_config_init\(void\) \{.*?\n\}", text, flags=re.DOTALL)
    assert struct and function, "upstream moved the tile configuration: look at patches/0001 again"
    body = function[0].replace("inline void", "void").replace("static thread_local bool done", "bool done")
    return f"#include <immintrin.h>\n#include <cstdint>\n{struct[0]}\n{body}\n"


def stores_before_load(source: str, tmp_path: Path) -> int:
    """Compile for Sapphire Rapids and count the bytes stored to the stack before ldtilecfg."""
    (tmp_path / "config.cpp").write_text(source)
    flags = ["-O3", "-march=sapphirerapids", "-std=c++17", "-S", "-o", "-"]
    run = subprocess.run(["g++", *flags, str(tmp_path / "config.cpp")], capture_output=True, text=True, check=True)
    before = run.stdout.split("ldtilecfg")[0]
    return len(re.findall(r"\tv?mov\w*\s+[%$][^,]+, -?\d*\(%r[sb]p\)", before))


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64")
def test_all_64_bytes_are_stored(tmp_path: Path) -> None:
    patched = tile_config_function()
    assert "__asm__" in patched
    plain = re.sub(r"#if defined\(__GNUC__\).*?#endif\n", "", patched, flags=re.DOTALL)
    with_barrier, without = stores_before_load(patched, tmp_path), stores_before_load(plain, tmp_path)
    assert with_barrier >= 4  # zeroes, first bytes, rows, columns
    assert without <= with_barrier  # a compiler without the bug keeps them all anyway
