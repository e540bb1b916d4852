"""Recording: ``attach()`` watches the user's ``generate()`` calls and writes what they did to trace files."""

from lvlm_probe.recording.probe import Probe, Recording, attach
from lvlm_probe.recording.stream import Stream

__all__ = ["Probe", "Recording", "Stream", "attach"]
