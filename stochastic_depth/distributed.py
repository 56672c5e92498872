"""One communication unit per branch, on PyTorch's own FSDP2: a dropped branch is neither gathered nor reduced."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stochastic_depth.compiling import eager
from stochastic_depth.gate_draws import GateDraws
from stochastic_depth.residual import Residual
from stochastic_depth.retrofit import Controller, controller
from stochastic_depth.retrofit.finding.branches import Branch
from stochastic_depth.retrofit.rewriting.sums import BranchParts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy


def shard_(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    check_gates: bool = False,
) -> FSDPModule:
    """Shard a stochastic model over processes, in place, with one FSDP2 unit per branch and one for the rest.

    FSDP2 gathers a unit's parameters before it runs and reduces its gradients after its backward. A branch whose gate
    is closed does not run, so nothing of it is sent. A step sends exactly the open branches and the rest: the layers
    outside all branches, single parameters of a block of another library (LayerScale's gains in some models), modules
    that a branch shares with something else, and masked branches.

    Args:
        model: made stochastic with `ranks="agree"`. Afterward, use, save and clip it like any model under
            `torch.distributed.fsdp.fully_shard`. Create the optimizer after this call.
        mesh: one dimension: parameters, gradients and optimizer states are sharded over it. Two dimensions: replicated
            over the first and sharded over the second; (N, 1) is pure replication, like DistributedDataParallel, and
            still saves the reductions of dropped branches.
        reshard_after_forward: see `fully_shard`; False keeps a branch's parameters gathered until its backward.
        mp_policy: mixed precision, see `fully_shard`.
        offload_policy: parameters on the CPU, see `fully_shard`.
        check_gates: in each training step, compare between ranks what determines the gates, with one reduction of 16
            bytes, which waits for the device. Ranks that disagree would silently compute wrong gradients.

    Returns:
        The model, which is an `FSDPModule` now.

    Raises:
        ValueError: if the model is not stochastic, its gates differ between ranks, or it is wrapped or sharded already.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard  # takes a second to import

    depth = controller(model)
    _refuse(model, depth, FSDPModule)
    policies = {"mp_policy": mp_policy, "offload_policy": offload_policy}
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        **{name: policy for name, policy in policies.items() if policy is not None},
    }
    for unit in _units(model, depth):
        fully_shard(unit if len(unit) > 1 else unit[0], **options)
    if check_gates:
        model.register_forward_pre_hook(_GateCheck(depth.passes, mesh), prepend=True)
    return fully_shard(model, **options)


def _refuse(model: nn.Module, depth: Controller, sharded: type) -> None:
    if depth.passes.ranks == "decorrelate":
        raise ValueError(
            "shard_ needs the same gates on every rank, but the model was made stochastic with ranks='decorrelate'. "
            "Ranks would gather different branches at the same time and compute wrong numbers without an error. "
            "Use ranks='agree'."
        )
    for name, module in model.named_modules():
        if isinstance(module, sharded):
            raise ValueError(f"The model is already sharded ({name or 'its root'}): call shard_ once, instead of it.")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError("The model is wrapped in DistributedDataParallel, which shard_ replaces: unwrap it.")


def _units(model: nn.Module, depth: Controller) -> list[list[nn.Module]]:
    """For each branch, the modules that it calls and that hold its own parameters; inner branches before outer ones.

    Parameters that other code uses too must be available when the branch is closed, so they stay with the rest.
    """
    holders: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, set()).add(module)
    units: dict[frozenset[nn.Module], list[nn.Module]] = {}
    owners: dict[frozenset[nn.Module], set[nn.Module]] = {}
    for branch in depth.branches:
        called = [] if branch.treatment == "mask" else _called(branch)
        inside = frozenset(part for module in called for part in module.modules())
        if called and all(holders[parameter] <= inside for module in called for parameter in module.parameters()):
            units[inside] = called  # branches that share all of their modules are one unit
            owners.setdefault(inside, set()).add(branch.module)
    own = [
        inside
        for inside, called in sorted(units.items(), key=lambda item: len(item[0]))
        if not inside & _reachable_without(model, owners[inside], called)
    ]
    return [units[inside] for inside in own]


def _reachable_without(model: nn.Module, owners: set[nn.Module], called: list[nn.Module]) -> set[nn.Module]:
    """The modules that can be reached from the root without passing through a branch of the owners."""
    reached: set[tuple[nn.Module, bool]] = set()
    pending = [(model, model in owners)]
    while pending:
        module, owned = pending.pop()
        if (module, owned) in reached:
            continue
        reached.add((module, owned))
        for name, child in module.named_children():
            if isinstance(module, Residual):
                branch = module in owners and name == "branch"
            else:
                branch = owned and child in called
            if not branch:
                pending.append((child, owned or child in owners))
    return {module for module, _ in reached}


def _called(branch: Branch) -> list[nn.Module]:
    """The modules with parameters that a branch calls; a branch may need several."""
    if isinstance(branch.parts, BranchParts):
        called = list(branch.parts.members)
    elif branch.kind == "layer":
        # The gate is inside the layer's call: a unit of the layer itself would be gathered before its gate is known.
        called = list(branch.parts.children())
    else:
        called = [branch.parts]
    # A list of modules is not called itself.
    while any(isinstance(module, (nn.ModuleList, nn.ModuleDict)) for module in called):
        called = [
            inner
            for module in called
            for inner in (module.children() if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else [module])
        ]
    return [module for module in called if any(True for _ in module.parameters())]


class _GateCheck:
    """Forward pre-hook that compares between ranks what determines the gates of a training step."""

    def __init__(self, draws: GateDraws, mesh: DeviceMesh) -> None:
        self._draws = draws
        self._mesh = mesh

    @eager
    def __call__(self, root: nn.Module, _args: Any) -> None:
        draws = self._draws
        if not root.training and draws.forced is None:
            return
        forced = draws.forced and tuple(gate if isinstance(gate, bool) else bool(gate.any()) for gate in draws.forced)
        # The root's call has begun, so its draw has been made.
        counter = draws.counter - 1 if forced is None else draws.counter
        decides = (draws.seed, counter, draws.survival_probs, draws.costs, draws.granularity, draws.draw)
        digest = hashlib.sha256(repr((*decides, forced, root.training)).encode()).digest()
        number = int.from_bytes(digest[:7], "big")
        extremes = torch.tensor([number, -number], device=self._mesh.device_type)
        for dim in range(self._mesh.ndim):
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._mesh.get_group(dim))
        largest, smallest = extremes.tolist()
        if largest != -smallest:
            raise RuntimeError(
                f"The ranks do not agree on their gates (here: seed {draws.seed}, draw {counter}). Every rank "
                "must make the same forwards in training mode, with the same survival probabilities, forced gates and "
                "restored state; was a controller's state loaded on some ranks only?"
            )
