"""A model, batches, metric and training that are not ours: the page that shows them, as it stands, and what users get wrong."""

import contextlib
import io
import os
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from torch import nn

import workbench as wb
from workbench.engine import LayerEngine, StackEngine, reversed_steps
from workbench.sensitivity import calibration_batches

BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "bring_your_own.md").read_text(), re.DOTALL)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(names that the page defines, what it prints, its folder)"""
    folder, names, printed = tmp_path_factory.mktemp("page"), {"__name__": "example"}, io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed), torch.random.fork_rng():
            for block in BLOCKS:
                exec(compile(block, "bring_your_own.md", "exec"), names)
    finally:
        os.chdir(before)
    return names, printed.getvalue(), folder


def test_it_takes_less_than_thirty_lines():
    workbench_code = BLOCKS[1]
    lines = [line for line in workbench_code.splitlines() if line.strip()]
    assert len(lines) < 30 and "wb." not in BLOCKS[0]


def test_the_integers_are_as_good_as_what_was_trained(page):
    names, printed, folder = page
    metric, packed = names["metric"], names["packed"]
    variance = torch.cat([ratings for *_, ratings in names["validation"]]).var()
    before, compressed, emulated, integer = (
        float(metric(names[name])) for name in ("model", "compressed", "emulated", "integer"))
    assert before < variance / 10 and compressed < variance / 10  # it has learnt
    assert integer == pytest.approx(emulated, rel=0.02) and integer < compressed * 1.2
    assert packed.cr_disk >= 18 and f"{integer:.4f} in integers" in printed
    assert (folder / "rater.packed.safetensors").stat().st_size >= 4 * packed.dense_weights / packed.cr_disk
    choices = {(row["method"], row["bits"]) for row in names["plan"].table(packed)}
    assert len(packed.blocks) == 32 and len(choices) > 2  # methods and widths are mixed
    assert not os.path.exists("rater.packed.safetensors")


def test_every_direction_on_the_array_equals_the_engine(page):
    names, printed, _ = page
    packed, executed, x = names["packed"], names["executed"], names["x"]
    stack = packed.stack("rnn")
    assert len(x) == names["lengths"][0]
    for depth, (directions, runs) in enumerate(zip(stack, executed.layers, strict=True)):
        inputs = StackEngine(stack[:depth]).run(x).output if depth else x
        for reverse, (layer, run) in enumerate(zip(directions, runs, strict=True)):
            expected = LayerEngine(layer).run(reversed_steps(inputs, None) if reverse else inputs)
            assert np.array_equal(run.output, expected.output) and np.array_equal(run.c, expected.c)
    cycles = dict(re.findall(r"(rnn\.\w+): (\d+) cycles a step", printed))
    assert list(cycles) == list(packed.layers) and all(int(count) > 0 for count in cycles.values())


def test_the_integer_model_gives_what_the_array_gives(page):
    """One sequence through the module around the layers: what enters attention and head are the array's outputs."""
    names, *_ = page
    packed, seen = names["packed"], []
    handle = names["integer"].rnn.register_forward_hook(lambda *arguments: seen.append(arguments[2][0].data))
    names["integer"](names["tokens"][:1], names["lengths"][:1])
    handle.remove()
    hidden = packed.layers["rnn.l1"].signals["hidden"]
    assert np.array_equal(hidden.quantise(seen[0]), names["executed"].output[:, 0])


def test_the_other_cells(page):
    names, printed, _ = page
    gru, projected = names["gru"].layers, names["projected"].layers["rnn.l0"]
    assert [layer.cell for layer in gru.values()] == ["GRU", "GRU"]
    assert projected.projected and (projected.hidden_size, projected.output_size) == (24, 12)
    found = re.findall(r"cr_disk ([\d.]+), squared error ([\d.]+) in float, ([\d.]+) in integers", printed)
    assert len(found) == 2
    for ratio, in_float, in_integers in (map(float, row) for row in found):
        assert ratio > 7 and in_integers == pytest.approx(in_float, rel=0.1) and in_float < 0.15


def test_other_budgets_schedules_and_fewer_units(page):
    names, printed, _ = page
    classes, free, small, fast = (names[name].chosen for name in ("classes", "free", "small", "fast"))
    assert set(classes.groupby(classes["block"].str.endswith(".g"))["method"].nunique()) == {1}
    assert free["predicted_loss"].sum() <= classes["predicted_loss"].sum() and free["bytes"].sum() <= classes["bytes"].sum()
    assert small["bytes"].sum() <= classes["bytes"].sum() and fast["cycles"].sum() <= 2000
    assert names["stepwise"].entered == 2 and wb.pack(names["stepwise"].model, names["classes"].plan).cr_disk >= 18
    assert names["gates"] == names["by_gate"].loc[names["by_gate"]["class"] == "sensitive", "gate"].tolist() != []
    model = names["model"]
    assert wb.pack(model, names["two_classes"]).cr_disk >= 12 and len(names["cheap"]) == 4 * 32
    kept, fresh = names["compressed"].state_dict(), wb.compress(model, names["plan"]).state_dict()
    resumed = names["resumed"].state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in resumed.items())
    assert not all(torch.equal(tensor, fresh[name]) for name, tensor in resumed.items())
    assert names["schedule"].entered == 1 and names["hybrid"].cr_disk >= 18
    # 16 features of 12 and units of 16 in two layers and directions; of 12 units 8 bits of 32.
    before, after = (2 * 4 * h * (12 + h) + 2 * 4 * h * 3 * h for h in (16, 12))
    assert names["plain"].cr_disk == 4 * before / after and "12 of 16 units" in printed


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.5), nn.GRU(3, 4, batch_first=True))


INPUTS = [torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))]


def error(model):
    return model(INPUTS[0])[0].square().mean()


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    error(model).backward()
    optimizer.step()


def measured(model, loop, epochs=0):
    return wb.sensitivity_table(model, loop, [wb.TopK(0.5)], bits=4, epochs=epochs)


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_loop_of_a_task_s_own_functions_measures_what_the_task_does(tiny_task, epochs):
    model = wb.build_classifier(tiny_task, 8, seed=0)
    loop = wb.Loop(lambda model: wb.evaluate(model, tiny_task, "valid").loss, calibration_batches(tiny_task),
                   lambda model: wb.fit(model, tiny_task, seed=3, epochs=1, progress=False))
    arguments = {"bits": 4, "epochs": epochs, "seed": 3}
    own, of_task = (wb.sensitivity_table(model, data, [wb.TopK(0.25)], **arguments) for data in (loop, tiny_task))
    accuracies = [name for name in own if name.startswith("accuracy")]
    assert own[accuracies].isna().all(axis=None) and not of_task[accuracies].isna().any(axis=None)
    pd.testing.assert_frame_equal(own.drop(columns=accuracies), of_task.drop(columns=accuracies))


def test_a_loop_is_called_in_the_right_mode_and_repeats(model):
    modes, before = [], torch.get_rng_state()

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return error(model)

    def once(model):
        modes.append((model.training, torch.is_grad_enabled()))
        train(model)

    weights = {name: values.clone() for name, values in model.state_dict().items()}
    tables = [measured(model, wb.Loop(evaluate, INPUTS, once), epochs=2) for _ in range(2)]
    pd.testing.assert_frame_equal(*tables)
    assert modes == [(False, False), (True, True), (False, False), (True, True), (False, False)] * 2 * 7
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(values, weights[name]) for name, values in model.state_dict().items())
    assert (tables[0]["loss_after"] < tables[0]["loss_before"]).all()  # the training was of the model that is measured


def test_a_hybrid_plan_is_searched_with_a_loop():
    model = nn.Sequential(nn.LSTM(8, 8))
    loop = wb.Loop(lambda model: model(torch.ones(3, 2, 8))[0].square().mean(), [torch.randn(3, 2, 8)])
    found = wb.search_hybrid(model, loop, ["g"], 8.0, [wb.Strength(4, 6, 6), wb.Strength(8, 6, 6)], epochs=0, seed=0)
    assert len(found) == 2 and found["valid_accuracy"].isna().all() and found["valid_loss"].is_monotonic_increasing


# --- what users get wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "kind", "message"), [
    (float("nan"), ValueError, r"needs finite losses, got nan before any retraining \(all blocks at 16 bits\)"),
    (float("inf"), ValueError, "needs finite losses, got inf"),
    (None, TypeError, "needs one number from the Loop's evaluate, got None"),
    (torch.zeros(2), TypeError, r"needs one number from the Loop's evaluate, got a tensor of shape \(2,\)"),
])
def test_a_metric_that_gives_no_number(model, loss, kind, message):
    with pytest.raises(kind, match=message):
        measured(model, wb.Loop(lambda _: loss, INPUTS))


def test_a_training_that_diverges_is_named(model):
    def train(model):
        next(model.parameters()).data.add_(0.001)

    losses = iter([1.0, 0.9, 0.8, 2.0, float("nan")])
    with pytest.raises(ValueError, match=r"got nan after epoch 1 of retraining \(1.weight_ih_l0.r, TopK 0.5 at 4 bits\)"):
        measured(model, wb.Loop(lambda _: next(losses), INPUTS, train), epochs=2)


def test_batches_that_are_not_there(model):
    used = iter(INPUTS)
    assert wb.calibrate(model, used)
    for batches in (used, []):
        with pytest.raises(ValueError, match="needs at least one batch, got none: empty, or a generator used before"):
            measured(model, wb.Loop(error, batches))


def test_a_loop_without_training_measures_no_retraining(model):
    with pytest.raises(ValueError, match="1 epochs of retraining need a Loop with the function train, got one without"):
        measured(model, wb.Loop(error, INPUTS), epochs=1)
    with pytest.raises(TypeError, match="needs a task, or a Loop of your own functions, got function"):
        measured(model, error)


def test_a_loop_is_not_moved_to_a_device(model):
    signals, loop = wb.calibrate(model, INPUTS), wb.Loop(error, INPUTS)
    table = measured(model, wb.Loop(lambda _: 1.0, INPUTS))
    with pytest.raises(ValueError, match="with a Loop runs where its model is, got the device 'cpu'"):
        wb.sensitivity_table(model, loop, [wb.TopK(0.5)], device="cpu")
    with pytest.raises(ValueError, match="with a Loop runs where its model is, got the device 'cpu'"):
        wb.search_hybrid(model, loop, [], 4.0, wb.strengths(8), epochs=0, seed=0, device="cpu")
    with pytest.raises(ValueError, match="""a measurement needs "cpu" or "cuda" as device, got 'tpu'"""):
        wb.search_allocation(model, loop, table, 4.0, bits=6, epochs=0, seed=0, device="tpu")
    assert signals == wb.calibrate(model, INPUTS)


@pytest.mark.parametrize(("module", "message"), [
    (nn.Linear(3, 4), "compresses nn.LSTM and nn.GRU, and found neither in Sequential"),
    (nn.RNN(3, 4), "'0' is an nn.RNN: the workbench takes nn.LSTM and nn.GRU"),
    (nn.LSTMCell(3, 4), "'0' is an nn.LSTMCell"),
])
def test_a_model_that_the_workbench_does_not_take(module, message):
    model = nn.Sequential(module)
    for call in (lambda: measured(model, wb.Loop(error, INPUTS)), lambda: wb.calibrate(model, INPUTS)):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_plan_or_table_of_another_model(model):
    other = nn.GRU(3, 4, bidirectional=True, batch_first=True)
    table = measured(other, wb.Loop(lambda _: 1.0, INPUTS))
    signals = wb.calibrate(model, INPUTS)
    plan = wb.uniform(other, wb.Dense(), 8, wb.calibrate(other, INPUTS))
    with pytest.raises(ValueError, match="needs a table of every block of the model, these differ: 1.weight_hh_l0.n"):
        wb.allocate(model, table, 4, signals)
    for step in (wb.compress, wb.emulate, wb.pack):
        with pytest.raises(ValueError, match="the plan names the blocks weight_ih_l0.r, .*, the model has 1.weight_ih_l0.r"):
            step(model, plan)
    with pytest.raises(ValueError, match="attach needs a packed model with the layers 1.l0, got l0, l0_reverse"):
        wb.attach(model, wb.pack(other, plan))
