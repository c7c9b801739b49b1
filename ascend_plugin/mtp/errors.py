"""The errors of this package: their messages are for users."""


class MTPError(Exception):
    """Training or evaluation is not possible; the message says why and what to do."""
