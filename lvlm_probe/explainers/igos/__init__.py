"""iGOS and iGOS++: masks found by integrated-gradient descent."""

from lvlm_probe.explainers.igos.descent import PRESETS, IgosSettings, igos, igos_plus, nesterov, path_masks

__all__ = ["PRESETS", "IgosSettings", "igos", "igos_plus", "nesterov", "path_masks"]
