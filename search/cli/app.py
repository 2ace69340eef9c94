"""The subcommands, each in the file of its kind."""

import typer

from search.cli import file_commands, latency_commands, look_commands, run_command

app = typer.Typer(
    name="search",
    help="Find mixed-precision, pruned versions of a neural network that fit a budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run_command.register(app)
look_commands.register(app)
latency_commands.register(app)
file_commands.register(app)
