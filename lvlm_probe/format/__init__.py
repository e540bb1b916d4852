"""The file format: records in memory, the schema on disk, and the checks between the two. ``SPEC.md`` is the prose.

* :mod:`~lvlm_probe.format.records`: what the recorder fills
* :mod:`~lvlm_probe.format.seal`: the head of a file, and the one way files are written
* :mod:`~lvlm_probe.format.encoding`: arrays, tensors, text and JSON as HDF5 members
* :mod:`~lvlm_probe.format.reading`: reading files that nobody vouches for
* :mod:`~lvlm_probe.format.schema`: what a trace file contains
* :mod:`~lvlm_probe.format.arrays`: files of named arrays, for explanations
"""

from lvlm_probe.format.arrays import read_arrays, write_arrays, writer_name
from lvlm_probe.format.reading import SealedFile, open_sealed
from lvlm_probe.format.records import JSON, Capture, ImageRecord, PointRecord, RowCapture
from lvlm_probe.format.schema import FORMAT, FORMAT_VERSION, validate, validate_row

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "JSON",
    "Capture",
    "ImageRecord",
    "PointRecord",
    "RowCapture",
    "SealedFile",
    "open_sealed",
    "read_arrays",
    "validate",
    "validate_row",
    "write_arrays",
    "writer_name",
]
