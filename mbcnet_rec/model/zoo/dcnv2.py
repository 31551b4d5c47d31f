"""DCN-V2 (Wang et al., 2021): cross and deep network. Shapes: B batch, N flattened width of all fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.schema.bounds import bounded
from mbcnet_rec.model.input_layout import ALL, Embeddings, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, logits_only
from mbcnet_rec.model.layers import MLP, Cross, CrossConfig, Logit, without_autocast
from mbcnet_rec.model.side_by_side import side_by_side
from mbcnet_rec.model.zoo.dnn import DNNConfig


@dataclass(frozen=True)
class DCNv2Config(DNNConfig):
    """Cross and deep network in parallel.

    Attributes:
        cross: of the one; hidden, batch_norm, dropout: of the other.
        top: widths of layers between the two and the logit. Wang et al. have none; the paper ends every model in 128 latents.
        embeddings: shared, or per_branch: each network reads a slice of every row.
    """

    cross: CrossConfig = CrossConfig()
    hidden: tuple[int, ...] = bounded((2048, 1024, 512, 512, 512), at_least=1, min_length=1)
    top: tuple[int, ...] = bounded((512, 256, 128), at_least=1)
    embeddings: Embeddings = "shared"

    def streams(self, groups: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Part -> the groups that it reads."""
        return {"cross": (ALL,), "deep": (ALL,)}


class DCNv2Arch(nn.Module):
    """logit = w top(cross(e) + MLP(e)) + b, where + concatenates: the parallel DCN-V2 (Wang et al., 2021)."""

    def __init__(self, config: DCNv2Config, layout: InputLayout) -> None:
        super().__init__()
        width = layout.of("cross").width()
        self._cross, self._deep = layout.tensor_name("cross"), layout.tensor_name("deep")
        self.cross = Cross(config.cross, width)
        self.mlp = MLP(layout.of("deep").width(), config.hidden, config)
        self.top = MLP(width + config.hidden[-1], config.top, config)
        self.logit = Logit((width + config.hidden[-1], *config.top)[-1])

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N), or that of either network, to the logits."""
        x, y = features[self._cross], features[self._deep]
        both = side_by_side(x.device, lambda: self.cross(x), lambda: self.mlp(y))
        return logits_only(self.logit(self.top(torch.cat(both, dim=1))) if self.top else self._sum(both))

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        """The logit of parts (B, n_i) without a cat: that of its gradient would be as many copies."""
        weights = self.logit.weight.view(-1).split([part.shape[1] for part in parts])
        with without_autocast(parts[0].device.type):
            products = [part.to(own.dtype).mv(own) for part, own in zip(parts, weights, strict=True)]
            return sum(products, self.logit.bias)


MODEL = ModelKind(
    "dcnv2", DCNv2Config, DCNv2Arch,
    widths=lambda ours: {"cross": ours.cross, "hidden": ours.deep.hidden, "top": ours.top, "dropout": ours.dropout},
)  # fmt: skip
