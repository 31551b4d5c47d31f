"""Runs facebookresearch/dlrm's own torchrec_dlrm/dlrm_main.py, as it is, for tasks of benchmarks/peers.py, and tells its rate.

    python torchrec_dlrm_speed.py THREADS DLRM/torchrec_dlrm

Tasks come as lines on standard input, each with the arguments of dlrm_main.py; see timed_steps.py. Nothing of ours is imported here.
"""

import importlib
import os
import socket
import sys
from typing import Any

import torch
from timed_steps import answer_tasks


def train(task: dict[str, Any]) -> None:
    """One run of its main function, in a process group of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    try:
        importlib.import_module("dlrm_main").main(task["arguments"])
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    sys.path.insert(0, sys.argv[2])
    answer_tasks(train)
