"""Real engines against the model itself: the same scenes through vLLM servers and here.

    integrations/vllm/install .venv-vllm                     # once: an environment of its own, 3.5 GB
    python tests/campaigns/served.py --env .venv-vllm --out tests/benchmarks/results/served.json

It starts the servers it needs, one after the other, by ``integrations/vllm/start``. Each part of ``PARTS`` is written
as soon as it is done, and a second call does what is missing; ``--only`` does some again. ``make served`` does it all.
Each scene is kept beside ``--out`` in ``.part``: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import http.client
import http.server
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lvlm_probe as probe
from lvlm_probe._version import versions_of
from lvlm_probe.importing.meter import Reading, measure
from lvlm_probe.serving.messages import as_uri

ROOT = Path(__file__).parents[2]

RISE: dict[str, Any] = {"method": "rise", "masks": 100, "cells": 5, "strengthen": False}
METHODS: dict[str, dict[str, Any]] = {
    "rise": RISE,
    "occlusion": {"method": "occlusion", "size": 8, "strengthen": False},
}
SPENT = ("requests", "retries", "reused", "megabytes", "seconds")


class Kept:
    """What is done so far, in a file: a run that was stopped goes on from there.

    Args:
        path: of the file.
        by: versions and number of scenes that it is done with; what was done with others is not used.
    """

    def __init__(self, path: Path, by: dict[str, Any]) -> None:
        self._path, self._by = path, by
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._done: dict[str, Any] = held["done"] if held.get("by") == by else {}

    def once(self, what: str, do: Callable[[], Any]) -> Any:
        """What ``do`` returns, or has returned before."""
        if what not in self._done:
            self._done[what] = do()
            new = self._path.with_name(self._path.name + ".new")
            new.write_text(json.dumps({"by": self._by, "done": self._done}), encoding="utf-8")
            new.replace(self._path)
            print(what, "done", flush=True)
        return self._done[what]


@dataclass
class Run:
    """What parts are told: the engine's environment, how many scenes, what is done; and the server that is up."""

    env: Path
    scenes: int
    kept: Kept
    up: contextlib.ExitStack
    _server: tuple[Any, str] | None = None

    def engine(self, checkpoint: Path | str, *options: str, more: dict[str, str] | None = None) -> str:
        """The address of a vLLM server on the loopback; the one that is up, if that is like it."""
        wanted = (str(checkpoint), options, more)
        if self._server is None or self._server[0] != wanted:
            self.stop()
            port = free_port()
            command = [str(ROOT / "integrations/vllm/start"), str(self.env), str(checkpoint), str(port), *options]
            self._server = (wanted, self.up.enter_context(running(command, port, more or {})))
        return self._server[1]

    def stop(self) -> None:
        """End the server that is up."""
        self.up.close()
        self._server = None

    def each(self, part: str, row: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
        """A row for each scene."""
        chosen = probe.demo.scenes(self.scenes)
        return [self.kept.once(f"{part}, scene {scene.index}", functools.partial(row, scene)) for scene in chosen]


def exact(replay: Any) -> Any:
    """The replay with real composites for whoever asks, as a server has them."""
    other = copy.copy(replay)
    other.log_probs = functools.partial(replay.log_probs, mode="exact")
    return other


def ranks(values: np.ndarray) -> np.ndarray:
    return values.ravel().argsort().argsort().astype(float)


def one_scene(server: Any, model: Any, processor: Any, scene: Any, folder: Path) -> dict[str, Any]:
    """Differences between the server and the model itself on one scene, and how fast each was."""
    before = dict(vars(server.spent))
    trace = server.ask(scene.image, scene.question, out=folder)
    replay = probe.replay(trace, server)
    answer = probe.ask(model, processor, scene.image, scene.question)
    local = answer.replay.over(replay.baseline)  # asking here may have chosen a stronger blur
    masks = torch.rand(32, 8, 8, generator=torch.Generator().manual_seed(scene.index)).round()
    steps, rates = len(trace.token_ids), {"load": os.getloadavg()[0]}

    def timed(name: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        started = time.perf_counter()
        values = run()
        rates[name] = len(masks) / (time.perf_counter() - started)
        return values

    served = timed("server", lambda: replay.log_probs(masks))
    here = timed("exact_one_by_one", lambda: local.log_probs(masks, mode="exact", micro_batch=1))
    timed("fast_by_sixteen", lambda: local.log_probs(masks, micro_batch=16))
    apart = (served - here[:, :steps]).abs()
    found: dict[str, Any] = {
        "scene": scene.index,
        "same_tokens": trace.token_ids.tolist() == local.token_ids[:steps].tolist(),
        "largest": float(apart.max()),
        "mean": float(apart.mean()),
        "numbers": apart.numel(),
        "masked_images_per_second": rates,
    }
    for name, options in METHODS.items():
        first, second = probe.explain(replay, **options), probe.explain(exact(local), **options)
        if first.values is None or second.values is None:
            found[name] = {"reason": first.reason, "local_reason": second.reason}
            continue
        scores = probe.evaluate(first, replay, steps=12), probe.evaluate(second, local, steps=12, mode="exact")
        found[name] = {
            "spearman": float(np.corrcoef(ranks(first.values), ranks(second.values))[0, 1]),
            "deletion": [one.deletion for one in scores],
            "insertion": [one.insertion for one in scores],
        }
    found["spent"] = {name: value - before[name] for name, value in vars(server.spent).items() if name in SPENT}
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


def kill_after(count: int, what: bytes, script: str, url: str, source: Path, journal: Path) -> None:
    """Run a script until its journal holds something so many times, and kill it."""
    child = subprocess.Popen([sys.executable, "-c", script, url, str(source), str(journal)])
    while child.poll() is None and (not journal.is_file() or journal.read_bytes().count(what) < count):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()


KILLED = """
import sys, lvlm_probe as probe
url, trace, journal = sys.argv[1:]
with probe.connect(url, journal=journal) as server:
    probe.explain(probe.replay(probe.open_trace(trace), server), method="rise", masks=100, cells=5, strengthen=False)
"""


def killed(url: str, scene: Any, folder: Path) -> dict[str, Any]:
    """A run that is killed once 60 answers are in its journal, and goes on."""
    journal = folder / "killed.jsonl"
    with probe.connect(url, journal=folder / "whole.jsonl") as server:
        trace = server.ask(scene.image, scene.question, out=folder)
        whole = probe.explain(probe.replay(trace, server), **RISE)
    kill_after(60, b"\n", KILLED, url, trace.path, journal)
    with probe.connect(url, journal=journal) as server:
        replay = probe.replay(trace, server)
        before = server.spent.requests
        again = probe.explain(replay, **RISE)
        asked, reused = server.spent.requests - before, server.spent.reused
    return {"same_map": bool(np.array_equal(whole.values, again.values)), "asked": asked, "reused": reused}


METERED = """
import sys, lvlm_probe as probe
from lvlm_probe.importing.meter import measure
url, file, journal = sys.argv[1:]
with probe.connect(url, journal=journal) as server:
    list(measure(file, server))
"""


def metered(url: str, scenes: Any, folder: Path) -> dict[str, Any]:
    """A meter that is killed after ten answers, and goes on."""
    journal, file = folder / "metered.jsonl", folder / "answers.jsonl"
    for scene in scenes:
        scene.image.save(folder / f"{scene.index}.png")
    rows = [{"image": f"{one.index}.png", "question": one.question, "answer": one.answer} for one in scenes]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    kill_after(10, b'"said"', METERED, url, file, journal)
    with probe.connect(url, journal=journal) as server:
        before = server.spent.requests
        found = [one for one in measure(file, server) if isinstance(one, Reading)]
        asked, reused = server.spent.requests - before, server.spent.reused
    model, processor = probe.demo.load()
    local = [one for one in measure(file, model, processor) if isinstance(one, Reading)]
    apart = [
        abs(word.llr - other.llr)
        for one, two in zip(found, local, strict=True)
        for word, other in zip(one.words, two.words, strict=True)
    ]
    return {"answers": len(found), "asked": asked, "reused": reused, "largest_llr_difference": max(apart)}


# ------------------------------------------------------------------------------------------------------------- servers


@contextlib.contextmanager
def running(command: list[str], port: int, more: dict[str, str]) -> Iterator[str]:
    """A server, as soon as it answers; the end of its log if it does not."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, process_group=0, env={**os.environ, **more}
        )
        try:
            while not answers(f"{url}/health"):
                if child.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{command[0]} ended:\n{log.read().decode()[-3000:]}")
                time.sleep(2)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            child.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


# --------------------------------------------------------------------------------------------------------------- parts


def road_part(road: str, run: Run) -> dict[str, Any]:
    """Agreement on one road, and its throughput beside that of passes here."""
    model, processor = probe.demo.load()
    url = run.engine(probe.demo.path())
    with tempfile.TemporaryDirectory() as name, probe.connect(url, road=road) as server:
        rows = run.each(road, lambda scene: one_scene(server, model, processor, scene, Path(name)))
        engine_facts = {key: value for key, value in server.engine.items() if key not in ("url", "root")}
    return {
        "scenes": rows,
        "spent": {name: sum(row["spent"][name] for row in rows) for name in SPENT},
        "engine": engine_facts,
    }


def trouble_part(run: Run) -> dict[str, Any]:
    """Faults on the way, a map and a meter that are killed, and roads that give less than log-probabilities."""
    chosen = probe.demo.scenes(run.scenes)
    url = run.engine(probe.demo.path())
    with tempfile.TemporaryDirectory() as name:
        return {
            "faults": through_faults(url, chosen[0], Path(name)),
            "killed": killed(url, chosen[0], Path(name)),
            "meter": metered(url, chosen, Path(name)),
            "less": {
                road: less(url, road, chosen[0], Path(name) / road) for road in ("top (5)", "top (1)", "sampling")
            },
        }


def less(url: str, road: str, scene: Any, folder: Path) -> dict[str, Any]:
    """RISE by bounds or samples against RISE by log-probabilities, with the same masks."""
    options = {**RISE, "masks": 300, "score": "prob"}
    with probe.connect(url) as server:
        replay = probe.replay(server.ask(scene.image, scene.question, out=folder / "exact"), server)
        words = probe.select_tokens(replay).text
        exactly = probe.explain(replay, tokens=words, **options)
    with probe.connect(url, road=road) as server:
        replay = probe.replay(server.ask(scene.image, scene.question, out=folder), server)
        before = server.spent.requests
        found = probe.explain(replay, tokens=words, **options)
        asked = server.spent.requests - before
    record = {
        "words": words,
        "requests": asked,
        "diagnostics": found.provenance.get("diagnostics"),
        "reason": found.reason,
    }
    if found.values is not None:
        record["spearman"] = float(np.corrcoef(ranks(exactly.values), ranks(found.values))[0, 1])
    return record


def sampled_part(run: Run) -> dict[str, Any]:
    """Requests that the middleware copies and such that it passes over, streamed and not: the same answers; and traces
    of the copies."""
    more = {"SHARE": "1", "PYTHONPATH": str(ROOT / "integrations/vllm")}
    option = ("--middleware", "sample_requests.SampleRequests")
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "samples.jsonl"
        url = run.engine(probe.demo.path(), *option, more={**more, "SAMPLES": str(file)})
        pairs = [
            [said(url, scene, stream=stream, agent=agent) for agent in ("lvlm-probe", "somebody")]
            for scene in probe.demo.scenes(run.scenes)
            for stream in (False, True)
        ]
        wait_for(lambda: file.is_file() and file.read_bytes().count(b"\n") >= len(pairs))
        rows = [json.loads(line)["response"]["choices"][0] for line in file.read_text().splitlines()]
        making = [sys.executable, str(ROOT / "integrations/vllm/make_traces.py"), str(file), "--server", url]
        subprocess.run([*making, "--out", str(Path(name) / "traces")], check=False, stdout=subprocess.DEVNULL)
        return {
            "asked": len(pairs),
            "streamed": len(pairs) // 2,
            "same_answers": sum(one == other for one, other in pairs),
            "kept": len(rows),
            "kept_as_answered": sum(
                row["message"]["content"] == pair[1][0] for row, pair in zip(rows, pairs, strict=False)
            ),
            "traces": len(list(probe.open_store(Path(name) / "traces"))),
        }


def said(url: str, scene: Any, *, stream: bool, agent: str) -> tuple[str, list[Any]]:
    """A server's answer, and all choices of its reply or replies."""
    content = [
        {"type": "image_url", "image_url": {"url": as_uri(scene.image)}},
        {"type": "text", "text": scene.question},
    ]
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 32, "temperature": 0}
    body |= {"logprobs": True, "return_token_ids": True, "stream": stream}
    headers = {"Content-Type": "application/json", "User-Agent": agent}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        text = reply.read().decode()
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    choices = [one for line in (lines if stream else [text]) for one in json.loads(line)["choices"]]
    parts = [one["delta"] if stream else one["message"] for one in choices]
    return "".join(part.get("content") or "" for part in parts), choices


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something has happened, or so long."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.05)


def batch_part(run: Run) -> dict[str, Any]:
    """What ``vllm run-batch`` writes, imported here."""
    run.stop()
    model, processor = probe.demo.load()
    with tempfile.TemporaryDirectory() as name:
        asked, said = Path(name) / "asked.jsonl", Path(name) / "said.jsonl"
        with asked.open("w") as file:
            for scene in probe.demo.scenes(run.scenes):
                content = [
                    {"type": "image_url", "image_url": {"url": as_uri(scene.image)}},
                    {"type": "text", "text": scene.question},
                ]
                body = {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 32}
                body |= {"temperature": 0, "logprobs": True, "return_token_ids": True}
                line = {"custom_id": str(scene.index), "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        start = [str(ROOT / "integrations/vllm/start"), str(run.env), str(probe.demo.path()), "run-batch"]
        subprocess.run([*start, "-i", asked, "-o", said], check=True, stdout=subprocess.DEVNULL)
        found = probe.import_answers(said, model, processor, Path(name) / "traces", requests=asked)
        apart = [one.largest_difference for one in found.imported if one.largest_difference is not None]
        return {
            "rows": len(said.read_text().splitlines()),
            "imported": len(found.imported),
            "compared": len(apart),
            "rejected": dict(found.reasons),
            "differing": len(found.differing),
            "largest": max(apart, default=None),
            "read_as": found.read_as,
        }


def qwen_part(run: Run) -> dict[str, Any]:
    """A tiny Qwen2-VL with random weights: other positions, images of any size."""
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name) / "qwen"
        make_qwen(checkpoint)
        model, processor = probe.load(checkpoint)
        url = run.engine(checkpoint)
        with probe.connect(url, road="tokens") as server:
            rows = run.each("qwen", lambda scene: qwen_scene(server, model, processor, scene, Path(name)))
            said = server.describe()
            try:  # random answers are cut into other tokens when they are read again
                chat = probe.connect(url, road="chat").describe()
            except probe.errors.ReplayError as error:
                chat = str(error)
    return {"scenes": rows, "tokens": said.splitlines()[1:], "chat": chat}


def qwen_scene(server: Any, model: Any, processor: Any, scene: Any, folder: Path) -> dict[str, Any]:
    """Differences of log-probabilities on one scene."""
    trace = server.ask(scene.image, scene.question, out=folder, max_tokens=8)
    try:
        local = probe.ask(model, processor, scene.image, scene.question, max_new_tokens=8).replay
    except probe.ProbeError as error:  # random weights say anything, the image token for one
        return {"scene": scene.index, "skipped": str(error).rpartition("ReplayError: ")[2][:200]}
    if trace.token_ids.tolist() != local.token_ids.tolist():
        return {"scene": scene.index, "same_tokens": False}
    replay = probe.replay(trace, server)
    masks = torch.rand(8, 6, 6, generator=torch.Generator().manual_seed(scene.index)).round()
    local = local.over(replay.baseline)  # asking here may have chosen a stronger blur
    apart = (replay.log_probs(masks) - local.log_probs(masks, mode="exact")).abs()
    row = {"scene": scene.index, "same_tokens": True, "largest": float(apart.max())}
    return {**row, "mean": float(apart.mean()), "numbers": apart.numel()}


def make_qwen(directory: Path) -> None:
    """Save a Qwen2-VL of three layers with the demo's tokenizer; vLLM's attention on CPUs wants heads of 32."""
    import transformers as hub

    names = (
        "<|vision_start|>",
        "<|vision_end|>",
        "<image>",
        "<|video_pad|>",
    )  # the demo's tokenizer has an image token
    tokenizer = hub.AutoTokenizer.from_pretrained(probe.demo.path())
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    start, end, image, video = (tokenizer.convert_tokens_to_ids(name) for name in names)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }
    vision = {"depth": 2, "embed_dim": 128, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end}
    torch.manual_seed(0)
    model = hub.Qwen2VLForConditionalGeneration(
        hub.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    )
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    content = (
        "{% for part in message['content'] %}{% if part['type'] in ('image', 'image_url') %}"
        "<|vision_start|><image><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{% if message['content'] is string %}"
        f"{{{{ message['content'] }}}}{{% else %}}{content}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    hub.Qwen2VLImageProcessor(size=size, patch_size=14).save_pretrained(directory)
    images = json.loads((directory / "preprocessor_config.json").read_text())
    images |= {"processor_class": "Qwen2VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2VLProcessor", "size": size}
    (directory / "video_preprocessor_config.json").write_text(json.dumps({**video, "patch_size": 14}))


def lens_part(run: Run) -> dict[str, Any]:
    """Attention rows from what vllm-lens captures, against those recorded on the model itself."""
    model, processor = probe.demo.load()
    url = run.engine(probe.demo.path(), more={"LENS": "1"})
    with tempfile.TemporaryDirectory() as name, probe.connect(url) as server:
        return {"scenes": run.each("lens", lambda scene: lens_scene(server, model, processor, scene, Path(name)))}


def lens_scene(server: Any, model: Any, processor: Any, scene: Any, folder: Path) -> dict[str, Any]:
    """Differences of attention rows on one scene."""
    trace = server.ask(scene.image, scene.question, out=folder)
    made = probe.import_attention(trace, server, processor=processor)
    local = probe.ask(model, processor, scene.image, scene.question, out=folder / "local").trace
    steps = len(made.token_ids)
    apart = np.abs(made.attention.values - local.attention.values[:steps])
    chosen = [int(np.nanargmax(trace.llr))]
    maps = [probe.explain(one, method="attention", tokens=chosen).values for one in (made, local)]
    return {
        "scene": scene.index,
        "largest": float(apart.max()),
        "boxes": float(np.abs(made.layout.patch_box - local.layout.patch_box).max()),
        "spearman": float(np.corrcoef(ranks(maps[0]), ranks(maps[1]))[0, 1]),
    }


def transformers_part(run: Run) -> dict[str, Any]:
    """What ``transformers serve`` is told."""
    run.stop()
    port = free_port()
    command = [str(run.env / "bin/transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        (Path(name) / "hub").mkdir()  # it lists what it has fetched, and fails where that is nowhere
        more = {"HF_HUB_OFFLINE": "1", "HF_HOME": name}
        url = stack.enter_context(running([*command, "--device", "cpu"], port, more))
        try:
            with probe.connect(url, str(probe.demo.path())) as server:
                return {"used": server.describe()}
        except probe.errors.ReplayError as error:
            return {"refused": str(error).replace(str(probe.demo.path()), "demo").replace(url, "")}


PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "tokens": functools.partial(road_part, "tokens"),
    "chat": functools.partial(road_part, "chat"),
    "trouble": trouble_part,
    "sampled": sampled_part,
    "batch": batch_part,
    "qwen": qwen_part,
    "lens": lens_part,
    "transformers_serve": transformers_part,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, required=True, help="made by integrations/vllm/install")
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--only", help="parts to do again, with commas between them, or all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    versions = versions_of("lvlm-probe", "torch", "transformers")
    part = options.out.with_suffix(".part")
    kept = Kept(part, {**versions, "scenes": options.scenes})
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    again = list(PARTS) if options.only == "all" else options.only.split(",") if options.only else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as up:
        run = Run(options.env, options.scenes, kept, up)
        for name in again or [name for name in PARTS if name not in record]:
            made = kept.once(name, lambda name=name: {**PARTS[name](run), "date": time.strftime("%Y-%m-%d")})
            record |= {name: made, "machine": platform.machine(), "versions": versions}
            options.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
