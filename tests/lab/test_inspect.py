"""`stochastic-depth inspect`: the branches of a published model, its saving, and one line for what cannot be shown."""

import pytest

from stochastic_depth_lab.cli.main import main


def test_a_timm_model_is_shown_with_its_rates_and_its_saving(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "timm:vit_tiny_patch16_224", "--drop-path-rate", "0.4", "--image-size", "224"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("blocks.11.drop_path2  0.600 ") for line in lines)
    # timm's decay over 12 blocks: 1 - 0.4 * l / 11 for l = 1..11, two branches each; block 0 has rate 0.
    assert any(
        f"22 branches, expected depth {2 * sum(1 - 0.4 * block / 11 for block in range(1, 12)):.2f}:" in x
        for x in lines
    )


@pytest.mark.parametrize(
    ("arguments", "branch"),
    [
        pytest.param(
            ["torchvision:convnext_tiny", "--drop-path-rate", "0.5"], "features.7.2.stochastic_depth", id="torchvision"
        ),
        pytest.param(["torchvision:resnet18", "--schedule", "linear_decay"], "layer4.1#1", id="additions"),
        pytest.param(
            ["transformers:convnext", "--drop-path-rate", "0.5"],
            "encoder.stages.3.layers.2.drop_path",
            id="transformers",
        ),
    ],
)
def test_models_of_all_sources_are_shown_and_measured(
    arguments: list[str], branch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments, "--image-size", "32", "--measure", "--batch-size", "2"]) == 0
    output = capsys.readouterr().out
    (row,) = (line for line in output.splitlines() if line.startswith(f"{branch} ") and "%" in line)
    assert row.split()[1] == "0.500"
    assert "gradients, time when open" in output
    assert "median of 5 interleaved steps of 2 images on cpu" in output


@pytest.mark.parametrize(
    ("model", "rate", "said"),
    [
        pytest.param("timm:vit_tiny_patch16_22", "0.1", "Similar names", id="unknown model"),
        pytest.param("nowhere:vit", "0.1", "timm:NAME", id="unknown source"),
        pytest.param("timm:vit_tiny_patch16_224", "1", "--drop-path-rate must be in [0, 1)", id="a rate of 1"),
        pytest.param("torchvision:resnet", "0.1", "torchvision has no model", id="unknown to torchvision"),
        pytest.param("transformers:resnat", "0.1", "transformers has no model type", id="unknown to transformers"),
        pytest.param(
            "torchvision:resnet18",
            "0.1",
            "torchvision:resnet18 has no drop paths with a rate. Give it one: --schedule",
            id="no drop path",
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line(model: str, rate: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "--drop-path-rate", rate]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
