"""docs/training.md says what the settings are: every one, its default, and recipes that are possible."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from mmsearch.towers.config import DualEncoderConfig
from mmsearch.train.settings import read_recipe, settings_from

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
BLOCKS = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def documented() -> dict[str, str]:
    """`section.name` -> what the page says its default is."""
    rows = re.findall(r"^\| `(\w+\.\w+)` \| ([^|]+?) \|", PAGE, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a setting has two rows"
    return dict(rows)


def defaults() -> dict[str, object]:
    """`section.name` -> the value of settings that say nothing but where the data is."""
    settings = settings_from({"source": [{"path": "pairs.csv"}]})
    sections = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    sections["source"] = sections.pop("sources")[0]
    return {
        "augment.enabled": True,
        **{
            f"{name}.{field.name}": getattr(section, field.name)
            for name, section in sections.items()
            for field in dataclasses.fields(section)
        },
    }


def meant(cell: str) -> object:
    """The value in a cell of the table: TOML in backquotes, or a word for what TOML cannot say."""
    if not cell.startswith("`"):
        return {"none": None, "required": "pairs.csv"}[cell]
    return tomllib.loads(f"value = {cell.strip('`')}")["value"]


def plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_every_setting_is_in_the_manual_and_none_that_does_not_exist():
    """A setting that is not written down is one that nobody finds."""
    assert documented().keys() == defaults().keys()


@pytest.mark.parametrize("name", sorted(defaults()))
def test_the_manual_says_the_default_that_there_is(name):
    """A default that was changed takes its row along."""
    assert meant(documented()[name]) == plain(defaults()[name])


def towers_can_be(config: Mapping[str, object]) -> bool:
    """Whether `start.config` of a recipe, where it has one, describes towers."""
    return not config or DualEncoderConfig.from_json(config).dim > 0


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_recipes_of_the_manual_are_possible(block):
    """What is copied from the page is accepted, and so are its towers."""
    settings = settings_from(tomllib.loads(block))
    assert settings.sources
    assert towers_can_be(settings.start.config)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_recipes_of_the_project_are_possible(path):
    """Each parses into settings, and its towers can be built."""
    settings = settings_from(read_recipe(path))
    assert settings.sources
    assert towers_can_be(settings.start.config)


def test_the_bundled_model_has_its_two_recipes():
    """Heads over frozen towers first, then both towers from what that gave."""
    heads, bundled = (settings_from(read_recipe(ROOT / "recipes" / f"{name}.toml")) for name in ("heads", "bundled"))
    assert not heads.start.model and heads.text.train == heads.image.train == "head"
    assert bundled.start.model == "checkpoints/heads"
    assert [one.path for one in heads.sources] == [one.path for one in bundled.sources]
