"""Dense: every weight kept, only its number format is chosen."""

from dataclasses import dataclass

from torch import nn

from workbench.methods.base import check_matrix, fake_quantise, to_integers
from workbench.packed import PackedDense


@dataclass(frozen=True)
class Dense:
    """Every weight kept; only its number format is chosen."""

    @classmethod
    def ladder(cls, shapes):
        return [cls()]

    def project(self, w):
        check_matrix(self, w)
        return w.clone()

    def constrain(self, w, fmt):
        check_matrix(self, w)
        return _DenseWeights(fmt)

    def pack(self, w, fmt):
        check_matrix(self, w)
        return PackedDense(to_integers(w, fmt), fmt)


class _DenseWeights(nn.Module):
    def __init__(self, fmt):
        super().__init__()
        self.fmt = fmt

    def right_inverse(self, w):
        return w.clone()

    def forward(self, stored):
        return fake_quantise(stored, self.fmt)
