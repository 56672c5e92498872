"""`stochastic-depth inspect`: the branches of a published model, its saving, and one line for what cannot be shown."""

import pytest

from stochastic_depth_lab.cli import main


def test_a_timm_model_is_shown_with_its_rates_and_its_saving(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "timm:vit_tiny_patch16_224", "--drop-path-rate", "0.4", "--image-size", "224"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("blocks.11.drop_path2") and "0.6000" in line for line in lines)
    # timm's decay over 12 blocks: 1 - 0.4 * l / 11 for l = 1..11, two branches each; block 0 has rate 0.
    assert any(
        f"expected depth: {2 * sum(1 - 0.4 * block / 11 for block in range(1, 12)):.2f} of 22" in x for x in lines
    )


@pytest.mark.parametrize(
    ("model", "rate", "said"),
    [
        pytest.param("timm:vit_tiny_patch16_22", "0.1", "Similar names", id="unknown model"),
        pytest.param("nowhere:vit", "0.1", "timm:NAME", id="unknown source"),
        pytest.param("timm:vit_tiny_patch16_224", "1", "drop rate of 1", id="a rate of 1"),
    ],
)
def test_what_cannot_be_shown_is_one_line(model: str, rate: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "--drop-path-rate", rate]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
