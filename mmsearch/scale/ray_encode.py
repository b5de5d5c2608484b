"""A build whose pictures are decoded and encoded by a Ray cluster, through Ray Data.

    build(["s3://bucket/photos"], "indexes/photos", engine=RayEngine(address="auto", work="/nfs/work"))

Requests go out in waves, each a Ray Dataset of batches; what comes back are names of shards (`shard_files`), which the
driver reads and hands to `Ingest`, which commits them as it does any pictures.

Decisions:
- Nothing depends on what Ray promises of a batch that was interrupted: a wave ends when every request has its one
  outcome. What came twice counts once, what did not come is asked for again, `_ROUNDS` times.
- Shards outlive workers and the driver. Those that lie in the work folder when a build begins are read first; they are
  removed once the store has committed what is in them.
- A wave is bounded: the driver holds what it knows of its pictures in memory, about a kilobyte each.
- A node with another model or without the pictures ends the build: its answers would be wrong, or skips.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import xxhash

from mmsearch import __version__, errors
from mmsearch.data.images import Limits
from mmsearch.data.loading import Failed
from mmsearch.data.remote import is_uri, scheme_of
from mmsearch.errors import IndexDamagedError, InputError, MmsearchError, ResourceError, StoreError, UsageError
from mmsearch.ingest import NOT_REMEMBERED
from mmsearch.pictures import Outcome, Request
from mmsearch.scale.ray_session import RaySession, connect
from mmsearch.scale.ray_workers import DecodePictures, EncodePixels, EncodeShards, Task, to_columns
from mmsearch.scale.shard_files import WorkFolder
from mmsearch.types import SkipReason

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes
    from mmsearch.progress import Progress

_SHARD_ROWS = 256
_WAVE_EACH = 32_768
"""Pictures of a wave for each actor: minutes of work, so that starting actors anew costs little."""
_ROUNDS = 4
_CORES_EACH = 4
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_FATAL = (UsageError, InputError, errors.ModelError, errors.IndexMismatchError, errors.MissingExtraError)


class RayEngine:
    """Where and how a build is spread. Give it to `build(engine=)`.

    `address`: "auto" or "host:port" of a running cluster; None starts Ray on this machine alone. `work`: the folder of
    shards, which all nodes must see (a path or a URI); None is `work` inside the index. `device`: as for
    `Encoder.load`; "cpu" leaves GPUs alone. `load`: makes a node's encoder, when it is not the build's own.
    `shard_rows`: pictures of a shard, what is lost with a worker at most. `wave`: pictures on their way at once.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        work: str | os.PathLike[str] | None = None,
        device: str = "auto",
        load: Callable[[], Encodes] | None = None,
        shard_rows: int = _SHARD_ROWS,
        wave: int | None = None,
    ) -> None:
        for name, value in (("shard_rows", shard_rows), ("wave", wave)):
            if value is not None and value < 1:
                raise UsageError(name, expected="at least 1", got=str(value))
        self._address, self._device, self._load = address, device, load
        self._work = None if work is None else os.fspath(work)
        self._shard_rows, self._wave = shard_rows, wave

    def pictures(
        self, encoder: Encodes, *, index: str, batch_size: int, workers: int | None, limits: Limits, told: Progress
    ) -> RayPictures:
        """Connect, and encode for the index at `index`. `workers`: decoding processes of each actor.

        Raises as `ray_session.connect`; `ResourceError` for a cluster without CPUs.
        """
        session = connect(self._address)
        try:
            plan = plan_for(session.ray, gpus=self._device != "cpu")
            task = Task(
                load=self._load or loader_of(encoder, device=self._device, plan=plan),
                identity=encoder.identity,
                preprocessing=encoder.preprocessing,
                version=__version__,
                place=place_of(self._work, index, encoder, limits),
                batch_size=batch_size,
                workers=workers or max(1, plan.cores // 2),
                limits=limits,
            )
            wave = self._wave or max(2, plan.actors) * _WAVE_EACH
            return RayPictures(session, plan, task, told=told, shard_rows=self._shard_rows, wave=wave)
        except BaseException:
            session.close()
            raise


@dataclass(frozen=True, slots=True)
class Plan:
    """How many actors encode, with how many cores or GPUs each, and how many decode (0: those that encode do)."""

    actors: int
    cores: int
    gpus: int = 0
    decoders: int = 0


def plan_for(ray: Any, *, gpus: bool) -> Plan:  # noqa: ANN401 - the module ray
    """What the nodes that are there now can do; a wave asks anew, so that nodes may come and go."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    cards = sum(int(node.get("GPU", 0)) for node in nodes) if gpus else 0
    if not cores:
        raise ResourceError(
            "ray", expected="nodes with at least one CPU", got=f"{len(nodes)} nodes without", do="Start workers."
        )
    if cards:
        return Plan(cards, 1, gpus=1, decoders=sum(cores))
    each = min(_CORES_EACH, *cores)
    return Plan(sum(count // each for count in cores), each)


def loader_of(encoder: Encodes, *, device: str, plan: Plan) -> Callable[[], Encodes]:
    """How a node comes by the encoder: a model is loaded there by its name, anything else travels as it is."""
    from mmsearch.encoder import Encoder

    if not isinstance(encoder, Encoder):
        return lambda: encoder
    if plan.gpus:
        return partial(Encoder.load, encoder.source, device=device)
    return partial(Encoder.load, encoder.source, device="cpu", threads=plan.cores)


class RayPictures:
    """`EncodesPictures` on a cluster, texts included. Close it: shards that are not committed stay for the next run."""

    takes_texts = True

    def __init__(
        self, session: RaySession, plan: Plan, task: Task, *, told: Progress, shard_rows: int, wave: int
    ) -> None:
        self._session, self._plan, self._task, self._told = session, plan, task, told
        self._shard_rows, self._wave = shard_rows, wave
        self._folder = WorkFolder(task.place)
        self._left: dict[bytes, str] | None = None
        self._handed: list[str] = []
        self._done = False

    def encode(self, requests: Iterable[Request]) -> Iterator[Sequence[Outcome]]:
        """A shard's outcomes a list, in the order in which the requests came where nothing is lost on the way.

        Raises what a node met: `IndexMismatchError`, `ModelError`, `InputError` (a node does not see the pictures),
        `StoreError`, and `ResourceError` when the cluster cannot finish.
        """
        if self._left is None:
            self._left = self._leftover()
        stream = iter(requests)
        while wave := list(islice(stream, self._wave)):
            waiting = {one.digest(): one for one in wave}
            yield from self._from_shards(waiting)
            yield from self._from_cluster(waiting)
        self._done = True

    def rest(self) -> Sequence[Outcome]:
        """Nothing is waited for: shards stay where they are, for the next run."""
        return []

    def committed(self) -> None:
        """Remove the shards whose outcomes are in the store."""
        names, self._handed = self._handed, []
        self._folder.remove(names)

    def close(self) -> None:
        """Leave the cluster; after a build that came to its end, the work folder goes too."""
        if self._done and not self._handed:
            self._done = False
            self._folder.clear()
        self._session.close()

    # Shards that are there already

    def _leftover(self) -> dict[bytes, str]:
        """Digest of a request -> the shard of an earlier run that has its outcome."""
        left: dict[bytes, str] = {}
        for name in self._folder.names():
            try:
                left.update({digest: name for digest, one in self._folder.read(name) if _holds(one)})
            except StoreError:
                self._folder.remove([name])  # cut off by a kill: its pictures are encoded anew
        if left:
            self._told.note(f"{self._task.place}: going on with {len(left)} pictures that are encoded already")
        return left

    def _from_shards(self, waiting: dict[bytes, Request]) -> Iterator[Sequence[Outcome]]:
        left = self._left or {}
        names = dict.fromkeys(left[digest] for digest in waiting if digest in left)
        for name in names:
            try:
                yield self._received(name, waiting, of_now=False)
            except StoreError:
                continue  # damaged since it was listed: its pictures are still waited for

    def _received(self, name: str, waiting: dict[bytes, Request], *, of_now: bool = True) -> list[Outcome]:
        """What a shard has of what is waited for, with the keys of this run; the shard may go once it is committed."""
        outcomes: list[Outcome] = []
        for digest, one in self._folder.read(name):
            request = waiting.pop(digest, None) if of_now or _holds(one) else None
            if request is not None:
                self._check_seen(one, request)
                outcomes.append(replace(one, key=request.key))
        self._handed.append(name)
        return outcomes

    def _check_seen(self, one: Outcome, request: Request) -> None:
        path = request.path
        vanished = isinstance(one, Failed) and one.skipped.reason is SkipReason.VANISHED
        if vanished and path is not None and not is_uri(path) and os.path.exists(path):
            raise InputError(
                path, expected="a file that every node sees", got="one that a node does not find",
                do="Put the pictures into a shared folder or a bucket.",
            )  # fmt: skip

    # The cluster

    def _from_cluster(self, waiting: dict[bytes, Request]) -> Iterator[Sequence[Outcome]]:
        trouble = ""
        for _ in range(_ROUNDS):
            if not waiting:
                return
            if trouble:
                self._told.note(f"asking again for {len(waiting)} pictures: {trouble}")
            trouble = "a worker was lost"
            try:
                for answer in self._answers(list(waiting.values())):
                    if answer["error"]:
                        trouble = self._raised(answer)
                        continue
                    yield self._received(answer["shard"], waiting)
            except IndexDamagedError as error:
                trouble = str(error)
            except self._session.ray.exceptions.RayError as error:
                trouble = _words(error)
                if "creation task" in str(error):  # what an actor is made of does not arrive; it never will
                    break
        if waiting:
            raise ResourceError(
                "ray", expected="an answer for every picture", got=f"none for {len(waiting)} of them ({trouble})",
                do="What is encoded is kept; run the same command again when the cluster is well.",
            )  # fmt: skip

    def _answers(self, requests: list[Request]) -> Iterator[dict[str, str]]:
        """One for each batch, as they are done."""
        ray = self._session.ray
        data = quiet_ray_data(ray)
        self._plan = plan_for(ray, gpus=self._plan.gpus > 0)
        pa = importlib.import_module("pyarrow")
        rows = self._shard_rows
        tables = [pa.table(to_columns(requests[i : i + rows])) for i in range(0, len(requests), rows)]
        whole = data.from_arrow(tables)
        for row in self._stages(data, whole, len(tables)).iter_rows():
            yield {name: str(row[name]) for name in ("shard", "error", "node")}

    def _stages(self, data: Any, whole: Any, batches: int) -> Any:  # noqa: ANN401 - ray.data and its Datasets
        plan = self._plan
        pool = data.ActorPoolStrategy
        # Ray Data restarts actors that died, and repeats their batches, as often as it takes.
        by_shard = {"batch_size": self._shard_rows, "batch_format": "numpy", "fn_constructor_args": (self._task,)}
        actors = min(plan.actors, batches)
        if not plan.gpus:
            return whole.map_batches(EncodeShards, num_cpus=plan.cores, compute=pool(size=actors), **by_shard)
        decoders = pool(min_size=1, max_size=max(1, min(plan.decoders, batches)))
        decoded = whole.map_batches(DecodePictures, num_cpus=1, compute=decoders, **by_shard)
        return decoded.map_batches(EncodePixels, num_cpus=0, num_gpus=1, compute=pool(size=actors), **by_shard)

    def _raised(self, answer: dict[str, str]) -> str:
        """What a node met, in words; raised at once when asking again cannot help."""
        said = json.loads(answer["error"])
        kind = getattr(errors, said.pop("kind"), None)
        if isinstance(kind, type) and issubclass(kind, MmsearchError) and kind is not errors.ImageError:
            error = _error_of(kind, said)
            if isinstance(error, _FATAL):
                raise error
            return f"node {answer['node']}: {error}"
        return f"node {answer['node']}: {said['got']}"


def quiet_ray_data(ray: Any) -> Any:  # noqa: ANN401 - the modules ray and ray.data
    """`ray.data`, its talk and bars turned off: the caller shows its own progress."""
    data = importlib.import_module("ray.data")
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return data


def place_of(work: str | None, index: str, encoder: Encodes, limits: Limits) -> str:
    """The folder of this job: what was encoded with another model or other limits is another job's."""
    index = os.path.abspath(index)
    if work is None:
        work = os.path.join(index, "work")
    if scheme_of(work) == "memory":
        raise UsageError("--work", expected="a place that all nodes share", got=work)
    if not is_uri(work):
        work = os.path.abspath(work)
    identity = encoder.identity
    same = [index, identity.weights, identity.preprocessing, identity.dim, asdict(limits), __version__]
    return f"{work.rstrip('/')}/encode-{xxhash.xxh3_64_hexdigest(json.dumps(same).encode())}"


def _holds(one: Outcome) -> bool:
    """Whether an earlier run's outcome holds today: some failures say nothing about the file itself."""
    return not isinstance(one, Failed) or one.skipped.reason not in NOT_REMEMBERED


def _error_of(kind: type[MmsearchError], said: dict[str, str]) -> MmsearchError:
    if kind is errors.MissingExtraError:
        kind = errors.ModelError
    return kind(said["where"], expected=said["expected"], got=said["got"], do=said["do"])


def _words(error: BaseException) -> str:
    """The last line of a remote traceback: what was raised there."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__
