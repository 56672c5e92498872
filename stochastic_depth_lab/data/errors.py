"""The one error that reading data raises for what its user can mend."""


class DataError(ValueError):
    """Data that is missing, damaged or of another form: one line with what was found, what is expected, the remedy."""
