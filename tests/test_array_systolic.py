"""The systolic array: hand numbers, SCALE-Sim's cycles, values, messages."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_array import COARSE, KINDS, SIGNALS, dense_layer, hybrid_layer

from workbench import tables
from workbench.array import systolic
from workbench.array.mapping import sums_of
from workbench.array.systolic import OMITTED, SYSTOLIC, SystolicArray, last_cycle, layer_products, run_product

# M, N, K of the products of one time step, batch 1: LSTM of 160 and 512 (L1); of 153 and 1024 projected to 512 (L2).
STEP = [(1, 2048, 672), (1, 4096, 665), (1, 512, 1024)]
SIZES = STEP + [(100, n, k) for _, n, k in STEP]
# SCALE-Sim 3.0.0, "Total Cycles" of SIZES.
SCALE_SIM = {
    "os16x16": [89855, 177919, 33727, 628991, 1245439, 236095],
    "os32x32": [46975, 93055, 17375, 187903, 372223, 69503],
    "ws16x16": [252671, 505343, 96255, 784895, 1569791, 299007],
    "ws32x32": [127679, 255359, 48639, 260735, 521471, 99327],
}
# The same of products drawn at random: array, (M, N, K), cycles.
SCALE_SIM_SMALL = [
    ((4, 4, "os"), [(5, 12, 17), (1, 15, 8), (1, 6, 4), (6, 16, 8)], [137, 55, 19, 111]),
    ((4, 4, "ws"), [(7, 18, 4), (4, 1, 7), (7, 9, 6), (7, 6, 3)], [84, 27, 101, 33]),
    ((3, 5, "os"), [(3, 20, 20), (8, 5, 5), (1, 1, 7), (4, 6, 6)], [103, 32, 12, 47]),
    ((3, 5, "ws"), [(5, 11, 7), (9, 7, 6), (4, 13, 10), (1, 12, 14)], [125, 71, 155, 149]),
    ((8, 2, "os"), [(3, 5, 9), (2, 11, 10), (1, 20, 11), (2, 10, 12)], [50, 107, 189, 99]),
    ((8, 2, "ws"), [(5, 16, 11), (3, 16, 16), (3, 2, 9), (1, 12, 13)], [335, 303, 37, 203]),
]


def operands(m, n, k, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-99, 100, (m, k)), rng.integers(-99, 100, (k, n))


def test_one_output_stationary_tile_by_hand():
    """2 x 2 PEs, sums of 3 products. PE (0, 0) multiplies in cycles 0, 1, 2; its neighbours a cycle later, as do the operands;
    PE (1, 1) in cycles 2, 3, 4: the last sum leaves in cycle 4."""
    run = run_product([[1, 2, 3], [4, 5, 6]], [[7, 10], [8, 11], [9, 12]], SystolicArray(2, 2, "os"))
    assert run.product.tolist() == [[50, 68], [122, 167]]
    assert (run.last_cycle, run.tiles, run.macs) == (4, 1, 12)


def test_one_weight_stationary_tile_by_hand():
    """2 x 2 PEs, one row of 2 operands. Cycles 0 and 1 shift the weights in. Operand 0 is in PE (0, 0) in cycle 2, in (0, 1) in
    cycle 3; operand 1, a cycle behind, meets the sum of column 0 in cycle 3, that of column 1 in cycle 4, where it leaves."""
    run = run_product([[2, 3]], [[5, 7], [11, 13]], SystolicArray(2, 2, "ws"))
    assert run.product.tolist() == [[43, 53]]
    assert (run.last_cycle, run.tiles, run.macs) == (4, 1, 4)


def test_tiles_follow_one_another_by_hand():
    """One row of 2 x 2 PEs works: 3 columns in two tiles of 2 + 2 + 2 - 2 cycles, padding multiplied as all else."""
    run = run_product([[1, 1]], [[1, 2, 3], [4, 5, 6]], SystolicArray(2, 2, "os"))
    assert run.product.tolist() == [[5, 7, 9]]
    assert (run.last_cycle, run.tiles, run.macs) == (7, 2, 16)


@pytest.mark.parametrize("name", SCALE_SIM)
def test_cycles_are_those_of_scale_sim(name):
    assert last_cycle(*np.transpose(SIZES), SYSTOLIC[name]).tolist() == SCALE_SIM[name]
    assert run_product(*operands(*SIZES[2]), SYSTOLIC[name]).last_cycle == SCALE_SIM[name][2]


@pytest.mark.parametrize(("array", "sizes", "cycles"), SCALE_SIM_SMALL)
def test_cycles_of_small_products_are_those_of_scale_sim(array, sizes, cycles):
    array = SystolicArray(*array)
    assert [run_product(*operands(*size), array).last_cycle for size in sizes] == cycles


@settings(max_examples=100, deadline=None)
@given(*[st.integers(1, 9)] * 3, st.integers(1, 5), st.integers(1, 5), st.sampled_from(["os", "ws"]), st.integers(0, 99))
def test_the_count_equals_the_literal_array(m, n, k, rows, cols, dataflow, seed):
    array, (a, b) = SystolicArray(rows, cols, dataflow), operands(m, n, k, seed)
    run = run_product(a, b, array)
    np.testing.assert_array_equal(run.product, a @ b)
    assert run.last_cycle == last_cycle(m, n, k, array)
    held = (k, n) if dataflow == "ws" else (m, n)
    assert run.macs == run.tiles * rows * cols * (m if dataflow == "ws" else k)
    assert run.tiles == -(-held[0] // rows) * -(-held[1] // cols)


@pytest.mark.parametrize("signals", [SIGNALS, COARSE], ids=["equal", "coarse"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_a_layer(kind, signals):
    """The sums that a gate rounds, from the operands of one step, whatever the stored form."""
    layer, rng = hybrid_layer(8, 3, signals=signals, **KINDS[kind]), np.random.default_rng(1)
    operand = {part: rng.integers(-4096, 4096, layer.block(part, gate).shape[1])
               for part, gate in layer.products}  # one vector for each part
    matrices = layer_products(layer)
    vectors = {"gates": np.concatenate([operand["ih"], operand["hh"]]), "projection": operand.get("hr")}
    for array in (SystolicArray(4, 4, "os"), SystolicArray(4, 4, "ws")):
        found = {name: run_product(vectors[name][None], w.T, array).product[0] for name, w in matrices.items()}
        gates = found["gates"].reshape(-1, layer.hidden_size)
        for band, (name, products) in zip(gates, ((n, p) for n, p in sums_of(layer).items() if n != "p"), strict=True):
            frac = layer.product_frac(*products[0]) if name == "hn" else layer.alignment(products[0][1])[0]
            expected = sum((layer.block(*p).dense() @ operand[p[0]]) << (frac - layer.product_frac(*p)) for p in products)
            np.testing.assert_array_equal(band, expected)
        if layer.projected:
            np.testing.assert_array_equal(found["projection"], layer.block("hr", "p").dense() @ operand["hr"])


def test_operands_out_of_step_are_seen(monkeypatch):
    """Row 1 enters a cycle early: its operand meets that of another place."""
    entering = systolic._entering
    monkeypatch.setattr(systolic, "_entering", lambda lanes, place: entering(lanes, place + (place == place[0] - 1)))
    for dataflow in ("os", "ws"):
        with pytest.raises(RuntimeError, match="hazard"):
            run_product(*operands(3, 2, 2), SystolicArray(2, 2, dataflow))


def test_what_it_omits_is_said():
    assert all(len(row) == 3 and all(row) for row in OMITTED)
    assert {"recurrence", "gates", "memories at the edges"} <= set(tables.omission_table()["left out"])


def test_table_of_a_projected_layer():
    table = tables.systolic_table({"small": dense_layer(32, 8, proj=16)}).set_index("product")
    assert table["rows x columns"].to_dict() == {"gates": "128 x 24", "projection": "16 x 32"}
    assert table.loc["gates", "os16x16"] == 8 * (24 + 16 + 16 - 2) - 1
    assert table.loc["projection", "ws16x16"] == 2 * (2 * 16 + 16 + 1 - 2) - 1


@pytest.mark.parametrize(("array", "message"), [
    ((0, 4, "os"), "SystolicArray needs a whole number of rows of at least 1, got 0"),
    ((4, 2.0, "os"), "SystolicArray needs a whole number of columns of at least 1, got 2.0"),
    ((4, 4, "is"), "SystolicArray knows the dataflows os, ws, got 'is'")])
def test_arrays_are_checked(array, message):
    with pytest.raises(ValueError, match=message):
        SystolicArray(*array)


@pytest.mark.parametrize(("a", "b", "message"), [
    ([[1, 2]], [[1, 2]], r"matrices \(M, K\) and \(K, N\), got \(1, 2\) and \(1, 2\)"),
    ([1, 2], [[1], [2]], r"got \(2,\) and \(2, 1\)"),
    (np.zeros((0, 2), int), [[1], [2]], r"got \(0, 2\)"),
    ([[1.0]], [[1]], "needs integers, got float64 and int64"),
    ([[1 << 31] * 2], [[1 << 31]] * 2, "sums under 2\\*\\*63, got operands whose sums may reach 9223372036854775808")])
def test_products_are_checked(a, b, message):
    with pytest.raises(ValueError, match=message):
        run_product(a, b, SYSTOLIC["os16x16"])


@pytest.mark.parametrize(("sizes", "message"), [
    ((0, 1, 1), "at least 1 for m, got 0"), ((1, [2, -1], 1), r"at least 1 for n, got \[2, -1\]"),
    ((1, 1, 1.5), "at least 1 for k, got 1.5")])
def test_sizes_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        last_cycle(*sizes, SYSTOLIC["os16x16"])
