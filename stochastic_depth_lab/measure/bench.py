"""The `bench` command: what skipping saves on this machine, relative to constant depth."""

from __future__ import annotations

import copy
import functools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import stochastic_depth as sd

_WIDTH = 12


@dataclass(frozen=True)
class Measured:
    """The measurement of one method.

    Attributes:
        name: name of the method.
        ratio: median over the rounds of its step's time over that of constant depth.
        expected_flops: share of the training FLOPs of constant depth that it executes on average.
        expected_time: share of the time of constant depth that would be left if closed branches took none.
    """

    name: str
    ratio: float
    """Time of a step relative to constant depth, the median over the rounds."""
    expected_flops: float
    expected_time: float


def bench(
    *, num_layers: int, batch_size: int, final_survival_prob: float, rounds: int, device: torch.device
) -> list[Measured]:
    """Measure a training step of the paper's network in interleaved rounds, which is robust on a busy machine.

    Args:
        num_layers: 6n + 2.
        batch_size: number of images in a step, 32x32, random.
        final_survival_prob: p_L of the linear decay.
        rounds: number of rounds; each takes every step once.
        device: where to train. On a CPU process time counts, elsewhere the time until the device has finished.

    Raises:
        ValueError: if there is no round or no image, or the library refuses the network or its schedule.
    """
    if rounds < 1 or batch_size < 1:
        raise ValueError(f"bench needs at least one round and one image, but has {rounds} and {batch_size}.")
    torch.manual_seed(0)
    plain = sd.models.cifar_resnet(num_layers).to(device)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    steps = {"constant depth": _step_of(plain, images, labels)}
    expected = {"constant depth": (1.0, 1.0)}
    cost = sd.make_stochastic_(copy.deepcopy(plain), sd.uniform(1.0)).cost(images, measure=True)
    ways: tuple[tuple[str, sd.Schedule, Literal["batch", "sample"]], ...] = (
        ("all gates open", sd.uniform(1.0), "batch"),
        ("granularity batch", sd.linear_decay(final_survival_prob), "batch"),
        ("granularity sample", sd.linear_decay(final_survival_prob), "sample"),
    )
    for name, schedule, granularity in ways:
        net = copy.deepcopy(plain)
        depth = sd.make_stochastic_(net, schedule, granularity=granularity)
        expected[name] = cost.share(depth.survival_probs), cost.share_of_time(depth.survival_probs) or 0.0
        steps[name] = _step_of(net, images, labels)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            times[name].append(_time_of(step, device))
    plain_times = times["constant depth"][1:]  # The first round warms up.
    return [
        Measured(name, statistics.median(a / b for a, b in zip(values[1:], plain_times, strict=True)), *expected[name])
        for name, values in times.items()
    ]


def bench_text(measured: list[Measured], device: torch.device, rounds: int) -> str:
    """The measurements as a bar chart of characters."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    longest = max(1.0, *(one.ratio for one in measured))
    lines = [
        f"{one.name:<18} {'█' * round(_WIDTH * one.ratio / longest):<{_WIDTH}} {one.ratio:.3f} "
        f"(expected {one.expected_flops:.3f} of FLOPs, {one.expected_time:.3f} of time)"
        for one in measured
    ]
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    lines += [
        "time of a training step of constant depth; expected if closed branches take none",
        f"medians of {rounds} interleaved rounds; {processor}, {threads}, PyTorch {torch.__version__}",
    ]
    return "\n".join(lines)


def _step_of(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return functools.partial(_step, net, optimizer, images, labels)


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()


def _time_of(step: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.process_time()
        step()
        return time.process_time() - begin
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin
