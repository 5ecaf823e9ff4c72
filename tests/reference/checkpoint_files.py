"""Shared by the scripts here: writing checkpoints in the layouts of the Hub."""
import json
import os
from collections import OrderedDict

import torch
from safetensors.torch import save_file


def write_json(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def write_weights(folder, tensors, container="safetensors", shards=1):
    """model.safetensors or pytorch_model.bin; with more than one shard, the shards and their index."""
    stem = "model" if container == "safetensors" else "pytorch_model"

    def put(name, part):
        if container == "safetensors":
            save_file(dict(part), f"{folder}/{name}", metadata={"format": "pt"})
        else:
            torch.save(part, f"{folder}/{name}")
    if shards == 1:
        put(f"{stem}.{container}", tensors)
        return
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    total, before, parts = sum(sizes.values()), 0, [OrderedDict() for _ in range(shards)]
    for name, tensor in tensors.items():
        parts[min(shards - 1, before * shards // total)][name] = tensor
        before += sizes[name]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"{stem}-{i:05d}-of-{shards:05d}.{container}"
        put(file, part)
        weight_map |= {name: file for name in part}
    write_json(f"{folder}/{stem}.{container}.index.json", {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def build_opt_without_affine_norms():
    """transformers 4.57.6 cannot build an OPT with layer_norm_elementwise_affine=False: _init_weights fills a weight that is None."""
    from transformers.models.opt.modeling_opt import OPTPreTrainedModel
    init_weights = OPTPreTrainedModel._init_weights

    def skip_plain_norms(self, module):
        if not (isinstance(module, torch.nn.LayerNorm) and module.weight is None):
            init_weights(self, module)
    OPTPreTrainedModel._init_weights = skip_plain_norms
