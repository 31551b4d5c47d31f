"""Proves that a vector's learned projection enters every group as W x + b, learns, and changes nothing where there is none."""

from pathlib import Path

import torch
from torchrec.sparse.jagged_tensor import KeyedTensor

from data.schema import parse_schema
from mbcnet_rec.model.input_layout import ALL, input_layout
from mbcnet_rec.model.sparse_arch import FeatureRegroup

B = 5


def layout_of(projection: int):
    fields = {
        "user": {"kind": "categorical", "num_embeddings": 9, "embedding_dim": 4},
        "price": {"kind": "numeric"},
        "image": {"kind": "vector", "width": 6, "projection": projection},
        "age": {"kind": "numeric"},
        "sound": {"kind": "vector", "width": 3},
    }
    groups = {"look": ["image", "user"], "rest": ["age", "sound"], "both": ["sound", "image", "price"]}
    schema = parse_schema({"name": "s", "label": "y", "fields": fields, "groups": groups}, "s", Path())
    layout = input_layout(schema)
    assert layout.width() == schema.width
    return layout


def inputs():
    generator = torch.Generator().manual_seed(0)
    user, dense = torch.randn(B, 4, generator=generator), torch.randn(B, 11, generator=generator)
    return KeyedTensor(["user"], [4], user), user, dense


def test_groups_hold_the_projected_vector():
    layout = layout_of(2)
    regroup = FeatureRegroup(layout)
    keyed, user, dense = inputs()
    price, image, age, sound = dense.split([1, 6, 1, 3], dim=1)
    (linear,) = regroup.projections.values()
    projected = image @ linear.weight.T + linear.bias
    found = regroup([keyed], dense)
    torch.testing.assert_close(found["look"], torch.cat([user, projected], 1))
    torch.testing.assert_close(found["rest"], torch.cat([age, sound], 1))
    torch.testing.assert_close(found["both"], torch.cat([sound, projected, price], 1))
    torch.testing.assert_close(found[ALL], torch.cat([user, price, projected, age, sound], 1))
    assert {name: found[name].shape[1] for name in (ALL, *layout.groups)} == {
        name: layout.width(name) for name in (ALL, *layout.groups)
    }
    found["look"].sum().backward()
    torch.testing.assert_close(linear.weight.grad, image.sum(0).expand(2, -1))


def test_without_projections_nothing_is_learned_and_the_columns_stay():
    regroup = FeatureRegroup(layout_of(0))
    keyed, user, dense = inputs()
    assert not regroup.state_dict()
    assert torch.equal(regroup([keyed], dense)[ALL], torch.cat([user, dense], 1))
