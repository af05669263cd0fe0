"""Low-rank matrices: the product of two thin factors (truncated SVD; Eckart and Young 1936, DOI 10.1007/BF02288367)."""

from dataclasses import dataclass

import torch
from torch import nn

from workbench.checks import check_whole, plain_numbers
from workbench.methods.base import check_matrix, fake_quantise, to_integers
from workbench.packed import PackedLowRank


@dataclass(frozen=True)
class LowRank:
    """Matrices U V of at most this rank: U (out, rank), V (rank, in). A block of fewer rows or columns takes as many.

    Stored, and trained, are the factors, as one (out + in, rank) matrix: U above V transposed. Both have the block's number
    format, so each singular value is shared out such that its column of U and its row of V get entries of equal mean square.
    AdamW moves every entry of both by about its learning rate, and their product the further the higher the rank: a high one
    may need a smaller rate than the dense matrix.
    A product does not give back the factors that it was made of. Who has them gives them as `stored`; they are used where
    their product is w.
    """

    rank: int
    factors = 2  # stored values in a product: its fraction bits are as many times theirs

    def __post_init__(self):
        plain_numbers(self)
        check_whole("LowRank", "rank", self.rank, 1)

    @classmethod
    def ladder(cls, shapes):
        """One rank less from member to member."""
        return [cls(rank) for rank in range(max(min(shape) for shape in shapes), 0, -1)]

    def decompose(self, w) -> torch.Tensor:
        """(out + in, rank) factors of the nearest matrix of that rank. In float64, whatever w is; signs such that in each
        column of U the entry of largest magnitude is positive."""
        check_matrix(self, w)
        u, s, vt = torch.linalg.svd(w.detach().double(), full_matrices=False)
        rank, balance = min(self.rank, len(s)), (w.shape[0] / w.shape[1]) ** 0.25
        u, v = u[:, :rank], vt[:rank].T
        signed = s[:rank].sqrt() * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        return torch.cat([u * (signed * balance), v * (signed / balance)]).to(w.dtype)

    def project(self, w):
        return _product(self.decompose(w.double()), w.shape[0]).to(w.dtype)

    def constrain(self, w, fmt, stored=None):
        check_matrix(self, w)
        return _LowRankWeights(self, w.shape[0], fmt, stored)

    def pack(self, w, fmt, stored=None):
        check_matrix(self, w)
        factors = to_integers(self._factors(w, fmt, stored), fmt)
        return PackedLowRank(fmt, factors[: w.shape[0]], factors[w.shape[0] :].T)

    def _factors(self, w, fmt, stored):
        """`stored` where its product is w, as far as the grid of the products of fmt and its own precision tell (w was
        rounded to that, in bfloat16 coarser than the grid); else a decomposition."""
        rank = min(self.rank, *w.shape)
        if stored is not None and fmt is not None and stored.shape == (sum(w.shape), rank):
            alike = max(2.0 ** -(self.factors * fmt.frac + 1), torch.finfo(stored.dtype).eps * w.abs().max())
            stored = stored.to(w)
            if (_product(stored, w.shape[0]) - w).abs().max() < alike:
                return stored
        return self.decompose(w)


def _product(stored, rows):
    return stored[:rows] @ stored[rows:].T


class _LowRankWeights(nn.Module):
    """Stored: the (out + in, rank) factors."""

    def __init__(self, method, rows, fmt, stored):
        super().__init__()
        self.method, self.rows, self.fmt, self.known = method, rows, fmt, stored

    def right_inverse(self, w):
        return self.method._factors(w, self.fmt, self.known)

    def shown(self, stored):
        """The factors that forward multiplies."""
        return fake_quantise(stored, self.fmt)

    def forward(self, stored):
        return _product(self.shown(stored), self.rows)
