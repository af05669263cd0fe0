"""Sparse or dense operation of a block, chosen from the sparsity of its weights and of what it multiplies.

A block with zeros among its weights can run as sparse words (value, column and end of row; a multiply-accumulate for each
weight that is not zero, and padding words) or as dense tiles (no indices; a multiply-accumulate for every weight). Zeros among
the inputs are skipped either way (skipping.py), and a sparse word may take several memory words, which hold its PE longer. The
integers are the same. After patent CN113537465A, which lets weight and input-sequence sparsity decide; its rule is not known.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import product
from statistics import NormalDist

import numpy as np

from workbench.array.mapping import BlockMapping, LayerMapping, Layout, Region, fitting_mappings, map_block, words_taken
from workbench.array.schedule import ABSENT, Schedule, schedule_mapping
from workbench.array.skipping import multiplied, work_of
from workbench.array.spec import ArraySpec
from workbench.engine import LayerEngine
from workbench.fixedpoint import QFormat
from workbench.packed import PackedDense, PackedLayer, PackedSparse

OPERATIONS = {"dense": PackedDense, "sparse": PackedSparse}


def with_operations(layer: PackedLayer, operations: dict[tuple[str, str], str]) -> PackedLayer:
    """The layer as the array stores it with these operations, (part, gate) -> "dense" or "sparse"; every weight stays."""
    blocks = dict(layer.blocks)
    for (part, gate), operation in operations.items():
        name = layer.block_name(part, gate)
        if operation not in OPERATIONS or type(blocks[name]) not in OPERATIONS.values():
            raise ValueError(f"with_operations runs dense and sparse blocks as {' or '.join(OPERATIONS)}, got {operation!r} "
                             f"for the {type(blocks[name]).__name__} {name}")
        blocks[name] = _stored_as(blocks[name], operation)
    return replace(layer, blocks=blocks)


def _stored_as(packed, operation):
    if isinstance(packed, OPERATIONS[operation]):
        return packed
    form = OPERATIONS[operation]
    return form(packed.dense(), packed.fmt) if form is PackedDense else form.from_dense(packed.dense(), packed.fmt)


def cycles_per_word(share, hold: int, lookahead: int):
    """Mean cycles of a PE for each word of its list, if any input is non-zero with probability `share`: hold, the cycles of a
    multiplication, for those that are not skipped, and before each of them floor(z / lookahead) for z zeros, which in the mean
    is q**lookahead / (1 - q**lookahead) with q = 1 - share. With a lookahead of 1 every word takes hold."""
    share = np.asarray(share, dtype=float)
    if lookahead == 1:
        return np.full(share.shape, float(hold))
    dropped = (1 - share) ** lookahead
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(share > 0, share * (hold + dropped / (1 - dropped)), 1 / lookahead)


def border(share, lookahead: int, dense_hold: int = 1, sparse_hold: int = 2):
    """Weight density below which sparse words take fewer cycles than dense tiles, at an input density; imbalance between PEs
    and words that only end a row left out of account."""
    return cycles_per_word(share, dense_hold, lookahead) / cycles_per_word(share, sparse_hold, lookahead)


def _predicted(block: BlockMapping, words, inputs, spec) -> float:
    """Mean cycles per step of the PE that takes longest, from how many words each PE has (pe_rows, pe_cols) and which share of
    the inputs (T, columns) that its column keeps is not zero.

    Of w words with density d in a PE's part of the block, w * share meet such an input in the mean, with a variance of
    w * share * (1 - share) * (1 - d); the PE row that meets most lies as far above the mean as the largest of so many normal
    deviates (Blom 1958).
    """
    kept = block.data_columns()[:, : inputs.shape[1]].astype(float)  # (pe_cols, columns)
    columns = np.maximum(kept.sum(axis=1), 1)  # (pe_cols,)
    share = ((inputs != 0) @ kept.T / columns)[:, None]  # (T, 1, pe_cols)
    density = words / np.maximum(block.local_rows[:, None] * columns, 1)  # (pe_rows, pe_cols)
    spread = np.sqrt(share * (1 - share) * np.clip(1 - density, 0, 1) / np.maximum(words, 1))
    above = NormalDist().inv_cdf((block.pe_rows - 0.375) / (block.pe_rows + 0.25))
    met = np.minimum(share + above * spread, 1)  # (T, pe_rows, pe_cols)
    per_word = cycles_per_word(met, spec.mac_ii + words_taken(block, spec) - 1, spec.lookahead)
    return float((words * per_word).max(axis=(1, 2)).mean())


def predicted_cycles(mapping: LayerMapping, part: str, gate: str, inputs) -> float:
    """Cycles per step that the multiplications of a block are expected to take. inputs: (T, columns) what it multiplies."""
    block, total = mapping.blocks[part, gate], 0.0
    for i in mapping.program:
        if i.kind == "mac" and (i.parts, i.gate) == ((part,), gate):
            counts = block.words_between(*i.rows)
            total += _predicted(block, np.clip(counts, *i.words) - i.words[0], inputs, mapping.spec)
    return total


def block_cycles(schedule: Schedule) -> dict[tuple[str, str], float]:
    """(part, gate) -> cycles per step for which the PEs multiply its block, as scheduled."""
    cycles = defaultdict(float)
    for row, starts in enumerate(schedule.rows):
        for n in np.flatnonzero(starts != ABSENT):
            i = schedule.mapping.program[n]
            if i.kind == "mac":
                cycles[i.parts[0], i.gate] += (schedule.by_row[row] if schedule.by_row else schedule.timed)[n].busy
    return {block: total / schedule.steps for block, total in cycles.items()}


@dataclass(frozen=True)
class Choice:
    """What compare_operations found. rows: one a block; schedules: label ("dense", "sparse": all blocks so; "chosen") -> one
    schedule a sequence."""

    operations: dict[tuple[str, str], str]
    rows: tuple[dict, ...]
    schedules: dict[str, tuple[Schedule, ...]]

    @property
    def cycles(self) -> dict[str, int]:
        """Label -> cycles of all sequences."""
        return {label: sum(schedule.cycles for schedule in some) for label, some in self.schedules.items()}


def choose_operations(layer: PackedLayer, spec: ArraySpec, inputs, layout: Layout) -> tuple[dict, dict]:
    """The operation of every block that is stored dense or sparse: the one with fewer predicted cycles, of equal ones the one
    with fewer bits. Where the layer so chosen streams weights, what a block adds to the loads counts if it takes longer.

    inputs: part -> (T, columns) what is multiplied in the steps of real sequences. Returns (part, gate) -> operation, and
    operation -> (part, gate) -> predicted cycles.
    """
    blocks = [block for block in layer.products if type(layer.block(*block)) in OPERATIONS.values()]
    pure = {o: fitting_mappings(with_operations(layer, dict.fromkeys(blocks, o)), spec, layout)[-1] for o in OPERATIONS}
    bits = {o: {block: mapping.blocks[block].on_chip_bits for block in blocks} for o, mapping in pure.items()}
    predicted = {o: {block: predicted_cycles(mapping, *block, inputs[block[0]]) for block in blocks}
                 for o, mapping in pure.items()}

    def choose():
        return {block: min(OPERATIONS, key=lambda o: (predicted[o][block], bits[o][block])) for block in blocks}

    chosen = fitting_mappings(with_operations(layer, choose()), spec, layout)[-1]
    if chosen.streamed_bits:
        # All words share the memory alike: of one bit more the share that does not fit is streamed, one word more displaces
        # what lay there.
        words = int(chosen.memory_words.sum())
        resident = min(1.0, spec.weight_words * np.count_nonzero(chosen.memory_words) / words)
        for o, mapping in pure.items():
            for block in blocks:
                memory = int(mapping.blocks[block].weight_words.sum()) * words_taken(mapping.blocks[block], spec)
                streamed = bits[o][block] * (1 - resident) + memory * resident * chosen.on_chip_bits / words
                predicted[o][block] = max(predicted[o][block], streamed / spec.load_bits_per_cycle)
    return choose(), predicted


def compare_operations(layer: PackedLayer, spec: ArraySpec, sequences, layout: Layout | None = None) -> Choice:
    """Choose each block's operation by predicted cycles and schedule the alternatives on real sequences, (T, 1, input_size)
    integers each: all dense, all sparse, as chosen, and every block the other way with the others as chosen.

    A row a block: densities of its weights and of what it multiplies; predicted and scheduled cycles per step of its
    multiplications, dense and sparse, and either way the cycles of all sequences and the bits on chip; the choice; best: its
    sequences take no more cycles than the other way; lost: the share of their cycles that the other way would save; best
    alone: so do its own multiplications. Without a layout: one region.
    """
    sequences = [np.asarray(x) for x in sequences]
    if not sequences or any(x.ndim != 3 or x.shape[1:] != (1, layer.input_size) for x in sequences):
        raise ValueError(f"compare_operations needs sequences of shape (T, 1, {layer.input_size}), one at least, got "
                         f"{', '.join(str(x.shape) for x in sequences) or 'none'}")
    layout = layout or Layout((Region(0, 0, spec.rows, spec.cols),))
    engine = LayerEngine(layer)
    inputs = [multiplied(layer, x, engine) for x in sequences]
    joined = {part: np.concatenate([found[part][:, 0] for found in inputs]) for part in inputs[0]}
    chosen, predicted = choose_operations(layer, spec, joined, layout)

    def run(operations):
        mappings = fitting_mappings(with_operations(layer, operations), spec, layout)
        runs = [tuple(schedule_mapping(mapping, len(found["ih"]), found) for found in inputs) for mapping in mappings]
        return min(runs, key=lambda some: sum(schedule.cycles for schedule in some))

    def steps_mean(some, block):
        return sum(block_cycles(schedule)[block] * schedule.steps for schedule in some) / sum(s.steps for s in some)

    schedules = {operation: run(dict.fromkeys(chosen, operation)) for operation in OPERATIONS} | {"chosen": run(chosen)}
    rows = []
    for block, operation in chosen.items():
        packed, found = layer.block(*block), {}
        for other in OPERATIONS:
            found[other] = schedules["chosen"] if other == operation else run(chosen | {block: other})
        cycles = {other: steps_mean(some, block) for other, some in found.items()}
        total = {other: sum(schedule.cycles for schedule in some) for other, some in found.items()}
        rows.append({
            "part": block[0], "gate": block[1], "weight density": np.count_nonzero(packed.dense()) / packed.dense().size,
            "input density": np.count_nonzero(joined[block[0]]) / joined[block[0]].size, "choice": operation,
            **{f"predicted {other}": predicted[other][block] for other in OPERATIONS},
            **{f"scheduled {other}": cycles[other] for other in OPERATIONS},
            **{f"sequences {other}": total[other] for other in OPERATIONS},
            **{f"bits {other}": some[0].mapping.blocks[block].on_chip_bits for other, some in found.items()},
            "best": total[operation] == min(total.values()), "lost": total[operation] / min(total.values()) - 1,
            "best alone": cycles[operation] == min(cycles.values())})
    return Choice(chosen, tuple(rows), schedules)


def crossover(spec: ArraySpec, weight_densities, input_densities, lookaheads, shape=(512, 512), bits: int = 16,
              steps: int = 20, seed: int = 0) -> list[dict]:
    """Which operation of a block takes fewer cycles, predicted and counted, over weight density, input density and lookahead:
    random supports and random inputs of `steps` steps, one block on the whole grid. A row a point; lost: share of cycles that
    the predicted choice takes beyond the better one; of its input density ideal border: as the function `border` has it, and
    border: the weight density at which the predictions cross, NaN where they do not."""
    if not all(0 <= density <= 1 for density in (*weight_densities, *input_densities)):
        raise ValueError(f"crossover needs densities from 0 to 1, got {weight_densities} of weights and {input_densities} of "
                         "inputs")
    rng, rows = np.random.default_rng(seed), []
    uniform, order = rng.random((steps, shape[1])), rng.random(shape)
    fmt = QFormat(bits, 0)
    for density in weight_densities:
        weights = (order < density).astype(np.int64)
        blocks = {operation: map_block(_stored_as(PackedDense(weights, fmt), operation), spec.rows, spec.cols)
                  for operation in OPERATIONS}
        for share in input_densities:
            inputs = (uniform < share).astype(np.int64)
            for lookahead in lookaheads:
                array = spec.with_(lookahead=lookahead)
                predicted = {o: _predicted(block, block.weight_words, inputs, array) for o, block in blocks.items()}
                counted = {o: _counted(block, inputs, array) for o, block in blocks.items()}
                choice, best = (min(OPERATIONS, key=cycles.get) for cycles in (predicted, counted))
                holds = [spec.mac_ii + words_taken(blocks[o], spec) - 1 for o in OPERATIONS]
                rows.append({
                    "lookahead": lookahead, "weight density": density, "input density": share, "choice": choice, "best": best,
                    **{f"predicted {o}": predicted[o] for o in OPERATIONS}, **{f"counted {o}": counted[o] for o in OPERATIONS},
                    "right": counted[choice] == counted[best], "lost": counted[choice] / counted[best] - 1,
                    "ideal border": float(border(share, lookahead, *holds))})
    for lookahead, share in product(lookaheads, input_densities):
        mine = sorted((row for row in rows if (row["lookahead"], row["input density"]) == (lookahead, share)),
                      key=lambda row: row["weight density"])
        more = np.array([row["predicted sparse"] - row["predicted dense"] for row in mine])  # rises with the weight density
        densities = [row["weight density"] for row in mine]
        crossing = float(np.interp(0, np.maximum.accumulate(more), densities, left=np.nan, right=np.nan))
        for row in mine:
            row["border"] = crossing
    return rows


def _counted(block, inputs, spec) -> float:
    """Cycles per step of a block's whole list."""
    if spec.lookahead == 1:
        return float((block.macs * spec.mac_ii + block.weight_words * (words_taken(block, spec) - 1)).max())
    return float(work_of(block, (0, block.shape[0]), (0, int(block.weight_words.max())), inputs, spec).busy.mean())
