"""Finds the patched llama.cpp libraries and programs, and makes the stock llama_cpp binding load them.

`import blockffn` calls `prepare`, which only sets an environment variable; nothing is loaded until a model is.

    >>> from blockffn import library
    >>> library.program("llama-quantize").name
    'llama-quantize'

Search order of `directory`: the BLOCKFFN_LIB_DIR environment variable; blockffn/native/bin (inside a wheel);
build/$BUILD_PROFILE/bin, build/native/bin, build/portable/bin of the source checkout.
"""

from __future__ import annotations

import ctypes
import os
import sys
import types
from pathlib import Path

from blockffn import backends
from blockffn.errors import BlockffnError

PACKAGE = Path(__file__).resolve().parent
BINDING_VARIABLE = "LLAMA_CPP_LIB_PATH"  # read by llama_cpp once, when it is imported
OUR_VARIABLE = "BLOCKFFN_LIB_DIR"
LIBRARY = "libllama.so"
# How long a thread spins between two graphs before it sleeps. With the default of libgomp (300,000 rounds, about 10 ms)
# other processes that want the cores starve a model with one thread per core. 5000 rounds cost a model of 7 M weights
# 5 % on a quiet machine, and one of 1.2 B nothing.
SPIN_VARIABLE, SPIN_ROUNDS = "GOMP_SPINCOUNT", "5000"


def candidates() -> list[Path]:
    """Return the directories that may hold libllama.so, in search order (BLOCKFFN_LIB_DIR: only that one)."""
    chosen = os.environ.get(OUR_VARIABLE)
    if chosen:
        return [Path(chosen)]
    build = PACKAGE.parent / "build"
    profiles = [os.environ.get("BUILD_PROFILE") or "native", "native", "portable"]
    return [PACKAGE / "native" / "bin", *(build / profile / "bin" for profile in dict.fromkeys(profiles))]


def find() -> Path | None:
    """Return the first candidate that holds libllama.so, or None when nothing is built."""
    for directory in candidates():
        if (directory / LIBRARY).exists():
            return directory.resolve()
    return None


def check_platform() -> None:
    """Refuse systems whose libraries this module cannot name; BlockffnError says what is supported."""
    if not sys.platform.startswith("linux"):
        system = {"darwin": "macOS", "win32": "Windows"}.get(sys.platform, sys.platform)
        raise BlockffnError(
            f"running models on {system} is not supported: expected Linux (x86-64 is tested); on Windows use WSL 2, "
            "on macOS a Linux container"
        )


def directory() -> Path:
    """Return the directory of the native libraries; BlockffnError when there is none, or none for this system."""
    check_platform()
    found = find()
    if found is None:
        tried = ", ".join(str(path) for path in candidates())
        cure = f"correct {OUR_VARIABLE}" if os.environ.get(OUR_VARIABLE) else "run `make setup` in the source checkout"
        raise BlockffnError(f"{LIBRARY} not found in {tried}; {cure}")
    return found


def program(name: str) -> Path:
    """Return the path of a llama.cpp program of the patched tree, for example ``program("llama-server")``."""
    path = directory() / name
    if not path.is_file():
        known = sorted(p.name for p in path.parent.glob("llama-*") if p.is_file())
        raise BlockffnError(f"{path}: program not found; built are: {', '.join(known) or 'none'}; run `make setup`")
    return path


def prepare() -> None:
    """Point the llama_cpp binding at our library; BlockffnError when it was already imported with another one."""
    ours = find()
    if ours is None:
        return  # converting needs no library; whatever needs one says so through `directory`
    _check_loaded_binding(ours)
    os.environ[BINDING_VARIABLE] = str(ours)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(SPIN_VARIABLE, SPIN_ROUNDS)


def load() -> types.ModuleType:
    """Import llama_cpp on our library and return its low-level module (llama_cpp.llama_cpp)."""
    ours = directory()
    prepare()
    try:
        import llama_cpp
        import llama_cpp.llama_cpp as low_level
    except (OSError, RuntimeError) as error:
        raise BlockffnError(f"{ours / LIBRARY}: cannot be loaded: {error}; run `make clean setup`") from error
    _check_loaded_binding(ours)
    from blockffn import logs

    logs.install(low_level=low_level)
    backends.load(_ggml(llama_cpp, ours), ours)
    return low_level


def _check_loaded_binding(ours: Path) -> None:
    """Refuse a llama_cpp that was imported earlier with a library other than ours."""
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is None:
        return
    theirs = Path(loaded._lib._name).resolve().parent
    if theirs != ours:
        raise BlockffnError(
            f"llama_cpp was imported before blockffn and loaded the library in {theirs}, expected {ours}; "
            "put `import blockffn` before every import of llama_cpp"
        )


def _ggml(llama_cpp: types.ModuleType, ours: Path) -> ctypes.CDLL:
    """Return our libggml, and make it llama_cpp._ggml: the binding's own module looks only inside its package."""
    name = "llama_cpp._ggml"
    if name in sys.modules:
        return sys.modules[name].libggml
    module = types.ModuleType(name, "libggml of blockffn, in place of the binding's own module")
    # The name under which libllama itself loaded it, or a second copy with its own state would be mapped.
    versioned = sorted(ours.glob("libggml.so.[0-9]*"), key=lambda path: len(path.name))
    path = versioned[0] if versioned else ours / "libggml.so"
    setattr(module, "libggml_base_path", ours)  # noqa: B010
    setattr(module, "libggml", ctypes.CDLL(str(path)))  # noqa: B010
    sys.modules[name] = module
    setattr(llama_cpp, "_ggml", module)  # noqa: B010
    return module.libggml
