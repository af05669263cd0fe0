import json
from dataclasses import dataclass, fields

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.nn.utils import parametrize

from workbench.budget import full_bits
from workbench.fixedpoint import QFormat
from workbench.methods import (
    METHODS,
    BankBalanced,
    BlockCirculant,
    BlockSparse,
    Dense,
    LowRank,
    RowBalanced,
    Structured,
    TopK,
    method_from_json,
    method_from_label,
    method_label,
    method_to_json,
)
from workbench.methods.base import fake_quantise
from workbench.plan import plan_block

# Every method is under contract here: (method, shape), with shapes that a parameter divides and does not divide.
CASES = [
    (Dense(), (6, 5)),
    (TopK(0.3), (6, 5)),
    (TopK(1), (4, 7)),
    (TopK(0.01), (4, 7)),
    (RowBalanced(0.3), (6, 5)),
    (RowBalanced(1), (4, 7)),
    (RowBalanced(0.01), (4, 7)),
    (BankBalanced(0.5, 4), (6, 12)),
    (BankBalanced(0.5, 8), (3, 12)),
    (BankBalanced(1, 4), (4, 7)),
    (BankBalanced(0.7, 4), (4, 9)),
    (BankBalanced(0.5, 3), (4, 10)),
    (BlockSparse(0.3, 2), (6, 5)),
    (BlockSparse(1, 3), (6, 7)),
    (BlockSparse(0.01, 4), (8, 3)),
    (Structured(2), (6, 5)),
    (Structured(3), (6, 7)),
    (Structured(4), (8, 12)),
    (Structured(8), (16, 3)),
    (BlockCirculant(2), (6, 5)),
    (BlockCirculant(3), (6, 6)),
    (BlockCirculant(4), (8, 3)),
    (BlockCirculant(8), (16, 19)),
    (BlockCirculant(4, "fft"), (8, 7)),
    (LowRank(1), (6, 5)),
    (LowRank(2), (8, 3)),
    (LowRank(3), (3, 9)),
    (LowRank(9), (4, 7)),
]
contract = pytest.mark.parametrize(("method", "shape"), CASES, ids=str)


def random_matrix(shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def integers(method, w, fmt):
    """The integers that a packed block shows: each stored value rounded once. Of a low-rank block by another decomposition, the
    eigenvectors of W^T W, each turned so that the largest entry of its column of U is positive."""
    if not isinstance(method, LowRank):
        return fmt.quantise(method.project(w).numpy())
    w = w.numpy().astype(np.float64)
    energy, v = (part[..., ::-1][..., : min(method.rank, *w.shape)] for part in scipy.linalg.eigh(w.T @ w))
    u, root, balance = w @ v, energy**0.25, (w.shape[0] / w.shape[1]) ** 0.25
    sign = np.sign(np.take_along_axis(u, np.abs(u).argmax(0)[None], 0))
    return fmt.quantise(sign * u / root * balance) @ fmt.quantise((sign * v * root / balance).T)


def value_format(method, fmt):
    """The grid of a block's weights, as wide as it takes."""
    return QFormat(32, fmt.frac * (2 if isinstance(method, LowRank) else 1))


def test_the_contract_covers_every_method():
    assert {type(method).__name__ for method, _ in CASES} == set(METHODS)
    assert all(cls.__name__ == name for name, cls in METHODS.items())


@contract
def test_numbers_of_numpy_are_python_s(method, shape):
    """As a loop over np.arange or a column of a table gives them."""
    numbers = {f.name: np.array(getattr(method, f.name))[()] for f in fields(method)}
    made = type(method)(**numbers)
    assert made == method and method_to_json(made) == method_to_json(method)
    assert json.dumps(method_to_json(made)) == json.dumps(method_to_json(method))
    assert method_label(made, exact=True) == method_label(method, exact=True)


@contract
def test_project_is_idempotent_and_leaves_its_input(method, shape):
    w = random_matrix(shape)
    before = w.clone()
    projected = method.project(w)
    assert projected.shape == w.shape and projected.data_ptr() != w.data_ptr()
    torch.testing.assert_close(method.project(projected), projected, rtol=1e-14, atol=1e-14 * isinstance(method, LowRank))
    assert torch.equal(w, before)


@contract
def test_nothing_in_the_set_is_nearer(method, shape):
    w = random_matrix(shape)
    projected = method.project(w)
    distance = (w - projected).norm()
    for seed in range(1, 40):
        # Far and near members of the set, each scaled to its best (the sets are closed under scaling).
        for scale in (10, 1, 0.1, 0.01):
            member = method.project(projected + scale * random_matrix(shape, seed))
            best = member * (w * member).sum() / (member * member).sum()
            assert (w - best).norm() >= distance - 1e-12


@contract
def test_pack_holds_the_quantised_projection(method, shape):
    projected = method.project(random_matrix(shape))
    for fmt in (QFormat(8, 5), QFormat(3, 1), QFormat(16, 12)):  # the narrow one rounds weights to zero and saturates
        packed = method.pack(projected, fmt)
        assert packed.shape == shape and packed.fmt == fmt and packed.frac == value_format(method, fmt).frac
        np.testing.assert_array_equal(packed.dense(), integers(method, projected, fmt))


@contract
def test_json_round_trip(method, shape):
    data = method_to_json(method)
    assert data["name"] == type(method).__name__
    assert method_from_json(data) == method
    assert method_label(method).startswith(data["name"])


@contract
def test_constrained_weights_are_the_quantised_projection(method, shape):
    w, fmt = random_matrix(shape), QFormat(8, 5)
    module = method.constrain(w, fmt)
    expected = value_format(method, fmt).dequantise(integers(method, w, fmt))
    np.testing.assert_array_equal(module(module.right_inverse(w)).numpy(), expected)
    without = method.constrain(w, None)
    torch.testing.assert_close(without(without.right_inverse(w)), method.project(w), rtol=1e-15,
                               atol=1e-14 * isinstance(method, LowRank))


@contract
def test_the_gradient_is_that_of_the_expansion(method, shape):
    w = random_matrix(shape)
    module = method.constrain(w, None)
    stored = module.right_inverse(w).requires_grad_()
    assert torch.autograd.gradcheck(module, stored)


@contract
def test_the_constrained_set_is_trained_in(method, shape):
    """A step of any size on the stored values stays inside the set, and packs to what the module shows."""
    w, fmt = random_matrix(shape), QFormat(8, 5)
    module = method.constrain(w, fmt)
    stored = module.right_inverse(w)
    shown = module(stored + random_matrix(stored.shape, 7))
    torch.testing.assert_close(method.project(shown), shown, rtol=0, atol=1e-14 * isinstance(method, LowRank))
    known = {"stored": module.shown(stored + random_matrix(stored.shape, 7))} if isinstance(method, LowRank) else {}
    packed = method.pack(shown, fmt, **known)
    np.testing.assert_array_equal(packed.dense(), value_format(method, fmt).quantise(shown.numpy()))


@contract
def test_float32_training_shows_the_same_grid(method, shape):
    w, fmt = random_matrix(shape).float(), QFormat(8, 5)
    module = method.constrain(w, fmt)
    shown = module(module.right_inverse(w))
    assert shown.dtype == torch.float32
    known = {"stored": module.shown(module.right_inverse(w))} if isinstance(method, LowRank) else {}
    packed = method.pack(shown, fmt, **known)
    np.testing.assert_array_equal(value_format(method, fmt).dequantise(packed.dense()), shown.double().numpy())


# Not of BlockSparse, whose tiles at the edge hold fewer weights than others.
@pytest.mark.parametrize(("method", "shape"), [case for case in CASES if not isinstance(case[0], BlockSparse)], ids=str)
def test_zero_weights_are_stored_like_any(method, shape):
    """However many there are: padding never takes the place of one."""
    full = random_matrix(shape)
    count = method.constrain(full, None).right_inverse(full).numel()
    for least in (0, 1, 9):  # half of the weights zero, five of six, all
        w = full * (random_matrix(shape, 5) > least)
        assert method.constrain(w, None).right_inverse(w).numel() == count


@contract
@pytest.mark.parametrize("bad", [(8,), (2, 2, 2), (0, 5), (8, 0)], ids=str)
def test_what_is_no_matrix_is_refused(method, shape, bad):
    for call in (method.project, lambda w: method.constrain(w, None), lambda w: method.pack(w, QFormat(8, 5))):
        with pytest.raises(ValueError, match="needs an .out, in. matrix with rows and columns, got shape"):
            call(torch.zeros(bad))


@contract
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(method, shape, bad):
    w = random_matrix(shape)
    w[1, 1] = w[0, 2] = bad
    for call in (method.project, lambda w: method.constrain(w, None), lambda w: method.pack(w, QFormat(8, 5))):
        with pytest.raises(ValueError, match="needs finite weights, got 2 that are not"):
            call(w)


@pytest.mark.parametrize("shapes", [[(16, 12), (16, 16)], [(8, 3)], [(6, 5), (4, 7)], [(5, 3)]], ids=str)
@pytest.mark.parametrize("family", METHODS.values(), ids=lambda cls: cls.__name__)
def test_no_member_of_a_ladder_is_larger_than_the_one_before(family, shapes):
    members = family.ladder(shapes)
    assert len(set(members)) == len(members) and all(type(member) is family for member in members)
    assert members or shapes[0][0] % 2, "only odd rows leave a family without a member"
    blocks = [random_matrix(shape, seed) for seed, shape in enumerate(shapes)]
    stored = [sum(m.pack(m.project(w), QFormat(24, 20)).stored_values for w in blocks) for m in members]
    assert stored == sorted(stored, reverse=True)
    for bits in (2, 6):
        sizes = [sum(full_bits(w, member, bits) for w in blocks) for member in members]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("family", "shapes", "members"), [
    (Dense, [(4, 3)], [Dense()]),
    (TopK, [(1, 2), (2, 2)], [TopK(1), TopK(0.75), TopK(0.5), TopK(0.25)]),
    (RowBalanced, [(2, 3), (2, 4)], [RowBalanced(1), RowBalanced(0.75), RowBalanced(0.5), RowBalanced(0.25)]),
    (BankBalanced, [(2, 2), (2, 4)], [BankBalanced(1, 2), BankBalanced(0.5, 2), BankBalanced(0.25, 1)]),
    (BankBalanced, [(1, 40)], [BankBalanced(1, 16), BankBalanced(2 / 3, 16), BankBalanced(1 / 3, 16), BankBalanced(0.2, 8),
                               BankBalanced(0.1, 4), BankBalanced(0.05, 2), BankBalanced(0.025, 1)]),
    (BlockSparse, [(4, 5)], [BlockSparse(1, 4), BlockSparse(0.5, 4)]),
    (BlockSparse, [(6, 2), (4, 2)], [BlockSparse(1, 2), BlockSparse(2 / 3, 2), BlockSparse(1 / 3, 2)]),
    (BlockSparse, [(4, 4), (3, 4)], []),
    (Structured, [(12, 5), (8, 3)], [Structured(2), Structured(4)]),
    (BlockCirculant, [(16, 3), (8, 5)], [BlockCirculant(2), BlockCirculant(4), BlockCirculant(8)]),
    (BlockCirculant, [(12, 12)], [BlockCirculant(2), BlockCirculant(4)]),
    (BlockCirculant, [(8, 8), (3, 8)], []),
    (LowRank, [(4, 9), (2, 5)], [LowRank(4), LowRank(3), LowRank(2), LowRank(1)]),
])  # fmt: skip
def test_ladders_by_hand(family, shapes, members):
    assert family.ladder(shapes) == members


# --- the number format with a straight-through gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fmt", [QFormat(8, 5), QFormat(2, 0), QFormat(4, -2), QFormat(16, 20), QFormat(8, 8, False)], ids=str)
def test_fake_quantise_equals_the_number_format(fmt, dtype):
    rng = np.random.default_rng(0)
    ties = (np.arange(-40, 40) / 2) * 2.0**-fmt.frac
    normal = rng.normal(size=200) * 2.0 ** (fmt.bits - fmt.frac - 1)
    w = torch.tensor(np.concatenate([ties, normal, [0.49999999999999994, 1e30, -1e30]]), dtype=dtype)
    expected = fmt.dequantise(fmt.quantise(w.double().numpy()))
    np.testing.assert_array_equal(fake_quantise(w, fmt).double().numpy(), expected)


def test_the_gradient_passes_inside_the_range_only():
    w = torch.tensor([-3.0, -2.0, -2.25, -2.26, 0.3, 1.5, 1.74, 1.75, 9.0], requires_grad=True)
    fake_quantise(w, QFormat(3, 1)).backward(torch.arange(1.0, 10))  # the grid is -2, -1.5, ..., 1.5
    assert w.grad.tolist() == [0, 2, 3, 0, 5, 6, 7, 0, 0]


# --- TopK


@pytest.mark.parametrize(("keep", "kept"), [(1, 30), (0.5, 15), (0.1, 3), (0.117, 4), (0.116, 3), (1 / 30, 1), (0.001, 1)])
def test_topk_keeps_the_stated_count(keep, kept):
    w = random_matrix((6, 5))
    assert int((TopK(keep).project(w) != 0).sum()) == kept
    assert TopK(keep).pack(TopK(keep).project(w), QFormat(24, 20)).stored_values == kept
    assert TopK(keep).constrain(w, None).right_inverse(w).shape == (kept,)


def test_topk_by_hand():
    w = torch.tensor([[0.5, -4.0, 1.0], [3.0, -0.25, -2.0]])
    assert TopK(0.5).project(w).tolist() == [[0, -4, 0], [3, 0, -2]]
    assert TopK(0.5).constrain(w, None).right_inverse(w).tolist() == [-4, 3, -2]


def test_topk_keeps_its_count_among_equal_weights():
    assert int(TopK(0.5).project(torch.ones(4, 5)).sum()) == 10


def test_the_support_stays_when_weights_move():
    w = torch.tensor([[0.5, -4.0], [3.0, -0.25]])
    module = TopK(0.5).constrain(w, None)
    assert module(module.right_inverse(torch.tensor([[9.0, 0.125], [0.0, 9.0]]))).tolist() == [[0, 0.125], [0, 0]]


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan"), "0.5", True, None])
def test_topk_refuses(keep):
    with pytest.raises(ValueError, match=r"TopK needs keep in \(0, 1\], got"):
        TopK(keep)


# --- balanced, block-sparse and structured supports


def row_balanced(mask, keep):
    return all(sum(row) == round(keep * len(row)) for row in mask)


def bank_balanced(mask, banks, count):
    return all(sum(bank) == min(count, len(bank)) for row in mask for bank in (row[b::banks] for b in range(banks)))


def whole_tiles(mask, block, count):
    """`count` tiles with every position, the others with none."""
    corners = [(i, j) for i in range(0, len(mask), block) for j in range(0, len(mask[0]), block)]
    tiles = [{bool(x) for row in mask[i : i + block] for x in row[j : j + block]} for i, j in corners]
    return all(len(tile) == 1 for tile in tiles) and sum(tile == {True} for tile in tiles) == count


def one_diagonal_a_tile(mask, period):
    stride = -(-len(mask[0]) // period)
    for first in range(0, len(mask), period):
        for s in range(stride):
            kept = {(i, b) for i in range(period) for b, j in enumerate(range(s, len(mask[0]), stride)) if mask[first + i][j]}
            places = range(len(range(s, len(mask[0]), stride)))
            if kept not in [{((b - o) % period, b) for b in places} for o in range(period)]:
                return False
    return True


@pytest.mark.parametrize(("method", "shape", "lawful"), [
    (RowBalanced(0.5), (2, 6), lambda mask: row_balanced(mask, 0.5)),
    (RowBalanced(0.25), (3, 4), lambda mask: row_balanced(mask, 0.25)),
    (BankBalanced(0.4, 2), (2, 6), lambda mask: bank_balanced(mask, 2, 1)),
    (BankBalanced(0.7, 2), (2, 5), lambda mask: bank_balanced(mask, 2, 2)),  # banks of three columns and two
    (BankBalanced(0.5, 4), (2, 6), lambda mask: bank_balanced(mask, 4, 1)),  # of two, two, one and one
    (BankBalanced(0.9, 3), (3, 4), lambda mask: bank_balanced(mask, 3, 2)),
    (BlockSparse(0.6, 2), (2, 6), lambda mask: whole_tiles(mask, 2, 2)),
    (BlockSparse(0.5, 2), (4, 3), lambda mask: whole_tiles(mask, 2, 2)),
    (BlockSparse(0.1, 3), (3, 4), lambda mask: whole_tiles(mask, 3, 1)),
    (Structured(2), (2, 6), lambda mask: one_diagonal_a_tile(mask, 2)),
    (Structured(2), (4, 3), lambda mask: one_diagonal_a_tile(mask, 2)),
    (Structured(3), (3, 4), lambda mask: one_diagonal_a_tile(mask, 3)),
    (Structured(4), (4, 3), lambda mask: one_diagonal_a_tile(mask, 4)),
], ids=lambda value: "rule" if callable(value) else str(value))  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_the_support_has_the_most_energy_of_all_lawful_ones(method, shape, lawful, seed):
    """By trial of every subset of the positions."""
    w = random_matrix(shape, seed).numpy()
    masks = (np.arange(1 << w.size)[:, None] >> np.arange(w.size)) & 1
    masks = masks[[lawful(mask.reshape(shape).tolist()) for mask in masks]]
    best = masks[np.argmax(masks @ w.ravel() ** 2)].reshape(shape)
    np.testing.assert_array_equal(method.project(torch.from_numpy(w)).numpy(), np.where(best, w, 0))


@pytest.mark.parametrize("method", [RowBalanced(0.3), BankBalanced(0.3, 4), BlockSparse(0.3, 4), Structured(4)], ids=str)
def test_the_support_does_not_depend_on_the_float_type(method):
    w = 1 + 1e-6 * random_matrix((256, 64)).float()  # sums of squares that float32 cannot tell apart
    assert torch.equal(method.support(w), method.support(w.double()))


def test_row_balanced_by_hand():
    w = torch.tensor([[0.5, -4.0, 1.0], [0.3, -0.25, -0.2]])
    assert RowBalanced(0.6).project(w).tolist() == (w * torch.tensor([[0, 1, 1], [1, 1, 0]])).tolist()  # round(1.8) = 2
    assert RowBalanced(0.1).constrain(w, None).right_inverse(w).tolist() == [-4, w[1, 0]]  # at least one a row


def test_bank_balanced_by_hand():
    # Columns 0, 2, 4 are one bank, 1, 3 the other: one of each is kept, although 5 and 4 stand in one bank.
    w = torch.tensor([[5.0, 1.0, 4.0, -2.0, 3.0]])
    assert BankBalanced(0.4, 2).project(w).tolist() == [[5, 0, 0, -2, 0]]  # round(0.4 * 3) = 1
    assert BankBalanced(0.7, 2).project(w).tolist() == [[5, 1, 4, -2, 0]]  # 2 of three columns, 2 of two


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_padding_takes_the_place_of_no_zero(kept):
    """10 columns in 3 banks, of four, three and three, and 2 of each kept; all columns but the first `kept` are zero."""
    w = torch.zeros(5, 10)
    w[:, :kept] = 1
    support = BankBalanced(0.5, 3).support(w)
    assert torch.equal(torch.bincount(support // 10 * 3 + support % 10 % 3), torch.full((15,), 2))


@pytest.mark.parametrize(("keep", "banks", "kept", "stored_words"), [
    (0.25, 4, 4, 4),  # four banks of three columns, one weight each
    (0.5, 4, 8, 8),  # round(1.5) = 2 each
    (0.25, 8, 8, 8),  # four banks of two columns and four of one: at least one each
    (1, 8, 12, 16),  # two words for every bank, four of them spare
    (0.25, 12, 12, 12), (0.25, 1, 3, 3)])  # fmt: skip
def test_banks_of_12_columns(keep, banks, kept, stored_words):
    method, w = BankBalanced(keep, banks), random_matrix((128, 12))
    projected = method.project(w)
    assert ((projected != 0).sum(1) == kept).all()
    (banked,) = method.encodings((128, 12))
    words, indices = banked.encode(method.pack(projected, QFormat(24, 20)))
    assert words.size == indices.size == 128 * stored_words


def test_block_sparse_by_hand():
    w = torch.tensor([[1.0, 1.0, 2.0, 0.0, 1.9], [1.0, 1.0, 0.0, 0.0, 1.9]])  # energies 4, 4 and 7.22
    w[0, 2] = 2.1
    assert BlockSparse(0.6, 2).project(w).tolist() == (w * torch.tensor([0, 0, 1, 1, 1])).tolist()  # round(1.8) = 2 tiles


def test_structured_by_hand():
    # Period 2, stride 2: the tiles are the columns 0 and 2, 1 and 3. Energies of the diagonals: 1 + 16 against 4 + 9, and
    # 25 + 1 against 4 + 36.
    w = torch.tensor([[1.0, 5.0, 2.0, 2.0], [3.0, 6.0, 4.0, 1.0]])
    assert Structured(2).project(w).tolist() == [[1, 0, 0, 2], [0, 6, 4, 0]]


@pytest.mark.parametrize(("period", "shape"), [(8, (128, 128)), (8, (128, 12)), (16, (32, 40)), (128, (128, 12))])
def test_structured_keeps_one_of_period_in_every_column(period, shape):
    kept = Structured(period).project(random_matrix(shape)) != 0
    assert (kept.sum(0) == shape[0] // period).all()
    assert kept.sum(1).max() <= -(-shape[1] // period)
    if shape[1] % period == 0:
        assert (kept.sum(1) == shape[1] // period).all()


def test_equal_weights_are_kept_in_the_stated_numbers():
    ones = torch.ones(8, 12)
    for method, kept in ((RowBalanced(0.5), 48), (BankBalanced(0.5, 4), 64), (BlockSparse(0.5, 4), 48), (Structured(4), 24)):
        assert int((method.project(ones) != 0).sum()) == kept


def test_storage_of_each_pattern():
    """Bits of a 128 x 128 and a 128 x 12 block of 6-bit weights, none zero."""
    fmt = QFormat(6, 0)
    for method, columns, weights, index_bits in [
        (RowBalanced(1 / 8), 128, 128 * 16, 128 * 16 * 7),
        (BankBalanced(1 / 8, 16), 128, 128 * 16, 128 * 16 * 3),
        (BlockSparse(1 / 8, 4), 128, 128 * 16, 32 * 32),  # a bit a tile
        (Structured(8), 128, 128 * 16, 16 * 16 * 3),  # an offset of 3 bits a tile
        (RowBalanced(1 / 6), 12, 128 * 2, 128 * 2 * 4),
        (BankBalanced(1 / 6, 4), 12, 128 * 4, 128 * 4 * 2),
        (BlockSparse(1 / 6, 4), 12, 16 * 16, 32 * 3),
        (Structured(8), 12, 16 * 12, 16 * 2 * 3),  # 12 columns in two tiles, each column one weight of eight
    ]:
        ones = (method.project(random_matrix((128, columns))) != 0).double()
        packed = method.pack(ones, fmt)
        encoding = method.encodings(packed.shape)[-1]
        words, indices = encoding.encode(packed)
        assert packed.stored_values == words.size == weights
        assert indices.size * encoding.index_width(packed.shape) == index_bits
        assert packed.storage_bits <= 6 * weights + index_bits  # no more than in the encoding of the pattern


@pytest.mark.parametrize(("method", "name"), [
    (lambda keep: RowBalanced(keep), "RowBalanced"), (lambda keep: BankBalanced(keep, 4), "BankBalanced"),
    (lambda keep: BlockSparse(keep, 4), "BlockSparse")])
@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan"), "0.5", True, None])
def test_keep_is_refused(method, name, keep):
    with pytest.raises(ValueError, match=rf"{name} needs keep in \(0, 1\], got"):
        method(keep)


@pytest.mark.parametrize("value", [0, -4, 4.0, "4", True, None])
def test_whole_parameters_are_refused(value):
    for make, message in ((lambda: BankBalanced(0.5, value), "BankBalanced needs a whole number of banks of at least 1, got"),
                          (lambda: BlockSparse(0.5, value), "BlockSparse needs a whole block of at least 2, got"),
                          (lambda: Structured(value), "Structured needs a whole period of at least 2, got")):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(("method", "message"), [
    (BlockSparse(0.5, 4), r"BlockSparse\(keep=0.5, block=4\) needs rows divisible by 4, got a 30x16 block"),
    (Structured(4), r"Structured\(period=4\) needs rows divisible by 4, got a 30x16 block"),
    (BankBalanced(0.5, 17), r"BankBalanced\(keep=0.5, banks=17\) needs at least 17 columns, got a 30x16 block"),
], ids=str)  # fmt: skip
def test_shapes_that_a_pattern_does_not_fit_are_refused(method, message):
    for call in (method.project, lambda w: method.constrain(w, None), lambda w: method.pack(w, QFormat(8, 5))):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(30, 16))


@pytest.mark.parametrize(("method", "message"), [
    (RowBalanced(0.25), r"Banks\(banks=1, count=2\) needs at most 2 weights in a bank of a row, got 8"),
    (BankBalanced(0.25, 2), r"Banks\(banks=2, count=1\) needs at most 1 weights in a bank of a row, got 4"),
    (Structured(2), r"Diagonals\(period=2\) needs the weights of each tile on one wrapped diagonal"),
], ids=str)  # fmt: skip
def test_what_is_no_member_is_not_packed(method, message):
    with pytest.raises(ValueError, match=message):
        method.pack(random_matrix((4, 8)), QFormat(8, 5))


# --- LowRank


def test_low_rank_by_hand():
    """Singular values 8 and 2; shared out evenly, as rows and columns are equally many: 2 sqrt(2) and sqrt(2)."""
    w = torch.tensor([[0.0, 8.0], [-2.0, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(LowRank(1).project(w), [[0, 8], [0, 0]], atol=1e-14)
    stored = LowRank(2).decompose(w)
    root = 2**0.5
    np.testing.assert_allclose(stored, [[2 * root, 0], [0, root], [0, -root], [2 * root, 0]], atol=1e-15)
    packed = LowRank(1).pack(w, QFormat(4, 1))  # 2.83 in halves is 6
    assert (packed.left.tolist(), packed.right.tolist()) == ([[6], [0]], [[0, 6]])
    assert packed.dense().tolist() == [[0, 36], [0, 0]] and packed.frac == 2  # 9 in quarters


@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (16, 16)], ids=str)
def test_both_factors_have_entries_of_equal_mean_square(shape):
    stored = LowRank(4).decompose(random_matrix(shape))
    u, v = stored[: shape[0]], stored[shape[0] :]
    torch.testing.assert_close(u.square().mean(0), v.square().mean(0))
    assert stored.shape == (sum(shape), 4)


@pytest.mark.parametrize(("rank", "shape", "stored"), [(2, (16, 12), 56), (20, (16, 12), 336), (1, (5, 9), 14)])
def test_low_rank_stores_two_factors(rank, shape, stored):
    packed = LowRank(rank).pack(random_matrix(shape), QFormat(8, 5))
    assert packed.stored_values == stored and packed.value_bits == 8 * stored and packed.index_bits == 0


def test_factors_of_other_weights_are_not_taken():
    w, fmt = random_matrix((6, 5)), QFormat(8, 5)
    module = LowRank(2).constrain(w, fmt)
    stored = module.shown(module.right_inverse(w) + 1)
    shown = module(stored)
    assert torch.equal(LowRank(2).constrain(shown, fmt, stored).right_inverse(shown), stored)
    for other, method in ((w, LowRank(2)), (shown + 2.0**-10, LowRank(2)), (shown, LowRank(1))):
        again = method.constrain(other, fmt, stored).right_inverse(other)
        torch.testing.assert_close(again, method.decompose(other))
        assert again.shape != stored.shape or not torch.allclose(again, stored)


@pytest.mark.parametrize("rank", [0, -1, 2.0, "2", True, None])
def test_low_rank_refuses_the_rank(rank):
    with pytest.raises(ValueError, match="LowRank needs a whole rank of at least 1, got"):
        LowRank(rank)


# --- BlockCirculant


@pytest.mark.parametrize(("block", "shape"), [(2, (6, 5)), (4, (8, 8)), (4, (8, 3)), (3, (6, 7))])
def test_circulant_is_scipys(block, shape):
    method = BlockCirculant(block)
    module = method.constrain(torch.zeros(shape), None)
    vectors = random_matrix((shape[0] // block, -(-shape[1] // block), block))
    tiles = np.block([[scipy.linalg.circulant(v) for v in row] for row in vectors.numpy()])[:, : shape[1]]
    np.testing.assert_array_equal(module(vectors).numpy(), tiles)
    # A circulant member is its own projection, from the same vectors: the padding is filled by the real entries.
    np.testing.assert_allclose(method.vectors(torch.from_numpy(tiles)), vectors, rtol=1e-14)
    fmt = QFormat(24, 20)
    np.testing.assert_array_equal(method.pack(torch.from_numpy(tiles), fmt).vectors, fmt.quantise(vectors))


def test_circulant_means_by_hand():
    # Block 2, three columns: the last tile has one real column, so its means run over one entry each.
    w = torch.tensor([[1.0, 10.0, 5.0], [20.0, 3.0, 6.0]])
    assert BlockCirculant(2).vectors(w).tolist() == [[[2, 15], [5, 6]]]
    assert BlockCirculant(2).project(w).tolist() == [[2, 15, 5], [15, 2, 6]]


def test_circulant_gradient_is_that_of_naive_indexing():
    method, w, k = BlockCirculant(4), random_matrix((8, 10)), 4
    module = method.constrain(w, None)
    stored = module.right_inverse(w).requires_grad_()
    weight = random_matrix((8, 10), 3)
    (module(stored) * weight).sum().backward()
    naive = stored.detach().clone().requires_grad_()
    rows = [torch.stack([naive[i // k, j // k, (i - j) % k] for j in range(10)]) for i in range(8)]
    (torch.stack(rows) * weight).sum().backward()
    torch.testing.assert_close(stored.grad, naive.grad)


@pytest.mark.parametrize(("block", "shape", "stored"), [(8, (16, 16), 32), (8, (16, 19), 48), (2, (6, 5), 18)])
def test_circulant_has_fewer_parameters(block, shape, stored):
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    parametrize.register_parametrization(linear, "weight", BlockCirculant(block).constrain(linear.weight.detach(), None))
    assert sum(p.numel() for p in linear.parameters()) == stored
    packed = BlockCirculant(block).pack(linear.weight, QFormat(8, 5))
    assert packed.stored_values == stored
    assert packed.value_bits == 8 * stored


def test_circulant_refuses_rows_that_the_block_does_not_divide():
    method = BlockCirculant(4)
    message = r"BlockCirculant\(block=4, datapath='time'\) needs rows divisible by 4, got a 30x16 block"
    for call in (method.project, lambda w: method.constrain(w, None), lambda w: method.pack(w, QFormat(8, 5))):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(30, 16))


@pytest.mark.parametrize("block", [0, 1, -4, 4.0, "4", True, None])
def test_circulant_refuses_the_block(block):
    with pytest.raises(ValueError, match="BlockCirculant needs a whole block of at least 2, got"):
        BlockCirculant(block)


def test_circulant_refuses_other_datapaths():
    with pytest.raises(ValueError, match="BlockCirculant has the datapaths time, fft, got 'dct'"):
        BlockCirculant(4, "dct")
    with pytest.raises(ValueError, match="needs a block that is a power of two for the fft datapath, got 6"):
        BlockCirculant(6, "fft")


# --- JSON and labels


@pytest.mark.parametrize(("data", "message"), [
    ("TopK", "a method needs .*, got 'TopK'"),
    ({"keep": 0.5}, "a method needs"),
    ({"name": "Topk", "keep": 0.5}, f"the methods are {', '.join(METHODS)}, got 'Topk'"),
    ({"name": ["TopK"]}, r"the methods are .*, got \['TopK'\]"),
    ({"name": "TopK"}, r"TopK needs keep, got \{\}"),
    ({"name": "TopK", "keep": 0.5, "k": 3, "a": 1}, "TopK has the parameters keep, got a, k"),
    ({"name": "Dense", "keep": 0.5}, "Dense has the parameters none, got keep"),
    ({"name": "TopK", "keep": "0.5"}, r"TopK needs keep in \(0, 1\], got '0.5'"),
    ({"name": "BlockCirculant", "block": 2.5}, "BlockCirculant needs a whole block of at least 2, got 2.5"),
])  # fmt: skip
def test_json_that_is_no_method_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        method_from_json(data)


def test_labels():
    assert method_label(Dense()) == "Dense"
    assert method_label(TopK(0.169412)) == "TopK 0.1694"
    assert method_label(BlockCirculant(8)) == "BlockCirculant 8"
    assert method_label(BlockCirculant(8, "fft")) == "BlockCirculant 8 fft"
    assert method_label(LowRank(3)) == "LowRank 3"
    assert method_label(TopK(0.169412), exact=True) == "TopK 0.169412" and method_label(TopK(0.25), exact=True) == "TopK 0.25"
    for keep in (1 / 3, np.float64(1 / 3), 1e-7 / 3):
        assert method_from_label(method_label(TopK(keep), exact=True)) == TopK(keep)


@dataclass(frozen=True)
class Own:
    """A user's method with every kind of parameter that a label holds, one of them hinted by a text."""

    keep: "float"
    count: int
    rows: bool
    order: str = "up"


@dataclass(frozen=True)
class Odd:
    sizes: tuple


def test_labels_of_a_method_of_one_s_own(monkeypatch):
    monkeypatch.setitem(METHODS, "Own", Own)
    monkeypatch.setitem(METHODS, "Odd", Odd)
    for method in (Own(0.5, 3, False), Own(0.25, 3, True, "down")):
        assert method_from_label(method_label(method)) == method
    with pytest.raises(ValueError, match="Own needs rows as bool, got 'no' in the label 'Own 0.5 3 no'"):
        method_from_label("Own 0.5 3 no")
    with pytest.raises(ValueError, match="parameters of int, float, str, bool, and sizes of Odd is <class 'tuple'"):
        method_from_label("Odd (1,2)")


def test_methods_suit_the_format_that_is_chosen_for_them():
    """The error of a packed block is the projection's plus at most half a step a weight, unless it saturates."""
    w = random_matrix((16, 16))
    for method in (Dense(), TopK(0.25), BankBalanced(0.25, 4), Structured(4), BlockCirculant(4)):
        projected = method.project(w)
        fmt = plan_block(w, method, 12).format
        error = np.abs(fmt.dequantise(method.pack(projected, fmt).dense()) - projected.numpy())
        assert np.sqrt((error**2).mean()) < 2.0**-fmt.frac
