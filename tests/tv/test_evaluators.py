"""Recipes for lmms-eval and VLMEvalKit under their own evaluators, on a task of three scenes.

Neither is in an environment of `make test`: they bring hundreds of megabytes. To run them:
``pip install lmms-eval`` or ``ms-vlmeval`` (0.0.20, VLMEvalKit as ModelScope packs it), beside torchvision.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

import lvlm_probe as probe

pytestmark = pytest.mark.campaign
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "integrations.md"
TASK = """
task: scenes
dataset_path: parquet
dataset_kwargs: {data_files: {test: FOLDER/test.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function scene_parts.visual
doc_to_text: !function scene_parts.text
doc_to_messages: !function scene_parts.messages
doc_to_target: answer
generation_kwargs: {max_new_tokens: 16, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
PARTS = """
def visual(doc): return [doc["image"].convert("RGB")]
def text(doc, options=None): return doc["question"]
def messages(doc, options=None):
    content = [{"type": "image", "url": visual(doc)[0]}, {"type": "text", "text": text(doc)}]
    return [{"role": "user", "content": content}]
"""


def recipe(name):
    (code,) = re.findall(rf"```python\n(def {name}\(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {"probe": probe}
    exec(code, names)
    return names[name]


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "LMUData"):
        monkeypatch.setenv(name, str(tmp_path))
    return probe.demo.scenes(3)


def test_lmms_eval(scenes, tmp_path):
    pytest.importorskip("lmms_eval", reason="needs lmms-eval")
    import datasets
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.chat.llava_hf import LlavaHf
    from lmms_eval.tasks import TaskManager

    rows = [{"image": scene.image, "question": scene.question, "answer": scene.answer} for scene in scenes]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    (tmp_path / "scene_parts.py").write_text(PARTS)
    (tmp_path / "scenes.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))

    def results(wrapped):
        lm = wrapped(LlavaHf(pretrained=str(probe.demo.path()), dtype="float32", device="cpu", device_map="cpu"))
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = simple_evaluate(lm, tasks=["scenes"], task_manager=tasks, batch_size=1)
        samples = [(sample["doc_id"], sample["resps"]) for sample in found["samples"]["scenes"]]
        return samples, found["results"]["scenes"]["exact_match,none"]

    record = recipe("recorded")
    plain = results(lambda lm: lm)
    assert results(lambda lm: record(lm, lm.model, lm._image_processor, tmp_path / "traces", llr=False)) == plain
    assert plain[1] == 1
    traces = list(probe.open_store(tmp_path / "traces"))
    assert [trace.meta for trace in traces] == [{"task": "scenes", "doc_id": number} for number in range(3)]
    assert [(trace.meta["doc_id"], [[trace.answer]]) for trace in traces] == plain[0]


def test_vlmevalkit(scenes, tmp_path, demo):
    pytest.importorskip("vlmeval", reason="needs ms-vlmeval")
    import pandas
    from vlmeval.dataset import build_dataset
    from vlmeval.inference import infer_data
    from vlmeval.vlm.base import BaseModel

    model, processor = demo

    class Demo(BaseModel):
        INTERLEAVE = True

        def generate_inner(self, message, dataset=None):
            opened = {"image": Image.open, "text": str}
            content = [{"type": part["type"], part["type"]: opened[part["type"]](part["value"])} for part in message]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    rows = []
    for number, scene in enumerate(scenes):
        scene.image.save(png := io.BytesIO(), "PNG")
        image = base64.b64encode(png.getvalue()).decode()
        rows.append({"index": 10 + number, "image": image, "question": scene.question, "answer": scene.answer})
    pandas.DataFrame(rows).to_csv(tmp_path / "scenes.tsv", sep="\t", index=False)

    def predictions(name, wrapped):
        (tmp_path / name).mkdir()
        data, out = build_dataset("scenes"), tmp_path / name / "out.pkl"
        infer_data(wrapped(Demo(), data), name, str(tmp_path / name), data, str(out))
        return pandas.read_pickle(out)

    record = recipe("recorded_rows")
    plain = predictions("plain", lambda lm, data: lm)
    recorded = predictions("recorded", lambda lm, data: record(lm, data, model, processor, tmp_path / "traces"))
    assert recorded == plain and list(plain) == [10, 11, 12]
    traces = list(probe.open_store(tmp_path / "traces"))
    assert {int(trace.meta["index"]): trace.answer for trace in traces} == plain
    assert {trace.meta["dataset"] for trace in traces} == {"scenes"}
    # Gradients, which it has turned off in this process, are there where they are asked for.
    assert probe.explain(probe.replay(traces[0], model, processor), method="integrated_gradients", steps=2)
