"""Energy, resources and comparison: hand numbers and messages."""

import numpy as np
import pytest
from test_array import KINDS, PRESETS, SIGNALS, SMALL, dense_layer, hybrid_layer

from workbench.array import ASSUMPTIONS, schedule_layer, schedule_layers
from workbench.array.cost import DEVICES, ENERGY_NOTE, PJ_PER_EVENT, Memory, compare, energy, resources
from workbench.array.schedule import EVENTS
from workbench.fixedpoint import QFormat


def test_energy_by_hand():
    modelled = energy({"macs": 10, "weight_reads": 4, "acc_reads": 3, "acc_writes": 2, "loaded_bits": 64, "link_words": 7})
    assert modelled.low_pj == pytest.approx(10 * 0.23 + 4 * 2.5 + 5 * 7.5 + 1300)  # 48 of 64 bits
    assert modelled.high_pj == pytest.approx(10 * 3.2 + 4 * 10 + 5 * 7.5 + 2600)
    assert modelled.without_source == {"link_words": 7}
    assert [row["event"] for row in modelled.rows] == ["macs", "weight_reads", "acc_reads", "acc_writes", "loaded_bits"]


def test_the_note_names_what_has_no_price():
    counted = energy(schedule_layer(dense_layer(), SMALL, 1).counts()).without_source
    assert set(counted) == {"padding_macs", "link_words", "activation_lookups", "roundings",
                            "multicast_words"}  # padding is in macs
    assert "links" in ENERGY_NOTE and "multicast" in ENERGY_NOTE and "activation" in ENERGY_NOTE and "roundings" in ENERGY_NOTE


def test_every_price_has_a_source_an_event_and_an_interval():
    assert set(PJ_PER_EVENT) < set(EVENTS)
    for low, high, source in PJ_PER_EVENT.values():
        assert 0 < low <= high
        assert "45 nm" in source and "ISSCC 2014" in source


def test_assumptions_are_sentences():
    assert len(set(ASSUMPTIONS)) == len(ASSUMPTIONS) >= 6
    assert all(text[0] != " " and text.endswith(".") for text in ASSUMPTIONS)


def test_energy_refuses_unknown_events():
    with pytest.raises(ValueError, match="energy knows the events macs, .*, got flops"):
        energy({"flops": 1})


@pytest.mark.parametrize("depth, bits, luts, ramb18", [
    (64, 18, 18, 0), (65, 18, 0, 1), (1024, 18, 0, 1), (1025, 18, 0, 2), (2048, 18, 0, 2), (2048, 9, 0, 1), (2049, 9, 0, 2),
    (5000, 4, 0, 2), (16384, 1, 0, 1), (3000, 12, 0, 3)])
def test_memory_by_hand(depth, bits, luts, ramb18):
    assert (Memory(depth, bits).luts, Memory(depth, bits).ramb18) == (luts, ramb18)


def test_resources_by_hand():
    used = resources(schedule_layer(dense_layer(128, 40, bits=16), PRESETS["array16x16"], 1).mapping)
    assert used.dsp == 256 + 16
    assert (used.weights, used.data) == (Memory(4 * (8 * 8 + 8 * 3), 16), Memory(2 * 3 + 8, 16))
    assert used.bram36 == 128  # one RAMB18 of weights per PE; the data lie in LUTs
    # Per PE: 16 LUTs of data, 96 of accumulators (two banks of 64 x 48 bits), an adder of 48; high: two ports.
    assert used.lut == (16 * 220 + 256 * (16 + 96 + 48), 16 * 1023 + 256 * (32 + 192 + 48))
    assert used.ff == (16 * 145 + 256 * 48, 16 * 1681 + 256 * 48)
    share = used.share("vu440")
    assert share["dsp"] == 272 / DEVICES["vu440"]["dsp"] and not share["verified"]
    with pytest.raises(ValueError, match="share knows the devices vu440, got 'zu9'"):
        used.share("zu9")


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


def test_streaming_buffers_count_twice():
    mapping = schedule_layer(dense_layer(128, 40, bits=16), PRESETS["group4x4"], 1).mapping
    used = resources(mapping)
    assert used.weights.depth == mapping.resident_words.max() + 2 * mapping.layout.stream_words == 2048
    assert used.bram36 == 16


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


def test_a_narrower_memory_word_takes_several():
    mapping = schedule_layer(dense_layer(8, 4, bits=16), SMALL.with_(weight_word_bits=8), 1).mapping
    np.testing.assert_array_equal(mapping.memory_words, 2 * mapping.per_pe(lambda block: block.weight_words))
