"""SCALE-Sim beside this simulator in one run: the same cycles on a systolic array, and how much faster a layer is simulated.

    python -m venv PEER && PEER/bin/pip install scalesim==3.0.0 "numpy<2.4"
    python benchmarks/scale_sim.py PEER/bin/python [--many]

The peer has an environment of its own, as it needs an older numpy. First the products of one time step of L1 (LSTM, 160 inputs,
512 units) and L2 (153 inputs, 1024 units, 512 outputs), and products drawn at random, on systolic arrays of both dataflows: the
peer's cycles must be those of the literal interpreter, whose values must be the products. --many adds products of 100 rows (10
minutes and 3 GB of the peer). Then L1 and L2 over 100 time steps on 16 x 16 PEs, dense, 16 bits, batch 1: the peer's time of a
step (output stationary, its faster one; every step is alike to it) times 100, over that of schedule_layer, counts, cycles and
split ("cycles"), and over that of execute_layer ("values"). Times are those of the processor, the least of several; ours once
the layer is packed. Limits: 10,000 times, 300 times, 200 MB. Exit status 1 when a limit is missed or a cycle differs.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when numpy loads

import numpy as np

from workbench.array import SYSTOLIC, SystolicArray, execute_layer, layer_products, preset, run_product, schedule_layer
from workbench.fixedpoint import TABLES, QFormat
from workbench.packed import GATES, PackedDense, PackedLayer, signals_of, table_uses

STEPS, MANY, BITS = 100, 100, 16
LAYERS = {"L1": (160, 512, 0), "L2": (153, 1024, 512)}  # inputs, units, outputs of a projection
TIMES_FASTER, MEGABYTES = {"cycles": 10_000, "values": 300}, 200
OURS_SECONDS = 3  # at least, of each row
# Run by the peer's interpreter: argv is JSON, [rows, cols, dataflow, [[M, N, K], ...]]; prints [cycles, seconds] of each.
PEER = """
import json, pathlib, sys, tempfile, time
from scalesim.scale_sim import scalesim
rows, cols, dataflow, sizes = json.loads(sys.argv[1])
sections = {
    "general": {"run_name": "run"},
    "run_presets": {"InterfaceBandwidth": "CALC", "UseRamulatorTrace": False},
    "architecture_presets": {
        "ArrayHeight": rows, "ArrayWidth": cols, "IfmapSramSzkB": 1024, "FilterSramSzkB": 4096, "OfmapSramSzkB": 1024,
        "IfmapOffset": 0, "FilterOffset": 10000000, "OfmapOffset": 20000000, "Dataflow": dataflow,
        "ReadRequestBuffer": 64, "WriteRequestBuffer": 64},
    "layout": {f"{what}{name}": value for what in ("Ifmap", "Filter") for name, value in (
        ("CustomLayout", False), ("SRAMBankBandwidth", 10), ("SRAMBankNum", 10), ("SRAMBankPort", 2))},
    "sparsity": {"SparsitySupport": False}}
found = []
for m, n, k in sizes:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config, topology, layout = (folder / file for file in ("run.cfg", "product.csv", "layout.csv"))
        config.write_text("\\n".join(f"[{section}]\\n" + "\\n".join(f"{key} = {value}" for key, value in values.items())
                                    for section, values in sections.items()))
        topology.write_text(f"Layer,M,N,K,\\nproduct,{m},{n},{k},\\n")
        layout.write_text("Layer\\nproduct," + 12 * "1," + "\\n")
        before = time.process_time()
        peer = scalesim(save_disk_space=True, verbose=False, config=str(config), topology=str(topology), layout=str(layout),
                        input_type_gemm=True)
        peer.run_scale(top_path=str(folder / "out"))
        seconds = time.process_time() - before
        report = (folder / "out" / "run" / "COMPUTE_REPORT.csv").read_text().splitlines()
        names = [name.strip() for name in report[0].split(",")]
        found.append([int(report[1].split(",")[names.index("Total Cycles")]), seconds])
print(json.dumps(found))
"""


def run_peer(interpreter, array, sizes):
    """[cycles, seconds] of the peer for each product."""
    asked = json.dumps([array.rows, array.cols, array.dataflow, sizes])
    done = subprocess.run([interpreter, "-c", PEER, asked], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the peer failed on {asked}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_peer(interpreter):
    """Refuse an interpreter that is missing or whose packages cannot run the peer."""
    wanted = "needs an interpreter with scalesim 3.0.0 and numpy under 2.4, as `--help` says"
    code = "import numpy, importlib.metadata as m; print(m.version('scalesim'), numpy.__version__)"
    try:
        done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        sys.exit(f"scale_sim.py {wanted}; got {interpreter!r}: {error}")
    if done.returncode:
        sys.exit(f"scale_sim.py {wanted}; {interpreter} says {done.stderr.strip().splitlines()[-1]}")
    version, numpy_version = done.stdout.split()
    if version != "3.0.0" or tuple(map(int, numpy_version.split(".")[:2])) >= (2, 4):
        sys.exit(f"scale_sim.py {wanted}; {interpreter} has scalesim {version} and numpy {numpy_version}")
    return f"SCALE-Sim {version}, its numpy {numpy_version}, ours {np.__version__}, one thread"


def packed_layer(inputs, hidden, outputs, rng):
    """A dense LSTM with random weights whose values fill 16 bits."""
    weights = QFormat(BITS, BITS - 1 + int(np.log2(hidden) / 2))  # a new layer's weights lie within 1 / sqrt(hidden)
    signals = {name: QFormat(BITS, 12) for name in signals_of("LSTM", outputs > 0)}
    signals |= {"sigmoid": QFormat(BITS, 16, signed=False), "tanh": QFormat(BITS, 15)}

    def block(*shape):
        return PackedDense(rng.integers(weights.min, weights.max + 1, shape), weights)

    blocks = {f"weight_{part}_l0.{gate}": block(hidden, columns)
              for part, columns in (("ih", inputs), ("hh", outputs or hidden)) for gate in GATES["LSTM"]}
    if outputs:
        blocks["weight_hr_l0.p"] = block(outputs, hidden)
    tables = {name: TABLES["linear"].build(name, uses) for name, uses in table_uses("LSTM", signals).items()}
    return PackedLayer("LSTM", blocks, {gate: rng.integers(-5000, 5000, hidden) for gate in GATES["LSTM"]}, signals, tables)


def compare_cycles(interpreter, products, many, rng):
    """Print peer and literal interpreter; how many differ, and (M, N, K) -> the peer's seconds for the products of a step."""
    drawn = random.Random(0)
    steps = [(1, *w.shape) for w in products.values()]
    cases = {array: steps + [(MANY, n, k) for _, n, k in steps] * many for array in SYSTOLIC.values()}
    for rows, cols in ((4, 4), (3, 5), (8, 2)):
        for dataflow in ("os", "ws"):
            cases[SystolicArray(rows, cols, dataflow)] = [
                tuple(drawn.randint(1, 24) for _ in range(3)) for _ in range(6)]
    differ, seconds = 0, {}
    print("array         M     N     K   peer cycles    our cycles   peer s   our s")
    for array, sizes in cases.items():
        for (m, n, k), (cycles, peer_s) in zip(sizes, run_peer(interpreter, array, sizes), strict=True):
            a, b = (rng.integers(-(1 << 15), 1 << 15, shape) for shape in ((m, k), (k, n)))
            before = time.process_time()
            run = run_product(a, b, array)
            our_s = time.process_time() - before
            wrong = run.last_cycle != cycles or not np.array_equal(run.product, a @ b)
            differ += wrong
            if array == SYSTOLIC["os16x16"] and m == 1:
                seconds[m, n, k] = peer_s
            print(f"{array.rows:2} x {array.cols:2} {array.dataflow}  {m:4}  {n:4}  {k:4}  {cycles:12,}  {run.last_cycle:12,}  "
                  f"{peer_s:7.2f}  {our_s:6.2f}{'  DIFFERS' * bool(wrong)}", flush=True)
    return differ, seconds


def least_seconds(function):
    least, start, calls = float("inf"), time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < OURS_SECONDS:
        before = time.process_time()
        function()
        least, calls = min(least, time.process_time() - before), calls + 1
    return least


def whole_schedule(layer, spec):
    schedule = schedule_layer(layer, spec, STEPS)
    return schedule.cycles, schedule.steady_state_cycles, schedule.counts(), schedule.split()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interpreter", help="the python of the peer's environment")
    parser.add_argument("--many", action="store_true", help="products of 100 rows, too")
    arguments = parser.parse_args()
    print(check_peer(arguments.interpreter))
    rng, spec = np.random.default_rng(0), preset("array16x16")
    layers = {label: packed_layer(*sizes, rng) for label, sizes in LAYERS.items()}
    missed, faster = 0, []
    for label, layer in layers.items():  # ours first: what the interpreter below takes is not the simulator's memory
        x = rng.integers(-9000, 9000, (STEPS, 1, layer.input_size))
        calls = {"cycles": lambda layer=layer: whole_schedule(layer, spec),
                 "values": lambda layer=layer, x=x: execute_layer(layer, spec, x)}
        faster += [(label, what, least_seconds(call)) for what, call in calls.items()]
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    products = {(label, name): w for label, layer in layers.items() for name, w in layer_products(layer).items()}
    differ, seconds = compare_cycles(arguments.interpreter, products, arguments.many, rng)
    print("layer  what    peer s, 100 steps  our ms  times faster  at least")
    for label, what, ours in faster:
        peer = STEPS * sum(seconds[1, *w.shape] for (of, _), w in products.items() if of == label)
        missed += peer / ours < TIMES_FASTER[what]
        print(f"{label:5}  {what:6}  {peer:17.0f}  {1e3 * ours:6.1f}  {peer / ours:12,.0f}  {TIMES_FASTER[what]:8,}")
    missed += megabytes > MEGABYTES
    print(f"peak memory of ours {megabytes:.0f} MB, at most {MEGABYTES}")
    print(f"{differ} products differ, {missed} limits missed")
    return differ + missed > 0


if __name__ == "__main__":
    sys.exit(main())
