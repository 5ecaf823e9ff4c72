#!/usr/bin/env python3
"""Loads checkpoints that `llm8 quantize` writes with Transformers and bitsandbytes, on the CPU, and compares the tokens.

    python3 bitsandbytes_interop.py LLM8 MODEL... [--scratch DIR]

For every model: `llm8 quantize`, then greedy generation from the same prompts by llm8 (which loads what it wrote) and by
Transformers; every weight that bitsandbytes holds is compared with the file too. Exits with 1 if any weight or token differs.
With --int8-head Transformers must refuse the checkpoint, by name, instead of taking its codes for 16-bit numbers.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

PROMPTS = [[2, 45, 7, 99, 13], [2, 17, 17, 120, 64, 3, 88, 91], [2, 150, 31, 5, 77, 12, 140, 9, 61, 4, 22]]
NEW_TOKENS = 24


def run(llm8, *args):
    return subprocess.run([llm8, *map(str, args)], check=True, capture_output=True, text=True).stdout


def greedy(llm8, folder, ids):
    text = run(llm8, "generate", "-m", folder, "--prompt-ids", ",".join(map(str, ids)), "-n", NEW_TOKENS, "--ignore-eos", "--json", "-q")
    return json.loads(text)["ids"]


def stored(folder):
    """Every tensor in the files."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            tensors.update({name: weights.get_tensor(name) for name in weights.keys()})
    return tensors


def compare(llm8, model, folder):
    shutil.rmtree(folder, ignore_errors=True)
    run(llm8, "quantize", "-m", model, "-o", folder, "--shard-size", "2MB", "-q")
    # In f32, so that the activations are not rounded to 16 bits between layers, as llm8's are not.
    reference = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32).eval()
    tensors = stored(folder)
    layers = 0
    for name, module in reference.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            assert torch.equal(module.weight.data, tensors[f"{name}.weight"]), name
            assert torch.equal(module.weight.SCB, tensors[f"{name}.SCB"]), name
            layers += 1
    assert layers == sum(name.endswith(".SCB") for name in tensors), f"{layers} layers in int8"
    same = 0
    for ids in PROMPTS:
        wanted = reference.generate(
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :].tolist()
        found = greedy(llm8, folder, ids)
        common = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), NEW_TOKENS)
        print(f"  prompt of {len(ids)}: {common} of {NEW_TOKENS} tokens the same")
        same += common
    print(f"  {layers} int8 layers the same to the bit, {same} of {NEW_TOKENS * len(PROMPTS)} tokens")
    return same == NEW_TOKENS * len(PROMPTS)


def refuses_int8_head(llm8, model, folder):
    shutil.rmtree(folder, ignore_errors=True)
    run(llm8, "quantize", "-m", model, "-o", folder, "--int8-head", "-q")
    try:
        AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    except ValueError as error:
        print(f"  int8 head: refused: {error}")
        return True
    print("  int8 head: LOADED, though its embedding cannot be read as 16-bit numbers")
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llm8")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("target/reference/interop"))
    args = parser.parse_args()
    fine = True
    for model in args.models:
        print(model)
        folder = args.scratch / model.name
        fine &= compare(args.llm8, model, folder)
        fine &= refuses_int8_head(args.llm8, model, folder)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
