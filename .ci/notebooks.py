"""Executes copies of the notebooks in examples/; fails when one raises, or says something else than what is stored.

    python .ci/notebooks.py            # what `make test` does
    python .ci/notebooks.py --write    # executes them and keeps the outputs

Compared are words, not figures: processors round differently. Of every cell the outputs have to be of the same kinds,
in the same order; texts are equal once each number is read as "a number" (NaN is none); images have the same format.
What goes to stderr is not compared, nor are widgets: bars of progress are one or the other.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

EXAMPLES = Path(__file__).parents[1] / "examples"
LARGEST = 500_000
"""Bytes: what a person still opens in a browser without waiting."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = re.compile(r"[-+−]?\d+(\.\d+)?(e[-+]?\d+)?")
_WIDGET = "application/vnd.jupyter.widget-view+json"


def executed(path: Path, kernel: AsyncKernelManager, folder: Path) -> Any:
    """The notebook, executed in a new folder and without the names of another one. Raises ``CellExecutionError``."""
    notebook = nbformat.read(path, as_version=4)
    folder.mkdir()
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {folder}"))
    NotebookClient(
        notebook,
        km=kernel,
        coalesce_streams=True,
        timeout=1800,
        startup_timeout=600,  # seconds; what hangs, as no notebook is judged by its time
    ).execute()
    del notebook.cells[0]
    return notebook


def kinds(cell: Any) -> list[tuple[str, ...]]:
    """What a cell put out, in order: texts with every number replaced by one sign, and the formats of all else."""
    found: list[tuple[str, ...]] = []
    for output in lasting(cell):
        if output.output_type != "stream":
            found.append((output.output_type, *sorted(output.get("data", ()))))
            continue
        text = _NUMBER.sub("<number>", " ".join(output.text.split()))
        if found and found[-1][0] == output.name:  # a bar came between
            text = f"{found.pop()[1]} {text}"
        found.append((output.name, text))
    return found


def lasting(cell: Any) -> list[Any]:
    """Outputs that are there to be read: neither stderr nor widgets."""
    return [
        output
        for output in cell.get("outputs", ())
        if output.get("name") != "stderr" and _WIDGET not in output.get("data", ())
    ]


def differences(stored: Any, new: Any) -> Iterator[str]:
    """Sentences about cells whose outputs differ in kind."""
    for number, (before, after) in enumerate(zip(stored.cells, new.cells, strict=True)):
        if kinds(before) != kinds(after):
            yield f"cell {number}:\n    stored {kinds(before)}\n    now    {kinds(after)}"


def bare(notebook: Any) -> Any:
    """Without times of execution, which change with every run, and without what does not last; cells are counted
    from 1."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count, cell.outputs = number, lasting(cell)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec",)} | {"language_info": {"name": "python"}}
    return notebook


def said_of(path: Path, kernel: AsyncKernelManager, folder: Path, *, write: bool) -> list[str]:
    """What is wrong with a notebook; with `write` the new outputs are kept."""
    said: list[str] = []
    try:
        new = executed(path, kernel, folder)
    except CellExecutionError as error:
        said.append(_COLOUR.sub("", str(error)))
    else:
        if write:
            nbformat.write(bare(new), path)
        else:
            said += differences(nbformat.read(path, as_version=4), new)
    if path.stat().st_size > LARGEST:
        said.append(f"{path.stat().st_size:,} bytes; at most {LARGEST:,}: show fewer or smaller images")
    return said


def main() -> int:
    """Checks or writes all notebooks; the exit status is 1 when one fails."""
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="1")
    failed = False
    kernel = AsyncKernelManager(kernel_name="python3")  # one for all: each would import torch, which takes seconds
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(EXAMPLES.glob("*.ipynb")):
            said = said_of(path, kernel, Path(folder) / path.stem, write="--write" in sys.argv[1:])
            print(f"{path.name}: {'FAILED' if said else 'ok'}", *said, sep="\n  ", flush=True)
            failed |= bool(said)
        asyncio.run(kernel.shutdown_kernel(now=True))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
