"""Pages of text, tables and pictures, each a self-contained HTML file."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

LONGEST_UNBROKEN = 60  # characters of a table's cell that stays on one line


@dataclass(frozen=True)
class Heading:
    """Opens a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; `best` is the index of the row to mark, -1 for none."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: int = -1


@dataclass(frozen=True)
class Picture:
    """A PNG; `caption` says what it shows and what to see in it."""

    name: str
    png: bytes
    caption: str

    @property
    def base64(self) -> str:
        """The PNG as text for a data URI."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Code:
    """A command or a file: folded under `title` if it has one."""

    text: str
    title: str = ""


Block = Heading | Text | Table | Picture | Code


def text_table(table: Table) -> str:
    """A table for the terminal, which is Markdown too."""
    rows = [table.header, *(tuple(cell.replace("\n", "; ") for cell in row) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _rendered(template: str, **values: object) -> str:
    templates = Environment(
        loader=PackageLoader("mbcnet_rec.report"), autoescape=template.endswith(".html"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters |= {"shown": shown, "mb": lambda size: f"{size / 1e6:.1f}"}
    return templates.get_template(template).render(values)


def shown(value: float | None, form: str = ".4f") -> str:
    """A metric with four digits, a dash where it is not defined."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def with_half(value: float, high: float, form: str = ".4f") -> str:
    """A metric with half its 95 % interval, which ends at `high`."""
    return shown(value, form) + (f" +-{high - value:{form.lstrip('+')}}" if math.isfinite(high) else "")


def to_text(template: str, **values: object) -> str:
    """One of templates/ for the terminal, without its last line's end."""
    return _rendered(template, **values).removesuffix("\n")


def to_html(title: str, lead: str, blocks: Sequence[Block]) -> str:
    """Write a page that needs no other file."""
    kinds = [(type(block).__name__, block) for block in blocks]
    return _rendered("page.html", title=title, lead=lead, blocks=kinds, longest_unbroken=LONGEST_UNBROKEN)
