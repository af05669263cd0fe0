"""Sparse methods: single weights are kept by magnitude, the rest is zero (Han 2015, arXiv 1506.02626)."""

from dataclasses import dataclass

import torch
from torch import nn

from workbench.methods.base import check_matrix, fake_quantise, to_integers
from workbench.packed import PackedSparse


@dataclass(frozen=True)
class TopK:
    """The largest weights of the block in magnitude. keep: kept fraction in (0, 1]; round(keep * size) weights, at least 1."""

    keep: float

    def __post_init__(self):
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise ValueError(f"TopK needs keep in (0, 1], got {self.keep!r}")

    def support(self, w) -> torch.Tensor:
        """(count,) sorted positions of the kept weights in row-major order."""
        check_matrix(self, w)
        count = max(1, round(self.keep * w.numel()))
        return torch.topk(w.detach().abs().flatten(), count, sorted=False).indices.sort().values

    def project(self, w):
        support = self.support(w)
        return _scatter(w.flatten()[support], support, w.shape)

    def constrain(self, w, fmt):
        return _SparseWeights(self.support(w), w.shape, fmt)

    def pack(self, w, fmt):
        check_matrix(self, w)
        return PackedSparse.from_dense(to_integers(w, fmt), fmt)


def _scatter(values, support, shape):
    return values.new_zeros(shape[0] * shape[1]).index_copy(0, support, values).view(shape)  # (out, in)


class _SparseWeights(nn.Module):
    """Stored: the (count,) kept weights; their positions are fixed."""

    def __init__(self, support, shape, fmt):
        super().__init__()
        self.shape, self.fmt = tuple(shape), fmt
        self.register_buffer("support", support)

    def right_inverse(self, w):
        return w.flatten()[self.support]

    def forward(self, stored):
        return _scatter(fake_quantise(stored, self.fmt), self.support, self.shape)
