"""Makes tests/fixtures/random: tiny checkpoints with random weights, one for each form of the files and of the architecture that the
trained models do not have, and what Transformers makes of them.

tests/fixtures/random/NAME/ holds config.json, the weights, and expected.safetensors:
    input_ids    I64 (2, tokens)
    logits       F32 (2, tokens, vocab)     fp32 arithmetic on the stored weights, eager attention
    hidden.0     F32 (tokens, hidden)       first sequence: the input of block 0
    hidden.I     F32 (tokens, hidden)       the output of block I - 1
    hidden.final F32 (tokens, hidden)       after the model's last norm; a model without one has its last hidden.I here.
                                            OPT's project_out, where there is one, comes after this.
The files are read back with from_pretrained, which must find every tensor it wants and no other.

python tests/reference/random_checkpoints.py [NAME ...]      Needs torch 2.8.0 (CPU) and transformers 4.57.6.
"""
import io
import json
import math
import shutil
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint_files import build_opt_without_affine_norms, write_json, write_weights

OUT = Path("tests/fixtures/random")

OPT = {  # the keys of facebook/opt-125m's config.json
    "activation_dropout": 0.0, "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
    "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 128, "hidden_size": 32,
    "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 64, "model_type": "opt", "num_attention_heads": 4,
    "num_hidden_layers": 2, "pad_token_id": 1, "prefix": "</s>", "transformers_version": "4.21.0.dev0", "use_cache": True,
    "vocab_size": 160, "word_embed_proj_dim": 32}
BLOOM = {
    "apply_residual_connection_post_layernorm": False, "architectures": ["BloomForCausalLM"], "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "model_type": "bloom", "n_inner": None,
    "n_layer": 2, "offset_alibi": 100, "pad_token_id": 3, "pretraining_tp": 1, "seq_length": 64, "skip_bias_add": True,
    "skip_bias_add_qkv": False, "slow_but_exact": False, "transformers_version": "4.21.0.dev0", "unk_token_id": 0, "use_cache": True,
    "vocab_size": 160}

CHECKPOINTS = {
    "opt-350m-form": dict(      # norms after the residual, no last norm, embeddings narrower than the model
        config={**OPT, "do_layer_norm_before": False, "hidden_size": 48, "word_embed_proj_dim": 32, "ffn_dim": 96},
        dtype=torch.float16, prefix="model.decoder.", container="bin", lm_head="shared", metadata=True),
    "galactica-form": dict(     # GELU (erf), linear layers without bias; the archive's root folder is `archive`
        config={**OPT, "activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": True, "hidden_size": 48,
                "word_embed_proj_dim": 48, "ffn_dim": 192, "bos_token_id": 0, "_remove_final_layer_norm": False, "vocab_size": 150},
        dtype=torch.float16, prefix="model.decoder.", container="bin", archive_root=True),
    "opt-plain-norms": dict(    # no bias and no parameter in any norm either; only the linear weights and the embeddings remain
        config={**OPT, "activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False},
        dtype=torch.float16, prefix="model.decoder."),
    "opt-odd": dict(            # sizes that are no multiple of 16, and as many tokens as there are positions
        config={**OPT, "hidden_size": 36, "word_embed_proj_dim": 36, "num_attention_heads": 3, "ffn_dim": 100, "vocab_size": 131,
                "max_position_embeddings": 20},
        dtype=torch.float32, prefix="model.decoder.", tokens=20),
    "opt-sharded-bin": dict(
        config={**OPT, "_remove_final_layer_norm": False}, dtype=torch.bfloat16, prefix="decoder.", container="bin", shards=2),
    "bloom-12-heads": dict(     # ALiBi slopes for a number of heads that is no power of two; config keys as bigscience/bloom-560m
        config={**BLOOM, "n_embed": 48, "num_attention_heads": 12}, dtype=torch.bfloat16, prefix="transformer.", shards=2),
    "bloom-residual": dict(     # residual taken after the norm; a head of its own
        config={**BLOOM, "apply_residual_connection_post_layernorm": True, "tie_word_embeddings": False, "hidden_size": 32, "n_head": 4},
        dtype=torch.float32, prefix="transformer.", lm_head="own"),
    "bloom-bin": dict(          # 5 heads of 8: neither the heads nor the width fit a power of two
        config={**BLOOM, "hidden_size": 40, "n_head": 5, "vocab_size": 163}, dtype=torch.float16, prefix="transformer.", container="bin",
        lm_head="shared"),
}


def random_weights(config, prefix, lm_head, generator):
    """fp32 tensors by checkpoint name. Linear weights keep the size of what they multiply; nothing is left at 0 or 1."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    weights = OrderedDict()
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.15 * normal
        elif parameter.dim() == 1:                                              # a norm's weight
            value = 1 + 0.25 * normal
            if name.endswith("word_embeddings_layernorm.weight"):               # or the tied head would find the input again
                value *= 0.4
        elif "embed" in name or name == "lm_head.weight":
            value = 1.5 / math.sqrt(parameter.shape[1]) * normal
        else:
            value = 1.5 / math.sqrt(parameter.shape[1]) * normal
        if name != "lm_head.weight":
            name = prefix + name.removeprefix("transformer.").removeprefix("model.decoder.")
        weights[name] = value
    assert ("lm_head.weight" in weights) == (lm_head == "own")                  # a tied head is not among the parameters
    return weights


def metadata_of_a_module(weights):
    """What nn.Module.state_dict() attaches to its OrderedDict, and torch.save pickles with it."""
    modules = {""} | {name[:i] for name in weights for i, c in enumerate(name) if c == "."}
    return OrderedDict((module, {"version": 1}) for module in sorted(modules))


def save(folder, weights, config, container, shards, lm_head, archive_root, metadata):
    if lm_head == "shared":
        name = "word_embeddings.weight" if config["model_type"] == "bloom" else "embed_tokens.weight"
        weights["lm_head.weight"] = next(tensor for key, tensor in weights.items() if key.endswith("." + name))
    if metadata:
        weights._metadata = metadata_of_a_module(weights)
    if archive_root:                                                            # as a file object: no file name to take the root from
        buffer = io.BytesIO()
        torch.save(dict(weights), buffer)
        (folder / "pytorch_model.bin").write_bytes(buffer.getvalue())
    else:
        write_weights(folder, weights, container, shards)


def expected(folder, config, tokens, generator):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.eval()
    input_ids = torch.randint(4, config["vocab_size"], (2, tokens), generator=generator)
    if config["model_type"] == "opt":
        input_ids[:, 0] = 2                                                     # </s>, with which every encoding begins
        decoder = model.model.decoder
        blocks, last_norm = decoder.layers, decoder.final_layer_norm
    else:
        blocks, last_norm = model.transformer.h, model.transformer.ln_f
    seen = {}

    def first(output):
        return (output[0] if isinstance(output, tuple) else output)[0].clone()

    blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.__setitem__("hidden.0", first(args[0] if args else kwargs["hidden_states"])), with_kwargs=True)
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda module, args, output, i=i: seen.__setitem__(f"hidden.{i + 1}", first(output)))
    if last_norm is not None:
        last_norm.register_forward_hook(lambda module, args, output: seen.__setitem__("hidden.final", first(output)))
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
        states = dict(seen)
        alone = model(input_ids=input_ids[:1]).logits
    assert torch.allclose(logits[:1], alone, atol=1e-5)
    assert all(torch.allclose(states[name].reshape(tokens, -1), seen[name].reshape(tokens, -1), atol=1e-5) for name in states)
    states.setdefault("hidden.final", states[f"hidden.{len(blocks)}"])
    check_that_it_tests_something(model, input_ids, logits)
    return {"input_ids": input_ids, "logits": logits, **{name: tensor.reshape(tokens, -1).clone() for name, tensor in sorted(states.items())}}


def check_that_it_tests_something(model, input_ids, logits):
    """Logits must be spread, not echo the input, and depend on far tokens and on their order."""
    top = logits.topk(2).values
    best = logits.argmax(-1)
    with torch.no_grad():
        other_first, swapped = input_ids.clone(), input_ids.clone()
        other_first[:, 1] = 5 + (other_first[:, 1] == 5)
        swapped[:, 1], swapped[:, 2] = input_ids[:, 2], input_ids[:, 1]
        far = (model(input_ids=other_first).logits - logits)[:, -1].abs().max().item()
        order = (model(input_ids=swapped).logits - logits)[:, -1].abs().max().item()
    spread, distinct, echo = logits.std(-1).mean().item(), best.unique().numel(), (best == input_ids).float().mean().item()
    print(f"  logits: std {spread:.2f}, largest {logits.abs().max():.1f}, {distinct} different best tokens of {best.numel()}, {echo:.0%} echo the "
          f"input, smallest top-2 gap {(top[..., 0] - top[..., 1]).min():.4f}; changing token 1 moves the last logits by {far:.2f}, "
          f"swapping 1 and 2 by {order:.2f}")
    assert torch.isfinite(logits).all() and 0.4 < spread < 6 and distinct >= 6 and echo < 0.7 and far > 0.05 and order > 0.02


def make(name, config, dtype, prefix, container="safetensors", shards=1, lm_head=None, tokens=12, archive_root=False, metadata=False):
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)
    weights = random_weights(config, prefix, lm_head, generator)
    weights = OrderedDict((key, tensor.to(dtype)) for key, tensor in weights.items())
    save(folder, weights, config, container, shards, lm_head, archive_root, metadata)
    print(name)
    tensors = expected(folder, config, tokens, generator)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "expected.safetensors")


def main():
    torch.set_num_threads(1)
    build_opt_without_affine_norms()
    for name in sys.argv[1:] or CHECKPOINTS:
        make(name, **CHECKPOINTS[name])
    total = 0
    for file in sorted(path for path in OUT.rglob("*") if path.is_file()):
        file.chmod(0o644)
        total += file.stat().st_size
        print(f"{file.stat().st_size:>9}  {file.relative_to(OUT)}")
    print(f"{total:>9}  in all")


main()
