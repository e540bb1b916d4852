"""What the engine is told, and what it says where it cannot run."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from lvlm_probe_ray.actor import Beacon, keep_files, loaded_sample
from lvlm_probe_ray.jobs import Job
from lvlm_probe_ray.options import Need, read_options
from PIL import Image

from lvlm_probe.errors import StudyError
from lvlm_probe.study import Sample
from lvlm_probe.study.run.engines import engine_named
from lvlm_probe.study.spec import read_study


def test_what_a_worker_needs() -> None:
    options = read_options({"num_gpus": {"default": 1, "large": 4}, "num_cpus": 2}, ["large", "small"])
    assert options.need("large", gpus=True) == Need(2.0, 4.0)
    assert options.need("small", gpus=True) == Need(2.0, 1.0)
    assert read_options({}, []).need("any", gpus=True) == Need(1.0, 1.0)
    assert read_options({}, []).need("any", gpus=False) == Need(1.0, 0.0)
    assert read_options({"num_gpus": 0.5}, []).need("any", gpus=True) == Need(1.0, 0.5)


def test_how_many_fit() -> None:
    machine = {"CPU": 16.0, "GPU": 4.0, "memory": 1e9}
    assert Need(1, 1).times_in(machine) == 4
    assert Need(1, 0.5).times_in(machine) == 8
    assert Need(5, 1).times_in(machine) == 3
    assert Need(1, 0).times_in({"CPU": 3.0}) == 3
    assert Need(1, 1).times_in({"CPU": 3.0}) == 0
    assert Need(0.1, 0).times_in({"CPU": 0.3}) == 3  # 0.3 / 0.1 is a little less than 3 in binary


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"worker": 2}, "no 'worker'; did you mean 'workers'"),
        ({"workers": 0}, "workers is a whole number from 1 on, not 0"),
        ({"attempts": 1.5}, "attempts is a whole number"),
        ({"min_workers": 3, "workers": 2}, "min_workers is 3, but workers 2"),
        ({"num_gpus": {"lrge": 4}}, "names a model 'lrge'"),
        ({"num_gpus": -1}, "num_gpus is a number from 0 on"),
        ({"num_cpus": "all"}, "num_cpus is a number"),
        ({"shared": True}, "shared is false, or left out"),
        ({"address": 6379}, "address is a text"),
        ({"runtime_env": "x"}, "runtime_env is a mapping"),
    ],
)
def test_options_that_are_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        read_options(given, ["large"])


def test_lost_maps_are_done_one_by_one() -> None:
    sample = Sample("7", "?", load=lambda: Image.new("RGB", (2, 2)))
    parts = Job("maps", "demo", "scenes", sample, "key", ("a", "b", "c")).again()
    assert [(part.rows, part.attempt, part.last) for part in parts] == [
        (("a",), 2, False),
        (("b",), 2, False),
        (("c",), 2, True),
    ]
    assert [part.last for part in parts[0].again()] == [False]
    (answer,) = Job("answer", "demo", "scenes", sample, "key").again()
    assert (answer.attempt, answer.rows, answer.last) == (2, (), True)


def test_a_sample_that_can_be_sent() -> None:
    import pickle

    def fails() -> Image.Image:
        raise StudyError("table x, row 3: the picture cannot be read")

    sent = pickle.loads(pickle.dumps(loaded_sample(Sample("1", "?", load=lambda: Image.new("RGB", (3, 2), "red")))))
    assert sent.image.tobytes() == Image.new("RGB", (3, 2), "red").tobytes()
    sent = pickle.loads(pickle.dumps(loaded_sample(Sample("1", "?", load=fails))))
    with pytest.raises(StudyError, match="row 3: the picture cannot be read"):
        _ = sent.image


def test_files_are_whole_and_records_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda part, path: (order.append(Path(path).name), replace(part, path)))
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "b.json").write_bytes(b"old")
    keep_files(
        tmp_path, {"maps/a.json": b"{}", "maps/a.heat.h5": b"x", "maps/b.json": b"new"}, unless_there=["maps/b.json"]
    )
    assert order == ["a.heat.h5", "a.json"]
    assert (tmp_path / "maps" / "b.json").read_bytes() == b"old"
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["a.heat.h5", "a.json", "b.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        keep_files(tmp_path, {"file/a.json": b"{}"})


def test_a_beacon_is_seen_only_where_it_was_lit(tmp_path: Path) -> None:
    from lvlm_probe_ray.actor import _sees

    here, there = Beacon(tmp_path / "here"), Beacon(tmp_path / "there")
    assert _sees(str(here.path), here.content)
    assert not _sees(str(there.path), here.content)
    here.remove()
    assert not _sees(str(here.path), here.content)


def study(directory: Path, more: str = "") -> Any:
    path = directory / "study.yaml"
    path.write_text(
        "models: {demo: demo}\ndatasets: {s: {reader: demo, source: eval, limit: 1}}\nmethods: {center: {}}\n" + more
    )
    return read_study(path)


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(StudyError, match=r"needs Ray, which cannot be imported .*: pip install ray"):
        engine_named("ray")(study(tmp_path))


def test_no_cluster_at_an_address(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
    with pytest.raises(StudyError, match=r"no Ray cluster at nowhere:x .*ray start --head"):
        engine_named("ray")(study(tmp_path, "engine_options: {address: 'nowhere:x'}\n"))
