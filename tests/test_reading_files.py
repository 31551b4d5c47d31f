"""Proves that files are found, that damage is refused and never read as other data, and that missing checksums are refused on request."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from numbered_rows import make_schema, write_rows
from pyarrow.fs import copy_files

from data.errors import InputError
from data.reading.config import StreamOptions
from data.reading.files import files_in_words, read_contents, resolve_files
from data.reading.selection import Selection
from data.reading.storage import file_system

SCHEMA = make_schema()


def write_file(path: Path, rows: int = 200, **options) -> Path:
    return write_rows(path, rows, **{"row_group_size": 100} | options)


def contents(files, **options):
    options = StreamOptions(**options)
    return read_contents(files, SCHEMA, Selection(options, SCHEMA, files))


def test_folders_globs_and_files_become_one_sorted_list(tmp_path):
    names = ["ds=2/b.parquet", "ds=1/a.parquet", "ds=1/c.parquet", "other.parquet"]
    for name in names:
        write_file(tmp_path / name, 3)
    (tmp_path / "ds=1" / "notes.txt").write_text("no data")
    every = sorted(tmp_path / name for name in names)
    assert resolve_files([str(tmp_path)]) == every
    assert resolve_files([str(tmp_path / "ds=*"), str(tmp_path / "ds=1" / "a.parquet")]) == every[:3]
    assert resolve_files([str(tmp_path / "**" / "*.parquet")]) == every
    for nothing in (tmp_path / "absent", tmp_path / "ds=9*", tmp_path / "\0"):
        with pytest.raises(InputError, match="no Parquet file there; check the path"):
            resolve_files([str(nothing)])
    with pytest.raises(InputError, match=r"\{1,2\}: no Parquet file there .globs know .* what stands in braces"):
        resolve_files([f"{tmp_path}/ds={{1,2}}"])
    with pytest.raises(InputError, match="'': is no path"):
        resolve_files([""])  # an unset variable, and not this folder


@pytest.mark.parametrize(
    "hidden",
    [
        "_temporary/0/part-0.parquet",
        ".snapshot/a.parquet",
        "ds=1/._a.parquet",
        "_delta_log/1.checkpoint.parquet",
        "ds=1/_a.parquet",
    ],
)
@pytest.mark.parametrize("text", ["logs", "logs/*", "logs/**/*.parquet"])
def test_what_spark_and_macos_mark_as_no_data_is_not_read(tmp_path, hidden, text):
    wanted = [write_file(tmp_path / "logs" / name, 3) for name in ("_day=1/b.parquet", "ds=1/a.parquet")]
    found = write_file(tmp_path / "logs" / hidden, 3)
    assert resolve_files([str(tmp_path / text)]) == wanted
    assert resolve_files([str(found)]) == [found]


def test_folders_of_part_files_and_files_without_an_ending_are_data(tmp_path):
    names = ["day1.parquet/part-0.snappy.parquet", "day2/000000_0", "day3/A.PARQUET", "day4/x.parq", "day5/y.pq"]
    files = [write_file(tmp_path / name, 3) for name in names]
    assert files_in_words(resolve_files([str(tmp_path)])) == "5 files"
    (tmp_path / "_delta_log").mkdir()
    told = f"5 files ({tmp_path} is a Delta table: rows that it has deleted or replaced are read too)"
    assert files_in_words(resolve_files([str(tmp_path)])) == told
    (tmp_path / "_delta_log").rmdir()
    for name in ("README", "day2/_SUCCESS", "notes.txt", "a.parquet.bak", "day3/part-0.orc"):
        (tmp_path / name).write_text("PAR1" if name.endswith("bak") else "text")
    os.mkfifo(tmp_path / "pipe")
    for paths in ([str(tmp_path)], [f"{tmp_path}/*"], [f"{tmp_path}/**"]):
        found = resolve_files(paths)
        assert found == sorted(files)
        assert [str(file.relative_to(tmp_path)) for file in found.others] == [
            "README",
            "a.parquet.bak",
            "day3/part-0.orc",
            "notes.txt",
            "pipe",
        ]
        words = files_in_words(found)
        assert words.startswith("5 files (no Parquet, by name, and left out: ")
        assert words.endswith("day3/part-0.orc, and 2 more)")
    assert resolve_files([f"{tmp_path}/day3/*.orc"]) == [tmp_path / "day3/part-0.orc"]


def test_one_file_by_two_names_counts_once_and_links_are_followed(tmp_path, monkeypatch):
    logs = tmp_path / "logs"
    file = write_file(logs / "ds=1" / "a.parquet", 3)
    far = write_file(tmp_path / "elsewhere" / "b.parquet", 3)
    os.link(file, logs / "ds=1" / "hard.parquet")
    (logs / "ds=1" / "soft.parquet").symlink_to(file)
    (logs / "current").symlink_to(file.parent)  # sorts before ds=1, which says the partition
    (logs / "ds=2").symlink_to(far.parent)
    (logs / "ds=2" / "back").symlink_to(logs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = [Path("logs/ds=1/a.parquet"), Path("logs/ds=2/b.parquet")]
    assert resolve_files(["logs"]) == resolve_files(["logs", "logs/", "logs/ds=1/a.parquet", "logs/*"]) == wanted
    assert resolve_files(["logs", "logs/../logs/ds=1", str(logs), "~/logs"]) == [
        logs / "ds=1/a.parquet",
        logs / "ds=2/b.parquet",
    ]
    assert resolve_files([f"file://{logs}", "logs/*", f"file://localhost{logs}/ds%3D1/*.parquet"]) == [
        logs / "ds=1/a.parquet",
        logs / "ds=2/b.parquet",
    ]


def test_a_name_that_arrow_cannot_open_is_told(tmp_path):
    os.rename(write_file(tmp_path / "a.parquet", 3), os.fsencode(tmp_path) + b"/a\xff.parquet")
    with pytest.raises(InputError, match=r"\.parquet: the name is not UTF-8, by which Arrow opens files; rename it"):
        resolve_files([str(tmp_path)])


def test_names_with_the_signs_of_globs_are_files_first(tmp_path):
    file = write_file(tmp_path / "a[1]" / "x?.parquet", 3)
    write_file(tmp_path / "a1" / "x1.parquet", 3)
    for path in ("a[1]", "a[1]/*.parquet", "a[1]/**", "a[1]/x?.parquet", "a[[]1]/*"):
        assert resolve_files([str(tmp_path / path)]) == [file]
    assert len(resolve_files([str(tmp_path / "a*" / "x?.parquet")])) == 2


@pytest.mark.parametrize("text", ["", "/ds=*", "/ds=*/*.parquet", "/*/a.parquet", "/**/*.parquet"])
def test_a_folder_that_cannot_be_read_is_named_whatever_path_leads_there(tmp_path, text):
    write_file(tmp_path / "ds=1" / "a.parquet", 3)
    (tmp_path / "ds=2").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"ds=2: cannot be read \(No such file or directory\)"):
        resolve_files([f"{tmp_path}{text}"])
    (tmp_path / "ds=2").unlink()
    (tmp_path / "ds=2").symlink_to(tmp_path / "ds=2")
    with pytest.raises(InputError, match=r"ds=2: cannot be read \(Too many levels of symbolic links\)"):
        resolve_files([f"{tmp_path}{text}"])


def test_a_uri_takes_the_files_that_a_folder_takes(tmp_path):
    names = ["ds=1/a.parquet", "ds=1/000000_0", "ds=2/_b.parquet", "ds=2/B.PQ", "_day=3/c.parquet"]
    for name in [*names, "a[1]/x.parquet"]:
        write_file(tmp_path / name, 3)
    for name in ("README", "ds=1/part-0.orc"):
        (tmp_path / name).write_text("text")
    uri = f"memory://{tmp_path.name}"
    system, path = file_system(uri)
    copy_files(str(tmp_path), path, destination_filesystem=system)
    for text in ("", "/*", "/**", "/ds=*/*", "/**/*.parquet", "/a[1]/*.parquet", "/ds=1", "/ds=2/_b.parquet"):
        here, there = resolve_files([f"{tmp_path}{text}"]), resolve_files([uri + text])
        assert here and [file.relative_to(tmp_path).as_posix() for file in here] == [
            str(file).removeprefix(f"{uri}/") for file in there
        ]
        assert [file.name for file in here.others] == [file.name for file in there.others]
    assert len(resolve_files([f"{uri}/ds=1", f"memory:///{tmp_path.name}/ds=1"])) == 2
    with pytest.raises(InputError, match=r"ds=9\*: no Parquet file there; check the path"):
        resolve_files([f"{uri}/ds=9*"])


def test_what_cannot_be_read_is_named(tmp_path):
    write_file(tmp_path / "logs" / "a.parquet", 3)
    (tmp_path / "logs" / "gone.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        InputError, match=r"logs/gone.parquet: cannot be read \(No such file or directory\); fix or remove it"
    ):
        resolve_files([str(tmp_path / "logs")])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "log.csv").write_text("click")
    with pytest.raises(InputError, match=r"text: no Parquet file there \(it holds log.csv\); check the path"):
        resolve_files([str(tmp_path / "text")])


def test_files_without_a_row_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"0.parquet and 0 more files hold no rows"):
        contents([write_file(tmp_path / "0.parquet", 0)])


def test_what_is_no_parquet_file_is_named(tmp_path):
    bad = tmp_path / "bad.parquet"
    for text in (b"", b"PAR1", b"click,row\n1,2\n" * 10):
        bad.write_bytes(text)
        said = r"bad.parquet: not a readable Parquet file \(.+\); the file is damaged or of another kind: write it again or remove it"
        with pytest.raises(InputError, match=said):
            contents([bad])


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_checksums_are_seen_in_the_pages_themselves(tmp_path, compression, version, use_dictionary):
    options = {"compression": compression, "data_page_version": version, "use_dictionary": use_dictionary}
    good = write_file(tmp_path / "good.parquet", **options)
    bare = write_file(tmp_path / "bare.parquet", write_page_checksum=False, **options)
    contents([good], require_checksum=True)
    with warnings.catch_warnings():  # what pyarrow and Spark write is nothing to be warned of
        warnings.simplefilter("error")
        contents([good, bare, bare])
    said = r"bare.parquet: the pages of column 'click' carry no checksum .so in 1 of 2 files.: require_checksum = true wants them; write the files"
    with pytest.raises(InputError, match=said):
        contents([good, bare], require_checksum=True)


DAMAGE = """
import random, sys, time
from pathlib import Path
from test_reading_files import SCHEMA, contents
from data.errors import InputError
from data.reading.decode import RowReader
from data.reading.encode import Encoder

def content(file):
    columns = ["single_ids", "dense", "labels"]
    reader = RowReader([file], Encoder(SCHEMA))
    scanned = [read for group in contents([file], require_checksum=True).row_groups for read, _ in reader.scan(group, 64)]
    lists = [(read.lists.offsets.tolist(), read.lists.values[0].tolist()) for read in scanned]
    return lists, [[getattr(read, name).tolist() for name in columns] for read in scanned]

good_file = Path(sys.argv[1])
good, want, file = good_file.read_bytes(), content(good_file), good_file.with_name("damaged.parquet")
draw = random.Random(0)

def outcome(damaged):
    file.write_bytes(damaged)
    start = time.monotonic()
    try:
        result = "same" if content(file) == want else "SILENTLY WRONG"
    except InputError as error:
        result = "refused" if str(file) in str(error) and "\\n" not in str(error) else f"BADLY NAMED {error}"
    return result if time.monotonic() - start < 5 else "SLOW"

def flipped():
    damaged = bytearray(good)
    for bit in draw.sample(range(8 * len(good)), draw.randint(1, 8)):
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)

cases = int(sys.argv[2])
for kind, files in (
    ("truncated", [good[: len(good) * cut // cases] for cut in range(cases)]),
    ("flipped", [flipped() for _ in range(4 * cases)]),
):
    results = [outcome(each) for each in files]
    print(kind, len(results), results.count("refused"), set(results) - {"refused", "same"})
"""


@pytest.mark.parametrize("cases", [75, pytest.param(300, marks=pytest.mark.long)])
def test_truncated_and_flipped_files_are_refused_or_read_right(tmp_path, cases):
    """Truncations, and four times as many files with 1 to 8 flipped bits: in a process of its own, because a crash would end this one."""
    good = write_file(tmp_path / "good.parquet", compression="zstd")
    folder = Path(__file__).parent
    command = [sys.executable, "-c", DAMAGE, str(good), str(cases)]
    path = {"PYTHONPATH": f"{folder}:{folder.parent}"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | path)
    assert ran.returncode == 0, ran.stderr
    truncated, flipped = ran.stdout.splitlines()
    assert truncated == f"truncated {cases} {cases} set()"
    kind, files, refused, others = flipped.split(maxsplit=3)
    assert (kind, int(files), others) == ("flipped", 4 * cases, "set()")
    assert int(refused) > 0.9 * int(files)  # the rest hit bytes that say nothing about the rows
