#!/usr/bin/env python3
"""Makes random GPT-NeoX cases in the layout of tests/golden and what transformers answers to them, for `parity`.

    pip install torch transformers safetensors
    python3 tools/random_cases.py --out /tmp/cases --count 60 && cargo run --example parity -- /tmp/cases/*

Every key that changes the maths varies: residual form, rotary share and base under old and new keys, linear scaling,
activation, biases, tied head, sizes, stored type, container, shards, name prefixes, padding, splits.
"""
import argparse, json, os, random, shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

ACTS = ["gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python"]


def make(out, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads = rng.choice([1, 2, 3, 4, 5])
    head_dim = rng.choice([8, 12, 16, 20, 24, 40, 64, 80])
    share = rng.choice([0.25, 0.5, 0.75, 1.0])
    if int(head_dim * share) % 2:
        share = 1.0
    base = rng.choice([10000, 500, 20000, 1000000])
    scaling = rng.choice([None, None, None, 2.0, 4.0])
    t = rng.choice([1, 5, 33, 70, 140])
    config = dict(
        vocab_size=rng.choice([50, 97, 128, 301]), hidden_size=heads * head_dim, num_hidden_layers=rng.choice([1, 2, 3]),
        num_attention_heads=heads, intermediate_size=rng.choice([24, 72, 4 * heads * head_dim]), hidden_act=rng.choice(ACTS),
        max_position_embeddings=256, layer_norm_eps=rng.choice([1e-5, 1e-6, 1e-3]), use_parallel_residual=rng.random() < 0.5,
        attention_bias=rng.random() < 0.7, tie_word_embeddings=rng.random() < 0.3,
    )
    rope = {"rope_type": "default" if scaling is None else "linear", "rope_theta": float(base), "partial_rotary_factor": share}
    if scaling:
        rope["factor"] = scaling
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**config, rope_parameters=rope, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 0.2) + (1.0 if "norm" in name and name.endswith("weight") else 0))
            if p.dim() == 2:
                p.mul_(2.0 / p.shape[1] ** 0.5)
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype).float())

    path = f"{out}/rand-{seed:04d}"
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    names = {n: p.detach() for n, p in model.named_parameters()}
    head = rng.choice(["embed_out", "lm_head"])
    prefix = rng.choice(["", "", "", "model.", "-gpt_neox."])
    state = {}
    for n, p in names.items():
        n = n.replace("lm_head", head).replace("embed_out", head)
        n = n[len("gpt_neox."):] if prefix.startswith("-") and n.startswith("gpt_neox.") else n
        state[("" if prefix.startswith("-") else prefix) + n] = p.to(dtype).clone().contiguous()
    if rng.random() < 0.5:  # buffers that old files hold
        for i in range(config["num_hidden_layers"]):
            layer = ("" if prefix.startswith("-") else prefix + "gpt_neox.") + f"layers.{i}.attention."
            state[layer + "bias"] = torch.ones(1, 1, 8, 8, dtype=rng.choice([torch.bool, torch.uint8]))
            state[layer + "masked_bias"] = torch.tensor(-1e9)
            state[layer + "rotary_emb.inv_freq"] = torch.ones(4)
    shards = rng.choice([1, 1, 2, 3])
    keys = sorted(state)
    rng.shuffle(keys)
    parts = [{k: state[k] for k in keys[i::shards]} for i in range(shards)]
    binary = rng.random() < 0.5
    stem, ext = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    write = (lambda part, f: torch.save(part, f)) if binary else (lambda part, f: save_file(part, f))
    if shards == 1:
        write(parts[0], f"{path}/{stem}.{ext}")
    else:
        index = {"metadata": {}, "weight_map": {}}
        for i, part in enumerate(parts):
            file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{ext}"
            write(part, f"{path}/{file}")
            index["weight_map"].update({k: file for k in part})
        json.dump(index, open(f"{path}/{stem}.{ext}.index.json", "w"))

    written = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "eos_token_id": 0, **config}
    if rng.random() < 0.5:
        written["rope_parameters"] = rope
    else:
        written.update(rotary_pct=share, rotary_emb_base=base)
        if scaling:
            written["rope_scaling"] = {rng.choice(["type", "rope_type"]): "linear", "factor": scaling}
    for key, default in [("use_parallel_residual", True), ("attention_bias", True), ("tie_word_embeddings", False), ("layer_norm_eps", 1e-5)]:
        if written[key] == default and rng.random() < 0.5:
            del written[key]
    json.dump(written, open(f"{path}/config.json", "w"))

    b = rng.choice([1, 2, 3])
    ids = torch.randint(0, config["vocab_size"], (b, t))
    mask = torch.ones_like(ids)
    if b > 1 and t > 5 and rng.random() < 0.6:
        for row in range(1, b):
            pad = rng.randrange(t - 1)
            mask[row, :pad], ids[row, :pad] = 0, 0
    kept = []
    hooks = [m.register_forward_hook(lambda m, a, o: kept.append(o[0] if isinstance(o, tuple) else o)) for m in
             [model.gpt_neox.embed_in, *model.gpt_neox.layers, model.gpt_neox.final_layer_norm]]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=position).logits.float()
    nll = -torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    expected = {"input_ids": ids, "logits": logits.contiguous(), "hidden": torch.stack(kept[:-1]).float().contiguous(),
                "final_norm": kept[-1].float().contiguous(), "nll": nll.contiguous()}
    if (mask == 0).any():
        expected["attention_mask"] = mask
    cuts = sorted(rng.sample(range(1, t), min(t - 1, rng.randrange(4)))) if t > 1 else []
    expected["split"] = torch.tensor([y - x for x, y in zip([0, *cuts], [*cuts, t])])
    save_file(expected, f"{path}/expected.safetensors")
    scale = max(1.0, logits.abs().max().item() / 10)
    json.dump({"name": f"rand-{seed}", "dtype": str(dtype), "name_prefix": prefix, "config": written,
               "param_count": sum(p.numel() for p in dict(model.named_parameters()).values()),
               "tolerance": {"logits_atol": 1e-4 * scale, "hidden_atol": 1e-4 * scale, "nll_atol": 1e-4 * scale}},
              open(f"{path}/case.json", "w"), indent=1)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True)
    p.add_argument("--count", type=int, default=60)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    for seed in range(a.seed, a.seed + a.count):
        make(a.out, seed)


main()
