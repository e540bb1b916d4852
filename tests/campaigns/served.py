"""A real engine against the model itself: the same scenes through a vLLM server and here, and through a faulty proxy.

    integrations/vllm/install .venv-vllm                     # once: an environment of its own, 3.5 GB
    integrations/vllm/start .venv-vllm CHECKPOINT 8101       # serves it on the loopback
    python tests/campaigns/served.py --url http://127.0.0.1:8101 --scenes 20 --out tests/benchmarks/results/served.json

Of every scene: the largest and the mean difference of log-probabilities under 0/1 masks, the rank correlation of maps
by RISE and occlusion, and the scores of both. Then the first scene once more with a quarter of all requests failing,
and once more by a run that is killed half-way. ``make served`` does all of it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import http.client
import http.server
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lvlm_probe as probe
from lvlm_probe._version import versions_of

RISE: dict[str, Any] = {"method": "rise", "masks": 150, "cells": 5, "strengthen": False}
METHODS: dict[str, dict[str, Any]] = {
    "rise": RISE,
    "occlusion": {"method": "occlusion", "size": 10, "strengthen": False},
}


def exact(replay: Any) -> Any:
    """The replay with real composites for whoever asks, as a server has them."""
    other = copy.copy(replay)
    other.log_probs = functools.partial(replay.log_probs, mode="exact")
    return other


def ranks(values: np.ndarray) -> np.ndarray:
    return values.ravel().argsort().argsort().astype(float)


def one_scene(server: Any, model: Any, processor: Any, scene: Any, folder: Path) -> dict[str, Any]:
    """Differences between the server and the model itself on one scene."""
    trace = server.ask(scene.image, scene.question, out=folder)
    replay = probe.replay(trace, server)
    answer = probe.ask(model, processor, scene.image, scene.question)
    local = answer.replay
    masks = torch.rand(32, 8, 8, generator=torch.Generator().manual_seed(scene.index)).round()
    steps = len(trace.token_ids)
    apart = (replay.log_probs(masks) - local.log_probs(masks, mode="exact")[:, :steps]).abs()
    found: dict[str, Any] = {
        "scene": scene.index,
        "same_tokens": trace.token_ids.tolist() == local.token_ids[:steps].tolist(),
        "largest": float(apart.max()),
        "mean": float(apart.mean()),
        "numbers": apart.numel(),
    }
    for name, options in METHODS.items():
        first, second = probe.explain(replay, **options), probe.explain(exact(local), **options)
        if first.values is None or second.values is None:
            found[name] = {"reason": first.reason, "local_reason": second.reason}
            continue
        served, here = probe.evaluate(first, replay, steps=25), probe.evaluate(second, local, steps=25, mode="exact")
        found[name] = {
            "spearman": float(np.corrcoef(ranks(first.values), ranks(second.values))[0, 1]),
            "deletion": [served.deletion, here.deletion],
            "insertion": [served.insertion, here.insertion],
        }
    return found


# --------------------------------------------------------------------------------------------------------------- faults


class Faulty(http.server.BaseHTTPRequestHandler):
    """Hands requests on to a server; 15 % of them get 429, 5 % get 503, and 5 % of connections are dropped."""

    protocol_version = "HTTP/1.1"
    to: tuple[str, int] = ("127.0.0.1", 0)
    luck = random.Random(1)
    done = {"429": 0, "503": 0, "dropped": 0, "handed on": 0}

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        drawn = self.luck.random() if self.command == "POST" else 1.0
        if drawn < 0.05:
            self.done["dropped"] += 1
            self.close_connection = True
            self.connection.close()
        elif drawn < 0.25:
            status = 429 if drawn < 0.20 else 503
            self.done[str(status)] += 1
            self._say(status, b"{}", {"Retry-After": "0"})
        else:
            self.done["handed on"] += 1
            link = http.client.HTTPConnection(*self.to, timeout=120)
            link.request(self.command, self.path, body or None, {"Content-Type": "application/json"})
            reply = link.getresponse()
            self._say(reply.status, reply.read(), {})

    do_GET = do_POST = _any

    def _say(self, status: int, text: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)


class Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients whose connection was dropped."""


def through_faults(url: str, scene: Any, folder: Path) -> dict[str, Any]:
    """The map of one scene with and without faults on the way."""
    at = urllib.parse.urlsplit(url)
    Faulty.to = (at.hostname or "127.0.0.1", at.port or 80)
    proxy = Quiet(("127.0.0.1", 0), Faulty)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    with probe.connect(url, journal=folder / "clean.jsonl") as server:
        trace = server.ask(scene.image, scene.question, out=folder)
        clean = probe.explain(probe.replay(trace, server), **RISE)
    with probe.connect(f"http://127.0.0.1:{proxy.server_port}", retries=20, journal=folder / "faulty.jsonl") as server:
        faulty = probe.explain(probe.replay(trace, server), **RISE)
        retries = server.spent.retries
    proxy.shutdown()
    return {"same_map": bool(np.array_equal(clean.values, faulty.values)), "retries": retries, **Faulty.done}


KILLED = """
import sys, lvlm_probe as probe
url, trace, journal = sys.argv[1:]
with probe.connect(url, journal=journal) as server:
    probe.explain(probe.replay(probe.open_trace(trace), server), method="rise", masks=150, cells=5, strengthen=False)
"""


def killed(url: str, scene: Any, folder: Path) -> dict[str, Any]:
    """A run that is killed once 60 answers are in its journal, and goes on."""
    journal = folder / "killed.jsonl"
    with probe.connect(url, journal=folder / "whole.jsonl") as server:
        trace = server.ask(scene.image, scene.question, out=folder)
        whole = probe.explain(probe.replay(trace, server), **RISE)
    child = subprocess.Popen([sys.executable, "-c", KILLED, url, str(trace.path), str(journal)])
    lines = 0
    while child.poll() is None and lines < 60:
        time.sleep(0.05)
        lines = journal.read_bytes().count(b"\n") if journal.is_file() else 0
    child.send_signal(signal.SIGKILL)
    child.wait()
    with probe.connect(url, journal=journal) as server:
        replay = probe.replay(trace, server)
        before = server.spent.requests
        again = probe.explain(replay, **RISE)
        asked, reused = server.spent.requests - before, server.spent.reused
    return {"same_map": bool(np.array_equal(whole.values, again.values)), "asked": asked, "reused": reused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = probe.demo.load()
    chosen = probe.demo.scenes(options.scenes)
    record: dict[str, Any] = {
        "machine": platform.machine(),
        "versions": versions_of("lvlm-probe", "torch", "transformers"),
    }
    for road in ("tokens", "chat"):
        with tempfile.TemporaryDirectory() as name, probe.connect(options.url, road=road) as server:
            started, folder = time.perf_counter(), Path(name)
            record.setdefault("engine", {key: value for key, value in server.engine.items() if key != "url"})
            rows = [one_scene(server, model, processor, scene, folder) for scene in chosen]
            record[road] = {"scenes": rows, "spent": vars(server.spent), "seconds": time.perf_counter() - started}
            print(road, [(row["scene"], row["largest"]) for row in rows], vars(server.spent), flush=True)
        chosen = chosen[: max(1, len(chosen) // 4)]  # the roads are the same to the last bit, which few scenes show
    with tempfile.TemporaryDirectory() as name:
        record["faults"] = through_faults(options.url, chosen[0], Path(name))
        record["killed"] = killed(options.url, chosen[0], Path(name))
    print(record["faults"], record["killed"], flush=True)
    options.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
