"""lvlm_probe: which image regions made a vision-language model say these words.

    import lvlm_probe as probe

    p = probe.attach(model, processor)
    with p.record("runs/demo"):
        out = model.generate(**inputs, max_new_tokens=64)
    p.detach()

    trace = probe.open_store("runs/demo")[-1]
    replay = probe.replay(trace, model, processor)
    heat = probe.explain(replay)
    score = probe.evaluate(heat, replay)
    probe.report([heat], scores=[score], out="report.html")

Everything heavy is imported on first use, so that ``import lvlm_probe`` costs next to nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from lvlm_probe import _moved
from lvlm_probe._version import __version__ as __version__

if TYPE_CHECKING:
    from lvlm_probe import causal, demo, errors, evidence, metrics, sanity, study, video
    from lvlm_probe.asking import Answer, ask
    from lvlm_probe.errors import ProbeError, ProbeWarning
    from lvlm_probe.evidence import Edit, edit
    from lvlm_probe.explainers import Outcome, Problem, explain, methods, register_explainer
    from lvlm_probe.heatmap import Heatmap, figure
    from lvlm_probe.importing import import_answers
    from lvlm_probe.importing.captured_attention import import_attention
    from lvlm_probe.metrics import Score, evaluate
    from lvlm_probe.models.families import register_family
    from lvlm_probe.models.loading import load
    from lvlm_probe.pages import report
    from lvlm_probe.pages.comparison import compare
    from lvlm_probe.pages.loggers import log
    from lvlm_probe.pages.widget import widget
    from lvlm_probe.planning import plan
    from lvlm_probe.recording.probe import Probe, Recording, attach
    from lvlm_probe.recording.stream import Stream
    from lvlm_probe.replaying import Replay, replay
    from lvlm_probe.replaying.own_scores import Given, score
    from lvlm_probe.replaying.verification import verify
    from lvlm_probe.selection import TokenSelection, select_tokens
    from lvlm_probe.serving import Server, connect
    from lvlm_probe.trace import Trace, TraceStore, open_store, open_trace
    from lvlm_probe.trace.image_files import open_image

__all__ = [
    "Answer",
    "Edit",
    "Given",
    "Heatmap",
    "Outcome",
    "Probe",
    "ProbeError",
    "ProbeWarning",
    "Problem",
    "Recording",
    "Replay",
    "Score",
    "Server",
    "Stream",
    "TokenSelection",
    "Trace",
    "TraceStore",
    "ask",
    "attach",
    "causal",
    "compare",
    "connect",
    "demo",
    "edit",
    "errors",
    "evaluate",
    "evidence",
    "explain",
    "figure",
    "import_answers",
    "import_attention",
    "load",
    "log",
    "methods",
    "metrics",
    "open_image",
    "open_store",
    "open_trace",
    "plan",
    "register_explainer",
    "register_family",
    "replay",
    "report",
    "sanity",
    "score",
    "select_tokens",
    "study",
    "verify",
    "video",
    "widget",
]

_ROOMS = ("causal", "demo", "errors", "evidence", "metrics", "sanity", "study", "video")
"""Submodules that come with the first look at them."""

_HOMES = {
    "Answer": "asking",
    "ask": "asking",
    "figure": "heatmap",
    "open_image": "trace.image_files",
    "ProbeError": "errors",
    "ProbeWarning": "errors",
    "Edit": "evidence",
    "edit": "evidence",
    "Outcome": "explainers",
    "Problem": "explainers",
    "explain": "explainers",
    "methods": "explainers",
    "register_explainer": "explainers",
    "compare": "pages.comparison",
    "Heatmap": "heatmap",
    "import_answers": "importing",
    "import_attention": "importing.captured_attention",
    "register_family": "models.families",
    "load": "models.loading",
    "Score": "metrics",
    "evaluate": "metrics",
    "plan": "planning",
    "report": "pages",
    "log": "pages.loggers",
    "widget": "pages.widget",
    "Given": "replaying.own_scores",
    "score": "replaying.own_scores",
    "Replay": "replaying",
    "replay": "replaying",
    "verify": "replaying.verification",
    "Server": "serving",
    "connect": "serving",
    "TokenSelection": "selection",
    "select_tokens": "selection",
    "Probe": "recording",
    "Recording": "recording",
    "Stream": "recording",
    "attach": "recording",
    "Trace": "trace",
    "TraceStore": "trace",
    "open_store": "trace",
    "open_trace": "trace",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())
_moved.install()
_former = _moved.names_of(__name__)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"lvlm_probe.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"lvlm_probe.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    return _former(name, 3)


def __dir__() -> list[str]:
    return sorted(__all__)
