"""Data sets of questions about images: the registry, and a reader for each published data set and for own files."""

from lvlm_probe.study.datasets.registry import Reader, Sample, open_dataset, reader_named, readers, register_dataset

__all__ = ["Reader", "Sample", "open_dataset", "reader_named", "readers", "register_dataset"]
