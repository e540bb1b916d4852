"""Where a picture lies in the square it was padded to, counted in cells of a grid over that square."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Box", "content_box", "image_token_count", "valid_cells"]


@dataclass(frozen=True)
class Box:
    """Rows ``[top, bottom)`` and columns ``[left, right)`` of a grid."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    @property
    def cols(self) -> int:
        return self.right - self.left


def content_box(side: int, size: tuple[int, int]) -> Box:
    """The part of a ``side × side`` grid that a picture fills once it is padded to a square.

    Args:
        size: ``(width, height)`` of the picture, pixels.

    Returns:
        With W > H: p = ⌊(side − int(H · side / W)) / 2⌋ rows are left out above and below, otherwise columns alike. As
        the published model counts, whose arithmetic rounds to floating point in this order.
    """
    width, height = int(size[0]), int(size[1])
    if width <= 0 or height <= 0:
        raise ValueError(f"a picture has a width and a height of at least 1; got {width} x {height}")
    if width > height:
        margin = (side - int(height * (side / width))) // 2
        return Box(margin, side - margin, 0, side)
    margin = (side - int(width * (side / height))) // 2
    return Box(0, side, margin, side - margin)


def image_token_count(side: int, size: tuple[int, int]) -> int:
    """Tokens of a picture in the prompt: its cells, and a newline token at the end of every row."""
    box = content_box(side, size)
    return box.rows * (box.cols + 1)


def valid_cells(side: int, size: tuple[int, int]) -> torch.Tensor:
    """Which cells of the grid the picture fills, ``(side, side)`` bool."""
    box = content_box(side, size)
    cells = torch.zeros(side, side, dtype=torch.bool)
    cells[box.top : box.bottom, box.left : box.right] = True
    return cells
