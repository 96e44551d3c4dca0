"""Where an engine keeps models: each one a row, all of them in one matrix for each dtype.

Belongs here: which column holds what, and moving rows in and out. What is computed on them is `engine.py`'s affair.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aggregation.base import Params
from aggregation.batched import TensorSlice
from node.weights import MAX_MAGNITUDE, all_sane

Tile = dict[torch.dtype, Tensor]
"""Some models, copied out to be worked on: [models, columns] for each dtype."""


class Rows:
    """Models with the names, shapes and dtypes of `params`, whose order the columns have.

    layout: for each dtype the slices of its matrix. Nearly every model has float32 and at most int64, for BatchNorm's
        counters.
    """

    def __init__(self, params: Params, device: torch.device) -> None:
        self.layout: dict[torch.dtype, list[TensorSlice]] = {}
        self._names = list(params)
        widths: dict[torch.dtype, int] = {}
        for name, tensor in params.items():
            offset = widths.get(tensor.dtype, 0)
            self.layout.setdefault(tensor.dtype, []).append(TensorSlice(name, offset, tuple(tensor.shape)))
            widths[tensor.dtype] = offset + tensor.numel()
        self.matrices = {
            dtype: torch.empty(0, width, dtype=dtype, device=device) for dtype, width in widths.items()
        }
        self.num_rows = 0
        self.bytes_per_row = sum(dtype.itemsize * width for dtype, width in widths.items())

    def reserve(self, num_rows: int) -> None:
        """At least so many rows, and at least twice as many where there are too few: growing costs little in all."""
        if num_rows <= self.num_rows:
            return
        capacity = max(num_rows, 2 * self.num_rows)
        for dtype, matrix in self.matrices.items():
            grown = matrix.new_empty(capacity, matrix.shape[1])
            grown[: self.num_rows] = matrix
            self.matrices[dtype] = grown
        self.num_rows = capacity

    # --- one row ----------------------------------------------------------------------------------------
    def params(self, row: int) -> Params:
        """Views of one row: to be read, and not to be kept."""
        return {
            name: tensor[0]
            for name, tensor in self.views(
                {dtype: matrix[row : row + 1] for dtype, matrix in self.matrices.items()}
            ).items()
        }

    def put(self, row: int, params: Mapping[str, Tensor]) -> None:
        for name, view in self.params(row).items():
            view.copy_(params[name])

    def copy(self, source: int, row: int) -> None:
        if source != row:
            for matrix in self.matrices.values():
                matrix[row] = matrix[source]

    # --- many rows --------------------------------------------------------------------------------------
    def gather(self, rows: Tensor) -> Tile:
        """rows: [models] int64, in any order, some of them perhaps twice."""
        return {dtype: matrix.index_select(0, rows) for dtype, matrix in self.matrices.items()}

    def scatter(self, rows: Tensor, tile: Tile) -> None:
        for dtype, matrix in tile.items():
            self.matrices[dtype].index_copy_(0, rows, matrix)

    def export(self, rows: Tensor) -> NDArray[np.uint8]:
        """[models, bytes_per_row], for `import_` of other rows with the same layout: every dtype's columns, as bytes."""
        parts = [matrix.view(torch.uint8) for matrix in self.gather(rows).values()]
        return torch.cat(parts, dim=1).cpu().numpy()

    def import_(self, rows: Tensor, data: NDArray[np.uint8]) -> None:
        start = 0
        for dtype, matrix in self.matrices.items():
            width = dtype.itemsize * matrix.shape[1]
            columns = torch.empty(len(data), matrix.shape[1], dtype=dtype)
            columns.view(torch.uint8).numpy()[:] = data[:, start : start + width]
            matrix.index_copy_(0, rows, columns.to(matrix.device))
            start += width

    def take_back(self, tile: Tile, index: int, row: int) -> None:
        """Put into the tile's model what a row holds."""
        for dtype, matrix in self.matrices.items():
            tile[dtype][index] = matrix[row]

    def views(self, tile: Tile) -> Params:
        """The tile's tensors by name, in the order of the model: [models, *shape], sharing its memory."""
        found = {
            part.name: matrix[:, part.offset : part.offset + math.prod(part.shape)].view(-1, *part.shape)
            if math.prod(part.shape)
            else matrix.new_empty(len(matrix), *part.shape)
            for dtype, matrix in tile.items()
            for part in self.layout[dtype]
        }
        return {name: found[name] for name in self._names}

    def insane(self, tile: Tile) -> dict[int, str]:
        """For each model with a tensor that is not `all_sane`, the first such tensor's name."""
        suspects = {
            int(index)
            for matrix in tile.values()
            if matrix.is_floating_point()
            # A norm within the limit rules out whatever is not, at a tenth of the price of looking for it.
            for index in (~(torch.linalg.vector_norm(matrix, dim=1) <= MAX_MAGNITUDE)).nonzero().flatten()
        }
        views = self.views(tile) if suspects else {}
        names = {
            index: next((name for name, tensor in views.items() if not all_sane(tensor[index])), "")
            for index in sorted(suspects)
        }
        return {index: name for index, name in names.items() if name}
