"""Explains an answer of a model of your own:  python examples/own_model.py MODEL_DIR IMAGE "QUESTION" [OUT_DIR]"""

import sys

from PIL import Image

import lvlm_probe as probe

name, image, question = sys.argv[1], Image.open(sys.argv[2]).convert("RGB"), sys.argv[3]
out = sys.argv[4] if len(sys.argv) > 4 else "runs/own"

model, processor = probe.load(name)  # or your own AutoModelForImageTextToText and AutoProcessor, loaded as you like
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
as_tensors = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}

with probe.attach(model, processor) as p, p.record(out, question=question) as recording:
    inputs = processor.apply_chat_template(messages, **as_tensors).to(model.device, model.dtype)
    model.generate(**inputs, max_new_tokens=64, do_sample=False)

trace = recording.traces[-1]
replay = probe.replay(trace, model, processor)
heat = probe.explain(replay)
score = probe.evaluate(heat, replay)
page = probe.report([heat], scores=[score], out=f"{out}/report.html")
print(f"{trace.answer.strip()!r}: the picture decides {heat.selection.text!r}. {score.verdict}. See {page}")
