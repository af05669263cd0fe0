import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench.constrain import compress, pack
from workbench.fixedpoint import QFormat
from workbench.gates import blocks, layers, weight
from workbench.methods import BlockCirculant, Dense, LowRank, TopK
from workbench.packed import signals_of
from workbench.plan import (
    ACTIVATIONS,
    LOSSLESS_BITS,
    BlockPlan,
    Plan,
    Unpackable,
    pack_block,
    plan_block,
    uncompressed,
    uniform,
)
from workbench.quantise import calibrate
from workbench.schedules import gradual

pytestmark = pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.LSTM(6, 8))


@pytest.fixture
def plan(model):
    """A mixed plan: every method, widths of 4 and 8 bits."""
    signals = calibrate(model, [torch.randn(5, 3, 6)])
    methods = (TopK(0.25), BlockCirculant(4), Dense(), BlockCirculant(2))
    entries = {name: plan_block(weight(model, name), methods[n % 4], 4 + 4 * (n % 2)) for n, name in enumerate(blocks(model))}
    return Plan(entries, signals)


@pytest.fixture
def data(plan):
    return plan.to_json()


def test_json_round_trip(plan, data, tmp_path):
    text = json.dumps(data)
    path = tmp_path / "plan.json"
    path.write_text(text)
    for source in (plan, data, text, "\n  " + text, path, str(path), json.dumps(data, sort_keys=True)):
        assert Plan.read(source) == plan
    assert Plan.read(plan) is plan


def stacked(kind):
    """Two layers and both directions inside a module."""
    torch.manual_seed(0)
    cls, options = {"LSTM": (nn.LSTM, {}), "GRU": (nn.GRU, {}), "projected": (nn.LSTM, {"proj_size": 4})}[kind]
    return nn.Sequential(cls(6, 8, num_layers=2, bidirectional=True, **options))


STACKS = {kind: (signals_of("GRU" if kind == "GRU" else "LSTM", kind == "projected")) for kind in ("LSTM", "GRU", "projected")}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", STACKS)
def test_json_round_trip_of_every_kind(kind, activation):
    model, x = stacked(kind), torch.randn(5, 3, 6)
    plan = replace(uniform(model, BlockCirculant(2), 6, calibrate(model, [x], 10)), activation=activation)
    again = Plan.read(json.dumps(plan.to_json()))
    assert again == plan and again.activation == activation
    again.check(model)
    assert {name: tuple(signals) for name, signals in again.signals.items()} == dict.fromkeys(layers(model), STACKS[kind])
    packed, other = pack(model, plan), pack(model, again)
    for name, layer in packed.layers.items():
        assert layer.table_kind == other.layers[name].table_kind == activation
        assert layer.signals == other.layers[name].signals == plan.signals[name]


def test_a_sorted_plan_packs_all_the_same(model, plan, data):
    """JSON says nothing about order, so none may matter."""
    sorted_plan = json.dumps(data, sort_keys=True)
    packed, other = pack(model, plan), pack(model, sorted_plan)
    assert other.layers["0.l0"].signals == packed.layers["0.l0"].signals
    assert all((block.dense() == packed.blocks[name].dense()).all() for name, block in other.blocks.items())


def test_check_passes_what_fits(model, plan):
    plan.check(model)


def test_check_names_what_is_missing_and_unknown(model, plan):
    some = dict(plan.blocks)
    del some["0.weight_ih_l0.f"], some["0.weight_hh_l0.o"]
    with pytest.raises(ValueError, match=r"the plan misses the blocks 0\.weight_ih_l0\.f, 0\.weight_hh_l0\.o"):
        replace(plan, blocks=some).check(model)
    more = plan.blocks | {"0.weight_hh_l0.z": plan.blocks["0.weight_hh_l0.o"]}
    with pytest.raises(ValueError, match=r"the plan names the blocks 0\.weight_hh_l0\.z, the model has 0\.weight_ih_l0\.i, "):
        replace(plan, blocks=more).check(model)
    with pytest.raises(ValueError, match=r"the plan misses the layers 0\.l0"):
        plan.with_signals({}).check(model)
    with pytest.raises(ValueError, match=r"the plan names the layers lstm\.l0, the model has 0\.l0"):
        plan.with_signals(plan.signals | {"lstm.l0": plan.signals["0.l0"]}).check(model)


@pytest.mark.parametrize(("kind", "other"), [("GRU", "LSTM"), ("LSTM", "projected"), ("projected", "LSTM"), ("LSTM", "GRU")])
def test_check_names_the_layer_whose_signals_are_not_its_cells(kind, other):
    model, x = stacked(kind), torch.randn(5, 3, 6)
    plan, foreign = uniform(model, Dense(), 8, calibrate(model, [x])), calibrate(stacked(other), [x])["0.l1_reverse"]
    expected, got = ", ".join(STACKS[kind]), ", ".join(STACKS[other])
    more = plan.signals["0.l1_reverse"] | {"n": QFormat(8, 7)}
    for signals, names in ((foreign, got), ({}, "none"), (more, f"{expected}, n")):
        wrong = plan.with_signals(plan.signals | {"0.l1_reverse": signals})
        for call in (wrong.check, lambda m, wrong=wrong: pack(m, wrong.to_json())):
            with pytest.raises(ValueError, match=rf"^Plan needs the signals {expected} of 0\.l1_reverse, got {names}$"):
                call(model)


@pytest.mark.parametrize(("layer", "signal"), [
    ("0.l0", "hidden"), ("0.l0_reverse", "hidden"), ("0.l1", "input"), ("0.l1_reverse", "input")])  # fmt: skip
@pytest.mark.parametrize("kind", STACKS)
def test_formats_that_differ_between_the_layers_of_a_stack_are_refused(kind, layer, signal):
    model = stacked(kind)
    plan = uniform(model, Dense(), 8, calibrate(model, [torch.randn(5, 3, 6)]))
    odd = plan.with_signals(plan.signals | {layer: plan.signals[layer] | {signal: QFormat(14, 11)}})
    with pytest.raises(ValueError, match=r"rounds nothing between the layers of '0'.*must be the same, got .*bits=14, frac=11"):
        pack(model, odd)


def test_check_names_the_block_that_a_method_does_not_fit(model, plan):
    entry = BlockPlan(BlockCirculant(3), QFormat(8, 6))
    wrong = replace(plan, blocks=plan.blocks | {"0.weight_hh_l0.g": entry})
    message = r"block 0\.weight_hh_l0\.g: BlockCirculant\(block=3.* needs rows divisible by 3, got a 8x8 block"
    with pytest.raises(ValueError, match=message):
        wrong.check(model)


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("change", [
    lambda plan, layer, block: replace(plan, blocks=plan.blocks | {block: BlockPlan(LowRank(2), QFormat(28, 14))}),
    lambda plan, layer, block: replace(plan, blocks=plan.blocks | {block: BlockPlan(BlockCirculant(4, "fft"), QFormat(19, 9))}),
    lambda plan, layer, block: replace(plan, delta={layer: {"hidden": 0.1}}, blocks=plan.blocks | {
        block: BlockPlan(BlockCirculant(4, "fft"), QFormat(8, 6))}),
    lambda plan, layer, block: replace(plan, signals=plan.signals | {layer: plan.signals[layer] | {"input": QFormat(25, 12)}},
                                       blocks=plan.blocks | {block.replace("hh", "ih"): BlockPlan(
                                           BlockCirculant(8, "fft"), QFormat(8, 6))}),
    lambda plan, layer, block: replace(plan, signals=plan.signals | {layer: plan.signals[layer] | {"input": QFormat(28, 12)}}),
    lambda plan, layer, block: replace(plan, signals={
        name: signals | {"pre": QFormat(17, 12)} for name, signals in plan.signals.items()}, activation="exact"),
    lambda plan, layer, block: replace(plan, signals={
        name: signals | {"sigmoid": QFormat(30, 28)} for name, signals in plan.signals.items()}),
    lambda plan, layer, block: replace(plan, signals=plan.signals | {layer: plan.signals[layer] | {"input": QFormat(14, 11)}}),
])  # fmt: skip
def test_formats_that_no_weights_suit_are_refused_before_any_training_with_the_words_of_pack(kind, change, monkeypatch):
    model = stacked(kind)
    plan = uniform(model, Dense(), 8, calibrate(model, [torch.randn(5, 3, 6)]))
    odd = change(plan, "0.l1", next(name for name in plan.blocks if "hh_l1." in name))
    with monkeypatch.context() as patch, pytest.raises(ValueError) as packing:
        patch.setattr(Plan, "_check_formats", lambda plan, model: None)
        pack(model, odd)
    for refusal in (lambda: compress(model, odd), lambda: gradual(model, odd), lambda: pack(model, odd)):
        with pytest.raises(ValueError, match=re.escape(str(packing.value))):
            refusal()


def test_formats_that_transforms_take_are_not_refused():
    """Sums of transforms have fewer fraction bits than the products of a plain block: these formats overflow with one alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.GRU(16, 16, bias=False))
    with torch.no_grad():
        model[0].weight_ih_l0 *= 0.01
    signals = calibrate(model, [torch.randn(5, 3, 16)])
    signals = {"0.l0": signals["0.l0"] | {"input": QFormat(16, 22), "hidden_product": QFormat(16, 14)}}
    plan, name = uniform(model, Dense(), 8, signals), "0.weight_ih_l0.n"
    by_fft, plain = (replace(plan, blocks=plan.blocks | {name: BlockPlan(method, QFormat(16, 26))})
                     for method in (BlockCirculant(4, "fft"), Dense()))
    by_fft.check(model)
    pack(model, by_fft)
    with pytest.raises(Unpackable, match="^layer 0.l0: gate n needs an accumulator under 48 bits"):
        pack(model, plain)


def test_what_only_the_weights_decide_is_left_to_pack(model, plan):
    wide = replace(plan, signals={"0.l0": plan.signals["0.l0"] | {"input": QFormat(24, -12)}})
    wide.check(model)  # its biases are small, its products fit
    with torch.no_grad():
        model[0].bias_ih_l0[:] = 1e6
    with pytest.raises(Unpackable, match=r"^layer 0\.l0: the bias of gate "):
        pack(model, plan)
    plan.check(model)


@pytest.mark.parametrize("kind", STACKS)
def test_what_is_uncompressed_makes_room_for_a_large_bias_in_its_layer_alone(kind):
    model = stacked(kind)
    signals = calibrate(model, [torch.randn(5, 3, 6)])
    dense = uniform(model, Dense(), LOSSLESS_BITS, signals)
    assert uncompressed(model, signals) == dense
    with torch.no_grad():
        model[0].bias_ih_l1[:8] = 20.0
    with pytest.raises(Unpackable, match=r"^layer 0\.l1: the bias of gate [ir] needs 32 bits"):
        pack(model, dense)
    plan = uncompressed(model, signals)
    pack(model, plan)
    lost = {name: dense.blocks[name].format.frac - entry.format.frac for name, entry in plan.blocks.items()}
    assert {fewer for name, fewer in lost.items() if "_l1." not in name} == {0}
    (fewer,) = {fewer for name, fewer in lost.items() if "_l1." in name}
    assert fewer > 0
    one_more = {name: replace(entry, format=replace(entry.format, frac=entry.format.frac + (lost[name] > 0)))
                for name, entry in plan.blocks.items()}
    with pytest.raises(Unpackable, match="the bias of gate"):
        pack(model, replace(plan, blocks=one_more))


BLOCK = "0.weight_hh_l0.g"


def edit(data, *path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize(("path", "value", "message"), [
    (("blocks",), [1], r"a plan needs an object as blocks, got \[1\]"),
    (("signals",), "auto", "a plan needs an object as signals, got 'auto'"),
    (("activation",), "cubic", "Plan knows the activations linear, exact, hard, got 'cubic'"),
    (("extra",), 1, "a plan needs exactly the keys .* and, if any, delta, got blocks, signals, activation, extra"),
    (("blocks", BLOCK), "Dense", rf"block {BLOCK} of a plan needs exactly the keys method and format, got 'Dense'"),
    (("blocks", BLOCK, "bits"), 8, rf"block {BLOCK} of a plan needs exactly the keys .*, got method, format, bits"),
    (("blocks", BLOCK, "method"), "Dense", rf"block {BLOCK}: a method needs .*, got 'Dense'"),
    (("blocks", BLOCK, "method", "name"), "Circulant", rf"block {BLOCK}: the methods are .*, got 'Circulant'"),
    (("blocks", BLOCK, "method"), {"name": "TopK", "kept": 1}, rf"block {BLOCK}: TopK has the parameters keep, got kept"),
    (("blocks", BLOCK, "method"), {"name": "TopK", "keep": 2}, rf"block {BLOCK}: TopK needs keep in \(0, 1\], got 2"),
    (("blocks", BLOCK, "format", "bits"), "8", rf"block {BLOCK}: QFormat needs a whole number for bits, got '8'"),
    (("blocks", BLOCK, "format", "bits"), 1, rf"block {BLOCK}: QFormat.* needs 2 to 32 bits"),
    (("blocks", BLOCK, "format"), {"bits": 8}, rf"block {BLOCK}: QFormat needs exactly the keys bits, frac and signed"),
    (("signals", "0.l0"), [], r"the signals of layer 0\.l0 need an object, got \[\]"),
    (("signals", "0.l0", "cell", "frac"), 1.5, r"the signals of layer 0\.l0: QFormat needs a whole number for frac, got 1\.5"),
    (("signals", "0.l0", "cell"), {"bits": 8, "frac": 7}, r"the signals of layer 0\.l0: QFormat needs exactly the keys bits"),
])  # fmt: skip
def test_read_refuses(data, path, value, message):
    edit(data, *path, value=value)
    for source in (data, json.dumps(data)):
        with pytest.raises(ValueError, match=message):
            Plan.read(source)


@pytest.mark.parametrize(("source", "message"), [
    ({}, "a plan needs exactly the keys activation, blocks, signals and, if any, delta, got "),
    (None, "a plan needs exactly the keys .*, got None"),
    (7, "a plan needs exactly the keys .*, got 7"),
    ("{]", "Plan.read needs JSON, got text that is not: "),
    ("", "Plan.read needs a dict, a JSON object or the path of a file, got ''"),
    ("no such file.json", "Plan.read needs a dict, a JSON object or the path of a file, got 'no such file.json'"),
    (Path("."), "Plan.read needs a dict, a JSON object or the path of a file, got '.'"),
    ("x" * 5000, "Plan.read needs a dict, a JSON object or the path of a file"),
])  # fmt: skip
def test_read_refuses_what_is_no_plan(source, message):
    with pytest.raises(ValueError, match=message):
        Plan.read(source)


def test_uniform_is_the_same_method_and_width_everywhere(model, plan):
    same = uniform(model, TopK(0.5), 6, plan.signals)
    same.check(model)
    assert list(same.blocks) == list(blocks(model))
    assert {(entry.method, entry.format.bits) for entry in same.blocks.values()} == {(TopK(0.5), 6)}


def test_the_format_is_chosen_for_the_values_that_are_stored():
    """A circulant block stores means, which are smaller than the weights that they are means of."""
    w = torch.tensor([[1.9, -1.6], [1.0, -1.9]])  # means of the diagonals: 0 and -0.3
    assert plan_block(w, Dense(), 8).format.frac == 6
    assert plan_block(w, BlockCirculant(2), 8).format.frac == 8
    w = torch.tensor([[0.0, 9.0], [0.0, 0.0]])  # of rank 1: 3 times 3; 9 itself would have 3 fraction bits
    assert (plan_block(w, LowRank(1), 8).format.frac, plan_block(w, Dense(), 8).format.frac) == (5, 3)
    tiny = plan_block(w / 1e9, LowRank(1), 8).format
    assert tiny.frac == 7  # a product then has 14


def test_pack_block_projects_then_quantises():
    w, fmt = torch.tensor([[0.5, -4.0, 1.0], [3.0, -0.25, -2.0]]), QFormat(4, 1)
    assert pack_block(w, BlockPlan(TopK(0.5), fmt)).dense().tolist() == [[0, -8, 0], [6, 0, -4]]
    assert pack_block(w, BlockPlan(BlockCirculant(2), fmt)).dense().tolist() == [[0, -1, 2], [-1, 0, -4]]


def test_a_table_of_another_model_is_refused(model, plan):
    with pytest.raises(ValueError, match="Plan.table needs the model packed by this plan, with the blocks .*, got None"):
        plan.table(None)
    other = nn.LSTM(4, 4)
    packed = pack(other, uniform(other, Dense(), 8, calibrate(other, [torch.randn(3, 2, 4)])))
    with pytest.raises(ValueError, match="Plan.table needs the model packed by this plan, .*, got weight_ih_l0.i, "):
        plan.table(packed)


def test_table_adds_up(model, plan):
    packed = pack(model, plan)
    rows = plan.table(packed)
    assert [row["block"] for row in rows] == list(plan.blocks)
    assert sum(row["value bits"] for row in rows) == packed.value_bits
    assert sum(row["index bits"] for row in rows) == packed.index_bits
    first = rows[0]
    assert (first["shape"], first["method"], first["bits"], first["stored values"]) == ("8x6", "TopK 0.25", 4, 12)
    assert first["cr_disk"] == pytest.approx(32 * 48 / (first["value bits"] + first["index bits"]))


@pytest.mark.parametrize(("method", "signals", "message"), [
    ("TopK 0.5", {}, r"a plan needs methods, such as TopK\(0.5\), got 'TopK 0.5'"),
    (TopK, {}, r"a plan needs methods, such as TopK\(0.5\), got <class"),
    (TopK(0.5), None, "Plan needs the formats of every layer's signals, as calibrate gives them, got None"),
    (TopK(0.5), {"l0": None}, "Plan needs the formats of every layer's signals, as calibrate gives them, got {'l0': None}"),
    (TopK(0.5), {"l0": {"input": "8"}}, "Plan needs the formats of every layer's signals, as calibrate gives them, got "),
], ids=str)
def test_what_is_no_method_or_no_signals_is_refused(method, signals, message):
    with pytest.raises(ValueError, match=message):
        uniform(torch.nn.LSTM(4, 4), method, 8, signals)


@pytest.mark.parametrize("planned", [None, {"w.i": TopK(0.5)}, {"w.i": (TopK(0.5), QFormat(8, 4))}], ids=str)
def test_what_is_no_plan_of_a_block_is_refused(planned):
    with pytest.raises(ValueError, match="Plan needs a BlockPlan for every block, got "):
        Plan(planned, {})
