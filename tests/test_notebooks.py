"""The notebooks run from top to bottom, and the ones in the repository show their outputs."""

import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytest.importorskip("optax")

from tools.run_notebooks import FOLDER, METADATA, execute, main  # noqa: E402

NAMES = ("01_generate", "02_logits_and_activations", "03_quantize_and_compare", "04_speculative", "05_export")
NAMES += ("06_lora",)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def errors(notebook):
    return [o for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "error"]


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_runs_in_a_fresh_kernel(name, monkeypatch):
    """Compiled as users compile: they train and compare in earnest, which takes longer than compiling."""
    for settings in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        monkeypatch.delenv(settings, raising=False)
    notebook = execute(FOLDER / f"{name}.ipynb")
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert errors(notebook) == []
    noise = [o.text for cell in cells for o in cell.outputs if o.get("name") == "stderr"]
    assert noise == []


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_of_one_whole_run(name):
    notebook = read(name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert errors(notebook) == []
    shown = [cell for cell in cells if re.search(r"plt\.show\(\)|print\(", cell.source)]
    assert shown
    assert [cell.source for cell in shown if not cell.outputs] == []


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebooks_hold_no_trace_of_a_machine(name):
    notebook = read(name)
    assert notebook.metadata == METADATA
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    places = (str(FOLDER.parent), str(pathlib.Path.home()), "site-packages", "ipykernel_")
    assert [place for place in places if f"{place}/" in text] == []
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == []


def test_a_failing_cell_is_an_exit_status(tmp_path, monkeypatch, capsys):
    cells = [nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "broken.ipynb")
    before = (tmp_path / "broken.ipynb").read_text()
    monkeypatch.setattr("tools.run_notebooks.FOLDER", tmp_path)
    assert main(["--write"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert (tmp_path / "broken.ipynb").read_text() == before
