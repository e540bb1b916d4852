from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from forks import holds_in_a_fork
from PIL import Image
from trace_samples import ANSWER, sample_capture, sample_image, sample_row

from lvlm_probe.errors import ImageError, PointNotFound, TraceError
from lvlm_probe.trace import Trace, open_store, open_trace, write
from lvlm_probe.trace.records import PointRecord

DATA = Path(__file__).parents[1] / "data"


def assert_same(trace: Trace, row: object, *, attention: bool = True) -> None:
    """Every field of the captured row is what the trace reads."""
    assert trace.trace_id == row.trace_id
    assert trace.batch_row == row.batch_row
    assert (trace.status, trace.error) == (row.status, row.error)
    assert (trace.prompt, trace.question) == (row.prompt, row.question)
    assert trace.tokens == row.tokens
    assert trace.log_probs_source == row.log_probs_source
    assert (trace.processor_call, trace.baseline) == (row.processor_call, row.baseline)
    assert (trace.notes, trace.meta) == (row.notes, row.meta)
    for mine, theirs in [
        (trace.input_ids, row.input_ids),
        (trace.token_ids, row.token_ids),
        (trace.special, row.special),
        (trace.log_probs, row.log_probs),
        (trace.baseline_log_probs, row.baseline_log_probs),
        (trace.layout.image_positions, row.image_positions),
        (trace.layout.image_index, row.image_index),
        (trace.layout.patch_box, row.patch_box),
    ]:
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype
    assert trace.layout.image_token_id == row.image_token_id
    assert set(trace.model_kwargs) == set(row.model_kwargs)
    for name, tensor in trace.model_kwargs.items():
        expected = torch.as_tensor(row.model_kwargs[name])
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
    assert [trace.image_record(index) for index in range(len(row.images))] == row.images
    assert trace.points == tuple(sorted(row.points))
    if attention:
        np.testing.assert_array_equal(trace.attention.values, row.points["decoder.attention"].values.astype("f4"))


def test_everything_comes_back(tmp_path: Path) -> None:
    capture = sample_capture(3, images=2, heads=2)
    path = write(capture, tmp_path / "runs" / "demo")
    for index, row in enumerate(capture.rows):
        trace = open_trace(path, index)
        assert_same(trace, row)
        assert trace.model == capture.model
        assert trace.created == capture.created
        assert trace.seconds == capture.seconds
        assert trace.writer.startswith("lvlm_probe ")
        assert trace.row == index
        assert trace.explanations_dir == path.parent / "explanations"
        trace.verify()


def test_a_relative_path_stays_what_it_was_where_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = write(sample_capture(), "run")
    trace, store = open_trace(relative), open_store("run")
    packed = pickle.dumps(trace)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for one in (trace, store[-1], pickle.loads(packed)):
        assert one.image.size == trace.image.size and one.answer
    assert trace.explanations_dir == tmp_path / "run" / "explanations"
    write(sample_capture(seed=1), tmp_path / "run")
    store.refresh()
    assert len(store) == 2


def test_an_empty_text_names_no_file_and_no_directory() -> None:
    for opens in (open_trace, open_store):
        with pytest.raises(TraceError, match="named by its path; got an empty text"):
            opens("")


def test_derived_values(tmp_path: Path) -> None:
    capture = sample_capture(tokens=6)
    trace = open_trace(write(capture, tmp_path))
    row = capture.rows[0]
    assert trace.answer == "The small square is red"
    assert [word.text for word in trace.words] == ["The", "small", "square", "is", "red"]
    np.testing.assert_array_equal(trace.llr, row.log_probs - row.baseline_log_probs)
    assert trace.llr.dtype == np.float32
    assert trace.image.mode == "RGB"
    assert np.array_equal(np.asarray(trace.image), np.asarray(sample_image()))
    assert trace.attention.layers == (0, 1)
    assert trace.attention.reduce == "head_mean"
    assert trace.attention.text_mass.shape == (6, 2, 1)
    total = trace.attention.values.sum(-1) + trace.attention.text_mass
    np.testing.assert_allclose(total, 1.0, atol=5e-3)


def test_what_was_not_recorded_is_none(tmp_path: Path) -> None:
    row = dataclasses.replace(
        sample_row(attention=False, llr=False, images=0, image_tokens=0),
        question=None,
        processor_call=None,
        image_token_id=None,
        patch_box=None,
        status="error",
        error="ValueError: hook failed",
    )
    capture = dataclasses.replace(sample_capture(), rows=[row])
    trace = open_trace(write(capture, tmp_path))
    assert_same(trace, row, attention=False)
    assert trace.llr is None
    assert trace.attention is None
    assert trace.images == ()
    with pytest.raises(ImageError, match=r"holds no image.*pass images="):
        _ = trace.image
    assert "no LLR" in trace.describe()
    assert "hook failed" in " ".join(trace.describe().split())


def test_an_empty_answer_is_a_trace(tmp_path: Path) -> None:
    trace = open_trace(write(sample_capture(tokens=0), tmp_path))
    assert (trace.answer, trace.words, trace.tokens) == ("", [], [])
    assert trace.log_probs.shape == (0,)
    assert "(no words)" in trace.describe()
    trace.verify()


def test_half_and_brain_floats_survive(tmp_path: Path) -> None:
    capture = sample_capture()
    pixels = torch.tensor([[1.5, -2.25e30, 7e-20]], dtype=torch.bfloat16)
    hidden = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    capture.rows[0].model_kwargs = {"pixel_values": pixels, "grid": torch.tensor([[1, 2, 3]])}
    capture.rows[0].points = {
        "decoder.hidden": PointRecord(hidden, ("step", "layer", "channel"), (3, 9), "none", "m", {"a": 1})
    }
    trace = open_trace(write(capture, tmp_path))
    assert trace.model_kwargs["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(trace.model_kwargs["pixel_values"], pixels)
    point = trace.point("decoder.hidden")
    assert torch.equal(point.values, hidden)
    assert (point.axes, point.layers, point.module, point.attrs) == (
        ("step", "layer", "channel"),
        (3, 9),
        "m",
        {"a": 1},
    )
    with pytest.raises(PointNotFound, match=r"no point 'x' was recorded; recorded: decoder.hidden"):
        trace.point("x")


def test_awkward_text_survives(tmp_path: Path) -> None:
    capture = sample_capture(tokens=4)
    row = capture.rows[0]
    row.tokens = ["<b>é\0", "", "\ud83d", "\x1b[31m图</s>"]
    row.special = np.array([False, False, False, True])
    row.prompt = "" if row.prompt is None else "\u202eabc\n\n"
    row.question = ""
    row.meta = {"bad": float("nan"), "path": Path("/x")}
    trace = open_trace(write(capture, tmp_path))
    assert trace.tokens == row.tokens
    assert trace.prompt == row.prompt
    assert trace.question == ""
    assert trace.meta == {"bad": "nan", "path": "/x"}


def test_arrays_are_read_only_and_read_once(tmp_path: Path) -> None:
    trace = open_trace(write(sample_capture(), tmp_path))
    with pytest.raises(ValueError, match="read-only"):
        trace.log_probs[0] = 0
    assert trace.log_probs is trace.log_probs


def test_closed_pickled_copied(tmp_path: Path) -> None:
    path = write(sample_capture(2), tmp_path)
    with open_trace(path, -1) as trace:
        assert trace.row == 1
        again = pickle.loads(pickle.dumps(trace))
        assert again == trace
        assert again.answer == trace.answer
        assert "row=-1" in repr(trace)
    with pytest.raises(TraceError, match="this trace is closed"):
        _ = trace.answer


@pytest.mark.parametrize("row", [2, -3])
def test_a_row_that_is_not_there(tmp_path: Path, row: int) -> None:
    path = write(sample_capture(2), tmp_path)
    with pytest.raises(TraceError, match=rf"2 rows, there is no row {row}; ask for row 0 to 1"):
        open_trace(path, row)


def test_no_handle_stays_open_and_a_change_is_noticed(tmp_path: Path) -> None:
    path = write(sample_capture(), tmp_path)
    trace = open_trace(path)
    held = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert str(path) not in held
    os.replace(write(sample_capture(seed=1), tmp_path), path)
    with pytest.raises(TraceError, match="changed since"):
        _ = trace.answer
    path.unlink()
    with pytest.raises(TraceError, match="moved or deleted"):
        _ = trace.answer


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    path = write(sample_capture(), tmp_path)
    code = (
        "import sys; from lvlm_probe.trace import open_trace\n"
        f"t = open_trace({str(path)!r}); t.describe(); t.attention; t._repr_html_()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'slow imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_fork_and_threads_read_the_same_trace(tmp_path: Path) -> None:
    trace = open_trace(write(sample_capture(tokens=30), tmp_path))
    expected = trace.log_probs.copy()
    seen: list[bool] = []
    threads = [
        threading.Thread(target=lambda: seen.append(np.array_equal(Trace(trace.path).log_probs, expected)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8
    assert holds_in_a_fork(lambda: trace.answer and np.array_equal(Trace(trace.path).log_probs, expected))


class TestWrite:
    def test_name_carries_time_process_and_rows(self, tmp_path: Path) -> None:
        path = write(sample_capture(2), tmp_path)
        assert re.fullmatch(rf"\d{{8}}T\d{{6}}\.\d{{6}}Z-{os.getpid()}-[0-9a-f]{{8}}\.b2\.h5", path.name)
        assert list(tmp_path.iterdir()) == [path]

    def test_names_sort_by_creation_even_when_the_clock_steps_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datetime

        from lvlm_probe.trace import writer

        first = write(sample_capture(), tmp_path)

        class Yesterday(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
                return datetime.datetime(2001, 1, 1, tzinfo=tz)

        monkeypatch.setattr(writer.datetime, "datetime", Yesterday)
        assert [write(sample_capture(), tmp_path).name > first.name for _ in range(3)] == [True] * 3

    def test_threads_never_share_a_name(self, tmp_path: Path) -> None:
        capture = sample_capture(attention=False, images=0, tokens=1)
        threads = [threading.Thread(target=lambda: [write(capture, tmp_path) for _ in range(5)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(open_store(tmp_path)) == 20
        assert not list(tmp_path.glob("*.part"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"log_probs": np.zeros(3, np.float32)}, r"output/log_probs.*shape is \(3,\), \(8,\)"),
            ({"tokens": ["a"]}, "1 pieces for 8 tokens"),
            ({"image_index": np.zeros(2, np.int64)}, "layout/image_index"),
            ({"patch_box": np.zeros((6, 3), np.float32)}, "patch_box"),
            ({"token_ids": np.full(8, 2**40)}, "do not fit into i4"),
            ({"token_ids": np.full(8, 0.5)}, "do not fit into i4"),
            ({"trace_id": "../../etc/passwd"}, "is not a trace id"),
            ({"status": "fine"}, "complete, stopped, error"),
            ({"log_probs_source": "guess"}, "generation, teacher_forced"),
            ({"model_kwargs": {"a": np.array(["x"])}}, "cannot be stored"),
            ({"model_kwargs": {"a/b": np.zeros(1)}}, "model_kwargs"),
            ({"meta": {"x": "y" * 5_000_000}}, "at most"),
            ({"points": {"p": PointRecord(np.zeros((5, 2)), ("step", "layer"), (0, 1))}}, "axis 'step' has size 5"),
            ({"points": {"p": PointRecord(np.zeros((8, 2)), ("step", "layer"), (0,))}}, "axis 'layer' has size 2"),
            ({"points": {"p": PointRecord(np.zeros((8, 2)), ("step",))}}, "1 axes"),
        ],
    )
    def test_a_capture_that_breaks_the_schema_is_not_written(
        self, tmp_path: Path, change: dict[str, object], message: str
    ) -> None:
        capture = sample_capture()
        capture.rows[0] = dataclasses.replace(capture.rows[0], **change)
        with pytest.raises(TraceError, match=message):
            write(capture, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_no_rows_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match="no rows"):
            write(sample_capture(0), tmp_path)

    def test_a_full_or_forbidden_disk_is_a_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("")
        with pytest.raises(TraceError, match="could not be written"):
            write(sample_capture(), tmp_path / "taken")
        with pytest.raises(TraceError, match="could not be written"):
            write(sample_capture(), "/proc/nowhere")

    def test_attention_is_chunked_by_step_and_uncompressed(self, tmp_path: Path) -> None:
        path = write(sample_capture(tokens=8, layers=3, heads=4, image_tokens=10), tmp_path, fsync=True)
        with h5py.File(path) as file:
            dataset = file["traces/000000/points/decoder.attention"]
            assert dataset.chunks == (1, 3, 4, 10)
            assert dataset.compression is None
            assert dataset.dtype == np.float16
            assert file["traces/000000/inputs/prompt"].dtype.kind == "S"


class TestStore:
    def test_is_a_sequence(self, tmp_path: Path) -> None:
        for seed, rows in enumerate([1, 3, 2]):
            write(sample_capture(rows, seed=seed), tmp_path)
        store = open_store(tmp_path)
        ids = ["sample-0-r0", *(f"sample-1-r{i}" for i in range(3)), "sample-2-r0", "sample-2-r1"]
        assert [trace.trace_id for trace in store] == ids
        assert [trace.trace_id for trace in reversed(store)] == ids[::-1]
        assert len(store) == 6
        for index in range(-6, 6):
            assert store[index].trace_id == ids[index]
        assert [trace.trace_id for trace in store[1:5:2]] == ids[1:5:2]
        assert [trace.trace_id for trace in store[::-1]] == ids[::-1]
        assert [trace.trace_id for trace in store[-2:]] == ids[-2:]
        assert store[2] in store
        for index in (6, -7):
            with pytest.raises(IndexError, match=f"holds 6 traces; there is no trace {index}"):
                store[index]

    def test_the_last_of_thousands_opens_one_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(3000):
            (tmp_path / f"20200101T000000.{number:06d}Z-1-0000abcd.b2.h5").write_bytes(b"unreadable")
        write(sample_capture(2, seed=7), tmp_path)
        opened: list[str] = []
        real = h5py.File

        def counting(name: object, *args: object, **kwargs: object) -> h5py.File:
            opened.append(str(name))
            return real(name, *args, **kwargs)

        monkeypatch.setattr(h5py, "File", counting)
        store = open_store(tmp_path)
        assert len(store) == 6_002
        assert opened == []
        last = store[-1]
        assert opened == []
        assert last.trace_id == "sample-7-r1"
        assert len(set(opened)) == 1
        assert len(store[-3:]) == 3
        assert next(iter(store)).path.name.startswith("20200101T000000.000000Z")
        with pytest.raises(TraceError, match="not an lvlm_probe file"):
            _ = store[0].answer

    def test_foreign_names_are_counted_by_opening(self, tmp_path: Path) -> None:
        path = write(sample_capture(3, seed=4), tmp_path)
        path.rename(tmp_path / "a nice name.h5")
        write(sample_capture(1, seed=5), tmp_path)
        store = open_store(tmp_path)
        assert len(store) == 4
        assert store[-1].trace_id == "sample-4-r2"
        assert open_store(tmp_path / "a nice name.h5")[1].trace_id == "sample-4-r1"

    def test_parts_folders_and_hidden_files_are_no_traces(self, tmp_path: Path) -> None:
        write(sample_capture(), tmp_path)
        (tmp_path / "20200101T000000.000000Z-1-0000abcd.b2.h5.1-0000abcd.part").write_bytes(b"x")
        (tmp_path / "explanations").mkdir()
        (tmp_path / "explanations" / "x.h5").write_bytes(b"x")
        (tmp_path / "folder.h5").mkdir()
        (tmp_path / ".hidden.h5").write_bytes(b"x")
        (tmp_path / "notes.txt").write_text("x")
        assert len(open_store(tmp_path)) == 1

    def test_is_a_snapshot_that_can_be_refreshed(self, tmp_path: Path) -> None:
        write(sample_capture(seed=1), tmp_path)
        store = open_store(tmp_path)
        write(sample_capture(seed=2), tmp_path)
        assert len(store) == 1
        store.refresh()
        assert [trace.trace_id for trace in store] == ["sample-1-r0", "sample-2-r0"]

    def test_missing_and_empty(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match="no such directory"):
            open_store(tmp_path / "missing")
        store = open_store(tmp_path)
        assert len(store) == 0
        assert list(store) == []
        with pytest.raises(IndexError, match="holds no traces"):
            store[-1]

    def test_only_dead_and_old_parts_are_cleaned(self, tmp_path: Path) -> None:
        write(sample_capture(), tmp_path)
        child = subprocess.Popen([sys.executable, "-c", "pass"])
        child.wait()
        (tmp_path / "explanations").mkdir()
        name = "20200101T000000.000000Z-1-0000abcd.b2.h5"
        dead = tmp_path / f"{name}.{child.pid}-0000abcd.part"
        dead_explanation = tmp_path / "explanations" / f"x.igos.h5.{child.pid}-0000abcd.part"
        young = tmp_path / f"{name}.{child.pid}-0000abce.part"
        alive = tmp_path / f"{name}.{os.getpid()}-0000abcd.part"
        foreign = tmp_path / "download.part"
        for part in (dead, dead_explanation, young, alive, foreign):
            part.write_bytes(b"x")
            if part is not young:
                os.utime(part, (0, 0))
        store = open_store(tmp_path)
        assert store.orphans() == sorted([dead, dead_explanation])
        assert store.clean() == sorted([dead, dead_explanation])
        assert sorted(tmp_path.glob("*.part")) == sorted([young, alive, foreign])
        assert store.clean(min_age=0) == [young]
        assert len(store) == 1


class TestForAPerson:
    def test_description_reads_well(self, tmp_path: Path) -> None:
        text = open_trace(write(sample_capture(2, tokens=11), tmp_path)).describe()
        lines = text.splitlines()
        assert max(len(line) for line in lines) <= 80
        assert any(line.startswith("question") and "What is there?" in line for line in lines)
        assert any(line.startswith("answer") and "red and well-lit." in line for line in lines)
        assert any(line.startswith("model") and "LlavaForConditionalGeneration" in line for line in lines)
        assert any(line.startswith("image") and "24 x 18 png" in line for line in lines)
        assert any(line.startswith("points") and "step 11, layer 2, head 1, image_token 6" in line for line in lines)
        assert any("per token" in line for line in lines)
        marked = [line.split()[1] for line in lines if line.startswith("* ")]
        assert marked == ["square", "red"]
        red = next(line for line in lines if line.startswith("* red"))
        assert "+4.00" in red
        assert "█" in red

    def test_long_words_wide_characters_and_escapes_keep_the_columns(self, tmp_path: Path) -> None:
        capture = sample_capture(tokens=5)
        row = capture.rows[0]
        row.tokens = ["图", " " + "x" * 300, " \x1b[2J\u202eevil\u200f\u2028", " ok", "</s>"]
        row.prompt = row.question = "clear \x1b]0;title\x07"
        text = open_trace(write(capture, tmp_path)).describe()
        assert not any(ord(char) < 32 and char != "\n" for char in text)
        assert not {"\u202e", "\u200f", "\u2028"} & set(text)
        assert "\\x1b" in text
        assert max(len(line) for line in text.splitlines()) <= 80

    def test_log_probs_that_are_no_numbers(self, tmp_path: Path) -> None:
        capture = sample_capture(tokens=4)
        capture.rows[0].log_probs = np.array([-np.inf, -np.inf, -1, -1], np.float32)
        capture.rows[0].baseline_log_probs = np.array([-np.inf, -2, -np.inf, -3], np.float32)
        trace = open_trace(write(capture, tmp_path))
        assert "nan" in trace.describe()
        assert "<span" in trace._repr_html_()

    def test_html_is_escaped_and_self_contained(self, tmp_path: Path) -> None:
        capture = sample_capture(tokens=4)
        row = capture.rows[0]
        row.tokens = ["<script>alert(1)</script>", " <b>&", " red", "</s>"]
        row.question = "<img src=x onerror=alert(2)>"
        page = open_trace(write(capture, tmp_path))._repr_html_()
        assert "<script" not in page
        assert "<b>" not in page
        assert "<img src=x" not in page
        assert "&lt;script&gt;" in page
        assert "http" not in page
        assert 'src="data:image/png;base64,' in page

    def test_html_without_picture_or_llr(self, tmp_path: Path) -> None:
        page = open_trace(write(sample_capture(images=0, llr=False), tmp_path))._repr_html_()
        assert "<img" not in page
        assert "deferred" in page


def test_cmyk_palette_and_alpha_pictures_come_as_rgb(tmp_path: Path) -> None:
    import io

    from lvlm_probe.trace.records import ImageRecord

    for mode, kind in [("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("1", "PNG"), ("I;16", "PNG")]:
        buffer = io.BytesIO()
        Image.new(mode, (9, 7)).save(buffer, kind)
        capture = sample_capture()
        capture.rows[0].images = [ImageRecord(buffer.getvalue(), f"image/{kind.lower()}", 9, 7)]
        image = open_trace(write(capture, tmp_path)).image
        assert (image.mode, image.size) == ("RGB", (9, 7))


def test_sample_answer_is_what_the_tests_expect() -> None:
    assert "".join(ANSWER) == "The small square is red and well-lit."


@pytest.mark.parametrize("golden", sorted(DATA.glob("golden-*.h5")), ids=lambda path: path.stem)
def test_the_golden_file_of_every_version_reads_for_ever(golden: Path) -> None:
    expected = json.loads(golden.with_suffix(".json").read_text(encoding="utf-8"))
    store = open_store(golden)
    assert len(store) == len(expected["rows"]) == 2
    for trace, row in zip(store, expected["rows"], strict=True):
        trace.verify()
        assert trace.model == expected["model"]
        assert trace.created == expected["created"]
        for name in ("trace_id", "status", "prompt", "question", "meta", "baseline"):
            assert getattr(trace, name) == row[name], name
        assert trace.tokens == row["pieces"]
        for name in ("special", "input_ids", "token_ids", "log_probs", "baseline_log_probs"):
            assert getattr(trace, name).tolist() == row[name], name
        for name in ("patch_box", "image_positions", "image_index"):
            assert getattr(trace.layout, name).tolist() == row[name], name
        for name, value in row.get("later", {}).items():
            found = getattr(trace, name)
            assert np.array_equal([clip.to_dict() for clip in found] if name == "clips" else found, value), name
        assert trace.attention.values.tolist() == row["attention"]
        assert {
            name: {"dtype": str(tensor.dtype), "values": tensor.double().tolist()}
            for name, tensor in trace.model_kwargs.items()
        } == row["model_kwargs"]
        assert [int(np.asarray(image, np.int64).sum()) for image in trace.images] == row["image_sums"]
    assert store[1].model_kwargs["pixel_values"].dtype == torch.bfloat16
