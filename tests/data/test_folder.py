from __future__ import annotations

import os
import random
import resource
import socket
import subprocess
import sys

import pytest
from picture_builders import png

from mmsearch.data.collection import read_collection
from mmsearch.errors import InputError
from mmsearch.types import SkipReason

PICTURE = png()


def tree(root, *names: str) -> None:
    """Files below `root`: pictures by default, texts where the name says so."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURE)


def listed(*paths, **options) -> tuple[list[str], list]:
    """(names below their root, what was skipped)."""
    skipped: list = []
    found = [s.name for s in read_collection([str(p) for p in paths], on_skip=skipped.append, **options)]
    return found, skipped


def test_a_folder_is_listed_recursively_and_sorted(tmp_path):
    """By the bytes of the names, folder by folder; the same whatever the file system's order and locale."""
    names = ["b.jpg", "a/z.png", "a/b/c.webp", "Z.gif", "ä.jpg", "a.jpg", "c/1.heic", "c/10.avif", "c/2.tif"]
    random.Random(0).shuffle(names)
    tree(tmp_path, *names)
    expected = ["Z.gif", "a/b/c.webp", "a/z.png", "a.jpg", "b.jpg", "c/1.heic", "c/10.avif", "c/2.tif", "ä.jpg"]
    assert listed(tmp_path) == (expected, [])


def test_a_source_says_where_it_came_from(tmp_path):
    """Root, name, absolute path and stamp."""
    tree(tmp_path, "a/b.jpg")
    (source,) = read_collection([str(tmp_path / "a" / "..")], on_skip=pytest.fail)
    assert (source.root, source.name) == (str(tmp_path), "a/b.jpg")
    assert source.path == str(tmp_path / "a" / "b.jpg")
    status = os.stat(source.path)
    assert source.stamp.size == len(PICTURE)
    assert (source.stamp.mtime_ns, source.stamp.ctime_ns) == (status.st_mtime_ns, status.st_ctime_ns)


def test_only_names_of_pictures_count(tmp_path):
    """Others are none of our business: neither listed nor reported; endings in any case."""
    tree(tmp_path, "a.JPG", "b.Jpeg", "c.txt", "d.mp4", "e", "f.jpg.bak", "g.eps", "h.psd", "thumbs.db")
    assert listed(tmp_path) == (["a.JPG", "b.Jpeg"], [])


def test_what_is_always_left_out_and_what_is_hidden(tmp_path):
    """Hidden files and folders unless asked for; the droppings of other programs always."""
    names = [".h.jpg", ".d/x.jpg", "._a.jpg", "a.jpg"]
    junk = ["@eaDir/x.jpg", "node_modules/x.jpg", ".git/x.jpg", "System Volume Information/x.jpg", "s/@eaDir/y.jpg"]
    tree(tmp_path, *names, *junk)
    assert listed(tmp_path)[0] == ["a.jpg"]
    assert listed(tmp_path, include_hidden=True)[0] == ["._a.jpg", ".d/x.jpg", ".h.jpg", "a.jpg"]
    assert listed(tmp_path / ".d")[0] == ["x.jpg"]


@pytest.mark.parametrize(
    ("globs", "left"),
    [
        (["*.png"], ["a.jpg", "s/b.jpg", "s/t/c.jpg"]),
        (["s"], ["a.jpg", "d.png"]),
        (["s/"], ["a.jpg", "d.png"]),
        (["s/t"], ["a.jpg", "d.png", "s/b.jpg"]),
        (["s/*"], ["a.jpg", "d.png"]),
        (["[ab].jpg", "d*"], ["s/t/c.jpg"]),
        (["nothing"], ["a.jpg", "d.png", "s/b.jpg", "s/t/c.jpg"]),
    ],
)
def test_globs_exclude_names_and_paths(tmp_path, globs, left):
    """A glob matches a name anywhere or a path below the folder; an excluded folder is not entered."""
    tree(tmp_path, "a.jpg", "d.png", "s/b.jpg", "s/t/c.jpg")
    assert listed(tmp_path, exclude=globs)[0] == left


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_reported(tmp_path):
    """Row 21, with the real thing."""
    tree(tmp_path, "a.jpg", "s/b.jpg")
    (tmp_path / "s").chmod(0)
    try:
        found, skipped = listed(tmp_path)
    finally:
        (tmp_path / "s").chmod(0o755)
    assert found == ["a.jpg"]
    assert [(s.path, s.reason) for s in skipped] == [(str(tmp_path / "s"), SkipReason.UNREADABLE)]


def test_a_folder_that_cannot_be_listed_is_reported_even_to_root(tmp_path, monkeypatch):
    """Row 21: the same by an injected failure; the builder must not take its pictures for deleted."""
    tree(tmp_path, "a.jpg", "s/b.jpg", "z.jpg")
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "s":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found, skipped = listed(tmp_path)
    assert found == ["a.jpg", "z.jpg"]
    assert [(s.path, s.reason) for s in skipped] == [(str(tmp_path / "s"), SkipReason.UNREADABLE)]


def test_links_in_circles_end(tmp_path):
    """Row 22: a link to itself, to its folder, to its parent, two that point at each other."""
    tree(tmp_path, "in/a.jpg", "in/s/b.jpg")
    inside = tmp_path / "in"
    os.symlink(inside / "self.jpg", inside / "self.jpg")
    os.symlink(inside, inside / "here")
    os.symlink("..", inside / "s" / "up")
    os.symlink(tmp_path, inside / "parent")
    os.symlink("two", inside / "one")
    os.symlink("one", inside / "two")
    found, skipped = listed(inside)
    assert found == ["a.jpg", "s/b.jpg"]
    assert [(os.path.basename(s.path), s.reason) for s in skipped] == [("self.jpg", SkipReason.UNREADABLE)]


def test_a_linked_picture_is_listed_once_where_it_really_is(tmp_path):
    """Row 22: adding a link never changes what a picture is called."""
    tree(tmp_path, "in/z.jpg", "in/z/b.jpg", "out/c.jpg", "out/d.jpg")
    inside = tmp_path / "in"
    os.symlink(inside / "z.jpg", inside / "a.jpg")
    os.symlink(inside / "z", inside / "a")
    os.symlink(tmp_path / "out", inside / "o")
    os.symlink(tmp_path / "out", inside / "p")
    os.symlink(tmp_path / "out" / "c.jpg", inside / "q.jpg")
    os.symlink(tmp_path / "out" / "d.jpg", inside / "b.jpg")
    assert listed(inside) == (["b.jpg", "o/c.jpg", "z/b.jpg", "z.jpg"], [])
    assert listed(inside, follow_symlinks=False) == (["z/b.jpg", "z.jpg"], [])


def test_a_link_into_a_place_that_is_left_out_counts(tmp_path):
    """Row 22: as git-annex keeps its files: the content lies hidden, the links are the names."""
    tree(tmp_path, ".git/annex/1.jpg", "real.jpg")
    os.symlink(tmp_path / ".git" / "annex" / "1.jpg", tmp_path / "cat.jpg")
    os.symlink(tmp_path / ".git" / "annex" / "1.jpg", tmp_path / "dog.jpg")
    assert listed(tmp_path)[0] == ["cat.jpg", "real.jpg"]


def test_hard_links_are_listed_once(tmp_path):
    """Row 22: by device and inode, first name first."""
    tree(tmp_path, "b.jpg", "c.jpg")
    (tmp_path / "s").mkdir()
    os.link(tmp_path / "b.jpg", tmp_path / "a.jpg")
    os.link(tmp_path / "b.jpg", tmp_path / "s" / "d.jpg")
    assert listed(tmp_path)[0] == ["a.jpg", "c.jpg"]


def test_overlapping_paths_list_each_picture_once(tmp_path):
    """A folder, a folder in it, a picture in both, all of it twice."""
    tree(tmp_path, "a.jpg", "s/b.jpg", "s/c.jpg")
    skipped: list = []
    given = [tmp_path, tmp_path / "s", tmp_path / "s" / "b.jpg", tmp_path, tmp_path / "a.jpg"]
    paths = [s.path for s in read_collection([str(p) for p in given], on_skip=skipped.append)]
    assert sorted(paths) == sorted(str(tmp_path / n) for n in ("a.jpg", "s/b.jpg", "s/c.jpg"))
    found, _ = listed(tmp_path / "s", tmp_path)
    assert found == ["b.jpg", "c.jpg", "a.jpg"]


def test_a_dead_link_is_reported(tmp_path):
    """Row 20."""
    os.symlink(tmp_path / "nowhere.jpg", tmp_path / "a.jpg")
    _, (skip,) = listed(tmp_path)
    assert (skip.reason, skip.detail) == (SkipReason.VANISHED, "a link that leads nowhere")


def test_pipes_sockets_and_devices_are_reported_and_never_opened(tmp_path):
    """Row 23: with a picture's name; a folder with one is a folder."""
    os.mkfifo(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "c.txt")
    os.symlink("/dev/zero", tmp_path / "b.jpg")
    tree(tmp_path, "c.jpg", "d.jpg/e.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "f.jpg"))
        found, skipped = listed(tmp_path)
    assert found == ["c.jpg", "d.jpg/e.jpg"]
    assert {(os.path.basename(s.path), s.reason) for s in skipped} == {
        (name, SkipReason.NOT_A_FILE) for name in ("a.jpg", "b.jpg", "c.txt", "f.jpg")
    }


STRANGE = [
    b"\xff\xfe\x80.jpg", b"new\nline.jpg", b"tab\there.jpg", b" space .jpg", b"-rf.jpg", b"*?[x].jpg",
    "🐕‍🦺.jpg".encode(), "\u202egnp.jpg".encode(), b"x" * 251 + b".jpg", b"quote\"'.jpg", b"back\\slash.jpg",
]  # fmt: skip


def test_names_of_any_bytes_are_listed_as_they_are(tmp_path):
    """Row 24: not UTF-8, newline, emoji, right-to-left, 255 bytes; the bytes come back unchanged, in order."""
    for name in STRANGE:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(PICTURE)
    found, skipped = listed(tmp_path)
    assert [os.fsencode(name) for name in found] == sorted(STRANGE)
    assert not skipped


def test_names_that_look_alike_stay_apart(tmp_path):
    """Row 25: composed and decomposed, capital and small."""
    names = ["caf\u00e9.jpg", "cafe\u0301.jpg", "A.jpg", "a.jpg"]
    tree(tmp_path, *names)
    if len(os.listdir(tmp_path)) < 4:
        pytest.skip("this file system does not tell them apart")
    assert set(listed(tmp_path)[0]) == set(names)


def test_a_path_that_is_too_long_is_reported(tmp_path):
    """Row 26: deeper than the system can name; what lies above it is listed."""
    tree(tmp_path, "a.jpg")
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(25):
            os.mkdir("d" * 200, dir_fd=here)
            deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = deeper
    finally:
        os.close(here)
    found, skipped = listed(tmp_path)
    assert found == ["a.jpg"]
    assert [s.reason for s in skipped] == [SkipReason.UNREADABLE]
    subprocess.run(["rm", "-rf", str(tmp_path / ("d" * 200))], check=True)


def test_a_thousand_folders_deep_is_no_recursion(tmp_path):
    """Row 26: one-letter folders up to the system's limit."""
    depth = (4000 - len(str(tmp_path))) // 2
    deepest = str(tmp_path)
    for _ in range(depth):
        deepest += "/d"
        os.mkdir(deepest)
    with open(deepest + "/a.jpg", "wb") as file:
        file.write(PICTURE)
    found, skipped = listed(tmp_path)
    assert (found, skipped) == (["d/" * depth + "a.jpg"], [])
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


def test_a_big_folder_streams(tmp_path):
    """Row 26: 5,000 pictures in a folder: the first comes without an item for each, memory stays flat."""
    for number in range(5_000):
        os.close(os.open(tmp_path / f"{number:05}.jpg", os.O_CREAT | os.O_WRONLY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(1 for _ in read_collection([str(tmp_path)], on_skip=pytest.fail))
    assert count == 5_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 15_000  # KiB


def test_a_file_removed_during_the_walk_has_vanished(tmp_path):
    """Row 20: listed with its folder, gone when its turn comes."""
    tree(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    skipped: list = []
    walk = read_collection([str(tmp_path)], on_skip=skipped.append)
    assert next(walk).name == "a.jpg"
    (tmp_path / "b.jpg").unlink()
    assert [s.name for s in walk] == ["c.jpg"]
    assert [s.reason for s in skipped] == [SkipReason.VANISHED]


def test_a_path_that_is_not_there_is_an_error_at_once(tmp_path):
    """Before anything is read, and with its name."""
    for path in (tmp_path / "none", tmp_path / "none" / "a.jpg", "a\0b"):
        with pytest.raises(InputError):
            read_collection([str(tmp_path), str(path)], on_skip=pytest.fail)


def test_an_empty_folder_gives_nothing(tmp_path):
    """What to make of it is for the builder."""
    assert listed(tmp_path) == ([], [])


def test_the_order_does_not_depend_on_the_locale(tmp_path):
    """The same under C and UTF-8, also for names that are neither."""
    tree(tmp_path, "ä.jpg", "Z.jpg", "a.jpg")
    with open(os.path.join(os.fsencode(tmp_path), b"\xe4.jpg"), "wb") as file:
        file.write(PICTURE)
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import os\n"
        "from mmsearch.data.collection import read_collection\n"
        f"print([os.fsencode(s.name) for s in read_collection([{str(tmp_path)!r}], on_skip=print)])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"LC_ALL": locale, "PYTHONUTF8": utf8}, capture_output=True, text=True, check=True,
        ).stdout
        for locale, utf8 in (("C", "1"), ("C.UTF-8", "0"))
    }  # fmt: skip
    assert len(told) == 1
