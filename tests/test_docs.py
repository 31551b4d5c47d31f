"""Proves that what docs/ and README print is right: schemas and configs load, commands are ours, links lead somewhere."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from data.schema import parse_schema
from data.schema.feature import Encoding, Kind, Transform
from data.schema.parse import parse_dataclass
from mbcnet_rec.cli import build_parser
from mbcnet_rec.config import DataConfig
from sharding.plan.constraints import ShardingConfig

DOCS = Path(__file__).parents[1] / "docs"
ROOT = DOCS.parent
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])


def blocks(page, *languages):
    """The text of the page's fenced blocks of some languages."""
    fences = page.read_text().split("```")[1::2]
    parts = [fence.partition("\n") for fence in fences]
    return [text for language, _, text in parts if language in languages]


def commands(page):
    """Ours, without what a shell does around them."""
    text = "\n".join(blocks(page, "", "console")).replace("\\\n", " ")
    lines = [re.split(r" [#|>]", line)[0] for line in text.splitlines()]
    return [line for line in lines if line.startswith("mbcnet ") and "..." not in line]


def test_the_pages_print_commands():
    assert sum(len(commands(page)) for page in PAGES) > 40


def test_a_schema_of_every_kind_loads():
    schemas = [tomllib.loads(block) for block in blocks(DOCS / "data.md", "toml") if "[fields]" in block]
    (schema,) = [parse_schema(table, "docs/data.md", Path()) for table in schemas]
    assert {feature.kind for feature in schema.features} == set(Kind.__args__)
    assert {feature.transform for feature in schema.features} == set(Transform.__args__)
    assert {feature.encoding for feature in schema.features} == set(Encoding.__args__)
    assert {feature.on_invalid for feature in schema.features} == {"error", "null", "modulo"}
    assert schema.groups and schema.group_column and schema.time_column


def test_options_load():
    tables = [tomllib.loads(block) for block in blocks(DOCS / "data.md", "toml") if "[data]" in block]
    _, config = (parse_dataclass(DataConfig, table["data"], "docs/data.md") for table in tables)
    assert config.test_where == ("ds >= last 7",)
    (table,) = (tomllib.loads(block) for block in blocks(DOCS / "planning.md", "toml"))
    assert parse_dataclass(ShardingConfig, table, "docs/planning.md").tables["item"].cache_ratio == 0.1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_ours(page):
    for command in commands(page):
        assert build_parser().parse_args(shlex.split(command)[1:]).run, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_architecture_page_is_fresh(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    architecture = importlib.import_module("architecture")
    assert (DOCS / "architecture.md").read_text() == architecture.page(), "run python docs/architecture.py"
    assert not [line for line in architecture.page().splitlines() if line.endswith("|  |")], "no docstring"


def test_the_site_has_every_page():
    names = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(names) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
