"""A server of ours on the loopback: the embedded model behind the routes of vLLM and SGLang, with faults on demand.

It computes with transformers what the engines compute, over real HTTP. A fault is a function of a request's number and
body that names one of ``FAULTS``; ``None`` answers well.
"""

from __future__ import annotations

import base64
import http.server
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from captured_qk import as_sent, captures, capturing
from PIL import Image

FAULTS = {
    "429", "503", "500", "drop", "truncated", "400",  # what is said
    "wrong_ids", "half", "logits", "uninitialised", "ignored", "no_ids", "no_image", "double_image", "other_model",
    "noisy",
}  # fmt: skip
Fault = Callable[[int, dict[str, Any]], str | None]
Drawn = tuple[tuple[int, int], bytes]
"""An image: its size and its pixels."""
IMAGE = 4
EOS = 2


def no_fault(number: int, body: dict[str, Any]) -> str | None:
    """Nothing is wrong."""
    return None


@lru_cache(maxsize=1000)  # of 50 kB each; most requests are those of another test, or the beginning of the same answer
def logits_of(model: Any, processor: Any, ids: tuple[int, ...], images: tuple[Drawn, ...]) -> torch.Tensor:
    """Of the next token at every position, ``(position, token)``."""
    drawn = [Image.frombytes("RGB", size, pixels) for size, pixels in images]
    pixels = processor.image_processor(images=drawn, return_tensors="pt")["pixel_values"]
    batch = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=batch, attention_mask=torch.ones_like(batch), pixel_values=pixels).logits[0].float()


class DemoServer(http.server.ThreadingHTTPServer):
    """Answers by the demo model.

    Args:
        model, processor: of the demo.
        routes: those that it has: ``tokens``, ``chat`` (``prompt_logprobs``), ``allowed``, ``bias``, ``top``,
            ``samples``, ``sglang``, ``lens`` (vllm-lens). All but the first and the last two continue a turn that was
            begun.
    """

    daemon_threads = True

    def __init__(self, model: Any, processor: Any, routes: set[str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.processor = model, processor
        self.routes = {"tokens", "chat", "allowed", "bias", "top", "samples", "lens"} if routes is None else routes
        self.luck = torch.Generator().manual_seed(0)
        self.takes_webp = True
        self.goes_on, self.sees_images, self.flipped = True, True, False
        self.fault: Fault = no_fault
        self.retry_after: str | None = None
        self.lists_models = True
        self.name, self.version, self.biased_before = "demo", "0.32.0", False
        self.lock, self.count = threading.Lock(), 0
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.before: Callable[[int], None] = lambda number: None
        self.inside = self.most_inside = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""

    # ---------------------------------------------------------------- the model

    def log_softmax(
        self, ids: list[int], images: list[Image.Image], fault: str | None, *, known: bool = True
    ) -> torch.Tensor:
        """Log-probabilities of the next token at every position, ``(position, token)``; unless ``known``, by a pass."""
        if fault == "no_image" or not self.sees_images:
            images = [Image.new("RGB", image.size, (90, 90, 90)) for image in images]
        drawn = tuple((image.size, image.tobytes()) for image in images)
        with self.lock:
            run = logits_of if known else logits_of.__wrapped__
            logits = run(self.model, self.processor, tuple(ids), drawn)
        if fault == "logits":
            return logits
        if fault == "other_model" or self.flipped:
            logits = logits.flip(-1)
        if fault == "half":
            logits = logits * 0.5
        return logits.log_softmax(-1)

    def expanded(self, ids: list[int]) -> list[int]:
        out: list[int] = []
        for token in ids:
            out += [IMAGE] * 64 if token == IMAGE else [token]
        return out

    def tokenised(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt_text(self, body: dict[str, Any]) -> tuple[str, list[Image.Image]]:
        turns, images = [], []
        for message in body["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                content = [dict(part) for part in content]
                for part in content:
                    if part["type"] == "image_url":
                        images.append(decoded(part.pop("image_url")["url"]))
                        part["type"] = "image"
            turns.append({"role": message["role"], "content": content})
        render = self.processor.apply_chat_template
        if body.get("continue_final_message") and self.goes_on:
            assert body["add_generation_prompt"] is False
            return render(turns, tokenize=False, continue_final_message=True), images
        return render(turns, tokenize=False, add_generation_prompt=True), images

    def generated(
        self, ids: list[int], images: list[Image.Image], most: int, fault: str | None, body: dict[str, Any]
    ) -> tuple[list[int], list[float]]:
        out: list[int] = []
        values: list[float] = []
        while len(out) < most and (not out or out[-1] != EOS):
            row = self.log_softmax([*ids, *out], images, fault)[-1]
            out.append(self.next_token(row, body))
            values.append(float(row[out[-1]]))
        return out, values

    def decode(self, token: int) -> str:
        piece = self.processor.tokenizer.convert_ids_to_tokens(token)
        return piece.replace("▁", " ")

    # ---------------------------------------------------------------- the routes

    def next_token(self, row: torch.Tensor, body: dict[str, Any]) -> int:
        """The token after a position, as the request wants it chosen."""
        if "samples" not in self.routes or not body.get("temperature"):
            return int(row.argmax())
        weights = (row / body["temperature"]).softmax(-1)
        with self.lock:
            return int(torch.multinomial(weights, 1, generator=self.luck))

    def top_of(self, row: torch.Tensor, body: dict[str, Any]) -> list[dict[str, Any]]:
        """What is listed of the likeliest tokens."""
        best = row.topk(int(body.get("top_logprobs") or 0) if "top" in self.routes else 0)
        found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [{"token": self.decode(index), "logprob": value} for value, index in found]

    def chat(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        text, images = self.prompt_text(body)
        ids = self.expanded(self.tokenised(text))
        fault_ids = self.with_fault(ids, fault)
        row = self.log_softmax(ids, images, fault)
        reply: dict[str, Any] = {"system_fingerprint": "demo-1"}
        if body.get("return_token_ids") and fault != "no_ids":
            reply["prompt_token_ids"] = fault_ids
        if "prompt_logprobs" in body and "chat" in self.routes and fault != "ignored":
            reply["prompt_logprobs"] = self.listed(ids, row, int(body["prompt_logprobs"]), fault)
        if "lens" in self.routes and (body.get("vllm_xargs") or {}).get("output_qk") == "true":
            with capturing() as seen:
                self.log_softmax(ids, images, fault, known=False)
            reply |= as_sent(captures(seen))
        only = None
        if "allowed_token_ids" in body and "allowed" in self.routes:
            only = body["allowed_token_ids"][0]
        if "logit_bias" in body and "bias" in self.routes:
            only = int(next(iter(body["logit_bias"])))
        if only is not None:
            value = 0.0 if self.biased_before else float(row[-1][only])
            tokens, values = [only], [value]
        else:
            tokens, values = self.generated(ids, images, body["max_tokens"], fault, body)
        answer = "".join(self.decode(token) for token in tokens if token != EOS)
        choice: dict[str, Any] = {
            "message": {"role": "assistant", "content": answer},
            "finish_reason": "stop" if tokens[-1] == EOS else "length",
        }
        if body.get("logprobs") and fault != "ignored":
            listed = [
                {
                    "token": self.decode(token),
                    "logprob": value,
                    "top_logprobs": [{"token": self.decode(token), "logprob": value}],
                }
                for token, value in zip(tokens, values, strict=True)  # an answer is greedy: the likeliest is itself
            ]
            if body["max_tokens"] == 1:
                listed[0]["top_logprobs"] = self.top_of(row[-1], body)
            choice["logprobs"] = {"content": listed}
        if body.get("return_token_ids") and fault != "no_ids":
            choice["token_ids"] = tokens
        return {**reply, "choices": [choice]}

    def tokens(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        images = [decoded(part["url"]) for part in body["content_parts"]]
        ids = self.expanded(body["token_ids"])
        if fault == "double_image":
            at = ids.index(IMAGE)
            ids = [*ids[:at], *[IMAGE] * 64, *ids[at:]]
            row = self.log_softmax(ids, images * 2, fault)
        else:
            row = self.log_softmax(ids, images, fault)
        number = int(body["sampling_params"]["prompt_logprobs"])
        reply = {"choices": [{"token_ids": [0]}], "prompt_logprobs": self.listed(ids, row, number, fault)}
        if fault != "no_ids":
            reply["prompt_token_ids"] = self.with_fault(ids, fault)
        if fault == "ignored":
            reply["prompt_logprobs"] = None
        return reply

    def sglang(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        images = [decoded(one) for one in body["image_data"]]
        ids = self.expanded(body["input_ids"])
        row = self.log_softmax(ids, images, fault)
        named = self.with_fault(ids, fault)
        entries = [[None, named[0], None]]
        entries += [[float(row[k - 1][ids[k]]), named[k], None] for k in range(1, len(ids))]
        tokens, values = self.generated(ids, images, body["sampling_params"]["max_new_tokens"], fault, {})
        texts = [self.decode(token) for token in tokens]
        meta = {
            "input_token_logprobs": None if fault == "ignored" else entries,
            "output_token_logprobs": [list(one) for one in zip(values, tokens, texts, strict=True)],
            "finish_reason": {"type": "stop" if tokens[-1] == EOS else "length"},
        }
        answer = "".join(text for text, token in zip(texts, tokens, strict=True) if token != EOS)
        return {"text": answer, "meta_info": meta}

    def listed(self, ids: list[int], row: torch.Tensor, number: int, fault: str | None) -> list[Any]:
        out: list[Any] = [None]
        for k in range(1, len(ids)):
            chosen = {ids[k], *row[k - 1].topk(number).indices.tolist()} if number else {ids[k]}
            entry = {
                str(token): {"logprob": float(row[k - 1][token]), "decoded_token": self.decode(token)}
                for token in sorted(chosen)
            }
            out.append(entry)
        if fault == "uninitialised":
            out[-1] = {"1459560800": {"logprob": -2.98e30}}
        return out

    def with_fault(self, ids: list[int], fault: str | None) -> list[int]:
        return [*ids[:-1], ids[-1] + 1] if fault == "wrong_ids" else ids


def decoded(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/webp;base64")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    server: DemoServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/v1/models":
            card = {"id": server.name, "root": "/models/demo", "owned_by": "vllm", "max_model_len": 256}
            self.say(200, {"data": [card] if server.lists_models else []})
        elif self.path == "/version" and "sglang" not in server.routes:
            self.say(200, {"version": server.version})
        elif self.path == "/get_model_info" and "sglang" in server.routes:
            self.say(200, {"model_path": "/models/demo"})
        else:
            self.say(404, {"error": "there is no such path"})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number, server.count = server.count, server.count + 1
            server.requests.append((self.path, body))
            server.headers.append(dict(self.headers))
            server.inside += 1
            server.most_inside = max(server.inside, server.most_inside)
        try:
            server.before(number)
            self.answer(body, server.fault(number, body))
        finally:
            with server.lock:
                server.inside -= 1

    def answer(self, body: dict[str, Any], fault: str | None) -> None:
        assert fault is None or fault in FAULTS
        server = self.server
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault is not None and fault.isdigit():
            self.say(int(fault), {"error": {"message": "slow down" if fault == "429" else "no"}}, server.retry_after)
            return
        if body.get("continue_final_message") and not server.routes & {"chat", "allowed", "bias", "top", "samples"}:
            self.say(422, {"error": {"message": "continue_final_message is not supported"}})
            return
        if not server.takes_webp and b"image/webp" in json.dumps(body).encode():
            self.say(400, {"error": {"message": "cannot identify image file"}})
            return
        route = {"/v1/chat/completions": "chat", "/inference/v1/generate": "tokens", "/generate": "sglang"}[self.path]
        if route != "chat" and route not in server.routes:
            self.say(403, {"error": {"message": f"{self.path} is off"}})
            return
        reply = getattr(server, route)(body, fault)
        if fault == "noisy":
            reply = shaken(reply)
        text = json.dumps(reply).encode()
        if fault == "truncated":
            self.send_response(200)
            self.send_header("Content-Length", str(len(text) // 2))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2])
            return
        self.say(200, text)

    def say(self, status: int, reply: Any, after: str | None = None) -> None:
        text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if after is not None:
            self.send_header("Retry-After", after)
        self.end_headers()
        self.wfile.write(text)


_shakes = iter(range(10**9))


def shaken(value: Any) -> Any:
    """The same reply with every log-probability another each time."""
    if isinstance(value, dict):
        return {key: one - 0.7 * (next(_shakes) % 3) if key == "logprob" else shaken(one) for key, one in value.items()}
    return [shaken(one) for one in value] if isinstance(value, list) else value


@contextmanager
def serving(model: Any, processor: Any, routes: set[str] | None = None) -> Iterator[DemoServer]:
    """The server, for the length of the block."""
    server = DemoServer(model, processor, routes)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
