"""What a plan costs before training: each figure against the calls that it stands for, and every control."""

import re

import numpy as np
import pytest
import torch

import workbench as wb
from workbench import exploration
from workbench.array import PRESETS, schedule_layer
from workbench.array.cost import BASELINE
from workbench.exploration import Question, call_of, explore, untrained
from workbench.methods import METHODS


@pytest.fixture(scope="module")
def lstm():
    return untrained("LSTM", 6, 32, seed=0)


def bits_in(plan):
    return {name: (entry.method, entry.format.bits) for name, entry in plan.blocks.items()}


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("method", ["hybrid", *METHODS])
def test_an_answer_is_what_the_single_calls_give(cell, method):
    model, signals = untrained(cell, 6, 32, seed=1)
    answer = explore(model, signals, Question(method, 6.0, 5, array="group4x4", batch=2))
    if method == "hybrid":
        plan = wb.hybrid_plan(model, ["g" if cell == "LSTM" else "n"], wb.Strength(8, 5, 5), 6.0, signals)
    else:
        plan = wb.budget.uniform_plan(model, METHODS[method], 5, 6.0, signals)
    packed, dense = wb.pack(model, plan), wb.pack(model, wb.uniform(model, wb.methods.Dense(), 16, signals))
    assert bits_in(answer.plan) == bits_in(plan) and answer.packed.storage_bits == packed.storage_bits
    mine, base = (schedule_layer(of.layers["l0"], PRESETS["group4x4"], 40, batch=2) for of in (packed, dense))
    figures = answer.figures()
    assert figures["steady_state_cycles"] == mine.steady_state_cycles  # of 10 steps as of 40
    assert answer.schedules[BASELINE].steady_state_cycles == base.steady_state_cycles
    assert figures["acceleration"] == pytest.approx(base.steady_state_cycles / mine.steady_state_cycles)
    assert figures["step_us"] == pytest.approx(mine.steady_state_cycles / 200)  # of both sequences, at 200 MHz
    assert figures["cycles_per_item"] == mine.steady_state_cycles / 2
    assert figures["cr_disk"] == packed.cr_disk >= 6 and figures["rnn_bytes"] == packed.storage_bits / 8
    widths = [entry.format.bits for entry in plan.blocks.values()]
    assert min(widths) <= figures["bits"] <= max(widths) and "whole_sequence" not in figures
    assert re.search(
        rf"^\*\*{method}, asked for 6x: {packed.cr_disk:.1f}x\*\*, {packed.storage_bits // 8:,} bytes of matrices, [\d.]+ "
        rf"bits a weight\. A step takes \*\*{mine.steady_state_cycles:,.0f} cycles\*\* \([\d.]+ µs at 200 MHz; 2 sequences, "
        rf"{mine.cycles_per_item:,.0f} cycles each\), most of all for {mine.bound}: [\d.]+ times as fast as dense 16-bit "
        rf"\({base.steady_state_cycles:,.0f} cycles, most of all for {base.bound}\)\. No accuracy: ", answer.sentence())


def test_the_call_of_a_question_of_numpy_s_numbers_is_python():
    question = Question("TopK", np.float64(6.0), np.int64(5), array="group4x4", batch=np.int64(2))
    model, _ = untrained("LSTM", np.int64(6), np.int32(32), seed=1)
    assert call_of(question, model) == call_of(Question("TopK", 6.0, 5, array="group4x4", batch=2), model)


def test_the_array_of_a_question():
    for name, spec in PRESETS.items():
        assert Question(array=name).spec() == spec == Question(array=name, rows=spec.rows, cols=spec.cols).spec()
    points = wb.array.scaled_points(24)
    for n in range(len(points["rows"])):
        point = {name: int(values[n]) for name, values in points.items()}
        assert Question(rows=point["rows"], cols=point["cols"]).spec() == PRESETS["array16x16"].with_(**point)
    assert Question(array="k26", rows=8).spec() == PRESETS["k26"].with_(rows=8, act_units=8)


def test_a_model_with_a_bias_that_dense_16_bit_has_no_room_for_is_answered():
    model, signals = untrained("LSTM", 6, 32, seed=1)
    model.bias_ih_l0.data[:32] = 5.0
    with pytest.raises(ValueError, match="bias of gate i needs 32 bits"):
        wb.pack(model, wb.uniform(model, wb.Dense(), 16, signals))
    answer = explore(model, signals, Question("TopK", 6.0, 5, array="group4x4"))
    assert answer.schedules[BASELINE].mapping.layer.bias["i"].min() / 2.0 ** answer.schedules[
        BASELINE].mapping.layer.bias_fracs["i"] > 4


def test_circulant_blocks_by_fft_and_a_layer_by_name():
    model = torch.nn.Sequential(torch.nn.LSTM(8, 16, num_layers=2))
    signals = wb.calibrate(model, [torch.randn(5, 2, 8)])
    first, second = (explore(model, signals, Question("BlockCirculant", 8.0, array="group4x4", layer=layer)).schedules
                     for layer in (None, "0.l1"))
    assert first[BASELINE].mapping.layer.input_size == 8 and second[BASELINE].mapping.layer.input_size == 16
    answer = explore(model, signals, Question("BlockCirculant", 8.0, array="group4x4", layer="0.l1"))
    assert "A step of layer 0.l1 alone, one of 2, takes" in answer.sentence() and "sequences" not in answer.sentence()
    by_fft = explore(model, signals, Question("BlockCirculant", 8.0, fft=True, array="group4x4"))
    assert {entry.method.datapath for entry in by_fft.plan.blocks.values()} == {"fft"}
    assert by_fft.schedules["BlockCirculant"].counts() != first["BlockCirculant"].counts()


@pytest.mark.parametrize(("asked", "message"), [
    ({"method": "topk"}, "a question knows the methods hybrid, Dense, .*, got 'topk'"),
    ({"method": "TopK", "fft": True}, "fft needs a plan with circulant blocks, got one of TopK"),
    ({"method": "hybrid", "sensitive": ("i", "f", "g", "o"), "fft": True}, "fft needs circulant blocks .*, got a plan without"),
    ({"method": "Dense", "target_cr_disk": 40.0}, "no uniform Dense of 2 to 8 bits meets cr_disk 40.0"),
    ({"target_cr_disk": 0.5}, "a target cr_disk must be a number of at least 1, got 0.5"),
    ({"sensitive": ("g", "x")}, "a question knows the gates i, f, g, o, got x"),
    ({"method": "TopK", "sensitive": ("x",)}, "a question knows the gates i, f, g, o, got x"),
    ({"bits": 10}, "a uniform plan needs 2 to 8 bits, got 10"),
    ({"rows": 0}, "ArraySpec needs rows of at least 1, got 0"),
    ({"array": "tpu"}, "preset knows group4x4, .*, got 'tpu'"),
    ({"rows": 6}, "ArraySpec needs rows and cols in multiples of 4"),
    ({"layer": "l1"}, "a question needs a layer of the model, l0, got 'l1'"),
    ({"batch": 0}, "a question needs a whole batch of at least 1, got 0"),
], ids=str)
def test_what_a_question_refuses(lstm, asked, message, monkeypatch):
    question = Question(**{"target_cr_disk": 6.0} | asked)
    if "plan" not in message.replace("fft needs a plan", "") and "no uniform" not in message:  # then before any work
        monkeypatch.setattr(Question, "plan", None)
        with pytest.raises(ValueError, match=message):
            wb.explorer(*lstm, question)
    with pytest.raises(ValueError, match=message):
        explore(*lstm, question)


def test_what_is_no_question_is_refused(lstm):
    for ask in (explore, wb.explorer):
        with pytest.raises(ValueError, match=f"{ask.__name__} needs a Question, got 3"):
            ask(*lstm, 3)


def test_an_array_that_no_such_device_holds(lstm):
    assert "Only a model" not in explore(*lstm, Question(target_cr_disk=6.0, array="k26")).sentence()
    text = explore(*lstm, Question(target_cr_disk=6.0, array="k26", rows=48, cols=48)).sentence()
    assert re.search(r"\*\*Only a model: the array does not fit the k26: it takes 2352 dsp of 1248, .*\.\*\*$", text)


def test_an_array_that_slows_the_baseline_down_is_said(lstm):
    small = explore(*lstm, Question("Dense", 2.0, array="group4x4"))
    assert "Dense 16-bit is not faster on half the rows or columns of the 4 x 4 PEs." in small.sentence()
    answer = explore(*lstm, Question("Dense", 2.0, array="vu440"))
    base = answer.schedules["dense 16-bit"]
    said = re.search(r"\*\*The 48 x 48 PEs are more than dense 16-bit can use: on (\d+) x (\d+) of them a step takes (\d+) "
                     r"cycles, on all (\d+)\. Accelerations against it are ([\d.]+) times those against that part\.\*\*",
                     answer.sentence())
    rows, cols, few, all_ = map(int, said.groups()[:4])
    spec = wb.array.preset("vu440").with_(rows=rows, cols=cols, h_words_per_cycle=min(12, cols))
    found = wb.array.schedule_layer(base.mapping.layer, spec, base.steps)
    assert round(found.steady_state_cycles) == few < all_ == round(base.steady_state_cycles) and rows * cols < 48 * 48
    assert float(said[5]) == pytest.approx(base.steady_state_cycles / found.steady_state_cycles, abs=0.005)


@pytest.mark.parametrize(("sizes", "message"), [
    (("RNN", 4, 8), "untrained knows the cells LSTM, GRU, got 'RNN'"),
    (("LSTM", 0, 8), "untrained needs a whole input_size of at least 1, got 0"),
    (("GRU", 4, -1), "untrained needs a whole hidden_size of at least 1, got -1"),
])
def test_what_untrained_refuses(sizes, message):
    with pytest.raises(ValueError, match=message):
        untrained(*sizes, seed=0)


def test_an_untrained_layer_is_drawn_from_its_seed_alone():
    torch.manual_seed(1)
    (one, signals), state = untrained("GRU", 4, 8, seed=3), torch.get_rng_state()
    torch.manual_seed(2)
    other, others = untrained("GRU", 4, 8, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)) and signals == others
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # nobody else's randomness is touched


@pytest.fixture
def asked(monkeypatch):
    """The questions that the controls ask, and what is displayed in place of answers."""
    questions, texts = [], []
    monkeypatch.setattr(exploration, "present_answer", lambda answer: questions.append(answer.question))
    monkeypatch.setattr("IPython.display.display", lambda shown: texts.append(shown.data))
    return questions, texts


def controls(box):
    return {control.description: control for column in box.children[0].children for control in column.children}


def test_every_control_asks_its_question(lstm, asked):
    questions, texts = asked
    model, signals = lstm
    start = Question("TopK", 6.0, array="group4x4")
    known = controls(wb.explorer(model, signals, start))
    assert questions.pop() == Question("TopK", 6.0, sensitive=("g",), array="group4x4", rows=4, cols=4, layer="l0")
    assert "layer on the array" not in known  # there is one
    for description, value, field in (
            ("asked cr_disk", 8.0, "target_cr_disk"), ("bits of a weight", 4, "bits"), ("method", "hybrid", "method"),
            ("Top-k gates", ("i", "f"), "sensitive"), ("circulant block", 4, "block"), ("circulant blocks by FFT", True, "fft"),
            ("PE rows", 8, "rows"), ("PE columns", 8, "cols"), ("batch", 3, "batch")):
        known[description].value = value
        assert getattr(questions.pop(), field) == value, description
    assert not questions and all(text.startswith("The same again: `wb.explore(") for text in texts)
    known["circulant blocks by FFT"].value, known["batch"].value = False, 1  # which k26 could not hold
    questions.clear()
    known["array"].value = "k26"
    (question,) = questions  # one answer, though three fields change
    assert (question.array, question.rows, question.cols) == ("k26", 16, 16)
    known["PE rows"].value = 10  # as typed beside the slider
    assert known["PE rows"].value == 12 and [question.rows for question in questions] == [16, 12]


def test_a_model_of_several_layers_has_a_control_for_them(asked):
    questions, _ = asked
    model = torch.nn.GRU(4, 8, bidirectional=True)
    signals = wb.calibrate(model, [torch.randn(5, 2, 4)])
    known = controls(wb.explorer(model, signals, Question("TopK", 4.0, array="group4x4")))
    known["layer on the array"].value = "l0_reverse"
    assert [question.layer for question in questions] == ["l0", "l0_reverse"] and questions[0].sensitive == ("n",)


def test_the_dense_baseline_is_packed_once_and_scheduled_for_every_question(lstm, asked, monkeypatch):
    packed, batches = [], []
    monkeypatch.setattr(exploration, "present_answer", lambda answer: batches.append(
        [schedule.mapping.batch for schedule in answer.schedules.values()]))
    monkeypatch.setattr(exploration, "uncompressed", lambda *a, real=exploration.uncompressed: packed.append(a) or real(*a))
    known = controls(wb.explorer(*lstm, Question("TopK", 6.0, array="group4x4")))
    known["bits of a weight"].value = 4
    known["batch"].value = 2
    assert len(packed) == 1
    assert batches == [[1, 1], [1, 1], [2, 2]]


def test_what_is_no_refusal_is_no_answer_either(lstm, asked, monkeypatch):
    box = wb.explorer(*lstm, Question("TopK", 6.0, array="group4x4"))

    def broken(answer):
        raise RuntimeError("a bug")

    monkeypatch.setattr(exploration, "present_answer", broken)
    with pytest.raises(RuntimeError, match="a bug"):  # in a kernel the output shows it
        controls(box)["bits of a weight"].value = 4
    assert box.children[1].value == ""


def test_controls_that_mean_nothing_are_off(lstm, asked):
    questions, _ = asked
    known = controls(wb.explorer(*lstm, Question("hybrid", 6.0, fft=True, array="group4x4")))
    names = ("Top-k gates", "circulant block", "circulant blocks by FFT")
    for method, off in (
            ("hybrid", (False, False, False)), ("BlockCirculant", (True, True, False)), ("TopK", (True, True, True))):
        known["method"].value = method
        assert tuple(known[name].disabled for name in names) == off
    assert [question.fft for question in questions] == [True, True, False]


def test_a_refused_question_is_said_and_the_next_one_answered(lstm, asked):
    questions, texts = asked
    box = wb.explorer(*lstm, Question("Dense", 6.0, array="group4x4"))
    known = controls(box)
    questions.clear(), texts.clear()
    known["asked cr_disk"].value = 100.0
    assert not questions and texts[0] == "**Not possible:** no uniform Dense of 2 to 8 bits meets cr_disk 100.0"
    assert box.children[1].value == ""  # no longer computing
    known["asked cr_disk"].value = 4.0
    assert len(questions) == 1


@pytest.mark.parametrize("question", [
    Question(), Question("TopK", 6.0, sensitive=("g",)), Question(sensitive=("i", "o"), block=4, fft=True, target_cr_disk=6.0),
    Question("LowRank", 6.0, 4, array="vu440", rows=48, cols=48), Question("BlockCirculant", 6.0, fft=True, layer="l0"),
    Question("LowRank", 6.0, array="k26", rows=8, cols=16, batch=2),
], ids=str)
def test_the_call_asks_the_same_again(lstm, question):
    model, signals = lstm
    called = eval(call_of(question, model), {"wb": wb, "model": model, "signals": signals})  # what a user would paste
    answer = explore(model, signals, question)
    assert called.figures() == answer.figures() and bits_in(called.plan) == bits_in(answer.plan)
    call = call_of(question, model)
    assert "None" not in call and "layer" not in call and ("rows" in call) == (question.rows == 8)
