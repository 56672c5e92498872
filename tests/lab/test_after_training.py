"""The command line after training: subnetworks of a run, its calibration, and exported files."""

import csv
import hashlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch
from small_runs import CPU, float64, small, train
from torch import nn

import stochastic_depth as sd
from stochastic_depth_lab.after import export
from stochastic_depth_lab.after.finetuning import finetune
from stochastic_depth_lab.after.trained import Trained, load_trained
from stochastic_depth_lab.after.uncertainty import reliability
from stochastic_depth_lab.cli.main import main
from stochastic_depth_lab.data import batches


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of small runs, as `reproduce` leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    train(replace(small(), name="small-stochastic"), folder / "small-stochastic")
    train(replace(small(None), name="small-constant"), folder / "small-constant")
    return folder


def expected_logits(runs: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Test images as they are stored, and what the run's network, still stochastic, gives for them."""
    run = load_trained(runs / "small-stochastic", device=CPU)
    images = run.images.data.test.images[:40]
    with torch.no_grad():
        return images, run.model(run.images.normalization(images))


def test_subnetworks_of_a_pair_side_by_side(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["evaluate", str(runs / "small-stochastic"), "--subnetworks", "--order", "lesion", "--out", str(tmp_path)]
    )
    assert code == 0
    printed = capsys.readouterr()
    assert "small-constant" in printed.out  # found beside it
    assert "6 of 6 blocks" in printed.err
    rows = list(csv.DictReader((tmp_path / "subnetworks.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["small-constant"] * 6 + ["small-stochastic"] * 6
    assert [int(row["num_blocks"]) for row in rows] == [1, 2, 3, 4, 5, 6] * 2
    for name in ("num_parameters", "flops", "latency_ms"):
        values = [float(row[name]) for row in rows]
        assert all(value > 0 for value in values)
        assert values[0] < values[5]
    # The whole network is the run's: its error is what `evaluate` says of the best weights.
    main(["evaluate", str(runs / "small-stochastic")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("best weights  test"))
    assert float(line.split("error ")[1].split(" %")[0]) == pytest.approx(float(rows[11]["error"]), abs=0.01)
    assert (tmp_path / "subnetworks.png").stat().st_size > 1000
    assert (tmp_path / "subnetworks.svg").exists()


def test_each_subnetwork_is_fine_tuned_as_its_own_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs / "small-stochastic")
    command = ["evaluate", run, "--subnetworks", "--points", "2", "--finetune-epochs", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr()
    for name in ("small-constant", "small-stochastic"):
        (head,) = re.findall(rf"^{name}\n(.*)$", printed.out, flags=re.M)
        assert head.split() == ["blocks", "parameters", "FLOPs", "ms", "error", "recalibrated", "fine-tuned"]
    rows = list(csv.DictReader((tmp_path / "subnetworks.csv").read_text().splitlines()))
    folders = [tmp_path / "finetuned" / f"{row['run']}-{row['num_blocks']}-blocks-seed-0" for row in rows]
    assert len(folders) == 4
    for row, folder in zip(rows, folders, strict=True):
        config = json.loads((folder / "config.json").read_text())
        assert config["depth"] is None
        assert config["model"]["keep"] == list(range(int(row["num_blocks"])))
        assert config["initial_weights"] == hashlib.sha256(Path(f"{folder}.safetensors").read_bytes()).hexdigest()
        assert json.loads((folder / "result.json").read_text())["test_error"] == float(row["finetuned_error"])
    # A finished fine-tuning is not repeated, and is a run like any other.
    assert printed.err.count("epoch 1/1") == 4
    assert main(command) == 0
    assert "epoch 1/1" not in capsys.readouterr().err
    assert main(["export", str(folders[2]), "--format", "safetensors"]) == 0
    assert "3 blocks" in capsys.readouterr().out


def assert_same_outputs(given: torch.Tensor, expected: torch.Tensor) -> None:
    """A single forward in float32 by two programs: the tolerance is a share of the largest output."""
    torch.testing.assert_close(given, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


@pytest.fixture
def _float64() -> Generator[None]:
    with float64():
        yield


@pytest.mark.usefixtures("_float64")
def test_fine_tuning_is_plain_training_from_the_remaining_weights(runs: Path, tmp_path: Path) -> None:
    run = load_trained(runs / "small-stochastic", device=CPU)
    keep = [0, 1, 4]
    network = sd.subnetwork(run.model, keep)
    options = {"folder": tmp_path, "observers": [], "device": CPU, "data_root": None}
    error = finetune(run.smaller(keep), network, epochs=2, **options)
    trained = load_trained(next(tmp_path.glob("*/")), device=CPU)
    last = torch.load(next(tmp_path.glob("*/checkpoints/last.pt")), weights_only=True)["model"]

    optimizer = torch.optim.SGD(network.parameters(), lr=0.002, momentum=0.9, nesterov=True, weight_decay=1e-4)
    network.train()
    for step, batch in enumerate([*training_batches(run, epoch=1), *training_batches(run, epoch=2)]):
        optimizer.param_groups[0]["lr"] = one_cycle(step, 14, 0.002)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch[0]), batch[1]).backward()
        optimizer.step()
    assert last.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(last[name], value, atol=1e-12, rtol=1e-9)
    assert error == 100 - 100 * accuracy(trained)


def training_batches(run: Trained, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    normalization, augmentation = run.images.normalization, run.images.augmentation
    return list(
        batches(run.images.data.train, 16, normalization=normalization, augmentation=augmentation, seed=0, epoch=epoch)
    )


def one_cycle(step: int, num_steps: int, peak: float) -> float:
    """PyTorch's own schedule."""
    parameter = nn.Parameter(torch.zeros(1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD([parameter]), peak, num_steps, cycle_momentum=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for steps of the optimizer
        for _ in range(step):
            schedule.step()
    return schedule.get_last_lr()[0]


@torch.no_grad()
def accuracy(run: Trained) -> float:
    test = run.images.data.test
    answers = run.model(run.images.normalization(test.images)).argmax(1)
    return (answers == test.labels).double().mean().item()


def test_an_exported_subnetwork_continues_training_with_the_numbers_in_its_file(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.safetensors"
    kept = [0, 2, 3, 5]
    export_it = ["export", str(runs / "small-stochastic"), "--keep", *map(str, kept), "--format", "safetensors"]
    assert main([*export_it, "--out", str(path)]) == 0
    assert "4 blocks" in capsys.readouterr().out
    learn_on = ["train", "digits-constant", "--data.limit", "100", "--model.num-layers", "14", "--recipe.epochs", "1"]
    learn_on += ["--model.keep", *map(str, kept), "--weights", str(path), "--recipe.learning-rate", "1e-30"]
    assert main([*learn_on, "--out", str(tmp_path / "run")]) == 0
    # At this learning rate, only the statistics of BatchNorm change.
    after = load_trained(tmp_path / "run", device=CPU).model
    weights = safetensors.torch.load_file(path)
    for name, parameter in after.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], atol=0, rtol=1e-6)
    # A subnetwork of a subnetwork has the numbers of the whole.
    export_it = ["export", str(tmp_path / "run"), "--keep", "0", "2", "--format", "safetensors"]
    shown = subprocess.run([sys.executable, "-m", "stochastic_depth_lab", *export_it], capture_output=True, text=True)
    assert shown.returncode == 0
    assert shown.stderr == (
        "CifarResNet was not trained with stochastic depth: without some of its branches it may be far less accurate.\n"
    )
    with safetensors.safe_open(tmp_path / "run" / "digits-constant-smaller.safetensors", "pt") as file:
        assert json.loads(file.metadata()["keep"]) == [kept[0], kept[2]]


def test_calibration_of_subnetworks_against_one_forward(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(runs / "small-stochastic"), "--monte-carlo", "4", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("one forward ")
    assert lines[2].startswith("4 subnetworks ")
    rows = list(csv.DictReader((tmp_path / "reliability.csv").read_text().splitlines()))
    assert sum(int(row["count"]) for row in rows if row["prediction"] == "one forward") == 100
    assert (tmp_path / "reliability.png").stat().st_size > 1000
    assert main(["evaluate", str(runs / "small-constant"), "--monte-carlo", "4"]) == 2
    assert "constant depth" in capsys.readouterr().err


def test_calibration_by_hand() -> None:
    # Confidence 0.9 and right, 0.9 and wrong (one bin); 0.6 and right (another): |0.5 - 0.9| * 2/3 + |1 - 0.6| * 1/3.
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    measured = reliability("x", probabilities, torch.tensor([0, 1, 1]), doubt=torch.tensor([0.1, 0.7, 0.7]))
    assert measured.calibration_error == pytest.approx(0.4)
    assert measured.error == pytest.approx(100 / 3)
    assert measured.loss == pytest.approx(-(torch.tensor([0.9, 0.1, 0.6]).log().mean().item()))
    assert measured.mistakes_found == pytest.approx(0.75)  # before one of two right answers, level with the other
    assert [each.count for each in measured.bins] == [1, 2]
    assert reliability("x", probabilities, torch.tensor([0, 0, 1])).mistakes_found is None


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # PyTorch 2.11, loading its own file
@pytest.mark.parametrize("form", ["onnx", "torch-export", "safetensors"])
def test_a_file_gives_what_the_run_gives(
    form: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / f"network{export.SUFFIXES[form]}"
    assert main(["export", str(runs / "small-stochastic"), "--format", form, "--out", str(path)]) == 0
    assert "test images it differs by" in capsys.readouterr().out
    images, expected = expected_logits(runs)
    run = load_trained(runs / "small-stochastic", device=CPU)
    inputs = run.images.normalization(images)
    if form == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        given = torch.from_numpy(session.run(None, {"images": inputs.numpy()})[0])  # 40 images: the batch is dynamic
        metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    elif form == "torch-export":
        metadata = {}
        files = {"metadata.json": ""}
        given = torch.export.load(path, extra_files=files).module()(inputs)
        metadata = json.loads(files["metadata.json"])
    else:
        fresh = sd.models.cifar_resnet(14, 10, in_channels=1)
        fresh.load_state_dict(safetensors.torch.load_file(path), strict=True)
        given = fresh.eval()(inputs)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
    assert_same_outputs(given, expected)
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["mean"]) == run.images.normalization.mean.tolist()


def test_a_smaller_file_takes_images_as_they_are_stored(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.onnx"
    arguments = ["export", str(runs / "small-stochastic"), "--cost", "0.6", "--normalize", "--out", str(path)]
    assert main(arguments) == 0
    images, _ = expected_logits(runs)
    run = load_trained(runs / "small-stochastic", device=CPU)
    small_one = sd.subnetwork(run.model, cost=0.6)
    sd.recalibrate_batchnorm_(small_one, run.training_batches(1000))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert_same_outputs(given, small_one(run.images.normalization(images)))
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    residuals = [name for name, module in run.model.named_modules() if isinstance(module, sd.Residual)]
    left = [name for name, module in small_one.named_modules() if isinstance(module, sd.Residual)]
    assert [residuals[number] for number in json.loads(metadata["keep"])] == left
    whole = sum(parameter.numel() for parameter in run.model.parameters())
    assert f"{sum(parameter.numel() for parameter in small_one.parameters())} parameters" in capsys.readouterr().out
    assert path.stat().st_size < 4 * whole
    # Weights alone, of some blocks by their number.
    arguments = ["export", str(runs / "small-stochastic"), "--keep", "0", "2", "--format", "safetensors"]
    assert main(arguments) == 0
    weights = safetensors.torch.load_file(runs / "small-stochastic" / "small-stochastic-smaller.safetensors")
    assert {name.split(".")[1:3] == ["0", "0"] for name in weights if ".branch." in name} == {True, False}
    assert not [name for name in weights if name.startswith("groups.2.1")]


def test_a_program_needs_nothing_of_this_project(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    assert main(["export", str(runs / "small-stochastic"), "--format", "torch-export", "--out", str(path)]) == 0
    code = (
        f"import sys, torch; torch.export.load({str(path)!r}).module()(torch.zeros(3, 1, 8, 8)); "
        "assert not [name for name in sys.modules if name.startswith('stochastic_depth')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class NoOnnx(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(x.flatten(1))[1] * torch.special.airy_ai(x.sum())


def test_an_operator_that_onnx_lacks_is_named_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"ONNX cannot represent this network: .*(airy|svd)") as error:
        export.write_onnx(NoOnnx(), torch.ones(2, 1, 3, 3), {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "9"], "keep must contain indices in 0..5, but contains 9"),
        (["--cost", "0.01"], "below the smallest possible network"),
        (["--keep", "0", "--cost", "0.5"], "--keep and --cost exclude each other"),
        (["--order", "lesion"], "--order needs --cost: it says which blocks are removed first"),
        (["--format", "safetensors", "--normalize"], "safetensors holds weights only"),
        (["--format", "tensorflow"], "tensorflow"),
    ],
    ids=["keep", "cost", "both", "order", "normalize", "format"],
)
def test_wrong_input_exits_with_2_and_writes_nothing(
    options: list[str], message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "network.onnx"
    assert main(["export", str(runs / "small-stochastic"), "--out", str(out), *options]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "RUN", "--subnetworks", "--finetune-epochs", "0"], "--finetune-epochs must be at least 1"),
        (["evaluate", "RUN", "--subnetworks", "--points", "0"], "--points must be at least 1, but is 0"),
        (["evaluate", "RUN", "--finetune-epochs", "2"], "are for --subnetworks"),
        (["train", "digits-constant", "--out", "NEW", "--model.keep", "0", "60"], "indices in 0..26, but contains 60"),
        (["train", "digits-constant", "--out", "NEW", "--weights", "BROKEN"], "broken.safetensors is damaged"),
    ],
    ids=["no-epochs", "no-points", "finetune-alone", "keep", "weights"],
)
def test_wrong_subnetwork_options_exit_with_2(
    command: list[str], message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    paths = {"RUN": runs / "small-stochastic", "NEW": tmp_path / "new", "BROKEN": tmp_path / "broken.safetensors"}
    out = ["--out", str(tmp_path / "out")] if command[0] == "evaluate" else []
    assert main([str(paths.get(word, word)) for word in command] + out) == 2
    complaint = capsys.readouterr().err
    assert message in complaint.splitlines()[-1]
    assert not (tmp_path / "new" / "result.json").exists()


def test_a_file_that_differs_is_not_written(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_onnx = export.run_onnx
    monkeypatch.setattr(export, "run_onnx", lambda content, inputs: run_onnx(content, inputs) * 1.01)
    assert main(["export", str(runs / "small-stochastic"), "--out", str(tmp_path / "network.onnx")]) == 2
    assert "is not written: on 64 images it differs by 1.0e-02" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_is_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(runs / "small-stochastic")]) == 2
    assert "run pip install '.[export]' in a clone of the project." in capsys.readouterr().err


def test_without_a_run_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["evaluate", str(tmp_path), "--subnetworks"], ["export", str(tmp_path)]):
        assert main(arguments) == 2
        assert "is not a run folder" in capsys.readouterr().err
