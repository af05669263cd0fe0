"""Errors of every signal: a literal float model beside the integer reference, hand numbers, padding, directions, layers."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_engine import Reference
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from workbench.constrain import pack
from workbench.fixedpoint import QFormat
from workbench.methods import Dense
from workbench.plan import uniform
from workbench.quantise import _Magnitudes, calibrate, format_of, observe
from workbench.signals import signal_errors

pytestmark = pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")
TRACED = {"LSTM": ["i", "f", "g", "o", "cell", "hidden"], "GRU": ["r", "z", "hidden_product", "n", "hidden"]}
COLUMNS = ["layer", "signal", "step", "sqnr_db", "largest", "format", "low", "high", "saturated"]


def rnn_of(kind, seed=0, **options):
    torch.manual_seed(seed)
    return (nn.GRU if kind == "GRU" else nn.LSTM)(3, 4, **options).double()


def packed_of(rnn, batches, bits=6, weight_bits=8, **formats):
    signals = {name: formats_of | {signal: fmt for signal, fmt in formats.items() if signal in formats_of}
               for name, formats_of in calibrate(rnn, batches, bits).items()}
    return pack(rnn, uniform(rnn, Dense(), weight_bits, signals))


def float_steps(rnn, suffix, xs, h=None, c=None):
    """One sequence through one layer and direction, by the formulas of torch's documentation: one dict of signals a step."""
    w_ih, w_hh, b_ih, b_hh = (getattr(rnn, f"{name}_{suffix}").detach().numpy()
                              for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    n = rnn.hidden_size
    h, c = (np.zeros(n) if s is None else s for s in (h, c))
    steps = []
    for x in xs:
        a, b = w_ih @ x + b_ih, w_hh @ h + b_hh
        if isinstance(rnn, nn.LSTM):
            i, f, g, o = (np.tanh(p) if k == 2 else 1 / (1 + np.exp(-p)) for k, p in enumerate((a + b).reshape(4, n)))
            c = f * c + i * g
            h = o * np.tanh(c)
            steps.append({"i": i, "f": f, "g": g, "o": o, "cell": c, "hidden": h})
        else:
            r, z = (1 / (1 + np.exp(-p)) for p in (a + b)[: 2 * n].reshape(2, n))
            s = b[2 * n :]
            new = np.tanh(a[2 * n :] + r * s)
            h = (1 - z) * new + z * h
            steps.append({"r": r, "z": z, "hidden_product": s, "n": new, "hidden": h})
    return steps


def integer_steps(layer, xs):
    """Cell and h of the integers, by the literal reference of the engine's tests."""
    h, c, steps = [0] * layer.output_size, [0] * layer.hidden_size, []
    for x in xs:
        (h,), c = Reference(layer).run([x], h, c)
        steps.append({"hidden": h} | ({"cell": c} if layer.cell == "LSTM" else {}))
    return steps


def expected(rows_of):
    """[(float values, integers, format)] -> the figures of a row."""
    exact, codes = (np.concatenate([np.asarray(pair[k], float) for pair in rows_of]) for k in (0, 1))
    fmt = rows_of[0][2]
    noise = ((codes * 2.0**-fmt.frac - exact) ** 2).sum()
    ends = (codes == fmt.max) | ((codes == fmt.min) & fmt.signed)
    return 10 * math.log10((exact**2).sum() / noise), np.abs(exact).max(), ends.mean()


def batch_of(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(max(lengths), len(lengths), 3, generator=generator, dtype=torch.float64)
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), x


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_cell_and_hidden_against_two_literal_models(kind, bidirectional):
    """Sequences of several lengths in two batches: padding counts nowhere, the reverse direction counts its own steps."""
    rnn = rnn_of(kind, bidirectional=bidirectional)
    batches = [batch_of([3, 1, 4], 1), batch_of([2, 5], 2)]
    packed = packed_of(rnn, [batch for batch, _ in batches])
    rows = signal_errors(rnn, packed, [batch for batch, _ in batches])
    assert list(rows) == COLUMNS
    found = rows.set_index(["layer", "signal", "step"])
    suffixes = ["l0", "l0_reverse"][: 1 + bidirectional]
    assert len(found) == len(rows) == len(suffixes) * len(TRACED[kind]) * 5
    for suffix in suffixes:
        layer, by_step = packed.layers[suffix], {}
        for (_, x), lengths in zip(batches, ([3, 1, 4], [2, 5]), strict=True):
            for b, length in enumerate(lengths):
                xs = x[:length, b].numpy()[:: -1 if suffix.endswith("reverse") else 1]
                codes = layer.signals["input"].quantise(xs).tolist()
                both = zip(float_steps(rnn, suffix, xs), integer_steps(layer, codes), strict=True)
                for t, (exact, integers) in enumerate(both):
                    for name, values in integers.items():
                        by_step.setdefault((name, t), []).append((exact[name], values, layer.signals[format_of(name)]))
        for (name, t), pairs in by_step.items():
            figures = found.loc[(suffix, name, t), ["sqnr_db", "largest", "saturated"]]
            assert tuple(figures) == pytest.approx(expected(pairs)), name
        assert rows[(rows["layer"] == suffix) & (rows["signal"] == "hidden")]["step"].tolist() == [0, 1, 2, 3, 4]


def test_padding_changes_nothing():
    rnn = rnn_of("LSTM")
    batch, x = batch_of([2, 4])
    packed = packed_of(rnn, [batch])
    both, alone = signal_errors(rnn, packed, [batch]), signal_errors(rnn, packed, [x[:, 1:]])
    late = [rows[rows["step"] >= 2].reset_index(drop=True) for rows in (both, alone)]
    pd.testing.assert_frame_equal(*late)
    key = ["layer", "signal", "step"]  # unpadded, one sequence after the other, comes to the same
    pd.testing.assert_frame_equal(*(rows.sort_values(key).reset_index(drop=True)
                                    for rows in (both, signal_errors(rnn, packed, [x[:2, :1], x[:, 1:]]))))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gates_of_the_first_step_by_hand(kind):
    """Weights of zero leave the biases: every gate is a constant, whatever comes in."""
    rnn = rnn_of(kind)
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            parameter.fill_(0.5 if name.startswith("bias_ih") else 0.0)
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    names = ("i", "f", "o") if kind == "LSTM" else ("r", "z")
    packed = packed_of(rnn, [x], bits=4, sigmoid=QFormat(4, 4, False))
    found = signal_errors(rnn, packed, [x]).set_index("signal")
    sigmoid = 1 / (1 + math.exp(-0.5))  # 0.6225; the nearest sixteenth is 10/16
    for name in names:
        row = found.loc[name]
        assert row["sqnr_db"] == pytest.approx(20 * math.log10(sigmoid / abs(10 / 16 - sigmoid)), abs=1e-6)
        assert (row["largest"], row["format"], row["low"], row["high"]) == (pytest.approx(sigmoid), "u4.4", 0.0, 15 / 16)
        assert row["saturated"] == 0 and row["layer"] == "l0" and row["step"] == 0
    if kind == "GRU":  # b_hn is 0 there: no signal, no error
        assert found.loc["hidden_product", "sqnr_db"] == math.inf and found.loc["hidden_product", "largest"] == 0


def test_saturated_share_of_a_narrow_format():
    """h grows to 0.6 and more in two of four units; a format that ends at 0.4375 holds the others."""
    rnn = rnn_of("LSTM")
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
        rnn.bias_ih_l0.copy_(torch.tensor([9.0] * 4 + [-9.0] * 4 + [7.0, -7.0, 0.1, 0.0] + [9.0] * 4))
    x = torch.zeros(1, 3, 3, dtype=torch.float64)
    found = signal_errors(rnn, packed_of(rnn, [x], bits=8, hidden=QFormat(4, 4)), [x]).set_index("signal")
    hidden = found.loc["hidden"]
    assert (hidden["saturated"], hidden["low"], hidden["high"], hidden["format"]) == (0.5, -0.5, 0.4375, "4.4")
    assert hidden["largest"] == pytest.approx(math.tanh(math.tanh(7) / (1 + math.exp(-9))) / (1 + math.exp(-9)))
    assert found.loc["f", "saturated"] == 0  # 0 of an unsigned format is no end
    assert found.loc["i", "saturated"] == 1  # 1 - 2**-13 lies at 255/256


def test_what_is_exact_has_no_noise():
    rnn = rnn_of("GRU")
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
    x = torch.zeros(2, 1, 3, dtype=torch.float64)
    rows = signal_errors(rnn, packed_of(rnn, [x]), [x])
    assert (rows["sqnr_db"] == math.inf).all() and (rows["saturated"] == 0).all()  # gates are 1/2, all else 0


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "projected"])
def test_errors_of_a_layer_reach_the_layers_above_it(kind):
    options = {"proj_size": 2} if kind == "projected" else {}
    rnn = rnn_of(kind, num_layers=2, bidirectional=True, **options)
    batch, _ = batch_of([3, 2])
    packed = packed_of(rnn, [batch], bits=16, weight_bits=16)
    fine = signal_errors(rnn, packed, [batch])
    assert list(dict.fromkeys(fine["layer"])) == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert ("unprojected" in set(fine["signal"])) == (kind == "projected")
    assert fine["sqnr_db"].min() > 50 and fine["saturated"].max() < 0.5
    shared = {f"l0{end}": packed.layers[f"l0{end}"].signals | {"hidden": QFormat(4, 3)} for end in ("", "_reverse")}
    shared |= {f"l1{end}": packed.layers[f"l1{end}"].signals | {"input": QFormat(4, 3)} for end in ("", "_reverse")}
    rough = signal_errors(rnn, pack(rnn, uniform(rnn, Dense(), 16, shared)), [batch])
    worse = (rough["sqnr_db"] < fine["sqnr_db"] - 10).groupby([rough["layer"], rough["step"], rough["signal"]]).all()
    first = "i" if kind != "GRU" else "r"
    assert not worse["l0", 0, first] and worse["l0", 1, first]  # h comes back with the second step
    assert worse["l0", 0, "hidden"] and worse["l1", 0, "hidden"] and worse["l1_reverse", 0, "hidden"]


class WithState(nn.Module):
    """Gives its two recurrent modules their first states."""

    def __init__(self, kind):
        super().__init__()
        self.one, self.two = rnn_of(kind, 1), rnn_of(kind, 2)

    def forward(self, x, h, c):
        state = (h, c) if isinstance(self.one, nn.LSTM) else h
        return self.two(self.one(x, state)[0][:, :, :3], state)[0]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_states_that_are_given_and_modules_apart(kind):
    """The second module gets the float output of the first one, and both begin with the state."""
    model, state = WithState(kind), torch.full((1, 2, 4), 0.25, dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    packed = packed_of(model, [(x, state, state)], bits=12)
    rough = replace(packed, layers=packed.layers | {"one.l0": packed_of(model, [(x, state, state)], bits=4).layers["one.l0"]})
    fine, coarse = (signal_errors(model, p, [(x, state, state)]) for p in (packed, rough))
    two = fine["layer"] == "two.l0"
    assert fine[two].equals(coarse[two]) and (coarse.loc[~two, "sqnr_db"] < fine.loc[~two, "sqnr_db"]).mean() > 0.9
    h = state[0, 0].numpy()
    first = np.array([float_steps(model.one, "l0", x[:1, b].numpy(), h, h)[0]["hidden"] for b in range(2)])
    row = fine[(fine["layer"] == "one.l0") & (fine["signal"] == "hidden") & (fine["step"] == 0)].iloc[0]
    assert row["largest"] == pytest.approx(np.abs(first).max()) and row["sqnr_db"] > 20


def test_packed_models_of_other_models_are_refused():
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    lstm, gru = rnn_of("LSTM"), rnn_of("GRU")
    with pytest.raises(ValueError, match=r"signal_errors needs cell, .* \('LSTM', 3, 4, 4\) for l0, got \('GRU', 3, 4, 4\)"):
        signal_errors(lstm, packed_of(gru, [x]), [x])
    with pytest.raises(ValueError, match="signal_errors needs a model and its PackedModel, got a GRU as the second"):
        signal_errors(lstm, gru, [x])


# --- what a calibration saw


def test_share_beyond_by_hand():
    seen = _Magnitudes()
    seen.add(torch.tensor([[1.0, 2.0, 3.0, -4.0], [0.0, 0.0, 0.0, 0.0]]))
    assert seen.share_beyond(QFormat(3, 0)) == 0  # -4 to 3 holds everything
    assert seen.share_beyond(QFormat(3, 1)) == 3 / 8  # -2 to 1.5; zeros count as values
    assert seen.share_beyond(QFormat(2, 0, signed=False)) == 1 / 8  # 0 to 3: what is negative lies beyond
    seen.add(torch.full((2, 4), -3.0))
    assert seen.share_beyond(QFormat(3, 1)) == 11 / 16 and _Magnitudes().share_beyond(QFormat(3, 1)) == 0


def test_explain_by_hand():
    rnn = rnn_of("GRU", bidirectional=True)
    x = torch.zeros(3, 2, 3, dtype=torch.float64)
    x[:2, 0] = torch.tensor([[3.0, 0.2, -0.3], [-4.0, 0.0, 0.1]])
    batch = pack_padded_sequence(x, torch.tensor([2, 3]), enforce_sorted=False)
    observation = observe(rnn, [batch])
    formats = observation.formats(4)
    formats = {name: signals | {"input": QFormat(4, 2), "hidden": QFormat(4, 4)} for name, signals in formats.items()}
    rows = pd.DataFrame(observation.explain(formats)).set_index(["layer", "signal"])
    assert list(rows.index) == [(name, signal) for name in ("l0", "l0_reverse") for signal in formats["l0"]]
    for layer in ("l0", "l0_reverse"):
        row = rows.loc[(layer, "input")]
        assert row.tolist() == [4, 2, True, -2.0, 1.75, 4.0, pytest.approx(100 * 2 / 15)]
    row, sequences = rows.loc["l0", "hidden"], [x[:2, 0].numpy(), x[:, 1].numpy()]
    steps = [step for xs in sequences for step in (*float_steps(rnn, "l0", xs), *float_steps(rnn, "l0_reverse", xs[::-1]))]
    hidden = np.array([step[name] for step in steps for name in ("n", "hidden")])  # what has that format
    beyond = ((hidden > 7 / 16) | (hidden < -8 / 16)).mean()
    assert 0.1 < beyond < 1 and row["beyond the range %"] == pytest.approx(100 * beyond)
    assert row["largest seen"] == pytest.approx(np.abs(hidden).max())  # of both directions: they share the format
    assert rows.loc["l0", "hidden"].equals(rows.loc["l0_reverse", "hidden"])
    assert not rows.loc["l0", "sigmoid"]["signed"] and rows.loc["l0", "sigmoid"]["smallest"] == 0
