"""Specification of a study: models × data sets × methods, read from YAML, with errors that name the line.

::

    name: demo
    about: What is studied, and why.  # stands at the top of the tables
    out: runs/study-demo              # beside the YAML file, unless absolute
    models:
      demo: {source: demo}
      other: {source: path/to/model, dtype: bfloat16, device_map: auto, group: llava, size: 7}
      big: {server: "http://gpu:8000", name: qwen-72b}   # runs elsewhere: no gradients, no attention
    datasets:
      scenes: {reader: demo, source: eval, limit: 20}
    methods:
      igos++: {}
      paper: {method: igos++, params: {preset: paper}}
      joint: {method: igos++, tokens: joint}        # a method with its own token rule or baseline
      quick: {method: igos++, search_dtype: bfloat16}
    settings: {alpha: 1.0, baseline: blur, grid: 32, steps: 50, seed: 0}
    filter: {minimum_drop: 0.3, normalised: false}

Everything that changes a result is part of the specification, and of the keys of its units. A ``source`` that lies
beside the YAML file is found there, wherever the study is started from.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml

from lvlm_probe.errors import ExplainError, StudyError
from lvlm_probe.study.bounded_yaml import WrongYaml, compose, plain
from lvlm_probe.study.datasets.registry import checked_option, options_of, readers
from lvlm_probe.study.keys import Key, WrongValue, checked, nearest, parts, short

_BEHAVIOUR = Literal["corrected", "release"]
BEHAVIOURS: tuple[str, ...] = get_args(_BEHAVIOUR)
_SEARCH = Literal["bfloat16"]
_BASELINE = Literal["blur", "blank", "noise", "mean", "first_frame", "middle_frame", "shuffled_frames"]


@dataclass(frozen=True)
class ModelSpec:
    """A model of the study; ``name`` is how tables call it."""

    name: str
    source: Annotated[str, Key("Directory, hub id, or demo for the embedded model.", "path/to/model", "needed")]
    dtype: Annotated[str, Key("Type of the weights: float32, bfloat16, float16.", "bfloat16")] = "float32"
    device: Annotated[str | None, Key("Where it runs.", "cuda:1", "cuda if there is one, else cpu")] = None
    device_map: Annotated[str | None, Key("How it is spread over devices (accelerate).", "auto")] = None
    attn: Annotated[str | None, Key("Attention implementation: sdpa or eager.", "sdpa", "the model's own")] = None
    group: Annotated[str | None, Key("What it is compared within in Table 4: one architecture.", "llava")] = None
    size: Annotated[
        float | None, Key("Parameters of its language model in billions, for the test of scale.", "7", above=0)
    ] = None
    vision: Annotated[str | None, Key("Its vision architecture, for the test of architecture.", "clip-l-336")] = None
    paper: Annotated[str | None, Key("What the paper calls it, for the ledger.", "LLaVA-1.5-7b")] = None
    server: Annotated[str | None, Key("A server that runs it, in place of a source.", "http://gpu:8000")] = None
    served_model: Annotated[
        str | None, Key("What the server calls it, also as name.", "qwen-72b", "its only model")
    ] = None


@dataclass(frozen=True)
class DatasetSpec:
    """A data set of the study; ``name`` is how tables call it.

    Options of its reader stand beside these keys in a file, or under ``options``.
    """

    name: str
    reader: Annotated[str, Key("How it is read; `lvlm-probe study datasets` lists the readers.", "table", "needed")]
    source: Annotated[str, Key("Its file or directory, or a hub id.", "questions.csv", "needed")]
    split: Annotated[str | None, Key("Of the data set, where it has several.", "test")] = None
    limit: Annotated[int | None, Key("Use the first so many samples.", "100", "all", least=1)] = None
    open_ended: Annotated[bool, Key("Strip choices and instructions from questions (paper, §4.3).", "false")] = True
    options: Annotated[
        Mapping[str, Any], Key("Options of the reader, which may stand beside these keys too.", "{task: Depth}")
    ] = field(default_factory=dict)
    paper: Annotated[str | None, Key("What the paper calls it, for the ledger.", "MMVP")] = None


@dataclass(frozen=True)
class MethodSpec:
    """A row of the tables: a method, its parameters, and what it explains; ``name`` is how tables call it."""

    name: str
    method: Annotated[str, Key("The explainer; `lvlm-probe methods` lists them.", "igos++", "the row's own name")]
    params: Annotated[Mapping[str, Any], Key("Parameters of the explainer.", "{preset: release}")] = field(
        default_factory=dict
    )
    tokens: Annotated[
        Literal["llr", "joint", "keywords"],
        Key(
            "What is explained: tokens that the image decides (llr; paper, Eq. 6), every token (joint), or YAKE's "
            "keywords of the answer.",
            "joint",
        ),
    ] = "llr"
    alpha: Annotated[
        float | None, Key("Threshold of the log-likelihood ratio, nats.", "2.0", "the study's settings.alpha")
    ] = None
    baseline: Annotated[
        _BASELINE | None, Key("Kind of image that it is made against.", "blank", "the study's settings.baseline")
    ] = None
    search_dtype: Annotated[
        _SEARCH | None,
        Key(
            "Number format that the method searches in, on models in float32; all scores are computed as ever.",
            "bfloat16",
            "the model's own",
        ),
    ] = None
    tables: Annotated[tuple[int, ...], Key("The paper's tables that the row belongs to.", "[2, 3]")] = (2,)
    paper: Annotated[str | None, Key("What the paper calls the row, for the ledger.", "iGOS++")] = None
    behaviour: Annotated[_BEHAVIOUR, Key("release: as the published code does, for the ledger.", "release")] = (
        "corrected"
    )

    @property
    def asked(self) -> dict[str, Any]:
        """What ``explain`` and ``plan`` are given of the row, besides what it explains."""
        return {"method": self.method, "search_dtype": self.search_dtype, **self.params}


@dataclass(frozen=True)
class Settings:
    """Settings that all maps of a study share."""

    alpha: Annotated[float, Key("Threshold of the log-likelihood ratio in nats (paper, Eq. 6).", "1.0")] = 1.0
    baseline: Annotated[_BASELINE, Key("What hides a part of the image; the last three of videos.", "blur")] = "blur"
    grid: Annotated[int, Key("All maps are ranked on grid × grid cells.", "32", least=1, most=1024)] = 32
    steps: Annotated[int, Key("Points on a deletion or insertion curve, less one.", "50", least=1, most=100_000)] = 50
    max_new_tokens: Annotated[int, Key("Length limit of answers, tokens.", "64", least=1, most=1_000_000)] = 64
    seed: Annotated[int, Key("Of everything random.", "0", least=0, most=2**63 - 1)] = 0
    num_frames: Annotated[
        int | None,
        Key("Frames of a video that models are shown.", "8", "what the processor samples, or 16", least=1, most=1000),
    ] = None
    fps: Annotated[
        float | None, Key("The same for each second of it, instead.", "2", "what the processor samples, or 16", above=0)
    ] = None
    words: Annotated[bool, Key("Also make one map per selected word, to look at; as many maps more.", "true")] = False


@dataclass(frozen=True)
class FilterSpec:
    """The filter of the samples that maps are made for (paper, §4.3: "clear probability difference" for all models).

    A sample is kept if the probability of the answer falls by at least ``minimum_drop`` on the baseline image,
    1 − P̃(a)/P(a), under every model of the study. The paper gives no number; 0.3 is the edge of its own class of
    answers that hardly need the image (Table 1).
    """

    minimum_drop: Annotated[
        float,
        Key(
            "Share of its probability that an answer has to lose on the baseline image, under every model, to get "
            "maps; 0 keeps every answer.",
            "0.3",
            least=0,
            most=1,
        ),
    ] = 0.3
    normalised: Annotated[
        bool, Key("Probability is the geometric mean over tokens instead of their product.", "true")
    ] = False


@dataclass(frozen=True)
class Study:
    """A whole study. Read it with :func:`read_study`.

    Attributes:
        base: Directory of the YAML file, where sources are looked for first; no part of what is handed on.
        trust_remote_code: Run the code that comes with a model. No file says so, the caller does; not handed on.
    """

    name: Annotated[str, Key("Stands at the top of the tables.", "a first study", "the file's name")]
    out: Annotated[
        Path, Key("Directory of its units, beside the file unless absolute.", "runs/study", "runs/ and the file's name")
    ]
    models: Annotated[
        Mapping[str, ModelSpec], Key("Name → model; a text alone is its source.", "{demo: demo}", "needed")
    ]
    datasets: Annotated[
        Mapping[str, DatasetSpec],
        Key("Name → data set.", "{scenes: {reader: demo, source: eval, limit: 2}}", "needed"),
    ]
    methods: Annotated[Mapping[str, MethodSpec], Key("Row of the tables → method.", "{igos++: {}}", "needed")]
    settings: Annotated[Settings, Key("What all maps share.", "{grid: 16}", "those below")] = Settings()
    filter: Annotated[FilterSpec, Key("Which samples get maps.", "{minimum_drop: 0.3}", "those below")] = FilterSpec()
    engine: Annotated[str, Key("Who does the units: local, or what a plugin brings.", "ray")] = "local"
    engine_options: Annotated[Mapping[str, Any], Key("Options of the engine.", "{address: auto}")] = field(
        default_factory=dict
    )
    about: Annotated[str, Key("What is studied, and why; stands at the top of the tables.", "Two models on MMVP.")] = ""
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

    def entries(self, node: yaml.Node, what: str) -> dict[str, _Entry]:
        if not isinstance(node, yaml.MappingNode):
            raise self.wrong(node, f"{what} is a mapping (name: …)")
        found: dict[str, _Entry] = {}
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

    def text(self, found: Mapping[str, _Entry], name: str, default: str) -> str:
        if name not in found:
            return default
        given = self.plain(found[name][1])
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise self.wrong(found[name][1], f"{name} is a text, not {short(given)}")
        return str(given)

    def study(self, node: yaml.Node) -> Study:
        found = self.entries(node, "a study")
        self.check_names(found, tuple(parts(Study)), "a study")
        for name in ("models", "datasets", "methods"):
            if name not in found:
                raise self.wrong(node, f"there are no {name}; a study names models, datasets and methods")
            if not self.entries(found[name][1], name):
                raise self.wrong(found[name][0], f"{name} is empty")
        out = Path(os.path.expanduser(self.text(found, "out", f"runs/{self.path.stem}")))
        options = self.plain(found["engine_options"][1]) if "engine_options" in found else {}
        if not isinstance(options, dict):
            raise self.wrong(found["engine_options"][1], "engine_options is a mapping")

        def each(part: str, read: Callable[[str, yaml.Node, yaml.Node], Any]) -> dict[str, Any]:
            return {name: read(name, *pair) for name, pair in self.entries(found[part][1], part).items()}

        def section(part: str, kind: type) -> dict[str, Any]:
            return self.values(found[part][1], kind, part)[0] if part in found else {}

        return Study(
            name=self.text(found, "name", self.path.stem),
            out=self.path.parent.absolute() / out,
            models=each("models", self.model),
            datasets=each("datasets", self.dataset),
            methods=each("methods", self.method),
            settings=Settings(**section("settings", Settings)),
            filter=FilterSpec(**section("filter", FilterSpec)),
            engine=self.text(found, "engine", "local"),
            engine_options=options,
            about=" ".join(self.text(found, "about", "").split()),
            base=self.path.parent.absolute(),
        )

    def check_names(self, found: Mapping[str, _Entry], known: tuple[str, ...], what: str) -> None:
        for name, (key, _) in found.items():
            if name not in known:
                raise self.wrong(key, f"{what} has no {name!r}; {nearest(name, known, 'it knows')}")

    def values(
        self, node: yaml.Node, kind: type, what: str, more: tuple[str, ...] = ()
    ) -> tuple[dict[str, Any], dict[str, _Entry]]:
        """The keys of a mapping as the dataclass holds them, and the nodes of ``more`` that stand beside them."""
        if isinstance(node, yaml.ScalarNode) and self.plain(node) is None:
            return {}, {}
        known = parts(kind)
        found = self.entries(node, what)
        self.check_names(found, (*known, *more), what)
        read: dict[str, Any] = {}
        for name, (_, value) in found.items():
            if name not in known:
                continue
            hint, key = known[name]
            given = self.plain(value)
            if hint in (str, str | None) and isinstance(given, int | float) and not isinstance(given, bool):
                given = str(given)  # names may be numbers
            try:
                read[name] = checked(hint, given, key)
            except WrongValue as error:
                raise self.wrong(value, f"{what}: {name} {error}") from None
        return read, {name: pair for name, pair in found.items() if name not in known}

    def model(self, name: str, key: yaml.Node, node: yaml.Node) -> ModelSpec:
        values: dict[str, Any] = {"source": self.plain(node)}
        if not _is_text(node):
            values, rest = self.values(node, ModelSpec, f"model {name}", ("name",))
            if "name" in rest:
                values["served_model"] = str(self.plain(rest["name"][1]))
        if values.get("server") is not None:
            if "source" in values:
                raise self.wrong(key, f"model {name} has a source and a server; the server runs the model")
            values["source"] = values["server"]
        elif values.get("served_model") is not None:
            raise self.wrong(key, f"model {name}: a name is what a server calls it, and there is no server")
        if "source" not in values:
            raise self.wrong(key, f"model {name} has no source: a directory, a hub id, or demo; nor a server")
        return ModelSpec(name, **values)

    def dataset(self, name: str, key: yaml.Node, node: yaml.Node) -> DatasetSpec:
        what = f"data set {name}"
        entries = self.entries(node, what)
        for needed in ("reader", "source"):
            if needed not in entries:
                raise self.wrong(key, f"{what} has no {needed}; `lvlm-probe study datasets` lists the readers")
        reader = self.text(entries, "reader", "")
        if reader not in readers():
            raise self.wrong(entries["reader"][1], f"there is no reader {reader!r}; {nearest(reader, readers())}")
        values, beside = self.values(node, DatasetSpec, what, more=tuple(options_of(reader)))
        under = self.entries(entries["options"][1], "options") if values.get("options") else {}
        options = {}
        for option, (there, value) in [*under.items(), *beside.items()]:
            if option in options:
                raise self.wrong(there, f"{what} has {option!r} twice, beside its keys and under options")
            options[option] = self.option(reader, option, there, value)
        return DatasetSpec(name, **{**values, "options": options})

    def option(self, reader: str, name: str, key: yaml.Node, node: yaml.Node) -> Any:
        """An option of a reader; where one name inside of it is wrong, the error names that line."""
        try:
            return checked_option(reader, name, self.plain(node))
        except WrongValue as error:
            inside = self.entries(node, name) if error.inside is not None else {}
            raise self.wrong(inside.get(error.inside or "", (key, node))[0], str(error)) from None

    def method(self, name: str, key: yaml.Node, node: yaml.Node) -> MethodSpec:
        from lvlm_probe.explainers import methods
        from lvlm_probe.explainers.registry import check_parameters, resolve

        what = f"method {name}"
        values = {"method": self.plain(node)} if _is_text(node) else self.values(node, MethodSpec, what)[0]
        spec = MethodSpec(name, **{"method": name, **values})
        if spec.method not in methods():  # of plugins too
            hint = nearest(spec.method, methods())
            raise self.wrong(key, f"{what}: there is no explainer {short(spec.method)}; {hint}")
        try:
            check_parameters(spec.method, resolve(spec.method), spec.params)
        except ExplainError as error:
            raise self.wrong(node, f"{what}: {error}") from error
        return spec


_Entry = tuple[yaml.Node, yaml.Node]
"""Nodes of a key and of its value."""


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"
