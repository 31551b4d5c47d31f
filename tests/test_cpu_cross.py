"""Proves that the cross network by hand gives the outputs and gradients of the plain one, and says so where it cannot run again."""

import copy

import pytest
import torch

from mbcnet_rec.cpu import cross
from mbcnet_rec.cpu.fast_path import use_fast_layers
from mbcnet_rec.model.layers import Cross, CrossConfig

ROWS, WIDTH = 67, 44


def networks(monkeypatch: pytest.MonkeyPatch, config: CrossConfig) -> tuple[Cross, Cross]:
    monkeypatch.setattr(cross, "MANY", 0)
    torch.manual_seed(0)
    plain = Cross(config, WIDTH)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    fast = copy.deepcopy(plain)
    use_fast_layers(torch.nn.ModuleList([fast]))
    return plain, fast


CASES = {
    "as the paper": CrossConfig(),
    "one layer": CrossConfig(num_layers=1),
    "three layers, one expert": CrossConfig(num_layers=3, num_experts=1, low_rank=5),
    "one wide expert": CrossConfig(num_experts=1, low_rank=cross.NARROW),
    "two wide experts": CrossConfig(num_experts=2, low_rank=cross.NARROW // 2),
    "full rank": CrossConfig("full_rank", num_layers=3),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_by_hand_is_autograds(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Of every parameter, a gate that is always 1 included, and of the input; the gradient that comes in is left as it is."""
    inputs = torch.randn(ROWS, WIDTH)
    gradient = torch.randn(ROWS, WIDTH)
    kept = gradient.clone()
    results = []
    for network in networks(monkeypatch, CASES[case]):
        x = inputs.clone().requires_grad_()
        output = network(x)
        output.backward(gradient)
        named = {name: parameter.grad for name, parameter in network.named_parameters()}
        results.append({"x": x.grad, "output": output.detach(), **named})
    assert torch.equal(gradient, kept)
    assert type(output.grad_fn).__name__ == "_CrossNetworkBackward"
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_second_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one writes over what it has read."""
    _, fast = networks(monkeypatch, CrossConfig())
    output = fast(torch.randn(ROWS, WIDTH, requires_grad=True)).sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.parametrize("how", ["frozen", "no grad", "bf16"])
def test_what_the_gradient_by_hand_does_not_know_is_the_plain_networks(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A frozen parameter, evaluation, autocast."""
    plain, fast = networks(monkeypatch, CrossConfig())
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    for network in (plain, fast):
        network.layers[0].c.requires_grad_(how != "frozen")
    with torch.set_grad_enabled(how != "no grad"), torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
        outputs = [network(x) for network in (plain, fast)]
    assert "_CrossNetwork" not in type(outputs[1].grad_fn).__name__
    torch.testing.assert_close(*outputs)
