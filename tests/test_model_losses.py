"""The losses agree with loops over Listing 1 in float64, values and gradients, and keep the promises that training relies on."""

import itertools
import math

import numpy as np
import pytest
import torch

from data.errors import InputError
from mbcnet_rec.model.losses import (
    CoteachingConfig,
    DifferentiationConfig,
    branch_coteaching_loss,
    branch_pairs,
    disagreement_rates,
    latent_distance,
    moderate_differentiation_loss,
    unit,
    weighted_bce,
)

SCHEMES = ("strong_to_weak", "weak_to_strong", "no_discrimination")
NORMS = ("l2", "squared")


def sigmoid(z):
    return 1.0 / (1.0 + math.exp(-z))


def naive_bce(z, y):
    p = sigmoid(z)
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


def naive_coteaching(logits, labels, scheme, threshold=-math.log(0.5), confidence=False):
    """Listing 1 row by row; the gradient by hand: d/dz_j of CE(p_i, sigmoid(z_j)) is p_j - p_i, teachers get none."""
    loss, count, gradient = 0.0, 0, np.zeros_like(logits)
    for i, j in itertools.permutations(range(len(logits)), 2):  # teacher, student
        for b, y in enumerate(labels):
            teacher, student = naive_bce(logits[i, b], y), naive_bce(logits[j, b], y)
            teaches = {
                "strong_to_weak": teacher < threshold < student,
                "weak_to_strong": teacher > threshold > student,
                "no_discrimination": True,
            }
            if teaches[scheme]:
                p_i, p_j = sigmoid(logits[i, b]), sigmoid(logits[j, b])
                margin = 2 * abs(p_i - 0.5) if confidence else 1.0
                loss += margin * (-p_i * math.log(p_j) - (1 - p_i) * math.log(1 - p_j))
                gradient[j, b] += margin * (p_j - p_i)
                count += 1
    return (loss / count, gradient / count) if count else (0.0, gradient)


def naive_differentiation(latents, transforms, norm):
    """Listing 1 with its loops over ordered pairs; the mean over pairs and rows at the end."""
    matrix = {}
    for (i, j), w in zip(branch_pairs(len(latents)), transforms, strict=True):
        matrix[i, j], matrix[j, i] = w, w.T
    terms = []
    for (i, j), w in matrix.items():
        mapped = latents[i] @ w
        for error in (mapped - latents[j], mapped @ w.T - latents[i]):
            squares = np.sum(error**2, axis=1)
            terms.append(squares if norm == "squared" else np.sqrt(squares))
    return 2 * float(np.mean(terms))  # two terms a pair


def numeric_gradient(function, x, eps=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += eps
        down[index] -= eps
        gradient[index] = (function(up) - function(down)) / (2 * eps)
    return gradient


def coteaching(logits, labels, **options):
    """The loss and its gradient."""
    z = logits.clone().requires_grad_()
    loss = branch_coteaching_loss(z, labels, **options)
    return loss.detach(), *torch.autograd.grad(loss, z)


def random_batch(num_branches=3, num_rows=40, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_branches, num_rows)) * scale, rng.integers(0, 2, num_rows).astype(np.float64)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("num_branches", [2, 3, 5])
@pytest.mark.parametrize("threshold", [-math.log(0.5), 0.4])
def test_coteaching_equals_listing_1(scheme, confidence, num_branches, threshold, dtype, rtol):
    logits, labels = random_batch(num_branches, seed=num_branches)
    z = torch.tensor(logits, dtype=dtype)
    options = {"scheme": scheme, "threshold": threshold, "confidence": confidence}
    loss, gradient = coteaching(z, torch.tensor(labels, dtype=dtype), **options)
    expected, expected_gradient = naive_coteaching(z.double().numpy(), labels, **options)
    assert expected > 0
    assert loss.item() == pytest.approx(expected, rel=rtol)
    error = np.linalg.norm(gradient.numpy() - expected_gradient)
    assert error < rtol * np.linalg.norm(expected_gradient)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_branches", [2, 3, 4])
def test_differentiation_equals_listing_1(norm, num_branches):
    rng = np.random.default_rng(num_branches)
    latents = rng.normal(size=(num_branches, 5, 4))
    transforms = rng.normal(size=(num_branches * (num_branches - 1) // 2, 4, 4))
    numeric = (
        numeric_gradient(lambda x: naive_differentiation(x, transforms, norm), latents),
        numeric_gradient(lambda x: naive_differentiation(latents, x, norm), transforms),
    )
    for dtype, rtol, gradient_rtol in ((torch.float64, 1e-12, 1e-7), (torch.float32, 1e-6, 2e-6)):
        inputs = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (latents, transforms)]
        loss = moderate_differentiation_loss(*inputs, norm=norm)
        loss.backward()
        assert loss.item() == pytest.approx(naive_differentiation(latents, transforms, norm), rel=rtol)
        for tensor, expected in zip(inputs, numeric, strict=True):
            assert np.linalg.norm(tensor.grad.numpy() - expected) < gradient_rtol * np.linalg.norm(expected)


@pytest.mark.parametrize("norm", NORMS)
def test_distance_without_transforms(norm):
    latents = np.random.default_rng(1).normal(size=(3, 6, 4))
    squares = [np.sum((latents[i] - latents[j]) ** 2, axis=1) for i, j in ((0, 1), (0, 2), (1, 2))]
    expected = np.mean(squares if norm == "squared" else np.sqrt(squares))
    assert latent_distance(torch.tensor(latents), norm=norm).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scheme", ["strong_to_weak", "weak_to_strong"])
@pytest.mark.parametrize("confidence", [False, True])
def test_without_disagreement_exactly_zero(scheme, confidence):
    labels = torch.tensor([1.0, 0.0, 1.0])
    logits = torch.tensor([[2.0, -1.0, -3.0], [1.0, -4.0, -1.0]])  # both right or both wrong
    loss, gradient = coteaching(logits, labels, scheme=scheme, confidence=confidence)
    assert loss == 0 and not gradient.any()


def test_a_prediction_of_one_half_is_neither_strong_nor_weak():
    _, gradient = coteaching(torch.tensor([[0.0, 0.0], [3.0, -3.0]]), torch.tensor([1.0, 1.0]))
    assert not gradient.any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_extreme_logits_stay_finite(scheme):
    logits = torch.tensor([[200.0, -200.0, 1e4], [-200.0, 200.0, -1e4]])
    loss, gradient = coteaching(logits, torch.tensor([1.0, 1.0, 0.0]), scheme=scheme)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_norm_of_exactly_zero_has_gradient_zero(norm):
    same = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1).requires_grad_()
    eye = torch.eye(4).repeat(3, 1, 1).requires_grad_()
    loss = moderate_differentiation_loss(same, eye, norm=norm) + latent_distance(same, norm=norm)
    loss.backward()
    assert loss == 0 and not same.grad.any() and not eye.grad.any()


def padded(tensor, dim, rows):
    noise = torch.randn(*tensor.shape[:dim], rows, *tensor.shape[dim + 1 :], dtype=tensor.dtype) * 3
    return torch.cat([tensor, noise], dim=dim)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_padding_rows_do_not_exist(scheme):
    torch.manual_seed(0)
    logits, labels = (torch.tensor(x) for x in random_batch())
    real, padding = len(labels), 17
    z, y = padded(logits, 1, padding), torch.cat([labels, torch.ones(padding)])
    # what data.stream.batch gives a padded batch: 0, and B / (real rows), so that plain means come out right
    weights = torch.cat([torch.full((real,), (real + padding) / real), torch.zeros(padding)])
    loss, gradient = coteaching(z, y, scheme=scheme, weights=weights)
    expected, expected_gradient = coteaching(logits, labels, scheme=scheme)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[:, :real], expected_gradient, rtol=1e-12, atol=0)
    assert not gradient[:, real:].any()
    torch.testing.assert_close(weighted_bce(z, y, weights), weighted_bce(logits, labels))
    torch.testing.assert_close(disagreement_rates(z, y, weights=weights), disagreement_rates(logits, labels))
    latents, transforms = torch.randn(3, real, 4).double(), torch.randn(3, 4, 4).double()
    for norm in NORMS:
        more = padded(latents, 1, padding)
        torch.testing.assert_close(
            moderate_differentiation_loss(more, transforms, norm=norm, weights=weights.double()),
            moderate_differentiation_loss(latents, transforms, norm=norm),
        )
        torch.testing.assert_close(
            latent_distance(more, norm=norm, weights=weights.double()), latent_distance(latents, norm=norm)
        )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_average_to_one_process(scheme, num_ranks):
    logits, labels = (torch.tensor(x) for x in random_batch(num_rows=40))
    # the last rank sees no disagreement at all: its own count is 0, the global one is not
    logits[:, -40 // num_ranks :] = logits[:1, -40 // num_ranks :]
    expected, expected_gradient = coteaching(logits, labels, scheme=scheme)
    shards = list(zip(logits.chunk(num_ranks, 1), labels.chunk(num_ranks), strict=True))
    counts = []
    for z, y in shards:
        coteaching(z, y, scheme=scheme, mean_over_ranks=lambda count: counts.append(count) or count)
    mean = torch.stack(counts).mean()
    parts = [coteaching(z, y, scheme=scheme, mean_over_ranks=lambda _: mean) for z, y in shards]
    losses, gradients = zip(*parts, strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=1e-12, atol=0)
    # DistributedDataParallel averages gradients
    torch.testing.assert_close(torch.cat(gradients, 1) / num_ranks, expected_gradient, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("rows_of", [(40,), (20, 20), (25, 12, 3, 0)])
def test_the_base_rate_as_threshold(rows_of):
    """A branch is strong on a row where its BCE is below that of always predicting the share of clicks of all ranks' rows, however few one has."""
    num_ranks = len(rows_of)
    rng = np.random.default_rng(0)
    labels, logits = (rng.random(40) < 0.2).astype(np.float64), rng.normal(size=(3, 40)) - 1.5
    rate = labels.mean()
    assert 0.05 < rate < 0.4
    bounds = [-math.log(rate if y else 1 - rate) for y in labels]
    rows = [naive_coteaching(logits[:, [b]], labels[[b]], "strong_to_weak", bounds[b]) for b in range(40)]
    terms = [
        sum(
            naive_bce(logits[i, b], labels[b]) < bounds[b] < naive_bce(logits[j, b], labels[b])
            for i, j in itertools.permutations(range(3), 2)
        )
        for b in range(40)
    ]
    expected = sum(count * loss for count, (loss, _) in zip(terms, rows, strict=True)) / sum(terms)
    # padding rows of weight 0 fill each rank's batch of 41 and do not count
    parts = zip(torch.tensor(logits).split(rows_of, 1), torch.tensor(labels).split(rows_of), strict=True)
    shards = [
        (padded(z, 1, 41 - len(y)), torch.cat([y, torch.ones(41 - len(y))]), (torch.arange(41) < len(y)).double())
        for z, y in parts
    ]
    seen, means = [], []
    for round_ in range(2):  # of the base rate, then of the number of disagreements
        seen.append([])
        for z, y, weights in shards:
            calls = []

            def mean(own, calls=calls, known=tuple(means)):
                calls.append(own.clone())
                return known[len(calls) - 1] if len(calls) <= len(known) else own

            coteaching(z, y, mean_over_ranks=mean, threshold="base_rate", weights=weights)
            seen[round_].append(calls[round_])
        means.append(torch.stack(seen[round_]).mean(0))
    one = torch.tensor(logits), torch.tensor(labels)
    losses, gradients = [], []
    for (z, y, weights), rows in zip(shards, rows_of, strict=True):
        replies = iter(means)
        options = {"threshold": "base_rate", "weights": weights}
        loss, gradient = coteaching(z, y, mean_over_ranks=lambda _, replies=replies: next(replies), **options)
        losses.append(loss)
        gradients.append(gradient[:, :rows])
    assert torch.stack(losses).mean().item() == pytest.approx(expected, rel=1e-9)
    of_one_process = coteaching(*one, threshold="base_rate")[1]
    torch.testing.assert_close(torch.cat(gradients, 1) / num_ranks, of_one_process, rtol=1e-12, atol=1e-18)
    assert disagreement_rates(*one, "base_rate").sum().item() == pytest.approx(sum(terms) / 40)


def test_a_batch_of_one_class_has_no_base_rate_to_beat():
    logits, labels = torch.tensor(random_batch()[0]), torch.zeros(40, dtype=torch.float64)
    loss, gradient = coteaching(logits, labels, threshold="base_rate")
    assert loss == 0 and not gradient.any()


def test_latents_of_unit_length():
    """Shrinking latents shrinks no loss, and a latent of 0 has gradient 0."""
    z = torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(unit(z), unit(1e-3 * z))
    torch.testing.assert_close(unit(z).norm(dim=2), torch.ones(3, 5, dtype=torch.float64))
    z[0, 0] = 0
    z.requires_grad_()
    distance = latent_distance(unit(z))
    (gradient,) = torch.autograd.grad(distance, z)
    assert gradient.isfinite().all() and (gradient[1:] * z[1:]).sum(2).abs().max() < 1e-12, "no push along the latent"
    half, maps = torch.randn(3, 5, 4).bfloat16(), torch.randn(3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = moderate_differentiation_loss(unit(half), maps)
    assert loss.dtype == torch.float32 and loss.item() == moderate_differentiation_loss(unit(half.float()), maps).item()


def test_disagreement_rates_by_hand():
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0])
    logits = torch.tensor([[1.0, 1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, -1.0]])
    # row 0: branch 0 right, 1 wrong; row 2: branch 1 right, 0 wrong; rows 1 and 3: both right
    assert disagreement_rates(logits, labels).tolist() == [[0.0, 0.25], [0.25, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_promoted(dtype):
    logits, labels = (torch.tensor(x) for x in random_batch())
    loss = branch_coteaching_loss(logits.to(dtype), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(branch_coteaching_loss(logits.to(dtype).double(), labels).item(), rel=1e-6)
    latents = torch.randn(2, 3, 4).to(dtype)
    assert moderate_differentiation_loss(latents, torch.randn(1, 4, 4)).dtype == torch.float32
    assert branch_coteaching_loss(logits, labels).dtype == torch.float64


def test_a_single_branch_has_no_differentiation():
    assert moderate_differentiation_loss(torch.randn(1, 5, 4), torch.empty(0, 4, 4)).item() == 0.0
    assert latent_distance(torch.randn(1, 5, 4)).item() == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CoteachingConfig(scheme="strong"), "scheme = 'strong': wanted one of 'strong_to_weak'"),
        (lambda: CoteachingConfig(weight=-0.1), "weight = -0.1"),
        (lambda: CoteachingConfig(threshold=math.nan), "threshold = nan"),
        (lambda: DifferentiationConfig(kind="max"), "kind = 'max': wanted one of 'moderate'"),
        (lambda: DifferentiationConfig(norm="l1"), "norm = 'l1'"),
        (lambda: branch_coteaching_loss(torch.zeros(2, 1), torch.zeros(1), scheme="all"), "scheme = 'all'"),
        (lambda: moderate_differentiation_loss(torch.zeros(3, 1, 2), torch.zeros(2, 2, 2)), "wanted 3"),
        (lambda: latent_distance(torch.zeros(2, 1, 2), norm="l3"), "norm = 'l3'"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(InputError, match=words):
        call()
