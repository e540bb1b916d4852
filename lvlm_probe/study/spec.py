"""Specification of a study: models × data sets × methods, read from YAML, with errors that name the line.

::

    name: demo
    about: What is studied, and why.  # stands at the top of the tables
    out: runs/study-demo              # beside the YAML file, unless absolute
    models:
      demo: {source: demo}
      other: {source: path/to/model, dtype: bfloat16, device_map: auto, group: llava, size: 7}
    datasets:
      scenes: {reader: demo, source: eval, limit: 20}
    methods:
      igos++: {}
      paper: {method: igos++, params: {preset: paper}}
      joint: {method: igos++, tokens: joint}        # a method with its own token rule or baseline
    settings: {alpha: 1.0, baseline: blur, grid: 32, steps: 50, seed: 0}
    filter: {minimum_drop: 0.3, normalised: false}

Everything that changes a result is part of the specification, and of the keys of its units. A ``source`` that lies
beside the YAML file is found there, wherever the study is started from.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lvlm_probe.errors import ExplainError, StudyError
from lvlm_probe.study.bounded_yaml import WrongYaml, compose, plain

__all__ = ["DatasetSpec", "FilterSpec", "MethodSpec", "ModelSpec", "Settings", "Study", "read_study"]

TOKEN_RULES = ("llr", "joint", "keywords")
BEHAVIOURS = ("corrected", "release")
_RANGES = {"grid": (1, 1024), "steps": (1, 100_000), "max_new_tokens": (1, 1_000_000), "seed": (0, 2**63 - 1)}
_PARTS = ("name", "about", "out", "models", "datasets", "methods", "settings", "filter", "engine", "engine_options")


@dataclass(frozen=True)
class ModelSpec:
    """A model of the study.

    Attributes:
        name: How tables call it.
        source: Directory, hub id, or ``demo``.
        dtype, device, device_map, attn: How it is loaded.
        group: What it is compared within (Table 4): models of one vision architecture, for instance.
        size: Parameters of its language model, in billions, for the test of scale.
        vision: Name of its vision architecture, for the test of architecture.
        paper: What the paper calls it, for the ledger.
    """

    name: str
    source: str
    dtype: str = "float32"
    device: str | None = None
    device_map: str | None = None
    attn: str | None = None
    group: str | None = None
    size: float | None = None
    vision: str | None = None
    paper: str | None = None


@dataclass(frozen=True)
class DatasetSpec:
    """A data set of the study.

    Attributes:
        name: How tables call it.
        reader: Name of its reader (``lvlm-probe study datasets``).
        source: Its path or hub id.
        split: Of the data set, where it has several.
        limit: Use the first so many samples; ``None``: all.
        open_ended: Strip choices and instructions (paper, §4.3).
        options: Further options of the reader.
        paper: What the paper calls it, for the ledger.
    """

    name: str
    reader: str
    source: str
    split: str | None = None
    limit: int | None = None
    open_ended: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: str | None = None


@dataclass(frozen=True)
class MethodSpec:
    """A row of the tables: a method, its parameters, and what it explains.

    Attributes:
        name: How tables call it.
        method: Name of the explainer; by default the row's own.
        params: Its parameters.
        tokens: ``llr`` (paper, Eq. 6), ``joint`` (every token), or ``keywords`` (YAKE on the answer).
        alpha: Threshold of the log-likelihood ratio, nats; by default the study's.
        baseline: Kind of image it is made against; by default the study's.
        tables: Numbers of the paper's tables that the row belongs to.
        paper: What the paper calls the row, for the ledger.
        behaviour: ``corrected``, or ``release`` for a row that does as the published code does.
    """

    name: str
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tokens: str = "llr"
    alpha: float | None = None
    baseline: str | None = None
    tables: tuple[int, ...] = (2,)
    paper: str | None = None
    behaviour: str = "corrected"


@dataclass(frozen=True)
class Settings:
    """Settings that all maps of a study share.

    Attributes:
        alpha: Threshold of the log-likelihood ratio in nats (paper, Eq. 6).
        baseline: Kind of the baseline image.
        grid: All maps are ranked on ``grid × grid`` cells.
        steps: Points on a deletion or insertion curve, less one.
        max_new_tokens: Length of answers.
        seed: Of everything random.
        words: Also make one map per selected word, to look at; as many maps more as words are selected.
    """

    alpha: float = 1.0
    baseline: str = "blur"
    grid: int = 32
    steps: int = 50
    max_new_tokens: int = 64
    seed: int = 0
    words: bool = False


@dataclass(frozen=True)
class FilterSpec:
    """The filter of the samples that maps are made for (paper, §4.3: "clear probability difference" for all models).

    A sample is kept if the probability of the answer falls by at least ``minimum_drop`` on the baseline image,
    1 − P̃(a)/P(a), under every model of the study. The paper gives no number; 0.3 is the edge of its own class of
    answers that hardly need the image (Table 1).

    Attributes:
        minimum_drop: In [0, 1]; 0 keeps every answer.
        normalised: P is the geometric mean over tokens instead of their product.
    """

    minimum_drop: float = 0.3
    normalised: bool = False


@dataclass(frozen=True)
class Study:
    """A whole study. Read it with :func:`read_study`.

    Attributes:
        name, about: What it is called, and a paragraph on it.
        out: Directory of its units.
        models, datasets, methods: By name.
        settings, filter: What all maps share; which samples get maps.
        engine, engine_options: Who does the units.
        base: Directory of the YAML file, where sources are looked for first; no part of what is handed on.
        trust_remote_code: Run the code that comes with a model. No file says so, the caller does; not handed on.
    """

    name: str
    out: Path
    models: Mapping[str, ModelSpec]
    datasets: Mapping[str, DatasetSpec]
    methods: Mapping[str, MethodSpec]
    settings: Settings = Settings()
    filter: FilterSpec = FilterSpec()
    engine: str = "local"
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    base: Path | None = None
    trust_remote_code: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        record = dataclasses.asdict(self)
        del record["base"], record["trust_remote_code"]
        return {**record, "out": str(self.out)}

    def located(self, source: str) -> str:
        """A source as it can be opened: the path beside the YAML file where there is one, else as it is."""
        beside = None if self.base is None else self.base / os.path.expanduser(source)
        return str(beside) if beside is not None and source != "demo" and beside.exists() else source


def read_study(path: str | Path) -> Study:
    """Read and check a study.

    Raises:
        StudyError: the file cannot be read, or something in it is wrong; the message names the line.
    """
    path = Path(path)
    node = compose(path)
    if node is None:
        raise StudyError(f"{path} is empty; a study names models, datasets and methods")
    return _Reader(path).study(node)


class _Reader:
    """Walks the YAML nodes, which know their lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrong(self, node: yaml.Node, sentence: str) -> StudyError:
        return StudyError(f"{self.path}, line {node.start_mark.line + 1}: {sentence}")

    def entries(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            raise self.wrong(node, f"{what} is a mapping (name: …)")
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.wrong(key, f"{what}: a name is a text")
            name = str(self.plain(key))
            if name in found:
                raise self.wrong(key, f"{what} has {name!r} twice")
            found[name] = (key, value)
        return found

    def plain(self, node: yaml.Node) -> Any:
        try:
            return plain(node)
        except WrongYaml as error:
            raise StudyError(f"{self.path}, line {error.line}: {error}") from error

    def text(self, found: Mapping[str, tuple[yaml.Node, yaml.Node]], name: str, default: str) -> str:
        if name not in found:
            return default
        given = self.plain(found[name][1])
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise self.wrong(found[name][1], f"{name} is a text, not {_short(given)}")
        return str(given)

    def study(self, node: yaml.Node) -> Study:
        found = self.entries(node, "a study")
        self.check_names(found, _PARTS, "a study")
        for name in ("models", "datasets", "methods"):
            if name not in found:
                raise self.wrong(node, f"there are no {name}; a study names models, datasets and methods")
            if not self.entries(found[name][1], name):
                raise self.wrong(found[name][0], f"{name} is empty")
        out = Path(os.path.expanduser(self.text(found, "out", f"runs/{self.path.stem}")))
        engine = self.text(found, "engine", "local")
        options = self.plain(found["engine_options"][1]) if "engine_options" in found else {}
        if not isinstance(options, dict):
            raise self.wrong(found["engine_options"][1], "engine_options is a mapping")
        return Study(
            name=self.text(found, "name", self.path.stem),
            out=out if out.is_absolute() else self.path.parent / out,
            models={name: self.model(name, *pair) for name, pair in self.entries(found["models"][1], "models").items()},
            datasets={
                name: self.dataset(name, *pair) for name, pair in self.entries(found["datasets"][1], "datasets").items()
            },
            methods={
                name: self.method(name, *pair) for name, pair in self.entries(found["methods"][1], "methods").items()
            },
            settings=self.settings(found["settings"][1]) if "settings" in found else Settings(),
            filter=self.filter(found["filter"][1]) if "filter" in found else FilterSpec(),
            engine=engine,
            engine_options=options,
            about=" ".join(self.text(found, "about", "").split()),
            base=self.path.parent.absolute(),
        )

    def check_names(self, found: Mapping[str, tuple[yaml.Node, yaml.Node]], known: tuple[str, ...], what: str) -> None:
        for name, (key, _) in found.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(known)}"
                raise self.wrong(key, f"{what} has no {name!r}; {hint}")

    def values(self, node: yaml.Node, kind: type, what: str, leave_out: tuple[str, ...] = ("name",)) -> dict[str, Any]:
        """The entries of a mapping, of the types that the dataclass says."""
        fields = {item.name: str(item.type) for item in dataclasses.fields(kind) if item.name not in leave_out}
        if isinstance(node, yaml.ScalarNode) and self.plain(node) is None:
            return {}
        found = self.entries(node, what)
        self.check_names(found, tuple(fields), what)
        read: dict[str, Any] = {}
        for name, (_, value) in found.items():
            given, wanted = self.plain(value), fields[name]
            if given is None and "None" in wanted:
                read[name] = None
            elif wanted.startswith("Mapping"):
                if not isinstance(given, dict):
                    raise self.wrong(value, f"{what}: {name} is a mapping (name: value)")
                read[name] = given
            elif wanted.startswith("tuple[int"):
                items = given if isinstance(given, list) else [given]
                if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
                    raise self.wrong(value, f"{what}: {name} is a list of whole numbers, not {_short(given)}")
                read[name] = tuple(items)
            elif wanted.startswith("bool"):
                if not isinstance(given, bool):
                    raise self.wrong(value, f"{what}: {name} is true or false, not {_short(given)}")
                read[name] = given
            elif wanted.startswith(("int", "float")):
                whole = wanted.startswith("int")
                if isinstance(given, bool) or not isinstance(given, int if whole else int | float):
                    raise self.wrong(
                        value, f"{what}: {name} is a {'whole ' if whole else ''}number, not {_short(given)}"
                    )
                read[name] = given if whole else float(given)
            elif isinstance(given, str | int | float) and not isinstance(given, bool):
                read[name] = str(given)
            else:
                raise self.wrong(value, f"{what}: {name} is a text, not {_short(given)}")
        return read

    def model(self, name: str, key: yaml.Node, node: yaml.Node) -> ModelSpec:
        values = {"source": self.plain(node)} if _is_text(node) else self.values(node, ModelSpec, f"model {name}")
        if "source" not in values:
            raise self.wrong(key, f"model {name} has no source: a directory, a hub id, or demo")
        if values.get("size") is not None and values["size"] <= 0:
            raise self.wrong(node, f"model {name}: size is above 0, in billions of parameters")
        return ModelSpec(name, **values)

    def dataset(self, name: str, key: yaml.Node, node: yaml.Node) -> DatasetSpec:
        values = self.values(node, DatasetSpec, f"data set {name}")
        for needed in ("reader", "source"):
            if needed not in values:
                raise self.wrong(key, f"data set {name} has no {needed}; `lvlm-probe study datasets` lists the readers")
        if values.get("limit") is not None and values["limit"] < 1:
            raise self.wrong(node, f"data set {name}: limit is at least 1")
        return DatasetSpec(name, **values)

    def method(self, name: str, key: yaml.Node, node: yaml.Node) -> MethodSpec:
        values = {"method": self.plain(node)} if _is_text(node) else self.values(node, MethodSpec, f"method {name}")
        spec = MethodSpec(name, **{"method": name, **values})
        if spec.tokens not in TOKEN_RULES:
            what = f"method {name}: tokens is one of {', '.join(TOKEN_RULES)}, not {_short(spec.tokens)}"
            raise self.wrong(key, what)
        if spec.behaviour not in BEHAVIOURS:
            what = f"method {name}: behaviour is {' or '.join(BEHAVIOURS)}, not {_short(spec.behaviour)}"
            raise self.wrong(key, what)
        from lvlm_probe.explainers import methods
        from lvlm_probe.explainers.registry import check_parameters, find

        if spec.method not in methods():  # of plugins too
            close = difflib.get_close_matches(spec.method, methods(), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(methods())}"
            raise self.wrong(key, f"method {name}: there is no explainer {_short(spec.method)}; {hint}")
        try:
            check_parameters(spec.method, find(spec.method), spec.params)
        except ExplainError as error:
            raise self.wrong(node, f"method {name}: {error}") from error
        return spec

    def settings(self, node: yaml.Node) -> Settings:
        values = Settings(**self.values(node, Settings, "settings"))
        for name, (least, most) in _RANGES.items():
            if getattr(values, name) < least:
                raise self.wrong(node, f"settings: {name} is at least {least}")
            if getattr(values, name) > most:
                raise self.wrong(node, f"settings: {name} is at most {most}")
        return values

    def filter(self, node: yaml.Node) -> FilterSpec:
        values = FilterSpec(**self.values(node, FilterSpec, "filter"))
        if not 0 <= values.minimum_drop <= 1:
            raise self.wrong(node, f"filter: minimum_drop is between 0 and 1, not {values.minimum_drop:g}")
        return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"
