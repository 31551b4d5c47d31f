"""Proves that `schema show --data` counts users, items, samples, clicks and density as Table 2 does: of real data, of ids of every type, of too many."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_data import printed_by

from data.profile import count
from data.schema import parse_schema

SHARED = Path(__file__).parents[2] / "shared" / "datasets/movielens_latest_small"
SCHEMA = """
name = "s"
label = "click"
group_column = "user"
[fields]
user = { kind = "categorical", encoding = "hash", num_embeddings = 9, embedding_dim = 4 }
thing = { kind = "categorical", column = "item", encoding = "hash", num_embeddings = 9, embedding_dim = 8 }
tags = { kind = "multi_valued", encoding = "hash", num_embeddings = 9, embedding_dim = 4 }
price = { kind = "numeric" }
"""


def figures(text):
    """The figures that were printed, without the columns behind them."""
    return {line[:16].strip(): line[16:] for line in text.split(":\n")[1].splitlines()}


@pytest.fixture
def log(tmp_path):
    """Ids are integers one day and text the next, with nulls; 7 rows, 3 users, 4 items, 3 clicks."""
    days = (([1, 1, 2, None], [10, 11, 10, 10], [1, 0, 1, 0]), (["2", "1", "3"], ["11", None, "x"], [0, 0, 1]))
    for day, (user, item, click) in enumerate(days):
        table = pa.table(
            {"user": user, "item": item, "click": click, "tags": [["a"]] * len(user), "price": [0.5] * len(user)}
        )
        pq.write_table(table, tmp_path / f"{day}.parquet", row_group_size=2)
    (tmp_path / "schema.toml").write_text(SCHEMA)
    return tmp_path


def test_figures_of_table_2(log):
    code, out, err = printed_by("schema", "show", log / "schema.toml", "--data", log, "--item", "thing")
    assert code == 0, err
    assert figures(out) == {
        "users": "3 (user)", "items": "3 (thing)", "feature fields": "4", "feature dims": "17", "samples": "7",
        "clicks": "3 (42.86% of the samples)", "density": "77.8 % (samples / (users x items))",
    }  # fmt: skip
    code, out, _ = printed_by("schema", "show", log / "schema.toml", "--data", log / "0.parquet", "--user", "click")
    found = figures(out)
    assert found["users"] == "2 (click)" and "density" not in found
    assert found["items"] == "not known: name their column with --item"


@pytest.mark.parametrize(
    ("option", "words"),
    [("tags", "--item tags: wanted one column with one value a row"), ("nothing", "--item nothing: wanted one column")],
)
def test_a_column_that_names_no_items_is_refused(log, option, words):
    code, out, err = printed_by("schema", "show", log / "schema.toml", "--data", log, "--item", option)
    assert code == 2 and words in err and not out
    code, _, err = printed_by("schema", "show", log / "schema.toml", "--item", option)
    assert code == 2 and "--data" in err


def test_movielens_has_the_users_and_films_that_its_authors_state(tmp_path):
    schema = {
        "name": "movielens", "label": "label", "group_column": "user_id",
        "fields": {"movie_id": {"kind": "categorical", "encoding": "hash", "num_embeddings": 99, "embedding_dim": 4}},
    }  # fmt: skip
    files = [SHARED / f"{split}.parquet" for split in ("train", "valid", "test")]
    lines = count.table_2(files, parse_schema(schema, "", Path()))
    values = [table["label"].to_pylist() for table in map(pq.read_table, files)]
    assert lines[:2] == ["users           610 (user_id)", "items           9,724 (movie_id)"]
    assert lines[4:] == [
        "samples         100,836",
        f"clicks          {sum(map(sum, values)):,} (48.18% of the samples)",
        f"density         {100 * 100_836 / (610 * 9_724):.3g} % (samples / (users x items))",
    ]
    # Table 2's own figures: density is of samples, and that of 24 months should read 5.52e-5 %
    assert f"{100 * 203.99e9 / (480_028_940 * 974_333_635):.3g}" == "4.36e-05"
    assert f"{100 * 395.99e9 / (528_665_908 * 1_355_865_204):.3g}" == "5.52e-05"
