"""`p2pnet sim`: thousands of nodes in one process, in virtual time."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from p2pnet.cli.options import print_json
from p2pnet.errors import UsageError


def _listed(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from p2pnet.sim.scenarios import SCENARIOS

    for scenario in SCENARIOS.values():
        click.echo(f"{scenario.name:14} {scenario.summary} ({scenario.nodes} nodes)")
        for key, value in scenario.options.items():
            click.echo(f"{'':14} --option {key}={value:g}")
    context.exit()


@click.command()
@click.option("--scenario", "name", default="churn", show_default=True, help="See --list.")
@click.option("--nodes", type=click.IntRange(min=1), show_default="the scenario's own")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Play so many, from --seed on; then only failures are shown.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=NUMBER",
    help="A number of the scenario's, see --list; may be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw a picture, e.g. sim.png (needs the extra `plot`).",
)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_listed,
    help="What there is to play.",
)
def sim(
    name: str,
    nodes: int | None,
    seed: int,
    seeds: int,
    options: tuple[str, ...],
    as_json: bool,
    picture: Path | None,
) -> None:
    """Play a scenario on simulated machines that run this very software.

    The same seed gives the same run, to the bit: the trace that is printed says so.
    Exit code 1: the scenario's own judge found something wrong.
    """
    from p2pnet.sim.scenarios import SCENARIOS

    scenario = SCENARIOS.get(name)
    if scenario is None:
        raise click.UsageError(f"there is no scenario {name!r}; there are: {', '.join(SCENARIOS)}")
    if picture is not None and seeds > 1:
        raise click.UsageError("--plot draws one seed: leave --seeds out")
    numbers = dict(map(_number, options))
    count = scenario.nodes if nodes is None else nodes
    failed = 0
    try:
        if picture is not None:  # before it takes minutes
            from p2pnet.sim.plot import check_can_plot

            check_can_plot(picture)
        for number in range(seed, seed + seeds):
            report = scenario.play(count, number, numbers)
            failed += bool(report.failures)
            if as_json:
                print_json(report.as_dict())
            elif seeds == 1 or report.failures:
                click.echo(report.text())
        if picture is not None:
            from p2pnet.sim.plot import plot

            plot(report, picture)
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    if seeds > 1 and not as_json:
        click.echo(f"{name}: {seeds} seeds from {seed} on, {failed} failed")
    if failed:
        sys.exit(1)


def _number(option: str) -> tuple[str, float]:
    key, _, value = option.partition("=")
    try:
        return key, float(value)
    except ValueError:
        raise click.UsageError(f"--option takes KEY=NUMBER, not {option!r}") from None
