"""A forged trace on its own model: refused in words, before the model is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from forgery import write_seal

import lvlm_probe as probe
from lvlm_probe.errors import ProbeError, ReplayError
from lvlm_probe.models.prompts import chat_inputs, placed
from lvlm_probe.trace import open_trace
from lvlm_probe.trace.schema import FORMAT_VERSION

ROW = "traces/000000"


@pytest.fixture(scope="module")
def recorded(demo, tmp_path_factory) -> bytes:
    model, processor = demo
    scene = probe.demo.scenes(1)[0]
    inputs = placed(chat_inputs(processor, [scene.image], scene.question), model)
    with probe.attach(model, processor) as attached, attached.record(tmp_path_factory.mktemp("t")) as recording:
        model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return recording.paths[0].read_bytes()


def forged(path: Path, data: bytes, change: Callable[[h5py.File], object]) -> Path:
    path.write_bytes(data)
    with h5py.File(path, "r+") as file:
        change(file)
    write_seal(path, "lvlm_probe.trace", FORMAT_VERSION)
    return path


def put(key: str, values: np.ndarray, dtype: str | None = None) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        attrs = dict(file[f"{ROW}/{key}"].attrs) if f"{ROW}/{key}" in file else {}
        if attrs:
            del file[f"{ROW}/{key}"]
        made = file.create_dataset(f"{ROW}/{key}", data=values)
        for name, value in {**attrs, **({"dtype": dtype} if dtype else {})}.items():
            made.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value

    return change


def edited(key: str, position: int, value: float) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        values = file[f"{ROW}/{key}"][()]
        values.reshape(-1)[position] = value
        file[f"{ROW}/{key}"][...] = values

    return change


CASES: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "prompt beyond the vocabulary": (edited("inputs/input_ids", 0, 2**31 - 1), "vocabulary"),
    "prompt below zero": (edited("inputs/input_ids", 0, -7), "vocabulary"),
    "answer beyond the vocabulary": (edited("output/token_ids", 1, 10**6), "vocabulary"),
    "answer below zero": (edited("output/token_ids", 0, -1), "vocabulary"),
    "pixels that are NaN": (edited("inputs/model_kwargs/pixel_values", 5, np.nan), "NaN"),
    "pixels that are infinite": (edited("inputs/model_kwargs/pixel_values", 5, np.inf), "infinite"),
    "integers for pixels": (put("inputs/model_kwargs/pixel_values", np.zeros((1, 3, 8, 8), "i8"), "int64"), "no pix"),
    "pixels of another rank": (put("inputs/model_kwargs/pixel_values", np.zeros(7, "f4"), "float32"), ""),
    "pixels of another size": (put("inputs/model_kwargs/pixel_values", np.zeros((1, 3, 9, 9), "f4"), "float32"), ""),
    "a mask of another length": (put("inputs/model_kwargs/attention_mask", np.ones((1, 3), "i8"), "int64"), "3"),
    "a mask of zeros": (lambda file: put("inputs/model_kwargs/attention_mask", np.zeros((1, len(
        file[f"{ROW}/inputs/input_ids"])), "i8"), "int64")(file), "hides the whole prompt"),
}  # fmt: skip


@pytest.mark.parametrize("processed", [True, False], ids=["processor", "pixels"])
@pytest.mark.parametrize("case", CASES)
def test_refused_before_the_model_is_touched(demo, recorded, tmp_path, case, processed):
    model, processor = demo
    change, expected = CASES[case]
    path = forged(tmp_path / "forged.h5", recorded, change)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ProbeError, match=expected or None) as caught:
            probe.verify(open_trace(path), model, processor if processed else None)
    finally:
        handle.remove()
    if expected:
        assert "forged.h5" in str(caught.value)
        assert not calls
        assert isinstance(caught.value, ReplayError)


def test_the_trace_itself_is_taken(demo, recorded, tmp_path):
    path = forged(tmp_path / "whole.h5", recorded, lambda file: None)
    assert probe.verify(open_trace(path), *demo).within(1e-4)
