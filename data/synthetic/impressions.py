"""The 192 columns of the synthetic log: what a model may see of the planted world.

Ids are functions of user, item, cluster or row; statistics are noisy functions of activity, popularity,
quality and taste; histories hold what the user's taste of that day likes; cross features are hashes of
pairs. Nulls, empty lists and repeated ids occur, as in a real log.

Shapes: n rows, L slots of a list.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from data.reading.keys import uniforms
from data.schema import Feature
from data.synthetic.planted import CLICK_RATE, PLANTED, TASTE, Facts, World, choose, normals, power_law_ranks, scatter

FIRST_SECOND = 1_714_521_600  # 2024-05-01 00:00:00 UTC
SECONDS_PER_DAY = 86_400
LIST_SLOTS = 5
TASTE_CANDIDATES = 3

# Field that a taste drives -> the tag of the taste's latent, and the field whose ids it holds
TASTE_FIELDS = {
    name: (f"taste<{taste}", each["source"]) for taste, each in PLANTED["tastes"].items() for name in each["fields"]
}


def to_record_batch(world: World, facts: Facts, labels: np.ndarray) -> pa.RecordBatch:
    """Every column of the schema, then the time column and the label."""
    arrays: dict[str, pa.Array] = {}
    ids = _Ids(world, facts)
    for feature in world.schema.features:
        if feature.kind == "vector":
            flat = pa.array(facts[feature.name].reshape(-1))
            arrays[feature.source_column] = pa.FixedSizeListArray.from_arrays(flat, feature.width)
        elif feature.kind == "numeric":
            arrays[feature.source_column] = _number(world, facts, feature)
        elif feature.is_single:
            arrays[feature.source_column] = _nullable(world, facts, feature.name, _integers(ids[feature.name]))
        else:
            arrays |= _list(world, facts, feature)
    second = facts["query_hour"] * 3600 + choose(world.key("second", facts["row"]), 3600)
    arrays["timestamp"] = pa.array(FIRST_SECOND + facts["day"] * SECONDS_PER_DAY + second)
    arrays[world.schema.label] = pa.array(labels)
    return pa.RecordBatch.from_pydict(arrays)


def _integers(ids: np.ndarray) -> pa.Array:
    # int32 wherever it fits: half the bytes to decode
    return pa.array(ids.astype(np.int32) if ids.size == 0 or ids.max() < 2**31 else ids)


def _owner(facts: Facts, name: str) -> np.ndarray:
    """The thing that a field describes: its user, its item, or this one query."""
    return facts[{"user": "user_id", "item": "item_id", "quer": "row"}[name[:4]]]


def _side(name: str) -> str:
    """The side whose cluster a field describes."""
    return "query" if name.startswith("query") else "doc"


def _nullable(world: World, facts: Facts, name: str, values: pa.Array) -> pa.Array:
    share = PLANTED["nulls"].get(name, 0.0)
    if not share:
        return values
    missing = uniforms(world.key(f"{name}_null", _owner(facts, name))) < share
    return pa.array(values.to_numpy(zero_copy_only=False), mask=missing)


class _Ids(dict):
    """Field name -> (n,) ids, computed when first asked for; cross features ask for their two sides."""

    def __init__(self, world: World, facts: Facts) -> None:
        super().__init__()
        self.world = world
        self.facts = facts

    def __missing__(self, name: str) -> np.ndarray:
        ids = self[name] = self._compute(name)
        return ids

    def _compute(self, name: str) -> np.ndarray:
        world, facts = self.world, self.facts
        if name == "item_price":
            return facts["item_price_band"]
        if name in facts:
            return facts[name]
        if "_x_" in name:
            left, right = name.split("_x_")
            return world.choose(name, self[left], self[right])
        if name in TASTE_FIELDS:
            return _liked(world, facts, name, np.zeros_like(facts["row"]))[0]
        if name.startswith("user_last"):
            ranks = power_law_ranks(world.key(name, facts["user_id"], facts["day"]), world.sizes[name], 0.7)
            return scatter(ranks, world.sizes[name])
        if name == "item_root_category":
            return world.choose(name, facts["item_category"])
        return world.choose(name, _owner(facts, name), skew=1.5)


def _liked(world: World, facts: Facts, name: str, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row, the best by the user's taste among a few candidates: ids (n,) and scores (n,)."""
    tag, field = TASTE_FIELDS[name]
    size = min(world.sizes[field], world.sizes[name])
    best = np.full(len(slot), -1, np.int64)
    best_score = np.full(len(slot), -np.inf)
    for candidate in range(TASTE_CANDIDATES):
        ids = choose(world.key(f"{name}_{candidate}", facts["user_id"], slot), size, 1.2)
        score = np.einsum("nd,nd->n", facts["taste"], normals(world.key(tag, ids), TASTE)) / np.sqrt(TASTE)
        better = score > best_score
        best, best_score = np.where(better, ids, best), np.where(better, score, best_score)
    return best, best_score


def _list(world: World, facts: Facts, feature: Feature) -> dict[str, pa.Array]:
    """A list column, and its weights if it has any."""
    name = feature.name
    owner = _owner(facts, name)
    n = len(owner)
    # a history may be empty and grows from day to day; item and query lists do not change
    seen = (owner, facts["day"]) if name.startswith("user") else (owner,)
    lengths = choose(world.key(f"{name}_length", *seen), LIST_SLOTS + 1)
    used = np.arange(LIST_SLOTS) < lengths[:, None]
    ids = np.empty((n, LIST_SLOTS), np.int64)
    scores = np.zeros((n, LIST_SLOTS))
    for slot in range(LIST_SLOTS):
        slots = np.full(n, slot)
        if name in TASTE_FIELDS:
            ids[:, slot], scores[:, slot] = _liked(world, facts, name, slots)
        else:
            ids[:, slot] = world.choose(name, owner, slots, skew=2.0)
            scores[:, slot] = normals(world.key(f"{name}_score", owner, slots), 1)[:, 0]
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths).astype(np.int32)])
    columns = {feature.source_column: pa.ListArray.from_arrays(offsets, _integers(ids[used]))}
    if feature.weights:
        weights = np.round(np.exp(0.5 * scores[used]) * 16) / 16
        columns[feature.weights] = pa.ListArray.from_arrays(offsets, pa.array(weights.astype(np.float32)))
    return columns


def _noise(world: World, facts: Facts, name: str) -> np.ndarray:
    """(n,) noise of a statistic: fixed for its owner, with a part that changes from day to day."""
    owner = _owner(facts, name)
    fixed = normals(world.key(f"{name}_fixed", owner), 1)[:, 0]
    return 0.8 * fixed + 0.6 * normals(world.key(f"{name}_daily", owner, facts["day"]), 1)[:, 0]


def _number(world: World, facts: Facts, feature: Feature) -> pa.Array:
    """A numeric column: a statistic, a price, a rating."""
    name = feature.name
    compute = next(compute for endings, compute in NUMBERS_BY_ENDING if name.endswith(endings))
    return _nullable(world, facts, name, pa.array(compute(world, facts, name)))


def _count(world: World, facts: Facts, name: str) -> np.ndarray:
    """How often something happened: log-normal around the owner's activity or popularity."""
    if name.startswith("user"):
        level = 4.0 * facts["user_activity"] + 0.8 * _noise(world, facts, name)
    elif name.startswith("item"):
        level = 6.0 * facts["item_popularity"] + 0.5 * facts["item_quality"] + 0.8 * _noise(world, facts, name)
    elif "cluster" in name:
        level = 4.0 + normals(world.key(name, facts[f"{_side(name)}_cluster_id"]), 1)[:, 0]
    else:
        level = 4.0 + normals(world.key(name, facts["row"]), 1)[:, 0]
    return np.minimum(np.exp(level), 1e9).astype(np.int32)


def _rate(world: World, facts: Facts, name: str) -> np.ndarray:
    """A click or conversion rate in [0, 1], seen through noise."""
    noise = 0.4 * _noise(world, facts, name)
    if name.startswith("item"):
        liking = 0.5 * facts["item_quality"]
    elif name in ("user_category_ctr_30d", "user_brand_ctr_30d", "user_style_ctr_30d"):
        kind = name.split("_")[1]
        liking = 0.6 * np.einsum("nd,nd->n", facts["taste"], facts[f"{kind}_latent"]) / np.sqrt(TASTE)
        noise = 0.4 * normals(world.key(name, facts["user_id"], facts["item_id"]), 1)[:, 0]
    else:
        liking = 0.4 * normals(world.key("user_openness", facts["user_id"]), 1)[:, 0]
    return np.round(np.minimum(CLICK_RATE * np.exp(liking + noise), 1.0), 3).astype(np.float32)


def _price(world: World, facts: Facts, name: str) -> np.ndarray:
    if name == "item_price":
        return facts["item_price"].astype(np.float32)
    if name == "user_average_order_price":
        level = 3.0 + 0.3 * facts["user_consumption_level"] + 0.3 * _noise(world, facts, name)
    else:
        level = facts[f"{_side(name)}_cluster_log_price"]
    return np.round(np.exp(level), 1).astype(np.float32)


def _stars(world: World, facts: Facts, name: str) -> np.ndarray:
    level = 4.6 + 0.2 * facts["item_quality"] + 0.2 * _noise(world, facts, name)
    return np.round(np.clip(level, 1.0, 5.0), 1).astype(np.float32)


def _share(world: World, facts: Facts, name: str) -> np.ndarray:
    return np.round(uniforms(world.key(name, _owner(facts, name))), 2).astype(np.float32)


def _percent(world: World, facts: Facts, name: str) -> np.ndarray:
    return choose(world.key(name, facts["item_id"]), 70, 2.0).astype(np.int32)


NUMBERS_BY_ENDING: tuple[tuple[tuple[str, ...], Callable[[World, Facts, str], np.ndarray]], ...] = (
    (("_price",), _price),
    (("_ctr_1d", "_ctr_7d", "_ctr_30d", "_rate_7d", "_rate_30d", "_return_rate"), _rate),
    (("_rating",), _stars),
    (("_rank_in_category", "_object_area", "_sharpness"), _share),
    (("_percent",), _percent),
    (("",), _count),
)
