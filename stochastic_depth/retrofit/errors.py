"""Why a block's code cannot be gated. Users see the messages, in warnings and errors that name the block."""


class TraceError(Exception):
    """Why a block's forward cannot be recorded."""


class StoredError(TraceError):
    """The forward leaves something behind on its block, which a recording of it would not."""


class CutError(Exception):
    """Why a branch cannot be separated from the rest of its block."""


class SidesError(CutError):
    """What a branch computes beside its output is used outside of it."""


class UnusedError(CutError):
    """Nothing uses what the branch gives."""


class ProofError(Exception):
    """Rewritten code does something else than the block's own."""
