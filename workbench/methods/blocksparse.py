"""Block sparsity: whole tiles are kept by their norm, so that the index is one for each tile (arXiv 1711.02782)."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from workbench.checks import check_whole
from workbench.methods.base import check_rows
from workbench.methods.pruning import Pruning, check_keep
from workbench.packed import tile_encodings


@dataclass(frozen=True)
class BlockSparse(Pruning):
    """The tiles of largest Frobenius norm. keep: kept fraction; round(keep * tiles), at least 1. block: side of a tile.

    Rows that `block` does not divide are refused. Columns that it does not divide are padded with zeros in the last tile;
    the padding is stored and counted.
    """

    keep: float
    block: int

    def __post_init__(self):
        check_keep(self)
        check_whole("BlockSparse", "block", self.block, 2)

    @classmethod
    def ladder(cls, shapes):
        """Tiles of 4 x 4, or of 2 x 2 where 4 does not divide the rows of every block; one tile of the largest block less
        from member to member."""
        block = next((k for k in (4, 2) if all(rows % k == 0 for rows, _ in shapes)), None)
        tiles = max(rows // block * -(-columns // block) for rows, columns in shapes) if block else 0
        return [cls(count / tiles, block) for count in range(tiles, 0, -1)]

    def check(self, w):
        super().check(w)
        check_rows(self, w, self.block)

    def support(self, w):
        self.check(w)
        rows, columns = w.shape
        # In float64, so that a model chooses the same support in training as when its float64 copy is packed.
        tiles = functional.pad(w.detach().double(), (0, -columns % self.block))
        tiles = tiles.view(rows // self.block, self.block, -1, self.block)  # (row tile, row, column tile, column)
        energy = tiles.square().sum((1, 3)).flatten()
        best = torch.topk(energy, max(1, round(self.keep * energy.numel())), sorted=False).indices
        kept = torch.zeros_like(energy, dtype=torch.bool).index_fill_(0, best, True).view(tiles.shape[0], 1, -1, 1)
        return kept.expand(tiles.shape).reshape(rows, -1)[:, :columns].flatten().nonzero().squeeze(1)

    def encodings(self, shape):
        return tile_encodings(self.block)
