"""What a stream costs while the model generates: a copy of a model that answers plainly beside one that is streamed.

    python tests/benchmarks/bench_stream.py                  # some ten minutes in one thread
    python tests/benchmarks/bench_stream.py --small          # a tiny model: that everything runs
    python tests/benchmarks/bench_stream.py --lag 16         # prints what log-likelihood ratios by chunks would cost

As in ``bench_recording.py``: two copies on one core, a token each in turn, which change places from round to round; a
figure is the median over pairs of rounds of the geometric mean of their ratios. Counted is the processor time from the
call to the last token, of the generating thread and of the thread that reads; what follows the last token (the file,
the baseline pass) is the same with and without a stream, and delays no word. Writes ``results/stream.json``.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_recording import QUESTION, AfterEachToken, build, in_turn, one_core
from random_model import write_results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_models

import lvlm_probe as probe

KINDS = ("nothing", "transformers' streamer", "recorded", "stream", "stream, and attention of every word")


class Clocked(AfterEachToken):
    """Also notes the processor time of the generating thread at each token."""

    def __init__(self, inner: AfterEachToken) -> None:
        super().__init__(inner.turns, inner.who)
        self.seconds = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.seconds = time.thread_time()
        return super().__call__(input_ids, scores, **more)


def side(kind: str, model: Any, processor: Any, given: Any, tokens: int, folder: str, into: list[float]) -> Any:
    """One side of ``in_turn``, which puts its seconds until the last token into ``into``."""
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}

    def run(timed: Callable[[Callable[..., Any]], None]) -> None:
        def generate(stopping_criteria: list[AfterEachToken]) -> None:
            clock = Clocked(stopping_criteria[0])
            more = {**given, **options, "stopping_criteria": [clock]}
            started = time.thread_time()
            if kind.startswith("stream"):
                said = started
                for word in attached.stream(folder, **more, by="token", record={"llr": False}):
                    if "attention" in kind:
                        _ = word.attention
                    said = time.thread_time()
                into.append(clock.seconds + said - started)  # the generating thread is new: its time began at nought
            elif kind == "recorded":
                with attached.record(folder, llr=False):
                    model.generate(**more)
                into.append(clock.seconds - started)
            else:
                streamer = transformers.TextStreamer(processor.tokenizer) if "streamer" in kind else None
                with open(os.devnull, "w") as nowhere:
                    if streamer is not None:
                        streamer.on_finalized_text = lambda text, stream_end=False: nowhere.write(text)  # type: ignore[method-assign]
                    model.generate(**more, **({"streamer": streamer} if streamer else {}))
                into.append(clock.seconds - started)

        if kind in KINDS[2:]:
            with probe.attach(model, processor) as attached:
                attached.attachment.boxes.update(PLACES)
                timed(generate)
                PLACES.update(attached.attachment.boxes)
        else:
            timed(generate)

    return run


PLACES: dict[Any, Any] = {}
"""Places of image tokens, which are found once per size of image."""


def lag(model: Any, asked: dict[str, Any], tokens: int, chunk: int) -> dict[str, float]:
    """Processor seconds of ratios that come every ``chunk`` tokens, from the model's cache of the baseline image.

    Returns:
        ``step``: one token of ``generate()``; ``begin``: prompt and baseline image into a cache; ``each``: one chunk
        behind it; ``once``: the one pass over all tokens that comes at the end.
    """
    prompt = asked["input_ids"].shape[1]

    def seconds(run: Callable[[], Any]) -> tuple[Any, float]:
        started = time.process_time()
        return run(), time.process_time() - started

    def generate(count: int) -> Any:
        return model.generate(**asked, min_new_tokens=count, max_new_tokens=count, do_sample=False)

    with torch.no_grad():
        answer, whole = seconds(lambda: generate(tokens))
        _, first = seconds(lambda: generate(1))
        said = answer[:, prompt:]
        begun, begin = seconds(lambda: model(**asked, use_cache=True, logits_to_keep=1))
        each = []
        for start in range(0, tokens - chunk + 1, chunk):
            part = {
                "input_ids": said[:, start : start + chunk],
                "attention_mask": torch.ones(1, prompt + start + chunk, dtype=torch.long),
                "past_key_values": begun.past_key_values,
            }
            each.append(seconds(lambda part=part: model(**part, use_cache=True))[1])  # type: ignore[misc]
        ids = torch.cat([asked["input_ids"], said[:, :-1]], dim=1)
        forced = {**asked, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        _, once = seconds(lambda: model(**forced, use_cache=False, logits_to_keep=tokens))
    step = (whole - first) / (tokens - 1)
    return {"step": step, "begin": begin, "each": statistics.median(each), "once": once}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=8, help="an even number")
    parser.add_argument("--small", action="store_true", help="a tiny model: figures mean nothing, but everything runs")
    parser.add_argument("--lag", type=int, help="tokens per chunk; measures that alone, and writes nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stream.json")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=probe.ProbeWarning)
    model, processor, edge = build(options.small)
    copies = model, copy.deepcopy(model)
    asked = [
        tiny_models.inputs("llava", each, processor, [tiny_models.picture(edge, edge)], QUESTION) for each in copies
    ]
    if options.lag:
        rounds = [lag(model, asked[0], options.tokens, options.lag) for _ in range(options.rounds)]
        told = {name: 1000 * statistics.median(each[name] for each in rounds) for name in rounds[0]}
        chunks = options.tokens // options.lag
        print(
            f"a token {told['step']:.0f} ms; the pass at the end {told['once']:.0f} ms; by {chunks} chunks of "
            f"{options.lag} {told['begin'] + chunks * told['each']:.0f} ms: {told['begin']:.0f} ms before the first "
            f"({told['begin'] / told['step']:.0f} tokens' time), {told['each']:.0f} ms for each"
        )
        return
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    seconds: list[float] = []
    before = os.getloadavg()[0]
    with one_core(), tempfile.TemporaryDirectory() as folder:
        for number in range(-1, options.rounds):  # the first round only warms up
            for kind in KINDS:
                took: tuple[list[float], list[float]] = [], []
                plain = number % 2
                roles = [KINDS[0] if who == plain else kind for who in (0, 1)]
                in_turn(*(
                    side(role, copies[who], processor, asked[who], options.tokens, folder, took[who])
                    for who, role in enumerate(roles)
                ))  # fmt: skip
                if number >= 0:
                    ratios[kind].append(took[1 - plain][0] / took[plain][0])
                    seconds.append(took[plain][0])
            print(f"\rround {number + 1}/{options.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    base = statistics.median(seconds)
    found = {}
    for kind, each in ratios.items():
        pairs = [math.sqrt(a * b) - 1 for a, b in zip(each[::2], each[1::2], strict=True)]
        found[kind] = {"overhead": statistics.median(pairs), "least": min(pairs), "most": max(pairs)}
        print(
            f"{kind:36s} {found[kind]['overhead']:+6.1%}  ({min(pairs):+.1%} to {max(pairs):+.1%})"
            f"  {1e6 * base * found[kind]['overhead'] / options.tokens:6.0f} us per token"
        )
    write_results(options.out, {
        "command": shlex.join(["python", "tests/benchmarks/bench_stream.py", *given]),
        "small": options.small, "weights": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": options.tokens, "rounds": options.rounds, "load_average": [before, os.getloadavg()[0]],
        "plain_cpu_seconds": base, "overheads": found,
    })  # fmt: skip


if __name__ == "__main__":
    main()
