"""Makes the outlier twin of a trained model: the same function, with outlier features as LLM.int8() (arXiv 2208.07339) describes them.

In every layer, at every LayerNorm output that feeds a linear layer, dimension d becomes s * (y + c): the norm's weight and bias take the
factor s and the shift c, the next linear layer's input column is divided by s, and W[:, d] * c is taken from its bias. The dimensions are
the same in every layer; s is a power of two, so only that bias is rounded.

Reads tests/fixtures/tiny-KIND, writes tests/fixtures/golden/tiny-KIND-outliers/outliers.json and the whole twin to
target/reference/tiny-KIND-outliers; outlier_overlay.py makes the fixture of it.

python tests/reference/outlier_twins.py bloom|opt        Needs numpy and safetensors.
"""
import json
import os
import shutil
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

RULE = """Same function, outlier features: LN output dim d becomes s*(y+c); the next linear's input column is divided by s
    and W[:,d]*c is taken from its bias. Same dims in every layer; s is a power of two, so only that bias is rounded."""
OUTLIERS = {"bloom": dict(dims=[11, 70, 133, 178, 241], scale=[32, 32, 64, 64, 32], shift=[1.0, -1.0, 2.0, -2.0, 1.0]),
            "opt": dict(dims=[5, 62, 97, 160, 222], scale=[32, 64, 32, 64, 32], shift=[-1.0, 2.0, 1.0, -2.0, -1.0])}
FEEDS = {  # the norms of a layer, and the linear layers each feeds
    "bloom": {"h.{}.input_layernorm": ["h.{}.self_attention.query_key_value"], "h.{}.post_attention_layernorm": ["h.{}.mlp.dense_h_to_4h"]},
    "opt": {"model.decoder.layers.{}.self_attn_layer_norm": [f"model.decoder.layers.{{}}.self_attn.{x}_proj" for x in "qkv"],
            "model.decoder.layers.{}.final_layer_norm": ["model.decoder.layers.{}.fc1"]}}
LAYERS = 4

kind = sys.argv[1]
parent, twin = f"tests/fixtures/tiny-{kind}", f"target/reference/tiny-{kind}-outliers"
shutil.copytree(parent, twin, dirs_exist_ok=True)
tensors = {name: tensor.astype(np.float64) for name, tensor in load_file(f"{parent}/model.safetensors").items()}
for layer in range(LAYERS):
    for norm, linears in FEEDS[kind].items():
        norm = norm.format(layer)
        for d, s, c in zip(*OUTLIERS[kind].values()):
            tensors[norm + ".weight"][d] *= s
            tensors[norm + ".bias"][d] = (tensors[norm + ".bias"][d] + c) * s
            for linear in (name.format(layer) for name in linears):
                tensors[linear + ".bias"] -= tensors[linear + ".weight"][:, d] * c
                tensors[linear + ".weight"][:, d] /= s
tensors = {name: tensor.astype(np.float32).astype(np.float16) for name, tensor in tensors.items()}
save_file(tensors, f"{twin}/model.safetensors", metadata={"format": "pt"})
golden = f"tests/fixtures/golden/tiny-{kind}-outliers"
os.makedirs(golden, exist_ok=True)
with open(f"{golden}/outliers.json", "w", encoding="utf-8") as file:
    json.dump({**OUTLIERS[kind], "rule": RULE}, file, indent=2)
    file.write("\n")
