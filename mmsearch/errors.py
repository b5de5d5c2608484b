"""The one tree of errors.

    MmsearchError                      exit 1
    ├── UsageError                     exit 2   arguments that cannot mean anything
    ├── InputError                     exit 1   what the user handed over: no such folder, nothing in it, bad table
    │   └── ImageError                 exit 1   one picture that cannot be read (carries a SkipReason)
    ├── ModelError                     exit 1   a model that is not there, refused, or unfit
    ├── StoreError                     exit 1   an index directory that cannot be used
    │   ├── IndexNotFoundError         exit 1
    │   ├── IndexMismatchError         exit 1   other model, preprocessing, dimension, or a newer format
    │   ├── IndexDamagedError          exit 4   a checksum or a count says so
    │   └── IndexLockedError           exit 6   another writer
    ├── PartialError                   exit 3   `--strict` and something was skipped
    ├── ResourceError                  exit 5   no space, no memory
    └── MissingExtraError              exit 1   a package that an extra brings

Decisions:
- A message has four parts: where, expected, got, what to do. They are kept apart on the error
  (a server wants them as fields) and joined in `str()`.
- The exit code belongs to the class, so that the command line needs no table of its own.
"""

from __future__ import annotations

from typing import ClassVar


class MmsearchError(Exception):
    """Base of everything mmsearch raises on purpose.

    `where` names the file, option or value; `expected` and `got` say what was wrong with it;
    `do` is the sentence that gets the user going again. Empty parts are left out of the message.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, *, expected: str = "", got: str = "", do: str = "") -> None:
        self.where, self.expected, self.got, self.do = where, expected, got, do
        super().__init__(where, expected, got, do)

    def __str__(self) -> str:
        parts = [self.where]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.got:
            parts.append(f"got {self.got}")
        head = ": ".join(parts[:1]) + (": " + ", ".join(parts[1:]) if len(parts) > 1 else "")
        line = f"{head}. {self.do}" if self.do else head
        # One line whatever a file name holds: a newline or an undecodable byte is shown escaped.
        return line.encode("utf-8", "backslashreplace").decode().replace("\r", "\\r").replace("\n", "\\n")


class UsageError(MmsearchError):
    """Arguments that cannot mean anything (k = 0, an unknown name)."""

    exit_code = 2


class InputError(MmsearchError):
    """What the user handed over cannot be used."""


class ImageError(InputError):
    """One picture cannot be read; `reason` is a `types.SkipReason`."""

    def __init__(self, where: str, *, reason: str, detail: str = "", do: str = "") -> None:
        super().__init__(where, got=f"{reason} ({detail})" if detail else reason, do=do)
        self.reason, self.detail = reason, detail


class ModelError(MmsearchError):
    """A model that is not there, is refused, or does not fit."""


class StoreError(MmsearchError):
    """An index directory that cannot be used."""


class IndexNotFoundError(StoreError):
    """No index where one was looked for."""


class IndexMismatchError(StoreError):
    """The index was made by another model, preprocessing or a newer format."""


class IndexDamagedError(StoreError):
    """A checksum or a count says that bytes are not the bytes that were written."""

    exit_code = 4


class IndexLockedError(StoreError):
    """Another process is writing to the index."""

    exit_code = 6


class PartialError(MmsearchError):
    """Something was skipped and `--strict` asked for that to be an error."""

    exit_code = 3


class ResourceError(MmsearchError):
    """Disk or memory ran out."""

    exit_code = 5


class MissingExtraError(MmsearchError):
    """A package that one of the extras brings is not installed."""

    def __init__(self, what: str, *, package: str, extra: str) -> None:
        super().__init__(
            what, expected=f"package {package}", got="not installed", do=f"pip install 'mmsearch[{extra}]'"
        )
