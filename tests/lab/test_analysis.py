"""What a network learned, against its forward written out block by block."""

import json

import pytest
import torch
from small_runs import CPU, Silent, float64, small, train

import stochastic_depth as sd
from stochastic_depth_lab.after.analysis import analyze
from stochastic_depth_lab.cli.main import main
from stochastic_depth_lab.data import Normalization, load
from stochastic_depth_lab.experiments.config import Depth
from stochastic_depth_lab.report import ReportError
from stochastic_depth_lab.report.evaluations import read_analysis


@pytest.fixture(scope="module", params=[None, Depth(), Depth(rescale="train")], ids=["constant", "eval", "train"])
def analyzed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    observer = Silent()
    with float64():
        train(small(request.param, epochs=2), folder, observer=observer)
        return folder, request.param, observer, analyze(folder, device=CPU, num_images=60)


@torch.no_grad()
def by_hand(folder, depth, closed=None):
    """Logits of sixty test images with one block closed, and each block's mean |branch| / mean |shortcut|."""
    digits = load("digits")
    inputs = Normalization.fit(digits.train.images[:100], "channel")(digits.test.images[:60]).double()
    net = sd.models.cifar_resnet(14, 10, in_channels=1).double()
    net.load_state_dict(torch.load(folder / "checkpoints" / "best.pt", weights_only=True))
    net.eval()
    factors = sd.linear_decay(0.5)(6) if depth and depth.rescale == "eval" else [1.0] * 6
    x = net.relu(net.bn(net.conv(inputs)))
    shares = []
    for index, block in enumerate(block for group in net.groups for block in group):
        shortcut = x if block.residual.shortcut is None else block.residual.shortcut(x)
        branch = factors[index] * block.residual.branch(x) * (index != closed)
        shares.append((branch.abs().mean() / shortcut.abs().mean()).item())
        x = block.relu(shortcut + branch)
    return net.fc(net.pool(x).flatten(1)), shares, digits.test.labels[:60]


def test_shares_and_lesions_are_those_of_the_forward_written_out(analyzed):
    folder, depth, _, analysis = analyzed
    logits, shares, labels = by_hand(folder, depth)
    assert analysis.branch_shares == pytest.approx(shares)
    right = (logits.argmax(1) == labels).double()
    assert analysis.reliability.error == pytest.approx(100 * (1 - right.mean().item()))
    assert sum(each.count for each in analysis.reliability.bins) == analysis.num_images == 60
    for closed in range(6):
        logits, _, _ = by_hand(folder, depth, closed)
        wrong = 100 * (logits.argmax(1) != labels).double().mean().item()
        assert analysis.lesion_errors[closed] == pytest.approx(wrong)
    assert len(set(analysis.lesion_errors)) > 1
    assert read_analysis(folder) == analysis


def test_the_depths_of_the_steps_are_counted(analyzed):
    _, depth, observer, _ = analyzed
    for row in observer.rows:
        counts = row["depth_counts"]
        assert len(counts) == 7
        assert sum(counts) == row["num_steps"]
        mean = sum(number * count for number, count in enumerate(counts)) / row["num_steps"]
        assert mean == pytest.approx(row["realized_depth"])
    assert (observer.rows[0]["depth_counts"][6] == 7) == (depth is None)


def test_the_report_shows_it(analyzed, tmp_path, capsys):
    folder, depth, _, analysis = analyzed
    assert main(["report", str(folder), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "What the blocks do: small" in page
    assert ("The number of blocks that the steps ran" in page) == (depth is not None)
    assert (tmp_path / "figures" / "blocks-1.svg").exists()
    lines = (tmp_path / "data" / "analysis.csv").read_text().splitlines()
    assert len(lines) == 7
    assert float(lines[1].split(",")[3]) == analysis.branch_shares[0]
    capsys.readouterr()


def test_evaluate_analyze_prints_it(analyzed, capsys):
    folder, *_ = analyzed
    assert main(["evaluate", str(folder), "--analyze", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("groups.") == 6
    assert "expected calibration error" in shown.out
    assert main(["evaluate", str(folder), "--analyze", "--subnetworks"]) == 2


def test_a_damaged_file_is_one_line(analyzed, tmp_path):
    (tmp_path / "analysis.json").write_text(json.dumps({"names": ["a"]}))
    with pytest.raises(ReportError, match=r"analysis\.json is damaged"):
        read_analysis(tmp_path)
    assert read_analysis(tmp_path / "nowhere") is None
