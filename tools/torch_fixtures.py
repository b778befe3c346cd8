#!/usr/bin/env python3
"""Writes crates/pricket-weights/tests/data: PyTorch files with every storage type, views, and shared and empty storages.

    pip install torch && python3 tools/torch_fixtures.py
"""
import collections, os

import torch

OUT = f"{os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}/crates/pricket-weights/tests/data"


def main():
    os.makedirs(OUT, exist_ok=True)
    base = torch.arange(24, dtype=torch.float32)
    state = collections.OrderedDict()
    for name, dtype in [("f64", torch.float64), ("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16),
                        ("i64", torch.int64), ("i32", torch.int32), ("i16", torch.int16), ("i8", torch.int8), ("u8", torch.uint8)]:
        state[name] = torch.arange(6).reshape(2, 3).to(dtype)
    state["bool"] = torch.tensor([[True, False], [False, True]])
    state["matrix"] = base.reshape(4, 6)
    state["transposed"] = base.reshape(4, 6).t()          # shares the storage of `matrix`
    state["slice"] = base.reshape(4, 6)[1:3, 2:5]         # also shares it
    state["column"] = base.reshape(4, 6)[:, 1]
    state["scalar"] = torch.tensor(2.5)
    state["empty"] = torch.zeros(0, 3)
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    state._metadata = collections.OrderedDict([("", {"version": 1})])
    torch.save(state, f"{OUT}/state_dict.bin")
    torch.save({"state_dict": {"inner": torch.arange(3).float()}, "epoch": 3, "lr": 0.5, "name": "x", "none": None,
                "list": [1, 2.0, (True, b"raw")], "big": 1 << 40}, f"{OUT}/wrapped.bin")
    torch.save(state["f32"], f"{OUT}/bare_tensor.bin")
    torch.save({"f32": state["f32"]}, f"{OUT}/legacy.bin", _use_new_zipfile_serialization=False)


main()
