"""Structured sparsity without an index a weight, in the manner of Wang S. 2019 (DOI 10.1109/ACCESS.2019.2917312).

That work keeps 1/8 of the weights with no load imbalance and no irregular access; its mask is not published. The pattern
here is chosen for the same ends: permuted diagonals (PermDNN, arXiv 2004.10936) over strided columns. The array maps it
like any sparse block so far, a local column in each of its words included.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from workbench.checks import check_whole, plain_numbers
from workbench.methods.base import check_rows, powers_of_two
from workbench.methods.pruning import Pruning
from workbench.packed import Diagonals


@dataclass(frozen=True)
class Structured(Pruning):
    """One weight of `period` is kept: of each tile the wrapped diagonal of most energy.

    A tile is `period` rows by the columns s, s + stride, s + 2 * stride and so on, stride = ceil(columns / period). In its
    row i the column number (i + offset) % period is kept, with one offset a tile, stored and counted: log2(period) bits for
    `period` weights. So every column has equally many weights and every row one in each class s of columns (at most one
    where `period` does not divide the columns). An array that deals columns in turn to a number of PE columns that divides
    `stride` therefore gives every PE equally many weights of every row, and their addresses follow from a counter.
    Rows that `period` does not divide are refused.
    """

    period: int

    def __post_init__(self):
        plain_numbers(self)
        check_whole("Structured", "period", self.period, 2)

    @classmethod
    def ladder(cls, shapes):
        """The powers of two that divide the rows of every block."""
        return [cls(period) for period in powers_of_two(shapes)]

    def check(self, w):
        super().check(w)
        check_rows(self, w, self.period)

    def support(self, w):
        self.check(w)
        (rows, columns), period = w.shape, self.period
        # In float64, so that a model chooses the same support in training as when its float64 copy is packed.
        tiles = functional.pad(w.detach().double(), (0, -columns % period)).square()
        tiles = tiles.view(rows // period, period, period, -1)  # (group of rows, row, column within the tile, tile)
        energy = sum(tiles[:, i].roll(-i, 1) for i in range(period))  # (group, offset, tile)
        row = torch.arange(period, device=w.device)[:, None, None]
        # max finds the first of the largest as argmax does, several times as fast across a dimension that is not the last.
        column = (row + energy.max(1).indices) % period  # (row, group, tile)
        kept = torch.zeros_like(tiles, dtype=torch.bool).scatter_(2, column.transpose(0, 1)[:, :, None], True)
        return kept.view(rows, -1)[:, :columns].flatten().nonzero().squeeze(1)

    def encodings(self, shape):
        return (Diagonals(self.period),)
