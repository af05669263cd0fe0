"""Energy and resources of a schedule. Everything here is modelled: counts are exact, pJ and LUTs are tables with sources."""

from dataclasses import dataclass

from workbench.array.mapping import LayerMapping, constants_kept, is_transformed, kept_at_edge, operand_bits, parts_of
from workbench.array.schedule import EVENTS, Schedule
from workbench.array.spec import ArraySpec, ceil_div
from workbench.fixedpoint import FUNCTIONS, KNOT_BITS, ExactTable, LinearTable
from workbench.packed import PARTS
from workbench.spectrum import TWIDDLE_BITS

HOROWITZ = "M. Horowitz, Computing's energy problem, ISSCC 2014, 45 nm, 0.9 V"
SEEN = "as quoted in stillwater-sc/universal, generic_45nm.hpp, and in gist V0XNIHILI/2b6fa61e"
SEEN_TABLE = SEEN + ", and in PMC8934428, table 3"
ADD_8_PJ, ADD_32_PJ, MULTIPLY_8_PJ, MULTIPLY_32_PJ = 0.03, 0.1, 0.2, 3.1
SRAM_8KB_64_BIT_PJ = 10.0
DRAM_64_BIT_PJ = (1300.0, 2600.0)
ACC_BITS = 48  # of an accumulator word as priced: what a DSP48E2 holds, whatever acc_bits of the array

# event -> (pJ low, pJ high, source). 45 nm ASIC rows only: an FPGA's figures must never be mixed in.
_SRAM = (SRAM_8KB_64_BIT_PJ * 16 / 64, SRAM_8KB_64_BIT_PJ,
         f"{HOROWITZ}: 64-bit access of 8 KB SRAM; low: its share of 16 bits, high: the whole access; {SEEN_TABLE}")
_ACCUMULATOR = (SRAM_8KB_64_BIT_PJ * ACC_BITS / 64, SRAM_8KB_64_BIT_PJ * ACC_BITS / 64,
                f"{HOROWITZ}: 64-bit access of 8 KB SRAM, its share of {ACC_BITS} bits (an upper figure: the accumulators "
                f"of a PE are a smaller memory); {SEEN_TABLE}")
PJ_PER_EVENT = {
    "macs": (MULTIPLY_8_PJ + ADD_8_PJ, MULTIPLY_32_PJ + ADD_32_PJ,
             f"{HOROWITZ}: integer multiply and add, low: 8 bits, high: 32 bits; {SEEN_TABLE} (32 bits)"),
    "transform_operations": (ADD_8_PJ, MULTIPLY_32_PJ + ADD_32_PJ,
                             f"{HOROWITZ}: low: integer add of 8 bits, high: multiply and add of 32 bits; {SEEN_TABLE}"),
    "elementwise_multiplies": (MULTIPLY_8_PJ, MULTIPLY_32_PJ,
                               f"{HOROWITZ}: integer multiply, low: 8 bits, high: 32 bits; {SEEN_TABLE} (32 bits)"),
    "weight_reads": _SRAM,
    "data_reads": _SRAM,
    "acc_reads": _ACCUMULATOR,
    "acc_writes": _ACCUMULATOR,
    "weight_writes": _SRAM,
    "data_writes": _SRAM,
    "loaded_bits": (DRAM_64_BIT_PJ[0] / 64, DRAM_64_BIT_PJ[1] / 64, f"{HOROWITZ}: DRAM access of 64 bits, per bit; {SEEN}"),
}
STATIC_POWER = "not given: no sourced figure for this array in 45 nm; a device's own must not join ASIC rows"
ENERGY_NOTE = ("All rows are of a 45 nm ASIC, none of an FPGA, and one interval serves every word width: a DSP takes no less "
               "energy for narrow operands. "
               "The total is a partial sum: words over links, the multicast to the PEs, activation look-ups and roundings "
               "without a look-up are counted but not priced, static power is not given. So a ratio of totals is no ratio of "
               "energies.")

# One RAMB18E2, depth x width (UltraScale memory resources, UG573). 36 bits in simple dual-port mode: a port to read, one to
# write, which all memories here have. Two side by side are a RAMB36E2 in each of its shapes, up to 512 x 72.
RAMB18_SHAPES = ((16384, 1), (8192, 2), (4096, 4), (2048, 9), (1024, 18), (512, 36))
LUT_RAM_DEPTH = 64  # one LUT of a SLICEM stores 64 x 1 bits
# A 4 x 4 grid of 16-bit multiply-accumulate PEs as synthesised: what a tool packs into the DSP decides within the interval.
LUT_PER_16_PES, FF_PER_16_PES = (220, 1023), (145, 1681)
DUAL_PORT = 2  # LUTs of a LUT RAM that is written while it is read, against one with a single port (RAM64X1D, UG474)
DS890 = "to be found in DS890, which was not at hand"
DS987 = "to be found in DS987, which was not at hand; as public projects for the KV260 quote it"


@dataclass(frozen=True)
class Total:
    """What a device has of one resource. verified: read in the source itself."""

    count: int
    source: str
    verified: bool = False


# Device -> resource -> Total. Virtex UltraScale XCVU440; Kria K26 (XCK26, the fabric of a Zynq UltraScale+ ZU5).
_TOTALS = {"vu440": (DS890, 2880, 2520, 2532960, 5065920), "k26": (DS987, 1248, 144, 117120, 234240)}
DEVICES = {device: {name: Total(count, source) for name, count in zip(("dsp", "bram36", "lut", "ff"), counts, strict=True)}
           for device, (source, *counts) in _TOTALS.items()}


@dataclass(frozen=True)
class Energy:
    """Modelled dynamic energy, a partial sum (ENERGY_NOTE). rows: event, count, low_pj, high_pj, source; without_source:
    events counted, not priced."""

    rows: tuple[dict, ...]
    without_source: dict[str, int]

    @property
    def low_pj(self) -> float:
        return sum(row["low_pj"] for row in self.rows)

    @property
    def high_pj(self) -> float:
        return sum(row["high_pj"] for row in self.rows)


def energy(counts: dict[str, int]) -> Energy:
    """counts: events as Schedule.counts() gives them. An unknown event raises ValueError."""
    unknown = set(counts) - set(EVENTS)
    if unknown:
        raise ValueError(f"energy knows the events {', '.join(EVENTS)}, got {', '.join(sorted(unknown))}")
    rows = tuple({"event": event, "count": counts[event], "low_pj": counts[event] * low, "high_pj": counts[event] * high,
                  "source": source} for event, (low, high, source) in PJ_PER_EVENT.items() if event in counts)
    return Energy(rows, {event: count for event, count in counts.items() if event not in PJ_PER_EVENT})


@dataclass(frozen=True)
class Memory:
    """A memory that every PE, or every activation unit, has once. depth: words of the fullest; bits: width; each takes either
    LUTs or RAMB18s."""

    depth: int
    bits: int

    @property
    def luts(self) -> int:
        return self.bits if self.depth <= LUT_RAM_DEPTH else 0

    @property
    def ramb18(self) -> int:
        if self.depth <= LUT_RAM_DEPTH:
            return 0
        return min(ceil_div(self.depth, depth) * ceil_div(self.bits, width) for depth, width in RAMB18_SHAPES)


@dataclass(frozen=True)
class Resources:
    """Modelled resources of the whole array. lut and ff: intervals (low, high), memories in LUTs included. edge: memories of
    every activation unit that delta thresholds need: the sums that are kept, and what was sent last of each signal; and those
    of hoisted input products. tables: of every activation unit."""

    dsp: int
    weights: Memory
    data: Memory
    bram36: int
    lut: tuple[int, int]
    ff: tuple[int, int]
    edge: tuple[Memory, ...] = ()
    tables: tuple[Memory, ...] = ()

    def share(self, device: str) -> dict[str, tuple[float, float]]:
        """Resource -> used part of what a device has, low and high; an unknown device raises ValueError."""
        return {name: (low / total.count, high / total.count)
                for name, (low, high, total) in self._against("share", device).items()}

    def check_fit(self, device: str) -> None:
        """ValueError with the numbers where the array takes more of a resource than a device has, even at the low end."""
        short = [f"{low} {name} of {total.count}" for name, (low, _, total) in self._against("check_fit", device).items()
                 if low > total.count]
        if short:
            raise ValueError(f"the array does not fit the {device}: it takes {', '.join(short)}")

    def _against(self, who, device):
        if device not in DEVICES:
            raise ValueError(f"{who} knows the devices {', '.join(DEVICES)}, got {device!r}")
        used = {"dsp": (self.dsp, self.dsp), "bram36": (self.bram36, self.bram36), "lut": self.lut, "ff": self.ff}
        return {name: (*interval, DEVICES[device][name]) for name, interval in used.items()}


def resources(mapping: LayerMapping) -> Resources:
    """One DSP per PE and per activation unit; every PE's memories as deep as the fullest PE needs and as wide as the widest
    word; streaming buffers count twice. lut and ff, per PE: multiply-accumulate as synthesised; accumulators (all banks) in
    LUT RAM; the adder (a LUT a bit) and the registers of the link that a drain goes over, acc_bits wide; weights and data
    where they are small enough for LUT RAM. High end of lut: LUT RAMs that are written while they are read (accumulators,
    data, streamed weights, those of the edge) take DUAL_PORT times as much. Every bank is a memory of its own. Every activation
    unit has the tables: of "linear" the start and the slope of each segment, in one memory; of "exact" all codes. A transform's
    addition reads two data words in a cycle, so that where there are transforms every PE keeps its data twice. Not counted:
    logic of the activation units, what they keep of c, of a GRU's h and of gates until these are used, the second link of a
    gather, which comes from both ends, multicast, loader, edge buffer, control."""
    spec, edge = mapping.spec, tuple(memory for m in mapping.layers for memory in _edge_memories(m))
    if mapping.edge_words:
        edge += (Memory(mapping.edge_words, spec.acc_bits),)
    widths = [block.word_bits for m in mapping.layers for block in m.blocks.values()]
    widths += [TWIDDLE_BITS for m in mapping.layers if constants_kept(m.spec, m.layout, m.blocks)]  # beside the weights
    weights = Memory(mapping.weight_depth, min(max(widths), spec.weight_word_bits))
    data = Memory(mapping.data_words, max(operand_bits(m.layer, part) for m in mapping.layers for part in parts_of(m.layer)))
    copies = 1 + any(is_transformed(part) for m in mapping.layers for part in parts_of(m.layer))
    # Layers share a table where it is the same.
    tables = {(name, *(array.tobytes() for array in table.arrays.values())): table
              for m in mapping.layers for name, table in m.layer.tables.items()}
    return _resources(spec, weights, data, mapping.streamed_bits > 0, _table_memories(tables), edge, copies)


def _table_memories(tables) -> tuple[Memory, ...]:
    segments = sum(table.knots.size - 1 for table in tables.values() if isinstance(table, LinearTable))
    exact = (Memory(codes.size, out_fmt.bits) for table in tables.values() if isinstance(table, ExactTable)
             for (_, out_fmt), codes in table.entries.items())
    return (*((Memory(2 * segments, KNOT_BITS),) if segments else ()), *exact)


def _edge_memories(mapping) -> tuple[Memory, ...]:
    layer, spec = mapping.layer, mapping.spec
    sent = [name for part, name in PARTS.items() if part in mapping.parts and name in layer.delta]
    if not sent:
        return ()
    kept = sum(mapping.blocks[i.parts[0], i.gate].rows_between(*i.rows) for i in mapping.program
               if i.kind == "drain" and kept_at_edge(layer, i))
    widths = {"input": layer.input_size, "hidden": layer.output_size, "unprojected": layer.hidden_size}
    return (Memory(ceil_div(kept, spec.act_units), spec.acc_bits),
            *(Memory(ceil_div(mapping.batch * widths[name], spec.act_units), layer.signals[name].bits) for name in sent))


def full_resources(spec: ArraySpec) -> Resources:
    """Of an array whose memories are all as deep and as wide as its specification lets them be, with linear tables."""
    return _resources(spec, Memory(spec.weight_words, spec.weight_word_bits), Memory(spec.data_words, spec.word_bits), True,
                      _table_memories({name: LinearTable.build(name) for name in FUNCTIONS}))


def _resources(spec, weights, data, streamed, tables, edge=(), data_copies=1):
    pes = spec.rows * spec.cols
    table_luts, edge_luts = (spec.act_units * sum(memory.luts for memory in some) for some in (tables, edge))
    data_ramb18, data_luts = data_copies * data.ramb18, data_copies * data.luts
    ramb18 = pes * (weights.ramb18 + data_ramb18) + spec.act_units * sum(memory.ramb18 for memory in (*tables, *edge))
    accumulators = spec.acc_bits * spec.acc_banks * ceil_div(spec.acc_depth, LUT_RAM_DEPTH)  # LUTs, as all below
    written_while_read = accumulators + data_luts + (weights.luts if streamed else 0)
    low = accumulators + data_luts + weights.luts + spec.acc_bits
    high = low + (DUAL_PORT - 1) * written_while_read
    return Resources(
        dsp=pes + spec.act_units, weights=weights, data=data, bram36=ceil_div(ramb18, 2),
        lut=tuple(ceil_div(n * pes, 16) + pes * more + table_luts + ports * edge_luts
                  for n, more, ports in zip(LUT_PER_16_PES, (low, high), (1, DUAL_PORT), strict=True)),
        ff=tuple(ceil_div(n * pes, 16) + pes * spec.acc_bits * spec.link_cycles for n in FF_PER_16_PES),
        edge=edge, tables=tables,
    )


BASELINE = "dense 16-bit"


def baseline_of(who: str, schedules: dict[str, Schedule]) -> Schedule:
    """That which accelerations are against; ValueError where there is none."""
    if BASELINE not in schedules:
        raise ValueError(f"{who} needs a schedule labelled {BASELINE!r}, got {', '.join(schedules) or 'none'}")
    return schedules[BASELINE]


def compare(schedules: dict[str, Schedule]) -> list[dict]:
    """One row per schedule of equal length; accelerations, item for item, against the one labelled "dense 16-bit".

    cycles: of the whole sequence; energy: modelled, of the whole sequence (a partial sum, ENERGY_NOTE), both for all items of
    a batch; multiply_cycles: cycles for which the fullest PE multiplies and transforms in one step of one item, so that
    `acceleration_multiply` is what would be won with no overhead at all.
    """
    base = baseline_of("compare", schedules)
    if len(lengths := {schedule.steps for schedule in schedules.values()}) > 1:
        raise ValueError(f"compare needs schedules of one number of steps, got {', '.join(map(str, sorted(lengths)))}")
    return [_row(label, schedule, base) for label, schedule in schedules.items()]


def _row(label, schedule: Schedule, base: Schedule) -> dict:
    mapping, used, modelled = schedule.mapping, resources(schedule.mapping), energy(schedule.counts())
    multiply, base_multiply = (int(m.working_cycles.max()) for m in (mapping, base.mapping))
    base_bits = 32 * base.mapping.dense_weights  # also for a layer of fewer units
    return {
        "label": label, "layout": mapping.layout_name, "batch": mapping.batch,
        "steady_state_cycles": schedule.steady_state_cycles, "cycles_per_item": schedule.cycles_per_item,
        "first_step_latency": schedule.first_step_latency, "cycles": schedule.cycles,
        "acceleration": base.cycles_per_item / schedule.cycles_per_item,
        "acceleration_sequence": base.cycles * mapping.batch / (schedule.cycles * base.mapping.batch),
        "multiply_cycles": multiply,
        "acceleration_multiply": base_multiply / multiply, "bound": schedule.bound,
        "words_per_pe": int(mapping.memory_words.max()), "whole_sequence": schedule.whole_sequence,
        "streamed_bits_per_step": schedule.counts()["loaded_bits"] / schedule.steps,
        "on_chip_bits": mapping.on_chip_bits, "cr_chip": base_bits / mapping.on_chip_bits,
        "energy_low_nj": modelled.low_pj / 1000, "energy_high_nj": modelled.high_pj / 1000,
        "dsp": used.dsp, "bram36": used.bram36, "lut_low": used.lut[0], "lut_high": used.lut[1],
        "ff_low": used.ff[0], "ff_high": used.ff[1],
    } | schedule.split()
