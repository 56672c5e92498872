"""Threads, asyncio tasks and other models that run at the same time do not share gates."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import reference
import torch
from reference import assert_close, copied, gradients, loss_of, mlp, vectors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.attribution import innermost_scope
from stochastic_depth.gates import draw_counts

SURVIVAL_PROBS = [0.8, 0.5, 0.5, 0.4]
CLOSED = [False] * 4
MIXED = [True, False, False, True]

both_forms = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def pair(**options) -> tuple[nn.Module, nn.Module, sd.Controller]:
    """A stochastic network, the same one plain, and its controller."""
    plain = mlp()
    net = copied(plain)
    return net, plain, sd.make_stochastic_(net, SURVIVAL_PROBS, **options)


def drawn(step: int) -> tuple[bool, ...]:
    return tuple(map(bool, draw_counts(SURVIVAL_PROBS, 1, seed=0, counter=step)))


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Results of functions that run concurrently, each in a new thread; raises the first error."""
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results


@contextmanager
def meeting_inside(*nets: nn.Module, calls: int = 2) -> Generator[None]:
    """Context in which `calls` forwards wait for each other between their second and third block."""
    barrier = threading.Barrier(calls)

    def meet(*_: object) -> None:
        barrier.wait(30)

    hooks = [net.blocks[2].register_forward_pre_hook(meet) for net in nets]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def replica_of(module: nn.Module) -> nn.Module:
    """Replicas as DataParallel calls them in threads: shallow copies of all modules, here on the same device."""
    replica = module._replicate_for_data_parallel()
    replica._parameters = dict(module._parameters)
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    return replica


# ---------------------------------------------------------------------------------------------- threads


def test_forwards_in_several_threads_are_a_draw_each() -> None:
    net, plain, depth = pair()
    x = vectors(3)
    steps, num_threads = 10, 3
    with meeting_inside(net, calls=num_threads), torch.no_grad():
        outputs = in_threads(*[lambda: [net(x) for _ in range(steps)]] * num_threads)
    assert depth.state_dict()["counter"] == steps * num_threads
    expected = [reference.forward(plain, x, drawn(step)) for step in range(steps * num_threads)]
    flat = sorted(float(output.detach().sum()) for of_thread in outputs for output in of_thread)
    torch.testing.assert_close(flat, sorted(float(output.detach().sum()) for output in expected), rtol=0, atol=1e-12)


def test_gradients_of_steps_in_several_threads() -> None:
    net, plain, _ = pair()
    batches = [vectors(3, seed=seed) for seed in range(2)]
    with meeting_inside(net):
        losses = in_threads(*[lambda x=x: loss_of(net(x)) for x in batches])
    in_threads(*[loss.backward for loss in losses])
    for order in ((0, 1), (1, 0)):
        expected = copied(plain)
        for step, index in enumerate(order):
            loss_of(reference.forward(expected, batches[index], drawn(step))).backward()
        reference.fill_skipped_gradients(expected, [True] * 4, "zero")
        ours, theirs = gradients(net), gradients(expected)
        if all(torch.allclose(ours[name], theirs[name], atol=1e-11) for name in theirs if theirs[name] is not None):
            return
    pytest.fail("the gradients are those of neither order of the two threads")


@pytest.mark.parametrize("first", ["evaluation", "training"])
def test_evaluation_beside_training(first: str) -> None:
    """A server's replica in evaluation mode never sees gates, and the training step never misses them."""
    net, plain, _ = pair()
    net.eval()
    replica = replica_of(net)
    net.train()
    x = vectors(3)
    runs = {"training": lambda: [net(x) for _ in range(10)], "evaluation": lambda: [replica(x) for _ in range(10)]}
    order = [first, *(name for name in runs if name != first)]
    with meeting_inside(net), torch.no_grad():  # a replica has the hooks of its module
        replica.blocks[2]._forward_pre_hooks = net.blocks[2]._forward_pre_hooks
        outputs = dict(zip(order, in_threads(*[runs[name] for name in order]), strict=True))
    for step in range(10):
        torch.testing.assert_close(outputs["training"][step], reference.forward(plain, x, drawn(step)))
        torch.testing.assert_close(outputs["evaluation"][step], reference.evaluate(plain, x, SURVIVAL_PROBS, "eval"))


def test_forced_gates_hold_for_their_thread_only() -> None:
    net, plain, depth = pair()
    x = vectors(3)

    def forced() -> Tensor:
        with depth.gates(CLOSED):
            return net(x)

    with meeting_inside(net), torch.no_grad():
        ours, theirs = in_threads(forced, lambda: net(x))
    torch.testing.assert_close(ours, reference.forward(plain, x, CLOSED))
    torch.testing.assert_close(theirs, reference.forward(plain, x, drawn(0)))
    with depth.gates(CLOSED), torch.no_grad():
        (theirs,) = in_threads(lambda: net(x))
        context = contextvars.copy_context()
        (copied_context,) = in_threads(lambda: context.run(net, x))
        torch.testing.assert_close(net(x), reference.forward(plain, x, CLOSED))
    torch.testing.assert_close(theirs, reference.forward(plain, x, drawn(1)))
    torch.testing.assert_close(copied_context, reference.forward(plain, x, CLOSED))


def test_parts_in_several_threads_have_a_draw_each() -> None:
    net, plain, depth = pair()
    barrier = threading.Barrier(2)
    x = vectors(3)

    def parts() -> Tensor:
        h = net.stem(x)
        for part in (net.blocks[:2], net.blocks[2:]):
            barrier.wait(30)
            h = part(h)
        return net.head(h)

    with torch.no_grad():
        outputs = in_threads(parts, parts)
    assert depth.state_dict()["counter"] == 2
    sums = sorted(float(output.detach().sum()) for output in outputs)
    expected = sorted(float(reference.forward(plain, x, drawn(step)).detach().sum()) for step in range(2))
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)


def test_a_thread_that_the_forward_starts_belongs_to_it_with_its_context() -> None:
    """`contextvars.copy_context().run` passes the forward on; afterward the context no longer refers to it."""
    net, plain, depth = pair()
    contexts: list[contextvars.Context] = []

    class Parallel(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            contexts.append(contextvars.copy_context())
            return in_threads(lambda: contexts[-1].run(self.part, x))[0]

    blocks = net.blocks
    net.blocks = nn.Sequential(*blocks[:2], Parallel(nn.Sequential(*blocks[2:])))
    x = vectors(3)
    with torch.no_grad():
        for step in range(8):
            torch.testing.assert_close(net(x), reference.forward(plain, x, drawn(step)))
        assert depth.state_dict()["counter"] == 8
        contexts[-1].run(blocks, net.stem(x))
    assert depth.state_dict()["counter"] == 9


def test_measuring_in_one_thread_does_not_see_another() -> None:
    net, plain, depth = pair()
    x = vectors(3)
    alone = depth.cost(x)
    with meeting_inside(net), torch.no_grad():
        cost, output = in_threads(lambda: depth.cost(x), lambda: net(x))
    assert cost == alone
    torch.testing.assert_close(output, reference.forward(plain, x, drawn(0)))
    assert depth.passes.observer is None


# ---------------------------------------------------------------------------------------------- DataParallel


def test_replicas_are_a_draw_each_in_their_order() -> None:
    """The gates are drawn when a replica is made: which thread comes first does not matter."""
    net, plain, depth = pair()
    batches = [vectors(3, seed=seed) for seed in range(3)]
    for step in range(0, 30, 3):
        net.zero_grad()
        replicas = [replica_of(net) for _ in batches]
        calls = [lambda replica=replica, x=x: replica(x) for replica, x in zip(replicas, batches, strict=True)]
        outputs = in_threads(*calls[::-1])[::-1]
        for index, (x, output) in enumerate(zip(batches, outputs, strict=True)):
            torch.testing.assert_close(output, reference.forward(plain, x, drawn(step + index)))
    assert depth.state_dict()["counter"] == 30


@pytest.mark.parametrize("training", [True, False])
def test_replicas_have_the_gates_that_are_forced_where_they_are_made(training: bool) -> None:
    net, plain, depth = pair()
    net.train(training)
    x = vectors(3)
    with depth.gates(MIXED):
        replicas = [replica_of(net) for _ in range(2)]
    outputs = in_threads(*[lambda replica=replica: replica(x) for replica in replicas])
    for output in outputs:
        torch.testing.assert_close(output, reference.forward(plain, x, MIXED))
    assert depth.state_dict()["counter"] == 0


# ---------------------------------------------------------------------------------------------- asyncio


def test_gates_forced_in_a_task_hold_for_it_only() -> None:
    net, plain, depth = pair()
    x = vectors(3)

    async def forced() -> Tensor:
        with depth.gates(CLOSED):
            await asyncio.sleep(0)
            return net(x)

    async def free() -> Tensor:
        output = net(x)
        await asyncio.sleep(0)
        return output

    async def main() -> list[Tensor]:
        return await asyncio.gather(forced(), free(), forced(), free())

    with torch.no_grad():
        outputs = asyncio.run(main())
    for output, gates in zip(outputs, (CLOSED, drawn(0), CLOSED, drawn(1)), strict=True):
        torch.testing.assert_close(output, reference.forward(plain, x, gates))


@both_forms
def test_parts_in_tasks_that_alternate(reentrant: bool) -> None:
    """Each task has a draw, and the recomputation of each half of a forward finds it."""
    net, plain, _ = pair()
    batches = [vectors(3, seed=seed).requires_grad_() for seed in range(3)]

    async def parts(x: Tensor) -> Tensor:
        h = net.stem(x)
        for part in (net.blocks[:2], net.blocks[2:]):
            h = checkpoint(part, h, use_reentrant=reentrant)
            await asyncio.sleep(0)
        return net.head(h)

    async def main() -> list[Tensor]:
        return await asyncio.gather(*map(parts, batches))

    outputs = asyncio.run(main())
    expected = copied(plain)
    for step in (1, 2, 0):
        theirs = reference.forward(expected, batches[step], drawn(step))
        torch.testing.assert_close(outputs[step], theirs)
        loss_of(theirs).backward()
        loss_of(outputs[step]).backward()
    ours = gradients(net)
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(ours[name], torch.zeros_like(ours[name]) if gradient is None else gradient)


# ---------------------------------------------------------------------------------------------- recomputations


class Checkpointed(nn.Module):
    """A network whose blocks are checkpointed."""

    def __init__(self, net: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.net.stem(x)
        for start in (0, 2):
            h = checkpoint(self.net.blocks[start : start + 2], h, use_reentrant=self.reentrant)
        return self.net.head(h)


def checkpointed(reentrant: bool, **options) -> tuple[nn.Module, nn.Module, sd.Controller]:
    plain = mlp()
    net = Checkpointed(copied(plain), reentrant)
    return net, plain, sd.make_stochastic_(net, SURVIVAL_PROBS, **options)


def assert_gradients(net: nn.Module, plain: nn.Module, x: Tensor, gates: tuple[bool, ...]) -> None:
    """Those of one forward with these gates; closed branches have zeros."""
    expected = copied(plain)
    loss_of(reference.forward(expected, x, gates)).backward()
    theirs = gradients(expected)
    ours = {name.removeprefix("net."): gradient for name, gradient in gradients(net).items()}
    filled = {name: torch.zeros_like(ours[name]) if theirs[name] is None else theirs[name] for name in theirs}
    assert_close(ours, filled)


SEVERAL_THREADS = r"^Forwards of this stochastic model ran in several threads, .* use_reentrant=False\)\.$"


@pytest.mark.parametrize("calls_root", [True, False], ids=["root", "parts"])
def test_each_step_in_a_new_thread(calls_root: bool) -> None:
    """A new thread numbers its autograd nodes from 0 again."""
    net, plain, _ = checkpointed(reentrant=False)
    losses: list[Tensor] = []

    def step(x: Tensor) -> None:
        net.zero_grad()
        losses.append(loss_of(net(x) if calls_root else nn.Module.__call__(net, x)))
        losses[-1].backward()

    for number in range(6):
        x = vectors(3, seed=number)
        in_threads(lambda x=x: step(x))
        assert_gradients(net, plain, x, drawn(number))


def test_each_step_in_a_new_thread_in_the_reentrant_form_is_refused() -> None:
    net, plain, _ = checkpointed(reentrant=True)
    x = vectors(3).requires_grad_()
    in_threads(lambda: loss_of(net(x)).backward())
    assert_gradients(net, plain, x, drawn(0))
    with pytest.raises(RuntimeError, match=SEVERAL_THREADS):
        in_threads(lambda: loss_of(net(x)).backward())


@both_forms
def test_a_backward_in_another_thread(reentrant: bool) -> None:
    """One thread makes all forwards, and another one all backwards, in another order."""
    net, plain, _ = checkpointed(reentrant)
    batches = [vectors(3, seed=seed).requires_grad_() for seed in range(3)]
    losses = in_threads(lambda: [loss_of(net(x)) for x in batches])[0]
    for index in (1, 2, 0):
        net.zero_grad()
        losses[index].backward()
        assert_gradients(net, plain, batches[index], drawn(index))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_evaluation_in_a_thread_beside_reentrant_checkpoints() -> None:
    """Without gradients it makes no nodes, and cannot be what is recomputed."""
    net, plain, _ = checkpointed(reentrant=True)

    def evaluate() -> None:
        with torch.no_grad():
            net(vectors(3))

    for step in range(0, 6, 2):
        net.zero_grad()
        x = vectors(3, seed=step).requires_grad_()
        loss = loss_of(net(x))
        in_threads(evaluate)
        loss.backward()
        assert_gradients(net, plain, x, drawn(step))


def compiled_autograd() -> AbstractContextManager[None]:
    """Its graph is run as it is: compiling it takes half a minute and changes nothing here."""
    return torch._dynamo.compiled_autograd._enable(lambda graph: graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_autograd() -> None:
    net, plain, _ = checkpointed(reentrant=False)
    batches = [vectors(3, seed=seed) for seed in range(3)]
    losses = [loss_of(net(x)) for x in batches]
    for step in (1, 2, 0):
        net.zero_grad()
        with compiled_autograd():
            losses[step].backward()
        assert_gradients(net, plain, batches[step], drawn(step))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_autograd_with_reentrant_checkpoints_is_refused() -> None:
    net, _, _ = checkpointed(reentrant=True)
    loss = loss_of(net(vectors(3).requires_grad_()))
    with pytest.raises(Exception, match="Compiled autograd does not tell which forward"), compiled_autograd():
        loss.backward()


def test_a_checkpoint_around_two_forwards_is_refused() -> None:
    net, _, depth = pair()
    x = vectors(3).requires_grad_()
    loss = checkpoint(lambda x: net(x) + net(x), x, use_reentrant=False).sum()
    assert depth.state_dict()["counter"] == 2
    with pytest.raises(RuntimeError, match=r"^An activation checkpoint around several forwards"):
        loss.backward()


def test_inspecting_what_a_checkpoint_saved() -> None:
    """It recomputes outside of a backward."""
    net, _, depth = pair()
    x = vectors(3).requires_grad_()
    segment = nn.Sequential(net.stem, net.blocks, nn.Tanh())
    output = checkpoint(segment, x, use_reentrant=False)
    with torch.no_grad():
        for _ in range(3):
            net(x)
    torch.testing.assert_close(output.grad_fn._saved_result, output)
    assert depth.state_dict()["counter"] == 4


def test_forced_gates_in_evaluation_hold_in_a_recomputation_of_foreign_blocks() -> None:
    """When the backward runs, the gates are no longer forced."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x).tanh()

    results = []
    for is_checkpointed in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(Block(), Block()).double()
        depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="train")
        net.eval()
        x = vectors(3).requires_grad_()
        with depth.gates([True, False]):
            loss = (checkpoint(net, x, use_reentrant=False) if is_checkpointed else net(x)).square().sum()
        loss.backward()
        results.append({"x": x.grad, **gradients(net)})
    assert_close(*results)


def test_a_model_evaluated_within_the_backward_of_another() -> None:
    net, plain, _ = pair()
    net(vectors(3))
    net.eval()
    seen: list[Tensor] = []
    x = vectors(3).requires_grad_()
    y = x * 2
    y.register_hook(lambda _: seen.append(net(vectors(3)).detach()))
    y.sum().backward()
    torch.testing.assert_close(seen[0], reference.evaluate(plain, vectors(3), SURVIVAL_PROBS, "eval"))


# ---------------------------------------------------------------------------------------------- scopes in scopes


class Recursive(nn.Module):
    """A root that its own forward calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, h: Tensor, times: int = 1) -> Tensor:
        return self.net.head(self.net.blocks(self(self.net.stem(h), 0) if times else h))


def test_a_root_inside_itself_is_one_pass() -> None:
    net = mlp(width=6)
    net.stem, net.head = nn.Identity(), nn.Identity()
    plain = copied(net)
    root = Recursive(net)
    depth = sd.make_stochastic_(root, SURVIVAL_PROBS)
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(8):
        inner = reference.forward(plain, x, drawn(step))
        torch.testing.assert_close(root(x), reference.forward(plain, inner, drawn(step)))
    assert depth.state_dict()["counter"] == 8
    with torch.no_grad():
        root.net.blocks(x)
    assert depth.state_dict()["counter"] == 9
    assert innermost_scope() is None


def test_another_stochastic_model_inside_of_a_forward() -> None:
    """For example a teacher that is not a child: it has its own passes, and so does the forward around it."""
    teacher, plain_teacher, _ = pair(seed=7)
    net, plain, _ = pair()
    x = vectors(3)
    seen: list[Tensor] = []
    net.blocks[2].register_forward_pre_hook(lambda *_: seen.append(teacher(x)))
    for step in range(8):
        torch.testing.assert_close(net(x), reference.forward(plain, x, drawn(step)))
        gates = [bool(count) for count in draw_counts(SURVIVAL_PROBS, 1, seed=7, counter=step)]
        torch.testing.assert_close(seen[-1], reference.forward(plain_teacher, x, gates))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
@pytest.mark.parametrize("where", ["forward", "hook before", "hook after"])
def test_a_forward_that_is_broken_off_leaves_no_state(error: type[BaseException], where: str) -> None:
    net, plain, _ = pair()

    def fail(*_: object) -> None:
        raise error

    hook = {
        "forward": net.blocks[1].register_forward_pre_hook,
        "hook before": net.register_forward_pre_hook,
        "hook after": net.register_forward_hook,
    }[where](fail)
    with pytest.raises(error):
        net(vectors(3))
    hook.remove()
    assert innermost_scope() is None
    x = vectors(3)
    with torch.no_grad():
        parts = net.head(net.blocks(net.stem(x)))
        torch.testing.assert_close(parts, reference.forward(plain, x, drawn(1)))
        torch.testing.assert_close(net(x), reference.forward(plain, x, drawn(2)))
