"""Recipes of the guide keep their promises: training goes on as without a probe, a benchmark has the same answers."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lvlm_probe as probe

pytest.importorskip("peft")
pytest.importorskip("accelerate")
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "integrations.md"


def test_a_training_with_maps_is_the_training_without(demo, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(from copy import deepcopy\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    without, cut = re.subn(r"\n    callbacks=.*\n", "\n", code)
    assert cut == 1
    monkeypatch.chdir(tmp_path)
    for name, scene in zip(("photo.jpg", "other.jpg"), probe.demo.scenes(2), strict=True):
        scene.image.save(name)
    weights = []
    for recipe in (code, without):
        torch.manual_seed(0)  # of the adapter's first weights
        names = {"probe": probe, "model": demo[0], "processor": demo[1]}
        exec(recipe, names)
        weights.append({path: value for path, value in names["adapted"].state_dict().items() if "lora_" in path})
        assert names["adapted"].training
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 4
    assert all(torch.equal(value, weights[1][path]) for path, value in weights[0].items())
    pages = sorted(Path("runs/maps").glob("*/0.html"))
    assert [page.parent.name for page in pages] == ["epoch-1", "epoch-2"]
    first, second = (probe.open_store(page.parent)[0] for page in pages)
    assert first.model["adapter"] == second.model["adapter"] == "default"
    assert first.model["fingerprint"] != second.model["fingerprint"]
    assert first.log_probs.tolist() != second.log_probs.tolist()


def test_a_benchmark_has_the_same_answers_and_traces_that_say_of_what(demo, tmp_path):
    model, processor = demo
    (code,) = re.findall(r"```python\n(def recorded\(lm.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {"probe": probe}
    exec(code, names)
    scenes = probe.demo.scenes(3)

    def generate_until(requests):  # as a model of lmms-eval has it: a list of requests to a list of answers
        answers = []
        for request in requests:
            inputs = processor.apply_chat_template(
                scenes[request.doc_id].messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    requests = [SimpleNamespace(task_name=task, doc_id=number) for number, task in ((2, "b"), (0, "a"), (1, "a"))]
    lm = SimpleNamespace(generate_until=generate_until)
    answers = generate_until(requests)
    assert names["recorded"](lm, model, processor, tmp_path, llr=False).generate_until(requests) == answers
    traces = list(probe.open_store(tmp_path))
    assert [(t.meta["task"], t.meta["doc_id"]) for t in traces] == [(r.task_name, r.doc_id) for r in requests]
    assert [trace.answer for trace in traces] == answers


def test_rows_of_a_data_set_have_the_same_answers_and_traces_that_say_of_what(demo, tmp_path):
    model, processor = demo
    (code,) = re.findall(r"```python\n(def recorded_rows\(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {"probe": probe}
    exec(code, names)
    rows = [{"index": 10 + n, "image": s.image, "question": s.question} for n, s in enumerate(probe.demo.scenes(3))]

    def build_prompt(line, **options):  # as data sets and models of VLMEvalKit have it: a row to a message
        return [{"type": "image", "value": line["image"]}, {"type": "text", "value": line["question"]}]

    def generate(message, dataset=None):
        content = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    answers = [generate(build_prompt(line)) for line in rows]
    lm, data = SimpleNamespace(generate=generate, build_prompt=build_prompt), SimpleNamespace(build_prompt=build_prompt)
    recorded = names["recorded_rows"](lm, data, model, processor, tmp_path, llr=False)
    for maker in (data, lm):
        found = [recorded.generate(message=maker.build_prompt(line), dataset="scenes") for line in rows]
        assert found == answers
    traces = list(probe.open_store(tmp_path))
    assert [trace.meta for trace in traces] == [{"dataset": "scenes", "index": str(line["index"])} for line in rows] * 2
    assert [trace.answer for trace in traces] == answers * 2
