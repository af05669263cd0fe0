"""Cost of a projection, relative to one torch.topk of the same matrix.

    python benchmarks/projection_speed.py

A 4096 x 1024 float32 matrix at three strengths. topk picks as many of the flat magnitudes, unsorted, as TopK must. Projections
and topk alternate on one thread; the figure is the ratio of the least processor times, so that what else the machine does
falls out. Exit status 1 when a method takes more than 3 times the topk, LowRank apart: its projection is a singular value
decomposition.
"""

import sys
import time

import torch

import workbench as wb
from workbench.methods import METHODS

ROWS, COLUMNS = 4096, 1024
KEEPS = (2, 8, 64)  # one weight of so many is kept
REPETITIONS = 7
LIMIT = 3.0
EXEMPT = "LowRank"
TIMED = {  # name of METHODS -> the member that keeps, or stores, one weight of n
    "Dense": lambda n: wb.Dense(),
    "TopK": lambda n: wb.TopK(1 / n),
    "RowBalanced": lambda n: wb.RowBalanced(1 / n),
    "BankBalanced": lambda n: wb.BankBalanced(1 / n, 16),
    "BlockSparse": lambda n: wb.BlockSparse(1 / n, 4),
    "Structured": wb.Structured,
    "BlockCirculant": wb.BlockCirculant,
    "LowRank": lambda n: wb.LowRank(ROWS * COLUMNS // (ROWS + COLUMNS) // n),
}


def seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def main():
    if missing := set(METHODS) ^ set(TIMED):
        sys.exit(f"METHODS and TIMED differ in {', '.join(sorted(missing))}")
    torch.set_num_threads(1)
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    flat, worst = w.abs().flatten(), 0.0
    print(f"torch {torch.__version__}, {ROWS} x {COLUMNS}, least of {REPETITIONS}")
    print("kept  method           topk ms  projection ms  ratio")
    for n in KEEPS:
        for name, make in TIMED.items():
            method, exempt, pairs = make(n), name == EXEMPT, []
            for _ in range(1 if exempt else REPETITIONS):
                start = time.process_time()
                torch.topk(flat, flat.numel() // n, sorted=False)
                middle = time.process_time()
                method.project(w)
                pairs.append((middle - start, time.process_time() - middle))
            topk, projection = map(min, zip(*pairs, strict=True))
            worst = worst if exempt else max(worst, projection / topk)
            print(f"1/{n:<3} {name:15} {1e3 * topk:8.1f} {1e3 * projection:14.1f} {projection / topk:6.2f}{' exempt' * exempt}")
    print(f"largest ratio {worst:.2f}, limit {LIMIT}")
    return worst > LIMIT


if __name__ == "__main__":
    sys.exit(main())
