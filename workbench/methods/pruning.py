"""What methods share that keep some weights of a block and set the others to zero."""

import zlib

from torch import nn

from workbench.checks import plain_numbers
from workbench.methods.base import check_matrix, fake_quantise, to_integers
from workbench.packed import PackedSparse


class Pruning:
    """A method gives support(w), the (count,) sorted positions of the row-major block that it keeps: those of most energy
    that its pattern allows, so that nothing in the set is nearer."""

    def check(self, w) -> None:
        """Refuse a block that the pattern does not fit."""
        check_matrix(self, w)

    def encodings(self, shape) -> tuple:
        """Encodings that fit this pattern, to choose from besides those that fit any block."""
        return ()

    def project(self, w):
        support = self.support(w)
        return _scatter(w.flatten()[support], support, w.shape)

    def constrain(self, w, fmt):
        return _SparseWeights(self.support(w), w.shape, fmt)

    def pack(self, w, fmt):
        self.check(w)
        return PackedSparse.from_dense(to_integers(w, fmt), fmt, *self.encodings(tuple(w.shape)))


def _scatter(values, support, shape):
    return values.new_zeros(shape[0] * shape[1]).index_copy(0, support, values).view(shape)  # (out, in)


class _SparseWeights(nn.Module):
    """Stored: the (count,) kept weights; their positions are fixed."""

    def __init__(self, support, shape, fmt):
        super().__init__()
        self.shape, self.fmt = tuple(shape), fmt
        self.register_buffer("support", support)
        self.chosen = self._digest()

    def _digest(self):
        return zlib.crc32(self.support.cpu().numpy())

    def check_positions(self, block: str) -> None:
        """Refuse positions that are not those that were chosen or loaded."""
        if self._digest() != self.chosen:
            raise ValueError(f"the positions of the weights that block {block} keeps have changed since they were chosen or "
                             "loaded, as in an average over buffers: of a constrained model average the parameters alone "
                             "(use_buffers=False)")

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        given = state_dict.get(name := f"{prefix}support")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if given is not None and (given.is_floating_point() or not (given.diff() > 0).all()):
            error_msgs.append(f"{name} needs rising whole positions, as a constrained model has them, and has others: it may "
                              "come from an average, which is for parameters alone")
        self.chosen = self._digest()

    def right_inverse(self, w):
        return w.flatten()[self.support]

    def forward(self, stored):
        return _scatter(fake_quantise(stored, self.fmt), self.support, self.shape)


def check_keep(method: Pruning) -> None:
    """Refuse a field keep that is no share, and make it a float."""
    plain_numbers(method)
    keep = method.keep
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"{type(method).__name__} needs keep in (0, 1], got {keep!r}")
    object.__setattr__(method, "keep", float(keep))
