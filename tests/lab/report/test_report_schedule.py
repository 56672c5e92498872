"""Schedules as text and as a figure."""

import pytest
from PIL import Image

from stochastic_depth_lab.report import ReportError, schedule_figure, schedule_text

LINEAR = [1 - block / 54 * 0.5 for block in range(1, 55)]


def test_paper_numbers():
    lines = schedule_text(range(1, 55), LINEAR).splitlines()
    # (3 L - 1) / 4 of the paper, L = 54
    assert lines[-1] == "expected depth 40.25 of 54 blocks: 25.5 % of the work is saved if all blocks cost the same"
    assert lines[1].split()[:2] == ["1", "0.991"]
    assert lines[-2].split()[:2] == ["54", "0.500"]
    assert lines[-2].count("█") == 20


@pytest.mark.parametrize("num_blocks", [1, 2, 30, 31, 54, 600])
def test_text_stays_short_and_shows_both_ends(num_blocks):
    lines = schedule_text(range(1, num_blocks + 1), [0.5] * num_blocks).splitlines()
    blocks = [int(line.split()[0]) for line in lines[1:-1]]
    assert len(blocks) <= 31
    assert blocks == sorted(set(blocks))
    assert (blocks[0], blocks[-1]) == (1, num_blocks)


def test_names_are_aligned():
    lines = schedule_text(["layer1.0", "l\n2"], [1.0, 0.5]).splitlines()
    assert lines[1].startswith("layer1.0  1.000  █")
    assert lines[2].startswith("     l\ufffd2  0.500  █")


@pytest.mark.parametrize("form", ["png", "svg"])
@pytest.mark.parametrize("num_blocks", [1, 54, 600])
def test_figure_is_written_the_same_every_time(tmp_path, form, num_blocks):
    blocks, probs = range(1, num_blocks + 1), [0.5] * num_blocks
    path = schedule_figure(blocks, probs, tmp_path / f"schedule.{form}")
    again = schedule_figure(blocks, probs, tmp_path / f"again.{form}")
    assert path.read_bytes() == again.read_bytes()
    if form == "png":
        with Image.open(path) as image:
            assert len(set(image.convert("L").tobytes())) > 10
    else:
        assert f"{num_blocks / 2:.2f} of {num_blocks} blocks" in path.read_text()


@pytest.mark.parametrize(
    ("names", "probs", "why"),
    [
        ([1, 2], [0.5], "1 for 2"),
        ([], [], "one survival probability per block"),
        ([1], [0.0], r"block 1 must be in \(0, 1\], but is 0.0"),
        (["a"], [float("nan")], "but is nan"),
        ([1], [1.2], "but is 1.2"),
    ],
)
def test_wrong_probabilities(names, probs, why, tmp_path):
    with pytest.raises(ReportError, match=why):
        schedule_text(names, probs)
    with pytest.raises(ReportError, match=why):
        schedule_figure(names, probs, tmp_path / "schedule.png")


def test_wrong_file_name_or_folder(tmp_path):
    with pytest.raises(ReportError, match=r"ends in \.png or \.svg, but a\.pdf"):
        schedule_figure([1], [0.5], tmp_path / "a.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        schedule_figure([1], [0.5], tmp_path / "file" / "a.png")
