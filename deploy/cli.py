"""The `tenfold` command: the subcommands that each package offers, under one name."""

from __future__ import annotations

import typer

from deploy.local import commands as local
from deploy.local import features as local_features
from loadtest.traces import commands as traces
from services.feature.commands import app as features

app = typer.Typer(
    name="tenfold",
    help="An AI serving mesh that keeps its promises at ten times the load.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help is there in half the time
    pretty_exceptions_enable=False,
)
local.add_to(app)
app.add_typer(traces.commands(local.traces_of), name="traces")
app.add_typer(features.commands(local_features.place_of), name="features")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
