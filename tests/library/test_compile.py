"""torch.compile of the branches: the same results, shared graphs, no recompilation once the shapes have been seen."""

from __future__ import annotations

from collections.abc import Callable, Generator

import pytest
import torch
from reference import assert_close, conv_net, copied, gradients, images, loss_of, mlp, residuals_of, vectors
from torch import nn

import stochastic_depth as sd

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
SURVIVAL_PROBS = [0.9, 0.7, 0.5, 0.3]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Generator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def in_place(net: nn.Module, **options) -> None:
    for residual in residuals_of(net):
        residual.branch.compile(**options)


def wrapped(net: nn.Module, **options) -> None:
    for residual in residuals_of(net):
        residual.branch = torch.compile(residual.branch, **options)


WAYS = {"compile()": in_place, "torch.compile": wrapped}
both_ways = pytest.mark.parametrize("compile_branches", WAYS.values(), ids=WAYS)


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def plain_names(values: dict) -> dict:
    return {name.replace("._orig_mod", ""): value for name, value in values.items()}


CASES = [("mlp", "eager", granularity, when) for granularity in ("batch", "sample") for when in ("before", "after")]
CASES += [("mlp", "aot_eager", "sample", "after"), ("conv", "eager", "sample", "after")]


@both_ways
@pytest.mark.parametrize(("kind", "backend", "granularity", "when"), CASES, ids=["-".join(case) for case in CASES])
def test_results_are_those_without_compilation(
    compile_branches: Callable, when: str, backend: str, granularity: str, kind: str
) -> None:
    make, inputs = (mlp, vectors) if kind == "mlp" else (conv_net, images)
    plain = make()
    net = copied(plain)
    if when == "before":
        compile_branches(net, backend=backend)
    for model in (net, plain):
        sd.make_stochastic_(model, SURVIVAL_PROBS, granularity=granularity)
    if when == "after":
        compile_branches(net, backend=backend)
    for step in range(3):
        for model in (net, plain):
            model.zero_grad()
        ours, theirs = net(inputs(4, seed=step)), plain(inputs(4, seed=step))
        loss_of(ours).backward()
        loss_of(theirs).backward()
        assert_close({"output": ours.detach()}, {"output": theirs.detach()})
        assert_close(plain_names(gradients(net)), gradients(plain), atol=1e-9)
    assert_close({"output": net.eval()(inputs(3))}, {"output": plain.eval()(inputs(3))})
    assert num_graphs() > 0
    sd.restore_(net)
    sd.restore_(plain)
    assert_close({"output": net(inputs(3))}, {"output": plain(inputs(3))})


@both_ways
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_no_recompilation_once_the_shapes_have_been_seen(compile_branches: Callable, granularity: str) -> None:
    net = mlp(6)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity)
    compile_branches(net, backend="eager")
    counts = [6, 1, 3, 4] if granularity == "sample" else [6]
    for count in counts:  # all, one, some and others: 1 and the dynamic size are graphs of their own
        gate = True if granularity == "batch" else torch.arange(6) < count
        with depth.gates([gate] * 6):
            net(vectors(6)).sum().backward()
    seen = num_graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(20):
            net(vectors(6, seed=step)).sum().backward()
    assert num_graphs() == seen
    assert 1 <= seen <= (1 if granularity == "batch" else 3)


def test_branches_of_one_shape_share_a_graph() -> None:
    """54 branches of three shapes and two transitions: one graph per shape, not per branch."""
    net = sd.models.cifar_resnet(20)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    wrapped(net, backend="eager")
    with depth.gates([True] * 9):
        net(torch.zeros(2, 3, 32, 32))
    assert num_graphs() == 5


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("how", ["torch.compile", "compile()"])
def test_a_compiled_whole_model_never_freezes_a_draw(granularity: str, how: str) -> None:
    """As documented: graph breaks at the gates, and the same gates as without compilation."""
    plain = mlp()
    net = copied(plain)
    for model in (net, plain):
        sd.make_stochastic_(model, SURVIVAL_PROBS, granularity=granularity)
    codes = []

    def backend(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        codes.append(graph.code)
        return graph.forward

    if how == "compile()":
        net.compile(backend=backend)
        compiled = net
    else:
        compiled = torch.compile(net, backend=backend)
    for step in range(12):
        for model in (net, plain):
            model.zero_grad()
        x = vectors(5, seed=step)
        ours, theirs = compiled(x), plain(x)
        loss_of(ours).backward()
        loss_of(theirs).backward()
        assert_close({"output": ours.detach()}, {"output": theirs.detach()})
        assert_close(gradients(net), gradients(plain))
        assert sd.controller(compiled).last_gates == sd.controller(plain).last_gates
    assert sd.controller(net).state_dict()["counter"] == 12
    assert any("tanh" in code for code in codes), "the branches, which alone have a tanh, were not compiled"
    net.eval()
    plain.eval()
    assert_close({"output": compiled(vectors(3))}, {"output": plain(vectors(3))})
