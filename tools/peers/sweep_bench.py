"""Measures how much of its download time a sweep hides behind scoring, with random checkpoints on a throttled local server.

    cargo build -p pricket-testhub && cargo build --example sweep --example checkpoints
    python3 tools/peers/sweep_bench.py target/debug

For several bandwidths it prints the time to fetch all checkpoints, the time to score them from the cache, and the time of a sweep
that does both, with its ratio to the longer of the other two. Needs numpy and safetensors.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

STEPS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 10000, 1000)]
LAYERS, WIDTH, HEADS, VOCAB = 6, 256, 8, 50304


def checkpoint(path, tiny, seed):
    path.mkdir(parents=True)
    config = json.loads((tiny / "config.json").read_text())
    config |= {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCAB}
    config |= {"intermediate_size": 4 * WIDTH, "max_position_embeddings": 2048, "tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny / "tokenizer.json", path)
    random = np.random.default_rng(seed)

    def normal(*shape):
        return (0.02 * random.standard_normal(shape, dtype=np.float32)).astype(np.float16)

    tensors = {"gpt_neox.embed_in.weight": normal(VOCAB, WIDTH), "embed_out.weight": normal(VOCAB, WIDTH)}
    norms = ["gpt_neox.final_layer_norm"]
    for i in range(LAYERS):
        layer = f"gpt_neox.layers.{i}"
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        shapes = {"attention.query_key_value": (3 * WIDTH, WIDTH), "attention.dense": (WIDTH, WIDTH)}
        shapes |= {"mlp.dense_h_to_4h": (4 * WIDTH, WIDTH), "mlp.dense_4h_to_h": (WIDTH, 4 * WIDTH)}
        for name, shape in shapes.items():
            tensors |= {f"{layer}.{name}.weight": normal(*shape), f"{layer}.{name}.bias": normal(shape[0])}
    for norm in norms:
        tensors |= {f"{norm}.weight": np.ones(WIDTH, np.float16), f"{norm}.bias": np.zeros(WIDTH, np.float16)}
    save_file(tensors, path / "model.safetensors")
    return (path / "model.safetensors").stat().st_size


def timed(command, env):
    start = time.monotonic()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - start


def main(target):
    target, tiny = Path(target), Path(__file__).parents[2] / "models/tiny"
    with tempfile.TemporaryDirectory(dir=".") as folder:
        folder = Path(folder)
        size = [checkpoint(folder / f"suite/step{step}", tiny, step) for step in STEPS][0]
        shutil.copytree(folder / "suite/step9000", folder / "suite/main")
        text = "In the year of our Lord the Congress met, and the President of the United States spoke of the army. "
        with (folder / "pile.jsonl").open("w") as out:
            for i in range(120):
                out.write(json.dumps({"text": f"{i} {text}" * 3, "slice": "made up"}) + "\n")
        cache = folder / "hub"
        env = os.environ | {"HF_HUB_CACHE": str(cache)}
        steps = ",".join(map(str, STEPS))
        sweep = [target / "examples/sweep", "--models", "bench/suite", "--slices", folder / "pile.jsonl", "--steps", steps]
        print(f"{len(STEPS)} checkpoints of {size / 1e6:.0f} MB", flush=True)
        for rate in [10_000_000, 30_000_000, 60_000_000, 200_000_000]:
            command = [target / "pricket-testhub", f"bench/suite={folder}/suite", "--rate", str(rate)]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                env["HF_ENDPOINT"] = server.stdout.readline().strip()
                shutil.rmtree(cache, ignore_errors=True)
                fetch = timed([target / "examples/checkpoints", "fetch", "bench/suite", "--steps", steps], env)
                score = timed([*sweep, "--no-prefetch", "--out", folder / f"cached-{rate}.jsonl"], env)
                shutil.rmtree(cache, ignore_errors=True)
                both = timed([*sweep, "--out", folder / f"both-{rate}.jsonl"], env)
                ratio = both / max(fetch, score)
                print(f"{rate / 1e6:.0f} MB/s: fetch {fetch:.1f} s, score {score:.1f} s, sweep {both:.1f} s, {ratio:.3f} x", flush=True)
            finally:
                server.kill()


main(*sys.argv[1:])
