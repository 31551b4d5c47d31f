"""Proves that the notebooks of examples/ run from the first cell to the last, and hold no output of somebody's machine."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def cells_of(path):
    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["own_branch", "your_logs"]


@pytest.mark.parametrize(
    "path", [pytest.param(each, marks=pytest.mark.long) for each in NOTEBOOKS], ids=lambda path: path.stem
)
def test_it_runs(path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for number, cell in enumerate(cells_of(path), 1):
        exec(compile(cell, f"{path.name}, cell {number}", "exec"), names)
    capfd.readouterr()
    if path.stem == "your_logs":
        assert names["found"]["auc"] > 0.6 and (tmp_path / "runs/first/report.html").is_file()
    else:
        assert "auc/gated" in names["run"].evaluate()
        pages = list((tmp_path / "studies").rglob("*.html"))
        assert pages and "w/o gated" in pages[0].read_text()
