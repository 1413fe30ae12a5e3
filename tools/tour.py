"""Make docs/tour.ipynb from docs/tour.py: run its cells, and keep their pictures.

    pip install '.[notebook]'
    python tools/tour.py

The notebook runs in the folder of docs/tour.py, as if it were opened there, and the commands in it
write to output-tour/. Names of machines, times and identifiers by chance are left out of the file,
so that it changes only where a cell or a picture does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.cli import UserError, run_cli
from common.files import ROOT, atomic_write

SOURCE = ROOT / "docs" / "tour.py"
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
SECONDS = 600  # a cell may take, on a slow machine
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@dataclass(kw_only=True)
class Tour:
    """Run the cells of docs/tour.py and write them with their pictures as a notebook."""

    output: Path = NOTEBOOK
    """Notebook to write, .ipynb."""

    def __post_init__(self) -> None:
        if self.output.suffix != ".ipynb":
            raise UserError(f"--output {self.output}: is no .ipynb file")


def read_source() -> Any:
    """The cells of docs/tour.py as a notebook without outputs."""
    try:
        import jupytext
    except ImportError:
        raise UserError("jupytext is missing: pip install '.[notebook]'") from None
    return jupytext.read(SOURCE)


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells in this Python, started in `folder`; the outputs are kept in the notebook.

    Raises UserError with a cell's message if it fails.
    """
    try:
        from ipykernel.kernelspec import make_ipkernel_cmd
        from jupyter_client.manager import AsyncKernelManager
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install '.[notebook]'") from None
    manager = AsyncKernelManager()
    # This Python, not one that is registered. Without the warning that the kernel, which only this
    # process talks to, is not encrypted.
    manager.kernel_spec.argv = make_ipkernel_cmd(extra_arguments=["--log-level=ERROR"])
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, km=manager, timeout=SECONDS, resources=resources, record_timing=False
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise UserError(f"{SOURCE.name}: a cell failed: {error.ename}: {error.evalue}") from None


def strip(notebook: Any) -> None:
    """Take out of a notebook what depends on the machine or on chance."""
    notebook.metadata = METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}


def main(args: Tour) -> None:
    """Make the notebook."""
    notebook = read_source()
    execute(notebook, SOURCE.parent)
    strip(notebook)
    import nbformat  # which nbclient needs too

    text = nbformat.writes(notebook)
    atomic_write(args.output, text + "\n")
    print(f"{len(notebook.cells)} cells, {len(text) / 1e6:.2f} MB: {args.output}")


if __name__ == "__main__":
    run_cli(Tour, main)
