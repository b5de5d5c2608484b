"""Shards held by Ray actors, searched as one: `ray://NAME`, or `ray://HOST:PORT/NAME` for a cluster elsewhere.

    …?deadline_ms=500      how long a search waits for its slowest shard [10000]
    …?missing=error        a shard that does not answer is an error, not a partial answer

Decisions:
- Plain named actors, detached: they outlive the command that started them, and Ray restarts one that dies.
- Each shard answers with its k best, scores that do not depend on its neighbours, and ties ordered by id: merged, that
  is what one index of all rows answers.
- A shard that is dead, refuses or is late is named in the answer. Only when none answers, or when that was asked for,
  it is an error. The next search asks it again.
- Of an id that two shards have, the first-named shard answers, as where directories are searched together.
- Changes need all shards. An item goes to the shard that has it, a new one where the hash of its id says.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Self, TypeVar
from urllib.parse import urlencode

import xxhash

import mmsearch.errors
from mmsearch.errors import IndexNotFoundError, MmsearchError, StoreError, UsageError
from mmsearch.index.base import MOST_ANSWERS, check_k
from mmsearch.opened import directories
from mmsearch.scale.address import Address
from mmsearch.scale.engine import (
    Answer,
    Collection,
    Entry,
    Items,
    answer_of,
    best,
    check_entries,
    item_from,
    refuse_other_kind,
    refuse_other_model,
)
from mmsearch.scale.marks import common_mark
from mmsearch.scale.ray_session import RaySession, connect
from mmsearch.scale.ray_shard import Registry, Shard, sent
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Modality
from mmsearch.where import Where

T = TypeVar("T")
NAMESPACE = "mmsearch"
DEADLINE_MS = 10_000
_CHANGE_S = 600.0
_START_S = 120.0
_OURS = {"deadline_ms", "missing"}


class RayEngine:
    """See `engine.Engine`."""

    files_are_here = False
    most_bytes: int | None = None

    def __init__(self, address: Address, session: RaySession, name: str) -> None:
        self.where, self._session, self._ray = address.shown, session, session.ray
        self._deadline, self._partial = _policy(address)
        about, self._shards = _registered(self._ray, name, self.where)
        self.collection = Collection.from_json(about, where=self.where)
        self._model = json.dumps(asdict(self.collection.model))

    @classmethod
    def open(cls, address: Address, *, create: Collection | None = None) -> Self:
        """See `engine.Engine.open`. Shards are not made here: `serve` starts those that are there."""
        address.refuse_other_options(_OURS)
        where, name = _place(address)
        _policy(address)  # a wrong option is found before Ray is
        session = connect(where)
        try:
            engine = cls(address, session, name)
            if create is not None:
                refuse_other_model(engine.collection.model, create.model, where=engine.where)
        except BaseException:
            session.close()
            raise
        return engine

    def search(self, queries: Embeddings, k: int, *, modality: Modality, where: Where = ()) -> Answer:
        """See `engine.Engine.search`. `missing` of the answer: the shards that did not answer, and why."""
        queries = check_embeddings(queries, dim=self.collection.model.dim, where="query")
        check_k(k, len(queries))
        most = MOST_ANSWERS // max(len(queries), 1)
        width, missing = k, dict[str, None]()
        while True:
            found, silent = self._ask("search", queries, width, modality.value, where)
            hidden, unsure = self._hidden({n: {i for ids in answer.ids for i in ids} for n, answer in found.items()})
            missing |= dict.fromkeys([*silent, *unsure])
            lists, enough = _joined_answers(found, hidden, k, width=width)
            if enough or width >= most:
                return answer_of([best(one, k) for one in lists], k, missing=list(missing))
            width = min(2 * width, most)

    def _hidden(self, found: dict[int, set[str]]) -> tuple[dict[int, set[str]], list[str]]:
        """Of the ids that each shard found, those that an earlier one has; and which do not say what they hold."""
        asked = {n: sorted(set[str]().union(*(ids for m, ids in found.items() if m > n))) for n in found}
        has, problems = self._gather({n: (ids,) for n, ids in asked.items() if ids}, "known", self._deadline)
        missing = self._missing(problems)
        if missing and not self._partial:
            raise self._incomplete(missing)
        return {n: set[str]().union(*(ids for m, ids in has.items() if m < n)) for n in found}, missing

    def fetch(self, ids: Sequence[str]) -> Items:
        """See `engine.Engine.fetch`."""
        found, missing = self._ask("fetch", list(ids))
        texts = _first_named(found)
        return Items({name: item_from(text, where=self.where) for name, text in texts.items()}, missing=missing)

    def count(self, modality: Modality) -> int:
        """See `engine.Engine.count`. An id that two shards have counts twice."""
        found, missing = self._ask("count", modality.value)
        if missing:
            raise self._incomplete(missing)
        return sum(found.values())

    def _ask(self, method: str, *values: Any) -> tuple[dict[int, Any], list[str]]:  # noqa: ANN401 - as shards have them
        """What each shard says, by number, and which ones say nothing in time."""
        found, problems = self._gather(self._every(*values), method, self._deadline)
        refused = [error for error in problems.values() if isinstance(error, UsageError)]
        if refused:
            raise refused[0]  # the question is wrong, not the shard
        missing = self._missing(problems)
        if missing and (not found or not self._partial):
            raise self._incomplete(missing)
        return found, missing

    def _missing(self, problems: dict[int, Exception]) -> list[str]:
        """Which shards did not answer, and why."""
        return [f"{self._shards[number][0]}: {error}" for number, error in sorted(problems.items())]

    def _incomplete(self, missing: Sequence[str]) -> StoreError:
        return StoreError(
            self.where,
            expected=f"{len(self._shards)} shards to answer",
            got="; ".join(missing)[:400],
            do="Ray restarts a shard that died; ask again, or start them anew: mmsearch serve-shards.",
        )

    def _gather(
        self, asked: dict[int, tuple[Any, ...]], method: str, seconds: float
    ) -> tuple[dict[int, Any], dict[int, Exception]]:
        """Ask some shards at once: values and errors by number."""
        found: dict[int, Any] = {}
        problems: dict[int, Exception] = {}
        waiting: dict[Any, int] = {}
        for number, values in asked.items():
            try:
                actor = self._ray.get_actor(self._shards[number][1], namespace=NAMESPACE)
                waiting[actor.ask.remote(self._model, method, *values)] = number
            except (ValueError, self._ray.exceptions.RayError) as error:
                problems[number] = _gone(error)
        ready, late = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=seconds) if waiting else ([], [])
        for ref in ready:
            try:
                found[waiting[ref]] = _value(self._ray.get(ref))
            except MmsearchError as error:
                problems[waiting[ref]] = error
            except self._ray.exceptions.RayError as error:
                problems[waiting[ref]] = _gone(error)
        for ref in late:
            problems[waiting[ref]] = StoreError(f"no answer within {seconds * 1000:.0f} ms")
            self._ray.cancel(ref)  # one that only waits in the actor's queue need not be worked on any more
        return found, problems

    def _all(self, asked: dict[int, tuple[Any, ...]], method: str) -> dict[int, Any]:
        """As `_gather`, for changes: every shard asked must answer."""
        found, problems = self._gather(asked, method, _CHANGE_S)
        for number, error in sorted(problems.items()):
            if isinstance(error, MmsearchError) and error.expected:
                raise error
            got = f"{self._shards[number][0]}: {error}"
            raise StoreError(self.where, expected="all shards for a change", got=got, do="Try again.")
        return found

    def _every(self, *values: Any) -> dict[int, tuple[Any, ...]]:  # noqa: ANN401 - as shards have them
        return dict.fromkeys(range(len(self._shards)), values)

    def upsert(self, entries: Sequence[Entry]) -> None:
        """See `engine.Engine.upsert`. Copies in later shards go: they would come to light with the first one's end."""
        check_entries(entries, dim=self.collection.model.dim, where=self.where)
        have = self._all(self._every([entry.item.id for entry in entries]), "known")
        home = _first_named({number: dict.fromkeys(ids, number) for number, ids in have.items()})
        copies = {number: [name for name in ids if home[name] != number] for number, ids in have.items()}
        asked: dict[int, list[Any]] = {}
        for entry in entries:
            by_hash = xxhash.xxh3_64_intdigest(entry.item.id.encode("utf-8", "surrogatepass")) % len(self._shards)
            asked.setdefault(home.get(entry.item.id, by_hash), []).append(sent(entry))
        self._all({number: (some,) for number, some in asked.items()}, "upsert")
        self._all({number: (names,) for number, names in copies.items() if names}, "delete")

    def delete(self, ids: Sequence[str]) -> None:
        """See `engine.Engine.delete`."""
        self._all(self._every(list(ids)), "delete")

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """See `engine.Engine.digests`."""
        return _first_named(self._all(self._every(list(ids)), "digests"))

    def ids(self) -> Iterator[list[str]]:
        """See `engine.Engine.ids`."""
        for number in range(len(self._shards)):
            last = -1
            while page := self._all({number: (last,)}, "ids")[number]:
                last = page[-1][0]
                yield [name for _, name in page]

    def mark(self) -> str:
        """See `engine.Engine.mark`. Shards that differ were left by a push that was killed."""
        return common_mark([mark for _, mark in sorted(self._all(self._every(), "mark").items())])

    def set_mark(self, mark: str) -> None:
        """See `engine.Engine.set_mark`."""
        self._all(self._every(mark), "set_mark")

    def finish(self) -> list[str]:
        """See `engine.Engine.finish`."""
        self._all(self._every(), "finish")
        return []

    def info(self) -> dict[str, Any]:
        """See `engine.Engine.info`."""
        found, missing = self._ask("count", Modality.IMAGE.value)
        return {
            "engine": "ray",
            "server": f"Ray {self._ray.__version__}",
            "shards": {label: found.get(number) for number, (label, _) in enumerate(self._shards)},
            "missing": missing,
        }

    def close(self) -> None:
        """See `engine.Engine.close`. The shards go on."""
        self._session.close()


def _joined_answers(
    found: dict[int, Answer], hidden: dict[int, set[str]], k: int, *, width: int
) -> tuple[list[list[tuple[float, str, int]]], bool]:
    """For each query the hits of all shards without hidden ids; and whether they hold the k best of all rows."""
    lists: list[list[tuple[float, str, int]]] = [[] for _ in next(iter(found.values())).ids]
    enough = True
    for number, answer in found.items():
        for one, scores, ids, parts in zip(lists, answer.scores, answer.ids, answer.parts, strict=True):
            hits = zip(map(float, scores), ids, parts, strict=False)
            kept = [hit for hit in hits if hit[1] not in hidden[number]]
            enough = enough and (len(kept) >= k or len(ids) < width)
            one += kept
    return lists, enough


def _first_named(found: dict[int, dict[str, T]]) -> dict[str, T]:
    """What shards say of ids, as one; of an id that two have, the first-named shard's word counts."""
    return {name: value for number in sorted(found, reverse=True) for name, value in found[number].items()}


def serve(indexes: Sequence[str], name: str, *, address: str | None = "auto") -> dict[str, Any]:
    """Start an actor for each index directory, under one name, and return what is served: JSON values.

    They go on until `stop`. The directories must be readable where Ray places the actors. All must be of one model:
    `IndexMismatchError` names both fingerprints of the first that is not. Raises `UsageError` for a name in use.
    """
    checked = _checked(name)
    indexes = [os.path.abspath(path) for path in directories(indexes)]
    with connect(address) as session:
        ray = session.ray
        if _actor(ray, f"{checked}/registry") is not None:
            do = f"End those first: mmsearch serve-shards --stop --name {name}"
            raise UsageError(f"shards {name}", expected="a free name", got="one in use", do=do)
        _kill(ray, [f"{checked}/{n}" for n in range(len(indexes))])  # of a start that was killed half way
        names = [(path, f"{checked}/{number}") for number, path in enumerate(indexes)]
        actors = [_start(ray, Shard, actor, path) for path, actor in names]
        try:
            about = _joined(ray, actors)
            registry = _start(ray, Registry, f"{checked}/registry", about, names)
            ray.get(registry.about.remote(), timeout=_START_S)
        except BaseException:
            _kill(ray, [actor for _, actor in names])
            raise
        place = "" if address in (None, "auto") else f"{address}/"
        return {"name": checked, "index": f"ray://{place}{checked}", "shards": list(indexes)}


def _checked(name: str) -> str:
    """A name of letters, digits and _, so that it can stand in an address."""
    return Address.parse(f"ray://shards?{urlencode({'collection': name})}").collection


def _joined(ray: Any, actors: Sequence[Any]) -> str:  # noqa: ANN401 - the module ray, actor handles
    """Ask every shard whose vectors it has; the first decides, others are refused."""
    deadline, model, about = time.monotonic() + _START_S, "", ""
    first: Collection | None = None
    for actor in actors:
        try:
            reply = ray.get(actor.ask.remote(model, "about"), timeout=max(1.0, deadline - time.monotonic()))
        except ray.exceptions.RayError as error:
            raise _gone(error) from error
        said = _value(reply)
        got = Collection.from_json(said, where="shards")
        if first is None:
            about, first, model = said, got, json.dumps(asdict(got.model))
        refuse_other_kind(first.settings, got.settings, where="shards to serve together")
    return about


def stop(name: str, *, address: str | None = "auto") -> int:
    """End the actors of a name; how many there were. Raises `IndexNotFoundError` when it is not served."""
    with connect(address) as session:
        _, shards = _registered(session.ray, _checked(name), f"ray://{name}")
        _kill(session.ray, [f"{name}/registry", *(actor for _, actor in shards)])
        return len(shards)


def _start(ray: Any, kind: type, actor: str, *values: Any) -> Any:  # noqa: ANN401 - the module ray, actor handles
    options = {"lifetime": "detached", "max_restarts": -1, "num_cpus": 0, "scheduling_strategy": "SPREAD"}
    return ray.remote(kind).options(name=actor, namespace=NAMESPACE, **options).remote(*values)


def _actor(ray: Any, name: str) -> Any:  # noqa: ANN401 - the module ray, an actor handle or None
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _kill(ray: Any, names: Sequence[str]) -> None:  # noqa: ANN401 - the module ray
    for name in names:
        actor = _actor(ray, name)
        if actor is not None:
            ray.kill(actor, no_restart=True)


def _registered(ray: Any, name: str, where: str) -> tuple[str, list[tuple[str, str]]]:  # noqa: ANN401 - the module ray
    """The collection as JSON, and (label, actor's name) of every shard."""
    registry = _actor(ray, f"{name}/registry")
    if registry is None:
        raise IndexNotFoundError(
            where, expected=f"shards served as {name!r}"[:80], got="none",
            do=f"Start them: mmsearch serve-shards INDEX... --name {name}",
        )  # fmt: skip
    try:
        about, shards = ray.get(registry.about.remote(), timeout=_START_S)
    except ray.exceptions.RayError as error:
        raise _gone(error) from error
    return about, [(label, actor) for label, actor in shards]


def _place(address: Address) -> tuple[str, str]:
    """(where Ray is, the name) of `ray://NAME` or `ray://HOST:PORT/NAME`."""
    parts, name = address.parts, address.parts.path.strip("/")
    if name:
        return parts.netloc, name
    if not parts.netloc or parts.port is not None:
        raise UsageError(address.shown, expected="ray://NAME or ray://HOST:PORT/NAME", got="no name")
    return "auto", parts.netloc


def _policy(address: Address) -> tuple[float, bool]:
    """(deadline of a search in seconds, whether an answer may be partial) from the options."""
    partial = address.choice("missing", "partial", "error") == "partial"
    return address.number("deadline_ms", DEADLINE_MS, most=3_600_000) / 1000, partial


def _value(reply: tuple[bool, Any]) -> Any:  # noqa: ANN401 - what a shard says
    """The value of a shard's reply, or its error."""
    fine, value = reply
    if fine:
        return value
    kind, where, expected, got, do = value
    error = getattr(mmsearch.errors, kind, None)
    plain = isinstance(error, type) and issubclass(error, MmsearchError) and error.__init__ is MmsearchError.__init__
    raise (error if plain else StoreError)(where, expected=expected, got=got, do=do)  # type: ignore[misc]


def _gone(error: Exception) -> StoreError:
    """A shard that Ray cannot reach, in a few words."""
    return StoreError(f"not there ({type(error).__name__})")
