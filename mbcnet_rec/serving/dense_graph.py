"""The dense part of a model as a list of ATen calls on its weights: what torch.export records, made ready for a CPU that serves.

What depends on weights alone is computed here, once. A layer's matrix is stored as its product reads it, (in, out): a product of few
rows then copies no matrix into another order.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from data.errors import InputError
from mbcnet_rec.runtime.process import quiet_libraries
from mbcnet_rec.serving import loader as serving

TRACED_ROWS = 7  # of the example that torch.export looks at; any number that no width equals
LINEAR = torch.ops.aten.linear.default


def trace(path: nn.Module, width: int) -> torch.export.ExportedProgram:
    """Record the calls of a module that maps (B, width) to scores, for any number of rows."""
    rows = torch.export.Dim("rows", min=1)
    with quiet_libraries(), torch.no_grad():
        return torch.export.export(path, (torch.zeros(TRACED_ROWS, width),), dynamic_shapes=({0: rows},))


@torch.no_grad()
def graph_spec(program: torch.export.ExportedProgram) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write an exported program as `serving.build_graph` reads it, with the tensors that its calls read, by their names."""
    signature = program.graph_signature
    names = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    names |= signature.inputs_to_lifted_tensor_constants
    stored = {**program.state_dict, **program.constants}
    nodes = list(program.graph.nodes)
    for node in nodes:
        if node.target is torch.ops.aten.to.dtype and node.args[0].meta["val"].dtype == node.args[1]:  # type: ignore[union-attr]
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    output = next(node for node in nodes if node.op == "output").args[0][0]  # type: ignore[index]
    needed = {output}
    for node in reversed(nodes):  # which stand behind what they depend on
        if node in needed:
            needed.update(node.all_input_nodes)
    fixed: dict[fx.Node, tuple[str, Any]] = {}  # weights and what is made of them alone, with names
    calls: list[dict[str, Any]] = []
    read: dict[str, tuple[str, Tensor]] = {}  # by the calls: name in the graph -> name and tensor
    for node in (each for each in nodes if each in needed):
        if node.name in names:
            fixed[node] = names[node.name], stored[names[node.name]]
        elif node.op == "call_function" and node.all_input_nodes and fixed.keys() >= {*node.all_input_nodes}:
            name = f"{_call_name(node)}{map_arg(node.args, lambda each: fixed[each][0])}"
            fixed[node] = name, node.target(*map_arg(node.args, lambda each: fixed[each][1]), **node.kwargs)  # type: ignore[operator]
        elif node.op == "call_function":
            call = {"name": node.name, "call": _call_name(node), "args": node.args, "kwargs": _plain(dict(node.kwargs))}
            own = {each.name: fixed[each] for each in node.all_input_nodes if each in fixed}
            if node.target is LINEAR and node.args[1] in fixed and node.args[0].meta["val"].dim() == 2:  # type: ignore[union-attr]
                x, weight, *bias = (each for each in node.args if each is not None)
                name, matrix = own.pop(weight.name)
                own[f"{weight.name}_t"] = f"{name}.t", matrix.t()
                call["call"] = "aten.addmm.default" if bias else "aten.mm.default"
                call["args"] = [*bias, x, {"node": f"{weight.name}_t"}]
            calls.append(call | {"args": _plain(call["args"])})
            read |= own
    used = {name: key for name, (key, _) in read.items()}
    spec = {"input": next(iter(signature.user_inputs)), "output": output.name, "weights": used, "calls": calls}
    return spec, {key: tensor.detach().contiguous() for key, tensor in read.values()}


def _call_name(node: fx.Node) -> str:
    """The name by which the loader finds a call; it would refuse others, so they are not written."""
    name = str(node.target) if isinstance(node.target, serving.OVERLOAD) else node.target.__name__  # type: ignore[union-attr]
    try:
        serving.resolve(name)
    except ValueError:
        raise InputError(
            f"the model calls {name}, which an artifact does not hold: it wants ATen operators; rewrite that call"
        ) from None
    return name


def _plain(value: Any) -> Any:
    """JSON of an argument: nodes and dtypes as one-entry dicts."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (torch.dtype, torch.layout)):
        return {"torch": str(value).partition(".")[2]}
    if isinstance(value, torch.device):
        return str(value)
    assert value is None or isinstance(value, (bool, int, float, str)), value
    return value
