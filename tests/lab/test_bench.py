"""`stochastic-depth bench`: ratios, expected FLOPs and bars, and one-line errors."""

import pytest

from stochastic_depth_lab.cli.main import main


def test_every_way_of_training_is_measured_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num-layers", "8", "--batch-size", "2", "--rounds", "2", "--device", "cpu"]
    assert main(["bench", *arguments, "--final-survival-prob", "0.4"]) == 0
    *rows, meaning, note = capsys.readouterr().out.splitlines()
    assert [row.split("█")[0].strip() for row in rows] == [
        "constant depth", "all gates open", "granularity batch", "granularity sample",
    ]  # fmt: skip
    ratios = [float(row.rpartition("█")[2].split()[0]) for row in rows]
    assert ratios[0] == 1.0
    assert all(ratio > 0 for ratio in ratios)
    expected = [float(row.split(" of FLOPs")[0].rpartition(" ")[2]) for row in rows]
    assert expected[:2] == [1.0, 1.0]
    # Three blocks of nearly the same FLOPs survive with 0.8, 0.6 and 0.4; the rest always runs.
    assert expected[2] == expected[3]
    assert 0.6 < expected[2] < 0.7
    times = [float(row.split(" of time)")[0].rpartition(" ")[2]) for row in rows]
    assert times[:2] == [1.0, 1.0]
    assert times[2] == times[3]
    assert 0.4 < times[2] < 1
    # Half a character of rounding, and what the three printed digits leave open.
    for row, ratio in zip(rows, ratios, strict=True):
        assert row.count("█") == pytest.approx(12 * ratio / max(1.0, *ratios), abs=0.52)
    assert "medians of 2 interleaved rounds" in note
    assert "1 threads" not in note
    assert all(len(row) <= 80 for row in [*rows, meaning])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--rounds", "0"], "at least one round", id="no round"),
        pytest.param(["--batch-size", "0"], "at least one round and one image", id="no image"),
        pytest.param(["--num-layers", "9"], "6n + 2", id="layers"),
        pytest.param(["--final-survival-prob", "0"], "must be in (0, 1]", id="probability"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
