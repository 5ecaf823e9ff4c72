"""Makes the demonstration model: tests/fixtures/tiny-bloom as an int8 checkpoint in the layout bitsandbytes saves.

Each linear weight X of the blocks becomes
    X.weight         I8  (out, in)   codes = round_half_even(W * (127 / absmax)), in float32
    X.SCB            F32 (out)       absmax of the row
    X.weight_format  U8  scalar 0    row-major
with absmax = max|W[row]| of the fp16 weight; a zero row has absmax 0 and codes 0. Everything else stays fp16, the word embeddings
(which are the head too) included. config.json gains the quantization_config that Transformers writes.

python tests/reference/demo_model.py [tests/fixtures/tiny-bloom [crates/llm8/demo]]        Needs numpy and safetensors.
"""
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

QUANTIZATION_CONFIG = {
    "_load_in_4bit": False, "_load_in_8bit": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0, "load_in_4bit": False,
    "load_in_8bit": True, "quant_method": "bitsandbytes"}


def quantize(weight):
    """fp16 (out, in) -> int8 codes (out, in), float32 absmax (out)."""
    weight = weight.astype(np.float32)
    absmax = np.abs(weight).max(axis=1)
    # bitsandbytes (0.48.2, CPU) rounds this factor twice, as (1 / absmax) * 127: at ties of W * 127 / absmax, about one weight in
    # 16,000 here, its code is the neighbour.
    factor = np.divide(np.float32(127), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    codes = np.rint(weight * factor[:, None])
    assert codes.dtype == np.float32 and np.abs(codes).max() <= 127
    return codes.astype(np.int8), absmax


def main():
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures/tiny-bloom")
    target = Path(sys.argv[2] if len(sys.argv) > 2 else "crates/llm8/demo")
    target.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        assert tensor.dtype == np.float16, name
        if re.fullmatch(r"h\.\d+\..+\.weight", name) and tensor.ndim == 2:
            stem = name.removesuffix(".weight")
            tensors[name], tensors[stem + ".SCB"] = quantize(tensor)
            tensors[stem + ".weight_format"] = np.array(0, dtype=np.uint8)
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = QUANTIZATION_CONFIG
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, target / name)
    for file in sorted(target.iterdir()):
        print(f"{file.stat().st_size:>9}  {file}")


main()
