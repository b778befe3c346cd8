"""Compares the download speed of pricket and huggingface_hub: 2 GB from a server on this machine, in turns.

    cargo build --release -p pricket-testhub && cargo build --release -p pricket-hub --example fetch
    python3 tools/peers/hub_bench.py target/release

Needs huggingface_hub. Both programs write to a cache on the same disk. pricket also hashes every file. A ratio above 1 means that
pricket is faster.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOS = {"bench/one": "1x2000000000", "bench/eight": "8x250000000"}
RUNS = 3
PYTHON = "import sys; from huggingface_hub import snapshot_download; snapshot_download(sys.argv[1])"


def timed(command, env, cache):
    shutil.rmtree(cache, ignore_errors=True)
    start = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.monotonic() - start, usage.ru_maxrss / 1024


def main(target):
    target = Path(target)
    arguments = [word for repo, what in REPOS.items() for word in ("--random", f"{repo}={what}")]
    server = subprocess.Popen([target / "pricket-testhub", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        endpoint = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory(dir=".") as cache:
            env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": cache + "/hub", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            for repo in REPOS:
                rows = []
                for _ in range(RUNS):
                    theirs = timed([sys.executable, "-c", PYTHON, repo], env, cache + "/hub")
                    ours = timed([target / "examples/fetch", repo], env, cache + "/hub")
                    rows.append((theirs[0], ours[0], theirs[1], ours[1]))
                    print(f"{repo}: python {theirs[0]:.2f} s, pricket {ours[0]:.2f} s, {theirs[0] / ours[0]:.2f} x", flush=True)
                ratio = statistics.median(theirs / ours for theirs, ours, _, _ in rows)
                peak = [max(row[i] for row in rows) for i in (2, 3)]
                print(f"{repo}: median {ratio:.2f} x; peak memory {peak[0]:.0f} MB and {peak[1]:.0f} MB")
    finally:
        server.kill()


main(*sys.argv[1:])
