"""Cuts the held-out text, tests/fixtures/heldout.txt, from the documents that are never trained on: English, French, Spanish, Chinese, German.

Reads target/reference/corpus/test.jsonl (corpus.py) and prints which documents were used.

python tests/reference/heldout_text.py
"""
import json

BUDGET = {"en": 22000, "fr": 11000, "es": 9000, "zh": 9000, "de": 4000}          # bytes
documents = [json.loads(line) for line in open("target/reference/corpus/test.jsonl", encoding="utf-8")]
parts, used = [], {}
for language, budget in BUDGET.items():
    texts, size = [], 0
    for document in sorted((d for d in documents if d["lang"] == language), key=lambda d: d["id"]):
        text = document["text"].strip()
        cap = min(3500, budget - size)
        if len(text.encode()) > cap:                                             # whole paragraphs only
            paragraphs, length = [], 0
            for paragraph in text.split("\n"):
                if length + len(paragraph.encode()) + 1 > cap:
                    break
                paragraphs.append(paragraph)
                length += len(paragraph.encode()) + 1
            text = "\n".join(paragraphs)
        if len(text.encode()) < 300:
            continue
        texts.append(text)
        size += len(text.encode())
        used.setdefault(document["pkg"], []).append(document["id"])
        if size > budget - 400:
            break
    parts.append("\n".join(texts) + "\n")
with open("tests/fixtures/heldout.txt", "w", encoding="utf-8") as file:
    file.write("".join(parts))
print(json.dumps(used, indent=1, ensure_ascii=False))
