"""The command `shortv`: every job as a subcommand, with hyphens or underscores, as `shortv lc-sweep`."""

from __future__ import annotations

from importlib import import_module

import click

from jobs.common import run

JOBS = ("bench", "campaign", "lc_sweep", "plan", "report", "serve", "train")


class Jobs(click.Group):
    """A group that imports a job when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all jobs."""
        return list(JOBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the job of this name; None when there is none."""
        name = cmd_name.replace("-", "_")
        command: click.Command | None = import_module(f"jobs.{name}").main if name in JOBS else None
        return command


@click.group(cls=Jobs)
def shortv() -> None:
    """Find the layers that need not touch visual tokens, and serve and judge the faster model."""


def main() -> None:
    """Run the command line; exit statuses are those of the jobs."""
    run(shortv)
