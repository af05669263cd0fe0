import numpy as np
import pytest
import torch

from workbench.models import LanguageModel, SequenceClassifier, build_classifier, build_language_model, seeded
from workbench.tasks import Recipe, Task
from workbench.tasks.task import pad


@pytest.fixture
def task():
    split = pad([np.ones((3, 2)), np.zeros((1, 2))], [0, 1], ["a", "b"])
    recipe = Recipe(dropout=0.25, pooling="last")
    return Task("toy", "official", ("no", "yes", "maybe"), dict.fromkeys(("train", "valid", "test"), split), "", "", "", "",
                recipe)


SHAPES = [
    {},
    {"cell": "GRU", "num_layers": 2},
    {"bidirectional": True},
    {"cell": "GRU", "num_layers": 2, "bidirectional": True},
    {"bidirectional": True, "proj_size": 3},
]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_padding_has_no_influence(pooling, shape):
    model = SequenceClassifier(3, 5, 4, pooling=pooling, **shape).eval()
    x, lengths = torch.randn(2, 6, 3), torch.tensor([6, 2])
    alone = model(x[1:, :2], lengths[1:])
    for padding in (0.0, 1e6, float("nan")):
        x[1, 2:] = padding
        torch.testing.assert_close(model(x, lengths)[1:], alone)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_tokens_go_through_an_embedding(shape):
    model = SequenceClassifier(3, 5, 4, vocab_size=7, **shape).eval()
    tokens, lengths = torch.tensor([[2, 6, 1, 0, 0], [3, 3, 3, 3, 3]], dtype=torch.int32), torch.tensor([3, 5])
    features = SequenceClassifier(3, 5, 4, **shape).eval()
    features.load_state_dict({k: v for k, v in model.state_dict().items() if k != "embedding.weight"})
    torch.testing.assert_close(model(tokens, lengths), features(model.embedding.weight[tokens.long()], lengths))
    assert not model.embedding.weight[0].any()  # padding


def test_pooling_of_two_directions_by_hand():
    model = SequenceClassifier(3, 5, 4, pooling="last", cell="GRU", bidirectional=True).eval()
    x = torch.randn(1, 4, 3)
    frames, _ = model.gru(x[:, :3])
    last = torch.cat([frames[:, 2, :5], frames[:, 0, 5:]], 1)  # each direction's own last frame
    torch.testing.assert_close(model(x, torch.tensor([3])), model.classifier(last))


def test_pooling_by_hand():
    mean, last = SequenceClassifier(3, 5, 4).eval(), SequenceClassifier(3, 5, 4, pooling="last").eval()
    last.load_state_dict(mean.state_dict())
    x = torch.randn(1, 4, 3)
    frames, (state, _) = mean.lstm(x[:, :3])
    lengths = torch.tensor([3])
    torch.testing.assert_close(mean(x, lengths), mean.classifier(frames.sum(1) / 3))
    torch.testing.assert_close(last(x, lengths), mean.classifier(state[0]))


def test_forget_bias_is_one_and_only_that():
    for model in (SequenceClassifier(3, 5, 4, num_layers=2, bidirectional=True), LanguageModel(9, 5, num_layers=2)):
        for suffix in ("l0", "l1", "l0_reverse", "l1_reverse") if model.lstm.bidirectional else ("l0", "l1"):
            bias = getattr(model.lstm, f"bias_ih_{suffix}") + getattr(model.lstm, f"bias_hh_{suffix}")
            assert (bias[5:10] == 1).all()
            assert not (bias[:5] == 1).any() and not (bias[10:] == 1).any()
    gru = SequenceClassifier(3, 5, 4, cell="GRU").gru
    assert not (gru.bias_ih_l0 == 1).any()  # the second gate of a GRU forgets nothing


def test_the_recurrent_module_is_named_after_its_cell():
    for build, sizes in ((SequenceClassifier, (3, 5, 4)), (LanguageModel, (9, 5))):
        lstm, gru = build(*sizes), build(*sizes, cell="GRU")
        assert lstm.rnn is lstm.lstm and not hasattr(lstm, "gru")
        assert gru.rnn is gru.gru and not hasattr(gru, "lstm")


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_language_model_by_hand(cell):
    model = LanguageModel(9, 5, cell=cell, num_layers=2, dropout=0.5).eval()
    tokens = torch.randint(0, 9, (6, 2))
    logits, state = model(tokens)
    out, expected = model.rnn(model.embedding.weight[tokens])
    torch.testing.assert_close(logits, out @ model.embedding.weight.T + model.bias)
    torch.testing.assert_close(state, expected)
    first, state = model(tokens[:4])
    second, _ = model(tokens[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), logits)
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    assert sum(p.numel() for p in model.parameters()) == 9 * 5 + 9 + sum(p.numel() for p in model.rnn.parameters())


def test_dropout_only_in_training():
    model = SequenceClassifier(3, 64, 4, dropout=0.5)
    x, lengths = torch.randn(1, 4, 3), torch.tensor([4])
    assert not torch.equal(model(x, lengths), model(x, lengths))
    model.eval()
    assert torch.equal(model(x, lengths), model(x, lengths))


def test_build_takes_the_recipe_unless_told(task):
    model = build_classifier(task, 7, seed=1)
    assert (model.lstm.input_size, model.lstm.hidden_size, model.classifier.out_features) == (2, 7, 3)
    assert (model.dropout.p, model.pooling) == (0.25, "last")
    other = build_classifier(task, 7, seed=1, dropout=0.0, pooling="mean")
    assert (other.dropout.p, other.pooling) == (0.0, "mean")


def test_build_of_tokens_and_of_a_language_model(tiny_token_task, tiny_language_task):
    model = build_classifier(tiny_token_task, 7, seed=1, cell="GRU", num_layers=2, bidirectional=True)
    assert (model.embedding.num_embeddings, model.gru.input_size, model.gru.num_layers) == (8, 4, 2)
    assert model.gru.dropout == model.dropout.p == 0.3 and model.gru.bidirectional
    model = build_language_model(tiny_language_task, 7, seed=1, cell="GRU", num_layers=2)
    assert (model.embedding.weight.shape, model.gru.num_layers, model.gru.dropout, model.dropout.p) == ((7, 7), 2, 0.1, 0.1)
    first, second, third = (build_language_model(tiny_language_task, 7, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], third["embedding.weight"])
    assert build_language_model(tiny_language_task, 7, seed=1, dropout=0.0).dropout.p == 0
    with pytest.raises(ValueError, match="build_classifier needs a task of labelled sequences, got the language task tiny_"):
        build_classifier(tiny_language_task, 7, seed=1)


def test_build_is_seeded_and_leaves_the_random_state(task):
    before = torch.get_rng_state()
    first, second, third = (build_classifier(task, 7, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lstm.weight_hh_l0"], third["lstm.weight_hh_l0"])


def test_seeded_restores_the_state_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"hidden_size": 0}, "hidden_size of at least 1, got 0"),
        (ValueError, {"hidden_size": -8}, "hidden_size of at least 1, got -8"),
        (TypeError, {"hidden_size": 8.0}, "an int as hidden_size, got 8.0"),
        (TypeError, {"hidden_size": True}, "an int as hidden_size, got True"),
        (ValueError, {"num_features": 0}, "num_features of at least 1"),
        (ValueError, {"num_classes": 0}, "num_classes of at least 1"),
        (ValueError, {"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
        (ValueError, {"num_layers": 0}, "num_layers of at least 1"),
        (ValueError, {"vocab_size": 0}, "vocab_size of at least 1"),
        (ValueError, {"cell": "RNN"}, "SequenceClassifier needs a cell out of LSTM, GRU, got 'RNN'"),
        (ValueError, {"cell": "GRU", "proj_size": 2}, "proj_size 0 with a GRU, got 2"),
        (ValueError, {"pooling": "max"}, "pooling out of mean, last, got 'max'"),
    ],
)
def test_refuses(error, arguments, message):
    with pytest.raises(error, match=message):
        SequenceClassifier(**({"num_features": 3, "hidden_size": 5, "num_classes": 4} | arguments))


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"vocab_size": 0}, "LanguageModel needs vocab_size of at least 1, got 0"),
        (TypeError, {"hidden_size": "5"}, "LanguageModel needs an int as hidden_size, got '5'"),
        (ValueError, {"cell": "lstm"}, "LanguageModel needs a cell out of LSTM, GRU, got 'lstm'"),
        (ValueError, {"dropout": -0.1}, r"LanguageModel needs a dropout in \[0, 1\), got -0.1"),
    ],
)
def test_language_model_refuses(error, arguments, message):
    with pytest.raises(error, match=message):
        LanguageModel(**({"vocab_size": 9, "hidden_size": 5} | arguments))
