"""``lvlm-probe study keys``: what may stand in a study's file."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from lvlm_probe.cli.shared.options import Json
from lvlm_probe.cli.shared.terminal import print_json, say
from lvlm_probe.errors import ProbeError

RUNS_BARE = True


def keys(
    word: Annotated[
        str | None, typer.Argument(metavar="WORD", help="Only keys, or readers, that have it in their name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the keys of a study's file, with what each holds, its default, meaning and an example.

    Example:  lvlm-probe study keys datasets
    """
    from lvlm_probe.study.keys import nearest
    from lvlm_probe.study.reference import study_keys

    entries = study_keys()
    found = [entry for entry in entries if word is None or word in entry.key or word == entry.reader]
    if not found:
        names = dict.fromkeys(name for entry in entries for name in (*entry.key.split("."), entry.reader or "") if name)
        raise ProbeError(f"no key of a study has {word!r} in its name; {nearest(str(word), names)}")
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in found])
        return
    for entry in found:
        whose = f", of the reader {entry.reader}" if entry.reader else ""
        default = "needed" if entry.default == "needed" else f"default: {entry.default}"
        say((entry.key, "bold"), f"  {entry.kind}{whose}; {default}")
        say(f"    {entry.says}")
        say((f"    {entry.example}", "dim"))
