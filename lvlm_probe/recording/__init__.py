"""Recording: ``attach()`` watches the user's ``generate()`` calls and writes what they did to trace files."""

from lvlm_probe.recording.probe import Probe, Recording, attach

__all__ = ["Probe", "Recording", "attach"]
