"""Widths of the models that a config says nothing about: those of its MBCnet. Imports no torchrec."""

from dataclasses import replace

from mbcnet_rec.model.models import ModelConfig


def fit_widths(model: ModelConfig) -> ModelConfig:
    """Give models that the config says nothing about the widths of its MBCnet, as the paper does.

    A DNN gets the deep branch's and the top's layers in a row, DCNv2 and Wide&Deep likewise, experts and streams the top's.
    """
    ours, plain = model.mbcnet, ModelConfig()
    row = (*ours.deep.hidden, *ours.top)
    fitted = {
        "dnn": replace(plain.dnn, hidden=row, dropout=ours.dropout),
        "crossnet": replace(
            plain.crossnet, cross=ours.cross, hidden=(ours.branch_dim, *ours.top), dropout=ours.dropout
        ),
        "wide_deep": replace(plain.wide_deep, hidden=row, dropout=ours.dropout),
        "dcnv2": replace(plain.dcnv2, cross=ours.cross, hidden=ours.deep.hidden, dropout=ours.dropout),
        "mmoe": replace(plain.mmoe, expert=row, gate=ours.top, tower=ours.top, dropout=ours.dropout),
        "enkd": replace(plain.enkd, hidden=row, dropout=ours.dropout),
        "finalmlp": replace(
            plain.finalmlp,
            first=replace(plain.finalmlp.first, hidden=row, gate=ours.top[-1:], dropout=ours.dropout),
            second=replace(plain.finalmlp.second, hidden=row, gate=ours.top[-1:], dropout=ours.dropout),
        ),
        "deepfm": replace(plain.deepfm, hidden=row, dropout=ours.dropout),
        "efgc": replace(
            plain.efgc, efgc=ours.efgc, branch_dim=ours.branch_dim, top=ours.top, dropout=ours.dropout
        ),
    }
    unsaid = {kind: value for kind, value in fitted.items() if getattr(model, kind) == getattr(plain, kind)}
    return replace(model, **unsaid)
