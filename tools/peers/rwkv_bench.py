#!/usr/bin/env python3
"""Compares the speed of pricket with the `rwkv` package on RWKV-4 on the CPU: random weights, alternating runs, median of the ratios.

    cargo build --examples
    python3 tools/peers/rwkv_bench.py --examples target/debug/examples --shapes 169m,430m

Needs rwkv (0.8) and torch. Both compute in f32 with f32 weights, the package with its strategy `cpu fp32`.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time

SHAPES = {"169m": (12, 768), "430m": (24, 1024), "1b5": (24, 2048)}
VOCAB = 50277


def peer(args, path):
    os.environ["RWKV_JIT_ON"] = "1"
    import torch
    torch.set_num_threads(args.threads)
    from rwkv.model import RWKV
    model = RWKV(model=path, strategy="cpu fp32", verbose=False)
    ids = [i * 7919 % VOCAB for i in range(args.prefill)]
    model.forward(ids[:8], None)
    start = time.perf_counter()
    out, state = model.forward(ids, None)
    prefill = args.prefill / (time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(args.new_tokens):
        out, state = model.forward([int(out.argmax())], state)
    print(json.dumps({"prefill": prefill, "decode": args.new_tokens / (time.perf_counter() - start)}))


def weights(path, layers, d):
    """Writes a checkpoint with the original tensor names."""
    import torch
    torch.manual_seed(0)
    normal = lambda *shape: torch.randn(shape) / shape[-1] ** 0.5
    out = {"emb.weight": normal(VOCAB, d), "head.weight": normal(VOCAB, d)}
    norm = lambda name: out.update({f"{name}.weight": torch.ones(d), f"{name}.bias": torch.zeros(d)})
    norm("blocks.0.ln0"), norm("ln_out")
    for i in range(layers):
        b = f"blocks.{i}"
        norm(f"{b}.ln1"), norm(f"{b}.ln2")
        out |= {f"{b}.att.time_decay": torch.rand(d) * 8 - 5, f"{b}.att.time_first": torch.randn(d)}
        out |= {f"{b}.att.time_mix_{x}": torch.rand(1, 1, d) for x in "kvr"} | {f"{b}.ffn.time_mix_{x}": torch.rand(1, 1, d) for x in "kr"}
        out |= {f"{b}.att.{x}.weight": normal(d, d) for x in ("key", "value", "receptance", "output")}
        out |= {f"{b}.ffn.key.weight": normal(4 * d, d), f"{b}.ffn.receptance.weight": normal(d, d), f"{b}.ffn.value.weight": normal(d, 4 * d)}
    torch.save(out, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", default="target/debug/examples")
    parser.add_argument("--shapes", default="169m,430m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args, args.peer)
    print("| shape | what | pricket, tok/s | rwkv, tok/s | ratio |\n|---|---|---|---|---|")
    for shape in args.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/rwkv.pth"
            weights(path, *SHAPES[shape])
            ours, theirs = [], []
            for _ in range(args.pairs):
                flags = ["--prefill", str(args.prefill), "--decode", "128", "--new-tokens", str(args.new_tokens), "--runs", "1"]
                done = subprocess.run([f"{args.examples}/bench", "--model", path, "--threads", str(args.threads), *flags, "--json"],
                                      capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
                if done.returncode:
                    sys.exit(done.stderr)
                ours.append({row["what"]: row["tokens_per_second"] for row in json.loads(done.stdout)["rows"]})
                flags = [f"--threads={args.threads}", f"--prefill={args.prefill}", f"--new-tokens={args.new_tokens}"]
                done = subprocess.run([sys.executable, __file__, "--peer", path, *flags], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                theirs.append(json.loads(done.stdout.splitlines()[-1]))
            for what in ("prefill", "decode"):
                ratio = statistics.median(a[what] / b[what] for a, b in zip(ours, theirs))
                print(f"| {shape} f32 | {what} | {max(a[what] for a in ours):.1f} | {max(b[what] for b in theirs):.1f} | {ratio:.2f} |", flush=True)


main()
