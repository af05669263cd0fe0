"""Layers and directions side by side and in turn: hand numbers, the literal interpreter and the engine as oracles, messages."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_array import KINDS, SMALL, dense_layer, hybrid_layer
from test_array_forms import low_rank_layer, spectral_layer

from workbench.array import (
    ArraySpec,
    Layout,
    Operation,
    Region,
    execute_layer,
    execute_stack,
    map_layer,
    preset,
    schedule_hoisted,
    schedule_layer,
    schedule_stack,
)
from workbench.array.cost import Memory, compare, resources
from workbench.array.interpreter import interpret, interpret_hoisted
from workbench.array.mapping import candidate_layouts, fitting_mappings, strips
from workbench.array.stack import side_by_side
from workbench.engine import StackEngine, run_layer
from workbench.plots import gantt_figure

WIDE = SMALL.with_(cols=8)  # two strips of 4 x 4
MAKES = (dense_layer, hybrid_layer, partial(low_rank_layer, ranks={"ih": 1, "hh": 2}),
         partial(spectral_layer, blocks={"ih": 2, "hh": 4}))


def stack_of(kind="LSTM", hidden=8, inputs=4, layers=2, directions=1, make=dense_layer):
    width = directions * KINDS[kind].get("proj", hidden)
    return [tuple(make(hidden, columns, seed=2 * index + reverse, **KINDS[kind]) for reverse in range(directions))
            for index, columns in enumerate((inputs,) + (width,) * (layers - 1))]


def check_side_by_side(mappings, pipelined, steps, seed):
    """Spans, events and values of layers side by side are those of the literal machine and of the engine."""
    rng, layers, batch = np.random.default_rng(seed), [m.layer for m in mappings], mappings[0].batch
    schedule = side_by_side(mappings, pipelined, steps)
    xs = [rng.integers(-4096, 4096, (steps, batch, layer.input_size)) for layer in (layers[:1] if pipelined else layers)]
    literal = interpret(schedule.mapping, xs)
    engine = None
    for n, layer in enumerate(layers):
        engine = run_layer(layer, engine.output if pipelined and n else xs[n])
        np.testing.assert_array_equal(np.array(literal.output[n]), engine.output)
        assert literal.c[n] == (None if engine.c is None else engine.c.tolist())
    assert literal.cycles == schedule.cycles
    for (step, n), (start, end) in literal.spans.items():
        assert schedule.rows[step + 1, n] == start and schedule.timed[n].busy + schedule.timed[n].latency == end - start
    assert len(literal.spans) == (schedule.rows >= 0).sum() == steps * len(schedule.mapping.program)
    assert literal.counts == {event: count for event, count in schedule.counts().items() if count}
    assert sum(schedule.split().values()) == schedule.cycles
    return schedule


@st.composite
def tiny_stacks(draw):
    def choose(*values):
        return draw(st.sampled_from(values))

    count, kind, pipelined = choose(2, 2, 3), choose(*KINDS), choose(True, True, False)
    spec = ArraySpec(
        rows=choose(4, 8), cols=12, mac_latency=choose(0, 4), acc_depth=choose(4, 64), acc_banks=choose(1, 2, 3),
        link_cycles=choose(1, 2), h_words_per_cycle=choose(1, 3, 8), act_units=choose(1, 4), act_latency=choose(0, 2),
        weight_words=choose(2048, 24), load_bits_per_cycle=choose(7, 64), config_cycles=choose(0, 5))
    width = KINDS[kind].get("proj")
    layers, inputs = [], choose(1, 3, 5)
    for seed in range(count):
        make, hidden = choose(*MAKES), choose(4, 8)
        layers.append(make(hidden, inputs, seed=seed, **KINDS[kind]))
        inputs = width or hidden if pipelined else inputs
    regions, batch = draw(st.sampled_from(strips(Region(0, 0, spec.rows, spec.cols), count))), choose(1, 1, 2)
    mappings = tuple(draw(st.sampled_from(fitting_mappings(layer, spec, draw(st.sampled_from(
        candidate_layouts(layer, spec, region))), batch))) for layer, region in zip(layers, regions, strict=True))
    return mappings, pipelined, choose(1, 2, 4), draw(st.integers(0, 1000))


@settings(max_examples=40, deadline=None)
@given(tiny_stacks())
def test_layers_side_by_side_equal_the_literal_interpreter(case):
    check_side_by_side(*case)


# Pipelines.


def pipeline(kind="LSTM", steps=2, batch=1, **changes):
    """Two layers, each on 4 x 4 PEs of 4 x 8."""
    mappings = (replace(map_layer(layer, WIDE.with_(**changes), Layout((Region(0, 4 * n, 4, 4),)), batch=batch), name=f"l{n}")
                for n, (layer,) in enumerate(stack_of(kind)))
    return side_by_side(tuple(mappings), True, steps)


def test_two_pipelined_layers_by_hand():
    schedule = pipeline()
    found = {(op.sequence_step, op.region, op.name): (op.start, op.end) for op in schedule.operations if op.region >= 0}
    # h of layer 0 is in all PEs at 74, as of that layer alone. Then both layers begin: layer 0 with W_hh, layer 1 with W_ih.
    assert [found[1, 0, f"mac {gate} hh"] for gate in "ifgo"] == [(74, 82), (78, 86), (87, 95), (91, 99)]
    assert [found[0, 1, f"mac {gate} ih"] for gate in "ifgo"] == [(74, 82), (78, 86), (82, 90), (86, 94)]
    # Then W_hh h of the first step, of zeros; g waits for the drain of i: 2 rows, 3 hops.
    assert [found[0, 1, f"mac {gate} hh"] for gate in "ifgo"] == [(90, 98), (94, 102), (103, 111), (107, 115)]
    assert found[0, 1, "drain i ih+hh"] == (98, 103) and found[0, 1, "drain g ih+hh"] == (111, 116)
    spans = {(op.sequence_step, op.resource, op.name, op.start): op.end for op in schedule.operations if op.region < 0}
    # The units serve layer 0 until its act o, at 116 for 2 cycles; its h is ready at 128, with 8 words to send.
    assert spans[1, "activation", "act o", 116] == 122 and spans[0, "activation", "act i", 118] == 124
    assert spans[1, "network", "h to PEs", 128] == 136  # 62 cycles after the one before
    assert spans[0, "network", "h to PEs", 154] == schedule.first_step_latency == 162
    assert schedule.period == (1, 62) and schedule.cycles == 162 + 62 == sum(schedule.split().values())
    assert not schedule.whole_sequence


def test_a_pipeline_is_as_fast_as_its_slowest_layer_alone():
    for kind in KINDS:
        schedule = pipeline(kind, 20)
        alone = [schedule_layer(layer, SMALL, 20).steady_state_cycles for (layer,) in stack_of(kind)]
        assert max(alone) <= schedule.steady_state_cycles < 1.05 * max(alone)


def test_h_of_a_pipelined_layer_is_sent_once_and_stored_twice():
    counts = pipeline(steps=3).counts()
    assert counts["multicast_words"] == 3 * (4 + 8 + 8)
    assert counts["data_writes"] == 3 * 4 * (4 + 2 * 8 + 8)  # in 4 PE rows: x; h in both layers; h of the last


def test_strips_by_hand():
    halves = [(Region(0, 0, 8, 4), Region(0, 4, 8, 4)), (Region(0, 0, 4, 8), Region(4, 0, 4, 8))]
    assert strips(Region(0, 0, 8, 8), 2) == halves
    assert strips(Region(4, 4, 4, 8), 2) == [(Region(4, 4, 4, 4), Region(4, 8, 4, 4))]
    assert len(strips(Region(0, 0, 16, 16), 3)) == 6 and strips(Region(0, 0, 4, 4), 2) == []


# Whole stacks.


@pytest.mark.parametrize("kind", KINDS)
def test_the_widths_of_strips_are_the_best(kind):
    stack, spec = stack_of(kind, 32, 4, make=hybrid_layer), preset("array16x16")
    best = schedule_stack(stack, spec, 10, form="side by side").stages[0]
    for regions in strips(Region(0, 0, 16, 16), 2):
        for split in (False, True):
            mappings = tuple(fitting_mappings(layer, spec, Layout((region,), split_tiles=split))[0]
                             for (layer,), region in zip(stack, regions, strict=True))
            assert best.steady_state_cycles <= side_by_side(mappings, True, 10).steady_state_cycles


def test_bidirectional_layers_wait_for_the_whole_sequence():
    stack = stack_of(directions=2)
    both = schedule_stack(stack, WIDE, 6, form="side by side")
    assert [len(stage.mapping.layers) for stage in both.stages] == [2, 2] and both.whole_sequence
    in_turn = schedule_stack(stack, WIDE, 6, form="in turn")
    assert [stage.mapping.name for stage in in_turn.stages] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    last = max(op.end for op in both.operations if op.stage == 0)
    assert min(op.start for op in both.operations if op.stage == 1) == last == both.stages[0].cycles
    assert schedule_stack(stack, WIDE, 6).cycles == min(both.cycles, in_turn.cycles)
    assert both.first_step_latency == last + both.stages[1].first_step_latency
    assert not schedule_stack(stack_of(), WIDE, 6, form="side by side").whole_sequence
    assert schedule_stack(stack_of(layers=1, directions=2), WIDE, 6, form="side by side").whole_sequence


def test_stages_in_turn_load_their_weights_where_not_all_fit():
    """Words per PE: 24 in the first layer, 32 in the second, of 8 bits."""
    fit, reload = (schedule_stack(stack_of(), SMALL.with_(weight_words=words), 6) for words in (56, 55))
    assert fit.loads == (0, 0) and reload.loads == (0, 32 * 16 * 8 // 64)
    assert reload.cycles == fit.cycles + 64 == sum(reload.split().values()) and reload.split()["load"] == 64
    assert reload.counts() == fit.counts() | {"loaded_bits": 32 * 16 * 8, "weight_writes": 32 * 16}
    assert fit.initial_load_cycles == (24 + 32) * 2 and reload.initial_load_cycles == 24 * 2
    assert (resources(fit.mapping).weights, resources(reload.mapping).weights) == (Memory(56, 8), Memory(32, 8))
    assert resources(pipeline().mapping).weights == Memory(32, 8)  # of the fullest PE
    for schedule in (fit, reload, pipeline()):
        assert all(schedule.operations[n].end <= op.start for op in schedule.operations for n in op.after)
        assert schedule.cycles == max(op.end for op in schedule.operations)
        assert round(schedule.utilisation().sum() * schedule.cycles) == schedule.counts()["macs"]


@pytest.mark.parametrize("form", ["in turn", "side by side", ""])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_stacks_equal_the_engine(kind, directions, form):
    stack, x = stack_of(kind, layers=3, directions=directions, make=hybrid_layer), np.random.default_rng(0)
    x = x.integers(-9000, 9000, (5, 2, 4))
    executed, engine = execute_stack(stack, SMALL.with_(cols=12), x, form), StackEngine(stack).run(x)
    np.testing.assert_array_equal(executed.output, engine.output)
    np.testing.assert_array_equal([run.h for layer in executed.layers for run in layer], engine.h)
    assert executed.schedule.mapping.batch == 2 and executed.schedule.steps == 5


@pytest.mark.parametrize("form", ["in turn", "side by side"])
def test_stacks_skip_zeros_as_their_layers_do(form):
    stack, x = stack_of(), np.random.default_rng(0).integers(-9000, 9000, (6, 1, 4)) * (np.arange(6) % 3 == 0)[:, None, None]
    executed = [execute_stack(stack, WIDE.with_(lookahead=n), x, form) for n in (1, 4)]
    np.testing.assert_array_equal(executed[0].output, executed[1].output)
    counts = executed[1].schedule.counts()
    assert counts["skipped_macs"] == 4 * 4 * 8 * 4 + 2 * 4 * 8 * 8  # four steps of x, the first h of both layers
    assert counts["macs"] + counts["skipped_macs"] == executed[0].schedule.counts()["macs"]
    assert executed[1].schedule.cycles <= executed[0].schedule.cycles


def test_a_pipeline_refuses_a_delta_threshold_of_what_two_layers_take():
    (below,), (above,) = stack_of()
    stack = [(replace(below, delta={"hidden": 3}),), (above,)]
    with pytest.raises(ValueError, match="a pipeline sends h once for two layers, so that it takes no delta threshold of it"):
        schedule_stack(stack, WIDE.with_(word_bits=17), 3, form="side by side")
    assert schedule_stack(stack, WIDE.with_(word_bits=17), 3).stages[1].mapping.name == "l1"


def test_json_rebuilds_the_table():
    for schedule in (schedule_layer(dense_layer(), SMALL, 3, batch=2), pipeline(batch=2), schedule_stack(stack_of(), SMALL, 3),
                     schedule_hoisted(dense_layer(), SMALL, 5, window=2)):
        read = json.loads(schedule.to_json())
        operations = [Operation(**row | {"after": tuple(row["after"])}) for row in read["operations"]]
        assert tuple(operations) == schedule.operations
        assert ArraySpec(**read["spec"]) == schedule.mapping.spec and read["batch"] == schedule.mapping.batch
        layouts = [Layout(tuple(Region(**region) for region in layer["layout"].pop("regions")), **layer["layout"])
                   for layer in read["layers"]]
        assert layouts == [mapping.layout for mapping in schedule.mapping.layers]
        assert (read["steps"], read["cycles"]) == (schedule.steps, schedule.cycles)
        assert read["counts"] == schedule.counts() and read["split"] == schedule.split()


def bars_and_rows(figure):
    axis = figure.axes[0]
    return axis.patches, [label.get_text() for label in axis.get_yticklabels()], {text.get_text() for text in axis.texts}


def test_gantt_names_layers_and_hatches_every_second_item():
    schedule = pipeline(batch=2, steps=4)
    bars, rows, texts = bars_and_rows(gantt_figure(schedule, 2))
    assert rows == ["l0 PEs 0", "l0 links 0", "l1 PEs 1", "l1 links 1", "network", "activation"]
    assert len(bars) == len(schedule.table(2)) and sum(bool(bar.get_hatch()) for bar in bars) == len(bars) // 2
    starts = {op["start"] for op in schedule.table(2)}
    assert min(starts) + max(bar.get_x() for bar in bars) == max(starts)
    assert "f hh" in texts and all(text.startswith(("l0 ", "l1 ")) for text in texts if "act" in text or "to PEs" in text)
    assert "l1 h" in bars_and_rows(gantt_figure(pipeline(steps=4), 2))[2]  # what is shared says whose


def test_gantt_draws_one_stage_and_every_kind_of_operation():
    schedule = schedule_hoisted(dense_layer(), SMALL, 3)
    for stage, rows in enumerate((["network", "PEs 0", "links 0"], ["PEs 0", "links 0", "activation", "network"])):
        bars, found, _ = bars_and_rows(gantt_figure(schedule, 1, stage))
        assert found == rows and len(bars) == sum(op["stage"] == stage for op in schedule.table(1))
    with pytest.raises(ValueError, match="no operations in step 7 of stage 0; the schedule has 3 steps"):
        gantt_figure(schedule, 7)
    fft = schedule_layer(spectral_layer(), preset("array16x16"), 3)
    assert {"transform", "inverse", "gather", "send"} <= {op.kind for op in fft.operations}
    assert len(bars_and_rows(gantt_figure(fft, 1))[0]) == len(fft.table(1))


def test_what_is_no_stack_or_has_no_place_is_refused():
    x = np.zeros((2, 1, 4), dtype=int)
    for none in ([], dense_layer(), [dense_layer()], [()], "a"):
        with pytest.raises(TypeError, match="schedule_stack needs layers of PackedLayers"):
            schedule_stack(none, SMALL, 3)
        with pytest.raises(TypeError, match="execute_stack needs layers of PackedLayers"):
            execute_stack(none, SMALL, x)
    with pytest.raises(TypeError, match="execute_layer needs a PackedLayer, got a str"):
        execute_layer("a", SMALL, x)
    with pytest.raises(ValueError, match="layers that fit: layer 1 takes 5 inputs, layer 0 gives 8"):
        schedule_stack([(dense_layer(8, 4),), (dense_layer(8, 5),)], SMALL, 3)
    with pytest.raises(ValueError, match="schedule_stack knows the forms in turn, side by side, got 'pipeline'"):
        schedule_stack(stack_of(), SMALL, 3, form="pipeline")
    with pytest.raises(ValueError, match="4 x 4 PEs have no strips of whole groups that hold l0, l1 side by side: too few"):
        schedule_stack(stack_of(), SMALL, 3, form="side by side")
    with pytest.raises(ValueError, match=r"side by side: a PE needs 6 data words .*the array has 5"):
        schedule_stack(stack_of(), WIDE.with_(data_words=5), 3, form="side by side")


# Hoisted input products.


def check_hoisted(layer, spec, steps, batch, window, seed):
    """Spans, events and values are those of the literal machine and of the engine."""
    schedule = schedule_hoisted(layer, spec, steps, batch, window)
    x = np.random.default_rng(seed).integers(-4096, 4096, (steps, batch, layer.input_size))
    literal, engine = interpret_hoisted([(stage.mapping, stage.steps) for stage in schedule.stages], x), run_layer(layer, x)
    np.testing.assert_array_equal(np.concatenate([np.array(stage.output) for stage in literal if stage.output]), engine.output)
    assert literal[-1].c == (None if engine.c is None else engine.c.tolist())
    for stage, found in zip(schedule.stages, literal, strict=True):
        for (step, n), (start, end) in found.spans.items():
            assert stage.rows[step + 1, n] == start and stage.timed[n].busy + stage.timed[n].latency == end - start
        assert len(found.spans) == (stage.rows >= 0).sum() and found.cycles == stage.cycles
        assert found.counts == {event: count for event, count in stage.counts().items() if count}
    assert sum(schedule.split().values()) == schedule.cycles == max(op.end for op in schedule.operations)
    return schedule


@st.composite
def tiny_hoisted(draw):
    def choose(*values):
        return draw(st.sampled_from(values))

    spec = ArraySpec(
        rows=choose(4, 8), cols=choose(4, 8), mac_latency=choose(0, 4), acc_depth=choose(4, 64), acc_banks=choose(1, 2, 3),
        h_words_per_cycle=choose(1, 3, 8), act_units=choose(1, 3, 4), weight_words=choose(2048, 24, 12),
        data_words=choose(512, 20), load_bits_per_cycle=choose(7, 64), config_cycles=choose(0, 5))
    make, kind, seed = choose(*MAKES), choose(*KINDS), draw(st.integers(0, 9))
    if make is MAKES[-1]:  # spectra and inverse transforms take more
        spec = spec.with_(data_words=512)
    layer = make(choose(4, 8), choose(1, 3, 9), seed=seed, **KINDS[kind])
    return layer, spec, choose(1, 2, 5), choose(1, 1, 2), choose(0, 0, 1, 2, 3), draw(st.integers(0, 1000))


@settings(max_examples=40, deadline=None)
@given(tiny_hoisted())
def test_hoisted_layers_equal_the_literal_interpreter(case):
    check_hoisted(*case)


def test_two_hoisted_steps_by_hand():
    """8 units, 4 inputs on 4 x 4 PEs."""
    schedule = schedule_hoisted(dense_layer(hidden=8, inputs=4), SMALL, 2)
    found = {(op.stage, op.step, op.name): (op.start, op.end) for op in schedule.operations}
    # Of each gate 2 rows x 1 column, 4 of pipeline, then 2 rows, 3 hops; g takes the bank of i once that is drained.
    products = {"i": (4, 10), "f": (6, 12), "g": (15, 21), "o": (17, 23)}
    drains = {"i": (10, 15), "f": (12, 17), "g": (21, 26), "o": (23, 28)}
    for gate in "ifgo":
        assert found[0, 0, f"mac {gate} ih"] == products[gate] and found[0, 0, f"drain {gate} ih"] == drains[gate]
    assert found[0, 1, "mac i ih"] == (26, 32)  # the second step's, once g is drained, and so on: 22 cycles behind
    assert found[0, 1, "drain o ih"] == (45, 50)
    assert schedule.stages[0].cycles == 50
    # Then the recurrence, with 50 added: W_hh 2 rows x 2 columns from h = 0 on; no W_ih x before it, no x on the network.
    assert [found[1, 0, f"mac {gate} hh"] for gate in "ifgo"] == [(50, 58), (54, 62), (63, 71), (67, 75)]
    assert found[1, 0, "act i"] == (63, 69) and found[1, 0, "act g"] == (76, 82) and found[1, 0, "h to PEs"] == (104, 112)
    assert schedule.first_step_latency == 112 and schedule.cycles == 112 + 62  # 136 without hoisting
    assert schedule.steady_state_cycles == 22 + 62 and schedule.whole_sequence
    # What waits at the edge: 2 steps of 4 gates of 2 rows per unit, each written and read once beside what is always counted.
    alone = schedule_layer(dense_layer(hidden=8, inputs=4), SMALL, 2).counts()
    more = {event: count - alone[event] for event, count in schedule.counts().items() if count != alone[event]}
    # W_ih x has rows and drains of its own now: 16 PEs turn to 2 rows of 4 gates and 8 x 4 sums pass 4 columns, twice.
    assert more == {"acc_reads": 2 * (4 * 8 * 4 + 32), "acc_writes": 2 * 32, "link_words": 2 * 4 * 8 * 4}
    assert resources(schedule.mapping).edge == (Memory(16, 48),) and resources(schedule.stages[1].mapping).edge == ()
    with pytest.raises(ValueError, match=r"has to keep 16 sums of 48 bits \(input products of 2 steps, batch of 1\), the array "
                                         r"has 15 \(edge_words\)"):
        schedule_hoisted(dense_layer(hidden=8, inputs=4), SMALL.with_(edge_words=15), 2)
    assert schedule_hoisted(dense_layer(hidden=8, inputs=4), SMALL.with_(edge_words=8), 2, window=1).window == 1
    less = replace(schedule.stages[0].mapping, spec=SMALL.with_(edge_words=15))
    with pytest.raises(RuntimeError, match="hazard: an activation unit keeps 16 sums, the array has 15"):
        interpret_hoisted([(less, 2)], np.zeros((2, 1, 4), dtype=int))


@pytest.mark.parametrize(("data_words", "together"), [(512, 6), (8, 2), (4, 1)])
def test_streamed_input_weights_serve_the_steps_that_the_data_memories_hold(data_words, together):
    """W_ih takes 16 words of a PE, x of a step 2, stored twice."""
    spec = SMALL.with_(weight_words=12, data_words=data_words)
    schedule = schedule_hoisted(dense_layer(8, 8), spec, 6)
    first = schedule.stages[0]
    assert (first.mapping.batch, first.steps, len(schedule.stages)) == (together, 6 // together, 2)
    unique = first.mapping.on_chip_bits - 8 * first.mapping.resident_words.sum()
    assert first.counts()["loaded_bits"] == 6 // together * unique > 0
    assert schedule.counts()["macs"] == 6 * 4 * (64 + 64)
    assert check_hoisted(dense_layer(8, 8), spec, 5, 1, 0, 1).stages[0].mapping.batch == min(together, 5)


def test_the_last_steps_take_the_words_that_are_there():
    """W_ih takes 32 words of a PE that has 24, x of a step 4 of its 16 data words: three steps together, then two. Three items
    share two banks of 4 sums, so 2 of the 4 rows of a gate at a time; two alone would take 4, and keep other words."""
    layer, spec = dense_layer(16, 8), SMALL.with_(acc_depth=4, weight_words=24, data_words=16, load_bits_per_cycle=4)
    schedule = check_hoisted(layer, spec, 5, 1, 0, 0)
    first, rest, _ = (stage.mapping for stage in schedule.stages)
    assert (first.batch, rest.batch, schedule.loads[:2]) == (3, 2, (0, 0))
    for mapping in (first, rest):
        assert {i.rows for i in mapping.program if i.kind == "mac"} == {(0, 2), (2, 4)}
    np.testing.assert_array_equal(first.resident_words, rest.resident_words)
    other = map_layer(layer, spec, first.layout, batch=2, parts=("ih",))
    assert {i.rows for i in other.program if i.kind == "mac"} == {(0, 4)}
    with pytest.raises(RuntimeError, match="hazard: 128 words that a stage takes as resident were not loaded"):
        interpret_hoisted([(first, 1), (other, 1)], np.zeros((5, 1, 8), dtype=int))


def test_later_windows_take_the_words_that_are_there():
    """At most four steps together: of windows of 5 steps three, then two, of the last one, of 4, all."""
    spec = SMALL.with_(acc_depth=4, weight_words=24, data_words=16)
    stages = check_hoisted(dense_layer(16, 8), spec, 9, 1, 5, 0).stages
    assert [stage.mapping.batch for stage in stages] == [3, 2, 1, 4, 1]
    assert stages[3].mapping.passes == 2  # no more than three share the accumulators


def test_stages_share_the_dense_weights_of_their_layer():
    """Two bytes a weight against four: 4 gates of 8 x 4 and of 8 x 8."""
    alone, hoisted = (schedule(dense_layer(8, 4, bits=16), SMALL, 4) for schedule in (schedule_layer, schedule_hoisted))
    assert alone.mapping.dense_weights == hoisted.mapping.dense_weights == 4 * 8 * (4 + 8)
    assert [stage.mapping.dense_weights for stage in hoisted.stages] == [4 * 8 * 4, 4 * 8 * 8]
    assert [stage.mapping.cr_chip for stage in hoisted.stages] == [2, 2]
    assert [row["cr_chip"] for row in compare({"dense 16-bit": hoisted, "alone": alone})] == [2, 2]
    low_rank = schedule_layer(low_rank_layer(8, 4), SMALL, 4).mapping  # two blocks on the array for each of the layer
    assert low_rank.dense_weights == 4 * 8 * (4 + 8)


def test_hoisting_wins_where_the_loader_binds():
    layer, spec = dense_layer(128, 40, bits=16), preset("group4x4")
    alone, hoisted = schedule_layer(layer, spec, 32), schedule_hoisted(layer, spec, 32)
    assert alone.bound == "memory" and hoisted.cycles < 0.75 * alone.cycles
    assert hoisted.loads[1] > 0  # W_hh takes the place of W_ih
    windows = schedule_hoisted(layer, spec, 32, window=16)
    assert windows.loads == (0, hoisted.loads[1], windows.stages[0].initial_load_cycles, hoisted.loads[1])  # in each window
    assert windows.cycles == sum(windows.loads) + 2 * (windows.stages[0].cycles + windows.stages[1].cycles)
    assert windows.steady_state_cycles == windows.cycles / 32 and resources(windows.mapping).edge[0].depth == 16 * 4 * 32
    rows = compare({"dense 16-bit": alone, "hoisted": hoisted})
    assert [row["whole_sequence"] for row in rows] == [False, True]
    assert rows[1]["acceleration_sequence"] == alone.cycles / hoisted.cycles
    assert rows[1]["multiply_cycles"] == rows[0]["multiply_cycles"] and rows[1]["cr_chip"] == rows[0]["cr_chip"]


@pytest.mark.parametrize("hoist", [True, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_hoisted_execution_equals_the_engine(kind, hoist):
    x = np.random.default_rng(0).integers(-9000, 9000, (5, 2, 4))
    layer, stack = hybrid_layer(8, 4, **KINDS[kind]), stack_of(kind, directions=2, make=hybrid_layer)
    executed = execute_layer(layer, SMALL, x, hoist=hoist)
    np.testing.assert_array_equal(executed.output, run_layer(layer, x).output)
    assert executed.schedule.window == min(hoist, 5) if hoist is not True else 5
    executed = execute_stack(stack, SMALL, x, hoist=hoist)
    np.testing.assert_array_equal(executed.output, StackEngine(stack).run(x).output)
    assert executed.schedule.cycles == sum(executed.schedule.split().values()) == max(
        op.end for op in executed.schedule.operations)
    skipping = execute_layer(layer, SMALL.with_(lookahead=4), x * (x > 5000), hoist=hoist)
    assert skipping.schedule.counts()["skipped_macs"] > 0


@pytest.mark.parametrize("hoist", [True, 2])
def test_low_rank_input_weights_are_hoisted_with_skipping(hoist):
    """U multiplies what V makes of x, whose zeros are skipped too."""
    x = np.random.default_rng(0).integers(-9000, 9000, (5, 2, 4))
    layer, spec = low_rank_layer(8, 4, ranks={"ih": 1, "hh": 2}), SMALL.with_(lookahead=2)
    executed = execute_layer(layer, spec, x * (x > 5000), hoist=hoist)
    np.testing.assert_array_equal(executed.output, run_layer(layer, x * (x > 5000)).output)
    assert executed.schedule.counts()["skipped_macs"] > 0


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int64])
def test_narrow_integers_do_not_wrap_where_x_moves(dtype):
    """Differences of an 8-bit signal take 9 bits; the engine computes in 64."""
    info = np.iinfo(dtype)
    ends = [max(info.min, -(2**15)), min(info.max, 2**15 - 1)]
    x = np.array(ends * 3, dtype=dtype).repeat(4).reshape(6, 1, 4)
    layer = replace(dense_layer(8, 4, bits=8), delta={"input": 100})
    spec = SMALL.with_(word_bits=18)
    expected = run_layer(layer, x.astype(np.int64)).output
    np.testing.assert_array_equal(execute_layer(layer, spec, x).output, expected)
    np.testing.assert_array_equal(execute_stack([(layer,)], spec, x).output, expected)


def test_numpy_s_numbers_of_steps_and_sides_are_python_s():
    layer, four = dense_layer(), np.int64(4)
    two = np.int64(2)
    for schedule in (schedule_layer(layer, SMALL, four, batch=two), schedule_hoisted(layer, SMALL, four, window=two),
                     schedule_stack([(layer,)], SMALL, four), schedule_stack([(layer,)], SMALL, four, hoist=two),
                     schedule_layer(layer, SMALL, 4, Layout((Region(0, 0, four, four),), np.int64(0)))):
        json.dumps(schedule.to_json())


@pytest.mark.parametrize("steps", [0, 2.5, "3", None, True])
def test_steps_that_are_none_are_refused(steps):
    message = f"a schedule needs a whole number of steps of at least 1, got {steps!r}"
    for schedule in (schedule_layer, schedule_hoisted, lambda layer, *rest: schedule_stack([(layer,)], *rest),
                     lambda layer, *rest: schedule_stack([(layer,)], *rest, hoist=True)):
        with pytest.raises(ValueError, match=message):
            schedule(dense_layer(), SMALL, steps)


def test_a_batch_that_is_none_is_refused():
    message = r"the array needs a whole number of sequences side by side \(batch\) of at least 1, got '3'"
    for schedule in (schedule_layer, schedule_hoisted,
                     lambda layer, *rest, **batch: schedule_stack(stack_of(), *rest, **batch)):
        with pytest.raises(ValueError, match=message):
            schedule(dense_layer(), WIDE, 3, batch="3")


def test_what_cannot_be_hoisted_is_refused():
    with pytest.raises(ValueError, match="a schedule of 2 steps needs inputs of as many, got 4"):
        schedule_hoisted(dense_layer(), SMALL, 2, inputs={"ih": np.zeros((4, 1, 4), dtype=int)})
    with pytest.raises(ValueError, match="hoisting takes no delta threshold of x"):
        schedule_hoisted(replace(dense_layer(), delta={"input": 3}), SMALL, 3)
    with pytest.raises(ValueError, match="execute_layer takes no layout with hoist, whose stages .*, got all on 4x4"):
        execute_layer(dense_layer(), SMALL, np.zeros((2, 1, 4), dtype=int), Layout((Region(0, 0, 4, 4),)), hoist=True)
    with pytest.raises(ValueError, match="schedule_stack hoists input products of layers in turn only"):
        schedule_stack(stack_of(), WIDE, 3, form="side by side", hoist=True)
    with pytest.raises(ValueError, match="hoisting needs a whole number of steps at a time, 0 for all, of at least 0, got -1"):
        schedule_hoisted(dense_layer(), SMALL, 3, window=-1)
