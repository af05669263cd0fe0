"""Energy, resources and comparison: hand numbers and messages."""

from dataclasses import fields, replace

import numpy as np
import pytest
from test_array import COARSE, KINDS, PRESETS, SIGNALS, SMALL, dense_layer, hybrid_layer, one_region
from test_array_forms import spectral_layer

from workbench.array import ASSUMPTIONS, ArraySpec, map_layer, schedule_hoisted, schedule_layer, schedule_layers
from workbench.array.cost import (
    DEVICES,
    ENERGY_NOTE,
    PJ_PER_EVENT,
    Memory,
    compare,
    energy,
    full_resources,
    resources,
)
from workbench.array.schedule import EVENTS
from workbench.fixedpoint import QFormat
from workbench.tables import device_table, energy_table, spec_table


def test_energy_by_hand():
    modelled = energy({"macs": 10, "weight_reads": 4, "acc_reads": 3, "acc_writes": 2, "loaded_bits": 64, "link_words": 7})
    assert modelled.low_pj == pytest.approx(10 * 0.23 + 4 * 2.5 + 5 * 7.5 + 1300)  # 48 of 64 bits
    assert modelled.high_pj == pytest.approx(10 * 3.2 + 4 * 10 + 5 * 7.5 + 2600)
    assert modelled.without_source == {"link_words": 7}
    assert [row["event"] for row in modelled.rows] == ["macs", "weight_reads", "acc_reads", "acc_writes", "loaded_bits"]


def test_the_note_names_what_has_no_price():
    counted = energy(schedule_layer(dense_layer(), SMALL, 1).counts()).without_source
    assert set(counted) == {"padding_macs", "link_words", "activation_lookups", "roundings",
                            "multicast_words", "skipped_macs"}  # padding is in macs, what is skipped in nothing
    assert "45 nm ASIC" in ENERGY_NOTE and "narrow operands" in ENERGY_NOTE
    assert "links" in ENERGY_NOTE and "multicast" in ENERGY_NOTE and "activation" in ENERGY_NOTE and "roundings" in ENERGY_NOTE


def test_every_price_has_a_source_an_event_and_an_interval():
    assert set(PJ_PER_EVENT) < set(EVENTS)
    for low, high, source in PJ_PER_EVENT.values():
        assert 0 < low <= high
        assert "45 nm" in source and "ISSCC 2014" in source


def test_assumptions_are_sentences():
    assert len(set(ASSUMPTIONS)) == len(ASSUMPTIONS) >= 6
    assert all(text[0] != " " and text.endswith(".") for text in ASSUMPTIONS)


def test_energy_does_not_depend_on_the_width_of_words():
    """The events of a layer of 8 bits cost what those of 16 bits do; only loaded bits are fewer."""
    narrow, wide = (schedule_layer(dense_layer(bits=bits), SMALL, 2).counts() for bits in (8, 16))
    assert energy(narrow) == energy(wide)


def test_a_schedule_says_what_it_is():
    packed = {"dense": dense_layer()}
    schedule = schedule_layers(packed, SMALL, 3)["dense"]
    assert repr(schedule) == (f"<Schedule of 3 steps, batch 1: {schedule.steady_state_cycles:g} cycles a step, "
                              f"{schedule.cycles} in all, most of all for {schedule.bound}>")
    assert schedule.step_us == schedule.steady_state_cycles / SMALL.clock_mhz
    with pytest.raises(TypeError, match="schedule_layers needs a dict of PackedLayers, .*, got a PackedLayer"):
        schedule_layers(dense_layer(), SMALL, 3)


def test_static_energy_is_said_not_to_be_given():
    table = energy_table({"dense": schedule_layer(dense_layer(), SMALL, 1)})
    assert table.index.name == "nJ of the sequence"
    table = table["dense"]
    assert table["dynamic, total"].count(" to ") == 1
    assert table["static"].startswith("not given") and table["dynamic + static"].startswith("not given")


def test_energy_refuses_unknown_events():
    with pytest.raises(ValueError, match="energy knows the events macs, .*, got flops"):
        energy({"flops": 1})


@pytest.mark.parametrize("depth, bits, luts, ramb18", [
    (64, 18, 18, 0), (65, 18, 0, 1), (1024, 18, 0, 1), (1025, 18, 0, 2), (2048, 18, 0, 2), (2048, 9, 0, 1), (2049, 9, 0, 2),
    (5000, 4, 0, 2), (16384, 1, 0, 1), (3000, 12, 0, 3), (512, 27, 0, 1), (512, 36, 0, 1), (513, 27, 0, 2), (512, 72, 0, 2),
    (512, 48, 0, 2), (1024, 48, 0, 3)])
def test_memory_by_hand(depth, bits, luts, ramb18):
    assert (Memory(depth, bits).luts, Memory(depth, bits).ramb18) == (luts, ramb18)


def test_resources_by_hand():
    used = resources(schedule_layer(dense_layer(128, 40, bits=16), PRESETS["array16x16"], 1).mapping)
    assert used.dsp == 256 + 16
    assert (used.weights, used.data) == (Memory(4 * (8 * 8 + 8 * 3), 16), Memory(2 * 3 + 8, 16))
    assert used.tables == (Memory(2 * 2 * 256, 16),)  # start and slope of 256 segments of sigmoid and tanh
    assert used.bram36 == 128 + 8  # one RAMB18 of weights per PE, one of tables per activation unit; the data lie in LUTs
    # Per PE: 16 LUTs of data, 96 of accumulators (two banks of 64 x 48 bits), an adder of 48; high: two ports.
    assert used.lut == (16 * 220 + 256 * (16 + 96 + 48), 16 * 1023 + 256 * (32 + 192 + 48))
    assert used.ff == (16 * 145 + 256 * 48, 16 * 1681 + 256 * 48)
    assert used.share("k26") == {"dsp": (272 / 1248,) * 2, "bram36": (136 / 144,) * 2,
                                 "lut": tuple(n / 117120 for n in used.lut), "ff": tuple(n / 234240 for n in used.ff)}
    for ask in (used.share, used.check_fit):
        with pytest.raises(ValueError, match="knows the devices vu440, k26, got 'zu9'"):
            ask("zu9")


@pytest.mark.parametrize(("tables", "memories"), [
    # 12-bit pre-activations and cell: the codes of sigmoid, and of tanh for either.
    ("exact", (Memory(4096, 7), Memory(4096, 8), Memory(4096, 8))), ("hard", ())])
def test_memories_of_other_tables(tables, memories):
    used = resources(schedule_layer(dense_layer(tables=tables, signals=COARSE), SMALL, 1).mapping)
    assert used.tables == memories
    assert used.bram36 == 2 * sum(memory.ramb18 for memory in memories)  # of 4 units; weights and data lie in LUTs


def test_every_bank_is_a_memory_of_its_own():
    """Two banks of 32 sums: 48 LUTs each, as they are read at the same time."""
    one, two = (resources(schedule_layer(dense_layer(), SMALL.with_(acc_depth=32, acc_banks=n), 1).mapping) for n in (1, 2))
    assert two.lut[0] - one.lut[0] == 16 * 48


def test_devices_give_all_four_totals_with_a_source():
    for device, totals in DEVICES.items():
        assert device in PRESETS and set(totals) == {"dsp", "bram36", "lut", "ff"}
        assert all(total.count > 0 and total.source and total.verified is False for total in totals.values())


def test_the_small_device_holds_its_preset_however_full():
    used = full_resources(PRESETS["k26"])
    used.check_fit("k26")
    # 1,024 words of 18 bits: one RAMB18 a PE; one a unit. Per PE: 96 LUTs of accumulators, 16 of data, 48 of an adder; high:
    # two ports.
    assert (used.dsp, used.bram36) == (256 + 16, 128 + 8)
    assert used.lut == (16 * 220 + 256 * (96 + 16 + 48), 16 * 1023 + 256 * (192 + 32 + 48))
    assert all(high <= 1 for _, high in used.share("k26").values())


@pytest.mark.parametrize(("hidden", "inputs", "proj"), [(512, 160, 0), (1024, 153, 512)])
def test_the_large_device_holds_dense_layers(hidden, inputs, proj):
    used = resources(map_layer(dense_layer(hidden, inputs, bits=16, proj=proj), PRESETS["vu440"], one_region(PRESETS["vu440"])))
    used.check_fit("vu440")
    assert used.bram36 <= 48 * 48 + 24 and all(high <= 1 for _, high in used.share("vu440").values())


def test_what_a_device_does_not_hold_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="does not fit the vu440: it takes 3480 bram36 of 2520$"):
        full_resources(PRESETS["vu440"]).check_fit("vu440")  # more than 64 data words a PE are a RAMB18 beside the BRAM36
    with pytest.raises(ValueError, match="it takes 2352 dsp of 1248, 1176 bram36 of 144, .* lut of 117120"):
        full_resources(PRESETS["vu440"].with_(weight_words=1024, data_words=64)).check_fit("k26")


def test_every_field_has_a_unit_and_a_source():
    table = spec_table(PRESETS["k26"]).set_index("field")
    assert list(table.index) == [f.name for f in fields(ArraySpec)]
    assert all(table["unit"]) and all(table["source"])
    assert table.loc["weight_words", ["value", "unit"]].tolist() == [1024, "words per PE"]


def test_device_table():
    schedule = schedule_layer(dense_layer(128, 40, bits=16), PRESETS["array16x16"], 1)
    table = device_table({"dense": schedule}, "k26").set_index("resource")
    assert table["dense"].to_dict() == {"dsp": "21.8%", "bram36": "94.4%", "lut": "38.0% to 73.4%", "ff": "6.2% to 16.7%"}
    assert set(table["verified"]) == {"no"}


@pytest.mark.parametrize(("kind", "depth", "bits"), [("LSTM", 2 + 2, 9), ("GRU", 2 + 2, 9), ("projected", 2 + 1 + 2, 12)])
def test_data_memory_holds_what_weights_multiply(kind, depth, bits):
    """8 units, 4 inputs on 4 x 4 PEs: x twice, h (projected: 4 values), and 8 values of 12 bits before a projection."""
    signals = SIGNALS | {"input": QFormat(8, 6), "hidden": QFormat(9, 8), "unprojected": QFormat(12, 11)}
    schedule = schedule_layer(dense_layer(signals=signals, **KINDS[kind]), SMALL, 1)
    assert resources(schedule.mapping).data == Memory(depth, bits)
    assert sum(energy(schedule.counts()).without_source.values()) > 0


def test_streamed_weights_in_lut_ram_need_two_ports():
    layer, spec = dense_layer(16, 8), SMALL.with_(weight_words=48)  # 96 words of 8 bits per PE: streamed into 48
    streamed = resources(schedule_layer(layer, spec, 1).mapping)
    assert streamed.weights.depth <= 48 and streamed.weights.luts == 8
    assert streamed.lut == (220 + 16 * (16 + 8 + 96 + 48), 1023 + 16 * (32 + 16 + 192 + 48))


@pytest.mark.parametrize(("block", "word_bits", "bits"), [(4, 18, 10), (8, 18, 16), (8, 12, 12), (8, 9, 9)])
def test_the_weight_memory_is_as_wide_as_the_constants_in_it(block, word_bits, bits):
    """Spectra of 8 + log2 k bits; from k = 8 on constants of 16 bits lie beside them, in as many words as they need."""
    spec = SMALL.with_(weight_word_bits=word_bits)
    used = resources(schedule_layer(spectral_layer(32, 32, {"ih": block, "hh": block}), spec, 1).mapping)
    assert used.weights.bits == bits


def test_spectra_may_be_wider_than_word_bits_and_it_is_said():
    """Weights and signals of 8 bits, spectra of 8 + 4; constants of 16 bits; transforms take and give 27."""
    layer = spectral_layer(32, 16, {"ih": 16, "hh": 16}, signals=SIGNALS | {"input": QFormat(8, 4), "hidden": QFormat(8, 6)})
    mapping = schedule_layer(layer, SMALL.with_(word_bits=8), 1).mapping
    assert {block.word_bits for block in mapping.blocks.values()} == {12}
    assert (resources(mapping).weights.bits, resources(mapping).data.bits) == (16, 27)
    assert [text.startswith("Datapath fft") for text in ASSUMPTIONS if "word_bits bounds" in text] == [True]


def test_memories_of_a_delta_threshold_count_once_where_input_products_are_hoisted():
    """On 4 units: sums of 8 rows and 4 gates, and 8 values of h; hoisted beside them the input's sums of 6 steps."""
    layer, spec = replace(dense_layer(8, 4), delta={"hidden": 3}), SMALL.with_(word_bits=17)
    kept = Memory(4 * 2, 48), Memory(2, 16)
    assert resources(schedule_layer(layer, spec, 6).mapping).edge == kept
    assert resources(schedule_hoisted(layer, spec, 6).mapping).edge == (*kept, Memory(6 * 4 * 2, 48))


def test_streaming_buffers_count_twice():
    mapping = schedule_layer(dense_layer(128, 40, bits=16), PRESETS["group4x4"], 1).mapping
    used = resources(mapping)
    assert used.weights.depth == mapping.resident_words.max() + 2 * mapping.layout.stream_words == 2048
    assert used.bram36 == 16 + 2


def test_compare_against_the_dense_baseline():
    layers = {"dense 16-bit": dense_layer(16, 6, bits=16), "hybrid": hybrid_layer(16, 6)}
    base, hybrid = compare(schedule_layers(layers, SMALL, 5))
    assert (base["acceleration"], base["acceleration_sequence"], base["acceleration_multiply"]) == (1, 1, 1)
    assert hybrid["acceleration"] == base["steady_state_cycles"] / hybrid["steady_state_cycles"]
    schedule = schedule_layer(layers["hybrid"], SMALL, 5)
    assert hybrid["cycles"] == schedule.cycles == sum(schedule.split().values())
    assert hybrid["energy_low_nj"] == energy(schedule.counts()).low_pj / 1000
    assert hybrid["cr_chip"] == pytest.approx(32 * 4 * 16 * 22 / schedule.mapping.on_chip_bits)
    with pytest.raises(ValueError, match="compare needs a schedule labelled 'dense 16-bit', got hybrid"):
        compare(schedule_layers({"hybrid": layers["hybrid"]}, SMALL, 5))


@pytest.mark.parametrize("mac_ii", [1, 2])
def test_transforms_are_no_overhead_of_the_multiplications(mac_ii):
    """32 x 32 in tiles of 8 on 4 x 4 PEs: in each PE a tile of each of the 8 blocks, 14 products; two forward transforms of
    22 operations and two inverse ones of 28. Dense, 8 x 8 products of each block."""
    layers = {"dense 16-bit": dense_layer(32, 32, bits=16), "fft": spectral_layer(32, 32, {"ih": 8, "hh": 8})}
    dense, fft = compare(schedule_layers(layers, SMALL.with_(mac_ii=mac_ii), 4))
    assert dense["multiply_cycles"] == mac_ii * 8 * 64
    assert fft["multiply_cycles"] == mac_ii * (8 * 14 + 2 * 22 + 2 * 28) == mac_ii * 212
    assert fft["acceleration_multiply"] == 512 / 212
    hoisted = compare({"dense 16-bit": schedule_hoisted(layers["fft"], SMALL.with_(mac_ii=mac_ii), 4)})
    assert hoisted[0]["multiply_cycles"] == fft["multiply_cycles"]


def test_a_narrower_memory_word_takes_several():
    mapping = schedule_layer(dense_layer(8, 4, bits=16), SMALL.with_(weight_word_bits=8), 1).mapping
    np.testing.assert_array_equal(mapping.memory_words, 2 * mapping.per_pe(lambda block: block.weight_words))
