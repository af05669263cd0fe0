"""Zero and delta skipping on the array: hand numbers, the literal interpreter as oracle, messages."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_array import KINDS, SMALL, dense_layer, hybrid_layer, one_region, tiny_cases
from test_array_forms import cases as low_rank_cases

from workbench.array import execute_layer, map_layer, multiplied, schedule_layer
from workbench.array.cost import Memory, resources
from workbench.array.interpreter import interpret
from workbench.array.mapping import candidate_layouts, fitting_mappings, least_cycles
from workbench.array.schedule import schedule_mapping
from workbench.engine import run_layer
from workbench.packed import PARTS


def check(mapping, x):
    """Values, spans and events of the schedule are the interpreter's. x: (T, B, input_size) or (T, input_size)."""
    x = x[:, None] if x.ndim == 2 else x
    layer, steps = mapping.layer, len(x)
    literal, schedule = interpret(mapping, x), schedule_mapping(mapping, steps, multiplied(layer, x))
    engine, executed = run_layer(layer, x), execute_layer(layer, mapping.spec, x, mapping.layout)
    np.testing.assert_array_equal(np.array(literal.output), engine.output)
    np.testing.assert_array_equal(executed.output, engine.output)
    assert literal.cycles == schedule.cycles == executed.schedule.cycles == sum(schedule.split().values())
    for (step, n), span in literal.spans.items():
        if step >= 0:
            assert (schedule.starts[step, n], schedule.ends[step, n]) == span, (step, mapping.program[n])
    assert literal.counts == {event: count for event, count in schedule.counts().items() if count}
    plain = schedule_mapping(replace(mapping, spec=mapping.spec.with_(lookahead=1)), steps)
    counts = schedule.counts()
    assert counts["macs"] + counts["skipped_macs"] == plain.counts()["macs"]
    assert round(schedule.utilisation().sum() * schedule.cycles) == counts["macs"] and schedule.utilisation().max() <= 1
    return schedule


def sequence(layer, steps, density, seed, batch=1):
    rng, shape = np.random.default_rng(seed), (steps, batch, layer.input_size)
    return rng.integers(-4096, 4096, shape) * (rng.random(shape) < density)


@st.composite
def skipping_cases(draw, cases):
    mapping, steps, seed = draw(cases)
    layer = mapping.layer
    names = sorted({PARTS[part] for part, _ in layer.products})
    chosen = draw(st.lists(st.sampled_from(names), unique=True))
    layer = replace(layer, delta={name: draw(st.sampled_from([0, 300, 3000])) for name in chosen})
    spec = mapping.spec.with_(lookahead=draw(st.sampled_from([1, 2, 4, 8])), word_bits=17)
    mapping = map_layer(layer, spec, mapping.layout, batch=mapping.batch)
    return mapping, sequence(layer, steps, draw(st.sampled_from([0, 0.2, 0.6, 1])), seed, mapping.batch)


@settings(max_examples=80, deadline=None)
@given(skipping_cases(tiny_cases()))
def test_skipping_equals_the_literal_interpreter(case):
    check(*case)


@settings(max_examples=30, deadline=None)
@given(skipping_cases(low_rank_cases("lowrank")))
def test_low_rank_blocks_with_skipping_equal_the_literal_interpreter(case):
    """What V makes of differences goes on to U; only what U gives is added to what is kept."""
    check(*case)


@pytest.mark.parametrize("lookahead", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [
    {}, {"weight_words": 48, "load_bits_per_cycle": 5}, {"mac_ii": 2, "weight_word_bits": 5},
    {"weight_words": 24, "load_bits_per_cycle": 512, "mac_ii": 4}])  # loads wait until multiplications are done with a buffer
def test_longer_sequences_equal_the_literal_interpreter(changes, kind, lookahead, monkeypatch):
    """What every PE does differs from step to step here, so that no step may be taken for another."""
    monkeypatch.setattr("workbench.array.skipping.CHUNK", 300)  # a few steps at a time
    spec = SMALL.with_(lookahead=lookahead, word_bits=17, **changes)
    for make in (dense_layer, hybrid_layer):
        layer = replace(make(8, 12, **KINDS[kind]), delta={"hidden": 1000})
        schedule = check(schedule_layer(layer, spec, 1).mapping, sequence(layer, 9, 0.3, 1))
        assert len({tuple(op.busy for op in program) for program in schedule.by_row}) > 2


# By hand.

PATTERN = [0, 3, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 5, 0, 0, 0]  # over 4 PE columns: 0 0 0 5, 3 0 0 0, 0 0 0 0, 1 0 2 0


def busy(schedule, name, step=0):
    return next(op.end - op.start for op in schedule.operations if op.name == name and op.step == step) - 4  # of pipeline


@pytest.mark.parametrize(("lookahead", "cycles"), [
    (1, 4),  # nothing is skipped
    # 1 + floor(3/2), 1 + ceil(3/2), ceil(4/2), 1 + (1 + floor(1/2)) + ceil(1/2): the fullest takes 3
    (2, 3),
    # 1 + floor(3/4), 1 + ceil(3/4), ceil(4/4), 1 + 1 + ceil(1/4)
    (4, 3), (8, 3),
])
def test_zeros_of_a_dense_block_by_hand(lookahead, cycles):
    layer, spec = dense_layer(4, 16), SMALL.with_(lookahead=lookahead)
    schedule = check(map_layer(layer, spec, one_region(spec)), np.array([PATTERN, [1] * 16, [0] * 16]))
    assert busy(schedule, "mac i ih") == cycles
    assert busy(schedule, "mac i ih", 1) == 4  # no zeros
    assert busy(schedule, "mac i ih", 2) == (4 if lookahead == 1 else -(-4 // lookahead))  # zeros only
    ih = next(op.counts for op in schedule.operations if op.name == "mac i ih" and op.step == 0)
    if lookahead > 1:  # 4 of 16 inputs, in each of 4 rows; three of the PE columns turn to their row
        assert ih == {"macs": 16, "skipped_macs": 48, "padding_macs": 0, "weight_reads": 16, "data_reads": 16, "acc_reads": 12,
                      "acc_writes": 12}


def test_each_pe_s_multiplications_by_hand():
    """Of one step, whose h is zero: of 4 gates each PE multiplies the 1, 1, 0 or 2 inputs of its column that are not."""
    spec = SMALL.with_(lookahead=4)
    schedule = check(map_layer(dense_layer(4, 16), spec, one_region(spec)), np.array([PATTERN]))
    assert np.rint(schedule.utilisation() * schedule.cycles).tolist() == [[4, 4, 0, 8]] * 4


@pytest.mark.parametrize(("lookahead", "cycles"), [(2, 5 + 5), (4, 3 + 3), (8, 2 + 2)])
def test_many_zeros_take_several_windows_by_hand(lookahead, cycles):
    """A PE has 20 inputs, of which the tenth alone is not zero: 1 + floor(9/2), then ceil(10/2); 1 + 2 and 3; 1 + 1 and 2."""
    spec = SMALL.with_(lookahead=lookahead)
    x = np.zeros((1, 80), dtype=int)
    x[0, 9 * 4] = 1
    schedule = check(map_layer(dense_layer(4, 80), spec, one_region(spec)), x)
    assert busy(schedule, "mac i ih") == cycles


@pytest.mark.parametrize(("lookahead", "cycles"), [(1, 16), (2, 8), (4, 5), (8, 5)])
def test_zeros_of_a_circulant_tile_by_hand(lookahead, cycles):
    """One PE has a tile of 4 x 4: four words, each for the inputs 0 5 0 0. Lookahead 2: one zero, then 3 three times, each
    1 + floor(3/2), and two at the end: 1 + 2 + 2 + 2 + 1; lookahead 4: 1 + 1 + 1 + 1 + 1."""
    layer = hybrid_layer(4, 4, 4)
    spec = SMALL.with_(lookahead=lookahead)
    schedule = check(map_layer(layer, spec, one_region(spec)), np.array([[0, 5, 0, 0]]))
    assert busy(schedule, "mac g ih") == cycles
    if lookahead > 1:  # each of the four words is read for its one product, which adds to another row
        counts = next(op.counts for op in schedule.operations if op.name == "mac g ih")
        assert (counts["macs"], counts["weight_reads"], counts["acc_writes"]) == (4, 4, 4)


def test_what_is_skipped_before_a_word_is_read_costs_no_memory_word():
    """16-bit values in memory words of 8 bits: each word that is read holds its PE for a cycle more, a dropped one does not."""
    layer, spec = dense_layer(4, 16, bits=16), SMALL.with_(lookahead=4, weight_word_bits=8)
    schedule = check(map_layer(layer, spec, one_region(spec)), np.array([PATTERN]))
    assert busy(schedule, "mac i ih") == 2 * 2 + 1  # 1 0 2 0: two words, and the zero at the end


def test_delta_skipping_by_hand():
    """An input that does not move is not sent again: from the second step on all of W_ih is dropped, 4 words of every PE."""
    layer, spec = dense_layer(4, 16), SMALL.with_(lookahead=4, word_bits=17)
    steps = 100 * np.array([PATTERN] * 3)
    still = replace(layer, delta={"input": 0})
    schedule = check(map_layer(still, spec, one_region(spec)), steps)
    assert [busy(schedule, "mac i ih", step) for step in range(3)] == [3, 1, 1]
    moved = steps + np.array([[0] * 16, [1] * 16, [3] * 16])  # by 1, then by 2
    for threshold, cycles in ((0, [3, 4, 4]), (1, [3, 1, 4]), (2, [3, 1, 4]), (3, [3, 1, 1])):
        slow = replace(layer, delta={"input": threshold})
        found = check(map_layer(slow, spec, one_region(spec)), moved)
        assert [busy(found, "mac i ih", step) for step in range(3)] == cycles, threshold


def test_kept_sums_are_counted_and_charged():
    """8 units, 4 gates: 32 sums at the edge are read and written once a step. With one threshold alone W_ih and W_hh are
    drained apart, 32 sums of 4 partial sums each."""
    plain, spec = dense_layer(8, 4), SMALL.with_(word_bits=17)
    both, one = (replace(plain, delta=dict.fromkeys(names, 5)) for names in (("input", "hidden"), ("hidden",)))
    counts = [schedule_layer(layer, spec, 1).counts() for layer in (plain, both, one)]
    for event, more in (("acc_reads", (32, 32 + 128)), ("acc_writes", (32, 32)), ("link_words", (0, 128))):
        assert [c[event] - counts[0][event] for c in counts[1:]] == list(more)
    used = [resources(schedule_layer(layer, spec, 1).mapping) for layer in (plain, both, one)]
    assert [u.edge for u in used] == [(), (Memory(8, 48), Memory(1, 16), Memory(2, 16)), (Memory(8, 48), Memory(2, 16))]
    assert [u.data.bits for u in used] == [16, 17, 17]
    twice = resources(map_layer(both, spec, one_region(spec), batch=2))
    assert twice.edge == (Memory(16, 48), Memory(2, 16), Memory(4, 16))  # a batch of two
    # Four activation units have each a LUT RAM of each memory; high: written while it is read. The PEs' data are a bit wider.
    assert [u.lut[0] - used[0].lut[0] for u in used[1:]] == [4 * (48 + 16 + 16) + 16, 4 * (48 + 16) + 16]
    assert [u.lut[1] - used[0].lut[1] for u in used[1:]] == [8 * (48 + 16 + 16) + 32, 8 * (48 + 16) + 32]


def test_without_a_sequence_nothing_is_skipped():
    layer, x = hybrid_layer(), sequence(hybrid_layer(), 5, 0.3, 0)
    plain, ahead = (schedule_layer(layer, SMALL.with_(lookahead=n), 5) for n in (1, 4))
    assert plain.table() == ahead.table() and plain.split() == ahead.split()
    inputs = multiplied(layer, x)
    assert schedule_layer(layer, SMALL, 5, inputs=inputs).table() == plain.table()  # a lookahead of 1 skips nothing
    skipping = schedule_layer(layer, SMALL.with_(lookahead=4), 5, inputs=inputs)
    assert skipping.cycles < plain.cycles
    assert skipping.steady_state_cycles == skipping.step_cycles[1:].mean() <= plain.steady_state_cycles
    assert skipping.step_cycles.sum() == skipping.ends[-1, -1]
    slow = replace(layer, delta={"input": 100, "hidden": 500})
    with_delta = schedule_layer(slow, SMALL.with_(lookahead=4, word_bits=17), 5, inputs=multiplied(slow, x))
    assert with_delta.steady_state_cycles < plain.steady_state_cycles


def test_the_best_layout_for_a_real_sequence_wins():
    """Zeros may leave less to do than the bound that layouts are otherwise passed over by."""
    layer, spec = hybrid_layer(32, 8, 8), SMALL.with_(rows=8, cols=8, lookahead=4, h_words_per_cycle=4, act_units=16)
    inputs = multiplied(layer, sequence(layer, 4, 0.1, 0)) | {"hh": np.zeros((4, 1, 32), dtype=int)}
    best = schedule_layer(layer, spec, 4, inputs=inputs)
    every = [schedule_mapping(mapping, 4, inputs) for layout in candidate_layouts(layer, spec)
             for mapping in fitting_mappings(layer, spec, layout)]
    assert best.steady_state_cycles == min(schedule.steady_state_cycles for schedule in every)
    assert len(best.candidates) == len(every) and all("steady_state_cycles" in row for row in best.candidates)
    assert max(least_cycles(layer, spec, layout) for layout in candidate_layouts(layer, spec)) > best.steady_state_cycles


@pytest.mark.parametrize("kind", KINDS)
def test_what_weights_multiply(kind):
    layer = dense_layer(8, 5, **KINDS[kind])
    x = sequence(layer, 6, 0.7, 0)
    found, result = multiplied(layer, x), run_layer(layer, x)
    np.testing.assert_array_equal(found["ih"], x)
    np.testing.assert_array_equal(found["hh"], np.concatenate([0 * result.output[:1], result.output[:-1]]))
    assert ("hr" in found) == (kind == "projected")
    slow = replace(layer, delta={"input": 2000, "hidden": 100})
    moved, result = multiplied(slow, x), run_layer(slow, x)
    assert set(np.abs(moved["ih"][moved["ih"] != 0]) > 2000) == {True} and (moved["ih"] == 0).mean() > (x == 0).mean()
    behind = np.concatenate([0 * result.output[:1], result.output[:-1]]) - moved["hh"].cumsum(axis=0)
    assert 0 < np.abs(behind).max() <= 100  # what was sent is never further off than the threshold


# Bad input.


def test_bad_input_is_refused():
    layer = dense_layer()
    with pytest.raises(ValueError, match=r"a schedule of 3 steps needs inputs of shape \(3, 1, 4\), got \(3, 2, 4\)"):
        schedule_layer(layer, SMALL.with_(lookahead=2), 3, inputs={"ih": np.zeros((3, 2, 4), dtype=int)})
    with pytest.raises(ValueError, match=r"words of 16 bits \(word_bits\), got QFormat\(bits=17, frac=12"):
        schedule_layer(replace(layer, delta={"hidden": 3}), SMALL, 3)
