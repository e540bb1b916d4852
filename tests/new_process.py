"""Processes in which nothing of the package is imported, but the libraries are that it stands on, which takes seconds.

They are forks of one Python that has imported those libraries and does nothing else. A test of what an import brings
along or leaves behind, or of other versions of the libraries, starts a Python of its own instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["run", "start"]

ENVIRONMENT = dict(os.environ)
PARENT = """
import importlib, json, os, sys
for name in (
    "h5py", "matplotlib.figure", "numpy", "PIL.Image", "rich.progress", "torch", "tqdm", "typer", "yaml",
    "transformers.generation", "transformers.image_processing_utils", "transformers.models.auto.processing_auto",
    "transformers.models.llava.modeling_llava", "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
):
    importlib.import_module(name)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for descriptor, path in enumerate(asked["streams"]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
sys.stdin = open(0, closefd=False)
os.chdir(asked["cwd"])
os.environ.clear()
os.environ.update(asked["env"])
sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
sys.argv[1:] = asked["arguments"]
exec(asked["code"], {"__name__": "__main__"})
"""


@cache
def _parent() -> Any:
    command = [sys.executable, "-c", PARENT]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


class Running:
    """A process that has been started; ``number`` is its process id."""

    def __init__(self, number: int) -> None:
        self.number = number

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return int(_parent().stdout.readline())


def start(
    code: str, *arguments: str, streams: tuple[Path, Path, Path], env: Mapping[str, str] | None = None, cwd: Any = None
) -> Running:
    """Begin what ``python -c CODE ARGUMENTS`` does; the next one begins when it has ended.

    Args:
        streams: files or FIFOs for its standard input, output and error.
        env: default: this process's.
        cwd: default: this process's.
    """
    asked = {
        "code": code, "arguments": arguments, "streams": [str(path) for path in streams],
        "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd()),
    }  # fmt: skip
    _parent().stdin.write(json.dumps(asked) + "\n")
    _parent().stdin.flush()
    return Running(int(_parent().stdout.readline()))


def run(
    code: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Any = None
) -> subprocess.CompletedProcess[str]:
    """Do what ``python -c CODE ARGUMENTS`` does, and return its code and what it has printed."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "error")]
        code_ = start(code, *arguments, streams=(Path(os.devnull), *said), env=env, cwd=cwd).wait()
        out, error = (path.read_text(encoding="utf-8") for path in said)
    return subprocess.CompletedProcess([sys.executable, "-c", code, *arguments], code_, out, error)
