"""Kills 2,000 recording processes with SIGKILL at random times and counts the damaged traces among those they finished.

    python tests/benchmarks/crash_trace.py [--kills 2000] [--seed 0] [--json]

Every finished file is opened and compared with what was recorded. Exits with 1 when a single one is not whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from crash_victims import kill_recorders


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=2000, help="how many processes to kill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times at which they are killed")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        toll = kill_recorders(Path(folder), kills=arguments.kills, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(toll)))
    else:
        print(
            f"{toll.kills} kills: {toll.files} finished trace files ({toll.traces} traces) and {toll.explanations} "
            f"explanations, {len(toll.damaged)} damaged; {toll.parts} unfinished .part files; {toll.seconds:.0f} s"
        )
        for fault in toll.damaged:
            print(f"damaged: {fault}", file=sys.stderr)
    return 1 if toll.damaged else 0


if __name__ == "__main__":
    sys.exit(main())
