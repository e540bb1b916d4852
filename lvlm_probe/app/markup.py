"""What the app shows of a map or of the layers: HTML whose texts are escaped, and drawings."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lvlm_probe.cards import text_html
from lvlm_probe.pages.plain import plain
from lvlm_probe.pages.samples import verdict_of

SIDE = 900
"""Longest side of an image on the page, pixels."""

MASK_CELLS = 64
"""Cells of the painted mask along a side."""


def facts_of(heat: Any, score: Any) -> str:
    """Method, settings and verdict of a map, as HTML; of one that was not checked, how to."""
    verdict = verdict_of(heat, score)
    settings = ", ".join(f"{key} {plain(value)}" for key, value in heat.params.items())
    passes = heat.provenance.get("passes") or {}
    rows = [
        ("Words", heat.selection.label or "none"),
        ("Method", heat.method),
        ("Took", ", ".join(f"{count} {name}" for name, count in passes.items() if count) or "no pass of the model"),
        ("Baseline image", str((heat.provenance.get("baseline") or {}).get("kind") or "none")),
    ]
    if score is not None and score.reason is None:
        rows.append(
            ("Scores", f"deletion {score.deletion:.3f} (low is good), insertion {score.insertion:.3f} (high is good)")
        )
    listed = "".join(f"<dt>{name}</dt><dd>{text_html(value)}</dd>" for name, value in rows)
    reasons = " ".join(verdict["reasons"]) if score is not None or heat.values is None else "Press “Check this map”."
    return (
        f'<p class="lp-verdict lp-{verdict["state"]}"><b>{text_html(verdict["title"])}</b> {text_html(reasons)}</p>'
        f"<dl>{listed}</dl><details><summary>Settings</summary>{text_html(settings)}</details>"
    )


def lens_view(image: Image.Image, lens: Any, layer: int) -> Image.Image:
    """The image, its longest side ``SIDE``, with the likeliest word on each image token."""
    scale = SIDE / max(image.size)
    drawn = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
    drawn = Image.blend(drawn, Image.new("RGB", drawn.size, "white"), 0.45)
    pen = ImageDraw.Draw(drawn)
    for box, words, shares in zip(lens.boxes * scale, lens.words[layer], lens.probabilities[layer], strict=True):
        x0, y0, x1, y1 = (float(edge) for edge in box)
        pen.rectangle((x0, y0, x1, y1), outline=(120, 130, 145))
        word = words[0].strip()
        size = min(30.0, (y1 - y0) / 2.2, 1.7 * (x1 - x0) / max(1, len(word)))
        if size >= 6:
            fill = (20, 25, 35) if shares[0] >= 0.2 else (110, 115, 125)
            pen.text(((x0 + x1) / 2, (y0 + y1) / 2), word, fill=fill, anchor="mm", font=ImageFont.load_default(size))
    return drawn


def lens_table(lens: Any, token: int) -> str:
    """The likeliest words of one image token in every layer, as HTML."""
    rows = ""
    for layer, (words, shares) in enumerate(zip(lens.words[:, token], lens.probabilities[:, token], strict=True)):
        cells = zip(words, shares, strict=True)
        told = "".join(f"<td>{text_html(word.strip() or '␣')} <small>{share:.2f}</small></td>" for word, share in cells)
        rows += f"<tr><th>{layer}</th>{told}</tr>"
    title = f"likeliest words at image token {token + 1}, and their probability"
    return f"<table><tr><th>layer</th><th colspan=9>{title}</th></tr>{rows}</table>"
