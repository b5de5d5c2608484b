"""The command itself: help, usage errors, exit codes, and how it ends when something happens to it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_fakes import FakeLibrary

from mmsearch import errors
from mmsearch.cli.app import VERBS


def subclasses(base: type) -> list[type]:
    return [base] + [found for child in base.__subclasses__() for found in subclasses(child)]


def example(kind: type) -> errors.MmsearchError:
    if kind is errors.ImageError:
        return errors.ImageError("a.jpg", reason="truncated")
    if kind is errors.MissingExtraError:
        return errors.MissingExtraError("parquet", package="pyarrow", extra="parquet")
    return kind("here", expected="this", got="that", do="Do so.")


def test_without_arguments_it_shows_its_help(mmsearch):
    """A newcomer who types the bare name sees every verb."""
    ended = mmsearch()
    assert ended.code == 0
    assert all(verb in ended.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(mmsearch, verb):
    """One sentence on the verb, and one on each of its options."""
    ended = mmsearch(verb, "--help")
    assert ended.code == 0
    assert (VERBS[verb].__doc__ or "").strip().split(".")[0] in " ".join(ended.out.split())
    options = [line for line in ended.out.splitlines() if line.lstrip().startswith("-")]
    starts = "\n".join(options)
    assert len(re.findall(r"^ +-.*?(?:  |$)", starts, re.MULTILINE)) == len(options)


@pytest.mark.parametrize(
    "args", [("nonsense",), ("query", "--nonsense"), ("query", "a", "b"), ("query", "a", "-k", "0")]
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(mmsearch, args):
    """No usage block, no traceback: what was wrong and where the help is."""
    ended = mmsearch(*args)
    assert ended.code == 2
    assert len(ended.err_lines) == 1
    assert ended.err.startswith("mmsearch: error: ")
    assert "--help" in ended.err
    assert ended.out == ""


@pytest.mark.parametrize("kind", subclasses(errors.MmsearchError), ids=lambda kind: kind.__name__)
def test_every_error_is_one_line_and_the_exit_code_of_its_class(mmsearch, kind):
    """Nothing that mmsearch raises on purpose shows a traceback."""
    ended = mmsearch("info", "--index", "x", library=FakeLibrary(fails=example(kind)))
    assert ended.code == kind.exit_code
    assert len(ended.err_lines) == 1
    assert ended.err.startswith("mmsearch: error: ")


def test_a_bug_keeps_its_traceback(mmsearch):
    """An error that nobody expected is not dressed up as one of the user's."""
    with pytest.raises(ZeroDivisionError):
        mmsearch("info", "--index", "x", library=FakeLibrary(fails=ZeroDivisionError()))


def test_ctrl_c_while_indexing_says_how_to_go_on(mmsearch):
    """Exit code 130, and the hint that nothing is lost."""
    ended = mmsearch("index", "photos", library=FakeLibrary(fails=KeyboardInterrupt()))
    assert ended.code == 130
    assert "Run the same command again" in ended.err
    assert "Traceback" not in ended.err


def running(code: str) -> subprocess.Popen[str]:
    """A command line in a process of its own; the fakes can be imported."""
    here = Path(__file__).parent
    head = f"import sys; sys.path.insert(0, {str(here)!r})\nfrom cli_fakes import FakeLibrary, hit\n"
    head += "from mmsearch.cli.app import main\n"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as users have it
    pipe, command = subprocess.PIPE, [sys.executable, "-c", head + code]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=here.parents[1], env=env)


@pytest.mark.parametrize(("hits", "read"), [(50_000, 1), (3, 0)])
def test_a_reader_that_goes_away_ends_the_command_quietly(hits, read):
    """`mmsearch query ... | head -1` neither fails nor complains, in the middle of its output or before it."""
    code = (
        f"hits = [hit(f'/photos/{{n:05}}.jpg', rank=n) for n in range(1, {hits})]\n"
        "sys.exit(main(['query', 'x', '--index', 'i', '-f'], library=FakeLibrary(hits=hits)))\n"
    )
    with running(code) as process:
        lines = [process.stdout.readline() for _ in range(read)]
        process.stdout.close()
        complaint = process.stderr.read()
    assert (lines, complaint) == (["/photos/00001.jpg\n"] * read, "")
    assert process.returncode == 0


def test_a_real_ctrl_c_ends_with_130():
    """The signal, not only the exception: one line, no traceback."""
    code = (
        "import time\n"
        "class Waits(FakeLibrary):\n"
        "    def info(self, path):\n"
        "        print('waiting', flush=True)\n"
        "        time.sleep(30)\n"
        "sys.exit(main(['info', '--index', 'i'], library=Waits()))\n"
    )
    with running(code) as process:
        process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        complaint = process.stderr.read()
    assert (process.returncode, complaint) == (130, "mmsearch: interrupted\n")


def test_the_version_is_the_packages(mmsearch):
    """`mmsearch --version` names what is installed."""
    import mmsearch as package

    assert mmsearch("--version").out == f"mmsearch {package.__version__}\n"
