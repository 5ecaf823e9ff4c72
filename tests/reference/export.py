"""Writes a trained checkpoint as tests/fixtures/tiny-bloom or tests/fixtures/tiny-opt: fp16, in the layout of the Hub.

Reads target/reference/train/KIND/checkpoint.pt (train.py) and target/reference/tokenizers/KIND (train_tokenizers.py). Keys of config.json
and tensor names are those of bigscience/bloom-560m (no prefix, no lm_head: tied) and facebook/opt-125m (`model.decoder.`, tied).

python tests/reference/export.py bloom|opt
"""
import os
import shutil
import sys
from collections import OrderedDict

import torch

from checkpoint_files import write_json, write_weights

CONFIG = {
    "bloom": {
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
        "architectures": ["BloomForCausalLM"], "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        "unk_token_id": 0, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True,
        "model_type": "bloom", "n_embed": 256, "n_inner": None, "n_layer": 4, "num_attention_heads": 8, "offset_alibi": 100,
        "pretraining_tp": 1, "seq_length": 256, "skip_bias_add": True, "skip_bias_add_qkv": False, "transformers_version": "4.20.0",
        "use_cache": True, "vocab_size": 5120, "torch_dtype": "float16"},
    "opt": {
        "_name_or_path": "tiny-opt", "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
        "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1,
        "eos_token_id": 2, "ffn_dim": 1024, "hidden_size": 256, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 512,
        "model_type": "opt", "num_attention_heads": 8, "num_hidden_layers": 4, "pad_token_id": 1, "prefix": "</s>",
        "torch_dtype": "float16", "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 5120, "word_embed_proj_dim": 256}}

kind = sys.argv[1]
config, folder = CONFIG[kind], f"tests/fixtures/tiny-{kind}"
tensors = OrderedDict()
for name, tensor in torch.load(f"target/reference/train/{kind}/checkpoint.pt")["model"].items():
    if name != "lm_head.weight":
        tensors[name.removeprefix("transformer.")] = tensor.half().contiguous()
write_json(f"{folder}/config.json", config)
write_json(f"{folder}/generation_config.json", {
    "_from_model_config": True, "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"],
    "pad_token_id": config["pad_token_id"], "transformers_version": "4.27.0.dev0"})
write_weights(folder, tensors)
for file in os.listdir(f"target/reference/tokenizers/{kind}"):
    shutil.copyfile(f"target/reference/tokenizers/{kind}/{file}", f"{folder}/{file}")
