"""Where on the page does this value stand? Fields of an answer, their places, and files that other tools read.

An answer that is JSON (or holds some) has fields: each value under its path, ``items[0].price``. Any other answer has
its words. What a trace knows of a field takes no pass: log P of its tokens and their ratio. Its place takes a map of
its tokens, whose smallest region that keeps most of the score is the value's region on the page (``regions``); of
several pages it is on the one without which it loses most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.errors import ExplainError
from lvlm_probe.escaping import drawable
from lvlm_probe.evidence.grounding import known_of
from lvlm_probe.evidence.regions import Region, region, twice_the_area
from lvlm_probe.explainers import explain
from lvlm_probe.explainers.scores import even_masks
from lvlm_probe.files import in_the_way, json_ready, path_of, write_whole
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.metrics import Score, evaluate
from lvlm_probe.metrics.localization import whole_pixels
from lvlm_probe.selection import select_tokens
from lvlm_probe.words import tokens_at

if TYPE_CHECKING:
    import os

    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.replaying import ReplayLike
    from lvlm_probe.trace import Trace

Format = Literal["json", "hocr", "w3c", "coco", "docling"]
FORMATS: tuple[Format, ...] = ("json", "hocr", "w3c", "coco", "docling")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null")
_DEEPEST = 64


@dataclass(frozen=True, repr=False)
class Field:
    """A value in an answer.

    Attributes:
        name: its path in the JSON, ``"items[0].price"``; of an answer that is none, empty.
        value: its text: of a string what is between the quotes.
        tokens: the answer's tokens that hold it.
        log_p: their log P given the answer before them, sum, nats; ``None`` where not recorded.
        llr: their log-likelihood ratio against the baseline image, nats; ``None`` where not recorded.
    """

    __repr__, __eq__ = in_one_line, equal

    name: str
    value: str
    tokens: tuple[int, ...]
    log_p: float | None = None
    llr: float | None = None

    @property
    def p(self) -> float | None:
        """Probability of the value's tokens, given the answer before them."""
        return None if self.log_p is None else float(np.exp(self.log_p))

    def __str__(self) -> str:
        return f"{self.name}: {self.value}" if self.name else self.value


@dataclass(frozen=True, repr=False)
class Place:
    """A value and where it stands.

    Attributes:
        field: the value.
        page: number of the image, counted from 0.
        heat: the map of its tokens.
        score: what ``evaluate`` says of the map.
        region: the smallest area that keeps most of the score; ``None`` where ``reason`` says why.
        reason: why there is no region.
        without: of several pages, what the value's log P loses without each, ``(page,)`` nats.
    """

    __repr__, __eq__ = in_one_line, equal

    field: Field
    page: int
    heat: Heatmap
    score: Score | None
    region: Region | None
    reason: str | None = None
    without: tuple[float, ...] = ()

    @property
    def trusted(self) -> bool:
        """Whether nothing speaks against the map."""
        return self.score is not None and self.region is not None and self.score.verdict.trusted

    def __str__(self) -> str:
        if self.region is None:
            return f"{self.field}: no place, {self.reason}"
        doubt = "" if self.trusted or self.score is None else f"; {self.score.verdict}"
        return f"{self.field}: page {self.page + 1}, {self.region}{doubt}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the field, its place, and the verdict."""
        score = self.score
        record = {
            **dataclasses.asdict(self.field),
            "p": self.field.p,
            "page": self.page,
            "region": None if self.region is None else self.region.to_dict(),
            "reason": self.reason,
            "without_page": list(self.without),
            "method": self.heat.method,
            "trusted": self.trusted,
            "verdict": [] if score is None else list(score.verdict.reasons),
            "deletion": None if score is None else score.deletion,
            "insertion": None if score is None else score.insertion,
        }
        ready: dict[str, Any] = json_ready(record)
        return ready

    def attached(self) -> Heatmap:
        """The map with the region's box in its provenance, ``["box"]``, which ``report`` draws."""
        if self.region is None:
            return self.heat
        record = {
            "kind": "box",
            "label": str(self.field)[:100],
            "pixels": list(self.region.box),
            "p": self.field.p,
            "verdict": "agrees" if self.trusted else "partly",
            "sentence": str(self.region),
        }
        return dataclasses.replace(self.heat, provenance={**self.heat.provenance, "box": record})


# -------------------------------------------------------------------------------------------------------------- fields


@naming_arguments
def fields(trace: Trace) -> list[Field]:
    """The values of a recorded answer: of JSON in it every leaf by its path, else its words. No model is needed."""
    pieces = [str(piece) for piece in trace.tokens]
    text = "".join(pieces)
    found = []
    for name, start, stop in _leaves_in(text):
        found.append((name, text[start:stop], tuple(tokens_at(pieces, [(start, stop)]))))
    if not found:
        found = [("", word.text, tuple(range(word.start, word.stop))) for word in trace.words]

    return [Field(name, value, tokens, *known_of(trace, tokens)) for name, value, tokens in found if tokens and value]


def _leaves_in(text: str) -> list[tuple[str, int, int]]:
    """(path, start, stop) of every value of the first JSON in a text; of one that breaks off, of what there is."""
    for start in re.finditer(r"[\[{]", text):
        found: list[tuple[str, int, int]] = []
        with contextlib.suppress(ValueError, IndexError):  # no JSON, or one that breaks off
            _read(text, start.start(), "", found, 0)
        if found and any(name.strip("[]0123456789") for name, _, _ in found):
            return found
    return []


def _read(text: str, at: int, path: str, found: list[tuple[str, int, int]], depth: int) -> int:
    """Read one JSON value; returns where it ends. Raises ``ValueError`` or ``IndexError`` where it is none."""
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    opens = text[at]
    if opens in "{[":
        at, number = _skip(text, at + 1), 0
        while text[at] not in "}]":
            inner = f"{path}[{number}]"
            if opens == "{":
                quoted = _STRING.match(text, at)
                if quoted is None:
                    raise ValueError("a key is a string")
                key, at = json.loads(quoted[0]), _skip(text, quoted.end())
                if text[at] != ":":
                    raise ValueError("no colon")
                at, inner = _skip(text, at + 1), f"{path}.{key}" if path else key
            at = _skip(text, _read(text, at, inner, found, depth + 1))
            if text[at] == ",":
                at = _skip(text, at + 1)
            elif text[at] not in "}]":
                raise ValueError("no comma")
            number += 1
        return at + 1
    if opens == '"':
        quoted = _STRING.match(text, at)
        if quoted is None:
            raise ValueError("a string that breaks off")
        if quoted.end() - at > 2:
            found.append((path, at + 1, quoted.end() - 1))
        return quoted.end()
    plain = _PLAIN.match(text, at)
    if plain is None:
        raise ValueError("no value")
    found.append((path, *plain.span()))
    return plain.end()


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()


# -------------------------------------------------------------------------------------------------------------- places


@naming_arguments
def locate(
    replay: ReplayLike,
    found: Sequence[Field] | None = None,
    *,
    names: Sequence[str] | None = None,
    method: str = "igos++",
    keep: float = 0.9,
    judge: dict[str, Any] | None = None,
    **options: Any,
) -> list[Place]:
    """Find where values of an answer stand: page, box, polygon and verdict of each.

    A value takes one map of its tokens and its score, whose insertion curve gives the region at no further pass. Of k
    pages, k passes more say on which page each value stands, however many values there are.

    Args:
        replay: the recorded answer on its model.
        found: of ``fields``; by default all of them.
        names: only the fields of these names.
        method: how they are mapped.
        keep: share of the score that the region keeps.
        judge: further arguments of ``evaluate``.
        **options: further arguments of ``explain``: seed, progress, search_dtype, parameters of the method.

    Raises:
        ExplainError: there is no field of a name, or as ``explain``.
    """
    chosen = list(fields(replay.trace) if found is None else found)
    if names is not None:
        there = [one.name for one in chosen]
        if missing := [name for name in names if name not in there]:
            raise ExplainError(f"the answer has no field {missing[0]!r}; it has {', '.join(there) or 'none'}")
        chosen = [one for one in chosen if one.name in names]
    progress = options.get("progress")
    places = []
    for one, lost in zip(chosen, _by_page(replay, chosen), strict=True):
        page = int(np.argmax(lost)) if lost else 0
        selection = select_tokens(replay, indices=one.tokens)
        heat = explain(replay, method=method, tokens=selection, image=page, **options)
        score = None if heat.values is None else evaluate(heat, replay, progress=progress, **(judge or {}))
        here, reason = None, heat.reason
        if score is not None:
            try:
                here = region(score, heat, keep=keep)
            except ExplainError as error:
                reason = str(error)
        places.append(Place(one, page, heat, score, here, reason, lost))
    return places


def _by_page(replay: ReplayLike, found: Sequence[Field]) -> list[tuple[float, ...]]:
    """What the log P of each value loses without each page, nats; nothing where there is one page."""
    if replay.n_images == 1 or not found:
        return [()] * len(found)
    steps = sorted({token for one in found for token in one.tokens})
    nothing = even_masks([0.0], (1, 1)).to(replay.device)
    whole = replay.original_log_probs
    with torch.no_grad():
        without = [replay.log_probs(nothing, image=page, steps=steps)[0] for page in range(replay.n_images)]
    return [
        tuple(float(whole[list(one.tokens)].sum()) - float(page[list(one.tokens)].sum()) for page in without)
        for one in found
    ]


# -------------------------------------------------------------------------------------------------------------- export


@naming_arguments
def export(
    places: Sequence[Place],
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    files: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write places as a file that other tools read.

    Args:
        places: of ``locate``. Those without a region are in ``"json"`` alone.
        path: the file.
        format: ``"json"``, everything; ``"hocr"``; ``"w3c"``, a page of Web Annotations (box and SVG outline of each);
            ``"coco"``, boxes and outer outlines, without holes; or ``"docling"``, a ``DoclingDocument``: a text item
            with its provenance (page, box, origin at the top left) for each value, and a pair of name and value for
            each field. By default hOCR for ``.hocr`` and ``.html``, else JSON.
        files: names of the pages' image files, for the files that name them; by default ``page-1.png``, ….
        overwrite: replace the file if it exists.

    Returns:
        the path written.

    Raises:
        ExplainError: there is no such format, too few files, or the file exists.
    """
    target = path_of(path, "the file", ExplainError)
    kind = format or ("hocr" if target.suffix.lower() in (".hocr", ".html") else "json")
    if kind not in FORMATS:
        raise ExplainError(f"format is one of {', '.join(FORMATS)}; got {kind!r}")
    if (there := in_the_way(target, overwrite=overwrite)) is not None:
        raise ExplainError(there)
    pages = 1 + max((place.page for place in places), default=0)
    names = [f"page-{number + 1}.png" for number in range(pages)] if files is None else list(files)
    if len(names) < pages:
        raise ExplainError(f"the places are on {pages} page(s), and {len(names)} file name(s) are given: one for each")
    placed = [(place, place.region) for place in places if place.region is not None]
    if kind == "hocr":
        text = _hocr(placed, names)
    else:
        made = {
            "json": lambda: [place.to_dict() for place in places],
            "w3c": lambda: _w3c(placed, names),
            "coco": lambda: _coco(placed, names),
            "docling": lambda: _docling(placed, target.stem),
        }[kind]()
        text = json.dumps(json_ready(made), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_whole(target, text)
    return target


_Placed = Sequence[tuple[Place, Region]]


def _xml(text: str) -> str:
    """A text as XML may hold it."""
    return html.escape(drawable(text))


def _hocr(placed: _Placed, files: Sequence[str]) -> str:
    """hOCR 1.2: a page for each image, a word for each value, its confidence P(value) in per cent."""
    pages = []
    for number in sorted({place.page for place, _ in placed}):
        mine = [(place, here) for place, here in placed if place.page == number]
        width, height = mine[0][1].image_size
        words = []
        for k, (place, here) in enumerate(mine):
            sure = "" if place.field.p is None else f"; x_wconf {round(100 * place.field.p)}"
            box = " ".join(map(str, whole_pixels(here.box)))
            name = f' data-name="{_xml(place.field.name)}"' if place.field.name else ""
            words.append(
                f'   <span class="ocrx_word" id="word_{number + 1}_{k + 1}" title="bbox {box}{sure}"{name}>'
                f"{_xml(place.field.value)}</span>"
            )
        image = _xml(files[number])
        pages.append(
            f'  <div class="ocr_page" id="page_{number + 1}" title="image &quot;{image}&quot;; '
            f'bbox 0 0 {width} {height}; ppageno {number}">\n' + "\n".join(words) + "\n  </div>"
        )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml">\n'
        " <head>\n"
        '  <title>Values and their places</title>\n  <meta name="ocr-system" content="lvlm_probe" />\n'
        '  <meta name="ocr-capabilities" content="ocr_page ocrx_word" />\n </head>\n <body>\n'
        + "\n".join(pages)
        + "\n </body>\n</html>\n"
    )


def _path(here: Region) -> str:
    """The outlines as an SVG path, even-odd."""
    return " ".join("M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in ring) + " Z" for ring in here.polygons)


def _w3c(placed: _Placed, files: Sequence[str]) -> dict[str, Any]:
    """A W3C annotation page (2017): of each value a body, and a target with its box and its outline."""
    items = []
    for number, (place, here) in enumerate(placed):
        left, top, right, bottom = whole_pixels(here.box)
        width, height = here.image_size
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        body = [{"type": "TextualBody", "purpose": "transcribing", "value": place.field.value}]
        if place.field.name:
            body.append({"type": "TextualBody", "purpose": "tagging", "value": place.field.name})
        items.append(
            {
                "id": f"#value-{number + 1}",
                "type": "Annotation",
                "motivation": "transcribing",
                "body": body,
                "target": {
                    "source": files[place.page],
                    "selector": [
                        {
                            "type": "FragmentSelector",
                            "conformsTo": "http://www.w3.org/TR/media-frags/",
                            "value": f"xywh=pixel:{left},{top},{right - left},{bottom - top}",
                        },
                        {
                            "type": "SvgSelector",
                            "value": f'{svg}<path fill-rule="evenodd" d="{_path(here)}"/></svg>',
                        },
                    ],
                },
            }
        )
    return {"@context": "http://www.w3.org/ns/anno.jsonld", "type": "AnnotationPage", "items": items}


def _coco(placed: _Placed, files: Sequence[str]) -> dict[str, Any]:
    """COCO: an image for each page, a category for each name, an annotation for each value."""
    categories = {name: k + 1 for k, name in enumerate(dict.fromkeys(place.field.name for place, _ in placed))}
    sizes = {place.page: here.image_size for place, here in placed}
    annotations = []
    for number, (place, here) in enumerate(placed):
        left, top, right, bottom = here.box
        outer = [ring for ring in here.polygons if twice_the_area(ring) > 0]
        annotations.append(
            {
                "id": number + 1,
                "image_id": place.page + 1,
                "category_id": categories[place.field.name],
                "bbox": [left, top, right - left, bottom - top],
                "area": here.area * here.image_size[0] * here.image_size[1],
                "segmentation": [[edge for point in ring for edge in point] for ring in outer],
                "iscrowd": 0,
                "score": place.field.p,
                "attributes": {"value": place.field.value, "trusted": place.trusted},
            }
        )
    return {
        "images": [
            {"id": page + 1, "file_name": files[page], "width": size[0], "height": size[1]}
            for page, size in sorted(sizes.items())
        ],
        "categories": [{"id": k, "name": name or "value"} for name, k in categories.items()],
        "annotations": annotations,
    }


def _docling(placed: _Placed, name: str) -> dict[str, Any]:
    """A DoclingDocument (schema 1.3.0): of each value a text item with its place, of each name a pair with it."""
    sizes = {place.page: here.image_size for place, here in placed}
    texts: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    links: list[dict[str, Any]] = []
    for number, (place, here) in enumerate(placed):
        value, own = place.field.value, {"$ref": f"#/texts/{number}"}
        box = dict(zip("ltrb", here.box, strict=True)) | {"coord_origin": "TOPLEFT"}
        stands = {"page_no": place.page + 1, "bbox": box, "charspan": [0, len(value)]}
        said = {"text": value, "orig": value}
        texts.append(_node(f"#/texts/{number}", parent="#/body", label="text", prov=[stands], **said))
        if place.field.name:
            key = {"text": place.field.name, "orig": place.field.name}
            cells.append({"label": "key", "cell_id": len(cells), **key})
            cells.append({"label": "value", "cell_id": len(cells), **said, "prov": stands, "item_ref": own})
            links.append({"label": "to_value", "source_cell_id": len(cells) - 2, "target_cell_id": len(cells) - 1})
    graph = {"cells": cells, "links": links}
    pairs = [_node("#/key_value_items/0", parent="#/body", label="key_value_region", prov=[], graph=graph)]
    items = [*texts, *(pairs if cells else ())]
    return {
        "schema_name": "DoclingDocument",
        "version": "1.3.0",
        "name": name,
        "body": _node("#/body", [item["self_ref"] for item in items], name="_root_", label="unspecified"),
        "texts": texts,
        "key_value_items": pairs if cells else [],
        "pages": {
            str(page + 1): {"page_no": page + 1, "size": {"width": width, "height": height}}
            for page, (width, height) in sorted(sizes.items())
        },
    }


def _node(ref: str, children: Sequence[str] = (), *, parent: str | None = None, **content: Any) -> dict[str, Any]:
    """A node of a DoclingDocument, which refers to others by JSON pointers."""
    above = {} if parent is None else {"parent": {"$ref": parent}}
    return {"self_ref": ref, **above, "children": [{"$ref": child} for child in children], **content}
