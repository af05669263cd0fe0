"""Large Movie Review Dataset: whether a review is for or against its film, from its words."""

import collections
import hashlib
import itertools
import json
import lzma
import re

import numpy as np

from workbench.tasks.task import Recipe, Task, check_published, data_folders, missing, pad, read_files

FILES = {  # name -> SHA-256
    "train.jsonl.xz": "296d044eb7e97f5f28701cf3e1f03b7730e4d5e25e877c88123dec95c0da5de1",
    "test.jsonl.xz": "da208a79b7a6baa63a5cf6e51676318f0ed795f23375ce88bf42d7856bc28822",
}
FOLDERS = ("train/neg", "train/pos", "test/neg", "test/pos")
# SHA-256 over name and bytes of every review in the order of the names: holds for any form of them.
REVIEWS_SHA256 = "0e2feae48acbcc7c5c390de8729b5db2ff4c8ae25c00809fc7a91fa65adefcff"
ADDRESS = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"

TOKENS = "words-1"  # to be changed with anything that changes the tokens
SEPARATOR = re.compile(r"[^\w\s'.,!?]")
PUNCTUATION = ".,!?"  # each a word of its own
UNKNOWN = 1
WORDS = 10_000
MAX_WORDS = 250
VALID_PER_CLASS = 1250


def load(split: str) -> Task:
    """The task; the only `split` is "official" (25,000 reviews to train on, of which 2,500 are for validation; 25,000 test).

    Tokens are the 10,000 most frequent words of the train part, 0 is padding, 1 any other word. Of a longer review the last
    250 words are kept, not the first: the verdict stands at the end (Sun et al. 2019, arXiv:1905.05583, table 2).
    """
    if split != "official":
        raise ValueError(f'imdb knows only split="official", got {split!r}')
    reviews = _read()
    names = list(reviews)
    number = collections.defaultdict(itertools.count().__next__)  # word -> place in the order of first appearance
    texts, marks = [], []  # of each review its words by number, and a digest of them
    for text in reviews.values():
        words = tokenise(text.decode())
        texts.append(np.fromiter(map(number.__getitem__, words), np.int32, len(words)))
        marks.append(hashlib.sha256(" ".join(words).encode()).digest())
    labels = [int("/pos/" in name) for name in names]
    test = [n for n, name in enumerate(names) if name.startswith("test/")]
    valid = _validation(marks, labels, exclude=set(test))
    train = sorted(set(range(len(names))) - valid - set(test))
    counts = np.bincount(np.concatenate([texts[n] for n in train]), minlength=len(number))
    frequent = sorted(number, key=lambda word: (-counts[number[word]], word))[:WORDS]
    vocabulary = ("<pad>", "<unk>", *frequent)  # padding is 0, UNKNOWN 1
    token = np.full(len(number), UNKNOWN, np.int32)
    token[[number[word] for word in frequent]] = np.arange(UNKNOWN + 1, len(vocabulary))
    parts = {"train": train, "valid": sorted(valid), "test": test}
    return Task(
        name="imdb",
        split=split,
        class_names=("negative", "positive"),
        splits={
            part: pad(
                [token[texts[n][-MAX_WORDS:]] for n in chosen],
                [labels[n] for n in chosen],
                [names[n].removesuffix(".txt") for n in chosen],
            )
            for part, chosen in parts.items()
        },
        digest=_digest(),
        description=f"sentiment of film reviews: the last {MAX_WORDS} words, of the {WORDS:,} most frequent",
        source="Maas et al. 2011",
        licence="no formal licence: published for research, the texts belong to their authors and IMDb",
        recipe=Recipe(epochs=3, lr=3e-3, batch_size=64, dropout=0.5, feature_noise=0.0, select_after=0.0),
        vocabulary=vocabulary,
    )


def digest() -> str:
    """SHA-256 over the reviews and the version of the tokens; the reviews are read and checked."""
    _read()
    return _digest()


def tokenise(text: str) -> list[str]:
    """Words of a review in lower case, and full stop, comma, exclamation and question mark."""
    text = SEPARATOR.sub(" ", text.lower().replace("<br />", " "))
    for mark in PUNCTUATION:  # splitting at spaces takes half the time of finding every word by an expression
        text = text.replace(mark, f" {mark} ")
    return text.split()


def _validation(marks, labels, exclude):
    """Numbers of the reviews that validate: as many of each class; copies of one text, of equal marks, stay together, and
    the order of the marks decides."""
    copies = collections.defaultdict(list)
    for n, mark in enumerate(marks):
        if n not in exclude:
            copies[mark].append(n)
    free, chosen = [VALID_PER_CLASS, VALID_PER_CLASS], set()
    for _, group in sorted(copies.items()):
        wanted = [sum(labels[n] == label for n in group) for label in (0, 1)]
        if wanted[0] <= free[0] and wanted[1] <= free[1]:
            free = [free[0] - wanted[0], free[1] - wanted[1]]
            chosen.update(group)
    return chosen


def _digest():
    return hashlib.sha256((REVIEWS_SHA256 + TOKENS).encode()).hexdigest()


def _read():
    """Name (for example "train/neg/0_3.txt") -> bytes of the 50,000 labelled reviews in the order of the names, checked."""
    if (files := read_files("imdb", FILES, ADDRESS)) is not None:
        lines = itertools.chain.from_iterable(lzma.decompress(data).splitlines() for data in files.values())
        reviews = {row["file"]: row["text"].encode() for row in map(json.loads, lines)}
        return dict(sorted(reviews.items()))
    for root in (root for folder in data_folders("imdb") for root in (folder, folder / "aclImdb")):
        if all((root / folder).is_dir() for folder in FOLDERS):
            return _checked(root)
    forms = f"{' and '.join(FILES)}, nor the folders {', '.join(FOLDERS)} (also below aclImdb/)"
    raise missing("imdb", forms, f"{ADDRESS} and extract it")


def _checked(root):
    reviews = {f"{folder}/{path.name}": path.read_bytes() for folder in FOLDERS for path in (root / folder).glob("*.txt")}
    reviews = dict(sorted(reviews.items()))
    check_published(f"imdb: the {len(reviews)} reviews in {root}", reviews, REVIEWS_SHA256, ADDRESS)
    return reviews
