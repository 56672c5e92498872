"""Activation checkpointing: a recomputation uses the gates of the forward that it repeats, in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from reference import assert_close, copied, counted_calls, gradients, loss_of, mlp, vectors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import stochastic_depth as sd

SURVIVAL_PROBS = [0.8, 0.5, 0.5, 0.4, 0.6, 0.3]
Function = Callable[[Tensor], Tensor]

both_forms = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
both_granularities = pytest.mark.parametrize("granularity", ["batch", "sample"])


class Trunk(nn.Module):
    """A network that runs its blocks in checkpointed segments; 0: without checkpointing."""

    def __init__(self, net: nn.Module, *, segment: int, reentrant: bool, preserve: bool = True) -> None:
        super().__init__()
        self.net = net
        self.segment, self.reentrant, self.preserve = segment, reentrant, preserve

    def features(self, x: Tensor) -> Tensor:
        h = self.net.stem(x)
        size = self.segment or 1
        for start in range(0, len(self.net.blocks), size):
            part = self.net.blocks[start : start + size]
            if self.segment:
                h = checkpoint(part, h, use_reentrant=self.reentrant, preserve_rng_state=self.preserve)
            else:
                h = part(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(self.features(x))


def pair(*, segment: int, reentrant: bool, preserve: bool = True, **options) -> tuple[Trunk, Trunk]:
    """The same stochastic network with and without checkpointing, both at counter 0."""
    options = {"granularity": "batch", "seed": 5, **options}
    plain = mlp(6)
    ours = Trunk(copied(plain), segment=segment, reentrant=reentrant, preserve=preserve)
    theirs = Trunk(plain, segment=0, reentrant=False)
    for trunk in (ours, theirs):
        sd.make_stochastic_(trunk, SURVIVAL_PROBS, **options)
    return ours, theirs


def counter(model: nn.Module) -> int:
    return sd.controller(model).state_dict()["counter"]


def assert_same_gradients(
    ours: nn.Module,
    theirs: nn.Module,
    our_losses: Sequence[Tensor],
    their_losses: Sequence[Tensor],
    order: Sequence[int],
) -> None:
    """Backward in the given order; after each, the gradients are those without checkpointing."""
    for index in order:
        torch.testing.assert_close(our_losses[index], their_losses[index], atol=0, rtol=0)
        for model, losses in ((ours, our_losses), (theirs, their_losses)):
            model.zero_grad()
            before = counter(model)
            losses[index].backward()
            assert counter(model) == before
        assert_close(gradients(ours), gradients(theirs))


NESTED = r"^Nested activation checkpoints cannot .* reentrant\. Use .*use_reentrant=False\) for all of them\.$"
# What PyTorch's reentrant form says where gradients are off.
NO_GRADIENTS = "ignore:None of the inputs have requires_grad:UserWarning"
ORDERS = [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)]


@both_forms
@both_granularities
@pytest.mark.parametrize("preserve", [True, False], ids=["rng kept", "rng not kept"])
@pytest.mark.parametrize("segment", [1, 2, 6])
@pytest.mark.parametrize("order", [(0,), *ORDERS], ids=str)
def test_forwards_of_the_root(
    reentrant: bool, granularity: str, preserve: bool, segment: int, order: tuple[int, ...]
) -> None:
    ours, theirs = pair(segment=segment, reentrant=reentrant, preserve=preserve, granularity=granularity)
    for start in (0, 3):
        batches = [vectors(3, seed=start + index) for index in range(len(order))]
        losses = [[loss_of(model(x)) for x in batches] for model in (ours, theirs)]
        assert_same_gradients(ours, theirs, *losses, order)
    assert counter(ours) == 2 * len(order)


@both_forms
@both_granularities
@pytest.mark.parametrize("segment", [1, 2, 6])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_forwards_of_parts(reentrant: bool, granularity: str, segment: int, order: tuple[int, ...]) -> None:
    """`model.features` without the root: every forward its own draw, every recomputation the right one."""
    ours, theirs = pair(segment=segment, reentrant=reentrant, granularity=granularity)
    batches = [vectors(3, seed=index) for index in range(3)]
    losses = [[loss_of(model.features(x)) for x in batches] for model in (ours, theirs)]
    assert_same_gradients(ours, theirs, *losses, order)
    assert counter(ours) == 3


@both_forms
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_forwards_of_root_and_parts_mixed(reentrant: bool, order: tuple[int, ...]) -> None:
    ours, theirs = pair(segment=2, reentrant=reentrant)
    for kinds in (("features", "forward", "features"), ("forward", "features", "forward")):
        losses = []
        for model in (ours, theirs):
            calls: list[Function] = [model if kind == "forward" else model.features for kind in kinds]
            losses.append([loss_of(call(vectors(3, seed=index))) for index, call in enumerate(calls)])
        assert_same_gradients(ours, theirs, *losses, order)


@both_forms
@both_granularities
@pytest.mark.filterwarnings(NO_GRADIENTS)
def test_other_forwards_between_forward_and_backward(reentrant: bool, granularity: str) -> None:
    """Evaluation, training mode without gradients, and parts do not disturb later recomputations."""
    ours, theirs = pair(segment=2, reentrant=reentrant, granularity=granularity)
    losses = []
    for model in (ours, theirs):
        made = [loss_of(model(vectors(3)))]
        model.eval()
        model(vectors(4))
        model.train()
        made.append(loss_of(model(vectors(3, seed=1))))
        with torch.no_grad():
            model(vectors(3, seed=2))
            model.features(vectors(3, seed=3))
        made.append(loss_of(model(vectors(3, seed=4))))
        with torch.no_grad():
            model(vectors(3, seed=5))
        losses.append(made)
    assert_same_gradients(ours, theirs, *losses, (1, 0, 2))


@both_forms
@pytest.mark.filterwarnings(NO_GRADIENTS)
def test_a_forward_without_gradients_between_forwards_of_parts(reentrant: bool) -> None:
    ours, theirs = pair(segment=6, reentrant=reentrant)
    losses = []
    for model in (ours, theirs):
        made = [model.features(vectors(3)).sum()]
        with torch.no_grad():
            model.features(vectors(3, seed=1))
            model(vectors(3, seed=2))
        made.append(model.features(vectors(3, seed=3)).sum())
        with torch.no_grad():
            model.features(vectors(3, seed=4))
        losses.append(made)
    assert_same_gradients(ours, theirs, *losses, (0, 1))


@both_forms
@pytest.mark.parametrize("last", ["forward", "features"])
@pytest.mark.filterwarnings(NO_GRADIENTS)
def test_a_forward_without_gradients_right_after_the_last_node(reentrant: bool, last: str) -> None:
    """The segment's node is the last one made; a pass without gradients after it must not claim it."""
    ours, theirs = pair(segment=6, reentrant=reentrant)
    losses = []
    for model in (ours, theirs):
        output = model.features(vectors(3))
        with torch.no_grad():
            getattr(model, last)(vectors(3, seed=1))
        losses.append([loss_of(output)])
    assert_same_gradients(ours, theirs, *losses, (0,))


@both_forms
@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_whole_root_checkpointed(reentrant: bool, granularity: str, order: tuple[int, ...]) -> None:
    _, theirs = pair(segment=0, reentrant=False, granularity=granularity)
    ours, _ = pair(segment=0, reentrant=False, granularity=granularity)
    losses = []
    for model in (ours, theirs):
        made = []
        for index in range(3):
            x = vectors(3, seed=index).requires_grad_()
            made.append(loss_of(checkpoint(model, x, use_reentrant=reentrant) if model is ours else model(x)))
        losses.append(made)
    assert_same_gradients(ours, theirs, *losses, order)
    assert counter(ours) == 3


@both_forms
@pytest.mark.parametrize("calls_root", [True, False], ids=["root", "parts"])
def test_forced_gates_hold_in_the_recomputation(reentrant: bool, calls_root: bool) -> None:
    """The context has been left, another one entered, when the backward runs."""
    ours, theirs = pair(segment=2, reentrant=reentrant)
    patterns = [(True, False, True, False, True, False), (False, True, False, True, False, True)]
    losses = []
    for model in (ours, theirs):
        made = []
        for index, gates in enumerate(patterns):
            with sd.controller(model).gates(gates):
                made.append(loss_of((model if calls_root else model.features)(vectors(3, seed=index))))
        losses.append(made)
    with sd.controller(ours).gates([True] * 6), sd.controller(theirs).gates([True] * 6):
        assert_same_gradients(ours, theirs, *losses, (0, 1))
    assert counter(ours) == 0


@both_forms
def test_evaluation_with_gradients(reentrant: bool) -> None:
    ours, theirs = pair(segment=2, reentrant=reentrant)
    for model in (ours, theirs):
        model(vectors(3))  # a pass with gates before
        model.eval()
    losses = [[loss_of(model(vectors(3, seed=1))), loss_of(model.features(vectors(3)))] for model in (ours, theirs)]
    assert_same_gradients(ours, theirs, *losses, (0, 1))


@both_forms
def test_checkpoint_sequential(reentrant: bool) -> None:
    _, theirs = pair(segment=0, reentrant=False)
    ours, _ = pair(segment=0, reentrant=False)
    losses = []
    for model in (ours, theirs):
        h = model.net.stem(vectors(3))
        if model is ours:
            h = checkpoint_sequential(model.net.blocks, 3, h, use_reentrant=reentrant)
        else:
            h = model.net.blocks(h)
        losses.append([loss_of(h)])
    assert_same_gradients(ours, theirs, *losses, (0,))


@both_forms
@pytest.mark.parametrize("gates", ["drawn", "closed"])
def test_a_segment_that_starts_before_its_first_branch(reentrant: bool, gates: str) -> None:
    """A part whose stem is recomputed too: the last node that needs it may be older than the first branch's call."""
    torch.manual_seed(0)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), sd.Residual(nn.Linear(5, 5)))

    ours = Root().double()
    theirs = copied(ours)
    for model in (ours, theirs):
        sd.make_stochastic_(model, [0.5], rescale="train", skipped_grad="none")
    for step in range(12):
        x = vectors(3, seed=step).requires_grad_()
        losses = []
        for model in (ours, theirs):
            if gates == "closed":
                with sd.controller(model).gates([False]):
                    y = checkpoint(model.part, x, use_reentrant=reentrant) if model is ours else model.part(x)
            else:
                y = checkpoint(model.part, x, use_reentrant=reentrant) if model is ours else model.part(x)
            losses.append([y.sum()])
        assert_same_gradients(ours, theirs, *losses, (0,))


@both_forms
def test_survival_probs_changed_between_forward_and_backward(reentrant: bool) -> None:
    """A schedule over time that moves on before the backward: the factor 1/p is that of the forward."""
    ours, theirs = pair(segment=6, reentrant=reentrant, rescale="train")
    losses = []
    for model in (ours, theirs):
        with sd.controller(model).gates([True] * 6):
            losses.append([loss_of(model(vectors(3)))])
        sd.controller(model).set_survival_probs([0.9] * 6)
    assert_same_gradients(ours, theirs, *losses, (0,))


@both_forms
def test_a_branch_checkpointed_inside(reentrant: bool) -> None:
    """Checkpointing within the branch, as model zoos do: the gate is outside the recomputed code."""

    class Wrapped(nn.Module):
        def __init__(self, branch: nn.Module) -> None:
            super().__init__()
            self.inner = branch

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    ours, theirs = pair(segment=0, reentrant=False)
    for residual in [block.residual for block in ours.net.blocks]:
        residual.branch = Wrapped(residual.branch)
    losses = [[loss_of(model(vectors(3, seed=index))) for index in range(3)] for model in (ours, theirs)]
    for index in (1, 0, 2):
        for model, made in zip((ours, theirs), losses, strict=True):
            model.zero_grad()
            made[index].backward()
        renamed = {name.replace(".inner", ""): grad for name, grad in gradients(ours).items()}
        assert_close(renamed, gradients(theirs))


@pytest.mark.parametrize("outer", [True, False], ids=["outer reentrant", "outer non-reentrant"])
@pytest.mark.parametrize("inner", [True, False], ids=["inner reentrant", "inner non-reentrant"])
@pytest.mark.parametrize("num_forwards", [1, 2])
# Up to PyTorch 2.11 the refusal leaves a generator of PyTorch's own open, which complains when it is collected.
@pytest.mark.filterwarnings(
    NO_GRADIENTS,
    "ignore:Exception ignored in.*_checkpoint_without_reentrant_generator:pytest.PytestUnraisableExceptionWarning",
)
def test_nested_checkpoints_are_right_or_refused(outer: bool, inner: bool, num_forwards: int) -> None:
    """A nested form that cannot be attributed says so; it never gives other gradients.

    In a reentrant checkpoint others cannot be: its recomputation has no mark but the number of its node.
    """
    theirs, ours = pair(segment=2, reentrant=inner)[::-1]
    losses = []
    for model in (ours, theirs):
        made = []
        for index in range(num_forwards):
            h = model.net.stem(vectors(3, seed=index))

            def features(h: Tensor, model: Trunk = model) -> Tensor:
                for start in (0, 2, 4):
                    part = model.net.blocks[start : start + 2]
                    h = checkpoint(part, h, use_reentrant=inner) if model is ours else part(h)
                return h

            made.append(loss_of(checkpoint(features, h, use_reentrant=outer) if model is ours else features(h)))
        losses.append(made)
    if not outer:
        assert_same_gradients(ours, theirs, *losses, range(num_forwards))
        return
    with pytest.raises(RuntimeError, match=NESTED):
        losses[0][0].backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_forgotten_forward_is_refused() -> None:
    """More passes than are remembered: an error, never the gates of another pass."""
    ours, _ = pair(segment=2, reentrant=True)
    loss = loss_of(ours(vectors(1)))
    with torch.no_grad():
        for _ in range(1025):
            ours(vectors(1))
    with pytest.raises(RuntimeError, match=r"^The recomputed forward pass is not among the latest 1024"):
        loss.backward()


def test_a_non_reentrant_checkpoint_is_never_forgotten() -> None:
    ours, theirs = pair(segment=2, reentrant=False)
    losses = [[loss_of(model(vectors(1)))] for model in (ours, theirs)]
    with torch.no_grad():
        for _ in range(1025):
            ours(vectors(1))
    assert_same_gradients(ours, theirs, *losses, (0,))


@both_forms
def test_the_recomputation_calls_only_open_branches(reentrant: bool) -> None:
    ours, _ = pair(segment=2, reentrant=reentrant)
    with counted_calls(ours) as calls:
        with sd.controller(ours).gates([True, False, True, False, False, False]):
            loss = loss_of(ours(vectors(3)))
        loss.backward()
    assert calls == [[3, 3], [], [3, 3], [], [], []]


def test_a_second_derivative_through_checkpoints() -> None:
    """Gradient penalty: the non-reentrant form supports it, and its nodes are found again."""
    ours, theirs = pair(segment=2, reentrant=False)
    penalties = []
    for model in (ours, theirs):
        inputs = [vectors(3, seed=index).requires_grad_() for index in range(2)]
        outputs = [loss_of(model(x)) for x in inputs]
        grads = [torch.autograd.grad(y, x, create_graph=True)[0] for y, x in zip(outputs, inputs, strict=True)]
        penalties.append([(grad**2).sum() for grad in grads])
    for index in (0, 1):
        for model, made in zip((ours, theirs), penalties, strict=True):
            model.zero_grad()
            made[index].backward()
        assert_close(gradients(ours), gradients(theirs))


def test_gates_forced_inside_of_a_checkpoint_are_put_back_after_its_recomputation() -> None:
    """The recomputation enters and leaves `depth.gates` too, where those that it repeats are in force."""
    model = nn.Sequential(sd.Residual(nn.Linear(4, 4)), sd.Residual(nn.Linear(4, 4)))
    depth = sd.make_stochastic_(model, sd.uniform(0.5))

    def forced(x: Tensor) -> Tensor:
        with depth.gates([False, True]):
            return model(x)

    x = torch.randn(2, 4)
    checkpoint(forced, x, use_reentrant=False).sum().backward()
    assert model[0].branch.weight.grad is None or not model[0].branch.weight.grad.any()
    assert model[1].branch.weight.grad.any()
    drawn = set()
    for _ in range(40):
        model(x)
        drawn.add(tuple(depth.last_gates or ()))
    assert len(drawn) == 4
    assert depth.passes.forced is None
