"""BatchNorm statistics of the evaluated network."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stochastic_depth.copies import evaluating_
from stochastic_depth.deploy.batches import arguments_of
from stochastic_depth.retrofit.apply import refuse_other_than_module
from stochastic_depth.torch_private import BatchNorm


@torch.no_grad()
def recalibrate_batchnorm_(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of BatchNorm by those of the evaluated network on some data, in place.

    In training, statistics come from random subnetworks. Evaluation runs a different network, with every branch at its
    test-time factor, and so does a `subnetwork`. Here the network runs in evaluation mode without draws or dropout, but
    each BatchNorm normalizes by the batch it sees. Running means and variances become those of all values of all
    batches together (not a mean over batches), so that only the normalization in earlier layers depends on how the data
    are divided into batches.

    Under `torch.distributed`, all ranks contribute and get the same statistics. Each rank passes its own share of the
    batches, in any number, and waits for the others once, at the end. (Each BatchNorm, including SyncBatchNorm,
    normalizes by its own rank's batch.)

    Args:
        model: the model, stochastic or plain; parameters and training modes do not change. If no BatchNorm has running
            statistics, a warning says that there is nothing to do.
        batches: tensors, tuples or lists that begin with one (the rest are labels), or mappings of arguments. A few
            hundred samples are enough for most networks.

    Raises:
        ValueError: if no rank has a batch; as after any error, the statistics are then unchanged.
        TypeError: if `batches` is a tensor, or contains something other than batches.

    Example:
        >>> import stochastic_depth as sd
        >>> net = sd.models.cifar_resnet(20)
        >>> recalibrate_batchnorm_(net, [torch.randn(8, 3, 32, 32) for _ in range(2)])
        >>> net.bn.num_batches_tracked
        tensor(2)
    """
    refuse_other_than_module(model)
    if isinstance(batches, Tensor):
        raise TypeError(f"batches must be batches, not a tensor {tuple(batches.shape)}: put it into a list, [images].")
    while isinstance(model, (DataParallel, DistributedDataParallel)):  # their forwards communicate with other ranks
        model = model.module
    layers = [each for each in model.modules() if isinstance(each, BatchNorm) and each.running_mean is not None]
    if not layers:
        warnings.warn(
            f"{type(model).__name__} has no BatchNorm with running statistics: there is nothing to recalibrate.",
            stacklevel=2,
        )
        return
    statistics = {layer: _Statistics(layer) for layer in layers}
    before = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_pre_hook(statistics[layer].see) for layer in layers]
    num_batches = 0
    try:
        evaluating_(model)
        for batch in batches:
            args, kwargs = arguments_of(batch, model)
            model(*args, **kwargs)
            num_batches += 1
        num_batches = int(_sum_over_ranks(before[0][0].new_tensor([num_batches], dtype=torch.float64)))
        if not num_batches:
            raise ValueError("batches is empty: there are no data to compute statistics from.")
        for each in statistics.values():
            each.write(num_batches)
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training


class _Statistics:
    """Number, mean and sum of squared deviations of all values that a layer has seen, per channel, in float64."""

    def __init__(self, layer: BatchNorm) -> None:
        assert layer.running_mean is not None
        self._layer = layer
        self._before = [buffer.clone() for buffer in layer.buffers()]
        self._count = 0
        self._mean = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self._deviations = torch.zeros_like(self._mean)

    def see(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook: adds a batch, and lets the layer normalize by it."""
        assert isinstance(layer, BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        x = args[0]
        dims = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dims, correction=0)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        count = x.numel() // x.shape[1]
        total = self._count + count
        # Combine two sets of values (Chan, Golub and LeVeque 1983).
        shift = mean.double() - self._mean
        self._deviations += variance.double() * count + shift.square() * (self._count * count / total)
        self._mean += shift * (count / total)
        self._count = total

    def write(self, num_batches: int) -> None:
        """Write the statistics of all ranks into the layer; a layer that saw no values stays unchanged."""
        own = self._mean.new_full((1,), self._count)
        total = _sum_over_ranks(own.clone())
        mean = _sum_over_ranks(self._mean * own) / total.clamp(min=1)
        deviations = _sum_over_ranks(self._deviations + own * (self._mean - mean).square())
        if not total:
            for buffer, value in zip(self._layer.buffers(), self._before, strict=True):
                buffer.copy_(value)
            return
        layer = self._layer
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(deviations / (total - 1).clamp(min=1))  # PyTorch's running variance is unbiased too
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(num_batches)


def _sum_over_ranks(values: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
