"""Every model of Table 3, and FM and DeepFM, computes its paper's formula, written here row by row in NumPy."""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from data.errors import InputError
from mbcnet_rec.model.branches import EFGCConfig, FMConfig
from mbcnet_rec.model.input_layout import ALL, WIDE, InputLayout
from mbcnet_rec.model.layers import CrossConfig
from mbcnet_rec.model.models import build_arch, build_model, needs_wide
from mbcnet_rec.model.zoo.crossnet import CrossNetConfig
from mbcnet_rec.model.zoo.dcnv2 import DCNv2Config
from mbcnet_rec.model.zoo.deepfm import DeepFMConfig
from mbcnet_rec.model.zoo.dnn import DNNConfig
from mbcnet_rec.model.zoo.efgc import EFGCNetConfig
from mbcnet_rec.model.zoo.enkd import EnKDConfig, TeacherGate, distillation_loss
from mbcnet_rec.model.zoo.finalmlp import FinalMLPConfig, StreamConfig
from mbcnet_rec.model.zoo.mmoe import MMoEConfig
from mbcnet_rec.plugins import model_class, model_config

B = 9
LAYOUT = InputLayout(
    {"user": 4, "item": 4, "tags": 4},
    {"price": (0, 1), "age": (1, 1)},
    {"match": ("user", "item"), "cost": ("price", "item")},
    wide=True,
)
SMALL = DNNConfig(hidden=(6, 5))
LOW_RANK = CrossConfig(num_layers=2, num_experts=3, low_rank=2)
FULL_RANK = CrossConfig(kind="full_rank", num_layers=2)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def array(tensor):
    return tensor.detach().numpy()


def affine(x, layer):
    return array(layer.weight) @ x + (0 if layer.bias is None else array(layer.bias))


def mlp(x, module):
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            x = np.maximum(affine(x, layer), 0)
    return x


def cross(x_0, module):
    x = x_0
    for layer in module.layers:
        if isinstance(layer, nn.Linear):
            x = x + x_0 * affine(x, layer)
        else:
            v, c, u, gate, bias = (array(p) for p in (layer.v, layer.c, layer.u, layer.gate, layer.bias))
            g = softmax(gate @ x)
            experts = [x_0 * (u[e] @ np.tanh(c[e] @ np.tanh(v[e] @ x)) + bias) for e in range(len(v))]
            x = x + sum(g[e] * experts[e] for e in range(len(v)))
    return x


def wide(w, module):
    # one weight for each of three sparse fields
    return sum(w[:3]) + w[3:] @ array(module.dense_weight) + array(module.bias)[0]


def fm(x, w, arch):
    vectors = [x[0:4], x[4:8], x[8:12]]  # three fields of width k, as they are
    matrices = array(next(iter(arch.vectors.projections.values())))  # (2, 1, k)
    vectors += [x[12] * matrices[0, 0], x[13] * matrices[1, 0]]
    pairs = sum(vectors[f] @ vectors[g] for f in range(5) for g in range(f + 1, 5))
    return wide(w, arch.wide) + pairs


def efgc(row, arch):
    match, cost = arch.branch.crossing.mlps
    groups = [mlp(row["match"], match), mlp(row["cost"], cost)]
    return affine(mlp(mlp(np.concatenate(groups), arch.branch.reduction), arch.top), arch.logit)[0]


def mmoe(x, arch):
    g = softmax(affine(mlp(x, arch.gate[0]), arch.gate[1]))
    mixed = sum(g[e] * mlp(x, expert) for e, expert in enumerate(arch.experts))
    return affine(mlp(mixed, arch.tower), arch.logit)[0]


def finalmlp(x, arch, contexts):
    streams = []
    for stream, columns in zip((arch.first, arch.second), contexts, strict=True):
        gate, body = stream[0], stream[1]
        context = array(gate.vector)[0] if columns is None else x[columns]
        g = 2 * sigmoid(affine(mlp(context, gate.gate[0]), gate.gate[1]))
        streams.append(mlp(g * x, body))
    h_1, h_2 = streams
    fusion = arch.fusion
    heads = array(fusion.heads)
    total = affine(h_1, fusion.first)[0] + affine(h_2, fusion.second)[0]
    for j, (p_1, p_2) in enumerate(zip(np.split(h_1, len(heads)), np.split(h_2, len(heads)), strict=True)):
        total += p_1 @ heads[j] @ p_2
    return total


def deep(x, arch):
    return affine(mlp(x, arch.mlp), arch.logit)[0]


def dcnv2(row, arch):
    both = np.concatenate([cross(row[ALL], arch.cross), mlp(row[ALL], arch.mlp)])
    return affine(mlp(both, arch.top), arch.logit)[0]


def crossnet(row, arch):
    return affine(mlp(cross(row[ALL], arch.cross), arch.mlp), arch.logit)[0]


FINAL = FinalMLPConfig(
    first=StreamConfig((8, 6), gate=(5,), context=("item", "age")), second=StreamConfig((4,), gate=(3,)), num_heads=2
)
# kind and config of each model -> its formula for a row
CASES = [
    ("dnn", SMALL, lambda row, arch: deep(row[ALL], arch)),
    ("enkd", EnKDConfig(hidden=(6, 5)), lambda row, arch: deep(row[ALL], arch)),
    ("crossnet", CrossNetConfig(cross=LOW_RANK), crossnet),
    ("crossnet", CrossNetConfig(cross=FULL_RANK, hidden=(5,)), crossnet),
    ("wide_deep", SMALL, lambda row, arch: wide(row[WIDE], arch.wide) + deep(row[ALL], arch)),
    ("dcnv2", DCNv2Config(hidden=(6, 5), cross=LOW_RANK, top=(4, 3)), dcnv2),
    ("dcnv2", DCNv2Config(hidden=(6,), cross=FULL_RANK, top=()), dcnv2),
    (
        "mmoe",
        MMoEConfig(num_experts=3, expert=(6, 4), gate=(5, 3), tower=(3, 2)),
        lambda row, arch: mmoe(row[ALL], arch),
    ),
    ("finalmlp", FINAL, lambda row, arch: finalmlp(row[ALL], arch, ([4, 5, 6, 7, 13], None))),
    ("fm", FMConfig(), lambda row, arch: fm(row[ALL], row[WIDE], arch)),
    ("deepfm", DeepFMConfig(hidden=(6, 5)), lambda row, arch: fm(row[ALL], row[WIDE], arch.fm) + deep(row[ALL], arch)),
    ("efgc", EFGCNetConfig(efgc=EFGCConfig((6, 4)), branch_dim=5, top=(4, 3)), efgc),
]


def config_of(kind, own):
    return model_config(kind, **{kind: own})


def features():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, LAYOUT.width(), generator=generator, dtype=torch.float64)
    return {
        ALL: x,
        WIDE: torch.randn(B, LAYOUT.width(WIDE), generator=generator, dtype=torch.float64),
        "match": x[:, :8],
        "cost": torch.cat([x[:, 4:8], x[:, 12:13]], 1),
    }


@pytest.mark.parametrize(("kind", "own", "naive"), CASES)
def test_equals_its_formula(kind, own, naive):
    torch.manual_seed(1)
    arch = build_arch(config_of(kind, own), LAYOUT).double()
    for parameter in arch.parameters():  # no bias or gate may hide at zero
        parameter.data.normal_(std=0.7)
    inputs = features()
    output = arch(inputs)
    rows = [{key: array(value[b]) for key, value in inputs.items()} for b in range(B)]
    expected = np.array([naive(row, arch) for row in rows])
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(array(output.fused_logits), expected, rtol=1e-9, atol=1e-12)
    assert output.branch_logits.shape == (0, B) and output.latents.shape == (0, B, 0)
    output.fused_logits.square().sum().backward()
    idle = [key for key, parameter in arch.named_parameters() if parameter.grad is None]
    assert not idle  # DistributedDataParallel waits for every gradient


def test_every_kind_is_tested_and_says_whether_it_is_wide():
    of_tasks = {"shared_bottom", "ple", "esmm"}  # see test_model_tasks.py
    assert {kind for kind, _, _ in CASES} | {"mbcnet"} | of_tasks == set(model_class().kinds)
    plain = dataclasses.replace(LAYOUT, wide=False)
    for kind, own, _ in CASES:
        wide = needs_wide(config_of(kind, own))
        with pytest.raises(ValueError, match="wide=True") if wide else nullcontext():
            build_arch(config_of(kind, own), plain)
    assert not needs_wide(model_config())


def naive_distillation(student, teachers, labels, gates, tau, soft_weight):
    def ce(p, z):
        return -p * np.log(sigmoid(z)) - (1 - p) * np.log(1 - sigmoid(z))

    total = 0.0
    for b, y in enumerate(labels):
        total += ce(y, student[b]) + ce(y, sum(gates[:, b] * teachers[:, b]))
        for t in range(len(teachers)):
            total += soft_weight * gates[t, b] * ce(sigmoid(teachers[t, b] / tau), student[b] / tau)
    return total / len(labels)


def test_distillation_equals_its_formula():
    rng = np.random.default_rng(0)
    student, teachers = rng.normal(size=B), rng.normal(size=(3, B)) * 2
    labels = rng.integers(0, 2, B).astype(float)
    gates = np.stack([softmax(column) for column in rng.normal(size=(B, 3))]).T
    s, t, g = (torch.tensor(x, requires_grad=True) for x in (student, teachers, gates))
    loss = distillation_loss(s, t, torch.tensor(labels), temperature=3.0, gates=g, soft_weight=0.7)
    loss.backward()
    expected = naive_distillation(student, teachers, labels, gates, 3.0, 0.7)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    soft = sum(gates[i] * sigmoid(teachers[i] / 3) for i in range(3))
    gradient = (sigmoid(student) - labels + 0.7 / 3 * (sigmoid(student / 3) - soft)) / B
    np.testing.assert_allclose(s.grad.numpy(), gradient, rtol=1e-10)
    mixture = sigmoid((gates * teachers).sum(0)) - labels
    np.testing.assert_allclose(g.grad.numpy(), teachers * mixture / B, rtol=1e-10)  # the labels' term alone
    assert t.grad is None


def test_distillation_ignores_padding_rows():
    s, t, y = torch.randn(6), torch.randn(2, 6), torch.tensor([1.0, 0, 1, 1, 0, 0])
    gates = TeacherGate(2)(t)
    weights = torch.tensor([1.5, 1.5, 1.5, 1.5, 0.0, 0.0])
    torch.testing.assert_close(
        distillation_loss(s, t, y, temperature=2.0, gates=gates, weights=weights),
        distillation_loss(s[:4], t[:, :4], y[:4], temperature=2.0, gates=gates[:, :4]),
    )


def test_teacher_gate():
    gate = TeacherGate(3)
    teachers = torch.randn(3, 5)
    torch.testing.assert_close(gate(teachers), torch.full((3, 5), 1 / 3))
    nn.init.normal_(gate.scores.weight)
    expected = np.stack([softmax(affine(array(teachers[:, b]), gate.scores)) for b in range(5)], 1)
    np.testing.assert_allclose(array(gate(teachers)), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", model_class().kinds)
def test_logits_are_float32_under_autocast(kind):
    """bfloat16 logits would be a few hundred distinct scores among thousands of rows."""
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = build_arch(model_config(kind), LAYOUT)(
            {name: torch.randn(1000, LAYOUT.width(name)) for name in (ALL, WIDE, *LAYOUT.groups)}
        )
    for logits in (output.fused_logits, *output.branch_logits):
        assert logits.dtype == torch.float32 and len(logits.unique()) > 900


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DNNConfig(hidden=()), r"hidden = \[\]"),
        (lambda: DNNConfig(dropout=-0.1), "dropout = -0.1"),
        (lambda: CrossNetConfig(hidden=(0,)), r"hidden = \[0\]"),
        (lambda: DCNv2Config(hidden=(5, 0)), r"hidden = \[5, 0\]"),
        (lambda: MMoEConfig(num_experts=0), "num_experts = 0"),
        (lambda: EFGCNetConfig(branch_dim=0), "branch_dim = 0"),
        (lambda: FMConfig(dim=-1), "dim = -1"),
        (lambda: EnKDConfig(temperature=0.0), "temperature = 0.0"),
        (lambda: EnKDConfig(soft_weight=-1.0), "soft_weight = -1.0"),
        (lambda: FinalMLPConfig(num_heads=3), "num_heads = 3"),
        (lambda: StreamConfig(gate=(), context=("user",)), "builds no gate"),
        (
            lambda: build_arch(config_of("finalmlp", FinalMLPConfig(StreamConfig(context=("shop",)))), LAYOUT),
            "model.finalmlp.first.context = .*'shop' is not a field",
        ),
        (lambda: build_arch(model_config("efgc"), InputLayout({"a": 4}, {}, {})), "schema has no groups"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_initial_weights_can_be_those_of_fuxictr():
    """xavier_normal: standard deviation sqrt(2 / (in + out)), biases 0; else torch's own, within 1 / sqrt(in)."""
    torch.manual_seed(0)
    plain, normal = (
        build_model(model_config("dnn", init, dnn=DNNConfig((400, 300))), nn.Identity(), LAYOUT).dense_arch.mlp[2]
        for init in ("torch", "xavier_normal")
    )
    assert plain.weight.abs().max() <= 400**-0.5 and plain.bias.abs().max() > 0
    assert abs(float(normal.weight.std()) / (2 / 700) ** 0.5 - 1) < 0.02 and not normal.bias.any()
