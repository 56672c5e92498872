"""Refuses combinations with several ranks that would hang, fail obscurely or compute wrong numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stochastic_depth.compiling import eager
from stochastic_depth.gate_draws import GateDraws, has_several_ranks
from stochastic_depth.residual import SkippedGrad
from stochastic_depth.torch_private import running_ddp


@eager
def refuse_unsound(draws: GateDraws, skipped_grad: SkippedGrad, parts: Sequence[nn.Module]) -> None:
    """Check a forward in training mode before it begins; with a single process this costs nothing.

    Args:
        draws: draws of the model.
        skipped_grad: gradients of the parameters of a branch that did not run.
        parts: for each branch, the module that holds its parameters.

    Raises:
        RuntimeError: if DistributedDataParallel would wait for gradients that never come, or SyncBatchNorm for ranks.
    """
    if draws.ranks == "decorrelate" and draws.granularity == "batch" and has_several_ranks():
        for name, part in zip(draws.names, parts, strict=True):
            if any(isinstance(module, nn.SyncBatchNorm) and module.training for module in part.modules()):
                raise RuntimeError(
                    f"The branch {name} holds a SyncBatchNorm, which waits for every rank, but with "
                    "ranks='decorrelate' its gate is open on some ranks only: training would hang. Use ranks='agree', "
                    "or plain BatchNorm."
                )
    # The model does not see its wrapper; PyTorch records which one is running.
    wrapper = running_ddp()
    if wrapper is None or not torch.is_grad_enabled():
        return
    if wrapper.static_graph:
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) assumes that every step uses the parameters in the same way, "
            "but gates change that; with no_sync it fails inside PyTorch. Leave static_graph at False."
        )
    if skipped_grad == "none" and not wrapper.find_unused_parameters:
        raise RuntimeError(
            "DistributedDataParallel waits for a gradient of every parameter, but with skipped_grad='none' those of a "
            "closed branch get none. Use make_stochastic_(..., skipped_grad='zero'), which needs no other change; "
            "or keep 'none' with DistributedDataParallel(..., find_unused_parameters=True) or shard_(model, mesh)."
        )
