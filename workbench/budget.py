"""Plans that fill a budget of bits: of a family of methods the member that stores the most within a compression ratio."""

import math
import numbers
from bisect import bisect_left, bisect_right
from collections.abc import Callable

import torch

from workbench.constrain import bake, pack
from workbench.fixedpoint import QFormat
from workbench.gates import blocks, dense_weights, weights
from workbench.methods import Method, check_family
from workbench.packed import PackedModel
from workbench.plan import Plan, Unpackable, uniform

WIDTHS = range(2, 9)  # bits of a weight that a uniform plan may take
ROUNDING = 1e-12  # share by which a limit that was computed from a result may miss it
FILLED = 0.95  # a width serves when its plan takes this share of the budget


class OutOfReach(ValueError):
    """No plan of the asked kind is as small as the target demands and can be packed."""


def check_target(target_cr_disk: float) -> None:
    if isinstance(target_cr_disk, bool) or not isinstance(target_cr_disk, numbers.Real) or not target_cr_disk >= 1:
        raise ValueError(f"a target cr_disk must be a number of at least 1, got {target_cr_disk!r}")


def check_bits(bits: int) -> None:
    if isinstance(bits, bool) or bits not in WIDTHS:
        raise ValueError(f"a uniform plan needs {WIDTHS[0]} to {WIDTHS[-1]} bits, got {bits!r}")


def full_bits(w: torch.Tensor, method: Method, bits: int) -> int:
    """Bits on disk of the (out, in) block with every kept weight non-zero: retraining cannot make it larger."""
    return full_block(w, method, bits).storage_bits


def full_block(w: torch.Tensor, method: Method, bits: int):
    """The (out, in) block packed with every kept weight non-zero."""
    module = method.constrain(w, None)
    ones = module(torch.ones_like(module.right_inverse(w)))
    return method.pack(ones, QFormat(bits, 0))


def keeps_a_share(method: Method) -> bool:
    """Whether its field `keep` is the share of a block's weights that stay; a whole number there counts something else."""
    return isinstance(getattr(method, "keep", None), float)


def kept_share(weights: list[torch.Tensor], method: Method) -> float:
    """Share of the blocks' weights that a method keeps; of one without such a field `keep` the share that it stores."""
    if keeps_a_share(method):
        return method.keep
    stored = sum(method.constrain(w, None).right_inverse(w).numel() for w in weights)
    return stored / sum(w.numel() for w in weights)


def strongest_member(members: list[Method], weights: list[torch.Tensor], share: float) -> Method | None:
    """The last of a ladder that still keeps that share of the blocks' weights; None where none does."""
    found = bisect_right(members, -share, key=lambda member: -kept_share(weights, member))  # shares fall along the ladder
    return members[found - 1] if found else None


def ladder(weights: list[torch.Tensor], family: type[Method]) -> list[Method]:
    """The members of a family that these blocks can take, from the most stored values to the fewest; OutOfReach where there is
    none, as of a circulant family where no power of two divides the rows of every block."""
    if not (members := family.ladder([tuple(w.shape) for w in weights])):
        raise OutOfReach(f"no {family.__name__} of its ladder takes blocks of {_shapes(weights)}")
    return members


def _shapes(weights):
    return ", ".join(dict.fromkeys(f"{w.shape[0]}x{w.shape[1]}" for w in weights))


def largest_member(weights: list[torch.Tensor], family: type[Method], bits: int, budget_bits: float) -> tuple[Method, int]:
    """The member of the family's ladder of most stored values that fits all these blocks into budget_bits, and the bits
    that they take. OutOfReach when none fits."""
    members = ladder(weights, family)

    def size(method):
        return sum(full_bits(w, method, bits) for w in weights)

    first = bisect_left(members, -budget_bits, key=lambda method: -size(method))  # sizes fall along the ladder
    if first == len(members):
        raise OutOfReach(f"no {family.__name__} of {bits} bits on blocks of {_shapes(weights)} fits {budget_bits:.0f} bits")
    return members[first], size(members[first])


def uniform_plan(model: torch.nn.Module, family: type[Method], bits: int, target_cr_disk: float, signals) -> Plan:
    """One method and one weight width for every block: the largest plan of the family that meets target_cr_disk.

    Of the widths from 2 to 8 bits it is the one nearest to `bits` (of two the wider) whose largest plan takes at least
    95 % of the target's bits; where no width does, the one that takes most, of equals the nearest to `bits`. So families
    that come in coarse steps, as circulant blocks do, are compared at their fairest. Sizes are taken with every kept
    weight non-zero, so that retraining cannot push the ratio under the target; but a schedule that chooses the kept weights
    later can, by a fraction of a percent, since the padding of relative indices depends on where they lie. A width whose plan
    `pack` refuses is passed over. OutOfReach when no width meets it.
    """
    def packed(plan):
        pack_anew(model, plan)
        return plan

    return first_uniform(model, family, bits, target_cr_disk, signals, packed)


def bits_within(target_cr_disk: float, known: dict) -> float:
    """Bits that blocks (name -> Block) may take at the ratio.

    A ratio that was computed from a size leads back to that size, whatever the two divisions rounded.
    """
    bits = 32 * dense_weights(known) / target_cr_disk
    return round(bits) if math.isclose(bits, round(bits), rel_tol=ROUNDING) else bits


def first_uniform(model: torch.nn.Module, family: type[Method], bits: int, target_cr_disk: float, signals, make: Callable):
    """make(plan) of the first width, in the order of uniform_plan, for whose plan that is not OutOfReach."""
    check_family("a uniform plan", family)
    check_target(target_cr_disk)
    check_bits(bits)
    ws = list(weights(model).values())
    budget_bits = bits_within(target_cr_disk, blocks(model))
    ladder(ws, family)  # if it is empty that is the reason, whatever the width
    refusals = []
    for method, width in _by_preference(ws, family, bits, budget_bits):
        try:
            return make(uniform(model, method, width, signals))
        except OutOfReach as error:
            refusals.append(str(error))
    none = f"no uniform {family.__name__} of {WIDTHS[0]} to {WIDTHS[-1]} bits meets cr_disk {target_cr_disk}"
    raise OutOfReach(": ".join([none, *refusals[:1]]))


def _by_preference(weights, family, bits, budget_bits):
    """(method, width) of every width that meets the budget: those that fill it, then by what they take."""
    others = []
    for width in sorted(WIDTHS, key=lambda width: (abs(width - bits), -width)):
        try:
            method, size = largest_member(weights, family, width, budget_bits)
        except OutOfReach:
            continue  # a narrower one may fit
        if size >= FILLED * budget_bits:
            yield method, width
        else:
            others.append((size, method, width))
    yield from (choice for _, *choice in sorted(others, key=lambda other: -other[0]))


def pack_anew(model: torch.nn.Module, plan: Plan) -> PackedModel:
    """pack_within_reach for who plans: a model that is constrained by now is projected onto the plan as any other."""
    return pack_within_reach(bake(model), plan)


def pack_within_reach(model: torch.nn.Module, plan: Plan, original: torch.nn.Module | None = None) -> PackedModel:
    """`pack`; what is Unpackable, for example by sums that no multiplier takes, is OutOfReach."""
    try:
        return pack(model, plan, original)
    except Unpackable as error:
        raise OutOfReach(f"the plan cannot be packed: {error}") from error
