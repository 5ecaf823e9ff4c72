"""Checkpoints in other containers, cut from the trained models, and what Transformers makes of them.

    tiny-bloom-1layer-2shards   the first layer of tiny-bloom, `transformer.` prefix, 2 safetensors shards and their index
    tiny-opt-2layer-bin         the first 2 layers of tiny-opt as pytorch_model.bin, `model.decoder.` prefix, lm_head sharing the embedding
    tiny-opt-1layer-2bins       the first layer of tiny-opt, `decoder.` prefix, 2 .bin shards and their index

Every tensor equals the parent's, and the last norm stays. The folders go to target/reference/variants (they are the parents' weights over
again, so they are no fixtures); last-token logits and 16 greedy tokens for the prompt `en` go to tests/fixtures/golden/variants/NAME.

python tests/reference/variants.py        Needs tests/fixtures/golden/tiny-{bloom,opt}/golden.json (golden.py).
"""
import json
import os
import shutil
from collections import OrderedDict

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint_files import write_json, write_weights

VARIANTS = [("tiny-bloom-1layer-2shards", "bloom", 1, "transformer.", "safetensors", 2),
            ("tiny-opt-2layer-bin", "opt", 2, "model.decoder.", "bin", 1), ("tiny-opt-1layer-2bins", "opt", 1, "decoder.", "bin", 2)]


def make(name, kind, layers, prefix, container, shards):
    parent, folder = f"tests/fixtures/tiny-{kind}", f"target/reference/variants/{name}"
    os.makedirs(folder, exist_ok=True)
    config = json.load(open(f"{parent}/config.json", encoding="utf-8"))
    config["n_layer" if kind == "bloom" else "num_hidden_layers"] = layers
    write_json(f"{folder}/config.json", config)
    shutil.copyfile(f"{parent}/generation_config.json", f"{folder}/generation_config.json")
    tensors = OrderedDict()
    for key, tensor in load_file(f"{parent}/model.safetensors").items():
        key = key.removeprefix("model.decoder.")
        if not (key.startswith(("h.", "layers.")) and int(key.split(".")[1]) >= layers):
            tensors[prefix + key] = tensor
    if (container, shards) == ("bin", 1):
        tensors["lm_head.weight"] = tensors[prefix + "embed_tokens.weight"]
    write_weights(folder, tensors, container, shards)
    return folder


@torch.no_grad()
def expected(folder, kind, golden):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = json.load(open(f"tests/fixtures/golden/tiny-{kind}/golden.json", encoding="utf-8"))["prompts"]
    ids = next(p["ids"] for p in prompts if p["name"] == "en")
    input_ids = torch.tensor([ids])
    logits = model(input_ids=input_ids).logits[0]
    new = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, num_beams=1, max_new_tokens=16)
    os.makedirs(golden, exist_ok=True)
    save_file({"ids": torch.tensor(ids), "last_logits": logits[-1].contiguous()}, f"{golden}/golden.safetensors")
    write_json(f"{golden}/golden.json", {"prompt": "en", "ids": ids, "argmax": logits.argmax(-1).tolist(), "greedy_ids": new[0, len(ids):].tolist()})


for name, kind, *form in VARIANTS:
    expected(make(name, kind, *form), kind, f"tests/fixtures/golden/variants/{name}")
