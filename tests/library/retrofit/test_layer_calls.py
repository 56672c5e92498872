"""What whole layers are given and return besides their hidden states, against masks in the plain model."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from plain_blocks import DropPath
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.retrofit.recording.maps import NotComputed, NotComputedError


class Net(nn.Module):
    """Three layers and a head, in float64."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.double()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(context, x)
        return self.head(x)


class ContextFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        return x + torch.tanh(self.f(x * context))


def masked(net: Net, x: Tensor, context: Tensor, weights: Sequence[float]) -> Tensor:
    """By hand: x + weight * (layer(x) - x)."""
    for layer, weight in zip(net.layers, weights, strict=True):
        x = x + weight * (layer(context, x) - x)
    return net.head(x)


INPUTS = tuple(torch.rand(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def test_hidden_states_that_are_not_the_first_argument() -> None:
    net = Net(ContextFirst)
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["layers.*"], rescale="eval")
    with depth.gates([True, False, True]):
        torch.testing.assert_close(net(*INPUTS), masked(plain, *INPUTS, weights=[1, 0, 1]))
    net.eval()
    with pytest.warns(UserWarning, match="cannot go into weights"):
        small = sd.subnetwork(net, keep=[0, 2], inputs=INPUTS)
    torch.testing.assert_close(small(*INPUTS), masked(plain, *INPUTS, weights=[0.5, 0, 0.5]))
    with pytest.warns(UserWarning, match="cannot go into weights"):
        sd.fold_(net, inputs=INPUTS)
    torch.testing.assert_close(net(*INPUTS), masked(plain, *INPUTS, weights=[0.5, 0.5, 0.5]))


class Residuals(nn.Module):
    """Hidden states and the stream that they are added to, as Mamba's layers pass them on."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        return self.f(residual), residual


class Pairs(Net):
    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.head(x + residual)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_value_that_a_closed_layer_did_not_compute_raises_where_it_is_used(granularity: Any) -> None:
    net = Pairs(Residuals)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["layers.*"], granularity=granularity)
    some = torch.tensor([True, False, True, True, False])
    with (
        depth.gates([True, False, True] if granularity == "batch" else [True, some, True]),
        pytest.raises(NotComputedError, match=r"dropped the layer layers\.1 in this step"),
    ):
        net(INPUTS[0])
    with depth.gates([True, True, True]):
        net(INPUTS[0])


def test_every_use_of_a_value_that_was_not_computed_raises() -> None:
    value: Any = NotComputed("because")
    for use in (
        lambda: value + 1, lambda: 1 + value, lambda: value * torch.ones(2), lambda: torch.ones(2) - value,
        lambda: value[0], lambda: value.shape, lambda: bool(value), lambda: float(value), lambda: list(value),
        lambda: value @ torch.ones(2), lambda: torch.stack([torch.ones(2), value]), lambda: value > 0, lambda: -value,
    ):  # fmt: skip
        with pytest.raises(NotComputedError, match="because"):
            use()
    assert not hasattr(value, "shape")
    assert isinstance(copy.deepcopy(value), NotComputed)


def test_what_a_layer_is_given_and_returns_is_passed_on() -> None:
    """T5's first layer makes the position bias of all others, and each returns what it was given."""
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, dropout_rate=0.0, use_cache=False,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = transformers.T5ForConditionalGeneration(config).double().encoder.train()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    plain, ids = copy.deepcopy(encoder), torch.arange(1, 19).view(2, 9)
    plain.block[1].register_forward_hook(lambda _layer, args, output: (args[0], *output[1:]))
    depth = sd.make_stochastic_(encoder, [1.0, 0.5, 0.5], layers=["block.*"])
    with depth.gates([True, False, True]):
        ours = encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(ours, plain(input_ids=ids).last_hidden_state)
    with depth.gates([False, True, True]), pytest.raises(NotComputedError, match=r"the layer block\.0"):
        encoder(input_ids=ids)


class Named(NamedTuple):
    hidden: Tensor
    extra: Tensor | None


class ReturnsNamed(ContextFirst):
    def forward(self, context: Tensor, x: Tensor) -> Any:
        return Named(super().forward(context, x), context.sum())


class ReturnsDict(ContextFirst):
    def forward(self, context: Tensor, x: Tensor) -> Any:
        return {"hidden": super().forward(context, x)}


class ReturnsLossFirst(ContextFirst):
    def forward(self, context: Tensor, x: Tensor) -> Any:
        return context.sum(), super().forward(context, x)


class More(ContextFirst):
    """Returns more in training, by code that cannot be recorded."""

    def forward(self, context: Tensor, x: Tensor) -> Any:
        x = super().forward(context, x)
        if float(x.detach().sum()) > 1e9:
            return x
        return (x, context.sum()) if self.training else x


class Takes(Net):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for layer in self.layers:
            output = layer(context, x)
            x = output.hidden if isinstance(output, Named) else output[0] if self.training else output
        return self.head(x)


@pytest.mark.parametrize("layer", [ReturnsNamed, More])
def test_a_closed_layer_returns_the_structure_of_an_open_one(layer: type[ContextFirst]) -> None:
    net = Takes(layer)
    plain = Net(ContextFirst)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["layers.*"])
    with depth.gates([True, False, True]):
        torch.testing.assert_close(net(*INPUTS), masked(plain, *INPUTS, weights=[1, 0, 1]))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (ReturnsDict, "A layer of layers= returns a dict. It needs to return its hidden states"),
        (ReturnsLossFirst, r"turns hidden states \(5, 8\) into \(\)|does not begin with one entry per sample"),
    ],
)
def test_a_layer_whose_hidden_states_are_not_the_first_value(layer: Any, message: str, granularity: Any) -> None:
    net = Net(layer)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["layers.*"], granularity=granularity)
    gate = True if granularity == "batch" else torch.tensor([True, False, True, True, False])
    with depth.gates([gate] * 3), pytest.raises((TypeError, RuntimeError), match=message):
        net(*INPUTS)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_pytorchs_encoder_with_padded_texts(granularity: Any) -> None:
    """Its attention asserts the mask's shape; in evaluation, it runs on nested tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3).double()
    plain = copy.deepcopy(encoder)
    depth = sd.make_stochastic_(encoder, sd.uniform(0.5), layers=["layers.*"], rescale="none", granularity=granularity)
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    padding = torch.arange(4) >= torch.tensor([4, 3, 2, 4, 1])[:, None]
    rows = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])
    expected = x
    for each, open_rows in zip(plain.layers, rows if granularity == "sample" else rows[:, :1], strict=True):
        run = each(expected, src_key_padding_mask=padding)
        expected = torch.where(open_rows.view(-1, 1, 1), run, expected)
    with depth.gates(rows if granularity == "sample" else rows[:, 0].tolist()):
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), expected)
    with torch.no_grad():
        ours, own = (m.eval()(x, src_key_padding_mask=padding) for m in (encoder, plain))
    torch.testing.assert_close(ours[~padding[:, : ours.shape[1]]], own[~padding[:, : own.shape[1]]])


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = nn.Linear(4, 4), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x))


@pytest.mark.parametrize("schedule", [None, sd.uniform(0.5)])
def test_a_changed_drop_path_inside_a_layer_is_refused(schedule: sd.Schedule | None) -> None:
    net = nn.Sequential(Dropped(), Dropped())
    depth = sd.make_stochastic_(net, schedule, layers=["0", "1"])
    x = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="is a part of the layer 1, whose gate has a rate of its own"):
        net[1].drop_path.drop_prob = 0.25
    net[1].drop_path.drop_prob = 0.25  # which changes nothing now
    net[0].drop_path.eval()
    with pytest.raises(RuntimeError, match="A drop path inside the layer 0 is in evaluation mode"):
        net(x)
    depth.set_survival_probs([1.0, 0.5])
    net(x)
    net[0].train()
    depth.set_survival_probs([0.5, 0.5])
    net(x)
    net.eval()
    assert torch.equal(net(x), copy.deepcopy(net)(x))
