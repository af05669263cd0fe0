"""A packed model on an array, from its file alone: figures against the calls that they stand for, hostile and missing files."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from IPython.display import Markdown
from torch import nn

import workbench as wb
from workbench import deployment, runs, sweep, tables
from workbench.array import execute_stack, preset, schedule_layer, schedule_stack
from workbench.array.cost import BASELINE, compare
from workbench.deployment import PACKED, dense_baseline, deploy, packed_from

pytestmark = pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")

SPEC = preset("group4x4")
KINDS = {
    "lstm": lambda: nn.LSTM(8, 16),
    "gru": lambda: nn.GRU(8, 16),
    "stack": lambda: nn.LSTM(8, 16, num_layers=2),
    "both directions": lambda: nn.GRU(8, 16, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(8, 16, proj_size=8),
}
METHODS = [wb.TopK(0.25), wb.BlockCirculant(4), wb.BlockCirculant(4, "fft"), wb.LowRank(2), wb.Dense()]


def packed_model(kind, method=METHODS[0], bits=6):
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind]())
    signals = wb.calibrate(model, [torch.randn(5, 3, 8)])
    return model, wb.pack(model, wb.uniform(model, method, bits, signals)), signals


@pytest.fixture
def displayed(monkeypatch):
    """What is displayed, as text: Markdown as it is, all else as HTML or by its description."""
    found = []

    def display(what, raw=False, metadata=None):
        found.append(what["text/plain"] if raw else what.data if isinstance(what, Markdown) else what._repr_html_())

    monkeypatch.setattr("IPython.display.display", display)
    return found


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_baseline_is_the_network_of_the_file_in_dense_16_bit(kind, method):
    model, packed, signals = packed_model(kind, method)
    compressed = wb.bake(wb.compress(model, wb.uniform(model, method, 6, signals)))  # the weights of the file, as floats
    dense = wb.pack(compressed, wb.uniform(compressed, wb.Dense(), 16, signals))
    for name, layer in packed.layers.items():
        base, true = (schedule_layer(of, SPEC, 6, batch=2) for of in (dense_baseline(layer), dense.layers[name]))
        assert compare({BASELINE: base}) == compare({BASELINE: true})
        assert base.counts() == true.counts()
        for block, expected in dense.layers[name].blocks.items():
            assert (base.mapping.layer.blocks[block].dense() == expected.dense()).all()


def test_a_bias_that_is_large_beside_the_weights_is_deployed():
    """Sums of 16-bit weights of 14 fraction bits and a hidden state of 15 leave a bias of 32 bits a range of 4."""
    model = torch.nn.LSTM(8, 8)
    model.bias_ih_l0.data[8:16] = 6
    packed = wb.pack(model, wb.uniform(model, wb.TopK(0.5), 8, wb.calibrate(model, [torch.randn(5, 2, 8)])))
    (layer,) = packed.layers.values()
    base = dense_baseline(layer)
    step = 2.0 ** -base.blocks["weight_ih_l0.f"].frac
    assert np.abs(base.blocks["weight_ih_l0.f"].dense() * step
                  - layer.blocks["weight_ih_l0.f"].dense() * 2.0 ** -layer.blocks["weight_ih_l0.f"].frac).max() <= step / 2
    bias = model.bias_ih_l0.detach()[8:16] + model.bias_hh_l0.detach()[8:16]
    np.testing.assert_allclose(np.ldexp(base.bias["f"], -base.bias_fracs["f"]), bias, atol=1e-4)
    assert deploy(packed, SPEC, steps=6).figures()["modules"][0]["label"] == BASELINE


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_single_calls(kind):
    _, packed, _ = packed_model(kind)
    found = deploy(packed, SPEC, steps=6, batch=2)
    stack = schedule_stack(packed.stack("0"), SPEC, 6, 2)
    figures, rows = found.figures(), found.by_layer()
    assert figures["cr_disk"] == packed.cr_disk and figures["bytes"] == packed.storage_bits // 8
    assert [row["label"] for row in figures["modules"]] == [BASELINE, PACKED]
    assert figures["modules"][1]["cycles"] == stack.cycles and found.modules["0"][PACKED].counts() == stack.counts()
    assert f"**{stack.steady_state_cycles:,.6g} cycles** " in found.sentence()
    assert figures["steady_state_cycles"] == stack.steady_state_cycles
    assert figures["acceleration"] == pytest.approx(figures["modules"][1]["acceleration"])
    assert figures["step_us"] == stack.steady_state_cycles / SPEC.clock_mhz
    assert list(rows["layer"]) == list(packed.layers) and len(figures["layers"]) == 2 * len(packed.layers)
    for cycles, layer in zip(rows["cycles, packed"], packed.layers.values(), strict=True):
        assert cycles == schedule_layer(layer, SPEC, 6, batch=2).steady_state_cycles
    if len(packed.layers) == 1:
        assert stack.steady_state_cycles == rows["cycles, packed"].item()
        assert "layers and directions" not in found.sentence() and "Dense 16-bit is not faster on half" in found.sentence()


def test_what_is_scheduled_is_what_executes():
    _, packed, _ = packed_model("stack")
    found = deploy(packed, SPEC, steps=6)
    executed = execute_stack(packed.stack("0"), SPEC, packed.layers["0.l0"].signals["input"].quantise(torch.randn(6, 1, 8)))
    assert executed.schedule.cycles == found.modules["0"][PACKED].cycles


def test_a_row_a_block_adds_up():
    _, packed, _ = packed_model("both directions")
    rows = packed.table()
    assert [row["block"] for row in rows] == list(packed.blocks)
    assert sum(row["value bits"] + row["index bits"] for row in rows) == packed.storage_bits
    texts = {method: packed_model("lstm", method)[1].table()[0]["stored as"] for method in METHODS}
    assert texts[wb.Dense()] == "dense" and texts[wb.LowRank(2)] == "lowrank, rank 2"
    assert texts[wb.BlockCirculant(4, "fft")] == "circulant, block 4, datapath fft"
    assert texts[wb.TopK(0.25)] == "sparse, Relative, width 4, block 1"  # 32 of 128 weights: 16 bytes, as many as a bitmap


def test_several_modules_and_thresholds_are_said():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.above = nn.LSTM(8, 16), nn.GRU(16, 8)

        def forward(self, x):
            return self.above(self.below(x)[0])[0]

    torch.manual_seed(0)
    model = Two()
    plan = wb.uniform(model, wb.TopK(0.5), 6, wb.calibrate(model, [torch.randn(5, 3, 8)], bits=12))
    plain, sent = (deploy(wb.pack(model, p), SPEC, steps=6) for p in (plan, plan.with_delta(hidden=0.1)))
    assert "A step of 'below' takes **" in plain.sentence() and "A step of 'above' takes **" in plain.sentence()
    assert "Delta thresholds save nothing here" in sent.sentence() and "Delta" not in plain.sentence()
    figures = plain.figures()
    for name in ("steady_state_cycles", "step_us"):
        assert figures[name] == sum(getattr(schedules[PACKED], name) for schedules in plain.modules.values())
    dense = sum(schedules[BASELINE].steady_state_cycles for schedules in plain.modules.values())
    assert figures["acceleration"] == dense / figures["steady_state_cycles"]
    for path in ("below", "above"):
        assert plain.modules[path][BASELINE].cycles == sent.modules[path][BASELINE].cycles


def test_removed_units_count_in_the_ratios_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(8, 16))
    small = wb.remove_units(model, 8, consumers={"0": []})
    packed = wb.pack(small, wb.uniform(small, wb.Dense(), 8, wb.calibrate(small, [torch.randn(5, 3, 8)])), original=model)
    found = deploy(packed, SPEC, steps=4)
    assert "These ratios are counted from the model before units were removed" in found.sentence()
    assert found.figures()["weights"] == 4 * 16 * 24 and found.modules["0"][BASELINE].mapping.dense_weights == 4 * 8 * 16
    assert "units were removed" not in deploy(packed_model("lstm")[1], SPEC, steps=4).sentence()


@pytest.mark.parametrize("array", ["group4x4", "k26"])
def test_names_from_a_file_are_no_markup(array, tmp_path, displayed):
    model = nn.Module()
    model.add_module("<img src=x onerror=alert(1)>`$", nn.LSTM(8, 16))
    model.forward = lambda x: next(model.children())(x)[0]
    plan = wb.uniform(model, wb.TopK(0.25), 6, wb.calibrate(model, [torch.randn(5, 3, 8)]))
    found = deploy(wb.load(wb.pack(model, plan).save(tmp_path / "odd.safetensors")), preset(array), steps=4)
    deployment.present_deployment(found, array)
    deployment.present_layers(found)
    deployment.present_packed(found)
    assert len(displayed) == 10 + (array == "k26")
    assert not any("<img" in text for text in displayed)
    assert any("?img src?x onerror?alert?1?" in text for text in displayed)


def test_an_array_too_large_for_its_device_is_only_a_model(displayed):
    _, packed, _ = packed_model("lstm")
    deployment.present_deployment(deploy(packed, wb.array_of("k26", 64, 64), steps=4), "k26")
    assert displayed[-1].startswith("**Only a model: the array does not fit the k26: it takes ")


def test_a_file_that_stores_nothing():
    with torch.no_grad():
        model = nn.Sequential(nn.LSTM(8, 16))
        for w in model.parameters():
            w.zero_()
    packed = wb.pack(model, wb.uniform(model, wb.TopK(0.25), 6, wb.calibrate(model, [torch.randn(5, 3, 8)])))
    assert packed.stored_values == 0 and "0 bits a stored value" in deploy(packed, SPEC, steps=4).sentence()


def test_cycles_are_written_out():
    def costs(cycles):
        mapping = SimpleNamespace(batch=3, spec=SimpleNamespace(clock_mhz=200))
        return SimpleNamespace(mapping=mapping, steady_state_cycles=cycles, cycles_per_item=cycles / 3, step_us=cycles / 200,
                               bound="links")

    assert tables.step_text(costs(1_234_567.0), costs(3_703_701.5), " of it") == (
        "A step of it takes **1,234,567 cycles** (6172.84 µs at 200 MHz; 3 sequences, 411,522.3 cycles each), most of all for "
        "links: 3.00 times as fast as dense 16-bit (3,703,701.5 cycles, most of all for links).")


def test_the_example_is_the_first_of_the_explorer():
    model, signals = wb.untrained("LSTM", 40, 128, seed=0)
    assert packed_from(None).storage_bits == wb.explore(model, signals, wb.Question()).packed.storage_bits


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: deploy("model.safetensors", SPEC), TypeError, "deploy needs a PackedModel, as pack and load give it, got a str"),
    (lambda: deploy(packed_model("lstm")[1], SPEC, steps=0), ValueError, "deploy needs a whole number of steps of at least 1"),
    (lambda: deploy(packed_model("lstm")[1], SPEC, batch=0), ValueError, "deploy needs a whole batch of at least 1, got 0"),
    (lambda: deploy(packed_model("lstm")[1], SPEC, batch="2"), ValueError, "deploy needs a whole batch of at least 1, got '2'"),
    (lambda: deploy(packed_model("lstm")[1], "k26"), TypeError, "deploy needs an ArraySpec, as array.preset and array_of give"),
    (lambda: deploy(packed_model("lstm")[1], SPEC.with_(data_words=4)), ValueError, r"^0\.l0, dense 16-bit: .*data words"),
    (lambda: deploy(packed_model("lstm", wb.BlockCirculant(8, "fft"))[1], SPEC.with_(data_words=16)), ValueError,
     r"^0\.l0, packed: .*data words"),
    (lambda: packed_from("nowhere.safetensors"), ValueError, "nowhere.safetensors"),
])  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- the file as a run's data


@pytest.fixture
def saved(tmp_path):
    return packed_model("lstm")[1].save(tmp_path / "own.safetensors")


def asked(path):
    values = runs.resolve("deploy", {"packed_file": str(path)})
    return values, runs.Run(runs.find_notebook("deploy"), values, "code", runs.data_digest(values))


def test_a_run_is_of_the_file_as_it_is(saved, tmp_path, monkeypatch):
    values, first = asked(saved)
    monkeypatch.chdir(tmp_path)
    assert asked("own.safetensors")[1].id == first.id and values["packed_file"] == str(saved)
    packed_model("gru")[1].save(saved)
    assert asked(saved)[1].id != first.id
    assert runs.data_digest(runs.resolve("deploy", {})) is None
    saved.unlink()
    with pytest.raises(ValueError, match=r"load .*own\.safetensors"):
        asked(saved)
    saved.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"load .*own\.safetensors"):  # before anything runs
        runs.run("deploy", {"packed_file": str(saved)}, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_sweep_knows_which_file_has_changed(saved, tmp_path):
    other = shutil.copy(saved, tmp_path / "other.safetensors")
    (tmp_path / "arrays.toml").write_text(
        f'notebook = "deploy"\n[grid]\npacked_file = ["{saved}", "other.safetensors"]\narray = ["group4x4", "k26"]\n')
    points = sweep.survey(sweep.read(tmp_path / "arrays.toml"), tmp_path)
    assert len({point.run.id for point in points}) == 4 and len({point.run.data for point in points}) == 1
    packed_model("gru")[1].save(other)
    again = sweep.survey(sweep.read(tmp_path / "arrays.toml"), tmp_path)
    assert [a.run.id == b.run.id for a, b in zip(points, again, strict=True)] == [True, True, False, False]
