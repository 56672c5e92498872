"""Broken and malicious files for every reader of the laboratory. The long form is part of `make faults`.

    python tests/faults/hostile.py --inputs 100000

An input is a good file that was damaged at random, or rebuilt around a damaged part so that its checksums are right. A
reader may read it, or refuse it with its own error. Everything else ends the run: a foreign error, a crash, five
seconds of processor time, 2 GB of memory, a process or a connection opened, a file written outside of the folder.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stochastic_depth_lab.errors import CheckpointError, ReportError, RunError
from stochastic_depth_lab.experiments import config, find
from stochastic_depth_lab.experiments.checks import check
from stochastic_depth_lab.report import read_run
from stochastic_depth_lab.runs import checkpoint, records

Reader = Callable[[bytes, Path], object]
OWN_ERRORS = (CheckpointError, RunError, ReportError)
EXPERIMENT = config.as_json(replace(find("digits-stochastic"), name="<b>&\"'"))
SECONDS, MEMORY_BYTES = 5, 2 << 30


class Hang(BaseException):
    """A reader took too long."""


# ---------------------------------------------------------------------------------------------- good files


def _checkpoint() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        state = {"epoch": 2, "model": {"weight": torch.arange(12.0).view(3, 4)}, "gates": {"names": ["a"], "seed": 0}}
        checkpoint.save(Path(folder), state, EXPERIMENT)
        return (Path(folder) / "last.pt").read_bytes()


_NAMES = ["1.residual", "2.residual"]
_EPOCH = {
    "epoch": 1, "train_loss": 2.0, "validation_error": 50.0, "validation_loss": 1.5, "test_error": 51.0,
    "test_loss": 1.6, "train_s": 3.0, "realized_depth": 1.5, "realized_cost": 0.8, "first_conv_grad": 0.01,
    "learning_rate": 0.1, "num_steps": 10, "steps_per_s": 3.3, "open_counts": [9.0, 6.0],
}  # fmt: skip
_RUN: dict[str, bytes] = {
    "config.json": json.dumps(EXPERIMENT).encode(),
    "branches.json": json.dumps(
        {"names": _NAMES, "survival_probs": [0.9, 0.5], "expected_depth": 1.4, "expected_cost": 0.7}
    ).encode(),
    "environment.json": json.dumps(
        {"device": "cpu", "cpu": "<b>", "started": "now", "command": "x", "versions": {"python": "3"}}
    ).encode(),
    "metrics.jsonl": json.dumps(_EPOCH).encode() + b"\n" + json.dumps({**_EPOCH, "epoch": 2}).encode() + b"\n",
}


# ---------------------------------------------------------------------------------------------- readers


def _read_checkpoint(content: bytes, folder: Path) -> object:
    (folder / "last.pt").write_bytes(content)
    return checkpoint.load(folder, EXPERIMENT)


def _read_config(content: bytes, folder: Path) -> object:
    (folder / "config.json").write_bytes(content)
    experiment = config.from_json(records.read_json(folder / "config.json"))
    check(experiment)
    return experiment


def _read_run_with(name: str, content: bytes, folder: Path) -> object:
    for other, good in _RUN.items():
        (folder / other).write_bytes(content if other == name else good)
    return read_run(folder)


def _keep_epochs(content: bytes, folder: Path) -> object:
    (folder / "metrics.jsonl").write_bytes(content)
    run = records.RunFolder(folder, find("digits-stochastic"))
    run.keep_epochs(2)
    return run.metrics()


# ---------------------------------------------------------------------------------------------- damage

_NUMBERS = (b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff" * 8)
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, 10**30, float("nan"), float("inf"), "", "x" * 3000, "<script>alert(1)</script>",
    "../../x", "\x00", "\ud800", [], {}, [[]], [None] * 50, {"a": {"b": 1}},
)  # fmt: skip


def damaged(content: bytes, draws: random.Random) -> bytes:
    """A file with one to four changes: bytes altered, cut out, put in, repeated, or everything after a point gone."""
    changed = bytearray(content)
    for _ in range(draws.choice((1, 1, 2, 4))):
        place = draws.randrange(len(changed) + 1)
        length = draws.choice((1, 1, 2, 4, 8, 64))
        match draws.randrange(7):
            case 0:
                del changed[place:]
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = draws.randbytes(length)
            case 3:
                changed[place:place] = changed[max(place - length, 0) : place] * draws.choice((1, 3, 50))
            case 4:
                number = draws.choice(_NUMBERS)
                changed[place : place + len(number)] = number
            case _ if place < len(changed):
                changed[place] ^= 1 << draws.randrange(8)
            case _:
                pass
    return bytes(changed)


def _damaged_zip(content: bytes, draws: random.Random) -> bytes:
    """Damaged as a file, or rebuilt with correct checksums around a damaged part, mostly the pickle."""
    if draws.random() < 0.4:
        return damaged(content, draws)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as good, zipfile.ZipFile(file, "w") as bad:
        chosen = draws.choice([name for name in good.namelist() for _ in range(8 if name.endswith(".pkl") else 1)])
        for name in good.namelist():
            part = good.read(name)
            bad.writestr(name, damaged(part, draws) if name == chosen else part)
    return file.getvalue()


def _damaged_json(content: bytes, draws: random.Random) -> bytes:
    """Damaged as text, or with one value replaced by another."""
    if draws.random() < 0.4:
        return damaged(content, draws)
    lines = content.splitlines()
    index = draws.randrange(len(lines))
    fields = json.loads(lines[index])
    holder: Any = fields
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draws.choice(keys)
        if isinstance(holder[key], (dict, list)) and holder[key] and draws.random() < 0.7:
            holder = holder[key]
            continue
        if draws.random() < 0.2 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = draws.choice(_VALUES)
        break
    lines[index] = json.dumps(fields).encode()
    return b"\n".join(lines) + (b"\n" if len(lines) > 1 else b"")


Target = tuple[Reader, Callable[[random.Random], bytes], bytes]


@functools.cache
def targets() -> dict[str, Target]:
    """For each reader, a generator of inputs, and an input that it must read."""
    packed, metrics = _checkpoint(), _RUN["metrics.jsonl"]
    made: dict[str, Target] = {
        "checkpoint": (_read_checkpoint, lambda draws: _damaged_zip(packed, draws), packed),
        "config.json": (_read_config, lambda draws: _damaged_json(_RUN["config.json"], draws), _RUN["config.json"]),
        "metrics.jsonl, to resume": (_keep_epochs, lambda draws: _damaged_json(metrics, draws), metrics),
    }
    for name, good in _RUN.items():
        reader = functools.partial(_read_run_with, name)
        made[f"{name}, to report"] = (reader, functools.partial(_damaged_json, good), good)
    return made


def read(reader: Reader, content: bytes, folder: Path) -> str:
    """Give an input to a reader: "read" or "refused".

    Raises:
        AssertionError: if it fails with an error that is not its own.
    """
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reader(content, folder)
        return "read"
    except OWN_ERRORS:
        return "refused"
    except ValueError as error:
        # A plain ValueError is our own where our own code raises it, and says so in one line.
        last = traceback.extract_tb(error.__traceback__)[-1]
        if type(error) is ValueError and "stochastic_depth" in last.filename:
            return "refused"
        raise AssertionError(f"a foreign error: {error!r}") from error
    except Exception as error:
        raise AssertionError(f"a foreign error: {error!r}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def guard(folder: Path) -> None:
    """From now on, this process must not hang, fill the memory, or open processes or files elsewhere."""

    def hang(_number: int, _frame: object) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, hang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"):
            os.write(2, f"forbidden: {event} {arguments}\n".encode())
            os._exit(3)
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = Path(arguments[0]).resolve()
            if not path.is_relative_to(folder.resolve()) and str(path) != "/dev/null":
                os.write(2, f"forbidden: writes {path}\n".encode())
                os._exit(3)

    sys.addaudithook(audit)


def fuzz(num_inputs: int, seed: int, folder: Path, only: str = "") -> Counter[str]:
    """Give this many inputs to the readers in turn; returns how many each reader read and refused."""
    outcomes: Counter[str] = Counter()
    of_reader = {name: target for name, target in targets().items() if only in name}
    places = {name: folder / str(index) for index, name in enumerate(of_reader)}
    for place in places.values():
        place.mkdir()
    for number in range(num_inputs):
        name = list(of_reader)[number % len(of_reader)]
        reader, make, _ = of_reader[name]
        content = make(random.Random(f"{seed}:{number}"))
        try:
            outcomes[f"{name}: {read(reader, content, places[name])}"] += 1
        except BaseException:
            print(f"input {number} of seed {seed}, {name}: {content[:2000]!r}", file=sys.stderr)
            raise
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name holds this")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "first"
        place.mkdir()
        for name, (reader, _, good) in targets().items():  # what is imported late is imported now
            assert read(reader, good, place) == "read", name
        guard(Path(folder))
        outcomes = fuzz(options.inputs, options.seed, Path(folder), options.only)
    for name, count in sorted(outcomes.items()):
        print(f"{count:7d}  {name}")
    print(f"{outcomes.total():7d}  inputs tried; every one read, or refused with an error of the reader's own")


if __name__ == "__main__":
    main()
