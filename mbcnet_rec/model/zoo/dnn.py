"""A deep network over all fields. Shapes: B batch, N flattened width of all fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from data.schema.bounds import bounded
from mbcnet_rec.model.input_layout import ALL, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, logits_only
from mbcnet_rec.model.layers import MLP, Logit, Regularisation


@dataclass(frozen=True)
class DNNConfig(Regularisation):
    """A deep network of `hidden` widths over all fields; by default the paper's deep branch and shared top in a row."""

    hidden: tuple[int, ...] = bounded((2048, 1024, 512, 512, 512, 512, 256, 128), at_least=1, min_length=1)


class DNNArch(nn.Module):
    """logit = w MLP(e) + b, e all fields concatenated."""

    def __init__(self, config: DNNConfig, layout: InputLayout) -> None:
        super().__init__()
        self.mlp = MLP(layout.width(), config.hidden, config)
        self.logit = Logit(config.hidden[-1])

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        return logits_only(self.logit(self.mlp(features[ALL])))


def as_deep(ours: Any) -> dict[str, Any]:
    """The layers of MBCnet's deep branch and its top in a row, and its dropout."""
    return {"hidden": (*ours.deep.hidden, *ours.top), "dropout": ours.dropout}


MODEL = ModelKind("dnn", DNNConfig, DNNArch, widths=as_deep)
