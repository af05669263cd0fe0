"""Fixed point: hand numbers, apytypes and Python's own integers as oracles, exactness of products, messages."""

import math
from fractions import Fraction

import numpy as np
import pytest
from apytypes import APyFixed, OverflowMode, QuantizationMode
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.fixedpoint import FUNCTIONS, LinearTable, ExactMatrix, QFormat, requantise

TABLES = {name: LinearTable.build(name) for name in FUNCTIONS}


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


@given(st.integers(2, 32), st.integers(-20, 30), st.integers(-(2**40), 2**40), st.integers(0, 25))
def test_quantise_against_apytypes(bits, frac, numerator, denominator_log2):
    x = math.ldexp(numerator, -denominator_log2 - frac + 2)  # few bits beyond the format: many ties
    exact = APyFixed.from_float(x, int_bits=110, frac_bits=64)
    oracle = exact.cast(int_bits=bits - frac, frac_bits=frac, quantization=QuantizationMode.TIES_POS, overflow=OverflowMode.SAT)
    assert float(exact) == x
    assert Fraction(int(QFormat(bits, frac).quantise(x))) / Fraction(2) ** frac == Fraction(float(oracle))


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
        assert TABLES[name].knots.tolist() == [math.floor(exact(n / 32) * 2**15 + 0.5) for n in range(257)]


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
    assert TABLES[function].lookup(np.array([[q]]), in_fmt, out_fmt).tolist() == [[expected]]


@pytest.mark.parametrize("function", FUNCTIONS)
@given(in_fmt=formats(frac=(-10, 48)), out_fmt=formats(bits=(2, 24), frac=(0, 24)), data=st.data())
def test_lookup_against_the_literal_definition(function, in_fmt, out_fmt, data):
    codes = st.integers(in_fmt.min, in_fmt.max)
    near_zero = st.integers(max(in_fmt.min, -300), min(in_fmt.max, 300))
    q = data.draw(st.lists(codes | near_zero, min_size=1, max_size=10))
    table = TABLES[function]
    assert table.lookup(q, in_fmt, out_fmt).tolist() == [literal_lookup(table, n, in_fmt, out_fmt) for n in q]


def test_tables_are_symmetric_about_their_middle():
    in_fmt, q = QFormat(12, 8), np.arange(1, 2048)
    fine = QFormat(32, 30)  # fine enough that nothing is rounded
    assert np.array_equal(TABLES["tanh"].lookup(-q, in_fmt, fine), -TABLES["tanh"].lookup(q, in_fmt, fine))
    assert np.array_equal(TABLES["sigmoid"].lookup(-q, in_fmt, fine), 2**30 - TABLES["sigmoid"].lookup(q, in_fmt, fine))


def test_error_of_the_tables():
    in_fmt = QFormat(16, 12)
    for function, out_fmt in (("sigmoid", QFormat(16, 16, signed=False)), ("tanh", QFormat(16, 15))):
        q = np.arange(-(2**15), 2**15)
        exact = FUNCTIONS[function](q / 2**12)
        error = np.abs(TABLES[function].lookup(q, in_fmt, out_fmt) - exact * 2**out_fmt.frac).max()
        assert TABLES[function].max_error_ulp(in_fmt, out_fmt) == pytest.approx(error)
        # Chord over 1/32: |f''| / 8 / 1024, with |f''| under 0.1 (sigmoid) and 0.77 (tanh); knots and result round once each.
        curvature = {"sigmoid": 0.0963, "tanh": 0.7699}[function]
        knot = 2.0 ** (out_fmt.frac - 15) / 2
        tail = (1 - float(FUNCTIONS[function](np.float64(8)))) * 2**out_fmt.frac if function == "sigmoid" else 0.1
        assert error <= max(curvature / 8 / 1024 * 2**out_fmt.frac, tail) + knot + 0.5


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
        (lambda: LinearTable("relu", TABLES["tanh"].knots), ValueError, "LinearTable knows sigmoid, tanh, got 'relu'"),
        (lambda: LinearTable("tanh", np.zeros(256, dtype=np.int64)), ValueError,
         "LinearTable needs 257 knots of 16 bits, got shape (256,)"),
        (lambda: TABLES["tanh"].lookup(1, QFormat(16, 49), QFormat(16, 15)), ValueError,
         "LinearTable needs inputs of at most 48 fraction bits, got QFormat(bits=16, frac=49, signed=True)"),
        (lambda: TABLES["tanh"].max_error_ulp(QFormat(21, 12), QFormat(16, 15)), ValueError,
         "at most 20 bits, got QFormat(bits=21"),
    ],
)
def test_messages(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_json_round_trip():
    fmt = QFormat(12, -3, signed=False)
    assert QFormat.from_json(fmt.to_json()) == fmt
