import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from workbench.constrain import IntegerRNN, attach, bake, compress, pack
from workbench.emulation import attach_emulated, emulate
from workbench.fixedpoint import QFormat
from workbench.gates import blocks, layers, weight
from workbench.methods import METHODS, BankBalanced, BlockCirculant, BlockSparse, Dense, LowRank, RowBalanced, Structured, TopK
from workbench.methods.pruning import Pruning
from workbench.packed import load
from workbench.plan import BlockPlan, Plan, uniform
from workbench.quantise import calibrate

pytestmark = pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")

# One method and format per gate, all different, so that no two gates can be exchanged unseen.
ENTRIES = {
    "i": BlockPlan(TopK(0.25), QFormat(8, 7)),
    "f": BlockPlan(BlockCirculant(4), QFormat(6, 6)),
    "g": BlockPlan(Dense(), QFormat(4, 3)),
    "o": BlockPlan(BlockCirculant(2), QFormat(5, 5)),
    "r": BlockPlan(BlockCirculant(4), QFormat(6, 6)),
    "z": BlockPlan(TopK(0.25), QFormat(8, 7)),
    "n": BlockPlan(Dense(), QFormat(5, 4)),
    "p": BlockPlan(BlockCirculant(2), QFormat(7, 7)),
}
KINDS = {"LSTM": (nn.LSTM, {}), "GRU": (nn.GRU, {}), "projected": (nn.LSTM, {"proj_size": 4})}
# 16-bit weights and signals: largest difference from the float layer over a few steps. The tables err by up to 2**-13.
CLOSE = {"rtol": 0, "atol": 2.0**-10}


def rnn_of(kind, num_layers=1, bidirectional=False, seed=1, **options):
    """6 inputs, 8 units, with a projection 4 outputs."""
    torch.manual_seed(seed)
    cls, more = KINDS[kind]
    return cls(6, 8, num_layers=num_layers, bidirectional=bidirectional, **more, **options)


class Tagger(nn.Module):
    """A recurrent module inside other modules, with an output layer."""

    def __init__(self, kind="LSTM", num_layers=1, bidirectional=False, bias=True):
        super().__init__()
        rnn = rnn_of(kind, num_layers, bidirectional, seed=0, batch_first=True, bias=bias)
        self.body = nn.ModuleDict({"rnn": rnn})
        self.head = nn.Linear((rnn.proj_size or 8) * (1 + bidirectional), 3)

    def forward(self, x):
        return self.head(self.body["rnn"](x)[0])


def mixed_plan(model):
    signals = calibrate(model, [torch.randn(5, 7, 6)])
    return Plan({name: ENTRIES[block.gate] for name, block in blocks(model).items()}, signals)


TAGGERS = {"LSTM": ("LSTM", 1, False), "GRU": ("GRU", 2, True), "projected": ("projected", 1, True)}
PLAIN = pytest.mark.parametrize("model", ["LSTM"], indirect=True)  # where numbers are by hand


@pytest.fixture(params=TAGGERS)
def model(request):
    return Tagger(*TAGGERS[request.param])


@pytest.fixture
def plan(model):
    return mixed_plan(model)


@pytest.fixture
def x():
    return torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(5))


def train(model, x, steps=3, rate=0.05):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    target = torch.randn(*x.shape[:-1], 3, generator=torch.Generator().manual_seed(6))
    for _ in range(steps):
        with parametrize.cached():
            loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def expected_block(w, entry):
    projected = entry.method.project(w.double()).numpy()
    return entry.format.dequantise(entry.format.quantise(projected))


# --- compress


def test_every_gate_gets_its_own_method_and_format(model, plan):
    constrained = bake(compress(model, plan))
    for name, entry in plan.blocks.items():
        np.testing.assert_array_equal(weight(constrained, name), expected_block(weight(model, name), entry), err_msg=name)


@PLAIN
def test_only_stored_values_are_parameters(model, plan):
    compressed = compress(model, plan)
    stored = sum(p.numel() for name, p in compressed.named_parameters() if "parametrizations" in name)
    # ih is 8 x 6: 12 kept, 2 x 2 tiles of 4, 48 dense, 4 x 3 tiles of 2; hh is 8 x 8: 16, 4 tiles of 4, 64, 16 tiles of 2
    assert stored == (12 + 16 + 48 + 24) + (16 + 16 + 64 + 32)
    assert pack(model, plan).cr_params == 4 * (48 + 64) / stored


def test_a_plan_may_be_json(model, plan, x):
    assert torch.equal(compress(model, plan.to_json())(x), compress(model, plan)(x))


def test_the_original_is_untouched_by_everything(model, plan, x):
    before, cls, output = copy.deepcopy(model.state_dict()), type(model.body["rnn"]), model(x)
    compressed = compress(model, plan)
    train(compressed, x)
    bake(model)
    attach(model, pack(model, plan))
    assert type(model.body["rnn"]) is cls and cls in (nn.LSTM, nn.GRU)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert torch.equal(model(x), output)


def test_the_constrained_model_is_untouched_by_bake_pack_attach_and_recompression(model, plan, x):
    compressed = train(compress(model, plan), x)
    before, output = copy.deepcopy(compressed.state_dict()), compressed(x)
    packed = pack(compressed, plan)
    bake(compressed)
    attach(compressed, packed)
    compress(compressed, plan)
    assert parametrize.is_parametrized(compressed.body["rnn"], "weight_hh_l0")
    assert all(torch.equal(w, before[name]) for name, w in compressed.state_dict().items())
    assert torch.equal(compressed(x), output)
    train(compressed, x)  # and it still trains
    assert not torch.equal(compressed(x), output)


def test_two_compressed_models_share_nothing(model, plan, x):
    first, second = compress(model, plan), compress(model, plan)
    output = second(x)
    train(first, x)
    assert torch.equal(second(x), output)
    bake(first)
    assert parametrize.is_parametrized(second.body["rnn"])


def test_training_stays_inside_the_set(model, plan, x):
    before, after = bake(compress(model, plan)), bake(train(compress(model, plan), x, steps=5))
    for name, entry in plan.blocks.items():
        w = weight(after, name)
        assert not torch.equal(w, weight(before, name))
        np.testing.assert_array_equal(w, expected_block(w, entry), err_msg=name)
        if isinstance(entry.method, TopK):
            support = entry.method.project(weight(model, name)) != 0
            assert not (w[~support] != 0).any()


def test_cached_and_uncached_steps_are_the_same(model, plan, x):
    cached, uncached = compress(model, plan), compress(model, plan)
    with parametrize.cached():
        output = cached(x)
    output.sum().backward()
    uncached(x).sum().backward()
    for one, other in zip(cached.parameters(), uncached.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch.equal(cached(x), uncached(x))


def test_a_step_is_seen_by_the_next_forward(model, plan, x):
    """Nothing may be cached across an optimizer step."""
    compressed = compress(model, plan)
    train(compressed, x, steps=1)
    with parametrize.cached():
        output = compressed(x)
    torch.testing.assert_close(output, bake(compressed)(x))


def test_recompression_bakes_first(model, plan, x):
    once = train(compress(model, plan), x)
    tighter = replace(plan, blocks=dict.fromkeys(plan.blocks, BlockPlan(TopK(0.125), QFormat(4, 3))))
    twice = compress(once, tighter)
    assert len(twice.body["rnn"].parametrizations["weight_hh_l0"]) == 1
    first, second = bake(once), bake(twice)
    for name, entry in tighter.blocks.items():
        np.testing.assert_array_equal(weight(second, name), expected_block(weight(first, name), entry))
    trained = bake(train(twice, x))
    assert all((weight(trained, n) != 0).sum() <= block.shape[0] * block.shape[1] / 8 for n, block in blocks(trained).items())


def test_a_compressed_model_moves_and_reloads(model, plan, x):
    compressed = train(compress(model, plan), x)
    other = compress(model, plan)
    other.load_state_dict(compressed.state_dict())
    assert torch.equal(other(x), compressed(x))
    assert compressed.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(("num_layers", "bidirectional"), [(1, False), (2, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_the_recurrent_module(kind, num_layers, bidirectional):
    rnn = rnn_of(kind, num_layers, bidirectional)
    plan = mixed_plan(rnn)
    compressed = compress(rnn, plan)
    x = torch.randn(5, 2, 6)
    compressed(x)[0].sum().backward()
    baked = bake(compressed)  # which copies it, after a forward that trains
    assert type(baked) is type(rnn)
    assert torch.equal(baked(x)[0], compressed(x)[0])
    assert isinstance(attach(compressed, pack(compressed, plan)), IntegerRNN)


# Every method, on the blocks of every kind: 8 x 6, 8 x 8, 8 x 4 and 8 x 16, and a projection's 4 x 8.
SAMPLES = [Dense(), TopK(0.3), RowBalanced(0.5), BankBalanced(0.5, 2), BlockSparse(0.5, 2), Structured(2), BlockCirculant(4),
           LowRank(2)]


@pytest.mark.parametrize("model", ["GRU", "projected"], indirect=True)
@pytest.mark.parametrize("method", SAMPLES, ids=lambda method: type(method).__name__)
def test_every_method_on_every_kind_of_block(model, x, method):
    plan = uniform(model, method, 8, calibrate(model, [x]))
    baked = bake(train(compress(model, plan), x, steps=1))
    plan = plan.with_signals(calibrate(baked, [x]))
    packed = pack(baked, plan)
    for name, block in packed.blocks.items():
        w = weight(baked, name)
        np.testing.assert_array_equal(np.ldexp(block.dense(), -block.frac), w, err_msg=name)
        if not isinstance(method, LowRank):  # whose product does not give back the factors that were rounded
            np.testing.assert_array_equal(w, expected_block(w, plan.blocks[name]), err_msg=name)
    assert packed.cr_disk > (3.9 if method == Dense() else 4.5)
    torch.testing.assert_close(attach(baked, packed).body["rnn"](x)[0], baked.body["rnn"](x)[0], **CLOSE)


@pytest.mark.parametrize("model", ["GRU", "projected"], indirect=True)
@pytest.mark.parametrize("method", SAMPLES, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("make", [compress, emulate])
def test_a_model_in_training_is_copied_between_two_steps(model, x, make, method):
    plan = uniform(model, method, 8, calibrate(model, [x]))
    trained = make(model, plan)
    average = AveragedModel(train(trained, x, steps=1), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    clone, before = copy.deepcopy(trained), trained(x)
    assert torch.equal(clone(x), before)
    train(clone, x, steps=2)
    assert torch.equal(trained(x), before) and not torch.equal(clone(x), before)
    average.update_parameters(trained)
    assert torch.equal(average(x), before)  # of the same twice
    assert torch.equal(train(trained, x, steps=2)(x), clone(x))
    average.update_parameters(trained)
    assert not torch.equal(average(x), trained(x))
    for one, other in zip(average.parameters(), trained.parameters(), strict=True):
        assert one.grad is None and one.shape == other.shape
    packed, again = (pack(baked, plan) for baked in (bake(clone), clone))
    assert packed.table() == again.table() == pack(trained, plan).table()
    bake(average.module)
    assert torch.equal(train(trained, x, steps=1)(x), train(clone, x, steps=1)(x))  # bake strips no class that they share


KEEPING = [method for method in SAMPLES if isinstance(method, Pruning)]


@pytest.mark.parametrize("model", ["GRU"], indirect=True)
@pytest.mark.parametrize("method", KEEPING, ids=lambda method: type(method).__name__)
def test_an_average_of_the_kept_positions_is_refused(model, x, method):
    """Torch averages whole numbers in floating point and cuts them off: they would be other positions."""
    plan = uniform(model, method, 8, calibrate(model, [x]))
    trained = compress(model, plan)
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        average.update_parameters(trained)
    with pytest.raises(ValueError, match=r"positions .* body\.rnn\.weight_ih_l0\.r keeps have changed .* \(use_buffers=False"):
        pack(average.module, plan)
    other = Tagger(*TAGGERS["GRU"])
    with torch.no_grad():
        for w in other.parameters():
            w.copy_(torch.randn_like(w) / 4)
    other = compress(other, plan)  # it keeps other positions, until it is given these
    for given in (average.module, other):
        given.load_state_dict(trained.state_dict())
        assert pack(given, plan).table() == pack(trained, plan).table()
    for wrong in (lambda support: support.float(), lambda support: support.flip(0), lambda support: support * 0):
        spoilt = {name: wrong(w) if name.endswith("support") else w for name, w in trained.state_dict().items()}
        with pytest.raises(RuntimeError, match="weight_ih_l0.0.gates.0.support needs rising whole positions, as a constrained"):
            average.module.load_state_dict(spoilt)


class Remembering(nn.Module):
    """It keeps what its last forward computed, as models do for their states and attention weights."""

    def __init__(self, keep):
        super().__init__()
        self.rnn, self.head, self.keep = nn.LSTM(6, 8), nn.Linear(8, 2), keep
        self.kept = None

    def forward(self, x):
        y, states = self.rnn(x)
        self.kept = self.keep(y, states)
        return self.head(y)


class Holder:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("keep", [lambda y, states: y, lambda y, states: states, lambda y, states: {"last": [(y,)], "n": 3}])
def test_a_model_that_keeps_what_it_computed_is_copied_without_its_graph(x, keep):
    model = Remembering(keep)
    plan = uniform(model, TopK(0.5), 8, calibrate(model, [x]))
    output = model(x)
    for made in (compress(model, plan), bake(model), attach(model, pack(model, plan))):
        kept = made.kept
        while isinstance(kept, (tuple, list, dict)):
            kept = kept["last"] if isinstance(kept, dict) else kept[0]
        assert kept is not None and kept.grad_fn is None
    compressed = compress(model, plan)
    compressed(x).sum().backward()
    pack(compressed, plan)
    assert torch.equal(bake(model)(x), output)
    output.sum().backward()  # the original's graph is there still


def test_a_computed_tensor_inside_an_object_is_refused(x):
    model = Remembering(lambda y, states: Holder(y))
    plan = uniform(model, TopK(0.5), 8, calibrate(model, [x]))
    model(x)
    with pytest.raises(ValueError, match="torch cannot copy a model that keeps a computed tensor inside an object of its own"):
        compress(model, plan)


@pytest.mark.parametrize("computed", [nn.utils.weight_norm, lambda head: prune.l1_unstructured(head, "weight", 0.5)],
                         ids=["weight_norm", "prune"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@PLAIN
def test_a_head_whose_weight_is_computed_trains_on_in_the_copy(model, x, computed):
    computed(model.head)
    output, before = model(x), model.head.weight.detach().clone()
    trained = train(compress(model, mixed_plan(model)), x)
    assert torch.equal(model(x), output) and torch.equal(model.head.weight, before)
    assert not torch.equal(trained.head.weight, before)
    assert torch.equal(trained.head.weight == 0, before == 0)
    pack(trained, mixed_plan(trained))


@pytest.mark.parametrize(("arguments", "message"), [
    ((torch.ones(2, 4, 6, dtype=torch.long),), r"needs floats of 2 or 3 dimensions or a packed sequence, got torch.int64 of"),
    ((torch.zeros(6),), r"or a packed sequence, got torch.float32 of shape \(6,\)"),
    (([[0.0] * 6],), "or a packed sequence, got list"),
    ((torch.zeros(2, 4, 6), torch.zeros(1, 2, 8)), r"needs \(h, c\) as its state, got torch.float32 of shape \(1, 2, 8\)"),
    ((torch.zeros(2, 4, 6), (torch.zeros(1, 2, 8),) * 3), r"needs \(h, c\) as its state, got torch.float32 of shape .*, torch"),
    ((torch.zeros(2, 4, 6), (torch.zeros(1, 2, 8), 0)), r"needs \(h, c\) as its state, got torch.float32 .*, int"),
])  # fmt: skip
@pytest.mark.parametrize("attached", [attach, attach_emulated])
@PLAIN
def test_what_an_attached_layer_cannot_take_is_refused(model, plan, attached, arguments, message):
    """Integers would come back as integers: zeros."""
    rnn = attached(model, pack(model, plan)).body["rnn"]
    with pytest.raises(ValueError, match=message):
        rnn(*arguments)


def test_every_method_has_a_sample():
    assert {type(method) for method in SAMPLES} == set(METHODS.values())


@pytest.mark.parametrize("method", [BlockCirculant(3), Structured(5), BlockSparse(0.5, 3)], ids=repr)
@pytest.mark.parametrize("verb", [compress, pack])
def test_rows_of_a_projection_that_a_method_does_not_divide(verb, method):
    rnn = rnn_of("projected", 2, True)
    plan = uniform(rnn, Dense(), 8, calibrate(rnn, [torch.randn(5, 2, 6)]))
    name = "weight_hr_l1_reverse.p"
    wrong = replace(plan, blocks=plan.blocks | {name: BlockPlan(method, QFormat(8, 7))})
    with pytest.raises(ValueError, match=rf"block {name}: {type(method).__name__}\(.* needs rows divisible by \d, got a 4x8"):
        verb(rnn, wrong)


# --- circulant blocks on the fft datapath


@pytest.mark.parametrize("model", ["LSTM", "GRU", "projected"], indirect=True)
def test_the_fft_datapath_from_plan_to_file(model, x, tmp_path):
    """Blocks of 4 need no constant but 1, so that there nothing rounds; blocks of 8 do."""
    signals, block = calibrate(model, [x], 12), 4 if model.body["rnn"].proj_size else 8
    plan = Plan.read(uniform(model, BlockCirculant(block, "fft"), 8, signals).to_json())
    compressed = train(compress(model, plan), x)
    packed = pack(compressed, plan)
    integers = attach(compressed, load(packed.save(tmp_path / "model")))
    assert all(layer.spectral_blocks == list(layer.blocks) for layer in packed.layers.values())
    assert torch.equal(integers(x), attach(compressed, packed)(x))
    time = attach(compressed, pack(compressed, uniform(model, BlockCirculant(block), 8, signals)))(x)
    assert torch.equal(integers(x), time) == (block == 4)
    torch.testing.assert_close(integers(x), compressed(x), rtol=0, atol=0.05)


# --- low-rank blocks: their factors are trained and must survive


@pytest.mark.parametrize("model", ["LSTM", "GRU", "projected"], indirect=True)
def test_the_factors_that_were_trained_are_packed(model, x):
    plan = uniform(model, LowRank(2), 6, calibrate(model, [x], 12))
    trained = train(compress(model, plan), x, steps=10)
    packed = pack(trained, plan)
    baked = bake(trained)
    ways = {"baked": baked, "copied": copy.deepcopy(baked), "baked twice": bake(baked), "wider": bake(baked).double(),
            "compressed again": compress(baked, plan), "compressed at once": compress(trained, plan)}
    for name, block in packed.blocks.items():
        assert 2 * 6 * (sum(block.shape)) == block.storage_bits
        for way, other in ways.items():
            again = pack(other, plan).blocks[name]
            assert (again.left.tolist(), again.right.tolist()) == (block.left.tolist(), block.right.tolist()), way
    assert torch.equal(compress(trained, plan)(x), trained(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [6, 14])  # products of 14-bit factors are finer than either dtype
def test_the_factors_that_were_trained_are_packed_where_their_product_was_rounded(dtype, bits):
    torch.manual_seed(0)
    rnn = nn.LSTM(12, 16)
    plan = uniform(rnn, LowRank(5), bits, calibrate(rnn, [torch.randn(20, 2, 12)]))
    compressed = compress(rnn.to(dtype), plan)
    for p in compressed.parameters():
        nn.init.normal_(p, std=0.1)
    packed = pack(compressed, plan)
    for parameter in ("weight_ih_l0", "weight_hh_l0"):
        for gate, module, stored in zip("ifgo", compressed.parametrizations[parameter][0].gates,
                                        compressed.parametrizations[parameter].parameters(), strict=True):
            block = packed.blocks[f"{parameter}.{gate}"]
            ours = np.concatenate([block.left, block.right.T]) * 2.0**-block.fmt.frac
            np.testing.assert_array_equal(ours, module.shown(stored).detach().double())


@pytest.mark.parametrize("model", ["LSTM"], indirect=True)
def test_changed_weights_and_other_methods_leave_the_old_factors(model, x):
    plan = uniform(model, LowRank(2), 6, calibrate(model, [x], 12))
    baked = bake(train(compress(model, plan), x))
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(baked.state_dict())  # plain weights, factors unknown
    with torch.no_grad():
        for rnn in (baked.body["rnn"], fresh.body["rnn"]):
            rnn.weight_hh_l0 += 0.25
    name = "body.rnn.weight_hh_l0.g"
    assert pack(baked, plan).blocks[name].dense().tolist() == pack(fresh, plan).blocks[name].dense().tolist()
    other = uniform(baked, TopK(0.25), 6, plan.signals)
    assert pack(compress(baked, other), other).blocks[name].dense().tolist() == pack(fresh, other).blocks[name].dense().tolist()


# --- bake


def test_baked_models_are_plain(model, plan, x):
    compressed = train(compress(model, plan), x)
    baked = bake(compressed)
    rnn = baked.body["rnn"]
    assert not rnn._weights_have_changed()
    assert type(rnn) is type(model.body["rnn"]) and not parametrize.is_parametrized(rnn)
    assert sorted(baked.state_dict()) == sorted(model.state_dict())
    assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad for p in rnn.parameters())
    torch.testing.assert_close(baked(x), compressed(x), rtol=0, atol=0)
    # What runs is what the parameters say, in torch's own list of them too.
    with torch.no_grad():
        for name, w in rnn.named_parameters():
            w.mul_(not name.startswith("weight"))
    assert torch.equal(baked(x), baked(0 * x))
    train(copy.deepcopy(baked), x)
    copy.deepcopy(model).load_state_dict(baked.state_dict())


def test_without_gradients_recurrent_weights_stay_parameters(model, plan, x):
    compressed = compress(model, plan)
    expected, names = bake(compressed), [name for name, _ in bake(compressed).named_parameters()]
    with torch.no_grad():
        baked, again = bake(compressed), compress(compressed, plan)
    for made in (baked, bake(again)):
        assert [name for name, _ in made.named_parameters()] == names and not list(made.buffers())
        assert all(p.requires_grad for p in made.parameters())
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), expected.parameters(), strict=True))
    made(x).sum().backward()


@pytest.mark.parametrize("verb", [bake, lambda model: compress(model, mixed_plan(model)), copy.deepcopy],
                         ids=["bake", "compress", "deepcopy"])
def test_inside_cached_a_constrained_model_is_not_copied(model, plan, verb):
    """It would leave weights without gradients for the next forward there."""
    compressed = compress(model, plan)
    with parametrize.cached():
        verb(model)
        with pytest.raises(ValueError, match=r"cannot be copied or constrained anew inside torch\.nn\.utils"):
            verb(compressed)
        with torch.no_grad():  # as a measurement in integers by a function of one's own
            verb(compressed)
    verb(compressed)


def test_a_frozen_layer_stays_frozen_and_its_weights_parameters(model, plan, x):
    model.body["rnn"].requires_grad_(False)
    baked = bake(compress(model, plan))
    assert {name for name, p in baked.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert sorted(name for name, _ in baked.named_parameters()) == sorted(name for name, _ in model.named_parameters())


def test_baking_a_plain_model_copies_it(model, x):
    baked = bake(model)
    assert baked is not model and torch.equal(baked(x), model(x))
    assert baked.body["rnn"].weight_hh_l0.data_ptr() != model.body["rnn"].weight_hh_l0.data_ptr()


# --- pack


@pytest.mark.parametrize("trained", [False, True])
def test_packed_integers_are_the_baked_weights(model, plan, x, trained):
    compressed = compress(model, plan)
    if trained:
        train(compressed, x, steps=10, rate=0.2)  # far enough that weights saturate and round to zero
    packed, baked = pack(compressed, plan), bake(compressed)
    for name, block in packed.blocks.items():
        np.testing.assert_array_equal(block.fmt.dequantise(block.dense()), weight(baked, name).numpy(), err_msg=name)


def test_one_shot_packing_is_compress_and_pack(model, plan):
    one_shot, packed = pack(model, plan), pack(compress(model, plan), plan)
    assert list(one_shot.blocks) == list(packed.blocks) == list(blocks(model))
    for name, block in one_shot.blocks.items():
        np.testing.assert_array_equal(block.dense(), packed.blocks[name].dense())


def test_merged_biases_at_the_aligned_fraction_bits(model, plan):
    for name, layer in pack(model, plan).layers.items():
        suffix, s = name.removeprefix("body.rnn."), layer.signals
        gates = "rzn" if layer.cell == "GRU" else "ifgo"
        b_ih, b_hh = (getattr(model.body["rnn"], f"bias_{part}_{suffix}").detach().double().numpy() for part in ("ih", "hh"))
        expected = {}
        for n, gate in enumerate(gates):
            rows, frac = slice(8 * n, 8 * n + 8), ENTRIES[gate].format.frac
            expected[gate] = b_ih[rows] + b_hh[rows], frac + max(s["input"].frac, s["hidden"].frac)
            if gate == "n":  # the product r * s is a term of its own, rounded before
                other = s["sigmoid"].frac + s["hidden_product"].frac
                expected |= {"n": (b_ih[rows], max(frac + s["input"].frac, other)), "hn": (b_hh[rows], frac + s["hidden"].frac)}
        assert set(layer.bias) == set(expected)
        for gate, (values, frac) in expected.items():
            np.testing.assert_array_equal(layer.bias[gate], np.floor(values * 2.0**frac + 0.5), err_msg=f"{name} {gate}")


# Biases: 4 of 8 for each layer and direction (i, f, g, o; r, z, n, hn). Output layer: 3 times its width, and 3.
@pytest.mark.parametrize(("kind", "num_layers", "bidirectional", "biases", "others"), [
    ("LSTM", 1, False, 32, 27), ("GRU", 1, False, 32, 27), ("GRU", 2, True, 128, 51), ("projected", 2, True, 128, 27)])
def test_parameters_outside_the_weights_are_counted(kind, num_layers, bidirectional, biases, others):
    for bias in (True, False):
        model = Tagger(kind, num_layers, bidirectional, bias)
        packed = pack(model, mixed_plan(model))
        assert (packed.rnn_bias_params, packed.other_params) == (biases * bias, others)
        assert bias or all((b == 0).all() for layer in packed.layers.values() for b in layer.bias.values())


@PLAIN
@pytest.mark.parametrize("verb", [compress, pack])
def test_plans_that_do_not_fit_are_refused(model, plan, verb):
    some = {name: entry for name, entry in plan.blocks.items() if not name.endswith("hh_l0.o")}
    with pytest.raises(ValueError, match=r"the plan misses the blocks body\.rnn\.weight_hh_l0\.o"):
        verb(model, replace(plan, blocks=some))
    wrong = dict.fromkeys(plan.blocks, BlockPlan(BlockCirculant(3), QFormat(8, 7)))
    with pytest.raises(ValueError, match=r"block body\.rnn\.weight_ih_l0\.i: BlockCirculant.*rows divisible by 3, got a 8x6"):
        verb(model, replace(plan, blocks=wrong))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("module", [nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda module: module.__name__)
def test_recurrent_modules_that_are_not_supported_are_refused_by_name(module, beside):
    supported = Tagger()
    plan = mixed_plan(supported)
    packed, model = pack(supported, plan), nn.ModuleDict({"odd": module(6, 8)} | ({"tagger": supported} if beside else {}))
    for call in (lambda m: calibrate(m, []), lambda m: compress(m, plan), lambda m: pack(m, plan), lambda m: attach(m, packed)):
        with pytest.raises(ValueError, match=f"'odd' is an nn.{module.__name__}: the workbench takes nn.LSTM and nn.GRU"):
            call(model)
        with pytest.raises(ValueError, match="compresses nn.LSTM and nn.GRU, and found neither in Sequential"):
            call(nn.Sequential(nn.Linear(6, 8)))


# --- diagnoses: which layer or block, which range, which format


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("verb", [compress, pack])
def test_a_weight_that_is_not_finite_names_its_block(model, plan, verb, value):
    name, block = list(blocks(model).items())[-1]
    with torch.no_grad():
        getattr(model.body["rnn"], block.parameter)[-1, -1] = value
    method = type(plan.blocks[name].method).__name__
    with pytest.raises(ValueError, match=rf"^block {name}: {method}\(.*\) needs finite weights, got 1 that are not$"):
        verb(model, plan)


# Rows of the second gate, and of a GRU's n b_in and b_hn.
@pytest.mark.parametrize(("kind", "part", "row", "bias"), [
    ("LSTM", "ih", 9, "f"), ("LSTM", "hh", 9, "f"), ("projected", "hh", 9, "f"), ("GRU", "hh", 9, "z"), ("GRU", "ih", 17, "n"),
    ("GRU", "hh", 17, "hn")])  # fmt: skip
def test_a_bias_that_does_not_fit_names_its_layer(kind, part, row, bias):
    model = Tagger(kind, 1, True)
    plan = mixed_plan(model)
    frac = pack(model, plan).layers["body.rnn.l0_reverse"].bias_fracs[bias]
    for value, message in ((99999.5, rf"needs 32 bits at {frac} fraction bits, got 99999"),
                           (float("-inf"), "needs finite values, got 1 that are not"),
                           (float("nan"), "needs finite values, got 1 that are not")):
        with torch.no_grad():
            for each in ("ih", "hh"):
                getattr(model.body["rnn"], f"bias_{each}_l0_reverse")[row] = value if each == part else 0
        with pytest.raises(ValueError, match=rf"^layer body\.rnn\.l0_reverse: the bias of gate {bias} {message}"):
            pack(model, plan)


# Coarse inputs are shifted to the many fraction bits of the hidden state's products, and so on.
@pytest.mark.parametrize(("kind", "signals", "message"), [
    ("LSTM", {"input": QFormat(18, -12)}, r"gate i needs an accumulator under 48 bits, but a row could reach \d+ \(\d\d bits\) "
     r"with body\.rnn\.weight_ih_l0\.i QFormat\(bits=16, frac=14.* and input QFormat\(bits=18, frac=-12, signed=True\), body"),
    ("LSTM", {"cell": QFormat(16, 32)}, r"f\*c \+ i\*g needs an accumulator under 48 bits, but could reach 281472829194240 "
     r"\(49 bits\) with cell QFormat\(bits=16, frac=32, signed=True\) and tanh QFormat\(bits=16, frac=15, signed=True\)"),
    ("GRU", {"input": QFormat(18, -12)}, r"gate r needs an accumulator .* input QFormat\(bits=18, frac=-12, signed=True\)"),
    ("GRU", {"hidden_product": QFormat(16, -12)}, r"gate n needs an accumulator .*\.weight_ih_l0\.n QFormat\(bits=16, frac=14"),
])  # fmt: skip
def test_a_sum_that_could_leave_the_accumulator_names_its_formats(kind, signals, message):
    model = Tagger(kind)
    plan = mixed_plan(model)
    wide = Plan(dict.fromkeys(plan.blocks, BlockPlan(Dense(), QFormat(16, 14))),
                {"body.rnn.l0": plan.signals["body.rnn.l0"] | signals})  # fmt: skip
    with pytest.raises(ValueError, match=rf"^layer body\.rnn\.l0: {message}"):
        pack(model, wide)


def test_a_table_that_the_formats_do_not_suit_names_its_layer(model, plan):
    wide = {name: signals | {"pre": QFormat(17, 12)} for name, signals in plan.signals.items()}
    with pytest.raises(ValueError, match=r"^layer body\.rnn\.l0: ExactTable needs inputs of at most 16 bits, got .*bits=17"):
        pack(model, replace(plan, signals=wide, activation="exact"))


@PLAIN
def test_operands_wider_than_the_multiplier_are_refused(model, plan):
    wide = plan.blocks | {"body.rnn.weight_hh_l0.g": BlockPlan(Dense(), QFormat(28, 14))}
    with pytest.raises(ValueError, match=r"body\.rnn\.weight_hh_l0\.g needs operands of 18 x 27 bits \(DSP48E2\), got"):
        pack(model, replace(plan, blocks=wide))


# --- attach


def fine(model, batch):
    """The model with 16-bit weights everywhere."""
    return pack(model, uniform(model, Dense(), 16, calibrate(model, [batch])))


def random_state(rnn, *batch):
    """Initial states as the module takes them; a hidden state without projection lies in (-1, 1)."""
    places = rnn.num_layers * (1 + rnn.bidirectional)
    h = torch.randn(places, *batch, rnn.proj_size or rnn.hidden_size).tanh()
    return (h, torch.randn(places, *batch, rnn.hidden_size)) if isinstance(rnn, nn.LSTM) else h


def check_close(got, want):
    """Output and states as torch returns them: structure, shapes, dtypes, and values to the last tolerance."""
    assert type(got) is type(want)
    if isinstance(want, tuple) and not isinstance(want, PackedSequence):
        for mine, theirs in zip(got, want, strict=True):
            check_close(mine, theirs)
    elif isinstance(want, PackedSequence):
        torch.testing.assert_close(got.data, want.data, **CLOSE)  # the very order of torch, ties included
        assert torch.equal(got.batch_sizes, want.batch_sizes)
        for mine, theirs in ((got.sorted_indices, want.sorted_indices), (got.unsorted_indices, want.unsorted_indices)):
            assert mine is theirs is None or torch.equal(mine, theirs)
        torch.testing.assert_close(pad_packed_sequence(got), pad_packed_sequence(want), **CLOSE)
    else:
        torch.testing.assert_close(got, want, **CLOSE)
        assert not got.requires_grad


every_kind = pytest.mark.parametrize("kind", KINDS)
every_stack = pytest.mark.parametrize(("num_layers", "bidirectional", "bias"), [
    (1, False, True), (1, True, False), (2, False, False), (2, True, True)])  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
@every_stack
@every_kind
def test_attached_modules_are_close_to_torchs(kind, num_layers, bidirectional, bias, batch_first):
    rnn = rnn_of(kind, num_layers, bidirectional, bias=bias, batch_first=batch_first)
    x, state = torch.randn(4, 7, 6), random_state(rnn, 4 if batch_first else 7)
    attached = attach(rnn, fine(rnn, (x, state)))
    assert isinstance(attached, IntegerRNN)
    for arguments in ((x,), (x, None), (x, state)):
        check_close(attached(*arguments), rnn(*arguments))
    for named in (attached(input=x, hx=state), attached(x, hx=state)):
        assert torch.equal(named[0], attached(x, state)[0])
    wide = tuple(s.double() for s in state) if kind != "GRU" else state.double()
    check_close(attached.double()(x.double(), wide), copy.deepcopy(rnn).double()(x.double(), wide))
    assert attached(x)[0].dtype == torch.float32  # as the input, whatever the module is


@every_stack
@every_kind
def test_an_unbatched_sequence(kind, num_layers, bidirectional, bias):
    rnn = rnn_of(kind, num_layers, bidirectional, bias=bias)
    x, state = torch.randn(5, 6), random_state(rnn)
    packed = fine(rnn, (x, state))
    for rnn.batch_first in (False, True):
        attached = attach(rnn, packed)
        for arguments in ((x,), (x, state)):
            check_close(attached(*arguments), rnn(*arguments))


@every_stack
@every_kind
def test_packed_sequences_keep_order_states_and_ends(kind, num_layers, bidirectional, bias):
    rnn = rnn_of(kind, num_layers, bidirectional, bias=bias)
    x, state = torch.randn(5, 4, 6), random_state(rnn, 4)
    packed = fine(rnn, (x, state))
    for lengths, enforce_sorted, rnn.batch_first in (
        ([2, 5, 3, 5], False, False), ([2, 5, 3, 5], False, True), ([5, 3, 3, 1], True, True), ([4, 4, 4, 4], False, False),
    ):  # fmt: skip
        batch = x.transpose(0, 1) if rnn.batch_first else x
        sequence = pack_padded_sequence(batch, torch.tensor(lengths), rnn.batch_first, enforce_sorted)
        attached = attach(rnn, packed)
        for arguments in ((sequence,), (sequence, state)):
            check_close(attached(*arguments), rnn(*arguments))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_each_layer_of_a_stack_has_its_own_hidden_format(bidirectional):
    rnn = rnn_of("projected", 2, bidirectional)
    with torch.no_grad():
        rnn.weight_hr_l0.mul_(12)
    x, state = torch.randn(5, 3, 6), random_state(rnn, 3)
    packed = fine(rnn, (x, state))
    assert packed.layers["l0"].signals["hidden"].frac < packed.layers["l1"].signals["hidden"].frac
    (output, states), (expected, expected_states) = attach(rnn, packed)(x, state), rnn(x, state)
    for got, want in ((output, expected), *zip(states, expected_states, strict=True)):
        torch.testing.assert_close(got, want, rtol=0, atol=2.0**-8)


@every_kind
def test_what_the_integer_engine_cannot_take(kind):
    rnn = rnn_of(kind, 2, True)
    x, state = torch.randn(5, 3, 6), random_state(rnn, 3)
    attached, h = attach(rnn, fine(rnn, (x, state))), state if kind == "GRU" else state[0]
    bad = h[:3] if kind == "GRU" else (h[:3], state[1])
    with pytest.raises(ValueError, match="the integer engine of '' needs the hidden state of 4 layers and directions, got 3"):
        attached(x, bad)
    with pytest.raises(ValueError, match="the engine needs x of shape"):
        attached(x[:, :, :5])
    h[2, 1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"cannot take the hidden state: QFormat\(bits=16.* cannot hold NaN: 1 of"):
        attached(x, state)
    x[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"cannot take the input: QFormat\(bits=16.* cannot hold NaN: 1 of 90 values are NaN"):
        attached(x)


@every_kind
def test_exact_tables_are_closer(kind):
    rnn, x = rnn_of(kind, 2, True), torch.randn(9, 8, 6)
    plan, errors = uniform(rnn, Dense(), 16, calibrate(rnn, [x])), {}
    for activation in ("exact", "linear", "hard"):
        attached = attach(rnn, pack(rnn, replace(plan, activation=activation)))
        errors[activation] = (attached(x)[0] - rnn(x)[0]).abs().max().item()
    assert errors["exact"] < errors["linear"] < CLOSE["atol"] < 0.01 < errors["hard"]


def test_attach_inside_a_module_leaves_the_rest(model, x):
    attached = attach(model, fine(model, x))
    assert isinstance(attached.body["rnn"], IntegerRNN) and isinstance(model.body["rnn"], nn.RNNBase)
    assert torch.equal(attached.head.weight, model.head.weight)
    torch.testing.assert_close(attached(x), model(x), rtol=0, atol=2.0**-8)
    for size in ("input_size", "hidden_size", "proj_size", "num_layers", "bidirectional", "batch_first", "bias", "dropout",
                 "mode"):
        assert getattr(attached.body["rnn"], size) == getattr(model.body["rnn"], size)
    torch.testing.assert_close(attached.double()(x.double()), attached.float()(x).double())


@pytest.mark.parametrize("as_integers", [attach, attach_emulated])
@pytest.mark.parametrize("kind", KINDS)
def test_code_that_asks_for_the_cell_goes_the_same_way_in_integers(kind, as_integers):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = rnn_of(kind)

        def forward(self, x):
            _, state = self.rnn(x)
            state = state[0] if isinstance(self.rnn, nn.LSTM) else state
            return state if isinstance(self.rnn, (nn.LSTM, nn.GRU)) else None

    model, x = Asking(), torch.randn(5, 3, 6)
    attached = as_integers(model, fine(model, x))
    for same in (attached, copy.deepcopy(attached)):
        check_close(same(x), model(x))
    assert "LSTM" not in (shown := repr(attached.rnn).split("(")[0]) and shown == type(attached.rnn).__name__
    with pytest.raises(ValueError, match="'rnn' runs in integers, as attach makes it: the workbench takes the float model"):
        pack(attached, Plan({}, {}))


def test_attached_outputs_lie_on_the_grid_of_the_hidden_state(model, plan, x):
    """What comes out is the integers of the engine, not a float copy of them."""
    packed = pack(compress(model, plan), plan)
    fmt = list(packed.layers.values())[-1].signals["hidden"]
    output, _ = attach(model, packed).body["rnn"](x)
    np.testing.assert_array_equal(fmt.dequantise(fmt.quantise(output.numpy())), output.numpy())


def test_a_compressed_model_runs_on_its_integers(model, plan, x):
    """The weights are the same in both, so only the rounding of signals is left between them."""
    compressed = train(compress(model, plan), x)
    plan = plan.with_signals(calibrate(compressed, [x]))  # training may have moved the outputs of a projection
    attached = attach(compressed, pack(compressed, plan))
    torch.testing.assert_close(attached.body["rnn"](x)[0], bake(compressed).body["rnn"](x)[0], **CLOSE)
    dense = attach(model, fine(model, x))
    assert (attached(x) - dense(x)).abs().max() > 0.01  # and not on those of the dense model


def test_two_layers_of_one_model_each_get_their_own():
    torch.manual_seed(2)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LSTM(6, 8, bidirectional=True), nn.GRU(16, 4)

        def forward(self, x):
            return self.second(self.first(x)[0])[0]

    model, x = Two(), torch.randn(5, 3, 6)
    packed = fine(model, x)
    assert list(packed.layers) == ["first.l0", "first.l0_reverse", "second.l0"]
    torch.testing.assert_close(attach(model, packed)(x), model(x), **CLOSE)


def test_a_module_under_two_names_is_replaced_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.GRU(6, 3, bidirectional=True)
            self.again = nn.ModuleList([self.down])

        def forward(self, x):
            return self.again[0](4 * self.down(x)[0])[0]  # the second call has the larger inputs

    torch.manual_seed(2)
    model, x = Twice(), torch.randn(5, 2, 6).clamp(-1, 1)
    signals = calibrate(model, [x])
    assert list(signals) == list(layers(model)) == ["down.l0", "down.l0_reverse"]
    assert signals["down.l0"]["input"].frac < calibrate(model.down, [x])["l0"]["input"].frac
    plan = uniform(model, Dense(), 16, signals)
    attached = attach(model, pack(model, plan))
    assert isinstance(attached.down, IntegerRNN) and attached.again[0] is attached.down
    torch.testing.assert_close(attached(x), model(x), rtol=0, atol=2.0**-8)
    compressed = compress(model, plan)
    assert compressed.again[0] is compressed.down and parametrize.is_parametrized(compressed.down, "weight_hh_l0_reverse")


@pytest.mark.parametrize(("trained", "asked", "moved"), [
    (TopK(0.5), TopK(0.25), "TopK 0.25"), (Dense(), BlockCirculant(4), "BlockCirculant 4"),
    (BlockCirculant(2), LowRank(2), "LowRank 2"), (TopK(0.5), RowBalanced(0.5), "RowBalanced 0.5"),
])
def test_pack_refuses_a_training_that_a_projection_would_undo(trained, asked, moved):
    torch.manual_seed(0)
    model = nn.LSTM(8, 8)
    signals = calibrate(model, [torch.randn(5, 3, 8)])
    plans = {method: uniform(model, method, 6, signals) for method in (trained, asked)}
    compressed = compress(model, plans[trained])
    with pytest.raises(ValueError, match=rf"in the sets of its plan, got [1-8] blocks .*, which {moved} would move by .* %: "
                                         r"end a retraining schedule with step\(1\.0\)"):
        pack(compressed, plans[asked])
    assert pack(bake(compressed), plans[asked]).cr_disk > 1  # one-shot, as asked for


def test_pack_takes_a_constrained_model_under_any_plan_that_holds_it():
    torch.manual_seed(0)
    model = nn.LSTM(8, 8)
    signals = calibrate(model, [torch.randn(5, 3, 8)])
    compressed = compress(model, uniform(model, BlockCirculant(4), 4, signals))
    for wider in (BlockCirculant(4, "fft"), Dense()):
        assert pack(compressed, uniform(compressed, wider, 8, signals)).cr_disk > 1
    plan = uniform(model, LowRank(3), 6, signals)
    assert pack(compress(model, plan).bfloat16(), plan).cr_disk > 1  # a product in bfloat16 is not of rank 3 to the last bit


def test_attach_refuses_packed_models_of_other_models(model, plan):
    packed = pack(model, plan)
    for exchanged in ((packed, model), (model, model)):
        with pytest.raises(ValueError, match="attach needs a model and its PackedModel, got a .* as the second"):
            attach(*exchanged)
    with pytest.raises(ValueError, match=r"attach needs a packed model with the layers 0\.l0, got body\.rnn\.l0"):
        attach(nn.Sequential(nn.LSTM(6, 8)), packed)
    for kind, options, first, expected in (
        ("LSTM", {"hidden_size": 12}, "l0", ("LSTM", 6, 12, 12)), ("GRU", {}, "l0", ("GRU", 6, 8, 8)),
        ("LSTM", {"input_size": 5}, "l0", ("LSTM", 5, 8, 8)), ("LSTM", {"proj_size": 5}, "l0", ("LSTM", 6, 8, 5)),
    ):  # fmt: skip
        other, sizes = copy.deepcopy(model), {"input_size": 6, "hidden_size": 8} | options
        stack = {"num_layers": model.body["rnn"].num_layers, "bidirectional": model.body["rnn"].bidirectional}
        other.body["rnn"] = getattr(nn, kind)(**sizes, **stack)
        layer = packed.layers[f"body.rnn.{first}"]
        got = layer.cell, layer.input_size, layer.hidden_size, layer.output_size
        if got != expected:
            message = f"attach needs cell, input, hidden and output sizes {expected} for body.rnn.{first}, got {got}"
            with pytest.raises(ValueError, match=re.escape(message)):
                attach(other, packed)
    one_way = copy.deepcopy(model)
    one_way.body["rnn"] = nn.LSTM(6, 8, num_layers=3)
    with pytest.raises(ValueError, match=r"with the layers body\.rnn\.l0, body\.rnn\.l1, body\.rnn\.l2, got body\.rnn\.l0"):
        attach(one_way, packed)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_attach_refuses_a_layer_whose_hooks_would_be_lost(model, plan, register):
    packed = pack(model, plan)
    hook = getattr(model.body["rnn"], register)(lambda *args: None)
    with pytest.raises(ValueError, match=r"attach replaces 'body\.rnn', which has forward hooks: remove them"):
        attach(model, packed)
    hook.remove()
    attach(model, packed)


def test_a_float_layer_that_is_held_elsewhere_too_does_not_run_on_in_silence():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.LSTM(6, 8), nn.LSTM(8, 8)
            self.order = [self.low, self.high]

        def forward(self, x):
            for rnn in self.order:
                x = rnn(x)[0]
            return x

    listed, x = Listed(), torch.randn(5, 2, 6)
    packed = pack(listed, uniform(listed, Dense(), 8, calibrate(listed, [x])))
    with pytest.raises(ValueError, match="attach has replaced 'low', but the model calls the float layer"):
        attach(listed, packed)(x)
    listed(x)  # as it was


def test_the_integer_engine_takes_bfloat16(model, plan, x):
    integers = attach(model, pack(model, plan)).body["rnn"]
    output, _ = integers(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, integers(x.bfloat16().float())[0].bfloat16())
