"""Command line: `python -m workbench run | sweep | report | train | parameters | tasks | methods`."""

import io
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import click


class _Commands(click.Group):
    """A click group whose expected errors are one line on stderr and exit status 1, never a traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """LSTM compression workbench: run notebooks as experiments and turn them into reports."""


@main.command("run")
@click.argument("notebook")
@click.option("-p", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="Set a parameter; lists as JSON.")
@click.option("--results", default="results", show_default=True, metavar="DIR", help="Where runs are kept.")
@click.option("--force", is_flag=True, help="Run again even if this run is finished.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), help="Limit in seconds [none].")
@click.option("--report", "with_report", is_flag=True, help="Write the HTML report and print its path last.")
def run_command(notebook, parameters, results, force, timeout_s, with_report):
    """Run NOTEBOOK (a path, or a name like "hybrid") once; a run that is already finished is reused."""
    from workbench import report, runs

    names = [name for name, _ in parameters]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"parameter {doubled[0]!r} is given more than once")
    try:
        result = runs.run(
            notebook, dict(parameters), results, force=force, timeout_s=timeout_s, echo=sys.stderr.buffer
        )
    except KeyboardInterrupt:
        raise click.ClickException("interrupted: nothing of this run was kept") from None
    if result.state != "ok":
        raise click.ClickException(f"{result.error}\nnotebook and log: {result.directory / 'run.ipynb'}")
    click.echo(f"{'reused' if result.cached else 'finished'}: {result.directory}", err=with_report)
    if with_report:
        click.echo(report.build(result.directory))


class _Shard(click.ParamType):
    name = "K/N"

    def convert(self, value, param, context):
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", value)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            self.fail(f"needs K/N with K from 1 to N, for example 2/8 (a job array of 1-8), got {value!r}")
        return int(found[1]), int(found[2])


@main.command("sweep")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--workers", type=click.IntRange(min=1), help="Runs at a time on this machine [its cores].")
@click.option("--scheduler", metavar="ADDRESS", help="Hand the runs to the workers of this dask scheduler instead.")
@click.option("--shard", type=_Shard(), default="1/1", help="Only every N-th run, from the K-th on: for job arrays.")
@click.option("--stale", type=click.Choice(["rerun", "warn", "ignore"]), default="rerun", show_default=True,
              help="What to do with results of older code or data: run again, or keep them, with or without a warning.")
@click.option("--results", default="results", show_default=True, metavar="DIR", help="Where runs are kept.")
@click.option("--report", "with_report", is_flag=True, help="Write the HTML report of every run too.")
def sweep_command(file, plan_only, workers, scheduler, shard, stale, results, with_report):
    """Execute the runs that the TOML FILE asks for; the same command again goes on with what is missing."""
    from workbench import runs, sweep

    if workers and scheduler:
        raise click.UsageError("--workers counts runs on this machine, --scheduler hands them over: give one of the two")
    asked = sweep.read(file)
    folder = runs.usable(results)
    workers = workers or runs.cores()
    plan = sweep.make_plan(asked, folder, stale=stale, shard=shard)
    click.echo(_described(plan, workers, scheduler), err=not plan_only)
    if plan_only:
        return
    # A job system ends a job by SIGTERM: as with Ctrl-C, kernels go first and finished runs stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found, problem = {}, None
    try:
        if plan.to_run:
            with _Progress(plan) as progress:
                found = sweep.perform(plan, folder, workers=workers, scheduler=scheduler, progress=progress)
    except KeyboardInterrupt:
        problem = "interrupted: finished runs are kept, the same command goes on"
        problem += "; what workers of the cluster have begun they finish" if scheduler else ""
    except RuntimeError as error:
        problem = str(error)
    except OSError as error:
        kept = f"the sweep stops, finished runs are kept in {folder}; the same command goes on once this is mended"
        raise click.ClickException(f"{error}: {kept}") from error
    command = ["python", "-m", "workbench", "sweep", str(file), *(["--results", results] if results != "results" else [])]
    place = sweep.write_table(asked, folder, shlex.join([*command, *(["--stale", stale] if stale != "rerun" else [])]))
    if problem:
        raise click.ClickException(problem)
    _write_index(place, with_report)
    if failed := sum(result.state != "ok" for result in found.values()):
        raise click.ClickException(f"{failed} of {len(plan.ours)} runs failed; the same command tries them again")


def _varied(asked, run):
    from workbench import sweep

    return sweep.shown({name: run.parameters[name] for name in (*asked.swept, asked.seed_parameter) if name})


def _described(plan, workers, scheduler):
    from workbench import sweep

    notes = {
        "stale": {"rerun": "answered by older code or data: run again", "warn": "answered by older code or data, KEPT",
                  "ignore": "answered by older code or data, kept"}[plan.stale],
        "failed": "run again",
    }
    seconds = sweep.estimate_s(plan.points, len(plan.to_run), workers)
    about = "no estimate yet: none has finished" if seconds is None else f"about {_duration(seconds)}"
    notes["to run"] = f"by the workers of {scheduler}" if scheduler else f"{workers} at a time, {about}"
    lines = [f"sweep {plan.sweep.name}: notebook {plan.sweep.notebook.name}"]
    for name, count in plan.counts().items():
        note = f"  {notes[name]}" if count and name in notes else ""
        lines.append(f"{name:>8} {count:5}{note}")
    if plan.stale == "warn":
        lines += [f"stale: {sweep.shown(point.run.parameters)}" for point in plan.ours if point.state == "stale"]
    return "\n".join(lines)


def _duration(seconds):
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Progress:
    """On a terminal one live line of runs done, failed and left and of the time left, elsewhere a line now and then."""

    def __init__(self, plan):
        from tqdm import tqdm

        self.asked, self.failed, self.told = plan.sweep, 0, time.monotonic()
        self.terminal = sys.stderr.isatty()
        form = "{n_fmt}/{total_fmt} runs, {desc}{elapsed} gone, {remaining} left" + " |{bar}|" * self.terminal
        self.bar = tqdm(total=len(plan.to_run), smoothing=0, mininterval=0, dynamic_ncols=True, bar_format=form,
                        file=sys.stderr if self.terminal else io.StringIO())

    def __call__(self, run, result):
        if result is not None:
            self.bar.n += 1
            if result.state != "ok":
                self.failed += 1
                place = result.directory / "run.ipynb"
                self.bar.write(f"failed: {_varied(self.asked, run)}: {result.error}\n  {place}", file=sys.stderr)
                self.bar.set_description_str(f"{self.failed} failed, ", refresh=False)
        if self.terminal:
            self.bar.refresh()
        elif time.monotonic() - self.told > 30 or (result is not None and self.bar.n == self.bar.total):
            self.told = time.monotonic()
            print(self.bar, file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()


@main.command("report")
@click.argument("run_or_sweep", type=click.Path(path_type=Path))
def report_command(run_or_sweep):
    """Write the HTML report of a finished run, or the index page of a sweep and the report of each of its runs; RUN_OR_SWEEP
    is a folder of results/runs or results/sweeps. Prints the path."""
    from workbench import report, sweep

    directory = run_or_sweep.resolve()
    if (directory / sweep.ASKED).is_file():
        _write_index(directory, with_report=True, again=True)
    else:
        click.echo(report.build(directory))


def _write_index(directory, with_report, again=False):
    """Write the index page of a sweep, print its path, and name every run whose report cannot be written."""
    from workbench import sweep

    if with_report or not sweep.index_is_new(directory):
        from workbench import index

        for problem in index.build_reports(directory, again) if with_report else ():
            click.echo(problem, err=True)
        index.build_index(directory)
        while not sweep.index_is_new(directory):  # another shard has ended meanwhile
            index.build_index(directory)
    click.echo(directory / sweep.INDEX)


@main.command("train")
@click.argument("task")
@click.option("--cell", type=click.Choice(["LSTM", "GRU"]), default="LSTM", show_default=True)
@click.option("--hidden-size", type=int, help="Units of each layer [the task's].")
@click.option("--num-layers", type=int, default=1, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--epochs", type=int, help="Passes over the training split [the task's].")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--checkpoints", type=click.Path(file_okay=False, path_type=Path), default="results/checkpoints",
              show_default=True, metavar="DIR", help="Where trainings are kept.")
def train_command(task, cell, hidden_size, num_layers, seed, epochs, device, checkpoints):
    """Train the float baseline of TASK; the same command again goes on where it stopped, or finds it finished. Ends with
    one reading of the test split."""
    from workbench import tasks, train

    loaded = tasks.load(task)

    def quality(loss, accuracy):
        language = isinstance(loaded, tasks.LanguageTask)
        return f"loss {loss:.4f}, " + (f"perplexity {train.perplexity(loss):.2f}" if language else f"accuracy {accuracy:.2f} %")

    def tell(row):
        click.echo(f"epoch {row['epoch']:3}: lr {row['lr']:.3g}, train loss {row['train_loss']:.4f}, "
                   f"validation {quality(row['valid_loss'], row['valid_accuracy'])}, {row['seconds']:.1f} s")

    hidden_size = loaded.recipe.hidden_size if hidden_size is None else hidden_size
    try:
        model, history = train.baseline(loaded, cell=cell, hidden_size=hidden_size, num_layers=num_layers, seed=seed,
                                        epochs=epochs, device=device, checkpoints=checkpoints.resolve(), on_epoch=tell)
    except KeyboardInterrupt:
        raise click.ClickException("interrupted: finished epochs are kept, the same command goes on") from None
    test = train.evaluate(model.to(device), loaded, "test")
    click.echo(f"epoch {history.best_epoch} kept, test {quality(test.loss, test.accuracy)}")


@main.command("parameters")
@click.argument("notebook")
def parameters_command(notebook):
    """List what `run -p` sets of NOTEBOOK: name, type, default as it is typed, meaning."""
    from workbench import runs

    for name, parameter in runs.read_parameters(notebook).items():
        default = shlex.quote(runs.as_text(parameter.default))
        click.echo(f"{name:<20} {parameter.type}, {default}" + f"  # {parameter.help}" * bool(parameter.help))


@main.command("tasks")
def tasks_command():
    """List the data sets."""
    from workbench.tasks import descriptions

    _list(descriptions())


@main.command("methods")
def methods_command():
    """List the compression methods."""
    from workbench.methods import METHODS

    _list({name: method.__doc__.splitlines()[0] for name, method in METHODS.items()})


def _list(table):
    for name, text in table.items():
        click.echo(f"{name:<20} {text}")


if __name__ == "__main__":
    main(prog_name="python -m workbench")
