"""What the app does, without its page: answers, maps and visitors by public names, and what strangers send."""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
import sys
import threading
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lvlm_probe as probe
from lvlm_probe.app import Limits, Service, application
from lvlm_probe.app.handlers import Handlers
from lvlm_probe.errors import ImageError, ProbeError
from lvlm_probe.models.prompts import chat_inputs


def asked(service: Service, scene: Any, visitor: str) -> Any:
    """The trace of an answer."""
    *_, trace = service.ask(next(iter(service.models)), scene.image, scene.question, visitor)
    return trace


@pytest.fixture(scope="module")
def service(demo: Any) -> Iterator[Service]:
    made = Service({"demo": demo})
    yield made
    made.close()


@pytest.fixture(scope="module")
def scene() -> Any:
    return probe.demo.scenes(1)[0]


@pytest.fixture(scope="module")
def visitor(service: Service) -> str:
    return service.new_visitor()


@pytest.fixture(scope="module")
def trace(service: Service, scene: Any, visitor: str) -> Any:
    return asked(service, scene, visitor)


def alone(demo: Any, scene: Any) -> str:
    model, processor = demo
    inputs = chat_inputs(processor, [scene.image], scene.question)
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(ids, skip_special_tokens=True)).strip()


@pytest.mark.quick
def test_an_answer_grows_word_by_word_and_is_the_model_s_own(demo: Any, service: Service, scene: Any) -> None:
    *grown, trace = service.ask("demo", scene.image, scene.question, service.new_visitor())
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(grown))
    assert len(set(grown)) > 2
    assert grown[-1].strip() == trace.answer == alone(demo, scene)
    assert trace.llr is not None


@pytest.mark.quick
def test_without_gradio_the_page_says_what_to_install(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ProbeError, match=r"pip install 'lvlm-probe\[app\]'"):
        application(service)


@pytest.mark.quick
def test_what_a_visitor_clicks_is_explained_and_shown_without_a_page(service: Service, scene: Any) -> None:
    # Of the sentence "The cross is yellow." the word 3 is the colour, which the image decides.
    visitor = service.new_visitor()
    name = asked(service, scene, visitor).path.name
    on = Handlers(service, None, [scene])
    opened, words, view, facts = on.on_open(None, {"name": name}, "demo", visitor)
    assert "data-word" in words and "Click a word" in facts and view.size == scene.image.size
    with pytest.raises(ProbeError, match="no word"):
        on.on_word(None, {"word": "<b>"}, opened, "input_gradient")

    def shown(_title: str) -> Any:
        return contextlib.nullcontext(lambda done, total: None)

    explained, words, view, facts = on.on_word(shown, {"word": "3"}, opened, "input_gradient")
    assert explained.word == 3 and 'aria-pressed="true"' in words
    assert view.tobytes() != scene.image.tobytes()
    assert "<dd>input_gradient</dd>" in facts and "Press “Check this map”" in facts


def test_where_image_tokens_lie_is_found_once_for_all_who_ask(
    service: Service, scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, first = service.ask("demo", scene.image, scene.question, service.new_visitor())

    def again(*_: object) -> None:
        raise AssertionError("found anew")

    monkeypatch.setattr("lvlm_probe.recording.recorder.find_token_boxes", again)
    *_, second = service.ask("demo", scene.image.rotate(90), scene.question, service.new_visitor())
    assert second.status == "complete" and second.path != first.path
    assert np.array_equal(first.patch_box, second.patch_box) and first.patch_box.shape == (64, 4)


def test_an_answer_that_is_stopped_ends_there(service: Service, scene: Any) -> None:
    stop = threading.Event()
    stop.set()
    *_, trace = service.ask("demo", scene.image, scene.question, service.new_visitor(), stop)
    assert len(trace.token_ids) == 1


def test_a_visitor_who_leaves_does_not_keep_the_model(service: Service, scene: Any) -> None:
    left = service.ask("demo", scene.image, scene.question, service.new_visitor())
    next(left)
    left.close()
    assert asked(service, scene, service.new_visitor()).status == "complete"
    assert not service.turn.locked()


def test_visitors_at_once_get_what_each_gets_alone(demo: Any, service: Service) -> None:
    scenes = probe.demo.scenes(6, seed=3)
    visitors = [service.new_visitor() for _ in scenes]
    traces: dict[int, Any] = {}

    def visit(number: int) -> None:
        for _ in range(2):
            traces[number] = asked(service, scenes[number], visitors[number])
        service.explain("demo", traces[number], 0, "input_gradient")

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(len(scenes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, scene in enumerate(scenes):
        assert traces[number].answer == alone(demo, scene)
        np.testing.assert_array_equal(np.asarray(traces[number].image), np.asarray(scene.image))
        assert [one.question for one in service.history(visitors[number])] == [scene.question] * 2


def test_nobody_opens_what_another_one_asked(service: Service, trace: Any, visitor: str) -> None:
    assert service.open(visitor, trace.path.name) == trace
    stranger = service.new_visitor()
    for name in (trace.path.name, str(trace.path), f"../{trace.path.parent.name}/{trace.path.name}", "..", ""):
        with pytest.raises(ProbeError, match="no such answer among yours"):
            service.open(stranger, name)
    for secret in ("", "../..", "A" * 32, visitor[:-1], visitor + "\n", None, 3):
        with pytest.raises(ProbeError, match="load it again"):
            service.folder_of(secret)  # type: ignore[arg-type]
    assert visitor not in str(trace.path)  # a folder's name does not give its visitor away


def test_a_word_is_explained_once_and_checked_on_request(service: Service, trace: Any) -> None:
    number = next(n for n, word in enumerate(trace.words) if word.text == "yellow")
    found = service.explain("demo", trace, number, "igos++")
    assert found.score() is None
    heat = found.read()
    assert heat.selection.label == "yellow"
    made = found.path.stat().st_mtime_ns
    assert service.explain("demo", trace, number, "igos++").path.stat().st_mtime_ns == made
    score = service.check("demo", trace, found)
    assert score.verdict.trusted
    assert found.score() == score
    page = service.page(trace, Path(service.scratch) / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert "yellow" in page
    with pytest.raises(ProbeError, match="none of number 99"):
        service.explain("demo", trace, 99, "igos++")
    with pytest.raises(ProbeError, match="cannot be explained by"):
        service.explain("demo", trace, None, "../igos")


def test_several_images_are_asked_about_and_explained_one_by_one(demo: Any, service: Service, visitor: str) -> None:
    first, second = (one.image for one in probe.demo.scenes(2))
    *_, trace = service.ask("demo", [first, None, second], "What color is the cross?", visitor)
    assert [image.tobytes() for image in trace.images] == [image.tobytes() for image in (first, second)]
    assert trace.answer == probe.ask(*demo, [first, second], "What color is the cross?").text
    number = len(trace.words) - 2
    found = [service.explain("demo", trace, number, "input_gradient", image=image) for image in (0, 1)]
    heats = [one.read() for one in found]
    span = (trace.words[number].start, trace.words[number].stop)
    for image, heat in enumerate(heats):
        alone = probe.explain(probe.replay(trace, *demo), method="input_gradient", tokens=span, image=image)
        assert heat.image_index == image and np.array_equal(heat.values, alone.values)
    assert not np.array_equal(heats[0].values, heats[1].values)
    region = np.zeros((8, 8), bool)
    region[:4] = True
    said, seen = service.say_again("demo", trace, region, "remove", image=1)
    assert said.startswith("Without this 50 % of the image")
    pixels, shown = np.asarray(second), np.asarray(seen)
    assert np.array_equal(shown[200:], pixels[200:]) and not np.array_equal(shown[:100], pixels[:100])
    assert service.attention("demo", trace, number, None, None, image=1).image_index == 1
    assert len(service.lens("demo", trace, image=1).boxes) == (trace.image_index == 1).sum()
    with pytest.raises(ProbeError, match="4 images, and 3 is the most"):
        next(service.ask("demo", [first] * 4, "what?", visitor))


def test_a_page_takes_a_map(service: Service, scene: Any) -> None:
    fresh = asked(service, scene, service.new_visitor())
    with pytest.raises(ProbeError, match="click a word"):
        service.page(fresh, Path(service.scratch) / "none.html")
    service.explain("demo", fresh, None, "input_gradient")
    assert service.page(fresh, Path(service.scratch) / "one.html").is_file()


@pytest.mark.parametrize("kind", ["keep", "remove"])
def test_a_painted_part_is_what_the_model_is_asked_about(demo: Any, service: Service, trace: Any, kind: Any) -> None:
    """The same mask in ``masked()`` around the model's own ``generate()``."""
    model, processor = demo
    region = np.zeros((64, 64), dtype=bool)
    region[38:62, 44:62] = True  # the cross
    said, seen = service.say_again("demo", trace, region, kind)
    with probe.attach(model, processor) as p, p.masked(torch.from_numpy(region == (kind == "keep")).float()):
        inputs = chat_inputs(processor, [trace.image], trace.question)
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = str(processor.decode(ids, skip_special_tokens=True)).strip()
    assert (expected in said) if expected != trace.answer else ("says the same" in said)
    assert (expected == trace.answer) == (kind == "keep")
    there = np.asarray(seen.resize((64, 64)))[50, 53].astype(int)
    whole = np.asarray(trace.image.resize((64, 64)))[50, 53].astype(int)
    assert (np.abs(there - whole).max() < 8) == (kind == "keep")


def test_nothing_painted_is_told(service: Service, trace: Any) -> None:
    with pytest.raises(ProbeError, match="nothing is painted"):
        service.say_again("demo", trace, np.zeros((64, 64), dtype=bool), "keep")


def test_attention_is_that_of_the_trace(service: Service, trace: Any) -> None:
    number = len(trace.words) - 2
    word = trace.words[number]
    heat = service.attention("demo", trace, number, 1, None)
    rows = trace.attention.values[word.start : word.stop, 1].mean(axis=0)
    mean = rows.astype(np.float64).reshape(heat.values.shape[0], -1, *heat.values.shape[1:]).mean(axis=1)
    assert np.corrcoef(mean.ravel(), heat.values.ravel())[0, 1] > 0.999
    heads = [service.attention("demo", trace, number, 1, head) for head in range(service.heads("demo"))]
    assert {one.params["source"] for one in heads} == {"replay"}
    with pytest.raises(ProbeError, match="attention is known of layers"):
        service.attention("demo", trace, number, 77, None)


def test_the_lens_has_a_layer_for_each_of_the_decoder_s(service: Service, trace: Any) -> None:
    assert len(service.lens("demo", trace).words) == len(trace.attention.layers)


# ---------------------------------------------------------------------------------------------------------- strangers


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims to be so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("large.png", png_of(10_000, 10_000), "10000 × 10000 pixels, and 40 million are the most"),
        ("bomb.png", png_of(60_000, 60_000), "3600000000 pixels"),
        ("a.pkl", b"\x80\x04cos\nsystem\n(S'true'\ntR.", "not an image"),
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "not an image"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n", "not an image"),
        ("cut.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF", "not an image"),
        ("empty.png", b"", "not an image"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_only_images_are_opened_and_the_refusal_names_no_path(
    service: Service, tmp_path: Path, name: str, data: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=told) as refused:
        service.open_upload(tmp_path / name)
    assert str(tmp_path) not in str(refused.value)


def test_limits_are_told_in_numbers(demo: Any, scene: Any, tmp_path: Path) -> None:
    service = Service({"demo": demo}, limits=Limits(file_bytes=1000, question=10))
    buffer = io.BytesIO()
    scene.image.save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(ImageError, match=r"MB is the most here"):
        service.open_upload(tmp_path / "a.png")
    visitor = service.new_visitor()
    with pytest.raises(ProbeError, match="10 is the most"):
        next(service.ask("demo", scene.image, "x" * 11, visitor))
    with pytest.raises(ProbeError, match="upload one"):
        next(service.ask("demo", None, "what?", visitor))
    with pytest.raises(ProbeError, match="there is no question"):
        list(service.ask("demo", scene.image, " ", visitor))
    with pytest.raises(ProbeError, match="no model 'else' here"):
        next(service.ask("else", scene.image, "what?", visitor))
    with pytest.raises(ProbeError, match="there is no model to serve"):
        Service({})
    service.close()


def test_strangers_do_not_fill_a_temporary_folder(demo: Any, scene: Any) -> None:
    service = Service({"demo": demo}, limits=Limits(answers=2))
    visitor = service.new_visitor()
    first = asked(service, scene, visitor)
    service.explain("demo", first, None, "input_gradient")
    assert service.page(first) == service.page(first)  # saved again, it is no further file
    assert len(list(Path(service.scratch).rglob("*.html"))) == 1
    kept = [asked(service, scene, visitor) for _ in range(2)]
    assert list(Path(service.scratch).iterdir()) == []
    assert {one.path for one in service.history(visitor)} == {one.path for one in kept}
    assert list(first.explanations_dir.iterdir()) == []
    folder, scratch = service.folder, Path(service.scratch)
    service.close()
    assert not folder.exists()
    assert not scratch.exists()


def test_a_damaged_answer_costs_nobody_else_theirs(demo: Any, scene: Any) -> None:
    service = Service({"demo": demo}, limits=Limits(answers=1))
    damaged = asked(service, scene, service.new_visitor()).path
    damaged.write_bytes(b"no trace")
    assert asked(service, scene, service.new_visitor()).answer
    assert not damaged.exists()
    service.close()


def test_an_answer_that_grows_when_the_app_is_closed_leaves_nothing(demo: Any, scene: Any) -> None:
    service = Service({"demo": demo})
    growing = service.ask("demo", scene.image, scene.question, service.new_visitor())
    next(growing)
    service.close()
    with contextlib.suppress(ProbeError):
        list(growing)
    assert not service.turn.locked() and not service.folder.exists() and not Path(service.scratch).exists()


def test_who_waits_or_comes_when_the_app_is_closed_is_refused(
    demo: Any, scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvlm_probe.app.service._LAST_SECONDS", 0.01)
    service, refused = Service({"demo": demo}), []
    visitor = service.new_visitor()
    before = asked(service, scene, visitor)

    def wait() -> None:
        try:
            list(service.ask("demo", scene.image, scene.question, visitor))
        except ProbeError as error:
            refused.append(str(error))

    with service.turn:  # as whoever runs on the model
        waiting = threading.Thread(target=wait)
        waiting.start()
        service.close()
    waiting.join()
    wait()
    assert len(refused) == 2 and all("has been closed" in told for told in refused)
    with pytest.raises(ProbeError, match="has been closed"):
        service.explain("demo", before, None, "input_gradient")
    assert not service.folder.exists()


class Refused(Exception):
    """Gradio's error, without Gradio."""

    def __init__(self, told: str, **_: Any) -> None:
        super().__init__(told)


@pytest.mark.parametrize("sent", [None, -1, 2.5, "9" * 5000, {"a": 1}, [[1]], "\ud800", "../../etc/passwd"], ids=repr)
def test_what_no_page_sends_is_named(service: Service, trace: Any, visitor: str, sent: Any) -> None:
    on = Handlers(service, types.SimpleNamespace(skip=str, Error=Refused), probe.demo.scenes(1))
    now = on.on_open(None, {"name": trace.path.name}, "demo", visitor)[0]
    for asks in (
        lambda: on.on_word(None, {"word": sent}, now, "center"),
        lambda: on.explained(None, now, 1, sent),
        lambda: on.on_model(None, sent),
        lambda: list(on.on_ask(sent, probe.demo.scenes(1)[0].image, "What?", visitor)),
        lambda: on.on_again("keep", None, now, sent),
        lambda: on.on_attention(None, now, sent or "first", "all"),
        lambda: on.on_image(None, now, sent),
    ):
        with pytest.raises((ProbeError, Refused)) as told:
            asks()
        assert "something unexpected" not in str(told.value)
    assert on.on_painted(None, {"mask": sent}) == "" and on.on_scene(None, {"scene": sent})[1]


@pytest.mark.parametrize("sent", [[], None, 3, {"name": []}], ids=repr)
def test_a_request_of_any_shape_ends_in_a_sentence(
    service: Service, sent: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on = Handlers(service, types.SimpleNamespace(Progress=str, skip=str, Error=Refused), [])
    with pytest.raises(Refused, match=r"something unexpected happened|no such answer"):
        on.said(on.on_open)(None, sent, "demo", service.new_visitor())
    question = on.on_ask("demo", probe.demo.scenes(1)[0].image, "half \ud800 a character", service.new_visitor())
    with pytest.raises(Refused, match="half of a character"):
        list(question)
    monkeypatch.setattr(Service, "ask", lambda *_: 1 / 0)
    with pytest.raises(Refused, match="ZeroDivisionError"):
        list(on.on_ask("demo", None, "", ""))
    assert "1 / 0" in caplog.text


def test_a_store_keeps_what_was_asked(demo: Any, scene: Any, tmp_path: Path) -> None:
    service = Service({"demo": demo}, store=tmp_path, limits=Limits(answers=1))
    visitor = service.new_visitor()
    traces = [asked(service, scene, visitor) for _ in range(2)]
    service.close()
    again = Service({"demo": demo}, store=tmp_path)
    assert [one.path for one in again.history(visitor)] == [one.path for one in reversed(traces)]
    again.close()
