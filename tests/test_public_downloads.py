"""Proves that public data sets are prepared from files of the layout they are downloaded in: values, joins, splits, and faults."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.public import raw_files as raw
from data.public.prepare import DATA_SETS, SCHEMA_FOLDER, prepare, write_splits
from data.reading.columns import Place
from data.reading.encode import Encoder
from data.schema import load_schema, parse_schema


def split_of(out: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted((out / split).glob("*.parquet"))])


def prepared(name: str, src: Path, out: Path) -> dict[str, pa.Table]:
    """Prepare, then encode every split by the fitted schema, as training would."""
    prepare(name, src, out)
    schema = load_schema(out / "schema.toml")
    encoder = Encoder(schema)
    summary = json.loads((out / "prepared.json").read_text())["splits"]
    splits = {split: split_of(out, split) for split in ("train", "valid", "test")}
    for split, table in splits.items():
        rows = table.select(list(schema.columns)).combine_chunks().to_batches()[0]
        assert encoder.encode(rows, Place(split, 0)).num_rows == len(table) == summary[split]["rows"]
    return splits


def has(row: dict, **values) -> None:
    assert {name: row[name] for name in values} == values


def src_of(folder: Path, **files: str | bytes) -> Path:
    """A folder `src` with files; "__" in a name stands for a dot. Names that end in gz are compressed."""
    src = folder / "src"
    src.mkdir(exist_ok=True)
    for name, text in files.items():
        content = text if isinstance(text, bytes) else text.encode()
        (src / name.replace("__", ".")).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    return src


def columns_of(splits: dict[str, pa.Table], name: str) -> list[list]:
    return [table[name].to_pylist() for table in splits.values()]


def criteo_line(number: int) -> str:
    """One line as in train.txt: label, 13 counts, 26 hashed ids, some of them empty."""
    counts = [str(number), "-1", "" if number % 3 else "7", *["5"] * 10]
    ids = [f"{number % 2:08x}", "", "68fd1e64", *["ffffffff"] * 23]
    return "\t".join([str(number % 2), *counts, *ids]) + "\n"


@pytest.mark.parametrize("file", ["train__txt", "train__txt__gz"])
def test_criteo_kaggle(file, tmp_path):
    src = src_of(tmp_path, **{file: "".join(map(criteo_line, range(28)))})
    splits = prepared("criteo_kaggle", src, tmp_path / "out")
    assert columns_of(splits, "I1") == [list(range(24)), [24, 25], [26, 27]]
    first, second = splits["train"].to_pylist()[:2]
    has(first, I2=-1, I3=7, C1=0, C2=None, C3=0x68FD1E64, C26=0xFFFFFFFF)
    has(second, I3=None, C1=1)


def test_criteo_1tb(tmp_path):
    days = range(9, 12)  # order by number, not by name
    lines = {day: "".join(criteo_line(100 * day + number) for number in range(6)) for day in days}
    src = src_of(tmp_path, **{f"day_{day}__gz": lines[day] for day in days})
    splits = prepared("criteo_1tb", src, tmp_path / "out")
    assert columns_of(splits, "I1") == [
        [*range(900, 906), *range(1000, 1006)], [1100, 1101, 1102], [1103, 1104, 1105],
    ]  # fmt: skip
    for day, message in ((10, "holds day_9 to day_11: wanted day_10 too"), (9, "wanted at least two days")):
        (src / f"day_{day}.gz").unlink()
        with pytest.raises(InputError, match=message):
            prepare("criteo_1tb", src, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_avazu(tmp_path):
    lines = [
        "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
        "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
    ]
    for number, hour in enumerate((14102100, 14102823, 14102900, 14103005, 14103023)):
        lines.append(
            f"1000009418151094273{number},{number % 2},{hour},1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,"
            f"a99f214a,ddd2926e,44956a24,1,2,15706,320,50,1722,0,35,-1,79"
        )
    splits = prepared("avazu", src_of(tmp_path, train__gz="\n".join(lines)), tmp_path / "out")
    assert columns_of(splits, "hour") == [[14102100, 14102823], [14102900], [14103005, 14103023]]
    assert columns_of(splits, "hour_of_day") == [[0, 23], [0], [5, 23]]
    # 21 October 2014 was a Tuesday
    assert columns_of(splits, "weekday") == [[1, 1], [2], [3, 3]]
    has(splits["train"].to_pylist()[0], site_id=0x1FBE01FE, C20=-1)
    assert "id" not in splits["train"].column_names


def test_movielens_latest(tmp_path):
    """Ratings are in time, those of one second by user; a tag of the same second is not before, and equal tags count once."""
    ratings = [(user, 1 + user % 2, 3.5 + user % 2, 2_000 - user // 2 * 2) for user in range(19)]
    ratings.append((19, 9, 5.0, 1_982))
    lines = [f"{user},{movie},{rating},{moment}" for user, movie, rating, moment in ratings]
    src = src_of(
        tmp_path,
        ratings__csv="\n".join(["userId,movieId,rating,timestamp", *reversed(lines), ""]),
        movies__csv='movieId,title,genres\n1,"Se7en, the (2nd) Film (1995)",Comedy|Drama\n2,Amélie,(no genres listed)\n',
        tags__csv="userId,movieId,tag,timestamp\n5,1,Funny ,1985\n6,1,later,1999\n7,1,FUNNY,1990\n8,1,now,2000\n",
    )
    splits = prepared("movielens_latest", src, tmp_path / "out")
    in_time = sorted(range(20), key=lambda user: (ratings[user][3], user))
    assert columns_of(splits, "user_id") == [in_time[:16], in_time[16:18], in_time[18:]]
    of_user = {row["user_id"]: row for table in splits.values() for row in table.to_pylist()}
    has(of_user[1], movie_id=2, label=1, year=None, genres=[], title_words=["amélie"], tags_before=[])
    has(of_user[0], label=0, year=1995, genres=["Comedy", "Drama"], rated_hour=0, rated_weekday=3)
    has(of_user[0], title_words=["se7en", "the", "2nd", "film"], tags_before=["funny", "later"])
    has(of_user[18], year=1995, tags_before=[])
    has(of_user[19], year=None, genres=[], title_words=[])  # a film that movies.csv lacks
    assert "rating" not in splits["train"].column_names


def test_taobao_ad_raw(tmp_path):
    first = 1_494_000_000
    moments = [first + 3_300, first + 6 * 86_400 - 1, first + 6 * 86_400, first + 7 * 86_400 + 36_000]
    sample = [f"{user},{moment},{ad},430548_1007,{1 - user % 2},{user % 2}" for user, moment, ad in
              zip((1, 2, 1, 3), moments, (10, 11, 99, 10), strict=True)]  # fmt: skip
    src = src_of(
        tmp_path,
        raw_sample__csv="\n".join(["user,time_stamp,adgroup_id,pid,nonclk,clk", *sample, ""]),
        ad_feature__csv="adgroup_id,cate_id,campaign_id,customer,brand,price\n"
        "11,6406,83237,1,95471,170.0\n10,6406,83238,2,NULL,32.99\n",
        user_profile__csv="userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,occupation,"
        "new_user_class_level \n2,0,5,2,5,,3,0,3\n1,19,3,2,3,2,3,0,\n",
    )
    splits = prepared("taobao_ad_raw", src, tmp_path / "out")
    assert columns_of(splits, "time_stamp") == [moments[:2], moments[2:3], moments[3:]]
    one, two = splits["train"].to_pylist()
    has(one, campaign_id=83238, brand=None, price=32.99, cms_segid=19, new_user_class_level=None)
    has(two, brand=95471, pvalue_level=None, label=0, hour=23, weekday=3)
    assert splits["valid"].to_pylist()[0]["cate_id"] is None, "an ad that ad_feature.csv lacks"
    has(splits["test"].to_pylist()[0], cms_segid=None, hour=10, weekday=5, label=1)
    assert not {"clk", "nonclk"} & set(splits["train"].column_names)


@pytest.mark.parametrize("name", DATA_SETS)
def test_missing_files_are_named(name, tmp_path):
    with pytest.raises(InputError, match=f"no such file; data set '{name}' needs .*: pass their folder as"):
        prepare(name, tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("criteo_kaggle", "train.txt", b"a\tb\n1\t2\n", r"train\.txt: .*check that this is the data set's own file"),
        ("criteo_kaggle", "train.txt", criteo_line(1).replace("68fd1e64", "no hex!!").encode(), "C3: wanted 8 hexadecimal digits"),
        ("criteo_kaggle", "train.txt", criteo_line(1).encode(), "the train split got no rows of 1"),
        ("avazu", "train.gz", gzip.compress(b"id,click\n1,0\n"), r"train\.gz: .*hour.*check that this is"),
        ("avazu", "train.gz", gzip.compress(b"x" * 100_000)[:-20], r"train\.gz: "),
    ],
    ids=["columns", "hex", "no rows", "header", "cut off"],
)  # fmt: skip
def test_wrong_files_leave_nothing_behind(name, file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare(name, tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_streaming_is_flat_in_memory(tmp_path, monkeypatch):
    """Four times the lines, the same peak of Arrow's memory."""
    monkeypatch.setattr(raw, "BLOCK_BYTES", 2**18)
    peaks, criteo = [], load_schema(SCHEMA_FOLDER / "criteo_kaggle.toml")
    block = "".join(criteo_line(number) for number in range(2_000))
    for copies in (1, 4):
        (tmp_path / "train.txt").write_text(block * 20 * copies)
        sources = {pattern: [tmp_path / "train.txt"] for pattern in DATA_SETS["criteo_kaggle"].files}
        pa.default_memory_pool().release_unused()
        held, splits = [], DATA_SETS["criteo_kaggle"].rows(sources)
        counts = write_splits(tmp_path, criteo, splits, 8_192, lambda rows: held.append(pa.total_allocated_bytes()))
        assert sum(part["rows"] for part in counts.values()) == 40_000 * copies
        peaks.append(max(held))
    assert peaks[1] < 1.5 * peaks[0], peaks


def test_writer_cuts_even_row_groups_and_several_files(tmp_path):
    schema = parse_schema({"name": "s", "label": "y", "fields": {"x": {"kind": "numeric"}}}, "s", tmp_path)
    table = pa.table({"x": range(75), "y": [1] * 75, "z": range(75)})
    pieces = [("train", table.slice(start, 7)) for start in range(0, 75, 7)]
    pieces += [("valid", table.slice(0, 1)), ("test", table.slice(0, 2))]
    counts = write_splits(tmp_path, schema, iter(pieces), 10, lambda rows: None, file_rows=30)
    assert counts == {split: {"rows": n, "label_rate": 1.0} for split, n in (("train", 75), ("valid", 1), ("test", 2))}
    footers = map(pq.read_metadata, sorted(tmp_path.glob("train/*.parquet")))
    sizes = [[footer.row_group(g).num_rows for g in range(footer.num_row_groups)] for footer in footers]
    assert sizes == [[10, 10, 10], [10, 10, 10], [10, 5]]
    assert split_of(tmp_path, "train") == table.select(["y", "x"])


@pytest.mark.parametrize(("label", "found"), [("2", "= 2"), ("-1", "= -1"), ("", "is empty"), ("nan", "is empty")])
def test_a_label_that_is_not_0_or_1_is_named_by_its_line(label, found, tmp_path):
    lines = [criteo_line(number) for number in range(40)]
    lines[6] = f"{label}\t{lines[6].partition(chr(9))[2]}"
    with pytest.raises(InputError, match=rf"train\.txt: line 7: label {found}: wanted 0 or 1"):
        prepare("criteo_kaggle", src_of(tmp_path, train__txt="".join(lines)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
