"""What a retrofitted model keeps, residual additions, errors, and what is found but is not a branch."""

import copy
import io
import warnings

import pytest
import timm
import torch
import torchvision
from masked import assert_equals_original_under_mask, awake, calls_when_closed
from torch import nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd


def vit(rate: float = 0.5, **options: object) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "depth": 3, "num_classes": 3, **options}
    return timm.create_model("vit_tiny_patch16_224", drop_path_rate=rate, **small)


def images(num: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)


TORCHVISION = {
    "convnext_tiny": 32,
    "efficientnet_b0": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_equals_the_original_under_the_same_mask(name: str) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        model = torchvision.models.get_model(name, num_classes=3)
        for module in model.modules():
            if isinstance(module, torchvision.ops.StochasticDepth):
                module.p = 0.5 if module.p > 0 else 0.0
        return model

    depth = assert_equals_original_under_mask(make, [images(4, torch.float64)])
    assert depth.masked == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_residual_additions_of_resnets_with_code_in_place(name: str, granularity: str) -> None:
    model = awake(torchvision.models.get_model(name, num_classes=3)).train()
    names = [n for n, m in model.named_modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    depth = sd.make_stochastic_(model, sd.linear_decay(0.5), granularity=granularity)
    assert depth.names == [f"{name}#1" for name in names]
    inputs = [images(4, torch.float64)]
    assert calls_when_closed(model, depth, inputs) == []
    with depth.gates([False] * len(names)):
        model(*inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for _ in range(3):
        model(*inputs).sum().backward()


def test_all_open_and_evaluation_of_a_resnet_are_the_plain_network() -> None:
    plain = awake(torchvision.models.resnet18(num_classes=3)).train()
    model = copy.deepcopy(plain)
    depth = sd.make_stochastic_(model, sd.uniform(1.0))
    x = images(4, torch.float64)
    with depth.gates([True] * 8):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model.eval()(x), plain.eval()(x))


class UserBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.f(x) * self.scale
        if mask is not None:
            y = y * mask
        return x + y


def test_a_users_block_with_an_argument_that_may_hold_one_entry_per_sample() -> None:
    """Its first dimension is as long as the batch in both cases: one entry per sample, or per position."""
    for mask in (torch.rand(4, 1, 1), torch.rand(4, 8)):
        model = UserBlock()
        depth = sd.make_stochastic_(model, [0.5], granularity="sample")
        assert depth.names == ["1"]
        x = torch.randn(4, 4, 8)
        gate = torch.tensor([True, False, True, False])
        plain = UserBlock()
        plain.load_state_dict(model.state_dict())
        expected = torch.where(gate.view(-1, 1, 1), plain(x, mask), x)
        if mask.dim() == 3:
            with depth.gates([gate]):
                torch.testing.assert_close(model(x, mask), expected)
        else:
            with depth.gates([gate]):
                torch.testing.assert_close(model(x, mask=mask), expected)


def test_model_keeps_names_hooks_copies_and_pickles() -> None:
    original = awake(vit())
    model = copy.deepcopy(original)
    keys = list(model.state_dict())
    depth = sd.make_stochastic_(model)
    assert depth.names == [f"blocks.{b}.drop_path{i}" for b in (1, 2) for i in (1, 2)]
    assert depth.survival_probs == pytest.approx([0.75, 0.75, 0.5, 0.5])
    assert list(model.state_dict()) == keys
    assert isinstance(model.blocks[1], type(original.blocks[1]))
    calls: list[str] = []
    model.blocks[1].register_forward_hook(lambda *_: calls.append("block"))
    model.blocks[1].attn.register_forward_hook(lambda *_: calls.append("attn"))
    x = images(4, torch.float64)
    with depth.gates([True] * 4):
        model(x)
    assert calls == ["attn", "block"]
    assert torch.equal(model.eval()(x), original.eval()(x))
    assert torch.equal(model.forward_features(x), original.forward_features(x))
    ours, theirs = model.forward_intermediates(x, indices=2)[1], original.forward_intermediates(x, indices=2)[1]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    model.blocks[1]._forward_hooks.clear()
    model.blocks[1].attn._forward_hooks.clear()
    model.train()(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        same = sd.controller(other)
        assert same is not depth
        same.load_state_dict(depth.state_dict())
        a, b = copy.deepcopy(model)(x), other.train()(x)
        assert torch.equal(a, b)
    sd.restore_(model)
    assert type(model.blocks[1]) is type(original.blocks[1])
    assert torch.equal(model.eval()(x), original.eval()(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    plain, model = awake(vit()), awake(vit())
    sd.make_stochastic_(plain)
    sd.make_stochastic_(model)
    x = images(4, torch.float64).requires_grad_()
    plain.train()(x).square().sum().backward()
    model.train()
    hidden = model.pos_drop(model._pos_embed(model.patch_embed(x)))
    del hidden
    blocks = model.blocks

    def run(hidden: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            hidden = checkpoint(block, hidden, use_reentrant=use_reentrant)
        return hidden

    model.blocks = Runner(run, blocks)
    model(x).square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name.replace("blocks.blocks", "blocks")].grad)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(x)


def test_parts_that_are_checkpointed_have_their_own_gates_where_code_is_proven_in_between() -> None:
    torch.manual_seed(0)
    net = nn.ModuleList(Plain() for _ in range(2)).double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample", rescale="none")
    for step in range(8):  # Code is proven in the first step and for new sizes, and recorded again in others.
        x = torch.randn(6 + step // 5, 4, dtype=torch.float64, requires_grad=True)
        gates = torch.rand(2, len(x)) < 0.5
        actual = expected = x
        with depth.gates(gates):
            for block in net:
                actual = checkpoint(block, actual, use_reentrant=True)
        for block, gate in zip(plain, gates, strict=True):
            expected = expected + gate[:, None] * block.f(expected)
        for output, module in ((actual, net), (expected, plain)):
            module.zero_grad()
            output.sin().sum().backward()
        torch.testing.assert_close(actual, expected)
        for mine, its in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad)


class Runner(nn.Module):
    def __init__(self, run: object, blocks: nn.Module) -> None:
        super().__init__()
        self.run, self.blocks = run, blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


def test_timms_own_checkpointing() -> None:
    plain, model = awake(vit()), awake(vit())
    sd.make_stochastic_(plain)
    sd.make_stochastic_(model)
    model.set_grad_checkpointing()
    x = images(4, torch.float64)
    plain.train()(x).square().sum().backward()
    model.train()(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_export_of_the_evaluated_model() -> None:
    model = vit().eval()
    x = images(2)
    expected = model(x)
    sd.make_stochastic_(model)
    exported = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), expected)


def test_forced_gates_are_not_exported() -> None:
    model = vit().eval()
    depth = sd.make_stochastic_(model)
    with depth.gates([False] * 4), pytest.raises(RuntimeError, match="An export would freeze the gates"):
        torch.export.export(model, (images(2),), strict=False)


def test_verify_and_cost() -> None:
    model = vit(0.5)
    depth = sd.make_stochastic_(model)
    assert depth.verify(images(2)).num_branches == 4
    cost = depth.cost(images(2))
    assert 0.6 < cost.flops_share < 0.9


def test_drop_paths_that_never_act_are_mentioned() -> None:
    depth = sd.make_stochastic_(timm.create_model("efficientnet_b0", drop_path_rate=0.2))
    assert "never executed" in str(depth)
    assert depth.masked == []


class TwoInOne(nn.Module):
    """A container that is called as a whole, with two drop paths in it."""

    def __init__(self) -> None:
        super().__init__()
        parts = nn.Linear(8, 8), timm.layers.DropPath(0.3), nn.Linear(8, 8), timm.layers.DropPath(0.4)
        self.branch = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


def test_several_drop_paths_in_one_container_have_gates_of_their_own() -> None:
    torch.manual_seed(0)
    depth = assert_equals_original_under_mask(TwoInOne, [torch.randn(4, 8, dtype=torch.float64)])
    assert depth.names == ["branch.1", "branch.3"]
    assert depth.survival_probs == pytest.approx([0.7, 0.6])


def test_where_and_refusals() -> None:
    depth = sd.make_stochastic_(vit(), where="blocks.2.*")
    assert depth.names == ["blocks.2.drop_path1", "blocks.2.drop_path2"]
    with pytest.raises(ValueError, match="matches none of the 4 branches"):
        sd.make_stochastic_(vit(), where="layers.*")
    with pytest.raises(ValueError, match=r"No residual branch was found.*drop_path_rate=0.1"):
        sd.make_stochastic_(vit(0.0))
    with pytest.raises(ValueError, match=r"No residual branch was found.*layers="):
        sd.make_stochastic_(nn.Sequential(nn.Linear(2, 2)), sd.uniform(0.5))
    model = vit()
    model.blocks[1].drop_path1.drop_prob = 1.0
    with pytest.raises(ValueError, match=r"blocks.1.drop_path1 has a drop rate of 1.*survival probability"):
        sd.make_stochastic_(model)
    model = vit()
    sd.make_stochastic_(model)
    with pytest.raises(ValueError, match="already stochastic"):
        sd.make_stochastic_(model)
    with warnings.catch_warnings():  # Importing the compiler warns of PyTorch's own deprecations.
        warnings.simplefilter("ignore")
        compiled = torch.compile(vit())
    with pytest.raises(ValueError, match="compiled"):
        sd.make_stochastic_(compiled)


def test_a_registered_class_of_the_users_own() -> None:
    class Skip(nn.Module):
        rate = 0.25

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.skip = nn.Linear(2, 2), Skip()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.skip(self.f(x))

    sd.register_drop_path(Skip, lambda module: sd.DropPathRule(module.rate, rescale="none"))
    depth = sd.make_stochastic_(nn.Sequential(Block()))
    assert (depth.names, depth.survival_probs) == (["0.skip"], [0.75])
    assert "rescale 'none'" in str(depth)


def test_gradient_bytes_count_the_single_parameters_of_a_block() -> None:
    """ConvNeXt holds the gain of its LayerScale itself."""
    model = timm.create_model("test_convnext", drop_path_rate=0.5)
    depth = sd.make_stochastic_(model)
    branch = depth.cost(torch.randn(1, 3, 64, 64)).branches[-1]
    block = model.get_submodule(branch.name.rpartition(".")[0])
    assert isinstance(block.gamma, nn.Parameter)
    assert branch.gradient_bytes == sum(4 * parameter.numel() for parameter in block.parameters())
