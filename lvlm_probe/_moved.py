"""Old module names, which go on working for one release: importing one warns and gives the names of its new place.

A finder at the end of ``sys.meta_path`` answers for the names of the table, and for no others. The module that it makes
looks every name up where the table says when it is asked for, so a class is the same class by its old and new path.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])

MOVED = {
    "_nnsight": "causal.through_nnsight",
    "adapters": "models.families",
    "anatomy": "models.anatomy",
    "attention.recording": "recording.attention_points",
    "capture": "replaying.capture",
    "causal.checks": "causal.interventions",
    "causal.cuts": "attention.cutting causal.through_nnsight",
    "causal.knockout": "attention.cutting causal.through_nnsight causal.interventions",
    "causal.looking": "causal.points",
    "causal.patches": "causal.patching",
    "chunks": "replaying.micro_batches",
    "cli.comparing": "cli.shared.comparison",
    "cli.demonstration": "cli.demo",
    "cli.explaining": "cli.explain cli.shared.maps",
    "cli.importing": "cli.import_",
    "cli.inputs": "cli.shared.inputs",
    "cli.inspection": "cli.inspect cli.verify",
    "cli.listing": "cli.methods",
    "cli.maps": "heatmap_store cli.shared.inputs",
    "cli.metering": "cli.meter",
    "cli.models": "cli.shared.models",
    "cli.options": "cli.shared.options",
    "cli.planning": "cli.plan",
    "cli.readers": "cli.study.datasets cli.study.peek",
    "cli.recording": "cli.record cli.shared.answers",
    "cli.scoring": "cli.evaluate cli.report",
    "cli.studying": "cli.study",
    "cli.supported": "cli.families",
    "cli.terminal": "cli.shared.terminal",
    "conditions": "recording.conditions",
    "decoding": "models.tokenizers",
    "encoder_tokens": "boxes.encoder_tokens",
    "exhaustion": "replaying.micro_batches",
    "explainers.attention": "explainers.attention_maps",
    "explainers.costs": "explainers.registry",
    "explainers.floors": "explainers.controls",
    "explainers.igos_settings": "explainers.igos.settings",
    "explainers.ordering": "explainers.igos.order",
    "explainers.recorded": "explainers.trace_only",
    "explainers.regions": "boxes.image_tokens boxes.painting explainers.scores",
    "explainers.regularization": "explainers.igos.regularizers",
    "explainers.relevance": "explainers.attention_relevance",
    "explainers.scaling": "explainers.scores",
    "family_table": "models.support",
    "forcing": "replaying.teacher_forcing models.inputs",
    "format": "storage trace.records trace.schema",
    "format.arrays": "storage.arrays",
    "format.encoding": "storage.encoding",
    "format.reading": "storage.reading",
    "format.records": "trace.records storage.encoding",
    "format.schema": "trace.schema trace.records",
    "format.seal": "storage.seal",
    "geometry": "images.tracing images.positions images.composite",
    "geometry.blend": "images.composite",
    "geometry.positions": "images.positions",
    "geometry.sampling": "images.positions",
    "geometry.trace": "images.tracing",
    "handed": "recording.handed_images",
    "hidden": "replaying.hidden_states",
    "identity": "models.fingerprint",
    "images.joining": "images.batching",
    "images.path": "images.image_path",
    "images.pixels": "images.pixel_path",
    "images.step": "images.processor_step",
    "importing.recorder": "importing.forced_recorder",
    "importing.tokens": "importing.retokenize",
    "isolation": "replaying.isolation",
    "layout": "boxes.painting",
    "loading": "models.loading",
    "logprobs": "recording.log_probs",
    "masking": "recording.masked_calls",
    "metrics.extras": "extras",
    "metrics.randomisation": "sanity.random_weights",
    "metrics.sanity": "sanity.former sanity.checks sanity.randomisation",
    "metrics.stability": "sanity.former sanity.stability",
    "originals": "models.drivers",
    "patch_gradient": "replaying.isolation",
    "pictures": "trace.image_files",
    "places": "boxes.sign_code models.families",
    "planning.probes": "planning.rehearsal",
    "player": "replaying",
    "player.baselines": "replaying.baselines",
    "player.gradient_flow": "replaying.gradient_flow",
    "player.replaying": "replaying.replays",
    "player.shortcuts": "replaying.shortcuts",
    "player.views": "replaying.replays replaying.micro_batches",
    "points": "recording.module_outputs",
    "prompt_pictures": "recording.prompt_images",
    "prompting": "models.prompts",
    "recognition": "recording.recognition",
    "recorded_inputs": "replaying.recorded_inputs",
    "recorded_path": "replaying.answer_source images.processor_step",
    "recorder": "recording.recorder recording.token_boxes",
    "replica": "models.replica",
    "report": "pages",
    "report.comparison": "pages.comparison",
    "report.comparison_page": "pages.comparison_page",
    "report.pictures": "pages.data_uris",
    "report.plain": "pages.plain",
    "report.prior_page": "pages.prior",
    "report.samples": "pages.samples",
    "report.standings": "pages.ranking",
    "rewording": "replaying.rewording",
    "row_inputs": "recording.row_inputs",
    "session": "recording.probe",
    "study.cells": "study.tables.cells",
    "study.document": "study.tables.document",
    "study.drops": "importing.drops",
    "study.engines": "study.run.engines",
    "study.exporting": "study.tables.export",
    "study.filtering": "study.run.sample_filter",
    "study.language_prior": "importing.meter",
    "study.ledger": "study.tables.ledger",
    "study.measuring": "study.run.cost_record",
    "study.model_table": "study.tables.table4",
    "study.own_data": "study.datasets.own_data",
    "study.pages.gathering": "study.pages.samples",
    "study.pages.loading": "study.pages.stored",
    "study.paper_tables": "study.tables.paper",
    "study.published": "study.datasets.published",
    "study.quadrants": "study.tables.figure5",
    "study.relaxing": "study.datasets.open_ended",
    "study.running": "study.run.runner",
    "study.scenes": "study.datasets.demo_scenes",
    "study.side_tables": "study.tables.tables8_9",
    "study.tabular": "study.datasets.files",
    "study.tokens": "study.run.token_rules",
    "study.units": "study.run.units",
    "study.word_maps": "study.run.word_maps",
    "study.working": "study.run.unit_work",
    "token_places": "boxes.image_tokens recording.token_boxes",
    "verification": "replaying.verification",
    "watch": "recording.processor_watch",
    "wrappers": "models.wrappers",
}
"""Old module: the modules, below the package, that hold what was in it; the first that has a name gives it."""

NAMES = {
    "demo.scene.COLUMNS": "demo.questions",
    "demo.scene.DOMAINS": "demo.questions",
    "demo.scene.ROWS": "demo.questions",
    "demo.scene.cell_query": "demo.questions",
    "demo.scene.colour_query": "demo.questions",
    "demo.scene.count_query": "demo.questions",
    "demo.scene.may_be_in": "demo.questions",
    "demo.scene.pair_query": "demo.questions",
    "demo.scene.plural": "demo.questions",
    "demo.scene.shape_query": "demo.questions",
    "demo.scene.where_query": "demo.questions",
    "AttachError": "errors",
    "ExplainError": "errors",
    "ImageError": "errors",
    "ImagePath": "images",
    "MaskError": "errors",
    "ModelMismatch": "errors",
    "OutOfMemory": "errors",
    "Plan": "planning",
    "PluginError": "errors",
    "PointNotFound": "errors",
    "ProcessorRefused": "errors",
    "ReplayError": "errors",
    "ReportError": "errors",
    "SelectionError": "errors",
    "StudyError": "errors",
    "TraceError": "errors",
    "Verification": "replaying.verification",
    "metrics.Completeness": "sanity.stability",
    "metrics.SanityReport": "sanity.former",
    "metrics.SanityStep": "sanity.checks",
    "metrics.Stability": "sanity.stability",
    "metrics.answer_randomisation": "sanity.former",
    "metrics.completeness": "sanity.stability",
    "metrics.over_prompts": "sanity.former",
    "metrics.over_seeds": "sanity.former",
    "metrics.randomised": "sanity.random_weights",
    "metrics.stability": "sanity.stability",
    "metrics.tie_share": "sanity.stability",
    "metrics.weight_blocks": "sanity.random_weights",
    "metrics.weight_randomisation": "sanity.former",
}
"""Old names of modules that are still there (bare ones: of the package), and the module that has them now."""

_PACKAGE = __name__.partition(".")[0]


class _MovedModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        for home in MOVED[self.__name__.partition(".")[2]].split():
            module = importlib.import_module(f"{_PACKAGE}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has moved and has no attribute {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Python sets a submodule as an attribute of its package, so importing lvlm_probe.report hides probe.report.
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Finder:
    """Meta path finder and loader of moved modules."""

    def find_spec(self, name: str, _path: Sequence[str] | None = None, _target: Any = None) -> Any:
        package, _, below = name.partition(".")
        if package != _PACKAGE or below not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _MovedModule(spec.name, f"Moved to {MOVED[spec.name.partition('.')[2]]}.")

    def exec_module(self, module: types.ModuleType) -> None:
        homes = MOVED[module.__name__.partition(".")[2]].split()
        there = " and ".join(f"{_PACKAGE}.{home}" for home in homes)
        warnings.warn(
            f"{module.__name__} has moved to {there}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )


def install() -> None:
    """Put the finder at the end of ``sys.meta_path``, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # type: ignore[arg-type]


def names_of(module: str) -> Callable[..., Any]:
    """The ``__getattr__`` of a module of which names have moved (``NAMES``), or its last line: ``lookup(name, 3)``."""

    def lookup(name: str, stacklevel: int = 2) -> Any:
        home = NAMES.get(f"{module}.{name}".partition(".")[2])
        if home is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} has moved to {_PACKAGE}.{home}.{name}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
        return getattr(importlib.import_module(f"{_PACKAGE}.{home}"), name)

    return lookup


def grouped(parameter: str, kind: type[Any]) -> Callable[[_Function], _Function]:
    """Let a function take by themselves, with a warning, what are fields of one of its parameters now.

    Args:
        parameter: its name; it holds a ``kind``.
        kind: a dataclass whose fields were keyword arguments once.
    """
    import dataclasses
    import functools

    fields = {field.name for field in dataclasses.fields(kind)}

    def of(function: _Function) -> _Function:
        @functools.wraps(function)
        def called(*args: Any, **named: Any) -> Any:
            former = {name: named.pop(name) for name in sorted(fields & named.keys())}
            if former:
                now = f"{parameter}={kind.__name__}({', '.join(f'{name}=…' for name in former)})"
                told = f"{', '.join(former)} of {function.__name__}() are given as {now}"
                warnings.warn(f"{told}; the old way goes with the next release", DeprecationWarning, stacklevel=2)
                named[parameter] = dataclasses.replace(named.get(parameter, kind()), **former)
            return function(*args, **named)

        return cast(_Function, called)

    return of


def renamed(old: str, new: str) -> property:
    """An attribute or method of a class by its ``old`` name, which warns and gives that of the ``new`` one."""

    def former(instance: Any) -> Any:
        kind = type(instance).__name__
        told = f"{kind}.{old} is called {kind}.{new} now; the old name goes with the next release"
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return getattr(instance, new)

    return property(former)
