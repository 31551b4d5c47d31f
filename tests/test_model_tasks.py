"""Proves that the loss of several labels is a sum of the loss of one over the rows that have each, and that each head computes its formula."""

import dataclasses

import numpy as np
import pytest
import torch

from data.errors import InputError
from data.schema import format_schema, load_schema
from data.schema.parse import read_toml
from data.schema.schema import parse_schema
from mbcnet_rec.model.input_layout import ALL, InputLayout
from mbcnet_rec.model.kinds import ModelOutput
from mbcnet_rec.model.losses import CoteachingConfig, DifferentiationConfig
from mbcnet_rec.model.models import build_arch, build_model, build_objective, tasks_of
from mbcnet_rec.model.objective import LossArch, build_transforms
from mbcnet_rec.model.tasks import TaskLosses
from mbcnet_rec.model.zoo.enkd import EnKDConfig
from mbcnet_rec.model.zoo.esmm import ESMMArch, ESMMConfig
from mbcnet_rec.model.zoo.mmoe import MMoEConfig
from mbcnet_rec.model.zoo.ple import PLEConfig
from mbcnet_rec.model.zoo.shared_bottom import SharedBottomConfig
from mbcnet_rec.plugins import model_config

B, K, D = 40, 3, 4
LAYOUT = InputLayout({"user": 4, "item": 4}, {"price": (0, 1)}, {"match": ("user", "item")})
TWO = dataclasses.replace(LAYOUT, tasks={"click": 1.0, "buy": 1.0})
CONFIGS = {
    "shared_bottom": SharedBottomConfig(bottom=(6, 5), tower=(4,)),
    "mmoe": MMoEConfig(num_experts=3, expert=(6, 5), gate=(4,), tower=(3,)),
    "ple": PLEConfig(levels=2, own_experts=2, shared_experts=1, expert=(5,), gate=(4,), tower=(3,)),
    "esmm": ESMMConfig(tower=(5, 4)),
}


def plain(**options):
    torch.manual_seed(0)
    differentiation = DifferentiationConfig()
    coteaching = CoteachingConfig(**options)
    return LossArch(coteaching, differentiation, build_transforms(K, D, differentiation)).double()


def drawn(num_tasks):
    """A model's output of so many tasks, and labels of which a third is missing, but for the first."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(1 + K, B, num_tasks, generator=draw, dtype=torch.float64) * 2
    latents = torch.randn(K, B, D, generator=draw, dtype=torch.float64)
    labels = (torch.rand(B, num_tasks, generator=draw) < 0.4).double()
    labels[:, 1:][torch.rand(B, num_tasks - 1, generator=draw) < 0.34] = torch.nan
    weights = torch.ones(B, dtype=torch.float64)
    weights[-3:] = 0  # padding
    return logits.requires_grad_(), latents, labels, weights * B / (B - 3)


def by_task(losses, logits, latents, labels, weights):
    return losses(ModelOutput(latents, logits[1:], logits[0]), labels, weights)


@pytest.mark.parametrize("threshold", [-float(np.log(0.5)), "base_rate"])
def test_a_single_task_is_todays_loss_bit_for_bit(threshold):
    """Loss, every term, every gradient, and what is logged."""
    logits, latents, labels, weights = drawn(1)
    today, tasks = plain(threshold=threshold), TaskLosses(plain(threshold=threshold), {"click": 1.0}, None)
    one, of_one = today(ModelOutput(latents, logits[1:, :, 0], logits[0, :, 0]), labels[:, 0], weights)
    (wanted,) = torch.autograd.grad(one, logits)
    many, of_many = by_task(tasks, logits, latents, labels, weights)
    (found,) = torch.autograd.grad(many, logits)
    assert torch.equal(one, many) and torch.equal(wanted, found)
    for name, term in of_one.terms.items():
        assert torch.equal(term, of_many.terms[name]), name
    assert torch.equal(of_one.logits, of_many.logits) and of_one.terms["coteaching_loss"] > 0
    assert today.state_dict().keys() == tasks.state_dict().keys(), "checkpoints have the same keys"


@pytest.mark.parametrize("scheme", ["strong_to_weak", "no_discrimination"])
@pytest.mark.parametrize("threshold", [-float(np.log(0.5)), "base_rate"])
def test_each_task_learns_as_of_the_rows_that_have_its_label(scheme, threshold):
    """The loss is the weighted sum of today's on each label's rows; a row without a label has no gradient there, nor does it count in C."""
    logits, latents, labels, weights = drawn(3)
    options = {"scheme": scheme, "threshold": threshold}
    tasks = TaskLosses(plain(**options), {"click": 1.0, "buy": 0.5, "cart": 2.0}, None)
    loss, outputs = by_task(tasks, logits, latents, labels, weights)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    wanted = torch.zeros(())
    for place, weight in enumerate(tasks.tasks.values()):
        known = labels[:, place].isfinite() & (weights > 0)
        assert not gradient[:, ~known, place].any() and gradient[:, known, place].any()
        own = ModelOutput(latents[:, known], logits[1:, known, place], logits[0, known, place])
        _, of_rows = plain(**options)(own, labels[known, place], torch.ones(int(known.sum()), dtype=torch.float64))
        task = list(tasks.tasks)[place]
        for term in ("bce", "coteaching_loss"):
            torch.testing.assert_close(outputs.terms[f"{term}/{task}"], of_rows.terms[term])
        wanted = wanted + weight * (of_rows.terms["bce"] + 0.1 * of_rows.terms["coteaching_loss"])
        assert of_rows.terms["coteaching_loss"] > 0
    torch.testing.assert_close(loss - 0.1 * outputs.terms["differentiation_loss"], wanted)
    assert outputs.logits.shape == (B, 3 * (1 + K)) and torch.equal(outputs.logits[:, 1 + K], logits.detach()[0, :, 1])


def test_a_task_without_a_label_in_the_batch_adds_nothing():
    logits, latents, labels, weights = drawn(2)
    labels[:, 1] = torch.nan
    loss, outputs = by_task(TaskLosses(plain(), {"click": 1.0, "buy": 1.0}, None), logits, latents, labels, weights)
    loss.backward()
    assert loss.isfinite() and outputs.terms["bce/buy"] == 0 and not logits.grad[:, :, 1].any()


def test_esmm_is_the_product_and_learns_click_and_conversion_over_all_rows():
    """sigmoid of the third logit is the product of the first two to 1e-6, also in float32 and far out; labels as Ma et al. say."""
    torch.manual_seed(0)
    arch = build_arch(model_config("esmm", esmm=CONFIGS["esmm"]), LAYOUT)
    for scale in (1.0, 10.0, 300.0):
        click, conversion, both = arch({ALL: torch.randn(500, 9) * scale}).fused_logits.unbind(-1)
        product = torch.sigmoid(click.double()) * torch.sigmoid(conversion.double())
        assert (torch.sigmoid(both).double() - product).abs().max() < 1e-6
    nan = float("nan")
    labels = torch.tensor([[0.0, 0.0], [0.0, nan], [1.0, 0.0], [1.0, 1.0], [1.0, nan], [nan, 1.0]])
    wanted = [[0, nan, 0], [0, nan, 0], [1, 0, 0], [1, 1, 1], [1, nan, nan], [nan, nan, nan]]
    np.testing.assert_array_equal(ESMMArch.targets(labels).numpy(), np.array(wanted))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def affine(x, layer):
    return layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()


def mlp(x, module):
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            x = np.maximum(affine(x, layer), 0)
    return x


def tower(x, module):
    return affine(mlp(x, module[0]), module[1])[0]


def gated(x, gate, experts):
    shares = softmax(affine(mlp(x, gate.scores[0]), gate.scores[1]))
    return sum(share * expert for share, expert in zip(shares, experts, strict=True))


def shared_bottom(x, arch):
    return [tower(mlp(x, arch.bottom), each) for each in arch.towers]


def mmoe(x, arch):
    experts = [mlp(x, each) for each in arch.experts]
    return [tower(gated(x, gate, experts), own) for gate, own in zip(arch.gates, arch.towers, strict=True)]


def ple(x, arch):
    """Tang et al. (2020), Eq. 1 to 5, and section 4.3: the shared experts of the next level get a mixture of all."""
    inputs = [x, x, x]
    for level in arch.levels:
        first, second, shared = [[mlp(inputs[place], each) for each in own] for place, own in enumerate(level.experts)]
        mixed = [first + shared, second + shared, first + second + shared]
        inputs = [gated(inputs[place], gate, mixed[place]) for place, gate in enumerate(level.gates)]
    assert len(inputs) == 2, "the last level has no shared output"
    return [tower(own, each) for own, each in zip(inputs, arch.towers, strict=True)]


@pytest.mark.parametrize(("kind", "naive"), [("shared_bottom", shared_bottom), ("mmoe", mmoe), ("ple", ple)])
def test_heads_equal_their_formulas(kind, naive):
    torch.manual_seed(1)
    arch = build_arch(model_config(kind, **{kind: CONFIGS[kind]}), TWO).double()
    x = torch.randn(9, 9, dtype=torch.float64)
    found = arch({ALL: x}).fused_logits.detach().numpy()
    np.testing.assert_allclose(found, [naive(row, arch) for row in x.numpy()], rtol=1e-9)
    assert found.std(0).min() > 1e-3 and not np.allclose(found[:, 0], found[:, 1])
    assert build_arch(model_config(kind, **{kind: CONFIGS[kind]}), LAYOUT)({ALL: x.float()}).fused_logits.shape == (9,)


SCHEMA = """
name = "s"
labels = ["click", "buy"]
[groups]
match = ["user", "item"]
[fields]
user = { kind = "categorical", num_embeddings = 5, embedding_dim = 4 }
item = { kind = "categorical", num_embeddings = 5, embedding_dim = 4 }
price = { kind = "numeric" }
"""


def schema_of(tmp_path, labels='labels = ["click", "buy"]'):
    (tmp_path / "s.toml").write_text(SCHEMA.replace('labels = ["click", "buy"]', labels))
    return parse_schema(read_toml(tmp_path / "s.toml"), "s.toml", tmp_path)


@pytest.mark.parametrize("kind", ["mbcnet", *CONFIGS])
def test_every_parameter_of_every_kind_gets_a_gradient(kind, tmp_path):
    """DistributedDataParallel waits for each; also where no row of the batch has the second label."""
    config = model_config(kind, **({kind: CONFIGS[kind]} if kind in CONFIGS else {}))
    layout = dataclasses.replace(LAYOUT, tasks=tasks_of(config, schema_of(tmp_path)))
    model = build_model(config, torch.nn.Identity(), layout)
    objective = build_objective(config, model)
    labels = torch.stack([torch.arange(8.0) % 2, torch.full((8,), torch.nan)], 1)
    features = torch.randn(8, 9)
    loss, outputs = objective.losses(model.dense_arch({ALL: features, "match": features[:, :8]}), labels, torch.ones(8))
    loss.backward()
    assert not [name for name, each in objective.named_parameters() if each.grad is None]
    assert outputs.logits.shape == (8, len(model.tasks) * (1 + len(model.branch_names)))


def test_what_takes_one_label_says_so(tmp_path):
    two, one = schema_of(tmp_path), schema_of(tmp_path, 'label = "click"')
    with pytest.raises(InputError, match=r"model.kind = 'dnn' \(of several labels: esmm, mbcnet, .*has click, buy"):
        tasks_of(model_config("dnn"), two)
    with pytest.raises(InputError, match=r"enkd.*takes one label"):
        tasks_of(model_config("enkd", enkd=EnKDConfig()), two)
    with pytest.raises(InputError, match=r"esmm.*wanted a schema of two labels.*it has 1"):
        tasks_of(model_config("esmm"), one)
    with pytest.raises(
        InputError, match=r"task_weights.cart = 1.0: wanted a number of 0 or more for one of click, buy"
    ):
        tasks_of(model_config(task_weights={"cart": 1.0}), two)
    clash = dataclasses.replace(two, label="buy", tasks=("buy", "buy_efgc"))
    with pytest.raises(InputError, match=r"label 'buy_efgc': branch efgc of 'buy' has a column of this name"):
        tasks_of(model_config(), clash)
    with pytest.raises(InputError, match=r"task_weights.click = 1.0: wanted none, since there is one label"):
        tasks_of(model_config(task_weights={"click": 1.0}), one)
    with pytest.raises(InputError, match="all are 0"):
        tasks_of(model_config(task_weights={"click": 0.0, "buy": 0.0}), two)
    assert tasks_of(model_config(task_weights={"buy": 3.0}), two) == {"click": 1.0, "buy": 3.0}
    assert tasks_of(model_config("esmm"), two) == {"click": 1.0, "buy": 0.0, "click_and_buy": 1.0}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ('label = "click"\nlabels = ["buy"]', "both label and labels"),
        ('label = ""', "wanted the column of 0 and 1"),
        ('labels = ["buy", "buy"]', "each once"),
        ('labels = ["a/b", "buy"]', "without '/'"),
        ('labels = ["click", "item"]', "this column is the label"),
        ('labels = ["click", "buy"]\ngroup_column = "buy"', "group_column = 'buy': this is the label"),
    ],
)
def test_labels_that_a_schema_may_not_have(labels, words, tmp_path):
    with pytest.raises(InputError, match=words):
        schema_of(tmp_path, labels)


def test_a_schema_says_its_labels_again(tmp_path):
    two = schema_of(tmp_path)
    (tmp_path / "again.toml").write_text(format_schema(two))
    again = load_schema(tmp_path / "again.toml")
    assert (again.label, again.tasks, again.labels) == ("click", ("click", "buy"), ("click", "buy"))
    assert schema_of(tmp_path, 'labels = ["click"]').tasks == () and again.columns[:2] == ("click", "buy")
    assert two.fingerprint() != schema_of(tmp_path, 'label = "click"').fingerprint()
