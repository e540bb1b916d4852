"""The report as a file: what it holds, what it hides, when it refuses. `test_report_browser.py` opens it."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import report_samples as samples
from PIL import Image
from trace_samples import sample_capture

from lvlm_probe.errors import ReportError, TraceError
from lvlm_probe.metrics import Similarity
from lvlm_probe.pages import report
from lvlm_probe.pages.data_uris import data_uri, encode_seen, encode_values, shrink
from lvlm_probe.pages.plain import plain, without_folders
from lvlm_probe.sanity import SanityCheck, SanityStep
from lvlm_probe.selection import select_tokens
from lvlm_probe.trace import open_trace
from lvlm_probe.trace.writer import write

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> {{script}} <!-- \u2028 &amp;"


def data_of(path: Path) -> dict:
    """The JSON that the page draws."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert match
    return json.loads(match[1])


class Tags(html.parser.HTMLParser):
    """Collects the tags of a page, as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


# ---------------------------------------------------------------- the file


def test_writes_one_file_and_nothing_else(tmp_path: Path) -> None:
    heats, scores = samples.page()
    out = report(heats, scores=scores, out=tmp_path / "new" / "report.html", title="A title")
    assert out == tmp_path / "new" / "report.html"
    assert [entry.name for entry in out.parent.iterdir()] == ["report.html"]
    assert "<title>A title</title>" in out.read_text("utf-8")


def test_loads_nothing_and_allows_nothing(tmp_path: Path) -> None:
    heats, scores = samples.page()
    text = report(heats, scores=scores, out=tmp_path / "report.html").read_text("utf-8")
    page = Tags()
    page.feed(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"src", "href"} & set(attributes), (tag, attributes)
    assert not re.search(r"@import|url\(", text)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a namespace's name, never fetched
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy


def test_a_sample_with_three_maps_is_small(tmp_path: Path) -> None:
    heats, scores = samples.page(images=[samples.picture((3000, 2000))])
    size = report(heats, scores=scores, out=tmp_path / "report.html").stat().st_size
    assert 50_000 < size < 1_500_000
    source = data_of(tmp_path / "report.html")["samples"][0]["images"]["0"]["src"]
    shown = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert max(shown.size) == 1024
    assert abs(shown.width / shown.height - 1.5) < 0.01


def test_noise_baseline_stays_small(tmp_path: Path) -> None:
    heats, _ = samples.page(words=False)
    heats[0] = dataclasses.replace(heats[0], provenance={"trace_id": "a", "baseline": {"kind": "noise", "seed": 3}})
    assert report(heats, out=tmp_path / "report.html").stat().st_size < 1_500_000
    assert data_of(tmp_path / "report.html")["samples"][0]["baselines"]["0: noise, seed 3"].startswith(
        "data:image/jpeg"
    )


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    recording = samples.trace(
        question=HOSTILE, tokens=[HOSTILE, *samples.PIECES[1:]], meta={HOSTILE: HOSTILE}, notes=[HOSTILE]
    )
    chosen = samples.selection(tokens=(HOSTILE, *samples.PIECES[1:]))
    out = report(
        [samples.heat(recording, chosen, method=HOSTILE)],
        scores=[samples.score(reasons=(HOSTILE,))],
        out=tmp_path / "r.html",
        title=HOSTILE,
    )
    page = Tags()
    page.feed(out.read_text("utf-8"))
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert not any(tag == "img" for tag, _ in page.tags)
    sample = data_of(out)["samples"][0]
    assert sample["question"] == HOSTILE
    assert sample["tokens"][0]["text"] == HOSTILE
    assert "{{script}}" in out.read_text("utf-8")  # the title's braces are not filled in


def test_folders_of_the_disk_do_not_travel(tmp_path: Path) -> None:
    heats, scores = samples.page()
    out = report(heats, scores=scores, out=tmp_path / "report.html")
    text = out.read_text("utf-8")
    assert not any(part in text for part in ("/home", "ada/", "secret", "settings/"))
    facts = data_of(out)["samples"][0]["provenance"]
    assert facts["file"] == "20261123T051141.b1.h5"
    assert facts["model_id"] == "llava-7b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ada/models/llava", "llava"),
        ("C:\\Users\\ada\\x.h5 is gone", "x.h5 is gone"),
        ("~/models/llava/ and /a/b", "llava and b"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("and/or, 1/2/3, /tmp", "and/or, 1/2/3, /tmp"),
        ("cannot open '/srv/runs/t.h5': no", "cannot open 't.h5': no"),
    ],
)
def test_without_folders(text: str, expected: str) -> None:
    assert without_folders(text) == expected


# ---------------------------------------------------------------- what it says


def test_words_carry_their_probabilities(tmp_path: Path) -> None:
    heats, scores = samples.page()
    sample = data_of(report(heats, scores=scores, out=tmp_path / "report.html"))["samples"][0]
    assert "".join(w["before"] + w["text"] for w in sample["words"]) + sample["tail"] == sample["answer"]
    assert sample["answer"] == "The carousel in the park is bright red."
    word = sample["words"][1]
    assert word["text"] == "carousel"
    assert word["tokens"] == [1, 2]
    assert word["llr"] == pytest.approx(0.9 + 0.4, abs=1e-5)  # a word's ratio is the sum over its tokens
    assert word["p"] == pytest.approx(np.exp(-0.1 - 0.05), rel=1e-5)
    assert word["p0"] == pytest.approx(np.exp(-0.15 - 1.3), rel=1e-5)
    assert sample["whole"] == [8]
    assert sample["alpha"] == 1.0
    assert sample["tokens"][10]["special"]


def test_ratios_of_the_selection_go_before_the_recorded_ones(tmp_path: Path) -> None:
    stronger = tuple(2 * value for value in samples.LLR)
    sample = data_of(report(samples.heat(None, samples.selection(llr=stronger)), out=tmp_path / "r.html"))["samples"][0]
    assert sample["tokens"][8]["llr"] == pytest.approx(6.8)
    assert sample["tokens"][8]["p0"] == pytest.approx(np.exp(-0.03 - 6.8), rel=1e-5)


def test_labels_and_grouping(tmp_path: Path) -> None:
    first, scores = samples.page()
    second = samples.trace("another")
    heats = [*first, samples.heat(second), samples.heat(second, method="rise")]
    found = data_of(report(heats, scores=[*scores, None, None], out=tmp_path / "r.html"))["samples"]
    assert [[m["label"] for m in s["maps"]] for s in found] == [
        ["Whole answer", "“carousel”", "“park”"],
        ["Selected words · igos++", "Selected words · rise"],
    ]
    assert [m["whole"] for m in found[0]["maps"]] == [True, False, False]


def test_a_word_that_is_the_whole_selection_keeps_its_own_map(tmp_path: Path) -> None:
    recording = samples.trace()
    heats = [samples.heat(recording), samples.heat(recording, samples.selection((8,), rule="words"))]
    maps = data_of(report(heats, out=tmp_path / "r.html"))["samples"][0]["maps"]
    assert [m["label"] for m in maps] == ["Whole answer", "“red”"]
    assert [m["whole"] for m in maps] == [True, False]


def test_a_part_of_the_selection_is_named_by_its_words(tmp_path: Path) -> None:
    """Whatever rule chose it: the command line narrows the selection itself to one word."""
    recording = samples.trace()
    heats = [samples.heat(recording, samples.selection((1, 2, 8))), samples.heat(recording, samples.selection((8,)))]
    maps = data_of(report(heats, out=tmp_path / "r.html"))["samples"][0]["maps"]
    assert [m["label"] for m in maps] == ["Whole answer", "“red”"]
    assert [m["whole"] for m in maps] == [True, False]


@pytest.mark.quick
def test_a_real_trace_file(tmp_path: Path) -> None:
    path = write(sample_capture(), tmp_path)
    with open_trace(path) as recording:
        chosen = select_tokens(recording)
        heat = samples.heat(recording, chosen, image_size=recording.images[0].size)
        sample = data_of(report([heat], scores=[samples.score()], out=tmp_path / "r.html"))["samples"][0]
        assert sample["question"] == recording.question
        assert sample["answer"] == recording.answer.strip()
        assert [w["text"] for w in sample["words"]] == [w.text for w in recording.words]
        assert [t["llr"] for t in sample["tokens"]] == pytest.approx(recording.llr.tolist(), abs=1e-5)
    assert sample["whole"] == list(chosen)
    assert sample["provenance"]["file"] == path.name
    assert sample["images"]["0"]["src"].startswith("data:image/")
    # Once the file has gone, the page says so and shows what the heatmap itself holds.
    path.unlink()
    sample = data_of(report([heat], out=tmp_path / "again.html"))["samples"][0]
    assert any("could not be read" in note for note in sample["notes"])
    assert str(tmp_path) not in (tmp_path / "again.html").read_text("utf-8")
    assert sample["words"]


def test_log_scores_and_random_maps(tmp_path: Path) -> None:
    scored = samples.score(params={"score": "log"}, random_gains=(0.1, -0.2))
    entry = data_of(report(samples.heat(), scores=scored, out=tmp_path / "r.html"))["samples"][0]["maps"][0]
    assert entry["score"]["unit"] == "nats"
    assert (entry["score"]["best_random"], entry["score"]["randoms"]) == (0.1, 2)
    assert entry["scoring"]["params"] == {"score": "log"}
    assert "deletion_curve" not in entry["scoring"]


def test_verdicts(tmp_path: Path) -> None:
    bad = samples.score(deletion=0.7, insertion=0.3, reasons=("insertion is below 0.5", "the baseline still says red."))
    heats = [samples.heat(samples.trace(name)) for name in "abc"] + [
        samples.heat(samples.trace("d"), samples.selection(()))
    ]
    maps = [
        s["maps"][0]
        for s in data_of(report(heats, scores=[samples.score(), bad, None, None], out=tmp_path / "r.html"))["samples"]
    ]
    assert [m["verdict"]["state"] for m in maps] == ["trusted", "doubted", "unchecked", "empty"]
    assert maps[1]["verdict"]["title"] == "Do not trust this map:"
    assert maps[1]["verdict"]["reasons"] == ["Insertion is below 0.5.", "The baseline still says red."]
    assert maps[3]["values"] is None
    assert maps[3]["score"] is None
    assert maps[3]["verdict"]["reasons"] == ["Nothing to explain: no token gains more than 1 nats from the image."]


@pytest.mark.parametrize("gives", ["samples", "bounds", "passes"])
def test_an_estimate_by_a_server_says_its_error_and_why_it_has_no_score(gives: str, tmp_path: Path) -> None:
    made = samples.heat()
    diagnostics = {"standard_error_mean": 0.07, "standard_error_max": 0.12}
    provenance = {**made.provenance, "server": {"gives": gives}, "diagnostics": diagnostics}
    page = report(dataclasses.replace(made, provenance=provenance), out=tmp_path / "r.html")
    first, second = data_of(page)["samples"][0]["maps"][0]["verdict"]["reasons"]
    assert ("evaluate()" in first) == (gives == "passes") and (f"gave {gives} alone" in first) == (gives != "passes")
    assert second.startswith("The standard error of the map is 7 % of its peak")


def test_sanity_checks_stand_beside_the_verdict(tmp_path: Path) -> None:
    step = SanityStep("lm_head", similarity=Similarity(0.97, 0.97, None, 0.1, 0.9))
    heat = samples.heat(samples.trace("a"))
    for check, verdict in (("seeds", "cannot say"), ("weights", "fails"), ("answers", "passes")):
        made = SanityCheck(check, verdict, f"what {HOSTILE} said", 0.5, (step,), {}, heat)
        heat = made.attached(heat)
    out = report([heat, samples.heat(samples.trace("b"))], scores=[samples.score(), None], out=tmp_path / "r.html")
    first, second = (sample["maps"][0] for sample in data_of(out)["samples"])
    assert [(line["title"], line["state"]) for line in first["sanity"]] == [
        ("Random weights: fails", "doubted"),
        ("Other words: passes", "trusted"),
        ("Other random numbers: cannot say", "unchecked"),
    ]
    assert first["sanity"][0]["reason"].startswith("What </script>") and second["sanity"] == []
    assert "sanity" not in first["provenance"]
    text = out.read_text("utf-8")
    assert "<script>document.title" not in text and "Random weights: fails. What &lt;/script&gt;" in text


@pytest.mark.parametrize("checks", [None, 3, ["weights"], {"weights": "passes"}, {"weights": {"verdict": "perfect"}}])
def test_what_a_file_claims_of_checks_is_shown_only_if_it_is_a_verdict(tmp_path: Path, checks: object) -> None:
    heat = samples.heat(samples.trace("a"))
    heat = dataclasses.replace(heat, provenance={**heat.provenance, "sanity": checks})
    (sample,) = data_of(report([heat], out=tmp_path / "r.html"))["samples"]
    assert sample["maps"][0]["sanity"] == []


def test_curves_and_baseline_check(tmp_path: Path) -> None:
    heats, scores = samples.page(words=False)
    sample = data_of(report(heats, scores=scores, out=tmp_path / "r.html"))["samples"][0]
    entry = sample["maps"][0]
    np.testing.assert_allclose(entry["score"]["deletion_curve"], scores[0].deletion_curve)
    np.testing.assert_allclose(entry["score"]["insertion_raw"], scores[0].insertion_raw)
    assert entry["baseline"]["probability"] == pytest.approx(0.033)
    assert entry["baseline"]["threshold"] == 0.05
    assert entry["baseline"]["name"] == "blur, strength 0.1"
    assert sample["baselines"][entry["baseline"]["image"]].startswith("data:image/")


def test_blur_at_its_limit_is_drawn_as_the_mean_colour(tmp_path: Path) -> None:
    heats, _ = samples.page(words=False)
    heats[0] = dataclasses.replace(
        heats[0],
        provenance={
            "trace_id": "a",
            "baseline": {"kind": "blur", "strength": None, "sigma": None, "limit": "mean colour"},
        },
    )
    sample = data_of(report(heats, out=tmp_path / "r.html"))["samples"][0]
    entry = sample["maps"][0]["baseline"]
    assert entry["name"] == "blur, down to the mean colour"
    shown = Image.open(io.BytesIO(base64.b64decode(sample["baselines"][entry["image"]].split(",")[1])))
    assert np.ptp(np.asarray(shown).reshape(-1, 3).astype(int), axis=0).max() == 0


def test_numbers_that_are_not_finite_are_holes(tmp_path: Path) -> None:
    heats, _ = samples.page(words=False)
    broken = samples.score(tie_share=float("nan"), baseline_check={"original_probability": np.float32("inf")})
    entry = data_of(report(heats, scores=[broken], out=tmp_path / "r.html"))["samples"][0]["maps"][0]
    assert entry["score"]["tie_share"] is None
    assert entry["baseline"]["original"] is None


# ---------------------------------------------------------------- degrading


def test_without_a_trace(tmp_path: Path) -> None:
    heat = dataclasses.replace(samples.heat(), trace=None)
    sample = data_of(report(heat, scores=samples.score(), out=tmp_path / "r.html"))["samples"][0]
    assert sample["images"]["0"]["src"] is None
    assert sample["question"] == ""
    assert sample["answer"] == "The carousel in the park is bright red."  # the selection remembers the tokens
    assert sample["words"][-2]["llr"] == pytest.approx(3.4)
    assert sample["words"][-2]["p"] is None
    assert "without the trace" in sample["notes"][0]


def test_a_trace_that_has_gone(tmp_path: Path) -> None:
    class Gone:
        trace_id = "gone"

        def __getattr__(self, name: str) -> object:
            raise TraceError(f"/home/ada/runs/x.h5: {name}: no such file")

    heat = dataclasses.replace(samples.heat(), trace=Gone())
    sample = data_of(report([heat], out=tmp_path / "r.html"))["samples"][0]
    assert sample["maps"][0]["values"] is not None
    assert any(note.startswith("The trace could not be read: x.h5") for note in sample["notes"])


def test_deferred_ratios(tmp_path: Path) -> None:
    recording = samples.trace(baseline_log_probs=None)
    heat = samples.heat(recording, samples.selection((5,), rule="span", llr=()))
    sample = data_of(report([heat], out=tmp_path / "r.html"))["samples"][0]
    assert not sample["llrKnown"]
    assert sample["words"][1]["llr"] is None
    assert sample["words"][1]["p"] == pytest.approx(np.exp(-0.15), rel=1e-5)


def test_pixel_space_traces_have_no_picture(tmp_path: Path) -> None:
    recording = samples.trace()
    heat = samples.heat(recording)
    recording.images = []
    sample = data_of(report([heat], out=tmp_path / "r.html"))["samples"][0]
    assert sample["images"]["0"]["src"] is None
    assert any("not in the trace" in note for note in sample["notes"])


# ---------------------------------------------------------------- encodings


def test_values_round_trip() -> None:
    values = np.random.default_rng(0).random((7, 11)).astype(np.float32)
    values[0, 0], values[0, 1], values[0, 2] = -1, 2, np.nan
    found = encode_values(values)
    numbers = struct.unpack("<77H", base64.b64decode(str(found["data"])))
    expected = np.clip(np.nan_to_num(values), 0, 1)
    np.testing.assert_allclose(np.reshape(numbers, (7, 11)) / 65535, expected, atol=1 / 65535)
    assert (found["w"], found["h"]) == (11, 7)


def test_fine_values_are_averaged() -> None:
    found = encode_values(np.tile([[0.0, 1.0], [1.0, 0.0]], (160, 160)).astype(np.float32))
    assert (found["w"], found["h"]) == (160, 160)
    assert set(struct.unpack("<25600H", base64.b64decode(str(found["data"])))) <= {32767, 32768}


def test_seen_bits() -> None:
    assert encode_seen(np.ones((5, 5), bool)) is None
    seen = np.zeros((3, 5), bool)
    seen[1, 2] = True
    found = encode_seen(seen)
    assert found is not None
    bits = np.unpackbits(np.frombuffer(base64.b64decode(str(found["data"])), np.uint8))[:15]
    np.testing.assert_array_equal(bits.reshape(3, 5), seen)


def test_pictures_are_rgb_on_white() -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    assert shrink(clear).getpixel((0, 0)) == (255, 255, 255)
    assert shrink(Image.new("L", (4000, 1000))).size == (1024, 256)
    assert data_uri(Image.new("RGB", (300, 300), "navy")).startswith("data:image/png")
    assert data_uri(samples.picture()).startswith("data:image/jpeg")


def test_plain() -> None:
    value = {"a": np.float32(0.5), 1: np.arange(2), "p": Path("/x/y/z.png"), "n": float("nan"), "t": (True, None)}
    assert plain(value) == {"a": 0.5, "1": [0, 1], "p": "z.png", "n": None, "t": [True, None]}


# ---------------------------------------------------------------- refusing


def test_refusals(tmp_path: Path) -> None:
    heats, scores = samples.page()
    with pytest.raises(ReportError, match="no heatmaps"):
        report([], out=tmp_path / "r.html")
    with pytest.raises(ReportError, match="3 heatmaps but 1 scores"):
        report(heats, scores=scores[:1], out=tmp_path / "r.html")
    with pytest.raises(ReportError, match="got a str"):
        report("heat.h5", out=tmp_path / "r.html")  # type: ignore[arg-type]
    with pytest.raises(ReportError, match=r"scores are what evaluate\(\) returns"):
        report(heats[0], scores={"deletion": 0.1}, out=tmp_path / "r.html")  # type: ignore[arg-type]
    with pytest.raises(ReportError, match="is a folder"):
        report(heats, out=tmp_path)
    with pytest.raises(ReportError, match=r"a page is HTML, and r\.pdf names another kind of file: call it r\.html"):
        report(heats, out=tmp_path / "r.pdf", overwrite=True)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ReportError, match="cannot write"):
        report(heats, out=tmp_path / "file" / "r.html")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_a_generator_of_heatmaps_is_fine(tmp_path: Path) -> None:
    heats, scores = samples.page()
    sample = data_of(report((heat for heat in heats), scores=iter(scores), out=tmp_path / "r.html"))["samples"][0]
    assert len(sample["maps"]) == 3


def test_existing_reports_are_kept_unless_told(tmp_path: Path) -> None:
    heats, _ = samples.page(words=False)
    out = tmp_path / "report.html"
    out.write_text("mine")
    for text in ("mine", "<!doctype html>\n<p>A page about lvlm_probe"):
        out.write_text(text)
        with pytest.raises(ReportError, match="not written by lvlm_probe; name another file, or pass overwrite=True"):
            report(heats, out=out)
        assert out.read_text() == text
    report(heats, out=out, overwrite=True)
    assert out.read_text("utf-8").startswith("<!doctype html>")


def test_a_page_whose_name_is_no_text_is_shown(tmp_path: Path) -> None:
    """The names of a disk are bytes; Python has halves of surrogate pairs for those that are no UTF-8."""
    page = report(samples.page(words=False)[0], out=tmp_path / "caf\udce9.html")
    shown = page._repr_html_()
    assert shown is not None and "caf%E9.html" in shown
    shown.encode()


def test_a_page_of_ours_is_replaced_so_that_a_cell_runs_again(tmp_path: Path) -> None:
    heats, _ = samples.page(words=False)
    out = report(heats, out=tmp_path / "report.html", title="first")
    assert report(heats, out=out, title="second") == out
    assert "<title>second" in out.read_text("utf-8")
    with pytest.raises(ReportError, match="exists; name another file"):
        report(heats, out=out, overwrite=False)
