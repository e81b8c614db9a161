"""The notebooks run, and what they print is what is stored in them.

    python tests/examples/test_notebooks.py

runs them where they are and stores their outputs.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MAX_BYTES = 400_000
# Last lines of cells that print nothing
SILENT = re.compile(r"^(def |class |import |from |%|    )|^\w[\w, ]* = ")


def execute(notebook, folder):
    """Gives its cells new outputs; CellExecutionError if one fails. What is warned of on stderr is left out."""
    settings = {"timeout": 120, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **settings).execute()
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(cell):
    """What a cell prints, and the types of what it shows. Pictures differ between machines in their last bits."""
    texts = ["".join(output.text for output in cell.outputs if output.output_type == "stream")]
    for output in cell.outputs:
        if output.output_type != "stream":
            html = output.data.get("text/html", "")
            texts.append((output.output_type, sorted(output.data), html))
    return texts


@pytest.mark.slow
def test_notebooks_are_as_stored(tmp_path):
    """They run in one process, as if they were one, since importing torch takes longer than the rest."""
    for name in ("images", "miniature"):
        (tmp_path / name).symlink_to(EXAMPLES / name)
    joined = read(NOTEBOOKS[0])
    for path in NOTEBOOKS[1:]:
        joined.cells += [nbformat.v4.new_code_cell("%reset -f"), *read(path).cells]
    for number, cell in enumerate(joined.cells):
        cell.id = f"cell-{number}"
    execute(joined, tmp_path)
    fresh = [cell for cell in code_cells(joined) if cell.source != "%reset -f"]
    stored = [cell for path in NOTEBOOKS for cell in code_cells(read(path))]
    for new, old in zip(fresh, stored, strict=True):
        assert texts_of(new) == texts_of(old), old.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES
    assert len(code_cells(notebook)) >= 8
    for number, cell in enumerate(code_cells(notebook), 1):
        assert cell.execution_count == number
        last = cell.source.splitlines()[-1]
        assert cell.outputs or SILENT.match(last) or number == 1, f"cell {number} was stored without its output"
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["adaptive_slicing", "expert_routing"]


if __name__ == "__main__":
    for notebook_path in NOTEBOOKS:
        rerun = read(notebook_path)
        execute(rerun, EXAMPLES)
        nbformat.write(rerun, notebook_path)
