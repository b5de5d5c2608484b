"""The promises that the package keeps to itself: layers, borders, public names, errors, commands."""

import ast
import importlib
import inspect
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmsearch
from mmsearch import errors
from mmsearch.cli.app import VERBS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmsearch"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    "errors": 0, "types": 0, "config": 0, "progress": 0,
    "occlusion": 1, "similarity": 1, "where": 1,
    "data": 2, "towers": 2, "index": 2, "store": 2, "evaluate.metrics": 2, "evaluate.report": 2,
    "evaluate": 2,
    "encoder": 3, "backends": 3, "testing": 3, "rerank": 3, "train": 3, "query": 3,
    "ingest": 4, "pictures": 4, "scan": 4, "token_fill": 4, "builder": 4, "searcher": 4, "evaluate.evaluator": 4,
    "evaluate.zeroshot": 4, "derive": 4, "derived_maker": 4,
    "evaluate.rerank_eval": 4, "evaluate.stages": 4, "evidence": 4, "explain": 4, "matcher": 4, "second_stage": 4,
    "view": 4, "hits": 4, "opened": 4, "shards": 4, "reshard": 4, "reindex": 4,
    "bridge": 4, "bridge_build": 4, "bridge_cost": 4, "bridged": 4, "scale": 4, "exchange": 4,
    "cli": 5, "server": 5, "__main__": 5,
}  # fmt: skip
"""Part -> layer; imports point down. Parts of layer 2 do not know each other."""

PUBLIC = [
    "BuildReport", "Encoder", "Hit", "Item", "Matcher", "MmsearchError", "Modality", "Reranker", "Searcher",
    "SkipReason", "Skipped", "Source", "__version__", "build", "find_index",
]  # fmt: skip


def part_of(module: str) -> str:
    """`towers` for mmsearch.towers.text; `evaluate.evaluator` where a file has a layer of its own."""
    names = module.split(".")[1:]
    pair = ".".join(names[:2])
    return pair if pair in LAYERS else names[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                deeper = (ROOT / full.replace(".", "/")).with_suffix(".py").exists() or (
                    ROOT / full.replace(".", "/")
                ).is_dir()
                yield node.lineno, full if base.startswith("mmsearch") and deeper else base


def offences(allowed) -> list[str]:
    """`file:line module` of every import that `allowed(own module, imported module)` refuses."""
    return [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in FILES
        for line, name in imported(path)
        if not allowed(module_of(path), name)
    ]


def points_down(own: str, other: str) -> bool:
    if not other.startswith("mmsearch.") or own == "mmsearch":
        return True
    mine, theirs = part_of(own), part_of(other)
    if mine.split(".")[0] == theirs.split(".")[0] and LAYERS[theirs] <= LAYERS[mine]:
        return True
    return LAYERS[theirs] < LAYERS[mine] or (LAYERS[theirs] == LAYERS[mine] and LAYERS[mine] > 2)


def test_every_part_has_a_layer():
    """A new folder is given its place before anything imports it."""
    assert {part_of(module_of(path)) for path in FILES if module_of(path) != "mmsearch"} <= set(LAYERS)


def test_imports_point_down():
    """No part knows what stands on it, and parts of layer 2 do not know each other."""
    assert offences(points_down) == []


def test_the_layer_test_can_fail():
    """An upward import and a sibling import are refused; a downward one is not."""
    assert not points_down("mmsearch.store.sqlite", "mmsearch.builder")
    assert not points_down("mmsearch.store.sqlite", "mmsearch.index.exact")
    assert not points_down("mmsearch.evaluate.metrics", "mmsearch.evaluate.evaluator")
    assert points_down("mmsearch.builder", "mmsearch.store")


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        (
            "torch",
            (
                "mmsearch.towers",
                "mmsearch.backends",
                "mmsearch.encoder",
                "mmsearch.rerank",
                "mmsearch.train",
                "mmsearch.testing",
            ),
        ),
        ("faiss", ("mmsearch.index",)),
        (
            "PIL",
            (
                "mmsearch.data",
                "mmsearch.encoder",
                "mmsearch.matcher",
                "mmsearch.rerank.heatmap",
                "mmsearch.scale.engine_searcher",
                "mmsearch.searcher",
                "mmsearch.testing",
                "mmsearch.train",
            ),
        ),
        ("sqlite3", ("mmsearch.store", "mmsearch.data.records")),
        ("typer", ("mmsearch.cli",)),
        ("rich", ("mmsearch.cli",)),
    ],
)
def test_each_library_has_its_border(library, homes):
    """Torch ends at the encoder, distances in the index, pictures in data, talk in the command line."""
    assert offences(lambda own, other: other.split(".")[0] != library or own.startswith(homes)) == []


def test_only_the_command_line_prints_exits_or_reads_the_environment():
    """A library that prints or exits cannot be built on."""
    found = []
    for path in FILES:
        if path.is_relative_to(PACKAGE / "cli") or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.unparse(node) if isinstance(node, (ast.Call, ast.Attribute)) else ""
            if re.match(r"(print|exit|quit|sys\.exit|os\.getenv)\(|os\.environ\b", text):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {text[:60]}")
    assert found == []


def test_no_pickle_anywhere():
    """Neither the module nor torch.load or numpy.load with pickles allowed."""
    assert (
        offences(lambda own, other: other.split(".")[0] not in {"pickle", "dill", "cloudpickle", "joblib", "shelve"})
        == []
    )
    for path in FILES:
        for call in (
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ):
            if ast.unparse(call.func) == "torch.load":
                assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
            assert not any(word.arg == "allow_pickle" and ast.unparse(word.value) == "True" for word in call.keywords)


def test_the_public_names_are_these():
    """A name that is added or goes away is a decision, not an accident."""
    assert mmsearch.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_imported_and_is_documented(name):
    """`from mmsearch import X` works for each of them, and `help(X)` says something."""
    value = getattr(mmsearch, name)
    assert name.startswith("__") or inspect.getdoc(value)


def test_unknown_names_are_attribute_errors():
    """Lazy names must not turn a typing mistake into something else."""
    with pytest.raises(AttributeError, match="nonsense"):
        mmsearch.nonsense  # noqa: B018 - the access is the test


def test_every_error_descends_from_the_one_base():
    """`except MmsearchError` catches all that mmsearch raises on purpose, wherever it is defined."""
    for path in FILES:
        if path.name in ("__main__.py",) or "torch" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                kind = getattr(importlib.import_module(module_of(path)), node.name, None)
                assert kind is None or issubclass(kind, errors.MmsearchError), f"{path}: {node.name}"


def test_exit_codes_are_those_of_the_manual():
    """The numbers that scripts rely on."""
    codes = {
        kind.__name__: kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert codes == {
        "MmsearchError": 1, "UsageError": 2, "InputError": 1, "ImageError": 1, "ModelError": 1, "StoreError": 1,
        "IndexNotFoundError": 1, "IndexMismatchError": 1, "IndexDamagedError": 4, "IndexLockedError": 6,
        "PartialError": 3, "ResourceError": 5, "MissingExtraError": 1,
    }  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_is_in_the_readme_and_the_manual(verb):
    """What cannot be found is not there."""
    assert f"mmsearch {verb}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"## mmsearch {verb}" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def loaded_by(code: str) -> tuple[set[str], float]:
    """Top-level modules that `code` loads in a fresh interpreter, and the CPU seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules, file=sys.stderr)"],
        check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {name.split(".")[0] for name in ended.stderr.split()}, seconds


@pytest.mark.parametrize(
    "code",
    [
        "import mmsearch",
        "from mmsearch.cli.app import main; main(['--help'])",
        "from mmsearch.cli.app import main; main(['query', '--help'])",
    ],
)
def test_help_and_the_bare_import_load_nothing_heavy(code):
    """Neither torch nor faiss nor numpy, and half a second of CPU at most."""
    modules, seconds = loaded_by(code)
    assert modules.isdisjoint({"torch", "faiss", "numpy", "PIL", "transformers", "timm", "torchvision", "onnxruntime"})
    assert seconds < 0.5
