"""The search for the native library, and the order of imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from blockffn import library
from blockffn.errors import BlockffnError


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a snippet in a fresh interpreter."""
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_import_is_cheap_and_needs_no_numpy_torch_or_library() -> None:
    code = "import sys, blockffn; print([m for m in ('torch', 'numpy', 'llama_cpp', 'gguf') if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_python_layer_does_not_import_torch(stock_model: Path) -> None:
    code = f"""
import sys, blockffn, blockffn.cli, blockffn.quantize, blockffn.inspection
llm = blockffn.Llama({str(stock_model)!r}, n_threads=1)
llm.create_completion("a", max_tokens=1)
print('torch' in sys.modules)
"""
    assert python(code).stdout.strip() == "False"


def test_lazy_names() -> None:
    code = """
import blockffn
print(blockffn.Llama.__module__, blockffn.convert.__name__, blockffn.NGramDrafter.__name__)
print("Llama" in dir(blockffn))
try:
    blockffn.Lama
except AttributeError as error:
    print(error)
"""
    lines = python(code).stdout.splitlines()
    assert lines[0] == "blockffn.llama blockffn.convert NGramDrafter"
    assert lines[1] == "True"
    assert "no attribute 'Lama'" in lines[2] and "Llama" in lines[2]


def test_directory_variable_is_the_only_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKFFN_LIB_DIR", str(tmp_path))
    assert library.candidates() == [tmp_path]
    with pytest.raises(BlockffnError, match=r"libllama\.so not found in .*BLOCKFFN_LIB_DIR"):
        library.directory()
    (tmp_path / "libllama.so").touch()
    assert library.directory() == tmp_path.resolve()


@pytest.mark.parametrize("profile", ["native", "portable", "other"])
def test_profile_comes_before_the_defaults(profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLOCKFFN_LIB_DIR", raising=False)
    monkeypatch.setenv("BUILD_PROFILE", profile)
    monkeypatch.setattr(library, "PACKAGE", tmp_path / "python_bindings")
    names = [path.parent.name for path in library.candidates()[1:]]
    assert names[0] == profile and set(names) >= {"native", "portable"} and len(names) == len(set(names))


def test_nothing_built_says_make_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLOCKFFN_LIB_DIR", raising=False)
    monkeypatch.setattr(library, "PACKAGE", tmp_path / "python_bindings")
    library.prepare()  # importing blockffn must work before anything is built: the converter needs no library
    with pytest.raises(BlockffnError, match="make setup"):
        library.directory()


def test_unknown_program_lists_the_known_ones() -> None:
    with pytest.raises(BlockffnError, match=r"llama-quantise: program not found.*llama-quantize"):
        library.program("llama-quantise")
    assert library.program("llama-quantize").is_file()


def test_binding_imported_first_with_another_library() -> None:
    """A copy of our library elsewhere stands for a stock one."""
    code = """
import os, shutil, sys, tempfile, pathlib
from blockffn.library import directory
ours = directory()
for name in list(sys.modules):
    if name.startswith("blockffn"):
        del sys.modules[name]
with tempfile.TemporaryDirectory() as other:
    for path in ours.glob("*.so*"):
        shutil.copy(path, other)
    os.environ["LLAMA_CPP_LIB_PATH"] = other
    import llama_cpp
    try:
        import blockffn
    except Exception as error:
        print(type(error).__name__, error)
"""
    result = python(code)
    assert result.stdout.startswith("BlockffnError llama_cpp was imported before blockffn"), result.stderr
    assert "put `import blockffn` before" in result.stdout


def test_binding_imported_first_without_a_library_then_blockffn() -> None:
    """The binding alone has no library; blockffn still works after its failed import."""
    code = """
import os
os.environ.pop("LLAMA_CPP_LIB_PATH", None)
try:
    import llama_cpp
except Exception as error:
    print(type(error).__name__)
import blockffn
print(blockffn.Llama.__name__)
"""
    assert python(code).stdout.split() == ["FileNotFoundError", "Llama"]


def test_low_level_ggml_module_is_our_libggml() -> None:
    code = """
import blockffn.library, pathlib
blockffn.library.load()
import llama_cpp._ggml as ggml
print(pathlib.Path(ggml.libggml._name).parent == blockffn.library.directory())
maps = open("/proc/self/maps").read().splitlines()
print(len({line.split()[-1] for line in maps if "libggml.so" in line}))
"""
    assert python(code).stdout.split() == ["True", "1"]  # mapped once, not a second copy under another name


def test_unloadable_library(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").write_bytes(b"not a library")
    code = "import blockffn\ntry:\n    blockffn.Llama\nexcept blockffn.BlockffnError as error:\n    print(error)"
    assert "cannot be loaded" in python(code, BLOCKFFN_LIB_DIR=str(tmp_path)).stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, library.SPIN_ROUNDS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_spin_rounds_are_the_users_choice(given: dict[str, str], expected: str) -> None:
    code = "import os, blockffn; print(os.environ.get('GOMP_SPINCOUNT'))"
    clean = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}
    script = "import os\nfor n in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'):\n    os.environ[n] or os.environ.pop(n)\n"
    assert python(script + code, **{**clean, **given}).stdout.strip() == expected


@pytest.mark.parametrize(("system", "name"), [("darwin", "macOS"), ("win32", "Windows"), ("freebsd14", "freebsd14")])
def test_other_systems_are_refused_by_name(system: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.sys, "platform", system)
    for call in (library.directory, library.load, lambda: library.program("llama-server")):
        with pytest.raises(BlockffnError, match=f"running models on {name} is not supported: expected Linux"):
            call()
