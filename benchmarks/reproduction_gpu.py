"""All figures on a GPU, in pieces of at most nine minutes, into one JSON file.

    python benchmarks/reproduction_gpu.py --out gpu.json --data-root FOLDER [--minutes 8.5]

Measures the pieces that the file does not hold yet, as far as the minutes go; the same command goes on, also with the
500 epochs of the paper's CIFAR-10 run, which stop and resume. Exit code 0: all is there; 75: run it again.

- `floor`: bytes and FLOPs of a step of ResNet-110, counted without a device, and the least time that they can take.
- `steps`: that step at constant and stochastic depth, with and without CUDA graphs: time, launches, memory.
- `deep`: 1202 layers.
- `vit`: timm's ViT-L/16, its own drop path at a uniform rate of 0.4, and the same rate really skipped.
- `gathers`: half of the samples taken and added back, at random places and as one window.
- `run`: CIFAR-10, ResNet-110, stochastic depth, the paper's recipe; with --constant, constant depth too.
- `compiled`: the step of `steps` with compiled branches, without and with graphs.
"""

from __future__ import annotations

import sys
from pathlib import Path

# On a machine where nothing can be installed the packages are those of the repository.
sys.path.append(str(Path(__file__).parents[1]))

import torchvision_schemas  # noqa: F401

# isort: split
import argparse
import functools
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from protocol import shuffled_rounds
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd
from stochastic_depth.samples import add_samples, take_and_carry
from stochastic_depth_lab.experiments import find
from stochastic_depth_lab.experiments.config import Experiment, quick
from stochastic_depth_lab.training import loop
from stochastic_depth_lab.training.progress import Lines

AGAIN = 75  # EX_TEMPFAIL
H200 = {"bytes_per_s": 4.8e12, "bf16_flops_per_s": 989e12}


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        layers: of the paper's network.
        deep_layers: of its deepest one.
        batch_size: images in its step.
        vit: timm's name of the transformer, its image size and batch.
        rounds: interleaved rounds, each of `steps` steps.
        steps: of one variant in a round.
        experiment: name of the laboratory's pair.
    """

    layers: int
    deep_layers: int
    batch_size: int
    vit: tuple[str, int, int]
    rounds: int
    steps: int
    experiment: str


FULL = Scale(110, 1202, 128, ("vit_large_patch16_224", 224, 64), 7, 20, "cifar10-110")
TINY = Scale(8, 14, 4, ("vit_tiny_patch16_224", 32, 2), 2, 1, "digits")
LEAST_MINUTES = {"floor": 0.5, "steps": 3.0, "vit": 2.0, "deep": 4.0, "gathers": 0.5, "compiled": 5.0}
"""A piece is begun only if the call has so much time left."""


class TrafficMode(TorchDispatchMode):
    """Adds up the bytes that operations read and write, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket not in (torch.ops.aten.detach, torch.ops.aten.empty_like):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return output


def paper_network(layers: int, device: torch.device) -> nn.Module:
    """The paper's CIFAR network."""
    torch.manual_seed(0)
    return sd.models.cifar_resnet(layers).to(device).to(memory_format=torch.channels_last)


def train_step(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One step, in mixed precision with bf16."""
    optimiser.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimiser.step()


def step_of(model: nn.Module, images: Tensor, num_classes: int = 10) -> Callable[[], None]:
    """A step of the paper's optimiser."""
    optimiser = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=images.is_cuda
    )
    labels = torch.randint(num_classes, (images.shape[0],), device=images.device)
    return functools.partial(train_step, model, optimiser, images, labels)


def synchronise(device: torch.device) -> None:
    """Wait for what the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(variants: Mapping[str, Callable[[], None]], device: torch.device, scale: Scale) -> dict[str, Any]:
    """Milliseconds of a step of each variant, median over interleaved rounds, and its ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in variants.values():
        for _ in range(3 * scale.steps):  # the rarer of two numbers of samples is recorded before it is timed
            step()
    for name in shuffled_rounds(variants, rounds=scale.rounds):
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(scale.steps):
            variants[name]()
        synchronise(device)
        times[name].append((time.perf_counter() - begin) / scale.steps * 1e3)
    first = next(iter(times.values()))
    return {
        name: {
            "ms": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, first, strict=True)),
            "rounds_ms": values,
        }
        for name, values in times.items()
    }


def peak_bytes(step: Callable[[], None], device: torch.device, num_steps: int) -> int | None:
    """Most bytes that the process takes from the device during some steps; None where the device does not tell.

    Reserved, not allocated: what a graph computes in counts as free between its replays, and nothing else can have it.
    """
    if device.type != "cuda":
        return None
    gc.collect()  # a stochastic model refers to itself: others may still be there
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(num_steps):
        step()
    return torch.cuda.max_memory_reserved(device)


def launches(step: Callable[[], None]) -> int:
    """How many kernels, copies and graphs a step asks the GPU for."""
    with torch.profiler.profile() as profile:
        step()
    asks = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(asks))


def floor(scale: Scale, _device: torch.device) -> dict[str, Any]:
    """Bytes and FLOPs of a step at constant depth and what one step leaves of them, and the time that they need."""
    result: dict[str, Any] = {"peak": H200}
    for name in ("constant", "stochastic"):
        model = sd.models.cifar_resnet(scale.layers).bfloat16().to("meta").to(memory_format=torch.channels_last)
        if name == "stochastic":
            sd.make_stochastic_(model, sd.linear_decay(0.5), draw="equal_cost")
        images = torch.empty(scale.batch_size, 3, 32, 32, dtype=torch.bfloat16, device="meta")
        labels = torch.empty(scale.batch_size, dtype=torch.int64, device="meta")
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
        with TrafficMode() as traffic, FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(images), labels).backward()
            optimiser.step()
        seconds = (traffic.num_bytes / H200["bytes_per_s"], counter.get_total_flops() / H200["bf16_flops_per_s"])
        result[name] = {
            "bytes": traffic.num_bytes,
            "flops": counter.get_total_flops(),
            "least_ms": 1e3 * max(seconds),
        }
    return result


def make_stochastic(model: nn.Module, depth: str) -> sd.Controller:
    """Linear decay to 0.5 per "batch" or "sample"; at "constant" depth every gate is open."""
    schedule = sd.uniform(1.0) if depth == "constant" else sd.linear_decay(0.5)
    granularity = "sample" if depth == "sample" else "batch"
    return sd.make_stochastic_(model, schedule, granularity=granularity, draw="equal_cost")


def steps(scale: Scale, device: torch.device) -> dict[str, Any]:
    """A step at constant and stochastic depth, with and without graphs: time, launches, memory."""
    images = torch.randn(scale.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)

    def make(depth: str, graphs: bool) -> Callable[[], None]:
        model = paper_network(scale.layers, device)
        if depth != "constant" or graphs:
            controller = make_stochastic(model, depth)
            if graphs:
                controller.capture()
        return step_of(model, images)

    kinds = [
        (depth, graphs)
        for depth in ("constant", "batch", "sample")
        for graphs in ((False, True) if device.type == "cuda" else (False,))
    ]
    names = {kind: f"{kind[0]} depth{', graphs' if kind[1] else ''}" for kind in kinds}
    peaks = {name: peak_bytes(make(*kind), device, scale.steps) for kind, name in names.items()}
    variants = {name: make(*kind) for kind, name in names.items()}
    measured = measure(variants, device, scale)
    for name, step in variants.items():
        constant = measured["constant depth, graphs" if name.endswith("graphs") else "constant depth"]["rounds_ms"]
        of_same = [a / b for a, b in zip(measured[name]["rounds_ms"], constant, strict=True)]
        measured[name] |= {
            "ratio_to_constant_depth_alike": statistics.median(of_same),
            "launches": launches(step),
            "peak_bytes": peaks[name],
        }
    return measured


def deep(scale: Scale, device: torch.device) -> dict[str, Any]:
    """The deepest network: time and memory."""
    images = torch.randn(scale.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    few = replace(scale, rounds=3, steps=min(scale.steps, 4))
    graphs = ("stochastic depth, graphs",) if device.type == "cuda" else ()

    def make(name: str) -> Callable[[], None]:
        model = paper_network(scale.deep_layers, device)
        if name != "constant depth":
            depth = make_stochastic(model, "batch")
            if name in graphs:
                depth.capture()
        return step_of(model, images)

    names = ("constant depth", "stochastic depth", *graphs)
    peaks = {name: peak_bytes(make(name), device, few.steps) for name in names}
    measured = measure({name: make(name) for name in names}, device, few)
    for name in names:
        measured[name]["peak_bytes"] = peaks[name]
    return measured


def vit(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Timm's ViT: rate 0, timm's drop path at 0.4 in every block, and the same rate skipped."""
    name, size, batch_size = scale.vit
    images = torch.randn(batch_size, 3, size, size, device=device)

    def make(variant: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=size, num_classes=10).to(device)
        if variant != "rate 0":
            for block in model.blocks:
                block.drop_path1, block.drop_path2 = timm.layers.DropPath(0.4), timm.layers.DropPath(0.4)
        if variant.endswith("_"):
            sd.make_stochastic_(model)
        return step_of(model, images)

    variants = ("rate 0", "0.4, timm", "0.4, make_stochastic_")
    few = replace(scale, steps=min(scale.steps, 5))
    peaks = {variant: peak_bytes(make(variant), device, few.steps) for variant in variants}
    measured = measure({variant: make(variant) for variant in variants}, device, few)
    for variant in variants:
        measured[variant]["peak_bytes"] = peaks[variant]
    return measured


def gathers(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Half of the samples taken and added back, forward and backward: anywhere in the batch, and as one window."""
    result: dict[str, Any] = {}
    shapes = {"ResNet-110": (scale.batch_size, 16, 32, 32), "ViT-L/16": (scale.vit[2], 197, 1024)}
    for name, shape in shapes.items():
        x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        half = max(shape[0] // 2, 1)
        order = torch.randperm(shape[0], device=device)[:half]

        def anywhere(x: Tensor = x, order: Tensor = order) -> None:
            samples, carried = take_and_carry(x, order)
            add_samples(carried, samples, order, 2.0).sum().backward()

        def window(x: Tensor = x, half: int = half) -> None:
            total = x.clone()
            total[:half].add_(x[:half], alpha=2.0)
            total.sum().backward()

        result[name] = measure({"anywhere": anywhere, "window": window}, device, scale)
    return result


def compiled(scale: Scale, device: torch.device) -> dict[str, Any]:
    """A step with stochastic depth whose branches are compiled, with and without graphs, beside one that is neither."""
    images = torch.randn(scale.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    variants: dict[str, Callable[[], None]] = {}
    for name in ("plain", "graphs", "compiled", "compiled, graphs"):
        model = paper_network(scale.layers, device)
        depth = make_stochastic(model, "batch")
        if name.startswith("compiled"):
            for branch in depth.branches:
                branch.parts.compile()
        if name.endswith("graphs") and device.type == "cuda":
            depth.capture()
        variants[name] = step_of(model, images)
    return measure(variants, device, scale)


def experiment_of(scale: Scale, kind: str) -> Experiment:
    """What the laboratory trains."""
    experiment = find(f"{scale.experiment}-{kind}")
    return quick(experiment) if scale is TINY else replace(experiment, precision="bf16")


def run(
    scale: Scale, device: torch.device, kind: str, folder: Path, data_root: Path | None, deadline: float
) -> dict[str, Any] | None:
    """Train in the laboratory until the deadline; the result, or None where the run has to go on."""
    experiment = experiment_of(scale, kind)
    try:
        result = loop.train(
            experiment,
            folder / experiment.name,
            [Lines(sys.stderr)],
            device=device,
            data_root=data_root,
            resume=True,
            stop_requested=lambda: time.monotonic() > deadline,
            cuda_graphs=device.type == "cuda",
        )
    except loop.Interrupted:
        return None
    return {**result, "train_minutes": result["train_s"] / 60}


def main() -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; runs lie beside it")
    parser.add_argument("--data-root", type=Path, help="where CIFAR-10 lies")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for this call")
    parser.add_argument("--constant", action="store_true", help="the paper's run at constant depth too")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="everything very small, to try the script")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: with --device cpu --tiny the script can be tried without")
    if args.minutes <= max(LEAST_MINUTES.values()):
        parser.error(f"--minutes must be more than {max(LEAST_MINUTES.values()):g}, which the longest piece may take")
    device, scale = torch.device(args.device), TINY if args.tiny else FULL
    deadline = time.monotonic() + 60 * args.minutes
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "scale": json.loads(json.dumps(asdict(scale))),
    }
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"machine": machine}
    if done["machine"] != machine:
        parser.error(f"{args.out} is of another machine or scale: {done['machine']}")
    minutes: dict[str, float] = done.setdefault("minutes", {})

    def keep() -> None:
        partial = args.out.with_suffix(".partial")
        partial.write_text(json.dumps(done, indent=1) + "\n")
        os.replace(partial, args.out)

    pieces: dict[str, Callable[[], dict[str, Any] | None]] = {
        piece.__name__: functools.partial(piece, scale, device) for piece in (floor, steps, vit, deep, gathers)
    }
    for kind in ("stochastic", "constant") if args.constant else ("stochastic",):
        pieces[f"run, {kind}"] = functools.partial(run, scale, device, kind, args.out.parent, args.data_root, deadline)
    pieces["compiled"] = functools.partial(compiled, scale, device)
    for name, piece in pieces.items():
        if name in done:
            continue
        begin = time.monotonic()
        if begin > deadline - 60 * LEAST_MINUTES.get(name, 1.5):
            return AGAIN
        result = piece()
        minutes[name] = minutes.get(name, 0.0) + (time.monotonic() - begin) / 60
        if result is not None:
            done[name] = result
            print(name, json.dumps(result), flush=True)
        keep()
        if result is None:
            return AGAIN
    if "steps" in done and "floor" in done:
        done["share of the floor"] = {
            f"{depth} depth": done["floor"][depth]["least_ms"] / done["steps"][f"{name} depth, graphs"]["ms"]
            for depth, name in (("constant", "constant"), ("stochastic", "batch"))
            if f"{name} depth, graphs" in done["steps"]
        }
        keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
