import copy
import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn
from torch.nn.utils import parametrize

from workbench import train
from workbench.constrain import compress
from workbench.container import read_tensors
from workbench.emulation import emulate
from workbench.methods import TopK
from workbench.models import build_classifier
from workbench.plan import uniform
from workbench.quantise import calibrate
from workbench.schedules import gradual
from workbench.sensitivity import calibration_batches
from workbench.tasks import Recipe, Task
from workbench.tasks.task import pad
from workbench.train import (
    Evaluation,
    augment,
    batch_losses,
    bucketed_batches,
    evaluate,
    fit,
    load_checkpoint,
    paired_interval,
    save_checkpoint,
    t_interval,
)


def toy_split(count, seed):
    """Class 1 drifts up, class 0 down, in sequences of 2 to 9 frames."""
    rng = np.random.default_rng(seed)
    labels = [n % 2 for n in range(count)]
    sequences = [rng.normal(0.5 * (2 * label - 1), 1, (rng.integers(2, 10), 3)) for label in labels]
    return pad(sequences, labels, [str(n) for n in range(count)])


@pytest.fixture(scope="module")
def task():
    splits = {"train": toy_split(70, 0), "valid": toy_split(40, 1), "test": toy_split(40, 2)}
    return Task("toy", "official", ("down", "up"), splits, "", "", "", "", Recipe(epochs=5, batch_size=16, select_after=0.0))


@pytest.fixture
def model(task):
    return build_classifier(task, 6, seed=0)


class Counted(nn.Module):
    """A constraint that counts how often it is evaluated."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return 0.5 * weight


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_learns_and_records(task, model):
    before = evaluate(model, task, "test")
    history = fit(model, task, seed=0, epochs=12, progress=False)
    after = evaluate(model, task, "test")
    assert after.loss < before.loss and after.accuracy > 85
    frame = history.frame
    assert list(frame.columns) == ["epoch", "lr", "train_loss", "valid_loss", "valid_accuracy", "seconds"]
    assert frame.epoch.tolist() == list(range(1, 13))
    assert frame.lr.max() <= task.recipe.lr and frame.lr.iloc[-1] < 0.1 * frame.lr.max()


def test_keeps_the_first_epoch_of_least_validation_loss(task, model):
    history = fit(model, task, seed=0, lr=0.3, epochs=8, progress=False)  # so fast that it does not end at its best
    losses = [row["valid_loss"] for row in history.epochs]
    assert history.best_epoch == 1 + int(np.argmin(losses)) < 8
    assert evaluate(model, task, "valid").loss == losses[history.best_epoch - 1]


def test_of_equal_losses_the_first_epoch_is_kept(task, model):
    assert fit(model, task, seed=0, lr=1e-30, progress=False).best_epoch == 1


def test_steps_written_out(task):
    """Without dropout and noise, on one batch, a training is the plain loop."""
    split = task.splits["train"]
    x, lengths, labels = (torch.from_numpy(array) for array in (split.x, split.lengths, split.labels))
    model = build_classifier(task, 6, seed=0, dropout=0.0)
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # so wrong at first that its gradient is clipped
    plain = copy.deepcopy(model)
    arguments = {"epochs": 20, "lr": 0.05, "batch_size": 70, "weight_decay": 0.1, "feature_noise": 0.0}
    history = fit(model, task, seed=0, select_after=0.95, progress=False, **arguments)
    optimizer = torch.optim.AdamW(plain.parameters(), 0.05, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, 21, pct_start=0.15)
    norms = []
    for row in history.epochs:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(plain(x, lengths), labels)
        loss.backward()
        assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-4)
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
    assert max(norms) > 1 > min(norms)  # clipping matters, sometimes
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_select_after_leaves_out_early_epochs(task, model):
    history = fit(model, task, seed=0, lr=0.3, epochs=8, select_after=0.5, progress=False)
    losses = [row["valid_loss"] for row in history.epochs]
    assert history.best_epoch == 5 + int(np.argmin(losses[4:]))
    assert min(losses[:4]) < min(losses[4:])  # otherwise this shows nothing


def test_same_seed_same_weights(task):
    results = []
    for seed in (3, 3, 4):
        model = build_classifier(task, 6, seed=0)
        fit(model, task, seed=seed, time_mask=0.3, feature_mask=0.3, progress=False)
        results.append(state(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_random_states_of_the_caller_are_untouched(task, model):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    fit(model, task, seed=0, time_mask=0.3, feature_mask=0.3, progress=False)
    evaluate(model, task, "valid")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    np.testing.assert_array_equal(np.random.get_state()[1], before[2][1])


def test_the_test_split_is_not_read(task, model):
    unread = SimpleNamespace(tokens=False, labels=np.array([0]))  # and no x
    fit(model, replace(task, splits=task.splits | {"test": unread}), seed=0, epochs=1, progress=False)


def test_what_is_given_goes_before_the_recipe(task, model):
    assert len(fit(model, task, seed=0, progress=False).epochs) == 5
    history = fit(model, task, seed=0, epochs=2, lr=0.04, progress=False)
    assert len(history.epochs) == 2
    assert max(row["lr"] for row in history.epochs) > 0.02


def test_one_evaluation_of_a_constraint_per_step(task, model):
    counted = Counted()
    parametrize.register_parametrization(model.lstm, "weight_hh_l0", counted)
    counted.calls, weights = 0, []
    fit(model, task, seed=0, epochs=2, progress=False, callback=lambda step, _: weights.append(
        model.lstm.parametrizations.weight_hh_l0.original.detach().clone()))  # fmt: skip
    assert counted.calls == 2 * (5 + 1)  # 5 steps and one validation per epoch
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))
    clone = copy.deepcopy(model)  # raises where a training forward has left tensors with a graph behind
    torch.testing.assert_close(evaluate(clone, task, "valid").loss, evaluate(model, task, "valid").loss)


def test_the_step_after_an_update_sees_the_new_constrained_weight(task, model):
    """A cache kept across steps would train on stale weights: a constraint that does nothing must change nothing."""
    constrained = copy.deepcopy(model)
    parametrize.register_parametrization(constrained.lstm, "weight_hh_l0", nn.Identity())
    fit(model, task, seed=0, epochs=2, progress=False)
    fit(constrained, task, seed=0, epochs=2, progress=False)
    torch.testing.assert_close(model.lstm.weight_hh_l0, constrained.lstm.weight_hh_l0)


def test_frozen_parameters_stay(task, model):
    model.classifier.weight.requires_grad_(False)
    before = state(model)
    fit(model, task, seed=0, epochs=1, progress=False)
    after = state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(before) - {"classifier.weight"}


def test_callback_sees_every_step_before_it_is_made(task, model):
    initial, seen = state(model), []

    def callback(step, total_steps):
        seen.append((step, total_steps))
        if step == 0:
            assert same(initial, model.state_dict())

    fit(model, task, seed=0, epochs=2, callback=callback, progress=False)
    assert seen == [(step, 10) for step in range(10)]


def test_modes_are_restored(task, model):
    for mode in (True, False):
        model.train(mode)
        fit(model, task, seed=0, epochs=1, progress=False)
        evaluate(model, task, "valid")
        assert model.training is mode


def test_distillation_draws_towards_the_teacher(task):
    class Opposite(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, lengths):
            return -self.inner(x, lengths)

    teacher = build_classifier(task, 6, seed=0)
    fit(teacher, task, seed=0, epochs=12, progress=False)
    accuracy = {}
    for weight in (0.0, 1.0):
        model = build_classifier(task, 6, seed=1)
        # Validation would choose an early epoch: the labels contradict this teacher.
        fit(model, task, seed=1, epochs=12, teacher=Opposite(teacher), distillation_weight=weight,
            select_after=0.9, progress=False)  # fmt: skip
        accuracy[weight] = evaluate(model, task, "train").accuracy
    assert accuracy[0.0] > 85 and accuracy[1.0] < 15


def test_loss_that_is_not_finite_is_reported(task, model):
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    before = model.training
    with pytest.raises(FloatingPointError, match=r"after epoch 1 of 5 .*learning rate was 0\.00024, its peak is 0\.006"):
        fit(model, task, seed=0, progress=False)
    assert model.training is before


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"epochs": 0}, "epochs of at least 1, got 0"),
        (TypeError, {"epochs": 1.5}, "an int as epochs"),
        (ValueError, {"lr": -1.0}, "lr above 0, got -1"),
        (ValueError, {"distillation_weight": 2.0}, r"distillation_weight in \[0, 1\].*got 2.0"),
        (ValueError, {"distillation_temperature": 0.0}, "distillation_temperature above 0.*got 0.5 and 0.0"),
        (ValueError, {"select_after": 1.0}, r"Recipe needs select_after in \[0, 1\), got 1.0"),
        (ValueError, {"device": "tpu"}, '"cpu" or "cuda" as device, got \'tpu\''),
    ],
)
def test_fit_refuses_before_it_starts(task, model, error, arguments, message):
    before = state(model)
    with pytest.raises(error, match=message):
        fit(model, task, seed=0, progress=False, **arguments)
    assert same(before, model.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_cuda(task, model):
    parametrize.register_parametrization(model.lstm, "weight_hh_l0", Counted())
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    fit(model, task, seed=0, epochs=12, time_mask=0.1, feature_mask=0.1, device="cuda", progress=False)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    accuracy = evaluate(copy.deepcopy(model), task, "test").accuracy
    assert accuracy > 85
    assert evaluate(model.to("cuda"), task, "test").accuracy == pytest.approx(accuracy, abs=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_missing(task, model):
    with pytest.raises(ValueError, match='cannot use device="cuda": torch finds no CUDA device'):
        fit(model, task, seed=0, device="cuda", progress=False)


def test_bar_goes_to_stderr(task, model, capfd):
    fit(model, task, seed=0, epochs=1)
    assert "training on toy: 100%" in capfd.readouterr().err


def test_batches_hold_every_index_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(1, 101, 1000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batches, again = bucketed_batches(lengths, 32), bucketed_batches(lengths, 32)
    assert sorted(torch.cat(batches).tolist()) == list(range(1000))
    assert max(map(len, batches)) == 32
    assert {tuple(b.tolist()) for b in batches} != {tuple(b.tolist()) for b in again}
    longest = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert longest < 1.2 * lengths.sum()  # 1.95 with batches at random
    order = [int(lengths[batch].max()) for batch in batches]
    assert order != sorted(order)


def test_augment_blanks_one_stretch_of_each_kind():
    x, lengths = torch.ones(200, 20, 10), torch.randint(1, 21, (200,))
    assert augment(x, lengths, Recipe(feature_noise=0.0)) is x
    noisy = augment(x, lengths, Recipe(feature_noise=0.2))
    assert abs((noisy - x).std() - 0.2) < 0.01 and (x == 1).all()

    masked = augment(x, lengths, Recipe(feature_noise=0.0, time_mask=0.5, feature_mask=0.3))
    for example, length in zip(masked, lengths, strict=True):
        kept_frames, kept_features = example.any(1), example.any(0)
        assert torch.equal(example, (kept_frames[:, None] & kept_features).float())
        assert (~kept_frames).sum() <= 0.5 * (length + 1) and kept_frames[length:].all()
        for kept in (kept_frames, kept_features):
            assert (kept.int().diff() == -1).sum() <= 1  # one stretch
    blank_features = (~masked.any(1)).sum(1)
    assert set(blank_features.tolist()) == {0, 1, 2, 3}
    assert (~masked.any(1)).any(0).all()  # every feature is blanked somewhere


def test_evaluate_item_by_item(task, model):
    result = evaluate(model, task, "test", batch_size=7)
    model.eval().requires_grad_(False)
    split = task.splits["test"]
    for n in range(len(split.labels)):
        logits = model(torch.from_numpy(split.x[n : n + 1]), torch.from_numpy(split.lengths[n : n + 1]))[0]
        assert result.correct[n] == (int(logits.argmax()) == split.labels[n])
        assert result.losses[n] == pytest.approx(float(logits.logsumexp(0) - logits[split.labels[n]]), abs=1e-5)
    assert isinstance(result, Evaluation)
    assert result.accuracy == pytest.approx(100 * result.correct.sum() / 40)
    assert result.loss == pytest.approx(result.losses.mean())
    with pytest.raises(ValueError, match="splits train, valid, test of toy, got 'tset'"):
        evaluate(model, task, "tset")


def test_evaluate_takes_a_recurrence_without_parameters(task, model):
    class Engine(nn.Module):
        """Stands for an LSTM on integers: no parameters, the same call."""

        def __init__(self, lstm):
            super().__init__()
            self.lstm = [lstm]

        def forward(self, x):
            assert not torch.is_grad_enabled() and not self.training
            return self.lstm[0](x)

    before = evaluate(model, task, "test")
    model.lstm = Engine(model.lstm)
    np.testing.assert_array_equal(evaluate(model, task, "test").losses, before.losses)


@pytest.mark.parametrize("change", ["bits", "emulated bits", "pooling", "dropout", "frozen"])
def test_a_checkpoint_of_another_model_of_the_same_state_is_refused(task, tmp_path, change):
    def made(second):
        recipe = replace(task.recipe, pooling="last" if change == "pooling" and second else "mean",
                         dropout=0.4 if change == "dropout" and second else 0.2)
        model = build_classifier(replace(task, recipe=recipe), 6, seed=0)
        if "bits" in change:
            plan = uniform(model, TopK(0.5), 3 if second else 6, calibrate(model, calibration_batches(task)))
            return (compress if change == "bits" else emulate)(model, plan)
        model.classifier.requires_grad_(change != "frozen" or not second)
        return model

    arguments = {"seed": 0, "epochs": 1, "progress": False, "checkpoint": tmp_path / "c.safetensors"}
    fit(made(False), task, **arguments)
    fit(made(False), task, **arguments)
    with pytest.raises(ValueError, match=r"is the checkpoint of another training\. (.*; )?model: \w+ there, \w+ here"):
        fit(made(True), task, **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_precision_is_trained_and_measured(task, model, dtype):
    wide = copy.deepcopy(model).to(dtype)
    fit(wide, task, seed=0, epochs=1, progress=False)
    assert math.isfinite(evaluate(wide, task, "valid").loss)
    assert evaluate(copy.deepcopy(model).double(), task, "valid").loss == pytest.approx(evaluate(model, task, "valid").loss)


def test_perplexity_of_a_diverged_model_is_infinite():
    assert Evaluation(800.0, 0.0, np.zeros(1), np.zeros(1, bool)).perplexity == math.inf
    assert Evaluation(2.0, 0.0, np.zeros(1), np.zeros(1, bool)).perplexity == math.exp(2.0)


def test_checkpoint_round_trip(task, model, tmp_path):
    path = save_checkpoint(model, tmp_path / "model.safetensors", {"task": "toy", "seed": 3})
    assert list(tmp_path.iterdir()) == [path]
    other = build_classifier(task, 6, seed=9)
    assert load_checkpoint(other, path) == {"task": "toy", "seed": 3}
    assert same(model.state_dict(), other.state_dict())


def test_checkpoint_of_a_constrained_model(task, tmp_path):
    models = [build_classifier(task, 6, seed=seed) for seed in (1, 2)]
    for model in models:
        parametrize.register_parametrization(model.lstm, "weight_hh_l0", Counted())
    load_checkpoint(models[1], save_checkpoint(models[0], tmp_path / "model.safetensors", {}))
    assert torch.equal(models[0].lstm.weight_hh_l0, models[1].lstm.weight_hh_l0)


def test_checkpoint_refuses_what_is_not_one(task, model, tmp_path):
    path = save_checkpoint(model, tmp_path / "model.safetensors", {})
    intact, before = path.read_bytes(), state(model)

    def refused(data, message):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, path)

    refused(intact[: len(intact) // 2], "a whole safetensors file, got .*model")
    refused(b"not at all", "a whole safetensors file")
    refused(intact[:-5] + bytes([intact[-5] ^ 1]) + intact[-4:], "found damage")
    refused(safetensors.numpy.save({"w": np.zeros(2)}), "needs a checkpoint, got .*of another origin")
    wider = save_checkpoint(build_classifier(task, 7, seed=0), tmp_path / "wider.safetensors", {})
    refused(wider.read_bytes(), r"the state of this very model.*classifier\.weight")
    with pytest.raises(ValueError, match="needs a checkpoint file, got .*missing"):
        load_checkpoint(model, tmp_path / "missing")
    with pytest.raises(ValueError, match="needs an existing directory, got .*nowhere"):
        save_checkpoint(model, tmp_path / "nowhere" / "model.safetensors", {})
    assert same(before, model.state_dict())


def test_checkpoint_leaves_the_old_file_when_writing_fails(task, model, tmp_path, monkeypatch):
    path = save_checkpoint(model, tmp_path / "model.safetensors", {"old": True})
    with pytest.raises(TypeError):
        save_checkpoint(model, path, {"not json": object()})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, path, {"old": False})
    assert list(tmp_path.iterdir()) == [path]
    assert load_checkpoint(model, path) == {"old": True}


def test_paired_interval_by_hand():
    a, b = np.ones((3, 50), bool), np.zeros((3, 50), bool)
    assert paired_interval(a, b, seed=0) == (100, 100, 100)
    assert paired_interval(a, a, seed=0) == (0, 0, 0)
    b[:, :25] = True  # a wins on every second item, in all seeds: only the items vary
    low, mean, high = paired_interval(a, b, seed=0)
    assert mean == 50
    half_width = 1.96 * 100 * np.sqrt(0.25 / 50)  # 13.9, the binomial's
    assert low == pytest.approx(50 - half_width, abs=1.5) and high == pytest.approx(50 + half_width, abs=1.5)


def test_paired_interval_is_paired_and_counts_seeds():
    rng = np.random.default_rng(0)
    a = rng.random((4, 200)) < 0.8
    assert paired_interval(a, a, seed=0) == (0, 0, 0)  # unpaired it would be about -5 to 5
    b = a.copy()
    b[0] = False  # one seed of four fails: the width comes from the seeds
    low, mean, high = paired_interval(a, b, seed=0)
    assert mean == pytest.approx(100 * a[0].sum() / 800)
    assert low == 0 and high > 2 * mean
    assert paired_interval(b, a, seed=0) == pytest.approx((-high, -mean, -low))
    c = rng.random((4, 200)) < 0.7
    assert paired_interval(a, c, seed=0) == paired_interval(a, c, seed=0) != paired_interval(a, c, seed=1)


@pytest.mark.parametrize(("seeds", "items", "right"), [(1, 40, (0.9, 0.8)), (3, 60, (0.8, 0.6)), (5, 200, (0.95, 0.94))])
def test_paired_interval_against_its_plain_definition(seeds, items, right):
    """Seeds and items drawn one by one, with replacement, as the bootstrap is defined."""
    rng = np.random.default_rng(seeds)
    a, b = (rng.random((seeds, items)) < share - 0.1 * rng.random((seeds, 1)) for share in right)
    difference, means = 100.0 * (a.astype(float) - b), []
    for _ in range(10_000):
        means.append(difference[rng.integers(seeds, size=seeds)][:, rng.integers(items, size=items)].mean())
    low, mean, high = paired_interval(a, b, seed=0)
    assert mean == pytest.approx(difference.mean())
    # The 2.5 % point of 10,000 draws is uncertain by 0.0016 of probability: within five times that in either sample.
    for mine, probability in ((low, 2.5), (high, 97.5)):
        least, most = np.percentile(means, [probability - 1.1, probability + 1.1])
        assert least - 1e-9 <= mine <= most + 1e-9


def test_t_interval_by_hand():
    low, mean, high = t_interval([1.0, 2.0, 6.0])
    assert mean == 3.0 and (high - mean, mean - low) == pytest.approx((4.302653 * np.sqrt(7 / 3),) * 2, rel=1e-6)
    low, mean, high = t_interval([4])
    assert mean == 4 and np.isnan([low, high]).all()
    assert np.isnan(t_interval([])).all()


def test_paired_interval_refuses():
    good = np.ones((2, 5), bool)
    for wrong in (good[0], good[:, :4], np.ones((3, 5), bool)):
        with pytest.raises(ValueError, match=r"two equal \(seeds, items\) arrays"):
            paired_interval(good, wrong, seed=0)
    with pytest.raises(TypeError, match="arrays of bool, got bool and float64"):
        paired_interval(good, good.astype(float), seed=0)


def test_metadata_is_json(model, tmp_path):
    path = save_checkpoint(model, tmp_path / "model.safetensors", {"accuracy": 98.5, "seeds": [0, 1]})
    about, tensors = read_tensors(path, who="", what="checkpoint", version=1)
    assert about == {"accuracy": 98.5, "seeds": [0, 1]}
    assert set(tensors) == set(model.state_dict())
    again = save_checkpoint(model, tmp_path / "again.safetensors", {"accuracy": 98.5, "seeds": [0, 1]})
    assert again.read_bytes() == path.read_bytes()


def test_modules_that_the_user_keeps_in_evaluation_mode_stay_there(task):
    """A switched-off dropout, say, in a model that trains; measured, as a teacher, and trained itself."""
    for model in (build_classifier(task, 6, seed=0).train(), build_classifier(task, 6, seed=0).eval()):
        model.lstm.train(not model.training)
        modes = [module.training for module in model.modules()]
        evaluate(model, task, "valid")
        assert [module.training for module in model.modules()] == modes
        fit(build_classifier(task, 4, seed=1), task, seed=0, epochs=1, teacher=model, distillation_weight=0.5, progress=False)
        assert [module.training for module in model.modules()] == modes
        fit(model, task, seed=0, epochs=1, progress=False)
        assert [module.training for module in model.modules()] == modes


@pytest.mark.filterwarnings("ignore:a retraining schedule passed over")  # of five steps
@pytest.mark.parametrize("epochs", [1, 5])
def test_no_epoch_before_the_end_of_a_schedule_is_kept(task, epochs):
    """One step an epoch, five epochs: the steps are at 0, 0.2, ... 0.8. Done at 0.75, the plan is whole in the last one only,
    though the one before ends at 0.8; and the last epoch is kept where none is late enough."""
    model = build_classifier(task, 8, seed=0)
    signals = calibrate(model, calibration_batches(task))
    schedule = gradual(model, uniform(model, TopK(0.25), 6, signals), until=0.75)
    history = fit(schedule.model, task, seed=0, epochs=epochs, batch_size=70, lr=1.0, select_after=0.75, retraining=schedule,
                  progress=False)
    assert history.best_epoch == epochs


def test_gradients_in_evaluation_mode_are_not_asked_of_cudnn(task, model, monkeypatch):
    """cuDNN refuses them. Off in every forward, on again between two of them."""
    seen = []
    handle = model.lstm.register_forward_pre_hook(lambda *_: seen.append((torch.backends.cudnn.enabled, model.training)))
    for _ in batch_losses(model, task, 2, seed=0):
        assert torch.backends.cudnn.enabled
    handle.remove()
    assert seen == 2 * [(False, False)]


def test_the_digest_of_code_knows_what_takes_part(tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("a = 1")
    other.write_text("a = 2")
    assert train.code_digest() == train.code_digest() != train.code_digest(one) != train.code_digest(other)
    assert train.code_digest(one, other) != train.code_digest(other, one)
