#!/usr/bin/env python3
"""Compares the LoRA training speed of pricket with PEFT, with random weights of one shape and alternating runs on one machine.

    cargo build --release --example bench
    python3 tools/peers/train_bench.py --bench target/release/examples/bench --shapes 160m,410m

Needs torch, transformers and peft. Both train rank 16 on all linear layers with AdamW in f32, with gradient checkpointing. A row
gives the tokens a second of both and their ratio.
"""
import argparse, json, statistics, subprocess, sys, time

SHAPES = {  # hidden, layers, heads
    "70m": (512, 6, 8), "160m": (768, 12, 12), "410m": (1024, 24, 16), "1.4b": (2048, 24, 16),
}


def torch_rate(args, shape):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    d, layers, heads = SHAPES[shape]
    config = GPTNeoXConfig(hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * d,
                           vocab_size=50304, max_position_embeddings=2048, rotary_pct=0.25, hidden_act="gelu")
    model = GPTNeoXForCausalLM(config).float().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows, tokens = args.rows, args.tokens
    ids = torch.tensor([[(i + 31 * row) * 7919 % 50304 for i in range(tokens)] for row in range(rows)])
    labels = ids.clone()
    labels[:, :int(tokens * args.masked)] = -100
    best = float("inf")
    for step in range(1 + args.runs):
        start = time.perf_counter()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step:
            best = min(best, time.perf_counter() - start)
    print(json.dumps({"rate": rows * tokens / best}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", help="path of the built example `bench`")
    parser.add_argument("--shapes", default="160m,410m")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--masked", type=float, default=0.0, help="share of the labels that is masked, 0 to 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2, help="timed steps of a run; the fastest counts")
    parser.add_argument("--pairs", type=int, default=2, help="alternating runs of both programs")
    parser.add_argument("--torch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch:
        return torch_rate(args, args.torch)
    print(f"| shape | pricket tokens/s | peft tokens/s | ratio | {args.rows} x {args.tokens}, {args.masked:.0%} masked |\n|---|---|---|---|---|")
    for shape in args.shapes.split(","):
        ours, theirs = [], []
        for _ in range(args.pairs):
            done = subprocess.run([args.bench, "--shape", shape, "--dtype", "f32", "--threads", str(args.threads), "--prefill", "4096",
                                   "--decode", "4096", "--train", f"{args.rows}x{args.tokens}", "--masked-fraction", str(args.masked),
                                   "--runs", str(args.runs), "--json"], capture_output=True, text=True, check=True)
            rows = json.loads(done.stdout)["rows"]
            ours.append(next(row["tokens_per_second"] for row in rows if row["what"] == "train"))
            flags = [f"--{key}={getattr(args, key)}" for key in ("rows", "tokens", "masked", "threads", "runs")]
            done = subprocess.run([sys.executable, __file__, "--torch", shape, *flags], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            theirs.append(json.loads(done.stdout.splitlines()[-1])["rate"])
        ratio = statistics.median(a / b for a, b in zip(ours, theirs))
        print(f"| {shape} | {max(ours):.0f} | {max(theirs):.0f} | {ratio:.2f} | |", flush=True)


main()
