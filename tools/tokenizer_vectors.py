#!/usr/bin/env python3
"""Writes tests/data/tokenizer-tiny: texts and ids with the results of the tokenizers library, for the tokenizer of models/tiny.

    pip install tokenizers && python3 tools/tokenizer_vectors.py
"""
import json, os, random, shutil

from tokenizers import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT = f"{ROOT}/tests/data/tokenizer-tiny"
TEXTS = [
    "", " ", "  ", "Hello, world!", " leading", "trailing ", "a\r\nb", "\t\tx", "\n\n\n", "1234567", "I'm you're DON'T", "caf\u00e9",
    "cafe\u0301", "\u212b", "\ufb01", "na\u00efve \u2014 \u201cquoted\u201d \u2026", "\u65e5\u672c\u8a9e", "\U0001f917\U0001f1e9\U0001f1ea",
    "\u041f\u0440\u0438\u0432\u0435\u0442", "<|endoftext|>", "Hello<|endoftext|>World", "<|padding|>", "a<|end", "\u00a0x\u2003y\u200b",
    "def f(x):\n        return x\n", "The people of the United States", "\u0000\u0001\x7f", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "e" * 200, "\ufffd",
]


def alphabet():
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def main():
    tokenizer = Tokenizer.from_file(f"{ROOT}/models/tiny/tokenizer.json")
    table, added = alphabet(), {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items()}

    def raw(i):
        token = tokenizer.id_to_token(i)
        return b"" if token is None else added[i].encode() if i in added else bytes(table[c] for c in token)

    os.makedirs(OUT, exist_ok=True)
    shutil.copy(f"{ROOT}/models/tiny/tokenizer.json", f"{OUT}/tokenizer.json")
    json.dump({"id": "tokenizer-tiny", "kind": "tokenizer", "tolerance": "exact"}, open(f"{OUT}/case.json", "w"), indent=1)
    with open(f"{OUT}/encode.jsonl", "w") as f:
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            decoded = tokenizer.decode(ids, skip_special_tokens=False)
            f.write(json.dumps({"text": text, "ids": ids, "decoded": decoded}) + "\n")
    rng = random.Random(1)
    with open(f"{OUT}/decode.jsonl", "w") as f:
        for n in range(80):
            top = 258 if n % 2 else tokenizer.get_vocab_size()  # the first 258 ids are special tokens and single bytes
            ids = [rng.randrange(top) for _ in range(rng.randrange(1, 14))]
            data = b"".join(map(raw, ids))
            f.write(json.dumps({"ids": ids, "bytes_hex": data.hex(), "decoded": data.decode("utf-8", "replace")}) + "\n")


main()
