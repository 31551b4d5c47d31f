"""docs/clusters.md: what it prints is understood as printed, as far as a machine without a cluster goes."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
from tiny_run import REPOSITORY, make_run
from torchx.specs.finder import get_component

from mbcnet_rec import cli

PAGE = (REPOSITORY / "docs/clusters.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("mbcnet launch")])
def test_launch_lines(line, tmp_path, monkeypatch, capsys):
    """Nothing is sent: what would be sent is printed instead."""
    monkeypatch.chdir(make_run(tmp_path))
    tiny = Path("tiny.toml").read_text().replace("lanes = 12", "lanes = 128").replace("= 48", "= 128")
    Path("run.toml").write_text(tiny)
    words = shlex.split(line.partition(" > ")[0])[1:]
    prints = "--dry-run" in words or "--print" in words
    assert cli.main(words if prints else [*words, "--dry-run"]) == 0
    assert capsys.readouterr().out


def test_components_take_what_is_printed():
    for line in LINES:
        words = shlex.split(line)
        if words[:2] == ["torchx", "run"]:
            component = get_component(next(word for word in words if word.startswith("mbcnet.")))
            known = inspect.signature(component.fn).parameters
            given = words[words.index(component.name) + 1 :]
            assert all(word.lstrip("-") in known for word in given if word.startswith("-")), line
