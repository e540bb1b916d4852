"""Pages of a study: every answer, map and score of it, to look through."""

from lvlm_probe.study.pages.page import MOST, PART, VIEWS, write_page

__all__ = ["MOST", "PART", "VIEWS", "write_page"]
