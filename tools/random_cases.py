#!/usr/bin/env python3
"""Makes random GPT-NeoX and MPT cases in the layout of tests/golden, with the outputs of transformers, for the example `parity`.

    pip install torch transformers safetensors
    python3 tools/random_cases.py --out /tmp/cases --count 60 && cargo run --example parity -- /tmp/cases/*

Every key that changes the output varies:

- GPT-NeoX: residual form, rotary fraction and base under old and new keys, linear scaling, activation, biases, tied head.
- MPT: numbers of heads other than powers of two, clipping, scale of the scores, and the three spellings of the configuration, as far
  as transformers implements them.
- Both: sizes, stored type, container, shards, name prefixes, padding, splits.
"""
import argparse, json, os, random, shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MptConfig, MptForCausalLM

ACTS = ["gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python"]


def neox(rng):
    heads = rng.choice([1, 2, 3, 4, 5])
    head_dim = rng.choice([8, 12, 16, 20, 24, 40, 64, 80])
    share = rng.choice([0.25, 0.5, 0.75, 1.0])
    if int(head_dim * share) % 2:
        share = 1.0
    base = rng.choice([10000, 500, 20000, 1000000])
    scaling = rng.choice([None, None, None, 2.0, 4.0])
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
    head = rng.choice(["embed_out", "lm_head"])
    prefix = rng.choice(["", "", "", "model.", "-gpt_neox."])
    buffers = {}
    if rng.random() < 0.5:  # buffers of old checkpoints
        for i in range(config["num_hidden_layers"]):
            layer = ("" if prefix.startswith("-") else "gpt_neox.") + f"layers.{i}.attention."
            buffers[layer + "bias"] = torch.ones(1, 1, 8, 8, dtype=rng.choice([torch.bool, torch.uint8]))
            buffers[layer + "masked_bias"] = torch.tensor(-1e9)
            buffers[layer + "rotary_emb.inv_freq"] = torch.ones(4)
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
    trunk = model.gpt_neox
    spell = lambda n: n.replace("lm_head", head).replace("embed_out", head)
    return model, written, prefix, spell, buffers, [trunk.embed_in, *trunk.layers, trunk.final_layer_norm]


def mpt(rng):
    spelling = rng.choice(["foundry", "native", "mosaic"])
    # For other numbers of heads than powers of two MosaicGPT has a rule of its own, which transformers does not implement.
    heads = rng.choice([1, 2, 4, 8] if spelling == "mosaic" else [1, 2, 3, 4, 5, 6, 7, 12])
    attention = dict(clip_qkv=rng.choice([None, None, 0.5, 2.0]), softmax_scale=rng.choice([None, None, 0.3]))
    config = dict(
        vocab_size=rng.choice([50, 97, 128, 301]), d_model=heads * rng.choice([4, 8, 12, 20, 64]), n_layers=rng.choice([1, 2, 3]),
        n_heads=heads, max_seq_len=256, expansion_ratio=4, no_bias=True, layer_norm_epsilon=rng.choice([1e-5, 1e-5, 1e-3]),
    )
    model = MptForCausalLM(MptConfig(**config, attn_config=attention, attn_implementation="eager")).eval()
    prefix = rng.choice(["", "", "model.", "-transformer."])
    renamed = [("norm_1.", "ln_1."), ("norm_2.", "ln_2."), ("norm_f.", "ln_f."), ("ffn.up_proj", "mlp.mlp_up"), ("ffn.down_proj", "mlp.mlp_down")]
    if spelling == "mosaic":
        written = {**config, "architectures": ["MosaicGPT"], "model_type": "mosaic_gpt", "mlp_ratio": 4, "alibi": True,
                   "attn_clip_qkv": attention["clip_qkv"], "softmax_scale": attention["softmax_scale"]}
        del written["expansion_ratio"]
    else:
        name = "MPTForCausalLM" if spelling == "foundry" else "MptForCausalLM"
        written = {**config, "architectures": [name], "model_type": "mpt", "attn_config": {**attention, "alibi": True}}
        if spelling == "native" and rng.random() < 0.5:
            del written["attn_config"]["alibi"]
        if spelling == "native" and rng.random() < 0.5:
            del written["no_bias"]

    def spell(name):
        for ours, theirs in renamed if spelling == "mosaic" else []:
            name = name.replace(ours, theirs)
        return name

    buffers = {"lm_head.weight": model.transformer.wte.weight} if spelling == "native" and rng.random() < 0.5 else {}
    trunk = model.transformer
    return model, written, prefix, spell, buffers, [trunk.wte, *trunk.blocks, trunk.norm_f]


def make(out, seed, family):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, written, prefix, spell, buffers, modules = {"neox": neox, "mpt": mpt}[family](rng)
    t = rng.choice([1, 5, 33, 70, 140])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 0.2) + (1.0 if "norm" in name and name.endswith("weight") else 0))
            if p.dim() == 2:
                p.mul_(2.0 / p.shape[1] ** 0.5)
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype).float())

    path = f"{out}/rand-{family}-{seed:04d}"
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    without, prefix_added = (prefix[1:], "") if prefix.startswith("-") else ("", prefix)
    state = {}
    for n, p in model.named_parameters():
        n = spell(n)
        state[prefix_added + n.removeprefix(without)] = p.detach().to(dtype).clone().contiguous()
    state.update({prefix_added + n: b.detach().clone() for n, b in buffers.items()})
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
    json.dump(written, open(f"{path}/config.json", "w"))

    b = rng.choice([1, 2, 3])
    ids = torch.randint(0, written["vocab_size"], (b, t))
    mask = torch.ones_like(ids)
    if b > 1 and t > 5 and rng.random() < 0.6:
        for row in range(1, b):
            pad = rng.randrange(t - 1)
            mask[row, :pad], ids[row, :pad] = 0, 0
    kept = []
    for module in modules:
        module.register_forward_hook(lambda m, a, o: kept.append(o[0] if isinstance(o, tuple) else o))
    # MPT takes no position_ids.
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if family == "neox" else {}
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, **positions).logits.float()
    nll = -torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    expected = {"input_ids": ids, "logits": logits.contiguous(), "hidden": torch.stack(kept[:-1]).float().contiguous(),
                "final_norm": kept[-1].float().contiguous(), "nll": nll.contiguous()}
    if (mask == 0).any():
        expected["attention_mask"] = mask
    cuts = sorted(rng.sample(range(1, t), min(t - 1, rng.randrange(4)))) if t > 1 else []
    expected["split"] = torch.tensor([y - x for x, y in zip([0, *cuts], [*cuts, t])])
    save_file(expected, f"{path}/expected.safetensors")
    scale = max(1.0, logits.abs().max().item() / 10)
    json.dump({"name": f"rand-{family}-{seed}", "dtype": str(dtype), "name_prefix": prefix, "config": written,
               "param_count": sum(p.numel() for p in dict(model.named_parameters()).values()),
               "tolerance": {"logits_atol": 1e-4 * scale, "hidden_atol": 1e-4 * scale, "nll_atol": 1e-4 * scale}},
              open(f"{path}/case.json", "w"), indent=1)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="directory for the cases")
    p.add_argument("--count", type=int, default=60, help="number of cases")
    p.add_argument("--seed", type=int, default=0, help="seed of the first case; each case adds 1")
    p.add_argument("--family", choices=["neox", "mpt"], default="neox")
    a = p.parse_args()
    for seed in range(a.seed, a.seed + a.count):
        make(a.out, seed, a.family)


main()
