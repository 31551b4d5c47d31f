"""ESMM (Ma et al., 2018): click and conversion over all impressions. Shapes: B batch, N flattened width of all fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.schema.bounds import bounded
from mbcnet_rec.model.input_layout import ALL, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, logits_only
from mbcnet_rec.model.layers import Regularisation
from mbcnet_rec.model.tasks import Towers


@dataclass(frozen=True)
class ESMMConfig(Regularisation):
    """Widths of each of the two networks, `tower`."""

    tower: tuple[int, ...] = bounded((512, 256, 128), at_least=1, min_length=1)


class ESMMArch(nn.Module):
    """pCTR and pCVR of a network each on the same embeddings, and pCTCVR = pCTR pCVR (Ma et al., 2018, Eq. 1 and 3)."""

    def __init__(self, config: ESMMConfig, layout: InputLayout) -> None:
        super().__init__()
        self.towers = Towers(2, layout.width(), config.tower, config)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits of pCTR, pCVR and pCTCVR, (B, 3)."""
        click, conversion = self.towers([features[ALL]] * 2).unbind(-1)
        # 1 / p - 1 = e^-a + e^-b + e^-(a + b) of p = sigmoid(a) sigmoid(b)
        both = -torch.logsumexp(torch.stack([-click, -conversion, -click - conversion]), dim=0)
        return logits_only(torch.stack([click, conversion, both], dim=-1))

    @staticmethod
    def targets(labels: Tensor) -> Tensor:
        """Labels (B, 2) -> click; conversion of the clicked rows; click and conversion, which is 0 without a click: (B, 3), NaN where not known."""
        click, conversion = labels.unbind(-1)
        clicked = torch.where(click > 0, conversion, torch.nan)
        return torch.stack([click, clicked, torch.where(click == 0, 0.0, clicked)], dim=-1)


def click_and_conversion(labels: Sequence[str]) -> dict[str, float]:
    """The tasks: conversion is learned through the product alone."""
    if len(labels) != 2:
        raise InputError(
            f"model.kind = 'esmm': wanted a schema of two labels, click and conversion, and it has {len(labels) or 1}; write "
            "labels = [CLICK, CONVERSION]"
        )
    return {labels[0]: 1.0, labels[1]: 0.0, f"{labels[0]}_and_{labels[1]}": 1.0}


MODEL = ModelKind("esmm", ESMMConfig, ESMMArch, "ESMM", tasks=click_and_conversion)
