#!/usr/bin/env python3
"""Compares the speed of pricket with llama.cpp and PyTorch on the CPU, with random weights of published shapes.

    pip install llama-cpp-python torch numpy
    cargo build --release --example bench --example quantize
    python3 tools/peers/cpu_bench.py --examples target/release/examples --shapes 160m,1.4b --types q4_0,q8_0,q5_1,f16

For each shape and type, `quantize --shape` writes a GGUF file that both programs read. Rows against llama.cpp use `--activations
q8`, as llama.cpp does (f32 for f16). Rows against torch (--torch) use bf16 activations for bf16 weights. Each row also gives the
speed with f32 activations.

A ratio above 1 means that pricket is faster. Every row is the median of --pairs alternating pairs. Each process times itself, after
a warm-up.
"""
import argparse, json, os, shlex, statistics, subprocess, sys, tempfile

LLAMA = r"""
import ctypes, json, sys, time
import llama_cpp as L, numpy as np
path, threads, prefill, decode, new = json.loads(sys.argv[1])
@L.llama_log_callback
def quiet(level, text, data): pass
L.llama_log_set(quiet, ctypes.c_void_p(0))
L.llama_backend_init()
model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
p = L.llama_context_default_params()
p.n_ctx, p.n_batch, p.n_ubatch, p.n_threads, p.n_threads_batch = 2048, 2048, 512, threads, threads
ctx = L.llama_init_from_model(model, p)
vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
prompt = lambda n: [i * 7919 % vocab for i in range(n)]
def run(ids):
    tokens = (L.llama_token * len(ids))(*ids)  # the batch holds only a pointer
    assert L.llama_decode(ctx, L.llama_batch_get_one(tokens, len(ids))) == 0
    return int(np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, -1), shape=(vocab,)).argmax())
def clear(): L.llama_memory_clear(L.llama_get_memory(ctx), True)
run(prompt(8)); out = {}
for n in prefill:
    clear(); start = time.time(); run(prompt(n)); out[f"prefill {n}"] = n / (time.time() - start)
for n in decode:
    clear(); token = run(prompt(n)); start = time.time()
    for _ in range(new - 1): token = run([token])
    out[f"decode {n}"] = (new - 1) / (time.time() - start)
print(json.dumps(out))
"""

# A plain GPT-NeoX. It computes the same as the class of transformers, without the work that transformers does between the operations.
TORCH = r"""
import json, sys, time, torch
from torch import nn
from torch.nn import functional as F
(layers, d, heads), dtype, threads, prefill, decode, new = json.loads(sys.argv[1])
dtype, vocab, rotated = getattr(torch, dtype), 50304, d // heads // 4
torch.set_num_threads(threads); torch.manual_seed(0)
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out, self.up, self.down = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
    def forward(self, x, cos, sin, past):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, t, heads, -1).transpose(1, 2).chunk(3, -1)
        def turn(y):
            a, rest = y[..., :rotated], y[..., rotated:]
            half = torch.cat((-a[..., rotated // 2:], a[..., :rotated // 2]), -1)
            return torch.cat((a * cos + half * sin, rest), -1)
        q, k = turn(q), turn(k)
        if past is not None: k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1).transpose(1, 2).reshape(b, t, d)
        return x + self.out(a) + self.down(F.gelu(self.up(self.norm_2(x)))), (k, v)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(vocab, d), nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
    def forward(self, ids, past=None):
        start, t = (past[0][0].shape[2] if past else 0), ids.shape[1]
        angles = torch.outer(torch.arange(start, start + t).float(), 10000 ** (-torch.arange(0, rotated, 2).float() / rotated))
        angles = torch.cat((angles, angles), -1)
        cos, sin, x, kept = angles.cos().to(dtype), angles.sin().to(dtype), self.embed(ids), []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, cos, sin, past[i] if past else None)
            kept.append(cache)
        return self.head(self.norm(x[:, -1:])), kept
with torch.inference_mode():
    model = Model().to(dtype); prompt = lambda n: torch.tensor([[i * 7919 % vocab for i in range(n)]])
    model(prompt(64)); out = {}
    for n in prefill:
        start = time.time(); model(prompt(n)); out[f"prefill {n}"] = n / (time.time() - start)
    for n in decode:
        logits, past = model(prompt(n)); start = time.time()
        for _ in range(new - 1): logits, past = model(logits[:, -1].argmax(-1, keepdim=True), past)
        out[f"decode {n}"] = (new - 1) / (time.time() - start)
print(json.dumps(out))
"""

SHAPES = {"160m": (12, 768, 12), "410m": (24, 1024, 16), "1b": (16, 2048, 8), "1.4b": (24, 2048, 16)}


# Speed of the peers on two cores of the Sapphire Rapids server on which the targets of docs/performance.md were set: prefill of 512
# tokens and decoding, in tokens a second. A row counts only if the peer reaches 0.9 of it.
SEEN = {("llama", "160m", "f16"): (396, 36), ("llama", "160m", "q4_0"): (527, 110), ("llama", "160m", "q8_0"): (308, 61),
        ("llama", "1.4b", "f16"): (35, 5.1), ("llama", "1.4b", "q4_0"): (56, 12.5), ("llama", "1.4b", "q5_1"): (12, 8.2),
        ("llama", "1.4b", "q8_0"): (25, 7.8), ("torch", "160m", "f32"): (713, 19), ("torch", "160m", "bf16"): (1370, 23),
        ("torch", "1.4b", "bf16"): (163, 4.3)}


def main():
    if sys.argv[1:2] == ["--peer"]:  # the command line that is printed for each row: --peer llama|torch ARGUMENTS
        sys.argv = sys.argv[2:]
        return exec({"llama": LLAMA, "torch": TORCH}[sys.argv[0]], {})
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--examples", default="target/release/examples", help="directory of the built examples")
    p.add_argument("--shapes", default="160m,1.4b")
    p.add_argument("--types", default="q4_0,q8_0,q5_1,f16", help="types of the files for llama.cpp; an empty string skips llama.cpp")
    p.add_argument("--torch", default="", help="types of the torch models to compare with: f32,bf16")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--pairs", type=int, default=5, help="alternating runs of both programs")
    p.add_argument("--prefill", default="512", help="prompt lengths to read, in tokens")
    p.add_argument("--decode", default="128", help="prompt lengths before decoding, in tokens")
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--tokenizer", default="models/tiny/tokenizer.json")
    a = p.parse_args()
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    prefill, decode = numbers(a.prefill), numbers(a.decode)

    def ours(activations, *model):
        command = [f"{a.examples}/bench", *model, "--threads", str(a.threads), "--prefill", a.prefill, "--decode", a.decode,
                   "--new-tokens", str(a.new_tokens), "--runs", "1", "--activations", activations, "--json"]
        out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        figures = {f"{row['what']} {row['prompt']}": row["tokens_per_second"] for row in out["rows"]}
        shares = {f"{row['what']} {row['prompt']}": row["share_of_bandwidth"] for row in out["rows"]}
        return figures, shares

    def theirs(peer, *args):
        command = ["python3", "tools/peers/cpu_bench.py", "--peer", peer, json.dumps(args)]
        run = subprocess.run([sys.executable, __file__, *command[2:]], check=True, capture_output=True, text=True)
        return json.loads(run.stdout.splitlines()[-1]), shlex.join(command)

    def compare(name, key, activations, model, peer):
        runs = []
        for _ in range(a.pairs):
            figures, command = peer()
            runs.append((ours(activations, *model), figures, ours("f32", *model)[0] if activations != "f32" else None))
        for what in runs[0][1]:
            middle = lambda values: statistics.median(values)
            ratios = [run[0][0][what] / run[1][what] for run in runs]
            own, other = middle(r[0][0][what] for r in runs), middle(r[1][what] for r in runs)
            exact = middle(r[2][what] for r in runs) if runs[0][2] else own
            share = middle(r[0][1][what] or 0 for r in runs)
            share = f"{100 * share:.0f} %" if share else ""
            seen = SEEN.get(key, (0, 0))[0 if what == "prefill 512" else 1] if what in ("prefill 512", "decode 128") else 0
            reached = f"{other / seen:.1f}" if seen else ""
            print(f"| {name} | {what} | {activations} | {own:.1f} | {exact:.1f} | {other:.1f} | {middle(ratios):.2f} x | {share} | {reached} |", flush=True)
        commands.append(f"{name}: {command}")

    commands = []
    print("| shape, type, peer | tokens | activations | pricket, tok/s | under f32 | peer | ratio | bandwidth | peer, relative |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in a.shapes.split(","):
        for kind in filter(None, a.types.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                path = f"{folder}/m.gguf"
                blocks = ["--quantize", kind, "--quantize-tables", kind] if kind not in ("f16", "f32", "bf16") else ["--dtype", kind]
                subprocess.run([f"{a.examples}/quantize", "--shape", shape, "--tokenizer", a.tokenizer, "--out", path, *blocks],
                               check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                activations = "f32" if kind in ("f16", "f32") else "q8"
                compare(f"{shape} {kind}, llama.cpp", ("llama", shape, kind), activations, ["--model", path],
                        lambda: theirs("llama", path, a.threads, prefill, decode, a.new_tokens))
        for kind in filter(None, a.torch.split(",")):
            dtype = {"f32": "float32", "bf16": "bfloat16"}[kind]
            compare(f"{shape} {kind}, torch", ("torch", shape, kind), kind, ["--shape", shape, "--dtype", kind],
                    lambda: theirs("torch", SHAPES[shape], dtype, a.threads, prefill, decode, a.new_tokens))

    print("\nThe peers' command lines:")
    print("\n".join(commands))


main()
