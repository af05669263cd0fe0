"""What a compression method is, and what all of them share: the protocol and the straight-through number format."""

import math
from typing import Protocol, Self

import torch

from workbench.fixedpoint import QFormat
from workbench.packed import PackedCirculant, PackedDense, PackedLowRank, PackedSparse


class Method(Protocol):
    """A set of matrices that a block is constrained to. Frozen dataclass: its fields are its parameters and its JSON."""

    @classmethod
    def ladder(cls, shapes: list[tuple[int, int]]) -> list[Self]:
        """The members usable on blocks of all these (out, in) shapes, from the most stored values to the fewest.

        Empty where there is none. No member takes more bits than the one before it, at any width.
        """

    def project(self, w: torch.Tensor) -> torch.Tensor:
        """(out, in) -> the nearest member of the set in the Frobenius norm."""

    def constrain(self, w: torch.Tensor, fmt: QFormat | None) -> torch.nn.Module:
        """A module that trains inside the set: right_inverse(w) -> stored values, forward(stored) -> (out, in).

        Stored values pass through fmt with a straight-through gradient; the support is chosen from w and then fixed.
        """

    def pack(self, w: torch.Tensor, fmt: QFormat) -> PackedDense | PackedSparse | PackedCirculant | PackedLowRank:
        """A member of the set -> the integers that are stored."""


class _FakeQuantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, fmt):
        t = w * 2.0**fmt.frac
        ctx.save_for_backward((t >= fmt.min - 0.5) & (t < fmt.max + 0.5))
        floor = t.floor()
        return (floor + (t - floor >= 0.5)).clamp(fmt.min, fmt.max) * 2.0**-fmt.frac

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None


def fake_quantise(w: torch.Tensor, fmt: QFormat | None) -> torch.Tensor:
    """Values of w on the grid of fmt (half up, saturating; equal to fmt.quantise bit for bit, of float32 up to 25 bits, more
    than a float32 holds), gradient straight through inside the range and zero where saturated (Bengio 2013, arXiv 1308.3432).
    fmt None leaves w as it is."""
    return w if fmt is None else _FakeQuantise.apply(w, fmt)


def check_matrix(who, w: torch.Tensor) -> None:
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"{who} needs an (out, in) matrix with rows and columns, got shape {tuple(w.shape)}")
    if not torch.isfinite(w).all():
        raise ValueError(f"{who} needs finite weights, got {int((~torch.isfinite(w)).sum())} that are not")


def check_rows(who, w, divisor: int) -> None:
    if w.shape[0] % divisor:
        raise ValueError(f"{who} needs rows divisible by {divisor}, got a {w.shape[0]}x{w.shape[1]} block")


def powers_of_two(shapes) -> list[int]:
    """The powers of two from 2 on that divide the rows of every (out, in) shape."""
    rows = math.gcd(*(rows for rows, _ in shapes))
    return [1 << n for n in range(1, rows.bit_length()) if rows % (1 << n) == 0]


def to_integers(w: torch.Tensor, fmt: QFormat):
    """Stored float values -> int64 array of fmt."""
    return fmt.quantise(w.detach().cpu().double().numpy())
