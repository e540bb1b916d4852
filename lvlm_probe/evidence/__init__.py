"""Evidence: what a map is asked next. What would the model say without this region?

* ``edit`` asks the model again with a region taken away, or kept alone, and finds the smallest region of a map without
  which the answer is another.
"""

from __future__ import annotations

from lvlm_probe.evidence.editing import Edit, edit

__all__ = ["Edit", "edit"]
