"""Fails when a wheel lacks a file of the package that git would keep: weights, templates, page, specification."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def main() -> int:
    """Compares the package directory with the wheel named on the command line."""
    package = Path(__file__).parents[1] / "lvlm_probe"
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        shipped = set(wheel.namelist())
    wanted = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    missing = sorted(wanted - shipped)
    print(f"{len(wanted)} files of the package, {len(missing)} not in {Path(sys.argv[1]).name}", *missing, sep="\n  ")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
