"""Cost of training with every signal quantised: forward and backward of an emulated layer over those of nn.LSTM or nn.GRU.

    python benchmarks/quantised_step.py [HIDDEN_SIZE...]

One layer, batches of 32 sequences, 35 and 100 steps, as many inputs as units, float32, 16-bit signals, linear tables; one
thread and two. The weights are plain: what constraining them costs is measured by constrained_step.py. Plain and emulated
steps alternate, so that the load of the machine falls on both alike; the ratio of the minima is the figure, the ratio of the
medians stands beside it. With two threads the machine must have two idle cores: threads that wait for one another measure
the load, not the step. Exit status 1 when a ratio of minima exceeds the limit of 2.5.
"""

import copy
import itertools
import statistics
import sys
import time

import torch
from torch import nn

import workbench as wb
from workbench.emulation import quantise_signals

BATCH, STEPS, HIDDEN_SIZES = 32, (35, 100), (128, 300, 512)
THREADS = (1, 2)
REPETITIONS, SECONDS = 12, 5  # of each shape, at least
LIMIT = 2.5


def stepper(rnn, x, gradient):
    """A function that does one forward and backward and returns its seconds."""

    def step():
        rnn.zero_grad()
        start = time.perf_counter()
        rnn(x)[0].backward(gradient)
        return time.perf_counter() - start

    return step


def emulated(rnn, x):
    """A copy that rounds every signal; its weights are not constrained."""
    plan = wb.plan.uniform(rnn, wb.Dense(), 8, wb.calibrate(rnn, [x[:, :4]]))
    rnn, packed = copy.deepcopy(rnn), wb.pack(rnn, plan)
    quantise_signals(rnn, packed.layers)
    return rnn


def measure(cell, hidden, steps):
    """(plain, emulated) -> seconds of every step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, BATCH, hidden, generator=generator, requires_grad=True)
    gradient = torch.randn(steps, BATCH, hidden, generator=generator)
    rnn = cell(hidden, hidden)
    runs = [stepper(model, x, gradient) for model in (rnn, emulated(rnn, x.detach()))]
    for step in runs * 2:  # the first steps allocate
        step()
    seconds, start = [], time.perf_counter()
    while len(seconds) < REPETITIONS or time.perf_counter() - start < SECONDS:
        seconds.append([step() for step in runs])
    return zip(*seconds, strict=True)


def main():
    sizes = [int(size) for size in sys.argv[1:]] or HIDDEN_SIZES
    worst = 0.0
    print(f"torch {torch.__version__}, batch {BATCH}, float32")
    print("threads  cell  hidden  steps  plain ms  emulated ms  ratio of minima  ratio of medians")
    for threads, cell, hidden, steps in itertools.product(THREADS, (nn.LSTM, nn.GRU), sizes, STEPS):
        torch.set_num_threads(threads)
        plain, quantised = measure(cell, hidden, steps)
        ratio, medians = min(quantised) / min(plain), statistics.median(quantised) / statistics.median(plain)
        worst = max(worst, ratio)
        print(f"{threads:7}  {cell.__name__:4}  {hidden:6}  {steps:5}  {1e3 * min(plain):8.1f}  {1e3 * min(quantised):11.1f}  "
              f"{ratio:15.2f}  {medians:16.2f}", flush=True)
    print(f"largest ratio of minima {worst:.2f}, limit {LIMIT}")
    return worst > LIMIT


if __name__ == "__main__":
    sys.exit(main())
