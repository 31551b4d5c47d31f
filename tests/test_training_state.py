"""Proves that the plateau schedule is that of the BARS protocol: rates a tenth at each evaluation that does not improve, not below 1e-6, an end
after two in a row, and that other schedules keep their rates."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from data.errors import InputError
from mbcnet_rec.config import TrainConfig
from mbcnet_rec.training.config import EmbeddingOptimConfig, OptimConfig, ScheduleConfig
from mbcnet_rec.training.dense_part import Rates
from mbcnet_rec.training.state import TrainState


def after(aucs, **settings):
    """What has become of the state after each evaluation: (better, lr_scale, stopped)."""
    state, train = TrainState(), TrainConfig(**settings)
    found = []
    for step, auc in enumerate(aucs):
        state.step = step
        found.append((state.note_evaluation(auc, train), round(state.lr_scale, 9), state.stopped))
    return found, state


def test_plateau_slows_down_at_each_miss_and_stops_after_two_in_a_row():
    found, state = after([0.6, 0.6, 0.7, 0.65, 0.69], schedule="plateau")
    assert found == [
        (True, 1.0, False),
        (False, 0.1, False),
        (True, 0.1, False),
        (False, 0.01, False),
        (False, 0.001, True),
    ]
    assert state.best == [(0.7, 2)]


@pytest.mark.parametrize(("patience", "ends"), [(0, False), (2, True)])
def test_a_constant_schedule_keeps_its_rates_and_stops_only_if_told(patience, ends):
    found, _ = after([0.6, 0.5, 0.4], schedule="constant", patience=patience)
    assert [each[1] for each in found] == [1.0, 1.0, 1.0] and found[-1][2] is ends


def test_the_patience_of_the_config_counts_under_plateau():
    found, _ = after([0.6, 0.5, 0.4, 0.3], schedule="plateau", patience=3)
    assert [each[2] for each in found] == [False, False, False, True]


def rates_of(dense: ScheduleConfig, tables: ScheduleConfig) -> tuple[Rates, Callable[[], list[float]]]:
    parts = {"dense": (1e-2, 1e-5), "fused": (1e-7, 1.0)}
    groups = {part: [{"lr": rate} for rate in rates] for part, rates in parts.items()}
    optimizers = [(part, SimpleNamespace(param_groups=each)) for part, each in groups.items()]
    optim = OptimConfig(dense_schedule=dense, embedding=EmbeddingOptimConfig(schedule=tables))
    built = SimpleNamespace(optim=optim, optimizer=SimpleNamespace(optimizers=optimizers))
    return Rates(built), lambda: [group["lr"] for each in groups.values() for group in each]  # type: ignore[arg-type]


def test_rates_are_scaled_from_their_base_and_not_below_the_floor():
    rates, now = rates_of(ScheduleConfig(), ScheduleConfig())
    for scale in (0.1, 0.01):  # not one upon the other
        rates.set(7, scale)
    assert now() == pytest.approx([1e-4, 1e-6, 1e-7, 0.01])


def test_schedules_of_tables_and_dense_part_are_their_formulas():
    """A warm-up of 4 steps, then each decay over 8: the shares at its beginning, at a quarter, half way, at the end and long after."""
    steps, shapes = (0, 3, 4, 6, 8, 12, 100), ("constant", "linear", "cosine", "polynomial")
    after = {
        "constant": (1, 1, 1, 1, 1),
        "linear": (1, 0.775, 0.55, 0.1, 0.1),
        "cosine": (1, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 0.55, 0.1, 0.1),
        "polynomial": (1, 0.1 + 0.9 * 0.75**3, 0.1 + 0.9 / 8, 0.1, 0.1),
    }
    for shape in shapes:
        schedule = ScheduleConfig(4, shape, 0 if shape == "constant" else 8, floor=0.1, power=3.0)
        rates, now = rates_of(ScheduleConfig(), schedule)
        found = []
        for step in steps:
            rates.set(step, 1.0)
            found.append(now())
        assert [each[3] for each in found] == pytest.approx([0.25, 1.0, *after[shape]])
        assert {each[0] for each in found} == {1e-2}, "the dense part's own schedule is constant"


def test_a_decay_without_an_end_is_refused():
    with pytest.raises(InputError, match=r"decay_steps = 0 with decay = 'cosine': wanted 1 or more"):
        ScheduleConfig(decay="cosine")


def test_an_auc_that_is_not_defined_decides_nothing():
    nan = float("nan")
    found, state = after([nan, 0.6, nan, nan, nan, 0.7], schedule="plateau", patience=1, keep_best=3)
    assert [each[0] for each in found] == [False, True, False, False, False, True]
    assert state.best == [(0.7, 5), (0.6, 1)] and state.lr_scale == 1.0 and not state.stopped
    # a checkpoint of an earlier version, which crowned its first evaluation
    old = state.to_json() | {"cursor": {"epoch": 0, "step": 0}, "best": [[None, 1]]}
    assert TrainState.from_json(old).best_step == -1
