"""MBCNet has the paper's shape and size, any subset and order of branches, and an objective that adds up as Eq. 17."""

import itertools

import pytest
import torch
from torch import nn

from data.errors import InputError
from mbcnet_rec.model.branches import BRANCHES, DeepConfig, EFGCConfig, FMConfig
from mbcnet_rec.model.input_layout import ALL, WIDE, InputLayout
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
from mbcnet_rec.model.objective import Objective, build_transforms

LAYOUT = InputLayout(
    {"user": 4, "item": 8, "tags": 4},
    {"price": (0, 1), "image": (1, 4)},
    {"match": ("user", "item"), "looks": ("image", "user")},
    wide=True,
)
SIZES = {
    "efgc": EFGCConfig((6, 4)),
    "cross": CrossConfig(num_layers=2, num_experts=2, low_rank=2),
    "deep": DeepConfig((10, 8)),
    "fm": FMConfig(),
}


def small(**kwargs):
    return MBCNetConfig(**({"branch_dim": 8, "top": (7, 5)} | SIZES | kwargs))


def features(rows=16, seed=0):
    x = torch.randn(rows, LAYOUT.width(), generator=torch.Generator().manual_seed(seed))
    return {
        ALL: x,
        WIDE: torch.randn(rows, LAYOUT.width(WIDE), generator=torch.Generator().manual_seed(seed + 1)),
        "match": x[:, :12],
        "looks": torch.cat([x[:, :4], x[:, 17:]], 1),
    }


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def paper_layout():
    """192 fields whose widths sum to 2,780, and seven overlapping groups of 800 columns together.

    125 fields of 16, 64 of 8, 1 of 12 and two image vectors of 128: 2000 + 512 + 12 + 256 = 2780.
    Groups: both images, 256; and 34 fields of 16 over six groups, 544.
    """
    dims = {f"f{i}": 16 for i in range(125)} | {f"g{i}": 8 for i in range(64)} | {"h": 12}
    groups = {"images": ("query", "item")}
    groups |= {
        f"group{i}": tuple(f"f{j}" for j in range(3 * i, 3 * i + size))
        for i, size in enumerate((6, 6, 6, 6, 5, 5))
    }
    return InputLayout(dims, {"query": (0, 128), "item": (128, 128)}, groups, wide=True)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_at_the_papers_size():
    layout = paper_layout()
    assert len(layout.keys(ALL)) == 192 and layout.width() == 2780
    assert len(layout.groups) == 7 and sum(layout.width(group) for group in layout.groups) == 800
    with torch.device("meta"):
        arch = BranchArch(MBCNetConfig(branches=tuple(BRANCHES)), layout)
        paper = BranchArch(MBCNetConfig(), layout)
        transforms = build_transforms(3, 128, DifferentiationConfig())
    branches = arch.branches
    # EFGC: first layers 800 * 1024 + 7 * 1024 =   826,368
    #       second     7 * (1024 * 128 + 128)  =   918,400
    #       reduction  7 * 128 * 512 + 512     =   459,264
    assert count(branches["efgc"]) == 826_368 + 918_400 + 459_264 == 2_204_032  # the paper's 2.2 million
    # Deep weights: 2780 * 2048 + 2048 * 1024 + 1024 * 512 + 512 * 512 + 512 * 512 = 8,839,168
    # biases: 2048 + 1024 + 3 * 512 = 4,608
    assert sum(p.numel() for p in branches["deep"].parameters() if p.dim() == 2) == 8_839_168
    assert count(branches["deep"]) == 8_839_168 + 4_608
    # Cross, a layer: V 2 * 16 * 2780 = 88,960, U the same, C 2 * 16 * 16 = 512, gates 2 * 2780 = 5,560, bias 2,780
    # two layers 2 * 186,772 = 373,544; reduction 2780 * 512 + 512 = 1,423,872
    assert count(branches["cross"].crossing) == 373_544
    assert count(branches["cross"]) == 373_544 + 1_423_872 == 1_797_416
    # FM: 125 fields of 16 as they are; 64 * 8 * 16 = 8,192; 12 * 16 = 192; 2 * 128 * 16 = 4,096; 16 * 512 + 512 = 8,704
    assert count(branches["fm"]) == 8_192 + 192 + 4_096 + 8_704
    # Wide: 190 weights of ids and 256 numbers to 512
    assert count(branches["wide"]) == (190 + 256) * 512 + 512
    # Top: 512 * 512 + 512 + 512 * 256 + 256 + 256 * 128 + 128 = 426,880, once for all branches
    assert count(arch.top) == 426_880
    # a logit layer of 128 + 1 for each branch and the fusion
    assert count(arch.branch_logits) == 5 * 129 and count(arch.fused_logit) == 129
    # W: three pairs of 128 * 128
    assert count(transforms) == 49_152
    # 2,204,032 + 8,843,776 + 1,797,416 + 426,880 + 4 * 129 = 13,272,620; with W 13,321,772: 13.3 million
    assert count(paper) == 13_272_620


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
    num_branches = len(branches)
    assert output.latents.shape == (num_branches, 16, 5)
    assert output.branch_logits.shape == (num_branches, 16) and output.fused_logits.shape == (16,)
    # Eq. 8, 9 and 15 branch by branch
    latents = [arch.top(branch(features())) for branch in arch.branches.values()]
    torch.testing.assert_close(output.latents, torch.stack(latents))
    for k, latent in enumerate(latents):
        torch.testing.assert_close(output.branch_logits[k], arch.branch_logits[k](latent).squeeze(1))
    fused = arch.fused_logit(sum(latents) / num_branches).squeeze(1)
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
    torch.testing.assert_close(output.fused_logits, arch.fused_logit(mixed).squeeze(1))


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
    model, whole = objective(
        coteaching=CoteachingConfig(weight=1.0, warmup_steps=4, scheme="no_discrimination")
    )
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
        ({"dropout": 1.5}, "dropout = 1.5"),
    ],
)
def test_refuses(kwargs, words):
    with pytest.raises(InputError, match=words):
        small(**kwargs)
