"""Proves that the plateau schedule is that of the BARS protocol: rates a tenth at each evaluation that does not improve, not below 1e-6, an end
after two in a row, and that other schedules keep their rates."""

import pytest
import torch

from mbcnet_rec.config import TrainConfig
from mbcnet_rec.training.state import TrainState, scale_rates


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


def test_rates_are_scaled_from_their_base_and_not_below_the_floor():
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in (1e-2, 1e-5, 1e-7)]
    optimizer = torch.optim.SGD(groups)
    for scale in (0.1, 0.01):  # not one upon the other
        scale_rates(optimizer, [1e-2, 1e-5, 1e-7], scale)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-6, 1e-7])


def test_an_auc_that_is_not_defined_decides_nothing():
    nan = float("nan")
    found, state = after([nan, 0.6, nan, nan, nan, 0.7], schedule="plateau", patience=1, keep_best=3)
    assert [each[0] for each in found] == [False, True, False, False, False, True]
    assert state.best == [(0.7, 5), (0.6, 1)] and state.lr_scale == 1.0 and not state.stopped
    # a checkpoint of an earlier version, which crowned its first evaluation
    old = state.to_json() | {"cursor": {"epoch": 0, "step": 0}, "best": [[None, 1]]}
    assert TrainState.from_json(old).best_step == -1
