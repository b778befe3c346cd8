#!/usr/bin/env python3
"""Writes tests/hostile: small GGUF and GGML files with one defect each, and errors.json with a text that each error must contain.

    python3 tools/hostile_files.py tests/hostile
"""
import json, os, struct, sys

u32, u64, i32 = (lambda n: struct.pack("<I", n)), (lambda n: struct.pack("<Q", n)), (lambda n: struct.pack("<i", n))
text = lambda s: u64(len(s)) + s
ARCH = text(b"general.architecture") + u32(8) + text(b"gptneox")


def gguf(values=(ARCH,), tensors=(), data=b"", version=3, counts=None):
    """A GGUF file of these metadata values and tensors, without any check."""
    counts = counts or (len(tensors), len(values))
    head = b"GGUF" + u32(version) + u64(counts[0]) + u64(counts[1]) + b"".join(values) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def tensor(name, shape, kind, offset):
    return text(name) + u32(len(shape)) + b"".join(u64(n) for n in shape) + u32(kind) + u64(offset)


def ggml(fields=(2, 64, 32, 2, 1, 4, 1, 1), words=(b"<|endoftext|>", b"a"), records=(), magic=b"lmgg"):
    head = magic + b"".join(u32(n) for n in fields)
    return head + b"".join(u32(len(w)) + w for w in words) + b"".join(records)


def record(name, shape, kind, data):
    return i32(len(shape)) + i32(len(name)) + i32(kind) + b"".join(u32(n) for n in shape) + name + data


A = tensor(b"a", [4], 0, 0)
FILES = {
    "gguf-empty-after-magic.gguf": (b"GGUF", "truncated"),
    "gguf-version-9.gguf": (gguf(version=9), "GGUF version 9"),
    "gguf-big-endian.gguf": (b"GGUF" + struct.pack(">I", 3) + b"\0" * 64, "big-endian"),
    "gguf-more-tensors-than-bytes.gguf": (gguf(counts=(1 << 60, 1)), "1152921504606846976 tensors"),
    "gguf-more-values-than-bytes.gguf": (gguf(counts=(0, 1 << 40)), "1099511627776 values"),
    "gguf-key-too-long.gguf": (gguf([u64(1 << 50)], data=b"\0" * 64), "the key of a metadata value"),
    "gguf-key-twice.gguf": (gguf([ARCH, ARCH]), "metadata general.architecture occurs twice"),
    "gguf-value-of-no-type.gguf": (gguf([text(b"k") + u32(77)]), "metadata k has the unknown value type 77"),
    "gguf-array-longer-than-file.gguf": (gguf([text(b"k") + u32(9) + u32(4) + u64(1 << 61)]), "metadata k"),
    "gguf-array-of-strings-longer-than-file.gguf": (gguf([text(b"k") + u32(9) + u32(8) + u64(1 << 40)]), "metadata k"),
    "gguf-array-of-arrays-cut-off.gguf": (gguf([text(b"k") + u32(9) + u32(9) + u64(1 << 30)]), "metadata k"),
    "gguf-array-of-arrays-of-arrays.gguf": (gguf([text(b"k") + u32(9) + (u32(9) + u64(1)) * 6], data=b"\0" * 64), "metadata k is an array of type 9"),
    "gguf-type-not-read.gguf": (gguf([ARCH] + [text(k) + u32(4) + u32(2 if b"length" in k else 1) for k in (b"gptneox.context_length", b"gptneox.embedding_length", b"gptneox.block_count", b"gptneox.feed_forward_length", b"gptneox.attention.head_count")],
                                      [tensor(b"token_embd.weight", [2, 1], 20, 0)], b"\0" * 32), "tensor token_embd.weight is stored as iq4_nl, which is not supported"),
    "gguf-text-longer-than-file.gguf": (gguf([text(b"k") + u32(8) + u64(1 << 63)]), "metadata k"),
    "gguf-alignment-0.gguf": (gguf([ARCH, text(b"general.alignment") + u32(4) + u32(0)]), "general.alignment"),
    "gguf-alignment-huge.gguf": (gguf([ARCH, text(b"general.alignment") + u32(4) + u32(1 << 31)]), "general.alignment"),
    "gguf-tensor-of-nine-dimensions.gguf": (gguf(tensors=[tensor(b"a", [1] * 9, 0, 0)]), "tensor a has 9 dimensions"),
    "gguf-tensor-size-overflows.gguf": (gguf(tensors=[tensor(b"a", [1 << 33, 1 << 33], 0, 0)]), "tensor a: invalid shape"),
    "gguf-tensor-of-no-elements.gguf": (gguf(tensors=[tensor(b"a", [4, 0], 0, 0)]), "tensor a: invalid shape"),
    "gguf-tensor-beyond-the-end.gguf": (gguf(tensors=[A], data=b"\0" * 15), "tensor a of 16 bytes"),
    "gguf-offset-overflows.gguf": (gguf(tensors=[tensor(b"a", [4], 0, (1 << 64) - 32)], data=b"\0" * 64), "tensor a"),
    "gguf-offset-not-aligned.gguf": (gguf(tensors=[tensor(b"a", [4], 0, 4)], data=b"\0" * 64), "tensor a"),
    "gguf-tensors-overlap.gguf": (gguf(tensors=[tensor(b"a", [16], 0, 0), tensor(b"b", [16], 0, 32)], data=b"\0" * 128), "tensors a and b overlap"),
    "gguf-tensor-twice.gguf": (gguf(tensors=[A, tensor(b"a", [4], 0, 32)], data=b"\0" * 64), "tensor a occurs twice"),
    "gguf-name-no-utf8.gguf": (gguf(tensors=[tensor(b"\xff\xfe", [4], 0, 0)], data=b"\0" * 32), "not UTF-8"),
    "gguf-half-a-block.gguf": (gguf(tensors=[tensor(b"a", [33, 2], 2, 0)], data=b"\0" * 64), "rows of 33 elements are not whole q4_0 blocks"),
    "gguf-of-another-family.gguf": (gguf([text(b"general.architecture") + u32(8) + text(b"llama")]), "llama"),
    "gguf-without-architecture.gguf": (gguf([]), "general.architecture"),
    "gguf-without-keys.gguf": (gguf(tensors=[A], data=b"\0" * 32), "gptneox.embedding_length"),
    "ggml-ends-in-the-header.bin": (b"lmgg" + u32(2) * 5, "truncated"),
    "ggml-no-tensors.bin": (ggml(), "no tensor follows"),
    "ggml-vocabulary-longer-than-file.bin": (ggml((1 << 30, 64, 32, 2, 1, 4, 1, 1)), "truncated"),
    "ggml-word-longer-than-file.bin": (ggml()[:-5] + u32(1 << 31), "word 1 of the vocabulary"),
    "ggml-tensor-of-no-name.bin": (ggml(records=[record(b"", [4], 0, b"\0" * 16)]), "a name of 0 bytes"),
    "ggml-tensor-of-a-hundred-dimensions.bin": (ggml(records=[i32(100) + i32(1) + i32(0)]), "100 dimensions"),
    "ggml-tensor-of-no-type.bin": (ggml(records=[record(b"a", [4], 99, b"\0" * 16)]), "tensor a has the unknown type 99"),
    "ggml-tensor-cut-off.bin": (ggml(records=[record(b"a", [4], 0, b"\0" * 9)]), "truncated"),
    "ggml-tensor-twice.bin": (ggml(records=[record(b"a", [4], 0, b"\0" * 16)] * 2), "tensor a occurs twice"),
    "ggml-bytes-after-the-end.bin": (ggml(records=[record(b"a", [4], 0, b"\0" * 16), b"\1\2"]), "truncated"),
    "ggml-name-no-utf8.bin": (ggml(records=[record(b"\xff\xff", [4], 0, b"\0" * 16)]), "not UTF-8"),
    "ggml-version-of-tomorrow.bin": (b"tjgg" + u32(9) + b"\0" * 64, "ggjt version 9"),
    "ggml-an-adapter.bin": (b"algg" + u32(1) + b"\0" * 64, "a LoRA adapter"),
    "ggml-without-its-tensors.bin": (ggml(records=[record(b"a", [4], 0, b"\0" * 16)]), "mlp.dense_h_to_4h.weight"),
}


def main():
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    for name, (data, _) in FILES.items():
        open(f"{folder}/{name}", "wb").write(data)
    words = {name: words for name, (_, words) in sorted(FILES.items())}
    json.dump(words, open(f"{folder}/errors.json", "w"), indent=1)
    print(f"{len(FILES)} files, {sum(len(data) for data, _ in FILES.values())} bytes")


main()
