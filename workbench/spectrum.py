"""Block-circulant products in the frequency domain, in integers: spectra of weights, transforms, exact bounds.

A real vector of k values (k a power of two) has a Hermitian spectrum: k real words, the real parts of the bins 0 to k/2, then
the imaginary parts of the bins 1 to k/2 - 1. The transforms are real ones, radix 2, unscaled. A spectrum of n is made of those
of the even and the odd values, E and O of m = n/2, for j from 0 to m/2 (the bins m/2 to m are mirrored):

    t = w**j O[j], w = exp(-2 pi i / n), one half-up rounding of each real part; X[j] = E[j] + t, X[m - j] = conj(E[j] - t)

The inverse takes it apart: E[j] = X[j] + conj(X[m - j]), O[j] = (X[j] - conj(X[m - j])) / w**j, rounded likewise; it ends with
k times the vector. Where w**j is 1 or -i nothing is multiplied and nothing rounds (16384 * a rounds to a).
"""

from functools import cache

import numpy as np

from workbench.fixedpoint import exact_float

TWIDDLE_BITS, TWIDDLE_FRAC = 16, 14  # of a transform's constants; 1 itself is one of them
TABLE_FRAC = 30  # of those from which the spectra of weights are computed, once
OPERAND_BITS = 27  # of every word that a transform takes and gives
WORD_BITS = 18  # of a spectrum's words, at most


def half_up(values, shift: int):
    """One half-up rounding: the last `shift` bits are dropped."""
    return (values + (1 << (shift - 1))) >> shift if shift else values


def _circle(n, frac):
    """(n,) cos and sin of 2 pi j / n in integers. No entry lies so near to a tie that machines could differ."""
    angle = 2 * np.pi * np.arange(n) / n
    return tuple(np.floor(np.ldexp(f(angle), frac) + 0.5).astype(np.int64) for f in (np.cos, np.sin))


@cache
def twiddles(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n // 4 + 1,) cos and sin of 2 pi j / n, those of w**j for j from 0 to n/4."""
    return tuple(values[: n // 4 + 1] for values in _circle(n, TWIDDLE_FRAC))


def word_bits(bits: int, k: int) -> int:
    """Width of the spectrum's words of a vector of signed `bits`-bit values."""
    return min(bits + k.bit_length() - 1, WORD_BITS)


def weight_spectra(vectors, bits: int) -> np.ndarray:
    """(..., k) signed values of `bits` bits -> (..., k) words of their spectra, rounded half up once to word_bits."""
    k = vectors.shape[-1]
    cos, sin = _circle(k, TABLE_FRAC)
    turns = np.arange(k)[:, None] * np.arange(k // 2 + 1) % k  # (value, bin)
    words = vectors @ np.concatenate([cos[turns], -sin[turns[:, 1 : k // 2]]], axis=1)
    width = word_bits(bits, k)
    largest = (1 << (width - 1)) - 1
    return np.clip(half_up(words, TABLE_FRAC + bits + k.bit_length() - 1 - width), -largest - 1, largest)


def parts(words) -> tuple[np.ndarray, np.ndarray]:
    """(..., k) words -> real and imaginary parts of the bins 0 to k/2, (..., k // 2 + 1) each."""
    bins = words.shape[-1] // 2 + 1
    im = np.zeros((*words.shape[:-1], bins), words.dtype)
    im[..., 1:-1] = words[..., bins:]
    return words[..., :bins], im


def forward(x) -> tuple[np.ndarray, np.ndarray]:
    """(..., k) integers -> real and imaginary parts of their spectrum."""
    n = x.shape[-1]
    if n == 1:
        return x, np.zeros_like(x)
    (e_re, e_im), (o_re, o_im), (cos, sin) = forward(x[..., ::2]), forward(x[..., 1::2]), twiddles(n)
    t_re, t_im = half_up(cos * o_re + sin * o_im, TWIDDLE_FRAC), half_up(cos * o_im - sin * o_re, TWIDDLE_FRAC)
    return _mirrored(e_re + t_re, e_re - t_re, n), _mirrored(e_im + t_im, t_im - e_im, n)


def _mirrored(first, last, n):
    """Bins j and n/2 - j side by side; the middle one is both."""
    return np.concatenate([first, last[..., (n // 2 - 1) // 2 :: -1]], axis=-1)


def inverse(re, im) -> np.ndarray:
    """Real and imaginary parts of a spectrum -> (..., k) integers, k times the vector."""
    n = 2 * (re.shape[-1] - 1)
    if n == 0:
        return re
    (cos, sin), count = twiddles(n), n // 4 + 1
    a_re, a_im, b_re, b_im = re[..., :count], im[..., :count], re[..., ::-1][..., :count], im[..., ::-1][..., :count]
    d_re, d_im = a_re - b_re, a_im + b_im
    odd = half_up(cos * d_re - sin * d_im, TWIDDLE_FRAC), half_up(cos * d_im + sin * d_re, TWIDDLE_FRAC)
    return np.stack([inverse(a_re + b_re, a_im - b_im), inverse(*odd)], axis=-1).reshape(*re.shape[:-1], n)


def _turned(re, im, cos, sin):
    """Largest magnitudes of the two parts of a rounded twiddle product; re, im: of what is multiplied."""
    return half_up(cos * re + sin * im, TWIDDLE_FRAC), half_up(cos * im + sin * re, TWIDDLE_FRAC)


def forward_bounds(magnitude: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(k // 2 + 1,) largest magnitudes of the real and imaginary parts of the spectrum of values up to `magnitude`; no word
    on the way is larger than the largest of them."""
    re, im, n = np.array([magnitude]), np.array([0]), 1
    while n < k:
        n *= 2
        t_re, t_im = _turned(re, im, *twiddles(n))
        re, im = _mirrored(re + t_re, re + t_re, n), _mirrored(im + t_im, im + t_im, n)
    return re, im


def inverse_bounds(re, im) -> tuple[np.ndarray, int]:
    """(..., k) largest magnitudes of what `inverse` gives, and the largest of any word on the way; re, im: of its inputs."""
    n, largest = 2 * (re.shape[-1] - 1), int(max(re.max(), im.max()))
    if n == 0:
        return re, largest
    (cos, sin), count = twiddles(n), n // 4 + 1
    e_re, e_im = (part[..., :count] + part[..., ::-1][..., :count] for part in (re, im))
    d_re, d_im = e_re.copy(), e_im.copy()
    if n > 2:  # the bin in the middle meets itself: E is real, the difference imaginary
        e_im[..., -1] = d_re[..., -1] = 0
    even, most_even = inverse_bounds(e_re, e_im)
    odd, most_odd = inverse_bounds(*_turned(d_re, d_im, cos, sin))
    return np.stack([even, odd], axis=-1).reshape(*re.shape[:-1], n), max(largest, most_even, most_odd, int(d_re.max()),
                                                                         int(d_im.max()))


def real_operations(k: int, back: bool) -> tuple[int, int]:
    """Real additions and multiply-accumulates of one transform of k, forward or back: per size n two additions where w**j is
    1, four of each for every other j below n/4; at n/4 the inverse doubles two words."""
    sizes = [1 << s for s in range(1, k.bit_length())]
    turns = sum(k // n * max(n // 4 - 1, 0) for n in sizes)
    return sum(k // n * (2 + 2 * (back and n > 2)) for n in sizes) + 4 * turns, 4 * turns


class SpectralProduct:
    """Products of a block-circulant matrix and vectors of integers up to `magnitude`, in the frequency domain.

    words: (out tiles, in tiles, k) spectra of its tiles; columns: of the matrix, what is missing in the last tile is zero. Per
    output tile: exact sums of spectrum products over the input tiles; one half-up rounding by `shift` bits, the fewest with
    which every word of the inverse has OPERAND_BITS by the exact bounds (sums of 48 bits are no operands of a multiplication);
    the inverse. So the results have log2(k) - shift fraction bits more than the products.
    """

    def __init__(self, words, columns: int, magnitude: int):
        self.words, self.columns, self.k = words, columns, words.shape[-1]
        self.spectrum_bounds = forward_bounds(magnitude, self.k)
        x_re, x_im = self.spectrum_bounds
        w_re, w_im = (np.abs(part) for part in parts(words))
        sums = (w_re * x_re + w_im * x_im).sum(1), (w_re * x_im + w_im * x_re).sum(1)  # (out tiles, bins)
        self.sum_bound = max(int(part.max()) for part in sums)
        self.shift = max(0, self.sum_bound.bit_length() - OPERAND_BITS + 1)
        while True:
            bounds, largest = inverse_bounds(*(half_up(part, self.shift) for part in sums))
            if largest < 1 << (OPERAND_BITS - 1):
                break
            self.shift += 1
        self.row_bounds = bounds.ravel().tolist()

    @property
    def more_frac(self) -> int:
        """Fraction bits of the results beyond those of a spectrum's word times an input."""
        return self.k.bit_length() - 1 - self.shift

    def spectra(self, x) -> tuple[np.ndarray, np.ndarray]:
        """x: (..., columns) int64 -> real and imaginary parts of its tiles' spectra, (..., in tiles, bins)."""
        tiles = self.words.shape[1]
        padded = np.zeros((*x.shape[:-1], tiles * self.k), dtype=np.int64)
        padded[..., : self.columns] = x
        return forward(padded.reshape(*x.shape[:-1], tiles, self.k))

    def results(self, re, im) -> np.ndarray:
        """Sums of the spectrum products (..., out tiles, bins) -> (..., rows) int64."""
        return inverse(half_up(re, self.shift), half_up(im, self.shift)).reshape(*re.shape[:-2], -1)

    def __call__(self, x) -> np.ndarray:
        """x: (..., columns) integers -> (..., rows) int64."""
        x_re, x_im = self.spectra(x)
        sums = self._products(np.concatenate([x_re, x_im], axis=-2))  # (..., bins, 2 * out tiles)
        return self.results(*np.split(np.swapaxes(sums, -1, -2), 2, axis=-2))

    def _products(self, spectra):
        """(..., 2 * in tiles, bins) -> (..., bins, 2 * out tiles), real parts first, exact; each bin is a small matrix."""
        if not hasattr(self, "_matrices"):
            w_re, w_im = (part.transpose(2, 1, 0) for part in parts(self.words))  # (bins, in tiles, out tiles)
            matrices = np.concatenate([np.concatenate([w_re, w_im], -1), np.concatenate([-w_im, w_re], -1)], 1)
            self._matrices = matrices.astype(exact_float(self.sum_bound) or np.int64)
        lead, flat = spectra.shape[:-2], spectra.reshape(-1, *spectra.shape[-2:]).transpose(2, 0, 1)  # (bins, n, 2 * in tiles)
        sums = flat.astype(self._matrices.dtype) @ self._matrices
        return sums.astype(np.int64).transpose(1, 0, 2).reshape(*lead, sums.shape[0], sums.shape[2])
