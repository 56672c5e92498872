"""A slow reference implementation of the method, from the paper, which the library must equal.

Nothing of the library's gates is used here. A network is read off as a list of (branch, shortcut) pairs and walked by
hand; gates are given as lists; a step of SGD is written out. Three small networks serve all tests.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from stochastic_depth import Residual

# ---------------------------------------------------------------------------------------------- networks


class Branch(nn.Sequential):
    """A sequence with its own forward, because PyTorch 2.13 ignores `compile()` of a plain `nn.Sequential`."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


def _net(stem: nn.Module, residuals: Iterable[Residual], head: nn.Module, after: Callable[[], nn.Module]) -> nn.Module:
    blocks = [nn.Sequential(OrderedDict(residual=residual, after=after())) for residual in residuals]
    return nn.Sequential(OrderedDict(stem=stem, blocks=nn.Sequential(*blocks), head=head))


def mlp(num_blocks: int = 4, width: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Vectors (N, 5) to (N, 3); no sample depends on another."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        residuals = [Residual(Branch(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width))) for _ in range(num_blocks)]
        net = _net(nn.Linear(5, width), residuals, nn.Linear(width, 3), nn.ReLU)
        return net.to(dtype)


def linear_net(num_blocks: int = 4, *, seed: int = 0) -> nn.Module:
    """Vectors (N, 5) to (N, 3) whose output is affine in every single gate: linear branches, nothing after the sum."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        residuals = [Residual(nn.Linear(6, 6)) for _ in range(num_blocks)]
        return _net(nn.Linear(5, 6), residuals, nn.Linear(6, 3), nn.Identity).double()


def conv_net(*, seed: int = 0, dtype: torch.dtype = torch.float64, batch_norm: bool = True) -> nn.Module:
    """Images (N, 3, 8, 8) to (N, 4): four blocks with BatchNorm, the third of which halves the image."""

    def norm(width: int) -> nn.Module:
        return nn.BatchNorm2d(width) if batch_norm else nn.Identity()

    def branch(in_width: int, width: int, stride: int) -> nn.Module:
        return Branch(
            nn.Conv2d(in_width, width, 3, stride, 1, bias=False),
            norm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            norm(width),
        )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        carry = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), norm(6))
        residuals = [
            Residual(branch(4, 4, 1)),
            Residual(branch(4, 4, 1), nn.Identity()),
            Residual(branch(4, 6, 2), carry),
            Residual(branch(6, 6, 1)),
        ]
        stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
        net = _net(stem, residuals, head, nn.ReLU)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
        return net.to(dtype)


def vectors(num_samples: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(num_samples, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def images(num_samples: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


def residuals_of(net: nn.Module) -> list[Residual]:
    return [module for module in net.modules() if isinstance(module, Residual)]


# ---------------------------------------------------------------------------------------------- the method


def plain_sum(shortcut: Tensor, branch: nn.Module, x: Tensor, gate: bool | Tensor, factor: float) -> Tensor:
    """shortcut + factor * gate * branch(x); a bool gate that is closed, or a mask that is all False, runs nothing.

    A mask (N,) is the paper's gate for each sample by itself: the branch sees the survivors, and only them.
    """
    if isinstance(gate, bool):
        return shortcut + factor * branch(x) if gate else shortcut
    if not gate.any():
        return shortcut
    survivors = [index for index in range(len(x)) if gate[index]]
    outputs = branch(torch.stack([x[index] for index in survivors]))
    rows = list(shortcut)
    for position, index in enumerate(survivors):
        rows[index] = rows[index] + factor * outputs[position]
    return torch.stack(rows)


def forward(
    net: nn.Module, x: Tensor, gates: Sequence[bool | Tensor] | None = None, factors: Sequence[float] | None = None
) -> Tensor:
    """A network of this file, block by block; None: every gate is open, and every factor 1."""
    gates = [True] * len(net.blocks) if gates is None else gates
    factors = [1.0] * len(net.blocks) if factors is None else factors
    h = net.stem(x)
    for block, gate, factor in zip(net.blocks, gates, factors, strict=True):
        residual = block.residual
        shortcut = h if residual.shortcut is None else residual.shortcut(h)
        h = block.after(plain_sum(shortcut, residual.branch, h, gate, factor))
    return net.head(h)


def evaluate(net: nn.Module, x: Tensor, survival_probs: Sequence[float], rescale: str) -> Tensor:
    """The test-time rule: every block runs; with rescale "eval" branch l counts p_l times."""
    return forward(net, x, factors=survival_probs if rescale == "eval" else None)


def training_factors(survival_probs: Sequence[float], rescale: str) -> list[float]:
    return [1 / survival_prob if rescale == "train" else 1.0 for survival_prob in survival_probs]


def fill_skipped_gradients(net: nn.Module, gates: Sequence[bool | Tensor], skipped_grad: str) -> None:
    """Gradients of zero where the optimizer must see zeros; PyTorch itself leaves None if nothing ran."""
    if skipped_grad == "zero":
        for block, gate in zip(net.blocks, gates, strict=True):
            if not (gate if isinstance(gate, bool) else bool(gate.any())):
                for parameter in block.residual.branch.parameters():
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)


class PlainSGD:
    """SGD with Nesterov momentum and weight decay as the authors' `optim.sgd` has it, one number after the other.

    d = gradient + weight_decay * w;  v = momentum * v + d (first step: v = d);  w = w - lr * (d + momentum * v).
    A parameter without a gradient (None) is passed over: neither its momentum nor its decay acts.
    """

    def __init__(self, net: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        self.parameters = list(net.parameters())
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocity: dict[int, Tensor] = {}

    def step(self) -> None:
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            d = parameter.grad + self.weight_decay * parameter.detach()
            before = self.velocity.get(index)
            self.velocity[index] = d.clone() if before is None else self.momentum * before + d
            parameter.data = parameter.data - self.lr * (d + self.momentum * self.velocity[index])
            parameter.grad = None


def every_pattern(num_blocks: int) -> list[tuple[bool, ...]]:
    return list(itertools.product([False, True], repeat=num_blocks))


def pattern_prob(gates: Sequence[bool], survival_probs: Sequence[float]) -> float:
    return math.prod(p if gate else 1 - p for gate, p in zip(gates, survival_probs, strict=True))


# ---------------------------------------------------------------------------------------------- looking


@contextmanager
def counted_calls(net: nn.Module) -> Iterator[list[list[int]]]:
    """For each branch, the batch sizes of its calls in this context, recorded by temporary hooks."""
    branches = [residual.branch for residual in residuals_of(net)]
    calls: list[list[int]] = [[] for _ in branches]
    hooks = [
        branch.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(len(args[0])))
        for branch, seen in zip(branches, calls, strict=True)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def drawn_gates(net: nn.Module, x: Tensor) -> tuple[bool, ...]:
    """Which branches one forward of `net` calls."""
    with counted_calls(net) as calls:
        net(x)
    return tuple(bool(sizes) for sizes in calls)


def assert_binomial(successes: int, trials: int, prob: float, what: str = "") -> None:
    """The exact two-sided test. Seeds are fixed, so that it either always fails or never."""
    p_value = binomtest(successes, trials, prob).pvalue
    assert p_value > 1e-4, f"{what}: {successes} of {trials}, expected {prob:.4f} of them (p-value {p_value:.1e})"


# ---------------------------------------------------------------------------------------------- comparing


def copied(net: nn.Module) -> nn.Module:
    """A copy of a plain network."""
    return copy.deepcopy(net)


def loss_of(output: Tensor) -> Tensor:
    """A scalar that depends on every output, and not evenly."""
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    return (output * weights).sum() + (output**2).mean()


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def buffers(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    """The same names, and bit for bit the same values, None where None."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), f"{name}: {value} against {other}"
        assert value is None or torch.equal(value, other), f"{name} differs by {(value - other).abs().max()}"


def assert_close(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], *, atol: float = 1e-11) -> None:
    """The same names, the same values to rounding in float64, None where None."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), f"{name}: {value} against {other}"
        if value is not None:
            torch.testing.assert_close(
                value, other, atol=atol, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_plain(net: nn.Module, keys: Iterable[str] | None = None) -> None:
    """Check that `net` has the classes, attributes and hooks of a plain network."""
    for name, module in net.named_modules():
        assert not type(module).__name__.startswith("Stochastic"), name
        assert not [key for key in module.__dict__ if "stochastic" in key], name
        hooks = [key for key, value in module.__dict__.items() if "hooks" in key and value]
        assert not hooks, f"{name} has {hooks}"
    for residual in residuals_of(net):
        assert type(residual) is Residual
    if keys is not None:
        assert list(net.state_dict()) == list(keys)


def linear_flops(num_samples: int, in_features: int, out_features: int, *, grad_input: bool = True) -> int:
    """Forward and backward of nn.Linear: two operations per multiply-add, for outputs, weights and inputs."""
    return 2 * num_samples * in_features * out_features * (3 if grad_input else 2)


def conv_flops(
    num_samples: int, in_width: int, out_width: int, kernel: int, out_size: int, *, grad_input: bool = True
) -> int:
    """Forward and backward of a square nn.Conv2d without groups."""
    forward_flops = 2 * num_samples * out_size**2 * out_width * in_width * kernel**2
    return forward_flops * (3 if grad_input else 2)
