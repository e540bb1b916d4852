"""Why this word and not that? Both sides of a contrast and their difference:  python examples/why_not_blue.py [OUT]

It draws the picture of docs/evidence.md:  python examples/why_not_blue.py docs/contrast.jpg
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

import lvlm_probe as probe

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/why_not_blue.jpg")
model, processor = probe.demo.load()
scene = probe.demo.scenes(1, kinds=["colour"])[0]
other = next(item.colour for item in scene.layout.items if item.colour not in scene.answer)
form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
with (
    tempfile.TemporaryDirectory() as runs,
    probe.attach(model, processor) as p,
    p.record(runs, images=[scene.image], question=scene.question) as recording,
):
    model.generate(**processor.apply_chat_template(scene.messages, **form), max_new_tokens=32, do_sample=False)
    replay = probe.replay(recording.traces[-1], model, processor)
    said = scene.visual_words[0]
    print(f"{scene.question} {recording.traces[-1].answer.strip()}  Why {said}, and not {other}?")
    heats = [probe.explain(replay, tokens=one, against=two) for one, two in ((said, other), (other, said))]
    scores = [probe.evaluate(heat, replay) for heat in heats]
    for heat, score in zip(heats, scores, strict=True):
        print(f"{heat.selection.label}: {heat.provenance['passes']}, gain {score.gain:.2f}; {score.verdict}")
    panels = [heat.overlay(score=score) for heat, score in zip(heats, scores, strict=True)]
    panels.append(heats[0].difference(heats[1]))
width, height = scene.image.size
sheet = Image.new("RGB", (3 * width + 2 * 12, height), "white")
for place, panel in enumerate(panels):
    sheet.paste(panel, (place * (width + 12), 0))
out.parent.mkdir(parents=True, exist_ok=True)
sheet.save(out, quality=88)
print(out)
