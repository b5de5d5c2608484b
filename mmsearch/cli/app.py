"""The command `mmsearch`: its verbs, its version, and how usage errors end.

Decisions:
- Verbs import what they need when they run, so that `mmsearch --help` loads neither torch nor FAISS.
- Help is plain text: it can be read in a pipe, and it costs no import of rich.
- Nothing catches `Exception`: a bug shows its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import typer
import typer.main

from mmsearch import __version__
from mmsearch.cli import terminal
from mmsearch.cli.bridge import bridge
from mmsearch.cli.demo import demo
from mmsearch.cli.eval import evaluate
from mmsearch.cli.exporting import export
from mmsearch.cli.importing import import_
from mmsearch.cli.index import index
from mmsearch.cli.info import info
from mmsearch.cli.library import Library
from mmsearch.cli.match import match
from mmsearch.cli.merge import merge
from mmsearch.cli.models import models
from mmsearch.cli.push import push
from mmsearch.cli.query import query
from mmsearch.cli.reindex import reindex
from mmsearch.cli.serve_shards import serve_shards
from mmsearch.cli.split import split
from mmsearch.cli.train import train
from mmsearch.cli.tune import tune
from mmsearch.cli.verify import verify

VERBS: Mapping[str, Callable[..., None]] = {
    "index": index,
    "query": query,
    "match": match,
    "info": info,
    "verify": verify,
    "tune": tune,
    "merge": merge,
    "split": split,
    "reindex": reindex,
    "bridge": bridge,
    "import": import_,
    "export": export,
    "push": push,
    "serve-shards": serve_shards,
    "models": models,
    "demo": demo,
    "eval": evaluate,
    "train": train,
}

app = typer.Typer(
    name="mmsearch",
    help="Find pictures by words and words by pictures.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)

# Typer's base of "this was not a valid command line"; it is public only through its descendants.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Find pictures by words and words by pictures."""
    if version:
        terminal.emit(f"mmsearch {__version__}")
        raise typer.Exit(0)
    if ctx.invoked_subcommand is None:
        terminal.emit(ctx.get_help())


def main(argv: Sequence[str] | None = None, *, library: Library | None = None) -> int:
    """Run one command line (default: the process's) and return its exit code.

    `library`: what the commands call; tests hand in their own.
    """
    terminal.prepare_streams()
    command = typer.main.get_command(app)
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        code = command.main(arguments, prog_name="mmsearch", standalone_mode=False, obj=library or Library())
    except _CommandLineError as error:
        terminal.say(f"mmsearch: error: {_usage(error)}")
        return int(getattr(error, "exit_code", 2))
    return int(code or 0)


def _usage(error: Exception) -> str:
    """What was wrong with the command line, and where its help is."""
    message = str(getattr(error, "format_message", error.__str__)()).rstrip()
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "mmsearch"
    return f"{message.rstrip('.')}. Try: {where} --help"
