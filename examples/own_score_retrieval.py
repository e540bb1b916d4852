"""A retriever's score: which part of a page matched the query?  python examples/own_score_retrieval.py [OUT]

Retrievers of the ColPali kind embed a page as the final hidden states of its image tokens, projected by one linear
layer, and score a query by late interaction: for each word of the query the best match among the image tokens, added
up (MaxSim)::

    s(query, page) = Σ_w max_i ⟨e_w, P h_i⟩

Nothing is generated, so a page is recorded with one new token, and the score reads hidden states instead of logits.
Here the model is the demo model, "pages" are its scenes, and P is fitted in closed form on some of them, to tell the
colours at a token.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lvlm_probe as probe

COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_score_retrieval")
model, processor = probe.demo.load()
form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def inputs_of(image: Image.Image) -> Any:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the image."}]
    return processor.apply_chat_template([{"role": "user", "content": content}], **form)


@torch.no_grad()
def fitted(pages: Sequence[Any]) -> torch.Tensor:
    """P by ridge regression: from the states of image tokens to the colour that the scene has there."""
    states, targets = [], []
    for page in pages:
        inputs = inputs_of(page.image)
        found = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        tokens = found[inputs["input_ids"][0] == model.config.image_token_id]
        side = round(len(tokens) ** 0.5)
        middles = (torch.arange(side) + 0.5) / side
        target = torch.zeros(side, side, len(COLOURS))
        for item in page.layout.items:
            near = (middles[:, None] - item.y) ** 2 + (middles[None, :] - item.x) ** 2 < item.radius**2
            target[near] = torch.eye(len(COLOURS))[COLOURS.index(item.colour)]
        states.append(tokens)
        targets.append(target.flatten(0, 1))
    h, t = torch.cat(states), torch.cat(targets)
    return torch.linalg.solve(h.T @ h + 10.0 * torch.eye(h.shape[1]), h.T @ t)


projection = fitted(probe.demo.scenes(60, split="train", seed=1))
page = next(
    one for one in probe.demo.scenes(60) if len({i.colour for i in one.layout.items}) == len(one.layout.items) > 2
)
with probe.attach(model, processor) as p, p.record(out, images=[page.image]) as recording:
    model.generate(**inputs_of(page.image), max_new_tokens=1, do_sample=False)
replay = probe.replay(recording.traces[-1], model, processor)

for query in (item.colour for item in page.layout.items[:2]):

    @probe.score(name=f"match of {query!r}", states=True)
    def match(given: probe.Given, query: str = query) -> torch.Tensor:
        """Late interaction of the query's words with the page under each mask, (batch,)."""
        embedded = given.states[:, given.image_positions] @ projection  # (batch, image_token, dimension)
        words = torch.eye(len(COLOURS))[[COLOURS.index(word) for word in query.split()]]  # (word, dimension)
        return (embedded @ words.T).amax(dim=1).sum(dim=1)

    heat = probe.explain(replay, tokens=match)
    score = probe.evaluate(heat, replay, steps=20)
    rows, cols = torch.meshgrid(*[(torch.arange(side) + 0.5) / side for side in page.image.size[::-1]], indexing="ij")
    item = next(item for item in page.layout.items if item.colour == query)
    there = (rows - item.y) ** 2 + (cols - item.x) ** 2 < item.radius**2
    share, area = float(heat.upsampled()[there.numpy()].sum() / heat.upsampled().sum()), float(there.float().mean())
    print(f"{query}: scores {score.original:.2f}, without the page {score.baseline:.2f}; {score.verdict}")
    print(f"  {share:.0%} of the heat on it, {area:.0%} of the page:  {heat.save(out / f'{query}.png')}")
    if share < 3 * area:
        sys.exit(f"the map of {query} misses what matched")
