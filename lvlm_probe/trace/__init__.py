"""Traces on disk: one immutable file per ``generate()`` call, read lazily, without the model and without torch.

* :func:`write` stores a capture; :func:`open_trace` opens one, :func:`open_rows` all of a file, :func:`open_store` a
  directory of them
* :class:`Trace` reads a file when it is asked for something, and holds it open for no longer than that, so thousands
  of traces can be at hand, survive a fork, and be pickled
* ``open_store(...).find(...)`` lists traces by what their headers say, as :class:`TraceSummary`
"""

from lvlm_probe.trace.index import TraceSummary
from lvlm_probe.trace.parts import AttentionRows
from lvlm_probe.trace.reader import Trace, open_rows, open_trace
from lvlm_probe.trace.records import Layout
from lvlm_probe.trace.store import TraceStore, open_store
from lvlm_probe.trace.writer import write

__all__ = [
    "AttentionRows",
    "Layout",
    "Trace",
    "TraceStore",
    "TraceSummary",
    "open_rows",
    "open_store",
    "open_trace",
    "write",
]
