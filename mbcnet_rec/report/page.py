"""Reports: blocks of text, tables and pictures -> one self-contained HTML page, and Markdown with pictures beside it."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mbcnet_rec.logs.metrics_log import write_whole

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #f4f4f1; margin: 0; }
main { max-width: 1280px; margin: 0 auto; padding: 2rem 1.5rem 4rem; background: #fff; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p.lead { color: #555; margin-top: 0; }
div.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: #555; border-bottom: 2px solid #ccc; }
th, td { padding: .3rem .55rem; white-space: nowrap; } td { text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
tr.best td { background: #fdf3ec; font-weight: 600; }
td.text { text-align: left; white-space: normal; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: 13.5px; }
pre { background: #f4f4f1; padding: .7rem 1rem; overflow-x: auto; font-size: 12.5px; line-height: 1.4; }
details summary { cursor: pointer; color: #0072b2; }
"""


LONG = 60  # characters of a cell that may break its line


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
    """A table.

    Attributes:
        header: of the columns.
        rows: of cells.
        best: index of the row to mark; -1: none.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: int = -1


@dataclass(frozen=True)
class Picture:
    """A PNG. name: of its file beside the Markdown, without an ending; caption: what it shows, and what to see in it."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Code:
    """A command or a file. title: of what unfolds; "": shown at once."""

    text: str
    title: str = ""


Block = Heading | Text | Table | Picture | Code


def to_html(title: str, lead: str, blocks: Sequence[Block]) -> str:
    """Write a page that needs no other file."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style>\n</head>\n<body><main>\n'
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n</main></body>\n</html>\n'
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Table(header, rows, best):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = "\n".join(_html_row(row, marked=index == best) for index, row in enumerate(rows))
            return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{lines}\n</table></div>'
        case Picture(name, png, caption):
            data = base64.b64encode(png).decode()
            alt = html.escape(f"{name}: {caption}", quote=True)
            return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        case Code(text, title):
            pre = f"<pre>{html.escape(text)}</pre>"
            return f"<details><summary>{html.escape(title)}</summary>{pre}</details>" if title else pre


def _html_row(cells: Sequence[str], marked: bool) -> str:
    mark = ' class="best"' if marked else ""
    text = ' class="text"'
    inner = "".join(f"<td{text if len(cell) > LONG else ''}>{html.escape(cell)}</td>" for cell in cells)
    return f"<tr{mark}>{inner}</tr>"


def to_markdown(title: str, lead: str, blocks: Sequence[Block], pictures: str) -> str:
    """Write Markdown whose pictures lie in the folder `pictures` beside it."""
    return "\n\n".join([f"# {title}", lead, *(_markdown(block, pictures) for block in blocks)]) + "\n"


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text):
            return text
        case Table(header, rows, best):
            lines = [_markdown_row(header), "|".join(["", "---", *["---:"] * (len(header) - 1), ""])]
            lines += [
                _markdown_row([f"**{cell}**" if index == best and cell else cell for cell in row])
                for index, row in enumerate(rows)
            ]
            return "\n".join(lines)
        case Picture(name, _, caption):
            return f"![{caption}]({pictures}/{name}.png)\n\n*{caption}*"
        case Code(text, title):
            return (f"{title}:\n\n" if title else "") + f"```\n{text.rstrip()}\n```"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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
