"""Pictures to rows: the seam between a build, which knows what is to be encoded, and what encodes it.

`LocalPictures` does so in this process; `scale.ray_encode` on the machines of a cluster.

Decisions:
- What comes back comes in lists, each to be taken as a whole: what encodes may forget a list once it is `committed`.
- Pictures that lie elsewhere (`data.remote`) are fetched ahead by threads into a temporary folder, since a decode
  worker is timed and its memory is limited; the network must not look like a picture that hangs.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsearch.data.images import ImageInfo, Limits
from mmsearch.data.loading import Failed, Loaded, Loader
from mmsearch.data.remote import is_uri, read_uri
from mmsearch.errors import ImageError
from mmsearch.types import Preprocessing, Skipped, SkipReason, Source, Stamp

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes
    from mmsearch.progress import Progress

_FETCHERS = 16
_FETCHED_AHEAD = 64


@dataclass(frozen=True, slots=True)
class Request:
    """A picture to be encoded, with texts to be encoded beside it; `path` None: the texts alone.

    `root`, `name`: whose it is; `stamp`: as the scan found it. `key`: the caller's own number.
    """

    key: int
    root: str
    name: str
    path: str | None
    stamp: Stamp | None
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, key: int, source: Source, texts: tuple[str, ...] = ()) -> Request:
        """What `source` asks for."""
        return cls(key, source.root, source.name, source.path, source.stamp, texts)

    def digest(self) -> bytes:
        """16 bytes of all but the key: two that are equal have the same answer."""
        stamp = self.stamp and (self.stamp.size, self.stamp.mtime_ns, self.stamp.ctime_ns)
        return xxhash.xxh3_128_digest(json.dumps([self.root, self.name, self.path, stamp, self.texts]).encode())


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What became of a request: `vector` (d,) of the picture, `texts` (m, d) of its texts; None: not asked for.

    `content_hash` (xxh3_128, 16 bytes), `info` and `stamp` are those of the picture's file as it was read.
    """

    key: int
    vector: NDArray[np.floating[Any]] | None
    content_hash: bytes | None = None
    info: ImageInfo | None = None
    stamp: Stamp | None = None
    texts: NDArray[np.floating[Any]] | None = None


Outcome: TypeAlias = Encoded | Failed


class EncodesPictures(Protocol):
    """What `Ingest` hands pictures to. `takes_texts`: whether it encodes texts too; if not, none are asked of it."""

    takes_texts: bool

    def encode(self, requests: Iterable[Request]) -> Iterator[Sequence[Outcome]]:
        """Every request's outcome, once, in lists; requests are taken in the caller's thread, ahead of the answers."""
        ...

    def rest(self) -> Sequence[Outcome]:
        """After an interrupted `encode`: what was on its way and can be had at once."""
        ...

    def committed(self) -> None:
        """All lists that were handed out are durable in the store."""
        ...

    def close(self) -> None:
        """Stop whatever is running."""
        ...


class Engine(Protocol):
    """Where a build's pictures are decoded and encoded."""

    def pictures(
        self, encoder: Encodes, *, index: str, batch_size: int, workers: int | None, limits: Limits, told: Progress
    ) -> EncodesPictures:
        """For one build of the index at `index` with the model of `encoder`; whoever asks closes it."""
        ...


class ThisProcess:
    """The engine of every build that names no other."""

    def pictures(
        self, encoder: Encodes, *, index: str, batch_size: int, workers: int | None, limits: Limits, told: Progress
    ) -> EncodesPictures:
        """See `LocalPictures`."""
        return LocalPictures(encoder, batch_size=batch_size, workers=workers, limits=limits)


class Decoder:
    """Requests to prepared pixels, in worker processes, wherever the pictures lie. Close it."""

    def __init__(self, *, preprocessing: Preprocessing, workers: int | None, limits: Limits) -> None:
        self._limits = limits
        self._loader = Loader(preprocessing=preprocessing, workers=workers, limits=limits)

    def decode(self, requests: Iterable[Request]) -> Iterator[Loaded | Failed]:
        """One after another; those that could not be fetched may come out of turn. Every request has a path."""
        asked: dict[int, Request] = {}
        lost: deque[Failed] = deque()
        with _Spool(self._limits.max_bytes) as spool:
            for one in self._loader.load(self._paths(requests, asked, lost, spool)):
                while lost:
                    yield lost.popleft()
                yield self._named(one, asked.pop(one.key), spool)
            yield from lost

    def _paths(
        self, requests: Iterable[Request], asked: dict[int, Request], lost: deque[Failed], spool: _Spool
    ) -> Iterator[tuple[int, str]]:
        for request, path in spool.fetched(requests):
            if isinstance(path, ImageError):
                skipped = Skipped(str(request.path), SkipReason(path.reason), path.detail)
                lost.append(Failed(request.key, skipped, None, request.stamp))
                continue
            asked[request.key] = request
            yield request.key, path

    def _named(self, one: Loaded | Failed, request: Request, spool: _Spool) -> Loaded | Failed:
        """The outcome as that of the picture, not of its copy in the temporary folder."""
        path = str(request.path)
        if not is_uri(path):
            return one
        stamp = spool.forget(request.key)
        if isinstance(one, Loaded):
            return replace(one, stamp=stamp)
        return replace(one, stamp=stamp, skipped=replace(one.skipped, path=path))

    def close(self) -> None:
        """Stop the workers."""
        self._loader.close()


class LocalPictures:
    """Pictures decoded ahead in worker processes and encoded here, `batch_size` at a time."""

    takes_texts = False

    def __init__(self, encoder: Encodes, *, batch_size: int, workers: int | None, limits: Limits) -> None:
        self._encoder, self._batch_size = encoder, batch_size
        self._decoder = Decoder(preprocessing=encoder.preprocessing, workers=workers, limits=limits)
        self._loaded: list[Loaded] = []
        self._paths: dict[int, str] = {}

    def encode(self, requests: Iterable[Request]) -> Iterator[Sequence[Outcome]]:
        """Batches of `batch_size`; a picture that failed is a list of its own."""
        self._loaded, self._paths = [], {}
        for one in self._decoder.decode(self._noted(requests)):
            if isinstance(one, Failed):
                del self._paths[one.key]
                yield [one]
                continue
            self._loaded.append(one)
            if len(self._loaded) >= self._batch_size:
                yield self.rest()
        if self._loaded:
            yield self.rest()

    def _noted(self, requests: Iterable[Request]) -> Iterator[Request]:
        for request in requests:
            self._paths[request.key] = str(request.path)
            yield request

    def rest(self) -> Sequence[Outcome]:
        """What is decoded, encoded."""
        loaded, self._loaded = self._loaded, []
        paths = [self._paths.pop(one.key) for one in loaded]
        return encode_loaded(self._encoder, loaded, paths, batch_size=self._batch_size)

    def committed(self) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        """Stop the workers."""
        self._decoder.close()


def encode_loaded(
    encoder: Encodes, loaded: Sequence[Loaded], paths: Sequence[str], *, batch_size: int
) -> list[Outcome]:
    """(n) decoded pictures, and what they are called in reports -> (n) outcomes."""
    if not loaded:
        return []
    pixels = np.stack([one.pixels for one in loaded])
    vectors, ok = encoder.encode_pixels(pixels, batch_size=batch_size)
    outcomes: list[Outcome] = []
    for one, path, vector, good in zip(loaded, paths, vectors, ok, strict=True):
        if good:
            outcomes.append(Encoded(one.key, vector, one.content_hash, one.info, one.stamp))
        else:
            skipped = Skipped(path, SkipReason.BAD_EMBEDDING, "the model gave no finite vector")
            outcomes.append(Failed(one.key, skipped, one.content_hash, one.stamp))
    return outcomes


class _Spool:
    """Remote pictures fetched ahead into a temporary folder; local ones pass through. A context manager."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._here: dict[int, tuple[str, Stamp]] = {}

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *details: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        if self._folder is not None:
            self._folder.cleanup()

    def fetched(self, requests: Iterable[Request]) -> Iterator[tuple[Request, str | ImageError]]:
        """Each request with the path of a local file, or why there is none; in order."""
        coming: deque[tuple[Request, Future[tuple[str, Stamp]] | None]] = deque()
        for request in requests:
            coming.append((request, self._fetch(request) if is_uri(str(request.path)) else None))
            while coming and (coming[0][1] is None or len(coming) >= _FETCHED_AHEAD):
                yield self._taken(*coming.popleft())
        while coming:
            yield self._taken(*coming.popleft())

    def _fetch(self, request: Request) -> Future[tuple[str, Stamp]]:
        if self._threads is None or self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mmsearch-")
            self._threads = ThreadPoolExecutor(_FETCHERS)
        target = os.path.join(self._folder.name, str(request.key))
        return self._threads.submit(_download, str(request.path), target, self._max_bytes, request.stamp)

    def _taken(self, request: Request, coming: Future[tuple[str, Stamp]] | None) -> tuple[Request, str | ImageError]:
        if coming is None:
            return request, str(request.path)
        try:
            self._here[request.key] = path, _ = coming.result()
        except ImageError as error:
            return request, error
        return request, path

    def forget(self, key: int) -> Stamp:
        """Remove the local copy; the stamp of the picture itself."""
        path, stamp = self._here.pop(key)
        os.unlink(path)
        return stamp


def _download(uri: str, target: str, max_bytes: int, stamp: Stamp | None) -> tuple[str, Stamp]:
    data, stamp = read_uri(uri, max_bytes=max_bytes, stamp=stamp)
    with open(target, "wb") as file:
        file.write(data)
    return target, stamp
