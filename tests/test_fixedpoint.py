"""Fixed point: hand numbers, apytypes and Python's own integers as oracles, exactness of products, messages."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from apytypes import APyFixedArray, OverflowMode, QuantizationMode
from fxpmath import Fxp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from workbench import fixedpoint
from workbench.fixedpoint import FUNCTIONS, TABLES, ExactMatrix, ExactTable, HardTable, LinearTable, QFormat, requantise

LINEAR = {name: LinearTable.build(name) for name in FUNCTIONS}


def nearest(value: Fraction, fmt: QFormat) -> int:
    """A real number in the units of fmt's last place -> half up, saturated; the definition, with exact fractions."""
    return min(max(math.floor(value + Fraction(1, 2)), fmt.min), fmt.max)


@st.composite
def formats(draw, bits=(2, 32), frac=(-40, 40)):
    signed = draw(st.booleans())
    return QFormat(draw(st.integers(*bits)), draw(st.integers(*frac)), signed)


# Formats.


@pytest.mark.parametrize(
    ("fmt", "low", "high", "magnitude"),
    [(QFormat(8, 7), -128, 127, 128), (QFormat(2, 0), -2, 1, 2), (QFormat(1, 0, signed=False), 0, 1, 1),
     (QFormat(32, 31), -(2**31), 2**31 - 1, 2**31), (QFormat(32, 0, signed=False), 0, 2**32 - 1, 2**32 - 1)],
)
def test_range_of_a_format(fmt, low, high, magnitude):
    assert (fmt.min, fmt.max, fmt.magnitude) == (low, high, magnitude)


@pytest.mark.parametrize(
    ("x", "fmt", "expected"),
    [
        (0.5, QFormat(8, 0), 1),  # ties go up,
        (-0.5, QFormat(8, 0), 0),  # also below zero
        (-1.5, QFormat(8, 0), -1),
        (2.5, QFormat(8, 0), 3),
        (-0.5000000000000001, QFormat(8, 0), -1),
        (0.49999999999999994, QFormat(8, 0), 0),  # adding 0.5 in float64 would give 1.0
        (-0.49999999999999994, QFormat(8, 0), 0),
        (126.5, QFormat(8, 0), 127),
        (127.5, QFormat(8, 0), 127),
        (1e300, QFormat(8, 0), 127),
        (-1e300, QFormat(8, 0), -128),
        (math.inf, QFormat(8, 0), 127),
        (-math.inf, QFormat(8, 0), -128),
        (-3.0, QFormat(8, 0, signed=False), 0),
        (1.0, QFormat(3, 3, signed=False), 7),
        (24.0, QFormat(8, -4), 2),  # steps of 16: 1.5 is a tie
        (23.9, QFormat(8, -4), 1),
        (0.001, QFormat(4, 12), 4),  # more fraction bits than bits: 4.096 steps of 2**-12
        (0.01, QFormat(4, 12), 7),
        (2.0**31 - 0.5, QFormat(32, 0), 2**31 - 1),
        (5e-324, QFormat(32, 64), 0),
    ],
)
def test_quantise_by_hand(x, fmt, expected):
    q = fmt.quantise(x)
    assert q.dtype == np.int64 and q == expected


def test_dequantise_is_exact_and_quantise_its_inverse():
    for fmt in (QFormat(8, 7), QFormat(6, -3), QFormat(5, 20), QFormat(4, 4, signed=False)):
        q = np.arange(fmt.min, fmt.max + 1)
        assert [Fraction(v) for v in fmt.dequantise(q)] == [Fraction(int(n)) / Fraction(2) ** fmt.frac for n in q]
        assert np.array_equal(fmt.quantise(fmt.dequantise(q)), q)


@given(formats(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-2000, 2000))
def test_quantise_against_exact_fractions(fmt, value, halves):
    tie = math.ldexp(halves / 2, -fmt.frac)  # odd halves lie between two codes
    for x in (value, tie, math.nextafter(tie, math.inf), math.nextafter(tie, -math.inf)):
        assert fmt.quantise(x) == nearest(Fraction(x) * Fraction(2) ** fmt.frac, fmt)


# Independent libraries, over all formats: apytypes (exact), and as a second opinion fxpmath (floats, rounding down).


def numerators(fmt, shift, rng):
    """Codes of fmt times 2**shift, what lies beside them and ties: near zero, near both ends and beyond, random."""
    step = 1 << max(shift, 0)
    near = np.array([fmt.min, 0, fmt.max])[:, None] + np.arange(-2, 3)
    codes = np.concatenate([near.ravel(), rng.integers(fmt.min, fmt.max + 1, 5), [3 * fmt.min - 7, 3 * fmt.max + 7]])
    beside = np.array([0, 1, step // 2 - 1, step // 2, step // 2 + 1, step - 1])
    return (codes[:, None] * step + beside).ravel()


def by_apytypes(numerators, frac, fmt):
    """numerators * 2**-frac -> codes of fmt. apytypes has signed formats only: an unsigned one is the half of one more bit."""
    bits = fmt.bits + (not fmt.signed)
    exact = APyFixedArray(numerators.tolist(), int_bits=66 - frac, frac_bits=frac)
    rounded = exact.cast(int_bits=bits - fmt.frac, frac_bits=fmt.frac, quantization=QuantizationMode.TIES_POS,
                         overflow=OverflowMode.SAT).to_numpy()
    return np.maximum(np.ldexp(rounded, fmt.frac), fmt.min)


@pytest.mark.parametrize("signed", [True, False])
def test_every_format_against_apytypes(signed):
    """2 to 32 bits, frac -64 to 64: real numbers and accumulators at a random distance, coarser ones included."""
    rng = np.random.default_rng(0)
    for bits in range(2, 33):
        for frac in range(-64, 65):
            fmt = QFormat(bits, frac, signed)
            shift = int(rng.integers(1, 18))
            values = numerators(fmt, shift, rng)  # of less than 53 bits, so that floats hold them
            expected = by_apytypes(values, frac + shift, fmt)
            assert np.array_equal(fmt.quantise(np.ldexp(values.astype(float), -frac - shift)), expected), (fmt, shift)
            assert np.array_equal(requantise(values, frac + shift, fmt), expected), (fmt, shift)
            shift = int(rng.integers(-12, 26))
            values = numerators(fmt, shift, rng)
            assert np.array_equal(requantise(values, frac + shift, fmt), by_apytypes(values, frac + shift, fmt)), (fmt, shift)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("frac", [-20, -1, 0, 7, 33])
def test_formats_against_fxpmath(signed, frac):
    rng = np.random.default_rng(0)
    for bits in range(2, 33):
        fmt, shift = QFormat(bits, frac, signed), int(rng.integers(1, 12))
        values = numerators(fmt, shift, rng)
        x = np.ldexp(values.astype(float), -frac - shift)
        half_up = Fxp(x + 0.5 * 2.0**-frac, signed, bits, frac, rounding="floor", overflow="saturate")
        assert np.array_equal(fmt.quantise(x), half_up.raw())
        assert np.array_equal(requantise(values, frac + shift, fmt), half_up.raw())


@pytest.mark.parametrize(("narrow", "wide"), [
    (QFormat(8, 5), QFormat(16, 12)),
    (QFormat(4, -2), QFormat(20, 3)),
    (QFormat(5, 9, signed=False), QFormat(12, 11)),
    (QFormat(32, 40), QFormat(32, 20)),
])
def test_from_one_format_to_another_and_back(narrow, wide):
    rng = np.random.default_rng(0)
    codes = rng.integers(wide.min, wide.max + 1, 200)
    assert np.array_equal(requantise(codes, wide.frac, narrow), narrow.quantise(wide.dequantise(codes)))
    codes = rng.integers(narrow.min, narrow.max + 1, 200)
    there = requantise(codes, narrow.frac, wide)
    assert np.array_equal(there, wide.quantise(narrow.dequantise(codes)))
    if wide.bits < 32:  # the wide format holds every code
        assert np.array_equal(requantise(there, wide.frac, narrow), codes)


# Accumulators.


@pytest.mark.parametrize(
    ("a", "frac", "fmt", "expected"),
    [(24, 4, QFormat(8, 0), 2), (23, 4, QFormat(8, 0), 1), (-24, 4, QFormat(8, 0), -1), (-25, 4, QFormat(8, 0), -2),
     (5, 0, QFormat(8, 3), 40), (16, 0, QFormat(8, 3), 127), (-17, 0, QFormat(8, 3), -128), (-1, 0, QFormat(8, 3, False), 0),
     (2**60, 60, QFormat(8, 0), 1), (2**60, 61, QFormat(8, 0), 1), (-(2**60), 61, QFormat(8, 0), 0),
     (1, 0, QFormat(8, 64), 127), (0, 0, QFormat(8, 64), 0), (2**60, 64, QFormat(8, -64), 0)],
)
def test_requantise_by_hand(a, frac, fmt, expected):
    assert requantise(np.array([a]), frac, fmt).tolist() == [expected]


@settings(max_examples=300)
@given(formats(frac=(-64, 64)), st.integers(-64, 128), st.integers(0, 60), st.data())
def test_requantise_against_exact_fractions(fmt, frac, log2, data):
    a = data.draw(st.integers(-(1 << log2), 1 << log2))
    tie = (data.draw(st.integers(-(1 << 10), 1 << 10)) << 1 | 1) << max(min(frac - fmt.frac, 45) - 1, 0)
    result = requantise(np.array([a, tie]), frac, fmt)
    assert result.dtype == np.int64
    assert result.tolist() == [nearest(Fraction(v) * Fraction(2) ** (fmt.frac - frac), fmt) for v in (a, tie)]


def test_requantise_agrees_with_quantise():
    rng = np.random.default_rng(0)
    a = rng.integers(-(2**40), 2**40, 1000)
    for fmt in (QFormat(16, 12), QFormat(8, 5), QFormat(16, 16, signed=False)):
        assert np.array_equal(requantise(a, 33, fmt), fmt.quantise(np.ldexp(a.astype(float), -33)))


# Products.


@pytest.mark.parametrize(
    ("bound", "dtype"),
    [(2**24 - 1, np.float32), (2**24, np.float64), (2**53 - 1, np.float64), (2**53, np.int64), (2**63 - 1, np.int64)],
)
def test_products_are_exact_at_the_bound_of_each_type(bound, dtype):
    magnitude = 7 if bound % 7 == 0 else 1
    total = bound // magnitude
    # One large weight and many ones: any order of summation passes through odd partial sums next to the bound.
    weights = np.array([[total - 63, *[1] * 63], [-(total - 63), *[-1] * 63], [0] * 64])
    product = ExactMatrix(weights, magnitude)
    assert product.dtype == dtype
    x = np.array([[magnitude] * 64, [-magnitude] * 64, [magnitude, *[-magnitude, magnitude] * 31, 0]])
    expected = [[sum(int(w) * int(v) for w, v in zip(row, vector, strict=True)) for row in weights] for vector in x]
    result = product(x)
    assert result.dtype == np.int64 and result.tolist() == expected


def test_products_that_leave_64_bits_are_refused():
    with pytest.raises(ValueError, match=r"ExactMatrix needs row sums under 2\*\*63, got a bound of 9223372036854775808"):
        ExactMatrix(np.array([[1 << 32, 1 << 32]]), 1 << 30)


# Tables.


def literal_lookup(table, q: int, in_fmt: QFormat, out_fmt: QFormat) -> int:
    """One element with Python's own numbers: the definition of the table."""
    knots = [int(k) for k in table.knots]
    position = min(abs(Fraction(q)) / Fraction(2) ** in_fmt.frac * 32, Fraction(256))  # 32 segments per unit
    segment = min(math.floor(position), 255)
    value = knots[segment] + (knots[segment + 1] - knots[segment]) * (position - segment)  # units of 2**-15
    if q < 0:
        value = -value if table.function == "tanh" else 2**15 - value
    return nearest(value * Fraction(2) ** (out_fmt.frac - 15), out_fmt)


def test_knots_are_the_function_in_16_bits():
    for name, exact in (("sigmoid", lambda x: 1 / (1 + math.exp(-x))), ("tanh", math.tanh)):
        assert LINEAR[name].knots.tolist() == [math.floor(exact(n / 32) * 2**15 + 0.5) for n in range(257)]


@pytest.mark.parametrize(
    ("function", "q", "in_fmt", "out_fmt", "expected"),
    [
        ("sigmoid", 0, QFormat(16, 12), QFormat(16, 16, False), 2**15),
        ("tanh", 0, QFormat(16, 12), QFormat(16, 15), 0),
        ("tanh", 32, QFormat(16, 5), QFormat(16, 15), 24956),  # tanh(1) * 2**15 = 24955.6: a knot
        ("tanh", -32, QFormat(16, 5), QFormat(16, 15), -24956),
        ("tanh", 1, QFormat(16, 6), QFormat(16, 15), 512),  # half way from 0 to tanh(1/32) * 2**15 = 1023.7 -> 1024
        ("sigmoid", 32767, QFormat(16, 12), QFormat(3, 3, False), 7),
        ("sigmoid", -32768, QFormat(16, 12), QFormat(3, 3, False), 0),
        ("tanh", 1, QFormat(8, -4), QFormat(16, 15), 32767),  # 16 lies beyond the table
        ("sigmoid", -1, QFormat(8, -64), QFormat(16, 15), 11),  # the last knot: sigmoid(-8) * 2**15 = 10.99
        ("tanh", 0, QFormat(8, -64), QFormat(16, 15), 0),
    ],
)
def test_lookup_by_hand(function, q, in_fmt, out_fmt, expected):
    assert LINEAR[function].lookup(np.array([[q]]), in_fmt, out_fmt).tolist() == [[expected]]


@pytest.mark.parametrize("function", FUNCTIONS)
@given(in_fmt=formats(frac=(-10, 48)), out_fmt=formats(bits=(2, 24), frac=(0, 24)), data=st.data())
def test_lookup_against_the_literal_definition(function, in_fmt, out_fmt, data):
    codes = st.integers(in_fmt.min, in_fmt.max)
    near_zero = st.integers(max(in_fmt.min, -300), min(in_fmt.max, 300))
    q = data.draw(st.lists(codes | near_zero, min_size=1, max_size=10))
    table = LINEAR[function]
    assert table.lookup(q, in_fmt, out_fmt).tolist() == [literal_lookup(table, n, in_fmt, out_fmt) for n in q]


def test_tables_are_symmetric_about_their_middle():
    in_fmt, q = QFormat(12, 8), np.arange(1, 2048)
    fine = QFormat(32, 30)  # fine enough that nothing is rounded
    assert np.array_equal(LINEAR["tanh"].lookup(-q, in_fmt, fine), -LINEAR["tanh"].lookup(q, in_fmt, fine))
    assert np.array_equal(LINEAR["sigmoid"].lookup(-q, in_fmt, fine), 2**30 - LINEAR["sigmoid"].lookup(q, in_fmt, fine))


# Input and output formats: the default ones, coarse and fine ones, unsigned ones, those that saturate at 1.
USES = [(QFormat(16, 12), QFormat(16, 15)), (QFormat(16, 12), QFormat(16, 16, signed=False)), (QFormat(8, 4), QFormat(8, 7)),
        (QFormat(8, -3), QFormat(8, 6)), (QFormat(16, 15), QFormat(12, 10)), (QFormat(10, 20), QFormat(16, 15)),
        (QFormat(9, 5, signed=False), QFormat(3, 3, signed=False)), (QFormat(6, 2), QFormat(4, 9)),
        (QFormat(12, 8), QFormat(8, -1)), (QFormat(8, 4), QFormat(2, 0))]
ORACLES = {"sigmoid": expit, "tanh": np.tanh}


def every_code(in_fmt):
    q = np.arange(in_fmt.min, in_fmt.max + 1)
    return q, np.ldexp(q.astype(float), -in_fmt.frac)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("in_fmt", "out_fmt"), USES)
def test_every_code_of_every_table(function, in_fmt, out_fmt):
    q, x = every_code(in_fmt)
    exact = np.ldexp(ORACLES[function](x), out_fmt.frac)
    stored = np.clip(exact, out_fmt.min, out_fmt.max)  # what saturates cannot be nearer
    # Exact table: the nearest code, to which only the last bits of the oracle's floats matter.
    table = ExactTable.build(function, [(in_fmt, out_fmt)])
    assert np.abs(table.lookup(q, in_fmt, out_fmt) - stored).max() <= 0.5 + 1e-9
    # Linear table: a chord over 1/32 misses |f''| / 8 / 1024, beyond 8 the last knot holds, knots and result round once each.
    curvature, tail = {"sigmoid": (0.0963, 1 - expit(8)), "tanh": (0.7699, 1 - np.tanh(8))}[function]
    miss = max(curvature / 8 / 1024, tail if np.abs(x).max() > 8 else 0) + 2.0**-16
    assert np.abs(LINEAR[function].lookup(q, in_fmt, out_fmt) - stored).max() <= miss * 2.0**out_fmt.frac + 0.5
    # Without a table: floats hold x / 4 + 1 / 2 and its rounding.
    hard = np.clip(x, -1, 1) if function == "tanh" else np.clip(x / 4 + 0.5, 0, 1)
    expected = np.clip(np.floor(np.ldexp(hard, out_fmt.frac) + 0.5), out_fmt.min, out_fmt.max)
    assert np.array_equal(HardTable(function).lookup(q, in_fmt, out_fmt), expected)
    for kind in TABLES.values():
        table = kind.build(function, [(in_fmt, out_fmt)])
        assert table.function == function
        error = np.abs(table.lookup(q, in_fmt, out_fmt) - exact).max()
        assert table.max_error_ulp(in_fmt, out_fmt) == pytest.approx(error, rel=1e-9)
        again = kind.restore(function, table.arrays, table.describe())
        assert np.array_equal(again.lookup(q, in_fmt, out_fmt), table.lookup(q, in_fmt, out_fmt))


@pytest.mark.parametrize(
    ("kind", "function", "q", "expected"),
    [
        # From 3 to 5 fraction bits: sigmoid(1) * 32 = 23.39, tanh(1) * 32 = 24.37; 1 + 1/8: 24.15 and 25.90.
        ("exact", "sigmoid", [-8, 0, 8, 9, 31], [9, 16, 23, 24, 31]),
        ("exact", "tanh", [-8, 0, 8, 9, 31], [-24, 0, 24, 26, 31]),  # tanh(31/8) * 32 = 31.97 saturates
        ("linear", "sigmoid", [-8, 0, 8, 9, 31], [9, 16, 23, 24, 31]),
        ("linear", "tanh", [-8, 0, 8, 9, 31], [-24, 0, 24, 26, 31]),
        # x + 16 = 32 * (x / 32 + 1 / 2): at -2 it ends in 0, at 2 in 1, which saturates.
        ("hard", "sigmoid", [-17, -16, -15, 0, 1, 15, 16], [0, 0, 1, 16, 17, 31, 31]),
        ("hard", "tanh", [-9, -8, -7, 1, 7, 8], [-32, -32, -28, 4, 28, 31]),
    ],
)
def test_tables_by_hand(kind, function, q, expected):
    in_fmt, out_fmt = QFormat(6, 3), QFormat(6, 5)
    assert TABLES[kind].build(function, [(in_fmt, out_fmt)]).lookup(q, in_fmt, out_fmt).tolist() == expected


@pytest.mark.parametrize(("kind", "function", "ulp"), [
    ("exact", "sigmoid", 0.5),
    ("exact", "tanh", 1.0),  # near 8 the nearest code would be 1, which the format lacks
    ("hard", "sigmoid", 0.1192 * 2**15),  # 1 - sigmoid(2)
    ("hard", "tanh", 0.2384 * 2**15),  # 1 - tanh(1)
    ("linear", "sigmoid", 0.0963 / 8 / 1024 * 2**15 + 1),  # chord, knots and result
    ("linear", "tanh", 0.7699 / 8 / 1024 * 2**15 + 1),
])
def test_largest_errors_of_the_default_formats(kind, function, ulp):
    in_fmt, out_fmt = QFormat(16, 12), QFormat(16, 15)
    error = TABLES[kind].build(function, [(in_fmt, out_fmt)]).max_error_ulp(in_fmt, out_fmt)
    assert 0.8 * ulp < error <= 1.02 * ulp


def test_numbers_of_numpy_are_python_s():
    fmt = QFormat(np.int64(8), np.int16(-4), np.bool_(False))
    assert fmt == QFormat(8, -4, False) and json.dumps(fmt.to_json()) == json.dumps(QFormat(8, -4, False).to_json())
    assert QFormat(np.int8(32), 0).max == 2**31 - 1  # in NumPy's int8 1 << 31 is 0


# Messages.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QFormat(8.0, 4), TypeError, "QFormat needs a whole number for bits, got 8.0"),
        (lambda: QFormat(8, True), TypeError, "QFormat needs a whole number for frac, got True"),
        (lambda: QFormat(8, 4, 1), TypeError, "QFormat needs True or False for signed, got 1"),
        (lambda: QFormat(1, 0), ValueError, "needs 2 to 32 bits when signed and 1 to 32 when unsigned, got 1"),
        (lambda: QFormat(33, 0), ValueError, "got 33"),
        (lambda: QFormat(0, 0, signed=False), ValueError, "got 0"),
        (lambda: QFormat(8, 65), ValueError, "needs frac from -64 to 64, got 65"),
        (lambda: QFormat(8, 4).quantise([1.0, math.nan]), ValueError,
         "QFormat(bits=8, frac=4, signed=True) cannot hold NaN: 1 of 2 values are NaN"),
        (lambda: QFormat.from_json({"bits": 8}), ValueError,
         "QFormat needs exactly the keys bits, frac and signed, got {'bits': 8}"),
        (lambda: LinearTable.build("relu"), ValueError, "LinearTable knows sigmoid, tanh, got 'relu'"),
        (lambda: LinearTable("relu", LINEAR["tanh"].knots), ValueError, "LinearTable knows sigmoid, tanh, got 'relu'"),
        (lambda: LinearTable("tanh", np.zeros(256, dtype=np.int64)), ValueError,
         "LinearTable needs 257 knots of 16 bits, got shape (256,)"),
        (lambda: LINEAR["tanh"].lookup(1, QFormat(16, 49), QFormat(16, 15)), ValueError,
         "LinearTable needs inputs of at most 48 fraction bits, got QFormat(bits=16, frac=49, signed=True)"),
        (lambda: LINEAR["tanh"].max_error_ulp(QFormat(21, 12), QFormat(16, 15)), ValueError,
         "at most 20 bits, got QFormat(bits=21"),
        (lambda: ExactTable.build("relu"), ValueError, "ExactTable knows sigmoid, tanh, got 'relu'"),
        (lambda: HardTable.build("relu"), ValueError, "HardTable knows sigmoid, tanh, got 'relu'"),
        (lambda: ExactTable.build("tanh", [(QFormat(17, 12), QFormat(16, 15))]), ValueError,
         "ExactTable needs inputs of at most 16 bits, got QFormat(bits=17"),
        (lambda: ExactTable.build("tanh", [(QFormat(8, 4), QFormat(8, 7))]).lookup(1, QFormat(8, 5), QFormat(8, 7)), ValueError,
         "ExactTable of tanh has no entries from QFormat(bits=8, frac=5, signed=True) to QFormat(bits=8, frac=7, signed=True)"),
        (lambda: ExactTable("tanh", {(QFormat(3, 1), QFormat(3, 2)): np.arange(7)}), ValueError,
         "ExactTable needs 8 codes of QFormat(bits=3, frac=2, signed=True), got shape (7,)"),
        (lambda: ExactTable("tanh", {(QFormat(3, 1), QFormat(3, 2)): np.arange(8)}), ValueError,
         "ExactTable needs 8 codes of QFormat(bits=3, frac=2, signed=True)"),
        (lambda: HardTable("tanh").lookup(1, QFormat(16, 49), QFormat(16, 15)), ValueError,
         "HardTable needs inputs of at most 48 fraction bits, got QFormat(bits=16, frac=49, signed=True)"),
    ],
)
def test_messages(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_json_round_trip():
    fmt = QFormat(12, -3, signed=False)
    assert QFormat.from_json(fmt.to_json()) == fmt


@pytest.mark.parametrize("shape", [(1, 23), (23, 1), (7, 5, 3), (0, 4), (4, 0), (), (50,)])
@pytest.mark.parametrize("arranged", [lambda x: x, lambda x: x.T, lambda x: x[..., ::2] if x.ndim else x])
def test_quantising_in_pieces_changes_nothing(shape, arranged, monkeypatch):
    """Pieces of 8 leave rests in most of these shapes."""
    x = arranged(np.random.default_rng(0).normal(scale=4, size=shape))
    fmt = fixedpoint.QFormat(5, 2)
    expected = fmt.quantise(x)
    monkeypatch.setattr(fixedpoint, "PIECE", 8)
    found = fmt.quantise(x)
    assert found.dtype == np.int64 and found.shape == x.shape
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, np.clip(np.floor(np.asarray(x) * 4 + 0.5), -16, 15))


def test_nan_in_the_last_piece_is_counted(monkeypatch):
    monkeypatch.setattr(fixedpoint, "PIECE", 8)
    x = np.zeros((5, 6))
    x[4, 5] = np.nan
    for values in (x, x.T, np.where(np.isnan(x), x, np.inf)):
        with pytest.raises(ValueError, match="cannot hold NaN: 1 of 30 values are NaN"):
            fixedpoint.QFormat(8, 4).quantise(values)
