"""A plain systolic array, for comparison with SCALE-Sim only: what it computes and when, cycle by cycle.

The array processor (interpreter.py) multicasts operands and keeps weights in its PEs. This is the other, well known array:
operands enter at the edges and move one PE per cycle. It shares no rule with the array processor, and no figure of a layer
comes from here; it shows that cycles counted from registers are the peer's where both model the same thing.

run_product is literal: registers of PEs, a loop over cycles; its cycles are counted by that loop. last_cycle is the closed form
that a test holds equal to it, for sizes at which the loop takes long. OMITTED says what both leave out.
"""

from dataclasses import dataclass

import numpy as np

from workbench.array.mapping import sums_of
from workbench.array.spec import ceil_div
from workbench.checks import check_whole, plain_numbers
from workbench.packed import PackedLayer

DATAFLOWS = {"os": "output stationary", "ws": "weight stationary"}
BUBBLE = -1  # tag of a register that holds no operand

# What the systolic model leaves out: (what, what it assumes, what the array processor does).
OMITTED = (
    ("recurrence", "one product alone; a sequence would be the sum of its steps",
     "step t + 1 waits until the last word of h is in the PEs"),
    ("gates", "no bias, rounding, look-up or element-wise product", "activation units with latency and interval"),
    ("pipeline of a PE", "multiply and add within a cycle", "mac_latency and mac_ii"),
    ("memories at the edges", "every operand is there in its cycle, as from SCALE-Sim's buffers without a stall",
     "weights in the PEs or streamed by the loader; x and h by multicast"),
    ("double buffering", "the next tile begins when the last result of a tile has left; weights are shifted in before, never "
     "while, a tile multiplies", "two accumulator banks, two streaming buffers"),
    ("results of an output-stationary tile", "each leaves in the cycle of its last product, over a bus per column; shifted out "
     "from PE to PE they would take rows - 1 cycles more a tile", "drained along the PE row, one hop per cycle"),
    ("sums of a weight-stationary product over several tiles", "added outside the array, free",
     "kept in the accumulators of the PE"),
    ("unused rows and columns", "a tile takes as long as a full one: one row of operands fills one PE row of them",
     "every PE works on a matrix-vector product"),
    ("sparsity, circulant blocks", "dense only", "every packed form"),
)  # fmt: skip


@dataclass(frozen=True)
class SystolicArray:
    """rows, cols: PEs; dataflow: "os" (every PE keeps a sum) or "ws" (every PE keeps a weight)."""

    rows: int
    cols: int
    dataflow: str

    def __post_init__(self):
        plain_numbers(self)
        check_whole("SystolicArray", "number of rows", self.rows, 1)
        check_whole("SystolicArray", "number of columns", self.cols, 1)
        if self.dataflow not in DATAFLOWS:
            raise ValueError(f"SystolicArray knows the dataflows {', '.join(DATAFLOWS)}, got {self.dataflow!r}")


SYSTOLIC = {f"{flow}{side}x{side}": SystolicArray(side, side, flow) for flow in DATAFLOWS for side in (16, 32)}


@dataclass(frozen=True)
class SystolicRun:
    """last_cycle: number, from 0, of the cycle in which the last result leaves: SCALE-Sim's "Total Cycles"; macs: products of
    operands, padding included."""

    product: np.ndarray  # (M, N) int64, exact
    last_cycle: int
    tiles: int
    macs: int


def run_product(a, b, array: SystolicArray) -> SystolicRun:
    """a (M, K) times b (K, N), integers, on the array, tile after tile; M is 1 for a step at batch 1.

    Output stationary: a tile is rows x cols of the product; a enters from the left, b from above. Weight stationary: a tile is
    rows x cols of b, shifted in from above; a enters from the left, sums move down. Tiles at the edge are padded with zeros,
    which are multiplied as all else.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or not a.size or not b.size:
        raise ValueError(f"run_product needs matrices (M, K) and (K, N), got {a.shape} and {b.shape}")
    if a.dtype.kind not in "iu" or b.dtype.kind not in "iu":
        raise ValueError(f"run_product needs integers, got {a.dtype} and {b.dtype}")
    largest = a.shape[1] * int(np.abs(a.astype(object)).max()) * int(np.abs(b.astype(object)).max())
    if largest >= 1 << 63:
        raise ValueError(f"run_product needs sums under 2**63, got operands whose sums may reach {largest}")
    a, b = a.astype(np.int64), b.astype(np.int64)
    (m, k), n = a.shape, b.shape[1]
    rows, cols = array.rows, array.cols
    product, now, tiles, macs = np.zeros((m, n), dtype=np.int64), 0, 0, 0
    for low in range(0, n, cols):
        b_cols = _padded(b[:, low : low + cols], k, cols)
        for top in range(0, m if array.dataflow == "os" else k, rows):
            if array.dataflow == "os":
                sums, cycles, done = _output_stationary(_padded(a[top : top + rows], rows, k), b_cols)
                part = product[top : top + rows, low : low + cols]
            else:
                a_tile, b_tile = _padded(a[:, top : top + rows], m, rows), _padded(b_cols[top : top + rows], rows, cols)
                sums, cycles, done = _weight_stationary(a_tile, b_tile)
                part = product[:, low : low + cols]
            part += sums[: part.shape[0], : part.shape[1]]
            now, tiles, macs = now + cycles, tiles + 1, macs + done
    return SystolicRun(product, now - 1, tiles, macs)


def _padded(matrix, rows, cols):
    return np.pad(matrix, ((0, rows - matrix.shape[0]), (0, cols - matrix.shape[1])))


def _output_stationary(a, b):
    """a (rows, K), b (K, cols) -> sums (rows, cols), cycles, multiply-accumulates. An operand carries its place in the sum."""
    (rows, length), cols = a.shape, b.shape[1]
    west, north = np.arange(rows), np.arange(cols)
    x, y, acc, sums = (np.zeros((rows, cols), dtype=np.int64) for _ in range(4))
    x_tag, y_tag = np.full((rows, cols), BUBBLE), np.full((rows, cols), BUBBLE)
    left, now, macs = rows * cols, 0, 0
    while left:
        # Every register takes its neighbour's value, the edge what is due: operand k enters row r or column c in cycle k + r or
        # k + c.
        x[:, 1:], x_tag[:, 1:], y[1:], y_tag[1:] = x[:, :-1], x_tag[:, :-1], y[:-1], y_tag[:-1]
        x[:, 0], x_tag[:, 0] = _entering(a, now - west)
        y[0], y_tag[0] = _entering(b.T, now - north)
        if (x_tag != y_tag).any():
            raise RuntimeError(f"hazard: operands of different places meet in cycle {now}")
        acc += x * y
        macs += int((x_tag != BUBBLE).sum())
        complete = x_tag == length - 1  # the last operand has come: the sum leaves over the bus of its column
        if complete.sum(axis=0).max() > 1:
            raise RuntimeError(f"hazard: two results on the bus of a column in cycle {now}")
        sums[complete] = acc[complete]
        left -= int(complete.sum())
        now += 1
    return sums, now, macs


def _weight_stationary(a, b):
    """a (M, rows), b (rows, cols) -> sums (M, cols), cycles, multiply-accumulates. An operand carries its row of a."""
    (m, rows), cols = a.shape, b.shape[1]
    west = np.arange(rows)
    weight, x, total = (np.zeros((rows, cols), dtype=np.int64) for _ in range(3))
    x_tag, total_tag = np.full((rows, cols), BUBBLE), np.full((rows, cols), BUBBLE)
    sums, left, now, macs = np.zeros((m, cols), dtype=np.int64), m * cols, 0, 0
    for row in range(rows - 1, -1, -1):  # the weights of the last row enter first and have the longest way
        weight[1:] = weight[:-1]
        weight[0] = b[row]
        now += 1
    start = now
    while left:
        # Operand m of row r enters in cycle m + r; a new sum, begun above the first row, meets it in every row.
        x[:, 1:], x_tag[:, 1:], total[1:], total_tag[1:] = x[:, :-1], x_tag[:, :-1], total[:-1], total_tag[:-1]
        x[:, 0], x_tag[:, 0] = _entering(a.T, now - start - west)
        total[0], total_tag[0] = 0, x_tag[0]
        if (x_tag != total_tag).any():
            raise RuntimeError(f"hazard: an operand meets the sum of another row in cycle {now}")
        total += weight * x
        macs += int((x_tag != BUBBLE).sum())
        out = np.flatnonzero(total_tag[-1] != BUBBLE)  # below the last row: they leave
        sums[total_tag[-1, out], out] = total[-1, out]
        left -= out.size
        now += 1
    return sums, now, macs


def _entering(lanes, place):
    """lanes (n, length), place (n,) -> the value of each lane at its place and the place as tag; 0 and BUBBLE outside."""
    inside = (place >= 0) & (place < lanes.shape[1])
    tags = np.where(inside, place, BUBBLE)
    return np.where(inside, lanes[np.arange(len(lanes)), tags], 0), tags


def last_cycle(m, n, k, array: SystolicArray) -> np.ndarray:
    """SystolicRun.last_cycle of a product (m, k) times (k, n) without running it; m, n, k may be arrays.

    Output stationary: a tile lasts until the farthest PE, rows - 1 and cols - 1 hops away, has its k-th operand; weight
    stationary: rows cycles of weights, then m operands, rows - 1 and cols - 1 hops.
    """
    m, n, k = np.broadcast_arrays(m, n, k)
    for name, size in (("m", m), ("n", n), ("k", k)):
        if size.dtype.kind not in "iu" or size.min() < 1:
            raise ValueError(f"last_cycle needs whole numbers of at least 1 for {name}, got {size.tolist()!r}")
    if array.dataflow == "os":
        return ceil_div(m, array.rows) * ceil_div(n, array.cols) * (k + array.rows + array.cols - 2) - 1
    return ceil_div(k, array.rows) * ceil_div(n, array.cols) * (2 * array.rows + array.cols + m - 2) - 1


def layer_products(layer: PackedLayer) -> dict[str, np.ndarray]:
    """The matrices (out, in) int64 of one time step, dense: "gates" multiplies [x, h], a band of rows for each sum of the layer
    (sums_of) and zeros where a part does not join it, both parts shifted to the sum's fraction; "projection" multiplies m."""
    def band(products):
        parts = {"ih": np.zeros((layer.hidden_size, layer.input_size), dtype=np.int64),
                 "hh": np.zeros((layer.hidden_size, layer.output_size), dtype=np.int64)}
        for part, gate in products:
            shift = 0 if products == (("hh", gate),) else layer.alignment(gate)[1 if part == "ih" else 2]
            parts[part] = layer.block(part, gate).dense().astype(np.int64) << shift
        return np.hstack(list(parts.values()))

    sums = sums_of(layer)
    products = {"gates": np.vstack([band(sums[name]) for name in sums if name != "p"])}
    return products | ({"projection": layer.block("hr", "p").dense().astype(np.int64)} if layer.projected else {})
