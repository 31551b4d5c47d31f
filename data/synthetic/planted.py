"""The planted world of the synthetic data: who sees which item, and the true click probability.

Everything is a function of (seed, day, row), through hashes of counters, so a billion items need no table and rows may be made in any
order. The true logit is

    logit = bias + sum over terms t of scale_t * term_t,    Var(scale_t * term_t) = SHARES[t] * LOGIT_SD^2

on a pilot sample. Seven terms are interactions inside the seven EFGC groups of the paper's Table 1, the
eighth holds the main effects. Latents inside interactions are centred, so that an additive model hardly
sees them. The image terms are computed from the published image vectors: a model sees the very numbers that
the truth is made of.

Shapes: n rows or ids, d latent width, r image latent width, w image width.
"""

import tomllib
from dataclasses import dataclass
from functools import cache, cached_property
from operator import attrgetter
from pathlib import Path
from typing import Literal

import numpy as np

from data.errors import InputError
from data.reading.keys import SPLITMIX_GAMMA, counter_keys, splitmix64, uniforms
from data.schema import Schema, load_schema

Facts = dict[str, np.ndarray]

FOLDER = Path(__file__).parents[1] / "schemas"
SCHEMAS = {"paper": FOLDER / "pailitao.toml", "demo": FOLDER / "pailitao_demo.toml"}
LOGIT_SD = 1.4
PILOT_ROWS = 40_000
# the true probability is a multiple of 1 / 65536, so a histogram gives exact AUC and log-loss
PROBABILITY_STEPS = 65_536
IMAGE_LATENT = 6
TASTE = 4
PAIR_LATENT = 3
LOW_HALVES = np.uint64(0x0000FFFF0000FFFF)
LOW_WORD = np.uint64(0xFFFFFFFF)
IRWIN_HALL_SCALE = 1.0 / (65536.0 * np.sqrt(4.0 / 12.0))  # makes the sum of four 16-bit uniforms unit variance
PIXEL_STEP = 16.0  # pixels are multiples of 1/16: exact in float32 and small in a file
DRIFT_RADIANS_PER_DAY = np.pi / 56  # taste on day 14 correlates about 0.75 with taste on day 1

PLANTED = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
CLICK_RATE, SHARES, CLUSTER_ATTRIBUTES = (PLANTED[key] for key in ("click_rate", "shares", "cluster_attributes_match"))
PROFILE_LIKES_IMAGES, QUERY_LIKES_ATTRIBUTES = PLANTED["profile_likes_images"], PLANTED["query_likes_attributes"]
PROFILE_LIKES_ATTRIBUTES = PLANTED["profile_likes_attributes"]
# Tag of each centred latent -> (the fact it belongs to, its width)
LATENT_SOURCES = {
    **{f"image<{name}": (name, IMAGE_LATENT) for name in (*PROFILE_LIKES_IMAGES, *QUERY_LIKES_ATTRIBUTES)},
    **{f"{left}>{right}": (left, PAIR_LATENT) for left, right in PROFILE_LIKES_ATTRIBUTES},
    **{f"{left}<{right}": (right, PAIR_LATENT) for left, right in PROFILE_LIKES_ATTRIBUTES},
    **{f"query>{name}": (f"query_cluster_{name}", PAIR_LATENT) for name in (*CLUSTER_ATTRIBUTES, "id")},
    **{f"doc>{name}": (f"doc_cluster_{name}", PAIR_LATENT) for name in (*CLUSTER_ATTRIBUTES, "id")},
}


def pailitao_schema(scale: Literal["paper", "demo"]) -> Schema:
    """Load the 192-field schema: with the paper's dims and true numbers of users and items (12 months), or narrow with small tables.

    The paper names some fields and the totals (Tables 1 and 2): 416 for the grouped, 44 numbers, 75 of 16 and 35 of 32; the rest is chosen to hold.
    """
    return load_schema(SCHEMAS[scale])


@dataclass(frozen=True)
class World:
    """What the planted function needs besides (day, row): sizes of tables and the calibration."""

    schema: Schema
    seed: int
    scales: dict[str, float]
    centres: dict[str, np.ndarray]
    bias: float

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Field name -> rows of its table."""
        return {name: table.num_embeddings for name, table in self.schema.table_of.items()}

    @cached_property
    def image_basis(self) -> np.ndarray:
        """(r, w), orthogonal rows of equal length: image = latent @ basis, latent = image @ basis.T * r/w."""
        width = next(feature.width for feature in self.schema.features if feature.name == "query_image")
        r = min(IMAGE_LATENT, width)
        square = normals(counter_keys(self.seed, "image_basis", np.arange(width)), r)
        return np.linalg.qr(square)[0].T * np.sqrt(width / r)

    def key(self, tag: str, *counters: np.ndarray) -> np.ndarray:
        """Hash a tag and counters under this world's seed."""
        return counter_keys(self.seed, tag, *counters)

    def choose(self, name: str, *counters: np.ndarray, skew: float = 1.0) -> np.ndarray:
        """Draw an id of field `name` as a function of the counters."""
        return choose(self.key(name, *counters), self.sizes[name], skew)


def make_world(schema: Schema, seed: int, days: int) -> World:
    """Calibrate on a pilot sample that the written rows do not contain; InputError if the schema's fields are not the Pailitao-like ones."""
    _require_pailitao(schema)
    world = World(schema, seed, {}, {}, 0.0)
    index = np.arange(PILOT_ROWS)
    facts = draw_facts(world, index % days, index, "pilot")
    centres = {
        tag: normals(world.key(tag, facts[source]), width).mean(axis=0)
        for tag, (source, width) in LATENT_SOURCES.items()
    }
    world = World(schema, seed, {}, centres, 0.0)
    terms = raw_terms(world, facts)
    scales = {name: LOGIT_SD * np.sqrt(SHARES[name]) / float(term.std()) for name, term in terms.items()}
    logit = np.sum([scales[name] * (term - term.mean()) for name, term in terms.items()], axis=0)
    offset = sum(scales[name] * float(term.mean()) for name, term in terms.items())
    low, high = -20.0, 20.0
    for _ in range(60):  # the click rate rises with the bias
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logit + middle).mean() < CLICK_RATE else (low, middle)
    return World(schema, seed, scales, centres, low - offset)


def _require_pailitao(schema: Schema) -> None:
    same = attrgetter("kind", "source_column", "weights", "encoding", "transform")
    known, found = ({each.name: same(each) for each in of.features} for of in (pailitao_schema("demo"), schema))
    for name in (*known, *found):
        if known.get(name) != found.get(name):
            fault = "is missing" if name not in found else "is not one of the 192, or was changed in more than its size"
            fix = "synthetic data has fixed fields; start from data/schemas/pailitao_demo.toml and change only sizes"
            raise InputError(f"schema {schema.name!r}: field {name!r} {fault}: {fix}")
    widths = [each.width for each in schema.features if each.name in ("query_image", "item_image")]
    if widths[0] != widths[1]:
        raise InputError(f"schema {schema.name!r}: query_image and item_image are {widths} wide: set both alike")


def draw_facts(world: World, day: np.ndarray, index: np.ndarray, stream: str = "row") -> Facts:
    """Draw who saw what, of each `day` and `index` within it, both (n,) int64; `stream` is "pilot" for rows that are not written."""
    row = world.key(stream, day, index)
    users, items = world.sizes["user_id"], world.sizes["item_id"]
    user_rank = power_law_ranks(world.key("user", row), users, 0.5)
    item_rank = power_law_ranks(world.key("item", row), items, 0.7)
    facts = {
        "row": row,
        "day": day,
        "user_id": scatter(user_rank, users),
        "item_id": scatter(item_rank, items),
        # 1 for the most popular, 0 for the least
        "user_activity": 1.0 - np.log1p(user_rank) / np.log1p(users),
        "item_popularity": 1.0 - np.log1p(item_rank) / np.log1p(items),
        "query_hour": world.choose("query_hour", row),
        "query_result_page": world.choose("query_result_page", row, skew=3.0),
    }
    for name in PLANTED["user_facts"]:
        facts[name] = world.choose(name, facts["user_id"], skew=1.3)
    facts["taste"] = taste_of_day(world, facts["user_id"], day)
    _draw_clusters(world, facts)
    _draw_item(world, facts)
    _draw_images(world, facts)
    return facts


def taste_of_day(world: World, user: np.ndarray, day: np.ndarray) -> np.ndarray:
    """(n, TASTE) taste of users, which turns slowly from day to day."""
    angle = (DRIFT_RADIANS_PER_DAY * day)[:, None]
    start, end = normals(world.key("taste", user), TASTE), normals(world.key("taste_drift", user), TASTE)
    return np.cos(angle) * start + np.sin(angle) * end


def _draw_clusters(world: World, facts: Facts) -> None:
    """The item's cluster, and a query cluster that often matches it, as retrieval would see to."""
    doc = world.choose("doc_cluster_id", facts["item_id"], skew=1.3)
    relevance = uniforms(world.key("relevance", facts["row"]))
    neighbour = (doc + 1 + choose(world.key("neighbour", facts["row"]), 4)) % world.sizes["doc_cluster_id"]
    other = choose(world.key("other_cluster", facts["row"]), world.sizes["query_cluster_id"], 1.3)
    query = np.where(relevance < 0.45, doc, np.where(relevance < 0.65, neighbour, other))
    clusters = {"query": query % world.sizes["query_cluster_id"], "doc": doc}
    for side, cluster in clusters.items():
        facts[f"{side}_cluster_id"] = cluster
        for name in (*CLUSTER_ATTRIBUTES, "scene"):
            size = world.sizes[f"{side}_cluster_{name}"]
            # one tag for both sides: an attribute belongs to the cluster, not to the side
            facts[f"{side}_cluster_{name}"] = choose(world.key(f"cluster_{name}", cluster), size, 1.2)
        category = facts[f"{side}_cluster_category"]
        facts[f"{side}_cluster_log_price"] = _log_price(world, category, 0.3, "cluster_price", cluster)


def _log_price(world: World, category: np.ndarray, spread: float, tag: str, owner: np.ndarray) -> np.ndarray:
    typical = normals(world.key("category_price", category), 1)[:, 0]
    return 4.0 + 0.8 * typical + spread * normals(world.key(tag, owner), 1)[:, 0]


def _draw_item(world: World, facts: Facts) -> None:
    item = facts["item_id"]
    usual = facts["doc_cluster_category"] % world.sizes["item_category"]
    facts["item_category"] = np.where(
        uniforms(world.key("usual_category", item)) < 0.85, usual, world.choose("item_category", item)
    )
    category = facts["item_category"]
    facts["item_style"] = world.choose("item_style", item, skew=1.5)
    # a category has some forty brands
    facts["item_brand"] = world.choose("item_brand", category, choose(world.key("brand_slot", item), 40, 1.5))
    facts["item_price"] = np.round(np.exp(_log_price(world, category, 0.6, "item_price", item)), 2)
    facts["item_price_band"] = np.searchsorted(price_bands(), facts["item_price"], side="right")
    facts["item_quality"] = normals(world.key("item_quality", item), 1)[:, 0]
    facts["category_latent"] = normals(world.key("taste<category", category), TASTE)
    facts["brand_latent"] = normals(world.key("taste<brand", facts["item_brand"]), TASTE)
    facts["style_latent"] = normals(world.key("taste<style", facts["item_style"]), TASTE)


@cache
def price_bands() -> np.ndarray:
    """The shipped schema's boundaries of item_price: what cross features with the price are made of."""
    return np.asarray(next(each.boundaries for each in pailitao_schema("demo").features if each.name == "item_price"))


def _draw_images(world: World, facts: Facts) -> None:
    """Image = (cluster centroid + own part) @ basis + pixel noise, rounded; and the latent read off it."""
    basis = world.image_basis
    r, width = basis.shape
    images = (("query_image", "query", facts["row"]), ("item_image", "doc", facts["item_id"]))
    for name, side, owner in images:
        category = normals(world.key("image_of_category", facts[f"{side}_cluster_category"]), r)
        cluster = normals(world.key("image_of_cluster", facts[f"{side}_cluster_id"]), r)
        own = normals(world.key(name, owner), r)
        latent = 0.8 * (0.6 * category + 0.8 * cluster) + 0.6 * own
        # einsum, not matmul: its sums do not depend on how many rows a block has
        noise = 0.1 * normals(world.key(f"{name}_pixels", owner), width)
        pixels = np.einsum("nr,rw->nw", latent, basis) + noise
        facts[name] = (np.round(pixels * PIXEL_STEP) / PIXEL_STEP).astype(np.float32)
        facts[f"{name}_latent"] = np.einsum("nw,rw->nr", facts[name].astype(np.float64), basis) * (r / width)


def raw_terms(world: World, facts: Facts) -> dict[str, np.ndarray]:
    """The eight terms of the logit before scaling, each (n,)."""
    query, item = facts["query_image_latent"], facts["item_image_latent"]
    r = query.shape[1]

    def latent(tag: str) -> np.ndarray:
        source, width = LATENT_SOURCES[tag]
        return normals(world.key(tag, facts[source]), width) - world.centres[tag]

    def matching(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.einsum("nd,nd->n", left, right) / np.sqrt(left.shape[1])

    def pair(left: str, right: str) -> np.ndarray:
        return matching(latent(left), latent(right))

    consumption = facts["user_consumption_level"] / (world.sizes["user_consumption_level"] - 1) - 0.4
    price_gap = np.abs(facts["query_cluster_log_price"] - facts["doc_cluster_log_price"])
    taste = facts["taste"]
    attributes_of_item = 0.6 * facts["category_latent"] + 0.5 * facts["brand_latent"] + 0.4 * facts["style_latent"]
    item_latent = attributes_of_item + 0.5 * normals(world.key("taste<item", facts["item_id"]), TASTE)
    return {
        "visual_relevance": matching(query, item),
        "query_image_item_attributes": sum(
            matching(query, latent(f"image<{name}")[:, :r]) for name in QUERY_LIKES_ATTRIBUTES
        ),
        "user_visual_preference": sum(matching(item, latent(f"image<{name}")[:, :r]) for name in PROFILE_LIKES_IMAGES),
        "user_attribute_preference": sum(pair(f"{a}>{b}", f"{a}<{b}") for a, b in PROFILE_LIKES_ATTRIBUTES)
        + 2.0 * consumption * (np.log(facts["item_price"]) - 4.0),
        "user_item": matching(taste, item_latent),
        "cluster_match": 1.5 * (facts["query_cluster_id"] == facts["doc_cluster_id"]) + pair("query>id", "doc>id"),
        "cluster_attributes": sum(pair(f"query>{name}", f"doc>{name}") for name in CLUSTER_ATTRIBUTES) - price_gap,
        "main_effects": facts["item_quality"]
        + 0.7 * normals(world.key("user_openness", facts["user_id"]), 1)[:, 0]
        + 1.5 * facts["item_popularity"]
        + 0.4 * np.sin(facts["query_hour"] * (np.pi / 12))
        - 2.0 * facts["query_result_page"] / world.sizes["query_result_page"],
    }  # type: ignore[dict-item]


def true_probability(world: World, facts: Facts) -> np.ndarray:
    """(n,) int64 in [1, 65535]: the true click probability in steps of 1 / 65536."""
    scaled = [world.scales[name] * term for name, term in raw_terms(world, facts).items()]
    logit = world.bias + np.sum(scaled, axis=0)
    steps = np.round(_sigmoid(logit) * PROBABILITY_STEPS).astype(np.int64)
    return np.clip(steps, 1, PROBABILITY_STEPS - 1)


def draw_labels(world: World, facts: Facts, probability: np.ndarray) -> np.ndarray:
    """(n,) int8 clicks: 1 with exactly the true probability."""
    draw = (world.key("click", facts["row"]) >> np.uint64(48)).astype(np.int64)
    return (draw < probability).astype(np.int8)


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logit))


def normals(key: np.ndarray, d: int) -> np.ndarray:
    """Turn keys (n,) into (n, d) float64 of mean 0 and variance 1, bell-shaped (Irwin-Hall of four)."""
    out = np.empty((len(key), d))
    for k in range(d):
        counter = np.uint64((k + 1) * int(SPLITMIX_GAMMA) % 2**64)
        bits = splitmix64(key + counter)
        # the sum of its four 16-bit parts, in pairs: a third of the time of a sum over an axis of length four
        pairs = (bits & LOW_HALVES) + ((bits >> np.uint64(16)) & LOW_HALVES)
        total = (pairs & LOW_WORD) + (pairs >> np.uint64(32))
        out[:, k] = (total.astype(np.float64) - 2.0 * 65535.0) * IRWIN_HALL_SCALE
    return out


def choose(key: np.ndarray, count: int, skew: float = 1.0) -> np.ndarray:
    """Turn keys into int64 ids in [0, count); above 1, `skew` makes low ids frequent."""
    draws = uniforms(key)
    return np.minimum((count * (draws if skew == 1.0 else draws**skew)).astype(np.int64), count - 1)


def power_law_ranks(key: np.ndarray, count: int, exponent: float) -> np.ndarray:
    """Turn keys into ranks in [0, count) with P(rank r) about (r + 1) ** -exponent, exponent below 1."""
    rest = 1.0 - exponent
    ranks = ((float(count + 1) ** rest - 1.0) * uniforms(key) + 1.0) ** (1.0 / rest)
    return np.minimum(ranks.astype(np.int64) - 1, count - 1)


def scatter(ranks: np.ndarray, count: int) -> np.ndarray:
    """Spread ranks over [0, count) one to one, so that popular ids do not all meet in one row-wise shard."""
    step = max(1, int(count * 0.6180339887))
    while np.gcd(step, count) != 1:
        step += 1
    return ranks * step % count
