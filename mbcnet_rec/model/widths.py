"""Widths of the models that a config says nothing about: those of its MBCnet."""

from dataclasses import replace

from mbcnet_rec.model.models import ModelConfig


def fit_widths(model: ModelConfig) -> ModelConfig:
    """Give models that the config says nothing about the widths of its MBCnet, as the paper does.

    A DNN gets the deep branch's and the top's layers in a row, DCNv2 and Wide&Deep likewise, experts and streams the top's.
    """
    ours, plain = model.mbcnet, ModelConfig()
    row = (*ours.deep.hidden, *ours.top)
    drop = ours.dropout
    stream = {"hidden": row, "gate": ours.top[-1:], "dropout": drop}
    first, second = replace(plain.finalmlp.first, **stream), replace(plain.finalmlp.second, **stream)
    fitted = {
        **{kind: {"hidden": row, "dropout": drop} for kind in ("dnn", "wide_deep", "enkd", "deepfm")},
        "crossnet": {"cross": ours.cross, "hidden": (ours.branch_dim, *ours.top), "dropout": drop},
        "dcnv2": {"cross": ours.cross, "hidden": ours.deep.hidden, "top": ours.top, "dropout": drop},
        "mmoe": {"expert": row, "gate": ours.top, "tower": ours.top, "dropout": drop},
        "finalmlp": {"first": first, "second": second},
        "efgc": {"efgc": ours.efgc, "branch_dim": ours.branch_dim, "top": ours.top, "dropout": drop},
    }
    unsaid = {
        kind: replace(getattr(plain, kind), **values)
        for kind, values in fitted.items()
        if getattr(model, kind) == getattr(plain, kind)
    }
    return replace(model, **unsaid)
