"""The one exception that means "the user can fix this", and how another library's error is quoted in its text."""

from collections.abc import Sequence


class InputError(ValueError):
    """A mistake in what the user gave us: a config, a schema, a plan, a file, a value.

    Its text is one line that names the thing, the value found, what was wanted and how to fix it. The command line prints
    that line and exits with code 2; a traceback is for our own mistakes.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a value in it may hold line breaks


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def some_of(phrases: Sequence[str], most: int, between: str = "; ") -> str:
    """The first of many phrases, and how many more there are."""
    more = [f"and {len(phrases) - most} more"] if len(phrases) > most else []
    return between.join([*phrases[:most], *more])
