"""Which argument a dropped layer returns: layers whose hidden states are not their first argument."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

WIDTH = 6


class Reader(nn.Module):
    """A decoder layer behind the memory that it reads, normalized after its sums."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, memory: Tensor, tgt: Tensor) -> Tensor:
        tgt = self.norms[0](tgt + self.attention(tgt, memory, memory)[0])
        return self.norms[1](tgt + self.feed(tgt))


class ReaderBefore(Reader):
    """Normalized before; it returns a tuple, and reshapes."""

    def forward(self, memory: Tensor, tgt: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        tgt = tgt + self.attention(self.norms[0](tgt), memory, memory)[0]
        b, n, c = tgt.shape
        tgt = tgt.reshape(b * n, c)
        tgt = tgt + self.feed(self.norms[1](tgt))
        return tgt.view(b, n, c), memory


class WithPositions(Reader):
    """Positions come first, and are added to what the attention sees."""

    def forward(self, pos: Tensor, src: Tensor) -> Tensor:  # type: ignore[override]
        q = self.norms[0](src) + pos
        src = src + self.attention(q, q, src)[0]
        return src + self.feed(self.norms[1](src))


class Stores(Reader):
    """Keeps its attention map."""

    def forward(self, memory: Tensor, tgt: Tensor) -> Tensor:
        read, self.attention_map = self.attention(tgt, memory, memory)
        tgt = self.norms[0](tgt + read)
        return self.norms[1](tgt + self.feed(tgt))


class Output(nn.Module):
    """The end of a branch, as Bert writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, shortcut: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + shortcut)


class EndsInChildren(Reader):
    """Its sums are in children, and the context goes by the name of hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = nn.ModuleList(Output() for _ in range(2))

    def forward(self, hidden_states: Tensor, query: Tensor) -> Tensor:  # type: ignore[override]
        query = self.outputs[0](self.attention(query, hidden_states, hidden_states)[0], query)
        return self.outputs[1](self.feed(query), query)


class Unnamed(Reader):
    def forward(self, *tensors: Tensor) -> Tensor:
        memory, tgt = tensors
        return super().forward(memory, tgt)


class Usual(Reader):
    """As PyTorch's: its hidden states come first."""

    def forward(self, tgt: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(memory, tgt)


class Decoder(nn.Module):
    def __init__(self, layer: Callable[[], Reader]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.is_usual = layer is Usual

    def forward(self, memory: Tensor, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory) if self.is_usual else layer(memory, x)
            x = x[0] if isinstance(x, tuple) else x
        return x


LAYERS = [Reader, ReaderBefore, WithPositions, EndsInChildren, Unnamed, Usual]


def reference(net: Decoder, inputs: tuple[Tensor, Tensor], gates: list[list[bool]]) -> Tensor:
    memory, x = inputs
    for layer, gate in zip(net.layers, gates, strict=True):
        own = layer(x, memory) if isinstance(layer, Usual) else layer(memory, x)
        own = own[0] if isinstance(own, tuple) else own
        x = torch.where(torch.tensor(gate).view(-1, 1, 1), own, x)
    return x


def inputs_of(num: int = 4) -> tuple[Tensor, Tensor]:
    memory, x = torch.randn(2, num, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return memory, x


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("layer", [*LAYERS, Stores])
def test_a_dropped_layer_returns_what_it_adds_its_branches_to(layer: type[Reader], granularity: str) -> None:
    net = Decoder(layer).double()
    inputs = inputs_of()
    if granularity == "batch":
        gates = [[False] * 4, [True] * 4, [False] * 4]
        given = [False, True, False]
    else:
        gates = [[True, False, True, False], [False] * 4, [False, False, True, True]]
        given = [torch.tensor(gate) for gate in gates]
    expected = reference(copy.deepcopy(net), inputs, gates)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["layers.*"], granularity=granularity)  # type: ignore[arg-type]
    with depth.gates(given):
        torch.testing.assert_close(net(*inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_factor_of_a_layer_scales_the_same_sum(layer: type[Reader]) -> None:
    net = Decoder(layer).double().eval()
    memory, x = inputs_of()
    plain = copy.deepcopy(net)
    sd.make_stochastic_(net, sd.uniform(0.5), layers=["layers.*"])
    for each in plain.layers:
        own = each(x, memory) if layer is Usual else each(memory, x)
        x = x + 0.5 * ((own[0] if isinstance(own, tuple) else own) - x)
    torch.testing.assert_close(net(*inputs_of()), x, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="is a whole layer"):
        sd.fold_(net, inputs=inputs_of())
    torch.testing.assert_close(net(*inputs_of()), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "example"),
    [*((layer, True) for layer in LAYERS), *((layer, False) for layer in LAYERS if layer is not Unnamed)],
)
def test_a_removed_layer_returns_them_too(layer: type[Reader], example: bool) -> None:
    net = Decoder(layer).double()
    inputs = inputs_of()
    expected = reference(copy.deepcopy(net), inputs, [[False] * 4, [True] * 4, [False] * 4])
    sd.make_stochastic_(net, sd.uniform(0.5), layers=["layers.*"], rescale="none")
    with nullcontext() if example else pytest.warns(UserWarning, match="no example"):
        small = sd.subnetwork(net, [1], inputs=inputs if example else None)
    torch.testing.assert_close(small(*inputs), expected, rtol=1e-12, atol=1e-12)


class Gated(Reader):
    """A gated update has no shortcut."""

    def forward(self, message: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        gate = self.feed(state + message).sigmoid()
        return gate * state + (1 - gate) * message


def test_what_the_code_does_not_show_is_said() -> None:
    net = Decoder(Gated).double()
    memory, x = inputs_of()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["layers.*"])
    with depth.gates([False] * 3), pytest.warns(UserWarning, match="Gated is called with several tensors"):
        output = net(memory, x)
    assert torch.equal(output, memory)


class Conditioned(Reader):
    """Its hidden states come behind a whole number and a value for each sample."""

    def forward(self, step: Tensor, condition: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        return z + self.feed(z + condition) * step


def test_other_shapes_and_whole_numbers_are_no_hidden_states() -> None:
    torch.manual_seed(0)
    layer = Conditioned().double()
    net = nn.ModuleDict({"layer": layer})
    _, x = inputs_of()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["layer"])
    with depth.gates([False]):
        assert torch.equal(layer(torch.tensor(3), x[:, :1].clone(), x), x)
