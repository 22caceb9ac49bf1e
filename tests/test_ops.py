"""The ops: oracle tests and batch invariance (C++ programs), test-backend-ops, and the benchmark's output."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from blockffn import library
from blockffn.cli import main
from blockffn.eval.bench import ops as bench_ops


def program(name: str) -> Path:
    """Return a program of the build that the library comes from."""
    found = library.find()
    assert found is not None, "the patched library is not built: run `make build`"
    assert (found / name).is_file(), f"{found / name} is missing: run `make build`"
    return found / name


def run(name: str, *arguments: str) -> str:
    """Run a test program and return what it printed."""
    passive = os.environ | {"OMP_WAIT_POLICY": "passive"}  # many small graphs: threads that spin cost more than they do
    result = subprocess.run(
        [program(name), *arguments], capture_output=True, text=True, timeout=600, check=False, env=passive
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    return result.stdout


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("test-node-barrier", 40),
        ("test-flash-attn", 3500),
        ("test-relu-router", 1200),
        ("test-union-ffn", 3900),
        ("test-token-tiles", 3700),
    ],
)
def test_against_oracle(name: str, checks: int) -> None:
    """Every check of the program passes, and none was lost."""
    found = re.search(r"(\d+) checks, 0 failed", run(name))
    assert found
    assert int(found[1]) > checks


def test_upstream_ops_keep_their_numbers() -> None:
    """Ours come last: an RPC server of the same release without our patches reads the numbers of all others right."""
    build = Path(__file__).resolve().parent.parent / "build"
    trees = (build / "pristine" / "vendor" / "llama.cpp", build / "src" / "llama.cpp")
    if not all(tree.is_dir() for tree in trees):
        pytest.skip("upstream's source is not unpacked: run `make setup`")
    headers = [(tree / "ggml/include/ggml.h").read_text() for tree in trees]
    enums = [re.findall(r"^\s+(GGML_OP_\w+)", header, re.MULTILINE) for header in headers]
    stock, ours = (names[: names.index("GGML_OP_COUNT")] for names in enums)
    assert ours == [*stock, "GGML_OP_RELU_ROUTER", "GGML_OP_UNION_FFN"] and len(stock) == 101


def test_batch_invariance() -> None:
    """Exact mode gives a token what it gets alone: all types of weights, buffers and caches. Without it many differ."""
    printed = run("test-batch-invariance")
    found = re.search(r"(\d+) checks, 0 failed; without the flag (\d+) depend on the batch", printed)
    assert found, printed
    assert int(found[1]) > 200
    assert int(found[2]) > 20


@pytest.mark.parametrize(
    ("op", "selection"), [("RELU_ROUTER", "."), ("UNION_FFN", "."), ("FLASH_ATTN_EXT", "hsk=(65|320),.*kv=113,")]
)
def test_backend_ops(op: str, selection: str) -> None:
    """The CPU agrees with its reference in upstream's own test."""
    printed = run("test-backend-ops", "test", "-b", "CPU", "-o", op, "-p", selection)
    assert re.search(r"[1-9]\d*/[1-9]\d* tests passed", printed)
    assert "FAIL" not in printed


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--types", "q9_9", "unknown type q9_9"),
        ("--active", "1.5", "--active is a share"),
        ("--active", "x", "a share"),
        ("--subject", "tea", "unknown subject tea"),
    ],
)
def test_bad_option_is_refused(option: str, value: str, message: str) -> None:
    """The benchmark names what it does not know."""
    result = subprocess.run([program("bench-ops"), option, value], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr


def row(n: int) -> bench_ops.Row:
    """A row as the program prints it."""
    return {
        "shape": "1.2B",
        "type": "q4_0",
        "n": n,
        "threads": 2,
        "ours_ms": 0.5 * n,
        "dense_ms": 2.0 * n,
        "dense_buffer": "CPU_REPACK",
        "mul_mat_id_ms": 1.0 * n,
        "mul_mat_id_buffer": "CPU",
        "spread": 0.01,
        "union_share": 0.2,
        "active_share": 0.2,
        "bandwidth_gbs": 25.0,
        "fraction_of_limit": 0.7,
    }


def test_table_shows_ratios() -> None:
    """Ratios are stock time over ours."""
    line = bench_ops.table_line(row(1))
    assert "4.00x" in line
    assert "2.00x" in line
    assert line.count("|") == bench_ops.header().splitlines()[0].count("|")


def test_other_subjects(tmp_path: Path) -> None:
    """Attention and the products around the FFN stand beside the best of their stock paths."""
    common = {"n": 4, "threads": 2, "ours_ms": 0.5, "spread": 0.02, "bandwidth_gbs": 30.0, "fraction_of_limit": 0.8}
    attention = {"subject": "attention", "shape": "MLA", "past": 128, "flash_ms": 3.0, "products_ms": 2.0, **common}
    head = {"subject": "head", "shape": "output", "type": "q6_K", "stock_ms": 1.0, "stock_buffer": "CPU", **common}
    lines = [bench_ops.table_line(found) for found in (attention, head)]
    assert "| f16 | 128 | 4 | 0.500 | 2.000 (products) | 4.00x |" in lines[0]
    assert "| q6_K | - | 4 | 0.500 | 1.000 (CPU) | 2.00x |" in lines[1]
    columns = bench_ops.header("products").splitlines()[0].count("|")
    assert all(line.count("|") == columns for line in lines)
    place = {"profile": "portable", "cpu": "some CPU", "commit": "abc", "date": "2026-01-01"}
    bench_ops.write_files({"environment": place, "rows": [head]}, tmp_path, "products")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "bench-products-portable.json",
        "bench-products-portable.md",
    ]


def test_files(tmp_path: Path) -> None:
    """Table, figures and plot are written under the profile's name."""
    place = {"profile": "portable", "cpu": "some CPU", "commit": "abc", "date": "2026-01-01"}
    bench_ops.write_files({"environment": place, "rows": [row(1), row(8)]}, tmp_path)
    assert json.loads((tmp_path / "bench-ops-portable.json").read_text())["rows"][1]["n"] == 8
    assert (tmp_path / "bench-ops-portable.md").read_text().count("1.2B") == 2
    assert (tmp_path / "bench-ops-portable.png").stat().st_size > 1000


def test_missing_program_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A build folder without the program gives one clear message and exit code 1."""
    assert main(["bench", "ops", "--build", str(tmp_path)]) == 1
    assert "make build" in capsys.readouterr().err
