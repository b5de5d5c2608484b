"""The documentation is true: its Python runs, its commands exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from PIL import Image

from mmsearch.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
BUNDLED = ROOT / "mmsearch" / "weights" / "config.json"


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[list[str]]:
    """Arguments of every `mmsearch ...` in a page's shell blocks, also behind pipes and `&&`."""
    found = []
    for line in "\n".join(blocks(page, "sh")).splitlines():
        for part in re.split(r"&&|\|", line):
            words = shlex.split(part, comments=True)
            if words and Path(words[0]).name == "mmsearch":
                found.append(words[1:])
    return found


def options_of(verb: str) -> set[str]:
    command = typer.main.get_command(app).commands[verb]
    return {name for param in command.params for name in param.opts if name.startswith("-")} - {"--help", "-h"}


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """A folder that holds what the examples talk about."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name, colour in (("red", (250, 10, 10)), ("green", (10, 200, 10)), ("blue", (10, 10, 250))):
        Image.new("RGB", (64, 48), colour).save(tmp_path / "photos" / f"{name}.jpg")
        (tmp_path / "photos" / f"{name}.txt").write_text(f"a {name} picture\n")
    Image.new("RGB", (64, 48), (250, 10, 10)).save(tmp_path / "cat.jpg")
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_the_python_of_the_documentation_runs(page, photos):
    """Every block, in order, in a folder with a few pictures."""
    if not BUNDLED.exists():
        pytest.skip("the bundled model is not in this checkout")
    names: dict = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}[{number}]", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if command_lines(page)], ids=named)
def test_every_command_line_of_the_documentation_is_possible(page):
    """The verb exists and has the options that are shown."""
    verbs = typer.main.get_command(app).commands
    for verb, *words in command_lines(page):
        assert verb in verbs
        used = {word.split("=")[0] for word in words if word.startswith("-") and word != "-"}
        assert used <= options_of(verb), f"mmsearch {verb}: {used - options_of(verb)}"


def test_the_manual_lists_exactly_the_options_there_are():
    """An option without its line in docs/cli.md is one that nobody finds; a line without its option lies."""
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## mmsearch ([\w-]+)[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    verbs = typer.main.get_command(app).commands
    assert set(sections) == set(verbs)
    for verb, section in sections.items():
        cells = "".join(re.findall(r"^\| (.*?) \| ", section, re.MULTILINE))
        assert set(re.findall(r"(?<![\w-])--?[a-zA-Z0-9][\w-]*", cells)) == options_of(verb), verb


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_inside_the_project_lead_somewhere(page):
    """A renamed file takes its links along."""
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), target


def test_the_readme_has_the_two_lines_that_matter():
    """One line installs and runs the demo, one installs and runs the tests; .ci/run takes the second from here."""
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    assert lines[0] == "python3 -m venv .venv && .venv/bin/pip install '.[demo]' && .venv/bin/mmsearch demo"
    assert lines[1] == "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"
    assert "grep -m 1 -E '^python3 -m venv \\.venv .*-m pytest$' README.md" in (ROOT / ".ci" / "run").read_text()
