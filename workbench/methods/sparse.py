"""Sparse methods: single weights are kept by magnitude, the rest is zero (Han 2015, arXiv 1506.02626)."""

from dataclasses import dataclass

import torch

from workbench.methods.pruning import Pruning, check_keep


@dataclass(frozen=True)
class TopK(Pruning):
    """The largest weights of the block in magnitude. keep: kept fraction in (0, 1]; round(keep * size) weights, at least 1."""

    keep: float

    def __post_init__(self):
        check_keep(self)

    @classmethod
    def ladder(cls, shapes):
        """One weight of the largest block less from member to member."""
        size = max(rows * columns for rows, columns in shapes)
        return [cls(count / size) for count in range(size, 0, -1)]

    def support(self, w) -> torch.Tensor:
        """(count,) sorted positions of the kept weights in row-major order."""
        self.check(w)
        count = max(1, round(self.keep * w.numel()))
        largest = torch.topk(w.detach().abs().flatten(), count, sorted=False).indices
        # A mask gives them in order, and for many of them much faster than a sort.
        return torch.zeros(w.numel(), dtype=torch.bool, device=w.device).index_fill_(0, largest, True).nonzero().squeeze(1)
