"""Proves that an untrusted checkpoint is refused before memory is taken for what it claims, and that nothing in it is run: pickles, links,
paths out of the folder, swapped or changed files, impossible headers, and manifests altered value by value with sums that fit."""

import hashlib
import json
import pickle
import random
import re
import resource
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from small_data import write_small

from data.errors import InputError
from mbcnet_rec.checkpoints.manifest import read_checkpoint
from mbcnet_rec.checkpoints.run_schema import saved_run
from mbcnet_rec.checkpoints.shards import Saved, load_shards, whole_shard
from mbcnet_rec.checkpoints.storage import CheckpointStorage, best_step
from mbcnet_rec.checkpoints.writer import Keep, Saver
from mbcnet_rec.cli import main
from mbcnet_rec.runtime.process import Process
from mbcnet_rec.training.state import TrainState

SOURCES = [path for folder in ("data", "sharding", "mbcnet_rec") for path in Path(folder).rglob("*.py")]
STATE = TrainState(step=5, best=[(0.7, 5)], evaluated_step=5)


NAMES = ("model/ebc.embedding_bags.user.weight", "model/top.weight", "optim/top.weight/exp_avg")


def pieces():
    generator = torch.Generator().manual_seed(0)
    return [whole_shard(name, torch.randn(30, 4, generator=generator)) for name in NAMES]


RANK_FILE = "rank_00000.safetensors"
COPIED = ("schema.toml", "vocabulary/user.parquet")


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint of one rank, with copies of two files of its run."""
    (tmp_path / "run/vocabulary").mkdir(parents=True)
    for name in COPIED:
        (tmp_path / "run" / name).write_text(name)
    alone = Process(0, 1, 0, 1, torch.device("cpu"))
    made = Saver(CheckpointStorage(tmp_path / "checkpoints"), alone, 10.0, folder=tmp_path / "run")
    files = {name: hashlib.sha256(name.encode()).hexdigest() for name in COPIED}
    run = {"optimizer": "sgd", "schema": "abc", "column_shards": {"user": 2}, "files": files}
    extra = {"state": STATE.to_json(), "stream": {"epoch": 0, "step": 5, "fingerprint": "f"}, "run": run}
    made.save(5, pieces(), extra, Keep(last=2, best=((0.7, 5),)))
    made.finish()
    folder = tmp_path / "checkpoints" / "step_5"
    next(folder.glob("rank_*")).rename(folder / RANK_FILE)
    rewrite(folder, lambda body: body["files"][0].update(file=RANK_FILE))
    return folder


def load(folder):
    """All that a run reads of a checkpoint."""
    saved = Saved(folder)
    saved_run(saved.manifest, saved.folder)
    TrainState.from_json(saved.manifest.extra.get("state", {}))
    load_shards(saved, pieces(), 0, 1)
    return saved


def rewrite(folder, change):
    """Alter the manifest's body and give it a sum that fits, as an attacker would."""
    body = json.loads((folder / "manifest.json").read_text())["body"]
    body = change(body) or body
    text = json.dumps(body)
    shell = f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "body": {text}}}\n'
    (folder / "manifest.json").write_text(shell)


def resum(folder):
    """Give the file of tensors a sum that fits."""
    sum_now = hashlib.sha256((folder / "rank_00000.safetensors").read_bytes()).hexdigest()
    rewrite(folder, lambda body: body["files"][0].update(sha256=sum_now))


class Bomb:
    """Unpickled, it runs a command that leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return subprocess.check_call, (["touch", str(self.mark)],)


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors", "extra.pkl"])
def test_a_pickle_in_any_file_is_not_opened(folder, tmp_path, name):
    mark = tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    if name == "extra.pkl":
        load(folder)  # what the manifest does not name is not read
    else:
        with pytest.raises(InputError, match="use another checkpoint"):
            load(folder)
        if name.startswith("rank"):
            resum(folder)
            with pytest.raises(InputError, match="not a safetensors file"):
                load(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is real"


def test_no_source_imports_a_reader_that_runs_code():
    words = ["pickle", "marshal", "shelve", "joblib", "cloudpickle", "dill"]
    words += ["torch.load", "allow_pickle", "yaml.load"]
    for path in SOURCES:
        code = "\n".join(line for line in path.read_text().splitlines() if "#" not in line)
        found = [word for word in words if f"import {word}" in code or f"{word}(" in code]
        assert not found, f"{path}: {found}"
    assert len(SOURCES) > 100


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors"])
def test_a_link_is_refused(folder, tmp_path, name):
    moved = tmp_path / name
    shutil.move(folder / name, moved)
    (folder / name).symlink_to(moved)
    with pytest.raises(InputError, match=f"{name}: is a symbolic link"):
        load(folder)
    with pytest.raises(InputError, match="symbolic link"):
        Saved(folder, hashed=False)


def test_one_flipped_bit_anywhere_is_refused(folder):
    rng = random.Random(0)
    for path in (folder / "manifest.json", folder / "rank_00000.safetensors", *folder.glob("copy_*")):
        data = path.read_bytes()
        for place in [*range(min(16, len(data))), *(rng.randrange(len(data)) for _ in range(100))]:
            flipped = bytearray(data)
            flipped[place] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(InputError, match=path.name):
                load(folder)
        path.write_bytes(data)
    assert TrainState.from_json(load(folder).manifest.extra["state"]) == STATE, "whole again, it is read"


HUGE = 10**18
HEADERS = {
    "1e18 elements": lambda h: h | {"0": h["0"] | {"shape": [HUGE]}},
    "1e18 elements in 1e18 bytes": lambda h: (
        h | {"2": {"dtype": "F32", "shape": [HUGE], "data_offsets": [h["2"]["data_offsets"][0], 4 * HUGE]}}
    ),
    "1e18 as a float": lambda h: h | {"0": h["0"] | {"shape": [1e18]}},
    "a product that overflows": lambda h: h | {"0": h["0"] | {"shape": [2**32, 2**32, 0 + 1]}},
    "a negative size": lambda h: h | {"0": h["0"] | {"shape": [-30, -4]}},
    "a true size": lambda h: h | {"0": h["0"] | {"shape": [True, 120]}},
    "overlap": lambda h: h | {"1": h["1"] | {"data_offsets": h["0"]["data_offsets"]}},
    "a gap": lambda h: h | {"0": h["0"] | {"data_offsets": [8, h["0"]["data_offsets"][1] + 8]}},
    "an unknown dtype": lambda h: h | {"0": h["0"] | {"dtype": "PICKLE"}},
    "another number of tensors": lambda h: {"0": h["0"]},
    "no table": lambda h: [1, 2],
    "no JSON": lambda h: b"{" * 1000,
    "nesting": lambda h: b"[" * 100_000,
    "a number of 5,000 digits": lambda h: b'{"0": {"shape": [' + b"9" * 5000 + b"]}}",
    "nothing": lambda h: b"",
    "a length beyond the file": lambda h: h,
}


@pytest.mark.parametrize("name", HEADERS)
def test_an_impossible_header_is_refused_before_memory_is_taken(folder, name):
    path = folder / "rank_00000.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = HEADERS[name](json.loads(data[8 : 8 + length]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    claimed = HUGE if name == "a length beyond the file" else len(text)
    path.write_bytes(claimed.to_bytes(8, "little") + text + data[8 + length :])
    resum(folder)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
    try:
        with pytest.raises(InputError, match="use another checkpoint"):
            load(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# a key of the manifest's only file, its value, words of the refusal
PATHS = (
    "../rank_00000.safetensors",
    "/etc/passwd",
    "rank_00000.safetensors/..",
    "rank_0.safetensors",
    "rank_00000.pkl",
    "..",
    "",
)
SHARDS = (
    ([NAMES[1], [0, 0], [HUGE, HUGE]], "this run wants"),
    ([NAMES[1], [HUGE, 0], [30, 4]], "does not lie inside its tensor"),
    ([NAMES[1], [0, 0, 0], [30, 4, 1]], "does not lie inside its tensor"),
    (["model/top.weight\x1b[2J", [0, 0], [30, 4]], "has no plain name"),
    (["m" * 5000, [0, 0], [30, 4]], "has no plain name"),
    ([7, [0, 0], [30, 4]], "is not described by name, offsets and shape"),
)
FILES = [("file", path, r"wanted a name such as rank_00000\.safetensors") for path in PATHS] + [
    ("pieces", [[NAMES[0], [0, 0], [30, 4]], shard, [NAMES[2], [0, 0], [30, 4]]], words)
    for shard, words in SHARDS
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), FILES)
def test_a_path_out_of_the_folder_or_a_block_outside_its_tensor_is_refused(folder, key, value, words):
    shutil.copy(folder / "rank_00000.safetensors", folder.parent / "rank_00000.safetensors")
    rewrite(folder, lambda body: body["files"][0].update({key: value}))
    with pytest.raises(InputError, match=words) as caught:
        load(folder)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("schema.toml", "../../secret", "wanted the name of a file of the run, that of its copy"),
        ("schema.toml", "copy_00000.ab/..", "wanted the name of a file of the run, that of its copy"),
        ("schema.toml", RANK_FILE, "wanted the name of a file of the run, that of its copy"),
        ("schema.toml\x1b[2J", "copy_00000.ab.toml", "wanted the name of a file of the run, that of its copy"),
        ("../secret", "", "does not say which run wrote it"),
    ],
)
def test_a_copy_has_no_path_out_of_either_folder(folder, name, file, words):
    def change(body):
        body["copies"][name] = [file or body["copies"]["schema.toml"][0], body["copies"].pop("schema.toml")[1]]

    rewrite(folder, change)
    with pytest.raises(InputError, match=words):
        load(folder)


WEIRD = (None, True, -1, 0, 0.5, HUGE, 1e308, "", "x" * 9, [], {}, [[]], {"a": 1}, "../..", "\x00")


def places_in(value, path=()):
    """Paths of all values in a JSON tree."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places_in(child, (*path, key))


def test_altered_manifests_are_read_or_refused_but_never_crash(folder):
    """500 manifests with one value replaced or removed, and a sum that fits."""
    original = (folder / "manifest.json").read_bytes()
    body = json.loads(original)["body"]
    paths, rng = [path for path in places_in(body) if path], random.Random(1)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(500):
        path, value = rng.choice(paths), rng.choice((*WEIRD, "remove"))

        def change(body, path=path, value=value):
            for key in path[:-1]:
                body = body[key]
            if value == "remove":
                del body[path[-1]]
            else:
                body[path[-1]] = value

        rewrite(folder, change)
        try:
            load(folder)
            outcomes["read"] += 1
        except InputError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        (folder / "manifest.json").write_bytes(original)
    assert outcomes["refused"] > 300 and outcomes["read"] > 20, outcomes


@pytest.mark.parametrize(
    "note", [b"", b"\x80\x04N.", b"[]", b'{"step": "5"}', b'{"step": 99}', b'{"step": {}}', b'{"step": -1}', b"[" * 99999]
)  # fmt: skip
def test_a_strange_note_of_the_best_does_not_mislead(folder, note):
    (folder.parent / "best.json").write_bytes(note)
    assert best_step(CheckpointStorage(folder.parent)) == 5


def test_a_prefix_behind_a_uri_brings_only_named_files(folder, tmp_path):
    """Names in a remote manifest are checked before anything is fetched by them."""
    storage = CheckpointStorage(f"memory://{tmp_path.name}/checkpoints")
    rewrite(folder, lambda body: body["files"][0].update(file="../../../secret"))
    with storage.write("step_5/manifest.json") as file:
        file.write((folder / "manifest.json").read_bytes())
    with pytest.raises(InputError, match="wanted a name such as"), storage.fetched(5) as fetched:
        read_checkpoint(fetched)


def test_the_command_line_refuses_in_one_line(folder, tmp_path, capfd):
    """A run folder from elsewhere, whose checkpoint is a pickle: exit code 2, one line, no code run."""
    config = write_small(tmp_path / "rows", 960, 96)
    run, mark = tmp_path / "rows/run", tmp_path / "ran"
    shutil.copytree(folder.parent, run / "checkpoints")
    (run / "config.toml").write_text(config.read_text())
    (run / "metrics.jsonl").write_text("")
    (run / "checkpoints/step_5/rank_00000.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    for args in (["train", "--config", str(config), "--resume"], ["evaluate", str(run)]):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(args) == 2
        *warned, last = capfd.readouterr().err.strip().splitlines()
        assert "SHA-256 differs" in warned[0] and all(each.startswith("mbcnet: warning: ") for each in warned)
        assert re.match("mbcnet: .*(none is whole|no whole checkpoint)", last)
    assert not mark.exists()
