"""make_stochastic_, controller and restore_; copies, pickles, number formats; and every error."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch
from reference import (
    assert_plain,
    assert_same,
    conv_net,
    copied,
    counted_calls,
    drawn_gates,
    gradients,
    images,
    linear_net,
    loss_of,
    mlp,
    residuals_of,
    state_of,
    vectors,
)
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.gates import draw_counts

SURVIVAL_PROBS = [0.9, 0.7, 0.5, 0.3]
NAMES = [f"blocks.{index}.residual" for index in range(4)]


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ---------------------------------------------------------------------------------------------- on and off


def test_names_and_order() -> None:
    net = conv_net()
    depth = sd.make_stochastic_(net, sd.linear_decay(0.5))
    assert depth.names == NAMES
    assert depth.names == [name for name, module in net.named_modules() if isinstance(module, sd.Residual)]
    assert depth.survival_probs == sd.linear_decay(0.5)(4)
    assert depth.expected_depth == pytest.approx(2.75)
    assert sd.controller(net) is depth


def test_the_root_may_be_a_residual_itself() -> None:
    net = sd.Residual(nn.Linear(2, 2))
    depth = sd.make_stochastic_(net, [0.5])
    assert depth.names == [""]
    sd.restore_(net)
    assert_plain(net)


def test_keys_classes_and_hooks_before_during_after() -> None:
    net = conv_net()
    own_hook = net.register_forward_hook(lambda *_: None)
    keys, classes = list(net.state_dict()), [type(module) for module in net.modules()]
    before = state_of(net)
    sd.make_stochastic_(net, SURVIVAL_PROBS)
    assert list(net.state_dict()) == keys
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in conv_net().named_parameters()]
    assert_same(state_of(net), before)
    assert all(isinstance(module, cls) for module, cls in zip(net.modules(), classes, strict=True))
    loss_of(net(images(2))).backward()
    assert list(net.state_dict()) == keys
    sd.restore_(net)
    assert list(net.state_dict()) == keys
    assert [type(module) for module in net.modules()] == classes
    assert list(net._forward_hooks) == [own_hook.id]
    own_hook.remove()
    assert_plain(net, keys)


def test_a_restored_network_computes_as_before_with_the_weights_it_has_now() -> None:
    plain = conv_net()
    net, x = copied(plain), images(3)
    sd.make_stochastic_(net, sd.uniform(1.0))
    optimizer = [torch.optim.SGD(model.parameters(), 0.1) for model in (net, plain)]
    for model, step in zip((net, plain), optimizer, strict=True):
        loss_of(model(x)).backward()
        step.step()
    sd.restore_(net)
    for mode in (True, False):
        assert torch.equal(net.train(mode)(x), plain.train(mode)(x))
    assert pickle.dumps(net)


def test_a_controller_of_a_restored_model_raises() -> None:
    net = mlp()
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    sd.restore_(net)
    assert "expected depth" in str(depth)
    for use in (
        lambda: depth.set_survival_probs([0.5] * 4),
        lambda: depth.set_costs(None),
        lambda: depth.gates([True] * 4).__enter__(),
        lambda: depth.cost(vectors(2)),
        lambda: depth.verify(vectors(2)),
        lambda: depth.load_state_dict(depth.state_dict()),
        depth.capture,
    ):
        with pytest.raises(RuntimeError, match="was removed from the model"):
            use()


def test_on_off_and_on_again() -> None:
    net = mlp()
    for seed in range(3):
        depth = sd.make_stochastic_(net, SURVIVAL_PROBS, seed=seed)
        assert depth.state_dict()["counter"] == 0
        net(vectors(2))
        sd.restore_(net)
        assert_plain(net)


def test_plain_weights_load_into_a_stochastic_network_and_back() -> None:
    plain, net = conv_net(seed=1), conv_net(seed=2)
    sd.make_stochastic_(net, SURVIVAL_PROBS)
    net.load_state_dict(plain.state_dict())
    assert_same(state_of(net), state_of(plain))
    fresh = conv_net(seed=3)
    fresh.load_state_dict(net.state_dict())
    assert_same(state_of(fresh), state_of(plain))


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        pytest.param(None, [0, 1, 2, 3], id="all"),
        pytest.param("blocks.[13].*", [1, 3], id="pattern"),
        pytest.param(["blocks.0.*", "*.2.residual"], [0, 2], id="patterns"),
        pytest.param(lambda _, module: module.shortcut is not None, [1, 2], id="predicate"),
    ],
)
def test_where(where: Any, chosen: list[int]) -> None:
    net = conv_net()
    depth = sd.make_stochastic_(net, sd.linear_decay(0.5), where=where)
    assert depth.names == [NAMES[index] for index in chosen]
    assert depth.survival_probs == sd.linear_decay(0.5)(len(chosen))
    with depth.gates([False] * len(chosen)), counted_calls(net) as calls:
        net(images(2))
    assert [index for index in range(4) if not calls[index]] == chosen
    sd.restore_(net)
    assert_plain(net)


def test_a_subclass_keeps_its_class() -> None:
    class Special(sd.Residual):
        """A class of the user's own."""

        def extra(self) -> str:
            return "extra"

    net = nn.Sequential(Special(nn.Linear(2, 2)), nn.ReLU())
    depth = sd.make_stochastic_(net, [0.5])
    assert isinstance(net[0], Special)
    assert net[0].extra() == "extra"
    with depth.gates([False]):
        x = torch.randn(3, 2)
        assert torch.equal(net[0](x), x)
    sd.restore_(net)
    assert type(net[0]) is Special


def test_print_lists_every_branch() -> None:
    net = conv_net()
    depth = sd.make_stochastic_(net, [1.0, 0.75, 0.5, 0.25], granularity="sample", seed=17)
    lines = str(depth).splitlines()
    for name, survival_prob in zip(depth.names, depth.survival_probs, strict=True):
        (line,) = [line for line in lines if line.startswith(name)]
        assert f"{survival_prob:.4f}" in line
    assert lines[0] == "4 branches, expected depth 2.50: an average step skips 37.5% of branch runs"
    assert "seed 17" in lines[-1]
    assert repr(depth) == "<Controller of 4 branches, expected depth 2.50>"


# ---------------------------------------------------------------------------------------------- copies and files


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "copy of copy": lambda model: copy.deepcopy(saved_and_loaded(model)),
}
all_copies = pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)


@all_copies
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_copy_draws_the_same_by_a_controller_of_its_own(copy_of: Callable, granularity: str) -> None:
    net, x = conv_net(), images(5)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity, seed=3)
    for _ in range(3):
        net(x)
    other = copy_of(net)
    own = sd.controller(other)
    assert own is not depth
    assert own.state_dict() == depth.state_dict()
    assert own.names == depth.names
    assert_same(state_of(other), state_of(net))
    for _ in range(5):
        assert torch.equal(net(x), other(x))
    assert_same(state_of(other), state_of(net))
    own.set_survival_probs([1.0] * 4)
    other(x)
    assert depth.survival_probs == SURVIVAL_PROBS
    assert (depth.state_dict()["counter"], own.state_dict()["counter"]) == (8, 9)
    with own.gates([False] * 4), counted_calls(net) as calls:
        net(x)
        assert own.verify(x).num_branches == 4
    assert calls != [[], [], [], []] or drawn_gates(net, x)


@all_copies
def test_a_copy_is_restored_by_itself(copy_of: Callable) -> None:
    net = conv_net()
    keys = list(net.state_dict())
    sd.make_stochastic_(net, SURVIVAL_PROBS)
    other = copy_of(net)
    sd.restore_(other)
    assert_plain(other, keys)
    assert sd.controller(net).names == NAMES
    assert type(net) is not type(other)
    sd.restore_(net)
    assert_plain(net, keys)


@all_copies
def test_a_copy_after_a_backward_with_checkpointing_state(copy_of: Callable) -> None:
    """State of the process and its autograd graphs is not copied."""
    net, x = mlp(), vectors(3)
    sd.make_stochastic_(net, SURVIVAL_PROBS)
    pending = loss_of(net(x))
    other = copy_of(net)
    loss_of(other(x)).backward()
    pending.backward()
    with torch.no_grad():
        other.blocks(other.stem(x))
    assert sd.controller(other).state_dict()["counter"] == 3
    assert gradients(net)["stem.weight"] is not None


def test_a_forced_copy_stays_forced_within_its_context_only() -> None:
    net, x = mlp(), vectors(3)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    with depth.gates([False] * 4):
        assert drawn_gates(net, x) == (False,) * 4
    other = copy.deepcopy(net)
    assert any(drawn_gates(other, x) for _ in range(5))


def test_a_saved_module_loads_in_a_new_process(tmp_path: Path) -> None:
    net, x = linear_net(), vectors(3)
    sd.make_stochastic_(net, SURVIVAL_PROBS, seed=4)
    net(x)
    torch.save({"net": net, "x": x}, tmp_path / "net.pt")
    expected = net(x)
    script = (
        "import sys, torch\n"
        "loaded = torch.load(sys.argv[1], weights_only=False)\n"
        "import stochastic_depth as sd\n"
        "output = loaded['net'](loaded['x'])\n"
        "assert sd.controller(loaded['net']).state_dict()['counter'] == 2\n"
        "hook = loaded['net'].register_forward_hook(lambda *_: None)\n"
        "sd.restore_(loaded['net'])\n"
        "assert list(loaded['net']._forward_hooks) == [hook.id]\n"
        "assert type(loaded['net'].blocks[0].residual) is sd.Residual\n"
        "torch.save(output, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "net.pt", tmp_path / "output.pt"], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected, atol=1e-12, rtol=0)


def test_a_part_of_a_stochastic_model_says_so() -> None:
    """A stage cut out of a stochastic model has no controller; the message says what to do."""
    net = mlp()
    sd.make_stochastic_(net, SURVIVAL_PROBS)
    for part in (net.blocks, copy.deepcopy(net.blocks)):
        for call in (sd.controller, sd.restore_):
            assert_refused(
                lambda call=call, part=part: call(part), ValueError, "part of a stochastic model", "restore_"
            )


# ---------------------------------------------------------------------------------------------- dtype and device


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_dtype_conversions(convert: str, granularity: str) -> None:
    net = mlp(dtype=torch.float32)
    keys = list(net.state_dict())
    sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity)
    getattr(net, convert)()
    dtype = net.stem.weight.dtype
    for step in range(5):
        net.zero_grad()
        output = net(vectors(5, seed=step, dtype=dtype))
        loss_of(output).backward()
        assert output.dtype == dtype
        assert {p.grad.dtype for p in net.parameters()} == {dtype}
    sd.restore_(net)
    assert_plain(net, keys)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_meta_device(granularity: str) -> None:
    net = conv_net().to("meta")
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity)
    x = images(5).to("meta")
    for _ in range(5):
        output = net(x)
        output.sum().backward()
        assert output.shape == (5, 4)
    assert depth.cost(x).flops_share == pytest.approx(_cost_on_cpu(), abs=1e-12)


def _cost_on_cpu() -> float:
    net = conv_net()
    return sd.make_stochastic_(net, SURVIVAL_PROBS).cost(images(5)).flops_share


def test_made_on_meta_and_materialized_later() -> None:
    net = mlp().to("meta")
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    net.to_empty(device="cpu").load_state_dict(mlp().state_dict())
    x = vectors(3)
    with depth.gates([True] * 4):
        assert torch.equal(net(x), mlp()(x))


# ---------------------------------------------------------------------------------------------- the controller


def test_forced_gates_nest_and_end_with_errors() -> None:
    net, x = mlp(), vectors(2)
    depth = sd.make_stochastic_(net, [1.0] * 4)
    with depth.gates([False] * 4):
        with depth.gates([True, False, True, False]):
            assert drawn_gates(net, x) == (True, False, True, False)
        assert drawn_gates(net, x) == (False,) * 4

        class Stop(Exception):  # noqa: N818
            pass

        with pytest.raises(Stop), depth.gates([True] * 4):
            raise Stop
        assert drawn_gates(net, x) == (False,) * 4
    assert drawn_gates(net, x) == (True,) * 4


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_would_freeze_the_gates() -> None:
    net = mlp()
    sd.make_stochastic_(net, SURVIVAL_PROBS)
    with pytest.raises(RuntimeError, match="A trace would freeze the gates"):
        torch.jit.trace(net, vectors(3))
    net.eval()
    assert torch.equal(torch.jit.trace(net, vectors(3))(vectors(2)), net(vectors(2)))


def test_a_cuda_graph_of_the_step_would_freeze_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"would freeze the gates: depth\.capture\(\) records each branch"):
        net(vectors(3))
    assert depth.state_dict()["counter"] == 0
    with depth.gates([True] * 4):
        net(vectors(3))


def test_survival_probs_of_numpy_are_saved_as_numbers(tmp_path: Path) -> None:
    depth = sd.make_stochastic_(mlp(), SURVIVAL_PROBS)
    depth.set_survival_probs(numpy.linspace(0.9, 0.5, 4))
    torch.save(depth.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["survival_probs"] == pytest.approx([0.9, 0.9 - 0.4 / 3, 0.9 - 0.8 / 3, 0.5])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_under_forced_gates_is_not_forced(copied: Callable[[nn.Module], nn.Module]) -> None:
    """An average of the weights that is begun within `depth.gates`."""
    net, x = mlp(), vectors(3)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, seed=5)
    with depth.gates([False] * 4):
        other = copied(net)
        forced = net(x)
    for model in (net, other):
        assert not torch.equal(model.eval()(x), forced)
        model.train()
    assert torch.equal(net.eval()(x), other.eval()(x))
    assert [sd.controller(model).last_gates for model in (net.train(), other.train()) if model(x) is not None] == [
        depth.last_gates
    ] * 2


def test_set_survival_probs_from_the_next_forward_on() -> None:
    net, x = linear_net(), vectors(2)
    depth = sd.make_stochastic_(net, [1.0] * 4)
    assert drawn_gates(net, x) == (True,) * 4
    depth.set_survival_probs([1e-9, 1.0, 1e-9, 1.0])
    assert depth.survival_probs == [1e-9, 1.0, 1e-9, 1.0]
    assert depth.expected_depth == pytest.approx(2)
    assert drawn_gates(net, x) == (False, True, False, True)


def test_controller_inside_a_wrapper() -> None:
    net = mlp()
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    assert sd.controller(nn.Sequential(net)) is depth
    assert sd.controller(torch.optim.swa_utils.AveragedModel(net)) is not depth


def test_survival_probs_are_copies() -> None:
    given = list(SURVIVAL_PROBS)
    depth = sd.make_stochastic_(mlp(), given)
    given[0] = 0.1
    depth.survival_probs[1] = 0.1
    depth.names.append("no")
    assert depth.survival_probs == SURVIVAL_PROBS
    assert len(depth.names) == 4


# ---------------------------------------------------------------------------------------------- refusals


def assert_refused(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    """One line that holds all the words: what was given, what is allowed, the likely mistake."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", ")"))
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def make(schedule: Any = SURVIVAL_PROBS, **options: Any) -> Callable[[nn.Module], object]:
    return lambda net: sd.make_stochastic_(net, schedule, **options)


DROP_RATE = "a drop rate of 0.2 is a survival probability of 0.8"
BAD_MAKE = {
    "no schedule": (make(None), ValueError, "No residual branch", "give a schedule", "linear_decay"),
    "a number": (make(0.5), TypeError, "is the number 0.5", "linear_decay(0.5)", "uniform(0.5)", "drop rate"),
    "a whole number": (make(1), TypeError, "is the number 1", "schedule must be"),
    "not called": (make(sd.linear_decay), TypeError, "such as linear_decay(0.5), but is linear_decay itself"),
    "no module": (lambda _: sd.make_stochastic_(3, sd.uniform(0.5)), TypeError, "model must be a torch.nn.Module", "3"),
    "a string": (make("linear_decay"), TypeError, "'linear_decay'", "schedule must be"),
    "too few": (make([0.5] * 3), ValueError, "one survival probability per branch, 4", "gives 3"),
    "too many": (make([0.5] * 5), ValueError, "one survival probability per branch, 4", "gives 5"),
    "zero": (make([0.5, 0, 0.5, 0.5]), ValueError, "survival_probs[1]", "in (0, 1]", "is 0.", DROP_RATE),
    "above one": (make([0.5, 0.5, 1.5, 0.5]), ValueError, "survival_probs[2]", "is 1.5.", DROP_RATE),
    "not a number": (make([0.5, "x", 0.5, 0.5]), TypeError, "survival_probs[1]", "is 'x'"),
    "nan": (make([float("nan")] * 4), ValueError, "survival_probs[0]", "is nan"),
    "granularity": (make(granularity="row"), ValueError, "granularity must be", "'batch', 'sample'", "'row'"),
    "rescale": (make(rescale=True), ValueError, "rescale must be", "'eval', 'train', 'none'", "True"),
    "skipped_grad": (make(skipped_grad=None), ValueError, "skipped_grad must be", "'zero', 'none'", "None"),
    "draw": (make(draw="equal"), ValueError, "draw must be", "'bernoulli', 'equal_cost'", "'equal'"),
    "ranks": (make(ranks="same"), ValueError, "ranks must be", "'agree', 'decorrelate'", "'same'"),
    "seed": (make(seed=0.5), TypeError, "seed must be a whole number", "0.5"),
    "seed none": (make(seed=None), TypeError, "seed must be a whole number", "None"),
    "where": (make(where="layer*"), ValueError, "where='layer*'", "none of the 4 branches", "blocks.0.residual"),
    "where useless": (make(where=["blocks.0*", "zzz*"]), ValueError, "where='zzz*'", "none of the 4 branches"),
    "where number": (make(where=3), TypeError, "where must be a predicate", "is 3"),
    "where empty": (make(where=[]), ValueError, "none of the 4 branches"),
}


@pytest.mark.parametrize("case", BAD_MAKE.values(), ids=BAD_MAKE)
def test_make_stochastic_refuses_and_changes_nothing(case: tuple) -> None:
    call, error, *words = case
    net = conv_net()
    before = state_of(net)
    assert_refused(lambda: call(net), error, *words)
    assert_plain(net)
    assert_same(state_of(net), before)
    sd.make_stochastic_(net, SURVIVAL_PROBS)


class OwnForward(sd.Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu())


BAD_MODELS = {
    "no residual": (lambda: nn.Sequential(nn.Linear(2, 2)), "No residual branch", "Sequential", "Residual(branch"),
    "own forward": (lambda: nn.Sequential(OwnForward(nn.Linear(2, 2))), "OwnForward", "its own forward"),
    "data parallel": (lambda: nn.DataParallel(mlp()), "wrapped in DataParallel", "make_stochastic_", "first"),
    "inside": (lambda: nn.Sequential(nn.DataParallel(mlp())), "wrapped in DataParallel"),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), "is compiled", "make_stochastic_", "first"),
    "compiled in place": (lambda: _compiled(mlp()), "is compiled", "first"),
}


def _compiled(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize("case", BAD_MODELS.values(), ids=BAD_MODELS)
def test_models_that_are_refused(case: tuple) -> None:
    make_model, *words = case
    model = make_model()
    assert_refused(lambda: sd.make_stochastic_(model, sd.uniform(0.5)), ValueError, *words)
    for module in model.modules():
        assert not type(module).__name__.startswith("Stochastic")
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("where", ["itself", "around", "inside"])
def test_making_a_model_stochastic_twice_is_refused(where: str) -> None:
    net = mlp()
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    model = {"itself": net, "around": nn.Sequential(net), "inside": net.blocks}[where]
    assert_refused(lambda: sd.make_stochastic_(model, sd.uniform(0.5)), ValueError, "already", "restore_", "set_surv")
    assert sd.controller(net) is depth
    net(vectors(2))
    assert depth.state_dict()["counter"] == 1


def test_no_controller() -> None:
    net = mlp()
    for call in (sd.controller, sd.restore_):
        assert_refused(lambda call=call: call(net), ValueError, "Sequential", "not stochastic", "make_stochastic_")


def test_two_controllers() -> None:
    nets = [mlp(), mlp()]
    for net in nets:
        sd.make_stochastic_(net, SURVIVAL_PROBS)
    assert_refused(lambda: sd.controller(nn.Sequential(*nets)), ValueError, "2 controllers")


def gates(values: Any) -> Callable[[sd.Controller], None]:
    def force(depth: sd.Controller) -> None:
        with depth.gates(values):
            raise AssertionError("not refused")

    return force


def load(**changes: Any) -> Callable[[sd.Controller], None]:
    return lambda depth: depth.load_state_dict(
        {key: value for key, value in {**depth.state_dict(), **changes}.items() if value is not ...}
    )


BAD_CALLS = {
    "gates too few": (gates([True]), ValueError, "gates must have one entry per branch, 4", "1 gates were given"),
    "gates too many": (gates([True] * 5), ValueError, "4 in all", "5 gates were given"),
    "gates number": (gates([1, 0, 1, 0]), TypeError, "gates[0]", "blocks.0.residual", "True or False", "is 1"),
    "gates float": (gates([True, 0.5, True, True]), TypeError, "gates[1]", "0.5"),
    "gates tensor": (gates([torch.ones(3, dtype=torch.bool)] * 4), TypeError, "gates[0]", "granularity 'batch'"),
    "gates no list": (gates(True), TypeError, "gates must", "True"),
    "probs too few": (lambda d: d.set_survival_probs([0.5]), ValueError, "survival_probs", "4 in all", "1 survival"),
    "probs zero": (lambda d: d.set_survival_probs([0.5, 0.5, 0.5, 0]), ValueError, "survival_probs[3]", DROP_RATE),
    "probs number": (lambda d: d.set_survival_probs(0.5), TypeError, "survival_probs must", "0.5"),
    "probs string": (lambda d: d.set_survival_probs("half"), TypeError, "survival_probs must be a sequence", "'half'"),
    "costs too few": (lambda d: d.set_costs([1.0, 2.0]), ValueError, "costs must have one entry per branch, 4", "2"),
    "costs zero": (lambda d: d.set_costs([1, 2, 0, 1]), ValueError, "costs must be positive", "blocks.2", "is 0"),
    "costs infinite": (lambda d: d.set_costs([1, 2, 3, float("inf")]), ValueError, "blocks.3", "inf"),
    "costs text": (lambda d: d.set_costs("1234"), ValueError, "blocks.0", "'1'"),
    "state costs": (load(costs=[1.0]), ValueError, "costs", "4 in all"),
    "state names": (load(names=["a", "b", "c", "d"]), ValueError, "first names that differ", "'a'", "blocks.0"),
    "state fewer": (load(names=NAMES[:2]), ValueError, "2 branches", "has 4", "blocks.2.residual"),
    "state no names": (load(names=None), ValueError, "names must be", "None"),
    "state costs number": (load(costs=5), ValueError, "costs must have one entry", "is 5"),
    "state probs text": (load(survival_probs=["a"] * 4), ValueError, "survival_probs[0]", "'a'"),
    "state probs": (load(survival_probs=[0.5] * 3), ValueError, "4 in all", "3 survival"),
    "state prob zero": (load(survival_probs=[0.5, 0, 1, 1]), ValueError, "survival_probs[1]", "is 0."),
    "state seed": (load(seed="x"), ValueError, "seed must be a whole number", "'x'"),
    "state counter": (load(counter=1.5), ValueError, "counter must be a whole number", "1.5"),
    "state negative": (load(counter=-1), ValueError, "counter must be at least 0", "-1"),
    "state incomplete": (load(counter=...), ValueError, "counter", "names", "seed", "survival_probs"),
    "state too much": (load(epoch=3), ValueError, "epoch"),
    "state no dict": (lambda d: d.load_state_dict([1]), ValueError, "[1]"),
}


@pytest.mark.parametrize("case", BAD_CALLS.values(), ids=BAD_CALLS)
def test_controller_refuses_and_changes_nothing(case: tuple) -> None:
    call, error, *words = case
    net, x = mlp(), vectors(3)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, seed=5)
    twin = copy.deepcopy(net)
    for model in (net, twin):
        model(x)
    before = depth.state_dict()
    assert_refused(lambda: call(depth), error, *words)
    assert depth.state_dict() == before
    for _ in range(5):
        assert torch.equal(net(x), twin(x))


@pytest.mark.parametrize(
    "mask",
    [torch.ones(3), torch.ones(3, 1, dtype=torch.bool), torch.tensor(True)],
    ids=["float", "two-dimensional", "scalar"],
)
def test_forced_masks_are_checked(mask: Tensor) -> None:
    net = mlp()
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample")
    assert_refused(lambda: gates([mask, True, True, True])(depth), TypeError, "gates[0]", "bool tensor (N,)")
    assert depth.state_dict()["counter"] == 0
    assert residuals_of(net)


# ---------------------------------------------------------------------------------------------- the class of the root


def test_classes_keep_their_names() -> None:
    """FSDP and accelerate look blocks up by them."""
    plain = conv_net()
    net = copy.deepcopy(plain)
    sd.make_stochastic_(net, SURVIVAL_PROBS)
    for ours, theirs in zip(net.modules(), plain.modules(), strict=True):
        assert isinstance(ours, type(theirs))
        for name in ("__name__", "__qualname__", "__module__"):
            assert getattr(type(ours), name) == getattr(type(theirs), name)
    assert repr(net) == repr(plain)
    assert type(net) is not type(plain)


class Announced(nn.Module):
    """A base class that acts on its subclasses, as transformers' does."""

    subclasses: ClassVar[list[str]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Announced.subclasses.append(cls.__name__)


class Registered(Announced):
    def __init__(self) -> None:
        super().__init__()
        self.block = sd.Residual(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_the_class_of_a_root_is_not_announced_as_a_new_one() -> None:
    net = Registered()
    sd.make_stochastic_(net, [0.5])
    assert Announced.subclasses == ["Registered"]
    net(torch.zeros(2, 3))
    sd.restore_(net)
    assert type(net) is Registered


@all_copies
def test_a_root_that_is_a_branch_itself(copy_of: Callable) -> None:
    torch.manual_seed(0)
    plain = sd.Residual(nn.Linear(3, 3))
    net = copy.deepcopy(plain)
    sd.make_stochastic_(net, [0.5], seed=1)
    net = copy_of(net)
    x = torch.ones(2, 3)
    for step in range(10):
        (is_open,) = draw_counts([0.5], 1, seed=1, counter=step)
        torch.testing.assert_close(net(x), plain(x) if is_open else x)
    assert sd.controller(net).state_dict()["counter"] == 10
    sd.restore_(net)
    assert type(net) is sd.Residual
    assert not vars(net).keys() - vars(plain).keys()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_replaced_in_the_root_is_one_pass_too(when: str) -> None:
    """accelerate's hooks do it."""
    net = conv_net()
    if when == "before":
        net.forward = functools.partial(type(net).forward, net)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    if when == "after":
        net.forward = functools.partial(nn.Sequential.forward, net)
    for step in range(5):
        net(images(2))
        assert depth.state_dict()["counter"] == step + 1


def test_classes_on_top_of_the_roots_class_survive_restore() -> None:
    """A parametrization swaps the class as well, and FSDP2 does."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = sd.Residual(nn.Linear(3, 3))
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) * self.gain

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    net = Root()
    x = torch.ones(2, 3)
    expected = 2 * net(x)
    depth = sd.make_stochastic_(net, [0.5])
    nn.utils.parametrize.register_parametrization(net, "gain", Twice())
    with depth.gates([True]):
        torch.testing.assert_close(net(x), expected)
    sd.restore_(net)
    torch.testing.assert_close(net(x), expected)
    assert isinstance(net, Root)
    assert not any("stochastic" in name for name in dir(net))
    nn.utils.parametrize.remove_parametrizations(net, "gain")
    assert type(net) is Root
