"""How far a trained network can be cut: error against size of the sub-networks of one or several runs, side by side."""

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd
from stochastic_depth.deploy.branches import branches_with_gates
from stochastic_depth.deploy.choice import Order, removal_order
from stochastic_depth_lab.build import reproducible
from stochastic_depth_lab.config import Experiment
from stochastic_depth_lab.data import batches
from stochastic_depth_lab.evaluation import BATCH_SIZE, evaluate
from stochastic_depth_lab.report.subnetwork_curve import Point
from stochastic_depth_lab.trained import NUM_LESION, NUM_RECALIBRATION, Trained, load_trained

_NUM_ROUNDS, _NUM_WARM_UP = 15, 3


def subnetwork_curve(
    paths: Sequence[Path],
    *,
    device: torch.device,
    data_root: Path | None = None,
    order: Order = "last",
    num_points: int = 9,
    finetune: Callable[[Experiment, nn.Module], float] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Test error, parameters, FLOPs and latency of sub-networks of several depths, for each run.

    Latency is that of one image, the median over interleaved rounds of all sub-networks (processor time on a CPU).

    Args:
        paths: the run folders.
        device: where.
        data_root: where the data lie. None: where the runs found them.
        order: which blocks go first, see `stochastic_depth.subnetwork`.
        num_points: sub-networks of each run, the whole network included.
        finetune: trains each of them on, given its experiment and network, and returns the test error in percent. See
            `stochastic_depth_lab.finetuning`.
        progress: is told of each sub-network.

    Raises:
        ValueError: in one line, if a folder holds no run with weights, or a number is too small.
    """
    if num_points < 1:
        raise ValueError(f"a curve has at least one point, but {num_points} are asked for.")
    points: list[Point] = []
    networks: list[nn.Module] = []
    example: Tensor | None = None
    for path in paths:
        run = load_trained(path, device=device, data_root=data_root)
        num_blocks = run.num_blocks
        example = run.inputs(run.images.data.test, 1)
        removal = _removal_order(run, order)
        for count in sorted({max(1, round(num_blocks * k / num_points)) for k in range(1, num_points + 1)}):
            keep = sorted(removal[num_blocks - count :])
            point, network = _point(run, keep)
            if finetune is not None:
                point = replace(point, finetuned_error=finetune(run.smaller(keep), network))
            points.append(point)
            networks.append(network)
            tuned = "" if point.finetuned_error is None else f", fine-tuned {point.finetuned_error:.2f} %"
            progress(f"{point.run}: {count} of {num_blocks} blocks, error {point.error:.2f} %{tuned}")
    assert example is not None
    return [
        replace(point, latency_ms=1000 * seconds)
        for point, seconds in zip(points, _latencies(networks, example), strict=True)
    ]


def _removal_order(run: Trained, order: Order) -> list[int]:
    """The blocks by their index, the first to be removed first."""
    network = copy.deepcopy(run.model)
    if run.depth is None:
        sd.make_stochastic_(network, sd.uniform(1.0))
    calibration = run.training_batches(NUM_LESION) if order == "lesion" else None
    return removal_order(network, branches_with_gates(network), order, calibration)


def _point(run: Trained, keep: list[int]) -> tuple[Point, nn.Module]:
    with warnings.catch_warnings():
        # That constant depth was never asked to do without a block is what the curve is about.
        warnings.filterwarnings("ignore", message=".*was not trained with stochastic depth")
        network = sd.subnetwork(run.model, keep)

    def error() -> float:
        split = run.images.data.test
        with reproducible(run.experiment.recipe):
            return evaluate(network, batches(split, BATCH_SIZE, normalisation=run.images.normalisation)).error

    plain = error()
    sd.recalibrate_batchnorm_(network, run.training_batches(NUM_RECALIBRATION))
    recalibrated = error()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(run.inputs(run.images.data.test, 1))
    return (
        Point(
            run=run.experiment.name,
            num_blocks=len(keep),
            num_parameters=sum(parameter.numel() for parameter in network.parameters()),
            flops=counter.get_total_flops(),
            latency_ms=float("nan"),
            error=plain,
            recalibrated_error=recalibrated,
        ),
        network,
    )


@torch.no_grad()
def _latencies(networks: Sequence[nn.Module], example: Tensor) -> list[float]:
    times: list[list[float]] = [[] for _ in networks]
    clock = time.perf_counter if example.is_cuda else time.process_time
    for number in range(_NUM_WARM_UP + _NUM_ROUNDS):
        for network, seen in zip(networks, times, strict=True):
            begin = clock()
            network(example)
            if example.is_cuda:
                torch.cuda.synchronize()
            if number >= _NUM_WARM_UP:
                seen.append(clock() - begin)
    return [median(seen) for seen in times]
