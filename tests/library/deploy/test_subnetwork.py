"""`subnetwork`: plain, smaller, and equal to the evaluated network whose dropped branches return zero."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import plain_models
import pytest
import reference
import torch
import torch.nn.functional as F
from plain_models import TIMM, TORCHVISION, DropPath, awake, first_tensor, timm_model, torchvision_resnet, with_factors
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd

P = [0.9, 0.35, 0.6, 0.5]


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"differs by {error:.1e} of the largest value"


def flops(net: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops()


def size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


# ---------------------------------------------------------------------------------------------- our networks


@pytest.mark.parametrize("rescale", ["eval", "train", "none"])
@pytest.mark.parametrize("keep", [[0], [3, 1], [0, 1, 2, 3]], ids=["one", "two", "all"])
def test_equals_the_evaluated_network_without_the_dropped_branches(keep: list[int], rescale: str) -> None:
    net, x = reference.conv_net().eval(), reference.images(4)
    plain = reference.copied(net)
    sd.make_stochastic_(net, P, rescale=rescale)
    before, whole = reference.state_of(net), net(x)
    small = sd.subnetwork(net, keep)
    factors = [p if rescale == "eval" else 1.0 for p in P]
    expected = reference.forward(plain, x, gates=[index in keep for index in range(4)], factors=factors)
    assert_near(small(x), expected)
    # The original is unchanged and shares nothing with the result.
    reference.assert_same(reference.state_of(net), before)
    assert torch.equal(net(x), whole)
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in net.parameters()}


def test_the_result_is_plain_smaller_and_keeps_its_names() -> None:
    net = sd.models.cifar_resnet(20, shortcut="projection")
    sd.make_stochastic_(net, sd.linear_decay(0.5))
    small = sd.subnetwork(net, [0, 1, 3, 4])
    reference.assert_plain(small)
    names = set(net.state_dict())
    # The third group is gone but for its projection shortcut.
    gone = {name for name in names if ".residual.branch." in name and name.split(".")[1:3] not in
            [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]}  # fmt: skip
    assert set(small.state_dict()) == names - gone
    assert [len(list(part.parameters())) for part in small.groups[2][1:]] == [0, 0]
    # Nothing is left of a dropped block, not even the ReLU behind its sum.
    assert [type(part) for part in small.groups[2][1].children()] == [nn.Identity, nn.Identity]
    assert flops(small.eval(), torch.zeros(1, 3, 32, 32)) < flops(net.eval(), torch.zeros(1, 3, 32, 32))


def test_a_relu_goes_only_where_another_one_comes_before() -> None:
    net = nn.Sequential(
        nn.Linear(4, 4), sd.Residual(nn.Linear(4, 4)), nn.ReLU(), sd.Residual(nn.Linear(4, 4)), nn.ReLU()
    )
    net, x = net.double(), torch.randn(5, 4, dtype=torch.float64)
    plain = reference.copied(net)
    sd.make_stochastic_(net, [0.5, 0.5])
    small = sd.subnetwork(net, [1])
    h = torch.relu(plain[0](x))
    assert_near(small(x), torch.relu(h + 0.5 * plain[3].branch(h)))
    both = sd.subnetwork(net, [0])
    h = plain[0](x)
    assert_near(both(x), torch.relu(h + 0.5 * plain[1].branch(h)))
    assert [type(module) for module in both[2:]] == [nn.ReLU, nn.Identity, nn.Identity]


def test_a_subnetwork_can_be_trained() -> None:
    net, x = reference.conv_net(), reference.images(6)
    sd.make_stochastic_(net, P)
    small = sd.subnetwork(net, [0, 2])
    assert small.training
    small(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    depth = sd.make_stochastic_(small, sd.uniform(0.5))
    assert len(depth.names) == 2


# ---------------------------------------------------------------------------------------------- budgets and orders


def test_a_number_of_blocks_keeps_the_first_or_those_that_survive_most() -> None:
    net = reference.mlp()
    sd.make_stochastic_(net, [0.5, 0.9, 0.7, 0.5])

    def kept(**how: object) -> list[int]:
        small = sd.subnetwork(net, **how)
        return [index for index, block in enumerate(small.blocks) if isinstance(block.residual, sd.Residual)]

    assert kept(num_blocks=2) == [0, 1]
    assert kept(num_blocks=2, order="survival") == [1, 2]
    assert kept(num_blocks=3, order="survival") == [0, 1, 2]  # of equal ones the last goes first


def test_lesion_drops_what_changes_the_outputs_least() -> None:
    net, x = reference.mlp().eval(), reference.vectors(8)
    with torch.no_grad():
        for index, scale in enumerate([0.5, 0.01, 2.0, 0.1]):
            net.blocks[index].residual.branch[2].weight.mul_(scale)
            net.blocks[index].residual.branch[2].bias.mul_(scale)
    plain = reference.copied(net)
    whole = reference.forward(plain, x, factors=P)
    change = []
    for index in range(4):
        factors = [p if index != other else 0.0 for other, p in enumerate(P)]
        change.append(((reference.forward(plain, x, factors=factors) - whole).square().sum() / 8).item())
    going = sorted(range(4), key=change.__getitem__)
    sd.make_stochastic_(net, P)
    from stochastic_depth.deploy.branches import branches_with_gates
    from stochastic_depth.deploy.choice import lesions

    batches = [(x[:5], torch.zeros(5)), (x[5:], torch.zeros(3))]
    torch.testing.assert_close(lesions(net, branches_with_gates(net), batches), change, rtol=1e-9, atol=0)
    small = sd.subnetwork(net, num_blocks=2, order="lesion", calibration=batches)
    kept = [index for index, block in enumerate(small.blocks) if isinstance(block.residual, sd.Residual)]
    assert kept == sorted(going[2:])
    assert kept != [0, 1]


@pytest.mark.parametrize("share", [1.0, 0.8, 0.55, 0.3])
def test_a_budget_of_flops_is_met_and_as_much_is_kept_as_it_allows(share: float) -> None:
    net = sd.models.cifar_resnet(20)
    sd.make_stochastic_(net, sd.linear_decay(0.5))
    x = torch.zeros(1, 3, 32, 32)
    whole = flops(net.eval(), x)
    small = sd.subnetwork(net, cost=share)
    num_kept = sum(isinstance(module, sd.Residual) for module in small.modules())
    assert flops(small, x) <= share * whole
    if share < 1:
        assert flops(sd.subnetwork(net, num_blocks=num_kept + 1), x) > share * whole
    else:
        assert num_kept == 9


@torch.no_grad()
def test_flops_are_counted_where_a_block_is_given_a_view_of_a_parameter() -> None:
    model = awake(timm_model("cait"))  # its class token
    sd.make_stochastic_(model, sd.linear_decay(0.5))
    x = plain_models.images()
    small = sd.subnetwork(model, num_blocks=2, inputs=x)
    share = matrix_flops(small, x) / matrix_flops(model, x)
    again = sd.subnetwork(model, cost=share + 1e-6, inputs=x)
    assert list(again.state_dict()) == list(small.state_dict())


def matrix_flops(net: nn.Module, x: Tensor) -> int:
    """FLOPs of a forward, by a counter that does not follow the modules."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.flops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            count = torch.utils.flop_counter.flop_registry.get(func._overloadpacket)
            self.flops += count(*args, **(kwargs or {}), out_val=output) if count else 0
            return output

    with Count() as counter:
        net(x)
    return counter.flops


def test_a_budget_of_parameters_is_met_and_as_much_is_kept_as_it_allows() -> None:
    net = sd.models.cifar_resnet(20)
    sd.make_stochastic_(net, sd.linear_decay(0.5))
    small = sd.subnetwork(net, parameters=0.5)
    assert size(small) <= 0.5 * size(net)
    num_kept = sum(isinstance(module, sd.Residual) for module in small.modules())
    assert size(sd.subnetwork(net, num_blocks=num_kept + 1)) > 0.5 * size(net)


# ---------------------------------------------------------------------------------------------- other libraries' models


def check_foreign(make: Callable[[], nn.Module], x: Tensor, last: str = "") -> None:
    model = awake(make())
    twin = copy.deepcopy(model)
    depth = sd.make_stochastic_(model, sd.linear_decay(0.4))
    keep = list(range(0, len(depth.names), 2))
    factors = [p if index in keep else 0.0 for index, p in enumerate(depth.survival_probs)]
    with torch.no_grad():
        expected = first_tensor(with_factors(twin, depth.names, factors, last)(x))
        small = sd.subnetwork(model, keep)
        assert_near(first_tensor(small(x)), expected)
        assert_near(first_tensor(small(x[:1])), first_tensor(small(x))[:1], 1e-11)  # any batch size
        assert first_tensor(small(x)).equal(first_tensor(reloaded(small)(x)))
    assert set(small.state_dict()) < set(model.state_dict())
    assert size(small) < size(model)
    reference.assert_plain(small)


def reloaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", [name for name in TIMM if name not in ("parallel-vit", "vit-without-layer-scale")])
def test_timm_models_do_without_branches(name: str) -> None:
    check_foreign(lambda: timm_model(name), plain_models.images(TIMM[name][2]))


def test_torchvision_resnets_do_without_branches() -> None:
    check_foreign(lambda: torchvision_resnet("resnet18"), plain_models.images(32), TORCHVISION["resnet18"])


def test_blocks_of_which_nothing_is_left_go_altogether() -> None:
    model = awake(timm_model("mixer"))
    depth = sd.make_stochastic_(model, sd.linear_decay(0.5))
    small = sd.subnetwork(model, num_blocks=len(depth.names) - 2)
    assert [type(block) for block in small.blocks] == [type(timm_model("mixer").blocks[0])] * 7 + [nn.Identity]


def test_a_dropped_block_still_takes_all_its_arguments() -> None:
    model = awake(timm_model("vit"))  # it iterates over its Sequential and gives masks
    sd.make_stochastic_(model, sd.linear_decay(0.5))
    small = sd.subnetwork(model, num_blocks=2)  # of four: the first of the three blocks has a rate of 0
    assert not list(small.blocks[2].modules())[1:]
    x = torch.ones(1, 2, 24)
    assert small.blocks[2](x, attn_mask=None) is x


def test_a_small_network_of_foreign_blocks_loads_without_the_library(tmp_path: Path) -> None:
    model = awake(torchvision_resnet("resnet18"))
    sd.make_stochastic_(model, sd.linear_decay(0.5))
    small, x = sd.subnetwork(model, num_blocks=5), plain_models.images(32)
    torch.save(small, tmp_path / "small.pt")
    torch.save((x, small(x)), tmp_path / "outputs.pt")
    code = f"""
        import runpy, sys, torch
        schemas = runpy.run_path({str(Path(__file__).parents[2] / "conftest.py")!r})  # kept alive
        small = torch.load({str(tmp_path / "small.pt")!r}, weights_only=False)
        x, expected = torch.load({str(tmp_path / "outputs.pt")!r})
        assert torch.equal(small(x), expected)
        assert not [name for name in sys.modules if name.startswith("stochastic_depth")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


class Sized(nn.Module):
    """Takes another path for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        is_long = x.shape[1] > 3
        x = x + self.a(x)
        y = self.b(x)
        if is_long:
            y = y * 3
        if twice:
            y = y * 2
        return x + y


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sized, self.twice = Sized(), True

    def forward(self, x: Tensor) -> Tensor:
        return self.sized(x, twice=self.twice)


def test_a_block_whose_code_depends_on_the_call_needs_an_example_and_refuses_another_call() -> None:
    net = Calls().double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = x + 6 * 0.5 * net.sized.b(x)
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(ValueError, match="pass an example as inputs"):
        sd.subnetwork(net, [1])
    small = sd.subnetwork(net, [1], inputs=x[:1])
    assert_near(small(x), expected)
    with pytest.raises(AssertionError, match="recorded for another call: it has another size"):
        small(x[:, :2])
    small.twice = False
    with pytest.raises(AssertionError, match="recorded for another call: twice must be True"):
        small(x)


class Ends(nn.Module):
    """An addition in code whose branch ends in an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.a(x))
        return x + self.b(x)


def test_a_factor_that_fits_no_weights_stays_in_the_code_of_a_foreign_block() -> None:
    net = nn.Sequential(Ends()).double()
    plain, x = reference.copied(net)[0], torch.randn(3, 4, dtype=torch.float64)
    sd.make_stochastic_(net, [0.7, 0.4])
    h = x + 0.7 * torch.tanh(plain.a(x))
    with pytest.warns(UserWarning, match="0#1 cannot go into weights: it ends in a call of tanh"):
        small = sd.subnetwork(net, [0])
    assert_near(small(x), h)
    assert set(small.state_dict()) == {"0.a.weight", "0.a.bias"}
    with pytest.warns(UserWarning, match="stays as a scalar"):
        sd.fold_(net)
    assert_near(net(x), h + 0.4 * plain.b(h))
    assert set(net.state_dict()) == {"0.a.weight", "0.a.bias", "0.b.weight", "0.b.bias"}


def test_dropping_does_not_let_code_in_place_write_into_the_input() -> None:
    model = awake(torchvision_resnet("resnet18"))  # its ReLU changes the sum in place
    sd.make_stochastic_(model, sd.linear_decay(0.5))
    small = sd.subnetwork(model, [0])
    x = torch.randn(1, 64, 8, 8, dtype=torch.float64)
    before = x.clone()
    small.layer1[1](x)
    assert torch.equal(x, before)


def test_a_dropped_layer_returns_its_input() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0) for _ in range(3)]
    net = nn.Sequential(*layers).double().eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = net[1](x)
    sd.make_stochastic_(net, sd.uniform(0.5), layers="*", rescale="none")
    small = sd.subnetwork(net, [1], inputs=x)
    assert_near(small(x), expected)
    assert size(small) * 3 == size(net)


class Outer(nn.Module):
    """A block whose code has a branch, and which calls another one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.a, self.drop_path = sd.Residual(nn.Linear(4, 4)), nn.Linear(4, 4), DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x))
        return x + self.drop_path(self.a(x))


def test_a_branch_inside_of_a_block_that_loses_one_too_is_dropped() -> None:
    net = nn.Sequential(Outer(), sd.Residual(nn.Linear(4, 4))).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    h = torch.tanh(x)
    expected = h + 0.5 * net[1].branch(h)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    assert depth.names == ["0.inner", "0.drop_path", "1"]
    small = sd.subnetwork(net, [2])
    assert_near(small(x), expected)
    assert set(small.state_dict()) == {"1.branch.weight", "1.branch.bias"}


class Ignores(nn.Module):
    """Changes values in place and ignores what the change gives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.act, self.drop_path1, self.drop_path2 = nn.ReLU(inplace=True), DropPath(0.2), DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.act(h.view(-1))
        x = x + self.drop_path1(self.b(h))
        g = self.c(x)
        F.relu(g, inplace=True)
        return x + self.drop_path2(self.d(g))


@pytest.mark.parametrize("kept", [0, 1], ids=["first", "second"])
def test_what_changes_a_value_in_place_stays_and_goes_with_the_value(kept: int) -> None:
    net = nn.Sequential(Ignores()).double().eval()
    x, plain = torch.randn(5, 4, dtype=torch.float64), reference.copied(net)[0]
    first, second = (plain.a, plain.b) if kept == 0 else (plain.c, plain.d)
    expected = x + 0.5 * second(torch.relu(first(x)))
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    assert len(depth.names) == 2
    small = sd.subnetwork(net, [kept])
    assert_near(small(x), expected)
    assert [name for name, _ in small[0].named_parameters()][::2] == (
        ["a.weight", "b.weight"] if kept == 0 else ["c.weight", "d.weight"]
    )


class Masked(nn.Module):
    """A block that takes a mask too, as timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop_path = nn.Linear(4, 4), DropPath(0.2)

    def forward(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        y = self.a(x) if mask is None else self.a(x) * mask
        return x + self.drop_path(y * 2 if is_causal else y)


class Behind(nn.Module):
    """Code in place behind a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y.relu_()


class InCode(nn.Module):
    """A block that is found by the addition in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


BLOCKS = {
    "residual": lambda: sd.Residual(nn.Linear(4, 4)),
    "shortcut": lambda: sd.Residual(nn.Linear(4, 4), nn.Dropout(0.0)),
    "in-code": InCode,
    "masked": Masked,
}
FOLLOWED = {
    "relu": lambda block: nn.Sequential(block, nn.ReLU(inplace=True)),
    "relu-behind-dropout": lambda block: nn.Sequential(nn.Sequential(block), nn.Dropout(0.0), nn.ReLU(inplace=True)),
    "code": Behind,
    "code-around-a-sequential": lambda block: Behind(nn.Sequential(block)),
}


class Again(nn.Module):
    """Uses the input of what it calls again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return torch.maximum(self.inner(x), -x)


@pytest.mark.parametrize("followed", FOLLOWED)
@pytest.mark.parametrize("kind", BLOCKS)
def test_code_in_place_behind_a_dropped_block_does_not_change_its_input(kind: str, followed: str) -> None:
    net = nn.Sequential(Again(FOLLOWED[followed](BLOCKS[kind]())), BLOCKS[kind]()).double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    h = torch.maximum(torch.relu(2 * x), -2 * x)
    (linear,) = (module for module in reference.copied(net)[1].modules() if isinstance(module, nn.Linear))
    sd.make_stochastic_(net, sd.uniform(0.5))
    small = sd.subnetwork(net, [1])
    assert_near(small(x), h + 0.5 * linear(h))
    assert_near(reloaded(small)(x), small(x))


@pytest.mark.parametrize("kind", ["residual", "layers"])
def test_a_dropped_branch_inside_of_another_does_not_change_the_shortcut_outside(kind: str) -> None:
    inner = Masked() if kind == "layers" else sd.Residual(nn.Linear(4, 4))
    net = nn.Sequential(sd.Residual(nn.Sequential(inner, nn.ReLU(inplace=True), nn.Linear(4, 4)))).double()
    x, linear = torch.randn(5, 4, dtype=torch.float64), reference.copied(net)[0].branch[2]
    net.append(sd.Residual(nn.Linear(4, 4)).double())
    if kind == "layers":
        sd.make_stochastic_(net, sd.uniform(0.5), layers=["0.branch.0", "1"], rescale="none")
        small, p = sd.subnetwork(net, [1]), 1.0
    else:
        depth = sd.make_stochastic_(net, sd.uniform(0.5))
        assert depth.names == ["0", "0.branch.0", "1"]
        small, p = sd.subnetwork(net, [0, 2]), 0.5
    h = x + p * linear(torch.relu(x))
    assert_near(small(x), h + p * net[1].branch(h))


class ViewInPlace(nn.Module):
    """Changes a view of its first sum in place, or lets a child do it."""

    def __init__(self, act: nn.Module | None) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), act
        self.drop_path1, self.drop_path2 = DropPath(0.2), DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.a(x))
        x = x.view(-1, 4).relu_() if self.act is None else self.act(x)
        return x + self.drop_path2(self.b(x))


@pytest.mark.parametrize("act", [None, nn.Sequential(nn.ReLU(inplace=True))], ids=["view", "child"])
def test_dropping_does_not_let_views_and_children_write_into_the_input(act: nn.Module | None) -> None:
    net = nn.Sequential(ViewInPlace(act)).double().eval()
    x, plain = torch.randn(5, 4, dtype=torch.float64), reference.copied(net)[0]
    h, before = torch.relu(x), x.clone()
    sd.make_stochastic_(net, sd.uniform(0.5))
    small = sd.subnetwork(net, [1])
    assert_near(small(x), h + 0.5 * plain.b(h))
    assert torch.equal(x, before)


def test_without_code_in_place_nothing_is_copied() -> None:
    net = sd.models.cifar_resnet(20)
    sd.make_stochastic_(net, sd.linear_decay(0.5))
    small = sd.subnetwork(net, [0])
    assert not any(isinstance(module, torch.fx.GraphModule) for module in small.modules())


def test_one_of_several_dropped_blocks_copies_and_none_before_weights() -> None:
    blocks = [sd.Residual(nn.Linear(4, 4)) for _ in range(5)]
    net = nn.Sequential(*blocks[:2], nn.Linear(4, 4), *blocks[2:4], nn.ReLU(inplace=True), blocks[4])
    sd.make_stochastic_(net, sd.uniform(0.5))
    small = sd.subnetwork(net, [4])
    copies = [isinstance(module, torch.fx.GraphModule) for module in small]
    assert copies == [False, False, False, False, True, False, False]
    x = torch.ones(1, 4)
    assert small[4](x) is not x
    assert torch.equal(small[4](x), x)


class Iterates(nn.Module):
    """Calls the blocks of its Sequential by itself."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask=mask, is_causal=False)
        return x


@pytest.mark.parametrize("layers", [None, ["blocks.*"]], ids=["drop-paths", "layers"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["default", "example"])
def test_what_stands_in_for_a_block_takes_its_arguments(is_masked: bool, layers: list[str] | None) -> None:
    net = Iterates(Masked(), Masked(), Masked()).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    inputs = (x, torch.rand(3, 4, dtype=torch.float64)) if is_masked else (x,)
    expected = x + 0.5 * net.blocks[1].a(x) * (inputs[1] if is_masked else 1)
    sd.make_stochastic_(net, sd.uniform(0.5), layers=layers)
    small = sd.subnetwork(net, [1], inputs=inputs if is_masked else None)
    assert_near(small(*inputs), expected)
    assert set(small.state_dict()) == {"blocks.1.a.weight", "blocks.1.a.bias"}


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "exactly one of keep, num_blocks, cost, parameters, but none"),
        ({"keep": [0], "cost": 0.5}, "exactly one .* but keep and cost"),
        ({"keep": []}, "keep is empty"),
        ({"keep": [0, 4]}, r"indices in 0\.\.3, but contains 4"),
        ({"keep": [-1]}, r"indices in 0\.\.3, but contains -1"),
        ({"keep": [1, 1]}, "contains 1 several times"),
        ({"keep": [True, False, True, True]}, "not a list of gates"),
        ({"num_blocks": 0}, r"whole number in 1\.\.4, but is 0"),
        ({"num_blocks": 5}, r"whole number in 1\.\.4, but is 5"),
        ({"num_blocks": 0.6}, r"whole number in 1\.\.4, but is 0\.6"),
        ({"cost": 60}, r"cost must be a share .* in \(0, 1\], but is 60"),
        ({"cost": 0.2}, r"cost=0\.2 is below the smallest possible network, which has 0\.3\d+ of the whole: 1 of 4"),
        ({"parameters": 0.01}, r"parameters=0\.01 is below the smallest possible network"),
        ({"num_blocks": 2, "order": "first"}, "order must be one of 'last', 'survival', 'lesion', but is 'first'"),
        ({"num_blocks": 2, "order": "lesion"}, "needs calibration"),
        ({"num_blocks": 2, "order": "lesion", "calibration": []}, "calibration holds no batch"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items()) or "nothing",
)
def test_wrong_input_is_refused_in_one_line(how: dict[str, object], message: str) -> None:
    net = reference.mlp()
    sd.make_stochastic_(net, P)
    with pytest.raises(ValueError, match=message) as error:
        sd.subnetwork(net, **how)
    assert "\n" not in str(error.value)
    assert sd.controller(net).survival_probs == P


def test_a_network_of_constant_depth_works_with_a_warning() -> None:
    net, x = reference.mlp(), reference.vectors(3)
    with pytest.warns(UserWarning, match="was not trained with stochastic depth"):
        small = sd.subnetwork(net, [0, 2])
    assert_near(small(x), reference.forward(net, x, gates=[True, False, True, False]))
    reference.assert_plain(net)


def test_a_branch_that_is_only_masked_cannot_be_taken_out() -> None:
    model = awake(timm_model("parallel-vit"))
    sd.make_stochastic_(model)
    with pytest.raises(ValueError, match="added to nothing"):
        sd.subnetwork(model, [0])


def test_flops_need_an_example_where_none_can_be_guessed() -> None:
    net = nn.Sequential(nn.Embedding(4, 6), sd.Residual(nn.Linear(6, 6)), sd.Residual(nn.Linear(6, 6)))
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(ValueError, match="cost counts FLOPs on an example"):
        sd.subnetwork(net, cost=0.6)
    small = sd.subnetwork(net, cost=0.6, inputs=torch.tensor([1, 2]))
    assert size(small) == 24 + 42


def test_the_branches_to_keep_are_those_of_the_subnetwork_most_important_first():
    net = sd.models.cifar_resnet(20)
    sd.make_stochastic_(net, sd.linear_decay(0.5))
    assert sd.branches_to_keep(net, num_blocks=9, order="survival") == list(range(9))
    assert sd.branches_to_keep(net, num_blocks=4) == [0, 1, 2, 3]
    by_cost = sd.subnetwork(net, cost=0.6)
    by_index = sd.subnetwork(net, keep=sd.branches_to_keep(net, cost=0.6))
    assert by_cost.state_dict().keys() == by_index.state_dict().keys()
    with pytest.raises(ValueError, match="exactly one of num_blocks and cost"):
        sd.branches_to_keep(net, num_blocks=4, cost=0.6)
