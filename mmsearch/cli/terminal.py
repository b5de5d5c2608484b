"""Talking to people: what goes to stdout and stderr, and how a command ends.

Decisions:
- stdout is data, stderr is talk, so that every command can stand in a pipe.
- File names are bytes: undecodable ones leave stdout as the bytes they came as. What is shown to a person
  has control characters escaped, so that no file name moves the cursor or forges a line.
- An expected error is one line and its class's exit code; anything else is a bug and keeps its traceback.
- A reader that goes away (`| head`) got what it wanted: that ends quietly with 0.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from mmsearch.errors import MmsearchError

P = ParamSpec("P")

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def prepare_streams() -> None:
    """Let any file name through: raw bytes on stdout, escapes on stderr."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def shown(text: str) -> str:
    """`text` as one harmless line: control, direction and undecodable characters are escaped."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode(), text)


def say(text: str) -> None:
    """One line of talk on stderr."""
    print(shown(text), file=sys.stderr, flush=True)


def emit(line: str) -> None:
    """One line of data on stdout."""
    sys.stdout.write(line + "\n")


def as_json(value: object, *, indent: int | None = None) -> str:
    """JSON that round-trips every file name: readable UTF-8, undecodable bytes as \\udcXX escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def plural(n: int, one: str, many: str = "") -> str:
    """`1 picture`, `2 pictures`."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def guarded(*, interrupted: str = "interrupted") -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Turn the errors that mmsearch raises on purpose into one line and an exit code.

    `interrupted`: what to say after Ctrl-C.
    """

    def decorate(verb: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(verb)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                verb(*args, **kwargs)
                sys.stdout.flush()
            except MmsearchError as error:
                say(f"mmsearch: error: {error}")
                raise typer.Exit(error.exit_code) from error
            except KeyboardInterrupt as error:
                say(f"mmsearch: {interrupted}")
                raise typer.Exit(INTERRUPTED) from error
            except BrokenPipeError as error:
                _drop_stdout()
                raise typer.Exit(0) from error

        return run

    return decorate


def _drop_stdout() -> None:
    """Point stdout at nothing, or the interpreter complains once more while it closes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
