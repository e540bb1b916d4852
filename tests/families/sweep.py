"""Checks families of the zoo, and says what each check measured.

python tests/families/sweep.py                        every family, on every backend it has; writes results.json
python tests/families/sweep.py llava qwen2_vl -v      some of them
python tests/families/sweep.py llava --backend pil --tiled --only gradient
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torchvision_shim  # noqa: E402, F401  (before anything imports torchvision)
from checks import CHECKS, run_checks  # noqa: E402
from zoo import MEMBERS, build, load_members  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="by default all")
    parser.add_argument("--backend", choices=("pil", "torchvision"), help="by default every one that a family has")
    parser.add_argument("--tiled", action="store_true", help="only the picture that triggers tiles")
    parser.add_argument("--only", nargs="*", default=(), choices=[check.__name__ for check in CHECKS])
    parser.add_argument("-v", "--verbose", action="store_true", help="notes of passed checks too")
    arguments = parser.parse_args()
    load_members()
    failed = 0
    for name in arguments.families or sorted(MEMBERS):
        member = MEMBERS[name]
        for backend in (arguments.backend,) if arguments.backend else member.backends:
            for tiled in (True,) if arguments.tiled else (False, True) if member.tiled else (False,):
                started = time.perf_counter()
                try:
                    verdicts = run_checks(build(name, backend), tiled=tiled, only=tuple(arguments.only))
                except Exception as error:
                    print(f"{name} {backend}: cannot be built: {type(error).__name__}: {error}")
                    failed += 1
                    continue
                marks = " ".join(
                    f"{v.check} {'–' if v.passed is None else 'ok' if v.passed else 'FAILED'}"
                    + (f" {v.figure:.1e}" if v.figure is not None else "")
                    for v in verdicts
                )
                print(f"{name} {backend}{' tiled' if tiled else ''} ({time.perf_counter() - started:.1f} s): {marks}")
                for verdict in verdicts:
                    if verdict.note and (arguments.verbose or verdict.passed is False):
                        print(f"    {verdict.check}: {verdict.note[:1500]}")
                failed += sum(verdict.passed is False for verdict in verdicts)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
