"""A connection to Ray: joined or started, quiet, and refused in one line where it cannot work.

Decisions:
- Whoever is connected already (a driver of its own, a test) stays connected: `close` ends only what `connect` began.
- An address is tried by a plain TCP connection first: Ray itself keeps trying a dead one for minutes.
- `ray://` addresses (Ray Client) are refused: Ray Data and actor handles want a driver inside the cluster.
- Ray's own talk on the driver's screen is turned down to errors; its log files are left as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import socket
from types import TracebackType
from typing import Any, Self

from mmsearch.errors import InputError, MissingExtraError, ResourceError, UsageError

_OLDEST = (2, 60)
"""The Ray release that this was first run with."""
_PATIENCE_S = 5.0
_START_A_CLUSTER = "Start one with 'ray start --head' there, or leave --address out to use this machine alone."

_AGAIN = "On a busy machine, try again; Ray's own logs say more."
_LET_IN = "A cluster with tokens wants RAY_AUTH_MODE=token and its token here too; Ray's version must be the cluster's."


class RaySession:
    """`ray`: the connected module. A context manager; `close` ends the connection if it was begun here."""

    def __init__(self, ray: Any, *, owned: bool) -> None:  # noqa: ANN401 - the module ray
        self.ray, self._owned = ray, owned

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, or end the one that was started here. May be called twice."""
        if self._owned:
            self._owned = False
            self.ray.shutdown()


def import_ray() -> Any:  # noqa: ANN401 - the module ray
    """The module; `MissingExtraError` where it is not installed, `UsageError` where it is too old."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", package="ray", extra="ray")
    ray = importlib.import_module("ray")
    found = str(ray.__version__)
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise UsageError("ray", expected=f"version {wanted} or later", got=found, do="pip install -U 'mmsearch[ray]'")
    return ray


def connect(
    address: str | None = None, *, cpus: int | None = None, object_store_bytes: int | None = None
) -> RaySession:
    """Join the cluster at `address` ("auto": the one running here; "host:port"), or start Ray on this machine (None).

    `cpus`, `object_store_bytes`: for a Ray that is started. Raises `MissingExtraError`, `UsageError`,
    `InputError` (nothing at that address, or another version of Ray or Python there), `ResourceError` (Ray does not
    start here).
    """
    ray = import_ray()
    if ray.is_initialized():
        return RaySession(ray, owned=False)
    check_address(address)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is None:
            ray.init(
                address="local", num_cpus=cpus, object_store_memory=object_store_bytes, include_dashboard=False, **quiet
            )
        else:
            ray.init(address=address, **quiet)
    except Exception as error:
        # Ray raises a plain Exception where its own node is late, and a RayError where a token is wanted
        refusals = (RuntimeError, ValueError, OSError, ray.exceptions.RayError)
        if type(error) is Exception or isinstance(error, refusals):
            raise _refused(address, error) from error
        raise
    return RaySession(ray, owned=True)


def check_address(address: str | None) -> None:
    """`UsageError` for what is no address, `InputError` where nobody listens; "auto" and None are left to Ray."""
    if address is None or address == "auto":
        return
    if "://" in address:
        do = "Run the command on a machine of the cluster, with --address auto."
        raise UsageError("--address", expected="auto or HOST:PORT", got=address, do=do)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError("--address", expected="auto or HOST:PORT", got=address, do="Ray's port is 6379 by default.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S).close()
    except OSError as error:
        got = error.strerror or str(error)
        raise InputError(f"--address {address}", expected="a Ray cluster", got=got, do=_START_A_CLUSTER) from None


def _refused(address: str | None, error: Exception) -> InputError | ResourceError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    got = (" ".join(lines)[:400] if "ersion" in str(error) else (lines or [type(error).__name__])[0]).rstrip(".")
    if address is None:
        return ResourceError("ray", expected="Ray to start on this machine", got=got, do=_AGAIN)
    nobody_listens = address == "auto" and isinstance(error, ConnectionError)  # else `check_address` has said so
    do = _START_A_CLUSTER if nobody_listens else _LET_IN
    return InputError(f"--address {address}", expected="a Ray cluster", got=got, do=do)
