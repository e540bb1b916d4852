"""A share of production requests is kept, without any effect on them, and becomes traces."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from demo_server import DemoServer

import lvlm_probe as probe
from lvlm_probe.serving.messages import as_uri

FOLDER = Path(__file__).parents[2] / "integrations" / "vllm"


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sampling = loaded("sample_requests")
making = loaded("make_traces")


def asked(scene: Any, **more: Any) -> bytes:
    content = [
        {"type": "image_url", "image_url": {"url": as_uri(scene.image)}},
        {"type": "text", "text": scene.question},
    ]
    return json.dumps(
        {"model": "demo", "messages": [{"role": "user", "content": content}], "user": "me", **more}
    ).encode()


def answer(text: str) -> bytes:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice]}).encode()


def served(middleware: Any, body: bytes, *, path: str = "/v1/chat/completions", agent: str = "openai") -> list[Any]:
    """What a client gets of a request whose body comes in two parts."""
    sent: list[Any] = []
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]

    async def receive() -> Any:
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", b"Bearer sk-secret"), (b"user-agent", agent.encode())]
    asyncio.run(middleware({"type": "http", "path": path, "headers": headers}, receive, send))
    return sent


def answering(replies: list[bytes], status: int = 200) -> Any:
    """An application that reads the whole request and answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": status, "headers": []})
        for number, reply in enumerate(replies, start=1):
            await send({"type": "http.response.body", "body": reply, "more_body": number < len(replies)})

    return app


def bodies(sent: list[Any]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent)


def kept(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.quick
@pytest.mark.parametrize("root", ["", "/api"])  # vLLM's --root-path
def test_a_request_that_is_drawn_is_a_row_without_its_key(root: str, scene: Any, tmp_path: Path) -> None:
    path, reply = tmp_path / "samples.jsonl", answer("A cross.")
    middleware = sampling.SampleRequests(answering([reply[:9], reply[9:]]), path=str(path), share=1.0)
    assert bodies(served(middleware, asked(scene), path=f"{root}/v1/chat/completions")) == reply
    middleware.close()
    (row,) = kept(path)
    assert row["response"]["choices"][0]["message"]["content"] == "A cross."
    assert row["request"]["messages"][0]["content"][1]["text"] == scene.question
    assert "secret" not in path.read_text() and '"me"' not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_a_share_is_drawn_and_all_others_pass_untouched(scene: Any, tmp_path: Path) -> None:
    path, reply = tmp_path / "samples.jsonl", answer("Yes.")
    draw = random.Random(3)
    middleware = sampling.SampleRequests(answering([reply]), path=str(path), share=0.1, draw=draw.random)
    for _ in range(200):
        assert bodies(served(middleware, asked(scene))) == reply
    middleware.close()
    again = random.Random(3)
    assert len(kept(path)) == sum(again.random() < 0.1 for _ in range(200)) > 5


def test_a_streamed_answer_is_put_together(scene: Any, tmp_path: Path) -> None:
    def event(text: str, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
        listed = [{"token": text, "logprob": -0.5}]
        return b"data: " + json.dumps({"choices": [{**choice, "logprobs": {"content": listed}}]}).encode() + b"\n\n"

    path = tmp_path / "samples.jsonl"
    whole = [event("A "), event("cross", "stop"), b"data: [DONE]\n\n"]
    for stream in (whole, whole[:1]):  # the second is cut off
        middleware = sampling.SampleRequests(answering(stream), path=str(path), share=1.0)
        assert bodies(served(middleware, asked(scene, stream=True))) == b"".join(stream)
        middleware.close()
    (row,) = kept(path)
    choice = row["response"]["choices"][0]
    assert choice["message"]["content"] == "A cross" and len(choice["logprobs"]["content"]) == 2


@pytest.mark.parametrize(
    "what",
    ["another path", "own", "text alone", "an error", "no JSON", "too large", "a full file", "no such folder", "busy"],
)
def test_what_is_not_kept_is_answered_all_the_same(
    what: str, scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("nowhere/samples.jsonl" if what == "no such folder" else "samples.jsonl")
    reply = b"not json" if what == "no JSON" else answer("Yes.")
    body = asked(scene)
    if what == "text alone":
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()
    if what == "too large":
        monkeypatch.setattr(sampling, "LARGEST", 100)
    if what == "busy":
        monkeypatch.setattr(sampling, "WAITING", 0)
    most = 1e-6 if what == "a full file" else 1.0
    app = answering([reply], 500 if what == "an error" else 200)
    middleware = sampling.SampleRequests(app, path=str(path), share=1.0, most_mb=most)
    route = "/v1/completions" if what == "another path" else "/v1/chat/completions"
    agent = "lvlm-probe" if what == "own" else "openai"
    for _ in range(12):  # more than may wait: each gives its place back
        assert bodies(served(middleware, body, path=route, agent=agent)) == reply
    middleware.close()
    assert not kept(path)


def test_a_server_that_fails_fails_as_it_would(scene: Any, tmp_path: Path) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("out of memory")

    middleware = sampling.SampleRequests(broken, path=str(tmp_path / "samples.jsonl"), share=1.0)
    for _ in range(12):
        with pytest.raises(RuntimeError, match="out of memory"):
            served(middleware, asked(scene))
    middleware.close()
    assert not kept(tmp_path / "samples.jsonl")


def test_samples_become_traces_once(
    behind: DemoServer, scene: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "samples.jsonl", tmp_path / "traces"
    middleware = sampling.SampleRequests(answering([answer(scene.answer)]), path=str(path), share=1.0)
    served(middleware, asked(scene))
    middleware.close()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = json.loads(path.read_text())
    row["request"]["messages"] = [*turns, *row["request"]["messages"]]
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    for made in (1, 0):
        assert making.main([str(path), "--server", behind.url, "--out", str(out)]) == 1
        told = capsys.readouterr()
        assert told.out.startswith(f"{made} traces") and "line 2 is not taken: several turns" in told.err
    (trace,) = probe.open_store(out)
    assert trace.answer.strip() == scene.answer and trace.llr is not None
