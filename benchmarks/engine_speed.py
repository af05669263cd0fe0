"""Throughput of the integer engine relative to torch's float nn.LSTM and nn.GRU, on one thread, and memory of its weights.

    python benchmarks/engine_speed.py [--seconds 3]

Sequences of 100 steps of 160 features, hidden 128 to 1024, batches of 1 and 32; the layers hold torch's own initial weights,
rounded: "8" with weights and signals of 8 bits, whose products are exact in float32, "16" with 16 bits, in float64. Torch runs
in float32 under inference_mode. Both take turns for at least `--seconds`, so that the load of the machine falls on both alike;
times are those of the processor, which other jobs lengthen less. The ratio of the minima is the figure, its limits 0.5 (8 bits)
and 0.3 (16 bits). Memory: bytes of the engine's weight arrays over those of float32, at most 2.5. Exit status 1 when a limit is
missed. Where the environment sets OPENBLAS_CORETYPE, numpy may take older kernels than its processor has, and torch does not:
unset it to compare them.
"""

import argparse
import os
import sys
import time

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when numpy and torch load

import numpy as np
import torch

from workbench.engine import LayerEngine
from workbench.fixedpoint import TABLES, QFormat
from workbench.packed import GATES, PackedDense, PackedLayer, signals_of, table_uses

STEPS, FEATURES, BATCHES, HIDDEN_SIZES = 100, 160, (1, 32), (128, 256, 512, 1024)
LIMITS, MEMORY_LIMIT = {8: 0.5, 16: 0.3}, 2.5


def signal_formats(bits):
    fracs = {"input": 4, "pre": 4, "sigmoid": 8, "tanh": 7, "cell": 5, "hidden": 7, "hidden_product": 4}
    return {name: QFormat(bits, frac + bits - 8, signed=name != "sigmoid") for name, frac in fracs.items()}


def packed_layer(module, bits):
    """The only layer of a torch module with weights of `bits` bits whose range its initial values fill."""
    cell, hidden = type(module).__name__, module.hidden_size
    fmt = QFormat(bits, bits - 1 + int(np.log2(hidden) / 2))  # initial values lie within 1 / sqrt(hidden)
    tensors = {name: value.detach().double().numpy().reshape(len(GATES[cell]), hidden, *value.shape[1:])
               for name, value in module.named_parameters()}
    blocks = {f"{name}.{gate}": PackedDense(fmt.quantise(tensors[name][n]), fmt)
              for name in ("weight_ih_l0", "weight_hh_l0") for n, gate in enumerate(GATES[cell])}
    bias = {gate: tensors["bias_ih_l0"][n] + tensors["bias_hh_l0"][n] for n, gate in enumerate(GATES[cell])}
    if cell == "GRU":
        bias |= {"n": tensors["bias_ih_l0"][2], "hn": tensors["bias_hh_l0"][2]}
    signals = {name: signal_formats(bits)[name] for name in signals_of(cell)}
    tables = {name: TABLES["linear"].build(name, uses) for name, uses in table_uses(cell, signals).items()}
    return PackedLayer.from_float_bias(cell, blocks, bias, signals, tables)


def least_seconds(functions, seconds):
    """Label -> least time of a call; the functions take turns until `seconds` have passed, at least five times."""
    least, start, rounds = dict.fromkeys(functions, float("inf")), time.perf_counter(), 0
    while rounds < 6 or time.perf_counter() - start < seconds:
        for label, function in functions.items():
            before = time.process_time()
            function()
            if rounds:  # the first calls allocate
                least[label] = min(least[label], time.process_time() - before)
        rounds += 1
    return least


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3, help="least time of each row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng, missed = np.random.default_rng(0), 0
    kernels = os.environ.get("OPENBLAS_CORETYPE", "chosen by the processor")
    print(f"torch {torch.__version__}, numpy {np.__version__}, OpenBLAS kernels {kernels}, one thread, {STEPS} steps of "
          f"{FEATURES} features")
    print("cell  hidden  batch  bits  products  torch ms  engine ms  ratio  at least  memory  at most")
    for module_class in (torch.nn.LSTM, torch.nn.GRU):
        for hidden in HIDDEN_SIZES:
            module = module_class(FEATURES, hidden).eval()
            engines = {bits: LayerEngine(packed_layer(module, bits)) for bits in LIMITS}
            for batch in BATCHES:
                x = rng.normal(size=(STEPS, batch, FEATURES)).astype(np.float32)
                integers = {bits: engine.layer.signals["input"].quantise(x) for bits, engine in engines.items()}
                calls = {bits: lambda bits=bits: engines[bits].run(integers[bits]) for bits in LIMITS}  # noqa: B023
                with torch.inference_mode():
                    least = least_seconds({"torch": lambda: module(torch.from_numpy(x))} | calls, arguments.seconds)  # noqa: B023
                for bits, limit in LIMITS.items():
                    weights, ratio = engines[bits].steps.weights, least["torch"] / least[bits]
                    memory = sum(w.nbytes for w in weights.values()) / (4 * sum(w.size for w in weights.values()))
                    missed += ratio < limit or memory > MEMORY_LIMIT
                    print(f"{module_class.__name__:4}  {hidden:6}  {batch:5}  {bits:4}  {weights['hh'].dtype!s:8}  "
                          f"{1e3 * least['torch']:8.2f}  {1e3 * least[bits]:9.2f}  {ratio:5.2f}  {limit:8}  {memory:6.2f}  "
                          f"{MEMORY_LIMIT:7}", flush=True)
    print(f"{missed} limits missed")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
