"""Trains the two byte-level BPE tokenizers on the training split and writes them in the layout of the Hub.

BLOOM: tokenizer.json. OPT: vocab.json + merges.txt and no tokenizer.json. Reads target/reference/corpus, writes
target/reference/tokenizers/{bloom,opt}/ and both splits as flat uint16 token streams, KIND.{train,test}.u16 (documents joined by </s>).

python tests/reference/train_tokenizers.py
"""
import json
import os

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = "target/reference/corpus"
OUT = "target/reference/tokenizers"


def read(split):
    return [json.loads(line) for line in open(f"{CORPUS}/{split}.jsonl", encoding="utf-8")]


def write(path, value, **how):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, **how)


def trainer(vocab_size, special_tokens):
    return trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special_tokens, max_token_length=32,
                               initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)


def merge_line(merge):
    return merge if isinstance(merge, str) else " ".join(merge)


def train_bloom(texts):
    """4 special tokens, 5100 tokens; the model has 5120 rows (the Hub pads likewise: 250680 to 250880)."""
    folder = f"{OUT}/bloom"
    os.makedirs(folder, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(" ?[^(\\s|[.,!?…。，、।۔،])]+"), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=False)
    tokenizer.train_from_iterator(texts, trainer(5100, ["<unk>", "<s>", "</s>", "<pad>"]))
    saved = json.loads(tokenizer.to_str())
    saved["model"]["merges"] = [merge_line(m) for m in saved["model"]["merges"]]          # the Hub file's older form
    write(f"{folder}/tokenizer.json", saved, ensure_ascii=False, separators=(",", ":"))
    write(f"{folder}/tokenizer_config.json", {
        "unk_token": "<unk>", "eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "name_or_path": "bigscience/tokenizer",
        "special_tokens_map_file": None, "tokenizer_class": "BloomTokenizerFast", "padding_side": "left"})
    write(f"{folder}/special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})
    return Tokenizer.from_file(f"{folder}/tokenizer.json")


def train_opt(texts):
    """The GPT-2 pre-tokenizer; fairseq's special ids and its odd tail (madeupword*, <mask>)."""
    folder = f"{OUT}/opt"
    os.makedirs(folder, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer(5110, ["<s>", "<pad>", "</s>", "<unk>"]))
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    for token in ("madeupword0000", "madeupword0001", "<mask>"):
        vocab[token] = len(vocab)
    write(f"{folder}/vocab.json", vocab)
    with open(f"{folder}/merges.txt", "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + "".join(merge_line(m) + "\n" for m in model["merges"]))

    def added(content, **more):
        return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, **more}
    names = {"unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write(f"{folder}/tokenizer_config.json", {
        "errors": "replace", **{name: added(token, __type="AddedToken") for name, token in names.items()}, "add_prefix_space": False,
        "add_bos_token": True, "special_tokens_map_file": None, "name_or_path": "patrickvonplaten/opt-30b", "tokenizer_class": "GPT2Tokenizer"})
    write(f"{folder}/special_tokens_map.json", {name: added(names[name]) for name in ("bos_token", "eos_token", "unk_token", "pad_token")})
    tokenizer = Tokenizer(models.BPE.from_file(f"{folder}/vocab.json", f"{folder}/merges.txt"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


train, test = read("train"), read("test")
texts = [document["text"] for document in train]
order = np.random.default_rng(1).permutation(len(train))
for kind, tokenizer in (("bloom", train_bloom(texts)), ("opt", train_opt(texts))):
    for split, documents in (("train", [train[i] for i in order]), ("test", test)):
        ids = [2]
        for encoding in tokenizer.encode_batch([d["text"] for d in documents], add_special_tokens=False):
            ids += encoding.ids + [2]
        np.array(ids, dtype=np.uint16).tofile(f"{OUT}/{kind}.{split}.u16")
        print(kind, split, len(ids), "tokens")
