"""Which extra of the distribution brings a package that is not needed to run a model.

>>> from blockffn.extras import missing
>>> print(missing(ModuleNotFoundError("No module named 'torch'", name="torch")))
this needs the Python package torch, which is not installed: pip install 'blockffn[train]'
"""

from __future__ import annotations

from blockffn.errors import BlockffnError

EXTRAS = {
    "huggingface_hub": "hub",
    "lm_eval": "lm-eval",
    "matplotlib": "train",
    "ray": "ray",
    "prometheus_client": "server",
    "pydantic": "server",
    "safetensors": "convert",
    "sentencepiece": "convert",
    "starlette": "server",
    "tomli": "train",
    "torch": "train",
    "uvicorn": "server",
}


def missing(error: ModuleNotFoundError) -> BlockffnError | None:
    """Return the message for a package of one of the extras; None for any other module."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    cure = f"pip install 'blockffn[{EXTRAS[package]}]'"
    return BlockffnError(f"this needs the Python package {package}, which is not installed: {cure}")
