"""Studies: data sets of questions about images, models × data sets × methods, and the tables made of them.

::

    from lvlm_probe import study

    for sample in study.open_dataset("mmvp", "data/MMVP", open_ended=True):
        sample.id, sample.question, sample.image, sample.answer

Importing this package imports neither torch nor the ``datasets`` library.
"""

from __future__ import annotations

from lvlm_probe.study.datasets.registry import Sample, open_dataset, readers, register_dataset

__all__ = ["Sample", "open_dataset", "readers", "register_dataset"]
