"""Proves that what `export --calibrate` fits on validation rows is what the loader and the scorer answer with, and that it corrects probabilities
that are off."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from serving_data import printed_by
from sklearn.metrics import log_loss

from data.errors import InputError
from mbcnet_rec.serving import loader
from mbcnet_rec.serving.calibration import entropy_of, fit_calibration


def drawn(rows, seed):
    """Logits twice as far from 0 as they should be, and one too high."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-1, 1.5, rows)
    return (2 * z + 1).astype(np.float32), (rng.random(rows) < 1 / (1 + np.exp(-z))).astype(np.float32)


def applied(model, calibration, logits):
    model.spec["calibration"] = calibration
    return model.probabilities(torch.from_numpy(logits))


@pytest.mark.parametrize("kind", ["isotonic", "platt"])
def test_a_fit_mends_probabilities_of_other_rows(artifact, kind):
    model, (z, y), (other, labels) = loader.load(artifact), drawn(20_000, 1), drawn(20_000, 2)
    calibration = json.loads(json.dumps(fit_calibration(kind, z, y)))
    raw, p = applied(model, None, other), applied(model, calibration, other)
    truth = 1 / (1 + np.exp(-(other - 1) / 2))
    assert np.abs(p - truth).mean() < 0.015 < np.abs(raw - truth).mean()
    assert entropy_of(p, labels) < entropy_of(raw, labels) - 0.02
    rate = labels.mean()
    assert entropy_of(p, labels) == pytest.approx(
        log_loss(labels, p) / log_loss(labels, np.full(len(p), rate)), abs=1e-6
    )
    far = applied(model, calibration, np.asarray([-1e30, 1e30, np.nan], np.float32))
    assert far[0] < 1e-4 and far[1] > 1 - 1e-4 and np.isnan(far[2])
    both = applied(model, calibration, np.stack([other[:9], other[:9]], 1))  # the fused one, and a branch
    np.testing.assert_array_equal(both[:, 0], p[:9])
    np.testing.assert_allclose(both[:, 1], raw[:9], rtol=1e-6)
    with pytest.raises(InputError, match="of one class"):
        fit_calibration(kind, z, np.ones_like(z))


def test_export(runs, tmp_path):
    code, out, err = printed_by(
        "export", runs / "row_wise", "--out", tmp_path / "a", "--no-aot", "--calibrate", "isotonic"
    )
    assert code == 0 and "before calibration (isotonic)" in out, err
    check, model = json.loads((tmp_path / "a" / "check.json").read_text()), loader.load(tmp_path / "a")
    rows = pq.read_table(runs / "test.parquet")
    p = model.predict(rows)
    assert entropy_of(p, rows["click"].to_numpy()) == pytest.approx(check["ne_after"], abs=1e-6)
    assert check["mean_score"] == pytest.approx(p.mean(), abs=1e-6)
    valid = pq.read_table(runs / "valid.parquet")
    assert model.predict(valid).mean() == pytest.approx(valid["click"].to_numpy().mean(), abs=2e-3)
    code, out, err = printed_by("export", runs / "row_wise", "--since", tmp_path / "a", "--out", tmp_path / "delta")
    assert code == 0, err
    model.apply(tmp_path / "delta")
    np.testing.assert_array_equal(model.predict(rows), p)
