"""One test for each private PyTorch name in `torch_private`; these fail first when PyTorch changes one."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from stochastic_depth import torch_private as private

ROOT = Path(__file__).parents[2]
PACKAGES = ("stochastic_depth", "stochastic_depth_lab")

# Private names of PyTorch: `torch._x`, modules and names with an underscore, and attributes of its objects.
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._(?!_)|from torch[\w.]*\._|from torch[\w.]* import _|functorch"
    r"|\._(version|sequence_nr|cdata|call_impl|compiled_call_impl|orig_mod|overloadpacket|parameters|buffers|modules"
    r"|(forward|backward)(_pre)?_hooks)\b|\"_orig_mod\"\)"
)
OWN = re.compile(r"self\._version|current\.version|child_dict\(module\)\.get")


def test_no_other_module_uses_a_private_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "torch_private.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PRIVATE.search(line.partition("#")[0]) and not OWN.search(line)
    ]
    assert not found, "\n".join(found)


def test_every_name_has_a_test_here() -> None:
    source = (ROOT / "stochastic_depth" / "torch_private.py").read_text()
    names = re.findall(r"^(?:def |class )?([A-Za-z]\w*)(?:\(.*|:.*| = .*)$", source, re.M)
    assert len(names) > 30
    tested = Path(__file__).read_text()
    assert not [name for name in names if not re.search(rf"\bprivate\.{name}\b", tested)]


# ---------------------------------------------------------------------------------------------- the autograd graph


class Watched(torch.autograd.Function):
    seen: list[tuple[private.Node | None, int]]

    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: object, grad: Tensor) -> Tensor:
        Watched.seen.append((private.evaluated_node(), private.graph_task()))
        return grad


def test_evaluated_node_and_graph_task() -> None:
    Watched.seen = []
    assert (private.evaluated_node(), private.graph_task()) == (None, -1)
    y = Watched.apply(torch.ones(2, requires_grad=True))
    y.sum().backward()
    ((node, task),) = Watched.seen
    assert node.name() == "WatchedBackward"
    assert private.number_of(node) == private.number_of(y.grad_fn)
    assert task >= 0
    assert private.graph_task() == -1


def test_number_of_and_next_node_count_the_nodes_of_a_thread() -> None:
    x = torch.ones(2, requires_grad=True)
    before = private.next_node()
    y = x * 2
    z = y + 1
    assert [private.number_of(y.grad_fn), private.number_of(z.grad_fn), private.next_node()] == [
        before,
        before + 1,
        before + 2,
    ]
    own: list[int] = []
    thread = threading.Thread(target=lambda: own.append(private.next_node()))
    thread.start()
    thread.join()
    assert own == [0]


def test_is_reentrant_checkpoint() -> None:
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(torch.sin, x, use_reentrant=True)
    node: private.Node = y.grad_fn
    assert private.is_reentrant_checkpoint(node)
    assert not private.is_reentrant_checkpoint(x.sin().grad_fn)


def test_keeps_its_result() -> None:
    x = torch.ones(2, requires_grad=True)
    assert private.keeps_its_result(x.relu())
    assert private.keeps_its_result(x.exp())
    assert not private.keeps_its_result(x.sin())
    assert not private.keeps_its_result(x)


@pytest.mark.parametrize("is_input_from_tokens", [False, True])
def test_mend_gradients_of_batch_norms(*, is_input_from_tokens: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 1, 8, 4, 3, generator=generator, dtype=torch.float64)
    from_tokens = [each.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view_as(each) for each in (x, grad)]
    weight = torch.ones(8, dtype=torch.float64, requires_grad=True)
    y = F.batch_norm(from_tokens[0] if is_input_from_tokens else x, None, None, weight, training=True)
    private.mend_gradients_of_batch_norms(y.exp().log(), [x])
    y.backward(grad if is_input_from_tokens else from_tokens[1])
    normalized = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(weight.grad, (grad * normalized).sum((0, 2, 3)))


def test_version_of() -> None:
    x = torch.zeros(3)
    assert private.version_of(x) == 0
    x[:2].add_(1)
    assert private.version_of(x) == 1, "a change through a view counts"


def test_base_of() -> None:
    x = torch.zeros(3)
    assert private.base_of(x) is None
    assert private.base_of(x[:2].view(2, 1)) is x


class Double(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ARG004
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def test_apply_and_transforms_are_active() -> None:
    x = torch.arange(3.0, requires_grad=True)
    y = private.apply(Double, x, 2.0)
    y.sum().backward()
    assert y.tolist() == [0, 2, 4]
    assert x.grad.tolist() == [2, 2, 2]
    assert not private.transforms_are_active()
    seen: list[bool] = []

    def summed(x: Tensor) -> Tensor:
        seen.append(private.transforms_are_active())
        return private.apply(Double, x, 2.0).sum()

    assert torch.func.grad(summed)(torch.ones(2)).tolist() == [2, 2]
    assert seen == [True]


# ---------------------------------------------------------------------------------------------- saved tensors


def test_top_saved_tensors_hooks_and_saves_as_usual() -> None:
    def pack(tensor: Tensor) -> Tensor:
        return tensor

    assert private.top_saved_tensors_hooks(True) is None
    assert private.saves_as_usual()
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert private.top_saved_tensors_hooks(True) == (pack, pack)
        assert not private.saves_as_usual()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not private.saves_as_usual()


def test_checkpoints_are_found_in_their_forward_and_in_their_recomputation() -> None:
    inner: list[private.Checkpoint | None] = []
    running: list[list[private.Checkpoint]] = []

    def function(x: Tensor) -> Tensor:
        inner.append(private.innermost_checkpoint())
        with torch.autograd.graph.save_on_cpu():  # other hooks
            running.append(private.running_checkpoints())
            assert private.innermost_checkpoint() is None
        return x.sin().cos()

    x = torch.ones(2, requires_grad=True)
    assert private.innermost_checkpoint() is None
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert [each.repeats for each in inner] == [False, True]
    assert inner[0].frame is inner[1].frame
    assert running == [[inner[0]], [inner[1]]]
    assert private.running_checkpoints() == []


def test_end_of_recomputation() -> None:
    ends: list[type[BaseException]] = []

    def function(x: Tensor) -> Tensor:
        try:
            return x.sin().cos()
        except BaseException as error:
            ends.append(type(error))
            raise

    x = torch.ones(2, requires_grad=True)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert ends == [private.EndOfRecomputation]


# ---------------------------------------------------------------------------------------------- compilers, modes


def test_outside_compiler_and_compiler_of_frames() -> None:
    compiling: list[bool] = []
    compilers: list[object] = []

    def inside(x: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        compilers.append(private.compiler_of_frames())
        return x + 1

    outside = private.outside_compiler(inside, recursive=True)
    assert private.compiler_of_frames() is None
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: outside(x * 2) * 3, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [9, 9]
    assert compiling == [False]
    called: list[object] = []
    shallow = private.outside_compiler(lambda x: called.append(private.compiler_of_frames()) or x, recursive=False)
    torch.compile(lambda x: shallow(x) + 1, backend="eager")(torch.ones(2))
    assert called[0] is not None, "what it calls is compiled"
    torch._dynamo.reset()


def test_is_compiled_and_is_compiled_wrapper() -> None:
    plain, in_place = nn.Linear(2, 2), nn.Linear(2, 2)
    in_place.compile(backend="eager")
    wrapper = torch.compile(plain, backend="eager")
    assert [private.is_compiled(module) for module in (plain, in_place, wrapper)] == [False, True, True]
    assert [private.is_compiled_wrapper(module) for module in (plain, in_place, wrapper)] == [False, False, True]
    assert private.child_dict(wrapper) == {"_orig_mod": plain}


def test_modes_see_operations_except_under_disable_current_modes() -> None:
    class Seen(private.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    assert private.current_dispatch_mode() is None
    with Seen() as seen:
        assert private.current_dispatch_mode() is seen
        torch.ones(2).sin()
        with private.disable_current_modes():
            torch.ones(2).cos()
    assert seen.names == ["aten.ones", "aten.sin"]


def test_without_torch_function() -> None:
    class Zeros(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {})) * 0

    with Zeros():
        replaced = torch.ones(2)
        with private.without_torch_function():
            own = torch.ones(2)
    assert (replaced.tolist(), own.tolist()) == ([0, 0], [1, 1])


def test_without_parametrizations_cached() -> None:
    layer = weight_norm(nn.Linear(2, 3))
    with parametrize.cached():
        cached = layer.weight
        with private.without_parametrizations_cached():
            anew = layer.weight
            assert anew is not cached
            assert layer.weight is not anew
        assert layer.weight is cached
    assert layer.weight is not cached


def test_outside_transforms_and_is_transformed() -> None:
    inside: list[tuple[bool, bool]] = []

    def function(x: Tensor) -> Tensor:
        with private.outside_transforms():
            inside.append((private.is_transformed(x), private.transforms_are_active()))
        assert private.transforms_are_active()
        return x.sin()

    torch.func.vmap(function)(torch.ones(2, 3))
    assert inside == [(True, False)]
    assert not private.is_transformed(torch.ones(2))
    with private.outside_transforms():
        assert not private.transforms_are_active()


def test_is_fake() -> None:
    seen: list[bool] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        seen.append(private.is_fake(mode.from_tensor(torch.ones(2))))
    assert seen == [True]
    assert not private.is_fake(torch.ones(2))
    exported = torch.export.export(Looks(), (torch.ones(2),))
    values = [node.meta["val"] for node in exported.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert all(private.is_fake(value) for value in values)


# ---------------------------------------------------------------------------------------------- modules


def test_the_dictionaries_of_a_module() -> None:
    shared = nn.ReLU()
    net = nn.Sequential(OrderedDict(a=shared, norm=nn.BatchNorm1d(2, affine=False), b=shared, none=None))
    assert private.child_dict(net) == {"a": shared, "norm": net.norm, "b": shared, "none": None}
    assert dict(net.named_children()).keys() == {"a", "norm"}, "what the public iterator passes over"
    linear = nn.Linear(2, 2, bias=False)
    assert private.parameter_dict(linear) == {"weight": linear.weight, "bias": None}
    weight = nn.Parameter(torch.zeros(2, 2))
    private.parameter_dict(linear)["weight"] = weight
    assert linear.weight is weight
    assert private.buffer_dict(net.norm).keys() == {"running_mean", "running_var", "num_batches_tracked"}
    assert set(private.TENSORS_AND_CHILDREN) <= vars(nn.Module()).keys()
    assert [vars(linear)[name] for name in private.TENSORS_AND_CHILDREN] == [private.parameter_dict(linear), {}, {}]


def test_every_attribute_of_a_plain_module_is_known() -> None:
    linear = nn.Linear(2, 2)
    assert vars(linear).keys() - private.MODULE_ATTRIBUTES == {"in_features", "out_features"}
    linear.compile(backend="eager")
    assert vars(linear).keys() - private.MODULE_ATTRIBUTES == {"in_features", "out_features"}
    hooks = {name for name in vars(nn.Module()) if "hooks" in name and "state_dict" not in name}
    assert set(private.HOOKS) == hooks


REGISTER = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_are_seen(kind: str) -> None:
    module = nn.Linear(2, 2)
    assert not any(private.hooks_of(module))
    assert not private.has_forward_hooks(module)
    handle = REGISTER[kind](module)
    assert sum(map(len, private.hooks_of(module))) == 1
    assert private.has_forward_hooks(module) == kind.startswith("forward")
    assert len(private.pre_hook_dict(module)) == (kind == "forward pre")
    handle.remove()
    assert not any(private.hooks_of(module))


def test_a_call_with_own_hooks_equals_a_plain_call() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    module.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)
    module.register_forward_hook(lambda _, _args, output: output * 2)
    module.register_forward_hook(lambda _, _args, kwargs, output: output + len(kwargs), with_kwargs=True)
    x = torch.randn(3, 2)
    assert torch.equal(private.call_with_own_hooks(module, lambda: None, x), module(x))
    of_process: list[object] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: of_process.append(1))
    try:
        private.call_with_own_hooks(module, lambda: None, x)
        assert not of_process
    finally:
        handle.remove()


def test_call_instead() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: pytest.fail("the hooks are not run"))
    private.call_instead(module, lambda x: x + 1)
    assert module(torch.zeros(2)).tolist() == [1, 1]


def test_classes_of_norms() -> None:
    for kind in (nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d):
        assert issubclass(kind, private.BatchNorm)
        assert issubclass(kind, private.RunningNorm)
    for kind in (nn.InstanceNorm1d, nn.InstanceNorm3d):
        assert issubclass(kind, private.InstanceNorm)
        assert issubclass(kind, private.RunningNorm)
        assert not issubclass(kind, private.BatchNorm)
    assert not issubclass(nn.GroupNorm, private.RunningNorm)


# ---------------------------------------------------------------------------------------------- tensors and structures


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storage_number(device: str) -> None:
    x, y = torch.empty(4, device=device), torch.empty(4, device=device)
    assert private.storage_number(x) == private.storage_number(x[1:].view(3, 1))
    assert private.storage_number(x) != private.storage_number(y)


def test_foreach() -> None:
    tensors = [torch.ones(2), torch.ones(3, 2)]
    private.foreach_copy_(tensors, [torch.full((2,), 2.0), torch.full((3, 2), 3.0)])
    assert [each.unique().tolist() for each in tensors] == [[2], [3]]
    private.foreach_zero_(tensors)
    assert not any(each.any() for each in tensors)


def test_trees() -> None:
    tree = {"a": [1, (2.5, None)], "b": OrderedDict(c=torch.ones(1))}
    leaves, form = private.tree_flatten(tree)
    assert leaves == private.tree_leaves(tree) == [1, 2.5, None, torch.ones(1)]
    assert private.tree_unflatten(leaves, form) == tree
    assert private.tree_map(str, [1, (2,)]) == ["1", ("2",)]
    assert private.tree_map_only(int, lambda value: value + 1, [1, ("x", 2)]) == [2, ("x", 3)]


def test_assert_in_graph_is_recorded() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(private.assert_in_graph, (x, "too small"))
    graph.output(x)
    module = fx.GraphModule(nn.Module(), graph)
    assert module(True) is True
    with pytest.raises(AssertionError, match="too small"):
        module(False)


# ---------------------------------------------------------------------------------------------- many processes


def test_keys_of_fsdp_and_running_ddp(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    seen: list[object] = []

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(private.running_ddp())
            return F.linear(x, self.weight)

    plain = set(vars(Looks(2, 2)))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(Looks(2, 2))
        wrapper(torch.ones(1, 2))
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = fully_shard(Looks(2, 2), mesh=mesh)
        assert set(private.keys_of_fsdp()) <= set(vars(sharded)) - plain
    finally:
        dist.destroy_process_group()
    assert seen == [wrapper]
    assert private.running_ddp() is None


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_is_traced_and_is_mapped() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    seen: list[tuple[bool, bool]] = []

    def note(x: Tensor) -> Tensor:
        seen.append((private.is_traced(), private.is_mapped()))
        return x + 1

    x = torch.ones(2)
    note(x)
    make_fx(note)(x)
    torch.jit.trace(note, x, check_trace=False)
    torch.vmap(note)(x)
    torch.func.grad(lambda value: note(value).sum())(x)
    assert seen == [(False, False), (True, False), (True, False), (False, True), (False, False)]


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_outside_trace() -> None:
    sizes: list[list[type]] = []

    def note(x: Tensor) -> Tensor:
        with private.outside_trace():
            sizes.append([type(size) for size in x.shape])
        return x + x.shape[0]

    traced = torch.jit.trace(note, torch.ones(2), check_trace=False)
    assert sizes == [[int]]
    assert torch.equal(traced(torch.ones(3)), torch.full((3,), 4.0))  # the rest is traced as before
