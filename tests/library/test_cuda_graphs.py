"""Recorded branches compared with plain ones. Without a GPU, a recording runs its function again on fixed memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.cuda_graphs import BranchGraphs, CudaRecording

BATCH = 6
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


class Rerun:
    """Overwrites its own memory in every replay, as graphs do, by running the function again."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], _: Any) -> None:
        self.input, self._function = x, function
        self._needed = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
        self.grads = tuple(torch.full_like(t, torch.nan) if t.requires_grad else None for t in (x, *parameters))

    def forward(self) -> None:
        with torch.enable_grad():
            self._result = self._function(self.input)
        if not hasattr(self, "output"):
            self.output, self.grad_output = torch.empty_like(self._result), torch.empty_like(self._result)
        self.output.data.copy_(self._result.data)

    def backward(self) -> None:
        grads = torch.autograd.grad(self._result, self._needed, self.grad_output)
        for static, grad in zip((grad for grad in self.grads if grad is not None), grads, strict=True):
            static.copy_(grad)


def captured(depth: sd.Controller, device: str = "cpu", **options: Any) -> BranchGraphs:
    if device == "cuda":
        return depth.capture()
    depth.passes.graphs = BranchGraphs(depth.names, record=Rerun, **options)
    return depth.passes.graphs


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return sd.models.cifar_resnet(20, 10).double().to(device)


def batch(device: str = "cpu", size: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images.to(device), torch.arange(size).to(device) % 10


def loss_of(model: nn.Module, device: str = "cpu", size: int = BATCH) -> Tensor:
    images, labels = batch(device, size)
    return F.cross_entropy(model(images), labels)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("skipped_grad", ["zero", "none"])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_training_is_that_of_plain_branches(granularity: Any, skipped_grad: Any, device: str) -> None:
    model, plain = network(device), network(device)
    options = {"granularity": granularity, "skipped_grad": skipped_grad, "seed": 3}
    depth = sd.make_stochastic_(model, sd.linear_decay(0.3), **options)
    sd.make_stochastic_(plain, sd.linear_decay(0.3), **options)
    graphs = captured(depth, device)
    num_run = 0
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (model, plain)]
    for _ in range(6):
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(net, device).backward()
            optimizer.step()
        num_run += sum(gate > 0 for gate in depth.last_gates or [])
    assert_same(list(model.state_dict().values()), list(plain.state_dict().values()))
    assert graphs.num_replayed == num_run
    assert graphs.num_not_replayed == 0
    assert max(graphs.num_recorded) == (1 if granularity == "batch" else 2)


def compiled(model: nn.Module) -> None:
    for residual in model.modules():
        if isinstance(residual, sd.Residual):
            residual.branch.compile(backend="eager")


def with_dropout(model: nn.Module) -> None:
    for residual in model.modules():
        if isinstance(residual, sd.Residual):
            residual.branch.relu = nn.Sequential(residual.branch.relu, nn.Dropout(0.3))


def in_channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("change", [compiled, with_dropout, in_channels_last])
def test_branches_of_other_kinds_are_those_of_plain_branches(
    change: Callable[[nn.Module], None], granularity: Any
) -> None:
    torch._dynamo.reset()
    model, plain = network(), network()
    change(model)
    if change is not compiled:
        change(plain)
    depth = sd.make_stochastic_(model, sd.uniform(0.6), granularity=granularity, seed=3)
    sd.make_stochastic_(plain, sd.uniform(0.6), granularity=granularity, seed=3)
    graphs = captured(depth)
    for step in range(4):
        for net in (model, plain):
            torch.manual_seed(step)
            loss_of(net).backward()
    assert_same(gradients(model), gradients(plain))
    assert_same(list(model.buffers()), list(plain.buffers()))
    assert graphs.num_replayed > 0
    assert graphs.num_not_replayed == 0


def test_a_branch_that_waits_for_its_backward_is_not_overwritten() -> None:
    model, plain = network(), network()
    depth = sd.make_stochastic_(model, sd.uniform(1.0))
    graphs = captured(depth)
    for net in (model, plain):
        (loss_of(net) + loss_of(net, size=BATCH)).backward()
    assert_same(gradients(model), gradients(plain))
    assert (graphs.num_replayed, graphs.num_not_replayed) == (9, 9)


def test_gradients_accumulate_over_backwards() -> None:
    model, plain = network(), network()
    graphs = captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    for net in (model, plain):
        for _ in range(3):
            loss_of(net).backward()
    assert_same(gradients(model), gradients(plain))
    assert graphs.num_replayed == 27


def test_gradients_that_somebody_keeps_are_not_overwritten() -> None:
    model = network()
    captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    loss_of(model).backward()
    kept = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    before = gradients(model)
    model.zero_grad()
    loss_of(model, size=BATCH).mul(3).backward()
    assert_same(kept, before)


def test_a_second_backward_is_refused() -> None:
    model = network()
    captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"groups\.2\.2\.residual runs as a CUDA graph, .* without retain_graph"):
        loss.backward()


def test_an_abandoned_forward_does_not_block_the_next() -> None:
    model = network()
    graphs = captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    loss_of(model)  # as where a loss is not finite, and the step is left out
    loss_of(model).backward()
    assert (graphs.num_replayed, graphs.num_not_replayed) == (18, 0)


def test_further_shapes_run_without_graphs() -> None:
    model, plain = network(), network()
    graphs = captured(sd.make_stochastic_(model, sd.uniform(1.0)), max_shapes=2)
    for net in (model, plain):
        for size in (4, 5, 6, 4):
            loss_of(net, size=size).backward()
    assert_same(gradients(model), gradients(plain))
    assert graphs.num_recorded == [2] * 9
    assert (graphs.num_replayed, graphs.num_not_replayed) == (27, 9)


def test_evaluation_runs_without_graphs() -> None:
    model, plain = network(), network()
    graphs = captured(sd.make_stochastic_(model, sd.uniform(0.5)))
    sd.make_stochastic_(plain, sd.uniform(0.5))
    model.eval(), plain.eval()
    torch.testing.assert_close(model(batch()[0]), plain(batch()[0]), rtol=0, atol=0)
    with torch.no_grad():
        model.train()(batch()[0])
    assert graphs.num_replayed == 0
    assert graphs.num_recorded == [0] * 9


@pytest.mark.parametrize(
    ("change", "num_recorded"),
    [
        (lambda net: net.groups[0].requires_grad_(False), 9 + 3),
        (lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}, assign=True), 9),
        (lambda net: [part.eval() for part in net.groups.modules() if isinstance(part, nn.BatchNorm2d)], 18),
        (lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}), 9),
    ],
    ids=["frozen", "assigned", "norms in evaluation", "loaded"],
)
def test_a_model_that_was_changed_is_not_run_as_it_was(change: Callable[[Any], object], num_recorded: int) -> None:
    model, plain = network(), network()
    graphs = captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    for net in (model, plain):
        loss_of(net).backward()
        net.zero_grad()
        change(net)
        loss_of(net).backward()
    assert_same(gradients(model), gradients(plain))
    assert sum(graphs.num_recorded) == num_recorded


def test_statistics_are_as_if_nothing_had_been_warmed_up() -> None:
    model, plain = network(), network()
    captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    for net in (model, plain):
        loss_of(net).backward()
    assert_same(list(model.buffers()), list(plain.buffers()))


def test_hooks_of_parameters_run_once() -> None:
    model, plain = network(), network()
    captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    for net in (model, plain):
        for parameter in net.parameters():
            parameter.register_hook(lambda grad: grad * 0.5)
        for _ in range(2):
            loss_of(net).backward()
    assert_same(gradients(model), gradients(plain))


def test_a_loss_that_is_kept_over_steps() -> None:
    model, plain = network(), network()
    graphs = captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    kept = []
    for net in (model, plain):
        for _ in range(3):
            kept.append(loss_of(net))
            kept[-1].backward()
    assert_same(gradients(model), gradients(plain))
    assert graphs.num_replayed == 27


class Tied(nn.Module):
    """One linear map, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class SharedNorm(nn.Module):
    """A norm that the branch uses, and the block outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.inner(self.norm(2 * x.cos()))


@pytest.mark.parametrize("make", [lambda: sd.Residual(Tied()), SharedNorm], ids=["tied", "shared norm"])
def test_parameters_that_are_used_twice(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), make(), make()).double()
    plain = copy.deepcopy(model)
    graphs = captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    x = torch.randn(8, 4, dtype=torch.float64)
    for net in (model, plain):
        for _ in range(2):
            net(x).square().sum().backward()
    assert_same(gradients(model), gradients(plain))
    assert graphs.num_replayed == 4


def test_a_parameter_outside_the_module_is_refused() -> None:
    weight = nn.Parameter(torch.ones(4))

    class Borrowing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * weight

    model = nn.Sequential(nn.Linear(4, 4), sd.Residual(Borrowing(4, 4)))
    captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    with pytest.raises(
        RuntimeError, match=r"branch 1 cannot be recorded .*: it uses parameters that do not belong to its module"
    ):
        model(torch.ones(2, 4))


def test_mixed_precision_is_that_of_plain_branches() -> None:
    model, plain = network().float(), network().float()
    graphs = captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    images, labels = batch()
    for net in (model, plain):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(images.float()), labels)
            loss.backward()
    for one, other in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert graphs.num_replayed == 18


def test_a_branch_without_gradients_is_not_recorded() -> None:
    model = network()
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    graphs = captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    loss_of(model).backward()
    assert graphs.num_recorded == [0] * 9


def test_saved_tensors_that_are_sent_elsewhere() -> None:
    model = network()
    graphs = captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        loss_of(model).backward()
    assert graphs.num_replayed == 0


def test_what_a_graph_would_freeze_is_refused() -> None:
    inner = sd.Residual(nn.Linear(4, 4))
    model = nn.Sequential(sd.Residual(nn.Sequential(nn.Linear(4, 4), inner)))
    with pytest.raises(ValueError, match=r"branch 0 cannot .* inside it has its own gate"):
        sd.make_stochastic_(model, sd.uniform(0.5)).capture()
    model = nn.Sequential(sd.Residual(nn.SyncBatchNorm(4)))
    with pytest.raises(ValueError, match=r"SyncBatchNorm waits for other ranks"):
        sd.make_stochastic_(model, sd.uniform(0.5)).capture()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_branches_run_without_graphs(use_reentrant: bool) -> None:
    model, plain = network(), network()
    for net in (model, plain):
        sd.make_stochastic_(net, sd.linear_decay(0.5))
    graphs = captured(sd.controller(model))
    images, labels = batch()
    for net in (model, plain):
        x = net.relu(net.bn(net.conv(images)))
        for group in net.groups:
            x = checkpoint(group, x, use_reentrant=use_reentrant) if net is model else group(x)
        F.cross_entropy(net.fc(net.pool(x).flatten(1)), labels).backward()
    assert_same(gradients(model), gradients(plain))
    if not use_reentrant:
        assert graphs.num_replayed == 0


class Block(nn.Module):
    """Of no library: a residual addition in its code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_branches_of_foreign_blocks_are_recorded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(4) for _ in range(5))).double()
    plain = copy.deepcopy(model)
    for net in (model, plain):
        sd.make_stochastic_(net, sd.linear_decay(0.5), granularity="sample")
    graphs = captured(sd.controller(model))
    x = torch.randn(8, 4, dtype=torch.float64)
    for net in (model, plain):
        for _ in range(4):
            net(x).square().sum().backward()
    assert_same(gradients(model), gradients(plain))
    assert graphs.num_replayed > 10
    assert graphs.num_not_replayed == 0


def test_copies_have_no_graphs() -> None:
    model = network()
    graphs = captured(sd.make_stochastic_(model, sd.uniform(1.0)))
    loss_of(model).backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    loss_of(other).backward()
    assert sd.controller(other).passes.graphs is None
    assert graphs.num_replayed == 9


def test_what_cannot_be_recorded_is_named() -> None:
    model = network()
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    with pytest.raises(ValueError, match=r"groups\.0\.0\.residual .* a parameter is a Parameter on cpu"):
        depth.capture()
    model.groups[0][1].residual.branch.bn1.momentum = None
    model.groups[0][0].residual.branch.bn2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"groups\.0\.0\.residual .* BatchNorm2d has hooks"):
        depth.capture()
    model.groups[0][0].residual.branch.bn2._forward_hooks.clear()
    model.groups[0][0].residual.branch.to("meta")
    with pytest.raises(ValueError, match=r"groups\.0\.0\.residual .* on meta, not a plain one on cuda"):
        depth.capture()


def test_a_failed_recording_names_the_branch() -> None:
    model = network()
    depth = sd.make_stochastic_(model, sd.uniform(1.0))

    def fail(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    depth.passes.graphs = BranchGraphs(depth.names, record=fail)
    with pytest.raises(RuntimeError, match=r"groups\.0\.0\.residual cannot be recorded .*: operation not permitted"):
        loss_of(model)


def test_what_a_recording_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        num_replays = 0

        def replay(self) -> None:
            Graph.num_replays += 1

    recorded = []

    def graph(graph: Graph, **how: Any) -> Any:
        recorded.append((graph, how))
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    weight, frozen = nn.Parameter(torch.full((4,), 3.0)), nn.Parameter(torch.ones(4), requires_grad=False)
    x = torch.arange(8.0).reshape(2, 4).requires_grad_()
    monkeypatch.setattr(torch, "empty_like", torch.ones_like)  # the gradient of the output
    recording = CudaRecording(lambda x: x * weight + frozen, x, [weight, frozen], None)
    assert recording.output.requires_grad is False
    assert recording.output.tolist() == (3 * x + 1).tolist()
    of_input, of_weight, of_frozen = recording.grads
    assert of_input is not None
    assert of_input.tolist() == [[3.0] * 4] * 2
    assert of_weight is not None
    assert of_weight.tolist() == [4.0, 6.0, 8.0, 10.0]
    assert of_frozen is None
    recording.forward(), recording.backward()
    assert Graph.num_replays == 2
    (first, how), (second, same) = recorded
    assert first is not second
    assert how == same == {"pool": (0, 1), "stream": None, "capture_error_mode": "thread_local"}
