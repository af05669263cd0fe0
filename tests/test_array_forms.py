"""Low-rank blocks on the array as two products: hand numbers, the literal interpreter and the engine as oracles."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_array import (
    COARSE,
    KINDS,
    SIGNALS,
    SMALL,
    check_against_interpreter,
    circulant,
    dense,
    layer_of,
    one_region,
    spans,
    sparse,
)

from workbench import spectrum as transforms
from workbench.array import ArraySpec, execute_layer, map_block, preset, schedule_layer
from workbench.array.cost import resources
from workbench.array.interpreter import _bins, _word_operands, forward_operations, inverse_operations
from workbench.array.mapping import candidate_layouts, fitting_mappings, least_cycles
from workbench.engine import run_layer
from workbench.fixedpoint import QFormat
from workbench.packed import PackedCirculant, PackedLowRank


def low_rank(shape, rng, rank=2, frac=4, bits=6):
    fmt = QFormat(bits, frac)
    return PackedLowRank(fmt, *(rng.integers(fmt.min, fmt.max + 1, sides) for sides in ((shape[0], rank), (rank, shape[1]))))


def low_rank_layer(hidden=8, inputs=4, ranks=None, **kind):
    """ranks: part -> rank; the others are dense."""
    ranks = {"ih": 2, "hh": 2, "hr": 2} if ranks is None else ranks
    return layer_of(lambda part, gate, shape, rng: low_rank(shape, rng, ranks[part]) if part in ranks else dense(shape, rng),
                    hidden, inputs, **kind)


@st.composite
def cases(draw, *forms):
    """Layers of these forms among others, on small arrays."""
    hidden, inputs = draw(st.sampled_from([4, 6, 8, 12])), draw(st.sampled_from([1, 3, 5, 8]))

    def choose(*values):
        return draw(st.sampled_from(values))

    def block(part, gate, shape, rng):
        form = choose(*forms, *forms, "dense", "sparse", "circulant")
        if form == "fft":
            return spectral(shape, rng, choose(*(k for k in (2, 4, 8) if shape[0] % k == 0)), choose(7, 6))
        if form == "lowrank":
            return low_rank(shape, rng, min(choose(1, 2, 3, 5), *shape), choose(3, 4))
        if form == "sparse":
            return sparse(shape, rng, choose(0.2, 0.6), choose(7, 6))
        if form == "circulant":
            return circulant(shape, rng, choose(*(k for k in (2, 3, 4) if shape[0] % k == 0)), choose(7, 6))
        return dense(shape, rng, frac=choose(7, 6))

    seed = draw(st.integers(0, 1000))
    kind = choose({}, {"proj": 2}, {"proj": 4}, {"cell": "GRU"}, {"cell": "GRU"})
    layer = layer_of(block, hidden, inputs, seed, signals=choose(SIGNALS, COARSE), **kind)
    spec = ArraySpec(
        rows=choose(4, 8), cols=choose(4, 8), mac_latency=choose(0, 1, 4), mac_ii=choose(1, 2), acc_depth=choose(8, 10, 64),
        acc_banks=choose(1, 2, 3), link_cycles=choose(1, 2, 3), h_words_per_cycle=choose(1, 3, 8), act_units=choose(1, 3, 4),
        act_latency=choose(0, 2), act_ii=choose(1, 2), weight_words=choose(2048, 24, 12), weight_word_bits=choose(18, 8),
        load_bits_per_cycle=choose(7, 64), config_cycles=choose(0, 5))
    layout = draw(st.sampled_from(candidate_layouts(layer, spec)))
    mapping = draw(st.sampled_from(fitting_mappings(layer, spec, layout, choose(1, 1, 2))))
    return mapping, draw(st.sampled_from([1, 2, 4])), seed


@settings(max_examples=40, deadline=None)
@given(cases("lowrank"))
def test_low_rank_layers_equal_the_literal_interpreter(case):
    check_against_interpreter(*case)


def test_a_low_rank_step_by_hand():
    """W_hh of rank 2: V has 2 rows of 8 columns, U 8 rows of 2. h has 16 bits, the weights 6: V h takes up to 16 + 3 + 5 bits,
    two words of the network each."""
    schedule = schedule_layer(low_rank_layer(ranks={"hh": 2}), SMALL, 1)
    found = spans(schedule)
    assert [i.name for i in schedule.mapping.program if i.region == 0 or i.kind == "multicast"] == [
        "x to PEs", *(name for gate in "ifgo" for name in (f"mac {gate} ih", f"drain {gate} ih")),  # of another fraction
        *(name for gate in "ifgo" for name in (f"mac {gate} hh", f"drain {gate} hh", f"hh.{gate} to PEs")),
        *(name for gate in "ifgo" for name in (f"mac {gate} hh.{gate}", f"drain {gate} hh.{gate}")), "h to PEs"]
    # Two rows over four PE rows: one each, of two columns; drain of one row; 2 values of 2 words, one word a cycle.
    start = found["mac i hh"][0]
    assert found["mac i hh"] == (start, start + 2 + 4)
    assert found["drain i hh"] == (start + 6, start + 6 + 1 + 3)
    assert found["hh.i to PEs"] == (start + 10, start + 14)
    assert found["mac i hh.i"][1] - found["mac i hh.i"][0] == 2 + 4  # two rows of a PE, one column
    counts = schedule.counts()
    assert counts["macs"] == 4 * (8 * 4 + 2 * 8 + 8 * 2)
    assert counts["multicast_words"] == 4 + 4 * 2 * 2 + 8
    assert counts["data_writes"] == 4 * 4 + 4 * 2 * 4 + 8 * 4  # every value to one PE column of four PEs, whole


def test_the_inner_product_of_x_runs_before_h_is_back():
    """Its way back to the PEs follows h, as the network serves in program order."""
    schedule = schedule_layer(low_rank_layer(16, 8), SMALL, 5)
    late = [op for op in schedule.operations if op.step == 4]
    h_is_back = max(op.end for op in schedule.operations if op.step == 3 and op.name == "h to PEs")
    assert all(op.start < h_is_back for op in late if op.name in [f"mac {gate} ih" for gate in "ifgo"])
    assert min(op.start for op in late if op.name == "ih.i to PEs") == h_is_back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [["ih"], ["hh"], ["hr"], ["ih", "hh", "hr"]], ids="+".join)
def test_low_rank_in_any_part(kind, parts):
    layer = low_rank_layer(12, 6, dict.fromkeys(parts, 3), **KINDS[kind])
    for changes in ({}, {"weight_words": 24, "load_bits_per_cycle": 5}, {"acc_depth": 4, "acc_banks": 1}):
        mapping = schedule_layer(layer, SMALL.with_(**changes), 1).mapping
        check_against_interpreter(mapping, 3, seed=2)


def test_what_v_gives_is_sent_once_all_its_passes_are_drained():
    """Rank 5 on four PE rows with one accumulator each: two passes, one way back."""
    mapping = schedule_layer(low_rank_layer(8, 6, {"hh": 5}), SMALL.with_(acc_depth=1), 1).mapping
    names = [i.name for i in mapping.program if i.gate == "i" or i.sum == "hh.i"]
    assert names[4:9] == ["mac i hh", "drain i hh", "mac i hh", "drain i hh", "hh.i to PEs"]
    check_against_interpreter(mapping, 3, seed=0)


@pytest.mark.parametrize("name", ["group4x4", "array16x16"])
def test_low_rank_execution_equals_the_engine(name):
    layer = low_rank_layer(32, 12, dict.fromkeys(("ih", "hh"), 5))
    x = np.random.default_rng(1).integers(-9000, 9000, (10, 2, 12))
    executed, engine = execute_layer(layer, preset(name), x), run_layer(layer, x)
    np.testing.assert_array_equal(executed.output, engine.output)
    assert np.unique(engine.output).size > 8


def test_low_rank_costs_what_its_factors_cost():
    rank, layer = 4, low_rank_layer(32, 12, {"hh": 4})
    mapping = schedule_layer(layer, SMALL, 1).mapping
    assert mapping.on_chip_bits == 4 * (32 * 12 * 8 + 2 * 32 * rank * 6)
    assert mapping.cr_chip == 32 * 4 * 32 * (12 + 32) / mapping.on_chip_bits
    assert mapping.macs.sum() == 4 * (32 * 12 + 2 * 32 * rank)
    widest = max(block.inner_bits(1 << 15) for name, block in layer.blocks.items() if "_hh_" in name)
    assert resources(mapping).data.bits == widest > 16
    # x twice, h once, and of each gate what its V gives: 3 + 3 + 8 + 4 columns of one PE.
    assert resources(mapping).data.depth == 2 * 3 + 8 + 4
    assert least_cycles(layer, SMALL, one_region(SMALL)) <= schedule_layer(layer, SMALL, 9).steady_state_cycles


# The fft datapath.


def spectral(shape, rng, block=4, frac=7):
    vectors = rng.integers(-128, 128, (shape[0] // block, -(-shape[1] // block), block))
    return PackedCirculant(shape, QFormat(8, frac), block, vectors, "fft")


def spectral_layer(hidden=16, inputs=8, blocks=None, **kind):
    """blocks: part -> size; the others are dense."""
    blocks = {"ih": 8, "hh": 8, "hr": 4} if blocks is None else blocks
    return layer_of(lambda part, gate, shape, rng: spectral(shape, rng, blocks[part]) if part in blocks else dense(shape, rng),
                    hidden, inputs, **kind)


@pytest.mark.parametrize(("shape", "block"), [((16, 16), 8), ((12, 7), 4), ((8, 6), 2), ((32, 40), 16)])
def test_spectral_words_rebuild_the_spectra(shape, block):
    packed = spectral(shape, np.random.default_rng(0), block)
    mapping = map_block(packed, 4, 4)
    np.testing.assert_array_equal(mapping.spectrum(), packed.spectrum)
    tiles = packed.spectrum.shape[0] * packed.spectrum.shape[1]
    assert mapping.macs.sum() == tiles * (2 * block - 2) and mapping.weight_words.sum() == tiles * block
    assert mapping.on_chip_bits == tiles * block * packed.spectrum_bits and mapping.padding.sum() == 0


@pytest.mark.parametrize("k", [2, 4, 8, 16, 32])
def test_the_literal_operations_are_the_transforms(k):
    """Run one after the other on a memory of names."""
    def run(operations, results, memory):
        for kind, name, *terms in operations:
            values = [sign * memory[where] for sign, where in (terms if kind == "add" else [terms[1]])]
            if kind == "add":
                memory[name] = sum(values)
            else:
                memory[name] = memory.get(name, 0) + terms[0] * values[0]
                memory[name] = (memory[name] + 8192) >> 14 if terms[2] else memory[name]
        return [sign * memory[where] for sign, where in results]

    def counted(operations):
        return tuple(sum(kind == one for kind, *_ in operations) for one in ("add", "mac"))

    x = np.random.default_rng(k).integers(-5000, 5000, k)
    operations, bins = forward_operations([(1, n) for n in range(k)])
    words = run(operations, _word_operands(bins), dict(enumerate(x.tolist())))
    re, im = transforms.forward(x)
    assert words == [*re.tolist(), *im[1:-1].tolist()]
    assert counted(operations) == transforms.real_operations(k, False)
    operations, results = inverse_operations(_bins([(1, n) for n in range(k)]))
    assert run(operations, results, dict(enumerate(words))) == transforms.inverse(re, im).tolist()
    assert counted(operations) == transforms.real_operations(k, True)


@settings(max_examples=40, deadline=None)
@given(cases("fft"))
def test_fft_layers_equal_the_literal_interpreter(case):
    check_against_interpreter(*case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [["ih"], ["hh"], ["ih", "hh"], ["ih", "hh", "hr"]], ids="+".join)
def test_fft_in_any_part(kind, parts):
    layer = spectral_layer(16, 6, {part: 4 if part == "hr" else 8 for part in parts}, **KINDS[kind])
    for changes in ({}, {"weight_words": 64, "load_bits_per_cycle": 9},
                    {"acc_depth": 8, "acc_banks": 1, "weight_word_bits": 8}):
        mapping = schedule_layer(layer, SMALL.with_(**changes), 1).mapping
        check_against_interpreter(mapping, 3, seed=2)


def test_an_fft_step_by_hand():
    """W_hh of 2 x 2 tiles of 8: two PE rows of tiles, two PE columns; the others of the 4 x 4 PEs have nothing to multiply."""
    schedule = schedule_layer(spectral_layer(16, 8, {"hh": 8}), SMALL, 1)
    found = spans(schedule)
    took = {name: end - start for name, (start, end) in found.items()}
    # Forward, 22 operations of a PE with one tile: 4 * 2 + 2 * 2 + (2 + 8); 4 cycles of pipeline. Products: 2 * 8 - 2.
    assert (took["forward hh.fft8"], took["mac i hh.fft8"]) == (22 + 4, 14 + 4)
    # Gathers: 8 rows, one a cycle, to the PE columns 0 to 3 in turn, from both ends: 3, 2, 2 and 3 hops.
    assert [took[f"gather {gate} hh.fft8"] for gate in "ifgo"] == [11, 10, 10, 11]
    # So each inverse has a PE of its own: 4 * 2 + 2 * 4 + (2 + 8 + 2) operations. What it gives: 8 rows, 3 hops to the edge.
    assert (took["inverse hh"], took["send i hh"]) == (28 + 4, 8 + 3)
    assert found["forward hh.fft8"][0] == 43  # behind W_ih o, whose 8 products begin at 35
    assert found["inverse hh"][0] == found["gather o hh.fft8"][1] and found["act i"][0] == found["send i hh"][1]
    # 16 PEs; two columns of four transform a tile each, of which 18 additions and 4 multiplications; 8 inverses of 24 and 4.
    counts = schedule.counts()
    assert counts["transform_operations"] == 8 * 22 + 8 * 28
    assert counts["macs"] == 4 * 16 * 8 + 16 * 14
    assert counts["weight_reads"] == 4 * 16 * 8 + 16 * 8 + 8 * 4 + 8 * 4  # constants, too
    # An addition reads two words and writes one, a multiplication reads one, each second one writes; sums come, results leave.
    assert counts["data_reads"] == counts["macs"] + 8 * (2 * 18 + 4) + 8 * (2 * 24 + 4) + 64
    assert counts["data_writes"] == (8 + 16) * 4 + 8 * (18 + 2) + 64 + 8 * (24 + 2)
    assert counts["link_words"] == 64 * 4 + 64 * 3 + 16 * (4 + 3 + 2 + 1)  # drains of W_ih, gathers, results
    # W_ih: 4 runs on a row in each PE and gate; every product of spectra turns to another row; drains and gathers.
    assert counts["acc_reads"] == 16 * 4 * 4 + 16 * 14 + 64 * 4 + 64 * 4 and counts["acc_writes"] == 16 * 4 * 4 + 16 * 14
    mapping = schedule.mapping
    assert mapping.on_chip_bits == 4 * 16 * 8 * 8 + 16 * 8 * 11  # spectra of 8 + 3 bits
    assert least_cycles(mapping.layer, SMALL, one_region(SMALL)) == 4 * 4 * 2 + 4 * 14
    assert mapping.memory_words.max() == 4 * 4 * 2 + 4 * 8 and mapping.resident_words.max() == mapping.memory_words.max() + 1
    # Two of the 8 columns of x, twice; of h a tile, its spectrum and one inverse.
    assert resources(mapping).data.depth == 2 * 2 + 8 + 8 + 8 and resources(mapping).data.bits == 27
    assert resources(mapping).lut[0] == 220 + 16 * (2 * 27 + 96 + 48)  # data twice, accumulators, a link's adder


def test_transforms_stand_beside_the_products_that_share_them():
    """Of the step above. W_ih of 4 rows and 2 columns a PE, then the spectra; links: 4 rows, 8 sums, 8 results."""
    schedule = schedule_layer(spectral_layer(16, 8, {"hh": 8}), SMALL, 1)
    rows = {row.pop("sum"): row for row in schedule.products()}
    same = {"layer": "", "region": 0, "memory": 0, "bound": "compute"}
    assert rows == {gate: same | {"compute": 8 + 14, "links": 4 + 8 + 8} for gate in "ifgo"} | {
        "forward hh.fft8": same | {"compute": 22, "links": 0}, "inverse hh": same | {"compute": 28, "links": 0}}
    pes = [op.busy for i, op in zip(schedule.mapping.program, schedule.timed, strict=True) if i.resource == "PEs 0"]
    assert sum(row["compute"] for row in rows.values()) == sum(pes)


def test_data_that_additions_of_transforms_read_are_kept_twice():
    """An addition takes two data words in a cycle, of a memory with one port to read and one to write."""
    used = resources(schedule_layer(spectral_layer(64, 64, {"ih": 16, "hh": 16}), SMALL, 1).mapping)
    assert used.data.depth > 64 and used.data.bits == 27 and used.data.ramb18 == 1  # up to 36 bits wide
    assert used.bram36 == (16 * (used.weights.ramb18 + 2 * 1) + 4 * 1) // 2  # tables of 4 units


def test_one_transform_serves_all_gates_and_sizes_of_blocks_have_one_each():
    layer = layer_of(lambda part, gate, shape, rng: spectral(shape, rng, 8 if gate in "if" else 4), 16, 8)
    names = [i.name for i in schedule_layer(layer, SMALL, 1, one_region(SMALL)).mapping.program]
    forward = [name for name in names if name.startswith("forward")]
    assert sorted(forward) == [f"forward {part}.fft{k}" for part in ("hh", "ih") for k in (4, 8)]
    assert [name for name in names if name.startswith("inverse")] == ["inverse ih", "inverse hh"]


def test_what_x_gives_is_transformed_back_before_h_is_back():
    schedule = schedule_layer(spectral_layer(32, 8), SMALL, 6)
    h_is_back = max(op.end for op in schedule.operations if op.step == 4 and op.name == "h to PEs")
    assert all(op.start < h_is_back for op in schedule.operations
               if op.step == 5 and op.name in ("forward ih.fft8", "inverse ih"))


def test_the_datapath_is_the_block_s_own():
    """The scheduler may not switch it; of the same integers both run, and only their own engine agrees."""
    fft = spectral_layer(32, 16, {"ih": 8, "hh": 16})
    time = replace(fft, blocks={name: replace(b, datapath="time") for name, b in fft.blocks.items()})
    x = np.random.default_rng(3).integers(-9000, 9000, (12, 2, 16))
    outputs = []
    for layer in (fft, time):
        executed = execute_layer(layer, preset("array16x16"), x)
        np.testing.assert_array_equal(executed.output, run_layer(layer, x).output)
        assert any(i.kind == "inverse" for i in executed.schedule.mapping.program) == (layer is fft)
        outputs.append(executed.output)
    assert (outputs[0] != outputs[1]).any()


@pytest.mark.parametrize(("hidden", "block", "faster"), [(128, 8, True), (128, 16, False), (512, 16, True)])
def test_where_the_fft_wins(hidden, block, faster):
    """On 16 x 16 PEs, 40 inputs: a transform takes the time of one PE, so that few large tiles leave most PEs idle."""
    fft = spectral_layer(hidden, 40, {"ih": block, "hh": block})
    time = replace(fft, blocks={name: replace(b, datapath="time") for name, b in fft.blocks.items()})
    cycles = {name: schedule_layer(layer, preset("array16x16"), 20).steady_state_cycles
              for name, layer in (("fft", fft), ("time", time))}
    assert (cycles["fft"] < cycles["time"]) == faster
    assert hidden == 128 or cycles["time"] > 3 * cycles["fft"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"acc_depth": 4}, r"a tile of the fft datapath needs 8 accumulators of one PE, the array has 4 \(acc_depth\)"),
    ({"lookahead": 2}, r"skips no zeros \(lookahead 2\) in layers on the datapath fft, got rnn.weight_ih_l0.i,"),
    # Of x a tile twice, of h one; a spectrum of each, and the sums and results of an inverse of each.
    ({"data_words": 20}, r"a PE needs 56 data words \(x twice, h once, spectra and inverse transforms\), the array has 20"),
])
def test_what_the_fft_datapath_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        schedule_layer(spectral_layer(16, 8), SMALL.with_(**changes), 2)


def test_an_inverse_waits_for_every_gather():
    """Slow links and short tiles: the sums of i, which meet in the first of 8 PE columns, come after those of o."""
    spec = SMALL.with_(cols=8, link_cycles=3, acc_banks=4, mac_latency=0)
    mapping = schedule_layer(spectral_layer(8, 4, {"hh": 2}), spec, 1).mapping
    found = spans(schedule_layer(mapping.layer, spec, 1))
    assert found["gather i hh.fft2"][1] > found["gather o hh.fft2"][1]
    assert found["inverse hh"][0] == found["gather i hh.fft2"][1]
    check_against_interpreter(mapping, 3, seed=0)


def test_two_inverses_never_share_a_sum():
    """Although W_ih and W_hh have the same fraction and tiles of one size: each inverse rounds what is its own."""
    layer = spectral_layer(4, 4, {"ih": 4, "hh": 4})
    assert [layer.alignment(gate)[1:] for gate in "ifgo"].count((0, 0)) > 0
    mapping = schedule_layer(layer, SMALL, 1).mapping
    assert all(len(i.parts) == 1 for i in mapping.program if i.kind in ("gather", "send"))
    check_against_interpreter(mapping, 3, seed=0)
