"""The delta threshold: literal accumulators as oracle, threshold 0 = no delta, plan, file and messages."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import (
    CELLS,
    COARSE,
    SIGNALS,
    Reference,
    codes,
    drawn_layer,
    random_layer,
    random_stack,
    random_states,
    reference,
    result_lists,
    scale,
    signal_formats,
)
from torch import nn

from workbench.constrain import attach, bake, compress, pack
from workbench.container import read_tensors, write_tensors
from workbench.emulation import emulate
from workbench.engine import LayerEngine, StackEngine, sent_steps
from workbench.fixedpoint import TABLES, QFormat
from workbench.gates import blocks
from workbench.methods import Dense, TopK
from workbench.packed import FILE_VERSION, FORMS, PARTS, PackedDense, load
from workbench.plan import Plan, uniform
from workbench.quantise import calibrate

pytestmark = pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")


class DeltaReference(Reference):
    """What hardware does, literally: every sum is kept, and what an element moved by times its weight is added to it."""

    def __init__(self, layer):
        super().__init__(layer)
        self.delta = layer.delta

    def run(self, x, h, c):
        self.kept = {key: [0] * len(rows) for key, rows in self.weights.items()}
        self.sent = {key: [0] * len(rows[0]) for key, rows in self.weights.items()}
        return super().run(x, h, c)

    def sums(self, part, gate, values, signal):
        if signal not in self.delta:
            return super().sums(part, gate, values, signal)
        kept, sent = self.kept[part, gate], self.sent[part, gate]
        for j, value in enumerate(values):
            moved = value - sent[j]
            if abs(moved) > self.delta[signal]:
                sent[j] = value
                for i, row in enumerate(self.weights[part, gate]):
                    kept[i] += row[j] * moved
        return [total / scale(self.fracs[part, gate] + self.s[signal].frac) for total in kept]


def both_paths(layer, *arguments):
    """The engine as it runs, and its definition in int64."""
    runner = LayerEngine(layer)
    fast, traced = (result_lists(runner.run(*arguments, trace=trace)) for trace in (None, lambda *_: None))
    assert fast == traced
    return fast


def operands(layer):
    return [PARTS[part] for part in dict.fromkeys(part for part, _ in layer.products)]


def test_what_is_sent_by_hand():
    x = np.array([[3], [5], [6], [4], [1], [-2], [-1]])
    # Threshold 2, nothing is sent before: 3 is (it moved by 3), 5 is not (2), 6 is (3), 4 not, 1 is (5), -2 is (3), -1 not.
    assert sent_steps(x, 2).ravel().tolist() == [3, 3, 6, 6, 1, -2, -2]
    assert sent_steps(x, 0).tolist() == x.tolist()


@pytest.mark.parametrize("label", CELLS)
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_delta_equals_the_literal_accumulators(label, kind, share):
    rng = np.random.default_rng(0)
    layer = random_layer(rng, list(FORMS), label, hidden=6, inputs=4, kind=kind)
    x, h, c = random_states(layer, rng, steps=6)
    x = np.cumsum(x // 8, axis=0).clip(-(2**15), 2**15 - 1)  # it moves slowly
    ranges = {name: layer.signals[name].max for name in operands(layer)}
    plain = both_paths(layer, x, h, c)
    for names in ([name] for name in ranges):
        changed = replace(layer, delta={name: int(share * ranges[name]) for name in names})
        assert both_paths(changed, x, h, c, [6, 0, 3]) == reference(changed, x, h, c, [6, 0, 3], make=DeltaReference)
    whole = replace(layer, delta={name: int(share * most) for name, most in ranges.items()})
    found = both_paths(whole, x, h, c)
    assert found == reference(whole, x, h, c, make=DeltaReference)
    assert found != plain and (share > 0.1 or len(np.unique(found[0])) > 5)
    assert both_paths(whole, x) == reference(whole, x, make=DeltaReference)


@pytest.mark.parametrize("label", CELLS)
@settings(max_examples=25, deadline=None)
@given(signal_formats(), st.sampled_from(list(TABLES)), st.integers(0, 2**32), st.floats(0, 1))
def test_delta_in_any_formats(label, signals, kind, seed, share):
    rng, layer = drawn_layer(label, signals, kind, seed, hidden=2, inputs=2)
    widths = {name: layer.signals[name] for name in operands(layer)}
    try:
        layer = replace(layer, delta={name: int(share * (fmt.max - fmt.min)) for name, fmt in widths.items()})
    except ValueError as error:  # one bit more, which PackedLayer may refuse
        assert any(words in str(error) for words in ("needs an accumulator under", "operands of 18 x 27"))
        return
    states = random_states(layer, rng, steps=4, batch=2)
    assert both_paths(layer, *states) == reference(layer, *states, make=DeltaReference)


@pytest.mark.parametrize("label", CELLS)
@pytest.mark.parametrize("signals", [SIGNALS, COARSE], ids=["16 bits", "8 bits"])
def test_threshold_0_is_no_delta_bit_for_bit(label, signals):
    rng = np.random.default_rng(1)
    layer = random_layer(rng, list(FORMS), label, hidden=6, inputs=5, signals=signals)
    still = replace(layer, delta=dict.fromkeys(operands(layer), 0))
    x, h, c = random_states(layer, rng, steps=9, batch=4)
    for arguments in ((x,), (x, h, c), (x, h, c, [9, 0, 1, 4])):
        assert both_paths(still, *arguments) == both_paths(layer, *arguments)


@pytest.mark.parametrize("label", CELLS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("lengths", [None, [3, 1, 2]])
def test_stacks_with_delta(label, directions, lengths):
    rng = np.random.default_rng(5)
    stack = random_stack(rng, label, directions)
    x = codes(SIGNALS["input"], (3, 3, 3), rng)
    flat = [layer for row in stack for layer in row]
    h = np.stack([codes(layer.signals["hidden"], (3, layer.output_size), rng) for layer in flat])
    c = None if label == "GRU" else np.stack([codes(layer.signals["cell"], (3, layer.hidden_size), rng) for layer in flat])
    still, slow = ([tuple(replace(layer, delta=dict.fromkeys(operands(layer), units)) for layer in row) for row in stack]
                   for units in (0, 3000))
    assert result_lists(StackEngine(still).run(x, h, c, lengths)) == result_lists(StackEngine(stack).run(x, h, c, lengths))
    found, values, place = StackEngine(slow).run(x, h, c, lengths), x, 0
    for row in slow:
        outputs = []
        for reverse, layer in enumerate(row):
            outputs.append(np.array(reference(layer, values, h[place], None if c is None else c[place], lengths, bool(reverse),
                                              DeltaReference)[0]))
            place += 1
        values = np.concatenate(outputs, axis=-1)
    assert found.output.tolist() == values.tolist()


# From the plan to the file and the attached model.


@functools.cache
def trained(make=nn.LSTM, **options):
    torch.manual_seed(0)
    model, x = make(6, 8, num_layers=2, bidirectional=True, **options), torch.randn(9, 4, 6).cumsum(0) / 3
    return model, x, uniform(model, TopK(0.5), 8, calibrate(model, [x], 12))


@pytest.mark.parametrize(("make", "options"), [(nn.LSTM, {}), (nn.LSTM, {"proj_size": 4}), (nn.GRU, {})],
                         ids=["LSTM", "projected", "GRU"])
def test_plan_pack_save_load_and_attach(make, options, tmp_path):
    model, x, plan = trained(make, **options)
    assert "delta" not in plan.to_json() and plan.delta == {}
    thresholds = {"input": 0.3, "hidden": 0.01}
    slow = Plan.read(json.dumps(plan.with_delta(**thresholds).to_json()))
    assert slow == plan.with_delta(**thresholds) and slow.with_delta() == plan
    packed = pack(model, slow)
    for layer in packed.layers.values():
        assert layer.delta == {name: int(threshold * 2 ** layer.signals[name].frac) for name, threshold in thresholds.items()}
    again = load(packed.save(tmp_path / "model"))
    assert {name: layer.delta for name, layer in again.layers.items()} == {
        name: layer.delta for name, layer in packed.layers.items()}
    with torch.no_grad():
        outputs = [attach(model, p)(x)[0] for p in (pack(model, plan), pack(model, plan.with_delta(input=0, hidden=0)), again)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    expected = StackEngine(packed.stack("")).run(packed.stack("")[0][0].signals["input"].quantise(x))
    assert outputs[2].double().numpy().tolist() == packed.stack("")[1][0].signals["hidden"].dequantise(expected.output).tolist()


def test_a_threshold_in_units_of_the_signal_is_cut_to_whole_integers():
    """With 3 fraction bits 0.3 is 2.4 units: an element that moved by 2 is not sent again, by 3 it is."""
    model, _, plan = trained()
    signals = {name: mine | {"input": QFormat(8, 3), "hidden": QFormat(8, 3)} for name, mine in plan.signals.items()}
    for threshold, units in ((0.3, 2), (0.25, 2), (0.249, 1), (0, 0)):
        packed = pack(model, plan.with_signals(signals).with_delta(hidden=threshold))
        assert {layer.delta["hidden"] for layer in packed.layers.values()} == {units}
        assert all(set(layer.delta) == {"hidden"} for layer in packed.layers.values())


def test_a_layer_may_be_left_out():
    model, _, plan = trained()
    packed = pack(model, replace(plan, delta={"l1": {"hidden": 0.1}}))
    assert [bool(layer.delta) for layer in packed.layers.values()] == [name == "l1" for name in packed.layers]


# Bad input.


@pytest.mark.parametrize(("delta", "message"), [
    ([1], r"Plan needs delta thresholds by layer and signal, got \[1\]"),
    ({"l0": 0.1}, r"Plan needs delta thresholds by layer and signal, got \{'l0': 0.1\}"),
    ({"l0": {"input": -0.1}}, "Plan needs a delta threshold of at least 0 for input of l0, got -0.1"),
    ({"l0": {"input": float("nan")}}, "of at least 0 for input of l0, got nan"),
    ({"l0": {"hidden": float("inf")}}, "of at least 0 for hidden of l0, got inf"),
    ({"l0": {"hidden": "0.1"}}, "of at least 0 for hidden of l0, got '0.1'"),
    ({"l0": {"hidden": True}}, "of at least 0 for hidden of l0, got True"),
    ({"l2": {"hidden": 0.1}}, "the plan names the layers l2, the model has l0, l0_reverse, l1, l1_reverse"),
    ({"l0": {"cell": 0.1, "hidden": 0.1}}, "Plan takes delta thresholds of input, hidden of l0, got cell"),
    ({"l0": {"hidden": 100.0}}, "PackedLayer needs a whole delta threshold of hidden from 0 to 4095, got 204800"),
    ({"l0": {"hidden": 1e308}}, "PackedLayer needs a whole delta threshold of hidden from 0 to 4095, got"),
])  # fmt: skip
def test_plans_are_refused(delta, message):
    model, _, plan = trained()
    with pytest.raises(ValueError, match=message):
        pack(model, plan.to_json() | {"delta": delta})


@pytest.mark.parametrize(("delta", "message"), [
    ({"hidden": -1}, "PackedLayer needs a whole delta threshold of hidden from 0 to 65535, got -1"),
    ({"hidden": 65536}, "from 0 to 65535, got 65536"), ({"hidden": 1.0}, "from 0 to 65535, got 1.0"),
    ({"hidden": True}, "from 0 to 65535, got True"), (7, "what its weights multiply, hidden, input, got 7"),
    ({"cell": 3}, "PackedLayer takes delta thresholds of what its weights multiply, hidden, input, got {'cell': 3}"),
])  # fmt: skip
def test_layers_and_hostile_files_are_refused(delta, message, tmp_path):
    layer = random_layer(np.random.default_rng(0), ["dense"])
    with pytest.raises(ValueError, match=message):
        replace(layer, delta=delta)
    model, _, plan = trained()
    about, tensors = read_tensors(pack(model, plan.with_signals({
        name: dict.fromkeys(mine, QFormat(16, 12)) for name, mine in plan.signals.items()})).save(tmp_path / "good"),
        who="", what="packed model", version=FILE_VERSION)
    about["layers"]["l1"]["delta"] = delta
    with pytest.raises(ValueError, match=message):
        load(write_tensors(tmp_path / "bad", tensors, who="", what="packed model", version=FILE_VERSION, about=about))


def test_a_difference_takes_one_bit_more():
    rng = np.random.default_rng(0)
    wide = {"hidden": QFormat(18, 15)}
    layer = random_layer(rng, ["dense"], signals=SIGNALS | wide, fmt=QFormat(18, 10))
    assert layer.operand("hh") == QFormat(18, 15)
    assert replace(layer, delta={"hidden": 4}).operand("hh") == QFormat(19, 15)
    with pytest.raises(ValueError, match=r"weight_ih_l0\.i with differences needs operands of 18 x 27 bits .*QFormat\(bits=28"):
        replace(random_layer(rng, ["dense"], signals=SIGNALS | {"input": QFormat(27, 15)}, fmt=QFormat(18, 10)),
                delta={"input": 4})
    unsigned = random_layer(rng, ["dense"], signals=SIGNALS | {"input": QFormat(16, 12, signed=False)})
    assert replace(unsigned, delta={"input": 4}).operand("ih") == QFormat(17, 12)  # from -65535 to 65535


def test_a_difference_doubles_what_an_accumulator_may_reach():
    """127 * 2**15 + 1 fits 23 bits, 127 * 2**16 + 1 does not."""
    layer = random_layer(np.random.default_rng(0), ["dense"], hidden=1, inputs=1, fmt=QFormat(8, 7), bias=2)
    blocks = {name: PackedDense(np.array([[127 if "ih" in name else 0]]), QFormat(8, 7)) for name in layer.blocks}
    signals = layer.signals | {"input": QFormat(16, 15), "hidden": QFormat(16, 15), "cell": QFormat(4, 2),
                               "sigmoid": QFormat(4, 4, False), "tanh": QFormat(4, 3)}
    layer = replace(layer, blocks=blocks, signals=signals, bias={gate: np.array([1]) for gate in "ifgo"}, acc_bits=24)
    assert replace(layer, acc_bits=23).row_bounds()["i"] == 127 * 2**15 + 1
    with pytest.raises(ValueError, match="gate i needs an accumulator under 23 bits, but a row could reach 8323073"):
        replace(layer, acc_bits=23, delta={"input": 1})
    assert replace(layer, delta={"input": 1}).row_bounds()["i"] == 127 * 2**16 + 1


def test_the_emulation_refuses():
    model, _, plan = trained()
    with pytest.raises(ValueError, match="the emulation sends every signal whole in every step: train without"):
        emulate(model, plan.with_delta(hidden=0.1))


def test_compressed_models_ignore_it_in_float():
    """A constrained model trains in float without delta; only the integers have it."""
    model, x, plan = trained()
    plan = replace(plan, blocks=uniform(model, Dense(), 8, plan.signals).blocks)
    with torch.no_grad():
        one, two = (bake(compress(model, p))(x)[0] for p in (plan, plan.with_delta(hidden=0.5)))
    assert torch.equal(one, two) and set(plan.blocks) == set(blocks(model))
