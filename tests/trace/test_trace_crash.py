from __future__ import annotations

from pathlib import Path

import pytest
from crash_victims import _fault, kill_recorders
from trace_samples import sample_capture

from lvlm_probe.trace import open_store, write


def test_twenty_kills_leave_no_damaged_trace(tmp_path: Path) -> None:
    """Twenty, at moments that the seed chooses; ``benchmarks/crash_trace.py`` kills as many as one likes."""
    toll = kill_recorders(tmp_path, kills=20, seed=0)
    assert toll.damaged == ()
    assert toll.files >= 12, "the victims died too early to prove anything"
    assert toll.explanations >= 5
    # Some kills must have hit a write, or the test says nothing; none may leave more than one unfinished file.
    assert 2 <= toll.parts <= toll.kills
    store = open_store(tmp_path)
    assert len(store.clean(min_age=0)) == toll.parts
    assert not list(tmp_path.rglob("*.part"))
    assert len(open_store(tmp_path)) == toll.traces


@pytest.mark.parametrize("change", ["truncate", "swap"])
def test_the_inspection_would_notice(tmp_path: Path, change: str) -> None:
    from crash_victims import expected_capture

    path = write(expected_capture(3), tmp_path)
    assert _fault(path) is None
    if change == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
        assert "cut short" in (_fault(path) or "")
    else:
        path.unlink()
        assert _fault(write(sample_capture(1, seed=3, tokens=4), tmp_path)) is not None
