"""Shared by the benchmarks: interleaved rounds, medians of ratios, and tables with hardware and versions."""

from __future__ import annotations

import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch


def interleaved(steps: Mapping[str, Callable[[], None]], *, rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Process time in seconds of each step in each round; every round runs every step once, in random order.

    The state of caches and memory allocator after a step then affects a random other step.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name in shuffled_rounds(steps, rounds=warm_up + rounds):
        begin = time.process_time()
        steps[name]()
        times[name].append(time.process_time() - begin)
    return {name: values[warm_up:] for name, values in times.items()}


def shuffled_rounds(names: Iterable[str], *, rounds: int) -> Iterator[str]:
    """All names in each round, in random order."""
    names, order = list(names), random.Random(0)
    for _ in range(rounds):
        yield from order.sample(names, len(names))


def ratio(times: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Median over the rounds of the ratio of two steps of one round; and the ratio of the means."""
    return (
        statistics.median(a / b for a, b in zip(times, reference, strict=True)),
        statistics.mean(times) / statistics.mean(reference),
    )


def processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_table(name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> None:
    """Print a table in Markdown and write it to `benchmarks/tables/NAME.md`."""
    lines = [f"## {title}", "", f"`python {shlex.join(sys.argv)}`", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    machine = (
        f"{processor()}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}."
    )
    lines += ["", f"{note} {machine}"]
    text = "\n".join(lines) + "\n"
    print(text)
    folder = Path(__file__).parent / "tables"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text(text)
