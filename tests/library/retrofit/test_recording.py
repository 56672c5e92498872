"""Side effects of a block are neither lost nor executed while its forward is recorded."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from plain_blocks import D, DropPath, assert_same, data, linear
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")


class Block(nn.Module):
    """A residual block with a drop path, which does something else as well."""

    n: int
    aux: Tensor
    steps: Tensor
    mean: Tensor

    def __init__(self, beside: Callable[["Block", Tensor], object]) -> None:
        super().__init__()
        self.f, self.drop_path = nn.Linear(4, 4), timm.layers.DropPath(0.5)
        self.beside = beside
        self.n, self.aux, self.seen = 0, torch.zeros(()), []
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        self.beside(self, h)
        return x + self.drop_path(h)


def store(block: Block, h: Tensor) -> None:
    block.aux = h.square().mean()


def count(block: Block, _h: Tensor) -> None:
    block.n += 1


def append(block: Block, h: Tensor) -> None:
    block.seen.append(h.mean())


def replace_buffer(block: Block, _h: Tensor) -> None:
    block.steps = block.steps + 1


@pytest.mark.parametrize(
    ("beside", "cause"), [(store, "aux"), (count, "n"), (append, "seen"), (replace_buffer, "steps")]
)
def test_a_block_that_stores_something_on_itself_runs_as_it_is(
    beside: Callable[[Block, Tensor], object], cause: str
) -> None:
    model = nn.Sequential(Block(beside))
    depth = sd.make_stochastic_(model)
    assert f"the forward stores {cause} on the block" in str(depth)
    block, x = model[0], torch.randn(3, 4)
    for _ in range(2):
        model(x)
    h = block.f(x)
    expected = {store: (h.square().mean(), 0, 0, 0), count: (0, 2, 0, 0), append: (0, 0, 2, 0)}
    aux, n, seen, steps = expected.get(beside, (0, 0, 0, 2))
    torch.testing.assert_close(block.aux, torch.as_tensor(aux, dtype=h.dtype))
    assert (block.n, len(block.seen), int(block.steps)) == (n, seen, steps)
    with depth.gates([False]):
        assert torch.equal(model(x), x)


class Windowed(Block):
    """Stores what follows from the size of its input, as transformers' Swin does."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] <= 4:
            self.n = 0
            self.width = min(x.shape[0], 7)
        return super().forward(x)


def test_numbers_that_follow_from_sizes_are_no_state() -> None:
    model = nn.Sequential(Windowed(lambda _block, _h: None))
    depth = sd.make_stochastic_(model)
    assert depth.masked == []
    for size in (3, 6):
        x = torch.randn(size, 4)
        with depth.gates([True]):
            torch.testing.assert_close(model(x), x + 2 * model[0].f(x))
        with depth.gates([False]):
            assert torch.equal(model(x), x)


@pytest.mark.parametrize("stores_in_training", [True, False])
def test_what_a_block_stores_in_one_mode_is_known_in_the_other(*, stores_in_training: bool) -> None:
    def watch(block: Block, h: Tensor) -> None:
        if block.training == stores_in_training:
            block.aux = h.mean()

    model = nn.Sequential(Block(watch)).train(not stores_in_training)
    depth = sd.make_stochastic_(model, rescale="eval")
    assert "the forward stores aux on the block" in str(depth)
    block, x = model.train(stores_in_training)[0], torch.randn(3, 4)
    model(x)
    torch.testing.assert_close(block.aux, block.f(x).mean())


def step(block: Block, _h: Tensor) -> None:
    block.steps.add_(1)


def average(block: Block, h: Tensor) -> None:
    block.mean.data[:2].mul_(0.5).add_(h.detach().mean(0)[:2])


@pytest.mark.parametrize(("beside", "name"), [(step, "steps"), (average, "mean")])
def test_buffers_that_a_block_changes_in_place_change_in_its_forwards_only(
    beside: Callable[[Block, Tensor], object], name: str
) -> None:
    model = nn.Sequential(Block(beside))
    plain = Block(beside)
    plain.load_state_dict(model[0].state_dict())
    depth = sd.make_stochastic_(model)
    assert torch.equal(getattr(model[0], name), getattr(plain, name))
    assert f"the forward changes its buffer {name} in place" in str(depth)
    x = torch.randn(3, 4)
    for _ in range(3):
        model(x), plain(x)
    assert torch.equal(getattr(model[0], name), getattr(plain, name))
    sd.restore_(model)


def hold_sparse(block: Block, _h: Tensor) -> None:
    assert block.sparse.is_sparse


def test_buffers_without_storage() -> None:
    """A sparse one, and those that torch.func stacks."""
    model = nn.Sequential(Block(hold_sparse))
    model[0].register_buffer("sparse", torch.eye(4).to_sparse())
    depth = sd.make_stochastic_(model)
    assert depth.masked == []
    model = nn.Sequential(Block(lambda _block, _h: None))
    sd.make_stochastic_(model, sd.uniform(0.5), rescale="eval")
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stacked = {name: torch.stack([value.detach(), 2 * value.detach()]) for name, value in values.items()}
    x = torch.randn(3, 4)
    both = torch.vmap(lambda values: torch.func.functional_call(model.eval(), values, (x,)))(stacked)
    torch.testing.assert_close(both[1], x + model[0].f(x))


def test_a_closed_layer_that_changes_a_buffer_leaves_it_alone() -> None:
    """What it returns only a run of a copy can tell."""
    model = nn.Sequential(Block(step))
    depth = sd.make_stochastic_(model, layers=["0"])
    with depth.gates([False]):
        model(torch.randn(3, 4))
    assert int(model[0].steps) == 0


def augmented(block: "Sum", x: Tensor) -> Tensor:
    y = block.g(x)
    z = y
    z += block.f(y)
    return y


def module_in_place(block: "Sum", x: Tensor) -> Tensor:
    y = block.g(x)
    h = block.relu(y)
    return y + block.f(h)


def function_in_place(block: "Sum", x: Tensor) -> Tensor:
    y = block.g(x)
    nn.functional.relu(y, inplace=True)
    return y + block.f(y)


def underscore_in_place(block: "Sum", x: Tensor) -> Tensor:
    y = block.g(x)
    torch.relu_(y)
    y /= 2
    return y + block.f(y)


def sizes_are_no_tensors(block: "Sum", x: Tensor) -> Tensor:
    length = x.shape[1]
    twice = length
    twice += length
    return (x + block.f(block.g(x))) * length + twice


class Sum(nn.Module):
    def __init__(self, body: Callable[["Sum", Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.g, self.relu, self.body = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


@pytest.mark.parametrize(
    "body", [augmented, module_in_place, function_in_place, underscore_in_place, sizes_are_no_tensors]
)
def test_a_branch_beside_code_in_place(body: Callable[["Sum", Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Sum(body)).double()
    plain, x = copy.deepcopy(model), torch.randn(3, 4, dtype=torch.float64)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    with depth.gates([True]):
        assert torch.equal(model(x), plain(x))
    plain[0].f.weight.data.zero_(), plain[0].f.bias.data.zero_()
    with depth.gates([False]):
        assert torch.equal(model(x), plain(x))


def changed_later(block: "Sum", x: Tensor) -> Tensor:
    y = block.g(x)
    h = block.f(y)
    y.relu_()
    y = y + h
    return y + block.f(y)


def changed_later_through_a_view(block: "Sum", x: Tensor) -> Tensor:
    y = block.g(x)
    h = block.f(y)
    y.view(-1)[2:].relu_()
    y = y + h
    return y + block.f(y)


@pytest.mark.parametrize("body", [changed_later, changed_later_through_a_view])
def test_an_addition_before_which_the_input_of_its_branch_changes_is_no_branch(
    body: Callable[["Sum", Tensor], Tensor],
) -> None:
    """The branch would run where the sum stands, on what has changed."""
    model = nn.Sequential(Sum(body))
    plain, x = copy.deepcopy(model), torch.randn(3, 4)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    assert depth.names == ["0#2"]
    with depth.gates([True]):
        assert torch.equal(model(x), plain(x))


class Config:
    scale = 1.0

    def __init__(self) -> None:
        self.scale = 2.0


class Reading(nn.Module):
    """A block whose forward reads values of a child and of a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop, self.config = nn.Linear(4, 4), nn.Dropout(0.0), Config()

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.dropout(self.f(x), self.drop.p, self.training)
        return x + h * self.config.scale


def test_values_of_children_and_of_a_configuration_may_change() -> None:
    model = nn.Sequential(Reading())
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    block, x = model[0], torch.randn(3, 4)
    with depth.gates([True]):
        torch.testing.assert_close(model(x), x + 2 * block.f(x))
        block.config.scale = 3.0
        torch.testing.assert_close(model(x), x + 3 * block.f(x))
        block.drop.p = 1.0
        assert torch.equal(model(x), x)


def test_a_number_that_changes_in_each_step_keeps_few_recordings() -> None:
    model = nn.Sequential(Reading())
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    block, x = model[0], torch.randn(3, 4)
    with depth.gates([True]):
        for step in range(100):
            block.config.scale = float(step)
            torch.testing.assert_close(model(x), x + step * block.f(x))
    forms = block._stochastic_depth_branch.forms
    assert len(forms.prepared) == 100
    assert forms.num_runs < 100 * 3, "proven once, whatever the number is"


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class _Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Swish.apply(x)


@pytest.mark.parametrize("in_child", [False, True])
def test_an_autograd_function_is_masked_with_its_name_and_skipped_in_a_child(*, in_child: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.act, self.drop_path = linear(), _Activation(), DropPath(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            return x + self.drop_path(self.act(y) if in_child else _Swish.apply(y))

    net, x = nn.Sequential(Block()).double(), data(4)
    depth = sd.make_stochastic_(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with depth.gates([True]):
            y = net(x)
    y.sum().backward()
    expected = x + 2 * nn.functional.silu(net[0].f(x))
    assert_same(y, expected)
    assert_same(net[0].f.weight.grad, torch.autograd.grad(expected.sum(), net[0].f.weight)[0])
    named = [each for each in caught if "calls _Swish, an autograd.Function" in str(each.message)]
    assert len(named) == len(caught) == (0 if in_child else 1)
    assert depth.verify(x).num_masked == (0 if in_child else 1)


class Packing(nn.Module):
    """An RNN over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.GRU(D, D, batch_first=True), linear()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.f(packed)[0], batch_first=True)
        return x + self.g(h)


@pytest.mark.parametrize("by_example", [False, True])
def test_packed_sequences_are_refused_in_their_own_words(*, by_example: bool) -> None:
    x, lengths = torch.randn(3, 4, D), torch.tensor([4, 1, 2])
    with pytest.raises(ValueError, match="it packs sequences of different lengths, which only a child, such as"):
        sd.make_stochastic_(Packing(), sd.uniform(0.5), inputs=[x, lengths] if by_example else None)


class WithoutAutocast(nn.Module):
    """Computes a part without autocast, on the device of its input."""

    def __init__(self, device: str | None) -> None:
        super().__init__()
        self.f, self.device = linear(), device

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(device_type=self.device or x.device.type, enabled=False):
            h = torch.tanh(x)
        return x + self.f(h)


@pytest.mark.parametrize("device", ["cpu", None])
@pytest.mark.parametrize("by_example", [False, True])
def test_a_part_may_run_without_autocast(device: str | None, *, by_example: bool) -> None:
    net, x = nn.Sequential(WithoutAutocast(device)).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none", inputs=[x] if by_example else None)
    with depth.gates([True]):
        assert_same(net(x), x + net[0].f(torch.tanh(x)))
    with depth.gates([False]):
        assert_same(net(x), x)
    single = net.float()
    with torch.autocast("cpu", torch.bfloat16), depth.gates([True]):
        actual = single(x.float())
        assert torch.equal(actual, x.float() + single[0].f(torch.tanh(x.float())))
