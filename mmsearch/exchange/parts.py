"""Vectors in one place and facts in another, joined row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import InputError
from mmsearch.exchange.base import HAS_IMAGE, TEXT_PART, Block, Facts, Matrix, Table, spans

if TYPE_CHECKING:
    import pyarrow

    from mmsearch.exchange.arrow_tables import ArrowTable


class MatrixPart:
    """The rows of a matrix, with a table beside it or ids of its own; see `base.Part`."""

    def __init__(
        self,
        matrix: Matrix,
        *,
        label: str,
        where: str,
        table: Table | None = None,
        ids: NDArray[np.int64] | None = None,
        modality: str | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        if table is not None and table.count != matrix.count:
            raise InputError(where, expected=f"{matrix.count} rows of ids, one a vector", got=str(table.count))
        self.label, self.notes, self.dim, self.count = label, notes, matrix.dim, matrix.count
        self._matrix, self._table, self._ids, self._modality = matrix, table, ids, modality

    def blocks(self, start: int, size: int) -> Iterator[Block]:
        """See `base.Part.blocks`."""
        tabled = None if self._table is None else self._table.facts(start, size)
        for first, last in spans(start, self.count, size):
            facts = self._facts(first, last) if tabled is None else next(tabled)
            rows = self._matrix.rows(first, last)
            if self._modality == "text":
                whole = np.arange(last - first, dtype=np.int64)
                yield Block(facts, texts=rows, text_of=whole, text_part=np.zeros_like(whole))
            else:
                yield Block(facts, images=rows)

    def _facts(self, first: int, last: int) -> list[Facts]:
        if self._ids is None:
            return [Facts() for _ in range(last - first)]
        return [Facts(id=str(one)) for one in self._ids[first:last].tolist()]


class ClipPart:
    """One number of the clip-retrieval layout: `img_emb`, `text_emb` and `metadata` of the same rows; see `base.Part`.

    Our own exports say more in the metadata: which rows have a picture (`has_image`), which of the captions the row of
    `text_emb` is of (`text_part`), and the vectors of the other captions.
    """

    def __init__(
        self, *, label: str, images: Matrix | None, texts: Matrix | None, table: ArrowTable | None, where: str
    ) -> None:
        sides = [side for side in (images, texts, table) if side is not None]
        if len({side.count for side in sides}) > 1:
            counts = [f"{name} {side.count}" for name, side in
                      (("img_emb", images), ("text_emb", texts), ("metadata", table)) if side is not None]  # fmt: skip
            raise InputError(
                where, expected="as many rows in each file of a number", got=", ".join(counts),
                do="One of them was cut short, or is of another run: write that one anew.",
            )  # fmt: skip
        matrices = [side for side in (images, texts) if side is not None]
        if len({side.dim for side in matrices}) > 1:
            dims = " and ".join(str(side.dim) for side in matrices)
            do = "Import one side with --modality, each into an index of its own."
            raise InputError(where, expected="pictures and texts of one dimension", got=dims, do=do)
        self.label, self.dim, self.count = label, matrices[0].dim, matrices[0].count
        self.notes: tuple[str, ...] = ()
        self._images, self._texts, self._table = images, texts, table

    def blocks(self, start: int, size: int) -> Iterator[Block]:
        """See `base.Part.blocks`."""
        batches = None if self._table is None else self._table.batches(start, size)
        for first, last in spans(start, self.count, size):
            batch = None if batches is None else next(batches)
            facts = [Facts() for _ in range(last - first)]
            if batch is not None and self._table is not None:
                facts = self._table.facts_of(batch)
            block = Block(facts, images=None if self._images is None else self._images.rows(first, last))
            if batch is not None and self._images is not None and HAS_IMAGE in batch.schema.names:
                block.has_image = _column(batch, HAS_IMAGE).astype(bool)
            if self._texts is not None:
                _take_texts(block, self._texts.rows(first, last), batch, self.dim)
            yield block


def _take_texts(block: Block, rows: NDArray[np.floating], batch: pyarrow.RecordBatch | None, dim: int) -> None:
    """Put the rows of `text_emb` into a block, and those of further captions that the metadata holds."""
    count = len(block)
    parts = np.zeros(count, np.int64)
    if batch is not None and TEXT_PART in batch.schema.names:
        parts = np.nan_to_num(_column(batch, TEXT_PART).astype(np.float64), nan=-1).astype(np.int64)
    place = np.flatnonzero(parts >= 0)
    block.texts, block.text_of, block.text_part = rows[place], place, parts[place]
    if batch is not None:
        from mmsearch.exchange.arrow_vectors import texts_of

        more, of, which = texts_of(batch, dim)
        if len(more):
            block.texts = np.concatenate([block.texts, more])
            block.text_of, block.text_part = np.concatenate([place, of]), np.concatenate([block.text_part, which])


def _column(batch: pyarrow.RecordBatch, name: str) -> NDArray[np.generic]:
    found: NDArray[np.generic] = batch.column(name).to_numpy(zero_copy_only=False)
    return found
