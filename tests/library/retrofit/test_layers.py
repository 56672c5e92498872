"""Whole layers as branches: transformers' encoders and decoders, with their keyword arguments and tuples."""

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import pytest
import timm
import torch
import transformers
from masked import Mask, assert_equals_original_under_mask, gradients, masked
from torch import Tensor, nn

import stochastic_depth as sd

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
MODELS = {
    "Bert": ({**SMALL, "vocab_size": 40}, "encoder.layer.*"),
    "Llama": ({**SMALL, "vocab_size": 40, "num_key_value_heads": 2, "use_cache": False}, "layers.?"),
    "ViT": ({**SMALL, "image_size": 16, "patch_size": 8}, None),
    "Wav2Vec2": (
        {**SMALL, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
         "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
         "feat_proj_dropout": 0.0, "apply_spec_augment": False},
        "encoder.layers.?",
    ),
}  # fmt: skip


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0])
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}Model")(config).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def layers_of(name: str, model: torch.nn.Module) -> str:
    pattern = MODELS[name][1]
    if pattern is None:
        first = next(n for n, m in model.named_modules() if type(m).__name__ == "ViTLayer")
        pattern = first.rpartition(".")[0] + ".?"
    return pattern


def inputs_of(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "ViT":
        return torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    if name == "Wav2Vec2":
        return torch.randn(3, 200, generator=generator, dtype=torch.float64)
    return torch.randint(40, (3, 7), generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_closed_layers_return_their_input_per_sample(name: str) -> None:
    model = model_of(name)
    pattern = layers_of(name, model)
    plain = copy.deepcopy(model)
    depth = sd.make_stochastic_(model, sd.uniform(0.5), layers=[pattern], granularity="sample")
    inputs = inputs_of(name)
    masks = [torch.tensor(mask) for mask in ([True, False, True], [False, False, True], [True, True, False])]

    def masked(index: int):
        def hook(_module, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            own = output[0] if isinstance(output, tuple) else output
            kept = torch.where(masks[index].view(-1, 1, 1), own, hidden)
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        return hook

    for index, layer in enumerate(depth.names):
        plain.get_submodule(layer).register_forward_hook(masked(index), with_kwargs=True)
    expected = plain(inputs).last_hidden_state
    expected.square().sum().backward()
    with depth.gates(masks):
        output = model(inputs).last_hidden_state
    output.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for (n, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None, n
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8, msg=n)


@pytest.mark.parametrize("name", MODELS)
def test_all_open_is_the_plain_model_and_all_closed_calls_no_layer(name: str) -> None:
    model = model_of(name)
    inputs, pattern = inputs_of(name), layers_of(name, model)
    expected = model(inputs).last_hidden_state
    depth = sd.make_stochastic_(model, sd.uniform(0.5), layers=pattern)
    called: list[str] = []
    for layer in depth.names:
        for child in model.get_submodule(layer).children():
            child.register_forward_pre_hook(lambda *_, layer=layer: called.append(layer))
    with depth.gates([True] * 3):
        assert torch.equal(model(inputs).last_hidden_state, expected)
    assert set(called) == set(depth.names)
    called.clear()
    with depth.gates([False] * 3):
        model(inputs).last_hidden_state.sum().backward()
    assert called == []


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = (torch.rand(x.shape[0], 1) >= self.drop_prob).to(x.dtype)
        return x * kept / (1 - self.drop_prob)


class DecidingBlock(nn.Module):
    """Looks at the values of its input, so that its forward cannot be recorded."""

    def __init__(self, rates: Sequence[float] = (0.5, 0.5)) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop_path1, self.drop_path2 = DropPath(rates[0]), DropPath(rates[1])

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        if x.abs().max() > 1e6:
            raise ValueError("out of range")
        x = x + self.drop_path1(self.first(x).tanh())
        return x + self.drop_path2(self.second(x).tanh()), "more"


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DecidingBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, more = block(x)
            assert more == "more"
        return x


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_a_block_that_cannot_be_recorded_is_masked_with_the_same_gates_and_says_so() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Deciding()

    inputs = [torch.randn(4, 6, dtype=torch.float64)]
    depth = assert_equals_original_under_mask(make, inputs)
    assert [name for name, _ in depth.masked] == depth.names
    assert "mask, nothing is saved: the forward's control flow depends on the values of a tensor" in str(depth)


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_a_drop_path_that_masked_blocks_share_has_a_gate_in_each_of_them() -> None:
    torch.manual_seed(0)
    original = Deciding().double().train()
    shared = original.blocks[0].drop_path1
    for block in original.blocks[1:]:
        block.drop_path1 = shared
    model = copy.deepcopy(original)
    depth = sd.make_stochastic_(model)
    assert len(depth.names) == 6
    gates = dict(zip(depth.names, [torch.arange(4) % (index + 2) == 0 for index in range(6)], strict=True))
    for branch, gate in zip(depth.branches, gates.values(), strict=True):
        setattr(original.get_submodule(branch.block_name), branch.key[0], Mask([gate], [0.5]))
    x = torch.randn(4, 6, dtype=torch.float64)
    with depth.gates(list(gates.values())):
        torch.testing.assert_close(model(x), original(x))
    sd.restore_(model)
    assert type(model.blocks[2].drop_path1) is DropPath


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_a_named_layer_runs_as_a_whole_and_its_gate_stands_for_its_drop_paths() -> None:
    torch.manual_seed(0)
    original = Deciding().double()
    model = copy.deepcopy(original)
    x = torch.randn(4, 6, dtype=torch.float64)
    depth = sd.make_stochastic_(model, layers=["blocks.1"])
    # The other blocks keep their drop paths, masked; the named one has a single gate of their rate.
    assert depth.names == [
        "blocks.0.drop_path1", "blocks.0.drop_path2", "blocks.1", "blocks.2.drop_path1", "blocks.2.drop_path2",
    ]  # fmt: skip
    assert depth.survival_probs == [0.5] * 5
    assert "subset, with its 2 drop paths" in str(depth)
    masks = [torch.rand(4, generator=torch.Generator().manual_seed(i)) < 0.5 for i in range(5)]
    of_drop_paths = [masks[0], masks[1], masks[2], masks[2], masks[3], masks[4]]
    names = [f"blocks.{block}.drop_path{path}" for block in range(3) for path in (1, 2)]
    reference = masked(original, names, of_drop_paths, [0.5] * 6)
    expected, expected_gradients = gradients(reference.train(), [x])
    sizes: list[int] = []
    model.blocks[1].first.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    with depth.gates(masks):
        output, ours = gradients(model.train(), [x])
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-12, atol=1e-12, msg=name)
    assert sizes == [int(masks[2].sum())]
    assert 0 < sizes[0] < 4
    with depth.gates([True, True, False, True, True]):
        sizes.clear()
        model(x)
    # What a layer returns beside its hidden states only a run can tell: one, of a copy without hooks.
    assert sizes == []
    assert torch.equal(model.eval()(x), original.eval()(x))
    sd.restore_(model)
    assert type(model.blocks[1].drop_path1) is DropPath


def test_layers_whose_drop_paths_disagree_need_a_schedule() -> None:
    model = nn.Sequential(DecidingBlock((0.5, 0.2)))
    with pytest.raises(ValueError, match="the drop paths of 0 have different rates or rules"):
        sd.make_stochastic_(model, layers=["0"])
    depth = sd.make_stochastic_(model, sd.uniform(0.8), layers=["0"], rescale="train")
    assert depth.survival_probs == [0.8]


def test_a_layer_that_changes_the_shape_cannot_be_a_branch() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    sd.make_stochastic_(model, sd.uniform(0.5), layers=["1"], granularity="sample")
    with pytest.raises(RuntimeError, match=r"The layer 1 turns hidden states \(2, 3\) into \(2, 4\)"):
        model(torch.ones(2, 3))


class Normalized(nn.Module):
    """A layer with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.norm(self.linear(x)).tanh() * scale


class NormalizedNet(nn.Module):
    """Two layers, the second of which is a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(4, 4), Normalized()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.stem(x), scale=torch.full((4,), 2.0, dtype=x.dtype))


def test_one_survivor_where_batch_norm_would_see_one_value() -> None:
    """As in a `Residual`: another sample, of weight 0, gives BatchNorm a second value per channel."""
    torch.manual_seed(0)
    model = NormalizedNet().double()
    plain, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
    depth = sd.make_stochastic_(model, [0.5], layers=["layer"], granularity="sample", rescale="none")
    with depth.gates([torch.tensor([False, False, True, False, False])]):
        output = model(x)
    hidden, scale = plain.stem(x), torch.full((4,), 2.0, dtype=torch.float64)
    expected = hidden.clone()
    expected[2] = plain.layer(hidden[[2, 0]], scale)[0]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(model.layer.norm.running_mean, plain.layer.norm.running_mean)


@pytest.mark.parametrize("name", MODELS)
def test_verify_proves_layers_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    depth = sd.make_stochastic_(model, sd.linear_decay(0.5), layers=[layers_of(name, model)])
    assert depth.verify(inputs_of(name)).num_branches == 3
    called = next(module for module in model.modules() if hasattr(module, "_stochastic_depth_branch"))
    inside = next(part for part in called.modules() if isinstance(part, nn.Linear))
    layer_forward = type(called).forward
    # Put back afterward: the class is that of all such layers.
    monkeypatch.setattr(
        type(called),
        "forward",
        lambda self, x, *args, **kwargs: (inside(x), layer_forward(self, x, *args, **kwargs))[1],
    )
    with pytest.raises(RuntimeError, match="run although their gates are closed"):
        depth.verify(inputs_of(name))


def test_layers_without_drop_paths_always_run() -> None:
    """The first block of timm's models has a rate of 0."""

    class Block(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.linear, self.drop_path = nn.Linear(3, 3), timm.layers.DropPath(rate) if rate else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(self.linear(x))

    depth = sd.make_stochastic_(nn.Sequential(Block(0.0), Block(0.25)), layers=["?"])
    assert (depth.names, depth.survival_probs) == (["1"], [0.75])
    assert "no branch: 0: it has no drop path with a rate above 0" in str(depth)


class Adding(nn.Module):
    """A layer that adds in place."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x += self.f(x)
        return x


@pytest.mark.parametrize(("rescale", "factor"), [("eval", 0.5), ("train", 2.0)])
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_the_factor_of_a_layer_that_adds_in_place(
    rescale: Literal["eval", "train"], factor: float, without_gradients: Callable[[], AbstractContextManager[None]]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Adding()).double().train(rescale == "train")
    depth = sd.make_stochastic_(model, [0.5], layers=["1"], rescale=rescale)
    x = torch.randn(3, 4, dtype=torch.float64)
    hidden = model[0](x)
    expected = hidden + factor * model[1].f(hidden)
    with nullcontext() if rescale == "eval" else depth.gates([True]):
        torch.testing.assert_close(model(x), expected)
        with without_gradients():
            torch.testing.assert_close(model(x), expected)


class Counted(nn.Linear):
    """Counts its runs, those of copies too."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.runs += 1
        return super().forward(x)


class Unrecordable(nn.Module):
    """A layer whose output structure only a run shows."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Counted(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        with torch.autocast("cpu", enabled=False):
            return x + scale * self.f(x), "more"


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = Unrecordable(), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x, more = self.layer(x, scale)
        assert more == "more"
        return self.last(x)


def test_a_closed_layer_runs_at_most_once_for_all_sizes() -> None:
    model = Scaling()
    depth = sd.make_stochastic_(model, [0.5], layers=["layer"])
    Counted.runs = 0
    with depth.gates([False]):
        for length in (5, 6, 7, 8):
            x = torch.randn(2, length, 4)
            torch.testing.assert_close(model(x), model.last(x))
        assert Counted.runs == 1
        for step in range(100):
            model(x, step / 100)
    assert len(model.layer._stochastic_depth_branch._structures) == 64


class MoreOfLong(nn.Module):
    """Returns a second value for long sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, int]:
        y = x + self.f(x)
        return y if x.shape[1] < 6 else (y, 1)


def test_a_closed_layer_whose_sizes_decide_what_it_returns() -> None:
    model = nn.Sequential(MoreOfLong())
    depth = sd.make_stochastic_(model, [0.5], layers=["0"])
    short, long = torch.randn(2, 5, 4), torch.randn(2, 6, 4)
    with depth.gates([False]):
        for _ in range(2):
            assert torch.equal(model(short), short)
            assert torch.equal(model(long)[0], long)
            assert model(long)[1] == 1
    torch.save(model, io.BytesIO())


class WithWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(x), x.mean(-1)


class LayerOfParts(nn.Module):
    """Puts together what it returns as layers of transformers do, or returns what a child returns."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.child, self.way = WithWeights(), way

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        out = self.child(x)
        if self.way == "sum of tuples":
            return (x + out[0],) + out[1:]
        if self.way == "one after the other":
            outputs = (x + out[0],)
            outputs += out[1:]
            return outputs
        if self.way == "unpacked":
            return (x + out[0], *out[1:])
        return out if self.way == "of a child" else x + out[0]


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("way", ["sum of tuples", "one after the other", "unpacked", "of a child", "a tensor"])
def test_a_closed_layer_returns_as_many_values_as_an_open_one(
    way: str, granularity: Literal["batch", "sample"]
) -> None:
    model, x = nn.Sequential(LayerOfParts(way)), torch.randn(3, 5, 4)
    depth = sd.make_stochastic_(model, [0.5], layers=["0"], granularity=granularity)
    gates = [False] if granularity == "batch" else torch.tensor([[False, True, False]])
    expected = model[0].child.f(x) if way == "of a child" else x + model[0].child.f(x)
    for _ in range(2):
        with depth.gates(gates):
            output = model(x)
        assert isinstance(output, Tensor if way == "a tensor" else tuple)
        if way != "a tensor":
            assert len(output) == 2
            output = output[0]
        for index in range(3):
            is_open = granularity == "sample" and index == 1
            torch.testing.assert_close(output[index], expected[index] if is_open else x[index])


def test_bad_layers() -> None:
    for layers in ([], 5, [5]):
        with pytest.raises(
            TypeError, match=r"^layers must be patterns of names, such as \['model\.layers\.\*'\], but is"
        ):
            sd.make_stochastic_(model_of("Bert"), sd.uniform(0.5), layers=layers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matches no module"):
        sd.make_stochastic_(model_of("Bert"), sd.uniform(0.5), layers=["decoder.*"])
    with pytest.raises(ValueError, match="no drop path with a rate above 0"):
        sd.make_stochastic_(model_of("Bert"), layers=["encoder.layer.*"])
    with pytest.raises(ValueError, match=r"0\.drop_path1 has a drop rate of 1: its branch would never survive"):
        sd.make_stochastic_(nn.Sequential(DecidingBlock((1.0, 1.0))), layers=["0"])
    shared = nn.Sequential(DecidingBlock(), DecidingBlock())
    shared[1].drop_path2 = shared[0].drop_path1
    with pytest.raises(ValueError, match=r"0 and 1 share a drop path, 1\.drop_path2, which cannot follow two gates"):
        sd.make_stochastic_(shared, sd.uniform(0.5), layers=["?"])
    assert not any(hasattr(module, "_stochastic_depth_branch") for module in shared.modules())
    with pytest.raises(ValueError, match="is a ModuleList"):
        sd.make_stochastic_(model_of("Bert"), sd.uniform(0.5), layers=["encoder.layer"])
    model = model_of("Wav2Vec2")
    model.config.layerdrop = 0.1
    for layers in (None, ["encoder.layers.?"]):
        with pytest.raises(ValueError, match="itself skips layers too"):
            sd.make_stochastic_(model, sd.uniform(0.5), layers=layers)
    model.config.layerdrop, model.encoder.layer_drop = 0.0, 0.25
    with pytest.raises(ValueError, match=r"Set model\.encoder\.layer_drop = 0\.0, and .* uniform\(0\.75\)\.$"):
        sd.make_stochastic_(model, sd.uniform(0.5))
