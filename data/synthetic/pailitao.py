"""The Pailitao-like schema: 192 fields, 2,780 dims, the seven EFGC groups of the paper's Table 1.

The paper names some fields and gives the totals (Tables 1 and 2); the rest is what an image-to-product
search would log, chosen so that the totals hold: 416 for the grouped fields, 44 numbers, 75 fields of 16
and 35 of 32.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from data.schema import Schema, format_schema, parse_schema

Scale = Literal["paper", "paper_24month", "demo"]

NAMES: dict[Scale, str] = {"paper": "pailitao", "paper_24month": "pailitao_24month", "demo": "pailitao_demo"}

# (users, items) of the paper's Table 2; in the demo so few that a laptop sees each popular one often.
USERS_AND_ITEMS: dict[Scale, tuple[int, int]] = {
    "paper": (480_028_940, 974_333_635),
    "paper_24month": (528_665_908, 1_355_865_204),
    "demo": (20_000, 20_000),
}


class Dims(NamedTuple):
    """Embedding dims by role: few distinct ones, so that FBGEMM fuses many tables into one kernel."""

    image: int  # of each of the two image vectors
    identity: int  # user_id and item_id
    attribute: int  # the other fields of user profile and item attributes
    cluster: int  # the two cluster ids
    cluster_attribute: int
    low: int  # ungrouped fields with few ids
    high: int  # ungrouped fields with many ids


DIMS: dict[Scale, Dims] = {
    "paper": Dims(64, 32, 8, 16, 4, 16, 32),
    "paper_24month": Dims(64, 32, 8, 16, 4, 16, 32),
    "demo": Dims(16, 8, 4, 8, 4, 4, 4),
}

PRICES = (5, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 500, 800, 1500, 3000)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000)
RATES = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.5)
STARS = (3.0, 3.5, 4.0, 4.2, 4.4, 4.5, 4.6, 4.7, 4.8, 4.9)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# name -> rows of the table at the paper's scale and in the demo
Rows = dict[str, tuple[int, int]]

USER_PROFILE: Rows = {
    "user_age": (12, 12),
    "user_gender": (3, 3),
    "user_job": (60, 20),
    "user_consumption_level": (8, 8),
    "user_city": (400, 60),
    "user_life_stage": (12, 10),
    "user_membership_level": (8, 6),
    "user_device": (20_000, 100),
}
ITEM_ATTRIBUTES: Rows = {
    "item_category": (20_000, 50),
    "item_delivery_location": (400, 60),
    "item_brand": (4_000_000, 500),
    "item_style": (2_000, 30),
    "item_colour": (200, 20),
    "item_material": (500, 20),
}
CLUSTERS = (1_000_000, 400)
CLUSTER_ATTRIBUTES: Rows = {
    "category": (20_000, 50),
    "gender": (3, 3),
    "age": (12, 12),
    "season": (4, 4),
    "style": (2_000, 30),
    "scene": (300, 20),
}

LOW_CATEGORICAL: Rows = {
    "user_province": (40, 34),
    "user_phone_brand": (200, 20),
    "user_network": (6, 6),
    "user_app_version": (400, 20),
    "user_channel": (300, 20),
    "user_interest_segment": (5_000, 50),
    "user_price_sensitivity": (10, 10),
    "user_active_level": (10, 10),
    "user_favourite_category": (20_000, 50),
    "user_favourite_style": (2_000, 30),
    "item_root_category": (200, 12),
    "item_season": (5, 5),
    "item_pattern": (300, 20),
    "item_size_group": (200, 20),
    "item_target_age": (12, 12),
    "item_target_gender": (3, 3),
    "item_shop_level": (20, 20),
    "item_shop_city": (400, 60),
    "item_shipping_type": (10, 10),
    "item_promotion": (500, 20),
    "query_hour": (24, 24),
    "query_weekday": (7, 7),
    "query_source": (6, 6),
    "query_object_type": (400, 20),
    "query_scene": (300, 20),
    "query_result_page": (20, 20),
    "query_device_os": (60, 10),
    "query_city_tier": (6, 6),
}
LOW_BUCKETS: dict[str, tuple[float, ...]] = {
    "item_ctr_1d": RATES,
    "item_ctr_7d": RATES,
    "item_ctr_30d": RATES,
    "item_conversion_rate_7d": RATES,
    "item_conversion_rate_30d": RATES,
    "item_rating": STARS,
    "item_return_rate": RATES,
    "item_shop_rating": STARS,
    "item_price_rank_in_category": SHARES,
    "user_ctr_7d": RATES,
    "user_ctr_30d": RATES,
    "user_conversion_rate_30d": RATES,
    "user_average_order_price": PRICES,
    "user_category_ctr_30d": RATES,
    "user_brand_ctr_30d": RATES,
    "user_style_ctr_30d": RATES,
}
# name -> (rows at the paper's scale, in the demo, pooling)
LOW_LISTS: dict[str, tuple[int, int, str]] = {
    "user_clicked_categories": (20_000, 50, "mean"),
    "user_clicked_brands": (4_000_000, 500, "mean"),
    "user_clicked_styles": (2_000, 30, "mean"),
    "user_cart_categories": (20_000, 50, "sum"),
    "user_bought_categories": (20_000, 50, "mean"),
    "item_tags": (100_000, 200, "sum"),
    "item_promotion_tags": (1_000, 30, "sum"),
    "query_object_tags": (50_000, 100, "sum"),
}
LOW_WEIGHTED: Rows = {"user_category_preferences": (20_000, 50), "user_style_preferences": (2_000, 30)}
# Designed cross features: the pair's hash. Each side is another field.
LOW_CROSSES: Rows = {
    f"{user}_x_{item}": (2_000_000, 2_000)
    for user in (
        "user_age",
        "user_gender",
        "user_job",
        "user_consumption_level",
        "user_city",
        "user_life_stage",
        "user_membership_level",
    )
    for item in ("item_category", "item_style", "item_price")
}

HIGH_CATEGORICAL: Rows = {
    "item_shop": (12_000_000, 2_000),
    "item_product": (200_000_000, 5_000),
    "item_series": (20_000_000, 2_000),
    "item_title_cluster": (2_000_000, 1_000),
    "user_community": (5_000_000, 500),
    "user_last_clicked_shop": (12_000_000, 2_000),
    "user_last_bought_product": (200_000_000, 5_000),
}
HIGH_LISTS: dict[str, tuple[int, int, str]] = {
    "user_clicked_shops": (12_000_000, 2_000, "mean"),
    "user_bought_products": (200_000_000, 5_000, "mean"),
    "user_clicked_clusters": (1_000_000, 400, "mean"),
    "item_title_words": (3_000_000, 1_000, "mean"),
    "query_object_words": (500_000, 200, "mean"),
}
HIGH_WEIGHTED: Rows = {
    "user_brand_preferences": (4_000_000, 500),
    "user_shop_preferences": (12_000_000, 2_000),
}
HIGH_CROSSES: Rows = {
    **{
        f"user_id_x_{item}": (400_000_000, 20_000)
        for item in ("item_category", "item_brand", "item_shop", "item_price", "item_style")
    },
    **{
        f"query_cluster_id_x_{item}": (100_000_000, 10_000)
        for item in ("doc_cluster_id", "item_category", "item_brand", "item_shop", "item_style", "item_price")
    },
    **{
        f"{user}_x_{item}": (50_000_000, 5_000)
        for user, item in (
            ("user_city", "item_brand"),
            ("user_city", "item_shop"),
            ("user_age", "item_brand"),
            ("user_age", "item_shop"),
            ("user_job", "item_brand"),
            ("user_consumption_level", "item_brand"),
            ("user_consumption_level", "item_shop"),
            ("user_life_stage", "item_brand"),
        )
    },
}

# The plain numbers, counts most of them: log1p
NUMBERS = (
    "user_impressions_7d", "user_clicks_7d", "user_clicks_30d", "user_carts_7d", "user_carts_30d",
    "user_favourites_30d", "user_orders_30d", "user_orders_90d", "user_spend_30d", "user_spend_90d",
    "user_searches_7d", "user_image_searches_30d", "user_days_since_last_visit",
    "user_days_since_registration", "user_dwell_seconds_7d", "user_refunds_90d",
    "item_impressions_1d", "item_impressions_7d", "item_clicks_1d", "item_clicks_7d", "item_clicks_30d",
    "item_carts_7d", "item_favourites_7d", "item_orders_7d", "item_orders_30d", "item_sales_value_30d",
    "item_reviews", "item_refunds_30d", "item_days_since_listing", "item_stock", "item_discount_percent",
    "item_image_search_views_7d", "item_questions_30d", "item_shop_followers",
    "query_cluster_searches_7d", "query_cluster_clicks_7d", "query_cluster_orders_7d",
    "doc_cluster_impressions_7d", "doc_cluster_clicks_7d", "doc_cluster_orders_7d", "doc_cluster_items",
    "query_candidates", "query_object_area", "query_image_sharpness",
)  # fmt: skip


def pailitao_schema(scale: Scale) -> Schema:
    """Build the 192-field schema.

    Args:
        scale: "paper" (12 months) and "paper_24month" have the paper's dims and true numbers of users and
            items; "demo" has the same fields and groups, narrow, with small tables.
    """
    table = {
        "name": NAMES[scale],
        "label": "click",
        "group_column": "user_id",
        "time_column": "timestamp",
        "fields": _fields(scale),
        "tables": {
            "item": {"num_embeddings": USERS_AND_ITEMS[scale][1], "embedding_dim": DIMS[scale].identity}
        },
        "groups": _groups(),
    }
    return parse_schema(table, f"pailitao_schema({scale!r})", Path())


def pailitao_text(scale: Scale) -> str:
    """The text of data/schemas/<name>.toml."""
    schema = pailitao_schema(scale)
    sizes = (
        "the paper's true numbers of users and items"
        if scale != "demo"
        else "tables and dims that a laptop trains"
    )
    header = (
        f"Pailitao-like image-to-product search: 192 fields, {schema.width:,} dims, {sizes}.\n"
        "The groups are those of the paper's Table 1. Written by data/synthetic/pailitao.py: change that instead."
    )
    return format_schema(schema, header)


def _groups() -> dict[str, list[str]]:
    """Table 1 of the paper: which fields cross, and why."""
    profile = ["user_id", *USER_PROFILE]
    attributes = ["item_id", "item_price", "item_sales_volume", *ITEM_ATTRIBUTES]
    clusters = [
        [f"{side}_cluster_{name}" for name in _cluster_attribute_names()] for side in ("query", "doc")
    ]
    return {
        "visual_relevance": ["query_image", "item_image"],
        "query_image_item_attributes": ["query_image", *attributes],
        "user_visual_preference": [*profile, "item_image"],
        "user_attribute_preference": [*profile, *attributes],
        "user_item": ["user_id", "item_id"],
        "cluster_match": ["query_cluster_id", "doc_cluster_id"],
        "cluster_attributes": clusters[0] + clusters[1],
    }


def _cluster_attribute_names() -> list[str]:
    return [*CLUSTER_ATTRIBUTES, "average_price", "popularity"]


def _fields(scale: Scale) -> dict[str, dict[str, Any]]:
    """Every field's entry, grouped fields first."""
    dims = DIMS[scale]
    column = 1 if scale == "demo" else 0
    users, _ = USERS_AND_ITEMS[scale]
    item = {"kind": "categorical", "table": "item"}

    def categorical(rows: Rows, dim: int) -> dict[str, dict[str, Any]]:
        return {
            name: {"kind": "categorical", "num_embeddings": sizes[column], "embedding_dim": dim}
            for name, sizes in rows.items()
        }

    def lists(rows: dict[str, tuple[int, int, str]], dim: int) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "kind": "multi_valued",
                "num_embeddings": sizes[column],
                "embedding_dim": dim,
                "pooling": sizes[2],
            }
            for name, sizes in rows.items()
        }

    def weighted(rows: Rows, dim: int) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "kind": "weighted_multi_valued",
                "num_embeddings": sizes[column],
                "embedding_dim": dim,
                "weights": f"{name}_weights",
            }
            for name, sizes in rows.items()
        }

    clusters: dict[str, dict[str, Any]] = categorical(
        {"query_cluster_id": CLUSTERS, "doc_cluster_id": CLUSTERS}, dims.cluster
    )
    for side in ("query", "doc"):
        names = {f"{side}_cluster_{name}": rows for name, rows in CLUSTER_ATTRIBUTES.items()}
        clusters |= categorical(names, dims.cluster_attribute)
        clusters[f"{side}_cluster_average_price"] = _bucketised(PRICES, dims.cluster_attribute)
        clusters[f"{side}_cluster_popularity"] = _bucketised(COUNTS, dims.cluster_attribute)
    return {
        "query_image": {"kind": "vector", "width": dims.image},
        "item_image": {"kind": "vector", "width": dims.image},
        "user_id": {"kind": "categorical", "num_embeddings": users, "embedding_dim": dims.identity},
        **categorical(USER_PROFILE, dims.attribute),
        "item_id": item,
        "item_price": _bucketised(PRICES, dims.attribute),
        "item_sales_volume": _bucketised(COUNTS, dims.attribute),
        **categorical(ITEM_ATTRIBUTES, dims.attribute),
        **clusters,
        **{name: {"kind": "numeric", "transform": "log1p"} for name in NUMBERS},
        **categorical(LOW_CATEGORICAL, dims.low),
        **{name: _bucketised(boundaries, dims.low) for name, boundaries in LOW_BUCKETS.items()},
        **lists(LOW_LISTS, dims.low),
        **weighted(LOW_WEIGHTED, dims.low),
        **categorical(LOW_CROSSES, dims.low),
        **categorical(HIGH_CATEGORICAL, dims.high),
        # an item is the same thing whether shown, clicked or bought: these share item_id's table
        "user_last_clicked_item": item,
        "user_clicked_items": {"kind": "multi_valued", "table": "item"},
        **lists(HIGH_LISTS, dims.high),
        **weighted(HIGH_WEIGHTED, dims.high),
        **categorical(HIGH_CROSSES, dims.high),
    }


def _bucketised(boundaries: tuple[float, ...], dim: int) -> dict[str, Any]:
    return {
        "kind": "numeric",
        "transform": "bucketise",
        "boundaries": list(boundaries),
        "num_embeddings": len(boundaries) + 2,
        "embedding_dim": dim,
    }
