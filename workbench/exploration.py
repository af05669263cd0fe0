"""What a plan costs before anything is trained: size, cycles, energy and resources on an array; and controls that vary it.

No accuracy is here: the weights stay as they come. A tradeoff or your own training loop says what a plan loses.
"""

import html
from dataclasses import dataclass, fields, replace

import pandas as pd
import torch

from workbench.acceleration import by_fft
from workbench.array import PRESETS, ArraySpec, Schedule, preset, schedule_layer
from workbench.array.cost import BASELINE
from workbench.array.spec import GROUP
from workbench.budget import WIDTHS, pack_within_reach, uniform_plan
from workbench.constrain import pack
from workbench.gates import blocks
from workbench.methods import METHODS, Dense
from workbench.packed import PackedModel
from workbench.plan import Plan, uniform
from workbench.plots import gantt_figure, region_figure
from workbench.quantise import calibrate
from workbench.report import show
from workbench.runs import listed
from workbench.sensitivity import LOSSLESS_BITS, Strength, hybrid_plan
from workbench.study import HYBRID
from workbench.tables import hardware_table, present

STEPS = 10  # of the sequence that is scheduled; the steady state is reached after two or three
CELLS = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU}
BLOCKS = (2, 4, 8, 16, 32)  # that the controls offer; a block that does not divide a matrix is refused
MOST_PES, MOST_SEQUENCES = 64, 16  # a side of the array and a batch, of the controls


@dataclass(frozen=True)
class Question:
    """What explore answers; every field but `layer` is a control of explorer.

    method: "hybrid", or a name of METHODS for its uniform plan; target_cr_disk: ratio that the plan reaches at least; bits: of
    a weight, of a uniform plan about (uniform_plan); sensitive, block: gates that the hybrid plan prunes by Top-k, None for an
    LSTM's g or a GRU's n, and the size of the circulant blocks of the others; fft: whether circulant blocks are multiplied by
    FFT; array: a name of PRESETS; rows, cols: its PEs, None for the preset's; activation units and multicast then go in step,
    as in scaled_points; batch: sequences side by side; layer: which of the model's, None for the first.
    """

    method: str = HYBRID
    target_cr_disk: float = 38.4
    bits: int = 6
    sensitive: tuple[str, ...] | None = None
    block: int = 8
    fft: bool = False
    array: str = "array16x16"
    rows: int | None = None
    cols: int | None = None
    batch: int = 1
    layer: str | None = None

    def spec(self) -> ArraySpec:
        spec = preset(self.array)
        rows, cols = self.rows or spec.rows, self.cols or spec.cols
        if (rows, cols) == (spec.rows, spec.cols):
            return spec
        return spec.with_(rows=rows, cols=cols, act_units=rows, h_words_per_cycle=max(1, cols // GROUP))

    def gates(self, model: torch.nn.Module) -> list[str]:
        """The gates that a hybrid plan prunes."""
        if self.sensitive is not None:
            return list(self.sensitive)
        return [gate for gate in dict.fromkeys(block.gate for block in blocks(model).values()) if gate in ("g", "n")]

    def plan(self, model: torch.nn.Module, signals) -> Plan:
        """The plan that is asked for; OutOfReach, a ValueError, where there is none of that ratio."""
        if self.method == HYBRID:
            strength = Strength(self.block, circulant_bits=self.bits, topk_bits=self.bits)
            plan = hybrid_plan(model, self.gates(model), strength, self.target_cr_disk, signals)
        elif self.method in METHODS:
            plan = uniform_plan(model, METHODS[self.method], self.bits, self.target_cr_disk, signals)
        else:
            raise ValueError(f"a question knows the methods {', '.join((HYBRID, *METHODS))}, got {self.method!r}")
        if not self.fft:
            return plan
        if (turned := by_fft(plan)) is None:
            raise ValueError(f"fft needs circulant blocks whose size is a power of two, got a plan of {self.method} without")
        return turned


@dataclass(frozen=True)
class Answer:
    """packed: the whole model under the plan; schedules: dense 16-bit and the plan, of the layer that was asked for."""

    question: Question
    plan: Plan
    packed: PackedModel
    schedules: dict[str, Schedule]

    def figures(self) -> dict:
        """Of the plan: cr_disk, cr_model, bytes on disk of the recurrent matrices, microseconds of a step of one sequence, and
        what hardware_table says."""
        schedule = self.schedules[self.question.method]
        return {"cr_disk": self.packed.cr_disk, "cr_model": self.packed.cr_model, "rnn_bytes": self.packed.storage_bits // 8,
                "step_us": schedule.cycles_per_item / schedule.mapping.spec.clock_mhz
                } | hardware_table(self.schedules)[self.question.method].to_dict()

    def sentence(self) -> str:
        """What was found, in words (Markdown)."""
        f, base = self.figures(), self.schedules[BASELINE]
        return (f"**{self.question.method}, asked for {self.question.target_cr_disk:g}x: {f['cr_disk']:.1f}x**, "
                f"{f['rnn_bytes']:,.0f} bytes of matrices. A step takes **{f['cycles_per_item']:,.0f} cycles** a sequence "
                f"({f['step_us']:.2f} µs at {base.mapping.spec.clock_mhz} MHz), {f['acceleration']:.2f} times as fast as dense "
                f"16-bit ({base.cycles_per_item:,.0f}); it waits mostly for {f['bound']}. No accuracy: nothing was trained.")


def untrained(cell: str, input_size: int, hidden_size: int, seed: int) -> tuple[torch.nn.Module, dict]:
    """One recurrent layer with torch's random weights, and the formats of its signals on random inputs: what explore takes.

    Kept weights of such matrices lie evenly; those of a trained network may not, and then cost more cycles."""
    if cell not in CELLS:
        raise ValueError(f"untrained knows the cells {', '.join(CELLS)}, got {cell!r}")
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if size < 1:
            raise ValueError(f"untrained needs {name} of at least 1, got {size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CELLS[cell](input_size, hidden_size, batch_first=True)
        return model, calibrate(model, [torch.randn(8, 50, input_size)])


def explore(model: torch.nn.Module, signals, question: Question) -> Answer:
    """Size and schedule of the plan that is asked for, of a model as it is. signals: as calibrate gives them. ValueError for
    what no plan reaches and what the array does not take."""
    spec, plan = question.spec(), question.plan(model, signals)
    dense = uniform(model, Dense(), LOSSLESS_BITS, signals)
    packed = {BASELINE: pack(model, dense), question.method: pack_within_reach(model, plan)}
    known = packed[BASELINE].layers
    layer = next(iter(known)) if question.layer is None else question.layer
    if layer not in known:
        raise ValueError(f"a question needs a layer of the model, {listed(known)}, got {layer!r}")
    schedules = {label: schedule_layer(of.layers[layer], spec, STEPS, batch=question.batch) for label, of in packed.items()}
    return Answer(question, plan, packed[question.method], schedules)


def present_answer(answer: Answer) -> None:
    """Display an answer: a sentence, both figures, and the tables of hardware and blocks."""
    from IPython.display import Markdown, display

    schedule = answer.schedules[answer.question.method]
    display(Markdown(answer.sentence()))
    show(region_figure(answer.schedules), "Which processing elements take which gates, and how much of a step each multiplies")
    show(gantt_figure(schedule, STEPS // 2), "What runs when in one time step of the plan")
    display(present(hardware_table(answer.schedules), index=True))
    display(present(pd.DataFrame(answer.plan.table(answer.packed))))


def explorer(model: torch.nn.Module, signals, question: Question | None = None):
    """Controls over the fields of a question, with its answer below: an ipywidgets.VBox for JupyterLab, answered at once.

    Below the answer stands the call that gives it again. What is refused is said in place of an answer."""
    import ipywidgets
    from IPython.display import Markdown, display

    question = Question() if question is None else question
    spec, gates = question.spec(), list(dict.fromkeys(block.gate for block in blocks(model).values()))
    question = replace(question, rows=spec.rows, cols=spec.cols, sensitive=tuple(question.gates(model)))
    wide, late = {"description_width": "initial"}, {"continuous_update": False}
    kinds = {
        "method": ipywidgets.Dropdown(options=[HYBRID, *METHODS], description="method"),
        "target_cr_disk": ipywidgets.BoundedFloatText(min=1, max=10_000, step=0.1, description="asked cr_disk"),
        "bits": ipywidgets.IntSlider(min=WIDTHS[0], max=WIDTHS[-1], description="bits of a weight", **late),
        "sensitive": ipywidgets.SelectMultiple(options=gates, rows=len(gates), description="Top-k gates"),
        "block": ipywidgets.Dropdown(options=sorted({*BLOCKS, question.block}), description="circulant block"),
        "fft": ipywidgets.Checkbox(description="circulant blocks by FFT", indent=False),
        "array": ipywidgets.Dropdown(options=list(PRESETS), description="array"),
        "rows": ipywidgets.IntSlider(min=GROUP, max=max(MOST_PES, spec.rows), step=GROUP, description="PE rows", **late),
        "cols": ipywidgets.IntSlider(min=GROUP, max=max(MOST_PES, spec.cols), step=GROUP, description="PE columns", **late),
        "batch": ipywidgets.IntSlider(min=1, max=max(MOST_SEQUENCES, question.batch), description="batch", **late),
    }
    for name, control in kinds.items():
        control.style, control.value = wide, getattr(question, name)
    output, busy, state = ipywidgets.Output(), ipywidgets.Label(), {"settling": False}

    def answer(change=None):
        if state["settling"]:
            return
        if change is not None and change["owner"] is kinds["array"]:
            state["settling"] = True  # one answer for the three that change together
            kinds["rows"].value, kinds["cols"].value = preset(change["new"]).rows, preset(change["new"]).cols
            state["settling"] = False
        hybrid = kinds["method"].value == HYBRID
        kinds["sensitive"].disabled = kinds["block"].disabled = not hybrid
        kinds["fft"].disabled = not hybrid and kinds["method"].value != "BlockCirculant"
        asked = replace(question, **{name: control.value for name, control in kinds.items()})
        asked = replace(asked, fft=asked.fft and not kinds["fft"].disabled)
        busy.value = "computing ..."
        with output:
            output.clear_output(wait=True)
            try:
                present_answer(explore(model, signals, asked))
            except ValueError as error:
                display(Markdown(f"**Not possible:** {html.escape(str(error))}"))
            display(Markdown(f"The same again: `{call_of(asked)}`"))
        busy.value = ""

    for control in kinds.values():
        control.observe(answer, names="value")
    answer()
    columns = [("method", "target_cr_disk", "bits"), ("sensitive", "block", "fft"), ("array", "rows", "cols", "batch")]
    rows = ipywidgets.HBox([ipywidgets.VBox([kinds[name] for name in names]) for names in columns])
    return ipywidgets.VBox([rows, busy, output])


def call_of(question: Question) -> str:
    """The call of explore that asks it: what differs from a question without arguments and matters to its method."""
    default = Question(array=question.array)
    spec, plain = question.spec(), default.spec()
    meant = replace(question, rows=None if spec.rows == plain.rows else spec.rows,
                    cols=None if spec.cols == plain.cols else spec.cols)
    if question.method != HYBRID:
        meant = replace(meant, sensitive=None, block=default.block)
    given = [f"{f.name}={getattr(meant, f.name)!r}" for f in fields(meant)
             if f.name == "array" or getattr(meant, f.name) != getattr(default, f.name)]
    return f"wb.explore(model, signals, wb.Question({', '.join(given)}))"
