"""Measures everything on a GPU in twelve minutes: a plan of pieces, the most valuable first.

Prepare, on any machine (`build/` is ignored by git):

    python benchmarks/reproduction_gpu.py --pack ../shared/data

That makes `build/gpu-1` and `build/gpu-2`: each half of CIFAR-10, and Python packages that the GPU machine may lack.
Then, on the GPU machine, with `build/gpu-1` in the first call and `build/gpu-2` in the second (the machine keeps
`build/` between them):

    python benchmarks/reproduction_gpu.py --minutes 7.5
    python benchmarks/reproduction_gpu.py --minutes 5

Each piece has a time limit and runs in its own process. Every result is written to `build/gpu/gpu.json` at once and
copied to the folder `$OUT` if there is one; if the script is killed, the same command runs the missing pieces. To
resume on another machine, put the files of `$OUT` into `build/gpu`. Exit code 0: complete; 75: run it again.

Rehearse it without a GPU, in about a minute:

    python benchmarks/reproduction_gpu.py --device cpu --tiny --out build/gpu-rehearsal

- `tests`: the tests that are marked `gpu`.
- `timm`: ViT-B/16, ViT-L/16, ConvNeXt-B, Swin-B and ResNet-50, bf16: rate 0, timm's mask, a fixed subset of the samples
  as in DINOv2, ours per sample and per batch: images per second, peak memory, an estimate of the largest batch.
- `steps`: a step of ResNet-110 at constant and stochastic depth, with and without CUDA graphs, and how long it would
  take if closed branches took no time.
- `add_samples`: samples added to those of a batch, in several ways.
- `pair, constant` and `pair, stochastic`: CIFAR-10 without augmentation, 110 layers, the paper's recipe in as many
  epochs as the measured step allows.
- `compiled`: the step with compiled branches. `deep`: 1202 layers.
- `floor`: bytes and FLOPs of a step, counted, and the least time that they can take.
"""

from __future__ import annotations

import sys
from pathlib import Path

# On a machine where nothing can be installed the packages are those of the repository, and those that were packed.
sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "build" / "gpu-1" / "packages"))

import torchvision_schemas  # noqa: F401

# isort: split
import argparse
import ctypes
import functools
import gc
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import tarfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from networks import ConvNeXtBlock, SubsetBlock
from protocol import shuffled_rounds
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd
from stochastic_depth.samples import add_samples
from stochastic_depth_lab.experiments import find
from stochastic_depth_lab.experiments.config import Experiment
from stochastic_depth_lab.training import loop
from stochastic_depth_lab.training.progress import Lines

ROOT = Path(__file__).parents[1]
AGAIN = 75  # EX_TEMPFAIL
H200 = {"bytes_per_s": 4.8e12, "bf16_flops_per_s": 989e12}
TEST_FILES = (
    "tests/library/test_gpu.py",
    "tests/library/test_cuda_graphs.py",
    "tests/library/test_branch_times.py",
    "tests/lab/test_loop.py",
    "tests/lab/data/test_data_batches.py",
)
"""Where tests are marked `gpu`."""
PACKAGES = ("pooch", "platformdirs")
"""Packages that the laboratory needs and a GPU machine may lack; all are plain Python."""


@dataclass(frozen=True)
class Scale:
    """Sizes of all measurements.

    Attributes:
        layers: of the paper's network.
        deep_layers: of its deepest one.
        batch_size: images in its step.
        timm: timm's names, the drop path rate of each, whether it is the same in every block, image size and batch.
        rounds: interleaved rounds, each of `steps` steps.
        steps: of one variant in a round.
        least_epochs: of the pair.
        limit: images of each part that the pair trains with; None: all.
    """

    layers: int
    deep_layers: int
    batch_size: int
    timm: tuple[tuple[str, float, bool, int, int], ...]
    rounds: int
    steps: int
    least_epochs: int
    limit: int | None


FULL = Scale(
    layers=110,
    deep_layers=1202,
    batch_size=128,
    timm=(
        ("vit_base_patch16_224", 0.4, True, 224, 128),
        ("vit_large_patch16_224", 0.4, True, 224, 64),
        ("resnet50", 0.5, False, 224, 128),
        ("convnext_base", 0.4, False, 224, 64),
        ("swin_base_patch4_window7_224", 0.5, False, 224, 64),
    ),
    rounds=5,
    steps=8,
    least_epochs=8,
    limit=None,
)
TINY = Scale(
    layers=8,
    deep_layers=14,
    batch_size=4,
    timm=(("vit_tiny_patch16_224", 0.4, True, 32, 4), ("convnext_atto", 0.4, False, 32, 4)),
    rounds=2,
    steps=1,
    least_epochs=2,
    limit=64,
)


class Results:
    """The results so far, in one JSON file that is written atomically.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """All results."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def of(self, piece: str) -> dict[str, Any]:
        """The results of a piece by their names."""
        return self.read().get(piece, {})

    def keep(self, piece: str, name: str, value: Any) -> None:
        """Write one result of a piece."""
        results = self.read()
        results.setdefault(piece, {})[name] = value
        self._write(results)
        print(f"{piece}: {name}: {json.dumps(value)[:300]}", flush=True)

    def _write(self, results: Mapping[str, Any]) -> None:
        text = json.dumps(results, indent=1) + "\n"
        partial = self.path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, self.path)
        if out := os.environ.get("OUT"):
            Path(out, self.path.name).write_text(text)


@dataclass(frozen=True)
class Setting:
    """Settings of a piece.

    Attributes:
        scale: how large everything is.
        device: where to measure.
        results: where to write measurements, and to read earlier ones.
        out: folder of the runs.
        data: folders with the parts of CIFAR-10.
        deadline: by `time.monotonic`, when the piece must be done.
    """

    scale: Scale
    device: torch.device
    results: Results
    out: Path
    data: tuple[Path, ...]
    deadline: float


@dataclass(frozen=True)
class Piece:
    """Part of the plan.

    Attributes:
        name: its name.
        run: measures; it returns whether all of it is there.
        limit_s: it is killed after this many seconds.
        least_s: it starts only if this many seconds are left.
        is_ready: whether it can start; what it needs may arrive later.
    """

    name: str
    run: Callable[[Setting], bool]
    limit_s: float
    least_s: float
    is_ready: Callable[[Setting], bool] = lambda _: True


def in_child(piece: Piece, setting: Setting) -> str:
    """Run a piece in its own process, with a time limit: "done", "unfinished", "cut off" or "failed"."""
    child = os.fork()
    if child == 0:
        try:
            # It must not outlive this process, whatever ends that.
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            os._exit(0 if piece.run(setting) else AGAIN)
        except BaseException as error:
            traceback.print_exc()
            setting.results.keep(piece.name, "error", "".join(traceback.format_exception_only(error)).strip()[:2000])
            sys.stderr.flush()
            os._exit(1)
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > setting.deadline + 2:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "cut off"
        time.sleep(0.05)
    return {0: "done", AGAIN: "unfinished"}.get(os.waitstatus_to_exitcode(ended[1]), "failed")


def follow(pieces: Sequence[Piece], setting: Setting, deadline: float) -> bool:
    """Run the missing pieces while time is left; those that failed before come last.

    Returns:
        Whether all of them are done.
    """
    tries = setting.results.of("tries")
    for piece in sorted(pieces, key=lambda piece: tries.get(piece.name, 0)):
        if setting.results.of("state").get(piece.name) == "done":
            continue
        if not piece.is_ready(setting):
            print(f"{piece.name}: waiting for its inputs", flush=True)
            continue
        begin = time.monotonic()
        if deadline - begin < piece.least_s:
            print(f"{piece.name}: {deadline - begin:.0f} s left, {piece.least_s:.0f} s needed", flush=True)
            continue
        setting.results.keep("tries", piece.name, tries.get(piece.name, 0) + 1)
        limit = min(begin + piece.limit_s, deadline)
        state = in_child(piece, replace(setting, deadline=limit))
        setting.results.keep("state", piece.name, state)
        seconds = setting.results.of("seconds").get(piece.name, 0.0)
        setting.results.keep("seconds", piece.name, round(seconds + time.monotonic() - begin, 1))
        mirror(setting.out)
    return all(setting.results.of("state").get(piece.name) == "done" for piece in pieces)


def mirror(out: Path) -> None:
    """Copy the runs to `$OUT`, each as one archive and the best weights, which are too large for it."""
    if target := os.environ.get("OUT"):
        for run in [out / kind for kind in ("constant", "stochastic") if (out / kind).is_dir()]:
            with tarfile.open(Path(target, f"{run.name}.tar"), "w") as archive:
                for path in run.rglob("*"):
                    if path.is_file() and path.name not in ("best.pt", "best.safetensors", "previous.pt"):
                        archive.add(path, path.relative_to(out))
            for path in run.rglob("best.pt"):
                shutil.copyfile(path, Path(target, f"{run.name}-best.pt"))


def unpack(out: Path) -> None:
    """Put the runs back that `mirror` has copied, if they are not there."""
    for archive in out.glob("*.tar"):
        if not (out / archive.stem).exists():
            with tarfile.open(archive) as tar:
                tar.extractall(out, filter="data")
            best = out / f"{archive.stem}-best.pt"
            if best.exists():
                shutil.copyfile(best, out / archive.stem / "checkpoints" / "best.pt")


# ---------------------------------------------------------------------------------------------- tests


class _Outcomes:
    """A plugin of pytest that writes every outcome as it comes, and leaves out what has one already.

    Args:
        setting: of the piece.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.known = setting.results.of("tests")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leave out what has run."""
        items[:] = [item for item in items if self.known.get(item.nodeid, "failed") != "passed"]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write an outcome."""
        if report.when == "call" or report.outcome != "passed":
            text = report.outcome
            if report.failed:
                text += ": " + str(getattr(report.longrepr, "reprcrash", report.longrepr))[:400]
            self.setting.results.keep("tests", report.nodeid, text)


def tests(setting: Setting) -> bool:
    """The tests that need a GPU; without one, a few that do not."""
    import pytest

    os.chdir(ROOT)
    chosen = (
        ["-m", "gpu", *TEST_FILES] if setting.device.type == "cuda" else ["-k", "draws_what and cpu", TEST_FILES[0]]
    )
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-W", "default", *chosen], plugins=[_Outcomes(setting)])
    setting.results.keep("tests", "exit code of pytest", int(code))
    # Failures are results too; with 5, everything had run before.
    return code in (0, 1, 5)


# ---------------------------------------------------------------------------------------------- steps


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


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One step, in mixed precision with bf16."""
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()


def step_of(model: nn.Module, images: Tensor, num_classes: int = 10) -> Callable[[], None]:
    """A step of the paper's optimizer."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=images.is_cuda
    )
    labels = torch.randint(num_classes, (images.shape[0],), device=images.device)
    return functools.partial(train_step, model, optimizer, images, labels)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(variants: Mapping[str, Callable[[], None]], device: torch.device, scale: Scale) -> dict[str, Any]:
    """Milliseconds of a step of each variant, median over interleaved rounds, and its ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in variants.values():
        for _ in range(scale.steps):  # the rarer of two numbers of samples is met, and recorded, before it is timed
            step()
    for name in shuffled_rounds(variants, rounds=scale.rounds):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(scale.steps):
            variants[name]()
        synchronize(device)
        times[name].append((time.perf_counter() - begin) / scale.steps * 1e3)
    first = next(iter(times.values()))
    return {
        name: {
            "ms": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, first, strict=True)),
            "rounds_ms": [round(value, 4) for value in values],
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
    """Number of kernels, copies and graphs that a step launches."""
    with torch.profiler.profile() as profile:
        step()
    asks = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(asks))


def make_stochastic(model: nn.Module, depth: str) -> sd.Controller:
    """Linear decay to 0.5 per "batch" or "sample"; at "constant" depth every gate is open."""
    schedule = sd.uniform(1.0) if depth == "constant" else sd.linear_decay(0.5)
    granularity = "sample" if depth == "sample" else "batch"
    return sd.make_stochastic_(model, schedule, granularity=granularity, draw="equal_cost")


def small_images(setting: Setting) -> Tensor:
    """A batch of the size of CIFAR's."""
    images = torch.randn(setting.scale.batch_size, 3, 32, 32, device=setting.device)
    return images.to(memory_format=torch.channels_last)


def steps(setting: Setting) -> bool:
    """A step at constant and stochastic depth, with and without graphs: time, launches, memory."""
    scale, device, images = setting.scale, setting.device, small_images(setting)

    def make(depth: str, graphs: bool) -> Callable[[], None]:
        model = paper_network(scale.layers, device)
        if depth != "constant" or graphs:
            controller = make_stochastic(model, depth)
            if graphs:
                controller.capture()
        return step_of(model, images)

    kinds = [
        (depth, graphs)
        for graphs in ((False, True) if device.type == "cuda" else (False,))
        for depth in ("constant", "batch", "sample")
    ]
    names = {kind: f"{kind[0]} depth{', graphs' if kind[1] else ''}" for kind in kinds}
    variants = {name: make(*kind) for kind, name in names.items()}
    measured = measure(variants, device, scale)
    setting.results.keep("steps", "times", measured)
    with torch.autocast(device.type, torch.bfloat16):
        cost = make_stochastic(paper_network(scale.layers, device), "batch").cost(images, measure=True)
    setting.results.keep("steps", "expected", {"flops": cost.flops_share, "time": cost.time_share})
    setting.results.keep("steps", "launches", {name: launches(step) for name, step in variants.items()})
    del variants
    setting.results.keep(
        "steps", "peak_bytes", {name: peak_bytes(make(*kind), device, scale.steps) for kind, name in names.items()}
    )
    return True


def compiled(setting: Setting) -> bool:
    """A step with stochastic depth whose branches are compiled, with and without graphs, beside one that is neither."""
    images, variants = small_images(setting), dict[str, Callable[[], None]]()
    for name in ("plain", "graphs", "compiled", "compiled, graphs"):
        model = paper_network(setting.scale.layers, setting.device)
        depth = make_stochastic(model, "batch")
        if name.startswith("compiled"):
            for branch in depth.branches:
                branch.parts.compile(backend="inductor" if setting.device.type == "cuda" else "eager")
        if name.endswith("graphs") and setting.device.type == "cuda":
            depth.capture()
        variants[name] = step_of(model, images)
    setting.results.keep("compiled", "times", measure(variants, setting.device, setting.scale))
    return True


def deep(setting: Setting) -> bool:
    """The deepest network: time and memory."""
    scale, device, images = setting.scale, setting.device, small_images(setting)
    few = replace(scale, rounds=3, steps=min(scale.steps, 2))
    graphs = ("stochastic depth, graphs",) if device.type == "cuda" else ()

    def make(name: str) -> Callable[[], None]:
        model = paper_network(scale.deep_layers, device)
        if name != "constant depth":
            depth = make_stochastic(model, "batch")
            if name in graphs:
                depth.capture()
        return step_of(model, images)

    names = ("constant depth", "stochastic depth", *graphs)
    setting.results.keep("deep", "times", measure({name: make(name) for name in names}, device, few))
    setting.results.keep("deep", "peak_bytes", {name: peak_bytes(make(name), device, few.steps) for name in names})
    return True


def floor(setting: Setting) -> bool:
    """Bytes and FLOPs of a step at constant depth and what one step leaves of them, and the time that they need."""
    scale = setting.scale
    for name in ("constant", "stochastic"):
        model = sd.models.cifar_resnet(scale.layers).bfloat16().to("meta").to(memory_format=torch.channels_last)
        if name == "stochastic":
            sd.make_stochastic_(model, sd.linear_decay(0.5), draw="equal_cost")
        images = torch.empty(scale.batch_size, 3, 32, 32, dtype=torch.bfloat16, device="meta")
        labels = torch.empty(scale.batch_size, dtype=torch.int64, device="meta")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
        with TrafficMode() as traffic, FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        flops = counter.get_total_flops()
        seconds = (traffic.num_bytes / H200["bytes_per_s"], flops / H200["bf16_flops_per_s"])
        found = {"bytes": traffic.num_bytes, "flops": flops, "least_ms": 1e3 * max(seconds), "peak": H200}
        setting.results.keep("floor", name, found)
    return True


# ---------------------------------------------------------------------------------------------- timm


def with_rates(name: str, rate: float, uniform: bool, size: int) -> nn.Module:
    """One of timm's models with its own drop paths: linear decay to the rate, or the same rate in every block."""
    torch.manual_seed(0)
    options = {"img_size": size} if "vit" in name or "swin" in name else {}
    model = timm.create_model(name, drop_path_rate=0.0 if uniform else rate, num_classes=10, **options)
    if uniform and rate:
        for block in model.blocks:
            block.drop_path1, block.drop_path2 = timm.layers.DropPath(rate), timm.layers.DropPath(rate)
    return model


def with_fixed_subsets(name: str, rate: float, uniform: bool, size: int) -> nn.Module | None:
    """Blocks that run on a fixed number of random samples, as in DINOv2; None where that has not been written."""
    model = with_rates(name, 0.0, uniform, size)
    if "vit" in name:
        model.blocks = nn.Sequential(*(SubsetBlock(block, rate) for block in model.blocks))
    elif "convnext" in name:
        blocks = [block for stage in model.stages for block in stage.blocks]
        rates = iter([rate * index / (len(blocks) - 1) for index in range(len(blocks))])
        for stage in model.stages:
            stage.blocks = nn.Sequential(*(SubsetBlock(ConvNeXtBlock(block), next(rates)) for block in stage.blocks))
    else:
        return None
    return model


def timm_models(setting: Setting) -> bool:
    """Each model in every way of dropping: images per second, peak memory, and the batch that would fit."""
    scale, device = setting.scale, setting.device
    for name, rate, uniform, size, batch_size in scale.timm:
        if name in setting.results.of("timm"):
            continue
        if setting.deadline - time.monotonic() < 15:
            return False

        def make(
            variant: str, num_images: int, which: tuple[str, float, bool, int] = (name, rate, uniform, size)
        ) -> Any:
            if variant == "rate 0":
                model = with_rates(which[0], 0.0, *which[2:])
            elif variant == "fixed subset":
                model = with_fixed_subsets(*which)
            else:
                model = with_rates(*which)
            if model is None:
                return None
            model = model.to(device)
            if variant.startswith("ours"):
                sd.make_stochastic_(model, granularity="sample" if variant.endswith("sample") else "batch")
            return step_of(model, torch.randn(num_images, 3, which[3], which[3], device=device))

        variants = ("rate 0", "timm", "fixed subset", "ours per sample", "ours per batch")
        made = {variant: step for variant in variants if (step := make(variant, batch_size))}
        few = replace(scale, steps=min(scale.steps, 4))
        measured: dict[str, Any] = measure(made, device, few)
        del made
        for variant, found in measured.items():
            found["images_per_s"] = 1e3 * batch_size / found["ms"]
            if device.type == "cuda":
                half, whole = (
                    peak_bytes(make(variant, num_images), device, few.steps)
                    for num_images in (batch_size // 2, batch_size)
                )
                per_image = (whole - half) / (batch_size - batch_size // 2)
                capacity = 0.95 * torch.cuda.get_device_properties(device).total_memory
                fits = batch_size + int((capacity - whole) / per_image)
                found |= {"peak_bytes": whole, "largest_batch_estimate": fits}
        setting.results.keep("timm", name, {"rate": rate, "batch_size": batch_size, **measured})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


# ---------------------------------------------------------------------------------------------- samples


def _index_add(x: Tensor, samples: Tensor, indices: Tensor) -> Tensor:
    return add_samples(x, samples, indices, 2.0)


def _copy_sums(x: Tensor, samples: Tensor, indices: Tensor) -> Tensor:
    return x.index_copy(0, indices, torch.add(x.index_select(0, indices), samples, alpha=2.0))


def _put(x: Tensor, samples: Tensor, indices: Tensor) -> Tensor:
    total = x.clone()
    total[indices] = torch.add(x[indices], samples, alpha=2.0)
    return total


def _window(x: Tensor, samples: Tensor, indices: Tensor) -> Tensor:
    total = x.clone()
    total[: len(indices)].add_(samples, alpha=2.0)
    return total


def additions(setting: Setting) -> bool:
    """Samples added to three quarters of a batch: `index_add_` accumulates atomically, the other ways do not."""
    scale, device = setting.scale, setting.device
    ways = {"index_add": _index_add, "index_copy of sums": _copy_sums, "index_put": _put, "one window": _window}
    shapes = {
        "ResNet-110": (scale.batch_size, 16, 32, 32),
        "ResNet-50, channels last": (scale.batch_size, 256, 56, 56),
        "ViT-L/16": (scale.batch_size, 197, 1024),
    }
    for name, shape in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, device=device, dtype=dtype)
            x = x.to(memory_format=torch.channels_last) if "channels last" in name else x
            indices = torch.randperm(shape[0], device=device)[: max(3 * shape[0] // 4, 1)]
            samples = x.index_select(0, indices).contiguous(
                memory_format=torch.channels_last if "channels last" in name else torch.contiguous_format
            )
            variants = {way: functools.partial(add, x, samples, indices) for way, add in ways.items()}
            with torch.no_grad():
                setting.results.keep("add_samples", f"{name}, {dtype}", measure(variants, device, scale))
    return True


# ---------------------------------------------------------------------------------------------- the pair

SHEETS = (*(f"data_batch_{number}.webp" for number in range(1, 6)), "test_batch.webp")
OTHERS = ("batches.meta", "filenames.json.xz", "labels.npz")
RESTORE = "restore_cifar10.py"


def pack(source: Path, build: Path) -> None:
    """Make the two folders to transfer, each at most 64 MB."""
    packages = [Path(str(importlib.util.find_spec(name).origin)).parent for name in PACKAGES]
    for half, names in (("gpu-1", SHEETS[:3]), ("gpu-2", (*SHEETS[3:], *OTHERS))):
        folder = build / half
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in names:
            shutil.copyfile(source / "cifar10" / name, folder / name)
        if half == "gpu-1":
            shutil.copyfile(source / RESTORE, folder / RESTORE)
            ignored = shutil.ignore_patterns("__pycache__")
            for package in packages:
                shutil.copytree(package, folder / "packages" / package.name, ignore=ignored)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {size / 2**20:.1f} MiB", flush=True)


def found(data: Sequence[Path]) -> dict[str, Path]:
    """Where each file of CIFAR-10 lies, of those that are there."""
    return {name: folder / name for name in (*SHEETS, *OTHERS, RESTORE) for folder in data if (folder / name).is_file()}


def has_both_halves(setting: Setting) -> bool:
    """Whether all of CIFAR-10 is there."""
    return len(found(setting.data)) == len(SHEETS) + len(OTHERS) + 1


def restored(setting: Setting) -> Path:
    """The folder of CIFAR-10 in the layout of its authors, restored from its halves."""
    folder = setting.out / "data"
    if not (folder / "whole").exists():
        place = setting.out / "restore"
        shutil.rmtree(place, ignore_errors=True)
        (place / "cifar10").mkdir(parents=True)
        for name, path in found(setting.data).items():
            shutil.copyfile(path, place / ("" if name == RESTORE else "cifar10") / name)
        subprocess.run([sys.executable, str(place / RESTORE), str(folder)], check=True)
        (folder / "whole").touch()
    return folder


def experiment_of(kind: str, num_epochs: int, setting: Setting) -> Experiment:
    """What the laboratory trains: the paper's recipe with fewer epochs, without augmentation."""
    experiment = find(f"cifar10-unaugmented-110-{kind}")
    scale = setting.scale
    return replace(
        experiment,
        data=replace(experiment.data, limit=scale.limit),
        model=replace(experiment.model, num_layers=scale.layers),
        recipe=replace(experiment.recipe, epochs=num_epochs),
        precision="bf16" if setting.device.type == "cuda" else "fp32",
    )


def num_epochs_in(seconds: float, setting: Setting) -> int:
    """Epochs that fit at constant depth, by the step that was measured; the same for both and for ever."""
    known = setting.results.of("pair").get("epochs")
    if known is None:
        times = setting.results.of("steps").get("times", {})
        measured = times.get("constant depth, graphs") or times.get("constant depth") or {"ms": 25.0}
        epoch_s = 45_000 / setting.scale.batch_size * measured["ms"] / 1e3 * 1.1 + 1.0
        known = setting.scale.least_epochs
        if setting.scale.limit is None:
            known = max(known, int(seconds / epoch_s))
        setting.results.keep("pair", "epochs", known)
    return known


def run(kind: str, seconds: float, setting: Setting) -> bool:
    """Train until the deadline, and resume where the last call stopped."""
    experiment = experiment_of(kind, num_epochs_in(seconds, setting), setting)
    stop_at = setting.deadline - 3  # it takes a moment to write the checkpoint
    try:
        result = loop.train(
            experiment,
            setting.out / kind,
            [Lines(sys.stderr)],
            device=setting.device,
            data_root=restored(setting),
            resume=True,
            stop_requested=lambda: time.monotonic() > stop_at,
            cuda_graphs=setting.device.type == "cuda",
        )
    except loop.Interrupted as stopped:
        setting.results.keep("pair", f"{kind}, so far", str(stopped))
        return False
    setting.results.keep("pair", kind, {**result, "train_minutes": result["train_s"] / 60})
    return True


# ---------------------------------------------------------------------------------------------- the plan


def machine(setting: Setting) -> bool:
    """The machine."""
    if setting.device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("There is no GPU. To rehearse the script without one, use --device cpu --tiny.")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    smi = None
    if setting.device.type == "cuda":
        smi = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    found_here = {
        "device": torch.cuda.get_device_name() if setting.device.type == "cuda" else platform.machine(),
        "nvidia-smi": smi,
        "num_cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "scale": json.loads(json.dumps(asdict(setting.scale))),
    }
    known = setting.results.of("machine")
    for name, value in found_here.items():
        if name in known and known[name] != value:
            # A pair may resume on another machine; then both are listed.
            since = f"{name}, since {time.strftime('%Y-%m-%d %H:%M')}"
            setting.results.keep("machine", since, value)
        elif name not in known:
            setting.results.keep("machine", name, value)
    return True


def plan(pair_s: float) -> list[Piece]:
    """The pieces, the most valuable first."""
    pairs = [
        Piece(f"pair, {kind}", functools.partial(run, kind, pair_s), pair_s + 15, min(30, pair_s), has_both_halves)
        for kind in ("constant", "stochastic")
    ]
    return [
        Piece("machine", machine, 30, 1),
        Piece("tests", tests, 110, 20),
        Piece("timm", timm_models, 230, 30),
        Piece("steps", steps, 75, 20),
        Piece("add_samples", additions, 30, 10),
        *pairs,
        Piece("compiled", compiled, 100, 40),
        Piece("deep", deep, 120, 60),
        Piece("floor", floor, 60, 10),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results and the runs")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[ROOT / "build" / "gpu-1", ROOT / "build" / "gpu-2"],
        help="folders with the parts of CIFAR-10",
    )
    parser.add_argument("--minutes", type=float, default=7.5, help="time for this call")
    parser.add_argument("--pair-minutes", type=float, default=2.2, help="time for each run of the pair")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="everything very small, to rehearse")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="pieces to run; default: all")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="only make what travels, from the data in FOLDER")
    args = parser.parse_args(arguments)
    if args.pack is not None:
        pack(args.pack, ROOT / "build")
        return 0
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    unpack(args.out)
    results = Results(args.out / "gpu.json")
    scale = TINY if args.tiny else FULL
    setting = Setting(scale, torch.device(args.device), results, args.out, tuple(args.data), deadline)
    pieces = plan(60 * args.pair_minutes)
    if args.tiny:
        pieces = [replace(piece, least_s=1) for piece in pieces]
    if args.only and (unknown := set(args.only) - {piece.name for piece in pieces}):
        parser.error(f"no piece {', '.join(sorted(unknown))}; there are {', '.join(piece.name for piece in pieces)}")
    pieces = [piece for piece in pieces if not args.only or piece.name in args.only]
    return 0 if follow(pieces, setting, deadline) else AGAIN


if __name__ == "__main__":
    sys.exit(main())
