"""Branches that a block gives to a child to call: `sublayer(x, lambda x: self.attention(x, mask))`, as in the Annotated
Transformer."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from masked import awake, calls_when_closed
from plain_blocks import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd

WIDTH = 6


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return self.out((self.query(query) @ memory.transpose(1, 2) + mask).softmax(-1) @ memory)


class Sublayer(nn.Module):
    """The norm, the sum and the dropout of a branch; the rest is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.dropout(function(self.norm(x)))


class Outer(nn.Module):
    """Hands what it is given on to its own child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Sublayer()

    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return self.inner(x, function)


class PreNorm(nn.Module):
    """No sum: that is in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return self.dropout(function(self.norm(x)))


class DroppingSublayer(Sublayer):
    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath(0.5)

    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.drop_path(self.dropout(function(self.norm(x))))


class Block(nn.Module):
    def __init__(self, sublayer: type[nn.Module]) -> None:
        super().__init__()
        self.attention = Attention()
        self.maps = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, WIDTH))
        self.sublayers = nn.ModuleList([sublayer(), sublayer()])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.sublayers[0](x, lambda x: self.attention(x, x, mask))
        return self.sublayers[1](x, self.maps)


class CallsForward(Block):
    """BERT-pytorch's: the function calls a forward itself."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.sublayers[0](x, lambda x: self.attention.forward(x, x, mask=mask))
        return self.sublayers[1](x, self.maps.forward)


class Checkpoints(Block):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.sublayers[0](x, lambda x: checkpoint(self.attention, x, x, mask, use_reentrant=False))
        return self.sublayers[1](x, self.maps)


class Adds(Block):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.sublayers[0](x, lambda x: self.attention(x, x, mask))
        return x + self.sublayers[1](x, self.maps)


class Net(nn.Module):
    def __init__(self, block: type[Block], sublayer: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(sublayer), block(sublayer)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


# The block, its sublayers, and the modules that end the branches of a block.
MODELS: dict[str, tuple[type[Block], type[nn.Module], tuple[str, str]]] = {
    "the sum in the child": (Block, Sublayer, ("sublayers.0.dropout", "sublayers.1.dropout")),
    "handed on": (Block, Outer, ("sublayers.0.inner.dropout", "sublayers.1.inner.dropout")),
    "forward called": (CallsForward, Sublayer, ("sublayers.0.dropout", "sublayers.1.dropout")),
    "checkpoint": (Checkpoints, Sublayer, ("sublayers.0.dropout", "sublayers.1.dropout")),
    "the sum in the block": (Adds, PreNorm, ("sublayers.0.dropout", "sublayers.1.dropout")),
    "a drop path": (Block, DroppingSublayer, ("sublayers.0.dropout", "sublayers.1.dropout")),
}
GATES = {
    "batch": [True, False, False, True],
    "sample": [torch.tensor([(row + index) % 3 > 0 for row in range(4)]) for index in range(4)],
}


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 5, size, dtype=torch.float64, generator=made) for size in (WIDTH, 5))  # pyright: ignore


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return awake(Net(*MODELS[name][:2])).double().train()


def multiplied(original: nn.Module, name: str, gates: Sequence[bool] | Sequence[Tensor]) -> nn.Module:
    """The model's own code without drop paths, with the ends of its branches multiplied by gates."""
    reference = copy.deepcopy(original)
    for module in reference.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    ends = [f"blocks.{index}.{end}" for index in range(2) for end in MODELS[name][2]]
    for end, gate in zip(ends, gates, strict=True):
        factor = torch.as_tensor(gate, dtype=torch.float64)
        factor = factor.view(-1, 1, 1) if factor.dim() else factor
        reference.get_submodule(end).register_forward_hook(lambda _, __, output, factor=factor: output * factor)
    return reference


def outcome(model: nn.Module, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    x, mask = x.clone().requires_grad_(), mask.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    output = model(x, mask)
    output.square().sum().backward()
    found = {"output": output.detach(), "x": x.grad, "mask": torch.zeros_like(mask) if mask.grad is None else mask.grad}
    return {**found, **{name: p.grad for name, p in model.named_parameters()}}  # pyright: ignore


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("granularity", GATES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_code_times_the_gates(name: str, granularity: str, with_example: bool) -> None:
    original = net(name)
    model = copy.deepcopy(original)
    example = {"inputs": inputs(1)} if with_example else {}
    schedule = sd.uniform(0.5) if name != "a drop path" else None
    rescale = {} if schedule is None else {"rescale": "none"}
    depth = sd.make_stochastic_(model, schedule, granularity=granularity, **rescale, **example)
    assert len(depth) == 4
    gates = GATES[granularity]
    factors = [torch.as_tensor(gate).double() / (1.0 if rescale else 0.5) for gate in gates]
    reference = multiplied(original, name, factors)
    for seed in range(2, 5):  # What the functions hold is another mask in each call.
        with depth.gates(gates):
            ours, theirs = outcome(model, *inputs(seed)), outcome(reference, *inputs(seed))
        for key, expected in theirs.items():
            torch.testing.assert_close(ours[key], expected, rtol=1e-10, atol=1e-12, msg=key)
    assert depth.masked == []
    if granularity == "batch":
        assert calls_when_closed(model, depth, inputs(1)) == []


def test_the_branches_belong_to_the_block_in_order() -> None:
    model = Net(Block, Sublayer)
    depth = sd.make_stochastic_(model, [0.9, 0.8, 0.7, 0.6])
    assert depth.names == ["blocks.0#1", "blocks.0#2", "blocks.1#1", "blocks.1#2"]
    attention = {type(part).__name__ for part in depth.branches[0].parts.modules()}
    assert {"Attention", "LayerNorm", "Dropout"} <= attention


def test_a_child_with_a_hook_keeps_it() -> None:
    model = Net(Block, Sublayer)
    model.get_submodule("blocks.0.sublayers.0").register_forward_hook(lambda *_: None)
    depth = sd.make_stochastic_(model, sd.uniform(0.5), where="blocks.1*")
    assert depth.names == ["blocks.1#1", "blocks.1#2"]
    assert "sublayers.0, which has hooks" in str(depth)


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        return activation(self.map(x))


class GivesActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activated = Activated()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activated(x, nn.functional.relu)


def test_a_function_that_holds_nothing_is_an_argument_as_any_other() -> None:
    model = nn.Sequential(GivesActivation(), GivesActivation())
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    assert depth.names == ["0#1", "1#1"]
    x, calls = torch.randn(3, WIDTH), []
    model[1].activated.register_forward_hook(lambda *_: calls.append(1))
    assert "2 run nothing when closed" in str(depth.verify(x))
    calls.clear()
    with depth.gates([True, True]):
        model(x)
    assert calls == [1]


class Doubled(nn.Module):
    """Computes with a function that cannot be looked into: its caller's code is not a part of any block."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, shift: Callable[[Tensor], Tensor]) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        return shift(self.map(x))


class GivesTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.doubled = Doubled()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.doubled(x, lambda y: y + mask)


class NetOfTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = GivesTensor()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.block(x, mask)


def test_a_function_that_holds_a_tensor_of_its_call_is_not_kept_for_the_next() -> None:
    with pytest.raises(ValueError, match="the block passes a function as an argument"):
        sd.make_stochastic_(NetOfTensors(), sd.uniform(0.5), inputs=[torch.randn(2, WIDTH), torch.randn(2, WIDTH)])
