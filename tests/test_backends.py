"""Which CPU backend is taken where a build has several.

BLOCKFFN_LIB_DIR=build/dispatch/bin pytest tests/test_backends.py     # part of `make test-wheels`
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blockffn import backends, library
from blockffn.errors import BlockffnError

VARIANTS = backends.variants(library.directory())
several = pytest.mark.skipif(not VARIANTS, reason="this build has a single CPU backend")
CPUS = {  # what qemu can stand for: the backend with the most instructions that such a processor has
    "qemu64": "x64", "Nehalem": "sse42", "Denverton": "sse42", "SandyBridge": "sandybridge", "IvyBridge": "ivybridge",
    "Opteron_G5": "piledriver", "Haswell": "haswell", "EPYC": "haswell",
}  # fmt: skip


class Ggml:
    """libggml that has loaded nothing, and notes what it is asked for."""

    def __init__(self, loads: bool = True) -> None:
        self.asked: list[Path] = []

        def one(path: bytes) -> int | None:
            self.asked.append(Path(os.fsdecode(path)))
            return 1 if loads else None

        def best(folder: bytes) -> None:
            self.asked.append(Path(os.fsdecode(folder)))

        self.ggml_backend_load, self.ggml_backend_load_all_from_path = one, best


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("libggml-cpu-haswell.so", "libggml-cpu-zen4.so", "libggml-cpu.so", "libggml.so", "libllama.so"):
        (tmp_path / name).touch()
    return tmp_path


def test_backends_by_name(folder: Path) -> None:
    assert backends.variants(folder) == {name: folder / f"libggml-cpu-{name}.so" for name in ("haswell", "zen4")}


def test_the_best_is_loaded_unless_one_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(backends, "variant", lambda: "zen4")
    best, named = Ggml(), Ggml()
    for _ in range(2):  # loading is done once
        backends.load(best, folder)
    monkeypatch.setenv(backends.VARIABLE, "haswell")
    backends.load(named, folder)
    assert best.asked == [folder] and named.asked == [folder / "libggml-cpu-haswell.so"]


def test_a_single_backend_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    ggml = Ggml()
    backends.load(ggml, tmp_path)
    assert ggml.asked == []
    monkeypatch.setenv(backends.VARIABLE, "haswell")
    with pytest.raises(BlockffnError, match="expected none: this build has a single CPU backend, found 'haswell'"):
        backends.load(Ggml(), tmp_path)


def test_what_cannot_be_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, "zen5")
    with pytest.raises(BlockffnError, match="expected one of haswell, zen4, found 'zen5'"):
        backends.load(Ggml(), folder)
    monkeypatch.setenv(backends.VARIABLE, "zen4")
    with pytest.raises(BlockffnError, match="this processor cannot run 'zen4'"):
        backends.load(Ggml(loads=False), folder)
    monkeypatch.delenv(backends.VARIABLE)
    monkeypatch.setattr(backends, "variant", lambda: None)
    with pytest.raises(BlockffnError, match=r"no CPU backend in .* runs on this processor; found haswell, zen4"):
        backends.load(Ggml(), folder)


def system(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blockffn", "inspect", "--system"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_inspect_says_what_was_taken() -> None:
    found = system()
    assert found.returncode == 0, found.stderr
    assert re.search(r"^libraries +" + re.escape(str(library.directory())), found.stdout, re.MULTILINE)
    expected = r"\w+" if VARIANTS else "None"
    assert re.search(rf"^cpu_variant +{expected}$", found.stdout, re.MULTILINE)


@several
def test_a_named_backend_runs_models(stock_model: Path) -> None:
    code = f"""
import blockffn
llm = blockffn.Llama({str(stock_model)!r}, n_threads=1, exact=True)
print(blockffn.backends.variant(), llm.create_completion("abc", max_tokens=8, temperature=0.0)["choices"][0]["text"])
"""
    command = [sys.executable, "-c", code]
    for name in ("x64", "sse42", "sandybridge", "haswell"):
        env = {**os.environ, backends.VARIABLE: name}
        found = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert found.returncode == 0, found.stderr
        assert found.stdout.startswith(name)
    assert system(BLOCKFFN_CPU_VARIANT="sapphirerapids").returncode in (0, 1)  # a message, never a dead process


@several
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="no qemu-x86_64")
@pytest.mark.parametrize("cpu", CPUS)
def test_a_processor_takes_what_it_can_run(cpu: str, stock_model: Path) -> None:
    command = ["qemu-x86_64", "-cpu", cpu, str(library.program("llama-completion")), "-m", str(stock_model)]
    command += ["-p", "abc", "-n", "2", "-t", "1", "-c", "64", "--temp", "0", "-no-cnv", "-v"]
    found = subprocess.run(command, capture_output=True, timeout=300, check=False)
    log = found.stderr.decode(errors="replace")
    assert found.returncode == 0, log[-2000:]
    assert re.findall(r"loaded CPU backend from .*libggml-cpu-(\w+)\.so", log) == [CPUS[cpu]]
