"""Makes traces of the requests that ``sample_requests`` has kept, through the server that answered them.

    python integrations/vllm/make_traces.py samples.jsonl --server http://gpu:8000 --out runs/production

Run it where lvlm-probe is installed, when the server has time; it sends four requests for a row, two at a time, and no
more than ``--max-requests``. Rows that are traces already are passed over, so it can be run again as the file grows;
rows that cannot be taken are listed with the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import lvlm_probe as probe
from lvlm_probe.importing.rows import AnswerRow, BadRow, Source, read_rows
from lvlm_probe.serving import Server

DONE = "sampled.txt"
"""Beside the traces: a digest of every row that became one."""


def main(arguments: list[str] | None = None) -> int:
    """Make traces of a file's rows; the number of rows that could not be taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("--served-model", metavar="NAME")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-requests", type=int, default=2000)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    done = options.out / DONE
    known = set(done.read_text().split()) if done.is_file() else set()
    source = Source.of(options.samples)
    refused = made = 0
    with (
        probe.connect(options.server, options.served_model, concurrency=2, max_requests=options.max_requests) as server,
        done.open("a") as kept,
    ):
        for line, row in read_rows(source):
            content = row.content if isinstance(row, AnswerRow) else line
            key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
            if key in known:
                continue
            try:
                make(row, source, server, options.out)
            except (BadRow, probe.ProbeError) as error:
                if server.max_requests is not None and server.spent.requests >= server.max_requests:
                    print(f"line {line}: {error}", file=sys.stderr)
                    break
                refused += 1
                print(f"line {line} is not taken: {error}", file=sys.stderr)
                continue
            made += 1
            kept.write(key + "\n")
            kept.flush()
    print(f"{made} traces in {options.out}; {refused} rows are not taken")
    return refused


def make(row: AnswerRow | BadRow, source: Source, server: Server, out: Path) -> None:
    """Make the trace of a row. Raises ``BadRow``, or what stopped it."""
    if isinstance(row, BadRow):
        raise row
    if row.asked is None or row.answer is None:
        raise BadRow("several turns, text before an image, or no answer: a trace is of one question and its answer")
    system, question = row.asked
    images = row.open_images(source.places, fetch=False)
    server.ask(images, question, system=system, answer=row.answer, token_ids=row.token_ids, out=out)


if __name__ == "__main__":
    sys.exit(bool(main()))
