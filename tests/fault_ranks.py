"""The scenarios of tests/test_training_faults.py: each breaks something in a run of two ranks and notes what came of it."""

import errno
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from forked_ranks import report, run_ranks
from small_data import write_small

from mbcnet_rec.model.objective import LossArch
from mbcnet_rec.training import records, saver
from mbcnet_rec.training.checkpoint import Saved, step_folder
from mbcnet_rec.training.records import TIMING_KEYS
from mbcnet_rec.training.tensor_file import map_block, read_header
from mbcnet_rec.training.watchdog import Watchdog

FOLDER = Path(sys.argv[1])
CONFIG = write_small(FOLDER, train_rows=2_400, other_rows=120)
STEPS = 12


def train_args(name, *settings, resume=False):
    common = [
        f"train.out={FOLDER / name}",
        f"train.max_steps={STEPS}",
        "train.log_every=4",
        "train.eval_every=6",
    ]
    args = ["train", "--config", str(CONFIG), *(["--resume"] if resume else ["--overwrite"])]
    for setting in (*common, "train.timeout_seconds=20", *settings):
        args += ["--set", setting]
    return args


def run(name, *settings, resume=False, **options):
    result = run_ranks(train_args(name, *settings, resume=resume), FOLDER / "logs" / name, **options)
    checkpoints = FOLDER / name / "checkpoints"
    result["steps"] = sorted(int(path.parent.name[5:]) for path in checkpoints.glob("step_*/manifest.json"))
    result["partial"] = [str(path) for path in (FOLDER / name).rglob("*.partial*")]
    return result


def tensors(name, step):
    """Logical blocks of a checkpoint as bytes."""
    saved = Saved(step_folder(FOLDER / name / "checkpoints", step))
    found = {}
    for part in saved.manifest.parts:
        blocks = read_header(saved.folder / part.file)
        for index, entry in enumerate(part.entries):
            values = map_block(saved.folder / part.file, blocks[str(index)])
            found[f"{entry.name}{entry.offsets}"] = values.contiguous().numpy().tobytes()
    return found


def metrics(name):
    lines = [json.loads(line) for line in (FOLDER / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]


def equal_to_calm(name):
    return {
        "tensors": tensors(name, STEPS) == tensors("calm", STEPS),
        "metrics": metrics(name) == metrics("calm"),
    }


def nan_at(step, guilty=1):
    """The loss of one step is NaN on one rank."""

    def hook(rank):
        forward, calls = LossArch.forward, [0]

        def broken(self, *args):
            loss, outputs = forward(self, *args)
            if self.training:
                calls[0] += 1
                if calls[0] == step and rank == guilty:
                    loss = loss * float("nan")
            return loss, outputs

        LossArch.forward = broken

    return hook


def at_beat(place, action, only=None):
    """Do something as a rank comes to a place, once."""

    def hook(rank):
        beat, done = Watchdog.beat, []

        def watched(self, where):
            if where == place and rank == (rank if only is None else only) and not done:
                done.append(where)
                action()
            beat(self, where)

        Watchdog.beat = watched

    return hook


def full_disk(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def calm():
    return run("calm", "train.checkpoint_every=5")


def killed_rank():
    """One rank dies by SIGKILL in step 8; then both are started again."""
    hook = at_beat("step 8", lambda: os.kill(os.getpid(), signal.SIGKILL), only=1)
    first = run("killed", "train.checkpoint_every=5", hook=hook)
    path = FOLDER / "killed" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "split": "tra')  # what a crash can leave
    stale = FOLDER / "killed" / "checkpoints" / ".step_7.dead.partial"
    stale.mkdir()
    again = run("killed", "train.checkpoint_every=5", resume=True)
    return {"first": first, "again": again, "equal": equal_to_calm("killed")}


def sigterm():
    """SIGTERM to one rank in step 9, where no checkpoint is due; resumed, it ends as if nothing had been."""
    hook = at_beat("step 9", lambda: os.kill(os.getpid(), signal.SIGTERM), only=1)
    first = run("term", hook=hook)
    again = run("term", resume=True)
    return {"first": first, "again": again, "equal": equal_to_calm("term")}


def usr1_in_evaluation():
    """SIGUSR1 within an evaluation: it is given up and made again."""
    hook = at_beat("evaluation at step 6", lambda: os.kill(os.getpid(), signal.SIGUSR1), only=0)
    first = run("usr1", hook=hook)
    lines = len(metrics("usr1"))
    again = run("usr1", resume=True)
    return {"first": first, "lines": lines, "again": again, "equal": equal_to_calm("usr1")}


def nan_stops():
    result = run("nan", hook=nan_at(8))
    result["faults"] = sorted(path.name for path in (FOLDER / "nan" / "faults").iterdir())
    # the step that failed is not in the checkpoint: trained on from it without the fault, the run ends as the calm one
    again = run("nan", resume=True)
    return {"first": result, "again": again, "equal": equal_to_calm("nan")}


def nan_skipped():
    """The step is passed over on both ranks: the rows are those of the checkpoint before, bit by bit."""
    result = run(
        "skip", "train.on_nonfinite=skip", "train.checkpoint_every=1", "train.keep_last=20", hook=nan_at(8)
    )
    before, after = tensors("skip", 7), tensors("skip", 8)
    changed = [name for name in before if not name.startswith("window") and before[name] != after.get(name)]
    return result | {"changed": changed, "next_changed": tensors("skip", 9) != after}


def nan_cap():
    return run("cap", "train.on_nonfinite=skip", "train.max_skipped=0", hook=nan_at(3))


def stopped_rank():
    """SIGSTOP of one rank: the other names it after the timeout, and the stacks are written."""
    hook = at_beat("step 5", lambda: os.kill(os.getpid(), signal.SIGSTOP), only=1)

    def wake(pids):
        end = time.monotonic() + 60
        while time.monotonic() < end and "gives no sign" not in (FOLDER / "logs/stop/rank_0.log").read_text():
            time.sleep(0.1)
        time.sleep(4)  # the others' timeout
        os.kill(pids[1], signal.SIGKILL)

    result = run("stop", "train.timeout_seconds=4", "train.stall_seconds=1", hook=hook, meanwhile=wake)
    result["stacks"] = (FOLDER / "stop" / "stacks" / "rank_0.txt").read_text()
    return result


def absent_rank():
    """Rank 1 never comes."""

    def hook(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return run("absent", "train.timeout_seconds=3", hook=hook)


def port_taken():
    """Another program listens at MASTER_PORT."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        return run("port", "train.timeout_seconds=3", port=taken.getsockname()[1])


def disk_full_in_save():
    """The disk of rank 1 is full from the second checkpoint on."""

    def hook(rank):
        real, calls = saver.write_tensors, [0]

        def filling(named, sink):
            calls[0] += 1
            return full_disk() if rank == 1 and calls[0] > 1 else real(named, sink)

        saver.write_tensors = filling

    first = run("full", "train.checkpoint_every=2", hook=hook)
    again = run("full", "train.checkpoint_every=2", resume=True)
    return {"first": first, "again": again, "equal": equal_to_calm("full")}


def disk_full_in_metrics():
    """The disk is full in the middle of the second line of metrics.jsonl."""

    def hook(rank):
        add = records.Records.add

        def adding(self, step, split, values):
            real = self._file

            def half(text):
                real.write(text[: len(text) // 2])
                real.flush()
                full_disk()

            if step >= 8:
                self._file = SimpleNamespace(
                    write=half, flush=real.flush, fileno=real.fileno, close=real.close
                )
            add(self, step, split, values)

        records.Records.add = adding

    first = run("lines", hook=hook)
    first["text"] = (FOLDER / "lines" / "metrics.jsonl").read_text()
    again = run("lines", resume=True)
    return {"first": first, "again": again, "equal": equal_to_calm("lines")}


SCENARIOS = (
    calm, killed_rank, sigterm, usr1_in_evaluation, nan_stops, nan_skipped, nan_cap, stopped_rank, absent_rank,
    port_taken, disk_full_in_save, disk_full_in_metrics,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = [each for each in SCENARIOS if len(sys.argv) < 3 or each.__name__ in (*sys.argv[2:], "calm")]
    report({each.__name__: each for each in chosen}, FOLDER / "results.json")
