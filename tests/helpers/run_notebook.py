"""Executes a notebook, and keeps the outputs that a reader needs: what was printed, and pictures in few colors.

    python tests/helpers/run_notebook.py docs/tutorial.ipynb    # in place

Needs nbclient and ipykernel, of the extra `test`.
"""

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


NUM_COLORS = 64


def executed(notebook: Path, folder: Path):
    """The notebook with its outputs, run from the top in a kernel of its own, in a folder. An error is raised."""
    cells = nbformat.read(notebook, as_version=4)
    return NotebookClient(cells, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


def keep_small_outputs(notebook) -> None:
    """Removes logs, progress bars and times from the outputs, and makes pictures small."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_read(output)]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = in_few_colors(output.data["image/png"])


def is_read(output) -> bool:
    if output.output_type == "display_data":
        return "image/png" in output.data  # progress of a training is HTML
    return output.get("name") != "stderr" and bool(output.get("text", "").strip())


def in_few_colors(png: str) -> str:
    written = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(NUM_COLORS).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main(notebook: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        done = executed(notebook, Path(folder))
    keep_small_outputs(done)
    nbformat.write(done, notebook)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
