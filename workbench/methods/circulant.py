"""Block-circulant matrices (C-LSTM, arXiv 1803.06305; CirCNN, arXiv 1708.08917): one vector per k x k tile.

W[i, j] = v[i // k, j // k, (i - j) % k], the convention of scipy.linalg.circulant. Columns that k does not divide are
padded in the last tile: means run over real entries, the padding is stored; rows that k does not divide are refused.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from workbench.checks import check_whole, plain_numbers
from workbench.methods.base import check_matrix, check_rows, fake_quantise, powers_of_two, to_integers
from workbench.packed import DATAPATHS, PackedCirculant


@dataclass(frozen=True)
class BlockCirculant:
    """One vector for each k x k tile, whose rows are its rotations (C-LSTM, arXiv 1803.06305).

    block: tile size k >= 2. datapath: how engine and array multiply; "time" is plain multiply-accumulates, "fft" products in
    the frequency domain, of blocks that are powers of two; their roundings differ, so the weights may be trained with either.
    """

    block: int
    datapath: str = "time"

    def __post_init__(self):
        plain_numbers(self)
        check_whole("BlockCirculant", "block", self.block, 2)
        if self.datapath not in DATAPATHS:
            raise ValueError(f"BlockCirculant has the datapaths {', '.join(DATAPATHS)}, got {self.datapath!r}")
        if self.datapath == "fft" and self.block & (self.block - 1):
            raise ValueError(f"BlockCirculant needs a block that is a power of two for the fft datapath, got {self.block}")

    @classmethod
    def ladder(cls, shapes):
        """The powers of two that divide the rows of every block."""
        return [cls(block) for block in powers_of_two(shapes)]

    def _check(self, w):
        check_matrix(self, w)
        check_rows(self, w, self.block)

    def vectors(self, w) -> torch.Tensor:
        """(out // k, ceil(in / k), k): means of the tiles' wrapped diagonals over real entries."""
        self._check(w)
        return (_diagonal_sums(w, self.block) / _diagonal_sums(torch.ones_like(w), self.block)).contiguous()

    def project(self, w):
        return _Expand.apply(self.vectors(w), w.shape[1])

    def constrain(self, w, fmt):
        self._check(w)
        return _CirculantWeights(self, w.shape[1], fmt)

    def pack(self, w, fmt):
        self._check(w)
        vectors = to_integers(self.vectors(w.double()), fmt)
        return PackedCirculant(tuple(w.shape), fmt, self.block, vectors, self.datapath)


def _diagonal_sums(w, k):
    """(out, in) -> (out // k, ceil(in / k), k): sums over the wrapped diagonals of each tile."""
    w = functional.pad(w, (0, -w.shape[1] % k))
    tiles = w.view(w.shape[0] // k, k, w.shape[1] // k, k)  # (row tile, i, column tile, j)
    row = torch.arange(k, device=w.device)
    column = (row - row[:, None]) % k  # (r, i) -> the column j of row i on diagonal r
    # Picking (i, j) pairs moves the two picked axes to the front: (r, i, row tile, column tile).
    return tiles[:, row.expand(k, k), :, column].sum(1).permute(1, 2, 0)


class _Expand(torch.autograd.Function):
    """vectors (out // k, in tiles, k) -> (out, in). Written out because the gradient of plain indexing is far slower."""

    @staticmethod
    def forward(ctx, vectors, columns):
        ctx.k = k = vectors.shape[2]
        row = torch.arange(k, device=vectors.device)
        tiles = vectors[:, :, (row[:, None] - row) % k]  # (row tile, column tile, i, j)
        return tiles.permute(0, 2, 1, 3).reshape(vectors.shape[0] * k, -1)[:, :columns].contiguous()

    @staticmethod
    def backward(ctx, grad):
        return _diagonal_sums(grad, ctx.k), None


class _CirculantWeights(nn.Module):
    """Stored: the (out // k, ceil(in / k), k) vectors, k times fewer parameters than the block."""

    def __init__(self, method, columns, fmt):
        super().__init__()
        self.method, self.columns, self.fmt = method, columns, fmt

    def right_inverse(self, w):
        return self.method.vectors(w)

    def forward(self, stored):
        return _Expand.apply(fake_quantise(stored, self.fmt), self.columns)
