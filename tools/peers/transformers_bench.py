#!/usr/bin/env python3
"""Compares the speed of pricket with transformers on one random checkpoint: alternating runs, medians and ratios.

    pip install torch transformers safetensors numpy
    cargo build --release --example bench
    python3 tools/peers/transformers_bench.py --bench target/release/examples/bench --shapes 160m,1.4b --dtypes f16,f32
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time

SHAPES = {  # layers, width, heads
    "70m": (6, 512, 8), "160m": (12, 768, 12), "410m": (24, 1024, 16), "1b": (16, 2048, 8), "1.4b": (24, 2048, 16),
    "2.8b": (32, 2560, 32), "6.9b": (32, 4096, 32),
}

CHILD = r"""
import json, sys, time, torch
from transformers import AutoModelForCausalLM
path, dtype, threads, prefill, decode, new, device = json.loads(sys.argv[1])
torch.set_num_threads(threads)
def now():
    if device != "cpu": torch.cuda.synchronize()
    return time.time()
start = now()
model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval().to(device)
load = now() - start
vocab = model.config.vocab_size
prompt = lambda n: torch.tensor([[i * 7919 % vocab for i in range(n)]], device=device)
out = {"load": load, "prefill": {}, "decode": {}}
with torch.inference_mode():
    model(prompt(8))
    for n in prefill:
        ids = prompt(n)
        if device != "cpu": model(ids, logits_to_keep=1, use_cache=True)
        start = now(); model(ids, logits_to_keep=1, use_cache=True); out["prefill"][n] = n / (now() - start)
    for n in decode:
        step = model(prompt(n), logits_to_keep=1, use_cache=True)
        start = now()
        for _ in range(new - 1):
            step = model(step.logits[:, -1].argmax(-1, keepdim=True), past_key_values=step.past_key_values, use_cache=True)
            # Streaming needs every token on the host.
            step.logits[0, -1].argmax().item()
        out["decode"][n] = (new - 1) / (now() - start)
print(json.dumps(out))
"""


def write_checkpoint(path, shape, dtype, device):
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    layers, d, heads = SHAPES[shape]
    config = GPTNeoXConfig(vocab_size=50304, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
                           intermediate_size=4 * d, max_position_embeddings=2048)
    torch.manual_seed(0)
    with torch.device(device):
        model = GPTNeoXForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(path, max_shard_size="100GB")
    # The child processes measure on the same GPU.
    del model
    if device != "cpu":
        torch.cuda.empty_cache()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bench", required=True, help="path of the built example `bench`")
    p.add_argument("--shapes", default="160m,1.4b")
    p.add_argument("--dtypes", default="f16,f32")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--pairs", type=int, default=3, help="alternating runs of both programs")
    p.add_argument("--prefill", default="128,512")
    p.add_argument("--decode", default="128")
    p.add_argument("--new-tokens", type=int, default=32)
    a = p.parse_args()
    names = {"f16": "float16", "f32": "float32", "bf16": "bfloat16"}
    prefill, decode = ([int(n) for n in v.split(",")] for v in (a.prefill, a.decode))
    print("| model | what | pricket | transformers | ratio |\n|---|---|---|---|---|")
    for shape in a.shapes.split(","):
        for dtype in a.dtypes.split(","):
            with tempfile.TemporaryDirectory() as path:
                write_checkpoint(path, shape, names[dtype], a.device)
                rows = {}
                for _ in range(a.pairs):
                    ours = json.loads(subprocess.run(
                        [a.bench, "--model", path, "--device", a.device, "--dtype", "auto" if a.device == "cpu" else dtype,
                         "--threads", str(a.threads), "--prefill", a.prefill, "--decode", a.decode,
                         "--new-tokens", str(a.new_tokens), "--runs", "1" if a.device == "cpu" else "3", "--json"], check=True, capture_output=True, text=True).stdout)
                    args = json.dumps([path, names[dtype], a.threads, prefill, decode, a.new_tokens, a.device])
                    theirs = json.loads(subprocess.run([sys.executable, "-c", CHILD, args], check=True, capture_output=True, text=True).stdout)
                    rows.setdefault("load, s", []).append((ours["load_seconds"], theirs["load"]))
                    for row in ours["rows"]:
                        key = f"{row['what']} {row['prompt']}, tok/s"
                        rows.setdefault(key, []).append((row["tokens_per_second"], theirs[row["what"]][str(row["prompt"])]))
                for what, pairs in rows.items():
                    ours, theirs = (statistics.median(v) for v in zip(*pairs))
                    ratio = statistics.median(t / o if what.startswith("load") else o / t for o, t in pairs)
                    print(f"| {shape} {dtype} | {what} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} x |", flush=True)


main()
