"""Any name that a file and a terminal can hold names a field, whatever torch's modules call their own; the rest is refused where it is read."""

import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import train
from torch import nn

from data.errors import InputError
from data.schema import parse_schema
from data.schema.names import ATTRIBUTES, file_stems, is_module_name, own_table
from data.schema.schema import toml_key, toml_text
from mbcnet_rec.cli import main

NAMES = (
    "user.id", "type", "items", "keys", "training", "T_destination", "__class__", "a@b", "a", "x=y", "sp ace", "Type", "cafe\u0301",
    "caf\u00e9", 'quo"te', "\U0001f600", "a" * 300,
)  # fmt: skip


def parse(fields="", tables="", groups="g = ['x']"):
    text = (
        f"name = 's'\nlabel = 'l'\n[tables]\n{tables}\n[fields]\nx = {{kind = 'numeric'}}\n{fields}\n[groups]\n{groups}"
    )
    return parse_schema(tomllib.loads(text), "s.toml", Path())


def test_the_names_that_torch_keeps_for_itself_are_known():
    modules = nn.ModuleDict()
    assert {name for name in dir(modules) if hasattr(modules, name)} == ATTRIBUTES
    for name in NAMES:
        modules.add_module(own_table(name), nn.Identity())  # raises KeyError where a name is taken
    assert own_table("user.id") == "user%2Eid" and own_table("type") == "%type"
    assert own_table("a@b") == "a@b" and own_table("Type") == "Type"  # what torch takes keeps its name
    assert not is_module_name("a.b") and not is_module_name("keys") and is_module_name("%keys")


def test_names_of_files_are_told_apart_by_every_disk():
    stems = file_stems(["City", "city", "cafe\u0301", "caf\u00e9", "x" * 2_000, "x" * 1_999])
    assert len({stem.lower() for stem in stems.values()}) == 6
    assert stems["City"] == "City" and stems["city"].startswith("city-")
    assert all(len(f"{stem}.parquet".encode()) <= 255 for stem in stems.values())


KEYED = "{kind = 'categorical', num_embeddings = 9, embedding_dim = 4}"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"tables": "'a.b' = {num_embeddings = 9, embedding_dim = 4}"}, r"tables: 'a\.b': wanted a name without '\.'"),
        ({"tables": "keys = {num_embeddings = 9, embedding_dim = 4}"}, "tables: 'keys': wanted a name without"),
        ({"groups": "'a/b' = ['x']"}, "groups: 'a/b': wanted a name without '/'"),
        ({"groups": "'@wide' = ['x']"}, "groups.@wide: the model has a group of this name itself"),
        ({"fields": "'a\\tb' = {kind = 'numeric'}".replace("'a\\tb'", '"a\\tb"')}, "give its column by `column`"),
        ({"fields": f"type = {KEYED}\n'%type' = {KEYED}"}, "field 'type' has a table '%type' too; rename one"),
    ],
)  # fmt: skip
def test_names_that_are_refused(parts, words):
    with pytest.raises(InputError, match=words):
        parse(**parts)


def test_fields_of_any_name_are_fitted_trained_and_planned(tmp_path, capfd):
    columns = {name: [(row * (3 + place)) % 11 for row in range(96)] for place, name in enumerate(NAMES)}
    pq.write_table(pa.table({"l": [row % 2 for row in range(96)], **columns}), tmp_path / "a.parquet")
    sizes = ("encoding = 'hash', num_embeddings = 9", "encoding = 'vocabulary', vocabulary = 'fit'")
    fields = "\n".join(
        f"{toml_key(name)} = {{kind = 'categorical', {sizes[place % 2]}, embedding_dim = 4}}"
        for place, name in enumerate(NAMES)
    )
    groups = "\n".join(f"{toml_key(name)} = {toml_text(NAMES[:3])}" for name in NAMES)
    (tmp_path / "s.toml").write_text(f"name = 's'\nlabel = 'l'\n[fields]\n{fields}\n[groups]\n{groups}\n")
    file, fitted = str(tmp_path / "a.parquet"), tmp_path / "fitted"
    assert main(["schema", "fit", str(tmp_path / "s.toml"), file, "-o", str(fitted)]) == 0
    assert main(["data", "check", file, "--schema", str(fitted / "schema.toml"), "--full"]) == 0
    (tmp_path / "run.toml").write_text(f"""name = "r"
schema = "{fitted}/schema.toml"
[data]
train = ["{file}"]
batch_size = 48
[model.mbcnet]
branches = ["efgc", "wide"]
branch_dim = 8
top = [8]
[model.mbcnet.efgc]
hidden = [8]
[train]
device = "cpu"
out = "{tmp_path}/run"
""")
    assert train(tmp_path / "run.toml") == 0, capfd.readouterr().err
    assert {name for name in (tmp_path / "run" / "plan.json").read_text().split('"') if "%" in name} >= {
        "user%2Eid",
        "wide_user%2Eid",
        "%type",
    }
