import numpy as np
import pytest
import torch

from workbench.models import SequenceClassifier, build_classifier, seeded
from workbench.tasks import Recipe, Task
from workbench.tasks.task import pad


@pytest.fixture
def task():
    split = pad([np.ones((3, 2)), np.zeros((1, 2))], [0, 1], ["a", "b"])
    recipe = Recipe(dropout=0.25, pooling="last")
    return Task("toy", "official", ("no", "yes", "maybe"), {"train": split}, "", "", "", "", recipe)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_has_no_influence(pooling):
    model = SequenceClassifier(3, 5, 4, pooling=pooling).eval()
    x, lengths = torch.randn(2, 6, 3), torch.tensor([6, 2])
    alone = model(x[1:, :2], lengths[1:])
    for padding in (0.0, 1e6, float("nan")):
        x[1, 2:] = padding
        torch.testing.assert_close(model(x, lengths)[1:], alone)


def test_pooling_by_hand():
    mean, last = SequenceClassifier(3, 5, 4).eval(), SequenceClassifier(3, 5, 4, pooling="last").eval()
    last.load_state_dict(mean.state_dict())
    x = torch.randn(1, 4, 3)
    frames, (state, _) = mean.lstm(x[:, :3])
    lengths = torch.tensor([3])
    torch.testing.assert_close(mean(x, lengths), mean.classifier(frames.sum(1) / 3))
    torch.testing.assert_close(last(x, lengths), mean.classifier(state[0]))


def test_forget_bias_is_one_and_only_that():
    lstm = SequenceClassifier(3, 5, 4).lstm
    bias = lstm.bias_ih_l0 + lstm.bias_hh_l0
    assert (bias[5:10] == 1).all()
    assert not (bias[:5] == 1).any() and not (bias[10:] == 1).any()


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
        (ValueError, {"pooling": "max"}, "pooling out of mean, last, got 'max'"),
    ],
)
def test_refuses(error, arguments, message):
    with pytest.raises(error, match=message):
        SequenceClassifier(**({"num_features": 3, "hidden_size": 5, "num_classes": 4} | arguments))
