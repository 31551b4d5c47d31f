"""The smallest cluster that fits. Every answer is a plan that was made, never a formula alone."""

from collections.abc import Callable
from dataclasses import replace

from data.errors import InputError
from sharding.cost.assess import Assessment, assess, search_bound
from sharding.plan.cluster import MAX_RANKS
from sharding.plan.placement import device_problem
from sharding.search.candidates import all_options, assumed_fields
from sharding.search.planner import make_plan
from sharding.search.task import Progress, Task

MOST_HOSTS = 4096  # of a search


def solve(task: Task, progress: Progress | None = None) -> Assessment:
    """Plan and assess; DoesNotFit if nothing fits."""
    plan = make_plan(task, progress)
    bound = search_bound(all_options(task), plan, task.cluster)
    assumed = assumed_fields(task.schema, task.config)
    return replace(assess(plan, task.cluster), any_types_bound=bound, assumed=assumed)


def smallest_cluster(task: Task, headroom: float, say: Callable[[str], None] = lambda line: None) -> Assessment:
    """The fewest devices that fit: parts of one host, then whole hosts. The task's cluster says the kind of host, not how many.

    `headroom`: share of each device's memory to leave free, in place of the config's reserve. `say` is told each size that is tried.
    """
    if problem := device_problem(task.empty_plan()):  # on every size
        raise InputError(f"sharding.{problem}")
    devices, config = task.cluster.devices_per_host, replace(task.config, storage_reserve=headroom)

    def attempt(hosts: int, devices: int) -> Assessment | InputError:
        cluster = task.cluster.resized(hosts, devices)
        say(f"trying: {cluster}")
        try:
            return solve(replace(task, config=config, cluster=cluster))
        except InputError as error:
            return error

    for count in [each for each in (1, 2, 4, 8, 16) if each < devices] + [devices]:
        found = attempt(1, count)
        if isinstance(found, Assessment):
            return found
    low, high = 1, 2  # `low` hosts do not fit
    while isinstance(found := attempt(high, devices), InputError):
        low, high = high, 2 * high
        if high > MOST_HOSTS or high * devices > MAX_RANKS:
            raise InputError(f"no cluster of {task.cluster.name} up to {low} hosts fits: {found}")
    while high - low > 1:
        middle = (low + high) // 2
        smaller = attempt(middle, devices)
        if isinstance(smaller, InputError):
            low = middle
        else:
            found, high = smaller, middle
    return found
