"""The plain version of a retrofitted model: the original, whose branches are multiplied by given masks."""

import collections
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import stochastic_depth as sd


class Mask(nn.Module):
    """Stands in for a drop path: its k-th call multiplies by the k-th mask (N,) over its probability."""

    def __init__(self, masks: Sequence[Tensor], survival_probs: Sequence[float]) -> None:
        super().__init__()
        self.masks, self.survival_probs = list(masks), list(survival_probs)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        call = self.num_calls % len(self.masks)
        self.num_calls += 1
        mask = self.masks[call].to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return x * mask / self.survival_probs[call]


def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with gains, biases and heads at random, without dropout: no branch contributes nothing."""
    torch.manual_seed(seed)
    model = model.double()
    for parameter in model.parameters():
        if parameter.dim() <= 1 or parameter.numel() == max(parameter.shape):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d)):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def settle_batch_norm(model: nn.Module, inputs: Sequence[object]) -> None:
    """Give each BatchNorm the statistics of these inputs: activations that grow from block to block lose digits."""
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model(*inputs)


def masked(
    model: nn.Module, names: Sequence[str], masks: Sequence[Tensor], survival_probs: Sequence[float]
) -> nn.Module:
    """A copy of the original whose drop paths are these masks."""
    model = copy.deepcopy(model)
    calls: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        calls.setdefault(name.partition("#")[0], []).append(index)
    for name, indices in calls.items():
        parent, _, child = name.rpartition(".")
        stand_in = Mask([masks[index] for index in indices], [survival_probs[index] for index in indices])
        setattr(model.get_submodule(parent), child, stand_in)
    return model


def first_tensor(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, dict) else list(output)  # type: ignore[call-overload]
    return first_tensor(values[0])


def gradients(model: nn.Module, inputs: Sequence[object]) -> tuple[Tensor, dict[str, Tensor]]:
    output = first_tensor(model(*inputs))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    (output * weights).sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equals_original_under_mask(
    make: Callable[[], nn.Module], inputs: Sequence[object], *, num_samples: int = 4, tolerance: float = 1e-9
) -> sd.Controller:
    """With the same gates, outputs and gradients of the retrofitted model are those of the original with masks."""
    original = awake(make())
    settle_batch_norm(original, inputs)
    model = copy.deepcopy(original)
    depth = sd.make_stochastic_(model, granularity="sample")
    # BatchNorm takes its statistics from the survivors, so it is compared with the statistics fixed.
    for network in (original, model):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    generator = torch.Generator().manual_seed(3)
    num_of_branch, outer = seen_samples(model, depth, inputs, num_samples)
    masks = [torch.rand(num_of_branch[i], generator=generator) < 0.5 for i in range(len(depth.names))]
    reference = masked(original, depth.names, masks, depth.survival_probs)
    expected, expected_gradients = gradients(reference, inputs)

    # A branch inside of another sees only the samples for which that one is open.
    def reaching(index: int) -> Tensor:
        around = outer[index]
        return torch.ones_like(masks[index]) if around is None else reaching(around) & masks[around]

    gates = [mask[reaching(index)] for index, mask in enumerate(masks)]
    with depth.gates(gates):
        output, ours = gradients(model, inputs)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    for name, gradient in expected_gradients.items():
        scale = max(1.0, gradient.abs().max().item() if gradient.numel() else 0.0)
        assert name in ours, name
        torch.testing.assert_close(ours[name] / scale, gradient / scale, rtol=0, atol=tolerance, msg=name)
    # The masks matter: the comparison could fail.
    others = masked(original, depth.names, [~mask for mask in masks], depth.survival_probs)
    assert not torch.allclose(first_tensor(others(*inputs)), expected, rtol=1e-6), "flipped gates change nothing"
    assert calls_when_closed(model, depth, inputs) == []
    return depth


def seen_samples(
    model: nn.Module, depth: sd.Controller, inputs: Sequence[object], num_samples: int
) -> tuple[list[int], list[int | None]]:
    """How many samples each branch sees, and in which other branch it lies.

    Windows folded into the batch outside of a branch count as samples.
    """
    seen = [num_samples] * len(depth.names)
    outer: list[int | None] = [None] * len(depth.names)
    running: list[int] = []
    passes = depth._passes
    plain_gate = passes.gate

    def gate(index, num, device, training):
        seen[index] = num
        return plain_gate(index, num, device, training)

    def run(index, branch, x):
        outer[index] = running[-1] if running else None
        running.append(index)
        output = branch(x)
        running.pop()
        return output

    passes.gate, passes.observer = gate, run
    try:
        with torch.no_grad(), depth.gates([True] * len(depth.names)):
            model(*inputs)
    finally:
        del passes.gate
        passes.observer = None
    return seen, outer


def calls_when_closed(model: nn.Module, depth: sd.Controller, inputs: Sequence[object]) -> list[str]:
    """Names of the branches of which a module is called although all gates are closed."""
    # A module with several names may be called from elsewhere.
    names = collections.Counter(module for _, module in model.named_modules(remove_duplicate=False))
    called: set[str] = set()
    hooks = []
    for branch in depth.branches:
        if branch.treatment == "skip":
            for part in branch.parts.modules():
                if names[part] == 1:
                    hooks.append(part.register_forward_pre_hook(lambda *_, name=branch.name: called.add(name)))
    with torch.no_grad(), depth.gates([False] * len(depth.names)):
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return sorted(called)
