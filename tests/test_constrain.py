import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from workbench.constrain import IntegerRNN, attach, bake, compress, pack
from workbench.fixedpoint import QFormat
from workbench.gates import blocks, weight
from workbench.methods import BlockCirculant, Dense, TopK
from workbench.plan import BlockPlan, Plan, uniform
from workbench.quantise import calibrate

# One method and format per gate, all different, so that no two gates can be exchanged unseen.
ENTRIES = {
    "i": BlockPlan(TopK(0.25), QFormat(8, 7)),
    "f": BlockPlan(BlockCirculant(4), QFormat(6, 6)),
    "g": BlockPlan(Dense(), QFormat(4, 3)),
    "o": BlockPlan(BlockCirculant(2), QFormat(5, 5)),
}
# 16-bit weights and signals: largest difference from the float layer over a few steps. The tables err by up to 2**-13.
CLOSE = {"rtol": 0, "atol": 2.0**-10}


class Tagger(nn.Module):
    """A recurrent layer inside other modules, with an output layer."""

    def __init__(self, batch_first=True, bias=True):
        super().__init__()
        self.body = nn.ModuleDict({"rnn": nn.LSTM(6, 8, batch_first=batch_first, bias=bias)})
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body["rnn"](x)[0])


def mixed_plan(model):
    signals = calibrate(model, [torch.randn(5, 7, 6)])
    return Plan({name: ENTRIES[block.gate] for name, block in blocks(model).items()}, signals)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tagger()


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
    compressed = compress(model, plan)
    for name, entry in plan.blocks.items():
        np.testing.assert_array_equal(weight(compressed, name), expected_block(weight(model, name), entry), err_msg=name)


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
    assert type(model.body["rnn"]) is cls is nn.LSTM
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
    compressed = train(compress(model, plan), x, steps=5)
    for name, entry in plan.blocks.items():
        w = weight(compressed, name)
        np.testing.assert_array_equal(w, expected_block(w, entry), err_msg=name)
        if isinstance(entry.method, TopK):
            support = entry.method.project(weight(model, name)) != 0
            assert not (w[~support] != 0).any()
    moved = [not torch.equal(weight(compressed, name), weight(compress(model, plan), name)) for name in plan.blocks]
    assert all(moved)


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
    for name, entry in tighter.blocks.items():
        np.testing.assert_array_equal(weight(twice, name), expected_block(weight(once, name), entry))
    train(twice, x)
    assert (weight(twice, "body.rnn.weight_hh_l0.g") != 0).sum() <= 8


def test_a_compressed_model_moves_and_reloads(model, plan, x):
    compressed = train(compress(model, plan), x)
    other = compress(model, plan)
    other.load_state_dict(compressed.state_dict())
    assert torch.equal(other(x), compressed(x))
    assert compressed.double()(x.double()).dtype == torch.float64


def test_a_model_that_is_an_lstm():
    lstm = nn.LSTM(6, 8)
    plan = mixed_plan(lstm)
    compressed = compress(lstm, plan)
    x = torch.randn(5, 2, 6)
    compressed(x)[0].sum().backward()
    assert type(bake(compressed)) is nn.LSTM
    assert torch.equal(bake(compressed)(x)[0], compressed(x)[0])


# --- bake


def test_baked_models_are_plain(model, plan, x):
    compressed = train(compress(model, plan), x)
    baked = bake(compressed)
    rnn = baked.body["rnn"]
    assert not rnn._weights_have_changed()
    assert type(rnn) is nn.LSTM and not parametrize.is_parametrized(rnn)
    assert sorted(baked.state_dict()) == sorted(model.state_dict())
    assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad for p in rnn.parameters())
    torch.testing.assert_close(baked(x), compressed(x), rtol=0, atol=0)
    # What runs is what the parameters say, in torch's own list of them too.
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(0)
        rnn.weight_ih_l0.mul_(0)
    assert torch.equal(baked(x), baked(0 * x))
    train(copy.deepcopy(baked), x)
    Tagger().load_state_dict(baked.state_dict())


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
    layer = pack(model, plan).layers["body.rnn.l0"]
    rnn = model.body["rnn"]
    merged = (rnn.bias_ih_l0.double() + rnn.bias_hh_l0.double()).detach().numpy()
    for n, gate in enumerate("ifgo"):
        frac = max(ENTRIES[gate].format.frac + layer.signals[signal].frac for signal in ("input", "hidden"))
        np.testing.assert_array_equal(layer.bias[gate], np.floor(merged[8 * n : 8 * n + 8] * 2.0**frac + 0.5))


def test_parameters_outside_the_weights_are_counted(model, plan):
    packed = pack(model, plan)
    assert (packed.rnn_bias_params, packed.other_params) == (32, 27)  # merged biases; 8 x 3 + 3 of the output layer
    plain = Tagger(bias=False)
    without = pack(plain, mixed_plan(plain))
    assert without.rnn_bias_params == 0
    assert all((b == 0).all() for b in without.layers["body.rnn.l0"].bias.values())


@pytest.mark.parametrize("verb", [compress, pack])
def test_plans_that_do_not_fit_are_refused(model, plan, verb):
    some = {name: entry for name, entry in plan.blocks.items() if not name.endswith("hh_l0.o")}
    with pytest.raises(ValueError, match=r"the plan misses the blocks body\.rnn\.weight_hh_l0\.o"):
        verb(model, replace(plan, blocks=some))
    wrong = dict.fromkeys(plan.blocks, BlockPlan(BlockCirculant(3), QFormat(8, 7)))
    with pytest.raises(ValueError, match=r"block body\.rnn\.weight_ih_l0\.i: BlockCirculant.*rows divisible by 3, got a 8x6"):
        verb(model, replace(plan, blocks=wrong))


@pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")
@pytest.mark.parametrize(("rnn", "message"), [
    (nn.GRU(6, 8), "got nn.GRU"),
    (nn.LSTM(6, 8, 2), "needs num_layers=1 so far, got num_layers=2"),
    (nn.LSTM(6, 8, bidirectional=True), "got bidirectional=True"),
    (nn.LSTM(6, 8, proj_size=4), "got proj_size=4"),
    (nn.Linear(6, 8), "found neither in Sequential"),
])  # fmt: skip
def test_models_that_are_not_supported_are_refused(model, plan, rnn, message):
    packed = pack(model, plan)
    for call in (lambda m: compress(m, plan), lambda m: pack(m, plan), lambda m: attach(m, packed)):
        with pytest.raises(ValueError, match=message):
            call(nn.Sequential(rnn))


def test_a_bias_beyond_32_bits_is_refused(model, plan):
    with torch.no_grad():
        model.body["rnn"].bias_ih_l0[9] = 99999.5
        model.body["rnn"].bias_hh_l0[9] = 0
    with pytest.raises(ValueError, match="the bias of gate f needs 32 bits at .* fraction bits, got 99999"):
        pack(model, plan)


def test_operands_wider_than_the_multiplier_are_refused(model, plan):
    wide = plan.blocks | {"body.rnn.weight_hh_l0.g": BlockPlan(Dense(), QFormat(28, 14))}
    with pytest.raises(ValueError, match=r"body\.rnn\.weight_hh_l0\.g needs operands of 18 x 27 bits \(DSP48E2\), got"):
        pack(model, replace(plan, blocks=wide))


def test_a_row_that_could_leave_the_accumulator_is_refused(model, plan):
    # The sum of coarse inputs is shifted to the many fraction bits of the hidden state's products.
    signals = {"body.rnn.l0": plan.signals["body.rnn.l0"] | {"input": QFormat(18, -12)}}
    wide = plan.blocks | {"body.rnn.weight_hh_l0.i": BlockPlan(Dense(), QFormat(16, 14))}
    with pytest.raises(ValueError, match="gate i needs an accumulator under 48 bits, but a row could reach"):
        pack(model, Plan(wide, signals))


# --- attach


def fine(model, batch):
    """The model with 16-bit weights everywhere."""
    return pack(model, uniform(model, Dense(), 16, calibrate(model, [batch])))


def random_state(batch):
    return torch.randn(1, batch, 8).tanh(), torch.randn(1, batch, 8)  # a hidden state lies in (-1, 1)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_attached_layers_are_close_to_nn_lstm(batch_first, bias):
    torch.manual_seed(1)
    lstm = nn.LSTM(6, 8, batch_first=batch_first, bias=bias)
    x, state = torch.randn(4, 7, 6), random_state(4 if batch_first else 7)
    attached = attach(lstm, fine(lstm, (x, state)))
    assert isinstance(attached, IntegerRNN)
    for arguments in ((x,), (x, None), (x, state)):
        (output, (h, c)), (expected, (expected_h, expected_c)) = attached(*arguments), lstm(*arguments)
        assert output.dtype == x.dtype and not output.requires_grad
        for got, want in ((output, expected), (h, expected_h), (c, expected_c)):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, **CLOSE)
    by_name = attached(input=x, hx=state)
    assert torch.equal(by_name[0], attached(x, state)[0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_unbatched_sequence(batch_first):
    torch.manual_seed(1)
    lstm = nn.LSTM(6, 8, batch_first=batch_first)
    x, state = torch.randn(5, 6), (torch.zeros(1, 8), torch.full((1, 8), 0.5))
    attached = attach(lstm, fine(lstm, x))
    for arguments in ((x,), (x, state)):
        (output, (h, c)), (expected, (expected_h, expected_c)) = attached(*arguments), lstm(*arguments)
        for got, want in ((output, expected), (h, expected_h), (c, expected_c)):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("lengths", "enforce_sorted"), [([2, 5, 3, 5], False), ([5, 3, 3, 1], True), ([4, 4, 4, 4], False)])
def test_packed_sequences_keep_order_states_and_ends(batch_first, lengths, enforce_sorted):
    torch.manual_seed(1)
    lstm = nn.LSTM(6, 8, batch_first=batch_first)
    x = torch.randn((4, 5, 6) if batch_first else (5, 4, 6))
    sequence = pack_padded_sequence(x, torch.tensor(lengths), batch_first, enforce_sorted)
    state = random_state(4)
    attached = attach(lstm, fine(lstm, (x, state)))
    for arguments in ((sequence,), (sequence, state)):
        (output, (h, c)), (expected, (expected_h, expected_c)) = attached(*arguments), lstm(*arguments)
        torch.testing.assert_close(h, expected_h, **CLOSE)
        torch.testing.assert_close(c, expected_c, **CLOSE)
        torch.testing.assert_close(output.data, expected.data, **CLOSE)  # the very order of torch, ties included
        assert torch.equal(output.batch_sizes, expected.batch_sizes)
        padded, expected_padded = (pad_packed_sequence(s, batch_first) for s in (output, expected))
        torch.testing.assert_close(padded, expected_padded, **CLOSE)


def test_attach_inside_a_module_leaves_the_rest(model, x):
    attached = attach(model, fine(model, x))
    assert isinstance(attached.body["rnn"], IntegerRNN) and isinstance(model.body["rnn"], nn.LSTM)
    assert torch.equal(attached.head.weight, model.head.weight)
    torch.testing.assert_close(attached(x), model(x), rtol=0, atol=2.0**-8)
    assert (attached.body["rnn"].input_size, attached.body["rnn"].hidden_size) == (6, 8)
    torch.testing.assert_close(attached.double()(x.double()), attached.float()(x).double())


def test_attached_outputs_lie_on_the_grid_of_the_hidden_state(model, plan, x):
    """What comes out is the integers of the engine, not a float copy of them."""
    packed = pack(compress(model, plan), plan)
    fmt = packed.layers["body.rnn.l0"].signals["hidden"]
    output, _ = attach(model, packed).body["rnn"](x)
    np.testing.assert_array_equal(fmt.dequantise(fmt.quantise(output.numpy())), output.numpy())


def test_a_compressed_model_runs_on_its_integers(model, plan, x):
    """The weights are the same in both, so only the rounding of signals is left between them."""
    compressed = train(compress(model, plan), x)
    attached = attach(compressed, pack(compressed, plan))
    torch.testing.assert_close(attached.body["rnn"](x)[0], bake(compressed).body["rnn"](x)[0], **CLOSE)
    dense = attach(model, fine(model, x))
    assert (attached(x) - dense(x)).abs().max() > 0.01  # and not on those of the dense model


def test_two_layers_of_one_model_each_get_their_own():
    torch.manual_seed(2)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LSTM(6, 8), nn.LSTM(8, 4)

        def forward(self, x):
            return self.second(self.first(x)[0])[0]

    model, x = Two(), torch.randn(5, 3, 6)
    packed = fine(model, x)
    assert list(packed.layers) == ["first.l0", "second.l0"]
    torch.testing.assert_close(attach(model, packed)(x), model(x), **CLOSE)


def test_a_layer_under_two_names_is_replaced_under_both():
    lstm = nn.LSTM(6, 6)
    model = nn.ModuleList([lstm, nn.Sequential(lstm)])
    plan = Plan({name: BlockPlan(Dense(), QFormat(8, 7)) for name in blocks(model)},
                {"0.l0": calibrate(lstm, [torch.randn(5, 2, 6)])["l0"]})  # fmt: skip
    attached = attach(model, pack(model, plan))
    assert isinstance(attached[0], IntegerRNN) and attached[1][0] is attached[0]


def test_attach_refuses_packed_models_of_other_models(model, plan):
    packed = pack(model, plan)
    with pytest.raises(ValueError, match=r"attach needs a packed model with the layers 0\.l0, got body\.rnn\.l0"):
        attach(nn.Sequential(nn.LSTM(6, 8)), packed)
    other = Tagger()
    other.body["rnn"] = nn.LSTM(6, 12)
    with pytest.raises(ValueError, match=r"attach needs input and hidden sizes \(6, 12\) for 'body.rnn', got \(6, 8\)"):
        attach(other, packed)
