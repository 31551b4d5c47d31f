"""Rows are cut into slices, one for each branch that reads the field: the same tables and lookups, fewer columns a branch."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_model_sparse_arch import DENSE, DIMS, GROUPS, B, keyed_tensors

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.model.branches import BranchesConfig, DeepConfig, EFGCConfig
from mbcnet_rec.model.input_layout import ALL, WIDE, InputLayout, with_streams
from mbcnet_rec.model.mbcnet import BranchArch, MBCNetConfig
from mbcnet_rec.model.models import build_arch, model_layout, needs_wide, schema_with_wide
from mbcnet_rec.model.sparse_arch import FeatureRegroup
from mbcnet_rec.model.zoo.dcnv2 import DCNv2Config
from mbcnet_rec.model.zoo.finalmlp import FinalMLPConfig
from mbcnet_rec.model.zoo.wide_deep import WideDeepConfig
from mbcnet_rec.plugins import model_config

ROOT = Path(__file__).parents[1]
LAYOUT = InputLayout(DIMS, DENSE, GROUPS)  # user 4, item 8, tags 4, shops 12; efgc reads user and item
READS = BranchesConfig(branches=("efgc", "cross", "deep", "wide")).streams(tuple(GROUPS))


def test_a_row_is_shared_out_among_its_readers():
    streams = with_streams(LAYOUT, READS).streams
    # wide takes the last column; of the rest later streams get what is over
    assert streams["efgc"].slices == {"user": (0, 1), "item": (0, 2)}
    assert streams["cross"].slices == {"user": (1, 1), "item": (2, 2), "tags": (0, 1), "shops": (0, 5)}
    assert streams["deep"].slices == {"user": (2, 1), "item": (4, 3), "tags": (1, 2), "shops": (5, 6)}
    assert streams["wide"].slices == {"user": (3, 1), "item": (7, 1), "tags": (3, 1), "shops": (11, 1)}
    with pytest.raises(InputError, match="row of field 'user' has 4 columns for 5 readers"):
        with_streams(LAYOUT, READS | {"fm": (ALL,)})


@pytest.mark.parametrize("op", ["split", "permute"])
@pytest.mark.parametrize("order", [list(DIMS), list(DIMS)[::-1], ["item", "shops", "user", "tags"]])
def test_each_branch_gets_its_columns_whatever_the_order_of_keys(op, order):
    layout = with_streams(LAYOUT, READS)
    columns = {key: torch.randn(B, width, requires_grad=True) for key, width in DIMS.items()}
    dense = torch.randn(B, 5)
    price, age, image = dense[:, :1], dense[:, 1:2], dense[:, 2:]
    parts = FeatureRegroup(layout, op)(keyed_tensors(order, columns), dense)

    def cut(stream, *keys):
        slices = layout.streams[stream].slices
        return [columns[key][:, start : start + width] for key in keys for start, width in [slices[key]]]

    expected = {
        "match@efgc": cut("efgc", "item", "user"),
        "looks@efgc": [*cut("efgc", "item"), image, price],
        "cost@efgc": [price, age],
        "all@cross": [*cut("cross", *DIMS), price, image, age],
        "all@deep": [*cut("deep", *DIMS), price, image, age],
        "@wide@wide": [*cut("wide", *DIMS), price, image, age],
    }
    assert layout.tensor_widths() == {name: part.shape[1] for name, part in parts.items()}
    assert list(parts) == list(expected)
    for name, pieces in expected.items():
        assert torch.equal(parts[name], torch.cat(pieces, 1)), name
    sum(part.sum() for part in parts.values()).backward()
    # every column has one reader, but for item and user, which two groups or one group of efgc read
    for key, tensor in columns.items():
        uses = torch.ones(DIMS[key])
        uses[: layout.streams["efgc"].slices.get(key, (0, 0))[1]] = sum(key in group for group in GROUPS.values()) or 1
        assert torch.equal(tensor.grad, uses.expand(B, -1)), key


def test_branches_read_their_slices_only():
    """The logits of a branch do not move where the columns of another one do."""
    config = MBCNetConfig(
        branch_dim=6, top=(6, 4), efgc=EFGCConfig((6, 5)), deep=DeepConfig((8, 6)), embeddings="per_branch"
    )
    layout = with_streams(LAYOUT, config.streams(tuple(GROUPS)))
    arch = BranchArch(config, layout)
    features = {name: torch.randn(B, width) for name, width in layout.tensor_widths().items()}
    before = arch(features).branch_logits
    moved = arch(features | {"all@deep": torch.randn(B, layout.of("deep").width())}).branch_logits
    assert torch.equal(before[:2], moved[:2]) and not torch.allclose(before[2], moved[2])


@pytest.mark.parametrize(
    ("kind", "own", "names"),
    [
        ("dcnv2", DCNv2Config(hidden=(8, 4), embeddings="per_branch"), ["all@cross", "all@deep"]),
        ("finalmlp", FinalMLPConfig(embeddings="per_branch"), ["all@first", "all@second"]),
        ("wide_deep", WideDeepConfig(hidden=(8, 4), embeddings="per_branch"), ["@wide@wide", "all@deep"]),
    ],
)
def test_other_models_have_streams_too(kind, own, names):
    schema = load_schema(ROOT / "data/schemas/pailitao.toml")
    config = dataclasses.replace(model_config(kind=kind), **{kind: own})
    layout = model_layout(config, schema)
    assert list(layout.tensors()) == names
    assert not needs_wide(config) and schema_with_wide(config, schema) is schema  # no tables of its own
    widths = layout.tensor_widths()
    sparse = sum(widths.values()) - 2 * 172  # dense columns go to both
    assert sparse == 2780 - 172, "every column of a row has one reader"
    arch = build_arch(config, layout)
    logits = arch({name: torch.randn(3, width) for name, width in widths.items()}).fused_logits
    assert logits.shape == (3,)
    shared = build_arch(
        dataclasses.replace(model_config(kind=kind), **{kind: dataclasses.replace(own, embeddings="shared")}),
        dataclasses.replace(LAYOUT, wide=True),
    )
    assert shared({ALL: torch.randn(3, 33), WIDE: torch.randn(3, 9)}).fused_logits.shape == (3,)
