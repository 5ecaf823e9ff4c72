"""Trains tiny-bloom or tiny-opt (the BloomForCausalLM / OPTForCausalLM modules of Transformers) on the packed token stream.

Reads target/reference/tokenizers (train_tokenizers.py), writes target/reference/train/KIND/{checkpoint.pt,log.json}. The forward pass
restates the modules' with fused attention and GELU, over the very same parameters, and is checked against theirs before training starts.
The cosine runs over training time (a step counts at most 20 s, so a stopped process loses nothing). Every step's learning rate is
logged; --replay LOG trains with the logged rates instead.

python tests/reference/train.py bloom|opt --minutes 35 [--bf16] [--resume]
"""
import argparse
import json
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("kind", choices=("bloom", "opt"))
parser.add_argument("--minutes", type=float, default=35)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--batch", type=int, default=0)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--resume", action="store_true")
parser.add_argument("--replay")
parser.add_argument("--seed", type=int, default=1234)
args = parser.parse_args()
torch.manual_seed(args.seed)
folder = f"target/reference/train/{args.kind}"
os.makedirs(folder, exist_ok=True)

HIDDEN, LAYERS, HEADS, VOCAB = 256, 4, 8, 5120
if args.kind == "bloom":
    length, batch_size = 256, args.batch or 16
    model = BloomForCausalLM(BloomConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=1,
        eos_token_id=2, pad_token_id=3, unk_token_id=0))
else:
    length, batch_size = 512, args.batch or 8
    model = OPTForCausalLM(OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_dim=1024, max_position_embeddings=512,
        do_layer_norm_before=True, activation_function="relu", word_embed_proj_dim=HIDDEN, dropout=0.0, attention_dropout=0.0,
        pad_token_id=1, bos_token_id=2, eos_token_id=2))
for name, parameter in model.named_parameters():          # residual projections start smaller (GPT-2's rule)
    if name.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight", "out_proj.weight", "fc2.weight")):
        parameter.data.mul_(1 / math.sqrt(2 * LAYERS))
embedding = model.get_input_embeddings().weight

slopes = torch.tensor([2.0 ** (-8.0 * (i + 1) / HEADS) for i in range(HEADS)]).view(1, HEADS, 1, 1)
position = torch.arange(length)
key, query = position.view(1, 1, 1, length), position.view(1, 1, length, 1)
ALIBI = (slopes * (key - query)).masked_fill(key > query, -1e30)          # (1, heads, tokens, tokens)


def norm(x, layer):
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def bloom_hidden(ids):
    batch, tokens = ids.shape
    body = model.transformer
    x = norm(F.embedding(ids, body.word_embeddings.weight), body.word_embeddings_layernorm)
    mask = ALIBI[:, :, :tokens, :tokens]
    for block in body.h:
        attention = block.self_attention
        qkv = attention.query_key_value(norm(x, block.input_layernorm)).view(batch, tokens, HEADS, 3, HIDDEN // HEADS)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype)).transpose(1, 2).reshape(batch, tokens, HIDDEN)
        x = x + attention.dense(mixed)
        x = x + block.mlp.dense_4h_to_h(F.gelu(block.mlp.dense_h_to_4h(norm(x, block.post_attention_layernorm)), approximate="tanh"))
    return norm(x, body.ln_f)


def opt_hidden(ids):
    batch, tokens = ids.shape
    body = model.model.decoder
    x = F.embedding(ids, body.embed_tokens.weight) + body.embed_positions.weight[2:2 + tokens]
    for block in body.layers:
        attention, normed = block.self_attn, norm(x, block.self_attn_layer_norm)
        q, k, v = (projection(normed).view(batch, tokens, HEADS, HIDDEN // HEADS).transpose(1, 2)
                   for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
        x = x + attention.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, tokens, HIDDEN))
        x = x + block.fc2(F.relu(block.fc1(norm(x, block.final_layer_norm))))
    return norm(x, body.final_layer_norm)


hidden = bloom_hidden if args.kind == "bloom" else opt_hidden


def loss_of(ids):
    states = hidden(ids[:, :-1]).reshape(-1, HIDDEN)
    return F.cross_entropy(F.linear(states, embedding).float(), ids[:, 1:].reshape(-1))


def stream_of(split):
    return torch.from_numpy(np.fromfile(f"target/reference/tokenizers/{args.kind}.{split}.u16", dtype=np.uint16).astype(np.int64))


stream, test = stream_of("train"), stream_of("test")
windows = (len(stream) - 1) // length
order = torch.randperm(windows, generator=torch.Generator().manual_seed(args.seed))          # one pass = every window once
held_out = [test[i:i + length + 1] for i in range(0, len(test) - length - 1, length)]
held_out = torch.stack(held_out[:: max(1, len(held_out) // (8192 // length))][: 8192 // length])


def batch_of(step):
    starts = [int(order[(step * batch_size + j) % windows]) * length for j in range(batch_size)]
    return torch.stack([stream[start:start + length + 1] for start in starts])


@torch.no_grad()
def evaluate():
    model.eval()
    total = sum(loss_of(held_out[i:i + 8]).item() * len(held_out[i:i + 8]) for i in range(0, len(held_out), 8))
    model.train()
    return total / len(held_out)


with torch.no_grad():
    model.eval()
    ids = held_out[:2, :64]
    difference = (F.linear(hidden(ids), embedding) - model(input_ids=ids).logits).abs().max().item()
    print("this forward against Transformers': largest difference", difference, flush=True)
    assert difference < 2e-3

decayed = [p for n, p in model.named_parameters() if p.dim() >= 2 and "embed" not in n]
others = [p for n, p in model.named_parameters() if not (p.dim() >= 2 and "embed" not in n)]
optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                              lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
step, used, log = 0, 0.0, {"lr": [], "eval": []}
if args.resume and os.path.exists(f"{folder}/checkpoint.pt"):
    saved = torch.load(f"{folder}/checkpoint.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step, used, log = saved["step"], saved["used"], saved["log"]
replay = json.load(open(args.replay))["lr"] if args.replay else None


def save():
    loss = evaluate()
    log["eval"].append([step, step * batch_size * length, round(used), round(loss, 4), round(math.exp(loss), 2)])
    print(f"step {step}: held-out perplexity {math.exp(loss):.2f}", flush=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "used": used, "log": log}, f"{folder}/checkpoint.tmp")
    os.replace(f"{folder}/checkpoint.tmp", f"{folder}/checkpoint.pt")
    json.dump(log, open(f"{folder}/log.json", "w"))


model.train()
last_save = used
while True:
    done = min(1.0, used / (args.minutes * 60))
    if step >= len(replay) if replay else done >= 1.0:
        break
    rate = replay[step] if replay else args.lr * min(1, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    started = time.time()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
        loss = loss_of(batch_of(step))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    used += min(time.time() - started, 20.0)
    step += 1
    log["lr"].append(rate)
    if step % 20 == 0:
        print(f"step {step} loss {loss.item():.3f} lr {rate:.5f} used {used / 60:.1f} min", flush=True)
    if used - last_save > 100:
        last_save = used
        save()
save()
