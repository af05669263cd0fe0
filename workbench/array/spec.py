"""The array processor as data: grid, memories, links, units and clock, with their units; and the presets."""

from dataclasses import dataclass, fields, replace

from workbench.checks import plain_numbers

GROUP = 4  # PEs come in groups of 4 x 4; regions are whole groups
DSP_BITS, DSP_ACC_BITS = 18, 48  # of one DSP48E2 (UG579): its narrower operand, its adder


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class ArraySpec:
    """A two-dimensional grid of processing elements (PEs). Units and sources of all fields: FIELDS, shown in reports.

    rows, cols: PEs, multiples of 4. clock_mhz: MHz. word_bits: widest packed weight or signal; acc_bits: accumulator.
    mac_latency: cycles between the last that a multiply-accumulate holds its PE and the first that can read its accumulator;
    mac_ii: cycles that it holds its PE.
    acc_depth: accumulators per bank and PE; acc_banks: banks, each a memory that multiplications or a drain use, never both
    in one cycle: with one bank, drains and multiplications of a region alternate; with two, one sum is drained while the
    next one, in the other bank, is multiplied.
    link_cycles: cycles per hop. h_words_per_cycle: words that the multicast network delivers per cycle, at most one to a PE.
    act_units, act_latency (cycles), act_ii (cycles per value and unit): activation units.
    weight_words: words of weight_word_bits per PE; data_words: words per PE of what weights multiply (inputs, hidden values,
    what a projection takes). edge_words: sums of hoisted input products, acc_bits wide, per activation unit.
    load_bits_per_cycle: loader bandwidth from outside. config_cycles: one configuration broadcast, once per sequence.
    lookahead: coming inputs that a PE may inspect in a cycle to skip zeros (skipping.py); 1 skips nothing.

    What the model assumes beyond the fields is listed in ASSUMPTIONS: sums cross a free edge buffer, each region drains at an
    edge of its own, one multicast rate for every region, x arrives by multicast, resident weights are in place.
    """

    rows: int = 16
    cols: int = 16
    clock_mhz: int = 200
    word_bits: int = 16
    acc_bits: int = 48
    mac_latency: int = 4
    mac_ii: int = 1
    acc_depth: int = 64
    acc_banks: int = 2
    link_cycles: int = 1
    h_words_per_cycle: int = 4
    act_units: int = 16
    act_latency: int = 4
    act_ii: int = 1
    weight_words: int = 2048
    weight_word_bits: int = 18
    data_words: int = 512
    edge_words: int = 4096
    load_bits_per_cycle: int = 512
    config_cycles: int = 64
    lookahead: int = 1

    def __post_init__(self):
        plain_numbers(self)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"ArraySpec needs a whole number for {f.name}, got {value!r}")
            smallest = 0 if f.name in MAY_BE_ZERO else 1
            if value < smallest:
                raise ValueError(f"ArraySpec needs {f.name} of at least {smallest}, got {value}")
        if self.rows % GROUP or self.cols % GROUP:
            raise ValueError(f"ArraySpec needs rows and cols in multiples of {GROUP} (groups of 4 x 4 PEs), "
                             f"got {self.rows} x {self.cols}")
        if self.word_bits > DSP_BITS:
            raise ValueError(f"ArraySpec needs word_bits of at most {DSP_BITS} (one DSP48E2 multiplies 27 x {DSP_BITS} bits), "
                             f"got {self.word_bits}")
        if self.acc_bits > DSP_ACC_BITS:
            raise ValueError(f"ArraySpec needs acc_bits of at most {DSP_ACC_BITS} (one DSP48E2 adds {DSP_ACC_BITS} bits), "
                             f"got {self.acc_bits}")

    def with_(self, **changes: int) -> "ArraySpec":
        """A copy with some fields changed; an unknown field raises TypeError."""
        if unknown := changes.keys() - (known := [f.name for f in fields(self)]):
            raise TypeError(f"ArraySpec has the fields {', '.join(known)}, got {', '.join(sorted(unknown))}")
        return replace(self, **changes)


ASSUMPTIONS = (
    "Drained sums reach the activation units through an edge buffer that any unit can read; neither its cycles nor its memory "
    "is charged. It is needed where gates are placed differently: sparse rows, split tiles, two regions.",
    "Each region drains at an edge of its own, also where two regions share PE rows.",
    "The multicast delivers h_words_per_cycle to all regions at once, whatever their size, and one word a cycle into any PE's "
    "data memory, in an order that the program fixes: the columns of a circulant tile or a transform, all for one PE column, "
    "take a cycle each. A write of another kind in the same cycle is not looked at: the result of a transform, a sum that a "
    "gather brings; nor are the ports of the memories at the edges. Of regions side by side, those of fewer PE columns than "
    "h_words_per_cycle are no candidates, as they would hold up the multicast for all.",
    "A PE that comes back to a row within mac_latency cycles (circulant pieces of 4 rows or fewer at a latency of 4) forwards "
    "the sum that is not written back yet; forwarding costs no cycle.",
    "x comes to the PEs over the multicast; loading it from outside is not counted, nor is what passes between layers in turn.",
    "Input products hoisted ahead of the recurrence wait in memories of the activation units (counted and charged); any unit's "
    "memory takes what a drain brings, also several words in a cycle, and reading it costs no cycle.",
    "Each item of a batch has x, h and c of its own; every resource serves the items in turn. What the activation units keep "
    "of c, or of a GRU's h, is not charged.",
    "Layers side by side share activation units, multicast and loader, which serve them in an order that the program fixes. "
    "Stages in turn begin when the one before has ended, each with a configuration and, where the weights of all do not fit "
    "together, with the load of its own.",
    "Resident weights and the first h are in place at the start; the first load is reported apart (initial_load_cycles).",
    "A barrier per region lies between operations: the fullest PE counts.",
    "A PE reads one memory word of its weights per cycle, not ahead: a stored word that takes several holds its PE longer. "
    "Streamed words are written through a second port.",
    "What V of a low-rank block gives, up to 27 bits, crosses the edge and goes back over the multicast as several words of "
    "word_bits; a data memory is as wide as the widest operand (counted in its resources) and gives one in a cycle.",
    "Datapath fft: every PE transforms the tiles of its own PE column, so that the spectra never leave it and the PE rows "
    "repeat the work (counted); a transform is not shared between PEs. Sums of spectrum products meet from both ends of a "
    "PE row in the PE that has the tile's inverse, in turn over the PE columns; what that gives leaves over the links as a "
    "drain does. One inverse per block and output tile, none shared by W_ih and W_hh, so that that of W_ih runs before h is "
    "back. The half-up shift of a sum belongs to its arrival; a turned sign and a result that is used within mac_latency "
    "cost nothing. word_bits bounds the packed weights and what passes the network; spectra of weights, up to 18 bits a "
    "word, and what a transform takes and gives, 27 bits, may be wider: memories are as wide as the widest (counted).",
    "With a lookahead above 1 a PE sees the columns of the words in its window and a flag for each input that it keeps (zero "
    "or not) beside its memories; neither is charged, and what it drops is read from neither memory.",
    "With a delta threshold the sender takes the difference from what it sent last and sends it, one bit wider, or 0 in its "
    "place; neither cycles nor energy of that are counted. The sums to which drained ones are added are kept at the edge "
    "(counted and charged), where any unit's memory reads and writes as many in a cycle as a drain brings.",
    "Alignment, bias and rounding belong to the latency of an activation; every activation unit owns a multiplier and keeps "
    "its part of c, or of a GRU's h, and of gates until they are used, in memories that are not charged. A sum that is rounded "
    "without a look-up (a GRU's W_hn h + b_hn, a projected h) takes as long as a look-up.",
)

MAY_BE_ZERO = ("mac_latency", "act_latency", "config_cycles")

ASSUMED = "assumption"
# Field -> (unit, source or ASSUMED with its reason). UG573 and UG579: memory resources and DSP slice of UltraScale.
FIELDS = {
    "rows": ("PEs", "choice, whole groups of 4 x 4"),
    "cols": ("PEs", "choice, whole groups of 4 x 4"),
    "clock_mhz": ("MHz", f"{ASSUMED}: published designs on such parts run at 200; no figure depends on it but times"),
    "word_bits": ("bits", f"{ASSUMED}: the 16-bit baseline; at most 18, the narrower operand of a DSP48E2 (UG579)"),
    "acc_bits": ("bits", "adder of a DSP48E2 (UG579)"),
    "mac_latency": ("cycles", f"{ASSUMED}: DSP48E2 with all its pipeline registers"),
    "mac_ii": ("cycles", f"{ASSUMED}: DSP48E2 takes operands every cycle"),
    "acc_depth": ("sums per bank and PE", f"{ASSUMED}: what a LUT holds as 64 x 1 RAM"),
    "acc_banks": ("banks per PE", f"{ASSUMED}: one drains while the other adds"),
    "link_cycles": ("cycles per hop", f"{ASSUMED}: one register"),
    "h_words_per_cycle": ("words per cycle", f"{ASSUMED}: one per column of groups"),
    "act_units": ("units", f"{ASSUMED}: one per PE row"),
    "act_latency": ("cycles", f"{ASSUMED}: rounding, look-up, interpolation, rounding"),
    "act_ii": ("cycles per value and unit", f"{ASSUMED}: pipelined"),
    "weight_words": ("words per PE", f"{ASSUMED}: one BRAM36 as 2K x 18 (UG573); k26: one RAMB18"),
    "weight_word_bits": ("bits", "port of a RAMB18 (UG573)"),
    "data_words": ("words per PE", f"{ASSUMED}: up to 64 lie in LUTs, which k26 keeps to; more take a RAMB18"),
    "edge_words": ("words of acc_bits per activation unit",
                   f"{ASSUMED}: six BRAM36 as 4K x 8 each; built only where input products are hoisted"),
    "load_bits_per_cycle": ("bits per cycle", f"{ASSUMED}: 512 bits at 200 MHz are 12.8 GB/s"),
    "config_cycles": ("cycles per sequence", f"{ASSUMED}: one configuration over an H-tree"),
    "lookahead": ("inputs per cycle", f"{ASSUMED}: 1 skips nothing"),
}
PRESETS = {
    "group4x4": ArraySpec(rows=4, cols=4, h_words_per_cycle=1, act_units=4, load_bits_per_cycle=64),
    "array16x16": ArraySpec(),
    "vu440": ArraySpec(rows=48, cols=48, h_words_per_cycle=12, act_units=48),
    "k26": ArraySpec(weight_words=1024, data_words=64),
}


def in_step(rows, cols) -> dict:
    """Fields that go with the sides of an array, as the presets have them: an activation unit per PE row, one word of the
    multicast per cycle and column of groups. rows, cols: PEs, numbers or NumPy arrays."""
    return {"act_units": rows, "h_words_per_cycle": ceil_div(cols, GROUP)}


def preset(name: str) -> ArraySpec:
    """The preset of that name; an unknown name raises ValueError that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"preset knows {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
