"""LLM.int8() as bitsandbytes itself computes it on the CPU: one layer in detail, and the whole model.

The model runs in fp32 around Linear8bitLt layers (every nn.Linear but lm_head; inputs cast to fp16, outputs back to fp32),
has_fp16_weights=False, thresholds 6.0 and 0.0. Writes GOLDEN/int8_bnb.json and GOLDEN/int8_bnb.safetensors:
    layer.x_f16, layer.y_f32_exact          the layer's input for the prompt `code`, and its output without quantisation
    layer.CB_i8, layer.SCB_f32              quantised weights
    layer.tT.CA_i8, .SCA_f32, .y_f16        quantised input and the output at threshold T
    model.t6.logits_last8                   the model's logits at the last 8 positions

python tests/reference/int8_bitsandbytes.py MODEL GOLDEN        Needs golden.py's GOLDEN/golden.json and bitsandbytes 0.48.2.
"""
import json
import sys

import bitsandbytes
import torch
import torch.nn as nn
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear8bitLt
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_files import write_json
from perplexity import nll_by_window, perplexity, windows

NOTE = ("LLM.int8() as bitsandbytes itself computes it on the CPU: one layer in detail, and the whole model. Made by "
        "tests/reference/int8_bitsandbytes.py. The model runs in fp32 around Linear8bitLt layers (every nn.Linear but lm_head; inputs cast to "
        "fp16, outputs back to fp32), has_fp16_weights=False, thresholds 6.0 and 0.0.")
LAYER = {"bloom": "transformer.h.1.self_attention.query_key_value", "opt": "model.decoder.layers.1.fc1"}
model_folder, golden_folder = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(model_folder)


def load():
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager").eval()


def int8_linear(linear, threshold):
    """In eval mode: while training, bitsandbytes' CPU path multiplies dequantised weights instead."""
    layer = Linear8bitLt(linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False, threshold=threshold)
    layer.weight = Int8Params(linear.weight.data.half().clone(), requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.half(), requires_grad=False)
    return layer.to("cpu").eval()


def quantise(module, threshold):
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and name != "lm_head":
            layer = int8_linear(child, threshold)
            layer.forward = (lambda forward: lambda x: forward(x.half()).float())(layer.forward)
            setattr(module, name, layer)
        else:
            quantise(child, threshold)
    return module.eval()


@torch.no_grad()
def main():
    model = load()
    kind = model.config.model_type
    prompts = json.load(open(f"{golden_folder}/golden.json", encoding="utf-8"))["prompts"]
    ids = torch.tensor([next(p["ids"] for p in prompts if p["name"] == "code")])
    linear, seen = model.get_submodule(LAYER[kind]), {}
    linear.register_forward_pre_hook(lambda module, args: seen.__setitem__("x", args[0].reshape(-1, args[0].shape[-1]).half()))
    model(input_ids=ids)
    x = seen["x"]
    record = {"layer": LAYER[kind], "prompt": "code", "bitsandbytes": bitsandbytes.__version__, "note": NOTE}
    codes, scales, _ = int8_vectorwise_quant(linear.weight.data.half())
    exact = linear(x.float())
    tensors = {"layer.x_f16": x.clone(), "layer.CB_i8": codes, "layer.SCB_f32": scales, "layer.y_f32_exact": exact}
    for threshold in (0.0, 6.0):
        name = f"layer.t{threshold:g}"
        codes, scales, columns = int8_vectorwise_quant(x.clone(), threshold=threshold)
        y = int8_linear(linear, threshold)(x.clone())
        tensors |= {name + ".CA_i8": codes, name + ".SCA_f32": scales, name + ".y_f16": y}
        record[name] = {"outlier_cols": [] if columns is None else columns.tolist(),
                        "max_abs_err_vs_exact": round((y.float() - exact).abs().max().item(), 6)}
    text, _ = windows(tokenizer, kind)
    for threshold in (6.0, 0.0):
        quantised = quantise(load(), threshold)
        record[f"perplexity_t{threshold:g}"] = round(perplexity(nll_by_window(quantised, text)), 5)
        if threshold == 6.0:
            tensors["model.t6.logits_last8"] = quantised(input_ids=ids).logits[0, -8:]
            new = quantised.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=32)
            record["model.t6.greedy_ids"] = new[0, ids.shape[1]:].tolist()
            record["model.t6.greedy_text"] = tokenizer.decode(new[0, ids.shape[1]:], clean_up_tokenization_spaces=False)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{golden_folder}/int8_bnb.safetensors")
    write_json(f"{golden_folder}/int8_bnb.json", record)
    print({key: value for key, value in record.items() if key.startswith(("perplexity", "layer."))})


main()
