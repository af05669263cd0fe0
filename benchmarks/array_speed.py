"""How fast and in how much memory a layer is simulated, and a design space swept.

    python benchmarks/array_speed.py

L1 (LSTM, 160 inputs, 512 units) and L2 (153 inputs, 1024 units, 512 outputs), dense, 16 bits, 100 time steps, batch 1, on
16 x 16 PEs: counts, cycles and their split ("cycles"); these and the values of every step ("values"). Then 10,000 arrays
for one layer of the size of L1 in three forms: Top-k 1/8, hybrid (i and f Top-k 1/8, g and o circulant 16), dense; 20
points drawn at random must equal the scheduler in every figure. Times are those of the processor, the least of several (a
sweep: of one), on one thread; memory is that of a process that does nothing else, packing of the layer included. Exit
status 1 when a limit is missed or a figure differs. How many times faster than SCALE-Sim this is: scale_sim.py.
"""

import json
import os
import resource
import subprocess
import sys
import time

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when numpy loads

import numpy as np
from scale_sim import LAYERS, STEPS, least_seconds, packed_layer, whole_schedule

from workbench.array import ArraySpec, execute_layer, grid_points, preset, schedule_layer, sweep_space
from workbench.array.cost import energy, resources
from workbench.array.space import FIGURES
from workbench.fixedpoint import QFormat
from workbench.packed import PackedCirculant, PackedSparse

SECONDS = {("L1", "cycles"): 0.020, ("L1", "values"): 2.0, ("L2", "cycles"): 0.1, ("L2", "values"): 5.0}
MEGABYTES = 200
SPARSITY, BLOCK, WEIGHTS = 1 / 8, 16, QFormat(8, 7)
FORMS = {"Top-k": "ifgo", "hybrid": "if", "dense": ""}  # gates whose blocks are sparse; of a hybrid the others are circulant
SWEEP_SECONDS = 10
POINTS = {
    "rows": (8, 16, 24, 32, 40), "cols": (8, 16, 24, 32, 40), "weight_words": (1024, 2048), "mac_latency": (2, 4),
    "load_bits_per_cycle": (128, 256, 512, 1024), "h_words_per_cycle": (2, 4, 8, 16, 32), "act_units": (4, 8, 16, 32, 64)}
DRAWN = 20


def compressed_layer(form, rng):
    """A layer of the size of L1 whose blocks are magnitude-pruned or circulant, of random weights of 8 bits."""
    layer = packed_layer(*LAYERS["L1"], rng)
    blocks = {}
    for name, block in layer.blocks.items():
        rows, cols = block.shape
        if name[-1] in FORMS[form]:
            values = np.clip(np.round(rng.normal(0, 40, block.shape)), WEIGHTS.min, WEIGHTS.max).astype(np.int64)
            least = np.partition(np.abs(values), -int(SPARSITY * values.size), axis=None)[-int(SPARSITY * values.size)]
            blocks[name] = PackedSparse.from_dense(np.where(np.abs(values) >= least, values, 0), WEIGHTS)
        elif FORMS[form]:
            vectors = rng.integers(WEIGHTS.min, WEIGHTS.max + 1, (rows // BLOCK, -(-cols // BLOCK), BLOCK))
            blocks[name] = PackedCirculant(block.shape, WEIGHTS, BLOCK, vectors)
        else:
            blocks[name] = block
    return type(layer)(layer.cell, blocks, layer.bias, layer.signals, layer.tables)


def calls_of(label):
    """What is timed of L1 or L2: name -> function."""
    rng, spec = np.random.default_rng(0), preset("array16x16")
    layer = packed_layer(*LAYERS[label], rng)
    x = rng.integers(-9000, 9000, (STEPS, 1, layer.input_size))

    def values():
        executed = execute_layer(layer, spec, x)
        return executed.output, executed.schedule.cycles, executed.schedule.counts()

    return {"cycles": lambda: whole_schedule(layer, spec), "values": values}


def megabytes(label, name):
    """Largest memory of a process that makes one call."""
    code = f"import array_speed, resource\narray_speed.calls_of({label!r})[{name!r}]()\n" \
           "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    folder = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    return int(json.loads(done.stdout)) / 1024


def differing(layer, space, drawn):
    """How many of the drawn points differ from the scheduler in a figure."""
    differ = 0
    for n in drawn.tolist():
        schedule = schedule_layer(layer, ArraySpec().with_(**{name: int(space[name][n]) for name in POINTS}), STEPS)
        used, spent = resources(schedule.mapping), energy(schedule.counts())
        figures = (schedule.steady_state_cycles, schedule.first_step_latency, schedule.cycles, spent.low_pj / 1000,
                   spent.high_pj / 1000, used.dsp, used.bram36, *used.lut, *used.ff)
        differ += figures != tuple(space[name][n] for name in FIGURES) or space["layout"][n] != schedule.mapping.layout.name
    return differ


def main():
    missed = 0
    print("layer  what    seconds    limit    MB  limit")
    for (label, name), limit in SECONDS.items():
        seconds, memory = least_seconds(calls_of(label)[name]), megabytes(label, name)
        missed += (seconds > limit) + (memory > MEGABYTES)
        print(f"{label:5}  {name:6}  {seconds:7.4f}  {limit:7.3f}  {memory:4.0f}  {MEGABYTES:5}", flush=True)
    print("sweep   points  fit     seconds  limit  of points drawn differ")
    rng, points = np.random.default_rng(0), grid_points(**POINTS)
    for form in FORMS:
        layer, start = compressed_layer(form, rng), time.process_time()
        space = sweep_space(layer, points, steps=STEPS)
        seconds = time.process_time() - start
        differ = differing(layer, space, rng.integers(0, space["fits"].size, DRAWN))
        missed += (seconds > SWEEP_SECONDS) + differ
        print(f"{form:6}  {space['fits'].size:6}  {int(space['fits'].sum()):6}  {seconds:7.2f}  {SWEEP_SECONDS:5}  "
              f"{differ} of {DRAWN}", flush=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"largest memory of the sweeps {memory} MB; limits missed: {missed}")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
