"""Encoding on a real Ray cluster: the same index as without, whatever dies on the way.

One head without CPUs and two worker nodes of one CPU each, on this machine; `ColorEncoder` instead of a model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None:
    pytest.skip("ray is not installed: pip install 'mmsearch[ray]'", allow_module_level=True)


from ray.cluster_utils import Cluster
from ray_kit import STORE_BYTES, BucketFileSystem, NotingEncoder, contents, encoded, photos, readers

from mmsearch.builder import SilentProgress, build
from mmsearch.errors import IndexMismatchError
from mmsearch.scale.ray_encode import RayEngine
from mmsearch.scale.ray_session import connect
from mmsearch.scale.shard_files import WorkFolder
from mmsearch.testing import ColorEncoder
from mmsearch.types import SkipReason

pytestmark = pytest.mark.ray
SOON_FOUND_DEAD = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
DRIVER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(HERE)!r}]
from pathlib import Path
from mmsearch.builder import build
from mmsearch.scale.ray_encode import RayEngine
from ray_kit import NotingEncoder
photos, index, notes, address = sys.argv[1:]
encoder = NotingEncoder(Path(notes), seconds=0.3)
build([photos], index, encoder=encoder, batch_size=4, workers=1, engine=RayEngine(address=address, shard_rows=4))
"""


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, joined by this process as driver; tests add the nodes they need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{HERE}")  # nodes run the code of this checkout, and `ray_kit`
        made = Cluster(initialize_head=True, head_node_args=node(0, _system_config=SOON_FOUND_DEAD))
        made.add_node(**node(1))
        with connect(made.address):
            yield made
        made.shutdown()


@pytest.fixture
def second(cluster):
    """One more node of one CPU."""
    added = cluster.add_node(**node(1))
    yield added
    with contextlib.suppress(Exception):
        cluster.remove_node(added)


def node(cpus, **more):
    return {"num_cpus": cpus, "object_store_memory": STORE_BYTES, "include_dashboard": False, **more}


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def on_ray(paths, index, encoder, *, shard_rows=8, progress=None, **engine):
    """A build by the cluster that this process is a driver of."""
    spread = RayEngine(shard_rows=shard_rows, **engine)
    return build(paths, index, encoder=encoder, batch_size=4, workers=1, engine=spread, progress=progress)


def here(paths, index):
    return build(paths, index, encoder=ColorEncoder(), batch_size=4, workers=1)


def mixed(folder: Path, count: int) -> list[Path]:
    """Pictures, one of them broken and some with captions, and a table of texts."""
    photos(folder / "photos", count)
    (folder / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    for number in range(0, count, 3):
        (folder / "photos" / f"{number:04d}.txt").write_text(f"picture {number} is red\nor blue")
    (folder / "texts.csv").write_text("caption\na yellow thing\ngreen\n")
    return [folder / "photos", folder / "texts.csv"]


def counted(report) -> tuple:
    return report.added, report.encoded_images, report.encoded_texts, [(s.path, s.reason) for s in report.skipped]


def test_a_node_that_dies_in_the_middle_changes_nothing(cluster, second, tmp_path, notes):
    """Two nodes encode, one is killed: every item is there once, bit for bit as a build without Ray has it."""
    paths = mixed(tmp_path, 72)
    done_by_then = []

    def kill():
        wait_for(lambda: len(readers(notes)) > 1)
        done_by_then.append(encoded(notes))
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    report = on_ray(paths, tmp_path / "spread", NotingEncoder(notes, seconds=0.15, together=2), shard_rows=4)
    killer.join()
    assert 0 < done_by_then[0] < 72, "the node was killed in the middle"
    assert counted(report) == counted(here(paths, tmp_path / "alone"))
    assert [s.reason for s in report.skipped] == [SkipReason.TRUNCATED]
    assert contents(tmp_path / "spread") == contents(tmp_path / "alone")
    assert not (tmp_path / "spread" / "work").exists(), "what is committed is not kept twice"


def test_a_driver_that_was_killed_goes_on_where_its_shards_end(cluster, tmp_path, notes):
    """No picture that is in a whole shard or in the index is encoded again; damaged shards count for nothing."""
    folder, index = photos(tmp_path / "photos", 64), tmp_path / "index"
    command = [sys.executable, "-c", DRIVER, *map(str, (folder, index, notes, cluster.address))]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: encoded(notes) >= 16 or driver.poll() is not None)
    assert driver.poll() is None
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not any(map(alive, readers(notes))))
    (place,) = (index / "work").iterdir()
    shards = WorkFolder(str(place))
    names = shards.names()
    (place / names[0]).write_bytes((place / names[0]).read_bytes()[:-9])
    whole = sum(len(shards.read(name)) for name in names[1:])
    done = whole + len(contents(index))
    again = tmp_path / "again"
    again.mkdir()
    report = on_ray([folder], index, NotingEncoder(again), shard_rows=4)
    assert len(names) > 1 and 0 < done < 64
    assert encoded(again) == 64 - done
    assert report.added + report.unchanged == 64
    here([folder], tmp_path / "alone")
    assert contents(index) == contents(tmp_path / "alone")


def test_a_second_run_moves_and_copies_without_encoding(cluster, tmp_path, notes):
    """What the driver can settle never reaches a node; Ctrl-C before that keeps what was encoded."""
    folder, index = photos(tmp_path / "photos", 24), tmp_path / "index"

    class Interrupts(SilentProgress):
        def advance(self, n, *, note=""):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_ray([folder], index, NotingEncoder(notes), progress=Interrupts())
    on_ray([folder], index, NotingEncoder(notes))
    before = contents(index)
    assert encoded(notes) == 24 == len(before), "nothing was encoded twice"
    (folder / "0000.png").rename(folder / "moved.png")
    shutil.copy(folder / "0001.png", folder / "copy.png")
    (folder / "0002.txt").write_text("now with words")
    report = on_ray([folder], index, NotingEncoder(notes))
    assert (report.moved, report.added, report.changed, report.encoded_images) == (1, 1, 1, 0)
    assert encoded(notes) == 24
    assert set(before) < set(contents(index))


def test_a_node_with_another_model_is_refused(cluster, tmp_path):
    """Its vectors would look like answers: the build ends, and the message names the node and both models."""
    folder = photos(tmp_path / "photos", 2)
    with pytest.raises(IndexMismatchError, match=r"node .*: expected model colors .*, got model other"):
        on_ray([folder], tmp_path / "index", ColorEncoder(), load=lambda: ColorEncoder(name="other"))


def test_pictures_in_a_bucket_are_listed_by_the_driver_and_fetched_by_the_nodes(cluster, tmp_path, notes):
    """s3://... goes through fsspec on every node; a picture that moved there keeps its id."""
    paths = mixed(tmp_path / "bucket", 10)
    BucketFileSystem.stand_in_for_s3(tmp_path / "bucket")
    encoder = NotingEncoder(notes, bucket=tmp_path / "bucket")
    report = on_ray(["s3://bucket/photos"], tmp_path / "index", encoder, work="s3://bucket/work")
    here(paths[:1], tmp_path / "alone")
    assert (report.added, report.encoded_images, len(report.skipped)) == (10, 10, 1)
    assert rows_by_name(tmp_path / "index") == rows_by_name(tmp_path / "alone")
    before = contents(tmp_path / "index")
    (tmp_path / "bucket" / "photos" / "0003.png").rename(tmp_path / "bucket" / "photos" / "else.png")
    report = on_ray(["s3://bucket/photos"], tmp_path / "index", encoder, work="s3://bucket/work")
    assert (report.moved, report.unchanged, report.removed) == (1, 9, 0)
    assert set(contents(tmp_path / "index")) == set(before)
    assert list((tmp_path / "bucket" / "work").rglob("*.arrow")) == []


def test_gpus_encode_what_cpus_decode(cluster, tmp_path, notes):
    """With GPUs in the cluster decoding is a stage of its own; the index is the same."""
    paths = mixed(tmp_path, 20)
    added = cluster.add_node(**node(1, num_gpus=1))
    try:
        report = on_ray(paths, tmp_path / "spread", NotingEncoder(notes))
    finally:
        cluster.remove_node(added)
    assert counted(report) == counted(here(paths, tmp_path / "alone"))
    assert contents(tmp_path / "spread") == contents(tmp_path / "alone")


def rows_by_name(index: Path) -> dict[str, list]:
    """File name -> captions, size and vectors, whatever place the collection was read from."""
    found = {}
    for (path, captions, _), *rows in contents(index).values():
        found[Path(path).name] = [captions, *rows]
    return found


def wait_for(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
