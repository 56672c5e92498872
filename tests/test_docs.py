"""The documentation: its site builds without a warning, its recipes run, and its links to code point at that code."""

import ast
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import stochastic_depth as sd

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Recipe(NamedTuple):
    """What a diff in the documentation needs around it to run.

    Attributes:
        imports: what the reader's script has imported.
        before: what it has done before.
        after: a training step with the model that the diff leaves behind.
        needs: a package that may be missing.
    """

    imports: str
    before: str = ""
    after: str = "model(torch.randn(4, 3, 64, 64)).sum().backward()"
    needs: str = "torch"


VIT = "model(torch.randn(4, 3, 224, 224)).sum().backward()"
RANK = "import torch.distributed as dist; from torch.nn.parallel import DistributedDataParallel"
SHARDED = "; from torch.distributed.device_mesh import init_device_mesh; from torch.distributed.fsdp import fully_shard"

RECIPES = {
    "README.md#1": Recipe("import timm", after=VIT, needs="timm"),
    "README.md#2": Recipe("", after="net(torch.randn(2, 3, 32, 32)).sum().backward()"),
    "docs/recipes.md#timm": Recipe("import timm; from timm.utils import ModelEmaV3", after=VIT, needs="timm"),
    "docs/recipes.md#torchvision": Recipe("import torchvision", needs="torchvision"),
    "docs/recipes.md#torchvision 2": Recipe("import torchvision", needs="torchvision"),
    "docs/recipes.md#transformers": Recipe(
        "from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments",
        after="model(torch.randn(4, 3, 64, 64)).logits.sum().backward()",
        needs="transformers",
    ),
    "docs/recipes.md#transformers 2": Recipe(
        "from transformers import AutoConfig, AutoModelForCausalLM",
        after="[model(torch.randint(50, (2, 8))).logits.sum().backward() for _ in range(3)]",
        needs="transformers",
    ),
    "docs/recipes.md#diffusers": Recipe(
        "from diffusers import DiTTransformer2DModel",
        after="for _ in range(3): transformer(torch.randn(2, 4, 8, 8), timestep=torch.tensor([1, 2]), "
        "class_labels=torch.tensor([1, 2])).sample.sum().backward()",
        needs="diffusers",
    ),
    "docs/recipes.md#Lightning": Recipe(
        "import lightning, timm",
        after="model = Classifier(); depth = model.depth; checkpoint = {}; model.on_save_checkpoint(checkpoint); "
        "model.on_load_checkpoint(checkpoint); model.net(torch.randn(64, 3, 32, 32)).sum().backward()",
        needs="lightning",
    ),
    "docs/recipes.md#Accelerate": Recipe(
        "import tempfile, timm; from accelerate import Accelerator",
        after="model(torch.randn(64, 3, 32, 32)).sum().backward(); accelerator.save_state(tempfile.mkdtemp())",
        needs="accelerate",
    ),
    "docs/recipes.md#DistributedDataParallel": Recipe(f"import timm; {RANK}", after=VIT, needs="timm"),
    "docs/recipes.md#FSDP2": Recipe(f"import timm; {RANK}{SHARDED}", after=VIT, needs="timm"),
    "docs/recipes.md#Your own loop": Recipe("", after="net(torch.randn(2, 3, 32, 32)).sum().backward()"),
    "docs/scale.md#DistributedDataParallel": Recipe(f"import timm; {RANK}", after=VIT, needs="timm"),
    "docs/scale.md#`shard_`: less traffic": Recipe(
        f"{RANK}{SHARDED}",
        before='num_ranks = 1; model = sd.models.cifar_resnet(20); init = init_device_mesh; '
        'init_device_mesh = lambda _, shape: init("cpu", shape)',
        after="model(torch.randn(2, 3, 32, 32)).sum().backward()",
    ),
}  # fmt: skip


def diffs() -> Iterator[tuple[str, str]]:
    """The diffs of all pages, by page and heading; in the README, which is one screen, by their number."""
    for page in PAGES:
        name, heading, found = str(page.relative_to(ROOT)), "", 0
        if name == "docs/language-models.md":
            continue  # Its diffs load a model from a hub; examples/layerskip.py, which is tested, is the same in full.
        for title, block in re.findall(r"^#+ ([^\n]*)$|^```diff\n(.*?)^```", page.read_text(), flags=re.M | re.S):
            if title:
                heading, found = title, 0 if name != "README.md" else found
                continue
            found += 1
            of_heading = heading if found == 1 else f"{heading} {found}"
            yield f"{name}#{found if name == 'README.md' else of_heading}", block


def with_the_change(diff: str) -> str:
    lines = diff.splitlines()
    assert all(line[:2] in ("+ ", "- ", "  ", "+") for line in lines), (
        "A line of a diff starts with '+ ', '- ' or '  '."
    )
    return "\n".join(line[2:] for line in lines if not line.startswith("-"))


@pytest.fixture
def process_group() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        time.sleep(0.2)  # See `process_group.group_of_one`.
        torch.distributed.destroy_process_group()


def test_every_diff_has_what_it_needs_to_run() -> None:
    assert sorted(name for name, _ in diffs()) == sorted(RECIPES)


# Warnings of these packages about their own code.
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("name", "diff"), [pytest.param(*found, id=found[0]) for found in diffs()])
def test_a_recipe_runs_and_drops_branches(
    name: str, diff: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES[name]
    pytest.importorskip(recipe.needs)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"torch": torch, "sd": sd}
    for code in (recipe.imports, recipe.before, with_the_change(diff), recipe.after):
        exec(compile(code, name, "exec"), namespace)
    depth = namespace["depth"]
    assert isinstance(depth, sd.Controller)
    assert depth.last_gates is not None
    assert min(depth.last_gates) < 1
    assert depth.masked == []


# ------------------------------------------------------------------------------------------ links to code


class Walk(NamedTuple):
    """A link of docs/how-it-works.md to the lines of a function."""

    name: str
    file: str
    first: int
    last: int


def walks() -> list[Walk]:
    links = re.findall(
        r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)#L(\d+)-L(\d+)\)", (ROOT / "docs/how-it-works.md").read_text()
    )
    return [Walk(name, file, int(first), int(last)) for name, file, first, last in links]


def lines_of(file: str, name: str) -> tuple[int, int]:
    """First and last line of a function or class, decorators included."""
    body = ast.parse((ROOT / file).read_text()).body
    for part in name.split("."):
        (node,) = [each for each in body if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name == part]
        body = node.body
    return min([node.lineno, *(each.lineno for each in node.decorator_list)]), node.end_lineno


@pytest.mark.parametrize("walk", walks(), ids=lambda walk: walk.name)
def test_the_walk_links_to_the_lines_of_the_functions_it_names(walk: Walk) -> None:
    first, last = lines_of(walk.file, walk.name)
    assert (walk.first, walk.last) == (first, last), "`python tests/test_docs.py` updates the links."


def test_the_walk_is_short() -> None:
    assert len({walk.file for walk in walks()}) <= 3
    assert sum(walk.last - walk.first + 1 for walk in {(w.file, w.name): w for w in walks()}.values()) <= 400


def update_the_walk() -> None:
    """Write the current lines into the links of docs/how-it-works.md."""
    page = ROOT / "docs/how-it-works.md"
    text = page.read_text()
    for walk in walks():
        first, last = lines_of(walk.file, walk.name)
        old, new = (f"[`{walk.name}`](../{walk.file}#L{a}-L{b})" for a, b in ((walk.first, walk.last), (first, last)))
        text = text.replace(old, new)
    page.write_text(text)


# ------------------------------------------------------------------------------------------ the site


def test_the_reference_has_every_public_name_and_no_other() -> None:
    documented = re.findall(
        r"^\.\. (?:auto)?(?:function|class|data):: (\w+)", (ROOT / "docs/api.md").read_text(), flags=re.M
    )
    returned = {"Cost", "CostCounts", "BranchGraphs"}  # what methods of the controller return, not to be made by users
    assert sorted(documented) == sorted({*dir(sd), *sd.models.__all__, *returned} - {"models", "__version__"})


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason="needs the extra docs")
    command = f"-m sphinx --fail-on-warning --quiet --builder html --conf-dir docs . {tmp_path / 'site'}".split()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    for page in ("docs/quickstart.html", "docs/recipes.html", "docs/api.html", "docs/results/speed.html"):
        assert f'href="{page}"' in home
    line = re.search(r'href="\.\./(source/[\w/.]+)#(L\d+)"', (tmp_path / "site/docs/how-it-works.html").read_text())
    assert f'name="{line[2]}"' in (tmp_path / "site" / line[1]).read_text()


if __name__ == "__main__":
    update_the_walk()
