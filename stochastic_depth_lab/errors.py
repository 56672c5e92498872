"""The errors that a user can fix: each is one line that says what was found, what was expected, and the remedy."""


class LabError(ValueError):
    r"""An error that the command line shows as it is.

    Example:
        >>> print(LabError("no readable file (what zlib says\nin two lines)"))
        no readable file (what zlib says in two lines)
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class DataError(LabError):
    """Images that are missing, damaged or in another format."""


class RunError(LabError):
    """A run folder that cannot be used."""


class CheckpointError(LabError):
    """A checkpoint or a file of weights that cannot be used."""


class ReportError(LabError):
    """Runs that cannot be reported on."""
