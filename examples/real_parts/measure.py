"""Measures a model of ``build.py``: names, places, and whether it looks; writes ``figures.json`` and prints a table.

    python examples/real_parts/build.py --pictures
    python examples/real_parts/measure.py --out runs/real

With ``--tower dinov2`` in both it is the other model, and ``figures-dinov2.json``.

Composites come in three kinds: of cut-outs that were trained on (in scenes that were not), of cut-outs held out of a
word that has others, and of words whose cut-outs were never trained on. A name is exactly right when the answer has
the word, and coarsely right when it has a word of the same group of ``names.txt``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import build
import scenes
import torch
import train
from PIL import Image

import lvlm_probe as probe

PHOTOGRAPHS = {
    "opencv-doc": {
        "apple.jpg": "apple",
        "orange.jpg": "orange",
        "butterfly.jpg": "butterfly",
        "squirrel_cls.jpg": "squirrel",
        "fruits.jpg": "fruit",
        "baboon.jpg": "monkey",
    },
    "mate-backgrounds": {"LadyBird.jpg": "ladybug", "FreshFlower.jpg": "flower", "YellowFlower.jpg": "flower"},
    "scikit-image": {
        "chelsea.png": "cat",
        "coffee.png": "cup",
        "rocket.jpg": "rocket",
        "motorcycle_left.png": "motorcycle",
    },
}
"""Photographs that no training scene shows any part of, and what is on them."""


def photographs(laid_out: Path) -> dict[str, tuple[Image.Image, str]]:
    """The photographs that can be had: scikit-image's when it is installed with them."""
    folders = {package: laid_out / package for package in PHOTOGRAPHS}
    try:
        import skimage

        folders["scikit-image"] = Path(skimage.__file__).parent / "data"
    except ImportError:
        pass
    found = {}
    for package, named in PHOTOGRAPHS.items():
        for name, word in named.items():
            for path in folders[package].rglob(name):
                found[name] = (Image.open(path).convert("RGB"), word)
    return found


class Asked:
    """A model that is asked about images, and the words its answers can have."""

    def __init__(self, folder: Path) -> None:
        self.model, self.processor = probe.load(folder)
        self.groups = {name.word: name.group for name in scenes.names()}

    def prompt(self, image: Image.Image, question: str) -> Any:
        """The model's inputs for a question."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def answer(self, image: Image.Image, question: str) -> str:
        """What the model says, greedily."""
        inputs = self.prompt(image, question)
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=20, do_sample=False)
        return str(self.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    def loss(self, image: Image.Image, question: str, answer: str) -> float:
        """Mean negative log-likelihood of an answer, in nats per token."""
        inputs = self.prompt(image, question)
        reply = self.processor.tokenizer(f"{answer}<|im_end|>", add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        ids = torch.cat([inputs["input_ids"], reply], 1)
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
            ).logits
        return float(torch.nn.functional.cross_entropy(logits[0, -reply.shape[1] - 1 : -1].float(), reply[0]))

    def right(self, answer: str, words: set[str]) -> tuple[bool, bool]:
        """Whether an answer names exactly these words, and whether coarsely: in a set, order does not count."""
        said = set()
        for word in sorted(self.groups, key=len, reverse=True):  # "fire truck" is no truck
            answer, n = re.subn(rf"\b{word}\b", "", answer, flags=re.IGNORECASE)
            said |= {word} if n else set()
        return said == words, {self.groups[word] for word in said} == {self.groups[word] for word in words}


def composites(
    asked: Asked, cuts: list[scenes.CutOut], grounds: list[Image.Image], n: int, seed: int
) -> dict[str, Any]:
    """Shares of right answers on `n` scenes, by question, and the loss with the own image and with another."""
    made = [train.scene(seed + i, cuts, grounds) for i in range(n)]
    right, losses = defaultdict(list), defaultdict(list)
    for i, scene in enumerate(made):
        objects = [(placed.word, placed.place) for placed in scene.objects]
        for k, (question, answer) in enumerate(scenes.questions(objects)):
            here = k < len(objects)
            words = {objects[k][0]} if here else {word for word, _ in objects}
            kind = (objects[k][1] or "one object") if here else "both objects"
            right[kind].append(asked.right(asked.answer(scene.image, question), words))
            other = next(s for s in made[i + 1 :] + made[:i] if len(s.objects) == len(objects))
            losses["own"].append(asked.loss(scene.image, question, answer))
            losses["other"].append(asked.loss(other.image, question, answer))
    shares = {
        kind: {
            "questions": len(pairs),
            "exact": round(sum(exact for exact, _ in pairs) / len(pairs), 2),
            "coarse": round(sum(coarse for _, coarse in pairs) / len(pairs), 2),
        }
        for kind, pairs in sorted(right.items())
    }
    return {"right": shares, "loss": {kind: round(sum(found) / len(found), 2) for kind, found in losses.items()}}


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--out", type=Path, default=Path("runs/real"), help="folder of build.py")
    command.add_argument("--scenes", type=int, default=100, help="scenes of each kind")
    command.add_argument("--tower", choices=build.TOWERS, default="efficientnet", help="which of its models")
    command.add_argument("--model", type=Path, help="the checkpoint, when it is not where build.py puts it")
    arguments = command.parse_args()
    tower = build.TOWERS[arguments.tower]
    asked = Asked(arguments.model or arguments.out / tower.model)
    laid_out = arguments.out / "parts"
    grounds = train.backgrounds(laid_out)
    figures: dict[str, Any] = {"photographs": {}}
    hits = []
    for name, (image, word) in photographs(laid_out).items():
        answer = asked.answer(image, "What is in the picture?")
        hits.append(asked.right(answer, {word}))
        figures["photographs"][name] = {"word": word, "answer": answer, "exact": hits[-1][0], "coarse": hits[-1][1]}
        print(f"{name:22} {word:12} {answer}", flush=True)
    print(f"photographs: exact {sum(e for e, _ in hits)}, coarse {sum(c for _, c in hits)} of {len(hits)}")
    cuts = train.split(scenes.cut_outs(laid_out / "tuxpaint-stamps-default", scenes.names()))
    for kind, seed in (("train", 500_000), ("held", 600_000), ("never", 700_000)):
        figures[kind] = composites(asked, cuts[kind], grounds, arguments.scenes, seed)
        print(f"{kind}: loss {figures[kind]['loss']}", flush=True)
        for question, share in figures[kind]["right"].items():
            print(f"  {question:14} exact {share['exact']:.2f}  coarse {share['coarse']:.2f}  of {share['questions']}")
    (arguments.out / f"{tower.model.replace('model', 'figures')}.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
