"""GDCN (Wang et al., CIKM 2023, arXiv 2311.04635) as a plug-in: everything that a model takes is in this file.

    mbcnet train --config run.toml --plugin examples/custom_model.py --set model.kind=gdcn
    python examples/custom_model.py                                     trains it for some steps on a synthetic log

docs/add_a_model.md walks through it. Shapes: B batch, N flattened width of all fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import mbcnet_rec
from data.schema.bounds import bounded
from data.synthetic.planted import pailitao_schema
from data.synthetic.write import write_synthetic
from mbcnet_rec.model.input_layout import ALL, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, logits_only
from mbcnet_rec.model.layers import MLP, Logit, Regularisation


@dataclass(frozen=True)
class GDCNConfig(Regularisation):
    """The table [model.gdcn]. num_layers: of the gated cross network; hidden: widths of the deep network beside it."""

    num_layers: int = bounded(3, at_least=1)
    hidden: tuple[int, ...] = bounded((512, 256, 128), at_least=1, min_length=1)


class GatedCross(nn.Module):
    """c_{l+1} = c_0 * (W^c_l c_l + b_l) * sigmoid(W^g_l c_l) + c_l, with * element by element: the gated cross layer of GDCN."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.gate = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))

    def forward(self, c_0: Tensor) -> Tensor:
        """Map (B, N) to (B, N)."""
        c = c_0
        for cross, gate in zip(self.cross, self.gate, strict=True):
            c = c_0 * cross(c) * torch.sigmoid(gate(c)) + c
        return c


class GDCNArch(nn.Module):
    """logit = w (gated cross(e) + MLP(e)) + b, where + concatenates: GDCN-P, whose two networks stand side by side."""

    def __init__(self, config: GDCNConfig, layout: InputLayout) -> None:
        super().__init__()
        self.cross = GatedCross(layout.width(), config.num_layers)
        self.deep = MLP(layout.width(), config.hidden, config)
        self.logit = Logit(layout.width() + config.hidden[-1])

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        e = features[ALL]
        return logits_only(self.logit(torch.cat([self.cross(e), self.deep(e)], dim=1)))


MODEL = ModelKind(
    "gdcn", GDCNConfig, GDCNArch, title="GDCN", widths=lambda ours: {"hidden": (*ours.deep.hidden, *ours.top)}
)


def main(rows: int = 7_000, steps: int = 20) -> None:
    """Train it on a synthetic log of 192 fields in a temporary folder, and print how well it orders the test rows."""
    demo = Path(mbcnet_rec.__file__).parent / "configs" / "demo.toml"
    with TemporaryDirectory() as folder:
        write_synthetic(pailitao_schema("demo"), f"{folder}/log", rows=rows)
        days = {"train": ["0*", "1[0-2]"], "valid": ["13"], "test": ["14"]}
        changes = [
            *(f"data.{split}={[f'{folder}/log/ds=2024-05-{each}' for each in own]}" for split, own in days.items()),
            *(f"plugins+={__file__}", "model.kind=gdcn", "model.gdcn.num_layers=2", "model.gdcn.hidden=[64, 32]"),
            *(f"schema={folder}/log/schema.toml", f"train.out={folder}/run", f"train.max_steps={steps}"),
        ]
        run = mbcnet_rec.train(mbcnet_rec.load_config(demo, changes))
        print(f"test AUC {run.evaluate()['auc']:.4f}")


if __name__ == "__main__":
    main()
