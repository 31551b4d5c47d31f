"""The one check of a configured value's range."""

from typing import Any

from data.errors import InputError


def require(owner: Any, keys: str, good: Any, wanted: str) -> None:
    """Check attributes of a config.

    Args:
        owner: has the attributes.
        keys: names of attributes, with blanks between.
        good: value -> whether it is allowed.
        wanted: which values are allowed, and how to repair another.

    Raises:
        InputError: a value is not allowed.
    """
    for key in keys.split():
        value = getattr(owner, key)
        if not good(value):
            raise InputError(f"{key} = {list(value) if isinstance(value, tuple) else value}: wanted {wanted}")
