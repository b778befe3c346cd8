#!/usr/bin/env python3
"""Compares the scoring speed of pricket with lm-evaluation-harness on the CPU: hellaswag-like items, random weights, in turns.

    pip install "lm_eval[hf]==0.4.13"
    cargo build --release --example score
    python3 tools/peers/score_bench.py --examples target/release/examples --model DIR_OF_A_RANDOM_160M

The harness is timed inside its own `loglikelihood` (encoding, batching, model), with the best of the given batch sizes. pricket is
timed over all of `score`. The log-likelihoods of both are compared.
"""
import argparse, json, random, statistics, tempfile

import harness

WORDS = ("the man dog house river old small red boat water fire wood went looked took gave found carried morning night "
         "people year country day hand road door garden table bread milk horse letter map clock box chest then when and "
         "with into over under he she they him her them was had were would could should never always").split()


def items(count):
    rng = random.Random(7)
    sentence = lambda n: " ".join(rng.choice(WORDS) for _ in range(n))
    return [{"ind": i, "activity_label": sentence(3).capitalize(), "ctx_a": sentence(rng.randint(25, 60)).capitalize() + ".",
             "ctx_b": sentence(rng.randint(2, 6)), "endings": [sentence(rng.randint(8, 24)) + "." for _ in range(4)],
             "label": str(rng.randint(0, 3))} for i in range(count)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--examples", default="target/release/examples")
    p.add_argument("--model", required=True, help="directory of a checkpoint in Hub layout with a tokenizer")
    p.add_argument("--items", type=int, default=200)
    p.add_argument("--types", default="f32,bf16")
    p.add_argument("--batches", default="1,4,16", help="batch sizes of the harness; the fastest is used")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--pairs", type=int, default=3, help="alternating runs of both programs")
    a = p.parse_args()
    tasks = ["hellaswag"]
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/hellaswag.validation.jsonl", "w") as f:
            f.writelines(json.dumps(item) + "\n" for item in items(a.items))
        harness.local_tasks(folder, tasks)
        print("| type | lm_eval, best batch | pricket | ratio | largest difference of a log-likelihood | acc |")
        print("|---|---|---|---|---|---|")
        for dtype in a.types.split(","):
            full = {"f32": "float32", "bf16": "bfloat16"}[dtype]
            theirs = lambda batch: harness.run(a.model, folder, tasks, 0, full, batch, a.threads)
            ours = lambda: harness.ours(a.examples, a.model, folder, tasks, 0, "--dtype", dtype, "--activations", dtype, "--threads", str(a.threads))
            best = min((theirs(int(b))["seconds"], int(b)) for b in a.batches.split(","))[1]
            pairs = [(theirs(best), ours()) for _ in range(a.pairs)]
            sums = [[float(r[0][0]) for s in run["samples"]["hellaswag"] for r in s["resps"]] for run in pairs[-1]]
            worst = max(abs(x - y) for x, y in zip(*sums, strict=True))
            seconds = [statistics.median(pair[i]["seconds"] for pair in pairs) for i in (0, 1)]
            ratio = statistics.median(t["seconds"] / o["seconds"] for t, o in pairs)
            acc = [run["results"]["hellaswag"]["acc,none"] for run in pairs[-1]]
            print(f"| {dtype} | {seconds[0]:.1f} s, {best} | {seconds[1]:.1f} s | {ratio:.2f} x | {worst:.1e} | {acc[0]} {acc[1]} |", flush=True)


main()
