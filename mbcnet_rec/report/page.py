"""Pages of text, tables and pictures: a self-contained HTML file, or Markdown with its pictures beside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from mbcnet_rec.logs.metrics_log import write_whole

LONGEST_UNBROKEN = 60  # characters of a table's cell that stays on one line


@dataclass(frozen=True)
class Heading:
    """Opens a section."""

    kind: ClassVar = "heading"
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    text: str


@dataclass(frozen=True)
class Table:
    """A table; `best` is the index of the row to mark, -1 for none."""

    kind: ClassVar = "table"
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: int = -1


@dataclass(frozen=True)
class Picture:
    """A PNG; `name` is its file's name without the ending, `caption` says what it shows and what to see in it."""

    kind: ClassVar = "picture"
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

    kind: ClassVar = "code"
    text: str
    title: str = ""


Block = Heading | Text | Table | Picture | Code


def to_html(title: str, lead: str, blocks: Sequence[Block]) -> str:
    """Write a page that needs no other file."""
    page = _templates().get_template("page.html")
    return page.render(title=title, lead=lead, blocks=blocks, longest_unbroken=LONGEST_UNBROKEN)


def to_markdown(title: str, lead: str, blocks: Sequence[Block], pictures: str) -> str:
    """Write Markdown whose pictures lie in the folder `pictures` beside it."""
    page = _templates().get_template("page.md")
    return page.render(title=title, lead=lead, blocks=blocks, pictures=pictures)


def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("mbcnet_rec.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def write_report(
    folder: Path, name: str, title: str, lead: str, blocks: Sequence[Block]
) -> tuple[Path, Path]:
    """Write NAME.html, NAME.md and NAME_pictures/*.png; return the first two."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = folder / f"{name}_pictures"
    for block in blocks:
        if isinstance(block, Picture):
            pictures.mkdir(exist_ok=True)
            (pictures / f"{block.name}.png").write_bytes(block.png)
    page, text = folder / f"{name}.html", folder / f"{name}.md"
    write_whole(page, to_html(title, lead, blocks))
    write_whole(text, to_markdown(title, lead, blocks, pictures.name))
    return page, text
