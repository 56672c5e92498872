"""Traces of a stochastic model: `torch.fx`, feature extractors, `torch.jit.trace`.

References: the model's own code with a gate before each branch, or the model itself outside of the trace.
"""

import copy
from typing import Any

import pytest
import torch
import torchvision
from plain_blocks import D, DropPath, assert_same, data, linear
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import stochastic_depth as sd


class Block(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath(rate) if rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x).tanh())


def blocks() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(D, 2))


def blocks_with_drop_paths() -> nn.Module:
    return nn.Sequential(Block(0.3), Block(0.5), nn.Linear(D, 2))


def residuals() -> nn.Module:
    return nn.Sequential(sd.Residual(linear()), sd.Residual(linear()), nn.Linear(D, 2))


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "blocks": (blocks, {"schedule": sd.uniform(0.6)}),
    "blocks, per sample": (blocks, {"schedule": sd.uniform(0.6), "granularity": "sample"}),
    "drop paths": (blocks_with_drop_paths, {}),
    "layers": (blocks, {"schedule": sd.uniform(0.6), "layers": ["0", "1"]}),
    "residuals": (residuals, {"schedule": sd.uniform(0.6)}),
}


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_trace_has_gates_that_act_whenever_it_runs(kind: str, *, called_before: bool) -> None:
    make, arguments = MODELS[kind]
    torch.manual_seed(0)
    net, x = make().double(), data(4)
    depth = sd.make_stochastic_(net, **arguments)
    if called_before:
        net(x)
    trace = fx.symbolic_trace(net)
    for gates in ([True, False], [False, False], [False, True]):
        with depth.gates(gates):
            assert_same(trace(x), net(x))
    assert not torch.equal(trace(x), trace(x)) or not torch.equal(trace(x), trace(x))
    trace(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert not depth.masked


@pytest.mark.parametrize("kind", MODELS)
def test_a_trace_of_the_evaluated_model_has_its_factors(kind: str) -> None:
    make, arguments = MODELS[kind]
    torch.manual_seed(0)
    net, x = make().double().eval(), data(4)
    sd.make_stochastic_(net, **arguments)
    assert_same(fx.symbolic_trace(net)(x), net(x))


def test_a_traced_module_that_is_itself_stochastic_is_refused() -> None:
    net = sd.Residual(linear()).double()
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(RuntimeError, match=r"torch\.fx cannot trace a Residual that is itself stochastic"):
        fx.symbolic_trace(net)


MAKERS: dict[str, tuple[Any, str]] = {
    "cifar_resnet": (lambda: sd.models.cifar_resnet(8), "groups.1"),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), "layer2"),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("ignore:The nodes obtained by tracing the model in train mode are different:UserWarning")
def test_features_are_extracted_in_training_and_in_evaluation(name: str) -> None:
    torch.manual_seed(0)
    make, place = MAKERS[name]
    net, x = make(), torch.randn(2, 3, 32, 32)
    depth = sd.make_stochastic_(net, sd.linear_decay(0.5))
    extractor = create_feature_extractor(net, [place])
    seen: list[Tensor] = []
    net.get_submodule(place).register_forward_hook(lambda _m, _i, output: seen.append(output))
    for module in (net, extractor):
        module.eval()
    net(x)
    torch.testing.assert_close(extractor(x)[place], seen[0])
    for module in (net, extractor):
        module.train()
    for norm in (each for each in net.modules() if isinstance(each, nn.BatchNorm2d)):
        norm.eval()
    for gates in ([True] * len(depth), [False] * len(depth)):
        with depth.gates(gates):
            seen.clear()
            net(x)
            torch.testing.assert_close(extractor(x)[place], seen[0])


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_jit_traces_the_evaluated_model_once_it_has_run(granularity: Any) -> None:
    torch.manual_seed(0)
    net, x = blocks().double(), data(4)
    plain = copy.deepcopy(net)
    sd.make_stochastic_(net, sd.uniform(0.6), granularity=granularity)
    net(x)
    net.eval()
    with pytest.raises(RuntimeError, match="run the model once in evaluation mode"):
        torch.jit.trace(net, x)
    net(x)
    traced = torch.jit.trace(net, x)  # which traces twice and compares
    h = x + 0.6 * plain[0].f(x).tanh()
    h = h + 0.6 * plain[1].f(h).tanh()
    assert_same(traced(x), plain[2](h))
