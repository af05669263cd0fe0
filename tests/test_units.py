"""Hidden units: what is left computes what the full model does with the removed units at zero; scores and sizes by hand."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import workbench as wb
from workbench.gates import blocks, dense_weights, layers, rnns


class Tagger(nn.Module):
    """Recurrent layers whose output, padded again, goes to two heads; the last state goes nowhere."""

    def __init__(self, rnn, width):
        super().__init__()
        self.rnn, self.head, self.gate = rnn, nn.Linear(width, 3), nn.Linear(width, 1)

    def forward(self, x, lengths=None):
        if lengths is not None:
            packed = pack_padded_sequence(x, lengths, batch_first=self.rnn.batch_first, enforce_sorted=False)
            out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=self.rnn.batch_first)
        else:
            out, _ = self.rnn(x)
        return self.head(out) * self.gate(out).sigmoid()


HEADS = {"rnn": ["head", "gate"]}
FORMS = {
    "LSTM": nn.LSTM(3, 6),
    "GRU": nn.GRU(3, 6),
    "no biases": nn.LSTM(3, 6, bias=False),
    "two layers": nn.LSTM(3, 6, num_layers=2),
    "bidirectional": nn.GRU(3, 6, bidirectional=True, batch_first=True),
    "two bidirectional layers": nn.LSTM(3, 6, num_layers=2, bidirectional=True, batch_first=True),
    "projected": nn.LSTM(3, 6, num_layers=2, bidirectional=True, proj_size=2),
}


def tagger(form):
    torch.manual_seed(0)
    rnn = FORMS[form]
    for parameter in rnn.parameters():
        nn.init.normal_(parameter)
    return Tagger(rnn, (rnn.proj_size or rnn.hidden_size) * (1 + rnn.bidirectional)).double()


def units_zero(model, removed):
    """The full model in which nothing takes the h of the removed units: layer name -> units."""
    model = wb.bake(model)
    with torch.no_grad():
        for name, layer in layers(model).items():
            rnn, units = rnns(model)[layer.rnn], removed[name]
            places = torch.tensor(units) + rnn.hidden_size * layer.reverse
            if rnn.proj_size:
                getattr(rnn, f"weight_hr_{layer.suffix}")[:, units] = 0
                continue
            getattr(rnn, f"weight_hh_{layer.suffix}")[:, units] = 0
            above = [f"weight_ih_l{layer.index + 1}{end}" for end in ("", "_reverse")]
            above = [getattr(rnn, parameter) for parameter in above if hasattr(rnn, parameter)]
            for w in above or [model.head.weight, model.gate.weight]:
                w[:, places] = 0
    return model


@pytest.mark.parametrize("form", FORMS)
def test_the_outputs_are_those_of_the_full_model_with_the_units_at_zero(form):
    model = tagger(form)
    kept = {name: sorted(torch.randperm(6, generator=torch.Generator().manual_seed(n))[:4].tolist())
            for n, name in enumerate(layers(model))}
    before = {name: p.clone() for name, p in model.state_dict().items()}
    smaller = wb.remove_units(model, kept, None if form == "projected" else HEADS)
    full = units_zero(model, {name: [u for u in range(6) if u not in units] for name, units in kept.items()})
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    for arguments in ((x,), (x, torch.tensor([2, 4, 1, 3, 4][: 5 if model.rnn.batch_first else 4]))):
        torch.testing.assert_close(smaller(*arguments), full(*arguments), rtol=0, atol=1e-14)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert smaller.rnn.hidden_size == 4 and all(b.shape[0] in (4, 2) for b in blocks(smaller).values())
    assert {type(p) for p in smaller.parameters()} == {nn.Parameter} and str(4) in repr(smaller.rnn)


@pytest.mark.parametrize("form", ["bidirectional", "two bidirectional layers"])
def test_the_order_in_which_layers_are_named_does_not_matter(form):
    model = tagger(form)
    kept = {name: [n % 3, 3, 4 + n % 2] for n, name in enumerate(layers(model))}
    one, other = wb.remove_units(model, kept, HEADS), wb.remove_units(model, dict(reversed(kept.items())), HEADS)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_zero_means_the_h_of_every_step(cell):
    """The reference above by the letter: after each step the h of the removed units is set to zero."""
    model = tagger(cell)
    kept = [0, 3, 4]
    smaller = wb.remove_units(model, {"rnn.l0": kept}, HEADS)
    x, state, outputs = torch.randn(7, 2, 3, dtype=torch.float64), None, []
    for frame in x:
        out, state = model.rnn(frame[None], state)
        keep = torch.zeros(6, dtype=torch.float64).index_fill_(0, torch.tensor(kept), 1)
        state = (state[0] * keep, state[1]) if cell == "LSTM" else state * keep
        outputs.append(out * keep)
    expected = torch.cat(outputs)
    torch.testing.assert_close(smaller.rnn(x)[0], expected[:, :, kept], rtol=0, atol=1e-14)
    torch.testing.assert_close(smaller(x), model.head(expected) * model.gate(expected).sigmoid(), rtol=0, atol=1e-14)


def test_scores_by_hand():
    """One feature, two units, GRU without biases; a head. Unit 0: W_ih 1 2 3, its rows of W_hh (own weights 1, 1, 1, from
    unit 1 2, 0, 0), its column of W_hh below that (0, 3, 0), head 4: squares 14 + 3 + 4 + 9 + 16 = 46. Unit 1: W_ih 0, rows of
    W_hh the 3 and its own 0, 0, 5; column the 2; head 0: 9 + 25 + 4 = 38."""
    model = Tagger(nn.GRU(1, 2, bias=False), 2)
    with torch.no_grad():
        model.rnn.weight_ih_l0.copy_(torch.tensor([[1.0], [0], [2], [0], [3], [0]]))  # rows r0 r1 z0 z1 n0 n1
        model.rnn.weight_hh_l0.copy_(torch.tensor([[1.0, 2], [0, 0], [1, 0], [3, 0], [1, 0], [0, 5]]))
        model.head.weight.copy_(torch.tensor([[4.0, 0], [0, 0], [0, 0]]))
        model.gate.weight.zero_()
    scores = wb.unit_scores(model, HEADS)
    torch.testing.assert_close(scores, {"rnn.l0": torch.tensor([46.0, 38.0]).sqrt()})
    assert wb.remove_units(model, 1, HEADS).rnn.weight_ih_l0.tolist() == [[1], [2], [3]]


def test_scores_count_what_takes_the_unit_in_the_layer_above_and_the_projection():
    for form, columns in (("two bidirectional layers", ["weight_ih_l1", "weight_ih_l1_reverse"]),
                          ("projected", ["weight_hr_l0"])):
        model = tagger(form)
        before = wb.unit_scores(model, HEADS)
        with torch.no_grad():
            for parameter in columns:
                getattr(model.rnn, parameter)[:, 2] *= 100
        after = wb.unit_scores(model, HEADS)
        assert (after["rnn.l0"] > 10 * before["rnn.l0"]).nonzero().tolist() == [[2]]
        assert list(after) == list(layers(model))


def test_ratios_start_from_the_original_when_it_is_given(tiny_task, tmp_path):
    """16 units of 3 features: 4 * 16 * 19 = 1,216 weights; of 5 units 4 * 5 * 8 = 160, in 8 bits: 1,216 * 32 / 1,280."""
    model = wb.build_classifier(tiny_task, 16, seed=0)
    smaller = wb.remove_units(model, 5)  # the classifier is known
    assert smaller.lstm.hidden_size == smaller.classifier.in_features == 5
    plan = wb.uniform(smaller, wb.Dense(), 8, wb.calibrate(smaller, [(torch.randn(2, 4, 3), torch.tensor([4, 4]))]))
    packed = wb.pack(smaller, plan, original=model)
    assert (packed.cr_disk, packed.cr_bits, packed.cr_params) == (30.4, 30.4, 7.6)
    # The rest in 32 bits: 4 * 16 merged biases and 16 * 2 + 2 of the head, after it 4 * 5 and 5 * 2 + 2.
    assert packed.cr_model == 32 * (1216 + 64 + 34) / (1280 + 32 * (20 + 12))
    read = wb.load(packed.save(tmp_path / "model"))
    assert read.cr_disk == 30.4 and read.cr_model == packed.cr_model and read.dense_weights == 160
    assert wb.pack(smaller, plan).cr_disk == 4
    rnns = [torch.nn.LSTM(3, 5), torch.nn.LSTM(3, 5)]
    one, other = torch.nn.ModuleDict({"a": rnns[0], "b": rnns[1]}), torch.nn.ModuleDict({"b": rnns[1], "a": rnns[0]})
    two = wb.Plan({f"{name}.{block.removeprefix('lstm.')}": entry for name in "ab" for block, entry in plan.blocks.items()},
                  {f"{name}.l0": plan.signals["lstm.l0"] for name in "ab"})
    assert wb.pack(one, two, original=other).cr_disk == wb.pack(one, two).cr_disk  # in whatever order modules were added
    with pytest.raises(ValueError, match=r"has blocks at least as large, got \(4, 3\) for the \(5, 3\) of lstm.weight_ih_l0.i"):
        wb.pack(smaller, plan, original=wb.remove_units(model, 4))
    for other, message in ((torch.nn.LSTM(4, 16), "with the same layers, got one with the blocks weight_ih_l0.i, "),
                           (torch.nn.ModuleDict({"lstm": torch.nn.LSTM(4, 16)}), "takes the same inputs, got 4 for 3")):
        with pytest.raises(ValueError, match=f"pack needs as original the model before remove_units, .*{message}"):
            wb.pack(smaller, plan, original=other)
    with pytest.raises(ValueError, match="PackedModel needs a whole number of original weights of at least 0, got 1.5"):
        packed.with_original(1.5, 0)
    for damaged in ([], [96], [96, 3, 1], 96):
        with pytest.raises(ValueError, match="PackedModel needs as original the numbers of weights and other parameters, got "):
            replace(packed, metadata={"original": damaged})


def test_what_is_smaller_goes_the_whole_way(tiny_task):
    model = wb.build_classifier(tiny_task, 16, seed=0, cell="GRU", num_layers=2, bidirectional=True)
    smaller = wb.remove_units(wb.compress(model, wb.uniform(model, wb.TopK(0.5), 8, signals_of(model))), 8)
    assert not any(parametrize.is_parametrized(m) for m in smaller.modules())
    assert dense_weights(blocks(smaller)) == 3 * 2 * (8 * 11 + 8 * 24)
    compressed = wb.compress(smaller, wb.uniform(smaller, wb.BlockCirculant(4), 8, signals_of(smaller)))
    wb.fit(compressed, tiny_task, seed=0, epochs=1, progress=False)
    packed = wb.pack(compressed, plan := wb.uniform(smaller, wb.BlockCirculant(4), 8, signals_of(compressed)))
    assert plan.blocks.keys() == packed.blocks.keys()
    assert wb.evaluate(wb.attach(compressed, packed), tiny_task, "valid").losses.shape == (40,)


def signals_of(model):
    return wb.calibrate(model, [(torch.randn(2, 4, 3), torch.tensor([4, 4]))])


def test_another_recurrent_module_may_take_the_output():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.GRU(3, 4, bidirectional=True), nn.LSTM(8, 5, bidirectional=True)
            self.head = nn.Linear(10, 2)

        def forward(self, x):
            return self.head(self.decoder(self.encoder(x)[0])[0])

    torch.manual_seed(0)
    model = Both()
    consumers = {"encoder": ["decoder"], "decoder": ["head"]}
    smaller = wb.remove_units(model, 3, consumers)
    sizes = [(m.input_size, m.hidden_size, m.weight_ih_l0_reverse.shape[1]) for m in (smaller.encoder, smaller.decoder)]
    assert sizes == [(3, 3, 3), (6, 3, 6)] and smaller(torch.randn(2, 1, 3)).shape == (2, 1, 2)
    only = wb.remove_units(model, {"encoder.l0": [1, 2], "encoder.l0_reverse": [0, 3]}, {"encoder": ["decoder"]})
    assert torch.equal(only.decoder.weight_ih_l0, model.decoder.weight_ih_l0[:, [1, 2, 4, 7]])
    assert torch.equal(only.head.weight, model.head.weight) and only.decoder.hidden_size == 5


def test_a_recurrent_module_alone_has_nothing_outside():
    rnn = nn.LSTM(3, 4)
    assert wb.remove_units(rnn, 2)(torch.randn(5, 1, 3))[0].shape == (5, 1, 2)


def head(width=6, **modules):
    model = Tagger(nn.LSTM(3, 6), width)
    for name, module in modules.items():
        setattr(model, name, module)
    return model


def same():
    model = head()
    model.same = model.head
    return model


def unknown():
    model = head()
    model.rnn.weight_ih_l0.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(("model", "keep", "consumers", "message"), [
    (head(), 3, None, r"to know what takes the output of 'rnn': give consumers=\{'rnn': \[...\]\}; nn.Linear of 6 features are "
                      "head, gate"),
    (head(), 3, {"lstm": []}, "needs consumers of the recurrent modules rnn, got those of lstm"),
    (head(), 3, {"rnn": ["head", "head"]}, "needs each consumer once, got 'head' twice"),
    (head(rnn=nn.LSTM(3, 6), other=nn.GRU(3, 6)), 3, {"rnn": ["head"], "other": ["head"]},
     "needs each consumer once, got 'head' twice"),
    (same(), 3, {"rnn": ["head", "same"]}, "needs each consumer once, got 'same' as 'head' and as 'same'"),
    (head(), 3, {"rnn": "head"}, r"consumers as {module path: \[module paths\]}, got {'rnn': 'head'}"),
    (head(), 3, {"rnn": None}, r"consumers as {module path: \[module paths\]}, got {'rnn': None}"),
    (head(), 3, ["head"], r"consumers as {module path: \[module paths\]}, got \['head'\]"),
    (head(), 3, {"rnn": [3]}, r"consumers as {module path: \[module paths\]}, got {'rnn': \[3\]}"),
    (head(), 3, {"rnn": ["tail", "more"]}, "the consumer 'tail' of 'rnn' is no module of the model"),
    (head(), 3, {"rnn": ["tail"]}, "the consumer 'tail' of 'rnn' is no module of the model"),
    (head(norm=nn.LayerNorm(6)), 3, {"rnn": ["norm"]}, "the consumer 'norm' of 'rnn' is an nn.LayerNorm"),
    (head(7), 3, HEADS, "needs a consumer of the 6 features of 'rnn', 'head' takes 7"),
    (head(head=nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))), 3, HEADS,
     "needs plain weights, and the consumer 'head' of 'rnn' is parametrized"),
    (wb.LanguageModel(9, 6), 3, None, "the consumer 'embedding' of 'lstm' is an nn.Embedding"),
    (head(), 0, HEADS, "needs a whole number of units to keep of at least 1, got 0"),
    (head(), 0.5, HEADS, "needs a whole number of units to keep of at least 1, got 0.5"),
    (head(), 7, HEADS, "cannot keep 7 units of rnn.l0, which has 6"),
    (head(), {"rnn.l1": [0]}, HEADS, "knows the layers rnn.l0, got rnn.l1"),
    (head(), {1: [0]}, HEADS, "knows the layers rnn.l0, got 1"),
    (head(), 3, {1: ["head"]}, "needs consumers of the recurrent modules rnn, got those of 1"),
    (head(), {"rnn.l0": torch.tensor([[0, 1]])}, HEADS, r"needs different units of rnn.l0 from 0 to 5, .* got \[tensor"),
    (unknown(), 3, HEADS, "needs finite weights to choose units by, got others in rnn.l0"),
    (head(), {"rnn.l0": [0, 0]}, HEADS, r"needs different units of rnn.l0 from 0 to 5, at least one, got \[0, 0\]"),
    (head(), {"rnn.l0": [1, 6, -1]}, HEADS, r"from 0 to 5, at least one, got \[6, -1\]"),
    (head(), {"rnn.l0": []}, HEADS, r"at least one, got \[\]"),
    (head(rnn=nn.LSTM(3, 6, num_layers=2)), {"rnn.l0": [0, 1], "rnn.l1": [0]}, HEADS,
     "needs equally many units in every layer of 'rnn', which has one hidden size, got 2 of rnn.l0, 1 of rnn.l1"),
    (head(rnn=nn.LSTM(3, 6, num_layers=2)), {"rnn.l0": [0, 1]}, HEADS, "got 2 of rnn.l0, 0 of rnn.l1"),
    (head(rnn=nn.LSTM(3, 6, proj_size=2)), 2, None, "needs to keep more units of 'rnn' than its proj_size 2, got 2"),
    (head(rnn=nn.RNN(3, 6)), 3, HEADS, "'rnn' is an nn.RNN: the workbench takes nn.LSTM and nn.GRU"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(model, keep, consumers, message):
    with pytest.raises(ValueError, match=message):
        wb.remove_units(model, keep, consumers)


class Reader(nn.Module):
    """A head over what `read` makes of the output and the last states."""

    def __init__(self, read, kind=nn.LSTM, width=6, **options):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.norm, self.head = kind(3, 6, **options), nn.LayerNorm(6), nn.Linear(width, 2)
        self.read = read

    def forward(self, x):
        return self.head(self.read(self, *self.rnn(x)))


class Pair(nn.Module):
    """The state of one module is the first of another."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.head = kind(3, 6), kind(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return {"out": [self.head(self.decoder(x, self.encoder(x)[1])[0])]}


PAIR, READ = {"encoder": [], "decoder": ["head"]}, {"rnn": ["head"]}
DEPENDS = "in which nothing but the consumers depends on the units that go: without them an output of magnitude .* changes by"


@pytest.mark.parametrize(("model", "keep", "consumers", "message"), [
    (Reader(lambda self, o, h: o), 4, READ, None),
    (Reader(lambda self, o, h: o, bias=False, num_layers=2), 4, READ, None),
    (Reader(lambda self, o, h: o, nn.GRU, num_layers=2, dropout=0.5), 4, READ, None),
    (Reader(lambda self, o, h: torch.cat([*h], -1), nn.GRU, 12, bidirectional=True), 4, READ, None),
    (Reader(lambda self, o, h: h[1][-1]), 4, READ, None),  # the last c
    (Reader(lambda self, o, h: o * torch.rand(())), 4, READ, None),  # drawn alike for both
    (Reader(lambda self, o, h: o, width=2, proj_size=2), 4, None, None),
    (Pair(nn.LSTM), {"encoder.l0": [1, 2, 5], "decoder.l0": [1, 2, 5]}, PAIR, None),
    (Pair(nn.LSTM), {"encoder.l0": [1, 2, 5], "decoder.l0": [1, 2, 4]}, PAIR, DEPENDS),
    (Pair(nn.GRU), 3, PAIR, DEPENDS),
    (Reader(lambda self, o, h: h[0], nn.GRU, num_layers=2), 4, READ, DEPENDS),  # of the lower layer
    (Reader(lambda self, o, h: torch.cat([h[1], h[0]], -1), nn.GRU, 12, bidirectional=True), 4, READ, DEPENDS),
    (Reader(lambda self, o, h: torch.cat([o[-1, :, :6], o[0, :, 6:]], -1), nn.GRU, 12, bidirectional=True), 3, READ, DEPENDS),
    (Reader(lambda self, o, h: o.sigmoid()), 4, READ, DEPENDS),
    (Reader(lambda self, o, h: o - o.mean(-1, keepdim=True)), 4, READ, DEPENDS),
    (Reader(lambda self, o, h: self.norm(o)), 4, READ, r"runs with fewer units, and it does not .* expected input with shape"),
    (nn.LSTM(3, 6), 4, None, "needs batches whose outputs do not have the size of the units, got none to compare"),
], ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_batches_show_what_else_depends_on_the_units(model, keep, consumers, message):
    batches, modes = [torch.randn(5, 2, 3), (torch.randn(1, 4, 3),)], [module.training for module in model.modules()]
    if message is None:
        assert rnns(wb.remove_units(model, keep, consumers, batches))
    else:
        with pytest.raises(ValueError, match=message):
            wb.remove_units(model, keep, consumers, batches)
        assert rnns(wb.remove_units(model, keep, consumers))  # without them it is not seen
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(("batches", "message"), [
    (torch.zeros(5, 2, 3), "remove_units needs several batches, each the model's arguments, got one Tensor"),
    (3, "remove_units needs batches, each the model's arguments, got 3"),
    ([], "remove_units needs at least one batch, got none"),
], ids=str)
def test_batches_that_are_none_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        wb.remove_units(head(), 3, HEADS, batches)


def test_a_head_that_shares_its_weights_is_refused():
    model = head(words=nn.Embedding(3, 6))
    model.head.weight = model.words.weight
    with pytest.raises(ValueError, match="needs weights of one module each, and 'head' shares its weight with 'words'"):
        wb.remove_units(model, 3, HEADS)


@pytest.mark.parametrize("units", [np.array([1, 4, 5]), torch.tensor([5, 1, 4]), [np.int64(1), 4, torch.tensor(5)]], ids=repr)
def test_units_may_be_numbers_of_numpy_and_torch(units):
    x, model = torch.randn(4, 2, 3).double(), tagger("LSTM")
    found, expected = (wb.remove_units(model, {"rnn.l0": kept}, HEADS) for kept in (units, [1, 4, 5]))
    assert torch.equal(found(x), expected(x))


@pytest.mark.parametrize("computed", [nn.utils.weight_norm, lambda head: prune.l1_unstructured(head, "weight", 0.5)],
                         ids=["weight_norm", "prune"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_head_whose_weight_is_computed_is_refused(computed):
    model = tagger("LSTM")
    computed(model.head)
    message = "plain weights, and weight of the consumer 'head' of 'rnn' is none, as of a pruned"
    with pytest.raises(ValueError, match=message):
        wb.remove_units(model, 4, HEADS)
    for context in (contextlib.nullcontext(), torch.no_grad()):
        with context:
            model(torch.randn(4, 2, 3).double())
        with pytest.raises(ValueError, match=message):
            wb.remove_units(model, 4, HEADS)


def test_a_number_of_units_for_one_layer_is_refused():
    with pytest.raises(ValueError, match="remove_units needs a list of the units of rnn.l0 that stay, got 5"):
        wb.remove_units(tagger("LSTM"), {"rnn.l0": 5}, HEADS)
