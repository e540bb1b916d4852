"""Evaluates the demo model on held-out scenes: what it knows, and how its words depend on the picture.

    python examples/evaluate_demo_model.py [--json]
    python examples/evaluate_demo_model.py --model examples/hard_model --hard
    python examples/evaluate_demo_model.py --model examples/video_model --clips     # needs torchvision
    python examples/evaluate_demo_model.py --model examples/document_model --documents

Every answer is generated greedily through the real processor and ``generate()``. Printed are, per kind of question, the
share of answers that equal the true sentence, with a 95 % Wilson interval; and on other scenes, with every generated
answer kept, how well LLR = log P(word | picture) - log P(word | blurred picture), summed over a word's pieces, parts
the words in visual slots from all others (AUROC, 95 % bootstrap interval over scenes; not of clips and documents).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

import lvlm_probe as probe
from lvlm_probe import demo

Asked = demo.Scene | demo.ClipScene | demo.DocumentScene
DRAWN = {
    "scenes": (demo.scenes, demo.KINDS),
    "hard": (lambda n, **drawn: demo.scenes(n, **drawn, hard=True), demo.HARD_KINDS),
    "clips": (demo.clips, demo.CLIP_KINDS),
    "documents": (demo.documents, demo.DOCUMENT_KINDS),
}
"""What can be asked about: how it is drawn, and the kinds of questions."""


@dataclass
class Word:
    """One word of an answer: log-probabilities are natural logs, summed over its pieces."""

    text: str
    visual: bool
    log_prob: float
    baseline_log_prob: float

    @property
    def llr(self) -> float:
        return self.log_prob - self.baseline_log_prob


def generate(model: Any, processor: Any, scenes: Sequence[Asked], *, batch: int = 50) -> list[list[int]]:
    """Greedy answers as token ids, without padding, the end token included."""
    answers: list[list[int]] = []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        inputs = encode(processor, part)
        with torch.inference_mode():
            rows = model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :]
        answers += [[t for t in row if t != processor.tokenizer.pad_token_id] for row in rows.tolist()]
    return answers


def encode(processor: Any, scenes: Sequence[Asked], images: Sequence[Image.Image] | None = None) -> Any:
    """The processor's inputs for the questions of scenes, clips or documents, about their own or the given pictures."""
    prompts = [processor.apply_chat_template(scene.messages, add_generation_prompt=True) for scene in scenes]
    shown = {
        "images": images or [scene.image for scene in scenes if not isinstance(scene, demo.ClipScene)],
        "videos": [scene.pixels for scene in scenes if isinstance(scene, demo.ClipScene)],
    }
    given = {name: list(values) for name, values in shown.items() if values}
    return processor(**given, text=prompts, return_tensors="pt", padding=True)


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    """The picture under a Gaussian blur whose `sigma` is a fraction of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(sigma * min(image.size)))


def answer_log_probs(
    model: Any, processor: Any, scene: demo.Scene, image: Image.Image, answer: Sequence[int]
) -> list[float]:
    """Teacher-forced log P of each token of `answer`, natural log."""
    inputs = encode(processor, [scene], [image])
    ids = torch.cat([inputs["input_ids"], torch.tensor([list(answer)])], dim=1)
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(list(answer))].tolist()


def words_of(model: Any, processor: Any, scene: demo.Scene, answer: Sequence[int], *, sigma: float) -> list[Word]:
    """The answer's words with their log-probabilities; a word is visual if it stands in a visual slot."""
    pieces = [t for t in answer if t != processor.tokenizer.eos_token_id]
    if not pieces:
        return []
    clear = answer_log_probs(model, processor, scene, scene.image, pieces)
    base = answer_log_probs(model, processor, scene, blurred(scene.image, sigma), pieces)
    slots = {scene.answer[:start].count(" ") for start, _ in scene.visual_spans}
    words: list[Word] = []
    position = -1
    for piece, here, there in zip(processor.tokenizer.convert_ids_to_tokens(pieces), clear, base, strict=True):
        punctuation = not any(c.isalnum() for c in piece)
        if piece.startswith("▁") or punctuation or not words:
            position += piece.startswith("▁")
            words.append(Word(piece.removeprefix("▁"), position in slots and not punctuation, here, there))
        else:
            words[-1].text += piece
            words[-1].log_prob += here
            words[-1].baseline_log_prob += there
    return words


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive outranks a negative, ties counting half (Mann-Whitney)."""
    values = np.concatenate([np.asarray(positive), np.asarray(negative)])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    z, p = 1.959964, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def exact_match(model: Any, processor: Any, *, n: int, seed: int, of: str = "scenes") -> dict[str, dict[str, Any]]:
    """Per kind: exact matches among `n` held-out scenes, clips or documents, the interval, and some wrong answers."""
    table: dict[str, dict[str, Any]] = {}
    draw: Any
    draw, known = DRAWN[of]
    for kind in known:
        scenes: Sequence[Any] = draw(n, seed=seed, split="eval", kinds=[kind])
        said = processor.batch_decode(generate(model, processor, scenes), skip_special_tokens=True)
        wrong = [(s.question, s.answer, a.strip()) for s, a in zip(scenes, said, strict=True) if s.answer != a.strip()]
        right = n - len(wrong)
        table[kind] = {"n": n, "exact": right / n, "interval": wilson(right, n), "wrong": wrong[:5]}
    return table


def llr_figures(model: Any, processor: Any, *, n: int, seed: int, sigma: float, hard: bool) -> dict[str, Any]:
    """LLR of visual and other words over `n` held-out scenes of all kinds, every generated answer kept."""
    scenes = demo.scenes(n, seed=seed, split="eval", hard=hard)
    answers = generate(model, processor, scenes)
    by_scene = [words_of(model, processor, s, a, sigma=sigma) for s, a in zip(scenes, answers, strict=True)]

    def separation(chosen: Sequence[list[Word]]) -> float:
        words = [word for part in chosen for word in part]
        return auroc([w.llr for w in words if w.visual], [w.llr for w in words if not w.visual])

    rng = np.random.default_rng(0)
    draws = [separation([by_scene[i] for i in rng.integers(0, n, n)]) for _ in range(1000)]
    said = processor.batch_decode(answers, skip_special_tokens=True)
    right = [words for words, s, a in zip(by_scene, scenes, said, strict=True) if s.answer == a.strip()]
    true = [w for part in right for w in part if w.visual]
    visual = [w for part in by_scene for w in part if w.visual]
    other = [w for part in by_scene for w in part if not w.visual]
    return {
        "scenes": n,
        "sigma": sigma,
        "auroc": separation(by_scene),
        "auroc_interval": tuple(float(v) for v in np.percentile(draws, [2.5, 97.5])),
        "visual_words": len(visual),
        "other_words": len(other),
        "visual_probability": float(np.mean([math.exp(w.log_prob) for w in visual])),
        "visual_probability_blurred": float(np.mean([math.exp(w.baseline_log_prob) for w in visual])),
        "other_probability": float(np.mean([math.exp(w.log_prob) for w in other])),
        "other_probability_blurred": float(np.mean([math.exp(w.baseline_log_prob) for w in other])),
        "visual_llr_above_1": float(np.mean([w.llr > 1 for w in visual])),
        "other_llr_above_1": float(np.mean([w.llr > 1 for w in other])),
        "right_answers": len(right),
        "true_probability_blurred": float(np.mean([math.exp(w.baseline_log_prob) for w in true])) if true else math.nan,
        "true_llr_above_1": float(np.mean([w.llr > 1 for w in true])) if true else math.nan,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo.path(), help="checkpoint folder")
    parser.add_argument("--hard", action="store_true", help="ask about hard scenes")
    parser.add_argument("--n", type=int, default=1000, help="scenes per kind of question")
    parser.add_argument("--llr-scenes", type=int, default=200)
    parser.add_argument("--sigma", type=float, default=0.4, help="width of the blur, as a fraction of the shorter side")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--clips", action="store_true", help="ask about clips; the LLR is left out")
    parser.add_argument("--documents", action="store_true", help="ask about documents; the LLR is left out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.time()
    model, processor = probe.load(options.model)
    of = next((name for name in ("hard", "clips", "documents") if getattr(options, name)), "scenes")
    kinds = exact_match(model, processor, n=options.n, seed=options.seed, of=of)
    llr = {} if of in ("clips", "documents") else llr_figures(
        model, processor, n=options.llr_scenes, seed=options.seed + 1, sigma=options.sigma, hard=options.hard
    )  # fmt: skip
    figures = {"exact_match": kinds, "llr": llr, "seconds": time.time() - started}
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    print(f"{'kind':10} {'n':>5}  exact   95 % interval")
    for kind, row in kinds.items():
        print(f"{kind:10} {row['n']:5}  {row['exact']:.4f}  {row['interval'][0]:.3f} - {row['interval'][1]:.3f}")
    if not llr:
        return 0
    low, high = llr["auroc_interval"]
    print(
        f"\nLLR on {llr['scenes']} scenes, all generated answers kept, blur sigma {llr['sigma']:g} of the side:\n"
        f"AUROC visual ({llr['visual_words']}) against other words ({llr['other_words']}): "
        f"{llr['auroc']:.4f}  [{low:.4f}, {high:.4f}]\n"
        "mean probability      picture  blurred\n"
        f"  visual words         {llr['visual_probability']:.4f}   {llr['visual_probability_blurred']:.4f}\n"
        f"  other words          {llr['other_probability']:.4f}   {llr['other_probability_blurred']:.4f}\n"
        f"LLR > 1: {llr['visual_llr_above_1']:.1%} of visual words, {llr['other_llr_above_1']:.1%} of the others\n"
        f"In the {llr['right_answers']} right answers, visual words: probability blurred "
        f"{llr['true_probability_blurred']:.4f}, LLR > 1 in {llr['true_llr_above_1']:.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
