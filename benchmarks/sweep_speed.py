"""Time of a sweep against papermill one run after another, overhead of a run, and the answer of a finished sweep.

    python benchmarks/sweep_speed.py [--runs 24] [--seconds 20] [--finished 1000]

A run trains the dense LSTM of the default task on one thread, for as many epochs as take about `--seconds`. The sweep and
the papermill loop, each with its own kernels, execute the same notebook with the same seeds in this same call, the sweep
first. Overhead: wall time of a run that does nothing, as a sweep and as papermill. The finished sweep: one real run, whose
directory is copied under the identities of all other runs; the time is that of the whole command `sweep FILE.toml`.
Exit status 1 when the sweep is less than 1.8 times as fast or the finished sweep takes 2 seconds or more.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill

import workbench as wb
from workbench import runs, sweep

FASTER, ANSWER_S = 1.8, 2.0
PARAMETERS = "seed: int = 0  # seed of the training\nepochs: int = 1  # of the training"
TRAIN = """\
import workbench as wb
task = wb.tasks.load("japanese_vowels")
model = wb.train_dense(task, 128, [seed], epochs=epochs, workers=1)
wb.record(loss=wb.evaluate(model[seed], task, "valid").loss)"""
NOTHING = "import workbench as wb\nwb.record(done=seed)"


def write_notebook(path, code):
    cells = [
        nbformat.v4.new_markdown_cell("# A run of the benchmark"),
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def sweep_s(folder, notebook, seeds, epochs):
    """Seconds of the whole command, from its start to its end."""
    file = folder / f"{notebook.stem}.toml"
    file.write_text(f'notebook = "{notebook.name}"\nseeds = {list(seeds)}\n[parameters]\nepochs = {epochs}\n')
    command = [sys.executable, "-m", "workbench", "sweep", str(file), "--results", str(folder / "results")]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def papermill_s(folder, notebook, seeds, epochs):
    """Seconds of papermill's own call for each seed, one after another in this process."""
    start = time.perf_counter()
    for seed in seeds:
        papermill.execute_notebook(
            str(notebook), str(folder / f"papermill-{notebook.stem}-{seed}.ipynb"), {"seed": seed, "epochs": epochs},
            kernel_name="python3", language="python", progress_bar=False,
        )  # fmt: skip
    return time.perf_counter() - start


def epochs_of(seconds):
    """Epochs of the training that take so long on one thread of this machine."""
    task, times = wb.tasks.load("japanese_vowels"), {}
    for epochs in (10, 10, 100):  # the first loads torch here
        start = time.perf_counter()
        wb.train_dense(task, 128, [0], epochs=epochs, workers=1)
        times[epochs] = time.perf_counter() - start
    per_epoch = (times[100] - times[10]) / 90
    return max(1, round((seconds - times[10]) / per_epoch) + 10)


def finished_sweep_s(folder, count):
    """Seconds of the answer of a sweep whose `count` runs are all finished; the least of three."""
    notebook = write_notebook(folder / "many.ipynb", NOTHING)
    first = runs.run(notebook, {}, folder / "results").directory
    file = folder / "many.toml"
    file.write_text(f'notebook = "many.ipynb"\nseeds = {list(range(count))}\n')
    for run in (point.run for point in sweep.survey(sweep.read(file), folder / "results")):
        directory = first.with_name(run.id)
        if not directory.exists():
            shutil.copytree(first, directory)
            status = json.loads((directory / "status.json").read_text())
            status |= {"run_id": run.id, "parameters": run.parameters}
            (directory / "status.json").write_text(json.dumps(status))
    sweep_s(folder, notebook, range(count), 1)  # writes table and index page
    return min(sweep_s(folder, notebook, range(count), 1) for _ in range(3))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--finished", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = range(arguments.runs)
        nothing = write_notebook(folder / "nothing.ipynb", NOTHING)
        few = range(8)
        ours, theirs = sweep_s(folder, nothing, few, 1) / len(few), papermill_s(folder, nothing, few, 1) / len(few)
        print(f"run that does nothing: sweep {ours:.2f} s a run ({runs.cores()} at a time), papermill {theirs:.2f} s")
        epochs = epochs_of(arguments.seconds)
        train = write_notebook(folder / "train.ipynb", TRAIN)
        ours, theirs = sweep_s(folder, train, seeds, epochs), papermill_s(folder, train, seeds, epochs)
        print(f"{len(seeds)} runs of {epochs} epochs: papermill {theirs:.1f} s ({theirs / len(seeds):.1f} s a run), "
              f"sweep {ours:.1f} s: {theirs / ours:.2f} times as fast (at least {FASTER})")
        answer = finished_sweep_s(folder, arguments.finished)
        print(f"finished sweep of {arguments.finished} runs: {answer:.2f} s (less than {ANSWER_S})")
    return int(theirs / ours < FASTER or answer >= ANSWER_S)


if __name__ == "__main__":
    sys.exit(main())
