"""Where an engine's collection is: `postgresql://user@host/db?collection=photos`, `milvus://…`, `ray://photos`, …

Decisions:
- One address says all: the engine by its scheme, the server, the collection, and how to search it.
- A password may stand in an address. `shown` is the address without it, and the only one that messages have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from mmsearch.errors import UsageError

_SECRET = {"password", "sslpassword", "token"}
_COLLECTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,47}", re.ASCII)
DEFAULT_COLLECTION = "mmsearch"


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed address. `parts`: of the address as it was given; `options`: after the question mark, by name."""

    scheme: str
    shown: str
    parts: SplitResult = field(repr=False)
    options: Mapping[str, str] = field(repr=False)

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Raises `UsageError` for what is no address."""
        try:
            parts = urlsplit(uri)
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
            parts.port  # noqa: B018 - reading it is what checks it
        except ValueError as error:
            raise UsageError("address of an engine", expected="scheme://place?name=value", got=str(error)) from error
        if "://" not in uri or not parts.scheme:
            raise UsageError("address of an engine", expected="scheme://place", got="one without a scheme")
        return cls(parts.scheme, _without_secrets(parts, pairs), parts, dict(pairs))

    @property
    def collection(self) -> str:
        """The collection's name, a plain identifier; it is the only part that becomes the name of a table."""
        name = self.options.get("collection", DEFAULT_COLLECTION)
        if not _COLLECTION.fullmatch(name):
            raise UsageError(
                self.shown, expected="a collection of letters, digits and _, at most 48", got=repr(name)[:60]
            )
        return name

    def number(self, name: str, default: int, *, most: int) -> int:
        """A whole number of 1 to `most` from the options."""
        text = self.options.get(name, str(default))
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= most):
            raise UsageError(self.shown, expected=f"{name}=1 to {most}", got=repr(text)[:60])
        return int(text[:9])

    def choice(self, name: str, *values: str) -> str:
        """One of a few words from the options; the first is the default."""
        word = self.options.get(name, values[0])
        if word not in values:
            raise UsageError(self.shown, expected=f"{name}={' or '.join(values)}", got=repr(word)[:60])
        return word

    def without(self, names: Set[str]) -> str:
        """The address as a driver reads it: without the options that are ours."""
        kept = {name: value for name, value in self.options.items() if name not in names}
        return _joined(self.parts.scheme, self.parts.netloc, self.parts.path, urlencode(kept, quote_via=quote))

    def refuse_other_options(self, names: Set[str]) -> None:
        """Raise `UsageError` for an option that means nothing here: a typing mistake must not pass unseen."""
        unknown = sorted(set(self.options) - names)
        if unknown:
            raise UsageError(self.shown, expected=" or ".join(sorted(names)), got=repr(unknown[0])[:60])

    def secrets(self) -> list[str]:
        """What must not be shown, longest first."""
        found = [self.options[name] for name in _SECRET & set(self.options)]
        if self.parts.password:
            found += [self.parts.password, unquote(self.parts.password)]
        return sorted(filter(None, found), key=len, reverse=True)

    def clean(self, text: object) -> str:
        """A driver's words on one line, without this address's secrets."""
        line = " ".join(str(text).split())
        for secret in self.secrets():
            line = line.replace(secret, "***")
        return line[:300]


def _without_secrets(parts: SplitResult, pairs: list[tuple[str, str]]) -> str:
    """The address with its password and secret options left out."""
    user, at, host = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}{at}{host}"
    kept = [(name, value) for name, value in pairs if name not in _SECRET]
    return _joined(parts.scheme, netloc, parts.path, urlencode(kept, safe="/:,"))


def _joined(scheme: str, netloc: str, path: str, query: str) -> str:
    """An address of its parts, with `//` also where no host is named (the standard library leaves that out)."""
    return f"{scheme}://{netloc}{path}{'?' if query else ''}{query}"
