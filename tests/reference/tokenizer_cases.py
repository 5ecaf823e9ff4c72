"""Expected tokenizations: strings with ids, tokens, offsets (characters and UTF-8 bytes) and decodings, by Transformers' fast tokenizer.

Writes GOLDEN/tokenizer_cases.json. For OPT, whose Hub repositories hold no tokenizer.json, `ids_slow` is the Python tokenizer's answer.

python tests/reference/tokenizer_cases.py tests/fixtures/tiny-bloom tests/fixtures/golden/tiny-bloom        (likewise tiny-opt)
"""
import os
import sys

from transformers import AutoTokenizer, GPT2Tokenizer

from checkpoint_files import write_json

TEXTS = [
    "", " ", "  ", "   a", "a   ", "\n", "\n\n", "\n\n\n  x", "\t", "\tx\ty", "a\tb", "a\r\nb", "Hello world", " Hello world",
    "  Hello  world  ", "Hello, world!", "Hello,world!!", "Hello ,world ;ok", "don't can't I'll we've they're it's", "DON'T I'LL",
    "l'été d'où qu'il n'y a", "naïve café déjà vu œuvre", "cafe\u0301 e\u0301te\u0301", "A\u030Angstro\u0308m", "ñandú ¿qué? ¡sí!",
    "Größe Straße ÄÖÜ", "你好，世界！", "你好,世界!", "您可以使用以下命令来安装软件包：apt install", "中文 with English 混合 text", "一、二、三。", "「引号」《书名》",
    "日本語のテキスト、です。", "한국어 텍스트", "Привет, мир!", "Γειά σου Κόσμε", "مرحبا، كيف حالك؟", "שלום עולם", "नमस्ते दुनिया।", "ภาษาไทย", "😀",
    "😀😀", "👩‍👩‍👧‍👦 family", "🇫🇷 drapeau", "a😀b", "x\u200by", "a\u00a0b", "\u3000全角空格\u3000", "\ufeffBOM", "tab\t\ttab  two",
    "1234567890", "3.14159, 2,718", "2024-01-01T00:00:00Z", "v1.2.3-rc4", "fn main() {\n    println!(\"hi {}\", x);\n}",
    "def f(x):\n\treturn x**2  # comment", "if (a && b || !c) { x += 1; }", "<html><body>&amp;</body></html>",
    "http://www.debian.org/doc/?q=a&b=c#d", "user@example.org", "C:\\path\\to\\file", "$HOME/.bashrc | grep -v '^#' > /dev/null",
    "... … . . .", "!!!???", "(a|b) [c] {d} | e", "a|b|c", "((nested (parens)))", "under_score camelCase PascalCase SCREAMING_CASE",
    "a" * 50, "the " * 12, "</s>", "<s>Hello</s>", "a <pad> b", "<unk>", "x</s>y </s> z", "\x00\x01\x7f", "ﬁ ligature ①②③ ½",
    "e\u0301\u0301\u0301 zalgo", "\U0001d54f math \U00020000 ext", "line1\nline2\n\nline4\n", "trailing newline\n", " \n \n ",
    "- item\n- item2\n  * sub",
]

model_folder, golden_folder = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(model_folder)
slow = GPT2Tokenizer.from_pretrained(model_folder) if os.path.exists(f"{model_folder}/vocab.json") else None
cases = []
for text in TEXTS:
    ids = tokenizer(text)["input_ids"]
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    byte_at = [0]
    for character in text:
        byte_at.append(byte_at[-1] + len(character.encode("utf-8")))
    cases.append({
        "text": text, "ids": ids, "ids_no_special": plain["input_ids"], "tokens": tokenizer.convert_ids_to_tokens(plain["input_ids"]),
        "offsets_char": plain["offset_mapping"], "offsets_byte": [[byte_at[start], byte_at[end]] for start, end in plain["offset_mapping"]],
        "decoded": tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        "decoded_skip_special": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)})
    if slow:
        cases[-1]["ids_slow"] = slow(text)["input_ids"]
write_json(f"{golden_folder}/tokenizer_cases.json", {
    "class": type(tokenizer).__name__, "note": "offsets belong to ids_no_special; offsets_byte are the same spans in UTF-8 bytes", "cases": cases})
print(len(cases), "cases; not restored by decoding:", [case["text"] for case in cases if case["decoded_skip_special"] != case["text"]])
