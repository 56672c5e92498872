"""The plan for the minutes on a GPU: limits, order, kills, and the packed files; rehearsed on the CPU."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "lab")]
import made_up_data  # noqa: E402
import reproduction_gpu as gpu  # noqa: E402

del sys.path[:2]

from stochastic_depth_lab.data import cifar  # noqa: E402


def in_fork(function: Callable[[], int]) -> int:
    """Exit code of a fork of this process, or minus the number of the signal that killed it."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)  # with more, OpenMP would wait for the threads of its parent, which a fork lacks
            os._exit(function())
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def setting_in(folder: Path) -> gpu.Setting:
    results = gpu.Results(folder / "gpu.json")
    return gpu.Setting(gpu.TINY, torch.device("cpu"), results, folder, (), time.monotonic() + 60)


def piece(name: str, run: Callable[[gpu.Setting], bool], limit_s: float = 20, **options: object) -> gpu.Piece:
    return gpu.Piece(name, run, limit_s, 0.1, **options)  # type: ignore[arg-type]


def kept(name: str, *, done: bool = True) -> Callable[[gpu.Setting], bool]:
    def run(setting: gpu.Setting) -> bool:
        number = setting.results.of(name).get("runs", 0)
        setting.results.keep(name, "runs", number + 1)
        return done

    return run


def follow(folder: Path, *pieces: gpu.Piece, seconds: float = 60) -> bool:
    return gpu.follow(pieces, setting_in(folder), time.monotonic() + seconds)


def test_a_piece_is_done_once(tmp_path: Path) -> None:
    pieces = [piece("one", kept("one")), piece("two", kept("two"))]
    assert follow(tmp_path, *pieces)
    assert follow(tmp_path, *pieces)
    results = gpu.Results(tmp_path / "gpu.json").read()
    assert (results["one"], results["two"]) == ({"runs": 1}, {"runs": 1})
    assert results["state"] == {"one": "done", "two": "done"}


def test_what_hangs_is_cut_off_and_what_it_had_measured_is_kept(tmp_path: Path) -> None:
    def hang(setting: gpu.Setting) -> bool:
        setting.results.keep("hanging", "first", 1)
        time.sleep(600)
        return True

    begin = time.monotonic()
    assert not follow(tmp_path, piece("hanging", hang, limit_s=0.2), piece("next", kept("next")))
    assert time.monotonic() - begin < 60
    results = gpu.Results(tmp_path / "gpu.json").read()
    assert results["state"] == {"hanging": "cut off", "next": "done"}
    assert results["hanging"] == {"first": 1}


def test_what_fails_says_why_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    def fail(_: gpu.Setting) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def crash(_: gpu.Setting) -> bool:
        os._exit(139)  # as after a segmentation fault

    assert not follow(tmp_path, piece("failing", fail), piece("crashing", crash), piece("next", kept("next")))
    results = gpu.Results(tmp_path / "gpu.json").read()
    assert results["state"] == {"failing": "failed", "crashing": "failed", "next": "done"}
    assert results["failing"]["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_pieces_that_failed_before_come_last(tmp_path: Path) -> None:
    order = []
    names = ("first", "second", "third")

    def noted(name: str) -> Callable[[gpu.Setting], bool]:
        def is_ready(_: gpu.Setting) -> bool:
            order.append(name)
            return True

        return is_ready

    for done in (("second",), names):
        follow(tmp_path, *(piece(name, kept(name, done=name in done), is_ready=noted(name)) for name in names[:2]))
    follow(tmp_path, *(piece(name, kept(name), is_ready=noted(name)) for name in names))
    assert order == ["first", "second", "first", "third"]


def test_pieces_that_do_not_fit_or_lack_data_do_not_start(tmp_path: Path) -> None:
    waiting = piece("waiting", kept("waiting"), is_ready=lambda _: (tmp_path / "data").exists())
    long = gpu.Piece("long", kept("long"), 600, 500)
    assert not follow(tmp_path, waiting, long, piece("short", kept("short")))
    assert gpu.Results(tmp_path / "gpu.json").of("tries") == {"short": 1}
    (tmp_path / "data").touch()
    assert follow(tmp_path, waiting)


def test_a_result_is_whole_whenever_the_script_is_killed(tmp_path: Path) -> None:
    def die(setting: gpu.Setting) -> bool:
        for number in range(1000):
            setting.results.keep("dying", f"result {number}", number)
            if number == 20:
                os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
        return True

    pieces = [piece("before", kept("before")), piece("dying", die), piece("after", kept("after"))]
    assert in_fork(lambda: follow(tmp_path, *pieces)) == -signal.SIGKILL
    results = gpu.Results(tmp_path / "gpu.json").read()
    assert results["state"] == {"before": "done"}
    assert len(results["dying"]) >= 21
    pieces[1] = piece("dying", kept("dying"))
    assert follow(tmp_path, *pieces)
    assert gpu.Results(tmp_path / "gpu.json").of("before") == {"runs": 1}


def test_results_are_copied_to_out_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))

    def train(setting: gpu.Setting) -> bool:
        setting.results.keep("pair", "epochs", 3)
        assert json.loads((out / "gpu.json").read_text())["pair"] == {"epochs": 3}
        for name in ("config.json", "checkpoints/last.pt", "checkpoints/previous.pt", "checkpoints/best.pt"):
            path = setting.out / "constant" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        return True

    assert follow(work, piece("train", train))
    assert sorted(path.name for path in out.iterdir()) == ["constant-best.pt", "constant.tar", "gpu.json"]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(out, elsewhere)
    gpu.unpack(elsewhere)
    found = sorted(str(path.relative_to(elsewhere / "constant")) for path in (elsewhere / "constant").rglob("*.*"))
    assert found == ["checkpoints/best.pt", "checkpoints/last.pt", "config.json"]


def test_every_file_with_tests_for_a_gpu_is_run_there() -> None:
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text() and path != Path(__file__)
    }
    assert marked == set(gpu.TEST_FILES)


@pytest.fixture
def halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two folders as `--pack` makes them, of made-up images."""
    source, made_up = tmp_path / "source", tmp_path / "made up"
    (source / "cifar10").mkdir(parents=True)
    made_up.mkdir()
    monkeypatch.setattr(cifar, "CIFAR10", made_up_data.write_cifar(made_up, cifar.CIFAR10, images_per_file=60))
    for name in (*gpu.SHEETS, *gpu.OTHERS):
        (source / "cifar10" / name).write_text(name)
    (source / gpu.RESTORE).write_text(
        "import shutil, sys, pathlib\n"
        "here = pathlib.Path(__file__).resolve().parent / 'cifar10'\n"
        f"assert sorted(path.name for path in here.iterdir()) == {sorted((*gpu.SHEETS, *gpu.OTHERS))!r}\n"
        f"shutil.copytree({str(made_up)!r}, sys.argv[1], dirs_exist_ok=True)\n"
    )
    gpu.pack(source, tmp_path / "build")
    return [tmp_path / "build" / "gpu-1", tmp_path / "build" / "gpu-2"]


def test_each_half_of_the_data_travels_once(halves: list[Path]) -> None:
    names = [{path.name for path in half.iterdir() if path.is_file()} for half in halves]
    assert names[0] == {*gpu.SHEETS[:3], gpu.RESTORE}
    assert names[1] == {*gpu.SHEETS[3:], *gpu.OTHERS}
    for package in gpu.PACKAGES:
        assert (halves[0] / "packages" / package / "__init__.py").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the script runs without this file's filters
def test_the_rehearsal_survives_being_killed_in_each_piece(
    halves: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_test = tmp_path / "test_small.py"
    small_test.write_text("def test_draws_what_a_cpu_draws():\n    pass\n")
    monkeypatch.setattr(gpu, "TEST_FILES", (str(small_test),))
    monkeypatch.setattr(gpu, "TINY", gpu.replace(gpu.TINY, timm=gpu.TINY.timm[:1]))
    out = tmp_path / "out"
    results = gpu.Results(out / "gpu.json")
    names = [each.name for each in gpu.plan(60)]

    def call(data: list[Path], victim: str | None = None) -> int:
        """The script; killed, with the process of the piece, when `victim` has kept its first result or epoch."""
        main = os.getpid()

        def die() -> None:
            os.kill(main, signal.SIGKILL)
            time.sleep(600)

        def keep(self: gpu.Results, piece: str, name: str, value: object) -> None:
            whole(self, piece, name, value)
            if os.getpid() != main and victim in (piece, f"{piece}, {name}"):
                die()

        def on_epoch(self: gpu.Lines, row: object) -> None:
            if victim == "pair, constant":
                die()

        whole = gpu.Results.keep
        monkeypatch.setattr(gpu.Results, "keep", keep)
        monkeypatch.setattr(gpu.Lines, "on_epoch", on_epoch)
        arguments = ["--device", "cpu", "--tiny", "--out", str(out), "--minutes", "5", "--data", *map(str, data)]
        return gpu.main(arguments)

    before: dict[str, object] = {}
    for name in names:
        if name == "pair, constant":  # with half of the data, all but the pair is done
            assert in_fork(lambda: call(halves[:1])) == gpu.AGAIN
            assert set(results.of("state")) == {each for each in names if not each.startswith("pair")}
            assert results.of("timm") == before["timm"]
        if results.of("state").get(name) != "done":
            assert in_fork(lambda name=name: call(halves, name) if "pair" in name else call(halves[:1], name)) == -9
        before = results.read()
    assert in_fork(lambda: call(halves)) == 0
    after = results.read()
    assert after["state"] == dict.fromkeys(names, "done")
    assert after["pair"]["epochs"] == before["pair"]["epochs"]
    assert after["pair"]["stochastic"]["epochs"] == after["pair"]["constant"]["epochs"] == 2
    for kind in ("constant", "stochastic"):
        assert len((out / kind / "metrics.jsonl").read_text().splitlines()) == 2
    assert "resumed" in json.loads((out / "constant" / "environment.json").read_text())
