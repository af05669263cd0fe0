"""Cost of one training step with constrained recurrent weights, relative to the dense step of the same model.

    python benchmarks/constrained_step.py

Shape of the fsdd task: batches of 64 sequences, 100 frames, 40 features, 10 classes; LSTM and GRU, hidden 128 and 256. All
blocks are constrained, alike or by two methods; of each family by the member that stores about an eighth. Weights only (no
signal is quantised), each forward runs inside torch's parametrize.cached(). Dense and constrained steps alternate, so that
the load of the machine falls on both alike; the ratio of the minima is the figure, the ratio of the medians stands beside
it. Exit status 1 when a ratio of minima exceeds the limit of 1.2.
"""

import itertools
import statistics
import sys
import time

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

import workbench as wb
from workbench.budget import ladder, strongest_member
from workbench.methods import METHODS, method_label
from workbench.plan import BlockPlan, Plan

BATCH, FRAMES, FEATURES, CLASSES = 64, 100, 40, 10
HIDDEN_SIZES = (128, 256)
REPETITIONS = 30
LIMIT = 1.2
SHARE = 1 / 8
CELLS = ("LSTM", "GRU")
WEIGHT_FORMAT = wb.QFormat(8, 7)
MIXED = {"f": wb.TopK(SHARE), "g": wb.TopK(SHARE), "n": wb.TopK(SHARE)}  # gate -> method; BlockCirculant for the others


def plans(model):
    """Label -> block name -> method."""
    ws, found = wb.gates.weights(model), {}
    for family in METHODS.values():
        method = strongest_member(ladder(list(ws.values()), family), list(ws.values()), SHARE)
        found[method_label(method)] = dict.fromkeys(ws, method)
    found["mixed"] = {name: MIXED.get(block.gate, wb.BlockCirculant(8)) for name, block in wb.gates.blocks(model).items()}
    return found


def stepper(model, frames, lengths, labels):
    """A function that does one training step and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step():
        start = time.perf_counter()
        with parametrize.cached():
            logits = model(frames, lengths)
        loss = cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - start

    return step


def main():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(BATCH, FRAMES, FEATURES, generator=generator)
    lengths = torch.full((BATCH,), FRAMES)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    worst = 0.0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, {FRAMES} frames, {FEATURES} features")
    print("cell  hidden  plan                  dense ms  constrained ms  ratio of minima  ratio of medians")
    for cell, hidden in itertools.product(CELLS, HIDDEN_SIZES):
        model = wb.SequenceClassifier(FEATURES, hidden, CLASSES, cell=cell)
        signals = wb.calibrate(model, [(frames[:4], lengths[:4])])
        steps = {"dense": stepper(model, frames, lengths, labels)}
        for label, methods in plans(model).items():
            plan = Plan({name: BlockPlan(method, WEIGHT_FORMAT) for name, method in methods.items()}, signals)
            steps[label] = stepper(wb.compress(model, plan), frames, lengths, labels)
        seconds = {label: [] for label in steps}
        for repetition in range(REPETITIONS + 2):
            for label, step in steps.items():
                elapsed = step()
                if repetition >= 2:  # the first steps allocate
                    seconds[label].append(elapsed)
        dense = seconds.pop("dense")
        for label, mine in seconds.items():
            ratio, medians = min(mine) / min(dense), statistics.median(mine) / statistics.median(dense)
            worst = max(worst, ratio)
            print(f"{cell:4}  {hidden:6}  {label:20}  {1e3 * min(dense):8.1f}  {1e3 * min(mine):14.1f}  {ratio:15.3f}  "
                  f"{medians:16.3f}")
    print(f"largest ratio of minima {worst:.3f}, limit {LIMIT}")
    return worst > LIMIT


if __name__ == "__main__":
    sys.exit(main())
