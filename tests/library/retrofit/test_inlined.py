"""Branches that end in a child, which receives the branch's last value and the shortcut and adds them (Bert)."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from masked import awake, calls_when_closed, first_tensor
from torch import Tensor, nn

import stochastic_depth as sd

WIDTH = 6


class PostNormSum(nn.Module):
    """Bert's: the last map of the branch, the sum and the norm behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, WIDTH)
        self.dropout = nn.Dropout(0.0)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = 1.0

    def forward(self, hidden: Tensor, shortcut: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(hidden)) * self.scale + shortcut)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.query_key(x).chunk(2, -1)
        weights = (query @ key.transpose(1, 2)).softmax(-1)
        return weights @ x, weights


class AttentionBlock(nn.Module):
    """By position; the attention gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.output = PostNormSum(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.attention(x)[0], x)


class Layer(nn.Module):
    """By name; the attention's branch belongs to a separate block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = AttentionBlock()
        self.intermediate = nn.Linear(WIDTH, 8)
        self.output = PostNormSum(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.output(shortcut=x, hidden=torch.relu(self.intermediate(x)))


class Sum(nn.Module):
    """x-transformers': the branch is outside, and the shortcut has a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return x + shortcut * self.gain


class Handed(nn.Module):
    """A child that passes both on to its own child."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = Sum()

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return torch.tanh(self.sum(x, shortcut))


class LoopOfSums(nn.Module):
    """One module with all branches, each of which ends in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(WIDTH, WIDTH), Handed()]) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for branch, add in self.layers:
            x = add(branch(x), x)
        return x


def bert(family: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, f"{family}Config")(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return getattr(transformers, f"{family}Model")(config, add_pooling_layer=False)

    return make


def features() -> Tensor:
    return torch.randn(4, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


TOKENS = torch.randint(3, 20, (4, 7), generator=torch.Generator().manual_seed(2))
OF_BERT = [f"encoder.layer.{layer}.{end}.output.dropout" for layer in range(2) for end in ("attention", "")]
OF_BERT = [end.replace("..", ".") for end in OF_BERT]
# How it is made, its input, and the modules whose calls end its branches, in the order of the branches.
MODELS = {
    "two layers": (
        lambda: nn.Sequential(Layer(), Layer()),
        features(),
        ["0.attention.output.dropout", "0.output.dropout", "1.attention.output.dropout", "1.output.dropout"],
    ),
    "a loop": (LoopOfSums, features(), ["layers.0.0", "layers.1.0", "layers.2.0"]),
    "Bert": (bert("Bert"), TOKENS, OF_BERT),
    "Roberta": (bert("Roberta"), TOKENS, OF_BERT),
}


def multiplied(model: nn.Module, ends: Sequence[str], gates: Sequence[bool] | Sequence[Tensor]) -> nn.Module:
    """The model's own code, with the outputs of these modules multiplied by gates."""
    reference = copy.deepcopy(model)
    for end, gate in zip(ends, gates, strict=True):
        factor = torch.as_tensor(gate, dtype=torch.float64)
        factor = factor.view(-1, 1, 1) if factor.dim() else factor
        reference.get_submodule(end).register_forward_hook(lambda _, __, output, factor=factor: output * factor)
    return reference


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    output = first_tensor(model(x))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    (output * weights).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, reference: nn.Module, x: Tensor) -> None:
    (output, ours), (expected, theirs) = gradients(model, x), gradients(reference, x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_equals_the_models_own_code_times_the_gates(name: str, granularity: str) -> None:
    make, x, ends = MODELS[name]
    original = awake(make()).train()
    model = copy.deepcopy(original)
    depth = sd.make_stochastic_(model, sd.uniform(0.5), granularity=granularity)
    assert len(depth.names) == len(ends)
    if granularity == "sample":
        gates = [torch.tensor([(row + index) % 3 > 0 for row in range(4)]) for index in range(len(ends))]
    else:
        gates = [index % 2 == 1 for index in range(len(ends))]
    with depth.gates(gates):
        assert_same(model, multiplied(original, ends, gates), x)
    assert depth.masked == []
    assert calls_when_closed(model, depth, [x]) == []
    # The gates matter: the comparison could fail.
    plain, other = first_tensor(original(x)), first_tensor(multiplied(original, ends, gates)(x))
    assert not torch.allclose(plain, other, rtol=1e-3)


def test_nothing_of_a_closed_branch_is_called() -> None:
    model = nn.Sequential(Layer()).train()
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    called: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, Attention, nn.Dropout)):
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    with depth.gates([False, True]):
        model(features().float())
        called.clear()
        model(features().float())
    assert called == [
        "0.attention.output.norm",
        "0.intermediate",
        "0.output.dense",
        "0.output.dropout",
        "0.output.norm",
    ]


def test_the_branch_belongs_to_the_block_that_calls_the_child_in_the_order_of_the_calls() -> None:
    depth = sd.make_stochastic_(nn.Sequential(Layer(), Layer()), [0.9, 0.8, 0.7, 0.6])
    assert depth.names == ["0.attention#1", "0#1", "1.attention#1", "1#1"]
    assert [type(branch.module).__name__ for branch in depth.branches] == ["AttentionBlock", "Layer"] * 2
    parts = [{type(part).__name__ for part in branch.parts.modules()} for branch in depth.branches[:2]]
    assert "Attention" in parts[0]
    assert "Attention" not in parts[1]
    assert not any("LayerNorm" in each for each in parts)


def test_verify_passes_and_restore_gives_the_model_back() -> None:
    original = awake(nn.Sequential(Layer(), Layer())).train()
    model = copy.deepcopy(original)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    report = depth.verify(features())
    assert [(name, status) for name, status, _ in report.statuses] == [(name, "proven") for name in depth.names]
    assert report.forward_flops_closed == 0
    sd.restore_(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    torch.testing.assert_close(model(features()), original(features()), rtol=0, atol=0)


class HoldsItsSum(nn.Module):
    """Receives two values, of which one is the shortcut of its own branch."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.memory = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.memory(memory)
        return x + self.mixer(x)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.layer = nn.Linear(WIDTH, WIDTH), HoldsItsSum()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, torch.relu(self.encoder(x)))


def test_a_child_that_holds_the_branch_keeps_it() -> None:
    depth = sd.make_stochastic_(nn.Sequential(Decoder()), sd.uniform(0.5))
    assert all(name.startswith("0.layer") for name in depth.names)


def test_a_child_with_a_hook_is_called_whole() -> None:
    model = nn.Sequential(Layer())
    model.get_submodule("0.output").register_forward_hook(lambda *_: None)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    assert depth.names == ["0.attention#1"]
    assert "0.output: a branch ends in it, which has hooks" in str(depth)


def test_a_hook_that_would_be_passed_over_is_refused() -> None:
    model = nn.Sequential(Layer())
    sd.make_stochastic_(model, sd.uniform(0.5))
    model(features().float())
    handle = model.get_submodule("0.output").register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"The block 0 \(Layer\) runs the code of its output .* ignore hooks"):
        model(features().float())
    handle.remove()
    model(features().float())
    model.get_submodule("0.output").forward = lambda _, shortcut: shortcut
    with pytest.raises(RuntimeError, match="ignore a forward of its own"):
        model(features().float())


def test_what_the_child_reads_and_holds_is_followed() -> None:
    original = awake(nn.Sequential(Layer(), Layer())).train()
    model = copy.deepcopy(original)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    for network in (model, original):
        network(features())
        network.get_submodule("0.output").scale = 3.0
        block = network.get_submodule("1.attention.output")
        torch.manual_seed(5)
        block.dense = nn.Sequential(block.dense, nn.Linear(WIDTH, WIDTH).double())
    with depth.gates([True] * 4):
        assert_same(model, original, features())
    assert any(part is model.get_submodule("1.attention.output.dense") for part in depth.branches[2].parts.modules())


ENDS = MODELS["two layers"][2]


def test_folded_into_the_weights_it_gives_the_same_outputs() -> None:
    original = awake(nn.Sequential(Layer(), Layer()))
    model = copy.deepcopy(original)
    sd.make_stochastic_(model, [0.9, 0.8, 0.7, 0.6])
    factors = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    expected = multiplied(original, ENDS, list(factors)).eval()(features())
    torch.testing.assert_close(model.eval()(features()), expected, rtol=0, atol=1e-12)
    sd.fold_(model, inputs=[features()])
    torch.testing.assert_close(model(features()), expected, rtol=0, atol=1e-12)
    weights = [model.get_submodule(end.replace("dropout", "dense")).weight for end in ENDS]
    for end, factor, weight in zip(ENDS, factors, weights, strict=True):
        before = original.get_submodule(end.replace("dropout", "dense")).weight
        torch.testing.assert_close(weight, before * factor, rtol=1e-12, atol=0)


def test_a_subnetwork_goes_without_the_branch() -> None:
    original = awake(nn.Sequential(Layer(), Layer()))
    model = copy.deepcopy(original)
    sd.make_stochastic_(model, [0.9, 0.8, 0.7, 0.6], rescale="none")
    smaller = sd.subnetwork(model, [0, 3], inputs=[features()])
    expected = multiplied(original, ENDS, [True, False, False, True]).eval()(features())
    torch.testing.assert_close(smaller.eval()(features()), expected, rtol=0, atol=1e-12)
    kept = {name.rpartition(".")[0] for name, _ in smaller.named_parameters()}
    assert "0.attention.output.dense" in kept
    assert not any(name.startswith(("0.intermediate", "1.attention.output.dense")) for name in kept)


class DecidesByValues(nn.Module):
    """Code that is understood only as it runs: an attention block that looks at its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.handed = Attention(), Handed()

    def forward(self, x: Tensor) -> Tensor:
        assert len(x.shape) == 3
        return self.handed(self.attention(x)[0], x)


def test_found_as_an_example_goes_through_the_code() -> None:
    original = awake(nn.Sequential(DecidesByValues(), Layer())).train()
    model = copy.deepcopy(original)
    depth = sd.make_stochastic_(model, sd.uniform(0.5), inputs=[features()])
    assert depth.names == ["0#1", "1.attention#1", "1#1"]
    gates = [False, True, False]
    with depth.gates(gates):
        reference = multiplied(original, ["1.attention.output.dropout", "1.output.dropout"], gates[1:])
        reference.get_submodule("0.attention").register_forward_hook(lambda *args: (args[2][0] * 0.0, args[2][1]))
        assert_same(model, reference, features())


class Basic(nn.Module):
    """Adds its input or, if it is given one, another shortcut (DLA)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).tanh()

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if shortcut is None:
            shortcut = x
        return self.branch(x) + shortcut


class Tree(nn.Module):
    """Gives its first child a shortcut that it projects itself."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.one, self.two, self.root = (
            nn.Linear(WIDTH, WIDTH), Basic(), Basic(), nn.Linear(2 * WIDTH, WIDTH),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x, self.project(x))
        return self.root(torch.cat([self.two(one), one], -1))


def test_a_whole_branch_in_a_child_that_is_given_its_shortcut() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Tree()).double(), torch.randn(4, WIDTH, dtype=torch.float64)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x])
    assert list(depth.names) == ["0#1", "0.two#1"]
    tree = net[0]
    for gates in ([True, True], [False, True], [True, False], [False, False]):
        one = tree.project(x) + gates[0] * tree.one.branch(x)
        expected = tree.root(torch.cat([one + gates[1] * tree.two.branch(one), one], -1))
        with depth.gates(gates):
            torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


class Scan(nn.Module):
    """A state space's: a sum of its own, which is no residual one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.skip = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        u = self.enter(x)
        return self.leave(u.cumsum(0).tanh() + u * self.skip)


class Pair(nn.Module):
    """Returns its branch, which is not added yet, and the shortcut (Mamba)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), Scan()

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = (hidden + residual) if residual is not None else hidden
        return self.mixer(self.norm(residual)), residual


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Pair() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden, residual = self.stem(x), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.head(self.norm(hidden + residual))


@pytest.mark.parametrize("by_example", [False, True])
def test_children_that_return_a_branch_and_its_shortcut(by_example: bool) -> None:
    torch.manual_seed(0)
    net, x = Pairs().double(), torch.randn(4, WIDTH, dtype=torch.float64)
    reference = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    assert list(depth.names) == ["1", "2", "3", "4"]
    for gates in ([True] * 4, [False] * 4, [True, False, True, False], [False, True, True, True]):
        stream = reference.stem(x)
        for layer, gate in zip(reference.layers, gates, strict=True):
            stream = stream + gate * layer.mixer(layer.norm(stream))
        expected = reference.head(reference.norm(stream))
        net.zero_grad()
        reference.zero_grad()
        with depth.gates(gates):
            output = net(x)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        output.square().sum().backward()
        expected.square().sum().backward()
        for (name, own), other in zip(net.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


class Heads(nn.Module):
    """Two values, neither of which is the other's shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep, self.deeper = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.wide(x), self.deeper(self.deep(x).tanh())


class AddsHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = Heads()

    def forward(self, x: Tensor) -> Tensor:
        wide, deep = self.heads(x)
        return wide + deep


@pytest.mark.parametrize("by_example", [False, True])
def test_a_child_that_returns_two_heads_holds_no_branch(by_example: bool) -> None:
    with pytest.raises(ValueError, match="No residual branch was found"):
        sd.make_stochastic_(AddsHeads(), sd.uniform(0.5), inputs=[torch.randn(4, WIDTH)] if by_example else None)
