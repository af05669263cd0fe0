"""Training and measuring language models, resumption of trainings, and baselines."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from workbench import tasks, train
from workbench.__main__ import main
from workbench.models import build_classifier, build_language_model
from workbench.train import baseline, evaluate, fit, save_checkpoint


@pytest.fixture
def task(tiny_language_task):
    return tiny_language_task


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_learns(task, cell):
    model = build_language_model(task, 12, seed=0, cell=cell)
    before = evaluate(model, task, "test")
    assert before.perplexity == pytest.approx(7, rel=0.1)  # it knows nothing of 7 words
    history = fit(model, task, seed=0, epochs=8, progress=False)
    after = evaluate(model, task, "test")
    # The text's own: the next word has probability 0.9 + 0.1 / 7, each other 0.1 / 7.
    best = np.exp(-(0.9 + 0.1 / 7) * np.log(0.9 + 0.1 / 7) - 0.6 / 7 * np.log(0.1 / 7))
    assert best < after.perplexity < 1.25 * best and after.accuracy > 85
    assert evaluate(model, task, "valid").loss == history.epochs[history.best_epoch - 1]["valid_loss"]


def test_adamw_learns_too(task):
    model = build_language_model(task, 12, seed=0)
    history = fit(model, task, seed=0, epochs=8, optimizer="adamw", lr=3e-2, progress=False)
    assert evaluate(model, task, "test").accuracy > 85
    assert history.epochs[-1]["lr"] < 0.1 * max(row["lr"] for row in history.epochs)


@pytest.mark.parametrize("count", [203, 210, 7, 2])
def test_evaluation_reads_every_token_once(task, count, monkeypatch):
    """Against each stream on its own, in one piece; 203 tokens make streams of 21 and 20, of which pieces of 8 leave a rest."""
    monkeypatch.setattr(train, "EVALUATION_TOKENS", 8)
    task = replace(task, splits=task.splits | {"valid": task.splits["train"][:count]})
    model = build_language_model(task, 5, seed=0)
    result = evaluate(model, task, "valid")
    model.eval()
    losses, correct = [], []
    for stream in np.array_split(task.splits["valid"], min(10, count // 2)):
        stream = torch.from_numpy(stream)
        with torch.no_grad():
            logits = model(stream[:-1, None])[0][:, 0]
        losses.append(functional.cross_entropy(logits, stream[1:], reduction="none"))
        correct.append(logits.argmax(1) == stream[1:])
    np.testing.assert_allclose(result.losses, torch.cat(losses), rtol=1e-4)
    np.testing.assert_array_equal(result.correct, torch.cat(correct))
    assert len(result.losses) == count - min(10, count // 2)
    assert result.perplexity == pytest.approx(np.exp(result.losses.mean()))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_evaluate_takes_a_recurrence_without_parameters(task, cell):
    class Engine(nn.Module):
        """Stands for a layer on integers: no parameters, its argument named hx, float tensors in and out."""

        def __init__(self, rnn):
            super().__init__()
            self.rnn = [rnn]

        def forward(self, input, hx=None):
            assert not torch.is_grad_enabled() and not self.training
            return self.rnn[0](input, hx)

    model = build_language_model(task, 5, seed=0, cell=cell)
    before = evaluate(model, task, "test")
    setattr(model, cell.lower(), Engine(model.rnn))
    np.testing.assert_array_equal(evaluate(model, task, "test").losses, before.losses)
    assert model.training


def test_steps_written_out(task):
    """Without dropout, a training is the plain loop: contiguous streams, a carried state, a clipped step."""
    model, plain = (build_language_model(task, 6, seed=0, dropout=0.0) for _ in range(2))
    history = fit(model, task, seed=0, epochs=2, progress=False)
    text = torch.from_numpy(task.splits["train"]).view(4, 500)
    optimizer = torch.optim.SGD(plain.parameters(), 5.0)
    for row in history.epochs:
        state, total = None, 0.0
        for start in range(0, 499, 20):
            x, y = text[:, start : start + 20], text[:, start + 1 : start + 21]
            x = x[:, : y.shape[1]]  # the last piece has 19
            out, state = plain.lstm(plain.embedding(x.T), state)
            state = [s.detach() for s in state]
            loss = functional.cross_entropy((out @ plain.embedding.weight.T + plain.bias).transpose(1, 2), y.T)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            total += loss.item() * y.numel()
        assert row["train_loss"] == pytest.approx(total / (4 * 499), rel=1e-4)
        assert row["lr"] == 5.0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_loss_of_words_is_the_cross_entropy(dtype, tolerance):
    """150 tokens are two whole parts of 64 rows and a rest; bfloat16 is summed in float32."""
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(150, 300, generator=generator)).to(dtype).requires_grad_()
    words = torch.randint(300, (150,), generator=generator)
    plain = logits.detach().double().requires_grad_()
    found, expected = train._WordLoss.apply(logits, words), functional.cross_entropy(plain, words)
    (0.3 * found).backward()  # a factor that bfloat16 does not hold
    (0.3 * expected).backward()
    assert found.item() == pytest.approx(expected.item(), rel=min(tolerance, 1e-5))
    torch.testing.assert_close(logits.grad.double(), plain.grad, rtol=tolerance, atol=tolerance / 150)
    size, known = logits.grad.double().abs().sum(), plain.grad.abs().sum()
    assert size.item() == pytest.approx(known.item(), rel=min(tolerance, 1e-3))


def test_the_loss_of_words_refuses_a_second_derivative():
    weights = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = train._WordLoss.apply(torch.ones(3, 4) @ weights, torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(loss, weights, retain_graph=True)
    assert torch.equal(gradient, *torch.autograd.grad(loss, weights, retain_graph=True))
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(loss, weights, create_graph=True)


def test_distillation_from_a_decoder_in_bfloat16_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(8, 500, generator=generator)).bfloat16()
    soft = (logits.float() / 2 + 0.1 * torch.randn(8, 500, generator=generator)).softmax(1)
    distil = train._Distillation(None, 1.0, 2.0)
    assert torch.equal(distil.mixed(0.0, logits, soft), distil.mixed(0.0, logits.float(), soft))


def test_the_decoder_multiplies_in_bfloat16_in_training_only(task):
    recipe = replace(task.recipe, decoder_bfloat16=True)
    model, plain = (build_language_model(replace(task, recipe=r), 12, seed=0, dropout=0.0) for r in (recipe, task.recipe))
    tokens = torch.from_numpy(task.splits["train"][:20, None])
    rough, state = model(tokens)
    exact, _ = plain(tokens)
    assert rough.dtype == torch.bfloat16 and state[0].dtype == torch.float32
    torch.testing.assert_close(rough.float(), exact, rtol=2e-2, atol=1e-3)
    assert not torch.equal(rough.float(), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(tokens)[0].dtype == torch.bfloat16  # the caller's own choice stands
    assert torch.equal(model.eval()(tokens)[0], plain.eval()(tokens)[0])
    fit(model, replace(task, recipe=recipe), seed=0, epochs=8, progress=False)
    assert evaluate(model, task, "test").accuracy > 85
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


def test_sgd_divides_its_rate_where_validation_does_not_improve(task):
    history = fit(build_language_model(task, 6, seed=0), task, seed=0, epochs=12, lr=40.0, progress=False)
    losses = [row["valid_loss"] for row in history.epochs]
    worse = [losses[n] >= min(losses[:n]) for n in range(1, 11)]  # of the epochs 2 to 11
    expected = 40.0 / 4.0 ** np.cumsum([0, 0, *worse])
    assert [row["lr"] for row in history.epochs] == expected.tolist()
    assert any(worse) and not all(worse)


def test_distillation_draws_a_language_model_towards_its_teacher(task):
    class Constant(nn.Module):
        """Always says word 3, and counts on being asked with its own state."""

        def forward(self, tokens, state):
            assert not self.training and (state is None or state == 1)
            return 20.0 * functional.one_hot(torch.full_like(tokens, 3), 7).float(), 1

    model = build_language_model(task, 12, seed=0)
    fit(model, task, seed=0, teacher=Constant(), distillation_weight=1.0, distillation_temperature=1.0, select_after=0.9,
        progress=False)  # fmt: skip
    accuracy = 100 * np.mean(task.splits["test"] == 3)
    assert evaluate(model, task, "test").accuracy == pytest.approx(accuracy, abs=3)


def test_augmentation_of_words_is_refused(task, tiny_token_task):
    for build, words in ((build_language_model, task), (build_classifier, tiny_token_task)):
        with pytest.raises(ValueError, match="is a task of words: its recipe needs .* of 0, got time_mask=0.1"):
            fit(build(words, 5, seed=0), words, seed=0, time_mask=0.1, progress=False)


def test_too_short_a_text_is_refused(task):
    short = replace(task, splits={part: tokens[:7] for part, tokens in task.splits.items()})
    with pytest.raises(ValueError, match="at least 2 tokens for each of 4 streams, got 7 in all"):
        fit(build_language_model(task, 5, seed=0), short, seed=0, progress=False)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_classifier_of_tokens_learns(tiny_token_task, cell):
    model = build_classifier(tiny_token_task, 6, seed=0, cell=cell)
    fit(model, tiny_token_task, seed=0, epochs=10, progress=False)
    assert evaluate(model, tiny_token_task, "test").accuracy > 85


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def constrained(model):
    parametrize.register_parametrization(model.rnn, "weight_hh_l0", Halved())
    return model


# fmt: off
KINDS = {
    "adamw, features": lambda fixture: (fixture("tiny_task"), build_classifier, {"lr": 0.3, "time_mask": 0.2}),
    "adamw, tokens": lambda fixture: (fixture("tiny_token_task"), build_classifier, {}),
    "sgd, language": lambda fixture: (fixture("tiny_language_task"), build_language_model, {"lr": 40.0}),
    "adamw, language": lambda fixture: (
        fixture("tiny_language_task"), build_language_model, {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.1},
    ),
}
# fmt: on


class Interrupted(Exception):
    pass


def stop_at(wanted):
    def callback(step, total):
        if step == (wanted if wanted >= 1 else int(wanted * total)):
            raise Interrupted

    return callback


@pytest.mark.parametrize("teaches", [False, True], ids=["alone", "with a teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_ends_with_the_very_same_weights(kind, teaches, request, tmp_path):
    task, build, settings = KINDS[kind](request.getfixturevalue)
    settings |= {"epochs": 6, "seed": 3, "select_after": 0.0, "progress": False}
    if teaches:
        settings |= {"teacher": build(task, 4, seed=8)}
    whole = constrained(build(task, 5, seed=1))
    expected = fit(whole, task, **settings)

    assert expected.best_epoch < 5 or kind != "adamw, features"  # there the best comes before a stop

    path = tmp_path / "training.safetensors"
    for share in (0.1, 0.4, 0.75):  # within the first, the third and the fifth epoch
        with pytest.raises(Interrupted):
            fit(constrained(build(task, 5, seed=1)), task, checkpoint=path, callback=stop_at(share), **settings)
    resumed, told = constrained(build(task, 5, seed=1)), []
    history = fit(resumed, task, checkpoint=path, on_epoch=told.append, **settings)
    assert same(resumed.state_dict(), whole.state_dict())

    def without_times(rows):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    assert without_times(history.epochs) == without_times(expected.epochs) == without_times(told)
    assert history.best_epoch == expected.best_epoch

    written = path.read_bytes()
    again = constrained(build(task, 5, seed=1))
    assert fit(again, task, checkpoint=path, callback=stop_at(0.0), **settings) == history
    assert same(again.state_dict(), whole.state_dict())
    assert path.read_bytes() == written and list(tmp_path.iterdir()) == [path]


def test_checkpoint_of_another_training_is_refused(tiny_task, tmp_path):
    path = tmp_path / "training.safetensors"

    def train_(seed=0, task=tiny_task, model=None, **settings):
        model = model or build_classifier(task, 4, seed=0)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            return fit(model, task, seed=seed, checkpoint=path, progress=False, **({"epochs": 2} | settings))
        except ValueError:
            assert same(before, model.state_dict())
            raise

    train_()
    for finished in (True, False):
        for arguments, message in (
            ({"epochs": 3}, "epochs: 2 there, 3 here"),
            ({"seed": 1, "lr": 0.5}, "another training. seed: 0 there, 1 here; lr: 0.006 there, 0.5 here"),
            ({"task": replace(tiny_task, digest="abc")}, "data:  there, abc here"),
            ({"teacher": build_classifier(tiny_task, 4, seed=1)}, r"distillation: None there, \['[0-9a-f]{16}', 0.5, 2.0\]"),
            ({"model": build_classifier(tiny_task, 5, seed=0)}, "initial weights: [0-9a-f]{16} there, [0-9a-f]{16} here"),
            ({"model": build_classifier(tiny_task, 4, seed=1)}, "initial weights"),
        ):
            with pytest.raises(ValueError, match=message):
                train_(**arguments)
        if finished:
            path.unlink()
            with pytest.raises(Interrupted):
                train_(callback=stop_at(5))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(ValueError, match="fit found damage in"):
        train_()
    save_checkpoint(build_classifier(tiny_task, 4, seed=0), path, {})
    with pytest.raises(ValueError, match="fit needs a training, got .*, a checkpoint"):
        train_()
    path = tmp_path / "nowhere" / "training.safetensors"
    with pytest.raises(ValueError, match="fit needs an existing directory for its checkpoint, got .*nowhere"):
        train_()


def test_baseline_is_trained_once_and_then_found(task, tiny_token_task, tmp_path, monkeypatch):
    model, history = baseline(task, hidden_size=6, seed=1, cell="GRU", epochs=2, checkpoints=tmp_path, progress=False)
    plain = build_language_model(task, 6, seed=1, cell="GRU")
    assert fit(plain, task, seed=1, epochs=2, progress=False).best_epoch == history.best_epoch
    assert same(model.state_dict(), plain.state_dict())
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("tiny_language-GRU-6-seed1-") and len(path.name) == len("tiny_language-GRU-6-seed1-") + 8 + 12

    monkeypatch.setattr(train, "_fit", lambda *_: pytest.fail("trained again"))
    again, found = baseline(task, hidden_size=6, seed=1, cell="GRU", epochs=2, checkpoints=tmp_path, progress=False)
    assert found == history and same(again.state_dict(), model.state_dict())
    monkeypatch.undo()

    baseline(tiny_token_task, hidden_size=6, seed=1, num_layers=2, epochs=1, checkpoints=tmp_path, progress=False)
    baseline(task, hidden_size=6, seed=1, cell="GRU", epochs=1, checkpoints=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_baseline_of_older_code_is_not_found(task, tmp_path, monkeypatch):
    baseline(task, hidden_size=3, seed=0, epochs=1, checkpoints=tmp_path, progress=False)
    monkeypatch.setattr(train, "code_digest", lambda: "changed")
    baseline(task, hidden_size=3, seed=0, epochs=1, checkpoints=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("inside", [True, False], ids=["in a run", "elsewhere"])
def test_baselines_lie_in_results(task, tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WB_RESULTS", str(tmp_path / "kept"))
    if not inside:
        monkeypatch.delenv("WB_RESULTS")
    baseline(task, hidden_size=3, seed=0, epochs=1, progress=False)
    (path,) = tmp_path.rglob("*.safetensors")
    assert path.parent == tmp_path / ("kept" if inside else "results") / "checkpoints"


@pytest.mark.parametrize(("name", "quality"), [("tiny_task", "accuracy"), ("tiny_language_task", "perplexity")])
def test_train_command(name, quality, request, tmp_path, monkeypatch):
    task = request.getfixturevalue(name)
    monkeypatch.setattr(tasks, "load", lambda asked: task)
    command = ["train", "toy", "--cell", "GRU", "--hidden-size", "4", "--epochs", "2", "--checkpoints", str(tmp_path / "kept")]
    first, second = (CliRunner().invoke(main, command) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr
    assert first.stdout == second.stdout  # the second time from the file
    *epochs, last = first.stdout.splitlines()
    assert [line.split(":")[0].split() for line in epochs] == [["epoch", "1"], ["epoch", "2"]]
    assert all(f", {quality} " in line and "validation loss" in line for line in epochs)
    model, history = baseline(task, hidden_size=4, seed=0, cell="GRU", epochs=2, checkpoints=tmp_path / "kept", progress=False)
    test = evaluate(model, task, "test")
    number = f"perplexity {test.perplexity:.2f}" if quality == "perplexity" else f"accuracy {test.accuracy:.2f} %"
    assert last == f"epoch {history.best_epoch} kept, test loss {test.loss:.4f}, {number}"
    wrong = CliRunner().invoke(main, [*command[:-1], str(tmp_path), "--hidden-size", "-1"])
    assert (wrong.exit_code, wrong.stderr.splitlines()[-1][:6]) == (1, "Error:")


def test_train_command_needs_no_notebook_packages():
    """A machine that only trains has torch, numpy, safetensors, click and tqdm."""
    code = """
import importlib.abc, runpy, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("papermill", "nbformat", "nbconvert", "jupyter_client", "ipykernel", "IPython", "traitlets",
                                  "ipywidgets", "matplotlib", "jinja2", "psutil", "pyarrow", "latex2mathml", "sktime"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
sys.argv = ["workbench", "train", "no such task"]
runpy.run_module("workbench", run_name="__main__", alter_sys=True)
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.stderr.startswith("Error: unknown task 'no such task'"), outcome.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda(kind, request, tmp_path):
    task, build, settings = KINDS[kind](request.getfixturevalue)
    settings |= {"epochs": 4, "seed": 3, "select_after": 0.0, "progress": False, "device": "cuda"}
    path = tmp_path / "training.safetensors"
    with pytest.raises(Interrupted):
        fit(build(task, 5, seed=1), task, checkpoint=path, callback=stop_at(0.6), **settings)
    with pytest.raises(ValueError, match="device: cuda there, cpu here"):
        fit(build(task, 5, seed=1), task, checkpoint=path, **(settings | {"device": "cpu"}))
    model, whole = build(task, 5, seed=1), build(task, 5, seed=1)
    history, expected = fit(model, task, checkpoint=path, **settings), fit(whole, task, **settings)
    losses = [[row["valid_loss"] for row in h.epochs] for h in (history, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    on_processor = fit(build(task, 5, seed=1), task, checkpoint=path, **(settings | {"device": "cpu"}))
    assert on_processor == history
    result = evaluate(model.to("cuda"), task, "test")
    assert result.loss == pytest.approx(evaluate(model.to("cpu"), task, "test").loss, rel=1e-3)
