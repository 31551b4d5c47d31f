"""The part of a model that serves: pooled columns -> the fused logit, and its graph as plain JSON.

Shapes: B batch, N flattened width of all lookups and dense columns, K branches, d latent width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from mbcnet_rec.model.sparse_arch import FeatureRegroup
from mbcnet_rec.serving import loader as serving

TRACED_ROWS = 7  # of the example that torch.export looks at; any number that no width equals


class FusedPath(nn.Module):
    """Regroup -> the chosen branches -> shared top -> fusion -> the fused logit (Eq. 15).

    The dense part `arch` serves the chosen branches by its `serve` if it has that (see BranchArch), else its fused logit. `widths` gives the columns of each lookup, in the order in which they stand;
    dense columns follow. With `each`, each chosen branch's own logit stands beside the fused one.
    """

    def __init__(
        self,
        regroup: FeatureRegroup,
        arch: nn.Module,
        branches: Sequence[str],
        widths: Mapping[str, int],
        each: bool = False,
    ) -> None:
        super().__init__()
        self.regroup = regroup
        self.arch = arch
        self._branches, self._each = list(branches), each
        self._keys, self._widths = list(widths), list(widths.values())

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N) to (B,), or with `each` to (B, 1 + K)."""
        pooled, dense = x.split([sum(self._widths), x.shape[1] - sum(self._widths)], dim=1)
        features = self.regroup([KeyedTensor(self._keys, self._widths, pooled)], dense)
        if self._branches and hasattr(self.arch, "serve"):
            return self.arch.serve(features, self._branches, each=self._each)  # pyright: ignore[reportCallIssue]
        output = self.arch(features)
        return torch.stack([output.fused_logits, *output.branch_logits], dim=1) if self._each else output.fused_logits


def trace(path: FusedPath, width: int) -> torch.export.ExportedProgram:
    """Record the path's calls for any number of rows. `width`: N."""
    example = torch.zeros(TRACED_ROWS, width)
    rows = torch.export.Dim("rows", min=1)
    with torch.no_grad():
        return torch.export.export(path, (example,), dynamic_shapes=({0: rows},))


def graph_spec(program: torch.export.ExportedProgram) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write an exported program as `serving.build_graph` reads it, with the weights that its output depends on."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    nodes = list(program.graph.nodes)
    output = next(node for node in nodes if node.op == "output").args[0][0]  # type: ignore[index]
    needed = {output}
    for node in reversed(nodes):  # which stand behind what they depend on
        if node in needed:
            needed.update(node.all_input_nodes)
    calls = [
        {
            "name": node.name,
            "call": _call_name(node),
            "args": _plain(node.args),
            "kwargs": {key: _plain(value) for key, value in node.kwargs.items()},
        }
        for node in nodes
        if node.op == "call_function" and node in needed
    ]
    tensors = {**program.state_dict, **program.constants}
    used = {node.name: names[node.name] for node in nodes if node.name in names and node in needed}
    spec = {"input": next(iter(signature.user_inputs)), "output": output.name, "weights": used, "calls": calls}
    return spec, {name: tensors[name].detach() for name in used.values()}  # type: ignore[union-attr]


def _call_name(node: fx.Node) -> str:
    """The name by which the loader finds a call; it would refuse others, so they are not written."""
    name = str(node.target) if isinstance(node.target, serving.OVERLOAD) else node.target.__name__  # type: ignore[union-attr]
    serving.resolve(name)
    return name


def _plain(value: Any) -> Any:
    """JSON of an argument: nodes and dtypes as one-entry dicts."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (torch.dtype, torch.layout)):
        return {"torch": str(value).partition(".")[2]}
    if isinstance(value, torch.device):
        return str(value)
    assert value is None or isinstance(value, (bool, int, float, str)), value
    return value
