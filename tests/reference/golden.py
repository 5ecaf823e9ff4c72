"""Expected outputs of Transformers for one checkpoint (read in fp32, eager attention, CPU).

golden.json          prompts with ids, arg-max at every position, NLL, 32 greedy tokens with the top1-top2 logit margin of every step,
                     a beam search, a left-padded batch
golden.safetensors   ids.N I64 (tokens); logits.N F32 (tokens, vocab), or with logits_at.N I64 (positions) F32 (positions, vocab);
                     hidden.J F32 (tokens, hidden) for the prompt `hidden_prompt`: J = 0 is the input of block 0, J the output of
                     block J - 1; hidden.final after the last norm; batch.*

python tests/reference/golden.py MODEL GOLDEN [--light]
e.g. MODEL tests/fixtures/tiny-bloom, GOLDEN tests/fixtures/golden/tiny-bloom. --light keeps the last position's logits of most prompts only.
A folder GOLDEN that ends in -outliers takes its parent's prompts, which must be there. Needs torch 2.8.0 and transformers 4.57.6.
"""
import json
import os
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_files import write_json

LONG = ("The package manager downloads the list of available packages from the servers that are named in the configuration file, "
        "checks their signatures, and then resolves the dependencies of every package that the user has asked for. ") * 8
# The first wording whose greedy continuation has no near-tie (every top1-top2 margin >= 0.004) is taken; if none has, the one with the widest.
PROMPTS = [
    ("en", ["The Debian project is", "The Debian project was", "Debian is", "This chapter describes"]),
    ("fr", ["Le système d'exploitation", "Le système de fichiers", "Les paquets Debian", "Cette commande permet"]),
    ("es", ["Para instalar el paquete,", "Para instalar los paquetes,", "El sistema de archivos", "Esta opción permite", "Si quiere instalar"]),
    ("zh", ["您可以使用以下命令来安装软件包：", "您可以使用以下命令：", "这个文件包含", "安装程序会"]),
    ("code", ["fn main() {\n    let mut x = 5;\n    println!(", "fn main() {\n    let x = 5;\n    println!(",
              "fn add(a: i32, b: i32) -> i32 {\n    ", "def main():\n    for i in range(10):\n        print("]),
    ("space", [" "]),
    ("mixed", ["Debian 是一个 system, et c'est libre 😀!", "Debian 是一个 system, et c'est libre 😀", "Linux 是一个 kernel, y es libre 😀.",
               "«Debian» 是一个 system 😀 et"]),
    ("long", [LONG]),
]
HIDDEN_PROMPT = "en"
BATCH = ["en", "zh", "code"]

model_folder, golden_folder = (path.rstrip("/") for path in sys.argv[1:3])
light = "--light" in sys.argv
torch.manual_seed(0)
os.makedirs(golden_folder, exist_ok=True)
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager").eval()
tokenizer = AutoTokenizer.from_pretrained(model_folder)
kind = model.config.model_type
if golden_folder.endswith("-outliers"):
    parent = json.load(open(golden_folder.removesuffix("-outliers") + "/golden.json", encoding="utf-8"))
    PROMPTS = [(p["name"], [LONG if p["name"] == "long" else p["text"]]) for p in parent["prompts"]]
tensors = {}
record = {"model_type": kind, "prompts": [], "dtype_of_golden": "float32 arithmetic on the stored weights",
          "transformers": transformers.__version__, "torch": torch.__version__}


def decode(ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def greedy(ids, count=32):
    """Arg-max decoding with the cache, and the margin top1-top2 at each step: a tie may break otherwise in another arithmetic."""
    input_ids = torch.tensor([ids])
    output = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, num_beams=1,
                            max_new_tokens=count, return_dict_in_generate=True, output_logits=True)
    best_two = [logits[0].float().topk(2).values for logits in output.logits]
    return output.sequences[0, len(ids):].tolist(), [round((first - second).item(), 5) for first, second in best_two]


def prompt(name, texts):
    best = None
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        if name == "long":
            ids = ids[:200]
        new, margins = greedy(ids)
        if best is None or min(margins) > min(best[3]):
            best = (text, ids, new, margins)
        if min(best[3]) >= 0.004:
            break
    text, ids, new, margins = best
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    tensors[f"ids.{name}"] = torch.tensor(ids)
    if name == "long":
        at = torch.tensor(sorted(set(range(0, len(ids), 50)) | {len(ids) - 1}))
        tensors[f"logits_at.{name}"], tensors[f"logits.{name}"] = at, logits[at]
    elif light and name not in ("en", "zh"):
        tensors[f"logits_at.{name}"], tensors[f"logits.{name}"] = torch.tensor([len(ids) - 1]), logits[-1:]
    else:
        tensors[f"logits.{name}"] = logits
    nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item() if len(ids) > 1 else 0.0
    record["prompts"].append({
        "name": name, "text": decode(ids) if name == "long" else text, "ids": ids, "argmax": logits.argmax(-1).tolist(),
        "nll_sum": round(nll, 5), "greedy_ids": new, "greedy_margin": margins, "greedy_text": decode(new)})
    print(f"[{name}] {text[-60:]!r} -> {decode(new)!r}  smallest margin {min(margins):.4f}")


def hidden_states(ids):
    blocks = model.transformer.h if kind == "bloom" else model.model.decoder.layers
    seen = {}

    def first(output):
        return (output[0] if isinstance(output, tuple) else output)[0].clone()
    hooks = [blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.__setitem__(0, first(args[0] if args else kwargs["hidden_states"])), with_kwargs=True)]
    for j, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(lambda module, args, output, j=j: seen.__setitem__(j + 1, first(output))))
    output = model(input_ids=ids[None], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    for j, states in seen.items():
        tensors[f"hidden.{j}"] = states.reshape(len(ids), -1)
    tensors["hidden.final"] = output.hidden_states[-1][0].clone()
    record["hidden_prompt"] = HIDDEN_PROMPT


def beam_search(ids):
    settings = {"num_beams": 4, "max_new_tokens": 32, "length_penalty": 1.0, "early_stopping": False}
    output = model.generate(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), do_sample=False, num_return_sequences=4,
                            return_dict_in_generate=True, output_scores=True, **settings)
    new = [sequence[len(ids):] for sequence in output.sequences]
    record["beam"] = {"prompt": HIDDEN_PROMPT, **settings, "sequences": [ids.tolist() for ids in new],
                      "scores": [round(score, 6) for score in output.sequences_scores.tolist()], "texts": [decode(ids) for ids in new]}


def left_padded_batch():
    pad = model.config.pad_token_id
    rows = [tensors[f"ids.{name}"].tolist() for name in BATCH]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    last = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    new = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=16)[:, width:]
    tensors["batch.input_ids"], tensors["batch.attention_mask"], tensors["batch.last_logits"] = ids, mask, last
    record["batch"] = {"prompts": BATCH, "padding_side": "left", "pad_token_id": pad, "greedy_ids": new.tolist()}


with torch.no_grad():
    for name, texts in PROMPTS:
        prompt(name, texts)
    hidden_states(tensors[f"ids.{HIDDEN_PROMPT}"])
    beam_search(tensors[f"ids.{HIDDEN_PROMPT}"])
    left_padded_batch()
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{golden_folder}/golden.safetensors")
write_json(f"{golden_folder}/golden.json", record)
