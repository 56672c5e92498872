"""Display of a controller: print, notebook, plot, metrics; length, iteration, indexing, public names."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import MagicMock

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from reference import conv_net, counted_calls, images, mlp, vectors
from torch import nn

import stochastic_depth as sd
from stochastic_depth.display import GateInfo, stages

matplotlib.use("Agg")
ROOT = Path(__file__).parents[2]
PROBS = [0.9, 0.6, 0.3, 1.0]


class Page(HTMLParser):
    """Text, bars and tags of the table, and whether its tags are balanced."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.bars: list[float] = []
        self.marks: list[float] = []
        self.text: list[str] = []
        self.feed(source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        own = dict(attrs)
        if own.get("class") == "fill":
            self.bars.append(float(re.findall(r"width:([\d.]+)%", own["style"] or "")[0]) / 100)
        if own.get("class") == "mark":
            self.marks.append(float(re.findall(r"calc\(([\d.]+)%", own["style"] or "")[0]) / 100)
        if tag not in ("br", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def small(**options: object) -> tuple[nn.Module, sd.Controller]:
    net = mlp()
    return net, sd.make_stochastic_(net, PROBS, **options)


# ---------------------------------------------------------------------------------------------- print


def test_print_starts_with_a_summary_and_folds_stages() -> None:
    depth = sd.make_stochastic_(sd.models.cifar_resnet(110), sd.linear_decay(0.5))
    assert str(depth).splitlines() == [
        "54 branches, expected depth 40.25: an average step skips 25.5% of branch runs",
        "branch                  count  survival          treatment",
        "groups.0.0-17.residual     18  0.9907 to 0.8333  skip",
        "groups.1.0-17.residual     18  0.8241 to 0.6667  skip",
        "groups.2.0-17.residual     18  0.6574 to 0.5000  skip",
        "granularity 'batch', rescale 'eval', skipped_grad 'zero', draw 'bernoulli',",
        "ranks 'agree', seed 0",
    ]


def test_a_vit_is_printed_in_80_columns() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.5)
    lines = str(sd.make_stochastic_(model)).splitlines()
    assert lines[0].startswith("22 branches, expected depth 16.00: ")
    assert lines[2] == "blocks.1-11.drop_path*     22  0.9545 to 0.5000  subset"
    assert max(map(len, lines)) <= 80


def test_print_tells_the_cost_once_it_was_counted() -> None:
    _, depth = small()
    assert "FLOPs" not in str(depth)
    share = depth.cost(vectors(3)).flops_share
    assert f"training FLOPs: {share:.1%} of constant depth" in str(depth).splitlines()
    depth.set_survival_probs([1.0] * 4)
    assert "training FLOPs: 100.0% of constant depth" in str(depth)


class Remembers(nn.Module):
    """Stores a tensor in its forward, so that its branch is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = nn.Identity()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        self.aux = y
        return x + self.drop_path(y)


def test_masked_branches_are_rows_of_their_own_save_nothing_and_share_a_line_for_the_cause() -> None:
    layers = pytest.importorskip("timm.layers")
    blocks = [Remembers() for _ in range(10)]
    for block in blocks:
        block.drop_path = layers.DropPath(0.5)
    net = nn.Sequential(*blocks)
    depth = sd.make_stochastic_(net)
    with pytest.warns(sd.MaskedBranchWarning):
        net(torch.randn(6, 4))
    lines = str(depth).splitlines()
    assert lines[0] == "10 branches, expected depth 5.00: an average step skips 0.0% of branch runs"
    assert lines[2].split() == ["0-9.drop_path", "10", "0.5000", "mask"]
    (cause,) = [line for line in lines if "nothing is saved" in line]
    assert cause.startswith("0.drop_path and 9 more: mask, nothing is saved: the forward stores aux")
    assert {gate.treatment for gate in depth} == {"mask"}
    assert "stores aux" in depth[0].cause


NAMES = {
    "one number": ([f"blocks.{n}.a" for n in range(9)], ["blocks.0-8.a"]),
    "gaps": ([f"b.{n}" for n in (0, 1, 2, 5, 7, 8, 10, 12, 14)], ["b.0-2,5,7-8,10,12,14"]),
    "two branches per block": ([f"b.{n}#{k}" for n in range(5) for k in (1, 2)], ["b.0-4#*"]),
    "other names per block": ([f"b.{n}.{k}" for n in range(5) for k in ("attn.0", "mlp.0")], ["b.0-4.*"]),
    "stages": ([f"s.{s}.blocks.{n}.x" for s in range(3) for n in range(4)], [f"s.{s}.blocks.0-3.x" for s in range(3)]),
    "in the root": ([str(n) for n in range(9)], ["0-8"]),
    "no numbers": ([f"block{letter}" for letter in "abcdefghi"], [f"block{letter}" for letter in "abcdefghi"]),
    "numbers within words": ([f"x1.conv{n}" for n in range(9)], [f"x1.conv{n}" for n in range(9)]),
    "few": ([f"b.{n}" for n in range(8)], [f"b.{n}" for n in range(8)]),
}


@pytest.mark.parametrize(("names", "labels"), NAMES.values(), ids=NAMES.keys())
def test_stages_are_found_by_the_numbers_in_names(names: list[str], labels: list[str]) -> None:
    rows = stages([GateInfo(name, 0.5, "skip") for name in names])
    assert [row.label for row in rows] == labels
    assert [gate.name for row in rows for gate in row.gates] == names


def test_a_stage_shows_its_first_and_last_probability_or_the_range() -> None:
    def survival(probs: list[float]) -> str:
        (row,) = stages([GateInfo(f"b.{n}", prob, "skip") for n, prob in enumerate(probs)])
        return row.survival

    assert survival([0.9 - 0.05 * n for n in range(9)]) == "0.9000 to 0.5000"
    assert survival([0.5 + 0.05 * n for n in range(9)]) == "0.5000 to 0.9000"
    assert survival([0.7, 0.9, 0.5, *[0.6] * 6]) == "0.5000 to 0.9000"
    assert survival([0.8] * 9) == "0.8000"


# ---------------------------------------------------------------------------------------------- notebook


def test_the_table_of_a_notebook_has_a_bar_per_branch_and_the_saving_on_top() -> None:
    net, depth = small()
    assert Page(depth._repr_html_()).marks == []
    for _ in range(10):
        net(vectors(2))
    page = Page(depth._repr_html_())
    assert page.text[0] == "Average saving: 30.0% of branch runs"
    assert page.bars == pytest.approx([0.3, *PROBS])
    frequencies = [gate.frequency for gate in depth]
    assert page.marks == pytest.approx(frequencies)
    for name, frequency in zip(depth.names, frequencies, strict=True):
        at = page.text.index(name)
        assert f"{frequency:.3f}" in page.text[at : at + 4]
    assert "details" not in page.tags
    share = depth.cost(vectors(2)).flops_share
    assert (
        Page(depth._repr_html_()).text[0] == f"Average saving: 30.0% of branch runs, {1 - share:.1%} of training FLOPs"
    )


def test_long_models_are_folded_by_stage_in_a_notebook() -> None:
    depth = sd.make_stochastic_(sd.models.cifar_resnet(56), sd.linear_decay(0.5))
    page = Page(depth._repr_html_())
    assert page.tags.count("details") == page.tags.count("summary") == 3
    assert page.tags.count("table") == 4, "the header, and one for each stage"
    assert [name for name in page.text if name in depth.names] == depth.names
    of_stages = [sum(depth.survival_probs[9 * stage : 9 * stage + 9]) / 9 for stage in range(3)]
    assert page.bars[1::10] == pytest.approx(of_stages, abs=1e-4)


def test_names_and_notes_are_escaped() -> None:
    net = nn.Sequential()
    net.add_module("<b>&", sd.Residual(nn.Linear(2, 2)))
    depth = sd.make_stochastic_(net, [0.5])
    assert "<b>&" not in depth._repr_html_()
    assert "<b>&" in Page(depth._repr_html_()).text


# ---------------------------------------------------------------------------------------------- plot


def test_the_plot_shows_probabilities_and_frequencies() -> None:
    net, depth = small()
    axes = depth.plot()
    assert [bar.get_height() for bar in axes.patches] == PROBS
    assert not axes.lines, "nothing was drawn yet"
    for _ in range(5):
        net(vectors(2))
    mine = plt.figure().subplots()
    assert depth.plot(mine) is mine
    assert list(mine.lines[0].get_ydata()) == [gate.frequency for gate in depth]
    assert (
        "5 training steps" in mine.get_legend().get_texts()[-1].get_text() + mine.get_legend().get_texts()[0].get_text()
    )
    plt.close("all")


def test_the_plot_labels_stages() -> None:
    axes = sd.make_stochastic_(sd.models.cifar_resnet(56), sd.linear_decay(0.5)).plot()
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"groups.{n}.0-8.residual" for n in range(3)]
    assert list(axes.get_xticks()) == [4, 13, 22]
    plt.close("all")


def test_without_matplotlib_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _, depth = small()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"^depth\.plot\(\) needs matplotlib: pip install matplotlib$") as caught:
        depth.plot()
    assert caught.value.name == "matplotlib"
    assert caught.value.__suppress_context__


def test_matplotlib_and_numpy_are_not_imported_before() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import stochastic_depth as sd; "
        "depth = sd.make_stochastic_(sd.models.cifar_resnet(20), sd.linear_decay(0.5)); "
        "str(depth), depth._repr_html_(), depth.metrics(); "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "assert not new & {'matplotlib', 'numpy', 'IPython'}, new"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- metrics


def test_metrics_are_what_ran_since_the_last_call() -> None:
    net, depth = small(seed=3)
    assert depth.metrics() == {"stochastic_depth/expected_depth": pytest.approx(2.8)}
    for num_steps in (7, 4):
        with counted_calls(net) as calls:
            for _ in range(num_steps):
                net(vectors(2))
        ran = [len(sizes) / num_steps for sizes in calls]
        net.eval()(vectors(2))
        net.train()
        with depth.gates([True] * 4):
            net(vectors(2))
        metrics = depth.metrics()
        assert list(metrics) == [
            "stochastic_depth/expected_depth",
            "stochastic_depth/realized_depth",
            *[f"stochastic_depth/frequency/{name}" for name in depth.names],
        ]
        assert list(metrics.values()) == pytest.approx([2.8, sum(ran), *ran])
    assert all(type(value) is float for value in metrics.values())


def test_frequencies_of_single_samples() -> None:
    net = conv_net()
    depth = sd.make_stochastic_(net, [0.7] * 4, granularity="sample")
    with counted_calls(net) as calls:
        for num_samples in (3, 5, 8):
            net(images(num_samples))
    assert [len(sizes) for sizes in calls] == [3] * 4
    expected = [sum(size / of for size, of in zip(sizes, (3, 5, 8), strict=True)) / 3 for sizes in calls]
    metrics = depth.metrics()
    assert [metrics[f"stochastic_depth/frequency/{name}"] for name in depth.names] == pytest.approx(expected)


def test_the_cost_share_is_the_mean_of_the_steps() -> None:
    net, depth = small(seed=5)
    cost = depth.cost(vectors(2))
    shares = []
    for _ in range(6):
        net(vectors(2))
        shares.append(cost.share(depth.last_gates))
    assert depth.metrics()["stochastic_depth/cost_share"] == pytest.approx(sum(shares) / 6)
    assert depth.metrics() == {"stochastic_depth/expected_depth": depth.expected_depth}


def test_verify_cost_and_monte_carlo_are_no_training_steps() -> None:
    net, depth = small()
    x = vectors(3)
    depth.verify(x)
    depth.cost(x)
    sd.monte_carlo(net, x, num_samples=4)
    assert [gate.frequency for gate in depth] == [None] * 4


def test_names_of_metrics_are_those_that_mlflow_allows() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.a(x)
            return x + self.b(x)

    net = nn.Sequential(Block(), Block())
    depth = sd.make_stochastic_(net, [0.5] * 4)
    assert depth.names == ["0#1", "0#2", "1#1", "1#2"]
    net(torch.randn(2, 3))
    metrics = depth.metrics()
    assert len(metrics) == 2 + 4
    assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in metrics)


def test_copies_count_for_themselves() -> None:
    net, depth = small()
    net(vectors(2))
    depth.cost(vectors(2))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        own = sd.controller(other)
        assert own[0].frequency is None
        other(vectors(2))
        assert own.metrics()["stochastic_depth/realized_depth"] == sum(own.last_gates)
    assert depth.metrics()["stochastic_depth/realized_depth"] == sum(depth.last_gates)


# ---------------------------------------------------------------------------------------------- as a collection


def test_length_iteration_and_indexing() -> None:
    _, depth = small()
    assert len(depth) == 4
    assert [(gate.name, gate.survival_prob) for gate in depth] == list(zip(depth.names, PROBS, strict=True))
    assert depth[depth.names[1]] == depth[1] == list(depth)[1]
    assert depth[-1] == GateInfo(depth.names[3], 1.0, "always runs")
    assert depth.names[0] in depth
    assert "blocks.7" not in depth
    with pytest.raises(IndexError):
        depth[4]
    with pytest.raises(KeyError, match=r"No branch is called 'blocks.0.residul'\. Did you mean 'blocks.0.residual'\?"):
        depth["blocks.0.residul"]


def test_treatments() -> None:
    _, depth = small(granularity="sample")
    assert [gate.treatment for gate in depth] == ["subset", "subset", "subset", "always runs"]
    assert small()[1][0].treatment == "skip"


# ---------------------------------------------------------------------------------------------- names


def test_dir_shows_the_public_names() -> None:
    _, depth = small()
    assert dir(depth) == [
        *("capture", "cost", "expected_depth", "gates", "last_gates", "load_state_dict", "masked", "metrics", "names"),
        *(
            "plot",
            "release",
            "set_costs",
            "set_progress",
            "set_survival_probs",
            "state_dict",
            "survival_probs",
            "verify",
        ),
    ]
    assert all(hasattr(depth, name) for name in dir(depth))
    assert set(dir(sd)) == {*sd.__all__, "timm", "__version__"}
    assert all(hasattr(sd, name) for name in dir(sd))


def test_importing_everything_does_not_hide_timm() -> None:
    names: dict[str, object] = {"timm": "the package"}
    exec("from stochastic_depth import *", names)
    assert names["timm"] == "the package"
    assert names["linear_decay"] is sd.linear_decay
    assert sd.timm(0.5)(3) == [1.0, 0.75, 0.5]


def test_the_version_is_the_same_everywhere() -> None:
    assert sd.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {sd.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# ---------------------------------------------------------------------------------------------- schedules


def test_schedules_print_as_the_calls_that_made_them() -> None:
    for name, schedule in sd.SCHEDULES.items():
        made = schedule(0.5)
        assert repr(made) == ("timm(0.5)" if name == "convnext" else f"{name}(0.5)")
        assert eval(repr(made), vars(sd)) == made == pickle.loads(pickle.dumps(made))
        assert made != schedule(0.25)


VALUES = {
    "list": list,
    "tuple": tuple,
    "float64 array": np.array,
    "float32 array": lambda probs: np.array(probs, dtype=np.float32),
    "tensor": torch.tensor,
    "list of tensors": lambda probs: [torch.tensor(prob, dtype=torch.float64) for prob in probs],
    "list of numpy numbers": lambda probs: list(np.array(probs)),
    "parameter": lambda probs: nn.Parameter(torch.tensor(probs)),
}


@pytest.mark.parametrize("kind", VALUES.values(), ids=VALUES.keys())
def test_survival_probs_in_lists_tuples_arrays_and_tensors(kind) -> None:
    probs = [0.75, 0.5, 0.25, 1.0]
    for depth in (
        sd.make_stochastic_(mlp(), kind(probs)),
        sd.make_stochastic_(mlp(), lambda num_blocks: kind(probs[:num_blocks])),
    ):
        assert depth.survival_probs == probs
        depth.set_survival_probs(kind([0.5] * 4))
        assert depth.survival_probs == [0.5] * 4
        assert all(type(prob) is float for prob in depth.survival_probs)
    assert sd.expected_depth(kind(probs)) == 2.5
    with pytest.raises(ValueError, match=r"survival_probs\[1\] must be in \(0, 1\], but is 0\. It is the chance"):
        sd.make_stochastic_(mlp(), kind([0.5, 0.0, 0.5, 0.5]))


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)], ids=["float32", "array", "tensor"]
)
def test_single_numbers_of_numpy_and_torch(value) -> None:
    schedule = sd.linear_decay(value)
    assert (schedule, repr(schedule)) == (sd.linear_decay(0.5), "linear_decay(0.5)")
    assert schedule(np.int64(2)) == schedule(torch.tensor(2)) == [0.75, 0.5]
    with pytest.raises(TypeError, match=r"^schedule must be a schedule, such as linear_decay\(0.5\)"):
        sd.make_stochastic_(mlp(), value)
    with pytest.raises(TypeError, match="must be a number in"):
        sd.linear_decay(np.bool_(True))


# ---------------------------------------------------------------------------------------------- documentation


def test_the_recipes_for_loggers_log_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard itself, and stand-ins for W&B and MLflow that note what they are given."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    wandb, mlflow = MagicMock(), MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "logging.md").read_text()
    names: dict[str, object] = {}
    blocks = re.findall(r"^```(?:python|py)\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    depth = names["depth"]
    keys = {f"stochastic_depth/{name}" for name in ("expected_depth", "realized_depth", "cost_share")}
    keys |= {f"stochastic_depth/frequency/{name}" for name in depth.names}
    (run,) = (tmp_path / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(run)).Reload()
    assert set(events.Tags()["scalars"]) == keys
    assert [event.step for event in events.Scalars("stochastic_depth/cost_share")] == [4, 9]
    for log in (wandb.init().__enter__().log, mlflow.log_metrics):
        assert [call.kwargs["step"] for call in log.call_args_list] == [4, 9]
        assert all(set(call.args[0]) == keys for call in log.call_args_list)
    assert all(f"`{name}`" in page for name in ("GateInfo", "depth.metrics()", "depth.plot()"))
