"""After training, on models as other people write them: the promised outputs, or an error that changes nothing.

Expected outputs are written out by hand with a plain copy of each model.
"""

from __future__ import annotations

import copy
import io
import random
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from plain_models import DropPath
from torch import Tensor, nn
from torch.nn.utils import prune

import stochastic_depth as sd

P = 0.4


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"differs by {error:.1e} of the largest value"


def folded(net: nn.Module, **how: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* cannot go into weights")
        sd.fold_(net, **how)
    return net


def vectors(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------- models


class RootSum(nn.Module):
    """The sum stands in the root's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def branch(self, x: Tensor, **_: object) -> Tensor:
        return F.gelu(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.branch(x))

    def expected(self, x: Tensor) -> Tensor:
        return self.head(x + P * self.branch(x))


class Attn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.q(x).tanh()
        return y if mask is None else y * mask


class OptionalBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attn()

    def branch(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attn(x, mask=mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.branch(x, mask)


class FunctionalEnd(OptionalBlock):
    """The block's own code computes the branch's output from optional arguments."""

    def branch(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = torch.tanh(self.attn.q(x))
        return y if mask is None else y * mask


class Pair(NamedTuple):
    values: Tensor
    weights: Tensor


class PairAttn(Attn):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Pair:
        y = super().forward(x, mask)
        return Pair(y, y.softmax(-1))


class PairBlock(OptionalBlock):
    """Its attention returns two values, of which one is added."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = PairAttn()

    def branch(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attn(x, mask)[0]


class Cross(nn.Module):
    """Which weights come last depends on the call."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def branch(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.own(x) if mask is None else self.other(x * mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.own(x) if mask is None else self.other(x * mask)
        return x + h


class Stack(nn.Module):
    """Passes optional arguments on to its blocks."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, object]:
        for block in self.blocks:
            x = block(x, mask) if mask is not None else block(x)
        return {"hidden": x, "lengths": [x.shape[0]]}

    def expected(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + P * block.branch(x, mask)
        return x


class Hooked(nn.Module):
    """A hook changes the output of the last linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.register_forward_hook(_plus_one)

    def branch(self, x: Tensor, _mask: Tensor | None = None) -> Tensor:
        return self.b(torch.relu(self.a(x)))

    def forward(self, x: Tensor, _mask: Tensor | None = None) -> Tensor:
        return x + self.branch(x)


def _plus_one(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return output + 1


class PreHooked(Hooked):
    """A hook renews the last weights before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(6, 6)
        self.b.register_forward_pre_hook(_normalize)


def _normalize(module: nn.Module, _args: object) -> None:
    module.weight.data.div_(module.weight.data.norm())


class OwnForward(Hooked):
    """The last linear map has its own forward, as with accelerate and quantizers."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(6, 6)
        self.b.forward = types.MethodType(lambda own, x: F.linear(x, own.weight, own.bias).tanh(), self.b)


class Normalized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class HookedRelu(Hooked):
    """A hook on a module that would pass the factor on."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.b[1].register_forward_hook(_plus_one)


class WithLast(Hooked):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.b = last


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.down, self.up = nn.Linear(6, 6), nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x)) * self.scaling


def pruned() -> nn.Module:
    linear = nn.Linear(6, 6)
    prune.random_unstructured(linear, "weight", 0.5)
    return linear


STACKS = {
    "optional": OptionalBlock,
    "functional-end": FunctionalEnd,
    "pair": PairBlock,
    "cross": Cross,
    "hook": Hooked,
    "pre-hook": PreHooked,
    "own-forward": OwnForward,
    "hook-on-relu": HookedRelu,
    "normalized": lambda: WithLast(Normalized(6, 6)),
    "weight-norm": lambda: WithLast(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
    "pruned": lambda: WithLast(pruned()),
    "lora": lambda: WithLast(Lora()),
}


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Two equal models in evaluation mode; not all can be copied."""
    made: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(Stack(make).double().eval())
    return made[0], made[1]


# ---------------------------------------------------------------------------------------------- fold_


@pytest.mark.parametrize("mode", ["evaluation", "training"])
@pytest.mark.parametrize("name", STACKS)
def test_folding_keeps_what_a_stranger_computes_in_every_form_of_call(name: str, mode: str) -> None:
    net, plain = twins(STACKS[name])
    net.train(mode == "training")
    x, mask, keys = vectors(4), vectors(4, seed=2), list(net.state_dict())
    forms = [(x,), (x, mask)]
    expected = [plain.expected(*form) for form in forms]
    # The branch is one of two in Cross, and what its biases give is added by one of two elsewhere.
    sd.make_stochastic_(net, sd.uniform(P), where=None if name == "cross" else "blocks.?#1")
    folded(net, inputs=forms[1])
    assert net.training == (mode == "training")
    for form, those in zip(forms, expected, strict=True):
        assert_near(net.eval()(*form)["hidden"], those)
    assert list(net.state_dict()) == keys
    if name not in ("own-forward", "pruned"):  # they cannot be copied
        assert_near(copy.deepcopy(net)(*forms[1])["hidden"], expected[1])


def test_folding_a_sum_in_the_roots_own_forward() -> None:
    net, x = RootSum().double(), vectors(4)
    expected = copy.deepcopy(net).expected(x)
    sd.make_stochastic_(net, sd.uniform(P))
    with pytest.warns(UserWarning, match="it ends in a call of gelu. It stays as a scalar"):
        sd.fold_(net)
    assert isinstance(net, RootSum)
    assert_near(net(x), expected)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert_near(torch.load(file, weights_only=False)(x[:2]), expected[:2])
    net(x).sum().backward()
    assert net.conv.weight.grad is not None


def test_a_scaled_block_does_not_trust_a_recording_of_another_form_of_call() -> None:
    class Frozen(FunctionalEnd):
        def branch(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = super().branch(x, mask)
            # A recording takes this for a constant.
            return y if mask is None else y * (2 if isinstance(mask, Tensor) else 3)

    net, x, mask = Stack(Frozen).double(), vectors(4), vectors(4, seed=2)
    expected = copy.deepcopy(net).expected(x, mask)
    sd.make_stochastic_(net, sd.uniform(P))
    folded(net, inputs=x)
    try:
        assert_near(net(x, mask)["hidden"], expected)
    except RuntimeError as error:
        assert "cannot be called in this form" in str(error)  # noqa: PT017


class Peeks(nn.Module):
    """Code outside the branch uses its last weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            sd.Residual(nn.Linear(6, 6)), sd.Residual(nn.Sequential(nn.Tanh(), nn.Linear(6, 6)))
        )
        self.norm, self.num_calls = nn.BatchNorm1d(6), 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        x = self.blocks(self.norm(x))
        return F.linear(x, self.blocks[1].branch[1].weight.t())


class PeeksInTheLayer(Peeks):
    """Its blocks are not `Residual`s, and its last layer is still all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Hooked(), Hooked())
        self.blocks[1].b._forward_hooks.clear()
        self.tied, self.head = self.blocks[0].b, nn.Linear(6, 6)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        x = self.blocks(self.norm(x))
        return self.head(F.linear(x, self.blocks[1].b.weight.t()))


@pytest.mark.parametrize("function", [sd.fold_, lambda net: sd.convert_rescale_(net, "train")], ids=["fold", "convert"])
@pytest.mark.parametrize("is_seen", [False, True], ids=["guessed", "remembered"])
def test_a_model_whose_outputs_would_change_is_refused_and_as_it_was(
    function: Callable[[nn.Module], None], is_seen: bool
) -> None:
    net, x = Peeks().double(), vectors(4)
    depth = sd.make_stochastic_(net, [0.7, P])
    if is_seen:
        net(x)
        assert depth.state_dict()["counter"] == 1
    state, classes = reference.state_of(net), [type(module) for module in net.modules()]
    described, before = str(depth), copy.deepcopy(net).eval()(x)
    net.num_calls = 7
    origin = "remembered" if is_seen else "guessed"
    with pytest.raises(
        RuntimeError, match=f"on the {origin} example the output would differ .* The model is as it was"
    ) as error:
        function(net)
    assert "\n" not in str(error.value)
    reference.assert_same(reference.state_of(net), state)
    assert [type(module) for module in net.modules()] == classes
    assert net.num_calls == 7
    assert str(depth) == described
    assert len(depth.calls.evaluation_first()) == is_seen  # a guess is no call
    assert torch.equal(net.eval()(x), before)
    with depth.gates([False, False]):  # the gates act still
        assert_near(net(x), F.linear(net.norm(x), net.blocks[1].branch[1].weight.t()))
    net.train()(x)
    assert depth.state_dict()["counter"] == 1 + is_seen
    sd.restore_(net)
    reference.assert_plain(net)


def test_a_check_leaves_no_traces() -> None:
    net, x = Peeks().double().train(), vectors(4)
    net.blocks[0].eval()
    net.forward = types.MethodType(lambda own, x: own.blocks(own.norm(x)), net)  # it does not inspect values
    sd.make_stochastic_(net, [0.7, P])
    modes, buffers = [module.training for module in net.modules()], reference.buffers(net)
    gradients = reference.gradients(net)
    hooks = [len(module._forward_hooks) for module in net.blocks.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    sd.fold_(net, inputs=x)
    assert [module.training for module in net.modules()] == modes
    reference.assert_same(reference.buffers(net), buffers)
    reference.assert_same(reference.gradients(net), gradients)
    assert [len(module._forward_hooks) for module in net.blocks.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))


def test_a_model_that_draws_in_evaluation_raises_no_false_alarm() -> None:
    class Noisy(Stack):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, object]:
            x = x + torch.randn_like(x) + random.random() + np.random.rand()
            return super().forward(x, mask)

    net, x = Noisy(lambda: WithLast(nn.Linear(6, 6))).double(), vectors(4)
    sd.make_stochastic_(net, sd.uniform(P))
    sd.fold_(net, inputs=x)
    reference.assert_plain(net)


class Named(nn.Module):
    """Takes arguments by name only, and more than can be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Hooked()

    def forward(self, *, tokens: Tensor, lengths: Tensor, kind: str) -> tuple[Tensor, str]:
        return self.block(tokens)[: int(lengths.max())], kind


def test_what_cannot_be_checked_is_folded_with_one_warning_and_an_example_is_taken_by_name() -> None:
    net, call = Named().double(), {"tokens": vectors(4), "lengths": torch.tensor([2, 3]), "kind": "a"}
    net.block.b._forward_hooks.clear()
    plain = copy.deepcopy(net).block
    expected = (call["tokens"] + P * plain.branch(call["tokens"]))[:3]
    sd.make_stochastic_(net, sd.uniform(P))
    twin = copy.deepcopy(net)
    with pytest.warns(UserWarning, match=r"fold_ could not check its result.*fold_\(model, inputs=x\)") as warned:
        sd.fold_(twin)
    assert len(warned) == 1
    assert_near(twin(**call)[0], expected)
    sd.fold_(net, inputs=call)  # without a warning
    assert_near(net(**call)[0], expected)


def test_without_a_factor_nothing_needs_a_check() -> None:
    net = Named().double()
    net.block.b._forward_hooks.clear()
    sd.make_stochastic_(net, sd.uniform(P), rescale="train")
    sd.fold_(net)
    reference.assert_plain(net)


def test_inputs_on_which_the_model_fails_are_a_users_error() -> None:
    net = RootSum().double()
    sd.make_stochastic_(net, sd.uniform(P))
    state = reference.state_of(net)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        sd.fold_(net, inputs=torch.zeros(2, 5).double())
    reference.assert_same(reference.state_of(net), state)
    assert sd.controller(net).survival_probs == [P]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_first_call_is_remembered_small_and_in_this_process_only(training: bool) -> None:
    net = Stack(WithTwoLinears).double().train(training)
    depth = sd.make_stochastic_(net, sd.uniform(P))
    assert depth.calls.evaluation_first() == []
    large = torch.randn(1000, 100, 6).double()
    with pytest.raises(RuntimeError):
        net(torch.zeros(3, 5).double())  # a call that fails is no example
    net(large, mask=torch.ones(6).double())
    net(large + 1, mask=torch.ones(6).double())
    ((args, kwargs),) = depth.calls.evaluation_first()
    assert torch.equal(args[0], large[:2])
    assert args[0].untyped_storage().nbytes() == 2 * 100 * 6 * 8
    assert torch.equal(kwargs["mask"], torch.ones(6).double())
    assert sd.controller(copy.deepcopy(net)).calls.evaluation_first() == []
    file = io.BytesIO()
    torch.save(net, file)
    assert len(file.getvalue()) < 100_000


class WithTwoLinears(Hooked):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(6, 6)


def test_a_drop_path_that_is_called_in_training_only_is_folded_rightly_or_not_at_all() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.drop_path = nn.Linear(6, 6), DropPath(0.05)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return x + self.drop_path(self.f(x))
            return x + self.f(x)

    net, x = nn.Sequential(Bypass(), Bypass()).double(), vectors(4)
    plain = copy.deepcopy(net)
    sd.make_stochastic_(net, sd.uniform(0.5))
    before = net.eval()(x)
    try:
        folded(net)
    except RuntimeError as error:
        assert "The model is as it was" in str(error)  # noqa: PT017
        assert torch.equal(net(x), before)
    else:
        h = x + 0.5 * plain[0].f(x)
        assert_near(net(x), h + 0.5 * plain[1].f(h))


# ---------------------------------------------------------------------------------------------- convert_rescale_


def test_a_hook_on_the_last_weights_leaves_a_branch_in_its_convention() -> None:
    net, x = Stack(Hooked).double().eval(), vectors(4)
    expected = copy.deepcopy(net).expected(x)
    sd.make_stochastic_(net, sd.uniform(P))
    with pytest.warns(UserWarning, match="stays in the convention 'eval': a Linear at its end has a hook") as warned:
        sd.convert_rescale_(net, "train", inputs=x)
    assert len(warned) == 3
    assert_near(net(x)["hidden"], expected)


# ---------------------------------------------------------------------------------------------- subnetwork


@pytest.mark.parametrize("how", ["given", "remembered"])
@pytest.mark.parametrize("name", [name for name in STACKS if name not in ("own-forward", "pruned")])
def test_a_subnetwork_of_a_strangers_model_takes_its_call(name: str, how: str) -> None:
    net, plain = twins(STACKS[name])
    x, mask = vectors(4), vectors(4, seed=2)
    expected = x
    for index in (0, 2):
        expected = expected + P * plain.blocks[index].branch(expected, mask)
    every = name == "cross"  # What its blocks add is one of two branches.
    sd.make_stochastic_(net, sd.uniform(P), where=None if every else "blocks.?#1")
    if how == "remembered":
        net(x, mask)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* cannot go into weights")
        small = sd.subnetwork(net, [0, 1, 4, 5] if every else [0, 2], inputs=(x, mask) if how == "given" else None)
    assert_near(small(x, mask)["hidden"], expected)


class Dropout(nn.Module):
    """Reads its mode in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.a(x), 0.5, self.training)
        return x + F.dropout(self.b(self.norm(x)), 0.5, self.training)


def test_what_is_left_of_a_block_is_its_code_in_evaluation_whatever_the_mode() -> None:
    net, x = nn.Sequential(Dropout(), Dropout()).double().train(), vectors(4)
    net[0].norm.eval()
    plain = copy.deepcopy(net).eval()
    h = x + P * plain[0].b(plain[0].norm(x))
    expected = h + P * plain[1].a(h)
    expected = expected + P * plain[1].b(plain[1].norm(expected))
    sd.make_stochastic_(net, sd.uniform(P))
    small = sd.subnetwork(net, [1, 2, 3])
    assert small.training
    assert small[1].norm.training
    assert not small[0].norm.training  # it was frozen
    assert_near(small.eval()(x), expected)


def test_a_subnetwork_that_is_not_what_it_promises_is_refused() -> None:
    net, x = Peeks().double().eval(), vectors(4)
    sd.make_stochastic_(net, [0.7, P])
    with pytest.raises(RuntimeError, match="subnetwork refuses Peeks: on the given example the output"):
        sd.subnetwork(net, [1], inputs=x)
    with pytest.raises(RuntimeError, match=r"the result would not run on the given example .AttributeError"):
        sd.subnetwork(net, [0], inputs=x)


class Silent(nn.Module):
    """Its `train` returns nothing, as that of mmlab's backbones."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.BatchNorm1d(6)

    def train(self, mode: bool = True) -> None:
        super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        for each in self.a:
            x = x + each(x)
        return self.norm(x)


def test_a_train_that_returns_nothing() -> None:
    net, x = Silent().double(), vectors(4)
    plain = copy.deepcopy(net)
    plain.train(False)
    h = x + P * plain.a[0](x)
    expected = plain.norm(h + P * plain.a[2](h))
    sd.make_stochastic_(net, sd.uniform(P))
    small = sd.subnetwork(net, [0, 2], inputs=x)
    small.train(False)
    assert_near(small(x), expected)
    assert sd.subnetwork(net, cost=0.7, inputs=x) is not None
    sd.recalibrate_batchnorm_(small, [x])
    torch.testing.assert_close(small.norm.running_mean, (h + P * plain.a[2](h)).mean(0))
    assert sd.monte_carlo(net, x, outputs="values").variance.max() > 0
    sd.fold_(net)
    net.train(False)
    assert torch.isfinite(net(x)).all()


def test_whole_layers_whose_train_returns_nothing_are_dropped() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(6, 6)

        def train(self, mode: bool = True) -> None:
            super().train(mode)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            y = x + self.f(x)
            return (y, y) if float(y.detach().sum()) > -1e9 else (y, None)  # only a run can tell

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)[0]
            return x

    net, x = Layers().double(), vectors(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["layers.*"])
    with depth.gates([False, True]):
        assert_near(net(x), x + net.layers[1].f(x))


def test_pytorchs_encoder_does_without_branches() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3).double().eval()
    x = torch.randn(3, 5, 8).double()
    h = x
    for index, layer in enumerate(copy.deepcopy(net).layers):
        p = 0.5 if index == 0 else 0.0
        h = layer.norm1(h + p * layer.self_attn(h, h, h)[0])
        h = layer.norm2(h + p * layer.linear2(torch.relu(layer.linear1(h))))
    sd.make_stochastic_(net, sd.uniform(0.5))
    try:
        net(x)
    except RuntimeError:
        pytest.xfail("the stochastic encoder cannot be evaluated yet, so that nothing can be compared")
    small = sd.subnetwork(net, [0, 1], inputs=x)
    assert_near(small(x), h, 1e-10)
    sd.fold_(net)
    h = x
    for layer in net.layers:
        h = layer.norm1(h + layer.self_attn(h, h, h)[0])
        h = layer.norm2(h + layer.linear2(torch.relu(layer.linear1(h))))
    assert_near(net(x), h, 1e-10)


# ---------------------------------------------------------------------------------------------- monte_carlo


class Dice(nn.Module):
    """Its drop path is called in training only, by code that cannot be recorded."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.f, self.drop_path, self.always = nn.Linear(6, 6), DropPath(0.2), always

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if float(y.detach().abs().max()) > 1e9:
            return y
        return x + (self.drop_path(y) if self.training or self.always else y)


class Bypassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = nn.Linear(6, 6), DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.drop_path(self.f(x))
        return x + self.f(x)


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
@pytest.mark.parametrize(
    "make", [lambda: Dice(always=False), Bypassed, lambda: nn.Sequential(Bypassed(), sd.Residual(nn.Linear(6, 6)))]
)
def test_gates_that_do_not_act_in_evaluation_are_refused_or_do(make: Callable[[], nn.Module]) -> None:
    net, x = nn.Sequential(make()).double(), vectors(4)
    sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    try:
        prediction = sd.monte_carlo(net, x, 8, outputs="values")
    except RuntimeError as error:
        assert "calls the drop path in training only: its gate has no effect in evaluation" in str(error)  # noqa: PT017
    else:
        assert prediction.variance.max() > 0


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_gates_of_a_masked_branch_act_and_agreement_is_no_error() -> None:
    net, x = nn.Sequential(Dice(always=True)).double(), vectors(4)
    plain = copy.deepcopy(net)[0]
    sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    prediction = sd.monte_carlo(net, x, 64, outputs="values")
    share = (prediction.mean - x) / plain.f(x)
    assert 0.2 < share.mean() < 0.8
    assert_near(share, share.mean().expand_as(share))
    zero = nn.Sequential(sd.Residual(nn.Linear(6, 6))).double()
    nn.init.zeros_(zero[0].branch.weight)
    nn.init.zeros_(zero[0].branch.bias)
    sd.make_stochastic_(zero, sd.uniform(0.5))
    assert not sd.monte_carlo(zero, x, 8, outputs="values").variance.any()


def test_a_layer_that_is_never_open_is_not_taken_for_a_bypass() -> None:
    net, x = nn.Sequential(Hooked(), Hooked()).double(), vectors(4)
    sd.make_stochastic_(net, [0.001, 0.9], layers=["*"], rescale="none")
    assert sd.monte_carlo(net, x, 8, outputs="values").mean.shape == x.shape


class Controlled(nn.Module):
    """A branch that ends in what it may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: Tensor, control: Tensor | None = None) -> Tensor:
        y = self.f(x)
        return x + (y if control is None else y + control)


class ControlledNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Controlled()

    def forward(self, x: Tensor, control: Tensor | None = None) -> Tensor:
        return self.block(x, control)


@pytest.mark.parametrize("called_with_it", [False, True])
def test_what_a_branch_may_be_given_has_its_factor_too(*, called_with_it: bool) -> None:
    net = ControlledNet().double()
    sd.make_stochastic_(net, sd.uniform(0.5))
    x, control = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    net(x)
    if called_with_it:
        net(x, control)
    net.eval()
    expected = net.block.f(x), net.block.f(x) + control
    with pytest.warns(UserWarning, match="0.5 of block#1 cannot go into weights"):
        sd.fold_(net)
    for y, given in zip(expected, ((x,), (x, control)), strict=True):
        torch.testing.assert_close(net(*given), x + 0.5 * y)


class Modulation(nn.Module):
    """Gives a shift, a scale and a gate: parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 18)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.f(condition.tanh()).chunk(3, -1)


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.norm, self.f = Modulation(), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        return x + gate * self.f(self.norm(x) * (1 + scale) + shift)


class ModulatedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Modulated() for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x


def test_a_factor_does_not_go_into_one_of_several_parts() -> None:
    torch.manual_seed(0)
    net = ModulatedNet().double()
    sd.make_stochastic_(net, sd.uniform(0.5))
    x, condition = torch.randn(2, 3, 6, dtype=torch.float64)
    net(x, condition)
    net.eval()
    expected = net(x, condition)
    modulation = net.blocks[0].modulation.f.weight.clone()  # pyright: ignore
    sd.fold_(net)
    torch.testing.assert_close(net(x, condition), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(net.blocks[0].modulation.f.weight, modulation)  # pyright: ignore


class EndsInGelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(self.f(x))


@pytest.mark.parametrize("layers", [None, ["*"]], ids=["blocks", "layers"])
def test_a_folded_model_with_a_factor_in_its_code_is_refused_and_stays_as_it_is(layers: Any) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(EndsInGelu(), EndsInGelu()), torch.randn(3, 8)
    sd.make_stochastic_(net, sd.uniform(0.5), layers=layers)
    with pytest.warns(UserWarning, match="cannot go into weights"):
        sd.fold_(net, inputs=x)
    before = net(x)
    for again in (lambda: sd.make_stochastic_(net, sd.uniform(0.5), layers=layers), lambda: sd.subnetwork(net, [0])):
        with pytest.raises(ValueError, match="fold_ has put a factor into the code of this EndsInGelu"):
            again()
    assert torch.equal(net(x), before)


class State(NamedTuple):
    x: Tensor
    mask: Tensor


class StateBlock(nn.Module):
    """Takes and returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, state: State) -> State:
        return state._replace(x=state.x + self.f(state.x).tanh() * state.mask)


def test_a_subnetwork_of_blocks_that_take_a_named_tuple() -> None:
    torch.manual_seed(0)
    net, state = nn.Sequential(*(StateBlock() for _ in range(3))).double(), State(*torch.randn(2, 4, 6).double())
    sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    small = sd.subnetwork(net, [1], inputs=[state])
    expected = state.x + net[1].f(state.x).tanh() * state.mask
    torch.testing.assert_close(small(state).x, expected, rtol=1e-12, atol=1e-12)
