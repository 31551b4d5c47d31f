"""Fields of kind sequence: which belong together, how long they are, and what can be wrong between fields.

    [fields]
    item   = { kind = "categorical", table = "item", encoding = "hash" }
    seen   = { kind = "sequence", table = "item", encoding = "hash", max_length = 50, pooling = "target_attention", target = "item" }
    brands = { kind = "sequence", beside = "seen", encoding = "hash", num_embeddings = 500, embedding_dim = 8 }
    ages   = { kind = "sequence", beside = "seen", encoding = "gap", num_embeddings = 24, embedding_dim = 4 }

A list's last values are the newest, and stay where it is longer than max_length. Fields `beside` a sequence are lists of the same length.
"""

from collections.abc import Sequence

from ..errors import InputError  # relative: an exported artifact carries this file
from .feature import Feature


def sequences_of(features: Sequence[Feature]) -> dict[str, tuple[Feature, ...]]:
    """Each sequence's name -> the field itself and those beside it; those with a target come first."""
    first = [each for each in features if each.is_sequence and not each.beside]
    return {
        each.name: tuple(
            sorted((each, *(side for side in features if side.beside == each.name)), key=lambda of: not of.target)
        )
        for each in first
    }


def lengths_of(features: Sequence[Feature]) -> dict[str, int]:
    """Field of kind sequence -> how many values of a list are kept."""
    longest = {each.name: each.max_length for each in features if each.is_sequence}
    return {each.name: longest.get(each.beside, each.max_length) for each in features if each.is_sequence}


def check_sequences(features: Sequence[Feature], source: str) -> None:
    """Refuse sequences that contradict other fields. The InputError names the field, the value, what was wanted and how to fix it."""
    named = {each.name: each for each in features}
    for each in features:
        problem = _problem(each, named) if each.is_sequence else ""
        if problem:
            raise InputError(f"{source}: fields.{each.name}.{problem}")
    tables = {each.table_name: each.name for each in features if each.is_sequence}
    for each in features:
        if each.is_sparse and each.table_name in tables and not (each.is_sequence or each.kind == "categorical"):
            raise InputError(
                f"{source}: fields.{each.name}: shares table {each.table_name!r} with the sequence {tables[each.table_name]!r}, whose "
                "rows are not pooled by the table; wanted a categorical field or a sequence: give this field a table of its own"
            )


def _problem(feature: Feature, named: dict[str, Feature]) -> str:
    first = named.get(feature.beside, feature)
    if feature.beside and not (first.is_sequence and first is not feature and not first.beside):
        return f"beside = {feature.beside!r}: wanted a field of kind 'sequence' that is not beside another; change it"
    if not feature.target:
        return ""
    if first.pooling not in ("target_attention", "transformer"):
        return f"target = {feature.target!r}: pooling = {first.pooling!r} has no target; remove it, or use 'target_attention'"
    target = named.get(feature.target)
    if target is None or target.kind != "categorical":
        return f"target = {feature.target!r}: wanted a categorical field, whose id the sequence's are compared with; change it"
    if target.table_name != feature.table_name:
        return (
            f"target = {feature.target!r}: it reads table {target.table_name!r}, this field {feature.table_name!r}; wanted one table, of "
            "[tables], that both name by `table`"
        )
    return ""
