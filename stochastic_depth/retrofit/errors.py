"""Reasons why a block's code cannot be gated. Users see the messages in warnings and errors that name the block."""

from collections.abc import Collection
from typing import Any

from torch import nn


class TraceError(Exception):
    """A block's forward cannot be recorded; the message says why."""


class GivenCodeError(TraceError):
    """A block gives code of its own, a module or a function, to a child to call.

    Attributes:
        value: the module or function.
        path: path of the child, empty if none is called.
    """

    def __init__(self, value: Any, path: str = "") -> None:
        what = "module" if isinstance(value, nn.Module) else "function"
        super().__init__(f"the block passes a {what} as an argument")
        self.value, self.path = value, path


class StoredError(TraceError):
    """The forward stores something on its block, which a recording would not do."""


class CutError(Exception):
    """A branch cannot be separated from the rest of its block; the message says why."""


class SidesError(CutError):
    """Values that a branch computes besides its output are used outside it."""


class UnusedError(CutError):
    """Nothing uses the branch's output."""


class ProofError(Exception):
    """Rewritten code computes something else than the block's own."""


def why_it_failed(error: Exception, names: Collection[str]) -> str:
    """Why code that uses these names cannot be recorded, if it fails with symbols or while it is recorded."""
    if isinstance(error, (TypeError, AttributeError)) and not _PACKS.isdisjoint(names):
        return "it packs sequences of different lengths, which only a child, such as one around the RNN, may do"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


_PACKS = {"pack_padded_sequence", "pack_sequence", "pad_packed_sequence", "PackedSequence"}
