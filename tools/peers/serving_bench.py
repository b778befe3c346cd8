#!/usr/bin/env python3
"""Compares the batching engine with llama.cpp on the CPU: requests with prompts of 64 to 512 tokens and 64 new tokens each, all there
from the start.

    pip install llama-cpp-python numpy
    cargo build --release --example bench --example quantize
    python3 tools/peers/serving_bench.py --examples target/release/examples --shape 160m --type q8_0 --slots 8,64

llama.cpp runs the loop of its server over its C interface: in each step every running sequence gets its next token, and the rest of the
512 tokens of the step are parts of prompts. Both programs read the same GGUF file of random weights, with 8-bit activations, on
the same number of threads, in alternating pairs. A ratio above 1 means that pricket is faster. `fixed` is pricket without joining:
one batch of as many requests as there are slots after the other.
"""
import argparse, json, statistics, subprocess, sys, tempfile

LLAMA = r"""
import ctypes, json, sys, time
import llama_cpp as L, numpy as np
path, threads, slots, lengths, new, step, unified = json.loads(sys.argv[1])
@L.llama_log_callback
def quiet(level, text, data): pass
L.llama_log_set(quiet, ctypes.c_void_p(0))
L.llama_backend_init()
model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
p = L.llama_context_default_params()
p.n_ctx, p.n_batch, p.n_ubatch, p.n_threads, p.n_threads_batch = slots * (max(lengths) + new), step, step, threads, threads
p.n_seq_max, p.kv_unified = slots, unified
ctx = L.llama_init_from_model(model, p)
memory = L.llama_get_memory(ctx)
vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
batch = L.llama_batch_init(step, 0, 1)
rng = np.random.default_rng(1)
waiting = [rng.integers(0, vocab, n).tolist() for n in lengths]
rows, free, done = {}, list(range(slots)), 0
def run():
    global done
    batch.n_tokens = 0; ends = []
    def put(token, at, seq, last):
        i = batch.n_tokens
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, at, 1, last
        batch.seq_id[i][0] = seq; batch.n_tokens += 1
        if last: ends.append((seq, i))
    for seq, row in rows.items():
        if row["read"] == len(row["ids"]) - 1 and row["new"]: put(row["ids"][-1], row["read"], seq, True); row["read"] += 1
    while True:
        for seq, row in rows.items():
            while not row["new"] and row["read"] < len(row["ids"]) and batch.n_tokens < step:
                put(row["ids"][row["read"]], row["read"], seq, row["read"] + 1 == len(row["ids"])); row["read"] += 1
        if not (waiting and free and batch.n_tokens < step): break
        rows[free.pop(0)] = {"ids": waiting.pop(0), "read": 0, "new": 0}
    assert L.llama_decode(ctx, batch) == 0
    for seq, i in ends:
        row = rows[seq]
        row["ids"].append(int(np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, i), shape=(vocab,)).argmax())); row["new"] += 1
        if row["new"] == new:
            L.llama_memory_seq_rm(memory, seq, -1, -1); del rows[seq]; free.append(seq); done += 1
start = time.time()
while rows or waiting: run()
seconds = time.time() - start
assert done == len(lengths)
print(json.dumps((sum(lengths) + done * new) / seconds))
"""


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--examples", default="target/release/examples")
    p.add_argument("--shape", default="160m")
    p.add_argument("--type", default="q8_0")
    p.add_argument("--tokenizer", default="models/tiny/tokenizer.json")
    p.add_argument("--slots", default="8,64")
    p.add_argument("--requests", type=int, default=64)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--pairs", type=int, default=3)
    a = p.parse_args()
    # The lengths of `bench --requests`.
    lengths = [64 + i * 7919 % a.requests * (512 - 64) // (a.requests - 1) for i in range(a.requests)]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.gguf"
        subprocess.run([f"{a.examples}/quantize", "--shape", a.shape, "--tokenizer", a.tokenizer, "--out", path, "--quantize", a.type,
                        "--quantize-embeddings-and-head", a.type], check=True, capture_output=True)

        def pricket(slots, *more):
            command = [f"{a.examples}/bench", "--model", path, "--activations", "q8", "--threads", str(a.threads), "--requests", str(a.requests),
                       "--new-tokens", str(a.new_tokens), "--slots", str(slots), "--runs", "1", "--prefill", "9999", "--decode", "9999", "--json", *more]
            out = subprocess.run(command, capture_output=True, text=True)
            if out.returncode: raise SystemExit(out.stderr)
            return json.loads(out.stdout)["serving"]["tokens_per_second"]

        def llama(slots, unified):
            command = [sys.executable, "-c", LLAMA, json.dumps([path, a.threads, slots, lengths, a.new_tokens, 512, unified])]
            out = subprocess.run(command, capture_output=True, text=True)
            if out.returncode: raise SystemExit(out.stderr[-2000:])
            return json.loads(out.stdout)

        for slots in map(int, a.slots.split(",")):
            # One cache for all sequences, or one for each: whichever is faster counts.
            both = lambda: max(llama(slots, True), llama(slots, False))
            rows = [(pricket(slots), both(), pricket(slots, "--fixed-batches")) for _ in range(a.pairs)]
            middle = lambda i: statistics.median(row[i] for row in rows)
            ratio = lambda i: statistics.median(row[0] / row[i] for row in rows)
            print(f"{a.shape} {a.type}, {slots} slots: pricket {middle(0):.0f} tokens/s, llama.cpp {middle(1):.0f} (ratio {ratio(1):.2f}), "
                  f"fixed batches {middle(2):.0f} (ratio {ratio(2):.2f})", flush=True)


main()
