"""Turns unpacked Debian documentation packages into a cleaned, paragraph-deduplicated multilingual corpus with a 2% held-out split.

Reads SOURCES/PACKAGE/... (unpack_packages.sh); writes target/reference/corpus/{train,test}.jsonl ({"id", "lang", "pkg", "text"} a line)
and stats.json. Deterministic: documents are visited in sorted order; the split is by SHA-1 of the document id.

python tests/reference/corpus.py SOURCES
"""
import gzip
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import defaultdict
from html.parser import HTMLParser
from multiprocessing import Pool

ROOT = sys.argv[1]
OUT = "target/reference/corpus"

# package -> [(regex on path, language)]; the first match wins, no match = skipped
RULES = {
    "debian-handbook": [(r"/html/en-US/", "en"), (r"/html/fr-FR/", "fr"), (r"/html/es-ES/", "es"),
                        (r"/html/zh-CN/", "zh"), (r"/html/de-DE/", "de")],
    "debian-reference-en": [(r"\.en\.html$", "en")],
    "debian-reference-fr": [(r"\.fr\.html$", "fr")],
    "debian-reference-es": [(r"\.es\.html$", "es")],
    "debian-reference-de": [(r"\.de\.html$", "de")],
    "debian-reference-zh-cn": [(r"\.zh-cn\.html$", "zh")],
    "maint-guide": [(r"\.html$", "en")], "maint-guide-fr": [(r"\.html$", "fr")],
    "maint-guide-es": [(r"\.html$", "es")], "maint-guide-zh-cn": [(r"\.html$", "zh")],
    "debian-faq": [(r"\.html$", "en")], "debian-faq-fr": [(r"\.html$", "fr")],
    "debian-faq-zh-cn": [(r"\.html$", "zh")],
    "aptitude-doc-en": [(r"/html/", "en")], "aptitude-doc-fr": [(r"/html/", "fr")],
    "aptitude-doc-es": [(r"/html/", "es")],
    "installation-guide-amd64": [(r"/en/.*\.html$", "en"), (r"/fr/.*\.html$", "fr"),
                                 (r"/es/.*\.html$", "es"), (r"/zh_CN/.*\.html$", "zh"), (r"/de/.*\.html$", "de")],
    "rust-doc": [(r"/html/(book|reference|rust-by-example|nomicon|cargo|rustc|embedded-book|edition-guide|error_codes)/(?!.*(print|/first-edition|second-edition|2018-edition)).*\.html$", "en")],
    "python3.11-doc": [(r"/html/(tutorial|howto|faq|library|reference|using|extending|installing|distributing)/.*\.html$", "en")],
    "developers-reference": [(r"\.html$", "en")], "developers-reference-fr": [(r"\.html$", "fr")],
    "debian-policy": [(r"\.html$", "en")],
    "debmake-doc": [(r"en.*\.html$", "en")],
    "harden-doc": [(r"/(en|html)[^/]*/.*en.*\.html$|\.en\.html$", "en"), (r"\.fr\.html$", "fr"), (r"\.es\.html$", "es")],
    "git-doc": [(r"\.html$", "en")],
    "debian-kernel-handbook": [(r"\.html$", "en")],
    "gimp-help-en": [(r"\.html$", "en")], "gimp-help-fr": [(r"\.html$", "fr")],
    "gimp-help-es": [(r"\.html$", "es")],
    "live-manual-html": [(r"/en/|\.en\.html$", "en"), (r"/fr/|\.fr\.html$", "fr"), (r"/es/|\.es\.html$", "es")],
    "manpages-zh": [(r"/man/zh_CN/.*\.gz$", "zh")],
    "fortunes-zh": [(r"/(tang300|song100)$", "zh")],
    "doc-debian": [(r"\.txt(\.gz)?$", "en")],
}
SKIP_TAGS = {"script", "style", "nav", "head", "header", "footer", "noscript", "svg", "form", "button", "select"}
VOID = {"meta", "link", "img", "br", "hr", "input", "col", "area", "base", "embed", "source", "track", "wbr"}
BLOCK = {"p", "div", "section", "article", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "li", "dt", "dd",
         "table", "tr", "blockquote", "pre", "center", "main", "td", "th", "body"}
SKIP_CLASS = re.compile(r"\b(navheader|navfooter|toc|sphinxsidebar|related|headerlink|breadcrumbs|sidebar|footer|nav-wrapper|menu|nav-chapters|docnav|titlepage|tocborder|clearer|document-navigation|copyright|list-of|index)\b")


class Text(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks, self.cur, self.pre, self.skip = [], [], 0, []

    def flush(self):
        s = "".join(self.cur)
        self.cur = []
        if self.pre:
            s = s.strip("\n")
            s = "\n".join(l.rstrip() for l in s.split("\n"))
        else:
            s = re.sub(r"\s+", " ", s).strip()
        if s.strip():
            self.blocks.append(s)

    def handle_starttag(self, tag, attrs):
        if tag in VOID:
            if not self.skip:
                if tag == "br":
                    if self.pre: self.cur.append("\n")
                    else: self.flush()
            return
        if self.skip:
            self.skip.append(tag)
            return
        cls = " ".join(v or "" for k, v in attrs if k in ("class", "id"))
        if tag in SKIP_TAGS or (tag not in ("html", "body", "main", "article") and SKIP_CLASS.search(cls)):
            self.flush()
            self.skip.append(tag)
            return
        if tag in BLOCK:
            self.flush()
        if tag == "pre":
            self.pre += 1

    def handle_endtag(self, tag):
        if self.skip:
            if tag in self.skip:  # unwinds unclosed tags too
                while self.skip and self.skip.pop() != tag:
                    pass
            return
        if tag in BLOCK:
            self.flush()
        if tag == "pre" and self.pre:
            self.pre -= 1

    def handle_data(self, d):
        if not self.skip:
            self.cur.append(d)


def man_blocks(s):
    """A rough troff-man reader: enough for running prose."""
    out, cur = [], []
    def fl():
        if cur:
            out.append(re.sub(r"\s+", " ", " ".join(cur)).strip())
            cur.clear()
    for l in s.split("\n"):
        if l.startswith(('.\\"', "'\\\"", '."')):
            continue
        m = re.match(r"^[.'](\w+)\s*(.*)$", l)
        if m:
            c, a = m.groups()
            a = a.replace('"', "")
            if c in ("SH", "SS", "PP", "P", "LP", "TP", "IP", "HP", "RS", "RE", "nf", "fi", "br", "sp", "TH", "Sh", "Pp"):
                fl()
                if c in ("SH", "SS") and a: out.append(a)
                continue
            if c in ("B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "SB"):
                cur.append(a if c in ("B", "I", "SM", "SB") else a.replace(" ", ""))
                continue
            continue
        l = re.sub(r"\\f.|\\s[+-]?\d", "", l)
        l = l.replace("\\-", "-").replace("\\&", "").replace("\\(aq", "'").replace("\\e", "\\").replace("\\ ", " ")
        l = re.sub(r"\\\((..)", "", l)
        if l.strip(): cur.append(l.strip())
        else: fl()
    fl()
    return out


def load(job):
    pkg, path, lang = job
    raw = open(path, "rb").read()
    if path.endswith(".gz"):
        raw = gzip.decompress(raw)
    m = re.search(rb"charset=[\"']?([\w-]+)", raw[:2000])
    enc = m.group(1).decode() if m else "utf-8"
    try:
        s = raw.decode(enc)
    except Exception:
        try: s = raw.decode("utf-8")
        except UnicodeDecodeError: s = raw.decode("latin-1")
    if "/man/" in path:
        blocks = man_blocks(s)
    elif re.search(r"\.html?(\.gz)?$", path):
        p = Text()
        p.feed(s)
        p.flush()
        blocks = p.blocks
    elif pkg == "fortunes-zh":
        s = re.sub(r"\x1b\[[\d;]*m", "", s)
        blocks = [b.strip() for b in s.split("%")]
    else:
        blocks = [b.strip() for b in re.split(r"\n\s*\n", s)]
    good = []
    for b in blocks:
        b = unicodedata.normalize("NFC", b).replace("\u00a0", " ").replace("\u00b6", "").replace("\u200b", "").replace("\r", "").strip("\n")
        b = "".join(ch for ch in b if ch in "\n\t" or ch >= " ")
        if re.match(r"^(next|prev|previous|up|home|suivant|précédent|siguiente|anterior|inicio|sommaire|\W*)$", b.strip().lower()):
            continue
        good.append(b)
    return pkg, path, lang, good


def main():
    jobs = []
    for pkg, rules in sorted(RULES.items()):
        base = os.path.join(ROOT, pkg)
        for d, _, fs in sorted(os.walk(base)):
            for f in sorted(fs):
                p = os.path.join(d, f)
                if f in ("copyright",) or f.startswith(("genindex", "search", "ix01", "py-modindex")) or os.path.islink(p):
                    continue
                for rx, lang in rules:
                    if re.search(rx, p):
                        if re.search(r"\.(html?|txt|md)(\.gz)?$|/man/|fortunes/", p):
                            jobs.append((pkg, p, lang))
                        break
    with Pool(2) as pool:
        docs = pool.map(load, jobs, chunksize=32)
    ids = set()
    split = {"test": [], "train": []}
    for pkg, path, lang, blocks in docs:
        did = os.path.relpath(path, ROOT)
        h = int(hashlib.sha1(did.encode()).hexdigest(), 16)
        split["test" if h % 50 == 7 else "train"].append((did, pkg, lang, blocks))
    seen_test, seen = set(), defaultdict(int)
    os.makedirs(OUT, exist_ok=True)
    stats = {}
    for name in ("test", "train"):
        n = defaultdict(lambda: [0, 0])
        with open(f"{OUT}/{name}.jsonl", "w") as f:
            for did, pkg, lang, blocks in split[name]:
                keep = []
                for b in blocks:
                    k = hashlib.sha1(re.sub(r"\s+", " ", b).encode()).digest()[:8]
                    if name == "train" and len(b) >= 60 and k in seen_test:
                        continue            # no held-out paragraph in the training text
                    if name == "test" and len(b) >= 60: seen_test.add(k)
                    seen[k] += 1
                    if seen[k] > (2 if len(b) >= 40 else 20):
                        continue
                    keep.append(b)
                text = "\n".join(keep)
                letters = sum(c.isalpha() for c in text)
                if len(text) < (150 if lang == "zh" else 400) or letters < 0.5 * len(text):
                    continue
                if lang == "zh" and sum("\u4e00" <= c <= "\u9fff" for c in text) < 0.25 * len(text):
                    continue                # untranslated
                f.write(json.dumps({"id": did, "lang": lang, "pkg": pkg, "text": text}, ensure_ascii=False) + "\n")
                n[lang][0] += 1; n[lang][1] += len(text.encode())
                n["pkg:" + pkg][0] += 1; n["pkg:" + pkg][1] += len(text.encode())
        stats[name] = {k: {"docs": v[0], "bytes": v[1]} for k, v in sorted(n.items())}
    json.dump(stats, open(f"{OUT}/stats.json", "w"), indent=1)
    for name in stats:
        print(name, {k: v for k, v in stats[name].items() if not k.startswith("pkg")})
    print({k: round(v["bytes"] / 1e6, 2) for k, v in stats["train"].items() if k.startswith("pkg")})


if __name__ == "__main__":          # the worker processes import this file
    main()
