"""Balanced sparsity: the same number of non-zeros in every row, or in every bank of every row, the largest in magnitude.

Processors that each take a row, or each a bank, then finish together.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from workbench.checks import check_whole
from workbench.methods.pruning import Pruning, check_keep
from workbench.packed import Banks


@dataclass(frozen=True)
class RowBalanced(Pruning):
    """Equally many weights in every row (BRDS, arXiv 2101.02667). keep: kept fraction; round(keep * columns), at least 1."""

    keep: float

    def __post_init__(self):
        check_keep(self)

    @classmethod
    def ladder(cls, shapes):
        """One weight of the widest block's rows less from member to member."""
        columns = max(columns for _, columns in shapes)
        return [cls(count / columns) for count in range(columns, 0, -1)]

    def support(self, w):
        self.check(w)
        return _balanced_support(w, 1, _count(self.keep, w.shape[1], 1))

    def encodings(self, shape):
        return (Banks(1, _count(self.keep, shape[1], 1)),)


@dataclass(frozen=True)
class BankBalanced(Pruning):
    """Equally many weights in every bank of every row (BBS, FPGA'19, DOI 10.1145/3289602.3293898).

    keep: kept fraction; banks: banks of a row, at most its columns. A bank has ceil(columns / banks) places, of which
    round(keep * places) are kept, at least 1. BBS cuts a row into contiguous pieces; here column j belongs to bank
    j % banks, the same up to the order of the columns, because the array deals columns to its PE columns in that way: equal
    work for each, if their number divides `banks`. Where `banks` does not divide the columns, the last banks have one
    column less; one that has less columns than it may keep keeps them all, and its spare word is stored and counted.
    """

    keep: float
    banks: int

    def __post_init__(self):
        check_keep(self)
        check_whole("BankBalanced", "number of banks", self.banks, 1)

    @classmethod
    def ladder(cls, shapes):
        """Most banks first (a power of two up to 16, at most the columns of every block), one weight of a bank less from
        member to member; when each bank holds one, half the banks, and so on."""
        narrowest, widest = (pick(columns for _, columns in shapes) for pick in (min, max))
        halvings = [banks for banks in (16, 8, 4, 2, 1) if banks <= narrowest]
        places = [-(-widest // banks) for banks in halvings]
        members = [cls(count / places[0], halvings[0]) for count in range(places[0], 1, -1)]
        return members + [cls(1 / size, banks) for size, banks in zip(places, halvings, strict=True)]

    def check(self, w):
        super().check(w)
        if w.shape[1] < self.banks:
            raise ValueError(f"{self} needs at least {self.banks} columns, got a {w.shape[0]}x{w.shape[1]} block")

    def support(self, w):
        self.check(w)
        return _balanced_support(w, self.banks, _count(self.keep, w.shape[1], self.banks))

    def encodings(self, shape):
        return (Banks(self.banks, _count(self.keep, shape[1], self.banks)),)


def _count(keep, columns, banks):
    return max(1, round(keep * -(-columns // banks)))


def _balanced_support(w, banks, count):
    """(n,) sorted positions of the `count` largest weights in each bank of each row."""
    rows, columns = w.shape
    # Padding is below every magnitude, so that it is kept only where a bank runs out of columns.
    magnitude = functional.pad(w.detach().abs(), (0, -columns % banks), value=-1).view(rows, -1, banks)
    places = torch.topk(magnitude, count, dim=1, sorted=False).indices  # (rows, count, banks)
    kept = torch.zeros_like(magnitude, dtype=torch.bool).scatter_(1, places, True)
    return kept.view(rows, -1)[:, :columns].flatten().nonzero().squeeze(1)
