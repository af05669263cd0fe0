"""What a PE really multiplies when it skips zeros: cycles and events per step, counted from the integers of a real sequence.

A PE works through its list of multiply-accumulates in order. In every cycle in which it is free it inspects the inputs of the
next `lookahead` of them, drops the leading ones whose input is zero and takes the first that is not; if all that it inspected
are zero it drops them and issues nothing in that cycle. So z zeros before a multiplication cost floor(z / lookahead) cycles, at
the end of the list ceil(z / lookahead). With a lookahead of 1 nothing is skipped: zeros are multiplied as they always were.
With a delta threshold the inputs are differences, which are zero where nothing was sent (delta skipping).

Not charged: the PE sees the columns of the words in its window and one flag for each input that it keeps (zero or not) beside
its memories; what it drops is read from neither.
"""

from dataclasses import dataclass

import numpy as np

from workbench.array.mapping import BlockMapping, words_taken
from workbench.array.spec import ArraySpec
from workbench.engine import LayerEngine, sent_steps
from workbench.fixedpoint import ExactMatrix
from workbench.packed import PARTS, PackedLayer, PackedLowRank

CHUNK = 1 << 21  # inputs that are looked at together


def multiplied(layer: PackedLayer, x, engine: LayerEngine | None = None) -> dict[str, np.ndarray]:
    """Part -> (T, B, width) integers that its weights multiply in each step: x, the h of the step before, what a projection
    takes; of a signal with a delta threshold what it moved by since it was last sent, or 0; for U of a low-rank block (part
    "ih.i" and so on) what V makes of these. x: (T, B, input_size); engine: that of the layer, if at hand."""
    traced = {"hidden": [], "unprojected": []}
    (engine or LayerEngine(layer)).run(x, trace=lambda t, name, values: traced[name].append(values) if name in traced else None)
    h = np.array(traced["hidden"])  # (T, B, output_size)
    found = {"ih": np.asarray(x, dtype=np.int64), "hh": np.concatenate([np.zeros_like(h[:1]), h[:-1]])}
    if layer.projected:
        found["hr"] = np.array(traced["unprojected"])
    for part, values in found.items():
        if PARTS[part] in layer.delta:
            found[part] = np.diff(sent_steps(values, layer.delta[PARTS[part]]), axis=0, prepend=0)
    for part, gate in layer.products:
        if isinstance(block := layer.block(part, gate), PackedLowRank):
            found[f"{part}.{gate}"] = ExactMatrix(block.right, layer.operand(part).magnitude)(found[part])
    return found


@dataclass(frozen=True)
class Work:
    """What the PEs of a region do in one mac instruction, step by step. events: those of schedule.EVENTS that it causes."""

    busy: np.ndarray  # (T,) cycles of the PE that takes longest
    multiply: np.ndarray  # (T,) cycles in which the mean PE multiplies what is no padding
    events: dict[str, np.ndarray]  # (T,) each
    pe_macs: np.ndarray  # (pe_rows, pe_cols) multiply-accumulates issued in all steps


def work_of(block: BlockMapping, rows, words, inputs, spec: ArraySpec) -> Work:
    """The work of one mac instruction. rows, words: as Instruction has them; inputs: (T, columns) what the block multiplies.

    PEs whose lists have the same columns and rows do the same in every step; each such list is counted once.
    """
    listed = _lists(block, rows, words)
    nonzero = np.zeros((len(inputs), max(inputs.shape[1], int(listed.cols.max()) + 1)), dtype=bool)  # padding columns are zero
    nonzero[:, : inputs.shape[1]] = inputs != 0
    size, taken = listed.cols.size, words_taken(block, spec)
    steps = max(1, CHUNK // size)
    found = [_count(listed, nonzero[low : low + steps], taken, spec) for low in range(0, len(inputs), steps)]
    busy, macs, *others = (np.concatenate(values) for values in zip(*found, strict=True))  # (T, lists)
    pe_macs = np.bincount(listed.pes, macs.sum(axis=0)[listed.list_of_pe], minlength=block.pe_rows * block.pe_cols)
    total, padding, read, runs = (values @ listed.sharing for values in (macs, *others))
    events = {"macs": total, "padding_macs": padding, "weight_reads": read * taken, "data_reads": total, "acc_reads": runs,
              "acc_writes": runs, "skipped_macs": np.diff(listed.starts, append=size) @ listed.sharing - total}
    return Work(busy.max(axis=1), (total - padding) * spec.mac_ii // pe_macs.size, events,
                pe_macs.astype(np.int64).reshape(block.pe_rows, block.pe_cols))


@dataclass(frozen=True)
class _Lists:
    """Different lists of multiply-accumulates, one behind the other."""

    cols: np.ndarray  # (macs,) block column of the input
    rows: np.ndarray  # (macs,) local row
    words: np.ndarray  # (macs,) number of the word
    padding: np.ndarray  # (macs,) bool: only padding causes it
    shared: bool  # whether a word may have several
    starts: np.ndarray  # (lists,) place of the first of each list
    sharing: np.ndarray  # (lists,) PEs that have it
    pes: np.ndarray  # (PEs with a list,)
    list_of_pe: np.ndarray  # (PEs with a list,)


def _lists(block, rows, words):
    inside = np.flatnonzero((block.local_row >= rows[0]) & (block.local_row < rows[1]))  # ordered by PE
    pe = block.pe[inside]
    place = np.arange(inside.size) - np.searchsorted(pe, pe)
    chosen = inside[(place >= words[0]) & (place < words[1])]
    used = block.used[chosen]
    word, pe = (np.repeat(values, used.sum(axis=1)) for values in (np.arange(chosen.size), block.pe[chosen]))
    cols, row = block.cols[chosen][used], block.local_of_row[block.rows[chosen][used]]
    # Padding is a column that is not there, or a word that only ends a row (a sparse block has no other zeros).
    padding = (cols >= block.shape[1]) | ((block.padding[chosen][word] > 0) & (used.shape[1] == 1))
    pes, starts = np.unique(pe, return_index=True)
    ends, numbers, kept, list_of_pe = np.append(starts[1:], pe.size), {}, [], []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        key = cols[start:end].tobytes(), row[start:end].tobytes(), padding[start:end].tobytes()
        if key not in numbers:
            numbers[key] = len(kept)
            kept.append((start, end))
        list_of_pe.append(numbers[key])
    places = np.concatenate([np.arange(start, end) for start, end in kept])
    lengths = np.array([end - start for start, end in kept])
    return _Lists(cols[places], row[places], word[places], padding[places], used.shape[1] > 1,
                  np.cumsum(lengths) - lengths, np.bincount(list_of_pe), pes, np.array(list_of_pe))


def _count(listed, nonzero, taken, spec):
    """(busy, macs, padding, words, runs) of some steps, each (T, lists). nonzero: (T, columns) bool."""
    (steps, _), size, lists = nonzero.shape, listed.cols.size, listed.starts.size
    starts = (np.arange(steps)[:, None] * size + listed.starts).ravel()  # of the list of each step, one behind the other
    issued = np.flatnonzero(nonzero.take(listed.cols, axis=1))
    begins = np.searchsorted(issued, starts)  # the first that is issued of each list, if any is
    ends = np.append(begins[1:], issued.size)
    macs, some = ends - begins, ends > begins
    where = issued - np.repeat(starts - np.tile(listed.starts, steps), macs)

    def per_list(chosen, values=1):
        """Sums over those of the issued that are chosen, or how many they are, of each list."""
        places = np.flatnonzero(chosen)
        total = np.concatenate([[0], np.cumsum(np.broadcast_to(values, chosen.shape)[places])])
        return total[np.searchsorted(places, ends)] - total[np.searchsorted(places, begins)]

    def changes(values):
        """How often the issued come to another value in their list."""
        other = np.diff(values[where], prepend=-1) != 0
        other[begins[some]] = True
        return per_list(other)

    before = np.diff(issued, prepend=-1) - 1  # zeros between it and the one before
    before[begins[some]] = issued[begins[some]] - starts[some]
    last = starts.copy()  # behind the last one that is issued
    last[some] = issued[ends[some] - 1] + 1
    after = np.append(starts[1:], steps * size) - last  # zeros
    words = changes(listed.words) if listed.shared else macs
    busy = (per_list(before >= spec.lookahead, before // spec.lookahead) + macs * spec.mac_ii + words * (taken - 1)
            + (after + spec.lookahead - 1) // spec.lookahead)
    counted = busy, macs, per_list(listed.padding[where]), words, changes(listed.rows)
    return tuple(values.reshape(steps, lists) for values in counted)
