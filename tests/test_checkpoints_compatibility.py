"""Proves that a checkpoint of another model is refused with what differs before anything is loaded; that --allow-partial loads what fits and says
what starts fresh; that a table can grow; and that a run can begin with another run's tables."""

import re

import pytest
import torch
from small_data import SCHEMA, write_small
from tiny_run import train

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.build import build
from mbcnet_rec.checkpoints.compatibility import load_checked, warm_start
from mbcnet_rec.checkpoints.shards import Saved, shards_of
from mbcnet_rec.cli import main
from mbcnet_rec.config import load_config
from mbcnet_rec.runtime.process import joined_process

STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config whose run has trained STEPS steps."""
    config = write_small(tmp_path_factory.mktemp("compatibility"), train_rows=960, other_rows=96)
    assert train(config, f"train.max_steps={STEPS}", "data.valid=[]", "data.test=[]") == 0
    return config


@pytest.fixture(scope="module")
def saved(config):
    return Saved(config.parent / f"run/checkpoints/step_{STEPS}")


@pytest.fixture
def process():
    with joined_process("cpu", 20.0) as process:
        yield process


def built_with(config, process, schema_text=SCHEMA, settings=()):
    """A model of a changed schema or config."""
    schema = config.parent / "changed.toml"
    schema.write_text(schema_text)
    wanted = load_config(config, [f"schema={schema}", *settings])
    return build(wanted, load_schema(schema), process), wanted


def changed(pattern, replacement):
    text = re.sub(pattern, replacement, SCHEMA)
    assert text != SCHEMA
    return text


def values(built):
    return {piece.name: piece.tensor.detach().clone() for piece in shards_of(built.model, built.optimizer)}


USERS = r"(user    = .*num_embeddings = )120"
EBC, WEIGHTED = "model/model.sparse_arch.ebc", "model/model.sparse_arch.weighted_ebc"
# change -> schema, settings, differences with what they leave fresh
CHANGES = {
    "a table has more rows": (changed(USERS, r"\g<1>150"), [], {"table user: shape 120x16 -> 150x16": "its new rows start fresh"}),
    # its ids beyond are clipped, or the data would be at fault
    "a table has fewer rows": (changed(USERS, r"\g<1>100"), [], {"table user: shape 120x16 -> 100x16": "starts fresh"}),
    "a table has other columns": (changed(r"(tags    = .*embedding_dim = )16", r"\g<1>8"), [], {"table tags: shape 40x16 -> 40x8": "starts fresh"}),
    "a table is added": (
        changed(r"\[groups\]", 'city = { kind = "categorical", column = "user", num_embeddings = 120, embedding_dim = 16 }\n[groups]'),
        [],
        {"table city: added": "starts fresh", "bias: shape 101 -> 117": "starts fresh"},
    ),
    "a table is removed": (changed(r"hour    = .*\n", "").replace('"hour", ', ""), [], {"table hour: removed": "", "dense part: ": "starts fresh"}),
    "another optimizer": (SCHEMA, ["optim.embedding.name=adagrad"], {"optimizer of the tables: rowwise_adagrad -> adagrad": "its state starts fresh"}),
    "another model": (SCHEMA, ["model.kind=dnn"], {": removed": "", ": added": "starts fresh"}),
    "another schema with the same tables": (
        changed(r'taste = \["user", "item", "history"\]', 'taste = ["user", "item", "tags"]'), [], {"schema: ": ""},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "settings", "differences"), CHANGES.values(), ids=CHANGES)
def test_a_difference_is_refused_before_a_load_and_a_partial_one_says_what_it_did(
    config, saved, process, text, settings, differences
):
    built, _ = built_with(config, process, text, settings)
    before = values(built)
    with pytest.raises(InputError, match=r"belongs to another model.*--allow-partial") as caught:
        load_checked(saved, built, process)
    assert all(what in str(caught.value) for what in differences), caught.value
    after = values(built)
    assert all(torch.equal(before[key], after[key]) for key in before), "nothing is loaded"
    lines = load_checked(saved, built, process, allow_partial=True)
    assert all(line.startswith("partial load: ") for line in lines)
    for what, fresh in differences.items():
        assert any(what in line and line.endswith(fresh) for line in lines), lines
    now = values(built)
    fitting = [key for key in now if saved.shapes.get(key) == now[key].shape and key.startswith(EBC)]
    assert len(fitting) >= 2
    for key in fitting:
        assert torch.equal(now[key], saved.whole(key)), key


def test_a_grown_table_keeps_its_rows_and_their_state(config, saved, process):
    built, _ = built_with(config, process, changed(USERS, r"\g<1>150"))
    before = values(built)
    load_checked(saved, built, process, allow_partial=True)
    after = values(built)
    name = f"{EBC}.embedding_bags.user.weight"
    for key in (name, name.replace("model/", "optim/") + "/sum"):
        old = saved.whole(key)
        assert len(after[key]) == 150 and torch.equal(after[key][:120], old)
        assert torch.equal(after[key][120:], before[key][120:]), "new rows are as they were drawn"
    assert old.any(), "the state is not empty"


def test_the_command_line_refuses_and_loads_in_part(config, tmp_path, capfd):
    run = tmp_path / "run"
    settings = [f"train.out={run}", "data.valid=[]", "data.test=[]"]
    args = ["train", "--config", str(config), *(word for each in settings for word in ("--set", each))]
    assert train(config, *settings, "train.max_steps=2") == 0
    capfd.readouterr()
    more = ["--set", "train.max_steps=4", "--set", "optim.embedding.name=adagrad", "--resume"]
    assert main([*args, *more]) == 2
    error = capfd.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "step_2: belongs to another model: optimizer of the tables: rowwise_adagrad -> adagrad" in error
    # another batch size: other steps an epoch, so the position in the data means nothing
    assert main([*args, *more, "--allow-partial", "--set", "data.batch_size=48"]) == 0
    said = capfd.readouterr().out
    assert "partial load: optimizer of the tables: rowwise_adagrad -> adagrad, its state starts fresh" in said
    assert "partial load: the position in the data starts fresh" in said and "from step 2" in said
    assert (run / "checkpoints/step_4").is_dir()


def warm(config, process, schema_text=SCHEMA, settings=()):
    if not any(each.startswith("train.warm_start=") for each in settings):
        settings = [f"train.warm_start={config.parent / 'run'}", *settings]
    built, wanted = built_with(config, process, schema_text, settings)
    before = values(built)
    return warm_start(wanted.train, built, load_schema(wanted.schema), process), before, values(built)


def test_a_run_can_begin_with_another_runs_tables(config, saved, process):
    line, before, after = warm(config, process, settings=["model.kind=dnn"])
    assert (
        line.startswith(f"warm start from step {STEPS} of ")
        and ": with optimizer state: hour, likes, tags, thing, user" in line
    )
    for key in after:
        if "embedding_bags" in key:
            assert torch.equal(after[key], saved.whole(key)), key
        elif key.startswith("model/"):
            assert torch.equal(after[key], before[key]), "the dense part is this run's own"
        else:
            assert not after[key].any(), f"{key}: its optimizer has made no step"


def test_chosen_tables_alone_and_longer_ones(config, saved, process):
    line, before, after = warm(
        config, process, changed(USERS, r"\g<1>150"), ["train.warm_start_tables=['user']", "optim.embedding.name=sgd"]
    )
    assert "without optimizer state: user" in line
    name = f"{EBC}.embedding_bags.%s.weight"
    assert torch.equal(after[name % "user"][:120], saved.whole(name % "user"))
    assert torch.equal(after[name % "user"][120:], before[name % "user"][120:])
    assert torch.equal(after[name % "tags"], before[name % "tags"]), "it was not asked for"


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        (SCHEMA, ["train.warm_start_tables=['users']"], "'users' is not a table of this run; wanted some of: hour, likes"),
        (changed(USERS, r"\g<1>60"), [], "table user has shape (120, 16) there and (60, 16) here"),
        (SCHEMA, ["train.warm_start=nowhere"], "train.warm_start = 'nowhere': no run folder"),
    ],
)  # fmt: skip
def test_a_warm_start_that_cannot_be_is_refused(config, process, text, settings, words):
    with pytest.raises(InputError) as caught:
        warm(config, process, text, settings)
    assert words in str(caught.value)
