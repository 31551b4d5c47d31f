"""Proves that a schema file either becomes a checked Schema or is refused in one line that names key, value and fix."""

import copy
import random
import string
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.schema import Schema, format_schema, parse_schema
from data.schema.feature import MAX_WIDTH, Feature

BASE = tomllib.loads("""
name = "shop"
label = "click"
group_column = "user"
time_column = "ts"
[tables]
item = { num_embeddings = 50, embedding_dim = 8 }
[fields]
user = { kind = "categorical", num_embeddings = 100, embedding_dim = 8, on_invalid = "modulo" }
city = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", min_count = 2, embedding_dim = 4 }
device = { kind = "categorical", encoding = "hash", num_embeddings = 1000, embedding_dim = 4 }
item = { kind = "categorical", table = "item", pooling = "mean" }
history = { kind = "multi_valued", table = "item", pooling = "mean", pooling_factor = 2.5, cardinality = 40 }
brands = { kind = "weighted_multi_valued", weights = "brand_w", num_embeddings = 9, embedding_dim = 4 }
price = { kind = "numeric", transform = "log1p" }
age = { kind = "numeric", transform = "bucketise", boundaries = [18.0, 30.0], num_embeddings = 4, embedding_dim = 4 }
score = { kind = "numeric", transform = "standardise", mean = "fit", std = 2.0 }
image = { kind = "vector", width = 16, projection = 8 }
[groups]
taste = ["user", "item", "image"]
money = ["price", "age"]
""")


def parse(change=None) -> Schema:
    table = copy.deepcopy(BASE)
    if change:
        change(table)
    return parse_schema(table, "shop.toml", Path())


def field(name, /, **entry):
    """A change that sets keys of one field; None removes a key."""

    def change(table):
        changed = table["fields"].get(name, {}) | entry
        table["fields"][name] = {key: value for key, value in changed.items() if value is not None}

    return change


def top(**entry):
    return lambda table: table.update(entry)


def test_every_kind_is_read():
    schema = parse()
    names = [[feature.name for feature in kind] for kind in (schema.sparse, schema.weighted, schema.dense)]
    sparse = ["user", "city", "device", "item", "age", "history"]
    assert names == [sparse, ["brands"], ["price", "score", "image"]]
    assert schema.table_of["item"] == schema.table_of["history"]
    assert schema.table_of["history"].feature_names == ("item", "history")
    assert schema.columns == (
        "click", "user", "city", "device", "item", "history", "brands", "brand_w", "price", "age", "score", "image",
    )  # fmt: skip
    # 8 + 4 + 4 + 2 * 8 + 4 + 4 of tables, 1 + 1 numbers, and the image's projection instead of its 16 columns
    assert schema.width == 40 + 2 + 8
    assert [feature.dense_width for feature in schema.dense] == [1, 1, 16]


REFUSED = {
    "no fields": (top(fields={}), r"\[fields\] is missing or empty"),
    "field is not a table": (lambda t: t["fields"].update(user=3), r"fields\.user = 3: wanted a table"),
    "unknown key of a field": (field("user", embeding_dim=8), r"fields\.user\.embeding_dim is not.*did you mean 'embedding_dim'"),
    "name inside a field": (field("user", name="x"), r"fields\.user\.name is not a known key"),
    "empty label": (top(label=""), "label = '': wanted the column"),
    "kind missing": (field("user", kind=None), r"fields\.user\.kind is missing; wanted one of 'categorical'"),
    "dim 30": (field("user", embedding_dim=30), "embedding_dim = 30: wanted a multiple of 4 .*; use 32"),
    "dim 2048": (field("user", embedding_dim=2048), "embedding_dim = 2048: .*; use 1024"),
    "no rows": (field("user", num_embeddings=None), r"num_embeddings = 0: wanted a number of rows"),
    "too many rows": (field("user", num_embeddings=2**41), r"num_embeddings = 2199023255552: wanted"),
    "one hashed row": (field("device", num_embeddings=1), "num_embeddings = 1: a hashed field needs at least 2"),
    "label as a field's column": (field("price", column="click"), "column = 'click': this column is the label"),
    "label as group": (top(group_column="click"), "group_column = 'click': this is the label"),
    "weighted mean": (field("brands", pooling="mean"), "pooling = 'mean': FBGEMM computes weighted bags as sums"),
    "weights of others": (field("history", weights="w"), "weights = 'w': only kind = \"weighted_multi_valued\" reads it"),
    "vocabulary missing": (field("city", vocabulary=None), "vocabulary is missing"),
    "min_count 0": (field("city", min_count=0), "min_count = 0: wanted 1 or more"),
    "encoding of a number": (field("price", encoding="hash"), "encoding = 'hash': only fields of ids"),
    "zch of uneven buckets": (
        field("device", encoding="zch", num_embeddings=1001),
        "num_embeddings = 1001: encoding = 'zch' wants a multiple of zch_buckets = 8, at least 16; use 1008",
    ),
    "zch buckets": (field("device", encoding="zch", zch_buckets=0), "zch_buckets = 0: wanted 1 to 1024"),
    "zch policy": (field("device", encoding="zch", eviction="fifo"), "eviction = 'fifo'.*distance_lfu"),
    "eviction of a hash": (field("device", eviction="lru"), "eviction = 'lru': only encoding = \"zch\" reads it"),
    "zch beside a hash": (field("item", encoding="zch"), "shares table 'item' with|num_embeddings = 50: encoding = 'zch'"),
    "modulo of a hash": (field("device", on_invalid="modulo"), "on_invalid = 'modulo': only encoding = 'ids'"),
    "unknown table": (field("item", table="items"), "table = 'items': no such table"),
    "size beside a table": (field("item", embedding_dim=8), "table = 'item': the table has its own sizes"),
    "table without a user": (
        lambda t: t["tables"].update(spare={"num_embeddings": 4, "embedding_dim": 4}),
        r"tables\.spare: no field uses this table",
    ),
    "pools otherwise": (field("item", pooling="sum"), "shares table 'item' with 'item' but pools otherwise"),
    "field named like a table": (
        field("item", table=None, num_embeddings=9, embedding_dim=4),
        r"fields\.item: \[tables\] has an entry of this name",
    ),
    "table of a number": (field("age", table="item", num_embeddings=None, embedding_dim=None), "a table of its own"),
    "dim of a number": (field("price", embedding_dim=4), "embedding_dim = 4: only fields with a table"),
    "std 0": (field("score", std=0.0), "std = 0.0: wanted a number above 0"),
    "width huge": (field("image", width=MAX_WIDTH + 1), "width = 65537: wanted the length"),
    "width of an id": (field("user", width=4), 'width = 4: only kind = "vector"'),
    "projection negative": (field("image", projection=-1), "projection = -1: wanted a number of columns"),
    "boundaries descend": (field("age", boundaries=[3.0, 1.0]), r"boundaries = \[3.0, 1.0\]: wanted ascending"),
    "rows of boundaries": (field("age", num_embeddings=3), "2 boundaries need 4 rows; set 4"),
    "one bucket": (field("age", boundaries="fit", num_buckets=1), "num_buckets = 1: wanted 2"),
    "boundaries unread": (field("price", boundaries=[1.0]), "only transform = \"bucketise\" reads it"),
    "cardinality negative": (field("user", cardinality=-1), "cardinality = -1: wanted 0 or more; remove the minus"),
    "unknown member": (top(groups={"g": ["user", "usr"]}), r"groups\.g: 'usr' is not a field"),
    "empty group": (top(groups={"g": []}), r"groups\.g = \[\]: wanted names"),
    "member twice": (top(groups={"g": ["user", "user"]}), r"groups\.g: a field is listed twice"),
    "group all": (top(groups={"all": ["user"]}), "the model has a group of this name itself"),
    "name with a slash": (lambda t: t["fields"].update({"../x": t["fields"].pop("price")}), r"'\.\./x': wanted a name without"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(case):
    change, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        parse(change)
    assert str(caught.value).startswith("shop.toml: ") and "\n" not in str(caught.value)


@settings(max_examples=100)
@given(st.text(min_size=1, max_size=8), st.text(max_size=8))
def test_any_name_is_written_so_that_it_reads_back(name, label):
    groups = {"g\x7f\U0001f600": [name]}
    table = {"name": name, "label": label, "fields": {name: {"kind": "numeric"}}, "groups": groups}
    try:
        schema = parse_schema(table, "t", Path())
        text = format_schema(schema).encode()
    except (InputError, UnicodeEncodeError):  # lone surrogates are no text
        return
    assert parse_schema(tomllib.loads(text.decode()), "t", Path()) == schema


def test_fingerprint_follows_meaning_and_not_hints():
    base = parse().fingerprint()
    assert parse(field("history", pooling_factor=9.0, cardinality=7)).fingerprint() == base
    assert parse(field("user", num_embeddings=101)).fingerprint() != base
    assert parse(top(groups={"taste": ["user"]})).fingerprint() != base
    assert parse(top(label="buy")).fingerprint() != base


VALUES = [0, 1, -1, 4, 6, 2**63, 1.5, float("nan"), float("inf"), True, "", "fit", "x", "../x", "hash", "ids", "vocabulary",
          "click", "item", "numeric", "vector", "bucketise", "mean", [], [1], [2.0, 1.0], ["user"], ["fit"], {}, {"a": 1}, None]  # fmt: skip


def containers(node):
    """The nested tables and lists, the outermost first."""
    if isinstance(node, dict | list):
        yield node
        for child in node.values() if isinstance(node, dict) else node:
            yield from containers(child)


def mutate(table, chooser: random.Random) -> None:
    """Set, add or remove one random entry of a nested table or list."""
    node, value = chooser.choice(list(containers(table))), copy.deepcopy(chooser.choice(VALUES))
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if keys and chooser.random() < 0.3:
        del node[chooser.choice(keys)]
    elif isinstance(node, dict):
        unknown = "".join(chooser.choices(string.printable, k=3))
        node[chooser.choice([*keys, *Feature.__dataclass_fields__, *BASE, unknown])] = value
    else:
        node.insert(chooser.randint(0, len(node)), value)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_schemas_are_valid_or_refused(seed):
    """150 mutated schemas a seed: never another exception, and what passes can be written and read back."""
    chooser = random.Random(seed)
    passed = refused = 0
    for _ in range(150):
        table = copy.deepcopy(BASE)
        for _ in range(chooser.choice((1, 1, 1, 2, 5))):
            mutate(table, chooser)
        try:
            schema = parse_schema(table, "fuzz", Path())
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        passed += 1
        assert parse_schema(tomllib.loads(format_schema(schema)), "again", Path()) == schema
        assert schema.width > 0 and schema.columns[0] == schema.label
    assert passed > 5 and refused > 50
