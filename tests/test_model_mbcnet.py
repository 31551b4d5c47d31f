"""MBCNet has the paper's shape and size, any subset and order of branches, and an objective that adds up as Eq. 17."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.model.branches import BRANCHES, DeepConfig, EFGCConfig
from mbcnet_rec.model.input_layout import ALL, WIDE, InputLayout, input_layout
from mbcnet_rec.model.layers import CrossConfig
from mbcnet_rec.model.losses import (
    CoteachingConfig,
    DifferentiationConfig,
    branch_coteaching_loss,
    latent_distance,
    moderate_differentiation_loss,
    weighted_bce,
)
from mbcnet_rec.model.mbcnet import BranchArch, MBCNet, MBCNetConfig
from mbcnet_rec.model.objective import Objective, Outputs, build_transforms
from mbcnet_rec.report.run_report import dead_blocks
from mbcnet_rec.training.evaluation import dead_outputs

ROOT = Path(__file__).parents[1]
LAYOUT = InputLayout(
    {"user": 4, "item": 8, "tags": 4},
    {"price": (0, 1), "image": (1, 4)},
    {"match": ("user", "item"), "looks": ("image", "user")},
    wide=True,
)
SMALL = {
    "efgc": EFGCConfig((6, 4)),
    "cross": CrossConfig(low_rank=2),
    "deep": DeepConfig((10, 8)),
    "branch_dim": 8,
    "top": (7, 5),
}


def small(**kwargs):
    return MBCNetConfig(**(SMALL | kwargs))


def features():
    generator = torch.Generator().manual_seed(0)
    x, wide = (torch.randn(16, LAYOUT.width(group), generator=generator) for group in (ALL, WIDE))
    return {ALL: x, WIDE: wide, "match": x[:, :12], "looks": torch.cat([x[:, :4], x[:, 17:]], 1)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_at_the_papers_size():
    layout = input_layout(load_schema(ROOT / "data/schemas/pailitao.toml"), wide=True)
    assert len(layout.keys(ALL)) == 192 and layout.width() == 2780
    assert len(layout.groups) == 7 and sum(layout.width(group) for group in layout.groups) == 800
    with torch.device("meta"):
        arch = BranchArch(MBCNetConfig(branches=tuple(BRANCHES)), layout)
        paper = BranchArch(MBCNetConfig(), layout)
        transforms = build_transforms(3, 128, DifferentiationConfig())
    # first layers 800 * 1024 + 7 * 1024; second 7 * (1024 * 128 + 128); reduction 7 * 128 * 512 + 512
    efgc = 826_368 + 918_400 + 459_264
    assert efgc == 2_204_032  # the paper's 2.2 million
    # a layer: V 2 * 16 * 2780, U the same, C 2 * 16 * 16, gates 2 * 2780, bias 2780; reduction 2780 * 512 + 512
    cross = 2 * (88_960 + 88_960 + 512 + 5_560 + 2_780) + 1_423_872
    # weights 2780 * 2048 + 2048 * 1024 + 1024 * 512 + 2 * 512 * 512, biases 2048 + 1024 + 3 * 512
    deep = 8_839_168 + 4_608
    # 77 fields of 16 as they are; 37 of 32, 16 of 8 and 16 of 4; two vectors of 64 and 44 numbers; 16 * 512 + 512
    fm = (37 * 32 + 16 * 8 + 16 * 4 + 2 * 64 + 44) * 16 + 8_704
    wide = (146 + 172) * 512 + 512  # weights of ids, and numbers
    assert [count(branch) for branch in arch.branches.values()] == [efgc, cross, deep, fm, wide]
    top = 512 * 512 + 512 + 512 * 256 + 256 + 256 * 128 + 128  # once for all branches
    assert count(arch.top) == top
    # a logit layer of 128 + 1 for each branch and the fusion: 13.3 million with W
    assert count(paper) == efgc + cross + deep + top + 4 * 129 == 13_272_620
    assert count(transforms) == 3 * 128 * 128


@pytest.mark.parametrize(
    "branches",
    [
        *itertools.permutations(("efgc", "cross", "deep")),
        *((name,) for name in BRANCHES),
        ("wide", "fm"),
        ("fm", "deep", "wide", "efgc", "cross"),
    ],
)
def test_any_branches_in_any_order(branches):
    config = small(branches=branches)
    arch = BranchArch(config, LAYOUT)
    output = arch(features())
    assert [part.shape for part in output] == [(len(branches), 16, 5), (len(branches), 16), (16,)]
    # Eq. 8, 9 and 15 branch by branch
    latents = [arch.top(branch(features())) for branch in arch.branches.values()]
    torch.testing.assert_close(output.latents, torch.stack(latents))
    for k, latent in enumerate(latents):
        torch.testing.assert_close(output.branch_logits[k], arch.branch_logits[k](latent))
    fused = arch.fused_logit(sum(latents) / len(branches))
    torch.testing.assert_close(output.fused_logits, fused)
    assert list(arch.branches) == list(branches)
    # every parameter learns: DistributedDataParallel waits for each gradient
    losses = objective(config)[1].losses
    loss, _ = losses(output, *ROWS)
    loss.backward()
    assert not [n for m in (arch, losses) for n, p in m.named_parameters() if p.grad is None]


def test_gated_fusion_is_a_weighted_mean():
    arch = BranchArch(small(fusion="gated"), LAYOUT)
    output = arch(features())
    z = output.latents
    gates = torch.softmax(arch.fusion.gate(torch.cat(list(z), dim=1)), dim=1)  # (B, K)
    mixed = sum(gates[:, k : k + 1] * z[k] for k in range(3))
    torch.testing.assert_close(output.fused_logits, arch.fused_logit(mixed))


def objective(config=None, **kwargs):
    model = MBCNet(config or small(), nn.Identity(), LAYOUT)
    return model, Objective(model, **kwargs)


ROWS = torch.tensor([1.0, 0.0] * 8), torch.ones(16)  # labels and weights


@pytest.mark.parametrize("kind", ["moderate", "max_difference", "min_difference"])
@pytest.mark.parametrize("norm", ["l2", "squared"])
def test_objective_is_the_sum_of_its_terms(kind, norm):
    coteaching = CoteachingConfig(weight=0.3, scheme="no_discrimination", confidence=True)
    differentiation = DifferentiationConfig(weight=0.7, kind=kind, norm=norm)
    model, whole = objective(coteaching=coteaching, differentiation=differentiation)
    output, (labels, _) = model.dense_arch(features()), ROWS
    loss, outputs = whole.losses(output, *ROWS)
    bce = weighted_bce(output.fused_logits, labels) + weighted_bce(output.branch_logits, labels).sum()
    taught = branch_coteaching_loss(output.branch_logits, labels, scheme="no_discrimination", confidence=True)
    if kind == "moderate":
        different = moderate_differentiation_loss(output.latents, whole.losses.transforms.weight, norm=norm)
    else:
        different = latent_distance(output.latents, norm=norm) * (-1 if kind == "max_difference" else 1)
        assert whole.losses.transforms is None and outputs.transform_distance.shape == (0,)
    torch.testing.assert_close(loss, bce + 0.3 * taught + 0.7 * different)
    terms = {"loss": loss, "bce": bce, "coteaching_loss": taught, "differentiation_loss": different}
    torch.testing.assert_close(outputs.terms, {name: term.detach() for name, term in terms.items()})
    assert not any(term.requires_grad for term in outputs.terms.values())
    torch.testing.assert_close(outputs.logits[:, 0], output.fused_logits.detach())
    torch.testing.assert_close(outputs.logits[:, 1:], output.branch_logits.detach().t())


def test_warm_up_grows_in_training_only():
    model, whole = objective(coteaching=CoteachingConfig(weight=1.0, warmup_steps=4, scheme="no_discrimination"))
    output = model.dense_arch(features())
    factors = []
    for _ in range(6):
        loss, outputs = whole.losses(output, *ROWS)
        terms = outputs.terms
        rest = terms["bce"] + 0.1 * terms["differentiation_loss"]
        factors.append(((loss - rest) / terms["coteaching_loss"]).item())
    assert factors == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], abs=1e-5)
    whole.eval()
    whole.losses(output, *ROWS)
    assert whole.losses.step == 6


@pytest.mark.parametrize("init", ["orthogonal", "identity"])
@pytest.mark.parametrize("parametrization", ["soft", "orthogonal"])
def test_transforms_start_orthogonal(init, parametrization):
    transforms = build_transforms(3, 6, DifferentiationConfig(init=init, parametrization=parametrization))
    eye = torch.eye(6).repeat(3, 1, 1)
    matrices = transforms()
    torch.testing.assert_close(matrices @ matrices.transpose(1, 2), eye, atol=1e-5, rtol=0)
    if init == "orthogonal":
        assert torch.linalg.matrix_norm(matrices[0] - matrices[1]) > 0.5
    if parametrization == "orthogonal":
        optimizer = torch.optim.SGD(transforms.parameters(), lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            (transforms() * torch.randn(3, 6, 6)).sum().backward()
            optimizer.step()
        moved = transforms()
        torch.testing.assert_close(moved @ moved.transpose(1, 2), eye, atol=1e-5, rtol=0)
        assert not torch.allclose(moved, matrices)


@pytest.mark.parametrize("parametrization", ["soft", "orthogonal"])
def test_autocast_keeps_the_losses_in_float32(parametrization):
    differentiation = DifferentiationConfig(parametrization=parametrization)
    model, whole = objective(differentiation=differentiation)
    if parametrization == "orthogonal":  # away from where it starts, so that W is computed by products
        whole.losses.transforms.parametrizations.weight.original.data.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        output = model.dense_arch(features())
        loss, outputs = whole.losses(output, *ROWS)
    assert output.latents.dtype == torch.bfloat16  # the products did run in half precision
    assert loss.dtype == torch.float32 and outputs.logits.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in outputs.terms.values())
    # float32 from where the losses start: equal to the losses of the same numbers outside autocast
    again, _ = whole.losses(type(output)(*(tensor.float() for tensor in output)), *ROWS)
    torch.testing.assert_close(loss, again, rtol=1e-6, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in whole.parameters())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"branches": ()}, r"branches = \[\]"),
        ({"branches": ("deep", "deep")}, "each once"),
        ({"branches": ("deep", "attention")}, "efgc, cross, deep, fm, wide"),
        ({"top": ()}, r"top = \[\]"),
        ({"fusion": "max"}, "fusion = 'max'"),
        ({"branch_dim": 7}, r"deep.hidden = \[10, 8\]"),
        ({"branches": ("cross",), "branch_dim": 0}, "branch_dim = 0"),
    ],
)
def test_refuses(kwargs, words):
    with pytest.raises(InputError, match=words):
        small(**kwargs)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_the_activation_of_the_last_layer_of_the_top(activation):
    arch = BranchArch(small(top_activation=activation), LAYOUT)
    latents = arch(features()).latents
    assert bool((latents < 0).any()) == (activation == "none")
    assert [type(layer).__name__ for layer in arch.top].count("ReLU") == 1 + (activation == "relu")


def test_dead_outputs_are_named():
    """Those that say the same of every row in each step; the bias may move between steps, padding and single rows say nothing."""
    logits = torch.tensor([[1.0, 0.2, 0.5, 0.1], [1.1, 0.2, 0.6, 0.3], [9.0, 9.0, 9.0, 9.0]])
    one = Outputs(logits, torch.zeros(3), torch.tensor([1.0, 1.0, 0.0]), {}, torch.zeros(3), torch.zeros(3))
    moved = one._replace(logits=one.logits - torch.tensor([0.0, 0.1, 0.0, 0.0]))
    names = ("fused", "cross", "deep", "efgc")
    assert dead_outputs([one, moved], names) == ["cross"]
    single, padding = (one._replace(weights=torch.eye(3)[0] * each) for each in (1, 0))
    assert dead_outputs([one, single, padding], names) == ["cross"]
    assert dead_outputs([single, padding], names) == dead_outputs([padding], names) == dead_outputs([], names) == []
    alive = one._replace(logits=torch.arange(12.0).reshape(3, 4))
    assert dead_outputs([one, alive], names) == []
    assert dead_outputs([one._replace(logits=logits[:, :1] * 0)], ["fused"]) == ["fused"]
    lines = [{"step": 10}, {"step": 20, "dead": ["deep"]}, {"step": 30, "dead": ["deep"]}]
    assert "Dead from step 20 to the end: Deep." in dead_blocks({"train": lines})[0].text
    assert dead_blocks({"train": lines[:1]}) == []
