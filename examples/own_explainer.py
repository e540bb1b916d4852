"""An explainer of your own beside iGOS++, on the demo model:  python examples/own_explainer.py [OUT_DIR]"""

import sys
from pathlib import Path

import torch

import lvlm_probe as probe
from lvlm_probe.explainers import Outcome, Problem


@probe.register_explainer("mine")
def mine(problem: Problem, *, size: int = 8, around: float = 0.1) -> Outcome:
    """Shows one place of the picture at a time, through a Gaussian window: how likely do the words get?"""
    rows, cols = problem.grid(size)
    row, col = (torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols
    far = (row[:, None] - row)[:, None, :, None] ** 2 + (col[:, None] - col)[None, :, None, :] ** 2
    windows = torch.exp(-far / (2 * around**2)).reshape(-1, rows, cols)  # one mask per cell, 1 = keep
    with torch.no_grad():
        log_probs = problem.replay.log_probs(windows.to(problem.replay.device), image=problem.image)
    gain = problem.score(log_probs).cpu()  # (cell,)
    values = (gain - gain.min()) / (gain.max() - gain.min()).clamp(min=1e-9)
    return Outcome(values.reshape(rows, cols), {"size": [rows, cols], "around": around})


out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_explainer")
model, processor = probe.demo.load()
scene = probe.demo.scenes(1)[0]
as_tensors = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
with probe.attach(model, processor) as p, p.record(out, images=[scene.image]) as recording:
    model.generate(**processor.apply_chat_template(scene.messages, **as_tensors), max_new_tokens=32, do_sample=False)
replay = probe.replay(recording.traces[-1], model, processor)
print(f"{scene.question} {recording.traces[-1].answer.strip()}")
for method in ("mine", "igos++"):
    heat = probe.explain(replay, method=method)
    score = probe.evaluate(heat, replay)
    picture = heat.save(out / f"{method}.png")
    print(f"{method:7} deletion {score.deletion:.3f}  insertion {score.insertion:.3f}  {score.verdict}  {picture}")
