"""Sealed HDF5 files of named arrays: immutable, checked member by member, and ignorant of models.

* :mod:`~lvlm_probe.storage.seal`: the head of a file, and the one way files are written
* :mod:`~lvlm_probe.storage.encoding`: arrays, tensors, text and JSON as HDF5 members
* :mod:`~lvlm_probe.storage.reading`: reading untrusted files
* :mod:`~lvlm_probe.storage.arrays`: files of named arrays, for explanations
"""

from lvlm_probe.storage.arrays import read_arrays, read_attrs, write_arrays
from lvlm_probe.storage.encoding import JSON
from lvlm_probe.storage.reading import SealedFile, open_sealed

__all__ = ["JSON", "SealedFile", "open_sealed", "read_arrays", "read_attrs", "write_arrays"]
