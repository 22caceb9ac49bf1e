"""The one exception that tells a user what is wrong with the input or the environment.

The command line prints it as ``error: ...`` and exits with code 1; from Python it is an ordinary exception:

    >>> from blockffn.errors import BlockffnError
    >>> raise BlockffnError("config.json: num_experts: expected a positive integer, found 0; fix the checkpoint")
    Traceback (most recent call last):
    blockffn.errors.BlockffnError: config.json: num_experts: expected a positive integer, found 0; fix the checkpoint
"""

from __future__ import annotations


class BlockffnError(Exception):
    """Bad input or environment. The message says what, where, expected, found, and the cure."""
