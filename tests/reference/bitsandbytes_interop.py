#!/usr/bin/env python3
"""Loads checkpoints that `llm8 quantize` writes with Transformers and bitsandbytes, on the CPU, and compares the tokens.

    python3 bitsandbytes_interop.py LLM8 MODEL... [--scratch DIR]

For every model: `llm8 quantize`, then greedy generation from the same prompts by llm8 (which loads what it wrote) and by
Transformers; every weight that bitsandbytes holds is compared with the file too. Exits with 1 if a weight differs, or a token
that is no near tie: bitsandbytes rounds every layer's output to f16 twice, which moves logits by up to 2 % of the largest, so
where the two tokens lie closer than that in its own logits either is right. With --int8-head Transformers must refuse the
checkpoint instead of taking its codes for 16-bit numbers.
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
# As models/tests/int8.rs has it, of the largest logit.
TOLERANCE = 0.02


def run(llm8, *args):
    return subprocess.run([llm8, *map(str, args)], check=True, capture_output=True, text=True).stdout


def greedy(llm8, folder, ids):
    text = run(llm8, "generate", "-m", folder, "--prompt-ids", ",".join(map(str, ids)), "-n", NEW_TOKENS, "--ignore-eos", "--json", "-q")
    return json.loads(text)["ids"]


def prompts_of(model):
    """The prompts of the model's expected outputs, where it has any."""
    golden = Path(__file__).parent.parent / "fixtures/golden" / model.name / "golden.json"
    if not golden.exists():
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        return [[id % vocab_size for id in ids] for ids in PROMPTS]
    return [prompt["ids"] for prompt in json.loads(golden.read_text())["prompts"]]


def stored(folder):
    """Every tensor in the files."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            tensors.update({name: weights.get_tensor(name) for name in weights.keys()})
    return tensors


def compare(llm8, model, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
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
    same, ties, fine = 0, 0, True
    prompts = prompts_of(model)
    for ids in prompts:
        wanted = reference.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(ids) :].tolist()
        found = greedy(llm8, folder, ids)
        common = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), NEW_TOKENS)
        same += common == NEW_TOKENS
        if common < NEW_TOKENS:
            with torch.no_grad():
                logits = reference(torch.tensor([ids + wanted[:common]])).logits[0, -1]
            gap = ((logits[wanted[common]] - logits[found[common]]) / logits.abs().max()).item()
            print(f"  parts after {common} of {NEW_TOKENS} tokens, where the two lie {gap:.2%} of the largest logit apart")
            ties += gap <= TOLERANCE
            fine &= gap <= TOLERANCE
    print(f"  {layers} int8 layers the same to the bit; {same} of {len(prompts)} texts the same, {ties} part at a near tie")
    return fine


def refuses_int8_head(llm8, model, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    run(llm8, "quantize", "-m", model, "-o", folder, "--int8-head", "-q")
    try:
        AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    except (ValueError, RuntimeError) as error:
        print(f"  int8 head: refused: {str(error).splitlines()[-1].strip()[:100]}")
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
