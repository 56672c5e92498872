"""The one error that reading data raises for what its user can mend."""


class DataError(ValueError):
    r"""Data that is missing, damaged or of another form: one line with what was found, what is expected, the remedy.

    Example:
        >>> print(DataError("no readable file (what zlib says\nin two lines)"))
        no readable file (what zlib says in two lines)
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))
