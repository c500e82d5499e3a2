"""The error that means: the user can mend this."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Wrong input. The message is one line: what was wrong, what was found, what to do. The command prints it."""
