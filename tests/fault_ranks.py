"""The scenarios of tests/test_training_faults.py: each breaks something in a run of two ranks and notes what came of it."""

import errno
import itertools
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from forked_ranks import report, run_ranks, training
from small_data import write_small
from tiny_run import lines_of

from mbcnet_rec.checkpoints.shards import Saved
from mbcnet_rec.training.hooks import Hooks

FOLDER = Path(sys.argv[1])
CONFIG = write_small(FOLDER, train_rows=2_400, other_rows=120)
STEPS = 12
LIMIT = 3_500


COMMON = [f"train.max_steps={STEPS}", "train.log_every=4", "train.eval_every=6", "train.timeout_seconds=20"]


def run(name, *settings, resume=False, hooks=lambda rank: Hooks(), **options):
    every = [f"train.out={FOLDER / name}", *COMMON, *settings]
    result = run_ranks(training(CONFIG, every, hooks, resume=resume), FOLDER / "logs" / name, **options)
    checkpoints = FOLDER / name / "checkpoints"
    result["steps"] = sorted(int(path.parent.name[5:]) for path in checkpoints.glob("step_*/manifest.json"))
    result["partial"] = [str(path) for path in (FOLDER / name).rglob("*.partial*")]
    return result


def tensors(name, step):
    """Logical blocks of a checkpoint as bytes."""
    saved = Saved(FOLDER / name / f"checkpoints/step_{step}")
    return {f"{entry.name}{entry.offsets}": values.numpy().tobytes() for entry, values in saved.tensors()}


def metrics(name):
    """Lines without what tells of the machine; of train lines the step alone, since one tells of the steps since a resume."""
    return [line["step"] if line["split"] == "train" else line for line in lines_of(FOLDER / name)]


def equal_to_calm(name):
    return {"tensors": tensors(name, STEPS) == tensors("calm", STEPS), "metrics": metrics(name) == metrics("calm")}


def on_rank(guilty, **hooks):
    return lambda rank: Hooks(**hooks) if rank == guilty else Hooks()


def loss_at(step, factor=float("nan")):
    """The loss of one step is NaN on rank 1, or another multiple of what it was."""
    steps = itertools.count(1)

    def on_loss(loss, outputs):
        if next(steps) != step:
            return loss, outputs
        terms = outputs.terms
        return loss * factor, outputs._replace(terms=terms | {"loss": terms["loss"] * factor})

    return on_rank(1, on_loss=on_loss)


def at_place(place, action, guilty=1):
    """Do something as a rank comes to a place, once."""
    places = iter([place])

    def on_place(where):
        if where == place and next(places, None):
            action()

    return on_rank(guilty, on_place=on_place)


def killed(number):
    return lambda: os.kill(os.getpid(), number)


def calm():
    return run("calm", "train.checkpoint_every=5")


def killed_rank():
    """One rank dies by SIGKILL in step 8; then both are started again."""
    hooks = at_place("step 8", killed(signal.SIGKILL))
    first = run("killed", "train.checkpoint_every=5", hooks=hooks)
    path = FOLDER / "killed" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "split": "tra')  # what a crash can leave
    stale = FOLDER / "killed" / "checkpoints" / "step_7"
    stale.mkdir()
    for name in ("rank_00000.dead-1.safetensors", ".manifest.json.partial"):
        (stale / name).write_text("")
    again = run("killed", "train.checkpoint_every=5", resume=True)
    return {"first": first, "again": again, "equal": equal_to_calm("killed"), "stale": stale.exists()}


def sigterm():
    """SIGTERM to one rank in step 9, where no checkpoint is due; resumed, it ends as if nothing had been."""

    def ask():
        (FOLDER / "asked").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGTERM)

    first = run("term", hooks=at_place("step 9", ask))
    first["seconds_after"] = time.time() - float((FOLDER / "asked").read_text())
    again = run("term", resume=True)
    return {"first": first, "again": again, "equal": equal_to_calm("term")}


def usr1_in_evaluation():
    """SIGUSR1 within an evaluation: it is given up and made again."""
    first = run("usr1", hooks=at_place("evaluation at step 6", killed(signal.SIGUSR1), guilty=0))
    lines = len(metrics("usr1"))
    again = run("usr1", resume=True)
    return {"first": first, "lines": lines, "again": again, "equal": equal_to_calm("usr1")}


def sigterm_in_reading():
    """SIGTERM to one rank in the first of the batches that are read before they are scored; the other takes its time for its first."""
    at = "reading rows to score at step 6"

    def hooks(rank):
        def on_place(where):
            with (FOLDER / f"places_{rank}").open("a") as file:
                file.write(f"{where}\n")
            if where == at and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                (FOLDER / "signalled").touch()
            while where == at and not (FOLDER / "signalled").exists():
                time.sleep(0.01)
            if where == at and rank == 0:
                time.sleep(1)

        return Hooks(on_place=on_place)

    first = run("term_read", "data.batch_size=12", hooks=hooks)
    first["places"] = [(FOLDER / f"places_{rank}").read_text().splitlines() for rank in (0, 1)]
    again = run("term_read", "data.batch_size=12", resume=True)
    whole = run("calm_read", "data.batch_size=12")
    equal = tensors("term_read", STEPS) == tensors("calm_read", STEPS)
    return {
        "first": first,
        "again": again,
        "whole": whole,
        "equal": {"tensors": equal, "metrics": metrics("term_read") == metrics("calm_read")},
    }


def nan_stops():
    result = run("nan", hooks=loss_at(8))
    result["faults"] = sorted(path.name for path in (FOLDER / "nan" / "faults").iterdir())
    # the step that failed is not in the checkpoint: trained on from it without the fault, the run ends as the calm one
    again = run("nan", resume=True)
    return {"first": result, "again": again, "equal": equal_to_calm("nan")}


def nan_skipped():
    """The step is passed over on both ranks: the rows are those of the checkpoint before, bit by bit."""
    result = run("skip", "train.on_nonfinite=skip", "train.checkpoint_every=1", "train.keep_last=20", hooks=loss_at(8))
    before, after = tensors("skip", 7), tensors("skip", 8)
    changed = [name for name in before if before[name] != after.get(name)]
    return result | {"changed": changed, "next_changed": tensors("skip", 9) != after}


def nan_cap():
    return run("cap", "train.on_nonfinite=skip", "train.max_skipped=0", hooks=loss_at(3))


def spike():
    """A loss a thousand times its size on one rank, in a run that logs every step."""
    return run("spike", "train.log_every=1", hooks=loss_at(11, factor=1000.0))


def stopped_rank():
    """SIGSTOP of one rank: the other names it after the timeout, and the stacks are written."""
    hooks = at_place("step 5", killed(signal.SIGSTOP))

    def wake(pids):
        end = time.monotonic() + 60
        while time.monotonic() < end and "gives no sign" not in (FOLDER / "logs/stop/rank_0.log").read_text():
            time.sleep(0.1)
        time.sleep(4)  # the others' timeout
        os.kill(pids[1], signal.SIGKILL)

    result = run("stop", "train.timeout_seconds=4", "train.stall_seconds=1", hooks=hooks, meanwhile=wake)
    result["stacks"] = (FOLDER / "stop" / "stacks" / "rank_0.txt").read_text()
    return result


def absent_rank():
    """Rank 1 never comes."""

    def hooks(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Hooks()

    return run("absent", "train.timeout_seconds=3", hooks=hooks)


def port_taken():
    """Another program listens at MASTER_PORT."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        return run("port", "train.timeout_seconds=3", port=taken.getsockname()[1])


def disk_full_in_save():
    """The disk of rank 1 is full from the second checkpoint on."""

    writes = itertools.count(1)

    def fill():
        if next(writes) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first = run("full", "train.checkpoint_every=2", hooks=on_rank(1, on_write=fill))
    again = run("full", "train.checkpoint_every=2", resume=True)
    return {"first": first, "again": again, "equal": equal_to_calm("full")}


def stuck_rank():
    """Rank 1 holds up a step for 2.5 s: both ranks write their stacks, then the run ends as ever."""
    steps = itertools.count(1)

    def slow(loss, outputs):
        if next(steps) == 8:
            time.sleep(2.5)
        return loss, outputs

    result = run("stuck", "train.stall_seconds=1", "train.checkpoint_every=5", hooks=on_rank(1, on_loss=slow))
    stacks = [(FOLDER / "stuck/stacks" / f"rank_{rank}.txt").read_text() for rank in (0, 1)]
    return {"first": result, "stacks": stacks, "equal": equal_to_calm("stuck")}


def reader_raises():
    """A row of rank 1's share has an id beyond its table; in the training rows, then in the validation rows."""
    results = {}
    for split in ("train", "valid"):
        table = pq.read_table(FOLDER / f"{split}.parquet")
        column = table["user"].to_pylist()
        # the last rows in file order are rank 1's in evaluation; in training half of all rows are
        column[-30:] = [999] * 30
        bad = FOLDER / f"bad_{split}.parquet"
        broken = table.set_column(table.schema.get_field_index("user"), "user", pa.array(column))
        pq.write_table(broken, bad, row_group_size=700, write_page_checksum=True)
        results[split] = run(f"bad_{split}", f'data.{split}=["{bad}"]')
    return results


def read_then(action, calls_before=8):
    """Rank 1 reads some windows, then something else happens in the thread that reads."""
    calls = itertools.count(1)
    return on_rank(1, on_rows=lambda: action() if next(calls) > calls_before else None)


def reader_is_stuck():
    """The storage of rank 1 does not answer."""
    hooks = read_then(lambda: time.sleep(60))
    return run("reader", "data.timeout_seconds=2", "data.window_rows=64", hooks=hooks)


def reader_dies():
    """The thread that reads for rank 1 ends."""
    return run("dies", "data.timeout_seconds=2", "data.window_rows=64", hooks=read_then(sys.exit))


def log_is_full():
    """Nobody can write to rank 0's terminal: training continues without."""

    def hooks(rank):
        if rank == 0:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, 1)
            os.dup2(full, 2)
        return Hooks()

    result = run("quiet", "train.checkpoint_every=5", hooks=hooks)
    return {"first": result, "done": (FOLDER / "quiet/DONE").is_file(), "equal": equal_to_calm("quiet")}


def disk_full_in_metrics():
    """metrics.jsonl of rank 0 may not grow beyond 3.5 kB: a line is cut off by the kernel."""

    def limit():
        whole = FOLDER / "lines/checkpoints/step_6/manifest.json"
        while not whole.exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))

    first = run("lines", hooks=at_place("step 7", limit, guilty=0))
    first["text"] = (FOLDER / "lines" / "metrics.jsonl").read_text()
    again = run("lines", resume=True)
    return {"first": first, "again": again, "equal": equal_to_calm("lines")}


SCENARIOS = (
    calm, killed_rank, sigterm, sigterm_in_reading, usr1_in_evaluation, nan_stops, nan_skipped, nan_cap, spike, stopped_rank, stuck_rank, absent_rank,
    port_taken, reader_raises, reader_is_stuck, reader_dies, log_is_full, disk_full_in_save, disk_full_in_metrics,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = [each for each in SCENARIOS if len(sys.argv) < 3 or each.__name__ in (*sys.argv[2:], "calm")]
    report({each.__name__: each for each in chosen}, FOLDER / "results.json")
