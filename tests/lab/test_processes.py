"""Several processes on one run: each its part of every batch, one writes, resumed it is the uninterrupted run."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_runs import CPU, Silent, assert_same, outcome, small

sys.path[:0] = [str(Path(__file__).parents[1] / "library" / "distributed"), str(Path(__file__).parent)]
import ranks  # noqa: E402

from stochastic_depth_lab import loop  # noqa: E402
from stochastic_depth_lab.build import find_device  # noqa: E402
from stochastic_depth_lab.cli import main  # noqa: E402
from stochastic_depth_lab.data import batches, load, part_of_batch  # noqa: E402
from stochastic_depth_lab.data.normalisation import Normalisation  # noqa: E402
from stochastic_depth_lab.processes import Processes  # noqa: E402
from stochastic_depth_lab.records import RunError  # noqa: E402

SMALL = small(num_threads=1, validate_every=3)


def _train(rank: int, folder: str, stop_after: int | None = None, **options: Any) -> dict[str, Any]:
    """Trains; told to stop, only the second process is asked to."""
    asked = [0]

    def stop_requested() -> bool:
        asked[0] += rank == 1
        return stop_after is not None and asked[0] > stop_after

    observer = Silent()
    processes = Processes(rank, dist.get_world_size(), dist.new_group(backend="gloo"))
    try:
        result = loop.train(
            SMALL, Path(folder), [observer], device=CPU, stop_requested=stop_requested, processes=processes, **options
        )
    except loop.Interrupted:
        result = {}
    return {"result": result, "rows": observer.rows, "starts": observer.starts}


def _whole_and_interrupted(rank: int, folder: str) -> dict[str, Any]:
    whole = _train(rank, f"{folder}/whole")
    stopped = _train(rank, f"{folder}/parts", stop_after=20)
    resumed = _train(rank, f"{folder}/parts", resume=True)
    try:
        _train(rank, f"{folder}/whole")
        refusal = ""
    except RunError as error:
        refusal = str(error)
    return {"whole": whole, "stopped": stopped, "resumed": resumed, "refusal": refusal}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, ranks.run(_whole_and_interrupted, 2, str(folder))


def test_two_processes_agree_on_the_result_and_one_writes_it(trained, capsys):
    folder, (first, second) = trained
    assert first["whole"]["result"] == second["whole"]["result"]
    epochs = [json.loads(line)["epoch"] for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4]
    assert json.loads((folder / "whole" / "environment.json").read_text())["num_processes"] == 2
    # Evaluated by a single process, the weights give what the two have found on their halves.
    assert main(["evaluate", str(folder / "whole"), "--device", "cpu"]) == 0
    assert f"best weights  test        error {first['whole']['result']['test_error']:.2f} %" in capsys.readouterr().out


def test_stopped_by_one_and_resumed_by_both_it_is_the_uninterrupted_run(trained):
    folder, (first, second) = trained
    assert first["stopped"]["result"] == second["stopped"]["result"] == {}
    assert first["resumed"]["starts"] == second["resumed"]["starts"] != [(1, 0)]
    assert_same(outcome(folder / "parts"), outcome(folder / "whole"))


def test_a_refusal_of_the_first_process_ends_them_all(trained):
    _, both = trained
    assert all("is not empty" in of_rank["refusal"] for of_rank in both)


def test_a_single_process_learns_nearly_the_same(trained, tmp_path):
    """BatchNorm normalises by halves of the batch there, so the same only roughly."""
    _, (first, _) = trained
    observer = Silent()
    loop.train(SMALL, tmp_path / "alone", [observer], device=CPU)
    for alone, two in zip(observer.rows, first["whole"]["rows"], strict=True):
        assert two["train_loss"] == pytest.approx(alone["train_loss"], rel=0.25)
        assert two["open_counts"] == alone["open_counts"]


@pytest.mark.parametrize(("num_images", "num_ranks"), [(5, 2), (16, 3), (1, 2), (2, 4)])
def test_the_parts_of_the_batches_are_the_batches(num_images, num_ranks):
    digits = load("digits", split_seed=0).train[torch.arange(16 + num_images)]
    normalisation = Normalisation.fit(digits.images, "channel")
    options = {"normalisation": normalisation, "seed": 3, "epoch": 1}
    whole = list(batches(digits, 16, **options))
    parts = [list(batches(digits, 16, rank=rank, num_ranks=num_ranks, **options)) for rank in range(num_ranks)]
    for index, (inputs, labels) in enumerate(whole):
        lengths = [len(part_of_batch(len(labels), rank, num_ranks)) for rank in range(num_ranks)]
        own = [part[index] for part in parts]
        assert torch.equal(torch.cat([part[0][:n] for part, n in zip(own, lengths, strict=True)]), inputs)
        assert torch.equal(torch.cat([part[1][:n] for part, n in zip(own, lengths, strict=True)]), labels)
        assert all(len(part[1]) >= 1 for part in own)
        # Means over the parts, weighted as the loop does and averaged over the processes, are the mean over the batch.
        weights = [n * num_ranks / len(labels) for n in lengths]
        means = [part[1].double().mean() * weight for part, weight in zip(own, weights, strict=True)]
        assert sum(means) / num_ranks == pytest.approx(labels.double().mean().item())


def test_batch_norm_is_synchronised_on_gpus_only():
    with pytest.raises(ValueError, match="synchronised, which PyTorch does on GPUs only"):
        Processes(0, 2).wrapped(torch.nn.BatchNorm2d(3), torch.device("cpu"), synchronise_batch_norm=True)


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_device(None, "fp32", 3) == torch.device("cuda:3")
    assert find_device("cuda", "fp32", 2) == torch.device("cuda:2")
    assert find_device("cuda:1", "fp32", 2) == torch.device("cuda:1")
    assert find_device("cpu", "fp32", 2) == torch.device("cpu")
