"""`~` in a path that a user gives: the one rule for configs, --set and arguments, since no shell replaces it in most of them."""

import os

from data.errors import InputError


def home_path(text: str, source: str) -> str:
    """Replace `~` or `~user` at the beginning, but no variable, by the home folder; InputError, naming the `source`, if nobody knows it."""
    if not text.startswith("~") or os.path.lexists(text):
        return text
    found = os.path.expanduser(text)
    if found == text:
        raise InputError(
            f"{source} = {text!r}: nobody knows the home folder of {text.partition('/')[0]}; write the path in full, or ./{text} for a name "
            "that begins with ~"
        )
    return found
