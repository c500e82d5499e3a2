"""What is said to users, and the error that means: they can mend this."""

import sys

__all__ = ["STANDARD_OUTPUT", "InputError", "say", "shown", "tell"]

STANDARD_OUTPUT = "standard output"  # the file that an error of `say` names

SHOWN = 60  # characters of a wrong value that an error repeats


class InputError(ValueError):
    """Wrong input. The message is one line: what was wrong, what was found, what to do. The command prints it."""


def say(text: str) -> None:
    """Print to standard output, at once, so that an error is one of this line."""
    try:
        print(text, flush=True)
    except OSError as error:
        error.filename = STANDARD_OUTPUT
        raise


def tell(text: str) -> None:
    """Print a line to standard error. That nobody can read it ends nothing."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass


def shown(value: object) -> str:
    """A wrong value as an error repeats it: in quotes where it is text, and of a long one the beginning only."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python itself refuses to write the longest
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > SHOWN:
        return f"{value[:SHOWN]!r}... ({len(value)} characters)"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
