"""Imports and exports hold a few blocks in memory, whatever the size of a source."""

import subprocess
import sys

import numpy as np

CODE = """
import re, sys
import faiss, pyarrow.parquet  # what they take is not what is measured
from mmsearch.exchange import base, export_vectors, import_vectors, importing
base.BLOCK_BYTES = 1 << 21
importing._derive = lambda store, *rest: store.finish()  # tuning an index is somebody else's memory
import_vectors(sys.argv[1], sys.argv[2])
for format in ("npy", "faiss", "parquet"):
    export_vectors(sys.argv[2], f"{sys.argv[2]}-{format}", format=format)
import_vectors(f"{sys.argv[2]}-parquet", f"{sys.argv[2]}-again")
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024)  # not its parent's, too
"""


def test_many_times_the_rows_take_the_same_memory(tmp_path):
    """What a large source needs beyond a small one is far less than its vectors are."""
    peaks = []
    for n in (2_000, 16_000):
        source = tmp_path / f"{n}.npy"
        np.save(source, np.random.default_rng(0).standard_normal((n, 512)).astype(np.float16))
        run = [sys.executable, "-c", CODE, str(source), str(tmp_path / str(n))]
        peaks.append(int(subprocess.run(run, check=True, capture_output=True, text=True).stdout))
    megabytes = 16_000 * 512 * 4 / 1e6
    assert peaks[1] - peaks[0] < megabytes / 3, f"{peaks} MiB at their highest, {megabytes:.0f} MB of vectors"
