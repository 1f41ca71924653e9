"""Execute the notebooks top to bottom in a fresh kernel: `python tools/run_notebooks.py [--write] [name ...]`.

Without --write nothing is changed: it only checks that every cell runs. With it, outputs are stored in place.
Exits with 1 where a cell fails. Needs the `notebook` extra.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
CELL_SECONDS = 600
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in its own folder; raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    # The kernel adds the version of the Python at hand, which says nothing about the notebook.
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute the notebooks and report cells that fail.")
    parser.add_argument("names", nargs="*", help="notebooks without their ending (default: all)")
    parser.add_argument("--write", action="store_true", help="store the outputs in place")
    options = parser.parse_args(arguments)
    paths = [FOLDER / f"{name}.ipynb" for name in options.names] or sorted(FOLDER.glob("*.ipynb"))
    if missing := [p.stem for p in paths if not p.is_file()]:
        parser.error(f"there is no notebook {', '.join(missing)} in {FOLDER}")
    failed = [path for path in paths if not _run(path, options.write)]
    return 1 if failed or not paths else 0


def _run(path: pathlib.Path, write: bool) -> bool:
    try:
        notebook = execute(path)
    except CellExecutionError as error:
        print(f"{path.name}: a cell fails\n{error}", file=sys.stderr)
        return False
    if write:
        nbformat.write(notebook, path)
    print(f"{path.name}: {'written' if write else 'runs'}")
    return True


if __name__ == "__main__":
    sys.exit(main())
