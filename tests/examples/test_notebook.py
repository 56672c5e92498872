"""The notebook runs from its first cell to its last, and shows what was committed."""

import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


# Warnings of the notebook's packages about their own code.
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_the_notebook_runs_and_draws_the_figures_that_it_shows() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    committed = nbformat.read(NOTEBOOK, as_version=4)
    run = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(run, timeout=300, kernel_name="python3")
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable  # whatever environment a kernel of this name was installed for
    client.execute()
    assert figures_and_lines(run) == figures_and_lines(committed), "`jupyter execute --inplace` updates the notebook."


def figures_and_lines(notebook: object) -> list[tuple[int, int]]:
    """For each code cell, the number of figures and of printed lines; the printed numbers depend on the machine."""
    counts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            figures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
            printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
            counts.append((len(figures), printed.count("\n")))
    return counts
