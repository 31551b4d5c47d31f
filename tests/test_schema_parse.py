"""Proves that TOML tables become the dataclasses they name, or one line that says where, what, and what was wanted."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from data.errors import InputError
from data.schema.bounds import Bounded, bounded
from data.schema.parse import parse_dataclass, read_toml, to_toml_value


@dataclass(frozen=True)
class Inner(Bounded):
    rate: float = bounded(0.5, above=0, at_most=1)
    layers: tuple[int, ...] = bounded((4,), at_least=1, min_length=1)
    count: int | None = bounded(None, at_least=2, wanted="two or more", fix="use 2")
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    steps: int
    mode: Literal["a", "b"] = "a"
    flag: bool = False
    name: str = "n"
    sizes: tuple[int, ...] = ()
    parts: dict[str, Inner] = field(default_factory=dict)
    inner: Inner = Inner()
    either: float | Literal["fit"] = 0.0
    maybe: int | None = None


def parse(**table):
    return parse_dataclass(Outer, table, "run.toml")


def test_every_type_is_read_and_written_back():
    parts, inner = {"x": {"rate": 1}}, {"rate": 0.25}
    outer = parse(steps=3, mode="b", flag=True, sizes=[1, 2], parts=parts, inner=inner, either="fit", maybe=4)
    assert outer == Outer(3, "b", True, "n", (1, 2), {"x": Inner(1.0)}, Inner(0.25), "fit", 4)
    assert isinstance(outer.parts["x"].rate, float)
    assert parse(**to_toml_value(outer)) == outer
    assert "maybe" not in to_toml_value(Outer(1))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"steps": 1.0}, "run.toml: steps = 1.0: wanted an integer"),
        ({"steps": True}, "steps = True: wanted an integer"),
        ({"steps": 2**63}, "steps = 9223372036854775808: wanted an integer of 64 bits"),
        ({"flag": 1}, "flag = 1: wanted true or false"),
        ({"name": 1}, "name = 1: wanted a string"),
        ({"name": "a\0"}, r"name = 'a\\x00': wanted a string without NUL"),
        ({"mode": "c"}, "mode = 'c': wanted one of 'a', 'b'"),
        ({"sizes": 3}, "sizes = 3: wanted a list of an integer"),
        ({"sizes": [1, "x"]}, r"sizes\[1\] = 'x': wanted an integer"),
        ({"parts": {"x": {"rat": 1}}}, r"parts\.x\.rat is not a known key; did you mean 'rate'"),
        ({"inner": {"rate": 2.0}}, r"inner\.rate = 2.0: wanted more than 0 and at most 1; lower it"),
        ({"inner": {"rate": 0}}, r"inner\.rate = 0.0: wanted more than 0 and at most 1; raise it"),
        ({"inner": {"layers": []}}, r"layers = \[\]: wanted 1 or more values, each 1 or more; change the"),
        ({"inner": {"count": 1}}, r"inner\.count = 1: wanted two or more; use 2"),
        ({"inner": {"rate": float("nan")}}, "inner.rate = nan: wanted a number"),
        ({"inner": 4}, r"inner = 4: wanted a table of keys; write \[inner\]"),
        ({"either": "fits"}, "either = 'fits': wanted a number or one of 'fit'"),
        ({"setps": 1}, "setps is not a known key; did you mean 'steps'"),
        ({"zzz": 1}, "zzz is not a known key; remove it, or use one of: either"),
        ({"two\nlines": 3}, "two lines is not a known key"),
    ],
)
def test_refused(table, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(**{"steps": 1} | table)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(InputError, match=r"run\.toml: steps is missing; wanted an integer; add it"):
        parse()


def test_bounds_hold_for_objects_made_in_python_too():
    assert Inner().layers == (4,) and Inner(count=2).count == 2
    with pytest.raises(InputError, match="mode = 'c': wanted one of 'a', 'b'; change the value"):
        Inner(mode="c")
    with pytest.raises(InputError, match="rate = nan: wanted more than 0 and at most 1; change it"):
        Inner(rate=float("nan"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; check the path"),
        (b'a = 1\nb = "\n', "not valid TOML: .*line 2"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        ("folder", "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "run.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: {message}"):
        read_toml(path)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfname = 'clicks'\n")
    assert read_toml(path) == {"name": "clicks"}
