"""Studies of zeros on the array, of small trained models."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench import plots, tables
from workbench.array import PRESETS, map_layer, multiplied, schedule_layer
from workbench.array.schedule import schedule_mapping
from workbench.constrain import attach, compress, pack
from workbench.engine import StackEngine
from workbench.methods import TopK
from workbench.models import build_classifier
from workbench.plan import uniform
from workbench.quantise import calibrate
from workbench.sensitivity import Loop, calibration_batches
from workbench.sparsity import delta_study, layer_sequences, operation_study
from workbench.train import evaluate, fit

SPEC = PRESETS["group4x4"]


@pytest.fixture(scope="module")
def trained(tiny_task):
    model = build_classifier(tiny_task, 12, seed=0)
    plan = uniform(model, TopK(0.5), 16, calibrate(model, calibration_batches(tiny_task)))
    model = compress(model, plan)
    fit(model, tiny_task, seed=0, epochs=3, progress=False)
    return model, plan


@pytest.fixture(scope="module")
def study(trained, tiny_task):
    return delta_study(*trained, tiny_task, SPEC, [0.2, 0, 1e-4, 0.9], [1, 4], 3, 100.0)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"cell": "GRU", "num_layers": 2}],
                         ids=["one", "both directions", "GRU"])
def test_layers_take_what_the_engine_gives_them(tiny_task, options):
    model = build_classifier(tiny_task, 8, seed=0, **options)
    plan = uniform(model, TopK(0.5), 8, calibrate(model, calibration_batches(tiny_task))).with_delta(hidden=0.05)
    packed, data = pack(model, plan), tiny_task.splits["valid"]
    found = layer_sequences(model, packed, tiny_task, "valid", 3)
    assert list(found) == list(packed.layers)
    for n in range(3):
        length = int(data.lengths[n])
        x = packed.layers[next(iter(found))].signals["input"].quantise(data.x[n : n + 1, :length].swapaxes(0, 1))
        assert all(len(sequences) == 3 and len(sequences[n]) == length for sequences in found.values())
        np.testing.assert_array_equal(found[next(iter(found))][n], x)
        traced = {}
        stack = packed.stack(packed.paths[0])
        StackEngine(stack).run(x, trace=lambda *key, traced=traced: traced.update({key[:3]: key[3]}))
        for place, name in enumerate(packed.layers):
            if place >= len(stack[0]):
                below = [np.array([traced[p, t, "hidden"] for t in range(length)])[:: -1 if p % len(stack[0]) else 1]
                         for p in range(len(stack[0]))]
                expected = np.concatenate(below, axis=-1)[:: -1 if place % len(stack[0]) else 1]
                np.testing.assert_array_equal(found[name][n], expected)


class Started(torch.nn.Module):
    """A model that gives its recurrent layers states of its own."""

    def __init__(self, features, classes):
        super().__init__()
        self.rnn, self.head = torch.nn.LSTM(features, 8, 2, batch_first=True, bidirectional=True), torch.nn.Linear(16, classes)
        self.h, self.c = torch.randn(2, 4, 1, 8).clamp(-0.9, 0.9)

    def forward(self, x, lengths):
        states = (s.expand(-1, len(x), -1).contiguous() for s in (self.h, self.c))
        return self.head(self.rnn(x, tuple(states))[0].mean(1))


def test_layers_start_in_the_states_that_are_given(tiny_task):
    torch.manual_seed(0)
    model = Started(tiny_task.num_features, tiny_task.num_classes)
    packed = pack(model, uniform(model, TopK(0.5), 8, calibrate(model, calibration_batches(tiny_task))))
    data, first = tiny_task.splits["valid"], packed.layers["rnn.l0"]
    found = layer_sequences(model, packed, tiny_task, "valid", 1)
    x = first.signals["input"].quantise(data.x[:1, : int(data.lengths[0])].swapaxes(0, 1))
    h, c = (np.stack([packed.layers[name].signals[signal].quantise(s) for name, s in zip(packed.layers, states, strict=True)])
            for signal, states in (("hidden", model.h), ("cell", model.c)))
    below = StackEngine(packed.stack("rnn")[:1])
    np.testing.assert_array_equal(found["rnn.l1"][0], below.run(x, h[:2], c[:2]).output)
    assert not np.array_equal(found["rnn.l1"][0], below.run(x).output)


def test_a_threshold_of_0_is_none_and_a_large_one_sends_nothing(study):
    table = study.table.set_index(["threshold", "lookahead"])
    assert list(table.index.get_level_values(0).unique()) == ["none", "0", "0.0001", "0.2", "0.9"]
    for column in ("valid accuracy", "cycles mean"):
        assert table.loc[("0", 1), column] == table.loc[("none", 1), column]
    assert set(study.table.loc[study.table["lookahead"] == 1, "acceleration"]) == {1.0}  # nothing is skipped
    skipping = table.xs(4, level="lookahead")
    for column in ("hidden sent", "input sent", "macs per step"):
        assert skipping[column].iloc[1:].is_monotonic_decreasing, column
    assert skipping.loc["0.9", "hidden sent"] == 0
    assert skipping.loc["0.9", "acceleration"] > skipping.loc["0.2", "acceleration"] > 1
    assert (table["cycles mean"] <= table["cycles p95"] + 1e-9).all() and (table["cycles p95"] <= table["cycles max"]).all()


def test_figures_of_a_row_are_those_of_the_schedules(study, trained, tiny_task):
    model, plan = trained
    packed = pack(model, plan.with_delta(input=0.2, hidden=0.2))
    ((name, layer),) = packed.layers.items()
    row = study.table[(study.table["threshold"] == "0.2") & (study.table["lookahead"] == 4)].iloc[0]
    assert (row["layer"], row["valid accuracy"]) == (name, evaluate(attach(model, packed), tiny_task, "valid").accuracy)
    plain = pack(model, plan).layers[name]
    spec = SPEC.with_(word_bits=17, lookahead=4)
    layout = schedule_layer(plain, spec, 1).mapping.layout
    xs = layer_sequences(model, packed, tiny_task, "valid", 3)[name]
    schedules = [schedule_mapping(map_layer(layer, spec, layout), len(x), multiplied(layer, x)) for x in xs]
    steps = np.concatenate([schedule.step_cycles[1:] for schedule in schedules])
    assert (row["cycles mean"], row["cycles max"]) == (steps.mean(), steps.max())
    assert row["cycles per sequence"] == np.mean([schedule.cycles for schedule in schedules])
    hidden = np.concatenate([multiplied(layer, x)["hh"].ravel() for x in xs])  # long sequences count for more, as in the cycles
    assert row["hidden sent"] == np.count_nonzero(hidden) / hidden.size


def test_the_largest_threshold_within_the_limit_is_chosen(study, trained, tiny_task):
    assert study.chosen == 0.9  # 100 nats may be lost
    losses = study.table.groupby("threshold")["valid loss"].first()
    assert losses["0"] == losses["none"] < losses["0.2"]
    strict = delta_study(*trained, tiny_task, SPEC, [0, 0.9], [4], 2, 0.0)
    assert strict.chosen == 0 and strict.test_accuracy["chosen"] == strict.test_accuracy["without"]
    model, plan = trained
    assert study.test_accuracy["chosen"] == evaluate(
        attach(model, pack(model, plan.with_delta(input=0.9, hidden=0.9))), tiny_task, "test").accuracy


def test_operations_of_a_trained_model(trained, tiny_task):
    model, plan = trained
    rows, choices = operation_study(model, pack(model, plan), tiny_task, SPEC, [1, 4], 3)
    assert len(rows) == 2 * 8 and set(choices) == {("lstm.l0", 1), ("lstm.l0", 4)}
    assert set(rows["lookahead"]) == {1, 4} and rows["weight density"].between(0.45, 0.5).all()
    assert {row["choice"] for _, row in rows.iterrows()} <= {"dense", "sparse"}
    for choice in choices.values():
        assert [schedule.steps for schedule in choice.schedules["chosen"]] == list(tiny_task.splits["valid"].lengths[:3])


def test_operations_that_take_the_same_are_counted_apart(trained, tiny_task):
    model, plan = trained
    rows, _ = operation_study(model, pack(model, plan), tiny_task, SPEC, [1], 2)
    rows = rows.assign(**{"sequences dense": 9, "sequences sparse": [9] * 3 + [8] * (len(rows) - 3)})
    table = tables.crossover_table(SPEC, [0.5], [0.5, 1.0], [1], 16, 8)
    equal = (table["counted dense"] == table["counted sparse"]).sum()
    text = tables.operation_verdict(table, rows).data
    assert f"of 2 points (both take the same in {equal})" in text
    assert f"of {len(rows)} cases (both take the same in 3)" in text


def test_the_figure(study):
    left, right = plots.delta_figure(study.table).axes
    assert [line.get_label() for line in left.lines] == ["input sent", "hidden sent", "valid accuracy"]
    assert [line.get_label() for line in right.lines] == ["lookahead 1", "lookahead 4"]
    assert list(right.lines[1].get_ydata()) == list(study.table.loc[study.table["lookahead"] == 4, "cycles mean"])


def test_the_verdict_in_words(study):
    text = tables.delta_verdict(study).data
    row = study.table[(study.table["threshold"] == "0.9") & (study.table["lookahead"] == 4)].iloc[0]
    assert text.startswith("**Threshold 0.9**, with a lookahead of 4: lstm.l0 sends")
    alone = study.table[(study.table["threshold"] == "none") & (study.table["lookahead"] == 4)].iloc[0]
    alone = alone["cycles mean"] / row["cycles mean"]
    assert f"{row['acceleration']:.2f} times as fast as without a threshold and with a lookahead of 1, " \
           f"{alone:.2f} times as fast by the threshold alone" in text
    assert f"{study.test_accuracy['chosen']:.1f} %" in text
    none = replace(study, chosen=0.0, table=study.table[study.table["threshold"] != "0"])
    assert "No threshold" in tables.delta_verdict(none).data


def test_bad_input_is_refused(trained, tiny_task, tiny_language_task):
    model, plan = trained
    with pytest.raises(ValueError, match="layer_sequences needs a task of sequences, got a LanguageTask"):
        layer_sequences(model, pack(model, plan), tiny_language_task, "valid", 2)
    loop = Loop(lambda model: pytest.fail("measured before it was refused"), [])
    for study in (lambda: delta_study(model, plan, loop, SPEC, [0.1], [1], 2, 1.0),
                  lambda: operation_study(model, pack(model, plan), loop, SPEC, [1], 2)):
        with pytest.raises(ValueError, match="layer_sequences needs a task of sequences, got a Loop"):
            study()
    with pytest.raises(ValueError, match="layer_sequences needs a model and its PackedModel, got a Plan as the second"):
        operation_study(model, plan, tiny_task, SPEC, [1], 2)
    with pytest.raises(ValueError, match="layer_sequences needs a whole number of sequences of at least 1, got 0"):
        layer_sequences(model, pack(model, plan), tiny_task, "valid", 0)
    with pytest.raises(ValueError, match="Plan needs a delta threshold of at least 0 for input of lstm.l0, got -1"):
        delta_study(model, plan, tiny_task, SPEC, [-1], [1], 2, 1.0)
    short = replace(tiny_task, splits=tiny_task.splits | {"valid": replace(
        tiny_task.splits["valid"], lengths=np.ones_like(tiny_task.splits["valid"].lengths))})
    with pytest.raises(ValueError, match="delta_study needs sequences of at least 2 steps, got 1 step each"):
        delta_study(model, plan, short, SPEC, [0.1], [1], 2, 1.0)
    assert torch.is_grad_enabled()
