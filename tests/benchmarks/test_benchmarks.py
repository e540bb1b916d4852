"""The benchmarks run to the end at their smallest size, and their page says what their files say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_app
import bench_engine
import bench_gpu
import bench_meter
import bench_recording
import bench_search
import bench_store
import bench_stream
import gpu_smoke
import pareto
import publish
from judging import Lines

HEAD = {"machine": "a machine, 1 thread(s)", "python": "3.11", "lvlm_probe": "0.1.0", "date": "2026-11-25"}


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    assert {"machine", "python", "lvlm_probe", "date", "command"} <= found.keys()
    return found


def test_search(tmp_path: Path) -> None:
    asked = ["--scenes", "1", "--methods", "integrated_gradients", "--out", str(tmp_path)]
    bench_search.main([*asked, "--results", str(tmp_path / "search.json")])
    found = load(tmp_path / "search.json")["models"]["demo"]
    assert found["pass"]["n"] == found["integrated_gradients"]["n"] == 1 and found["pass"]["cosine"] > 0.9
    shown = publish.page(tmp_path)
    assert f"| integrated_gradients | 1 | {found['integrated_gradients']['float32']['gain']['estimate']:.3f} [" in shown
    assert "| a pass forward in bfloat16 to float32, the embedded model, held-out scenes | – | " in shown
    before = (tmp_path / "demo.jsonl").read_bytes()
    bench_search.main([*asked, "--results", str(tmp_path / "search.json")])  # what is kept is not measured again
    assert (tmp_path / "demo.jsonl").read_bytes() == before


def test_where_the_time_goes(tmp_path: Path) -> None:
    def run() -> None:
        torch.rand(300, 300) @ torch.rand(300, 300)

    shares = bench_engine.kernels(run)
    assert sum(shares.values()) == pytest.approx(1) and 0 < shares["matrix products"] < 1 and shares["attention"] == 0
    line = {"ratios": {"iteration": 0.25}, "load_average": [1.0], "threads": 1, "kernels": {"curves": {"x": 0.5}}}
    put(tmp_path, "engine.json", models={"demo": line})
    assert "| the embedded model, curves | x 50.0 % |" in publish.page(tmp_path)


def test_stream(tmp_path: Path) -> None:
    bench_stream.main(["--small", "--tokens", "3", "--rounds", "2", "--out", str(tmp_path / "stream.json")])
    found = load(tmp_path / "stream.json")
    assert found["overheads"].keys() == set(bench_stream.KINDS) and found["plain_cpu_seconds"] > 0
    assert all(one["least"] <= one["overhead"] <= one["most"] for one in found["overheads"].values())


def test_lag_of_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    bench_stream.main(["--small", "--lag", "2", "--tokens", "5", "--rounds", "1"])
    assert "by 2 chunks of 2" in capsys.readouterr().out


def test_recording(tmp_path: Path) -> None:
    bench_recording.main(["--small", "--tokens", "3", "--rounds", "2", "--out", str(tmp_path / "recording.json")])
    found = load(tmp_path / "recording.json")
    assert found["image_tokens"] == 16
    assert {len(rounds) for rounds in found["seconds"].values()} == {2}
    assert all(min(one["plain"] + one["recorded"]) > 0 for rounds in found["seconds"].values() for one in rounds)
    # Rows of 16 tokens in 3 layers in half precision, and the rest in single.
    assert found["size"]["with attention"]["attention_bytes_per_token"] == 3 * (16 * 2 + 4)
    assert all(seconds >= 0 for seconds in found["inside"]["seconds"].values())
    text = publish.page(tmp_path)
    assert "these figures mean nothing" in text
    assert "| time added to generate(), without attention | ≤ 2.0 % |" in text


def test_overheads_are_of_two_rounds_with_the_copies_exchanged() -> None:
    """Here the second copy takes twice as long, recorded or not, and recording adds a tenth."""
    plain = [(1.0, 10.0), (2.0, 20.0), (1.5, 10.0), (3.0, 20.0)]
    recorded = [(2.2, 22.0), (1.1, 11.0), (3.3, 22.0), (1.65, 11.0)]
    seconds = {"kind": [{"plain": a, "recorded": b} for a, b in zip(plain, recorded, strict=True)]}
    found = bench_recording.overheads(seconds, tokens=100)["kind"]
    assert found["cpu"]["overhead"] == pytest.approx(0.1)
    assert found["clock"]["overhead"] == pytest.approx(0.1)
    assert found["cpu"]["added_us_per_token"] == pytest.approx(1750.0)


def test_two_sides_take_turns() -> None:
    worked: list[str] = []

    def side(name: str, steps: int) -> Any:
        def generate(stopping_criteria: list[Any]) -> None:
            for _ in range(steps):
                worked.append(name)
                (hand_over,) = stopping_criteria
                assert not hand_over(torch.zeros(1, 1), None).any()

        return lambda timed: timed(generate)

    times = bench_recording.in_turn(side("a", 2), side("b", 4))
    assert worked == ["a", "b", "a", "b", "b", "b"]
    assert all(clock > 0 for _, clock in times)


def test_store(tmp_path: Path) -> None:
    bench_store.main(["--traces", "6", "--out", str(tmp_path / "store.json")])
    found = load(tmp_path / "store.json")
    costs = found["costs"]
    assert costs["open the store"]["bytes"] == 0
    # Nothing but the last file and a little besides; and no trace at all once they are listed.
    assert costs["open the store and read the last answer"]["bytes"] < 1.6 * found["file_bytes"]
    assert costs["list with filters, again"]["bytes"] < 10_000
    assert costs["read the attention map of an opened trace"]["bytes"] < 0.5 * found["file_bytes"]
    assert "| list with filters, again: bytes read |" in publish.page(tmp_path)


def test_gpu_script_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One model here; the two others differ in their configuration, which the next test builds."""
    out = tmp_path / "gpu.json"
    bench_gpu.main(["--small", "--models", "LLaVA-1.5-7B", "--out", str(out)])
    found = load(out)
    steps = found["models"]["LLaVA-1.5-7B"]["steps"]
    assert list(steps) == [*bench_gpu.RECORDINGS, *bench_gpu.EXPLANATIONS, bench_gpu.CURVES]
    assert not [step for step, line in steps.items() if "error" in line]
    assert steps["igos++ (paper)"]["passes"] == [100, 100]
    assert steps["igos++ (thorough)"]["passes"][1] > 100 > steps["igos++ (fast)"]["passes"][1]
    # Operations follow the passes.
    each = {
        step: steps[step]["tera_operations"] / sum(steps[step]["passes"]) for step in steps if "passes" in steps[step]
    }
    assert each["igos++ (thorough)"] == pytest.approx(each["igos++ (paper)"], rel=0.25)
    assert "left" not in capsys.readouterr().out
    bench_gpu.main(["--small", "--models", "LLaVA-1.5-7B", "--out", str(out), "--seconds", "0"])
    assert load(out) == found  # nothing was missing, so nothing was done again
    text = publish.page(tmp_path)
    assert "| LLaVA-OneVision-7B, tmm: seconds (T-MM in Table 9) | ≤ 2.7 s | not measured | not measured |" in text


def test_latencies_of_the_app(tmp_path: Path) -> None:
    bench_app.main(["--rounds", "2", "--tokens", "8", "--out", str(tmp_path / "app.json")])
    found = load(tmp_path / "app.json")
    for one in found["rounds"]:
        assert one["app"]["coloured"] > one["app"]["whole"] >= one["app"]["first"] > 0
        assert one["plain"].keys() == {"first", "whole"}
    text = publish.app("<!-- app figures -->\n<!-- /app figures -->", tmp_path)
    assert "Median of 2 questions to the embedded model" in text
    guide, results = Path(publish.ROOT / "docs" / "guides" / "app.md"), Path(publish.__file__).parent / "results"
    assert publish.app(guide.read_text(encoding="utf-8"), results) == guide.read_text(encoding="utf-8")


def test_the_tables_of_quantised_weights() -> None:
    """Those of the page are those of the file, and a sentence in the place of a map is none."""
    results = Path(publish.__file__).parent / "results"
    text = (publish.ROOT / "docs" / "reality.md").read_text("utf-8")
    assert publish.quantised(text, results) == text
    kinds = json.loads((results / "quantised.json").read_text("utf-8"))["kinds"]
    rows = [line for line in text.splitlines() if line.startswith("| torchao int4 |")]
    assert (
        kinds["torchao int4"]["works"]["gradients"].startswith("ExplainError")
        and "gradient" not in kinds["torchao int4"]
    )
    assert rows[0].count("no, says so") == 3 and rows[1].count("–") == 2


def test_a_step_that_fails_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(sample: Any, *args: Any) -> Any:
        raise ValueError("no kernel image is available")

    monkeypatch.setattr(bench_gpu.Sample, "explained", failing)
    monkeypatch.setitem(bench_gpu.MODELS, "LLaVA-OneVision-7B", ("llava_onevision", failing))
    out = tmp_path / "gpu.json"
    bench_gpu.main(["--small", "--models", "LLaVA-OneVision-7B", "LLaVA-1.5-7B", "--out", str(out)])
    models = load(out)["models"]
    told = {"error": "ValueError: no kernel image is available"}
    assert models["LLaVA-OneVision-7B"]["steps"] == {"generate": told}
    steps = models["LLaVA-1.5-7B"]["steps"]
    assert {step for step, line in steps.items() if line == told} == {*bench_gpu.EXPLANATIONS, bench_gpu.CURVES}
    assert {step for step, line in steps.items() if "seconds" in line} == set(bench_gpu.RECORDINGS)
    text = publish.page(tmp_path)
    assert "| gradcam | – | ValueError: no kernel image is available | – | – |" in text


def test_the_script_for_ten_minutes_on_a_card(tmp_path: Path) -> None:
    """On the CPU: the figures that an earlier call has left; what it starts is started here."""
    done = {step: {"seconds": 1.0} for step in (*bench_gpu.RECORDINGS, *bench_gpu.EXPLANATIONS, bench_gpu.CURVES)}
    earlier = {"Qwen2.5-VL-7B": {"steps": done}, "LLaVA-OneVision-7B": {"steps": done}}
    last = {**done, "tmm": {"error": "of another day"}, "gradcam": {}}
    (tmp_path / "gpu.json").write_text(
        json.dumps({"device": "CPU", "models": {**earlier, "LLaVA-1.5-7B": {"steps": last}}}), encoding="utf-8"
    )
    python, started = tmp_path / "python", tmp_path / "started"
    python.write_text(f'#!/bin/sh\necho "$@" >> {started}\n', encoding="utf-8")
    python.chmod(0o755)
    settings = {**os.environ, "OUT": str(tmp_path), "MINUTES": "30", "PYTHON": str(python)}
    script = [str(Path(bench_gpu.__file__).with_name("gpu_run.sh")), "--device", "cpu", "--small"]
    ended = subprocess.run(script, env=settings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    smoke, bench = (line.split() for line in started.read_text(encoding="utf-8").splitlines())
    assert [smoke[0], bench[0]] == ["tests/benchmarks/gpu_smoke.py", "tests/benchmarks/bench_gpu.py"]
    assert gpu_smoke.main([*smoke[1:], "--seconds", "0"]) == 0  # tests/device runs its checks
    bench_gpu.main(bench[1:])
    models = load(tmp_path / "gpu.json")["models"]
    assert {name: models[name] for name in earlier} == earlier
    steps = models["LLaVA-1.5-7B"]["steps"]
    assert steps.keys() == done.keys() and all("seconds" in line for line in steps.values())
    assert steps["tmm"]["passes"] and steps["generate"] == {"seconds": 1.0}


@pytest.mark.parametrize("name", bench_gpu.MODELS)
def test_small_models_of_the_gpu_script_answer(name: str, tmp_path: Path) -> None:
    chip = bench_gpu.Chip(torch.device("cpu"), None)
    sample = bench_gpu.Sample(name, chip, True, tmp_path)
    assert {weights.dtype for weights in sample.model.parameters()} == {torch.bfloat16}
    assert sample.replay.token_ids.shape == (6,)
    assert sample.image_tokens > 0


@pytest.mark.parametrize(
    ("name", "billions", "image_tokens"),
    [("LLaVA-1.5-7B", 7.06, 576), ("LLaVA-OneVision-7B", 8.03, None), ("Qwen2.5-VL-7B", 8.29, 391)],
)
def test_true_geometries_have_the_published_number_of_weights(
    name: str, billions: float, image_tokens: int | None
) -> None:
    """On the meta device, where weights take no memory. Numbers of weights: the checkpoints' own, from their cards."""
    model_class, (config, processor) = bench_gpu.MODELS[name][1](False)
    with torch.device("meta"):
        model = model_class(config)
    assert sum(weights.numel() for weights in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)
    if image_tokens is not None:
        given = bench_gpu.tiny_models.inputs(
            bench_gpu.MODELS[name][0], _OnCpu(), processor, [bench_gpu.tiny_models.picture(640, 480)], "What?"
        )
        image = config.image_token_id
        assert int((given["input_ids"] == image).sum()) == image_tokens


class _OnCpu:
    device = torch.device("cpu")


def test_operations_are_those_of_the_products() -> None:
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)

    def run() -> None:
        torch.autograd.grad((a @ b).sum(), [a, b])

    assert bench_gpu.operations_of(lambda: a @ b) == 2 * 3 * 5 * 7
    assert bench_gpu.operations_of(run) == 3 * 2 * 3 * 5 * 7  # the product, and one for each gradient


@pytest.mark.quick
def test_a_clone_is_a_whole_trace_of_its_own(tmp_path: Path) -> None:
    import lvlm_probe as probe

    original = bench_store.record_one(tmp_path / "one")
    first, second = (bench_store.clone(original, tmp_path, number) for number in (0, 3))
    traces = [probe.open_trace(path) for path in (original, first, second)]
    for trace in traces:
        trace.verify()
    assert len({trace.trace_id for trace in traces}) == 3
    assert [trace.status for trace in traces[1:]] == ["complete", "stopped"]
    assert traces[2].answer == traces[0].answer
    assert [trace.path for trace in probe.open_store(tmp_path)] == [first, second]


# ------------------------------------------------------------------------------------------------------------ the page


def put(directory: Path, name: str, **found: Any) -> None:
    (directory / name).write_text(json.dumps({**HEAD, **found}), encoding="utf-8")


def test_without_results_nothing_is_measured(tmp_path: Path) -> None:
    text = publish.page(tmp_path)
    assert text.count("## ") == len(publish.SECTIONS)
    for section in publish.SECTIONS:
        assert f"`{section.command}`: not measured." in text
    assert text.startswith("# Benchmarks\n")
    assert "0 goals met, 0 missed, " in text
    assert "met |" not in text
    assert "**missed**" not in text


def sentence(surprise: float, llr: float, visual: str = "red") -> bench_meter.Sentence:
    """ "The star is red.", of which one word has these numbers."""
    pieces, red = [" The", " star", " is", " red", "."], np.array([0.0, 0.0, 0.0, 1.0, 0.0])
    return bench_meter.Sentence(pieces, [False] * 5, -surprise * red, llr * red, 0 * red, frozenset([visual]))


def test_the_meter_is_judged_against_the_joint_drop(tmp_path: Path) -> None:
    """Planted words that the image speaks for a little, in answers that are longer than others: what a sum hides."""
    kinds = {"own": sentence(0, 5), "contradicted": sentence(6, 4), "swapped": sentence(6, 4), "unseen": sentence(0, 0)}
    found = [{kind: [one] * 8 for kind, one in kinds.items()} | {"drawn": [sentence(1, 5)]} for _ in range(3)]
    told = bench_meter.figures(found, np.random.default_rng(0))
    for kind, measure in (
        ("contradicted", "surprise of the worst word"),
        ("unseen", "share of words not from the image"),
    ):
        assert set(told["areas"][kind]) == {"1", "2", "4", "8", "mixed"}
        assert all(line[measure] == 1.0 for line in told["areas"][kind].values())
    # 4, 9, 19 and 39 nats against 5, 10, 20 and 40: one contradicted sentence in eight is still above any four.
    assert told["areas"]["contradicted"]["mixed"]["joint drop (before)"] == pytest.approx(10 / 16)
    assert told["answers"]["contradicted"]["8"] == {
        "unlikely": 1.0, "habit": 0.0, "image": 0.0, "unknown": 0.0, "joint drop above 70 %": 1.0,
    }  # fmt: skip
    assert told["words"]["planted words"]["unlikely"] == told["words"]["own other words"]["habit"] == 1.0
    assert told["words_per_answer"] == {"1": 4.0, "2": 8.0, "4": 16.0, "8": 32.0}
    tuned = bench_meter.threshold_curve(found)
    assert (tuned["3"], tuned["6"]["planted"]) == ({"planted": 1.0, "own": 0.0}, 0.0)
    put(tmp_path, "meter.json", **told, tuned=tuned)
    text = publish.page(tmp_path)
    assert (
        "| one word contradicts the image | the most surprising word | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |" in text
    )
    assert (
        "| contradicted | 8 | 100.0 % | 0.0 % | 0.0 % | 100.0 % |" in text
        and "1 to 8 sentences mixed | ≥ 0.980" in text
    )


def test_goals_met_and_missed_are_said_plainly(tmp_path: Path) -> None:
    put(tmp_path, "engine.json", models={"demo": {"ratios": {"iteration": 0.25, "curves": 0.51}}})
    put(
        tmp_path,
        "ray.json",
        speedup={"all": 1.79},
        units={"answers": 3, "maps": 4},
        seconds={"1 worker": {"all": 17.9}, "2 workers": {"all": 10.0}},
        runs={"1": [{}, {}, {}]},
        busy=0.95,
        units_slower=1.1,
        command="python somewhere/else.py",
    )
    put(tmp_path, "planner.json", lines=[{"model": "m", "ratio": 0.9}, {"model": "m", "ratio": 1.16}])
    put(
        tmp_path,
        "growth.json",
        slopes={
            "image_tokens": {
                "tmm": {
                    "seconds": {"all": 1.5, "last": 1.9},
                    "peak": {"all": 1.0, "last": 1.0},
                    "layer": {"all": 1.02, "last": 1.1},
                }
            },
            "answer_tokens": {},
        },
    )
    out = tmp_path / "docs" / "benchmarks.md"
    publish.main(["--results", str(tmp_path), "--out", str(out)])
    text = out.read_text("utf-8")
    assert "| time of one iteration of iGOS+, the embedded model | ≤ 0.25 | 0.25 | met |" in text
    assert "| time of deletion and insertion, the embedded model | ≤ 0.50 | 0.51 | **missed** |" in text
    assert "| peak memory, the embedded model | ≤ 0.40 | not measured | not measured |" in text
    assert "| speed-up of two workers over one | ≥ 1.80 | 1.79 | **missed** |" in text
    assert "3 answers and 4 maps: 18 s with one worker, 10 s with two" in text
    assert "| error of predicted peak memory, worst of 2 predictions | ≤ 15.0 % | 16.0 % | **missed** |" in text
    assert "| m | 2 | 0.90 to 1.16 |" in text
    assert "| T-MM: exponent of memory beyond the model's own | ≤ 1.10 | 1.10 | met |" in text
    assert "| tmm | 1.50 | 1.00 |" in text
    assert "`python somewhere/else.py`: a machine, 1 thread(s); Python 3.11, lvlm_probe 0.1.0; 2026-11-25." in text
    assert "2 goals met, 3 missed, " in text


def test_a_run_that_spreads_over_the_bound_does_not_decide() -> None:
    def verdict(figure: float, low: float, high: float) -> str:
        return publish.Goal("x", figure, 0.02, publish.percent, quartiles=(low, high)).verdict

    assert verdict(-0.002, -0.056, 0.086) == "not decided: quartiles -5.6 % to 8.6 %"
    assert verdict(0.01, 0.005, 0.015) == "met"
    assert verdict(0.04, 0.03, 0.05) == "**missed**"


def test_the_goals_of_page_and_scripts_are_the_same() -> None:
    assert publish.ENGINE == bench_engine.GOALS
    assert {kind: bound for kind, bound in publish.RECORDING.items() if bound} == bench_recording.GOALS
    assert publish.RECORDING.keys() == {bench_recording.NOTHING, *bench_recording.KINDS}
    assert publish.GPU_PAPER == bench_gpu.PAPER
    assert set(publish.GPU_MODELS) == set(bench_gpu.MODELS)


def test_the_page_in_docs_is_the_one_that_the_results_give() -> None:
    docs = publish.ROOT / "docs" / "benchmarks.md"
    assert docs.read_text("utf-8") == publish.page(Path(publish.__file__).parent / "results"), (
        "docs/benchmarks.md is not that of tests/benchmarks/results: run python tests/benchmarks/publish.py"
    )


def test_what_passes_buy_on_another_model(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    judged = {"key": "k", "held_out": None, "pointing": 1.0, "average_precision": 0.5, "backward": 0}
    gains = {"igos++": [0.9, 0.8, 0.7], "rise": [0.6, 0.5], "random": [0.0, 0.0, 0.0]}
    for name, found in gains.items():
        for scene, gain in enumerate(found):
            lines.add({**judged, "scene": scene, "name": name, "gain": gain, "forward": 10 if name == "rise" else 80})
    rows = pareto.rows_of({name: lines for name in lines.names() if name != "random"})
    pareto.compare(rows, "igos++")
    assert [(row["name"], row["passes"]) for row in rows] == [("rise", 10), ("igos++", 80)]
    assert rows[0]["against"]["mean"] == pytest.approx(-0.3) and "against" not in rows[1]
    page = pareto.section("photographs", rows)
    assert "## Photographs" in page and "| rise (on 2) | 10 + 0 |" in page and "| igos++ | 80 + 0 |" in page
    assert "3 images" in page
    few = pareto.rows_of({"igos++": lines}, scenes={2})
    assert few[0]["gain"]["mean"] == pytest.approx(0.7)
