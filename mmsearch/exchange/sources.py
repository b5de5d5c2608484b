"""What a path is, as a source of vectors: by its folders' names and by the first bytes of its files, not by endings.

| path | rows |
|---|---|
| folder with `img_emb/` or `text_emb/` | clip-retrieval's layout |
| `.npy` file, FAISS file | its rows, with ids from `--ids` or NAME.ids.jsonl beside it |
| Parquet or Arrow file | its column of vectors |
| any other folder | such files in it, all of one kind, in order of their names |
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import xxhash

from mmsearch.errors import InputError, MissingExtraError, UsageError
from mmsearch.exchange.base import Part, Reading, Table, VectorSource
from mmsearch.exchange.matrices import NpyMatrix
from mmsearch.exchange.parts import ClipPart, MatrixPart
from mmsearch.exchange.sidecars import SIDECAR, open_ids
from mmsearch.index.faiss_files import FaissFile, is_faiss

if TYPE_CHECKING:
    from mmsearch.exchange.arrow_tables import ArrowTable

MODALITIES = ("image", "text")
_FOLDERS = ("img_emb", "text_emb", "metadata")
_NUMBER = re.compile(r"(?:img_emb|text_emb|metadata)_(\d+)\.(?:npy|parquet)")
_ENDINGS = (".npy", ".parquet", ".arrow", ".feather", ".ipc", ".arrows", ".faiss", ".index")
_KINDS = "a .npy, Parquet, Arrow or FAISS file, or a folder of them"


def open_source(path: str, reading: Reading) -> VectorSource:
    """The vectors at `path`. Raises `InputError` when there are none, `UsageError` when `reading` cannot be meant."""
    root = os.path.abspath(os.path.expanduser(path))
    if reading.modality not in (None, *MODALITIES):
        raise UsageError("modality", expected=" or ".join(MODALITIES), got=str(reading.modality))
    if not os.path.exists(root):
        raise InputError(root, expected=_KINDS, got="no such path")
    try:
        if not os.path.isdir(root):
            source = _of_files([root], root=root, reading=reading)
        elif any(os.path.isdir(os.path.join(root, name)) for name in _FOLDERS[:2]):
            source = _clip(root, reading)
        else:
            source = _folder(root, reading)
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename else root
        raise InputError(where, expected="something that can be read", got=error.strerror or str(error)) from error
    return _whole(source)


def _whole(source: VectorSource) -> VectorSource:
    """The source without its empty parts; `InputError` when nothing is left, or dimensions differ."""
    parts = [part for part in source.parts if part.count]
    if not parts:
        raise InputError(source.path, expected="at least one vector", got="none")
    odd = next((part for part in parts if part.dim != parts[0].dim), None)
    if odd is not None:
        where = f"{source.path} ({odd.label})"
        raise InputError(where, expected=f"vectors of d = {parts[0].dim}, as those before", got=f"d = {odd.dim}")
    return replace(source, parts=parts)


def _folder(root: str, reading: Reading) -> VectorSource:
    """A folder of files of one kind; those of the other modality are left out where exports wrote both."""
    names = sorted(
        name for name in os.listdir(root)
        if name.lower().endswith(_ENDINGS) and not name.startswith(".") and not name.endswith((".ids.npy",))
    )  # fmt: skip
    wanted, notes = reading.modality or "image", tuple[str, ...]()
    other = [name for name in names if _is_of(name, "text" if wanted == "image" else "image")]
    if other and len(other) < len(names):
        names = [name for name in names if name not in other]
        notes = (f"{root}: {len(other)} files of the other modality are left out; --modality picks which",)
    files = [os.path.join(root, name) for name in names]
    kinds = {_kind(file) for file in files}
    if not files or len(kinds) > 1:
        got = "none" if not files else f"files of several kinds ({', '.join(sorted(kinds))})"
        raise InputError(root, expected="vector files of one kind (or clip-retrieval's img_emb and metadata)", got=got)
    return replace(_of_files(files, root=root, reading=reading), folder=root, notes=notes)


def _is_of(name: str, modality: str) -> bool:
    return re.match(rf"{modality}(_\d+)?\.(npy|faiss)", name) is not None


def _of_files(files: Sequence[str], *, root: str, reading: Reading) -> VectorSource:
    several = len(files) > 1
    if reading.ids is not None and several:
        raise UsageError("--ids", expected="one file of vectors", got=f"{len(files)} in {root}")
    read, parts = list(files), []
    for file in files:
        label = os.path.splitext(os.path.basename(file))[0] if several else ""
        ids = _ids_beside(file) if reading.ids is None else os.path.abspath(os.path.expanduser(reading.ids))
        kind = _kind(file)
        if kind == "arrow":
            parts.append(_arrow_part(file, label=label, reading=reading))
            continue
        read += [ids] if ids is not None else []
        parts.append(_matrix_part(file, kind, label=label, reading=reading, ids=ids))
    notes = [note for part in parts for note in part.notes]
    return VectorSource(
        root, os.path.dirname(files[0]), parts, _fingerprint(read, root=root, reading=reading), tuple(notes)
    )


def _matrix_part(file: str, kind: str, *, label: str, reading: Reading, ids: str | None) -> Part:
    if reading.vector_column is not None:
        raise UsageError("--vector-column", expected="a Parquet or Arrow file", got=file)
    if reading.id_column is not None and ids is None:
        do = "Name a table or JSON lines with --ids, or leave --id-column out."
        raise UsageError("--id-column", expected="ids for the vectors", got=f"{reading.id_column!r} for {file}", do=do)
    table = None if ids is None else _table(ids, reading)
    if kind == "npy":
        return MatrixPart(NpyMatrix(file), label=label, where=ids or file, table=table, modality=reading.modality)
    opened = FaissFile.open(file)
    own = opened.ids if table is None else None
    note = f"{file}: {opened.kind} keeps vectors approximately; they are imported as it gives them back"
    return MatrixPart(
        opened, label=label, where=ids or file, table=table, ids=own, modality=reading.modality,
        notes=() if opened.exact else (note,),
    )  # fmt: skip


def _table(ids: str, reading: Reading) -> Table:
    if _first_bytes(ids)[:4] == b"PAR1" or _first_bytes(ids) == b"ARROW1":
        _need_pyarrow(ids)
    return open_ids(ids, id_column=reading.id_column)


def _arrow_part(file: str, *, label: str, reading: Reading) -> Part:
    _need_pyarrow(file)
    from mmsearch.exchange.arrow_tables import ArrowPart, ArrowTable

    if reading.ids is not None:
        raise UsageError("--ids", expected="a .npy or FAISS file", got=file, do="A table has its ids in a column.")
    table = ArrowTable(file, id_column=reading.id_column, vector_column_=reading.vector_column)
    return ArrowPart(file, label=label, table=table, modality=reading.modality)


def _clip(root: str, reading: Reading) -> VectorSource:
    """clip-retrieval's folders: files of one number belong together."""
    if reading.ids is not None or reading.vector_column is not None:
        raise UsageError(root, expected="its own metadata", got="--ids or --vector-column")
    wanted = [name for name in _FOLDERS if not (reading.modality == "text" and name == "img_emb")]
    wanted = [name for name in wanted if not (reading.modality == "image" and name == "text_emb")]
    found = {name: _numbered(os.path.join(root, name)) for name in wanted}
    numbers = sorted({number for name in wanted[:-1] for number in found[name]})
    for name in wanted:
        missing = [number for number in numbers if number not in found[name]] if found[name] else []
        if missing:
            raise InputError(
                os.path.join(root, name), expected=f"a file for each of the numbers {numbers[0]} to {numbers[-1]}",
                got=f"none for {missing[0]}",
            )  # fmt: skip
    parts = [_clip_part(root, number, found, reading=reading) for number in numbers]
    files = [found[name][number] for number in numbers for name in wanted if number in found[name]]
    return VectorSource(root, root, parts, _fingerprint(files, root=root, reading=reading))


def _clip_part(root: str, number: int, found: dict[str, dict[int, str]], *, reading: Reading) -> Part:
    def matrix(name: str) -> NpyMatrix | None:
        file = found.get(name, {}).get(number)
        return None if file is None else NpyMatrix(file)

    table: ArrowTable | None = None
    if (file := found["metadata"].get(number)) is not None:
        _need_pyarrow(file)
        from mmsearch.exchange.arrow_tables import ArrowTable

        table = ArrowTable(file, id_column=reading.id_column)
    where = f"{root}, number {number}"
    return ClipPart(label=str(number), images=matrix("img_emb"), texts=matrix("text_emb"), table=table, where=where)


def _numbered(folder: str) -> dict[int, str]:
    """Number -> file, of the files in one of the layout's folders."""
    if not os.path.isdir(folder):
        return {}
    found: dict[int, str] = {}
    for name in sorted(os.listdir(folder)):
        match = _NUMBER.fullmatch(name)
        if match is not None:
            number = int(match.group(1))
            if number in found:
                raise InputError(folder, expected="one file of a number", got=f"two of {number}")
            found[number] = os.path.join(folder, name)
    return found


def _kind(file: str) -> str:
    """One of "npy", "faiss" and "arrow"; `InputError` for anything else."""
    magic = _first_bytes(file)
    if magic == b"\x93NUMPY":
        return "npy"
    if magic[:4] == b"PAR1" or magic == b"ARROW1" or magic[:4] == b"\xff\xff\xff\xff":
        return "arrow"
    if is_faiss(magic[:4]):
        return "faiss"
    raise InputError(file, expected=_KINDS, got=f"a file that begins with {magic[:6]!r}" if magic else "an empty file")


def _first_bytes(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(6)


def _ids_beside(file: str) -> str | None:
    """The ids that our own exports write beside vectors."""
    beside = os.path.splitext(file)[0] + SIDECAR
    return beside if os.path.isfile(beside) else None


def _need_pyarrow(where: str) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtraError(where, package="pyarrow", extra="parquet")


def _fingerprint(files: Sequence[str], *, root: str, reading: Reading) -> str:
    """A digest that changes when a file is written, added or taken away, or read another way."""
    stamps = []
    for file in files:
        status = os.stat(file)
        stamps.append([os.path.relpath(file, root), status.st_size, status.st_mtime_ns])
    how = asdict(reading) | {"ids": None}
    text = json.dumps([stamps, how], sort_keys=True, default=str)
    return str(xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape")))
