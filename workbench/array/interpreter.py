"""The definition of the array: a loop over cycles in plain Python integers. Slow and obvious; for tiny layers.

It takes from mapping.py which PE stores which words and the order in which each resource serves a program, and nothing
from schedule.py. What may start is decided by the state of memories, accumulators and buffers, not by listed needs; what
would be a hazard in hardware raises RuntimeError.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from workbench.array.mapping import (
    COPIES,
    LayerMapping,
    SideBySide,
    array_sums,
    block_of,
    columns_kept,
    inverse_columns,
    is_spectral,
    is_transformed,
    memories_of,
    multicast_groups,
    network_words,
    part_of,
    parts_of,
    words_taken,
)
from workbench.packed import PARTS, PackedSparse
from workbench.spectrum import TWIDDLE_BITS, TWIDDLE_FRAC, twiddles

BANK_USERS = ("mac", "drain", "gather")  # kinds of instructions that take accumulator banks
SENT = {"hh": "h", "hr": "m"}  # part -> the value that is multicast for it in the step that computes it


@dataclass(frozen=True)
class Interpretation:
    """spans: (step of the program, number in it) -> (start, end) cycles; the multicast of the first x is of step -1. Of layers
    side by side, output and c are lists with an entry each."""

    output: list  # (T, B, output_size); no B where x has none
    c: list | None  # (B, hidden_size); None for a GRU
    cycles: int
    spans: dict[tuple[int, int], tuple[int, int]]
    counts: dict[str, int]  # events that happened at all


def half_up(value: int, frac: int, fmt) -> int:
    """One rounding of an integer with `frac` fraction bits to a number format, saturating."""
    shift = frac - fmt.frac
    value = (value + (1 << (shift - 1))) >> shift if shift > 0 else value << -shift
    return min(max(value, fmt.min), fmt.max)


@dataclass(frozen=True)
class _Task:
    """One value per element that the activation units compute. reads: (steps back, value); compute: (element, what is read)
    -> integer; event: what it counts as."""

    value: str
    event: str
    reads: tuple[tuple[int, str], ...]
    compute: Callable


def _product(value, one, other):
    return _Task(value, "elementwise_multiplies", (one, other), lambda j, a, b: a * b)


def _look_up(layer, function, value, in_fmt, out_fmt):
    return int(layer.tables[function].lookup(value, in_fmt, out_fmt))


def _act(layer, gate, also=None, output=None):
    """The sum of a gate, its bias and what else joins it: one rounding, one look-up. also: (value, its left shift)."""
    s, bias, (frac, *_) = layer.signals, layer.bias[gate], layer.alignment(gate)
    function = "tanh" if gate in "gn" else "sigmoid"
    value, shift = also or ("", 0)

    def compute(j, total, joined=0):
        pre = half_up(total + int(bias[j]) + (joined << shift), frac, s["pre"])
        return _look_up(layer, function, pre, s["pre"], s[output or function])

    return _Task(f"act {gate}", "activation_lookups", ((0, f"sum {gate}"), *(((0, value),) if also else ())), compute)


def _lstm_tasks(layer):
    s = layer.signals
    kept, new = s["sigmoid"].frac + s["cell"].frac, s["sigmoid"].frac + s["tanh"].frac
    frac = max(kept, new)
    name, fmt = ("m", s["unprojected"]) if layer.projected else ("h", s["hidden"])
    tasks = {f"act {gate}": [_act(layer, gate)] for gate in "ifgo"}
    tasks |= {
        "cell": [_product("f*c", (0, "act f"), (1, "cell")), _product("i*g", (0, "act i"), (0, "act g"))],
        "tanh c": [_Task("tanh c", "activation_lookups", ((0, "cell"),),
                         lambda j, c: _look_up(layer, "tanh", c, s["cell"], s["tanh"]))],
        name: [_Task(name, "elementwise_multiplies", ((0, "act o"), (0, "tanh c")),
                     lambda j, o, tanh_c: half_up(o * tanh_c, new, fmt))]}
    if layer.projected:
        tasks["h"] = [_Task("h", "roundings", ((0, "sum p"),),
                            lambda j, total: half_up(total, layer.product_frac("hr", "p"), s["hidden"]))]

    def join(kept_product, new_product):
        return half_up((kept_product << (frac - kept)) + (new_product << (frac - new)), frac, s["cell"])

    return tasks, join


def _gru_tasks(layer):
    s, one = layer.signals, 1 << layer.signals["sigmoid"].frac

    def hidden_product(j, total):
        return half_up(total + int(layer.bias["hn"][j]), layer.product_frac("hh", "n"), s["hidden_product"])

    tasks = {
        "act r": [_act(layer, "r")],
        "s": [_Task("s", "roundings", ((0, "sum hn"),), hidden_product)],
        "r*s": [_product("r*s", (0, "act r"), (0, "s"))],
        "act n": [_act(layer, "n", ("r*s", layer.alignment("n")[2]), "hidden")],
        "act z": [_act(layer, "z")],
        "h": [_Task("(1-z)*n", "elementwise_multiplies", ((0, "act z"), (0, "act n")), lambda j, z, n: (one - z) * n),
              _product("z*h", (0, "act z"), (1, "h"))]}

    def join(new_product, kept_product):
        return half_up(new_product + kept_product, s["sigmoid"].frac + s["hidden"].frac, s["hidden"])

    return tasks, join


def interpret(mapping: LayerMapping | SideBySide, x) -> Interpretation:
    """Run a few steps: x (T, B, input_size) integers, or (T, input_size) of one sequence; h and c start at zero. Of layers side
    by side, x is a list, with the x of each, or of the first of a pipeline."""
    alone = isinstance(mapping, LayerMapping)
    xs = [np.asarray(one) for one in ([x] if alone else x)]
    machine = _Machine(mapping, [(one[:, None] if one.ndim == 2 else one).tolist() for one in xs])
    machine.run()
    output, c = zip(*(machine.result(n) for n in range(len(mapping.layers))), strict=True)
    if alone:
        output, c = output[0], c[0]
        if xs[0].ndim == 2:
            output, c = [row[0] for row in output], c and c[0]
    return Interpretation(output, c, machine.now, machine.spans, dict(+machine.counts))


def interpret_hoisted(stages, x) -> list[Interpretation]:
    """Run one layer whose input products are hoisted: x (T, B, input_size). stages: (mapping, steps of its program) in turn, of
    input products, whose items are some steps of all sequences, and of the recurrence over the steps that they were for."""
    x, found, done, waiting, former = np.asarray(x), [], 0, {}, None
    batch, resident = x.shape[1], {}
    for mapping, steps in stages:
        taken = _resident_words(mapping)
        if missing := taken - resident.setdefault(mapping.fills_edge, taken):
            raise RuntimeError(f"hazard: {len(missing)} words that a stage takes as resident were not loaded")
        if mapping.fills_edge:
            ahead = mapping.batch // batch  # steps that a step of the program takes together
            first = done + len({step for step, *_ in waiting})
            machine = _Machine(mapping, [x[first : first + steps * ahead].reshape(steps, mapping.batch, -1).tolist()])
            machine.run()
            for (step, item, *which), total in machine.kept.items():
                waiting[first + step * ahead + item // batch, item % batch, *which] = total
            units = Counter((row % mapping.spec.act_units) for *_, row in waiting)
            if max(units.values()) > mapping.spec.edge_words:
                raise RuntimeError(f"hazard: an activation unit keeps {max(units.values())} sums, the array has "
                                   f"{mapping.spec.edge_words} (edge_words)")
            found.append(Interpretation([], None, machine.now, machine.spans, dict(+machine.counts)))
        else:
            kept = {(step - done, *which): total for (step, *which), total in waiting.items()}
            machine = former = _Machine(mapping, [range(steps)], kept, former)
            machine.run()
            done, waiting = done + steps, {}
            found.append(Interpretation(*machine.result(0), machine.now, machine.spans, dict(+machine.counts)))
    return found


def _listed(block, low, high):
    """PE -> numbers of its words in the block for the local rows [low, high), in the order in which it uses them."""
    found = defaultdict(list)
    for number, (pe, row) in enumerate(zip(block.pe.tolist(), block.local_row.tolist(), strict=True)):
        if low <= row < high:
            found[pe].append(number)
    return found


def _resident_words(mapping):
    """(part, gate, number in its block) of the words that are multiplied and never loaded."""
    return {(*i.parts, i.gate, number) for i in mapping.program if i.kind == "mac" and i.chunk < 0
            for numbers in _listed(mapping.blocks[i.parts[0], i.gate], *i.rows).values() for number in numbers[slice(*i.words)]}


def _sent(i):
    """The value that a multicast sends; for an inner part what V of the low-rank block gives."""
    return SENT.get(i.parts[0], f"sum {i.parts[0]}")


def _bins(words):
    """Operands of a tile's k words -> (re, im) of the bins 0 to k/2; None is zero."""
    half = len(words) // 2
    return [(words[j], words[half + j] if 0 < j < half else None) for j in range(half + 1)]


def _word_operands(bins):
    """The inverse of _bins."""
    return [re for re, _ in bins] + [im for _, im in bins[1:-1]]


def _signed(value, row, column, k):
    """i * i = -1: a word of an imaginary part, times an imaginary part, is taken from a real one."""
    return -value if row % k <= k // 2 < column % k else value


_names = itertools.count()


def _add(operations, one, other):
    operations.append(("add", name := ("sum", next(_names)), one, other))
    return 1, name


def _minus(operand):
    return -operand[0], operand[1]


def _turn(operations, n, j, sign, re, im):
    """(re + i im) * exp(sign * 2 pi i j / n): four multiply-accumulates, each pair rounded once."""
    cos, sin = (int(values[j]) for values in twiddles(n))
    parts = []
    for terms in (((cos, re), (-sign * sin, im)), ((cos, im), (sign * sin, re))):
        name = "turned", next(_names)
        operations += [("mac", name, constant, operand, n == 1) for n, (constant, operand) in enumerate(terms)]
        parts.append((1, name))
    return parts


def forward_operations(source):
    """The real operations of one transform in their order, and the operands (sign, name) that hold the bins 0 to n/2. A word
    whose sign is turned is not moved: who takes it adds or subtracts."""
    n, bins = len(source), {}
    if n == 1:
        return [], [(source[0], None)]
    (operations, even), (more, odd) = forward_operations(source[::2]), forward_operations(source[1::2])
    operations += more
    for j in range(n // 4 + 1):
        (a, b), (c, d) = even[j], odd[j]
        if j == 0:
            bins[0], bins[n // 2] = (_add(operations, a, c), None), (_add(operations, a, _minus(c)), None)
        elif 4 * j == n:
            bins[j] = a, _minus(c)
        else:
            c, d = _turn(operations, n, j, -1, c, d)
            bins[j] = _add(operations, a, c), _add(operations, b, d)
            bins[n // 2 - j] = _add(operations, a, _minus(c)), _add(operations, d, _minus(b))
    return operations, [bins[j] for j in range(n // 2 + 1)]


def inverse_operations(bins):
    """The real operations of one inverse transform in their order, and the operands of its n values."""
    n, operations, even, odd = 2 * (len(bins) - 1), [], [], []
    if n == 0:
        return [], [bins[0][0]]
    for j in range(n // 4 + 1):
        (a, b), (c, d) = bins[j], bins[n // 2 - j]
        if j == 0:
            even.append((_add(operations, a, c), None))
            odd.append((_add(operations, a, _minus(c)), None))
        elif 4 * j == n:
            even.append((_add(operations, a, a), None))
            odd.append((_minus(_add(operations, b, b)), None))
        else:
            even.append((_add(operations, a, c), _add(operations, b, _minus(d))))
            odd.append(tuple(_turn(operations, n, j, 1, _add(operations, a, _minus(c)), _add(operations, b, d))))
    (more, even), (yet_more, odd) = inverse_operations(even), inverse_operations(odd)
    return operations + more + yet_more, [value for pair in zip(even, odd, strict=True) for value in pair]


def _key(i):
    """What instructions of one step of the sequence have in common that together read, or add up to, one thing."""
    return i.layer, i.item, i.kind, i.region, i.gate, i.parts, i.rows


@dataclass
class _Active:
    """An instruction on its resource. step: of the program; t: of the sequence; todo: what is still to be issued; flying:
    issued and not yet landed."""

    step: int
    t: int
    number: int
    instruction: object
    start: int
    todo: object
    held: int = 0  # cycles that the present piece of work has been held
    flying: int = 0
    row_held: dict = field(default_factory=dict)  # PE -> the row whose sum its DSP holds
    met: dict = field(default_factory=lambda: defaultdict(list))  # row -> partial sums that have come to the PE of its inverse
    chosen: set = field(default_factory=set)  # PEs that have found the next input that is not zero
    unread: set = field(default_factory=set)  # PEs that dropped the first of a word, which is not read yet


class _Item:
    """The values of one sequence in one layer; h and c start at zero."""

    def __init__(self, layer):
        self.layer, self.sums = layer, array_sums(layer)
        self.arrived = Counter()  # (part, step) -> words multicast
        self.arrived["hh", -1] = layer.output_size
        self.edge, self.edge_parts = defaultdict(int), Counter()  # (step, sum, row)
        # With delta thresholds: (part, column) -> what was sent last; (parts, sum, row) -> the sum that is kept at the edge.
        self.last_sent, self.kept = Counter(), Counter()
        # Instruction of the activation units -> its tasks; where there are two, their values are joined into one.
        self.tasks, self.join = (_lstm_tasks if layer.cell == "LSTM" else _gru_tasks)(layer)
        self.values = defaultdict(dict)  # (step, value; "sum ..." on the edge) -> index -> integer
        for state in ("cell", "h"):
            self.values[-1, state] = dict.fromkeys(range(self.size(state)), 0)

    def go_on(self, former, steps):
        """Take on the state that the same sequence has after so many steps."""
        self.last_sent, self.kept = former.last_sent, former.kept
        for state in ("cell", "h"):
            self.values[-1, state] = former.values[steps - 1, state]

    def add_up(self, place, total, parts):
        """Add what some parts of a sum come to, at the edge. place: (step, sum, row)."""
        t, name, row = place
        self.edge[place] += total
        self.edge_parts[place] += parts
        if self.edge_parts[place] == len(self.sums[name]):
            self.values[t, f"sum {name}"][row] = self.edge[place]

    def size(self, value):
        """Elements of a value."""
        if "." in value:  # what V of a low-rank block gives
            return self.layer.block(*value.removeprefix("sum ").split(".")).rank
        return self.layer.output_size if value in ("h", "sum p") else self.layer.hidden_size

    def complete(self, step, value):
        return len(self.values[step, value]) == self.size(value)

    def listed(self, step, value):
        return [self.values[step, value][j] for j in range(self.size(value))]


class _Machine:
    def __init__(self, mapping, x, kept=None, former=None):
        """x: per layer, or of the first only, (T, B, input_size). kept: (step, item, sum, row) -> sum of hoisted input products
        at the edge; former: the machine that ran the steps before."""
        self.mapping, self.spec, self.x, self.steps = mapping, mapping.spec, x, len(x[0])
        self.kept = kept or {}
        self.program = mapping.program
        self.now, self.counts, self.spans = 0, Counter(), {}
        # Program order, per resource; a step of the program does what belongs to a step of the sequence.
        self.order = [(step, n) for step in range(-1, self.steps + len(mapping.layers)) for n, i in enumerate(self.program)
                      if 0 <= step - i.lag < self.steps]
        self.queues = defaultdict(list)
        for step, n in self.order:
            self.queues[self.program[n].resource].append((step, n))
        self.issuing = dict.fromkeys(self.queues)  # resource -> _Active
        self.landing = []  # (cycle at whose end it lands, what then happens)
        self.per_step = Counter(_key(i) for i in self.program)  # how many instructions
        self.entries, self.chunks = Counter(), Counter()  # region -> per step
        for i in self.program:
            self.entries[i.region] += i.kind in ("drain", "gather")
            self.chunks[i.region] = max(self.chunks[i.region], i.chunk + 1)
        self.chunk_users = Counter((i.region, i.chunk) for i in self.program if i.kind == "mac")
        self.retired = Counter()  # the same keys with the step of the sequence in front
        # PE memories: (region, pe row, pe col) -> address -> (step, value); a wrong step is a hazard.
        self.data = defaultdict(dict)
        self.arrived_at = {}  # (region, pe row, pe col) -> cycle in which the last word of the network was written there
        self.acc = defaultdict(Counter)  # (region, bank, pe row, pe col) -> (entry since the first step, row) -> sum
        self.bank_users = [place for place in self.order if self.program[place[1]].kind in BANK_USERS]  # not retired
        self.bank_written = {}  # (region, bank) -> cycle of the last write that is on its way
        self.bank_drained = {}  # (region, bank) -> cycle of the last read of a drain
        self.buffers = {}  # (region, 0 or 1) -> multiplications that are still to use its chunk
        self.loaded = set()  # (region, step, chunk)
        self.regions = [region for m in mapping.layers for region in m.layout.regions]
        self.items = {(n, item): _Item(m.layer) for n, m in enumerate(mapping.layers) for item in range(mapping.batch)}
        # (layer, part, column) -> the PEs that keep it
        self.keepers, first = defaultdict(list), 0
        for layer, m in enumerate(mapping.layers):
            for n, region in enumerate(m.layout.regions):
                for part in parts_of(m.layer):
                    for pe_col, columns in enumerate(columns_kept(m.layer, m.layout, m.blocks, part, n).tolist()):
                        for column, kept in enumerate(columns):
                            self.keepers[layer, part, column] += [
                                (first + n, pe_row, pe_col) for pe_row in range(region.rows) if kept]
            first += len(m.layout.regions)
            for j in range(m.layer.output_size):
                for pe in self.keepers[layer, "hh", j]:
                    self.data[pe] |= {(item, "hh", 0, j): (-1, former.data[pe][item, "hh", 0, j][1] if former else 0)
                                      for item in range(mapping.batch)}
        for place, item in self.items.items() if former else ():
            item.go_on(former.items[place], former.steps)
        for (t, item, name, row), total in self.kept.items():
            self.items[0, item].add_up((t, name, row), total, 1)

    def _operand(self, i, t, part=None):
        """What a multiplication of step t takes: its size, the step that it is from, its place among the copies in a PE."""
        layer, part = self.mapping.layers[i.layer].layer, part or i.parts[0]
        size = {"ih": layer.input_size, "hh": layer.output_size, "hr": layer.hidden_size}.get(part_of(part))
        if is_transformed(part):  # whole tiles
            size = -(-size // block_of(part)) * block_of(part)
        elif part != part_of(part):
            size = self.items[i.layer, i.item].size(part)
        due = t - 1 if part == "hh" else t
        return size, due, due % COPIES.get(part, 1)

    def _block(self, i):
        return self.mapping.layers[i.layer].blocks[i.parts[0], i.gate]

    def _takers(self, i):
        """(layer, part) of those that a multicast is for: h of a pipelined layer is the x of the next, too."""
        above = self.mapping.pipelined and i.parts == ("hh",) and i.layer + 1 < len(self.mapping.layers)
        return [(i.layer, i.parts[0])] + [(i.layer + 1, "ih")] * above

    def result(self, layer):
        """h of every step, (T, B, output_size), and the last c, (B, hidden_size) or None."""
        items = [self.items[layer, item] for item in range(self.mapping.batch)]
        output = [[item.listed(t, "h") for item in items] for t in range(self.steps)]
        return output, [item.listed(self.steps - 1, "cell") for item in items] if "cell" in items[0].tasks else None

    def run(self):
        while any(self.queues.values()) or any(self.issuing.values()) or self.landing:
            if self.now >= self.spec.config_cycles:
                for resource, queue in self.queues.items():
                    if queue and self.issuing[resource] is None and self._may_start(*queue[0]):
                        self._start(resource, *queue.pop(0))
                for resource, active in self.issuing.items():
                    if active is not None:
                        self._work(active)
                        if not active.todo:
                            self.issuing[resource] = None
                self._land()
            self.now += 1
            if self.now > 1_000_000:
                raise RuntimeError(f"no end after {self.now} cycles: {[q[0] for q in self.queues.values() if q]} wait")

    # What may start: the state of the machine at the beginning of the cycle.

    def _may_start(self, step, n):
        i = self.program[n]
        t, item = step - i.lag, self.items[i.layer, i.item]
        if i.kind == "mac":
            size, due, _ = self._operand(i, t)
            return (item.arrived[i.parts[0], due] == size and self._has_bank(step, n)
                    and (i.chunk < 0 or (i.region, step, i.chunk) in self.loaded))
        if i.kind == "transform":
            size, due, _ = self._operand(i, t, part_of(i.parts[0]))
            return item.arrived[part_of(i.parts[0]), due] == size
        if i.kind == "inverse":
            return all(self._all_retired(t, key) for key in self.per_step
                       if key[:3] == (i.layer, i.item, "gather") and part_of(key[5][0]) == i.parts[0])
        if i.kind == "send":
            return self._all_retired(t, (i.layer, i.item, "inverse", i.region, "", (part_of(i.parts[0]),), (0, 0)))
        if i.kind in ("drain", "gather"):
            return self._has_bank(step, n) and all(
                self._all_retired(t, (i.layer, i.item, "mac", i.region, i.gate, (part,), i.rows)) for part in i.parts)
        if i.kind == "load":
            return (i.region, self._buffer(step, i)) not in self.buffers
        if i.kind == "multicast":
            for layer, part in self._takers(i):  # x overwrites that of two steps before
                readers = [key for key in self.per_step if key[:2] == (layer, i.item) and (
                    (key[2], key[5]) == ("mac", ("ih",)) or (key[2] == "transform" and part_of(key[5][0]) == "ih"))]
                if part == "ih" and t > 1 and not all(self._all_retired(t - 2, key) for key in readers):
                    return False
            return i.parts == ("ih",) or item.complete(t, _sent(i))
        return all(item.complete(t - back, value) for task in item.tasks[i.name] for back, value in task.reads)

    def _all_retired(self, t, key):
        return self.retired[t, key] == self.per_step[key]

    def _entry(self, step, i):
        return step * self.entries[i.region] + i.entry

    def _bank(self, step, i):
        return i.region, self._entry(step, i) % self.spec.acc_banks

    def _has_bank(self, step, n):
        """Whether everything of the other kind that comes before it in the program has left the bank."""
        i = self.program[n]
        earlier = (self.program[m] for s, m in self.bank_users if (s, m) < (step, n)
                   and self._bank(s, self.program[m]) == self._bank(step, i))
        return all((other.kind == "mac") == (i.kind == "mac") for other in earlier)

    def _buffer(self, step, i):
        return (step * self.chunks[i.region] + i.chunk) % 2

    # What an instruction has to do.

    def _start(self, resource, step, n):
        i = self.program[n]
        t, item = step - i.lag, self.items[i.layer, i.item]
        if i.kind == "mac":
            wait_word, wait_mac = words_taken(self._block(i), self.spec) - 1, self.spec.mac_ii - 1
            todo = self._pe_lists(i)
            if self.spec.lookahead == 1:  # nothing is skipped: what each PE issues in each cycle is known
                todo = {pe: [slot for mac in macs for slot in [None] * (wait_word * mac[0] + wait_mac) + [mac]]
                        for pe, macs in todo.items()}
        elif i.kind == "load":
            self.buffers[i.region, self._buffer(step, i)] = self.chunk_users[i.region, i.chunk]
            block = self._block(i)
            words = sum(first for macs in self._pe_lists(i).values() for first, *_ in macs)
            self.counts["weight_writes"] += words * words_taken(block, self.spec)
            todo = words * block.word_bits
            self.counts["loaded_bits"] += todo
        elif i.kind in ("drain", "gather", "send"):
            todo = list(range(*i.rows))
        elif i.kind == "transform":
            todo = self._slots(self._forward_tiles(i, t))
        elif i.kind == "inverse":
            todo = self._slots(self._inverse_tiles(i, t))
        elif i.kind == "multicast":
            values = self.x[i.layer][t][i.item] if i.parts == ("ih",) else item.listed(t, _sent(i))
            width = network_words(item.layer, self.spec, i.parts[0])  # a value is there with its last word
            todo = [[(word % len(values), values[word % len(values)], word // len(values) == width - 1) for word in group]
                    for group in multicast_groups(memories_of(self.mapping, i), self.spec.h_words_per_cycle)]
        else:
            todo = [(j, task) for task in item.tasks[i.name] for j in range(item.size(task.value))]
        self.issuing[resource] = _Active(step, t, n, i, self.now, todo)

    def _pe_lists(self, i):
        """(pe row, pe col) -> list of (first of its word or not, value, row, column, padding or not), in the PE's order."""
        block = self._block(i)
        sparse = isinstance(block.packed, PackedSparse)
        lists = defaultdict(list)
        for pe, numbers in _listed(block, *i.rows).items():
            for number in numbers[slice(*i.words)]:
                value = int(block.values[number])
                targets = block.rows[number].tolist(), block.cols[number].tolist(), block.used[number].tolist()
                macs = [(row, column) for row, column, used in zip(*targets, strict=True) if used]
                if is_spectral(block.packed):  # whose words are never padding
                    macs = [(n == 0, _signed(value, row, column, block.unit), row, column, False)
                            for n, (row, column) in enumerate(macs)]
                else:
                    macs = [(n == 0, value, row, column, column >= block.shape[1] or (sparse and value == 0))
                            for n, (row, column) in enumerate(macs)]
                lists[divmod(pe, block.pe_cols)] += macs
        return dict(lists)

    # One cycle of work.

    def _work(self, a):
        work = {"mac": self._work_mac, "drain": self._work_drain, "load": self._work_load, "multicast": self._work_multicast,
                "transform": self._work_transform, "inverse": self._work_transform, "gather": self._work_gather,
                "send": self._work_send, "activation": self._work_activation, "elementwise": self._work_activation}
        work[a.instruction.kind](a)

    def _work_mac(self, a):
        i, part = a.instruction, a.instruction.parts[0]
        size, due, copy = self._operand(i, a.t)
        bank, entry = self._bank(a.step, i), self._entry(a.step, i)
        if self.bank_drained.get(bank) == self.now:
            raise RuntimeError(f"hazard: {i.name} of step {a.step} writes the bank {bank} that a drain reads, cycle {self.now}")
        self.bank_written[bank] = self.now + self.spec.mac_latency
        taken = words_taken(self._block(i), self.spec)

        def read(pe, column):
            if column >= size:  # padding
                return 0
            tag, x = self.data[i.region, *pe][i.item, part, copy, column]
            if tag != due:
                raise RuntimeError(f"hazard: step {a.t} reads {part} {column} of step {tag} in cycle {self.now}")
            return x

        for pe, slots in a.todo.items():
            if self.spec.lookahead > 1 and pe not in a.chosen:
                self._skip(a, pe, slots, taken, lambda mac, pe=pe: read(pe, mac[3]) == 0)
            mac = slots.pop(0)
            if mac is None:
                continue
            a.chosen.discard(pe)
            first, value, row, column, padding = mac
            x = read(pe, column)
            self.counts["weight_reads"] += taken * first  # a word is read once and held while it is used
            self.counts.update({"macs": 1, "data_reads": 1, "padding_macs": int(padding)})
            if a.row_held.get(pe) != row:
                a.row_held[pe] = row
                self.counts.update({"acc_reads": 1, "acc_writes": 1})  # one later, when it leaves the row
            self._fly(a, self.spec.mac_latency, lambda place=(*bank, *pe), key=(entry, row), product=value * x:
                      self._accumulate(place, key, product))
        a.todo = {pe: slots for pe, slots in a.todo.items() if slots}

    def _skip(self, a, pe, slots, taken, is_zero):
        """A PE that is free inspects the inputs of what comes next and drops the leading zeros. Before the first that is not
        zero it waits as long as that takes; if there is none among them it has nothing for this cycle."""
        window = slots[: self.spec.lookahead]
        zeros = list(itertools.takewhile(is_zero, window))
        del slots[: len(zeros)]
        self.counts["skipped_macs"] += len(zeros)
        if any(first for first, *_ in zeros):
            a.unread.add(pe)
        if len(zeros) == len(window):
            slots.insert(0, None)
            self._fly(a, self.spec.mac_latency, lambda: None)  # a cycle without a multiplication passes the pipeline, too
            return
        first, *rest = slots[0]
        first = first or pe in a.unread
        a.unread.discard(pe)
        slots[:1] = [None] * (self.spec.mac_ii - 1 + (taken - 1) * first) + [(first, *rest)]
        a.chosen.add(pe)

    def _accumulate(self, place, key, product):
        self.acc[place][key] += product
        if len(self.acc[place]) > self.spec.acc_depth:
            raise RuntimeError(f"hazard: more than {self.spec.acc_depth} accumulators in use, (region, bank, PE): {place}")

    def _work_drain(self, a):
        i, local = a.instruction, a.todo.pop(0)
        block = self._block(i)
        for row, pe_row in enumerate(block.pe_row_of_row.tolist()):
            if block.local_of_row[row] == local:
                self._pass_on(a, row, pe_row, 0, 0)

    def _pass_on(self, a, row, pe_row, column, partial):
        """A PE adds its sum to what came over the link and sends it to its neighbour, or from the last column to the edge."""
        i, bank = a.instruction, self._bank(a.step, a.instruction)
        if self.bank_written.get(bank, -1) >= self.now:
            raise RuntimeError(f"hazard: {i.name} of step {a.step} reads the bank {bank} that is written, cycle {self.now}")
        self.bank_drained[bank] = self.now
        partial += self.acc[*bank, pe_row, column][self._entry(a.step, i), row]
        self.counts.update({"acc_reads": 1, "link_words": 1})
        if column < self.regions[i.region].cols - 1:
            # It enters the neighbour `link_cycles` later: what lands at the end of a cycle is used in the next.
            self._hop(a, self.spec.link_cycles, self._pass_on, row, pe_row, column + 1, partial)
        else:
            self._fly(a, 0, lambda: self._reach_edge(a, row, partial))

    def _hop(self, a, cycles, function, *arguments):
        """A word on its way over a link."""
        self.landing.append((self.now + cycles, "link", a, (function, *arguments)))
        a.flying += 1

    # The fft datapath. Words of a tile are the real parts of the bins 0 to k/2, then the imaginary ones of 1 to k/2 - 1.

    def _forward_tiles(self, i, t):
        """PE -> its transforms: (operations, what reads an operand, what takes the results)."""
        part, k = i.parts[0], block_of(i.parts[0])
        size, due, copy = self._operand(i, t, part_of(part))
        found = defaultdict(list)
        for first in range(0, self._operand(i, t)[0], k):
            for pe in self.keepers[i.layer, part, first]:
                operations, bins = forward_operations([(1, first + n) for n in range(k)])

                def read(column, pe=pe):
                    if column >= size:  # padding
                        return 0
                    tag, x = self.data[pe][i.item, part_of(part), copy, column]
                    if tag != due:
                        raise RuntimeError(f"hazard: {i.name} of step {t} reads {column} of step {tag}, cycle {self.now}")
                    return x

                def store(values, pe=pe, first=first):
                    self.data[pe] |= {(i.item, part, 0, first + n): (t, value) for n, value in enumerate(values)}

                found[pe].append((operations, _word_operands(bins), read, store))
        return found

    def _inverse_tiles(self, i, t):
        found, blocks = defaultdict(list), self.mapping.layers[i.layer].blocks
        for (part, gate), block in blocks.items():
            if not is_transformed(part) or part_of(part) != i.parts[0]:
                continue
            columns = inverse_columns(blocks, part, gate)
            for first in range(0, block.shape[0], block.unit):
                pe = i.region, int(block.pe_row_of_row[first]), int(columns[first])
                operations, values = inverse_operations(_bins([(1, first + n) for n in range(block.unit)]))

                def read(row, pe=pe, gate=gate):
                    tag, value = self.data[pe][i.item, "inverse", i.parts[0], gate, row]
                    if tag != t:
                        raise RuntimeError(f"hazard: {i.name} of step {t} reads a sum of step {tag}, cycle {self.now}")
                    return value

                def store(results, pe=pe, gate=gate, first=first):
                    self.data[pe] |= {(i.item, "inverse", i.parts[0], gate, first + n): (t, value)
                                      for n, value in enumerate(results)}

                found[pe].append((operations, values, read, store))
        return found

    def _slots(self, tiles):
        """What each PE issues in each cycle; a constant that takes several memory words keeps it waiting."""
        wait_constant = -(-TWIDDLE_BITS // self.spec.weight_word_bits) - 1
        todo = defaultdict(list)
        for pe, transforms in tiles.items():
            for operations, results, read, store in transforms:
                known = {}  # name -> integer
                for n, operation in enumerate(operations):
                    wait = self.spec.mac_ii - 1 + wait_constant * (operation[0] == "mac")
                    finish = (results, store) if n == len(operations) - 1 else None
                    todo[pe] += [None] * wait + [(operation, known, read, finish)]
        return dict(todo)

    def _work_transform(self, a):
        for slots in a.todo.values():
            slot = slots.pop(0)
            if slot is None:
                continue
            (kind, name, *terms), known, read, finish = slot

            def value(operand, known=known, read=read):
                self.counts["data_reads"] += 1
                sign, where = operand
                return sign * (known[where] if where in known else read(where))

            self.counts["transform_operations"] += 1
            if kind == "add":
                known[name] = value(terms[0]) + value(terms[1])
                self.counts["data_writes"] += 1
            else:
                constant, operand, last = terms
                self.counts["weight_reads"] += -(-TWIDDLE_BITS // self.spec.weight_word_bits)
                known[name] = known.get(name, 0) + constant * value(operand)
                if last:
                    known[name] = (known[name] + (1 << (TWIDDLE_FRAC - 1))) >> TWIDDLE_FRAC
                    self.counts["data_writes"] += 1
            if finish:
                results, store = finish
                values = [sign * known[where] for sign, where in results]
                self._fly(a, self.spec.mac_latency, lambda store=store, values=values: store(values))
            else:
                self._fly(a, self.spec.mac_latency, lambda: None)
        a.todo = {pe: slots for pe, slots in a.todo.items() if slots}

    def _work_gather(self, a):
        """The sums of a row come from both ends of its PE row to the PE that has its inverse."""
        i, local, block = a.instruction, a.todo.pop(0), self._block(a.instruction)
        columns = inverse_columns(self.mapping.layers[i.layer].blocks, i.parts[0], i.gate).tolist()
        for row, pe_row in enumerate(block.pe_row_of_row.tolist()):
            if block.local_of_row[row] == local:
                way = row, pe_row, columns[row]
                if columns[row] > 0:
                    self._gather(a, way, 0, 1, 0)
                if columns[row] < block.pe_cols - 1:
                    self._gather(a, way, block.pe_cols - 1, -1, 0)

    def _gather(self, a, way, column, direction, partial):
        i, bank, (row, pe_row, end) = a.instruction, self._bank(a.step, a.instruction), way
        if self.bank_written.get(bank, -1) >= self.now:
            raise RuntimeError(f"hazard: {i.name} of step {a.step} reads the bank {bank} that is written, cycle {self.now}")
        if column != end:
            self.bank_drained[bank] = self.now
            partial += self.acc[*bank, pe_row, column][self._entry(a.step, i), row]
            self.counts.update({"acc_reads": 1, "link_words": 1})
            self._hop(a, self.spec.link_cycles, self._gather, way, column + direction, direction, partial)
            return
        a.met[row].append(partial)
        if len(a.met[row]) == (end > 0) + (end < self.regions[i.region].cols - 1):
            self.bank_drained[bank] = self.now
            total = sum(a.met[row]) + self.acc[*bank, pe_row, end][self._entry(a.step, i), row]
            self.counts["acc_reads"] += 1
            packed, layer = self._block(i).packed, self.items[i.layer, i.item].layer
            shift = packed.multiplication(layer.signals[PARTS[part_of(i.parts[0])]].magnitude).shift  # decided when packed
            total = (total + (1 << shift >> 1)) >> shift
            place = i.item, "inverse", part_of(i.parts[0]), i.gate, row
            self._fly(a, 0, lambda: self._keep(i, (pe_row, end), place, (a.t, total)))
        else:
            self._fly(a, 0, lambda: None)

    def _keep(self, i, pe, place, value):
        self.data[i.region, *pe][place] = value
        self.counts["data_writes"] += 1

    def _work_send(self, a):
        """Each row leaves its PE when a word from the first PE column would pass there, so that no two meet on a link."""
        i, local, block = a.instruction, a.todo.pop(0), self._block(a.instruction)
        columns = inverse_columns(self.mapping.layers[i.layer].blocks, i.parts[0], i.gate).tolist()
        for row, pe_row in enumerate(block.pe_row_of_row.tolist()):
            if block.local_of_row[row] == local and columns[row]:
                self._hop(a, columns[row] * self.spec.link_cycles, self._send, row, pe_row, columns[row], None)
            elif block.local_of_row[row] == local:
                self._send(a, row, pe_row, 0, None)

    def _send(self, a, row, pe_row, column, value):
        i = a.instruction
        if value is None:
            tag, value = self.data[i.region, pe_row, column][i.item, "inverse", part_of(i.parts[0]), i.gate, row]
            self.counts["data_reads"] += 1
            if tag != a.t:
                raise RuntimeError(f"hazard: {i.name} of step {a.t} reads a result of step {tag}, cycle {self.now}")
        self.counts["link_words"] += 1
        if column < self.regions[i.region].cols - 1:
            self._hop(a, self.spec.link_cycles, self._send, row, pe_row, column + 1, value)
        else:
            self._fly(a, 0, lambda: self._reach_edge(a, row, value))

    def _reach_edge(self, a, row, partial):
        i = a.instruction
        item, place, shift = self.items[i.layer, i.item], (a.t, i.sum, row), 0
        if i.sum not in ("hn", "p") and "." not in i.sum:  # which nothing joins before they are rounded, or sent
            shift = item.layer.alignment(i.gate)[1 if part_of(i.parts[0]) == "ih" else 2]
        partial <<= shift
        if PARTS[part_of(i.parts[0])] in item.layer.delta and "." not in i.sum:  # what was drained is what this sum moved by
            item.kept[i.parts, i.sum, row] += partial
            partial = item.kept[i.parts, i.sum, row]
            self.counts.update({"acc_reads": 1, "acc_writes": 1})
        if self.mapping.layers[i.layer].fills_edge and i.sum in item.layer.gates:
            self.kept[a.t, i.item, i.sum, row] = partial
            self.counts["acc_writes"] += 1
        else:
            item.add_up(place, partial, len(i.parts))

    def _work_load(self, a):
        a.todo = max(0, a.todo - self.spec.load_bits_per_cycle)
        self._fly(a, 0, lambda: None)

    def _work_multicast(self, a):
        i, t = a.instruction, a.t
        group = a.todo.pop(0)
        if len(group) > self.spec.h_words_per_cycle:
            raise RuntimeError(f"hazard: {i.name} of step {t} brings {len(group)} words in cycle {self.now}")
        for column, value, last in group:
            self.counts["multicast_words"] += 1
            self._fly(a, 0, lambda column=column, value=value, last=last: self._arrive(i, t, column, value, last))

    def _arrive(self, i, t, column, value, last):
        """A word of the network enters the data memories that keep it; the last of a value's words completes it."""
        for pe in (pe for layer, part in self._takers(i) for pe in self.keepers[layer, part, column]):
            if self.arrived_at.get(pe) == self.now:
                raise RuntimeError(f"hazard: {i.name} of step {t} brings the PE {pe} two words in cycle {self.now}")
            self.arrived_at[pe] = self.now
        if last:
            self._store(i, t, column, value)

    def _store(self, i, t, column, value):
        for layer, part in self._takers(i):
            item, stored = self.items[layer, i.item], value
            item.arrived[part, t] += 1
            if PARTS.get(part) in item.layer.delta:  # what V of a low-rank block makes of differences is sent as it is
                moved = value - item.last_sent[part, column]
                stored = moved if abs(moved) > item.layer.delta[PARTS[part]] else 0
                item.last_sent[part, column] += stored
            for pe in self.keepers[layer, part, column]:
                self.data[pe][i.item, part, t % COPIES.get(part, 1), column] = (t, stored)
                self.counts["data_writes"] += 1

    def _work_activation(self, a):
        a.held += 1
        if a.held < self.spec.act_ii:
            return
        a.held = 0
        for j, task in a.todo[: self.spec.act_units]:
            self.counts[task.event] += 1
            self._fly(a, self.spec.act_latency, lambda j=j, task=task: self._compute(a.t, a.instruction, j, task))
        del a.todo[: self.spec.act_units]

    def _compute(self, t, i, j, task):
        item = self.items[i.layer, i.item]
        self.counts["acc_reads"] += (t, i.item, i.sum, j) in self.kept
        item.values[t, task.value][j] = task.compute(j, *(item.values[t - back, value][j] for back, value in task.reads))
        computed = [item.values[t, other.value].get(j) for other in item.tasks[i.name]]
        if len(computed) > 1 and None not in computed:
            item.values[t, i.name][j] = item.join(*computed)

    # What lands at the end of a cycle.

    def _fly(self, a, latency, effect):
        a.flying += 1
        self.landing.append((self.now + latency, "value", a, effect))

    def _land(self):
        # A word on a link enters the next PE during its cycle, so links go before what ends with the cycle.
        for _, _, a, hop in [item for item in self.landing if item[:2] == (self.now, "link")]:
            a.flying -= 1
            hop[0](a, *hop[1:])
        ended = []
        for _, _, a, effect in [item for item in self.landing if item[:2] == (self.now, "value")]:
            effect()
            a.flying -= 1
            ended.append(a)
        self.landing = [item for item in self.landing if item[0] > self.now]
        for a in ended:
            if not a.todo and not a.flying and (a.step, a.number) not in self.spans:
                self.spans[a.step, a.number] = (a.start, self.now + 1)
                self._retire(a)

    def _retire(self, a):
        i = a.instruction
        self.retired[a.t, _key(i)] += 1
        if i.kind in BANK_USERS:
            self.bank_users.remove((a.step, a.number))
        if i.kind == "load":
            self.loaded.add((i.region, a.step, i.chunk))
        elif i.kind == "mac" and i.chunk >= 0:
            buffer = i.region, self._buffer(a.step, i)
            self.buffers[buffer] -= 1
            if not self.buffers[buffer]:  # all items have used the chunk
                del self.buffers[buffer]
        elif i.kind == "transform":
            self.items[i.layer, i.item].arrived[i.parts[0], a.t] = self._operand(i, a.t)[0]
        elif i.kind in ("drain", "gather"):
            for place, sums in self.acc.items():
                if place[:2] == self._bank(a.step, i):
                    for key in [key for key in sums if key[0] == self._entry(a.step, i)]:
                        del sums[key]
