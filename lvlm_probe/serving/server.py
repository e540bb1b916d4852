"""A server that runs the model, as ``connect`` finds it: what it can do, asking it, and replaying what it said."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from PIL import features

from lvlm_probe._version import versions_of
from lvlm_probe.errors import ImageError, ModelMismatch, ProcessorRefused, ReplayError
from lvlm_probe.files import path_of
from lvlm_probe.images import Baseline, CompositePath, ImagePath, make_baseline
from lvlm_probe.images.baselines import KINDS
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.progress import roughly
from lvlm_probe.serving.checks import Checks, allowed, check_answer, check_same
from lvlm_probe.serving.forcing import Forcing
from lvlm_probe.serving.generating import (
    NoLogProbs,
    generated,
    generated_by_sglang,
    prompt_alone,
    said_of,
    walked,
)
from lvlm_probe.serving.journal import FILE, Journal
from lvlm_probe.serving.measuring import QUESTION, Measured, drawn, measured
from lvlm_probe.serving.messages import PNG, WEBP, ImageFormat, Prompt, Said, as_uri, smaller
from lvlm_probe.serving.replays import EstimatedReplay, ServedReplay
from lvlm_probe.serving.roads import (
    ROADS,
    Gives,
    Road,
    Untrue,
    check_continued,
    continued,
    likeliest_in,
    log_prob_in,
    no_log_probs,
    roads_named,
)
from lvlm_probe.serving.transport import Refused, Spent, Transport
from lvlm_probe.trace import Trace, open_trace, write
from lvlm_probe.trace.image_files import encode_image, open_image
from lvlm_probe.trace.records import Capture, ImageRecord, RowCapture

if TYPE_CHECKING:
    from PIL import Image

_PROBE_TOKENS = 8
"""Tokens of the answer that capabilities are measured on."""
_ANY_ROAD = "Leave the road out (road=, --road): the best that works is used"
_META = "served"
"""Where a trace keeps what is needed to ask the server again."""
_WHAT: dict[Gives, str] = {
    "passes": "exact log-probabilities of a given answer",
    "bounds": "log-probabilities of tokens that are among the likeliest, and bounds on those of others",
    "samples": "samples alone, whose mean is the probability",
}


@naming_arguments
def connect(
    url: str,
    model: str | None = None,
    *,
    processor: Any = None,
    key_variable: str = "OPENAI_API_KEY",
    concurrency: int = 8,
    retries: int = 6,
    timeout: float = 120.0,
    max_requests: int | None = None,
    journal: str | os.PathLike[str] | None = None,
    road: str | None = None,
    tell: Callable[[str], object] | None = None,
    sleep: Callable[[float], object] | None = None,
) -> Server:
    """Find out what a server can do: an engine with an OpenAI-compatible API that runs the model somewhere else.

    Costs a dozen small requests: a short answer about a drawn image, and the roads (``serving.roads``) tried on it;
    some dozens where the server gives no log-probabilities of a given answer.

    Args:
        url: ``http://host:8000``, with or without ``/v1``.
        model: the name that it is served under; may be left out where there is one.
        processor: the model's processor, without its weights: says what the model sees of an image, which is drawn on
            pages, and makes the prompts of SGLang, which alone needs it.
        key_variable: environment variable of the key, if one is needed. It is sent to ``url``, and kept nowhere.
        concurrency: requests under way at the same time, at most.
        retries: how often a request is sent again when the server is busy or the connection drops.
        timeout: seconds that the server may say nothing.
        max_requests: requests in all, these included; ``None``: any number. Methods that would send more end before.
        journal: file of answers that are paid for; by default ``served.jsonl`` beside each trace.
        road: the only road to use: ``"tokens"``, ``"chat"``, ``"next token"``, ``"top"`` (or one kind of it, ``"top
            (5)"``) or ``"sampling"``; by default the best that works.
        tell: called with a sentence before a method sends many requests: how many, megabytes, an estimate of the time.
        sleep: waits for some seconds, between two tries.

    Raises:
        ReplayError: the server cannot be reached, has no such model, or gives nothing of an answer that can be used;
            the message says what was tried and why not.
    """
    roads = roads_named(road)
    transport = Transport(
        url,
        key_variable=key_variable,
        concurrency=concurrency,
        retries=retries,
        timeout=timeout,
        max_requests=max_requests,
        sleep=sleep,
    )
    card = _card(transport, model)
    kept = None if journal is None else path_of(journal, "the journal", ReplayError)
    return Server(transport, card, processor, journal=kept, roads=roads, tell=tell)


class Server:
    """A model behind a server. Made by ``connect``; ``print(server)`` says what it can do.

    Attributes:
        model: the name it is served under.
        engine: what is known of it, JSON-ready: ``url``, ``engine``, ``version``, ``model``, ``root``, ``owned_by``.
        measured: the roads that were tried, and how they did.
        spent: requests, retries, megabytes so far.
    """

    def __init__(
        self,
        transport: Transport,
        card: Mapping[str, Any],
        processor: Any = None,
        *,
        journal: Path | None = None,
        roads: Sequence[Road] = ROADS,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self.tell = tell if tell is not None else lambda sentence: None
        self._transport, self._processor, self._journal = transport, processor, journal
        self._journals: dict[Path, Journal] = {}
        self._workers = concurrent.futures.ThreadPoolExecutor(transport.concurrency, thread_name_prefix="lvlm-probe")
        self.model = str(card["id"])
        self.engine: dict[str, Any] = {"url": transport.address, **_named(transport, card)}
        self._sglang = self.engine["engine"] == "SGLang"
        if self._sglang and processor is None:
            raise ReplayError(
                f"{transport.address} is SGLang, which returns no prompt: give the model's processor (not its "
                "weights), connect(url, processor=AutoProcessor.from_pretrained(…))"
            )
        self._walks = all(one.gives == "samples" for one in roads)
        image = drawn()
        said = self._first_answer(image, roads)
        found = measured(said, [image], self._measuring(), roads=roads, sglang=self._sglang)
        self.measured: tuple[Measured, ...] = tuple(one for _, one in found)
        self._roads = [road for road, one in found if one.works]
        if not self._roads:
            self._refuse(roads)
        self._walks = self.gives == "samples"
        self.takes_webp = self._takes_webp(said, image)

    # ------------------------------------------------------------------ what it is

    @property
    def name(self) -> str:
        """Engine, version and model, for people."""
        version = f" {self.engine['version']}" if self.engine.get("version") else ""
        return f"{self.engine['engine']}{version} serving {self.model!r}"

    @property
    def identity(self) -> str:
        """64 hex digits that tell this engine, version and model from others, wherever it is; weights are not seen."""
        known = {name: value for name, value in self.engine.items() if name != "url"}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    @property
    def road(self) -> str:
        """The road that is used wherever an answer fits on it."""
        return self._roads[0].name

    @property
    def gives(self) -> Gives:
        """What that road gives: ``"passes"``, exact log-probabilities; ``"bounds"`` on them; ``"samples"``."""
        return self._roads[0].gives

    @property
    def what(self) -> str:
        """What that road gives, in words."""
        return _WHAT[self.gives]

    @property
    def spent(self) -> Spent:
        """Requests, retries, megabytes so far."""
        return self._transport.spent

    @property
    def max_requests(self) -> int | None:
        """Requests that it may be asked in all."""
        return self._transport.max_requests

    @property
    def at_once(self) -> int:
        """Requests that may be under way now."""
        return self._transport.at_once

    def describe(self) -> str:
        """What it can do, in sentences."""
        lines = [f"{self.name} at {self.engine['url']}"]
        gives = {road.name: _WHAT[road.gives] for road in self._roads}
        for one in self.measured:
            if one.works:
                off = "" if one.difference is None else f", {one.difference:.1g} nats from its own generation"
                used = ", in use" if one.road == self.road else ""
                lines.append(f"  {one.road}: {gives[one.road]}{off}{used}")
            else:
                lines.append(f"  {one.road}: no. {one.reason}")
        can = "rise, occlusion, greedy and floors" if self.gives == "passes" else "rise and floors, nothing else,"
        lines.append(f"  it gives no gradients, attention or activations: {can} can be run")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        roads = ", ".join(one.road for one in self.measured if one.works)
        return f"<{self.name}: {self.what} ({roads})>"

    def cost(self, requests: int, images: Sequence[Image.Image], form: ImageFormat = PNG) -> str:
        """What requests with such images come to: number, megabytes, and an estimate of the time."""
        megabytes = requests * sum(len(as_uri(image, form)) for image in images) / 1e6
        said = f"{requests:,} requests, about {megabytes:,.0f} MB"
        if rate := self.spent.per_second:
            return f"{said}, {roughly(requests / rate)}"
        if latency := self._transport.latency:  # of requests one by one: how many it takes at once is to be seen
            most = requests * latency
            said += f", {roughly(most / self.at_once)} to {roughly(most)}"
        return said

    def require_log_probs(self, what: str) -> None:
        """Raise ``ReplayError`` where the road gives less of an answer than log-probabilities, which ``what`` takes."""
        if self.gives != "passes":
            raise no_log_probs(what, self.name, self.what)

    def allowed(self, log_probs: torch.Tensor) -> torch.Tensor:
        """How far two readings of tokens may lie apart by rounding, nats, ``(step,)``: the number format of an engine
        is not known, so that of half precision is taken."""
        return allowed(log_probs)

    def check_name(self) -> None:
        """Check that it still goes by the name it was found under. Raises ``ModelMismatch``."""
        now = _named(self._transport, _card(self._transport, self.model))
        differing = [name for name, value in now.items() if value != self.engine.get(name)]
        if differing:
            told = ", ".join(f"{name} {self.engine.get(name)!r} is now {now[name]!r}" for name in differing)
            raise ModelMismatch(f"the server at {self.engine['url']} is another one than at the start: {told}")

    def close(self) -> None:
        """End its threads and close its files."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        for journal in self._journals.values():
            journal.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ asking

    def ask(
        self,
        image: Any,
        question: str,
        *,
        out: str | os.PathLike[str],
        answer: str | None = None,
        token_ids: Sequence[int] | None = None,
        system: str | None = None,
        max_tokens: int = 128,
        baseline: str | Image.Image = "blur",
        llr: bool = True,
        fields: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Trace:
        """Ask about an image, and keep the answer as a trace; or take an answer that was given before.

        Args:
            image: one image, or a list of several, of any kind that ``open_image`` opens.
            question: the user's turn, after the images.
            out: folder of the trace, and of the journal.
            answer: an answer to measure instead of asking for one.
            token_ids: its tokens, to be checked against the server's.
            system: the system's turn.
            max_tokens: length of the answer at most.
            baseline: ``"blur"``, ``"blank"``, ``"noise"``, ``"mean"``, or an image: what log-likelihood ratios are
                taken to.
            llr: take log-likelihood ratios, which costs a request.
            fields: further fields of every request, e.g. ``{"chat_template_kwargs": {"enable_thinking": False}}``.
            sampling: of the generation; greedy by default.

        Raises:
            ReplayError: the server does not answer, or its numbers cannot be used; the message says why.
            ModelMismatch: its log-probabilities are others when it is asked for them than when it answered.
            ImageError: an image cannot be opened.
        """
        if not question.strip():
            raise ReplayError("there is no question: server.ask(image, question, out=…)")
        images = [open_image(one) for one in (image if isinstance(image, list | tuple) else [image])]
        if not images:
            raise ImageError("there is no image to ask about")
        prompt = Prompt(question, system, dict(fields or {}))
        if answer is None:
            said = self._generate(prompt, images, max_tokens, dict(sampling or {}))
        else:
            said = self._given(prompt, images, answer, token_ids)
        road = self._road_for(said, len(images))
        said, left_out = _fitting(said, road)
        forcing = self._forcing(said, road, Path(out), images)
        checks = check_answer(forcing, images, said.log_probs)
        made = [make_baseline(one, baseline) for one in images]
        lost = forcing.score([lambda: [one.image for one in made]])[0].numpy() if llr and said.log_probs else None
        if road.gives != "passes" and lost is not None and np.isnan(lost[list(forcing.askable)]).any():
            lost = None
        forcing.confirmed()
        row = self._row(said, images, made[0], lost, given=answer is not None)
        row.notes += left_out
        if llr and lost is None:
            row.notes.append(f"log-likelihood ratios are not known: the server gives {_WHAT[road.gives]}")
        row.meta[_META] = self._about(said, road, checks, forcing.form)
        return open_trace(write(Capture([row], self._model(), _now()), out))

    def measured_answer(
        self,
        images: Sequence[Image.Image],
        question: str,
        answer: str,
        *,
        token_ids: Sequence[int] | None = None,
        system: str | None = None,
        baseline: str | Image.Image = "blur",
    ) -> RowCapture:
        """An answer that was given before, with its log-probabilities on the images and on their baseline.

        Three requests, or as many as the journal of ``connect(…, journal=…)`` lacks; the checks of ``ask`` are left to
        those of ``connect`` and of each reply.

        Args:
            images: of the prompt, RGB.
            question: the user's turn.
            answer: what was answered.
            token_ids: its tokens, to be checked against the server's.
            system, baseline: as for ``ask``.

        Raises:
            ReplayError: the server does not answer, or not about this answer.
        """
        said = self._given_before(Prompt(question, system), images, answer, token_ids)
        road = self._road_for(said, len(images))
        said, _ = _fitting(said, road)
        made = [make_baseline(one, baseline) for one in images]
        forcing = self._measuring()(road, said) if self._journal is None else self._forcing(said, road, Path(), images)
        return self._row(
            said, images, made[0], forcing.score([lambda: [one.image for one in made]])[0].numpy(), given=True
        )

    def replayed(self, trace: Trace, *, processor: Any = None, strict: bool = True) -> ServedReplay:
        """The answer of a trace on this server; see ``lvlm_probe.replay``. Costs a few requests of checks."""
        about = trace.meta.get(_META)
        known: Mapping[str, Any] = about if isinstance(about, Mapping) else {}
        if strict and known:
            then = known.get("engine")
            was = then.get("model") if isinstance(then, Mapping) else None
            if was != self.model:
                raise ModelMismatch(
                    f"{trace.path.name} was answered by {was!r}, and this server runs {self.model!r}; connect to the "
                    "one that answered, or pass strict=False to replay the answer on another model"
                )
        if not trace.images:
            raise ImageError(f"{trace.path.name} holds no image: there is nothing to mask")
        if trace.clips:
            raise ImageError(
                f"{trace.path.name} holds a video, and a server is sent images alone; replay it on the model itself: "
                "probe.replay(trace, model, processor)"
            )
        said = _said_of(trace, known)
        images = [image.convert("RGB") for image in trace.images]
        forcing = self._forcing(said, self._road_for(said, len(images)), trace.path.parent, images)
        checks = check_answer(forcing, images, trace.log_probs.tolist(), strict=strict, likeliest=not known)
        forcing.confirmed()
        recorded = dict(trace.baseline or {})
        kind = str(recorded.get("kind", "blur"))
        recorded, kind = (recorded, kind) if kind in KINDS else ({}, "blur")
        params = {name: recorded[name] for name in ("strength", "seed") if recorded.get(name) is not None}
        made = [make_baseline(image, kind, **params) for image in images]
        seen = _seen_by(self._processor if processor is None else processor, images)
        path = CompositePath(images, [one.image for one in made], seen=seen)
        kind_of = ServedReplay if forcing.road.gives == "passes" else EstimatedReplay
        return kind_of(trace, self, forcing, checks, path, {**recorded, "kind": made[0].kind, **made[0].params})

    def captured(self, trace: Trace) -> dict[str, Any]:
        """The server's reply to a trace's prompt and answer, with the queries and keys that vllm-lens captures while
        they are read; ``lvlm_probe.import_attention`` makes attention rows of them. One request.

        Raises:
            Untrue: the server reads another prompt or answer.
            ReplayError: the server does not do that.
        """
        about = trace.meta.get(_META)
        said = _said_of(trace, about if isinstance(about, Mapping) else {})
        uris = [as_uri(image.convert("RGB")) for image in trace.images]
        body = continued(said.prompt, uris, said.answer, ask={"vllm_xargs": {"output_qk": "true"}})
        reply: dict[str, Any] = self._post("/v1/chat/completions", body)
        check_continued(reply, said)
        return reply

    # ------------------------------------------------------------------ inside

    def _row(
        self, said: Said, images: Sequence[Image.Image], baseline: Baseline, lost: np.ndarray | None, *, given: bool
    ) -> RowCapture:
        """The answer as a trace keeps it."""
        return RowCapture(
            trace_id=f"served-{secrets.token_hex(8)}",
            batch_row=0,
            status="complete" if said.finish == "stop" or given else "stopped",
            input_ids=np.asarray(said.prompt_ids, np.int64),
            prompt=said.prompt.question,
            question=said.prompt.question,
            token_ids=np.asarray(said.token_ids, np.int64),
            tokens=list(said.pieces),
            special=np.asarray(said.special, bool),
            log_probs=np.asarray(said.log_probs or [np.nan] * len(said.token_ids), np.float32),
            log_probs_source="teacher_forced" if given else "generation",
            top_log_probs=np.asarray(said.top_log_probs, np.float32) if said.top_log_probs else None,
            top_tokens=list(said.top_tokens) if said.top_log_probs else None,
            baseline_log_probs=lost,
            baseline={"kind": baseline.kind, **baseline.params},
            images=[ImageRecord(*encode_image(one), one.width, one.height) for one in images],
            notes=[f"the answer was given by {self.name}, and nothing was recorded inside the model"],
        )

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._transport.post(path, {"model": self.model, **body})

    def _refuse(self, roads: Sequence[Road]) -> NoReturn:
        """Say why none of the roads works."""
        why: dict[str | None, list[str]] = {}
        for one in self.measured:
            why.setdefault(one.reason, []).append(one.road)
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items())
        if roads is ROADS:
            raise ReplayError(
                f"{self.name} gives no log-probabilities of a given answer that could be used ({told}). vLLM gives "
                "them by default"
            )
        raise ReplayError(
            f"{self.name} cannot be asked on this road ({told or 'it is one of another engine'}). {_ANY_ROAD}"
        )

    def _first_answer(self, image: Image.Image, roads: Sequence[Road]) -> Said:
        """A short answer of the server's, with log-probabilities where it gives any. Raises ``ReplayError``."""
        asked: tuple[Any, ...] = (Prompt(QUESTION), [image], _PROBE_TOKENS, {})
        try:
            try:
                return self._generate(*asked)
            except NoLogProbs as error:
                if all(one.gives != "samples" for one in roads):
                    raise NoLogProbs(f"{self.name}: {error}. {_ANY_ROAD}") from error
                self._walks = True
                try:
                    return self._generate(*asked)
                except ReplayError as other:
                    raise ReplayError(f"{self.name}: {error}; and it cannot be sampled: {other}") from other
        except Refused as error:
            raise ReplayError(
                f"{self.name} does not answer a question about an image with log-probabilities: {error}"
            ) from error

    def _generate(self, prompt: Prompt, images: Sequence[Image.Image], most: int, sampling: dict[str, Any]) -> Said:
        uris = [as_uri(image) for image in images]
        if self._walks:
            if sampling:
                raise ReplayError(
                    f"{self.name} gives {self.what}: its answer has to be the greedy one, without sampling="
                )
            return walked(self._post, prompt, uris, max_tokens=most)
        if not self._sglang:
            return generated(self._post, prompt, uris, max_tokens=most, **sampling)
        ids = self._prompt_ids(prompt, len(images))
        return generated_by_sglang(self._post, prompt, uris, ids, max_tokens=most, **sampling)

    def _prompt_ids(self, prompt: Prompt, images: int) -> list[int]:
        """The prompt as the processor here makes it, one placeholder for each image."""
        turns = prompt.messages([""] * images)
        for part in turns[-1]["content"]:
            if part["type"] == "image_url":
                part.clear()
                part["type"] = "image"
        text = self._processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        found: list[int] = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _given_before(
        self, prompt: Prompt, images: Sequence[Image.Image], answer: str, token_ids: Sequence[int] | None
    ) -> Said:
        """``_given``, or what the journal has of it."""
        if self._journal is None:
            return self._given(prompt, images, answer, token_ids)
        journal = self._kept_in(self._journal)
        about = [prompt.question, prompt.system, answer, list(token_ids or ()), self.identity]
        digest = hashlib.sha256(json.dumps(about).encode())
        for image in images:
            digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
        key = digest.hexdigest()
        if (known := journal.said(key)) is not None and (found := _said_in(prompt, answer, known)) is not None:
            return found
        said = self._given(prompt, images, answer, token_ids)
        journal.keep_said(key, {name: list(getattr(said, name)) for name in _SAID})
        return said

    def _kept_in(self, path: Path) -> Journal:
        known = self._journals.get(path)
        return self._journals.setdefault(path, Journal(path)) if known is None else known

    def _given(
        self, prompt: Prompt, images: Sequence[Image.Image], answer: str, token_ids: Sequence[int] | None
    ) -> Said:
        """An answer that was given before, by the tokens that the server makes of it."""
        if not answer.strip():
            raise ReplayError("there is no answer to measure")
        if self.gives != "passes":
            raise ReplayError(
                f"{self.name} gives {self.what}, of what it says itself: an answer that was given before cannot be "
                "measured through it"
            )
        uris = [as_uri(image) for image in images]
        before = prompt_alone(self._post, prompt, uris)
        reply = self._post("/v1/chat/completions", continued(prompt, uris, answer, ask={"prompt_logprobs": 1}))
        ids, entries = reply.get("prompt_token_ids"), reply.get("prompt_logprobs")
        if not isinstance(ids, list) or not isinstance(entries, list) or tuple(ids[: len(before)]) != before:
            raise Untrue(
                "the server does not continue an answer that it is given behind the prompt that it answers itself "
                "(prompt_logprobs with continue_final_message)"
            )
        own = ids[len(before) :]
        given = list(token_ids or ())
        if given and given[: len(own)] != own:
            raise Untrue(
                f"the server cuts this answer into other tokens ({own[:6]}…) than it was said in ({given[:6]}…): its "
                "log-probabilities are not those of the answer"
            )
        texts, values, top = [], [], []
        for token, entry in zip(own, entries[-len(own) :] if own else [], strict=True):
            about = (entry.get(str(token)) if isinstance(entry, dict) else None) or {}
            texts.append(str(about.get("decoded_token") or ""))
            values.append(log_prob_in(about.get("logprob"), f"{texts[-1]!r} of the answer"))
            top.append(likeliest_in(entry, texts[-1], values[-1]))
        said = said_of(prompt, answer, own, texts, before, values, "length")
        return dataclasses.replace(
            said, top_log_probs=tuple(value for value, _ in top), top_tokens=tuple(text for _, text in top)
        )

    def _road_for(self, said: Said, images: int) -> Road:
        """The best road that an answer fits on. Raises ``ReplayError``."""
        reasons = []
        for road in self._roads:
            try:
                road.request(said, [""] * images, 0)
                return road
            except ReplayError as error:
                reasons.append(f"{road.name}: {error}")
        raise ReplayError(f"{self.name} cannot be asked about this answer ({'; '.join(reasons)})")

    def _forcing(self, said: Said, road: Road, folder: Path, images: Sequence[Image.Image]) -> Forcing:
        journal = self._kept_in(folder / FILE if self._journal is None else self._journal)
        engine = {name: value for name, value in self.engine.items() if name != "url"}  # it may move
        return Forcing(
            self._post,
            road,
            said,
            engine=engine,
            journal=journal,
            workers=self._workers,
            spent=self.spent,
            form=smaller(images) if self.takes_webp else PNG,
        )

    def _measuring(self, form: ImageFormat = PNG) -> Callable[[Road, Said], Forcing]:
        """Requests of a road that is tried; nothing of it is kept."""
        return lambda road, said: Forcing(
            self._post, road, said, engine={}, journal=Journal(None), workers=self._workers, spent=self.spent, form=form
        )

    def _takes_webp(self, said: Said, image: Image.Image) -> bool:
        """Whether the server reads the same image in lossless WebP as in PNG."""
        if not features.check("webp"):
            return False
        road = self._roads[0]
        said, _ = _fitting(said, road)
        forcing = self._measuring(WEBP)(road, said)
        try:
            check_same(forcing, [image], torch.tensor(said.log_probs))
        except (ReplayError, ModelMismatch):
            return False
        return True

    def _about(self, said: Said, road: Road, checks: Checks, form: ImageFormat) -> dict[str, Any]:
        return {
            "engine": dict(self.engine),
            "road": road.name,
            "gives": road.gives,
            **({"texts": list(said.texts)} if said.texts else {}),
            "measured": [vars(one) for one in self.measured],
            "system": said.prompt.system,
            "fields": dict(said.prompt.fields),
            "checks": checks.to_dict(),
            "images_as": form,
            "concurrency": self._transport.concurrency,
            "spent": dict(vars(self.spent)),
        }

    def _model(self) -> dict[str, Any]:
        versions = {
            **versions_of("lvlm-probe"),
            str(self.engine["engine"]): str(self.engine.get("version") or "unknown"),
        }
        return {"model_id": self.model, "class": "served", "versions": versions, _META: dict(self.engine)}


def _fitting(said: Said, road: Road) -> tuple[Said, list[str]]:
    """The answer as the road can hold it, and what was left out."""
    if all(said.special):
        raise ReplayError("the server's answer is empty: there is nothing to explain")
    if road.closing or not said.closing:
        return said, []
    kept = len(said.token_ids) - said.closing
    names = ("token_ids", "pieces", "special", "log_probs", "top_log_probs", "top_tokens", "texts")
    parts = {name: getattr(said, name)[:kept] for name in names}
    left = "".join(said.pieces[kept:]) or "the closing token"
    return dataclasses.replace(said, **parts), [f"{left} is left out: a chat message cannot hold it"]


def _seen_by(processor: Any, images: Sequence[Image.Image]) -> Any:
    """What a processor lets through of images; ``None`` where there is none, or it cannot be watched."""
    if processor is None:
        return None
    try:
        path = ImagePath.from_processor(processor, images)
        path.seen(0, (1, 1))
    except (ImageError, ProcessorRefused):
        return None
    return path.seen


def _said_of(trace: Trace, known: Mapping[str, Any]) -> Said:
    """The answer of a trace, as it is asked about."""
    fields, system, texts = known.get("fields"), known.get("system"), known.get("texts")
    raw = tuple(map(str, texts)) if isinstance(texts, list | tuple) and len(texts) == len(trace.tokens) else ()
    if trace.question is None:
        raise ReplayError(f"{trace.path.name} does not say what was asked: record it with question=…")
    return Said(
        Prompt(
            trace.question,
            system if isinstance(system, str) else None,
            dict(fields) if isinstance(fields, Mapping) else {},
        ),
        trace.answer,
        tuple(trace.token_ids.tolist()),
        tuple(trace.tokens),
        tuple(trace.special.tolist()),
        tuple(trace.input_ids.tolist()),
        tuple(trace.log_probs.tolist()),
        texts=raw,
    )


_SAID = ("token_ids", "pieces", "special", "prompt_ids", "log_probs", "top_log_probs", "top_tokens", "texts")
"""What a journal keeps of an answer."""


def _said_in(prompt: Prompt, answer: str, kept: Mapping[str, Any]) -> Said | None:
    """An answer that a journal kept; ``None`` where a line is none of ours."""
    parts = {name: tuple(kept[name]) if isinstance(kept.get(name), list) else None for name in _SAID}
    if any(part is None for part in parts.values()):
        return None
    whole = [len(parts[name] or ()) for name in _SAID[:3]]
    return Said(prompt, answer, finish="length", **parts) if len({*whole}) == 1 and whole[0] else None  # type: ignore[arg-type]


def _card(transport: Transport, model: str | None) -> dict[str, Any]:
    """What the server says of the model."""
    found = transport.get("/v1/models")
    cards = found.get("data") if isinstance(found, dict) else None
    cards = [one for one in cards if isinstance(one, dict) and "id" in one] if isinstance(cards, list) else []
    if not cards and isinstance(found, dict) and model is not None:
        return {"id": model}  # a server that lists only what it has fetched itself
    if not cards:
        raise ReplayError(
            f"{transport.address}/v1/models names no model: name it, connect(url, model), --served-model; or it is no "
            "OpenAI-compatible server"
        )
    names = [str(one["id"]) for one in cards]
    if model is None and len(cards) > 1:
        raise ReplayError(f"{transport.address} serves several models, name one: {', '.join(names)[:300]}")
    card = next((one for one in cards if model in (None, one["id"])), None)
    if card is None:
        raise ReplayError(f"{transport.address} serves no {model!r}; it serves {', '.join(names)[:300]}")
    return card


def _named(transport: Transport, card: Mapping[str, Any]) -> dict[str, Any]:
    """Engine, version and model, as far as the server says."""
    owner = str(card.get("owned_by") or "")
    known = {"model": str(card["id"]), "root": card.get("root"), "owned_by": owner, "engine": "", "version": None}
    for path, engine, name in (("/version", "vLLM", "version"), ("/get_model_info", "SGLang", "model_path")):
        try:
            found = transport.get(path)
        except Refused:
            continue
        if isinstance(found, dict) and isinstance(found.get(name), str):
            known["engine"] = engine
            known["version" if name == "version" else "root"] = found[name]
            break
    known["engine"] = known["engine"] or (f"a server of {owner}" if owner else "an OpenAI-compatible server")
    return known


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
