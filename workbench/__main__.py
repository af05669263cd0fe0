"""Command line: `python -m workbench run | report | tasks | methods`."""

import sys
from pathlib import Path

import click


class _Commands(click.Group):
    """A click group whose expected errors are one line on stderr and exit status 1, never a traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except (ValueError, TypeError, OSError) as error:
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


@main.command("report")
@click.argument("run_dir", type=click.Path(path_type=Path))
def report_command(run_dir):
    """Write the HTML report of a finished run and print its path."""
    from workbench import report

    click.echo(report.build(run_dir.resolve()))


@main.command("tasks")
def tasks_command():
    """List the data sets."""
    from workbench.tasks import TASKS

    _list(TASKS)


@main.command("methods")
def methods_command():
    """List the compression methods."""
    from workbench.methods import METHODS

    _list(METHODS)


def _list(table):
    for name, entry in table.items():
        click.echo(f"{name:<20} {entry.__doc__.splitlines()[0]}")


if __name__ == "__main__":
    main(prog_name="python -m workbench")
