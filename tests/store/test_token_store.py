"""The cache of patch tokens: never an error to who searches, never another picture's tokens, nothing doubled."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import tempfile
from pathlib import Path

import pytest
from store_kit import IndexStore, in_child, make_index
from test_store_sharing import as_nobody, forbid_writing

from mmsearch.errors import IndexLockedError, ResourceError, StoreError, UsageError
from mmsearch.store.tokens import TOKENS_NAME, TokenStore, remove_tokens, wrong_tokens


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def blob(number: int, size: int = 3000) -> bytes:
    return random.Random(number).randbytes(size)


def pairs(*several: int) -> list[tuple[bytes, bytes]]:
    return [(key(n), blob(n)) for n in several]


def filled(folder: Path, *several: int, identity: str = "a") -> str:
    """An index directory's path with tokens of these pictures."""
    folder.mkdir(exist_ok=True)
    with TokenStore.open(folder, identity=identity, write=True) as tokens:
        tokens.put(pairs(*several))
    return str(folder)


def read(path: str, *several: int, identity: str | None = "a") -> dict[int, bytes]:
    """What a reader finds, by number."""
    with TokenStore.open(path, identity=identity) as tokens:
        return {int.from_bytes(k, "little"): v for k, v in tokens.get(key(n) for n in several).items()}


def spoil(path: str, statement: str) -> None:
    """Change the file behind the store's back."""
    with sqlite3.connect(os.path.join(path, TOKENS_NAME)) as db:
        db.execute(statement)
    db.close()


def test_what_is_put_is_there(quick_path):
    """By content hash; what is asked for and not there is left out, and so is None."""
    path = filled(quick_path, 1, 2, 3)
    assert read(path, 3, 1, 9, 1) == {3: blob(3), 1: blob(1)}
    with TokenStore.open(path, identity="a") as tokens:
        assert tokens.get([None, key(2), None]) == {key(2): blob(2)}
        assert tokens.missing([key(9), key(2), key(8), key(9)]) == [key(9), key(8)]
        assert (tokens.count, tokens.bytes) == (3, 9000)


def test_many_pictures_are_asked_for_at_once(quick_path):
    """More than fit into one statement of SQLite."""
    path = filled(quick_path, *range(1203))
    assert len(read(path, *range(300_000))) == 1203
    with TokenStore.open(path, identity="a") as tokens:
        assert tokens.missing([key(n) for n in range(1300)]) == [key(n) for n in range(1203, 1300)]


def test_putting_again_doubles_nothing(quick_path):
    """The same picture twice, in one call and in two: the last one stays."""
    path = filled(quick_path, 1, 2)
    with TokenStore.open(path, identity="a", write=True) as tokens:
        tokens.put([(key(1), b"new"), *pairs(2, 3), (key(3), b"newer")])
        assert tokens.count == 3
    assert read(path, 1, 2, 3) == {1: b"new", 2: blob(2), 3: b"newer"}


def test_a_batch_is_there_or_it_is_not(quick_path):
    """One that fails half way leaves nothing behind."""
    path = filled(quick_path, 1)
    with TokenStore.open(path, identity="a", write=True) as tokens:
        with pytest.raises(UsageError, match="16 bytes"):
            tokens.put([*pairs(2), (b"short", b"x")])
        assert tokens.count == 1


def test_pruning_keeps_what_is_named(quick_path):
    """The rest is gone; what was never there is no matter."""
    path = filled(quick_path, 1, 2, 3, 4)
    with TokenStore.open(path, identity="a", write=True) as tokens:
        assert tokens.prune([key(2), key(4), key(77), key(2)]) == 2
        assert tokens.prune([key(2), key(4)]) == 0
    assert sorted(read(path, 1, 2, 3, 4)) == [2, 4]


def test_other_tokens_are_as_none_to_a_reader_and_removed_by_a_writer(quick_path):
    """Whoever reads with the wrong identity gets nothing, and changes nothing."""
    path = filled(quick_path, 1, 2)
    assert read(path, 1, identity="b") == {}
    with TokenStore.open(path, identity="b") as tokens:
        assert (tokens.count, tokens.bytes, tokens.missing([key(1)])) == (0, 0, [key(1)])
    assert sorted(read(path, 1, 2)) == [1, 2]
    assert sorted(read(path, 1, 2, identity=None)) == [1, 2]
    with TokenStore.open(path, identity="b", write=True) as tokens:
        assert tokens.count == 0
        tokens.put(pairs(2))
    assert read(path, 1, 2, identity="a") == {}
    assert sorted(read(path, 1, 2, identity="b")) == [2]


def test_a_reader_keeps_what_it_has_open_while_others_begin_anew(quick_path):
    """Another identity means another file: nobody reads tokens of two kinds."""
    path = filled(quick_path, 1, 2)
    with TokenStore.open(path, identity="a") as reader:
        assert reader.get([key(1)]) == {key(1): blob(1)}
        filled(quick_path, 2, 3, identity="b")
        assert reader.get([key(1), key(3)]) == {key(1): blob(1)}
    assert sorted(read(path, 1, 2, 3, identity="b")) == [2, 3]


def test_a_reader_sees_what_a_writer_commits(quick_path):
    """Searches go on while tokens are made."""
    path = filled(quick_path, 1)
    with TokenStore.open(path, identity="a") as reader, TokenStore.open(path, identity="a", write=True) as writer:
        writer.put(pairs(2))
        assert sorted(reader.get([key(1), key(2)])) == [key(1), key(2)]


def test_an_index_without_tokens_is_no_error(quick_path):
    """Before the first filling, and after the removal."""
    assert read(str(quick_path), 1) == {}
    assert not os.path.exists(quick_path / TOKENS_NAME)
    path = filled(quick_path, 1)
    (quick_path / (TOKENS_NAME + "-wal")).write_bytes(b"the log of a killed writer")
    remove_tokens(path)
    remove_tokens(path)
    assert read(path, 1) == {}
    assert [name for name in os.listdir(path) if name.startswith(TOKENS_NAME)] == []


def test_one_writer_at_a_time_and_it_is_the_index_s(quick_path):
    """Two fillings, or a build and a filling, do not meet."""
    path = make_index(quick_path / "index")
    with TokenStore.open(path, identity="a", write=True):
        for other in (
            lambda: TokenStore.open(path, identity="a", write=True),
            lambda: IndexStore.open(path, write=True),
        ):
            with pytest.raises(IndexLockedError):
                other()
    TokenStore.open(path, identity="a", write=True).close()


def test_only_a_writer_writes(quick_path):
    """And only an open one; without saying what made them nobody does."""
    path = filled(quick_path, 1)
    with TokenStore.open(path, identity="a") as tokens, pytest.raises(UsageError, match="write=True"):
        tokens.put(pairs(2))
    with pytest.raises(UsageError, match="open"):
        tokens.get([key(1)])
    with pytest.raises(UsageError, match="identity"):
        TokenStore.open(path, identity=None, write=True)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE tokens SET tokens = zeroblob(3000) WHERE rowid = 2",
        "UPDATE tokens SET tokens = substr(tokens, 1, 2999) WHERE rowid = 2",
        "UPDATE tokens SET tokens = 7 WHERE rowid = 2",
        "UPDATE tokens SET xxh3 = 'x' WHERE rowid = 2",
        "UPDATE tokens SET (xxh3, tokens) = (SELECT xxh3, tokens FROM tokens WHERE rowid = 1) WHERE rowid = 2",
    ],
)
def test_damaged_tokens_are_as_missing(quick_path, statement):
    """Shorter, of another type, even another picture's with its checksum: they are not handed out, and made anew."""
    path = filled(quick_path, 1, 2, 3)
    spoil(path, statement)
    assert sorted(read(path, 1, 2, 3)) == [1, 3]
    assert wrong_tokens(path) == [key(2)]
    with TokenStore.open(path, identity="a", write=True) as tokens:
        assert tokens.repair() == 1
        assert tokens.missing([key(1), key(2), key(3)]) == [key(2)]
        tokens.put(pairs(2))
        assert tokens.repair() == 0
    assert wrong_tokens(path) == []
    assert sorted(read(path, 1, 2, 3)) == [1, 2, 3]


@pytest.mark.parametrize("damage", ["empty", "text", "short", "zeros", "directory"])
def test_a_damaged_file_is_as_none_and_begun_anew(quick_path, damage):
    """Nothing is raised to a reader; a writer goes on with a new one (but removes no directory)."""
    path = filled(quick_path, *range(8))
    file = Path(path, TOKENS_NAME)
    whole = file.read_bytes()
    file.unlink()
    if damage == "directory":
        file.mkdir()
        assert read(path, 1) == {}
        with pytest.raises((StoreError, ResourceError)):
            TokenStore.open(path, identity="a", write=True)
        return
    file.write_bytes(
        {"empty": b"", "text": b"no database at all", "short": whole[: len(whole) // 2], "zeros": bytes(len(whole))}[
            damage
        ]
    )
    assert set(read(path, *range(8)).items()) <= {(n, blob(n)) for n in range(8)}
    with TokenStore.open(path, identity="a", write=True) as tokens:
        tokens.repair()
        tokens.put(pairs(*range(8)))
    assert len(read(path, *range(8))) == 8
    assert wrong_tokens(path) == []


def test_no_byte_that_flips_hands_out_wrong_tokens(quick_path):
    """All over the file: what is read is right or missing, `repair` brings everything back, and nothing is raised."""
    path = filled(quick_path, *range(12))
    file = Path(path, TOKENS_NAME)
    whole, draw = file.read_bytes(), random.Random(0)
    keys = [found.start() for found in re.finditer(re.escape(key(5)), whole)]  # in the table, and in its index
    assert len(keys) >= 2
    places = [*keys, *range(0, 120, 4), *(draw.randrange(len(whole)) for _ in range(50))]
    lost = 0
    for place in places:
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << draw.randrange(8)
        file.write_bytes(spoiled)
        found = read(path, *range(12))
        assert all(value == blob(n) for n, value in found.items()), place
        lost += len(found) < 12
        with TokenStore.open(path, identity="a", write=True) as tokens:
            tokens.repair()
            tokens.put(pairs(*(int.from_bytes(k, "little") for k in tokens.missing([key(n) for n in range(12)]))))
            assert tokens.count == 12, place
        assert len(read(path, *range(12))) == 12, place
        assert wrong_tokens(path) == [], place
    assert lost > 20


def test_a_page_that_turns_out_to_be_damaged_while_writing_costs_the_file_not_the_run(quick_path):
    """The batch under way is in the new file, the others are missing and made again."""
    path = filled(quick_path, *range(60))
    with TokenStore.open(path, identity="a", write=True) as tokens:
        file = Path(path, TOKENS_NAME)
        file.write_bytes(file.read_bytes()[:4096] + bytes(len(file.read_bytes()) - 4096))
        tokens.put(pairs(*range(100, 200)))
        tokens.repair()
        tokens.put(pairs(1))
        missing = tokens.missing([key(n) for n in (1, 2)])
    assert missing in ([], [key(2)])
    assert read(path, 1) == {1: blob(1)}


def test_a_killed_writer_loses_only_what_it_had_not_committed(quick_path):
    """At any moment: every batch is whole or not there, the next writer goes on, nothing is there twice."""
    path = str(quick_path)
    for kill_at in range(1, 9):

        def die(tell, kill_at=kill_at):
            tokens = TokenStore.open(path, identity="a", write=True)
            for batch in range(8):
                if batch + 1 == kill_at:  # after so many steps of SQLite
                    tokens._db.set_progress_handler(lambda: os.kill(os.getpid(), signal.SIGKILL), 25 * kill_at)
                tokens.put(pairs(*range(batch * 10, batch * 10 + 10)))
                tell(f"end{batch}")

        status, lines = in_child(die)
        assert os.WTERMSIG(status) == signal.SIGKILL
        ended = sum(line.startswith("end") for line in lines)
        with TokenStore.open(path, identity="a", write=True) as tokens:
            there = [n for n in range(80) if not tokens.missing([key(n)])]
            assert tokens.count == len(there)
            assert set(range(ended * 10)) <= set(there)
            assert len(there) % 10 == 0
            assert tokens.repair() == 0
    remove_tokens(path)


@pytest.mark.parametrize("left", ["nothing", "empty", "log only"])
def test_a_beginning_that_was_killed_is_begun_again(quick_path, left):
    """A file without tables, or the log of one that was removed, is no damage."""
    filled(quick_path, 1, identity="old")
    file = quick_path / TOKENS_NAME
    log = Path(f"{file}-wal")
    log.write_bytes(file.read_bytes())
    file.unlink()
    if left != "log only":
        log.unlink()
    if left == "empty":
        file.write_bytes(b"")
        assert wrong_tokens(str(quick_path)) == []
    path = filled(quick_path, 2)
    assert read(path, 1, 2) == {2: blob(2)}


READ = """
import sys
from mmsearch.store.tokens import TokenStore
from mmsearch.errors import MmsearchError
with TokenStore.open(sys.argv[1], identity="a") as tokens:
    found = tokens.get(n.to_bytes(16, "little") for n in range(9))
print(sorted(k[0] for k in found))
try:
    TokenStore.open(sys.argv[1], identity="a", write=True)
except MmsearchError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def open_place():
    """A folder whose path anybody may walk."""
    folder = Path(tempfile.mkdtemp(prefix="mmsearch-test-"))
    folder.chmod(0o755)
    yield folder
    for entry in [folder, *folder.rglob("*")]:
        if entry.is_dir():
            entry.chmod(0o755)
    shutil.rmtree(folder)


def test_tokens_on_a_read_only_disk_can_be_read(open_place):
    """Closed properly, and left by a killed writer: what its log held may be missing, what is read is right."""
    closed = filled(open_place / "closed", 1, 2)
    killed = filled(open_place / "killed", 1, 2)

    def die(tell):
        TokenStore.open(killed, identity="a", write=True).put(pairs(3))
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(die)
    assert os.path.getsize(os.path.join(killed, TOKENS_NAME + "-wal")) > 0
    os.unlink(os.path.join(killed, TOKENS_NAME + "-shm"))
    for path in (closed, killed):
        forbid_writing(path)
        lines = as_nobody(READ, path)
        assert lines[0] == "[1, 2]"
        assert lines[1] in ("StoreError", "ResourceError")
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o555


def test_reading_leaves_the_folder_as_it_was(quick_path):
    """No side files of SQLite stay behind."""
    path = filled(quick_path, 1, 2)
    before = {p.name: p.read_bytes() for p in Path(path).iterdir()}
    assert len(read(path, 1, 2)) == 2
    assert {p.name: p.read_bytes() for p in Path(path).iterdir()} == before


def test_a_picture_costs_little_more_than_its_tokens(quick_path):
    """Less than 32,000 bytes in the file for 31,266 of tokens."""
    with TokenStore.open(quick_path, identity="a", write=True) as tokens:
        tokens.put((key(n), blob(n, 31_266)) for n in range(200))
        assert tokens.bytes == 200 * 31_266
    assert os.path.getsize(quick_path / TOKENS_NAME) / 200 < 32_000


def test_info_and_verify_know_the_tokens(quick_path):
    """How many, how large; which pictures' are damaged, by name; and an index without any is whole."""
    path = make_index(quick_path / "index", 5)
    with IndexStore.open(path) as store:
        assert store.info()["patch_tokens"] == {"pictures": 0, "bytes": 0}
        assert store.verify() == []
    filled(Path(path), *range(5))
    with IndexStore.open(path) as store:
        assert store.info()["patch_tokens"] == {"pictures": 5, "bytes": 15_000}
        assert store.verify() == []
        spoil(path, "UPDATE tokens SET tokens = zeroblob(3000) WHERE rowid > 1")
        (problem,) = store.verify()
        assert problem.file == TOKENS_NAME
        assert problem.what.endswith("/photos/p1, /photos/p2, /photos/p3 and 1 more")
        assert "--tokens" in problem.repair
        Path(path, TOKENS_NAME).write_bytes(b"no database at all")
        (problem,) = store.verify()
        assert (problem.file, "--tokens" in problem.repair) == (TOKENS_NAME, True)
        assert store.info()["patch_tokens"] == {"pictures": 0, "bytes": 0}
