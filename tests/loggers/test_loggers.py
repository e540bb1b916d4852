"""``probe.log`` against the libraries themselves: what was logged is read back from their own files.

They live in an environment of their own (``.venv-loggers``; ``.ci/checks loggers``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

import lvlm_probe as probe


@pytest.fixture(scope="module")
def explained(demo, tmp_path_factory):
    """A map that holds up or not, and its score."""
    model, processor = demo
    scene = probe.demo.scenes(1)[0]
    answer = probe.ask(model, processor, scene.image, scene.question, out=tmp_path_factory.mktemp("traces"))
    heat = probe.explain(answer.replay, method="center")
    return heat, probe.evaluate(heat, answer.replay, steps=4)


def numbers(score):
    return {
        "deletion": score.deletion,
        "insertion": score.insertion,
        "gain": score.gain,
        "trusted": float(score.verdict.trusted),
    }


def test_tensorboard(explained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    heat, score = explained
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (1, 2):
            probe.log(heat, score, writer, name="after", step=step)
    found = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    found.Reload()
    for name, value in numbers(score).items():
        assert [(event.step, event.value) for event in found.Scalars(f"after/{name}")] == [
            (step, pytest.approx(value, rel=1e-6)) for step in (1, 2)
        ]
    image = found.Images("after/map")[0]
    assert (image.width, image.height) == heat.preview(1024).size and image.step == 1
    (text,) = {event.tensor_proto.string_val[0].decode() for event in found.Tensors("after/words/text_summary")[:1]}
    assert "| yellow |" in text and "| yes |" in text and "lvlm\\_probe/after-1.html" in text
    pages = sorted(path.name for path in (tmp_path / "lvlm_probe").iterdir())
    assert pages == ["after-1.html", "after-2.html"]
    assert "<!doctype html>" in (tmp_path / "lvlm_probe" / pages[0]).read_text("utf-8").lower()


def test_mlflow(explained, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    heat, score = explained
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as run:
        probe.log(heat, score, run, step=3)
    kept = client.get_run(run.info.run_id)
    assert kept.data.metrics == pytest.approx({f"lvlm_probe/{name}": value for name, value in numbers(score).items()})
    assert client.get_metric_history(run.info.run_id, "lvlm_probe/gain")[0].step == 3
    names = {entry.path for entry in client.list_artifacts(run.info.run_id, "lvlm_probe")}
    assert names == {
        f"lvlm_probe/{name}" for name in ("map-3.png", "words-3.json", "verdict-3.txt", "lvlm_probe-3.html")
    }
    folder = client.download_artifacts(run.info.run_id, "lvlm_probe", str(tmp_path))
    assert np.array_equal(
        np.asarray(Image.open(os.path.join(folder, "map-3.png"))), np.asarray(heat.preview(1024, score=score))
    )
    with open(os.path.join(folder, "words-3.json"), encoding="utf-8") as file:
        table = json.load(file)
    assert [row[0] for row in table["data"]] == ["The", "cross", "is", "yellow", "."]
    assert [row[-1] for row in table["data"]] == [False, False, False, True, False]


def messages(data: bytes) -> Iterator[bytes]:
    """The records of W&B's own file: seven bytes, then LevelDB's log of blocks of 32 KiB."""
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: filling
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""


def test_wandb(explained, tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    import wandb
    from wandb.proto import wandb_internal_pb2

    heat, score = explained
    with wandb.init(project="probe", dir=str(tmp_path), mode="offline", settings={"silent": True}) as run:
        probe.log(heat, score, run, step=2)
        folder = run.dir
    wandb.teardown()  # its own process writes the file
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    said, kept = {}, []
    for data in messages(file.read_bytes()):
        message = wandb_internal_pb2.Record.FromString(data)
        for item in message.history.item:
            said[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if message.WhichOneof("record_type") == "artifact":
            kept += [entry.path for entry in message.artifact.manifest.contents]
    found = {name: said[f"lvlm_probe/{name}"] for name in numbers(score)}
    assert found == pytest.approx(numbers(score)) and said["_step"] == 2
    assert said["lvlm_probe/map/_type"] == "image-file" and "center" in said["lvlm_probe/map/caption"]
    with Image.open(os.path.join(folder, said["lvlm_probe/map/path"])) as drawn:
        assert drawn.size == heat.preview(1024).size
    assert said["lvlm_probe/words/nrows"] == 5 and "lvlm_probe-2.html" in kept


def test_what_is_no_map(explained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    heat, _ = explained
    nothing = type(heat)(**{**vars(heat), "values": None, "reason": "no word depends on the image"})
    with SummaryWriter(str(tmp_path)) as writer:
        probe.log(nothing, None, writer)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert not found.Tags()["images"] and not found.Tags()["scalars"]
    assert (
        b"No word depends on the image" in found.Tensors("lvlm_probe/words/text_summary")[0].tensor_proto.string_val[0]
    )
