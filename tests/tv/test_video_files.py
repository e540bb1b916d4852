"""Videos from files: PyAV's own decoding frame by frame is the truth, and transformers' reader where it can read."""

from __future__ import annotations

import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av", reason="needs the second environment, .venv-tv, which has PyAV")

import av
from toy_clip import ToyClip, tube_weights
from video_samples import film

import lvlm_probe as probe
from lvlm_probe.errors import ImageError, ProbeWarning
from lvlm_probe.trace.video_files import is_video_name, read_video


def evenly(count: int) -> Any:
    return lambda facts: np.linspace(0, facts.frames - 1, count).round().astype(int)


def whole(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.mkv", "libx264", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
    ],
)
def test_frames_are_those_that_are_asked_for(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    path = film(tmp_path / name, codec=codec, pixels=pixels, frames=40, fps=10, keys=12)
    every = whole(path)
    for sampling in (
        evenly(6),
        lambda facts: range(facts.frames),
        lambda facts: [facts.frames - 1],
        lambda _: [3, 3, 25],
    ):
        frames, indices, facts = read_video(path, sampling)
        assert (facts.frames, facts.fps, facts.width, facts.height, facts.audio) == (40, 10.0, 64, 48, False)
        assert np.array_equal(frames, every[list(indices)])


def test_transformers_reads_the_same_frames(tmp_path: Path) -> None:
    from transformers.video_utils import load_video

    path = film(tmp_path / "a.mp4", frames=30)
    frames, indices, facts = read_video(path, evenly(5))
    theirs, metadata = load_video(str(path), sample_indices_fn=lambda metadata, **_: np.array(indices), backend="pyav")
    assert np.array_equal(frames, theirs)
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (facts.frames, facts.fps, facts.duration)


def test_far_frames_are_reached_by_a_key_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", frames=60, keys=10)
    every = whole(path)
    counts: list[int] = []
    original = av.container.InputContainer.decode

    def counted(container: Any, *streams: Any) -> Any:
        counts.append(0)
        for frame in original(container, *streams):
            counts[-1] += 1
            yield frame

    class Counting:
        """The container, with its frames counted."""

        def __init__(self, container: Any) -> None:
            self._container = container

        def __getattr__(self, name: str) -> Any:
            return getattr(self._container, name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            self._container.close()

        def decode(self, *streams: Any) -> Any:
            return counted(self._container, *streams)

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *args, **settings: Counting(opened(*args, **settings)))
    frames, _, _ = read_video(path, lambda _: [2, 55])
    assert np.array_equal(frames, every[[2, 55]])
    assert sum(counts) < 20  # one for the size, three up to the third, six from the key frame before the other


def test_a_phone_s_video_stands_upright(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", frames=4)
    lying = whole(path)
    turned = bytearray(path.read_bytes())
    at = turned.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8  # version, times, layer and volume, then the matrix
    one = 0x10000
    turned[at : at + 24] = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, one, 0, -one, 0, 0))
    path.write_bytes(turned)
    frames, _, facts = read_video(path, evenly(4))
    assert (facts.width, facts.height) == (48, 64)
    assert np.array_equal(frames, np.rot90(lying, -1, axes=(1, 2)))


def test_what_is_not_shown_is_said(tmp_path: Path) -> None:
    with pytest.warns(ProbeWarning, match="audio track, which is not looked at"):
        _, _, facts = read_video(film(tmp_path / "a.mp4", audio=True), evenly(2))
    assert facts.audio
    path = film(tmp_path / "a.webm", codec="libvpx-vp9", frames=60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(ProbeWarning, match="the rest was cut off"):
        _, _, facts = read_video(path, evenly(2))
    assert 0 < facts.frames < 60


@pytest.mark.parametrize("pause", [0, 5])
def test_frames_that_are_not_evenly_spaced_are_told(tmp_path: Path, pause: int) -> None:
    """As phones film in the dark: ten frames in a second, a pause of so many seconds, and ten frames more."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number + 10 * pause * (number >= 10), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, facts = read_video(path, evenly(4))
    assert facts.frames == 20
    told = [str(one.message) for one in caught]
    assert [("not evenly spaced" in one) for one in told] == [True] * bool(pause)


def refused(path: Path, sampling: Any = None) -> str:
    with warnings.catch_warnings(), pytest.raises(ImageError) as error:
        warnings.simplefilter("ignore", ProbeWarning)
        read_video(path, sampling or evenly(4))
    return str(error.value)


def test_a_file_that_is_no_whole_video_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    assert "there is no such file" in refused(path)
    assert "it is a directory" in refused(tmp_path)
    path.write_bytes(b"")
    assert "is empty; copy it again" in refused(path)
    path.write_bytes(np.random.default_rng(0).bytes(4000))
    assert "not a video that can be read" in refused(path)
    path.write_text("#EXTM3U\n/etc/passwd\n")  # a playlist leads to other files
    assert "not a video that can be read" in refused(path)
    begins_with_its_index = film(tmp_path / "b.mp4", frames=80, options={"movflags": "faststart"})
    data = begins_with_its_index.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    assert "says that it has 80 frames" in refused(path)
    ends_with_it = film(tmp_path / "c.mp4", frames=80).read_bytes()
    path.write_bytes(ends_with_it[: len(ends_with_it) // 2])
    assert "cut off" in refused(path)
    flipped = bytearray(ends_with_it)
    for place in range(2000, len(flipped) - 3000, 97):
        flipped[place] ^= 0xFF
    path.write_bytes(flipped)
    assert "damaged" in refused(path)
    assert "only audio" in refused(film(tmp_path / "d.mp4", frames=0, audio=True))


def test_more_than_a_trace_keeps_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "a.mp4", frames=30)
    monkeypatch.setattr("lvlm_probe.trace.video_files.MOST_PIXELS", 12 * 64 * 48)
    said = refused(path, evenly(20))
    assert "20 frames of 64 x 48" in said
    assert "ask for 12 or fewer" in said
    assert len(read_video(path, evenly(12))[0]) == 12


def test_a_rule_that_asks_for_what_is_not_there_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", frames=5)
    for wanted in ([], [5], [-1]):
        assert "it has 5" in refused(path, lambda _, wanted=wanted: wanted)


def test_videos_are_known_by_their_names() -> None:
    assert is_video_name("clip.MP4")
    assert is_video_name(Path("a/b.webm"))
    assert not is_video_name("map.gif")  # an image where images are asked for
    assert not is_video_name(b"clip.mp4")


def test_a_heatmap_is_saved_as_a_film(tmp_path: Path) -> None:
    toy = ToyClip(tube_weights(8, 8, slice(4, 6), slice(0, 3), slice(5, 8)))
    heat = probe.video.explain(toy, method="input_gradient", size=8, progress=False)
    path = heat.save(tmp_path / "map.mp4")
    frames, _, facts = read_video(path, lambda facts: range(facts.frames))
    assert (facts.frames, facts.fps) == (8, 2.0)
    with av.open(str(path)) as container:
        assert "input_gradient" in container.metadata["comment"]
    plain = [np.asarray(frame.resize((480, 480)), float) for frame in toy.trace.images]
    changed = [float(np.abs(one - other)[:, 240:].mean()) for one, other in zip(frames, plain, strict=True)]
    assert set(np.argsort(changed)[-2:].tolist()) == {4, 5}
