"""Interrupts real training in every way we know, again and again, until it has finished.

What it leaves must equal, bit for bit, what the uninterrupted run leaves. The long form is `make faults`:

    python tests/faults/faults.py --kills 100 --others 24
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "lab")]
from small_runs import assert_same, outcome  # noqa: E402

EXPERIMENT = shlex.split(
    "train digits-stochastic --model.num-layers 14 --data.limit 100 --recipe.batch-size 16 --recipe.checkpoint-every 1 "
    "--recipe.epoch-passes 1 --recipe.learning-rate 0.02 --recipe.num-threads 1"
)
DEADLINE_S = 30
"""What a cluster gives a process between SIGTERM and SIGKILL."""
WAIT_S = 300.0
"""How long a run may take to its next checkpoint before it counts as hanging."""
_PRELOADED = [
    "torch",
    "sklearn.datasets",
    "matplotlib",
    "stochastic_depth_lab.cli.main",
    "stochastic_depth_lab.training.loop",
]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(_PRELOADED)


def start(
    arguments: Sequence[str], log: Path, file_limit: int | None = None, variables: dict[str, str] | None = None
) -> BaseProcess:
    """The command line in a separate process, in which PyTorch is already loaded."""
    process = _FORKS.Process(target=_command, args=(list(arguments), str(log), file_limit, variables or {}))
    process.start()
    return process


def _command(arguments: list[str], log: str, file_limit: int | None, variables: dict[str, str]) -> None:
    from stochastic_depth_lab.cli.main import main

    os.environ.update(variables)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does: the write fails with an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(main(arguments))


class Interrupted:
    """One run that is interrupted until it has had all of its faults, and then finishes.

    Args:
        folder: holds the run and its log.
        epochs: of the run.
        moments: draws the moments of the faults.
        survived: counts the faults by kind.
    """

    def __init__(self, folder: Path, epochs: int, moments: random.Random, survived: Counter[str]) -> None:
        self.run = folder / "run"
        self.log = folder / "log"
        self.arguments = [*EXPERIMENT, "--recipe.epochs", str(epochs), "--out", str(self.run), "--resume"]
        self.moments = moments
        self.survived = survived
        self.checkpoints = self.run / "checkpoints"

    def finished(self) -> bool:
        return (self.run / "result.json").exists()

    def go_on(self, fault: str) -> None:
        """Start the run, inject the fault, and wait until it stops."""
        self._started_ns = time.time_ns()
        process = start(self.arguments, self.log, 20_000 if fault == "no space" else None)
        if fault == "no space":
            process.join(120)
            assert process.exitcode == (0 if self.finished() else 2), self.log.read_text()
        elif fault == "SIGTERM":
            self._wait(process)
            process.terminate()  # SIGTERM, unless it has just come to its end
            process.join(DEADLINE_S)
            # Before the command has put up its handler there is nothing to save, and the signal ends it.
            assert process.exitcode in (0, 128 + signal.SIGTERM, -signal.SIGTERM), self.log.read_text()
        else:
            (self._wait_for_write if fault == "kill in a write" else self._wait)(process)
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), self.log.read_text()
        # A run that was killed while it exited is finished: it is not resumed, which would repair the damage.
        if process.exitcode != 0 and not self.finished() and self._damage(fault):
            self.survived[fault] += 1
            self.survived["of these while a checkpoint was being written"] += self._in_a_write()

    def _in_a_write(self) -> bool:
        """Whether this process left, or is writing, a checkpoint that does not have its final name yet."""
        for name in ("next.pt.tmp", "next.pt"):
            try:
                if (self.checkpoints / name).stat().st_mtime_ns > self._started_ns:
                    return True
            except FileNotFoundError:
                pass
        return False

    def _wait(self, process: BaseProcess) -> None:
        """Wait until a random moment: during the start, or after a checkpoint, so that a slow machine makes progress
        too."""
        if self.moments.random() < 0.7:
            while process.is_alive() and not self._has_saved():
                time.sleep(0.002)
        end = time.monotonic() + self.moments.uniform(0, 1)
        while process.is_alive() and time.monotonic() < end:
            time.sleep(0.002)

    def _has_saved(self) -> bool:
        last = self.checkpoints / "last.pt"
        try:
            return last.stat().st_mtime_ns > self._started_ns
        except FileNotFoundError:
            return False

    def _wait_for_write(self, process: BaseProcess) -> None:
        """Wait until a checkpoint is being written."""
        self._wait(process)
        while process.is_alive() and not self._in_a_write():
            pass

    def _damage(self, fault: str) -> bool:
        """Damage the newest checkpoint if the fault is that, and there is one before it; False if there is not."""
        last = self.checkpoints / "last.pt"
        if fault not in DAMAGES:
            return True
        if not last.exists() or not (self.checkpoints / "previous.pt").exists():
            return False
        DAMAGES[fault](last, self.moments)
        return True


def _truncate(path: Path, moments: random.Random) -> None:
    os.truncate(path, moments.randrange(path.stat().st_size))


def _flip(path: Path, moments: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(moments.choice((1, 1, 8))):
        content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    path.write_bytes(content)


def _delete(path: Path, _moments: random.Random) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "newest truncated": _truncate,
    "bits flipped": _flip,
    "newest deleted": _delete,
}
OTHERS = (*DAMAGES, "no space", "SIGTERM")


def uninterrupted(folder: Path, epochs: int) -> dict[str, object]:
    """The outcome of a run without faults."""
    process = start([*EXPERIMENT, "--recipe.epochs", str(epochs), "--out", str(folder)], folder.with_suffix(".log"))
    process.join()
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()
    return outcome(folder)


def interrupt(folder: Path, *, epochs: int, kills: int, others: int, seed: int) -> Counter[str]:
    """Runs with faults until that many have happened; every run must end as the uninterrupted one.

    Returns:
        How many faults of each kind were survived, and how many runs they fell into.
    """
    moments = random.Random(seed)
    faults = [("kill", "kill in a write")[number % 4 == 3] for number in range(kills)]
    faults += [OTHERS[number % len(OTHERS)] for number in range(others)]
    moments.shuffle(faults)
    survived: Counter[str] = Counter()
    expected = uninterrupted(folder / "uninterrupted", epochs)
    while faults:
        place = folder / f"interrupted-{survived['runs']}"
        place.mkdir()
        run = Interrupted(place, epochs, moments, survived)
        while faults and not run.finished():
            before = survived[faults[-1]]
            run.go_on(faults[-1])
            if survived[faults[-1]] > before:
                faults.pop()
        if not run.finished():
            process = start(run.arguments, run.log)
            process.join()
            assert process.exitcode == 0, run.log.read_text()
        assert_same(outcome(run.run), expected)
        survived["runs"] += 1
    return survived


def start_two(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """The command line in two processes, which torchrun starts again when one of them dies."""
    torchrun = shlex.split("-m torch.distributed.run --nproc-per-node 2 --max-restarts 100 --monitor-interval 0.1")
    command = [sys.executable, *torchrun, "-m", "stochastic_depth_lab", *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _finish_with_two(arguments: Sequence[str], log: Path) -> None:
    """The command line in two processes, as torchrun starts them, to the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [{**address, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    processes = [start(arguments, log, variables=variables) for variables in ranks]
    for process in processes:
        process.join()
        assert process.exitcode == 0, log.read_text()


def _workers(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def interrupt_two(folder: Path, *, epochs: int, kills: int, seed: int) -> Counter[str]:
    """One of two processes is killed again and again; torchrun starts both again, from the last checkpoint.

    Then torchrun itself is stopped, and another one resumes the run.
    """
    moments = random.Random(seed)
    survived: Counter[str] = Counter()
    shared = [*EXPERIMENT, "--recipe.epochs", str(epochs)]
    log = folder / "log"
    _finish_with_two([*shared, "--out", str(folder / "whole")], log)
    run = folder / "parts"
    arguments = [*shared, "--out", str(run), "--resume"]
    last = run / "checkpoints" / "last.pt"
    process = start_two(arguments, log)

    def wait_for_checkpoint() -> None:
        started = time.time_ns()
        while process.poll() is None and not (last.exists() and last.stat().st_mtime_ns > started):
            assert time.time_ns() - started < WAIT_S * 1e9, f"no checkpoint for {WAIT_S} s: {log.read_text()[-2000:]}"
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))

    for _ in range(kills):
        wait_for_checkpoint()
        workers = _workers(process) if process.poll() is None else []
        if len(workers) == 2:
            try:
                os.kill(moments.choice(workers), signal.SIGKILL)
            except ProcessLookupError:  # It has just come to its end.
                continue
            survived["one of two processes killed"] += 1
    wait_for_checkpoint()
    if process.poll() is None:
        process.terminate()
        process.wait(DEADLINE_S + 30)
        survived["SIGTERM to torchrun"] += 1
        assert not (run / "result.json").exists()
        _finish_with_two(arguments, log)
    else:
        assert process.returncode == 0, log.read_text()
    assert_same(outcome(run), outcome(folder / "whole"))
    return survived


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--others", type=int, default=25)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--of-two", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        survived = interrupt(
            Path(folder), epochs=options.epochs, kills=options.kills, others=options.others, seed=options.seed
        )
    with tempfile.TemporaryDirectory() as folder:
        survived += interrupt_two(Path(folder), epochs=8 * options.of_two, kills=options.of_two, seed=options.seed)
    print("faults survived; every run ended with the weights and metrics of the uninterrupted one, bit for bit")
    for kind, count in sorted(survived.items()):
        print(f"{count:6d}  {kind}")


if __name__ == "__main__":
    main()
