"""Error against size of the subnetworks of one or several runs."""

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
from stochastic_depth_lab.after.trained import NUM_LESION, NUM_RECALIBRATION, Trained, load_trained
from stochastic_depth_lab.experiments.config import Experiment, Order
from stochastic_depth_lab.report.subnetwork_curve import Point
from stochastic_depth_lab.training.evaluation import evaluate_part
from stochastic_depth_lab.training.setup import reproducible

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
    """Test error, parameters, FLOPs and latency of subnetworks of several depths, for each run.

    Latency is that of one image: the median over interleaved rounds of all subnetworks (process time on a CPU).

    Args:
        paths: the run folders.
        device: where to compute.
        data_root: folder of the data sets. None: where the runs found them.
        order: which blocks to remove first, see `stochastic_depth.subnetwork`.
        num_points: number of subnetworks per run, including the whole network.
        finetune: continues training a subnetwork, given its experiment and network, and returns the test error in
            percent, see `after.finetuning`.
        progress: receives messages.

    Raises:
        ValueError: in one line, if a folder holds no run with weights, or a number is too small.
    """
    if num_points < 1:
        raise ValueError(f"--points must be at least 1, but is {num_points}.")
    points: list[Point] = []
    networks: list[nn.Module] = []
    example: Tensor | None = None
    for path in paths:
        run = load_trained(path, device=device, data_root=data_root)
        num_blocks = run.num_blocks
        example = run.inputs(run.images.data.test, 1)
        calibration = run.training_batches(NUM_LESION) if order == "lesion" else None
        ranking = sd.branches_to_keep(run.model, num_blocks=num_blocks, order=order, calibration=calibration)
        for count in sorted({max(1, round(num_blocks * k / num_points)) for k in range(1, num_points + 1)}):
            keep = sorted(ranking[:count])
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


def _point(run: Trained, keep: list[int]) -> tuple[Point, nn.Module]:
    with warnings.catch_warnings():
        # The curve shows constant depth without blocks too.
        warnings.filterwarnings("ignore", message=".*was not trained with stochastic depth")
        network = sd.subnetwork(run.model, keep)

    with reproducible(run.experiment.recipe):
        plain = evaluate_part(network, run.images, run.images.data.test).error
    sd.recalibrate_batchnorm_(network, run.training_batches(NUM_RECALIBRATION))
    with reproducible(run.experiment.recipe):
        recalibrated = evaluate_part(network, run.images, run.images.data.test).error
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
