"""What would it say without this? The smallest region that flips an answer:  python examples/without_this.py [OUT]

It draws the picture of docs/evidence.md:  python examples/without_this.py docs/without.jpg
"""

import sys
import tempfile
from pathlib import Path

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

import lvlm_probe as probe

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/without_this.jpg")
model, processor = probe.demo.load()
scene = probe.demo.scenes(1, kinds=["pair"])[0]
with tempfile.TemporaryDirectory() as runs:
    answer = probe.ask(model, processor, scene.image, scene.question, out=runs)
    heat = probe.explain(answer.replay, tokens=scene.visual_words[0], method="occlusion")
    edits = [probe.edit(answer.replay, heat), probe.edit(answer.replay, heat, keep=0.08)]
    baseline = answer.replay.over(heat.provenance["baseline"]).baseline_image()
    panels = [(heat.overlay(mark=False), f"{scene.question}\n{answer.text}")]
for edit in edits:
    assert edit.mask is not None and baseline is not None  # of a region by a map, over an image that is known
    print(f"{edit}  ({edit.answers} answers, {edit.steps} tokens)")
    shown = Image.fromarray((255 * edit.mask).astype("uint8")).resize(scene.image.size, Image.Resampling.BILINEAR)
    where = edit.sentence.partition(" it says ")[0]
    panels.append((Image.composite(scene.image, baseline, shown), f"{where}:\n{edit.answer}"))
width, height = scene.image.size
font = ImageFont.truetype(findfont("DejaVu Sans"), 13)
sheet = Image.new("RGB", (3 * width + 2 * 12, height + 48), "white")
for place, (panel, text) in enumerate(panels):
    sheet.paste(panel, (place * (width + 12), 0))
    ImageDraw.Draw(sheet).text((place * (width + 12), height + 8), text, fill="black", font=font)
out.parent.mkdir(parents=True, exist_ok=True)
sheet.save(out, quality=88)
print(out)
