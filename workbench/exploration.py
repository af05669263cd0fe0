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
from workbench.array.spec import GROUP, ceil_div, in_step
from workbench.budget import WIDTHS, check_bits, check_target, pack_anew, uniform_plan
from workbench.checks import check_whole, plain_numbers
from workbench.constrain import pack
from workbench.gates import check_gates, gate_names, layers
from workbench.methods import METHODS, BlockCirculant
from workbench.models import CELLS
from workbench.packed import PackedModel
from workbench.plan import Plan, uncompressed
from workbench.plots import gantt_figure, region_figure
from workbench.quantise import calibrate
from workbench.report import show
from workbench.runs import listed
from workbench.sensitivity import Strength, hybrid_plan
from workbench.study import HYBRID
from workbench.tables import baseline_text, fit_text, hardware_table, present, step_text

STEPS = 10  # of the sequence that is scheduled: matters to its cycles and energy, not to the steady state
BLOCKS = (2, 4, 8, 16, 32)  # that the controls offer; a block that does not divide a matrix is refused
MOST_PES, MOST_SEQUENCES = 64, 16  # a side of the array and a batch, of the controls


def array_of(array: str, rows: int | None = None, cols: int | None = None) -> ArraySpec:
    """The preset of that name with other numbers of PE rows and columns, None for its own; activation units and multicast then
    go in step, as in scaled_points."""
    spec = preset(array)
    rows, cols = spec.rows if rows is None else rows, spec.cols if cols is None else cols
    if (rows, cols) == (spec.rows, spec.cols):
        return spec
    return spec.with_(rows=rows, cols=cols, **in_step(rows, cols))


@dataclass(frozen=True)
class Question:
    """What explore answers; every field is a control of explorer.

    method: "hybrid", or a name of METHODS for its uniform plan; target_cr_disk: ratio that the plan reaches at least; bits: of
    a weight, of a uniform plan about (uniform_plan); sensitive, block: gates that the hybrid plan prunes by Top-k, None for an
    LSTM's g or a GRU's n, and the size of the circulant blocks of the others; fft: whether circulant blocks are multiplied by
    FFT; array, rows, cols: as array_of takes them; batch: sequences side by side; layer: which of the model's goes on the
    array, None for the first.
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

    def __post_init__(self):
        plain_numbers(self)

    def spec(self) -> ArraySpec:
        return array_of(self.array, self.rows, self.cols)

    def of(self, model: torch.nn.Module) -> "Question":
        """The question with what None stands for. ValueError for what no model, or not this one, can be asked."""
        if self.method not in (HYBRID, *METHODS):
            raise ValueError(f"a question knows the methods {', '.join((HYBRID, *METHODS))}, got {self.method!r}")
        check_target(self.target_cr_disk)
        check_bits(self.bits)
        if self.fft and self.method not in (HYBRID, BlockCirculant.__name__):
            raise ValueError(f"fft needs a plan with circulant blocks, got one of {self.method}")
        check_whole("a question", "batch", self.batch, 1)
        gates = gate_names(model)
        sensitive = [gate for gate in gates if gate in ("g", "n")] if self.sensitive is None else list(self.sensitive)
        check_gates("a question", model, sensitive)
        known = list(layers(model))
        layer = known[0] if self.layer is None else self.layer
        if layer not in known:
            raise ValueError(f"a question needs a layer of the model, {listed(known)}, got {layer!r}")
        spec = self.spec()
        return replace(self, sensitive=tuple(sensitive), rows=spec.rows, cols=spec.cols, layer=layer)

    def plan(self, model: torch.nn.Module, signals) -> Plan:
        """The plan that is asked for; OutOfReach, a ValueError, where there is none of that ratio."""
        if self.method == HYBRID:
            strength = Strength(self.block, circulant_bits=self.bits, topk_bits=self.bits)
            plan = hybrid_plan(model, list(self.sensitive), strength, self.target_cr_disk, signals)
        else:
            plan = uniform_plan(model, METHODS[self.method], self.bits, self.target_cr_disk, signals)
        if not self.fft:
            return plan
        if (turned := by_fft(plan)) is None:
            raise ValueError("fft needs circulant blocks whose size is a power of two, got a plan without")
        return turned


@dataclass(frozen=True)
class Answer:
    """packed: the whole model under the plan; schedules: dense 16-bit and the plan, of the layer that was asked for."""

    question: Question
    plan: Plan
    packed: PackedModel
    schedules: dict[str, Schedule]

    def hardware(self) -> pd.DataFrame:
        """hardware_table of the layer."""
        return hardware_table(self.schedules).drop(index="whole_sequence")  # a matter of several layers

    def figures(self) -> dict:
        """Of the plan of the whole model cr_disk, cr_model, bytes on disk of the recurrent matrices and mean width of what is
        stored (bits), and of the layer microseconds of a step (of all sequences) and what `hardware` says."""
        schedule = self.schedules[self.question.method]
        return {"cr_disk": self.packed.cr_disk, "cr_model": self.packed.cr_model, "rnn_bytes": self.packed.storage_bits // 8,
                "bits": self.packed.mean_bits, "step_us": schedule.step_us} | self.hardware()[self.question.method].to_dict()

    def sentence(self) -> str:
        """What was found, in words (Markdown)."""
        q, schedule, base = self.question, self.schedules[self.question.method], self.schedules[BASELINE]
        layer = f" of layer {q.layer} alone, one of {len(self.packed.layers)}," if len(self.packed.layers) > 1 else ""
        text = (
            f"**{q.method}, asked for {q.target_cr_disk:g}x: {self.packed.cr_disk:.1f}x**, {self.packed.storage_bits // 8:,} "
            f"bytes of matrices, {self.packed.mean_bits:.3g} bits a weight. {step_text(schedule, base, layer)} No accuracy: "
            f"nothing was retrained. {baseline_text(base)} {fit_text(schedule, q.array)}")
        return text.rstrip()


def untrained(cell: str, input_size: int, hidden_size: int, seed: int) -> tuple[torch.nn.Module, dict]:
    """One recurrent layer with torch's random weights, and the formats of its signals on random inputs: what explore takes.

    Kept weights of such matrices lie evenly; those of a trained network may not, and then cost more cycles."""
    if cell not in CELLS:
        raise ValueError(f"untrained knows the cells {', '.join(CELLS)}, got {cell!r}")
    input_size = check_whole("untrained", "input_size", input_size, 1)
    hidden_size = check_whole("untrained", "hidden_size", hidden_size, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CELLS[cell](input_size, hidden_size, batch_first=True)
        return model, calibrate(model, [torch.randn(8, 50, input_size)])


def explore(model: torch.nn.Module, signals, question: Question) -> Answer:
    """Size of the plan that is asked for, of a model as it is, and its schedule. signals: as calibrate gives them. ValueError
    for what no plan reaches and what the array does not take."""
    question = _asked("explore", model, question)
    return _explore(model, signals, question, _dense(model, signals))


def _asked(who, model, question) -> Question:
    if not isinstance(question, Question):
        raise ValueError(f"{who} needs a Question, got {question!r}")
    return question.of(model)


def _dense(model, signals) -> PackedModel:
    return pack(model, uncompressed(model, signals))  # dense holds every set


def _explore(model, signals, question, dense: PackedModel):
    spec, plan = question.spec(), question.plan(model, signals)
    packed = pack_anew(model, plan)
    schedules = {name: schedule_layer(of.layers[question.layer], spec, STEPS, batch=question.batch)
                 for name, of in ((BASELINE, dense), (question.method, packed))}
    return Answer(question, plan, packed, schedules)


def present_answer(answer: Answer) -> None:
    """Display an answer: a sentence, both figures, and the tables of hardware and blocks."""
    from IPython.display import Markdown, display

    schedule = answer.schedules[answer.question.method]
    display(Markdown(answer.sentence()))
    show(region_figure(answer.schedules), "Which processing elements take which gates, and how much of a step each multiplies")
    show(gantt_figure(schedule, STEPS // 2), "What runs when in one time step of the plan")
    display(present(answer.hardware(), index=True))
    display(present(pd.DataFrame(answer.plan.table(answer.packed))))


def explorer(model: torch.nn.Module, signals, question: Question | None = None):
    """Controls over the fields of a question, with its answer below: an ipywidgets.VBox for JupyterLab.

    Below the answer stands the call that gives it again. What is refused is said in place of an answer. ValueError for a first
    question that no control can hold."""
    import ipywidgets
    from IPython.display import Markdown, display

    question = _asked("explorer", model, Question() if question is None else question)
    gates = gate_names(model)
    wide, late = {"description_width": "initial"}, {"continuous_update": False}
    most = max(10_000, question.target_cr_disk)
    kinds = {
        "method": ipywidgets.Dropdown(options=[HYBRID, *METHODS], description="method"),
        "target_cr_disk": ipywidgets.BoundedFloatText(min=1, max=most, step=0.1, description="asked cr_disk"),
        "bits": ipywidgets.IntSlider(min=WIDTHS[0], max=WIDTHS[-1], description="bits of a weight", **late),
        "sensitive": ipywidgets.SelectMultiple(options=gates, rows=len(gates), description="Top-k gates"),
        "block": ipywidgets.Dropdown(options=sorted({*BLOCKS, question.block}), description="circulant block"),
        "fft": ipywidgets.Checkbox(description="circulant blocks by FFT", indent=False),
        "array": ipywidgets.Dropdown(options=list(PRESETS), description="array"),
        "rows": ipywidgets.IntSlider(min=GROUP, max=max(MOST_PES, question.rows), step=GROUP, description="PE rows", **late),
        "cols": ipywidgets.IntSlider(min=GROUP, max=max(MOST_PES, question.cols), step=GROUP, description="PE columns", **late),
        "batch": ipywidgets.IntSlider(min=1, max=max(MOST_SEQUENCES, question.batch), description="batch", **late),
        "layer": ipywidgets.Dropdown(options=list(layers(model)), description="layer on the array"),
    }
    for name, control in kinds.items():
        control.style, control.value = wide, getattr(question, name)
    output, busy, state = ipywidgets.Output(), ipywidgets.Label(), {"settling": False}
    dense = _dense(model, signals)

    def settle(changed):
        """What follows from a change, before it is answered: an array brings its sides, a side that was typed is rounded up."""
        if changed is kinds["array"]:
            spec = preset(changed.value)
            kinds["rows"].value, kinds["cols"].value = spec.rows, spec.cols
        for side in (kinds["rows"], kinds["cols"]):
            side.value = GROUP * ceil_div(side.value, GROUP)
        hybrid = kinds["method"].value == HYBRID
        kinds["sensitive"].disabled = kinds["block"].disabled = not hybrid
        kinds["fft"].disabled = not hybrid and kinds["method"].value != BlockCirculant.__name__

    def answer(change=None):
        if state["settling"]:
            return
        state["settling"] = True
        settle(change and change["owner"])
        state["settling"] = False
        asked = Question(**{name: control.value for name, control in kinds.items()})
        asked = replace(asked, fft=asked.fft and not kinds["fft"].disabled)
        busy.value = "computing ..."
        with output:
            output.clear_output(wait=True)
            try:
                present_answer(_explore(model, signals, asked, dense))
            except ValueError as error:
                display(Markdown(f"**Not possible:** {html.escape(str(error))}"))
            finally:
                busy.value = ""
            display(Markdown(f"The same again: `{call_of(asked, model)}`"))

    for control in kinds.values():
        control.observe(answer, names="value")
    answer()
    columns = [["method", "target_cr_disk", "bits"], ["sensitive", "block", "fft"], ["array", "rows", "cols", "batch"]]
    if len(layers(model)) > 1:
        columns[0].append("layer")
    rows = ipywidgets.HBox([ipywidgets.VBox([kinds[name] for name in names]) for names in columns])
    return ipywidgets.VBox([rows, busy, output])


def call_of(question: Question, model: torch.nn.Module) -> str:
    """The call of explore that asks it: what differs from a question without arguments and matters to its method."""
    asked, default = question.of(model), Question(array=question.array).of(model)
    unsaid = {"sensitive", "block"} if asked.method != HYBRID else set()
    given = [f"{f.name}={getattr(asked, f.name)!r}" for f in fields(asked) if f.name not in unsaid
             and (f.name == "array" or getattr(asked, f.name) != getattr(default, f.name))]
    return f"wb.explore(model, signals, wb.Question({', '.join(given)}))"
