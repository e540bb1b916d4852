"""A robot's action as a score: which part of the image moves the arm?  python examples/own_score_robot.py [OUT]

Policies of the OpenVLA kind say their actions as tokens: one token per joint, each standing for a bin of its range.
What the arm does hangs on all bins together, so the score is the action that is expected of them, Σ P(bin) · centre,
and not log P of the one bin that won. OpenVLA's 256 bins are the last ids of its vocabulary, ``vocabulary - 1 -
torch.arange(256)``.

The policy here is the demo model, which says where a thing is: "left" and "right" are the two bins of a move to the
side.
"""

import sys
from pathlib import Path

import torch

import lvlm_probe as probe

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_score_robot")
model, processor = probe.demo.load()
scene = next(scene for scene in probe.demo.scenes(20, kinds=["where"]) if "right" in scene.answer)
form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
with probe.attach(model, processor) as p, p.record(out, images=[scene.image], question=scene.question) as recording:
    model.generate(**processor.apply_chat_template(scene.messages, **form), max_new_tokens=32, do_sample=False)
trace = recording.traces[-1]
replay = probe.replay(trace, model, processor)

moves = {" left": -1.0, " right": 1.0}  # a bin's token, and the middle of its range
bins = torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in moves])
centres = torch.tensor(list(moves.values()))
step = next(number for number, token in enumerate(trace.token_ids) if token in bins)  # the token that is the action


@probe.score(name="move to the side", steps=[step])
def move(given: probe.Given) -> torch.Tensor:
    """The expected action of each masked image, (batch,)."""
    return given.logits(step)[:, bins].softmax(dim=-1) @ centres


print(f"{scene.question} {trace.answer.strip()}")
heat = probe.explain(replay, tokens=move)
score = probe.evaluate(heat, replay)
print(f"moves by {score.original:+.2f}, without the image by {score.baseline:+.2f}: {score.verdict}")
on_target = float(heat.upsampled()[scene.mask].sum() / heat.upsampled().sum())
print(
    f"{on_target:.0%} of the heat on the object, {scene.mask.mean():.0%} of the image:  {heat.save(out / 'move.png')}"
)
if not score.verdict.trusted or on_target < 3 * scene.mask.mean():
    sys.exit("the map of the action misses the object that decides it")
