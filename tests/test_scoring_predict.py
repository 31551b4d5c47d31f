"""Proves that `mbcnet predict` writes exactly one row for each row of the input, in its order, with the same probabilities on any world
size, whatever fails on the way: a killed rank, a faulty value, a damaged page, a file that changes.
"""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_data import evaluated, rank_results

from data.errors import InputError
from mbcnet_rec.cli import plain_words
from mbcnet_rec.runtime.exits import CannotWriteError
from mbcnet_rec.scoring.predict import ColumnLeftOutWarning, kept_columns, run_prediction

COLUMNS = ["user", "probability", *(f"probability_{name}" for name in ("efgc", "cross", "deep"))]


def predicted(folder, name):
    return pq.read_table(folder / name / "test.parquet")


def files_in(folder):
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*.parquet") if each.is_file())


def assert_same(one, two):
    assert one.column_names == two.column_names == COLUMNS and one["user"].equals(two["user"])
    for name in COLUMNS[1:]:
        assert np.abs(one[name].to_numpy() - two[name].to_numpy()).max() < 1e-5


def test_rows_and_probabilities(runs):
    kind = "row_wise"
    assert rank_results(runs)[f"{kind}_predict_2"]["codes"] == [0, 0]
    source = pq.read_table(runs / "test.parquet")
    one, two = predicted(runs, f"{kind}_predicted_1"), predicted(runs, f"{kind}_predicted_2")
    assert one["user"].equals(source["user"])
    assert_same(one, two)
    p, y = one["probability"].to_numpy().astype(np.float64), source["click"].to_numpy()
    loss = -np.mean(y * np.log(p) + (1 - y) * np.log1p(-p))
    assert abs(loss - evaluated(runs, f"{kind}_evaluate_1")["log_loss"]) < 1e-6
    assert p.std() > 0.1


def test_killed_on_two_ranks_and_finished_on_one(runs):
    killed, resumed = rank_results(runs)["killed"], rank_results(runs)["resumed"]
    assert killed["codes"][1] == -9
    whole = [name for name in killed["left"] if name.endswith(".parquet")]
    assert 1 <= len(whole) < 4 and all(name.startswith("_pieces/test.parquet/") for name in whole)
    assert resumed["codes"] == [0] and "of them were there already" in resumed["words"][0]
    left = {path.name for path in (runs / "row_wise_killed").iterdir()}
    assert left == {"_predict.json", "test.parquet"}
    assert_same(predicted(runs, "row_wise_predicted_1"), predicted(runs, "row_wise_killed"))


def predict(run, data, out, capfd, **options):
    """Chunks of 1,000 rows: what was refused, and what was printed."""
    try:
        refused, code = "", run_prediction(str(run), [str(data)], str(out), chunk_rows=1_000, **options)
    except InputError as error:
        refused, code = str(error), 2
    return code, capfd.readouterr().out, refused


def test_faults_stop_their_own_chunks_only(runs, tmp_path, capfd):
    """A faulty value and a damaged page; repaired, the same command finishes and scores nothing twice that has not changed."""
    source = pq.read_table(runs / "test.parquet").drop_columns(["click"])
    data, out = tmp_path / "in", tmp_path / "out"
    (data / "ds=1").mkdir(parents=True)
    bad = source.slice(0, 1_900).to_pydict()
    bad["user"][1_500] = 500
    broken = pa.Table.from_pydict(bad, schema=source.schema)
    pq.write_table(broken, data / "ds=1" / "a.parquet", row_group_size=500, write_page_checksum=True)
    pq.write_table(source, data / "b.parquet", row_group_size=400, write_page_checksum=True)
    pq.write_table(source.slice(0, 0), data / "empty.parquet", write_page_checksum=True)
    argv, keep = (runs / "row_wise", data, out, capfd), ["unread", "user"]
    code, _, err = predict(*argv, keep=keep)
    assert code == 2 and "a.parquet: row group 3, row 0, field 'user' = 500" in err
    assert files_in(out) == [
        "_pieces/b.parquet/000000.parquet",
        "_pieces/b.parquet/000001.parquet",
        "_pieces/ds=1/a.parquet/000000.parquet",
    ]
    code, _, err = predict(*argv, keep=["user"])
    assert code == 2 and "other columns" in err
    repaired = source.slice(0, 1_900)
    pq.write_table(repaired, data / "ds=1" / "a.parquet", row_group_size=500, write_page_checksum=True)
    flip_a_byte(data / "b.parquet", "image")
    code, text, err = predict(*argv, keep=keep)
    assert code == 2, err
    assert "a.parquet has changed" in text and "b.parquet has changed" in text, err
    assert "b.parquet: row group 3: cannot be decoded" in err
    assert "_pieces/ds=1/a.parquet/000001.parquet" in files_in(out)
    stamp = (out / "_pieces/ds=1/a.parquet/000001.parquet").stat().st_mtime_ns
    assert "_pieces/b.parquet/000000.parquet" in files_in(out)
    pq.write_table(source, data / "b.parquet", row_group_size=400, write_page_checksum=True)
    code, text, _ = predict(*argv, keep=keep)
    assert code == 0 and "3,900 rows in 3 files (1,900 of them were there already)" in text
    assert (out / "ds=1/a.parquet").stat().st_mtime_ns >= stamp
    for name, wanted in (("ds=1/a.parquet", repaired), ("b.parquet", source), ("empty.parquet", source[:0])):
        found = pq.read_table(out / name)
        assert found["unread"].to_pylist() == wanted["unread"].to_pylist()
    assert not (out / "_pieces").exists()
    expected = predicted(runs, "row_wise_predicted_1")["probability"].to_numpy()
    found = pq.read_table(out / "b.parquet")["probability"].to_numpy()
    assert np.abs(found - expected).max() < 1e-5


def flip_a_byte(path, column):
    """Damage a page of the fourth row group: opening a file looks at the first one."""
    place = pq.read_metadata(path).row_group(3)
    chunks = map(place.column, range(place.num_columns))
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.startswith(column))
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(data)


def test_a_file_of_lost_bytes_and_a_full_disk(runs, tmp_path):
    data, out = tmp_path / "test.parquet", tmp_path / "out"
    shutil.copy(runs / "test.parquet", data)

    def full(draft, place):
        if place.suffix == ".parquet":
            raise OSError(28, "No space left on device")
        draft.replace(place)

    with pytest.raises(CannotWriteError, match=r"No space left on device.*start again"), plain_words():
        run_prediction(str(runs / "row_wise"), [str(data)], str(out), put=full)
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        run_prediction(str(runs / "row_wise"), [str(data)], str(out))
    shutil.copy(runs / "test.parquet", data)
    assert run_prediction(str(runs / "row_wise"), [str(data)], str(out)) == 0
    (out / "test.parquet").write_bytes(b"cut off")  # by a disk that lied: made again
    assert run_prediction(str(runs / "row_wise"), [str(data)], str(out)) == 0
    assert pq.read_metadata(out / "test.parquet").num_rows == 2_000
    shutil.copy(runs / "test.parquet", out / "input.parquet")
    with pytest.raises(InputError, match="choose another output folder"):
        run_prediction(str(runs / "row_wise"), [str(out / "input.parquet")], str(out))


def test_what_is_not_its_own_is_left_alone(runs, tmp_path):
    run, data = str(runs / "row_wise"), [str(runs / "test.parquet")]
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "_predict.json").write_text(json.dumps({"format": 1}))
    for out, options, words in (
        (tmp_path, {}, "not a prediction"),
        (tmp_path / "other", {}, "not a prediction"),
        (tmp_path / "notes.txt", {}, "is a file"),
        (tmp_path / "x", {"keep": ["nothing"]}, "no such column"),
        (tmp_path / "x", {"keep": ["probability"]}, "no such column"),
        ("s3://bucket/scores", {}, "wanted a folder of this machine"),
    ):
        with pytest.raises(InputError, match=words):
            run_prediction(run, data, str(out), **options)
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "x").exists()


def everything_in(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def days(runs, tmp_path):
    """Two days of rows in files of one name: day 2 is day 1 in the opposite order."""
    source = pq.read_table(runs / "test.parquet").slice(0, 300)
    for day, table in ((1, source), (2, source.take(list(range(299, -1, -1))))):
        (tmp_path / f"ds={day}").mkdir()
        pq.write_table(table, tmp_path / f"ds={day}/part-0.parquet", write_page_checksum=True)
    return tmp_path


def test_scores_of_another_file_are_replaced_only_by_overwrite(runs, days, capfd, monkeypatch):
    run, out = runs / "row_wise", days / "out"
    monkeypatch.chdir(days)
    assert predict(run, "ds=1", out, capfd)[0] == 0
    first, before = pq.read_table(out / "part-0.parquet"), everything_in(out)
    code, _, err = predict(run, "ds=2", out, capfd)
    assert code == 2 and "\n" not in err
    for words in (f"{days}/ds=1/part-0.parquet", f"{days}/ds=2/part-0.parquet", "another --out", "--overwrite"):
        assert words in err
    code, _, err = predict(run, days / "ds=*", out, capfd)
    assert code == 2 and f"{days}/ds=1/part-0.parquet: its scores are in {out}/part-0.parquet already" in err
    for options, words in (({"keep": ["click"]}, "other columns (user, "), ({}, "other weights")):
        code, _, err = predict(runs / ("table_wise" if not options else "row_wise"), "ds=1", out, capfd, **options)
        assert code == 2 and words in err
    assert everything_in(out) == before
    assert "(300 of them were there already)" in predict(run, days / "ds=1", out, capfd)[1], "by another path"
    broken = pq.read_table("ds=2/part-0.parquet").to_pydict()
    broken["user"][7] = 500
    (days / "bad").mkdir()
    pq.write_table(pa.table(broken), "bad/part-1.parquet", write_page_checksum=True)
    assert predict(run, "bad", out, capfd, overwrite=True)[0] == 2
    assert pq.read_table(out / "part-0.parquet").equals(first), "it stays until what replaces it is whole"
    broken["user"][7] = 1
    pq.write_table(pa.table(broken), "bad/part-1.parquet", write_page_checksum=True)
    assert predict(run, "bad", out, capfd, overwrite=True)[0] == 0
    assert files_in(out) == ["part-1.parquet"], "and goes then"
    assert predict(run, "ds=2", out, capfd)[0] == 0, "another name is added"
    again = pq.read_table(out / "part-0.parquet").take(list(range(299, -1, -1)))
    assert again["user"].equals(first["user"])
    assert np.abs(again["probability"].to_numpy() - first["probability"].to_numpy()).max() < 1e-6


def test_where_scores_go_is_always_below_out(runs, days, capfd, monkeypatch):
    (days / "here").mkdir()
    monkeypatch.chdir(days / "here")
    run, before = str(runs / "row_wise"), everything_in(days)
    for number, data in enumerate((["../ds=1", str(days / "ds=2")], [str(days / "ds=1"), "../ds=2/part-0.parquet"])):
        assert run_prediction(run, data, f"out{number}") == 0
        assert files_in(days / f"here/out{number}") == ["ds=1/part-0.parquet", "ds=2/part-0.parquet"]
    assert before.items() <= everything_in(days).items()
    pieces = days / "ds=1/_pieces/x.parquet"
    pieces.parent.mkdir()
    pieces.write_bytes((days / "ds=1/part-0.parquet").read_bytes())
    with pytest.raises(InputError, match=r"cannot be written to a file '_pieces/x.parquet'"):
        run_prediction(run, [str(pieces), str(days / "ds=1/part-0.parquet")], "out")


def test_a_folder_that_grows_is_scored_on(runs, days, capfd):
    logs, out = days / "logs", days / "out"
    logs.mkdir()
    (days / "ds=1").rename(logs / "ds=1")
    assert predict(runs / "row_wise", logs, out, capfd)[0] == 0
    assert files_in(out) == ["ds=1/part-0.parquet"], "as it will be with a second day"
    (days / "ds=2").rename(logs / "ds=2")
    assert "600 rows in 2 files (300 of them were there already)" in predict(runs / "row_wise", logs, out, capfd)[1]
    assert predict(runs / "row_wise", logs / "*/part-*", days / "glob", capfd)[0] == 0
    assert files_in(days / "glob") == ["ds=1/part-0.parquet", "ds=2/part-0.parquet"]


def test_a_group_column_that_some_files_lack_is_left_out_aloud(tmp_path):
    schema = pa.schema([("user", pa.int64())])
    files, lacking = [tmp_path / "a", tmp_path / "b"], pa.schema([("item", pa.int64())])
    assert kept_columns(files, [schema, schema], [], ["user", ""]) == ["user"]
    with pytest.warns(ColumnLeftOutWarning, match=r"b: has no column 'user', so the scores of no file have it"):
        assert kept_columns(files, [schema, lacking], [], ["user", "day"]) == []


def test_each_file_keeps_the_type_of_its_columns(runs, days, capfd):
    table = pq.read_table(days / "ds=1/part-0.parquet")
    number = [None, *range(-149, 150)]
    text = [None if each is None else str(each) for each in number]
    variants = {
        "int64": pa.array(number), "int16": pa.array(number, pa.int16()), "double": pa.array(number, pa.float64()),
        "uint64": pa.array([2**64 - 1] * 300, pa.uint64()), "decimal": pa.array(number).cast(pa.decimal128(20)),
        "string": pa.array(text), "large": pa.array(text, pa.large_string()), "null": pa.nulls(300),
        "dictionary": pa.array(text).dictionary_encode(), "codes": pa.array(number).dictionary_encode(),
        "view": pa.array(text, pa.string_view()), "bytes": pa.array(text).cast(pa.binary()), "bool": pa.array([True, None] * 150),
        "list": pa.array([[each, None] for each in number]), "empty": pa.array([[]] * 300, pa.list_(pa.null())),
        "struct": pa.array([{"a": each, "b": [{"c": str(each)}]} for each in number]),
        "map": pa.array([[("k", each)] for each in number], pa.map_(pa.string(), pa.int64())),
        "time": pa.array(number, pa.timestamp("us", "Europe/Oslo")), "day": pa.array(number, pa.date32()),
    }  # fmt: skip
    for name, column in variants.items():
        pq.write_table(
            table.append_column("id.of it", column),
            days / f"ds=2/{name}.parquet",
            row_group_size=70,
            write_page_checksum=True,
        )
    (days / "ds=2/part-0.parquet").unlink()
    keep = ["id.of it", "click", "tags"]
    options = {"keep": keep, "chunk_rows": 100}
    assert run_prediction(str(runs / "row_wise"), [str(days / "ds=2")], str(days / "out"), **options) == 0
    for name in variants:
        source, found = (pq.read_table(days / each / f"{name}.parquet") for each in ("ds=2", "out"))
        assert found.column_names[:3] == keep and len(found.column_names) == 7
        for column in keep:
            assert found[column].type == source[column].type, name
            assert found[column].to_pylist() == source[column].to_pylist(), name
