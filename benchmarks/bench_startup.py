"""Where the time of a cold query goes. Prints one JSON line.

    python benchmarks/bench_startup.py [--model DIR] [--index DIR] [--text TEXT] [--runs 7]

Each run is a fresh interpreter that times itself: import of mmsearch, opening the model (config and checksums),
making the text session, the first text, the second text. Medians over the runs, in milliseconds; `process` is
the whole interpreter from outside. With --index, `query` is the wall time of the whole `mmsearch query`.
`heavy` lists what should not have been imported.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

HEAVY = ("torch", "transformers", "torchvision", "timm", "sklearn", "scipy", "PIL", "faiss")
PROBE = """
import json, sys, time
marks = [time.perf_counter()]
mark = lambda: marks.append(time.perf_counter())
from mmsearch.encoder import Encoder
mark()
from pathlib import Path
model, text = sys.argv[1:3]
encoder = Encoder.load(Path(model) if model else None, threads=1)
mark()
import onnxruntime
mark()
encoder.encode_texts([text])
mark()
encoder.encode_texts([text])
mark()
names = ("import_mmsearch", "open_model", "import_onnxruntime", "session_and_first_text", "second_text")
times = {name: (b - a) * 1e3 for name, a, b in zip(names, marks, marks[1:])}
print(json.dumps({"times": times, "modules": sorted(m for m in sys.modules if "." not in m)}))
"""


def wall_ms(command):
    """Wall time of one command in milliseconds, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return (time.perf_counter() - start) * 1e3, done.stdout


def medians(samples):
    return {name: round(statistics.median(sample[name] for sample in samples), 1) for name in samples[0]}


def probe(model, text, runs):
    samples, modules = [], set()
    for _ in range(runs):
        process, out = wall_ms([sys.executable, "-c", PROBE, model, text])
        found = json.loads(out)
        samples.append({**found["times"], "process": process})
        modules |= set(found["modules"])
    return {**medians(samples), "heavy": sorted(modules & set(HEAVY))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a model directory; the bundled model without it")
    parser.add_argument("--index", help="an index directory: also time the whole command")
    parser.add_argument("--text", default="a dog on a beach")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    wall_ms([sys.executable, "-c", PROBE, options.model, options.text])  # fills the file cache
    result = {"bench": "startup", "unit": "ms", **probe(options.model, options.text, options.runs)}
    result["bare_python"] = medians([{"p": wall_ms([sys.executable, "-c", "0"])[0]} for _ in range(options.runs)])["p"]
    if options.index:
        command = [sys.executable, "-m", "mmsearch", "query", options.text, "--index", options.index]
        wall_ms(command)
        result["query"] = medians([{"query": wall_ms(command)[0]} for _ in range(options.runs)])["query"]
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps({**result, "runs": options.runs, "machine": machine}))


if __name__ == "__main__":
    main()
