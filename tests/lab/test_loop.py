"""The loop compared with a plain one, and with interrupted runs."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_runs import CPU, Silent, assert_same, float64, outcome, small, train

import stochastic_depth as sd
from stochastic_depth_lab.after.evaluation import evaluate_run
from stochastic_depth_lab.data import Augmentation, Normalization, batches, load
from stochastic_depth_lab.errors import CheckpointError
from stochastic_depth_lab.experiments import config
from stochastic_depth_lab.experiments.config import Data, Depth, Regularizers
from stochastic_depth_lab.runs import checkpoint
from stochastic_depth_lab.training import loop
from stochastic_depth_lab.training.evaluation import Evaluation
from stochastic_depth_lab.training.loop import Interrupted
from stochastic_depth_lab.training.run import NotFiniteError, Run
from stochastic_depth_lab.training.schedules import learning_rate
from stochastic_depth_lab.training.setup import find_device


class StopAfter:
    """Requests a stop at the n-th call."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("depth", [None, Depth()], ids=["constant", "stochastic"])
def test_it_is_the_plain_loop(tmp_path, depth):
    """The optimizer's formula written out, gates drawn by the test's own controller, the mean computed by hand."""
    experiment = replace(small(depth, epochs=2), data=Data("digits", limit=100, translation=1))
    observer = Silent()
    with float64():
        result = train(experiment, tmp_path / "run", observer=observer)

    digits = load("digits")
    images, labels = digits.train.images[:100], digits.train.labels[:100]
    part = type(digits.train)(images, labels)
    normalization = Normalization.fit(images, "channel")
    torch.manual_seed(0)
    net = sd.models.cifar_resnet(14, 10, in_channels=1)
    control = sd.make_stochastic_(net.double(), sd.linear_decay(0.5), seed=0) if depth else None
    net.double()
    velocity = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for epoch in (1, 2):
        losses, gradients, depths = [], [], []
        order = batches(
            part, 16, normalization=normalization, augmentation=Augmentation(1, flip=False), seed=0, epoch=epoch
        )
        for step, (inputs, answers) in enumerate(order):
            rate = learning_rate(experiment.recipe, epoch, step, 7)
            net.train()
            net.zero_grad()
            loss = F.cross_entropy(net(inputs.double()), answers)
            loss.backward()
            losses.append(loss.item())
            gradients.append(net.conv.weight.grad.abs().mean().item())
            depths.append(sum(control.last_gates) if control else 6)
            with torch.no_grad():
                for parameter, v in zip(net.parameters(), velocity, strict=True):
                    gradient = parameter.grad + 1e-4 * parameter
                    v.mul_(0.9).add_(gradient)
                    parameter -= rate * (gradient + 0.9 * v)
        row = observer.rows[epoch - 1]
        assert (step + 1, len(answers)) == (7, 4)  # the last, short batch was used
        assert row["train_loss"] == pytest.approx(sum(losses) / 7)
        assert row["first_conv_grad"] == pytest.approx(sum(gradients) / 7)
        assert row["realized_depth"] == pytest.approx(sum(depths) / 7)
        assert row["learning_rate"] == rate
        test = normalization(digits.test.images[:100]).double()
        net.eval()
        wrong = (net(test).argmax(1) != digits.test.labels[:100]).sum().item()
        assert row["test_error"] == wrong  # of 100: percent
        assert row["test_loss"] == pytest.approx(F.cross_entropy(net(test), digits.test.labels[:100]).item())
    assert result["realized_depth"] == pytest.approx(sum(row["realized_depth"] for row in observer.rows) / 2)
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["model"]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_the_cost_is_that_of_the_gates(tmp_path):
    observer = Silent()
    train(small(), tmp_path / "run", observer=observer)
    net = sd.models.cifar_resnet(14, 10, in_channels=1)
    cost = sd.make_stochastic_(net, sd.linear_decay(0.5)).cost(torch.zeros(2, 1, 8, 8))
    for row in observer.rows:
        mean_gates = [count / row["num_steps"] for count in row["open_counts"]]
        assert row["realized_cost"] == pytest.approx(cost.share(mean_gates))  # linear in the gates of unnested branches
    branches = json.loads((tmp_path / "run" / "branches.json").read_text())
    assert branches["survival_probs"] == sd.linear_decay(0.5)(6)
    assert branches["expected_cost"] == pytest.approx(cost.flops_share)


def test_the_expected_time_is_measured_and_moves_no_gate(tmp_path, monkeypatch):
    """Of six blocks that take a tenth of a step each; gates of equal cost are drawn by FLOPs, the same in every run."""
    seen = []

    def measured(self, *inputs, measure=False):
        seen.append((measure, len(inputs[0])))
        counted = cost(self, *inputs)
        branches = tuple(replace(branch, time_s=0.1) for branch in counted.branches)
        return replace(counted, branches=branches, total=replace(counted.total, time_s=1.0)) if measure else counted

    experiment = small(Depth("linear_decay", 0.5, draw="equal_cost"))
    first, second = Silent(), Silent()
    train(experiment, tmp_path / "first", observer=first)
    cost = sd.Controller.cost
    monkeypatch.setattr(sd.Controller, "cost", measured)
    train(experiment, tmp_path / "second", observer=second)
    assert (True, min(64, experiment.recipe.batch_size)) in seen
    branches = json.loads((tmp_path / "second" / "branches.json").read_text())
    assert branches["expected_time"] == pytest.approx(1 - 0.1 * sum(1 - p for p in sd.linear_decay(0.5)(6)))
    assert [row["open_counts"] for row in first.rows] == [row["open_counts"] for row in second.rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Outcomes of whole runs by name: each is trained once."""
    folder = tmp_path_factory.mktemp("whole")
    experiments = {
        "constant": small(None),
        "stochastic": small(),
        "sample": small(Depth(granularity="sample")),
        "within epochs": small(validate_every=3, checkpoint_every=2),
        "over time": small(Depth(over_time="plateau", turn=0.3)),
        "regularized": replace(small(None), regularizers=Regularizers(0.8, 0.8, 0.3)),
    }
    for name, experiment in experiments.items():
        train(experiment, folder / name)
    return {name: (experiment, outcome(folder / name)) for name, experiment in experiments.items()}


@pytest.mark.parametrize("questions", [4, 7])
@pytest.mark.parametrize("name", ["constant", "stochastic", "sample", "within epochs", "over time", "regularized"])
def test_a_run_stopped_again_and_again_is_the_uninterrupted_one(tmp_path, uninterrupted, name, questions):
    experiment, expected = uninterrupted[name]
    starts = set()
    for _ in range(60):
        observer = Silent()
        try:
            train(experiment, tmp_path / "run", observer=observer, resume=True, stop_requested=StopAfter(questions))
            break
        except Interrupted:
            starts.update(observer.starts)
    assert len(starts) > 3
    assert any(0 < step < 7 for _, step in starts)
    assert_same(outcome(tmp_path / "run"), expected)


def test_a_run_killed_after_its_metrics_repeats_the_epoch(tmp_path, uninterrupted, monkeypatch):
    """Killed between the line of `metrics.jsonl` and the checkpoint, the moment at which the two disagree."""
    experiment, expected = uninterrupted["stochastic"]
    with monkeypatch.context() as patch:
        saves = iter(range(10))

        def dying(*arguments):
            if next(saves) == 2:
                raise KeyboardInterrupt
            checkpoint_save(*arguments)

        checkpoint_save = checkpoint.save
        patch.setattr(checkpoint, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            train(experiment, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 3
    with metrics.open("a") as file:
        file.write('{"epoch": 4, "tra')  # and a torn line
    train(experiment, tmp_path / "run", resume=True)
    assert_same(outcome(tmp_path / "run"), expected)


def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path, uninterrupted):
    experiment, expected = uninterrupted["stochastic"]
    with pytest.raises(Interrupted):
        train(experiment, tmp_path / "run", stop_requested=StopAfter(25))
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    observer = Silent()
    train(experiment, tmp_path / "run", resume=True, observer=observer)
    assert len(observer.remarks) == 1
    assert "last.pt is damaged" in observer.remarks[0]
    assert_same(outcome(tmp_path / "run"), expected)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, uninterrupted):
    experiment, _ = uninterrupted["stochastic"]
    with pytest.raises(Interrupted):
        train(experiment, tmp_path / "run", stop_requested=StopAfter(5))
    with pytest.raises(ValueError, match=r"seed: 0, not 1; recipe|seed: 0, not 1"):
        train(replace(experiment, seed=1), tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path):
    experiment = small(warmup_epochs=2, warmup_learning_rate=0.01, learning_rate=1e30, lr_schedule="step_text")
    with pytest.raises(NotFiniteError, match=r"the loss is (nan|inf) in epoch 3, step [2-7] of 7"):
        train(experiment, tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    saved = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["tally"]["step"]) == (3, 0)
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert not (tmp_path / "run" / "result.json").exists()


def test_the_reported_error_is_that_at_the_lowest_validation_error(tmp_path):
    observer = Silent()
    result = train(small(epochs=5, learning_rate=0.05), tmp_path / "run", observer=observer)
    best = min(observer.rows, key=lambda row: (row["validation_error"], row["validation_loss"]))
    assert (result["best_epoch"], result["test_error"]) == (best["epoch"], best["test_error"])
    assert result["final_test_error"] == observer.rows[-1]["test_error"]
    again = evaluate_run(tmp_path / "run", device=CPU)
    assert again["best"]["test"].error == result["test_error"]
    assert again["best"]["validation"].error == result["validation_error"]
    assert again["last"]["test"].error == result["final_test_error"]


def test_the_lowest_validation_error_may_lie_within_an_epoch(tmp_path, monkeypatch):
    """Every three steps, counted over all epochs of seven. Of equal errors the lower loss counts, then the first."""
    validations = {3: (50, 1), 6: (40, 1), 7: (45, 1), 9: (30, 1), 12: (30, 0.5), 14: (30, 0.7), 15: (60, 1)}
    validations |= {18: (30, 0.5), 21: (35, 0.1), 24: (35, 1), 27: (35, 1), 28: (35, 1)}
    seen = {"validation": [], "test": []}

    def scripted(run, split):
        after = 7 * (run.epoch - 1) + run.tally.step
        if split is run.images.data.validation:
            seen["validation"].append(after)
            return Evaluation(*map(float, validations[after]))
        seen["test"].append(after)
        return Evaluation(float(after), 1.0)

    monkeypatch.setattr(Run, "_evaluate", scripted)
    result = train(small(epochs=4, validate_every=3), tmp_path / "run")
    assert seen["validation"] == list(validations)  # none of them twice
    assert seen["test"] == [3, 6, 7, 9, 12, 14, 21, 28]  # where it was the lowest so far, and for each epoch's line
    assert (result["best_epoch"], result["best_step"]) == (2, 5)
    assert (result["validation_error"], result["test_error"], result["final_test_error"]) == (30, 12, 28)
    assert [row["test_error"] for row in _rows(tmp_path / "run")] == [7, 14, 21, 28]


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_mixed_precision_is_nearly_one_in_full_precision(tmp_path, precision):
    """A single step from the same weights: the losses of later steps depend on how the processor rounds."""
    single = small(epochs=1, batch_size=100)
    train(single, tmp_path / "full")
    train(replace(single, precision=precision), tmp_path / "mixed")
    (full,), (mixed,) = _rows(tmp_path / "full"), _rows(tmp_path / "mixed")
    for name in ("train_loss", "first_conv_grad"):
        assert mixed[name] == pytest.approx(full[name], rel=0.1)
        assert mixed[name] != full[name]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_resumes_bit_for_bit(tmp_path, precision):
    experiment = replace(small(epochs=2), precision=precision)
    result = train(experiment, tmp_path / "whole")
    assert math.isfinite(result["test_error"])
    with pytest.raises(Interrupted):
        train(experiment, tmp_path / "parts", stop_requested=StopAfter(5))
    train(experiment, tmp_path / "parts", resume=True)
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_global_settings_are_as_before(tmp_path):
    before = torch.get_num_threads()
    train(small(epochs=1, num_threads=before + 1), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["num_threads"] == before + 1
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:99", "cpu:1:2", "mps"])
def test_a_missing_device(name):
    with pytest.raises(ValueError, match=r"^(--device must be|There is no device)"):
        find_device(name, "fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_gpu_resumes_bit_for_bit(tmp_path, precision, cuda_graphs):
    experiment = replace(small(), precision=precision)
    train_there = partial(loop.train, device=find_device("cuda", precision), cuda_graphs=cuda_graphs)
    train_there(experiment, tmp_path / "whole", [Silent()])
    with pytest.raises(Interrupted):
        train_there(experiment, tmp_path / "parts", [Silent()], stop_requested=StopAfter(12))
    train_there(experiment, tmp_path / "parts", [Silent()], resume=True)
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


@pytest.mark.parametrize("change", [{"tally": 3}, {"model": {}}, {"gates": {"seed": 0}}, {"best": None}], ids=str)
def test_a_checkpoint_with_the_state_of_something_else_is_refused(tmp_path, change):
    experiment = small(epochs=1)
    train(experiment, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    path = tmp_path / "run" / "checkpoints"
    state, _ = checkpoint.load(path, config.as_json(experiment))
    for name in ("experiment", "format_version"):
        del state[name]
    checkpoint.save(path, {**state, **change}, config.as_json(experiment))  # whole, and with the right digest
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train(experiment, tmp_path / "run", resume=True)
