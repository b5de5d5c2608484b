from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import xxhash
from picture_builders import jpeg, noisy, photo, png, png_bomb
from PIL import Image

from mmsearch.data.images import Limits, open_image, prepare
from mmsearch.data.loading import Failed, Loaded, Loader, file_digest
from mmsearch.errors import ResourceError, UsageError
from mmsearch.types import Preprocessing, SkipReason

SMALL = Preprocessing(size=16)


def loader(**options) -> Loader:
    return Loader(**{"preprocessing": SMALL, "workers": 2, "worker": "nasty_worker", **options})


def folder_of(tmp_path, *names: str) -> list[str]:
    """One picture a name, each of its own colour; what its name asks for comes from `nasty_worker`."""
    paths = []
    for number, name in enumerate(names):
        path = tmp_path / name
        path.write_bytes(png(Image.new("RGB", (20, 20), (number * 7 % 256, number % 256, 99))))
        paths.append(str(path))
    return paths


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def check(results: list, paths: list[str], bad: dict[str, SkipReason]) -> None:
    """Every result has its own key, pixels and hash, in order; exactly the bad ones failed, each as it should."""
    assert [r.key for r in results] == list(range(len(paths)))
    for result, path in zip(results, paths, strict=True):
        name = os.path.basename(path)
        if name in bad:
            assert isinstance(result, Failed), name
            assert (result.skipped.path, result.skipped.reason) == (path, bad[name])
            continue
        assert isinstance(result, Loaded), result
        with open(path, "rb") as file:
            data = file.read()
        assert np.array_equal(result.pixels, prepare(open_image(data)[0], SMALL))
        assert (result.content_hash, result.stamp) == file_digest(path)


def test_pixels_hashes_and_order_are_those_of_plain_decoding(tmp_path):
    """Whatever worker did it: the same pixels as in this process, the hash of the bytes, the order asked for."""
    paths = folder_of(tmp_path, *[f"{i}.png" for i in range(60)])
    (tmp_path / "0.png").write_bytes(jpeg(noisy(640, 480)))  # slow one first: others overtake it
    with loader(ahead=8) as decode:
        results = list(decode.load(enumerate(paths)))
    assert results[0].info.width == 640
    assert results[0].content_hash == xxhash.xxh3_128_digest((tmp_path / "0.png").read_bytes())
    for result, path in zip(results[1:], paths[1:], strict=True):
        assert np.array_equal(result.pixels, prepare(open_image(path)[0], SMALL))
        assert (result.content_hash, result.stamp) == file_digest(path)
    assert [r.key for r in results] == list(range(60))


def test_a_hanging_decoder_is_ended_and_the_job_goes_on(tmp_path):
    """Row 15: a loop in C or a sleep: its worker is killed after the timeout, the others are not touched."""
    paths = folder_of(tmp_path, *["a.png", "hang.png", "b.png", "c.png", "sleep.png", "d.png", "e.png"])
    started = time.monotonic()
    with loader(timeout_s=1) as decode:
        results = list(decode.load(enumerate(paths)))
    check(results, paths, {"hang.png": SkipReason.TIMEOUT, "sleep.png": SkipReason.TIMEOUT})
    assert results[1].skipped.detail == "over 1 s"
    assert time.monotonic() - started < 15


def test_a_picture_that_really_takes_too_long_is_a_timeout(tmp_path):
    """Row 15 without a trick: 400 megapixels within half a second is not to be had."""
    paths = folder_of(tmp_path, "a.png", "slow.png", "b.png")
    (tmp_path / "slow.png").write_bytes(png_bomb(20_000))
    limits = Limits(max_pixels=500_000_000)
    with Loader(preprocessing=SMALL, workers=1, timeout_s=0.5, limits=limits) as decode:
        results = list(decode.load(enumerate(paths)))
    check(results, paths, {"slow.png": SkipReason.TIMEOUT})


def test_a_stopped_worker_is_ended_from_outside(tmp_path):
    """Row 15: its own alarm clock does not tick while it is stopped; the parent's patience ends instead."""
    paths = folder_of(tmp_path, *["stop.png", "a.png", "b.png"])
    with loader(timeout_s=0.7, workers=1) as decode:
        results = list(decode.load(enumerate(paths)))
    check(results, paths, {"stop.png": SkipReason.TIMEOUT})


def test_a_crashing_decoder_costs_the_culprit_only(tmp_path):
    """Row 16: two crashes convict; everything that waited behind it is decoded by others."""
    names = [f"{i}.png" for i in range(40)]
    names[3], names[4], names[20] = "segv1.png", "segv2.png", "segv3.png"
    paths = folder_of(tmp_path, *names)
    with loader() as decode:
        results = list(decode.load(enumerate(paths)))
    check(results, paths, {name: SkipReason.CRASHED for name in names if name.startswith("segv")})
    assert "SIGSEGV" in results[3].skipped.detail


def test_a_failed_picture_still_has_its_hash_and_stamp(tmp_path):
    """Rows 15, 16: so that it is remembered and not tried again until it changes."""
    paths = folder_of(tmp_path, "segv.png", "hang.png", "broken.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with loader(timeout_s=1) as decode:
        results = list(decode.load(enumerate(paths)))
    for result, path in zip(results, paths, strict=True):
        assert (result.content_hash, result.stamp) == file_digest(path)


def test_a_worker_that_dies_once_convicts_nobody(tmp_path):
    """Row 16: the picture at hand may be an innocent victim; it is tried once more."""
    paths = folder_of(tmp_path, "a.png", "once.png", "b.png")
    (tmp_path / "once.png.first").write_bytes(b"")
    with loader() as decode:
        check(list(decode.load(enumerate(paths))), paths, {})


def test_a_memory_bomb_costs_itself_only(tmp_path):
    """Row 5: the worker's address space is bounded; what the kernel kills for memory is called so."""
    paths = folder_of(tmp_path, "a.png", "flood.png", "b.png", "oom.png", "c.png")
    with loader(memory_bytes=1 << 30) as decode:
        results = list(decode.load(enumerate(paths)))
    check(results, paths, dict.fromkeys(("flood.png", "oom.png"), SkipReason.OUT_OF_MEMORY))


def test_a_big_picture_in_a_small_worker_is_out_of_memory(tmp_path):
    """Row 5 without a trick: 144 megapixels do not fit in 400 MB."""
    paths = folder_of(tmp_path, "a.png", "big.png", "b.png")
    (tmp_path / "big.png").write_bytes(png_bomb(12_000))
    with Loader(preprocessing=SMALL, workers=1, memory_bytes=400 << 20) as decode:
        results = list(decode.load(enumerate(paths)))
    check(results, paths, {"big.png": SkipReason.OUT_OF_MEMORY})


def test_the_limit_set_is_the_limit_that_counts(tmp_path):
    """Row 6: pixels and bytes, as given, on both sides of Pillow's own limit."""
    paths = folder_of(tmp_path, "a.png", "bomb.png", "long.png")
    (tmp_path / "bomb.png").write_bytes(png_bomb(20_000))
    (tmp_path / "long.png").write_bytes(png(noisy()) + b"\0" * 300_000)
    with loader(limits=Limits(max_pixels=300_000_000, max_bytes=200_000)) as decode:
        results = list(decode.load(enumerate(paths)))
    check(results, paths, dict.fromkeys(("bomb.png", "long.png"), SkipReason.TOO_LARGE))
    assert "limit 300" in results[1].skipped.detail


def test_every_kind_of_bad_file_costs_itself_only(tmp_path):
    """Rows 1, 2, 20, 23 and 44: whatever fails, the rest keep their own pixels."""
    paths = folder_of(tmp_path, *[f"{i}.png" for i in range(8)])
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").write_bytes(b"<html>")
    (tmp_path / "3.png").unlink()
    (tmp_path / "4.png").unlink()
    os.mkfifo(tmp_path / "4.png")
    (tmp_path / "6.png").unlink()
    (tmp_path / "6.png").mkdir()
    reasons = {
        "1.png": SkipReason.EMPTY,
        "2.png": SkipReason.NOT_AN_IMAGE,
        "3.png": SkipReason.VANISHED,
        "4.png": SkipReason.NOT_A_FILE,
        "6.png": SkipReason.NOT_A_FILE,
    }
    with loader() as decode:
        results = list(decode.load(enumerate(paths)))
    check(results, paths, reasons)
    assert results[3].content_hash is results[3].stamp is None


def test_no_fault_ever_moves_pixels_to_another_item(tmp_path):
    """Row 44: a random mix of good, bad, crashing and hanging pictures, few slots, every item its own pixels."""
    generator, names, bad = random.Random(3), [], {}
    for number in range(80):
        kind = generator.choices(["", "segv", "bad", "oom"], [20, 1, 3, 1])[0]
        names.append(f"{kind}{number}.png")
    paths = folder_of(tmp_path, *names)
    for name in names:
        if name.startswith("bad"):
            (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
            bad[name] = SkipReason.TRUNCATED
        elif name.startswith("segv"):
            bad[name] = SkipReason.CRASHED
        elif name.startswith("oom"):
            bad[name] = SkipReason.OUT_OF_MEMORY
    with loader(ahead=5) as decode:
        check(list(decode.load(enumerate(paths))), paths, bad)


def test_names_of_any_bytes_reach_the_worker(tmp_path):
    """Row 24: not UTF-8, with newlines and quotes, emoji, 255 bytes."""
    names = [b"\xff\xfe.png", b"new\nline.png", b'q"uote\\.png', "🐕‍🦺.png".encode(), b"x" * 251 + b".png"]
    paths = []
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            file.write(png())
        paths.append(os.fsdecode(path))
    with loader() as decode:
        check(list(decode.load(enumerate(paths))), paths, {})


def test_more_requests_than_the_pipe_holds_wait_their_turn(tmp_path):
    """Megabytes of long names behind a hanging picture: nobody waits for ever, and nobody is blamed for it."""
    hang = folder_of(tmp_path, "hang.png")[0]
    absent = [str(tmp_path / "/".join([f"{i}" + "\udcff" * 200] * 15)) for i in range(200)]
    with loader(workers=1, timeout_s=1) as decode:
        first, *rest = decode.load(enumerate([hang, *absent]))
    assert first.skipped.reason == SkipReason.TIMEOUT
    assert [r.skipped.path for r in rest] == absent
    assert {r.skipped.reason for r in rest} == {SkipReason.VANISHED}


def test_requests_are_taken_as_they_are_needed(tmp_path):
    """Bounded look-ahead: never more than `ahead` requests are out, however long the list."""
    path = folder_of(tmp_path, "a.png")[0]
    taken = 0

    def requests():
        nonlocal taken
        for number in range(500):
            taken = number + 1
            yield number, path

    with loader(ahead=10) as decode:
        for count, _ in enumerate(decode.load(requests())):
            assert taken <= count + 10


def test_a_load_that_is_given_up_leaves_the_loader_fit_for_the_next(tmp_path):
    """Breaking off and starting again never mixes up pictures."""
    paths = folder_of(tmp_path, *[f"{i}.png" for i in range(30)])
    with loader(ahead=6) as decode:
        for _ in range(5):
            running = decode.load(enumerate(paths))
            next(running)
            running.close()
        check(list(decode.load(enumerate(paths))), paths, {})


def test_one_load_at_a_time_and_none_after_closing(tmp_path):
    """Misuse is named, not answered with somebody else's pixels."""
    paths = folder_of(tmp_path, "a.png")
    decode = loader()
    running = decode.load(enumerate(paths * 3))
    next(running)
    with pytest.raises(UsageError, match="loading"):
        next(decode.load(enumerate(paths)))
    running.close()
    decode.close()
    decode.close()
    with pytest.raises(UsageError, match="closed"):
        next(decode.load(enumerate(paths)))


@pytest.mark.parametrize("options", [{"workers": 0}, {"ahead": 0}, {"timeout_s": 0}])
def test_settings_that_mean_nothing_are_refused(options):
    """At once, not in a worker."""
    with pytest.raises(UsageError):
        loader(**options)
    with pytest.raises(UsageError):
        loader(preprocessing=Preprocessing(size=16, fit="stretch"))


def test_workers_start_when_needed_and_stay(tmp_path):
    """None before the first picture, one for one picture, the same ones for the next load, none after."""
    paths = folder_of(tmp_path, "a.png", "b.png", "c.png")
    with loader() as decode:
        assert decode.worker_pids == ()
        list(decode.load(enumerate(paths[:1])))
        first = decode.worker_pids
        assert len(first) == 1
        list(decode.load(enumerate(paths)))
        assert set(first) <= set(decode.worker_pids)
        pids = decode.worker_pids
    assert not any(alive(pid) for pid in pids)


def test_no_requests_no_workers():
    """An empty list is an empty answer."""
    with loader() as decode:
        assert list(decode.load([])) == []
        assert decode.worker_pids == ()


def test_a_worker_that_cannot_start_is_one_clear_error(tmp_path):
    """Not an endless row of restarts; the reason is in the message."""
    paths = folder_of(tmp_path, "a.png")
    with loader(worker="stillborn_worker") as decode, pytest.raises(ResourceError, match="no decoder here"):
        list(decode.load(enumerate(paths)))


def test_workers_import_nothing_heavy():
    """A worker starts in a fraction of a second: no torch, no faiss, not even the rest of mmsearch."""
    code = f"import sys; sys.path[:] = {sys.path!r}; import mmsearch.data.worker; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert not loaded & {"torch", "faiss", "transformers", "onnxruntime", "sqlite3", "asyncio", "mmsearch.store"}


PARENT = """
    import sys, itertools, signal
    signal.alarm(60)  # whatever becomes of the test, this ends
    sys.path[:] = {path!r}
    from mmsearch.data.loading import Loader
    from mmsearch.types import Preprocessing
    decode = Loader(preprocessing=Preprocessing(size=16), workers=2, timeout_s={timeout}, worker="nasty_worker")
    running = decode.load((i, {picture!r}) for i in itertools.count())
    {first}
    print(*decode.worker_pids, flush=True)
    for _ in running: {each}
"""


def parent(picture: str, *, timeout: float = 20, first: str = "next(running)", each: str = "pass", **options):
    code = PARENT.format(path=sys.path, picture=picture, timeout=timeout, first=first, each=each)
    code = textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **options)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """SIGKILL of the parent: no worker survives it."""
    process = parent(folder_of(tmp_path, "a.png")[0])
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    assert eventually(lambda: not any(alive(pid) for pid in pids))


def test_even_a_hanging_worker_ends_after_its_parent_was_killed(tmp_path):
    """No orphan spins on: its alarm clock is the kernel's, not the parent's."""
    hang = folder_of(tmp_path, "hang.png")[0]
    process = parent(hang, timeout=2, first=f"decode._crew.ask({hang!r}); decode._crew.gather(1)")
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    assert pids
    assert eventually(lambda: not any(alive(pid) for pid in pids))


def test_ctrl_c_ends_parent_and_workers_quietly(tmp_path):
    """Workers ignore the interrupt and end with their parent; they print nothing of their own."""
    ready = "while not all(w.ready for w in decode._crew._workers): decode._crew.gather(0.1)"
    first = f"next(running)\n    {ready}"
    options = {"stderr": subprocess.PIPE, "start_new_session": True, "first": first}
    process = parent(folder_of(tmp_path, "a.png")[0], **options)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert all(alive(pid) for pid in pids)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert said.count("KeyboardInterrupt") == 1
    assert eventually(lambda: not any(alive(pid) for pid in pids))


def test_libraries_that_print_are_not_heard(tmp_path, capfd):
    """What C code and Pillow say about broken files reaches no terminal, and much of it clogs no pipe."""
    paths = folder_of(tmp_path, "loud.png", "loud2.png")
    with loader() as decode:
        check(list(decode.load(enumerate(paths))), paths, {})
    assert capfd.readouterr() == ("", "")


def test_nothing_is_left_open(tmp_path):
    """Loaders come and go: no descriptor of theirs stays, also after crashes and timeouts."""
    paths = folder_of(tmp_path, "a.png", "segv.png", "hang.png")
    gc.collect()  # what earlier tests dropped is closed now, not between two counts
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with loader(timeout_s=0.3) as decode:
            list(decode.load(enumerate(paths)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pixel_array_stays_what_it_was(tmp_path):
    """Slots are used again; what was handed out is the caller's own, writable."""
    paths = folder_of(tmp_path, *[f"{i}.png" for i in range(20)])
    with loader(ahead=4) as decode:
        results = list(decode.load(enumerate(paths)))
    check(results, paths, {})
    assert all(r.pixels.flags.writeable and r.pixels.shape == (16, 16, 3) for r in results)


def test_big_jpegs_arrive_scaled_and_with_their_true_size(tmp_path):
    """Workers decode at reduced scale; `info` is about the picture, not about the decoding."""
    path = tmp_path / "big.jpg"
    path.write_bytes(jpeg(photo(1600, 1200)))
    with Loader(preprocessing=Preprocessing(size=64), workers=1) as decode:
        (result,) = decode.load([(5, str(path))])
    assert (result.key, result.info.width, result.info.height) == (5, 1600, 1200)
    full = prepare(photo(1600, 1200), Preprocessing(size=64)).astype(int)
    assert np.abs(result.pixels - full).mean() < 2
