"""``lvlm-probe study resume``: the same as ``run``."""

from lvlm_probe.cli.study.run import run as resume

__all__ = ["HELP", "resume"]

HELP = """The same as run: go on where a study was stopped.

Example:  lvlm-probe study resume study.yaml
"""
