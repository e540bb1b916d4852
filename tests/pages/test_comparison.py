"""The comparison page: what it holds, what one bad method costs the others, when it refuses."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html.parser
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_samples as samples
import torch
from toy_replay import ToyReplay, box_weights

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ReportError, SelectionError
from lvlm_probe.explainers import registry
from lvlm_probe.metrics import bootstrap_ci
from lvlm_probe.pages.comparison import Comparison, compare

HOSTILE = "</td></table><script>document.title='owned'</script><img src=x onerror=alert(1)> {{script}} &amp;"


class Page(html.parser.HTMLParser):
    """The tags of a page, and what each cell of its table says."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open = False
        self.text = path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        kind = dict(attrs).get("class")
        if kind == "scene":
            self.rows.append([""])
        elif kind == "cell":
            self.rows[-1].append("")
        self.open = self.open or kind in ("scene", "cell")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.open = False

    def handle_data(self, data: str) -> None:
        if self.open:
            self.rows[-1][-1] += data.replace("\u00a0", " ")


@pytest.fixture
def bad_methods() -> Iterator[None]:
    """Two explainers that fail, one as ours do and one as a plugin's bug would."""

    @registry.register("says why")
    def says_why(problem: Any) -> Any:
        raise ExplainError("this model has no such layers, see /home/ada/secret/models/llava")

    @registry.register("buggy")
    def buggy(problem: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    yield
    for name in ("says why", "buggy"):
        del registry.METHODS[name]


def toy(trace_id: str = "toy", rows: slice = slice(1, 3)) -> ToyReplay:
    """An answer of two words, the second of which hangs on a box of an 8 × 8 grid."""
    replay = ToyReplay(
        torch.stack([box_weights(8, slice(0, 8), slice(0, 8)), box_weights(8, rows, slice(4, 6))]),
        original=(0.9, 0.95),
        base=(0.9, 0.01),
        tokens=["The", " star"],
    )
    replay.trace_id = replay.trace.trace_id = trace_id
    return replay


def test_every_method_on_every_answer_with_its_scores(tmp_path: Path) -> None:
    replays = [toy("a"), toy("b", slice(5, 7))]
    done: list[tuple[int, int]] = []
    made = compare(
        replays, ["random", "occlusion"], out=tmp_path / "new" / "page.html", progress=lambda *at: done.append(at)
    )
    assert isinstance(made, Comparison)
    assert made.path == tmp_path / "new" / "page.html"
    assert done == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert made.methods == ("random", "occlusion")
    page = Page(made.path)
    assert [len(row) for row in page.rows] == [3, 3]
    for replay, row, texts in zip(replays, made.rows, page.rows, strict=True):
        assert "The star" in texts[0]
        for heat, score, text, method in zip(row.heats, row.scores, texts[1:], made.methods, strict=True):
            assert heat is not None and score is not None
            assert heat.method == method
            assert heat.selection.text == "star"
            again = probe.evaluate(heat, replay, grid=32)
            assert (score.deletion, score.insertion) == (again.deletion, again.insertion)
            assert f"del {again.deletion:.2f} · ins {again.insertion:.2f}" in text
            passes = heat.provenance["passes"]
            assert (f"{passes['forward']} + 0 passes" if passes["forward"] else "no pass") in text
    assert "one grid of 32 × 32 cells" in page.text
    assert made.standings()[0].method == "occlusion"


def test_means_are_those_of_the_rows(tmp_path: Path) -> None:
    gains = {"first": (0.9, 0.5, 0.7), "second": (0.2, 0.3, 0.1)}
    heats, scores, labels = [], [], []
    for number in range(3):
        trace = samples.trace(f"trace-{number}")
        for label, values in gains.items():
            heats.append(samples.heat(trace, method="igos++"))
            scores.append(samples.score(deletion=0.05, insertion=0.05 + values[number]))
            labels.append(label)
    made = compare(heats, scores=scores, labels=labels, out=tmp_path / "page.html")
    first, second = made.standings()
    assert (first.method, second.method) == ("first", "second")
    assert first.gain is not None
    expected = bootstrap_ci(gains["first"])
    assert (first.gain.estimate, first.gain.low, first.gain.high) == pytest.approx(
        (expected.estimate, expected.low, expected.high)
    )
    assert first.gain.estimate == pytest.approx(0.7)
    assert (first.maps, first.trusted, first.forward, first.seconds) == (3, 3, 1210.0, 8.71)
    text = Page(made.path).text
    assert "All 3 answers together" in text
    assert f"0.70 [{expected.low:.2f}, {expected.high:.2f}]" in text


def test_the_best_gain_of_a_row_is_marked_and_a_reversed_one_is_red(tmp_path: Path) -> None:
    trace = samples.trace()
    heats = [samples.heat(trace, method=name) for name in ("good", "as good", "bad")]
    scores = [
        samples.score(deletion=0.04, insertion=0.961),
        samples.score(deletion=0.04, insertion=0.959),
        samples.score(deletion=0.8, insertion=0.3, reasons=("insertion − deletion is -0.50",)),
    ]
    page = Page(compare(heats, scores=scores, out=tmp_path / "page.html").path)
    ((_, good, as_good, bad),) = page.rows
    assert ["best" in text for text in (good, as_good, bad)] == [True, True, False]
    assert "−0.50" in bad and "do not trust" in bad and "Insertion − deletion is -0.50." in bad
    bars = [attrs for tag, attrs in page.tags if tag == "rect" and attrs["class"] in ("reach", "back")]
    assert [(bar["class"], bar["x"], bar["width"]) for bar in bars][1:] == [
        ("reach", "4.0", "91.9"),
        ("back", "30.0", "50.0"),
    ]


@pytest.mark.quick
def test_what_a_method_cannot_do_stands_in_its_place(bad_methods: None, tmp_path: Path) -> None:
    made = compare([toy()], ["says why", "random", "buggy"], out=tmp_path / "page.html")
    ((_, why, fine, bug),) = Page(made.path).rows
    assert "No heatmap" in why and "This model has no such layers, see llava." in why
    assert "gain" in fine
    assert "something unexpected happened, ZeroDivisionError: division by zero" in bug.replace("Some", "some")
    assert [heat is not None and heat.values is not None for heat in made.rows[0].heats] == [False, True, False]
    lost = next(one for one in made.standings() if one.method == "buggy")
    assert (lost.gain, lost.maps) == (None, 0)
    assert "division by zero" in lost.reasons[0]


def test_judging_that_fails_keeps_the_heatmap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("lvlm_probe.pages.comparison.evaluate", fail)
    made = compare([toy()], ["random"], out=tmp_path / "page.html")
    ((_, cell),) = Page(made.path).rows
    assert "Not judged: something unexpected happened, RuntimeError: out of luck." in cell
    assert made.rows[0].heats[0]


def test_methods_with_parameters_and_labels_of_their_own(tmp_path: Path) -> None:
    quick = {"iterations": 1, "ig_steps": 2, "size": 4}
    made = compare(
        toy(), {"one": {"method": "igos++", **quick}, "igos++": {**quick, "iterations": 2}}, out=tmp_path / "p.html"
    )
    one, two = made.rows[0].heats
    assert one is not None and two is not None
    assert (one.method, one.params["iterations"]) == ("igos++", 1)
    assert two.params["iterations"] == 2
    assert [text for tag, text in _heads(made.path)] == ["one", "igos++"]


def _heads(path: Path) -> list[tuple[str, str]]:
    head = re.search(r"<thead>(.*?)</thead>", path.read_text("utf-8"), re.DOTALL)
    assert head
    return re.findall(r'<(th) scope="col">([^<]*)</th>', head[1])[1:]


def test_heatmaps_of_other_words_or_without_a_column_get_their_place(tmp_path: Path) -> None:
    trace = samples.trace()
    word = samples.selection((5,), rule="span")
    heats = [samples.heat(trace, method="a"), samples.heat(trace, method="b"), samples.heat(trace, word, method="a")]
    page = Page(compare(heats, out=tmp_path / "page.html").path)
    assert [row[2].startswith("bNo heatmap was given") for row in page.rows] == [False, True]
    assert "Nothing here was judged" in page.text
    assert 'class="k"> park' not in page.text  # a word's own white space is not underlined
    assert '<span class="k">park</span>' in page.text


def test_scores_that_cannot_be_compared_are_told(tmp_path: Path) -> None:
    trace = samples.trace()
    heats = [samples.heat(trace, method="a"), samples.heat(trace, method="b")]

    def text(first: dict[str, Any], second: dict[str, Any]) -> str:
        base = {"score": "prob", "auc": "trapezoid", "steps": 50, "mode": "fast", "grid": [32, 32]}
        scores = [
            samples.score(
                params=base | {key: value for key, value in changes.items() if key != "kind"},
                baseline_check={"kind": changes.get("kind", "blur"), "mean_probability": 0.03},
            )
            for changes in (first, second)
        ]
        made = compare(heats, scores=scores, out=tmp_path / "page.html", overwrite=True)
        return made.path.read_text("utf-8")

    same = text({}, {})
    assert 'class="warning"' not in same and "one grid of 32 × 32 cells" in same
    assert "different grids (16 × 16, 32 × 32)" in text({}, {"grid": [16, 16]})
    assert "in different ways" in text({}, {"steps": 20})
    assert "against different baselines" in text({}, {"kind": "mean"})


def test_nothing_is_loaded_and_every_string_is_text(tmp_path: Path) -> None:
    trace = samples.trace(question=HOSTILE, tokens=[HOSTILE, " red"], llr=[0.1, 3.0], log_probs=[-0.1, -0.1])
    chosen = samples.selection((1,), tokens=(HOSTILE, " red"), llr=(0.1, 3.0), skipped={})
    heats = [
        samples.heat(trace, chosen, method=HOSTILE),
        samples.heat(trace, chosen, method="b", values=None, reason=HOSTILE),
    ]
    scores = [samples.score(reasons=(HOSTILE,)), None]
    made = compare(heats, scores=scores, out=tmp_path / "page.html", title=HOSTILE)
    page = Page(made.path)
    assert page.text.count("document.title") == page.text.count("document.title=&#x27;owned") > 4
    assert [tag for tag, _ in page.tags].count("script") == 1
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 3  # the colour bar, the image and one heatmap
    assert all(str(source).startswith("data:image/") for source in sources)
    assert not any(name == "style" or name.startswith("on") for _, attrs in page.tags for name in attrs)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        assert body
        assert base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode() in policy
    assert "/home/ada" not in page.text


def test_refusals(tmp_path: Path, bad_methods: None) -> None:
    out = tmp_path / "page.html"
    replay, heat = toy(), samples.heat()
    other = dataclasses.replace(heat)
    for wrong, message in (
        (lambda: compare([], out=out), "given nothing"),
        (lambda: compare([object()], out=out), "got a object"),
        (lambda: compare([replay, heat], out=out), "not both"),
        (lambda: compare([heat], ["random"], out=out), "leave methods out"),
        (lambda: compare([heat], scores=[None, None], out=out), "1 heatmaps but 2 scores"),
        (lambda: compare([heat], scores=["good"], out=out), "got a str"),
        (lambda: compare([heat, other], out=out), "called 'igos\\+\\+': tell them apart"),
        (lambda: compare(replay, ["random"], labels=["x"], out=out), "go with heatmaps"),
        (lambda: compare(replay, [], out=out), "no methods"),
        (lambda: compare(replay, ["random"], image=1, out=out), "image=1, but toy has 1 image"),
        (lambda: compare(replay, ["random"], out=tmp_path), "is a folder"),
    ):
        with pytest.raises(ReportError, match=message):
            wrong()
    with pytest.raises(ExplainError, match="no explainer 'randon'; there are \\(closest first\\): 'random'"):
        compare(replay, ["random", "randon"], out=out)
    with pytest.raises(SelectionError, match="'zebra' is not in the answer"):
        compare(replay, ["random"], tokens="zebra", out=out)
    assert not out.exists()
    compare(replay, ["random"], out=out)
    with pytest.raises(ReportError, match="exists"):
        compare(replay, ["random"], out=out, overwrite=False)
    compare(replay, ["center"], out=out)  # a page of ours: a cell that runs again replaces it


@pytest.fixture(scope="module")
def recorded(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real answer of the embedded model."""
    model, processor = demo
    (scene,) = probe.demo.scenes(1, kinds=["cell"])
    with probe.attach(model, processor) as attached:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with attached.record(tmp_path_factory.mktemp("runs"), images=[scene.image], question=scene.question) as run:
            model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return run.traces[-1]


def test_a_trace_alone_has_maps_but_no_scores(recorded: Any, tmp_path: Path) -> None:
    made = compare(recorded, out=tmp_path / "page.html")
    assert {"attention", "random", "tam"} <= set(made.methods)
    assert not {"igos++", "rise", "tmm"} & set(made.methods)
    cells = dict(zip(made.methods, Page(made.path).rows[0][1:], strict=True))
    assert "Not judged: judging needs the model." in cells["attention"]
    assert "record with points=" in cells["tam"]
    both = compare(recorded, ["tmm", "random"], out=tmp_path / "both.html")
    assert "needs gradients and passes of the model" in Page(both.path).rows[0][1]


def test_the_embedded_model_under_the_usual_methods(demo: Any, recorded: Any, tmp_path: Path) -> None:
    replay = probe.replay(recorded, *demo)
    before = replay.baseline["kind"]
    made = compare(replay, ["tmm", "gradcam", "input_gradient", "attention"], out=tmp_path / "page.html", steps=8)
    ((scene, *cells),) = Page(made.path).rows
    assert recorded.answer.strip() in scene and recorded.question in scene
    assert f"Baseline {before}" in scene
    assert all("gain" in cell for cell in cells)
    assert {tuple(score.params["grid"]) for score in made.rows[0].scores if score} == {(32, 32)}
    assert {heat.shape for heat in made.rows[0].heats if heat} >= {(8, 8), (16, 16)}
    assert len({str(heat.provenance["baseline"]) for heat in made.rows[0].heats if heat}) == 1


def test_a_search_in_bfloat16_is_one_of_all_methods_or_of_a_label(demo: Any, recorded: Any, tmp_path: Path) -> None:
    replay = probe.replay(recorded, *demo)
    named: Any = {"input_gradient": {}, "exact": {"method": "input_gradient", "search_dtype": None}, "random": {}}
    made = compare(replay, named, search_dtype="bfloat16", steps=4, out=tmp_path / "a.html", progress=False)
    (row,) = made.rows
    low, exact, random = row.heats
    assert [heat.search_dtype for heat in row.heats if heat] == ["bfloat16", None, "bfloat16"]
    assert low and exact and random and not np.array_equal(low.values, exact.values)
    over = replay.strengthened(low.selection.decided)
    alone = probe.explain(over, method="input_gradient", search_dtype="bfloat16", strengthen=False, progress=False)
    np.testing.assert_array_equal(low.values, alone.values)
    assert made.path.read_text("utf-8").count("searched\u00a0in\u00a0bfloat16") == 1, "random runs no pass"
    for source, said in ((recorded, "is for passes of a model"), (replay, "got 'int8'")):
        with pytest.raises(ExplainError, match=said):
            compare(source, ["random"], search_dtype="int8", out=tmp_path / "b.html", progress=False)
    assert not (tmp_path / "b.html").exists()


def test_a_figure_of_all_heatmaps_with_their_verdicts(tmp_path: Path) -> None:
    heats = [
        samples.heat(recording, method="igos++")
        for recording in (samples.trace("one"), samples.trace("two", question="What is bright?"))
        for _ in range(2)
    ]
    doubted = samples.score(reasons=("tied",))
    labels = ["one mask", "two masks"] * 2
    found = compare(heats, scores=[samples.score(), doubted, None, None], labels=labels, out=tmp_path / "c.html")
    drawn = found.figure(tmp_path / "c.pdf")
    said = [item.get_text() for item in drawn.texts]
    assert said.count("one mask") == said.count("two masks") == 2  # each answer has its own row of titles
    assert said.count("not checked") == 2
    assert sum(one.endswith("holds up") for one in said) == sum(one.endswith("do not trust") for one in said) == 1
    assert {"What colour is the carousel?", "What is bright?"} <= set(said)
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")


def test_the_page_names_the_image_of_several_and_what_numbers_outside_0_to_1_say(tmp_path: Path) -> None:
    several = samples.trace(question=None, images=[samples.picture((90, 60), seed) for seed in range(10)])
    page = Page(
        compare(
            [samples.heat(several, image_index=7)],
            scores=[samples.score(deletion=-3.5, insertion=28.3)],
            out=tmp_path / "c.html",
        ).path
    )
    (row,) = page.rows
    assert "Image 8 of 10" in row[0] and "Prompt USER:" in row[0]
    alts = [str(attrs.get("alt")) for tag, attrs in page.tags if tag == "img"]
    assert sum(alt.endswith("not explained") for alt in alts) == 9 and "Image 8, the explained one" in alts
    assert "deletion -3.5 is below 0" in row[1].lower() and "insertion 28.3 is above 1" in row[1].lower()
