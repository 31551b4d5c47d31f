"""The low-rank mixture agrees with TorchRec's; a CPU's own layers with torch's; field vectors and layouts with what they say. Formulas: test_model_baselines."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.modules.crossnet import LowRankMixtureCrossNet
from torchrec.sparse.jagged_tensor import KeyedTensor

from data.errors import InputError
from data.schema import Table
from mbcnet_rec.cpu import cross, layers, mlp
from mbcnet_rec.cpu.fast_path import use_fast_layers
from mbcnet_rec.cpu.layers import Dropout, Linear, cheap_dropout
from mbcnet_rec.model.factorisation import FieldVectors
from mbcnet_rec.model.input_layout import ALL, WIDE, InputLayout, wide_tables
from mbcnet_rec.model.layers import MLP, Cross, CrossConfig, GroupedMLP, Regularisation
from mbcnet_rec.model.side_by_side import grouped_product
from mbcnet_rec.model.sparse_arch import FeatureRegroup


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_low_rank_mixture_equals_torchrec(num_experts):
    ours = Cross(CrossConfig("low_rank_mixture", 2, num_experts, 4), 9).double()
    for parameter in ours.parameters():  # no bias may hide at zero
        parameter.data.normal_(std=0.5)
    theirs = LowRankMixtureCrossNet(9, 2, num_experts, 4, activation=torch.tanh).double()
    for number, layer in enumerate(ours.layers):
        if num_experts > 1:
            layer.gate.data.copy_(ours.layers[0].gate)  # theirs shares the gates of all layers
            for e in range(num_experts):
                theirs.gates[e].weight.data.copy_(layer.gate[e : e + 1])
        theirs.V_kernels[number].data.copy_(layer.v)
        theirs.U_kernels[number].data.copy_(layer.u)
        theirs.C_kernels[number].data.copy_(layer.c)
        theirs.bias[number].data.copy_(layer.bias.unsqueeze(1))
    x = torch.randn(5, 9).double()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def one_dnn_products(call):
    """How many products oneDNN makes in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == "mkldnn::_linear_pointwise")


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize(("wide", "narrow", "view"), [(300, 256, False), (257, 301, True), (1000, 70, False)])
def test_linear_by_one_dnn_is_a_linear(wide, narrow, view, capability, monkeypatch):
    """Also where the gradient of weights of aligned rows is left to MKL."""
    monkeypatch.setattr(layers, "INTEL", False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    ours, plain = Linear(wide, narrow), torch.nn.Linear(wide, narrow).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(37, wide + 12)[:, :wide] if view else torch.randn(37, wide)
    x.requires_grad_()
    y = x.detach().double().requires_grad_()
    weight = torch.randn(37, narrow)
    products = one_dnn_products(lambda: (ours(x) * weight).sum().backward())
    by_mkl = capability == "AVX2" and wide % 8 == 0
    assert products == (2 if by_mkl else 3) or not torch.backends.mkldnn.is_available()
    (plain(y) * weight).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(ours(x), plain(y), **close)
    torch.testing.assert_close(x.grad, y.grad, **close)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **close)
        assert a.grad.is_contiguous()


def test_linear_leaves_the_rest_to_torch(monkeypatch):
    x = torch.randn(5, 300)
    monkeypatch.setattr(layers, "INTEL", True)
    assert one_dnn_products(lambda: Linear(300, 256)(x).sum().backward()) == 0
    monkeypatch.setattr(layers, "INTEL", False)
    assert one_dnn_products(lambda: Linear(300, 256)(x)) == 1

    def rest():
        Linear(30, 20)(x[:, :30])  # small
        Linear(300, 256).double()(x.double())
        Linear(300, 256).to("meta")(x.to("meta"))
        with torch.no_grad():
            Linear(300, 256)(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert Linear(300, 256)(x).dtype == torch.bfloat16
        assert "mkldnn" not in str(torch.export.export(Linear(300, 256), (x,)).graph)

    assert one_dnn_products(rest) == 0


@pytest.mark.parametrize("kind", ["low_rank_mixture", "full_rank"])
@pytest.mark.parametrize("intel", [True, False])
def test_fast_cross_is_a_cross(kind, intel, monkeypatch):
    """Values and the gradients of input and parameters, by either library; the first layer's input is x_0 itself."""
    monkeypatch.setattr(cross, "MANY", 1)
    monkeypatch.setattr(layers, "INTEL", intel)
    monkeypatch.setattr(layers, "ONE_DNN_FROM", 1)
    monkeypatch.setattr(cross, "ONE_DNN_FROM", 1)
    dtype, bound = (torch.float64, 1e-12) if intel else (torch.float32, 1e-5)  # oneDNN's products are of float32
    plain = Cross(CrossConfig(kind, 3, 2, 4), 9).to(dtype)
    for parameter in plain.parameters():  # no bias may hide at zero
        parameter.data.normal_(std=0.5)
    fast = copy.deepcopy(plain)
    use_fast_layers(fast)
    x, weight = torch.randn(5, 9, dtype=dtype), torch.randn(5, 9, dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [network(own) for network, own in zip((plain, fast), inputs, strict=True)]
    assert "CrossNetwork" in type(outputs[1].grad_fn).__name__
    for output in outputs:
        (output * weight).sum().backward()
    for found, wanted in [outputs, [own.grad for own in inputs]]:
        torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
    for first, second in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=bound, atol=bound)


@pytest.mark.parametrize("hidden", [(512, 7), (6,), (5, 512, 4)])
@pytest.mark.parametrize("last_relu", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_fast_mlp_is_an_mlp(hidden, last_relu, learned, monkeypatch):
    """Values and the gradients of input and parameters; an input of no gradient gets none, and its columns may be some of a wider one's."""
    monkeypatch.setattr(mlp, "MANY", 1)
    monkeypatch.setattr(layers, "INTEL", True)
    plain = MLP(9, hidden, last_relu=last_relu).double()
    fast = copy.deepcopy(plain)
    use_fast_layers(fast)
    x, weight = torch.randn(6, 12).double()[:, 2:11], torch.randn(6, hidden[-1]).double()
    inputs = [x.detach().requires_grad_(learned) for _ in range(2)]
    outputs = [network(own) for network, own in zip((plain, fast), inputs, strict=True)]
    assert "DenseLayers" in type(outputs[1].grad_fn).__name__ and outputs[1].is_contiguous()
    for output in outputs:
        (output * weight).sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    assert (inputs[1].grad is not None) == learned
    if learned:
        torch.testing.assert_close(*(own.grad for own in inputs), rtol=1e-12, atol=1e-12)
    for first, second in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-12, atol=1e-12)
        assert second.grad.is_contiguous()


def test_columns_of_data_get_no_gradient(monkeypatch):
    """The regroup says how many columns come before those of dense fields, and an MLP leaves the product for the others out: their gradient is 0."""
    monkeypatch.setattr(mlp, "MANY", 1)
    monkeypatch.setattr(layers, "INTEL", True)
    model = nn.ModuleDict(
        {"regroup": FeatureRegroup(InputLayout({"a": 4, "b": 8}, {"price": (0, 3)}, {})), "mlp": MLP(15, (5,))}
    )
    plain = copy.deepcopy(model["mlp"])
    use_fast_layers(model)
    for dense in (torch.randn(6, 3), torch.randn(6, 3, requires_grad=True)):
        table = torch.randn(6, 12, requires_grad=True)
        features = model["regroup"]([KeyedTensor(["a", "b"], [4, 8], table)], dense)[ALL]
        features.retain_grad()
        model["mlp"](features).sum().backward()
        wanted = features.detach().requires_grad_()
        plain(wanted).sum().backward()
        learned = 15 if dense.requires_grad else 12
        torch.testing.assert_close(features.grad[:, :learned], wanted.grad[:, :learned])
        assert not features.grad[:, learned:].any() and torch.equal(table.grad, features.grad[:, :12])


def test_mlp_regularisation():
    x = torch.randn(64, 5)
    normal = MLP(5, (8,), Regularisation(batch_norm=True))
    assert [type(layer).__name__ for layer in normal] == ["Linear", "BatchNorm1d", "ReLU"]
    dropping = MLP(5, (400,), Regularisation(dropout=0.5))
    kept = (dropping(x) > 0).float().mean() / (dropping.eval()(x) > 0).float().mean()
    assert 0.45 < kept < 0.55
    assert torch.equal(dropping(x), dropping(x))  # none in evaluation
    with pytest.raises(InputError, match=r"dropout = 1\.0"):
        Regularisation(dropout=1.0)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_cheap_dropout_is_dropout(p):
    """Its share of zeros, its scale, its gradient; neighbours that share a random number fall independently."""
    torch.manual_seed(0)
    x = torch.ones(1001, 401, requires_grad=True)  # a number of elements that four does not divide
    y = cheap_dropout(x, p)
    y.sum().backward()
    assert torch.equal(x.grad, y), "the gradient passes where the value does, by the same scale"
    kept = (y > 0).double().flatten()
    assert torch.allclose(y[y > 0], torch.tensor(1 / (1 - p)), rtol=1e-2 if p > 0.99 else 1e-4)
    error = 5 * max(p * (1 - p), 1e-9) ** 0.5 / y.numel() ** 0.5  # five standard errors
    assert abs(float(kept.mean()) - (1 - p)) <= error
    assert abs(float(y.detach().double().mean()) - 1) <= error / (1 - p)
    for apart in (1, 2, 3, 4, 401):
        together = (kept[apart:] * kept[:-apart]).mean()
        assert abs(float(together) - float(kept.mean()) ** 2) <= 3 * error


def test_masks_are_made_of_splitmix64():
    """Of its published output for seed 0; each 16 bits are known by the two neighbouring shares that keep and drop them."""
    for place, value in enumerate((0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F), start=1):
        for part in range(4):
            bits = value >> 16 * part & 0xFFFF
            masks = np.empty((2, 16), np.float32)
            for mask, dropped in zip(masks, (bits, bits + 1), strict=True):
                layers.draw_mask(0, dropped, 2.0, mask)
            assert masks[:, 4 * place + part].tolist() == [2, 0]


def test_dropout_follows_the_seed_and_keeps_the_dtype():
    layer, x = Dropout(0.5), torch.ones(64, 32, dtype=torch.bfloat16)
    draws = []
    for seed in (1, 1, 2):
        torch.default_generator.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == x.dtype
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("dim", [0, 5])
def test_field_vectors(dim):
    """Fields of width k stand as they are, the others are linear in their own columns alone."""
    fields = {"a": 4, "b": 8, "c": 4, "d": 12}, {"price": (0, 1), "image": (1, 4)}
    module, x = FieldVectors(InputLayout(*fields, {}), dim), torch.randn(3, 33)
    vectors = module(x)
    assert vectors.shape == (3, 6, module.dim) and module.dim == (dim or 4)
    moved, as_is = [], []
    for start, stop in ((0, 4), (4, 12), (12, 16), (16, 28), (28, 29), (29, 33)):
        y = x.clone()
        y[:, start:stop] = 0
        (field,) = (module(y) != vectors).any(dim=2).all(dim=0).nonzero().flatten().tolist()
        assert not module(y)[:, field].any()
        moved.append(field)
        as_is.append(torch.equal(vectors[:, field], x[:, start:stop]))
    assert sorted(moved) == list(range(6)) and as_is == [dim == 0, False, dim == 0, *[False] * 3]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"groups": {ALL: ("a",)}}, "groups.all: the model needs this name"),
        ({"groups": {WIDE: ("a",)}}, "groups.@wide: the model needs this name"),
    ],
)
def test_layout_refuses(kwargs, words):
    with pytest.raises(InputError, match=words):
        InputLayout(**({"embedding_dims": {"a": 4}, "dense_slices": {}, "groups": {}} | kwargs))


def test_wide_tables():
    shared = Table("t", 9, 16, "mean", ("x", "y"), True)
    wide = [Table(f"wide_{field}", 9, 4, "mean", (field,), True) for field in ("x", "y")]
    assert wide_tables([shared]) == wide
    with pytest.raises(InputError, match=r"tables\.wide_x: the model keeps wide weights under this name"):
        wide_tables([Table("wide_x", 9, 4, "sum", ("z",), False), shared])


@pytest.mark.parametrize("batch_norm", [False, True])
def test_groups_of_equal_widths_are_one_product_where_it_is_asked_for(batch_norm):
    """The numbers and gradients of one MLP a group, whose parameters keep their names; on a CPU, and with batch norm, each has its own product."""
    widths = [6, 5, 6, 6]
    grouped = GroupedMLP(widths, (8, 4), Regularisation(batch_norm=batch_norm)).double()
    inputs = [torch.randn(7, width).double().requires_grad_() for width in widths]
    names = [name for name, _ in grouped.named_parameters()]
    assert names[:2] == ["mlps.0.0.weight", "mlps.0.0.bias"] and len(names) == 4 * (8 if batch_norm else 4)
    plain = grouped(inputs)
    assert all(map(torch.equal, plain, [mlp(each) for mlp, each in zip(grouped.mlps, inputs, strict=True)]))
    if batch_norm:
        return
    together = grouped_product([grouped.mlps[place] for place in (0, 2, 3)], [inputs[place] for place in (0, 2, 3)])
    sources = [inputs[0], *grouped.mlps[3].parameters()]
    for one, other in zip([plain[0], plain[2], plain[3]], together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(first.sin().sum() + last.cos().sum(), sources)
        for first, last in ((together[0], together[2]), (plain[0], plain[3]))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
