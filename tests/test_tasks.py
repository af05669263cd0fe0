import hashlib
import importlib.metadata
import io
import json
import lzma
import shutil
import subprocess
import sys
import wave
import zipfile
from collections import Counter

import numpy as np
import pytest

from workbench import tasks
from workbench.tasks import LanguageTask, Recipe, Split, Task, fsdd, imdb, japanese_vowels, ptb
from workbench.tasks.task import PARTS, data_folders, pad, standardise


@pytest.fixture(scope="module")
def vowels():
    return tasks.load("japanese_vowels")


def wav(samples):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(fsdd.SAMPLE_RATE)
        writer.writeframes(np.asarray(samples, "<i2").tobytes())
    return file.getvalue()


@pytest.fixture(scope="module")
def recordings():
    """A stand-in of the real archive: the same names; every recording is a noise of 2 to 4 frames of its own."""
    rng = np.random.default_rng(0)
    return {
        f"{digit}_{speaker}_{index}.wav": wav(rng.integers(-(2**12), 2**12, rng.integers(300, 600)))
        for digit in range(10)
        for speaker in fsdd.SPEAKERS
        for index in range(50)
    }


@pytest.fixture
def archive(recordings, tmp_path, monkeypatch):
    total = hashlib.sha256(b"".join(name.encode() + recordings[name] for name in sorted(recordings)))
    monkeypatch.setattr(fsdd, "RECORDINGS_SHA256", total.hexdigest())
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    path = tmp_path / "fsdd" / "recordings.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        for name, data in reversed(recordings.items()):  # the order inside the archive does not matter
            file.writestr(name, data)
    return path


def test_names_and_unknown_names():
    assert tasks.names() == ["japanese_vowels", "fsdd", "imdb", "ptb"]
    for verb in (tasks.load, tasks.digest):
        with pytest.raises(ValueError, match=r"unknown task 'mnist'; known tasks: japanese_vowels, fsdd, imdb, ptb"):
            verb("mnist")


def test_tasks_load_neither_torch_nor_sktime():
    code = (
        "import sys; from workbench import tasks; tasks.load('japanese_vowels');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'sktime', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_japanese_vowels_counts(vowels):
    assert {part: len(split.labels) for part, split in vowels.splits.items()} == {"train": 216, "valid": 54, "test": 370}
    assert (vowels.num_features, vowels.num_classes) == (12, 9)
    assert Counter(vowels.splits["train"].labels.tolist()) == dict.fromkeys(range(9), 24)
    assert Counter(vowels.splits["valid"].labels.tolist()) == dict.fromkeys(range(9), 6)
    assert list(Counter(vowels.splits["test"].labels.tolist()).values()) == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    items = [item for split in vowels.splits.values() for item in split.items]
    assert len(set(items)) == 640
    assert vowels.splits["valid"].items[:7] == tuple(f"JapaneseVowels_TRAIN:{n}" for n in (*range(24, 30), 54))


def test_japanese_vowels_values_come_from_the_file_by_train_statistics(vowels):
    path = next(p for p in importlib.metadata.files("sktime") if p.name == "JapaneseVowels_TRAIN.ts").locate()
    lines = path.read_text().splitlines()
    cases = [[c.split(",") for c in line.split(":")[:-1]] for line in lines[lines.index("@data") + 1 :]]
    raw = [np.array(case, float).T for case in cases]
    train = np.concatenate([case for n, case in enumerate(raw) if n % 30 < 24])
    number = 5 * 30 + 27  # validation utterance 5 * 6 + 3
    expected = (raw[number] - train.mean(0)) / np.sqrt(train.std(0) * train.std(0).mean())
    split = vowels.splits["valid"]
    assert split.lengths[33] == len(expected)
    np.testing.assert_allclose(split.x[33, : len(expected)], expected, atol=1e-6)
    assert not split.x[33, len(expected) :].any()
    assert vowels.splits["train"].x.dtype == np.float32


def test_japanese_vowels_refuses_other_splits_and_other_files(monkeypatch):
    with pytest.raises(ValueError, match="japanese_vowels knows only split=\"official\", got 'speaker:1'"):
        tasks.load("japanese_vowels", split="speaker:1")
    monkeypatch.setitem(japanese_vowels.FILES, "JapaneseVowels_TEST.ts", "0" * 64)
    with pytest.raises(ValueError, match=r"JapaneseVowels_TEST\.ts is not the published file: SHA-256 b3d41d6a"):
        tasks.load("japanese_vowels")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(FileNotFoundError, match=r"needs JapaneseVowels_TRAIN\.ts of the sktime package"):
        tasks.digest("japanese_vowels")


def test_digest_is_that_of_the_task_and_changes_with_the_features(vowels, monkeypatch):
    assert tasks.digest("japanese_vowels") == vowels.digest
    monkeypatch.setattr(japanese_vowels, "FEATURES", "other")
    assert tasks.digest("japanese_vowels") != vowels.digest


def test_fsdd_official_split(archive):
    task = tasks.load("fsdd")
    index = {part: {int(i.split("_")[2]) for i in split.items} for part, split in task.splits.items()}
    assert index == {"test": set(range(5)), "valid": set(range(5, 10)), "train": set(range(10, 50))}
    assert {part: len(split.items) for part, split in task.splits.items()} == {"train": 2400, "valid": 300, "test": 300}
    for split in task.splits.values():
        assert [int(item[0]) for item in split.items] == split.labels.tolist()
    train = task.splits["train"]
    frames = train.x[np.arange(train.x.shape[1]) < train.lengths[:, None]]
    np.testing.assert_allclose(frames.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(frames.std(0), 1, atol=1e-4)


def test_fsdd_speaker_split(archive):
    task = tasks.load("fsdd", split="speaker:theo")
    speakers = {part: Counter(i.split("_")[1] for i in split.items) for part, split in task.splits.items()}
    others = [speaker for speaker in fsdd.SPEAKERS if speaker != "theo"]
    assert speakers == {
        "test": {"theo": 500},
        "valid": dict.fromkeys(others, 50),
        "train": dict.fromkeys(others, 450),
    }
    assert {int(i.split("_")[2]) for i in task.splits["valid"].items} == set(range(5, 10))
    for wrong in ("speaker:ada", "theo", "speaker"):
        with pytest.raises(ValueError, match=f'fsdd knows split="official" and "speaker:<name>" .* got {wrong!r}'):
            tasks.load("fsdd", split=wrong)


def test_fsdd_takes_the_upstream_folder_too(archive, recordings):
    zipped = tasks.load("fsdd").splits["test"]
    before = tasks.digest("fsdd")
    archive.unlink()
    folder = archive.parent / "recordings"
    folder.mkdir()
    for name, data in recordings.items():
        (folder / name).write_bytes(data)
    (folder / "index.html").write_text("not a recording")
    plain = tasks.load("fsdd").splits["test"]
    assert plain.items == zipped.items
    np.testing.assert_array_equal(plain.x, zipped.x)
    assert tasks.digest("fsdd") == before == tasks.load("fsdd").digest
    next(folder.glob("3_theo_7.wav")).unlink()
    with pytest.raises(ValueError, match="recordings needs 3000 recordings, got 2999"):
        tasks.load("fsdd")


def test_fsdd_refuses_damaged_archives(archive, monkeypatch):
    intact = archive.read_bytes()
    archive.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(ValueError, match=r"fsdd: .*recordings\.zip is damaged"):
        tasks.digest("fsdd")
    damaged = bytearray(intact)
    damaged[1000] ^= 1  # inside a recording
    archive.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"fsdd: .*recordings\.zip is damaged"):
        tasks.digest("fsdd")
    archive.write_bytes(intact)
    monkeypatch.setattr(fsdd, "RECORDINGS_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="are not the published ones"):
        tasks.load("fsdd")


def test_fsdd_missing_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(fsdd, "data_folders", lambda name: [tmp_path / name])
    with pytest.raises(FileNotFoundError, match=r"recordings\.zip .*Fetch the folder from https://.*WORKBENCH_DATA"):
        tasks.load("fsdd")


def test_data_folders_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    assert data_folders("fsdd")[0] == tmp_path / "fsdd"
    monkeypatch.delenv("WORKBENCH_DATA")
    (inside,) = data_folders("fsdd")
    assert inside.parts[-2:] == ("data", "fsdd")


def test_log_mel_equals_the_sum_written_out():
    samples = np.random.default_rng(1).uniform(-1, 1, 437)
    filters = fsdd.mel_filters()
    result = fsdd.log_mel(samples, filters)
    assert result.shape == (3, 40)  # frames start at 0, 100 and 200; 300 + 200 is beyond 437
    n = np.arange(200)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 199)
    frame = samples[200:400] * window
    power = [abs(np.sum(frame * np.exp(-2j * np.pi * k * n / 256))) ** 2 for k in range(129)]
    np.testing.assert_allclose(result[2], np.log(np.array(power) @ filters + 1e-6))


def test_log_mel_puts_a_tone_into_the_band_of_its_pitch():
    tone = np.sin(2 * np.pi * 1000 * np.arange(4000) / 8000)
    top = 2595 * np.log10(1 + 4000 / 700)  # 2146.06 mel; 1000 Hz = 999.99 mel; bands are 52.34 mel apart
    nearest = round(999.99 / (top / 41)) - 1
    assert set(fsdd.log_mel(tone, fsdd.mel_filters()).argmax(1)) == {nearest} == {18}


def test_log_mel_of_silence_and_of_long_recordings():
    assert (fsdd.log_mel(np.zeros(20_000), fsdd.mel_filters()) == np.log(1e-6)).all()
    assert fsdd.log_mel(np.zeros(20_000), fsdd.mel_filters()).shape == (100, 40)


def test_mel_filters_by_hand():
    filters = fsdd.mel_filters()
    assert filters.shape == (129, 40)
    assert (filters.max(0) > 0).all() and filters.max() <= 1 and filters.min() == 0
    centre, high = 700 * (10 ** (2146.0645 / 41 * np.array([39, 40]) / 2595) - 1)  # Hz, of band 38: 3583 and 3787
    bin_hz = 117 * 8000 / 256  # 3656.25, on the falling side
    assert filters[117, 38] == pytest.approx((high - bin_hz) / (high - centre), abs=1e-4)
    assert filters[117, 39] == pytest.approx(1 - filters[117, 38])  # neighbours add up to 1
    assert np.count_nonzero(filters[117]) == 2


def test_pad_and_standardise_by_hand():
    first, second = np.array([[1.0, 10], [3, 30]]), np.array([[5.0, 50]])
    centred = standardise([first, second], train=[0])
    np.testing.assert_array_equal(centred[0], [[-1, -1], [1, 1]])
    np.testing.assert_array_equal(centred[1], [[3, 3]])
    split = pad(centred, [0, 1], ["a", "b"])
    np.testing.assert_array_equal(split.x[1], [[3, 3], [0, 0]])
    np.testing.assert_array_equal(split.lengths, [2, 1])


def test_pad_tokens_by_hand():
    split = pad([np.array([5, 6]), np.array([7])], [0, 1], ["a", "b"])
    assert split.x.dtype == np.int32 and split.tokens
    np.testing.assert_array_equal(split.x, [[5, 6], [7, 0]])


def test_half_standardised_by_hand():
    """Deviations 1 and 16: divided by 1 and 4 they are 1 and 4, of mean variance 8.5."""
    (centred,) = standardise([np.array([[1.0, 16], [3, 48]])], train=[0], power=0.5)
    np.testing.assert_allclose(centred, np.array([[-1, -4], [1, 4]]) / np.sqrt(8.5), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_a_feature_that_stays_the_same_in_training_is_only_shifted(dtype, power):
    """0.1 is no binary fraction: its mean over many frames is off by a rounding, which is no deviation."""
    frames = np.array([[1.0, 0.1, 0], [3, 0.1, 0]] * 500, dtype)
    centred = standardise([frames, np.array([[5, 0.2, 1]], dtype)], train=[0], power=power)
    np.testing.assert_allclose(centred[0][:2], [[-1, 0, 0], [1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(centred[1], [[3, 0.1, 1]], rtol=1e-5)
    (still,) = standardise([np.full((4, 2), 7.0)], train=[0])
    assert not still.any()


@pytest.mark.parametrize(("sequences", "labels", "message"), [
    ([], [], "pad needs at least one sequence, got none"),
    ([np.array([0.5, 1.7])], [0], r"pad needs features as \(T, F\), \(T, 1\) where there is one, .*, got \(2,\) float64"),
    ([np.zeros((2, 1))], [0.5], "pad needs labels that are whole numbers, got float64"),
    ([np.zeros((2, 1))], ["up"], "pad needs labels that are whole numbers, got <U2"),
    ([np.array([[0.0], [np.nan]])], [0], "Split needs finite features, got 1 of 2 that are not"),
])  # fmt: skip
def test_pad_refuses(sequences, labels, message):
    with pytest.raises(ValueError, match=message):
        pad(sequences, labels, ["a"] * len(sequences))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
def test_labels_of_any_whole_numbers_are_taken(dtype):
    assert pad([np.zeros((2, 1))] * 2, np.array([0, 1], dtype), ["a", "b"]).labels.dtype == np.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": np.array([3.0, 1.0])}, "Split needs lengths as int64, got float64"),
        ({"labels": np.array([0, 1], np.int32)}, "Split needs labels as int64, got int32"),
        ({"x": np.full((2, 3, 1), np.inf, np.float32)}, "Split needs finite features, got 6 of 6 that are not"),
        ({"x": np.zeros((2, 3, 1))}, "x as .* float32 or .* int32 or int64, got .* float64"),
        ({"x": np.zeros((2, 3), np.float32)}, "x as .* got .* float32"),
        ({"x": np.zeros((2, 3, 1), np.int64)}, "x as .* got .* int64"),
        ({"lengths": np.array([3, 4])}, "1 to 3 frames"),
        ({"lengths": np.array([0, 1])}, "1 to 3 frames"),
        ({"items": ("a",)}, "2 sequences, 2 lengths, 2 labels, 1 items"),
    ],
)
def test_split_refuses(change, message):
    good = {"x": np.zeros((2, 3, 1), np.float32), "lengths": np.array([3, 1]), "labels": np.array([0, 1]), "items": ("a", "b")}
    Split(**good)
    with pytest.raises(ValueError, match=message):
        Split(**(good | change))


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"epochs": 0}, "epochs of at least 1, got 0"),
        (TypeError, {"epochs": 2.5}, "an int as epochs, got 2.5"),
        (ValueError, {"batch_size": -1}, "batch_size of at least 1, got -1"),
        (ValueError, {"lr": 0.0}, "lr above 0, got 0.0"),
        (ValueError, {"lr": float("nan")}, "lr above 0, got nan"),
        (ValueError, {"weight_decay": -1}, "weight_decay from 0"),
        (ValueError, {"select_after": 1.0}, r"select_after in \[0, 1\), got 1.0"),
        (ValueError, {"optimizer": "adam"}, "an optimizer out of adamw, sgd, got 'adam'"),
        (ValueError, {"max_gradient_norm": 0}, "max_gradient_norm above 0, got 0"),
        (TypeError, {"bptt": 3.5}, "an int as bptt, got 3.5"),
        (ValueError, {"feature_mask": 1.5}, "feature_mask from 0 to 1, got 1.5"),
        (TypeError, {"decoder_bfloat16": 1}, "a bool as decoder_bfloat16, got 1"),
    ],
)
def test_recipe_refuses(error, change, message):
    with pytest.raises(error, match=message):
        Recipe(**change)


def test_real_fsdd():
    if not any((folder / form).exists() for folder in data_folders("fsdd") for form in ("recordings.zip", "recordings")):
        pytest.skip("the recordings are neither in $WORKBENCH_DATA nor in data/")
    task = tasks.load("fsdd")
    assert tasks.digest("fsdd") == task.digest
    assert {part: split.x.shape for part, split in task.splits.items()} == {
        "train": (2400, 100, 40),
        "valid": (300, 100, 40),
        "test": (300, 90, 40),
    }


WORDS_TASK = ("toy", "official")
REST = ("", "", "", "")


@pytest.mark.parametrize(
    ("sequence", "vocabulary", "recipe", "message"),
    [
        ([[1.0]], ("a", "b"), {}, "a vocabulary exactly where its sequences are tokens; train holds x .* float32"),
        ([1], None, {}, "a vocabulary exactly where its sequences are tokens; train holds x .* int32"),
        ([2], ("a", "b"), {}, "toy: train needs tokens from 0 to 1, got 2 to 2"),
        ([1], ("a", "b"), {"time_mask": 0.1}, "feature_noise, time_mask, feature_mask of 0, got time_mask=0.1"),
        ([1], ("a", "b"), {"feature_noise": 0.2}, "got feature_noise=0.2"),
    ],
)
def test_task_refuses(sequence, vocabulary, recipe, message):
    splits = dict.fromkeys(PARTS, pad([np.array(sequence)], [0], ["a"]))
    with pytest.raises(ValueError, match=message):
        Task(*WORDS_TASK, ("no", "yes"), splits, *REST, Recipe(**({"feature_noise": 0.0} | recipe)), vocabulary)


@pytest.mark.parametrize(
    ("tokens", "recipe", "message"),
    [
        (np.array([0, 2]), {}, "toy: train needs tokens from 0 to 1, got 0 to 2"),
        (np.array([0, -1]), {}, "tokens from 0 to 1, got -1 to 0"),
        (np.array([0]), {}, "train as .tokens,. int64 of at least 2 tokens, got"),
        (np.array([0, 1], np.int32), {}, "int64 of at least 2 tokens, got .* int32"),
        (np.array([0, 1]), {"feature_noise": 0.2}, "toy is a task of words: .* got feature_noise=0.2"),
    ],
)
def test_language_task_refuses(tokens, recipe, message):
    with pytest.raises(ValueError, match=message):
        LanguageTask(*WORDS_TASK, ("a", "b"), dict.fromkeys(PARTS, tokens), *REST, Recipe(**({"feature_noise": 0.0} | recipe)))


@pytest.mark.parametrize("label", [2, -100])
def test_labels_of_no_class_are_refused(label):
    good, odd = (pad([np.ones((1, 1))], [number], ["a"]) for number in (1, label))
    with pytest.raises(ValueError, match=f"Task toy needs labels from 0 to 1, .* got {label} to {label} in valid"):
        Task(*WORDS_TASK, ("no", "yes"), {"train": good, "valid": odd, "test": good}, *REST, Recipe())


def test_tasks_with_other_splits_are_refused():
    one = pad([np.ones((1, 1))], [0], ["a"])
    with pytest.raises(ValueError, match="Task toy needs the splits train, valid, test, got train, valid, tests"):
        Task(*WORDS_TASK, ("no", "yes"), {"train": one, "valid": one, "tests": one}, *REST, Recipe())
    with pytest.raises(ValueError, match="LanguageTask toy needs the splits train, valid, test, got train"):
        LanguageTask(*WORDS_TASK, ("a", "b"), {"train": np.array([0, 1])}, *REST, Recipe(feature_noise=0.0))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def reviews():
    """A stand-in of the real reviews: 40 of each kind; "good" or "bad" and numbers, and some texts several times."""
    rng = np.random.default_rng(0)
    found = {}
    for folder in imdb.FOLDERS:
        for n in range(40):
            numbers = " ".join(map(str, rng.integers(0, 50, 3 + n)))
            text = f"{'GOOD' if folder.endswith('pos') else 'Bad'}<br /><br />{numbers}."
            found[f"{folder}/{n}_{n % 10}.txt"] = text.encode()
        for copy in (11, 12, 13):
            found[f"{folder}/{copy}_{copy % 10}.txt"] = found[f"{folder}/10_0.txt"]
    return found


@pytest.fixture
def imdb_folder(reviews, tmp_path, monkeypatch):
    """As the packed files."""
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    monkeypatch.setattr(imdb, "VALID_PER_CLASS", 8)
    monkeypatch.setattr(imdb, "MAX_WORDS", 20)
    monkeypatch.setattr(imdb, "WORDS", 30)
    folder = tmp_path / "imdb"
    folder.mkdir()
    digests = {}
    for name in imdb.FILES:
        rows = [{"file": file, "text": text.decode()} for file, text in reviews.items() if file.startswith(name.split(".")[0])]
        (folder / name).write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        digests[name] = sha256((folder / name).read_bytes())
    monkeypatch.setattr(imdb, "FILES", digests)
    monkeypatch.setattr(imdb, "REVIEWS_SHA256", sha256(b"".join(n.encode() + reviews[n] for n in sorted(reviews))))
    return folder


def test_imdb_tokenise():
    text = "It's GREAT!!<br /><br />\"Really\" well-made, 9/10... caf\u00c9"
    assert imdb.tokenise(text) == ["it's", "great", "!", "!", "really", "well", "made", ",", "9", "10", ".", ".", ".", "café"]


def test_imdb_splits_and_tokens(imdb_folder, reviews):
    task = tasks.load("imdb")
    assert {part: Counter(split.labels.tolist()) for part, split in task.splits.items()} == {
        "train": {0: 32, 1: 32}, "valid": {0: 8, 1: 8}, "test": {0: 40, 1: 40},
    }  # fmt: skip
    of = {part: {f"{item}.txt" for item in split.items} for part, split in task.splits.items()}
    assert set().union(*of.values()) == set(reviews)
    assert all(item.startswith("test") == (part == "test") for part, items in of.items() for item in items)
    assert not {reviews[item] for item in of["train"]} & {reviews[item] for item in of["valid"]}

    words = Counter(word for item in of["train"] for word in imdb.tokenise(reviews[item].decode()))
    assert task.vocabulary[:2] == ("<pad>", "<unk>") and len(task.vocabulary) == 32
    counts = [words[word] for word in task.vocabulary[2:]]
    assert counts == sorted(words.values(), reverse=True)[:30]
    for split in task.splits.values():
        for n, item in enumerate(split.items):
            last = imdb.tokenise(reviews[f"{item}.txt"].decode())[-20:]
            expected = [word if word in task.vocabulary else "<unk>" for word in last]
            assert [task.vocabulary[token] for token in split.x[n, : split.lengths[n]]] == expected
            assert not split.x[n, split.lengths[n] :].any()
            assert split.labels[n] == ("pos" in item)
    assert task.num_features == task.recipe.embedding_size


def test_imdb_takes_the_upstream_folders_too(imdb_folder, reviews):
    packed, before = tasks.load("imdb"), tasks.digest("imdb")
    for name in imdb.FILES:
        (imdb_folder / name).unlink()
    for root in (imdb_folder / "aclImdb", imdb_folder):
        for name, text in reviews.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(text)
        plain = tasks.load("imdb")
        assert plain.digest == before == packed.digest
        for part, split in plain.splits.items():
            assert split.items == packed.splits[part].items
            np.testing.assert_array_equal(split.x, packed.splits[part].x)
        changed = root / "train" / "neg" / "3_3.txt"
        changed.write_text("another")
        with pytest.raises(ValueError, match="the 160 reviews in .* are not the published ones"):
            tasks.digest("imdb")
        shutil.rmtree(root / "train")


@pytest.mark.parametrize(("name", "file"), [("imdb", "test.jsonl.xz"), ("ptb", "ptb.valid.txt")])
def test_text_files_are_checked_and_missed(name, file, tmp_path, monkeypatch):
    module = tasks.TASKS[name]
    monkeypatch.setattr("workbench.tasks.task.data_folders", lambda name: [tmp_path / name])
    monkeypatch.setattr(imdb, "data_folders", lambda name: [tmp_path / name])
    with pytest.raises(FileNotFoundError, match=rf"{name}: found neither .*{file}.* https://.*WORKBENCH_DATA .* holds {name}"):
        tasks.load(name)
    (tmp_path / name).mkdir()
    for other in module.FILES:
        (tmp_path / name / other).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}: .*train.* is not the published file: SHA-256 e3b0c442"):
        tasks.digest(name)
    with pytest.raises(ValueError, match=f"{name} knows only split=\"official\", got 'speaker:1'"):
        tasks.load(name, split="speaker:1")


def test_ptb_words_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    (tmp_path / "ptb").mkdir()
    texts = {"train": " a b \n b <unk> \n", "valid": " b a \n", "test": " <unk> \n"}
    monkeypatch.setattr(ptb, "FILES", {f"ptb.{part}.txt": sha256(text.encode()) for part, text in texts.items()})
    for part, text in texts.items():
        (tmp_path / "ptb" / f"ptb.{part}.txt").write_text(text)
    task = tasks.load("ptb")
    assert task.vocabulary == ("a", "b", "<eos>", "<unk>")
    assert {part: tokens.tolist() for part, tokens in task.splits.items()} == {
        "train": [0, 1, 2, 1, 3, 2], "valid": [1, 0, 2], "test": [3, 2],
    }  # fmt: skip
    assert task.digest == tasks.digest("ptb")


def real(name):
    if not any((folder / file).exists() for folder in data_folders(name) for file in (*tasks.TASKS[name].FILES, "train")):
        pytest.skip(f"the files of {name} are neither in $WORKBENCH_DATA nor in data/")
    return tasks.load(name)


def test_real_imdb():
    task = real("imdb")
    assert {part: split.x.shape for part, split in task.splits.items()} == {
        "train": (22_500, 250), "valid": (2_500, 250), "test": (25_000, 250),
    }  # fmt: skip
    assert all(split.labels.mean() == 0.5 for split in task.splits.values())
    assert len(task.vocabulary) == 10_002 and task.vocabulary[2] == "the"
    assert max(np.mean(split.x == imdb.UNKNOWN) for split in task.splits.values()) < 0.05


def test_real_ptb():
    task = real("ptb")
    assert {part: len(tokens) for part, tokens in task.splits.items()} == {"train": 929_589, "valid": 73_760, "test": 82_430}
    assert len(task.vocabulary) == 10_000
    end = task.vocabulary.index("<eos>")
    assert {part: int((tokens == end).sum()) for part, tokens in task.splits.items()} == {
        "train": 42_068, "valid": 3_370, "test": 3_761,
    }  # fmt: skip
