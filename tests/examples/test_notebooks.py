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


def execute(path, folder):
    """The notebook with new outputs; ExecutionError if a cell fails. What a machine warns of on stderr is left out."""
    notebook = nbformat.read(path, as_version=4)
    settings = {"timeout": 120, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **settings).execute()
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


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
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_as_stored(path, tmp_path):
    for name in ("images", "miniature"):
        (tmp_path / name).symlink_to(EXAMPLES / name)
    (tmp_path / path.name).write_bytes(path.read_bytes())
    fresh, stored = execute(tmp_path / path.name, tmp_path), nbformat.read(path, as_version=4)
    for number, (new, old) in enumerate(zip(code_cells(fresh), code_cells(stored), strict=True)):
        assert texts_of(new) == texts_of(old), f"cell {number}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
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
        nbformat.write(execute(notebook_path, EXAMPLES), notebook_path)
