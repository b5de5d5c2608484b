"""What runs on the nodes of a cluster: pictures decoded, encoded, and written as shards.

Decisions:
- A batch of Ray Data's is a shard. Only names of shards travel back; vectors never pass through the object store.
- What goes wrong in a batch comes back as data (`error`), not as Ray's exception: the driver tells a node that has
  another model, or does not see the pictures, from one whose disk is full, and says so in one line.
- Decoding runs in processes of its own also here (`data.loading`): a picture that hangs or kills its decoder costs
  itself, not the batch, again and again, on one node after another.
- On CPUs one actor does both, decoding ahead of its own model. Where the model runs on a GPU, decoding is a stage of
  its own that any node's CPUs take part in, and pixels travel.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmsearch import __version__
from mmsearch.data.images import ImageInfo, Limits
from mmsearch.data.loading import Failed, Loaded
from mmsearch.errors import IndexMismatchError, MmsearchError
from mmsearch.pictures import Decoder, Encoded, LocalPictures, Outcome, Request, encode_loaded
from mmsearch.scale.shard_files import WorkFolder
from mmsearch.types import ModelIdentity, Preprocessing, Skipped, SkipReason, Stamp

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes

Columns: TypeAlias = dict[str, Any]
"""A batch of Ray Data's: arrays or lists of one length by name."""
_DECODED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Task:
    """What a node is told. `load` makes the encoder there; `identity`, `version`: what the driver's are."""

    load: Callable[[], Encodes]
    identity: ModelIdentity
    preprocessing: Preprocessing
    version: str
    place: str
    batch_size: int
    workers: int
    limits: Limits


def to_columns(requests: Sequence[Request]) -> Columns:
    """(n) requests as a batch."""
    return {"request": [json.dumps(asdict(one)).encode() for one in requests]}


def from_columns(batch: Mapping[str, Any]) -> list[Request]:
    """The requests of a batch."""
    found = []
    for text in batch["request"]:
        fields = json.loads(text)
        stamp = fields["stamp"] and Stamp(**fields["stamp"])
        found.append(Request(**{**fields, "stamp": stamp, "texts": tuple(fields["texts"])}))
    return found


class EncodeShards:
    """A stage of one actor a few cores: requests -> the name of a shard. One row comes out of a batch."""

    def __init__(self, task: Task) -> None:
        self._task, self._refused = task, None
        self._folder = WorkFolder(task.place)
        try:
            self._encoder = loaded_encoder(task)
            self._pictures = LocalPictures(
                self._encoder, batch_size=task.batch_size, workers=task.workers, limits=task.limits
            )
        except Exception as error:  # noqa: BLE001 - told with the first batch: Ray would hide it in an actor's death
            self._refused = error_json(error)

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        """A batch of requests -> `shard`, `error` and `node`, one of each."""
        if self._refused is not None:
            return _answer(error=self._refused)
        try:
            requests = from_columns(batch)
            with_picture = [one for one in requests if one.path is not None]
            outcomes = {one.key: one for part in self._pictures.encode(with_picture) for one in part}
            return _answer(shard=written(self._folder, self._encoder, requests, outcomes))
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver hears which node it was
            return _answer(error=error_json(error))


class DecodePictures:
    """A stage of CPUs: requests -> the same with pixels, `_DECODED_AT_ONCE` at a time."""

    def __init__(self, task: Task) -> None:
        self._size = task.preprocessing.size
        self._decoder = Decoder(preprocessing=task.preprocessing, workers=task.workers, limits=task.limits)

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[Columns]:
        """`request`, `pixels` (n, s, s, 3) uint8, `facts` (JSON): a picture that failed has no pixels but zeros."""
        requests = from_columns(batch)
        try:
            found = {one.key: one for one in self._decoder.decode(one for one in requests if one.path is not None)}
        except Exception as error:  # noqa: BLE001 - the next stage hands it on
            found, refused = {}, error_json(error)
        else:
            refused = ""
        for start in range(0, len(requests), _DECODED_AT_ONCE):
            part = requests[start : start + _DECODED_AT_ONCE]
            pixels = np.zeros((len(part), self._size, self._size, 3), np.uint8)
            facts = []
            for row, request in zip(pixels, part, strict=True):
                one = found.get(request.key)
                if isinstance(one, Loaded):
                    row[:] = one.pixels
                facts.append(facts_json(one, refused=refused))
            yield {**to_columns(part), "pixels": pixels, "facts": facts}


class EncodePixels:
    """A stage of GPUs: what `DecodePictures` gives -> the name of a shard."""

    def __init__(self, task: Task) -> None:
        self._task, self._refused = task, None
        self._folder = WorkFolder(task.place)
        try:
            self._encoder = loaded_encoder(task)
        except Exception as error:  # noqa: BLE001 - as in `EncodeShards`
            self._refused = error_json(error)

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        """As `EncodeShards`."""
        if self._refused is not None:
            return _answer(error=self._refused)
        try:
            requests = from_columns(batch)
            facts = [json.loads(text) for text in batch["facts"]]
            if refused := next((one["refused"] for one in facts if one["refused"]), None):
                return _answer(error=refused)
            return _answer(shard=written(self._folder, self._encoder, requests, self._outcomes(requests, facts, batch)))
        except Exception as error:  # noqa: BLE001 - as in `EncodeShards`
            return _answer(error=error_json(error))

    def _outcomes(
        self, requests: Sequence[Request], facts: Sequence[dict[str, Any]], batch: Mapping[str, Any]
    ) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        loaded: list[Loaded] = []
        for request, fact, pixels in zip(requests, facts, batch["pixels"], strict=True):
            one = from_facts(request.key, fact, pixels)
            if isinstance(one, Loaded):
                loaded.append(one)
            elif one is not None:
                outcomes[request.key] = one
        paths = {request.key: str(request.path) for request in requests}
        size = self._task.batch_size
        for start in range(0, len(loaded), size):
            part = loaded[start : start + size]
            encoded = encode_loaded(self._encoder, part, [paths[one.key] for one in part], batch_size=size)
            outcomes.update({one.key: one for one in encoded})
        return outcomes


def loaded_encoder(task: Task) -> Encodes:
    """This node's encoder; `IndexMismatchError` when it, or the program, is not the driver's."""
    if __version__ != task.version:
        raise IndexMismatchError(
            f"node {node_name()}", expected=f"mmsearch {task.version}, as the driver has", got=__version__,
            do="Install the same version on all nodes.",
        )  # fmt: skip
    encoder = task.load()
    has, wants = encoder.identity, task.identity
    if not has.same_space(wants):
        raise IndexMismatchError(
            f"node {node_name()}", expected=_model(wants), got=_model(has), do="Bring the driver's model to that node."
        )
    return encoder


def written(folder: WorkFolder, encoder: Encodes, requests: Sequence[Request], outcomes: Mapping[int, Outcome]) -> str:
    """Encode the requests' texts too, and put all of it in place as one shard; its name."""
    whole = with_texts(
        encoder, requests, [outcomes[one.key] if one.path is not None else Encoded(one.key, None) for one in requests]
    )
    return folder.write(requests, whole, dim=encoder.dim)


def with_texts(encoder: Encodes, requests: Sequence[Request], outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The outcomes, with the rows of their requests' texts; a picture that failed needs none."""
    whole = list(outcomes)
    lacking = [i for i, one in enumerate(whole) if isinstance(one, Encoded) and requests[i].texts]
    texts = [text for i in lacking for text in requests[i].texts]
    rows = encoder.encode_texts(texts) if texts else np.empty((0, encoder.dim), np.float32)
    start = 0
    for i in lacking:
        one, stop = whole[i], start + len(requests[i].texts)
        assert isinstance(one, Encoded)
        whole[i] = replace(one, texts=rows[start:stop])
        start = stop
    return whole


def facts_json(one: Loaded | Failed | None, *, refused: str = "") -> bytes:
    """A decoded picture but for its pixels; `refused`: what stands for the whole batch instead."""
    facts: dict[str, Any] = {"refused": refused, "kind": None if one is None else type(one).__name__}
    if one is not None:
        facts["hash"] = None if one.content_hash is None else one.content_hash.hex()
        facts["stamp"] = one.stamp and asdict(one.stamp)
        facts |= {"info": asdict(one.info)} if isinstance(one, Loaded) else {"skipped": asdict(one.skipped)}
    return json.dumps(facts).encode()


def from_facts(key: int, facts: dict[str, Any], pixels: NDArray[np.uint8]) -> Loaded | Failed | None:
    """What `facts_json` was made of; None: nothing was to be decoded."""
    if facts["kind"] is None:
        return None
    stamp = facts["stamp"] and Stamp(**facts["stamp"])
    digest = None if facts["hash"] is None else bytes.fromhex(facts["hash"])
    if facts["kind"] == "Failed":
        given = facts["skipped"]
        return Failed(key, Skipped(given["path"], SkipReason(given["reason"]), given["detail"]), digest, stamp)
    assert digest is not None  # a picture that was decoded was read
    return Loaded(key, pixels, digest, ImageInfo(**facts["info"]), stamp)


def error_json(error: Exception) -> str:
    """An error as the driver can raise it again."""
    if isinstance(error, MmsearchError):
        said = {"where": error.where, "expected": error.expected, "got": error.got, "do": error.do}
    else:
        said = {"where": "", "expected": "", "got": f"{type(error).__name__}: {error}", "do": ""}
    return json.dumps({"kind": type(error).__name__, **said})


def node_name() -> str:
    """What this machine is called."""
    return socket.gethostname()


def _model(identity: ModelIdentity) -> str:
    return f"model {identity.name} (weights {identity.weights}, preprocessing {identity.preprocessing})"


def _answer(*, shard: str = "", error: str = "") -> Columns:
    return {"shard": [shard], "error": [error], "node": [node_name()]}
