"""The smallest cluster that fits. Every answer is a plan that was made, never a formula alone."""

import math
from collections.abc import Callable
from dataclasses import replace

from data.errors import InputError
from sharding.cost.assess import Assessment, assess
from sharding.cost.memory import DoesNotFit, Shortage
from sharding.plan.cluster import MAX_RANKS
from sharding.search.planner import make_plan
from sharding.search.task import Progress, Task

MOST_STEPS = 12  # cluster sizes tried by one search


def solve(task: Task, progress: Progress | None = None) -> Assessment:
    """Plan and assess.

    Raises:
        DoesNotFit: nothing fits.
    """
    return assess(make_plan(task, progress), task.cluster)


def smallest_cluster(
    task: Task, headroom: float, say: Callable[[str], None] = lambda line: None
) -> Assessment:
    """The fewest devices that fit, leaving a share of each device's memory free: parts of one host, then whole hosts.

    Args:
        task: its cluster says the kind of host, not how many.
        headroom: share of memory to leave free, in place of the config's reserve.
        say: told each size that is tried.

    Raises:
        InputError: none of the sizes tried fits.
    """
    if not 0 <= headroom < 1:
        raise InputError(
            f"--headroom {headroom}: wanted a share in [0, 1); 0.2 leaves a fifth of every device free"
        )
    devices, config = task.cluster.devices_per_host, replace(task.config, storage_reserve=headroom)

    def attempt(hosts: int, devices: int) -> Assessment | InputError:
        cluster = task.cluster.resized(hosts, devices)
        say(f"trying: {cluster}")
        try:
            return solve(replace(task, config=config, cluster=cluster))
        except InputError as error:
            return error

    found: Assessment | InputError = InputError("nothing was tried")
    for count in [each for each in (1, 2, 4, 8, 16) if each < devices] + [devices]:
        found = attempt(1, count)
        if isinstance(found, Assessment):
            return found
    low, high = 1, 1  # `low` hosts do not fit
    for _ in range(MOST_STEPS):
        high = max(low + 1, _hosts_needed(found.shortage, low) if isinstance(found, DoesNotFit) else 0)
        if high * devices > MAX_RANKS:
            break
        found = attempt(high, devices)
        if isinstance(found, InputError):
            low = high
            continue
        while high - low > 1:
            middle = (low + high) // 2
            smaller = attempt(middle, devices)
            if isinstance(smaller, InputError):
                low = middle
            else:
                found, high = smaller, middle
        return found
    raise InputError(f"no cluster of {task.cluster.name} up to {high} hosts fits: {found}")


def _hosts_needed(shortage: Shortage, hosts: int) -> int:
    """A first guess: as if need stayed and room grew with hosts. Activations grow too, so it may be short by some."""
    if shortage.room_bytes <= 0 or shortage.too_large:
        return hosts + 1
    return min(2 * hosts, math.ceil(hosts * shortage.needed_bytes / shortage.room_bytes))
