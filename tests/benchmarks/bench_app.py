"""When the first words of an answer are there in the app, and when they are coloured, beside plain streaming.

    python tests/benchmarks/bench_app.py                    # a minute in one thread
    python tests/benchmarks/bench_app.py --model DIR_OR_ID --rounds 5

In one run the same questions are asked in turn: plainly, ``generate()`` in a thread and transformers'
``TextIteratorStreamer``, with no probe anywhere; and of the app's ``Service``, without its page, which adds what the
browser takes. Both make the prompt. Seconds from the question to the first text, to the whole answer, and to the
coloured words, which take the baseline pass and the trace on disk. The first question is asked before, so that what is
found out once per image size is not in the figures but beside them. Writes ``results/app.json``.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from random_model import write_results
from transformers import TextIteratorStreamer

import lvlm_probe as probe
from lvlm_probe.app import Limits, Service
from lvlm_probe.models.prompts import chat_inputs, placed
from lvlm_probe.trace import Trace


def timed(texts: Iterator[Any]) -> dict[str, float]:
    """Seconds to the first text, to the last one, and to the trace, where there is one."""
    began, found = time.perf_counter(), {}
    for text in texts:
        now = time.perf_counter() - began
        if isinstance(text, Trace):
            found["coloured"] = now
        elif text.strip():
            found.setdefault("first", now)
            found["whole"] = now
    return found


def plain(model: Any, processor: Any, scene: Any, tokens: int) -> Iterator[str]:
    """An answer as transformers streams it."""
    inputs = placed(chat_inputs(processor, [scene.image], scene.question), model, processor)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {**inputs, "streamer": streamer, "max_new_tokens": tokens, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    yield from streamer
    thread.join()


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "app.json")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    model, processor = probe.demo.load() if options.model == "demo" else probe.load(options.model)
    service = Service({"model": (model, processor)}, limits=Limits(answer=options.tokens))
    visitor = service.new_visitor()
    scenes = probe.demo.scenes(options.rounds + 1, seed=11)
    timed(plain(model, processor, scenes[0], options.tokens))
    once = timed(service.ask("model", scenes[0].image, scenes[0].question, visitor))
    rounds = [
        {
            "plain": timed(plain(model, processor, scene, options.tokens)),
            "app": timed(service.ask("model", scene.image, scene.question, visitor)),
        }
        for scene in scenes[1:]
    ]
    service.close()

    def median(kind: str, what: str) -> float:
        return statistics.median(one[kind][what] for one in rounds)

    figures = {f"{kind}_{what}": median(kind, what) for kind in ("plain", "app") for what in ("first", "whole")}
    figures["app_coloured"] = median("app", "coloured")
    ratios = {
        what: statistics.median(one["app"][what] / one["plain"]["first"] for one in rounds)
        for what in ("first", "coloured")
    }
    for name, seconds in figures.items():
        print(f"{name:>14}  {seconds * 1000:8.1f} ms")
    print(
        f"  first word {ratios['first']:.2f}, first coloured word {ratios['coloured']:.2f} of plain streaming's first"
    )
    write_results(options.out, {
        "command": shlex.join(["python", "tests/benchmarks/bench_app.py", *given]), "model": options.model,
        "rounds": rounds, "first_image_of_a_size": once, "seconds": figures, "of_plain_first": ratios,
    })  # fmt: skip


if __name__ == "__main__":
    main()
