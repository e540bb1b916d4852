"""``lvlm-probe study datasets``: which data sets can be read."""

from __future__ import annotations

from lvlm_probe.cli.shared.options import Json
from lvlm_probe.cli.shared.terminal import print_json, say

RUNS_BARE = True


def datasets(as_json: Json = False) -> None:
    """List the data sets that can be read, with the files that each expects.

    Example:  lvlm-probe study datasets
    """
    from lvlm_probe.study import readers

    found = readers()
    if as_json:
        print_json(found)
        return
    width = max(map(len, found))
    for name, layout in found.items():
        say((f"{name:<{width}}  ", "bold"), layout)
