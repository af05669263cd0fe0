"""Japanese Vowels: which of nine men speaks, from 12 linear-prediction cepstral coefficients per frame.

The files come with the installed sktime package; sktime itself is not imported (that takes a second).
"""

import hashlib
import importlib.metadata

import numpy as np

from workbench.tasks.task import Recipe, Task, pad, standardise

FILES = {  # name -> SHA-256
    "JapaneseVowels_TRAIN.ts": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    "JapaneseVowels_TEST.ts": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}
FEATURES = "half standardised-1"  # to be changed with anything that changes the features
SPEAKERS = 9
TRAIN_PER_SPEAKER = 30
VALID_PER_SPEAKER = 6  # the last ones of each speaker's training utterances


def load(split: str) -> Task:
    """The task; the only `split` is "official" (270 training utterances, of which 54 are for validation; 370 test)."""
    if split != "official":
        raise ValueError(f'japanese_vowels knows only split="official", got {split!r}')
    sources = _read()
    sequences, labels, items = [], [], []
    for name, text in sources.items():
        lines = text.decode("ascii").splitlines()
        cases = [line for line in lines if line and line[0] not in "#@"]
        for number, line in enumerate(cases):
            *channels, speaker = line.split(":")
            sequences.append(np.array([channel.split(",") for channel in channels], float).T)  # (T, 12)
            labels.append(int(speaker) - 1)
            items.append(f"{name.removesuffix('.ts')}:{number}")
    num_train = SPEAKERS * TRAIN_PER_SPEAKER
    first_valid = TRAIN_PER_SPEAKER - VALID_PER_SPEAKER
    parts = {  # the training file lists the speakers in turn, 30 utterances each
        "train": [n for n in range(num_train) if n % TRAIN_PER_SPEAKER < first_valid],
        "valid": [n for n in range(num_train) if n % TRAIN_PER_SPEAKER >= first_valid],
        "test": list(range(num_train, len(sequences))),
    }
    sequences = standardise(sequences, parts["train"], power=0.5)  # the higher cepstra are small and mostly noise
    return Task(
        name="japanese_vowels",
        split=split,
        class_names=tuple(f"speaker {n}" for n in range(1, SPEAKERS + 1)),
        splits={
            part: pad([sequences[n] for n in chosen], [labels[n] for n in chosen], [items[n] for n in chosen])
            for part, chosen in parts.items()
        },
        digest=_digest(sources),
        description="speaker identification from the vowels a and e: 12 cepstral coefficients, 7 to 29 frames",
        source="Kudo, Toyama, Shimbo 1999; UCI Machine Learning Repository, data set 128; the copy inside sktime",
        licence="CC BY 4.0",
        recipe=Recipe(epochs=100, weight_decay=0.1, pooling="last", feature_noise=1.1),
    )


def digest() -> str:
    """SHA-256 over the two files and the feature version."""
    return _digest(_read())


def _digest(sources):
    return hashlib.sha256(b"".join(sources.values()) + FEATURES.encode()).hexdigest()


def _read():
    """File name -> bytes, checked."""
    installed = {path.name: path for path in importlib.metadata.files("sktime") or ()}
    sources = {}
    for name, expected in FILES.items():
        if name not in installed:
            raise FileNotFoundError(f"japanese_vowels needs {name} of the sktime package; the installed one has none")
        path = installed[name].locate()
        sources[name] = path.read_bytes()
        found = hashlib.sha256(sources[name]).hexdigest()
        if found != expected:
            raise ValueError(f"japanese_vowels: {path} is not the published file: SHA-256 {found}, expected {expected}")
    return sources
