"""A rank lost under NCCL ends the run with 77 and not in a hang or with 134, and a host's GPUs are shared out or refused; without a GPU."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.errors import InputError
from mbcnet_rec.runtime.exits import LostRankError
from mbcnet_rec.runtime.process import Process, joined_process, refuse_shared_gpu, vote
from mbcnet_rec.runtime.watchdog import Watchdog
from sharding.bridge.groups import leave_groups

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_answer_that_lacks_a_rank_is_no_answer(rank):
    """NCCL leaves the tensors of a collective that it has ended as they were, as the fake group does; its watchdog then kills no process."""
    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    with pytest.raises(RuntimeError, match="NCCL ended a collective that not all ranks had joined"):
        vote([torch.tensor(False), False])
    leave_groups()


def test_the_vote_of_one_process_reads_the_flag():
    assert vote([torch.tensor(True), False, True]) == [0, None, 0]


def lost_rank(error: Exception, device: torch.device, tmp_path) -> BaseException:
    """What becomes of an error in rank 0 while rank 1, of which a store of no process tells, is silent."""
    process = Process(0, 2, 0, 2, device, dist.HashStore())
    with pytest.raises(RuntimeError) as raised, Watchdog(process, tmp_path, 0.5):
        raise error
    return raised.value


def test_an_error_over_what_nccl_has_ended_is_a_lost_rank(tmp_path):
    found = lost_rank(RuntimeError("negative dimension -7"), CUDA, tmp_path)
    assert isinstance(found, LostRankError) and found.exit_code == 77
    assert "rank 0: at start: rank 1 gives no sign of life" in str(found)


def test_an_error_of_a_rank_of_its_own_stays_what_it_is(tmp_path):
    assert str(lost_rank(RuntimeError("negative dimension -7"), CPU, tmp_path)) == "negative dimension -7"


def test_an_error_aborts_the_groups_and_nothing_is_left():
    with joined_process("cpu"):
        part = dist.new_group([0])
        leave_groups(abort=True)
        assert not dist.is_initialized() and part not in dist.distributed_c10d._world.pg_map
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_scheduler_may_show_each_task_one_gpu():
    """Four ranks on two hosts, which see one GPU each, all as number 0."""
    store = dist.HashStore()
    for rank, gpu in enumerate(("a", "b", "c", "c")):
        store.set(f"gpu/{rank}", gpu)
    refuse_shared_gpu(store, 0, 0, 2, "a")
    refuse_shared_gpu(store, 1, 1, 2, "b")
    with pytest.raises(
        InputError, match=r"local rank 1: this host has 1 GPU; start at most that many processes on it \(-j HOSTSx1\)"
    ):
        refuse_shared_gpu(store, 3, 1, 2, "c")
