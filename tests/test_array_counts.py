"""Events add up: what the schedule counts, against the packed blocks and hardware rules alone, over every mapping."""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_array import (
    COARSE,
    KINDS,
    SIGNALS,
    SMALL,
    circulant,
    dense,
    dense_layer,
    layer_of,
    one_region,
    pruned,
    spans,
    sparse,
)

from workbench.array import ArraySpec, map_layer, schedule_layer
from workbench.array.cost import resources
from workbench.array.interpreter import interpret
from workbench.array.mapping import (
    candidate_layouts,
    fitting_mappings,
    memories_of,
    multicast_cycles,
    multicast_groups,
    network_words,
    takers,
)
from workbench.array.schedule import EVENTS, SPLIT, schedule_mapping
from workbench.array.stack import schedule_hoisted
from workbench.fixedpoint import QFormat
from workbench.methods import BankBalanced, BlockSparse, RowBalanced, Structured, TopK
from workbench.packed import PARTS, PackedCirculant, PackedDense, PackedLowRank, PackedSparse

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of a mapping, where a case fails


def low_rank(shape, rng, frac):
    """Of rank 3, in products of 7 more than `frac` fraction bits, as others."""
    fmt = QFormat(6, 4 if frac == 7 else 3)
    return PackedLowRank(fmt, *(rng.integers(fmt.min, fmt.max + 1, sides) for sides in ((shape[0], 3), (3, shape[1]))))


MAKES = {
    "dense": dense, "low rank": low_rank, "sparse": sparse, "empty": lambda shape, rng, frac: sparse(shape, rng, 0, frac),
    "circulant 4": lambda shape, rng, frac: circulant(shape, rng, 4, frac),
    "circulant 2": lambda shape, rng, frac: circulant(shape, rng, 2, frac),
    **{str(method): lambda shape, rng, frac, method=method: pruned(method, shape, rng, frac)
       for method in (TopK(0.3), RowBalanced(0.3), BankBalanced(0.3, 4), BlockSparse(0.3, 4), Structured(4))},
}  # fmt: skip


@st.composite
def mappings(draw):
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    hidden, inputs = choose(4, 8, 12, 16), choose(1, 3, 5, 8)

    def block(part, gate, shape, rng):
        return MAKES[choose(*MAKES)](shape, rng, frac=choose(7, 6)) if shape[1] >= 4 else dense(shape, rng)

    layer = layer_of(block, hidden, inputs, draw(st.integers(0, 99)), signals=choose(SIGNALS, COARSE), **KINDS[choose(*KINDS)])
    layer = replace(layer, delta=choose({}, {}, {"input": 9}, {"input": 9, "hidden": 5}))
    spec = ArraySpec(rows=choose(4, 8), cols=choose(4, 8), word_bits=17, acc_depth=choose(4, 64), acc_banks=choose(1, 2),
                     weight_words=choose(2048, 40, 16), weight_word_bits=choose(18, 8), load_bits_per_cycle=choose(7, 64),
                     h_words_per_cycle=choose(1, 3, 8), act_units=choose(1, 4))
    layout = draw(st.sampled_from(candidate_layouts(layer, spec)))
    return draw(st.sampled_from(fitting_mappings(layer, spec, layout, choose(1, 1, 3))))


def on_the_array(layer):
    """(part, gate) -> the products of a step: a low-rank block is V, and U with an operand of its own."""
    products = {}
    for part, gate in layer.products:
        block = layer.block(part, gate)
        if isinstance(block, PackedLowRank):
            products[part, gate] = PackedDense(block.right, block.fmt)
            products[f"{part}.{gate}", gate] = PackedDense(block.left, block.fmt)
        else:
            products[part, gate] = block
    return products


def operands(layer, spec):
    """Part -> (values, words of the network that each takes) of what is multicast for it in a step."""
    found = {"ih": (layer.input_size, 1), "hh": (layer.output_size, 1)}
    found |= {"hr": (layer.hidden_size, 1)} if layer.projected else {}
    for part, gate in layer.products:
        if isinstance(block := layer.block(part, gate), PackedLowRank):
            bits = block.inner_bits(layer.operand(part).magnitude)
            found[f"{part}.{gate}"] = block.rank, ceil(bits / spec.word_bits)
    return found


def stored(packed, unit, pe_cols):
    """(multiply-accumulates, those of padding, words, bits of a word) of a block, from its form alone."""
    rows, columns = packed.shape
    if isinstance(packed, PackedDense):
        return packed.values.size, 0, packed.values.size, packed.fmt.bits
    if isinstance(packed, PackedSparse):  # a word for each weight, and one for each row and PE column without any
        weights = packed.dense() != 0
        padding = sum(not weights[:, c::pe_cols][row].any() for row in range(rows) for c in range(min(pe_cols, columns)))
        index = (ceil(columns / pe_cols) - 1).bit_length()
        return int(weights.sum()) + padding, padding, int(weights.sum()) + padding, packed.fmt.bits + index + 1
    assert isinstance(packed, PackedCirculant)
    pieces, padded = rows // unit * ceil(columns / unit), ceil(columns / unit) * unit
    diagonals = packed.block if unit == packed.block else 2 * unit - 1
    return rows * padded, rows * (padded - columns), pieces * diagonals, packed.fmt.bits


def keepers(mapping, part, column):
    """PEs that multiply a column of x, h or m: one PE column for each region and size of pieces, in all its PE rows."""
    found = set()
    for (p, gate), packed in on_the_array(mapping.layer).items():
        block = mapping.blocks[p, gate]
        if p == part:
            region = mapping.layout.region_of(packed)
            found |= {(region, row, column // block.unit % block.pe_cols) for row in range(block.pe_rows)}
    return len(found)


def streaming(mapping):
    """Numbers of the regions whose weights do not fit their PEs."""
    needed = [np.zeros((r.rows, r.cols), dtype=np.int64) for r in mapping.layout.regions]
    for product, packed in on_the_array(mapping.layer).items():
        block = mapping.blocks[product]
        words = np.bincount(block.pe, minlength=block.pe_rows * block.pe_cols).reshape(block.pe_rows, block.pe_cols)
        needed[mapping.layout.region_of(packed)] += words * ceil(block.word_bits / mapping.spec.weight_word_bits)
    return {n for n, words in enumerate(needed) if words.max() > mapping.spec.weight_words}


def drained(mapping):
    """(words over links, rows that are added to sums kept at the edge) of one step of one item: every row of every sum that is
    drained passes all PE columns of its region; behind a delta threshold it is added to what is kept. W_ih and W_hh of a gate
    are one sum where they are in one region, in pieces of one size, with products of one fraction and both or neither with a
    threshold; W_in x and W_hn h of a GRU never are, nor is what V of a low-rank block gives."""
    layer, words, kept, products = mapping.layer, 0, 0, on_the_array(mapping.layer)

    def last(part, gate):  # U of a low-rank block stands in the sum
        return (f"{part}.{gate}", gate) if (f"{part}.{gate}", gate) in products else (part, gate)

    sums = [(part.split(".")[0], gate) for part, gate in products if "." in part] + [last("hr", "p")] * layer.projected
    for gate in layer.gates:
        ends = [last(part, gate) for part in ("ih", "hh")]
        alike = {(mapping.layout.region_of(products[end]), mapping.blocks[end].unit, layer.product_frac(part, gate),
                  PARTS[part] in layer.delta) for part, end in zip(("ih", "hh"), ends, strict=True)}
        sums += ends[: 1 + (len(alike) == 2 or (layer.cell == "GRU" and gate == "n"))]
    for part, gate in sums:
        rows, region = products[part, gate].shape[0], mapping.layout.region_of(products[part, gate])
        words += rows * mapping.layout.regions[region].cols
        kept += rows * (PARTS[part.split(".")[0]] in layer.delta)
    return words, kept


def expected(mapping):
    """Event -> its number in one step."""
    layer, spec, items = mapping.layer, mapping.spec, mapping.batch
    hidden, gru = layer.hidden_size, layer.cell == "GRU"
    macs = padding = reads = 0
    for product, packed in on_the_array(layer).items():
        block = mapping.blocks[product]
        products, useless, words, bits = stored(packed, block.unit, block.pe_cols)
        macs, padding = macs + products, padding + useless
        reads += words * ceil(bits / spec.weight_word_bits)
    vectors = operands(layer, spec)
    counts = {
        "macs": macs, "padding_macs": padding, "weight_reads": reads, "data_reads": macs, "link_words": drained(mapping)[0],
        "multicast_words": sum(values * words for values, words in vectors.values()),
        "data_writes": sum(keepers(mapping, part, column) for part, (values, _) in vectors.items() for column in range(values)),
        "activation_lookups": (3 if gru else 5) * hidden, "elementwise_multiplies": 3 * hidden,
        "roundings": hidden if gru else layer.output_size * layer.projected,
    }
    return {event: items * count for event, count in counts.items()} | {"loaded_bits": mapping.streamed_bits}


@settings(max_examples=100, deadline=None)
@given(mappings(), st.sampled_from([1, 2, 5]))
def test_events_are_those_of_the_blocks(mapping, steps):
    schedule = schedule_mapping(mapping, steps)
    counts = schedule.counts()
    assert {event: counts[event] for event in expected(mapping)} == {e: steps * n for e, n in expected(mapping).items()}
    # A sum is read as often as it is written, and once more when it is drained; a PE turns to every row of its blocks.
    assert counts["acc_reads"] == counts["acc_writes"] + counts["link_words"]
    assert counts["acc_writes"] <= counts["macs"] + steps * mapping.batch * drained(mapping)[1]
    assert set(counts) == set(EVENTS)


@settings(max_examples=60, deadline=None)
@given(mappings())
def test_bits_are_conserved(mapping):
    """What stays and what is loaded once is all that is stored; no memory holds more than it has."""
    spec, bits, memory_words = mapping.spec, 0, 0
    for product, packed in on_the_array(mapping.layer).items():
        _, _, words, word_bits = stored(packed, mapping.blocks[product].unit, mapping.blocks[product].pe_cols)
        bits += words * word_bits
        memory_words += words * ceil(word_bits / spec.weight_word_bits)
    assert mapping.on_chip_bits == bits == mapping.initial_bits + mapping.streamed_bits // mapping.passes
    assert mapping.memory_words.sum() == memory_words
    written = schedule_mapping(mapping, 1).counts()["weight_writes"]
    assert mapping.resident_words.sum() + written // mapping.passes == memory_words
    fullest = [int(mapping.resident_words[r.window].max()) + 2 * mapping.layout.stream_words * (n in streaming(mapping))
               for n, r in enumerate(mapping.layout.regions)]
    assert resources(mapping).weights.depth == max(fullest) <= spec.weight_words
    assert mapping.layout.stream_words == 0 or written > 0


@settings(max_examples=60, deadline=None)
@given(mappings(), st.sampled_from([1, 3, 30]))
def test_cycles_add_up(mapping, steps):
    schedule = schedule_mapping(mapping, steps)
    split = schedule.split()
    assert set(split) == set(SPLIT) and min(split.values()) >= 0
    assert sum(split.values()) == schedule.cycles == max(op.end for op in schedule.operations)
    assert schedule.first_step_latency <= schedule.cycles
    # No resource works faster than it can.
    for resource, least in least_busy(mapping).items():
        assert schedule.cycles >= steps * least, resource
    assert schedule.utilisation().max() <= 1 / mapping.spec.mac_ii


def least_busy(mapping):
    """Resource -> cycles of one step in which it must work, from the events alone."""
    spec, counts = mapping.spec, expected(mapping)
    values = counts["activation_lookups"] + counts["elementwise_multiplies"] + counts["roundings"]
    return {"PEs": mapping.batch * int(mapping.macs.max()), "loader": ceil(counts["loaded_bits"] / spec.load_bits_per_cycle),
            "network": ceil(counts["multicast_words"] / spec.h_words_per_cycle), "units": ceil(values / spec.act_units)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_every_form_with_every_cell(make, kind):
    """The drawn cases mix forms; here each form alone with each cell, in every layout."""
    layer = layer_of(lambda part, gate, shape, rng: MAKES[make](shape, rng, frac=7), 16, 8, **KINDS[kind])
    spec = ArraySpec(rows=8, cols=4, weight_words=64)
    for layout in candidate_layouts(layer, spec):
        for mapping in fitting_mappings(layer, spec, layout):
            counts = schedule_mapping(mapping, 2).counts()
            assert {event: counts[event] for event in expected(mapping)} == {e: 2 * n for e, n in expected(mapping).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_hoisting_moves_work_and_adds_none(make, kind):
    layer = layer_of(lambda part, gate, shape, rng: MAKES[make](shape, rng, frac=7), 16, 8, **KINDS[kind])
    moved = [event for event in EVENTS if event not in ("acc_reads", "acc_writes", "link_words")]  # sums that wait at the edge
    alone = schedule_layer(layer, SMALL, 4).counts()
    for window in (0, 1, 2):
        hoisted = schedule_hoisted(layer, SMALL, 4, window=window).counts()
        assert {event: hoisted[event] for event in moved} == {event: alone[event] for event in moved}
        assert hoisted["acc_reads"] == hoisted["acc_writes"] + hoisted["link_words"]


# Real additions and multiply-accumulates of a transform, forward and back, by hand: 2 additions where a butterfly turns
# nothing; 8 operations at the one that turns, for k = 8.
TRANSFORMS = {2: ((2, 0), (2, 0)), 4: ((4 + 2, 0), (4 + 4, 0)), 8: ((8 + 4 + 2 + 4, 4), (8 + 8 + 4 + 4, 4))}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{"ih": 4}, {"hh": 8}, {"ih": 8, "hh": 4}, {"ih": 4, "hh": 4}], ids=str)
def test_the_fft_datapath(sizes, kind, batch):
    """2k - 2 products a tile and k words read; one forward transform of each tile of a vector for each k, in all PE rows, and
    one inverse per output tile. The tanh gate's blocks are half as large, so that there are two sizes."""
    def block(part, gate, shape, rng):
        if part not in sizes:
            return dense(shape, rng)
        k = sizes[part] // (1 + (gate in "gn"))
        return replace(circulant(shape, rng, k), datapath="fft")

    layer, spec = layer_of(block, 16, 6, **KINDS[kind]), SMALL.with_(word_bits=16)
    mapping = map_layer(layer, spec, one_region(spec), batch=batch)
    schedule, expected = schedule_mapping(mapping, 3), dict.fromkeys(("macs", "weight_reads", "transform_operations"), 0)
    bits, transforms, links = 0, set(), [0, 0]  # links: at least, at most
    for part, gate in layer.products:
        packed = layer.block(part, gate)
        rows, columns = packed.shape
        if part not in sizes:
            expected["macs"] += rows * columns
            expected["weight_reads"] += rows * columns
            bits += rows * columns * packed.fmt.bits
            links = [n + rows * 4 for n in links]  # never one sum with an inverse
            continue
        k = packed.block
        tiles = rows // k * ceil(columns / k)
        expected["macs"] += tiles * (2 * k - 2)
        expected["weight_reads"] += tiles * k
        bits += tiles * k * (packed.fmt.bits + k.bit_length() - 1)
        links = [links[0] + rows * (3 + 1), links[1] + rows * (3 + 4)]  # to the PE with the inverse, from there to the edge
        transforms.add((part, k, 4 * ceil(columns / k), False))
        transforms.add((part, k, rows // k, gate))
    for _, k, number, gate in transforms:
        adds, macs = TRANSFORMS[k][gate is not False]
        expected["transform_operations"] += number * (adds + macs)
        expected["weight_reads"] += number * macs
    # Every PE has the cosines of the largest transform beside its weights: k/4 - 1 of them.
    constants = 16 * max(k // 4 - 1 for _, k, *_ in transforms)
    words = expected["weight_reads"] - sum(number * TRANSFORMS[k][gate is not False][1] for _, k, number, gate in transforms)
    assert mapping.resident_words.sum() == words + max(constants, 0)
    counts = schedule.counts()
    assert {event: counts[event] for event in expected} == {event: 3 * batch * count for event, count in expected.items()}
    assert 3 * batch * links[0] <= counts["link_words"] <= 3 * batch * links[1]
    assert mapping.on_chip_bits == bits and sum(schedule.split().values()) == schedule.cycles
    assert counts["multicast_words"] == 3 * batch * sum(values for values, _ in operands(layer, spec).values())


# Cycles by hand from the rules: multiply-accumulates of the fullest PE + 4 of pipeline + rows of a PE row + hops of columns.


def block_cycles(layer, spec, layout=None):
    """From the first multiply-accumulate of W_hi to its last sum at the edge; W_ii is drained apart."""
    found = spans(schedule_layer(layer, spec, 1, layout))
    return found["drain i hh"][1] - found["mac i hh"][0]


def test_a_dense_block_that_does_not_fill_the_grid():
    """6 x 6 on 4 x 4 PEs: 2 rows x 2 columns in the fullest PE, 2 rows to drain, 3 hops of 2 cycles; three cycles a product."""
    assert block_cycles(dense_layer(6, 4, hidden_frac=6), SMALL.with_(link_cycles=2)) == 4 + 4 + 2 + 3 * 2
    assert block_cycles(dense_layer(6, 4, hidden_frac=6), SMALL.with_(mac_ii=3)) == 3 * 4 + 4 + 2 + 3


def test_an_unbalanced_sparse_block():
    """8 x 8: one row is full, 2 weights in each PE of a PE row; the others have one weight in PE column 0 and a padding word in
    the other three. Each PE row holds 2 rows, so the fullest PE has 2 + 1 words."""
    values = np.zeros((8, 8), dtype=np.int64)
    values[0], values[1:, 0] = 5, 3
    layer = layer_of(lambda part, gate, shape, rng: PackedSparse.from_dense(values, QFormat(8, 6 if part == "hh" else 7)), 8, 8)
    assert block_cycles(layer, SMALL) == 3 + 4 + 2 + 3


def test_circulant_tiles_in_time_domain():
    """8 x 8 of 2 x 2 tiles of 4 x 4, one per PE: 16 cycles; each of two PE rows drains 4 rows."""
    layer = layer_of(lambda part, gate, shape, rng: circulant(shape, rng, 4, 6 if part == "hh" else 7), 8, 8)
    assert block_cycles(layer, SMALL, one_region(SMALL)) == 16 + 4 + 4 + 3


def test_units_and_multicast_that_do_not_divide_the_values():
    """8 values: 3 words a cycle; 3 units of 2 cycles a value, 4 of latency."""
    found = spans(schedule_layer(dense_layer(), SMALL.with_(h_words_per_cycle=3, act_units=3, act_ii=2), 1))
    assert found["h to PEs"][1] - found["h to PEs"][0] == 3
    assert found["act i"][1] - found["act i"][0] == 3 * 2 + 4


def multicasts(layer, spec):
    """Part -> cycles of its multicast, in the whole array and whole tiles."""
    schedule = schedule_mapping(map_layer(layer, spec, one_region(spec)), 3)
    return {i.parts[0]: took.busy for i, took in zip(schedule.mapping.program, schedule.timed, strict=True)
            if i.kind == "multicast"}


def whole_tiles(hidden, inputs, k):
    return layer_of(lambda part, gate, shape, rng: circulant(shape, rng, k), hidden, inputs)


def test_one_word_a_cycle_into_a_memory():
    """Of a tile of 8 all words are for the PEs of one column, of which each takes one in a cycle."""
    assert multicasts(whole_tiles(8, 8, 8), ArraySpec(rows=4, cols=4, h_words_per_cycle=4)) == {"ih": 8, "hh": 8}
    # 12 values of x in one memory of 8 and one of 4: as the memory needs, or the network: 12 / 1.
    assert multicasts(whole_tiles(16, 12, 8), ArraySpec(rows=4, cols=4, h_words_per_cycle=4)) == {"ih": 8, "hh": 8}
    assert multicasts(whole_tiles(16, 12, 8), ArraySpec(rows=4, cols=4, h_words_per_cycle=1)) == {"ih": 12, "hh": 16}
    # 5 tiles of 4 go round 4 PE columns, so that one memory takes 8 words, three take 4: 20 words, 3 in a cycle, take 7 cycles
    # and end together only if the memory of 8 is served in every cycle: 8.
    assert multicasts(whole_tiles(20, 4, 4), ArraySpec(rows=4, cols=4, h_words_per_cycle=3)) == {"ih": 4, "hh": 8}
    # Dense columns go round: 8 values, 4 a cycle; on 4 PE columns 8 a cycle find but 4 memories.
    for each in (4, 8):
        assert multicasts(dense_layer(), ArraySpec(rows=4, cols=4, h_words_per_cycle=each)) == {"ih": 1, "hh": 2}
    assert multicasts(dense_layer(), ArraySpec(rows=4, cols=8, h_words_per_cycle=8)) == {"ih": 1, "hh": 1}


def test_the_order_of_a_multicast_by_hand():
    """Words 0 to 3 are for one memory, 4 and 5 for another, 6 for none: two of the first's before the second's first."""
    memories = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0]], dtype=bool)
    assert multicast_groups(memories, 2) == [[0, 4], [1, 5], [2, 6], [3]]
    assert multicast_groups(memories, 1) == [[0], [1], [2], [3], [4], [5], [6]]  # as they come
    memories = np.array([[1, 0, 1, 0], [0, 1, 1, 0]], dtype=bool)  # the third for both
    assert multicast_groups(memories, 3) == [[0, 1, 3], [2]]
    assert multicast_cycles(memories, np.array([3, 1, 2])).tolist() == [2, 4, 2]


@settings(max_examples=100, deadline=None)
@given(mappings(), st.sampled_from([1, 2, 3, 5, 9]))
def test_multicasts_keep_to_network_and_memories(mapping, each):
    """Every word once, at most `each` in a cycle and one into a memory; where each has one memory, in the fewest cycles."""
    for i in (i for i in mapping.program if i.kind == "multicast"):
        memories, width = memories_of(mapping, i), network_words(mapping.layer, mapping.spec, i.parts[0])
        assert (memories == np.hstack([np.vstack([kept for _, kept in takers(mapping, i)])] * width)).all()
        assert memories.shape[1] == width * i.values
        groups = multicast_groups(memories, each)
        assert sorted(word for group in groups for word in group) == list(range(memories.shape[1]))
        assert max(map(len, groups)) <= each
        assert max(memories[:, group].sum(axis=1).max() for group in groups) <= 1
        assert multicast_cycles(memories, each) == multicast_cycles(memories, np.array([1, each]))[1] == len(groups)
        least = max(ceil(memories.shape[1] / each), memories.sum(axis=1).max())
        assert least == len(groups) or (least < len(groups) and memories.sum(axis=0).max() > 1)


@pytest.mark.parametrize(("groups", "message"), [
    (lambda memories, each: [[0], [1, 2], *([n] for n in range(3, memories.shape[1]))], r"PE \(0, 0, 0\) two words in cycle"),
    (lambda memories, each: [list(range(memories.shape[1]))], "brings 8 words in cycle")])
def test_interpreter_sees_two_words_that_enter_a_memory(monkeypatch, groups, message):
    spec = ArraySpec(rows=4, cols=4, h_words_per_cycle=2)
    mapping, x = map_layer(whole_tiles(8, 8, 8), spec, one_region(spec)), np.zeros((2, 8), dtype=int)
    interpret(mapping, x)
    monkeypatch.setattr("workbench.array.interpreter.multicast_groups", groups)
    with pytest.raises(RuntimeError, match=f"hazard: x to PEs of step 0 {'brings the ' * ('PE' in message)}{message}"):
        interpret(mapping, x)


@pytest.mark.parametrize(("cell", "cycles"), [
    # From h in the PEs: W_hi h 4 + 4; its drain 2 + 3; W_hg h, in the same bank, 4 + 4; its drain 2 + 3; g's look-up 2 + 4;
    # c, of two products, 4 + 4; tanh c holds the units for 2, then o's look-up takes 2 + 4; h 2 + 4; 8 words to the PEs.
    ("LSTM", 8 + 5 + 8 + 5 + 6 + 8 + 2 + 6 + 6 + 8),
    # W_hr h holds the PEs for 4; W_hn h 4 + 4; its drain 2 + 3; s, r*s: 2 + 4 each; n's look-up holds the units for 2;
    # z's takes 2 + 4; h, of two products, 4 + 4; 8 words.
    ("GRU", 4 + 8 + 5 + 6 + 6 + 2 + 6 + 8 + 8)])
def test_the_recurrence_by_hand(cell, cycles):
    schedule = schedule_layer(dense_layer(cell=cell), SMALL, 9)
    assert schedule.steady_state_cycles == cycles
    first, second = spans(schedule, 3), spans(schedule, 4)
    assert min(start for name, (start, _) in second.items() if name.endswith("hh")) == first["h to PEs"][1]
