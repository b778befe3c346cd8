#!/usr/bin/env python3
"""Exchanges adapters between pricket and PEFT in both directions: PEFT loads adapters that pricket trained, and pricket loads adapters
that PEFT made. The logits of both must agree within 1e-4.

    cargo build --examples
    python3 tools/peers/peft_parity.py --binaries target/debug/examples

Needs torch, transformers, peft, safetensors and numpy. The base models are golden cases. They run in the classes of transformers
where these implement the model, else in the plain MPT below (qk_ln, MosaicGPT).
"""
import argparse, json, math, subprocess, sys, tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests/golden/models"
BASES = ["neox-parallel-rot025", "neox-sequential-rot100", "neox-tied", "mpt-native-clip-scale", "mpt-with-bias", "mpt-qk-ln",
         "mosaicgpt-1b-style", "llama-gqa", "llama-mqa-bias-rope-parameters", "rwkv4-hf-rescale"]
TARGETS = {"gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
           "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
           "rwkv": ["key", "value", "receptance", "output"],
           "mpt": ["Wqkv", "out_proj", "up_proj", "down_proj"], "mosaic_gpt": ["Wqkv", "out_proj", "mlp_up", "mlp_down"]}


class Mpt(torch.nn.Module):
    """MPT as in llm-foundry, with the tensor names of an MPT or MosaicGPT checkpoint."""

    def __init__(self, config, weights):
        super().__init__()
        attention = config.get("attn_config", {})
        self.heads, self.layers = config["n_heads"], config["n_layers"]
        self.clip = attention.get("clip_qkv", config.get("attn_clip_qkv"))
        self.qk_ln = attention.get("qk_ln", config.get("attn_qk_ln", False))
        self.bias_max = attention.get("alibi_bias_max", config.get("alibi_bias_max", 8))
        self.config = PretrainedConfig()
        for name, tensor in weights.items():
            if name.startswith("lm_head"):
                continue
            *path, last = name.split(".")
            at = self
            for i, part in enumerate(path):
                if part not in at._modules:
                    at.add_module(part, torch.nn.Module())
                at = at._modules[part]
            at.register_parameter(last, torch.nn.Parameter(tensor.float()))
        self.transformer.wte = torch.nn.Embedding.from_pretrained(self.transformer.wte.weight.data)
        for _, block in self.transformer.blocks.named_children():
            for at in (block.attn, block._modules.get("ffn", block._modules.get("mlp"))):
                for part, module in list(at.named_children()):
                    if module.weight.dim() == 2:
                        linear = torch.nn.Linear(module.weight.shape[1], module.weight.shape[0], bias="bias" in module._parameters)
                        linear.load_state_dict(module.state_dict())
                        at._modules[part] = linear

    def prepare_inputs_for_generation(self, *_, **__):
        raise NotImplementedError("peft requires this method; generation is not implemented")

    def norm(self, at, name, x):
        norm = at._modules.get(name) or at._modules[name.replace("norm_", "ln_")]
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm._parameters.get("bias"))

    def forward(self, input_ids, **_):
        x = self.transformer.wte(input_ids)
        b, t, d = x.shape
        h = 2 ** math.ceil(math.log2(self.heads))
        slopes = [2 ** (-(i + 1) * self.bias_max / h) for i in range(h)]
        slopes = torch.tensor(slopes if h == self.heads else (slopes[1::2] + slopes[::2])[:self.heads])
        distance = torch.arange(t)[None, :] - torch.arange(t)[:, None]
        bias = slopes[:, None, None] * distance + torch.full((t, t), float("-inf")).triu(1)
        for _, block in self.transformer.blocks.named_children():
            qkv = block.attn.Wqkv(self.norm(block, "norm_1", x))
            if self.clip:
                qkv = qkv.clamp(-self.clip, self.clip)
            q, k, v = qkv.chunk(3, -1)
            if self.qk_ln:
                q, k = self.norm(block.attn, "q_ln", q), self.norm(block.attn, "k_ln", k)
            q, k, v = (u.view(b, t, self.heads, -1).transpose(1, 2) for u in (q, k, v))
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + block.attn.out_proj(a.transpose(1, 2).reshape(b, t, d))
            ffn = block._modules.get("ffn", block._modules.get("mlp"))
            up, down = (ffn._modules.get(a) or ffn._modules[b] for a, b in (("up_proj", "mlp_up"), ("down_proj", "mlp_down")))
            x = x + down(F.gelu(up(self.norm(block, "norm_2", x))))
        return F.linear(self.norm(self.transformer, "norm_f", x), self.transformer.wte.weight)


def load(base):
    """Returns a new torch model of a golden case in f32, and its configuration."""
    config = json.loads((GOLDEN / base / "config.json").read_text())
    if config["model_type"] in ("gpt_neox", "llama", "rwkv") or base.startswith("mpt-native"):
        from transformers import AutoModelForCausalLM
        # rescale_every would divide RWKV's weights in place, also those under an adapter.
        more = {"rescale_every": 0} if config["model_type"] == "rwkv" else {}
        return AutoModelForCausalLM.from_pretrained(GOLDEN / base, dtype=torch.float32, **more), config
    file = GOLDEN / base / "model.safetensors"
    weights = load_file(file) if file.exists() else torch.load(GOLDEN / base / "pytorch_model.bin", weights_only=True)
    return Mpt(config, weights), config


def logits(model, ids):
    with torch.no_grad():
        out = model(input_ids=ids)
    return (out if torch.is_tensor(out) else out.logits).float().contiguous()


def compare(args, folder, base, adapter, model, ids, base_logits, what):
    """Writes a case with the logits of PEFT and runs `parity` on it. Returns whether the logits agree and the adapter changes them."""
    case = folder / f"{base}-{what}"
    case.mkdir()
    for file in adapter.iterdir():
        if file.is_file():
            (case / file.name).write_bytes(file.read_bytes())
    save_file({"input_ids": ids, "base_logits": base_logits, "logits": logits(model, ids)}, case / "expected.safetensors")
    moved = (logits(model, ids) - base_logits).abs().max().item()
    (case / "case.json").write_text(json.dumps({"base_case": base, "tolerance": {"logits_atol": 1e-4}}))
    done = subprocess.run([args.binaries / "parity", case], capture_output=True, text=True)
    line = json.loads(done.stdout)
    ok = line["ok"] and moved > 1e-2
    print(f"| {base} | {what} | {'ok' if ok else 'FAILED'} | {line['max_abs'].get('logits', line.get('error'))} | {moved:.2f} |", flush=True)
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", type=Path, default=ROOT / "target/debug/examples", help="directory of the built examples")
    args = parser.parse_args()
    torch.manual_seed(0)
    ok = True
    print("| base | adapter | result | difference of logits | change by the adapter |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for base in BASES:
            (folder / base).symlink_to(GOLDEN / base)
            model, config = load(base)
            vocab = config["vocab_size"]
            ids = torch.randint(0, vocab, (2, 16))
            base_logits = logits(model, ids)
            data = folder / f"{base}.jsonl"
            data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in torch.randint(0, vocab, (8, 16)).tolist()))
            kinds = [("lora", []), ("dora", ["--dora"]), ("rslora", ["--rslora"]), ("bias", ["--bias", "all"])]
            if config["model_type"] == "gpt_neox" and not config.get("tie_word_embeddings"):
                # transformers has named the head lm_head since 5.14.
                kinds.append(("head", ["--modules-to-save", "lm_head,embed_in"]))
            for kind, flags in kinds:
                out = folder / f"{base}-{kind}-trained"
                command = [args.binaries / "finetune", "--model", GOLDEN / base, "--data", data, "--out", out, "--steps", "6",
                           "--lr", "0.02", "--batch", "4", "--rank", "4", "--save-every", "0", *flags]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                model, _ = load(base)
                model = PeftModel.from_pretrained(model, str(out)).eval()
                ok &= compare(args, folder, base, out, model, ids, base_logits, f"{kind}-by-pricket")
            for kind, more in [("lora", {}), ("dora", {"use_dora": True}), ("pattern", {"rank_pattern": {"out_proj": 2, "dense": 2}})]:
                model, _ = load(base)
                targets = TARGETS[config["model_type"]]
                model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **more)).eval()
                out = folder / f"{base}-{kind}-made"
                model.save_pretrained(out)
                ok &= compare(args, folder, base, out, model, ids, base_logits, f"{kind}-by-peft")
    sys.exit(not ok)


main()
