"""Bounds of config values: declared beside each field, checked in one place, with one form of message.

    @dataclass(frozen=True)
    class CrossConfig(Bounded):
        num_layers: int = bounded(2, at_least=1)
        dropout: float = bounded(0.0, at_least=0, below=1)
        hidden: tuple[int, ...] = bounded((128, 64), at_least=1, min_length=1)    # bounds of each value of the list
        kind: Literal["low_rank_mixture", "full_rank"] = "low_rank_mixture"      # checked too

A class with checks of its own extends `__post_init__` and calls `super().__post_init__()` first.
"""

import dataclasses
import functools
import typing
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError  # relative: an exported artifact carries this file

KEY = "bounds"  # in the metadata of a dataclass field


@dataclass(frozen=True)
class Bounds:
    """The values that a field may take, within limits if there are any; of a list, each of its values."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    min_length: int = 0  # values that a list must hold
    wanted: str = ""  # the bounds in words, where the plain form ("1 or more") says too little
    fix: str = ""  # how to fix it, where "raise it" or "lower it" says too little

    def allow(self, number: float) -> bool:
        """Whether a number lies inside; NaN lies outside of any bound."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def in_words(self) -> str:
        """The bounds for a message."""
        limits = {
            "{:,} or more": self.at_least, "more than {:,}": self.above,
            "at most {:,}": self.at_most, "less than {:,}": self.below,
        }  # fmt: skip
        return " and ".join(words.format(limit) for words, limit in limits.items() if limit is not None)

    def problem(self, name: str, value: Any) -> str:
        """Return `name = value: wanted ...; how to fix it`, or an empty string. Text and None have no bounds."""
        if isinstance(value, (tuple, list)):
            if len(value) >= self.min_length and all(map(self.allow, value)):
                return ""
            wanted = self.wanted or (f"{self.min_length or 'any number of'} or more values, each {self.in_words()}")
            return f"{name} = {list(value)}: wanted {wanted}; {self.fix or 'change the list'}"
        if value is None or isinstance(value, str) or self.allow(value):
            return ""
        least = self.at_least if self.at_least is not None else self.above
        is_low = least is not None and value <= least
        fix = self.fix or ("raise it" if is_low else "lower it" if value == value else "change it")
        return f"{name} = {value}: wanted {self.wanted or self.in_words()}; {fix}"


def bounded(default: Any, **bounds: Any) -> Any:
    """Declare a dataclass field whose value has bounds: those of `Bounds`. The default itself is not checked here."""
    return dataclasses.field(default=default, metadata={KEY: Bounds(**bounds)})


def bounds_problem(config: Any, skip: Container[str] = ()) -> str:
    """Return what is wrong with the first field of a dataclass, `skip` left out, that breaks its bounds, or an empty string."""
    for field in dataclasses.fields(config):
        if KEY in field.metadata and field.name not in skip:
            problem = field.metadata[KEY].problem(field.name, getattr(config, field.name))
            if problem:
                return problem
    return ""


@functools.cache
def _choices(cls: type) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(cls)
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Literal}


class Bounded:
    """A dataclass that checks the bounds and the Literals of its fields when it is made."""

    def __post_init__(self) -> None:
        """Refuse a value out of its bounds or choices: the InputError names field, value, what was wanted and how to fix it."""
        for name, choices in _choices(type(self)).items():
            value = getattr(self, name)
            if value not in choices:
                wanted = ", ".join(map(repr, choices))
                raise InputError(f"{name} = {value!r}: wanted one of {wanted}; change the value")
        problem = bounds_problem(self)
        if problem:
            raise InputError(problem)
