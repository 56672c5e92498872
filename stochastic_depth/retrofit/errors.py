"""Reasons why a block's code cannot be gated. Users see the messages in warnings and errors that name the block."""


class TraceError(Exception):
    """A block's forward cannot be recorded; the message says why."""


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
