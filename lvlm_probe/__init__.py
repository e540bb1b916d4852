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
    from lvlm_probe import causal, demo
    from lvlm_probe.errors import (
        AttachError,
        ExplainError,
        ImageError,
        MaskError,
        ModelMismatch,
        OutOfMemory,
        PluginError,
        PointNotFound,
        ProbeError,
        ProbeWarning,
        ProcessorRefused,
        ReplayError,
        ReportError,
        SelectionError,
        StudyError,
        TraceError,
    )
    from lvlm_probe.explainers import explain, register_explainer
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.images import ImagePath
    from lvlm_probe.importing import import_answers
    from lvlm_probe.metrics import Score, evaluate
    from lvlm_probe.models.loading import load
    from lvlm_probe.pages import report
    from lvlm_probe.pages.comparison import compare
    from lvlm_probe.planning import Plan, plan
    from lvlm_probe.recording.probe import Probe, Recording, attach
    from lvlm_probe.replaying import Replay, replay
    from lvlm_probe.replaying.verification import Verification, verify
    from lvlm_probe.selection import TokenSelection, select_tokens
    from lvlm_probe.trace import Trace, TraceStore, open_store, open_trace

__all__ = [
    "AttachError",
    "ExplainError",
    "Heatmap",
    "ImageError",
    "ImagePath",
    "MaskError",
    "ModelMismatch",
    "OutOfMemory",
    "Plan",
    "PluginError",
    "PointNotFound",
    "Probe",
    "ProbeError",
    "ProbeWarning",
    "ProcessorRefused",
    "Recording",
    "Replay",
    "ReplayError",
    "ReportError",
    "Score",
    "SelectionError",
    "StudyError",
    "TokenSelection",
    "Trace",
    "TraceError",
    "TraceStore",
    "Verification",
    "attach",
    "causal",
    "compare",
    "demo",
    "evaluate",
    "explain",
    "import_answers",
    "load",
    "open_store",
    "open_trace",
    "plan",
    "register_explainer",
    "replay",
    "report",
    "select_tokens",
    "verify",
]

_HOMES = {
    "explain": "explainers",
    "register_explainer": "explainers",
    "compare": "pages.comparison",
    "Heatmap": "heatmap",
    "ImagePath": "images",
    "import_answers": "importing",
    "load": "models.loading",
    "Score": "metrics",
    "evaluate": "metrics",
    "Plan": "planning",
    "plan": "planning",
    "report": "pages",
    "Replay": "replaying",
    "replay": "replaying",
    "Verification": "replaying.verification",
    "verify": "replaying.verification",
    "TokenSelection": "selection",
    "select_tokens": "selection",
    "Probe": "recording",
    "Recording": "recording",
    "attach": "recording",
    "Trace": "trace",
    "TraceStore": "trace",
    "open_store": "trace",
    "open_trace": "trace",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())
_moved.install()


def __getattr__(name: str) -> Any:
    if name in ("causal", "demo"):
        return importlib.import_module(f"lvlm_probe.{name}")
    if name in __all__:
        value = getattr(importlib.import_module(f"lvlm_probe.{_HOMES.get(name, 'errors')}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lvlm_probe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
