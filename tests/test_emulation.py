"""Quantisation-aware training: the engine in float64, gradients of a literal straight-through cell and torch's own."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from workbench.constrain import attach, bake, compress, pack
from workbench.emulation import QuantisedGRU, QuantisedLSTM, attach_emulated, emulate, mismatch_rate, quantise_signals
from workbench.fixedpoint import QFormat
from workbench.gates import blocks, cell_name, layers
from workbench.methods import BlockCirculant, Dense, LowRank, TopK
from workbench.models import SequenceClassifier
from workbench.packed import signals_of
from workbench.plan import BlockPlan, Plan, uniform
from workbench.quantise import calibrate
from workbench.train import evaluate, fit

INPUTS, UNITS, STEPS, BATCH = 5, 6, 7, 4
KINDS = {  # name -> cell, its arguments
    "LSTM": (nn.LSTM, {}),
    "LSTM without bias": (nn.LSTM, {"bias": False}),
    "projected LSTM": (nn.LSTM, {"proj_size": 3}),
    "two bidirectional projected LSTM layers": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    "GRU": (nn.GRU, {}),
    "GRU without bias": (nn.GRU, {"bias": False}),
    "two bidirectional GRU layers": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
}
ONE_LAYER = [name for name in KINDS if not name.startswith("two")]
ACTIVATIONS = ("linear", "exact", "hard")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(kind, spread=1.0, **more):
    cell, arguments = KINDS[kind]
    rnn = cell(INPUTS, UNITS, **arguments | more).double()
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.copy_(torch.randn_like(parameter) * spread)
    return rnn


def random_plan(rnn, rng, activation="linear", narrow=False):
    """A format of its own for every block and signal; both directions share hidden, which is the next layer's input."""

    def draw(bits, integer_bits, most_frac, signed=True):
        bits = int(rng.integers(*bits))
        return QFormat(bits, min(bits - signed - int(rng.integers(*integer_bits)), most_frac), signed)

    signals, width = {}, (3, 6) if narrow else (3, 17)
    for layer in layers(rnn).values():
        found = {name: draw(width, (0, 3), 13) for name in signals_of(cell_name(rnn), bool(rnn.proj_size))}
        if narrow:
            found |= {name: draw(width, (-2, 1), 13) for name in ("hidden", "unprojected") if name in found}  # they saturate
        found["sigmoid"] = draw(width, (0, 2), 16, signed=bool(rng.integers(2)))
        found["input"] = draw(width, (-2, 9), 13)  # sums coarser than what they are rounded to, too
        if layer.reverse:
            found |= {name: signals[layer.name.removesuffix("_reverse")][name] for name in ("input", "hidden")}
        if layer.index:
            found["input"] = signals[layer.name.replace("l1", "l0")]["hidden"]
        signals[layer.name] = found
    return Plan({name: BlockPlan(Dense(), draw((2, 10), (1, 4), 13)) for name in blocks(rnn)}, signals, activation)


def fine_plan(rnn):
    """16-bit weights and signals."""
    return replace(uniform(rnn, Dense(), 16, calibrate(rnn, [torch.randn(STEPS, BATCH, INPUTS).double()])), activation="exact")


def states_of(rnn, batch=BATCH):
    count = rnn.num_layers * (2 if rnn.bidirectional else 1)
    h, c = (torch.randn(count, batch, size).double() for size in (rnn.proj_size or UNITS, UNITS))
    return (h, c) if isinstance(rnn, nn.LSTM) else h


def packed_sequence(x, lengths, batch_first=False):
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=False)


def tensors(result):
    """Everything that a recurrent module returns, as a flat list."""
    output, states = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(states if isinstance(states, tuple) else (states,))]


def assert_same(first, second):
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(a, b)


# --- equal to the integer engine


def test_the_fft_datapath_is_refused():
    rnn = make("LSTM")
    plan = uniform(rnn, BlockCirculant(2, "fft"), 6, calibrate(rnn, [torch.randn(STEPS, BATCH, INPUTS).double()], 10))
    with pytest.raises(ValueError, match="exactly, as the datapath time does, not fft: train with the one .* weight_ih_l0.i,"):
        emulate(rnn, plan)


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_in_float64_is_the_engine_too(kind):
    """Also after training, which moves the factors; the sums of a product have twice their fraction bits."""
    rnn, x = make(kind), torch.randn(STEPS, BATCH, INPUTS).double()
    plan = uniform(rnn, LowRank(2), 6, calibrate(rnn, [x], 10))
    emulated = emulate(rnn, plan)
    for _ in range(2):
        packed = pack(emulated, plan)
        assert_same(attach(emulated, packed)(x), emulated(x))
        assert all(row["mismatches %"] == 0 for row in mismatch_rate(emulated, packed, [x]))
        optimizer = torch.optim.SGD(emulated.parameters(), 1.0)
        emulated(x)[0].square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_float64_it_is_the_engine_bit_for_bit(kind, activation):
    values = set()
    for seed in range(2):
        rnn, rng = make(kind), np.random.default_rng(seed)
        plan = random_plan(rnn, rng, activation)
        emulated, engine = emulate(rnn, plan), attach(rnn, pack(rnn, plan))
        x, states = 2 * torch.randn(STEPS, BATCH, INPUTS).double(), states_of(rnn)
        assert_same(emulated(x), engine(x))
        assert_same(emulated(x, states), engine(x, states))
        sequences = packed_sequence(x, [3, STEPS, 1, 5])
        assert_same(emulated(sequences, states), engine(sequences, states))
        values |= set(emulated(x)[0].flatten().tolist())
    assert len(values) > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [Dense(), TopK(0.3), BlockCirculant, LowRank(2)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attached_in_float64_it_is_the_attached_engine(kind, method, batch_first):
    """In a model in float32, whose own weights do not matter any more: not even those of a dropout in training mode."""
    rnn = make(kind, batch_first=batch_first, **({"dropout": 0.5} if kind.startswith("two") else {}))
    x, states = torch.randn(BATCH, BATCH, INPUTS), states_of(rnn)
    states = tuple(s.float() for s in states) if isinstance(states, tuple) else states.float()
    method = BlockCirculant(rnn.proj_size or 2) if method is BlockCirculant else method
    packed = pack(rnn, uniform(rnn, method, 8, calibrate(rnn, [x.double()], 8)))
    rnn.float()
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
    engine, emulated = attach(rnn, packed), attach_emulated(rnn, packed).train()
    lengths = [4, 2, 1, 3]
    for arguments in ((x,), (x, states), (x[0],), (packed_sequence(x, lengths, batch_first), states)):
        assert_same(engine(*arguments), emulated(*arguments))
        assert all(t.dtype == torch.float32 for t in tensors(emulated(*arguments)))
    assert len(emulated(x)[0].unique()) > 10
    assert (emulated.hidden_size, emulated.bidirectional) == (rnn.hidden_size, rnn.bidirectional)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda(kind):
    rnn, x = make(kind), torch.randn(STEPS, BATCH, INPUTS)
    packed = pack(rnn, uniform(rnn, TopK(0.5), 8, calibrate(rnn, [x.double()], 8)))
    rnn.float()
    found = attach_emulated(rnn, packed).to("cuda")(x.to("cuda"))
    for a, b in zip(tensors(attach(rnn, packed)(x)), tensors(found), strict=True):
        assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_narrow_signals_saturate_as_the_engine_does(kind):
    for seed in range(6):
        rnn = make(kind, spread=3.0)
        plan = random_plan(rnn, np.random.default_rng(seed), narrow=True)
        x = 4 * torch.randn(STEPS, BATCH, INPUTS).double()
        assert_same(emulate(rnn, plan)(x), attach(rnn, pack(rnn, plan))(x))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "two bidirectional GRU layers"])
def test_every_form_of_arguments_that_torch_takes(kind, batch_first):
    rnn = make(kind, batch_first=batch_first)
    plan = fine_plan(rnn)
    emulated, engine = emulate(rnn, plan), attach(rnn, pack(rnn, plan))
    x, states = torch.randn(BATCH, STEPS, INPUTS).double(), states_of(rnn, BATCH if batch_first else STEPS)
    one = tuple(s[:, 0] for s in states) if isinstance(states, tuple) else states[:, 0]
    for arguments in ((x,), (x, states), (x[0],), (x[0], one)):
        assert_same(emulated(*arguments), engine(*arguments))
        assert [t.shape for t in tensors(emulated(*arguments))] == [t.shape for t in tensors(rnn(*arguments))]
    lengths = [4, 7, 2, 7] if batch_first else [4, 2, 1, 3, 4, 1, 2]
    result = emulated(input=packed_sequence(x, lengths, batch_first), hx=states)
    assert_same(result, engine(packed_sequence(x, lengths, batch_first), states))
    expected = rnn(packed_sequence(x, lengths, batch_first), states)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(result[0], name), getattr(expected[0], name))


# --- gradients


def straight(x, fmt):
    """Rounds the values of x to fmt; the gradient passes where they do not saturate."""
    t = x.detach() * 2.0**fmt.frac
    values = torch.from_numpy(fmt.dequantise(fmt.quantise(x.detach().numpy())))
    passed = x * ((t >= fmt.min - 0.5) & (t < fmt.max + 0.5))
    return passed + (values - passed).detach()


def activation(table, x, in_fmt, out_fmt):
    """Looks values of in_fmt up; the gradient is that of the function that the table stands for."""
    values = torch.from_numpy(out_fmt.dequantise(table.lookup(in_fmt.quantise(x.detach().numpy()), in_fmt, out_fmt)))
    if type(table).__name__ == "HardTable":
        smooth = (x / 4 + 0.5).clamp(0, 1) if table.function == "sigmoid" else x.clamp(-1, 1)
    else:
        smooth = getattr(torch, table.function)(x)
    return smooth + (values - smooth).detach()


def reference(rnn, layer, x, h, c=None):
    """One layer step by step, in values; torch differentiates it. Returns every h, and the last c."""
    s, tables = layer.signals, layer.tables
    gates = layer.gates
    biases = dict.fromkeys(layer.bias, 0.0)
    if rnn.bias:
        b_ih, b_hh = (dict(zip(gates, b.chunk(len(gates)), strict=True)) for b in (rnn.bias_ih_l0, rnn.bias_hh_l0))
        biases = {gate: b_ih[gate] + b_hh[gate] for gate in gates}
        if layer.cell == "GRU":
            biases |= {"n": b_ih["n"], "hn": b_hh["n"]}
        biases = {gate: straight(b, QFormat(32, layer.bias_fracs[gate])) for gate, b in biases.items()}
    w_ih, w_hh = (dict(zip(gates, w.chunk(len(gates)), strict=True)) for w in (rnn.weight_ih_l0, rnn.weight_hh_l0))

    def gate(function, out, sums):
        return activation(tables[function], straight(sums, s["pre"]), s["pre"], s[out])

    x, h = straight(x, s["input"]), straight(h, s["hidden"])
    c = None if c is None else straight(c, s["cell"])
    outputs = []
    for step in x:
        sums = {name: step @ w_ih[name].T + biases[name] for name in gates}
        if layer.cell == "LSTM":
            i, f, g, o = (gate(*(["tanh"] if n == "g" else ["sigmoid"]) * 2, sums[n] + h @ w_hh[n].T) for n in gates)
            c = straight(f * c + i * g, s["cell"])
            m = o * activation(tables["tanh"], c, s["cell"], s["tanh"])
            h = straight(straight(m, s["unprojected"]) @ rnn.weight_hr_l0.T if rnn.proj_size else m, s["hidden"])
        else:
            r, z = (gate("sigmoid", "sigmoid", sums[n] + h @ w_hh[n].T) for n in "rz")
            product = straight(h @ w_hh["n"].T + biases["hn"], s["hidden_product"])
            n = gate("tanh", "hidden", sums["n"] + r * product)
            h = straight((1 - z) * n + z * h, s["hidden"])
        outputs.append(h)
    return torch.stack(outputs), c


def plain_weights(rnn, plan):
    """A copy with the constrained values as plain parameters, and the packed layer of its one layer."""
    return bake(compress(rnn, plan)), pack(rnn, plan).layers["l0"]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ONE_LAYER)
def test_gradients_are_those_of_the_literal_straight_through_cell(kind, activation, narrow):
    for seed in range(2):
        rnn = make(kind, spread=1.5 if narrow else 0.5)
        plan = random_plan(rnn, np.random.default_rng(seed), activation, narrow)
        rnn, layer = plain_weights(rnn, plan)
        states = [s[0].requires_grad_() for s in (states_of(rnn) if isinstance(rnn, nn.LSTM) else [states_of(rnn)])]
        x = torch.randn(STEPS, BATCH, INPUTS).double().requires_grad_()
        leaves = [x, *states, *rnn.parameters()]
        expected, c = reference(rnn, layer, x, *states)
        quantise_signals(rnn, {"l0": layer})
        hx = tuple(s[None] for s in states)
        output, hx = rnn(x, hx if len(hx) > 1 else hx[0])
        assert torch.equal(output, expected)
        weight, last = torch.randn_like(output), [torch.randn_like(s) for s in states]
        h = hx[0] if c is not None else hx
        loss = (output * weight).sum() + (h[0] * last[0]).sum()
        wanted = (expected * weight).sum() + (expected[-1] * last[0]).sum()
        if c is not None:
            loss, wanted = loss + (hx[1][0] * last[1]).sum(), wanted + (c * last[1]).sum()
        for mine, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_with_fine_formats_gradients_are_torch_s(kind):
    rnn = make(kind, spread=0.4)
    plan = fine_plan(rnn)
    plain = bake(compress(rnn, plan))
    emulated = copy.deepcopy(plain)
    quantise_signals(emulated, pack(rnn, plan).layers)
    x, states = torch.randn(STEPS, BATCH, INPUTS).double(), states_of(rnn)
    sequences = packed_sequence(x, [3, STEPS, 1, 5])
    found = []
    for model in (plain, emulated):
        results = [*tensors(model(x.clamp(-1.5, 1.5), _small(states))), *tensors(model(sequences))]
        generator = torch.Generator().manual_seed(1)
        loss = sum((r * torch.randn(r.shape, generator=generator)).sum() for r in results)
        found.append((results, torch.autograd.grad(loss, list(model.parameters()))))
    for ours, theirs in zip(*(results + list(grads) for results, grads in found[::-1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-3, atol=3e-3)


def _small(states):
    return tuple(map(_small, states)) if isinstance(states, tuple) else states.clamp(-0.9, 0.9)


@pytest.mark.parametrize("kind", ["projected LSTM", "GRU"])
def test_a_graph_that_is_kept_may_be_differentiated_again(kind):
    rnn = make(kind)
    emulated = emulate(rnn, random_plan(rnn, np.random.default_rng(0)))
    loss = emulated(torch.randn(STEPS, BATCH, INPUTS).double())[0].square().sum()
    first, second = (torch.autograd.grad(loss, list(emulated.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and any(grad.any() for grad in first)


# --- models


class Two(nn.Module):
    """Two recurrent modules, one after the other."""

    def __init__(self):
        super().__init__()
        self.first = nn.GRU(INPUTS, UNITS, batch_first=True, bidirectional=True)
        self.second = nn.LSTM(2 * UNITS, UNITS, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(UNITS, 2)

    def forward(self, x, lengths=None):
        x, _ = self.first(x)
        if lengths is None:
            return self.head(self.second(x)[0])
        return self.head(self.second(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1][0][-1])


@pytest.fixture
def x():
    return torch.randn(BATCH, STEPS, INPUTS)


@pytest.fixture
def model():
    return Two().eval()


@pytest.fixture
def plan(model, x):
    return Plan({name: BlockPlan(TopK(0.5), QFormat(6, 5)) for name in blocks(model)}, calibrate(model, [x], bits=10))


def test_a_model_trains_and_then_runs_on_its_integers(model, plan, x):
    emulated = emulate(model, plan).train()
    optimizer, losses = torch.optim.Adam(emulated.parameters(), 0.02), []
    target = torch.randn(BATCH, STEPS, 2)
    for _ in range(30):
        with parametrize.cached():
            loss = (emulated(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    emulated = emulated.eval().double()
    packed = pack(emulated, plan)
    lengths = torch.tensor([3, STEPS, 1, 5])
    for arguments in ((x.double(),), (x.double(), lengths)):
        assert torch.equal(emulated(*arguments), attach(emulated, packed)(*arguments))
    assert all(row["mismatches %"] == row["largest ulp"] == 0 for row in mismatch_rate(emulated, packed, [x, (x, lengths)]))


def test_emulation_leaves_the_model_and_bake_undoes_it(model, plan, x):
    before, output = copy.deepcopy(model.state_dict()), model(x)
    emulated = emulate(model, plan)
    assert isinstance(emulated.first, QuantisedGRU) and isinstance(emulated.second, QuantisedLSTM)
    assert type(model.first) is nn.GRU and type(model.second) is nn.LSTM and torch.equal(model(x), output)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert list(emulated.state_dict()) == list(compress(model, plan).state_dict())
    assert not torch.equal(emulated(x), compress(model, plan)(x))
    for plain, expected in ((bake(emulated), bake(compress(model, plan))), (compress(emulated, plan), compress(model, plan))):
        assert torch.equal(plain(x), expected(x))
    assert type(bake(emulated).first) is nn.GRU and "rounding" not in vars(bake(emulated).first)
    assert torch.equal(emulate(emulated, plan)(x), emulated(x))


def test_dropout_acts_between_the_layers_in_training_only(model, plan, x):
    emulated = emulate(model, plan)
    assert torch.equal(emulated(x), emulated(x))
    emulated.train()
    assert not torch.equal(emulated(x), emulated(x))


def test_quantised_training_recovers_what_few_bits_cost(tiny_task):
    torch.manual_seed(0)
    model, train = SequenceClassifier(3, 8, 2), tiny_task.splits["train"]
    fit(model, tiny_task, seed=0, epochs=20, lr=0.02, progress=False)
    signals = calibrate(model, [(torch.from_numpy(train.x), torch.from_numpy(train.lengths))], bits=4, clip="mse")
    plan = uniform(model, Dense(), 2, signals)
    trained = emulate(model, plan)
    fit(trained, tiny_task, seed=0, epochs=20, lr=0.01, progress=False)
    one_shot = evaluate(attach(model, pack(model, plan)), tiny_task, "valid").loss
    retrained = evaluate(attach(trained, pack(trained, plan)), tiny_task, "valid").loss
    dense = evaluate(model, tiny_task, "valid").loss
    assert one_shot > dense + 0.03
    assert retrained < (one_shot + dense) / 2
    trained, x, lengths = trained.double().eval(), torch.from_numpy(train.x).double(), torch.from_numpy(train.lengths)
    assert torch.equal(trained(x, lengths), attach(trained, pack(trained, plan))(x, lengths))


# --- float32


def test_the_mismatch_of_float32_is_measured():
    rnn = nn.LSTM(64, 64, num_layers=2)
    x = torch.randn(20, 8, 64)
    plan = uniform(rnn, Dense(), 16, calibrate(rnn, [x]))
    emulated, packed = emulate(rnn, plan), pack(rnn, plan)
    rows = mismatch_rate(emulated, packed, [x, x.double()])  # floats are taken in the model's own dtype
    assert [row["layer"] for row in rows] == ["l0", "l1"] and all(row["outputs"] == 2 * x.numel() for row in rows)
    assert all(0 < row["mismatches %"] < 20 and 1 <= row["largest ulp"] < 8 for row in rows)
    off = (emulated(x)[0].double() - attach(rnn, packed)(x.double())[0]) * 2.0 ** packed.layers["l1"].signals["hidden"].frac
    assert rows[1]["mismatches %"] == 100 * off.count_nonzero() / off.numel() and rows[1]["largest ulp"] == off.abs().max()
    assert all(row["mismatches %"] == 0 for row in mismatch_rate(emulated.double(), packed, [x]))
    with pytest.raises(ValueError, match="mismatch_rate needs several batches, each the model's arguments, got one Tensor"):
        mismatch_rate(emulated, packed, x)
    other = pack(nn.LSTM(64, 64, num_layers=2), plan)
    assert all(row["mismatches %"] > 50 for row in mismatch_rate(emulated, other, [x]))


def test_steps_beyond_a_sequence_and_given_states_are_counted_right():
    rnn = make("two bidirectional GRU layers")
    emulated, packed = emulate(rnn, plan := random_plan(rnn, np.random.default_rng(1))), pack(rnn, plan)
    x = torch.randn(STEPS, BATCH, INPUTS).double()
    rows = mismatch_rate(emulated, packed, [(packed_sequence(x, [3, STEPS, 1, 5]), states_of(rnn))])
    assert [row["layer"] for row in rows] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert all(row["outputs"] == 16 * UNITS and row["mismatches %"] == 0 for row in rows)


# --- messages


def test_what_is_not_finite_is_named(model, plan, x):
    emulated = emulate(model, plan)
    with pytest.raises(ValueError, match="layer l0 needs finite values, got others in input"):
        emulated(torch.full_like(x, torch.nan))
    emulated(torch.full_like(x, torch.inf))  # saturates
    with torch.no_grad():
        emulated.first.bias_hh_l0_reverse[-1] = torch.nan
    with pytest.raises(ValueError, match="layer l0_reverse needs finite values, got others in bias hn"):
        emulated(x)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_autocast_does_not_make_it_coarser(kind):
    rnn, x = make(kind).float(), torch.randn(STEPS, BATCH, INPUTS)
    emulated = emulate(rnn, uniform(rnn, TopK(0.5), 8, calibrate(rnn, [x])))
    plain = emulated(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(emulated(x)[0], plain)
        from_other_layers = emulated(x.bfloat16())[0]
    assert torch.equal(from_other_layers, emulated(x.bfloat16().float())[0])
    from_other_layers.sum().backward()
    assert all(p.grad is not None for p in emulated.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_no_sequence_is_taken_as_torch_does(kind):
    rnn, x = make(kind), torch.randn(STEPS, 0, INPUTS, dtype=torch.float64)
    emulated = emulate(rnn, uniform(rnn, TopK(0.5), 8, calibrate(rnn, [torch.randn(STEPS, BATCH, INPUTS).double()])))
    output, states = emulated(x)
    expected, expected_states = rnn(x)
    flat, expected_flat = (s if isinstance(s, tuple) else (s,) for s in (states, expected_states))
    assert output.shape == expected.shape and [s.shape for s in flat] == [s.shape for s in expected_flat]
    output.sum().backward()
    assert not any(p.grad.any() for p in emulated.parameters())


def test_refusals(model, plan, x):
    with pytest.raises(ValueError, match=r"emulate of 'first' needs .* float32 or float64, .* got torch.bfloat16: train"):
        emulate(copy.deepcopy(model).bfloat16(), plan)
    emulated, packed = emulate(model, plan), pack(model, plan)
    for dtype in (torch.bfloat16, torch.float16):
        converted = copy.deepcopy(emulated).to(dtype)
        with pytest.raises(ValueError, match=rf"an emulated layer needs .* float32 or float64, .* got {dtype}: train in autoc"):
            converted(x.to(dtype))
        with pytest.raises(ValueError, match=rf"mismatch_rate needs weights in float32 or float64, .* got {dtype}"):
            mismatch_rate(converted, packed, [x])
    with pytest.raises(ValueError, match="mismatch_rate needs a model from emulate, got a plain nn.GRU 'first'"):
        mismatch_rate(compress(model, plan), packed, [x])
    with pytest.raises(ValueError, match="mismatch_rate needs a model and its PackedModel, got a Plan as the second"):
        mismatch_rate(emulated, plan, [x])
    for without in (emulated, attach(model, packed), attach_emulated(model, packed)):
        with pytest.raises(ValueError, match=r"a recurrent layer needs at least 1 time step, got an input of shape \("):
            without(x[:, :0])
    wide = {name: signals | {"pre": QFormat(21, 12)} for name, signals in plan.signals.items()}
    with pytest.raises(ValueError, match=r"every code of pre and needs at most 20 bits, got QFormat\(bits=21"):
        emulate(model, plan.with_signals(wide))
    emulated = emulate(model, plan)
    state = torch.zeros(1, 2, 3)
    for arguments, message in (([x[..., :3]], "input.size"), ([x.double()], "dtype"), ([x, state], "hidden size")):
        with pytest.raises((RuntimeError, ValueError), match=message):
            emulated.first(*arguments)
