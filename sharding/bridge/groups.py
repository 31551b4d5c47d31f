"""How a process leaves its ranks. Imports no TorchRec, which takes seconds."""

import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group


def leave_groups(*, abort: bool = False) -> None:
    """Leave all process groups; with `abort` at once, where NCCL would wait for a collective that another rank never joins."""
    (_abort_process_group if abort else dist.destroy_process_group)()
