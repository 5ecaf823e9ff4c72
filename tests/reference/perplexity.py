"""Perplexity of one checkpoint on tests/fixtures/heldout.txt: fp32, fp16 and the int8 schemes of quantisation_schemes.py.

Writes GOLDEN/perplexity.json, with the fp32 NLL of every window.

python tests/reference/perplexity.py MODEL GOLDEN        e.g. tests/fixtures/tiny-bloom tests/fixtures/golden/tiny-bloom
"""
import copy
import math
import sys

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_files import write_json
from quantisation_schemes import SCHEMES, QuantisedLinear, quantise

PROTOCOL = ("The whole text is encoded without special tokens and cut into windows that do not overlap: BLOOM 256 ids (255 predicted), "
            "OPT </s> + 255 ids (255 predicted); the last, shorter one is dropped; each window is run alone, with no cache; exp(mean NLL).")
DESCRIPTIONS = {
    "absmax": "int8, one absmax scale per tensor for inputs and weights", "zeropoint": "int8 affine, per tensor, both",
    "rowwise": "inputs one absmax scale per row, weights per tensor",
    "vectorwise": "inputs per row, weights per output feature, no decomposition (threshold 0)",
    "zeropoint-vw": "affine, inputs per row, weights per output feature", "llm.int8-rowwise": "rowwise + fp16 outlier columns (6.0)",
    "llm.int8": "vectorwise + outlier columns (any |x| >= 6.0 in the window) in fp16 with the fp16 weights (the paper)",
    "llm.int8-bnb": "as bitsandbytes with has_fp16_weights=False: row scale over all |x| < 6.0, outlier columns' weights dequantised from int8"}


def windows(tokenizer, kind):
    """(windows, 256) ids, and the number of ids in the text."""
    text = open("tests/fixtures/heldout.txt", encoding="utf-8").read()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = 256 if kind == "bloom" else 255
    start = [2] if kind == "opt" else []
    return torch.tensor([start + ids[i:i + step] for i in range(0, len(ids) - step + 1, step)]), len(ids)


@torch.no_grad()
def nll_by_window(model, ids):
    return [F.cross_entropy(model(input_ids=window[None]).logits[0].float()[:-1], window[1:], reduction="sum").item() for window in ids]


def perplexity(nll):
    return math.exp(sum(nll) / (len(nll) * 255))


def main():
    model_folder, golden_folder = sys.argv[1:3]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids, text_tokens = windows(AutoTokenizer.from_pretrained(model_folder), model.config.model_type)
    exact = nll_by_window(model, ids)
    found = {"fp32": perplexity(exact), "fp16": perplexity(nll_by_window(copy.deepcopy(model).half(), ids))}
    for scheme in SCHEMES:
        quantised = quantise(copy.deepcopy(model), scheme)
        found[scheme] = perplexity(nll_by_window(quantised, ids))
        if scheme == "llm.int8":
            columns = {name: round(layer.outlier_columns / layer.calls, 2)
                       for name, layer in quantised.named_modules() if isinstance(layer, QuantisedLinear)}
    for scheme, value in found.items():
        print(f"{scheme:18s} {value:10.4f}  {100 * (value / found['fp32'] - 1):+8.2f}%")
    write_json(f"{golden_folder}/perplexity.json", {
        "text": "heldout.txt", "protocol": PROTOCOL,
        "windows": len(ids), "predicted_tokens": len(ids) * 255, "text_tokens": text_tokens,
        "perplexity": {scheme: round(value, 5) for scheme, value in found.items()}, "schemes": DESCRIPTIONS,
        "mean_outlier_columns_per_window": columns, "nll_sum_per_window_fp32": [round(nll, 4) for nll in exact]})


if __name__ == "__main__":
    main()
