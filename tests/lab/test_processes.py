"""Several processes train one run: each on its part of every batch; one writes; a resumed run is bit-identical."""

import contextlib
import errno
import json
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_runs import CPU, TIMES, Silent, assert_same, float64, outcome, small

sys.path[:0] = [str(Path(__file__).parents[1] / "library" / "distributed"), str(Path(__file__).parent)]
import ranks  # noqa: E402

import stochastic_depth as sd  # noqa: E402
from stochastic_depth_lab.cli.main import main  # noqa: E402
from stochastic_depth_lab.data import batches, load, part_of_batch  # noqa: E402
from stochastic_depth_lab.data.normalization import Normalization  # noqa: E402
from stochastic_depth_lab.errors import RunError  # noqa: E402
from stochastic_depth_lab.experiments.config import Depth, Experiment  # noqa: E402
from stochastic_depth_lab.runs import checkpoint  # noqa: E402
from stochastic_depth_lab.training import loop, setup  # noqa: E402
from stochastic_depth_lab.training.processes import Processes  # noqa: E402
from stochastic_depth_lab.training.setup import find_device  # noqa: E402

# Halves of 15 images differ, so that dropout draws more in one process than in the other.
SMALL = small(num_threads=1, validate_every=3, batch_size=15)
SMALL = replace(SMALL, regularizers=replace(SMALL.regularizers, activation_survival_prob=0.9))
# The last batch of an epoch has two images: of three processes one has none of them.
EXACT = replace(small(num_threads=1, epochs=2, validate_every=3), data=replace(SMALL.data, limit=98))
EXACT = replace(EXACT, regularizers=replace(EXACT.regularizers, filter_penalty=1e-3))


def _train(
    rank: int, folder: str, stop_after: int | None = None, experiment: Experiment = SMALL, **options: Any
) -> dict[str, Any]:
    """Trains; if it is to stop, only the second process is asked."""
    asked = [0]

    def stop_requested() -> bool:
        asked[0] += rank == 1
        return stop_after is not None and asked[0] > stop_after

    observer = Silent()
    processes = Processes(rank, dist.get_world_size(), dist.new_group(backend="gloo"))
    try:
        result = loop.train(
            experiment,
            Path(folder),
            [observer],
            device=CPU,
            stop_requested=stop_requested,
            processes=processes,
            **options,
        )
    except loop.Interrupted:
        result = {}
    return {"result": result, "rows": observer.rows, "starts": observer.starts, "seed": torch.initial_seed()}


def _whole_and_interrupted(rank: int, folder: str) -> dict[str, Any]:
    whole = _train(rank, f"{folder}/whole")
    stopped = _train(rank, f"{folder}/parts", stop_after=20)
    resumed = _train(rank, f"{folder}/parts", resume=True)
    try:
        _train(rank, f"{folder}/whole")
        refusal = ""
    except RunError as error:
        refusal = str(error)
    return {"whole": whole, "stopped": stopped, "resumed": resumed, "refusal": refusal, "full": _full(rank, folder)}


def _full(rank: int, folder: str) -> str:
    """The disk is full, which the first process alone can see, when it saves the first weights."""

    def full(path: Path, _content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(checkpoint, "write_whole", full)
        with pytest.raises(OSError, match="No space left on device") as error:
            _train(rank, f"{folder}/full")
    return Path(error.value.filename).name


@contextlib.contextmanager
def _layer_norm() -> Generator[None]:
    """Networks that normalize each image by itself, in float64: a batch is the mean of its parts to rounding."""
    plain = setup.build_network

    def built(*arguments: Any) -> Any:
        model, depth = plain(*arguments)
        for module in model.modules():
            for name, child in module.named_children():
                if isinstance(child, torch.nn.BatchNorm2d):
                    setattr(module, name, torch.nn.GroupNorm(1, child.num_features))
        model.double().register_forward_pre_hook(lambda _module, inputs: inputs[0].double())
        return model, depth

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "build_network", built)
        yield


def _with_layer_norm(rank: int, folder: str) -> dict[str, Any]:
    with _layer_norm():
        return _train(rank, folder, experiment=EXACT)


def test_three_processes_with_a_third_of_the_batch_each_equal_one_with_the_whole(tmp_path):
    of_three = ranks.run(_with_layer_norm, 3, str(tmp_path / "three"))
    observer = Silent()
    with _layer_norm():
        result = loop.train(EXACT, tmp_path / "alone", [observer], device=CPU)
    for of_rank in of_three:
        for three, alone in zip(of_rank["rows"], observer.rows, strict=True):
            numbers = {name: value for name, value in three.items() if name not in TIMES}
            torch.testing.assert_close(numbers, {name: alone[name] for name in numbers}, rtol=1e-5, atol=1e-7)
        assert of_rank["result"]["test_error"] == result["test_error"]
    three, alone = (
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("three", "alone")
    )
    assert three["gates"] == alone["gates"]
    for name, weight in alone["model"].items():
        torch.testing.assert_close(three["model"][name], weight, rtol=1e-10, atol=1e-12)


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
    # A single process gets the same evaluation as the two on their halves.
    assert main(["evaluate", str(folder / "whole"), "--device", "cpu"]) == 0
    assert f"best weights  test        error {first['whole']['result']['test_error']:.2f} %" in capsys.readouterr().out


def test_stopped_by_one_and_resumed_by_both_it_is_the_uninterrupted_run(trained):
    folder, (first, second) = trained
    assert first["stopped"]["result"] == second["stopped"]["result"] == {}
    assert first["resumed"]["starts"] == second["resumed"]["starts"] != [(1, 0)]
    assert_same(outcome(folder / "parts"), outcome(folder / "whole"))


def test_dropout_differs_between_processes_and_resumes(trained):
    _, (first, second) = trained
    assert first["whole"]["seed"] == first["resumed"]["seed"] != second["whole"]["seed"] == second["resumed"]["seed"]


def test_a_full_disk_ends_them_all_with_the_reason(trained):
    _, both = trained
    assert [of_rank["full"] for of_rank in both] == ["best.safetensors"] * 2


def test_a_refusal_of_the_first_process_ends_them_all(trained):
    _, both = trained
    assert all("is not empty" in of_rank["refusal"] for of_rank in both)


def _in_float64(rank: int, folder: str, experiment: Experiment) -> dict[str, Any]:
    with float64():
        return _train(rank, folder, experiment=experiment)


@pytest.mark.parametrize("depth", [None, Depth()], ids=["constant", "stochastic"])
def test_two_processes_are_the_plain_loop_over_the_halves_of_each_batch(tmp_path, depth):
    """BatchNorm normalizes each half by itself, and the running statistics are those of the first halves."""
    experiment = small(depth, epochs=1, batch_size=15, lr_schedule="step_text", num_threads=1)
    first, _ = ranks.run(_in_float64, 2, str(tmp_path / "run"), experiment)

    train = load("digits").train[torch.arange(100)]
    torch.manual_seed(0)
    net = sd.models.cifar_resnet(14, 10, in_channels=1).double()
    control = sd.make_stochastic_(net, sd.linear_decay(0.5), seed=0) if depth else None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)
    normalization = Normalization.fit(train.images, "channel")
    options = {"normalization": normalization, "seed": 0, "epoch": 1}
    losses, open_counts = [], [0.0] * 6
    for inputs, labels in batches(train, 15, **options):
        halves = [slice(0, len(labels) // 2), slice(len(labels) // 2, None)]
        total = 0.0
        for number, half in enumerate(halves):
            statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
            gates = (
                control.gates([gate == 1 for gate in control.last_gates])
                if control and number
                else contextlib.nullcontext()
            )
            with gates:
                loss = F.cross_entropy(net(inputs[half].double()), labels[half], reduction="sum") / len(labels)
            loss.backward()
            total += loss.item()
            if number:
                for name, buffer in net.named_buffers():
                    buffer.copy_(statistics[name])
        losses.append(total)
        open_counts = [
            n + gate for n, gate in zip(open_counts, control.last_gates if control else [1] * 6, strict=True)
        ]
        optimizer.step()
        optimizer.zero_grad()
    (row,) = first["rows"]
    assert row["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert row["open_counts"] == open_counts
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["model"]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(("num_images", "num_ranks"), [(5, 2), (16, 3), (1, 2), (2, 4)])
def test_the_parts_of_the_batches_are_the_batches(num_images, num_ranks):
    digits = load("digits", split_seed=0).train[torch.arange(16 + num_images)]
    normalization = Normalization.fit(digits.images, "channel")
    options = {"normalization": normalization, "seed": 3, "epoch": 1}
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


def test_batch_norm_is_synchronized_on_gpus_only():
    with pytest.raises(ValueError, match="synchronized, which PyTorch supports on GPUs only"):
        Processes(0, 2).wrapped(torch.nn.BatchNorm2d(3), torch.device("cpu"), synchronize_batch_norm=True)


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_device(None, "fp32", 3) == torch.device("cuda:3")
    assert find_device("cuda", "fp32", 2) == torch.device("cuda:2")
    assert find_device("cuda:1", "fp32", 2) == torch.device("cuda:1")
    assert find_device("cpu", "fp32", 2) == torch.device("cpu")
