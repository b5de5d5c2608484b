"""Stand-ins for the library: they answer what a test says and remember what they were asked."""

from dataclasses import dataclass

from mmsearch.cli.library import Library
from mmsearch.errors import IndexNotFoundError
from mmsearch.types import BuildReport, Hit, Item, Modality


def hit(path: str, *, rank: int = 1, score: float = 0.5, caption: str | None = None, **item) -> Hit:
    modality = Modality.TEXT if caption else Modality.IMAGE
    return Hit(rank, score, Item(f"{rank:016x}", path, **item), modality, caption)


class FakeHits(list):
    """What a searcher returns: hits with notes."""

    def __init__(self, hits=(), notes=()):
        super().__init__(hits)
        self.notes = tuple(notes)


class FakeSearcher:
    """Returns the hits it was made with and remembers what it was asked."""

    def __init__(self, hits):
        self.hits, self.asked = hits, []

    def __enter__(self):
        return self

    def __exit__(self, *details):
        pass

    def search_text(self, text, **options):
        self.asked.append((text, options))
        return self.hits

    search_image = search_text


class FakeLibrary(Library):
    """Library calls that do nothing but remember; `fails` is raised by all of them."""

    def __init__(self, *, hits=(), notes=(), report=None, problems=(), facts=None, fails=None, found=None):
        super().__init__()
        self.searcher = FakeSearcher(FakeHits(hits, notes))
        self.report, self.problems, self.facts = report, list(problems), facts or {}
        self.fails, self.found, self.calls = fails, found, []

    def _called(self, name, **arguments):
        self.calls.append((name, arguments))
        if self.fails is not None:
            raise self.fails

    def build(self, paths, out, **options):
        self._called("build", paths=list(paths), out=out, **options)
        return self.report or BuildReport(out)

    def open(self, path, *, device):
        self._called("open", path=path, device=device)
        return self.searcher

    def find_index(self, home):
        if self.found is None:
            raise IndexNotFoundError(str(home), expected="an index directory in it", got="none")
        return self.found

    def info(self, path):
        self._called("info", path=path)
        return self.facts

    def tune(self, path, **options):
        self._called("tune", path=path, **options)
        return self.facts

    def verify(self, path):
        self._called("verify", path=path)
        return self.problems

    def evaluate(self, pairs, **options):
        self._called("evaluate", pairs=pairs, **options)
        return self.facts

    def compare(self, pairs, **options):
        self._called("compare", pairs=pairs, **options)
        return self.facts

    def classify(self, folder, **options):
        self._called("classify", folder=folder, **options)
        return self.facts

    def compare_classes(self, folder, **options):
        self._called("compare_classes", folder=folder, **options)
        return self.facts


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def err_lines(self) -> list[str]:
        return self.err.splitlines()
