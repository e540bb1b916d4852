"""The tables and figures of a study, and the documents they are written to."""

from lvlm_probe.study.tables.table import FORMS, Cell, Table

__all__ = ["FORMS", "Cell", "Table"]
