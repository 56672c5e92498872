"""The table: every number against an independent computation from the files."""

import csv
import io
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from stochastic_depth_lab.experiments.config import Regularizers
from stochastic_depth_lab.report import read_run, text_table
from stochastic_depth_lab.report.runs import labels
from stochastic_depth_lab.report.table import NOTHING, constant_depth_of, html_table, rows, summary_csv, time_share

PUBLISHED = {"test_error": 5.23, "source": "Huang et al. 2016"}


@pytest.fixture
def published_pair(write_run):
    constant = write_run("constant", config={"published": {**PUBLISHED, "test_error": 6.41}})
    return constant, write_run("stochastic", stochastic=True, config={"name": "digits-stochastic"})


def test_text_table_word_for_word(published_pair):
    table = text_table([read_run(folder) for folder in published_pair], 120)
    assert table.replace(NOTHING, "-").splitlines() == [
        "                                                  digits-constant  digits-stochastic",
        "test error at lowest validation error, %                     5.12               5.12",
        "published test error, %                                      6.41                  -",
        "final test error, %                                          4.50               4.50",
        "lowest validation error, %                                   4.00               4.00",
        "reached at epoch                                                3                  3",
        "epochs                                                          4                  4",
        "training time, s                                             10.0                7.0",
        "training time per epoch, share of constant depth            1.000              0.700",
        "expected time if closed blocks take none, share             1.000              0.766",
        "expected depth, blocks                                       4.00               2.75",
        "realized depth, blocks                                       4.03               2.78",
        "expected cost, share of training FLOPs                      1.000              0.688",
        "realized cost, share of training FLOPs                      0.997              0.684",
        "mean |gradient| of first convolution                      0.00310            0.00310",
        "parameters                                                173,210            173,210",
        "",
        "digits-constant: published test error 6.41 %, Huang et al. 2016",
    ]


def independently(folder: Path, constant: Path) -> dict[str, float | None]:
    """The table's numbers, computed from the files by definition."""
    epochs, of_constant = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, constant)
    )
    config, branches, result = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("config", "branches", "result")
    )
    best = min(epochs, key=lambda e: (e["validation_error"], e["epoch"]))
    steps = sum(e["num_steps"] for e in epochs)
    seconds = sum(e["train_s"] for e in epochs)
    return {
        "test_error": best["test_error"],
        "published_test_error": config["published"] and config["published"]["test_error"],
        "final_test_error": epochs[-1]["test_error"],
        "validation_error": best["validation_error"],
        "best_epoch": best["epoch"],
        "epochs": len(epochs),
        "train_s": seconds,
        "time_share": seconds / len(epochs) / (sum(e["train_s"] for e in of_constant) / len(of_constant)),
        "expected_time": branches["expected_time"],
        "expected_depth": sum(branches["survival_probs"]),
        "realized_depth": sum(e["realized_depth"] * e["num_steps"] for e in epochs) / steps,
        "expected_cost": branches["expected_cost"],
        "realized_cost": sum(e["realized_cost"] * e["num_steps"] for e in epochs) / steps,
        "first_conv_grad": sum(e["first_conv_grad"] * e["num_steps"] for e in epochs) / steps,
        "num_parameters": result["num_parameters"],
    }


def test_every_number_of_table_and_csv(published_pair):
    pair = published_pair
    runs = [read_run(folder) for folder in pair]
    expected = [independently(folder, constant=pair[0]) for folder in pair]
    table = {row.key: row.values for row in rows(runs)}
    assert list(table) == list(expected[0])
    for key, values in table.items():
        for value, numbers in zip(values, expected, strict=True):
            assert value == (None if numbers[key] is None else pytest.approx(numbers[key])), key
    for line, numbers in zip(csv.DictReader(io.StringIO(summary_csv(runs))), expected, strict=True):
        line.pop("run")
        assert {key: float(text) if text else None for key, text in line.items()} == pytest.approx(numbers)


def test_no_published_row_where_nothing_is_published(write_run):
    assert "published" not in text_table([read_run(write_run())])


def test_unfinished_run_is_compared_per_epoch_with_a_remark(write_run):
    constant = read_run(write_run("constant"))
    half = read_run(write_run("half", stochastic=True, finished=False, num_epochs=2))
    # (0.7 + 1.4) / 2 epochs against (1 + 2 + 3 + 4) / 4 epochs
    assert time_share(half, [constant, half]) == pytest.approx(0.42)
    assert text_table([constant, half], 200).splitlines()[-1] == "digits-stochastic: unfinished: 2 of 4 epochs so far"
    assert rows([constant, half])[-1].cells == ("173,210", NOTHING)


def test_constant_depth_is_that_of_the_same_network_and_seed(write_run):
    other_network = read_run(write_run("a", config={"model": {"num_layers": 20}}))
    other_data = read_run(write_run("b", config={"data": {"dataset": "cifar10"}}))
    other_seed = read_run(write_run("c", config={"seed": 1}))
    same_seed = read_run(write_run("d", config={"seed": 2}))
    run = read_run(write_run("e", stochastic=True, config={"seed": 2}))
    assert constant_depth_of(run, [other_network, other_data, run]) is None
    assert time_share(run, [other_network, other_data, run]) is None
    assert constant_depth_of(run, [other_network, other_seed, run]) is other_seed
    assert constant_depth_of(run, [other_seed, same_seed, run]) is same_seed
    longer = read_run(write_run("g", config={"seed": 2, "recipe": {"epochs": 9, "batch_size": 64}}))
    assert constant_depth_of(run, [longer, same_seed, run]) is same_seed
    assert constant_depth_of(run, [other_seed, longer, run]) is longer
    dropout = asdict(Regularizers(activation_survival_prob=0.8))
    regularized = read_run(write_run("f", config={"seed": 2, "regularizers": dropout}))
    other_batch = read_run(write_run("h", config={"seed": 2, "recipe": {"epochs": 4, "batch_size": 999}}))
    assert constant_depth_of(run, [regularized, other_batch, run]) is None
    assert constant_depth_of(run, [regularized, other_seed, run]) is other_seed
    assert constant_depth_of(regularized, [regularized, same_seed]) is same_seed


@pytest.mark.parametrize(("width", "per_block"), [(80, [2, 2, 1]), (120, [3, 2]), (200, [5])])
def test_as_many_runs_stand_side_by_side_as_fit(write_run, width, per_block):
    runs = [read_run(write_run(f"run{i}", config={"seed": i})) for i in range(5)]
    blocks = text_table(runs, width).split("\n\n")
    assert [block.splitlines()[0].count("seed") for block in blocks] == per_block
    assert all(len(line) <= width for block in blocks for line in block.splitlines())
    for block in blocks:  # whatever is broken, each row is there once
        assert re.sub(r"\s+", " ", block).count("training time per epoch, share of") == 1


def test_html_table_escapes_names(write_run):
    html = html_table([read_run(write_run(config={"name": "<script>alert(1)</script>"}))])
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_time_across_machines_has_a_remark(write_run):
    constant, run = write_run("constant"), write_run("stochastic", stochastic=True, config={"precision": "bf16"})
    (constant / "environment.json").write_text('{"cpu": "A", "num_threads": 2, "started": "then"}')
    (run / "environment.json").write_text('{"cpu": "B", "num_threads": 2, "started": "now"}')
    remark = "digits-stochastic: its time is compared across a difference in cpu, precision"
    assert text_table([read_run(constant), read_run(run)], 200).splitlines()[-1] == remark


def test_many_runs_become_rows_that_can_be_sorted(write_run):
    runs = [read_run(write_run(f"run-{seed}", config={"seed": seed})) for seed in range(7)]
    few, many = html_table(runs[:6]), html_table(runs)
    assert few.count("<tr") == len(rows(runs)) + 1
    assert "sortable" not in few
    assert many.count("<tr") == 8
    assert '<table class="sortable">' in many
    assert '<tr><th scope="row">digits-constant, seed 6</th><td>5.12</td>' in many


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_many_runs_are_a_line_each_as_wide_as_the_terminal(write_run, width):
    settings = [(decay, size) for decay in (0.0, 1e-4, 1e-3, 1e-2) for size in (32, 64)]
    runs = [
        read_run(
            write_run(
                f"run-{decay}-{size}",
                stochastic=True,
                config={
                    "name": f"digits-stochastic-weight-decay-{decay}-batch-size-{size}-epochs-4",
                    "recipe": {"epochs": 4, "batch_size": size, "weight_decay": decay},
                },
            )
        )
        for decay, size in settings
    ]
    blocks = [block.splitlines() for block in text_table(runs, width).split("\n\n")]
    assert all(len(line) <= width for block in blocks for line in block)
    for block in blocks:
        assert [line.split("  ")[0] for line in block if line.startswith("batch")] == list(labels(runs))
    first = [line for block in blocks for line in block if line.startswith("batch 32 · wd 0 ")]
    values = [cell for line in first for cell in line.removeprefix("batch 32 · wd 0 ").split()]
    assert values == [row.cells[0] for row in rows(runs) if row.cells[0] != NOTHING]
