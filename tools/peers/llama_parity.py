#!/usr/bin/env python3
"""Compares the greedy tokens of llama.cpp and pricket on GGUF files that pricket wrote.

    python3 tools/peers/llama_parity.py --examples target/debug/examples [MODEL ...]

Needs llama-cpp-python. For each model and type, `quantize` writes a file. llama.cpp continues four prompts by 64 tokens, with keys
and values in f32. pricket does the same with the activation function that llama.cpp uses for every model. Where the tokens first
differ, the margin between the first and second token of llama.cpp is printed. A margin under 1e-2 is within rounding.
"""
import argparse, ctypes, json, os, subprocess, tempfile

import llama_cpp
import numpy as np

PROMPTS = ["My fellow citizens, the people of the United States", "The whale", "In the year of our Lord",
           "I recommend to Congress that"]


def greedy(path, ids, count):
    """Returns [(token, margin)] of llama.cpp."""
    llm = llama_cpp.Llama(path, n_ctx=512, verbose=False, n_threads=2, type_k=0, type_v=0)
    out, tokens = [], list(ids)
    llm.eval(tokens)
    for _ in range(count):
        logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()
        second, first = np.argsort(logits)[-2:]
        out.append((int(first), float(logits[first] - logits[second])))
        llm.eval([int(first)])
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*", default=["tiny", "tiny-mpt", "tiny-chat", "tiny-llama"])
    p.add_argument("--examples", default="target/debug/examples")
    p.add_argument("--types", default="f16,q8_0,q4_0,q5_1,q4_1,q5_0")
    p.add_argument("--activations", default="q8", help="q8 rounds as ggml does; f32 does not round")
    a = p.parse_args()
    worst = 0
    for model in a.models:
        for kind in a.types.split(","):
            with tempfile.TemporaryDirectory() as folder:
                path = f"{folder}/m.gguf"
                how = ["--dtype", kind] if kind in ("f16", "f32", "bf16") else ["--quantize", kind]
                subprocess.run([f"{a.examples}/quantize", "--model", model, "--out", path, *how], check=True, stdout=subprocess.DEVNULL)
                same, parted = 0, []
                for prompt in PROMPTS:
                    command = [f"{a.examples}/generate", "--model", path, "--prompt", prompt, "-n", "64", "-t", "0", "--json",
                               "--ignore-eos", "--activations", a.activations, "--cache-type", "f32"]
                    # LLaMA has no GELU.
                    command += [] if model == "tiny-llama" else ["--activation", "gelu_tanh"]
                    ours = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    llm = llama_cpp.Llama(path, vocab_only=True, verbose=False)
                    theirs = llm.tokenize(prompt.encode(), add_bos=True, special=True)
                    assert theirs == ours["prompt_ids"], (theirs, ours["prompt_ids"])
                    for i, (token, margin) in enumerate(greedy(path, ours["prompt_ids"], 64)):
                        if token != ours["ids"][i]:
                            parted.append((prompt, i, margin))
                            break
                        same += 1
                print(f"{model} {kind}: {same} equal tokens, {len(parted)} of {len(PROMPTS)} prompts differ", flush=True)
                for prompt, i, margin in parted:
                    print(f"    {prompt!r} at token {i}, margin of llama.cpp {margin:.4f}")
                    worst = max(worst, margin)
    print(f"largest margin at a difference: {worst:.4f}")


main()
