"""Proves that `launch` uses no other private names of torchx and torchelastic than these, all in elastic.py, and that each is still there."""

import ast
import inspect
from pathlib import Path

import pytest
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

LAUNCH = Path(__file__).parents[1] / "launch"
NAMES = [
    (LocalElasticAgent, "_monitor_workers"),
    (LocalElasticAgent, "_pcontext"),
    (LocalElasticAgent, "_shutdown"),
    (LocalElasticAgent, "_stop_workers"),
    (SimpleElasticAgent, "_remaining_restarts"),
    (SimpleElasticAgent, "_rendezvous"),
    (SimpleElasticAgent, "_restart_workers"),
    (DynamicRendezvousHandler, "_bootstrap_store_info"),
]


@pytest.mark.parametrize(("owner", "name"), NAMES)
def test_the_name_is_still_there(owner, name):
    assert name in inspect.getsource(owner), f"launch/elastic.py uses {owner.__name__}.{name}"


def test_no_other_private_name_is_used():
    found = set()
    for path in LAUNCH.glob("*.py"):
        attributes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        ]
        names = {
            node.attr for node in attributes if node.attr.startswith("_") and not node.attr.startswith("__")
        }
        found |= {(path.name, name) for name in names}
    found -= {("worker.py", "_exit"), ("run_command.py", "_run_locally")}  # os._exit, and a method of our own
    assert found == {("elastic.py", name) for _, name in NAMES}
