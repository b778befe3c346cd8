"""Compares the answers of a fine-tuned model in llama.cpp and in pricket.

    pip install llama-cpp-python
    cargo build --examples
    python3 tools/peers/finetuned_answers.py runs/instructions

`quantize` merges the adapter into models/tiny as q8_0. Both programs then continue each held-out question of
docs/data/instructions.validation.jsonl greedily. Prints how many answers are equal, and how many are right.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("adapter", type=Path)
    p.add_argument("--binaries", type=Path, default=ROOT / "target/debug/examples")
    p.add_argument("--count", type=int, default=100)
    p.add_argument("--options", default="", help="further flags of generate")
    a = p.parse_args()
    from llama_cpp import Llama

    lines = (ROOT / "docs/data/instructions.validation.jsonl").read_text().splitlines()[:a.count]
    rows = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        merged = f"{folder}/merged.gguf"
        command = [a.binaries / "quantize", "--model", ROOT / "models/tiny", "--adapter", a.adapter, "--out", merged, "--quantize", "q8_0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        llama = Llama(merged, n_ctx=256, verbose=False)
        equal = right = 0
        for row in rows:
            command = [a.binaries / "generate", "--model", merged, "--prompt-format", "dolly", "--prompt", row["instruction"],
                       "--temperature", "0", "--max-tokens", "24", "--json", *a.options.split()]
            said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            prompt = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
                      f"### Instruction:\n{row['instruction']}\n### Response:\n")
            other = llama.create_completion(prompt, max_tokens=24, temperature=0)["choices"][0]["text"]
            ours = said["text"] if "text" in said else said[0]["text"]
            equal += ours.strip() == other.strip()
            right += ours.strip() == row["response"]
            if ours.strip() != other.strip():
                print(f"{row['instruction']}\n  pricket:   {ours!r}\n  llama.cpp: {other!r}")
    print(f"{equal} of {len(rows)} answers are equal; {right} of pricket's are right")


main()
