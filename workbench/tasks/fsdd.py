"""Free Spoken Digit Dataset: 3,000 recordings of the digits 0 to 9 by six speakers, as log-mel frames."""

import hashlib
import io
import re
import wave
import zipfile
import zlib

import numpy as np

from workbench.tasks.task import Recipe, Task, check_published, data_folders, pad, standardise

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
RECORDING = re.compile(rf"([0-9])_({'|'.join(SPEAKERS)})_([0-9]+)\.wav")
NUM_RECORDINGS = 3000
# SHA-256 over name and bytes of every recording in the order of the names: holds for any archive of them.
RECORDINGS_SHA256 = "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e"
ADDRESS = "https://github.com/Jakobovski/free-spoken-digit-dataset/tree/26eb9aaf76e81b692f806f9140c2d2777410d7a1/recordings"

FEATURES = "log-mel-1"  # to be changed with anything that changes the features
SAMPLE_RATE = 8000  # Hz
WINDOW = 200  # samples, 25 ms
HOP = 100  # samples, 12.5 ms
FFT = 256
BANDS = 40
MAX_FRAMES = 100  # 1.2 s; the rest of the few longer recordings is left out
POWER_FLOOR = 1e-6  # under it lies the rounding of 16-bit samples


def load(split: str) -> Task:
    """The task, divided the way `split` says.

    "official": recordings 0-4 of every speaker and digit test, 5-9 validate, 10-49 train. "speaker:<name>": all
    500 recordings of that speaker test; of the others 5-9 validate and all the rest trains, 0-4 too.
    """
    held_out = split.removeprefix("speaker:")
    if split != "official" and (held_out == split or held_out not in SPEAKERS):
        raise ValueError(f'fsdd knows split="official" and "speaker:<name>" of {", ".join(SPEAKERS)}; got {split!r}')
    recordings = _read()
    filters = mel_filters()
    names = list(recordings)
    sequences = [log_mel(_samples(recordings[name]), filters) for name in names]
    parts = {"train": [], "valid": [], "test": []}
    for n, name in enumerate(names):
        _, speaker, index = _fields(name)
        parts[_official(index) if split == "official" else _by_speaker(index, speaker == held_out)].append(n)
    sequences = standardise(sequences, parts["train"])
    return Task(
        name="fsdd",
        split=split,
        class_names=tuple(str(digit) for digit in range(10)),
        splits={
            part: pad(
                [sequences[n] for n in chosen],
                [_fields(names[n])[0] for n in chosen],
                [names[n].removesuffix(".wav") for n in chosen],
            )
            for part, chosen in parts.items()
        },
        digest=_digest(),
        description=f"spoken digits: {BANDS} log-mel bands, 25 ms window, 12.5 ms hop, first {MAX_FRAMES} frames",
        source="Jackson et al. 2018, doi:10.5281/zenodo.1342401",
        licence="CC BY-SA 4.0",
        # Chosen on the validation split of the official division.
        recipe=Recipe(epochs=60, feature_noise=0.4, time_mask=0.1, feature_mask=0.1),
    )


def digest() -> str:
    """SHA-256 over the recordings and the feature version; the recordings are read and checked."""
    _read()
    return _digest()


def mel_filters() -> np.ndarray:
    """Triangular filters of height 1, equally spaced on the mel scale from 0 Hz to half the sample rate: (FFT//2+1, BANDS)."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)  # Hz
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    hz = np.fft.rfftfreq(FFT, 1 / SAMPLE_RATE)[:, None]  # (FFT//2+1, 1)
    return np.maximum(0, np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)))


def log_mel(samples: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Natural logarithm of the mel power of the first frames of `samples` in [-1, 1): (frames, BANDS)."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP][:MAX_FRAMES]  # (frames, WINDOW)
    spectrum = np.fft.rfft(frames * np.hanning(WINDOW), FFT)  # (frames, FFT//2+1)
    return np.log(np.abs(spectrum) ** 2 @ filters + POWER_FLOOR)


def _official(index):
    return "test" if index < 5 else "valid" if index < 10 else "train"


def _by_speaker(index, held_out):
    return "test" if held_out else "valid" if 5 <= index < 10 else "train"


def _fields(name):
    digit, speaker, index = RECORDING.fullmatch(name).groups()
    return int(digit), speaker, int(index)


def _samples(recording):
    with wave.open(io.BytesIO(recording)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 2**15


def _digest():
    return hashlib.sha256((RECORDINGS_SHA256 + FEATURES).encode()).hexdigest()


def _read():
    """File name -> bytes of the 3,000 recordings in the order of the names, checked."""
    for folder in data_folders("fsdd"):
        archive, plain = folder / "recordings.zip", folder / "recordings"
        if archive.is_file():
            return _checked(archive, _unzip(archive))
        if plain.is_dir():
            return _checked(plain, {path.name: path.read_bytes() for path in plain.iterdir() if path.is_file()})
    raise FileNotFoundError(
        f"fsdd: found neither recordings.zip nor the folder recordings in "
        f"{' or '.join(str(folder) for folder in data_folders('fsdd'))}. Fetch the folder from {ADDRESS} into one of "
        f"these, or set WORKBENCH_DATA to the folder that holds fsdd/recordings"
    )


def _unzip(archive):
    try:
        with zipfile.ZipFile(archive) as file:
            return {name.rpartition("/")[2]: file.read(name) for name in file.namelist()}
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"fsdd: {archive} is damaged: {error}") from error


def _checked(where, files):
    recordings = {name: files[name] for name in sorted(files) if RECORDING.fullmatch(name)}
    if len(recordings) != NUM_RECORDINGS:
        raise ValueError(f"fsdd: {where} needs {NUM_RECORDINGS} recordings, got {len(recordings)}; source: {ADDRESS}")
    check_published(f"fsdd: the recordings in {where}", recordings, RECORDINGS_SHA256, ADDRESS)
    return recordings
