"""What the user handed over is what was seen: pictures and tensors that change hands, dtype, order or values."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import tiny_models
import torch
from forks import HAS_FORK, holds_in_a_fork
from PIL import Image, ImageDraw, ImageSequence
from transformers import pipeline

import lvlm_probe as probe
from lvlm_probe.recording import processor_watch
from lvlm_probe.recording.handed_images import hand_over
from lvlm_probe.recording.processor_watch import ProcessorWatch


@pytest.fixture(scope="module")
def llava():
    return tiny_models.build("llava")


def ask(llava, images=None, question="What is in the picture?"):
    model, processor = llava
    return tiny_models.inputs("llava", model, processor, images or [tiny_models.picture(90, 60)], question)


def generate(model, inputs, **settings):
    return model.generate(**{**inputs, "max_new_tokens": 4, "do_sample": False, **settings})


def recorded(llava, tmp_path, prepare, change=lambda inputs: inputs, **settings):
    """Prepared while attached, changed, then generated: the traces."""
    model, processor = llava
    with probe.attach(model, processor) as p, p.record(tmp_path, **settings) as recording:
        generate(model, change(prepare()))
    assert not recording.faults, recording.faults
    return recording.traces


def kept(trace):
    return [np.asarray(image) for image in trace.images]


# ------------------------------------------------------------------------------------------------------------- pictures


def erase(image):
    ImageDraw.Draw(image).rectangle([0, 0, *image.size], fill=0)


@pytest.mark.parametrize(
    "change",
    [erase, lambda image: image.thumbnail((24, 24)), lambda image: image.paste(0, (0, 0, 40, 40)), Image.Image.close],
)
@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_a_picture_that_changes_after_the_processor_call(llava, tmp_path, change, mode):
    picture = tiny_models.picture(90, 60).convert(mode)
    seen = np.asarray(picture.convert("RGB"))

    def changed(inputs):
        change(picture)
        return inputs

    (trace,) = recorded(llava, tmp_path, lambda: ask(llava, [picture]), changed)
    assert np.array_equal(kept(trace)[0], seen) and trace.status == "complete" and trace.llr is not None
    assert probe.verify(trace, *llava).within(1e-4)


def test_pages_of_one_file_are_one_object(llava, tmp_path):
    pages = [tiny_models.picture(90, 60, seed=seed) for seed in range(3)]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    model, processor = llava
    with probe.attach(model, processor) as p, p.record(tmp_path / "traces", llr=False, boxes=False) as recording:
        ready = [ask(llava, [page]) for page in ImageSequence.Iterator(Image.open(tmp_path / "pages.tiff"))]
        for inputs in ready:
            generate(model, inputs)
    for trace, page in zip(recording.traces, pages, strict=True):
        assert np.array_equal(kept(trace)[0], np.asarray(page))


@pytest.mark.parametrize("shape", [(60, 90, 3), (60, 90, 4), (60, 90), (3, 60, 90), (2, 60, 90, 3)])
def test_arrays_that_are_written_over(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    handed = hand_over(array if array.ndim == 4 else [array])
    before = [np.asarray(image).copy() for image in handed.images]
    array[:] = 0
    assert len(before) == (2 if array.ndim == 4 else 1)
    assert all(np.array_equal(np.asarray(now), then) for now, then in zip(handed.images, before, strict=True))
    assert all(image.any() for image in before)


@pytest.mark.parametrize("shape", [(3, 90, 3), (3, 60, 4), (4, 90, 3), (1, 90, 3)])
def test_an_array_that_may_be_rows_or_channels_first_is_no_image(shape):
    """transformers takes the first axis for channels, where it can, and then reads another image than NumPy's rows."""
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    handed = hand_over([array])
    assert handed.images is None and str(shape) in handed.why


def test_a_photograph_keeps_its_file_and_its_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    tiny_models.picture(90, 60).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as opened:
        (copied,) = hand_over(opened).images
    assert copied.filename == str(tmp_path / "turned.jpg") and copied.format == "JPEG"
    assert copied.getexif()[0x0112] == 6 and copied.size == (90, 60)


# -------------------------------------------------------------------------------------------------------- pixel tensors


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_(0.5),
        lambda t: t + 0.01,
        lambda t: t.flip(-1),
        lambda t: torch.where(t == t.max(), t.min(), t),
        lambda t: t.mul_(1.001),
    ],
)
def test_tensors_that_changed_show_no_picture(llava, tmp_path, change):
    def changed(inputs):
        inputs["pixel_values"] = change(inputs["pixel_values"])
        return inputs

    with pytest.warns(probe.ProbeWarning, match="changed after the call") as caught:
        (trace,) = recorded(llava, tmp_path, lambda: ask(llava), changed)
    assert len(caught) == 1
    assert not trace.images and any("changed after the call" in note for note in trace.notes)
    assert probe.verify(trace, *llava).within(1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clone().requires_grad_(),
        lambda t: t.bfloat16().float(),
        lambda t: t.half(),
        lambda t: t.bfloat16(),
        lambda t: t.double(),
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ],
)
def test_the_same_values_otherwise_are_found(change):
    watch, processor = ProcessorWatch(), tiny_models.build_processor("llava").image_processor
    picture = tiny_models.picture(90, 60)
    made = processor(images=[picture], return_tensors="pt")["pixel_values"]
    watch.add([picture], {}, {"pixel_values": made})
    found = watch.find({"pixel_values": change(made)})
    assert np.array_equal(np.asarray(found.images[0]), np.asarray(picture))


def watched(count, *, name="llava", nested=False, **settings):
    """A watch that has seen ``count`` calls of one picture each; the pictures and what was made of them."""
    watch, processor = ProcessorWatch(**settings), tiny_models.build_processor(name).image_processor
    pictures = [tiny_models.picture(90 - 10 * (k % 3), 60, seed=k) for k in range(count)]
    made = []
    for picture in pictures:
        result = processor(images=[[picture]] if nested else [picture], return_tensors="pt")
        watch.add([[picture]] if nested else [picture], {}, result, processor)
        made.append(dict(result))
    return watch, pictures, made


def numbers(found, pictures):
    return [next(k for k, p in enumerate(pictures) if np.array_equal(p, image)) for image in found.images]


@pytest.mark.parametrize("order", [[0, 1], [2, 0], [1, 1], [3, 2, 1, 0], [0, 0, 3], [2]])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_rows_are_found_joined_reordered_and_repeated(name, order):
    watch, pictures, made = watched(4, name=name)
    given = {key: torch.cat([made[k][key] for k in order]) for key in made[0]}
    found = watch.find(given)
    assert numbers(found, pictures) == order and found.shares == (1,) * len(order)
    first = next(key for key, value in given.items() if value.is_floating_point())
    given[first][-1, ..., -1] += 1
    assert watch.find(given) is None


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_rows_of_one_call_are_found_one_by_one(name):
    processor = tiny_models.build_processor(name).image_processor
    pictures = [tiny_models.picture(90 - 20 * k, 60, seed=k) for k in range(3)]
    made, watch = processor(images=pictures, return_tensors="pt"), ProcessorWatch()
    watch.add(pictures, {}, made, processor)
    assert numbers(watch.find(made), pictures) == [0, 1, 2]
    single = processor(images=[pictures[1]], return_tensors="pt")
    assert numbers(watch.find(single), pictures) == [1]
    swapped = {key: torch.cat([single[key], processor(images=[pictures[0]], return_tensors="pt")[key]]) for key in made}
    assert numbers(watch.find(swapped), pictures) == [1, 0]


def test_tiles_filled_up_to_the_longest_of_a_batch_are_found():
    watch, pictures, made = watched(2, name="idefics3", nested=True)
    values = [entry["pixel_values"] for entry in made]
    most = max(value.shape[1] for value in values) + 1
    padded = torch.cat([torch.nn.functional.pad(v, (0, 0) * 3 + (0, most - v.shape[1])) for v in values])
    assert numbers(watch.find({"pixel_values": padded}), pictures) == [0, 1]
    padded[1, -1, 0, 0, 0] = 1  # not filling any more
    assert watch.find({"pixel_values": padded}) is None


def test_calls_with_other_settings_are_not_taken_for_one():
    watch, pictures, made = watched(1)
    processor = tiny_models.build_processor("llava").image_processor
    processor.image_mean = [0.1, 0.1, 0.1]
    other = processor(images=pictures, return_tensors="pt")
    watch.add(pictures, {}, other, processor)
    both = torch.cat([made[0]["pixel_values"], other["pixel_values"]])
    assert watch.find(other).config["image_mean"] == [0.1, 0.1, 0.1]
    assert watch.find({"pixel_values": both}) is None


def test_memory_is_bounded_and_what_was_let_go_is_told():
    watch, _, made = watched(12, kept_bytes=4 * (90 * 60 * 4 + 2000))
    assert 2 <= len(watch) <= 5
    assert watch.find(made[-1]) is not None and watch.find(made[0]) is None
    assert "calls ago" in watch.why(made[0])[1] and "images=" in watch.why(made[0])[1]


def test_equal_pictures_are_held_once():
    watch, processor = ProcessorWatch(kept_bytes=3 * 90 * 60 * 4), tiny_models.build_processor("llava").image_processor
    for _ in range(10):
        picture = tiny_models.picture(90, 60)
        watch.add([picture], {}, processor(images=[picture], return_tensors="pt"))
    assert len(watch) == 10
    assert len({id(call.images[0]) for call in [watch.find(processor(images=[picture], return_tensors="pt"))]}) == 1


def test_why_a_call_is_not_known():
    watch, _, made = watched(1)
    assert ProcessorWatch().why(made[0])[0] == "before"
    assert watch.why({"patches": torch.rand(2, 3)})[0] == "names"
    assert watch.why({"pixel_values": torch.rand(1, 3, 4, 4)})[0] == "unknown"
    made[0]["pixel_values"].add_(1)
    assert watch.why(made[0])[0] == "changed"


@pytest.mark.skipif(not HAS_FORK, reason="no fork here")
def test_a_worker_that_is_forked_while_a_call_is_kept_waits_for_nobody(llava, monkeypatch):
    """A worker of a data loader, whose processor calls are watched too."""
    model, processor = llava
    keeping, forked, plain = threading.Event(), threading.Event(), processor_watch.look_of

    def look(image):
        keeping.set()
        forked.wait()
        return plain(image)

    with probe.attach(model, processor):
        monkeypatch.setattr(processor_watch, "look_of", look)
        thread = threading.Thread(target=ask, args=(llava,))
        thread.start()
        keeping.wait()

        def asked() -> bool:
            forked.set()  # the fork's own, which the thread does not see
            ask(llava)
            return True

        held = holds_in_a_fork(asked)
        forked.set()
        thread.join()
        assert held


def test_a_watch_serves_many_threads():
    processor = tiny_models.build_processor("llava").image_processor
    watch, failed = ProcessorWatch(kept_bytes=1 << 20), []

    def serve(start):
        for seed in range(start, start + 20):
            picture = tiny_models.picture(60, 60, seed=seed)
            made = processor(images=[picture], return_tensors="pt")
            watch.add([picture], {}, made)
            found = watch.find(made)
            if found is None or not np.array_equal(np.asarray(found.images[0]), np.asarray(picture)):
                failed.append(seed)

    threads = [threading.Thread(target=serve, args=(1000 * k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_twenty_prompts_prepared_ahead(llava, tmp_path):
    model, processor = llava
    pictures = [tiny_models.picture(90, 60, seed=seed) for seed in range(20)]
    with probe.attach(model, processor) as p, warnings.catch_warnings():
        warnings.simplefilter("error", probe.ProbeWarning)
        ready = [ask(llava, [picture]) for picture in pictures]
        with p.record(tmp_path, llr=False, boxes=False, attention=False) as recording:
            for inputs in ready[::-1]:
                generate(model, inputs, max_new_tokens=1)
    for trace, picture in zip(recording.traces, pictures[::-1], strict=True):
        assert np.array_equal(kept(trace)[0], np.asarray(picture))


def test_a_pipeline_that_collates(demo, tmp_path):
    model, processor = demo
    scenes = probe.demo.scenes(4)
    with probe.attach(model, processor) as p, p.record(tmp_path, llr=False, boxes=False) as recording:
        ask_all = pipeline("image-text-to-text", model=model, processor=processor)
        ask_all(text=[scene.messages for scene in scenes], max_new_tokens=4, batch_size=2)
    shown = [kept(trace) for trace in recording.traces]
    assert [len(images) for images in shown] == [1, 1, 1, 1]
    for (image,), scene in zip(shown, scenes, strict=True):
        assert np.array_equal(image, np.asarray(scene.image))
    assert all(probe.verify(trace, model, processor).within(1e-4) for trace in recording.traces)


def test_inputs_of_before_attach_say_so_once(llava, tmp_path):
    model, processor = llava
    before = ask(llava)
    with probe.attach(model, processor) as p, p.record(tmp_path, llr=False, boxes=False) as recording:
        with pytest.warns(probe.ProbeWarning, match="made nothing since attach") as caught:
            generate(model, before)
            generate(model, before)
    assert len(caught) == 1
    assert all("made nothing since attach" in trace.notes[0] for trace in recording.traces)


def test_a_float_picture_is_told_as_what_it_is(llava, tmp_path):
    _, processor = llava
    pixels = torch.rand(3, 60, 90)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    with pytest.warns(probe.ProbeWarning, match="array of float32"):
        (trace,) = recorded(
            llava, tmp_path, lambda: processor(images=pixels, text=[text], do_rescale=False, return_tensors="pt")
        )
    assert not trace.images and any("array of float32 and shape (3, 60, 90)" in note for note in trace.notes)


def test_an_image_of_one_colour_is_warned_of(llava, tmp_path):
    """A 16-bit file that was cut off to white, a frame that was never filled: the answer is about nothing."""
    blank = Image.new("L", (90, 60), 255)
    with pytest.warns(probe.ProbeWarning, match="same colour"):
        recorded(llava, tmp_path / "blank", lambda: ask(llava, [blank]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", probe.ProbeWarning)
        recorded(llava, tmp_path / "other", lambda: ask(llava))
