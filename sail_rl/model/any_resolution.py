"""AnyRes: a picture at its native size instead of tiles.

A cell, the square of pixels that becomes one token, takes the place of a tile, and the model is told how many rows and
columns of cells each picture has.
"""

import numpy as np

CELL = 28  # pixels: 2 x 2 patches of 14


def native_grid(height: int, width: int, largest_side: int) -> tuple[int, int]:
    """Rows and columns of cells: each side rounded to whole cells, the longer one no longer than `largest_side`."""
    scale, most = min(1.0, largest_side / max(height, width)), largest_side // CELL
    rows, columns = (min(max(round(side * scale / CELL), 1), most) for side in (height, width))
    return rows, columns


def cut_cells(picture_CHW: np.ndarray) -> np.ndarray:
    """The cells of a picture of whole cells, row by row: [cells, C, CELL, CELL]."""
    colours, height, width = picture_CHW.shape
    blocks = picture_CHW.reshape(colours, height // CELL, CELL, width // CELL, CELL)
    return blocks.transpose(1, 3, 0, 2, 4).reshape(-1, colours, CELL, CELL)
