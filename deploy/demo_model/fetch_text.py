#!/usr/bin/env python3
"""Fetches the sources of the demo model and turns them into plain text documents.

  fetch_text.py --out DIR [--books-git GITDIR] [--debs DIR]

Reads sources.json beside this file: books from one public git repository (pinned commit and file hashes), reference
text and WordNet from Debian packages (pinned version and hash). Writes
DIR/{books,reference,chat,drill}.{train,heldout}.txt; in each file documents are separated by one zero byte. Needs git,
apt-get, dpkg-deb; nothing outside Python's library. A package version that has left the mirrors is still on
https://snapshot.debian.org: put it into --debs by hand.
"""

import argparse
import collections
import gzip
import hashlib
import html.parser
import json
import os
import random
import re
import subprocess
import textwrap

HERE = os.path.dirname(os.path.abspath(__file__))
HELDOUT_SHARE = 25  # one document in this many, chosen by its hash


def digest(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def is_heldout(name):
    return digest(name) % HELDOUT_SHARE == 0


def check(data, sha256, name):
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SystemExit(f"{name}: sha256 differs from sources.json")
    return data


# ---- books ------------------------------------------------------------------------------------------------------


def clone_books(books, work, git_dir):
    """The git directory that holds the pinned commit; fetches just that commit unless one is given."""
    if git_dir:
        return git_dir
    git_dir = os.path.join(work, "books.git")
    if not os.path.isdir(git_dir):
        subprocess.run(["git", "init", "-q", "--bare", git_dir], check=True)
    print("books: fetching", books["repository"], flush=True)
    subprocess.run(["git", "-C", git_dir, "fetch", "-q", "--depth=1", books["repository"], books["commit"]], check=True)
    return git_dir


def clean_book(markdown, path):
    """Markdown -> plain paragraphs separated by blank lines, without markup, notes, tables and pictures."""
    head, _, body = markdown.replace("\r", "").lstrip("\ufeff").partition("\n-------\n")
    if not body:
        head, body = "", markdown
    title = re.search(r"^# Title: *(.*)$", head, re.M)
    author = re.search(r"^## Author: *(.*)$", head, re.M)
    body = body.replace("\ufeff", "").replace("\u00a0", " ").replace("\u2026", "...")
    body = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", body)
    body = re.sub(r"\[\^?\d+\]:?", "", body)
    body = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", body)
    body = re.sub(r"\[(Illustration|Footnote)[^\]]*\]", "", body)
    body = re.sub(r"<[^<>]{1,80}>", "", body)
    body = re.sub(r"\\([-_*.#\[\]()!`\\])", r"\1", body)
    body = re.sub(r"(?<!\w)[_*]{1,3}(?=\S)|(?<=\S)[_*]{1,3}(?!\w)", "", body)
    paragraphs = []
    if title and author:
        paragraphs = [title.group(1).strip(), "By " + author.group(1).strip()]
    for block in re.split(r"\n\s*\n", body):
        lines = [re.sub(r"[ \t]+", " ", re.sub(r"^\s*(#+|>)\s*", "", line)).strip() for line in block.split("\n")]
        lines = [line for line in lines if line and not re.fullmatch(r"[-*_=~+| .]+", line) and "|" not in line]
        # A line of prose is a paragraph by itself in this collection; several short lines are verse or a list.
        separator = "\n" if all(len(line) < 60 for line in lines) else " "
        if lines:
            paragraphs.append(separator.join(lines))
    text = "\n\n".join(paragraphs)
    # Most readers will type straight quotes and unwrapped lines, some text they bring will not be so: a tenth of the
    # books is wrapped, another tenth gets typographic quotes.
    kind = digest("form " + path) % 10
    if kind == 0:
        width = 62 + digest("width " + path) % 16
        text = "\n\n".join("\n".join(textwrap.wrap(p, width)) if len(p) > width else p for p in text.split("\n\n"))
    elif kind == 1:
        text = re.sub(r'(^|[\s(\u2014])"', "\\1\u201c", text)
        text = re.sub(r"(^|[\s(\u2014\u201c])'", "\\1\u2018", text)
        text = text.replace('"', "\u201d").replace("'", "\u2019")
    return text


def books(spec, work, git_dir):
    git_dir = clone_books(spec, work, git_dir)
    for book in spec["files"]:
        data = subprocess.run(["git", "-C", git_dir, "cat-file", "blob", f"{spec['commit']}:{book['path']}"],
                              check=True,
                              stdout=subprocess.PIPE).stdout
        check(data, book["sha256"], book["path"])
        yield book["split"], clean_book(data.decode("utf-8"), book["path"])


# ---- Debian packages --------------------------------------------------------------------------------------------


def unpack(package, work, debs):
    """Downloads (unless already there), checks and unpacks one package; returns the folder."""
    root = os.path.join(work, package["name"])
    debs = debs or work
    name = f"{package['name']}_{package['version'].replace(':', '%3a')}_all.deb"
    path = os.path.join(debs, name)
    if not os.path.exists(path):
        print("package:", name, flush=True)
        subprocess.run(["apt-get", "download", "-qq", f"{package['name']}={package['version']}"], cwd=debs, check=True)
    with open(path, "rb") as f:
        check(f.read(), package["sha256"], name)
    subprocess.run(["dpkg-deb", "-x", path, root], check=True)
    return root


class PageText(html.parser.HTMLParser):
    """Text of headings, paragraphs, list items and listings, one block each."""

    BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "pre", "td", "div", "title"}
    SKIPPED = {"script", "style", "table", "title", "nav", "head"}

    def __init__(self):
        super().__init__()
        self.blocks, self.text, self.skip, self.pre = [], [], 0, 0

    def flush(self):
        text = "".join(self.text)
        text = text.strip("\n") if self.pre else re.sub(r"\s+", " ", text).strip()
        if text:
            self.blocks.append(text)
        self.text = []

    def handle_starttag(self, tag, attributes):
        if tag in self.BLOCKS:
            self.flush()
        self.skip += tag in self.SKIPPED
        self.pre += tag == "pre"

    def handle_endtag(self, tag):
        if tag in self.BLOCKS:
            self.flush()
        self.skip -= tag in self.SKIPPED
        self.pre -= tag == "pre"

    def handle_data(self, data):
        if not self.skip:
            self.text.append(data)


def page_text(html_bytes):
    page = PageText()
    page.feed(html_bytes.decode("utf-8", "replace"))
    page.flush()
    text = "\n\n".join(b for b in page.blocks if not re.fullmatch(r"(Prev|Next|Home|Up|[\W\d]+)", b))
    return text.translate({0xA0: " ", 0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2026: "..."})


def reference(roots):
    pages = []
    for folder, pattern in ((roots["debian-handbook"] + "/usr/share/doc/debian-handbook/html/en-US", r"\.html$"),
                            (roots["debian-reference-en"] + "/usr/share/debian-reference", r"^ch.*\.en\.html$")):
        for name in sorted(os.listdir(folder)):
            if re.search(pattern, name) and os.path.isfile(os.path.join(folder, name)):
                with open(os.path.join(folder, name), "rb") as f:
                    pages.append((name, page_text(f.read())))
    with gzip.open(roots["dict-jargon"] + "/usr/share/dictd/jargon.dict.dz") as f:
        jargon = f.read().decode("utf-8").translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0xB4: "'"})
    for entry in re.split(r"\n\n(?=\S)", jargon):
        head, _, body = entry.partition("\n")
        body = re.sub(r"^ ?[/,:a-z].*$", "", body, count=1,
                      flags=re.M) if body.startswith(" ") and body[1] != " " else body
        body = "\n\n".join(re.sub(r"\s+", " ", p).strip() for p in body.split("\n\n"))
        body = re.sub(r"\{\s*([^}]*)\}", r"\1", body).strip()
        if len(body) > 100:
            pages.append((head, head.strip() + "\n\n" + body))
    for name, text in pages:
        if len(text) > 200:
            yield "heldout" if is_heldout(name) else "train", text


# ---- WordNet as chat --------------------------------------------------------------------------------------------

Sense = collections.namedtuple("Sense", "word gloss example synonyms parent part instance domain")
THINGS = {5, 6, 8, 14, 17, 18, 20}  # animal, artifact, body, group, object, person, plant: mostly things one can count
UNFIT = re.compile(
    r"sexual|penis|vagina|genital|intercourse|prostitut|obscen|offensive|disparag|derogat|ethnic slur|coit|erotic"
    r"|fuck|negro|nigger", re.I)


def with_article(gloss):
    """WordNet often leaves out the article ("massive powerful mammal of Asia"); a sentence needs it."""
    if re.match(
            r"(a|an|the|any|one|some|each|all|either|two|three|four|several|most|his|her|its|your|that|those|what|whatever"
            r"|something|someone|anything|made|used|\w+s) ", gloss):
        return gloss
    return article(gloss)


def wordnet(folder):
    """{part: {word: Sense}}: the commonest sense of each word."""
    parts = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
    synsets = {}
    for part, letter in parts.items():
        with open(os.path.join(folder, "data." + part), encoding="latin-1") as f:
            for line in f:
                if line.startswith("  "):
                    continue
                data, _, text = line.partition(" | ")
                field = data.split()
                count = int(field[3], 16)
                words = [re.sub(r"\(.*\)$", "", w).replace("_", " ") for w in field[4:4 + 2 * count:2]]
                pointers = field[5 + 2 * count:]
                parent = [(pointers[i], pointers[i + 1])
                          for i in range(0,
                                         len(pointers) - 3, 4)
                          if pointers[i] in ("@", "@i") and pointers[i + 2] == letter]
                examples = [e.strip() for e in re.findall(r'"([^"]+)"', text)]
                gloss = re.sub(r';\s*"[^"]*"?|"[^"]*"', "", text).strip().rstrip(";:,. ")
                gloss = re.sub(r"^\([^)]*\)\s*", "", gloss.split("; ")[0]).strip()
                synsets[letter, field[0]] = (words, gloss, examples, parent, int(field[1]))
    result = {}
    for part, letter in parts.items():
        table = result[part] = {}
        with open(os.path.join(folder, "index." + part), encoding="latin-1") as f:
            for line in f:
                if line.startswith("  "):
                    continue
                field = line.split()
                offset = field[-int(field[2])]  # senses are listed commonest first
                words, gloss, examples, parent, domain = synsets[letter, offset]
                lemma = field[0].replace("_", " ")
                word = next((w for w in words if w.lower() == lemma), lemma)
                up = synsets.get((letter, parent[0][1])) if parent else None
                synonyms = [w for w in words if w.lower() != lemma]
                example = next((e for e in examples if re.search(r"\b" + re.escape(lemma), e.lower())), "")
                if UNFIT.search(" ".join([word, gloss] + words)):
                    continue
                if 3 < len(gloss) < 220 and re.fullmatch(r"[A-Za-z' .-]+", word):
                    table[lemma] = Sense(word, gloss, example, synonyms, up[0][0] if up else "", part,
                                         bool(parent) and parent[0][0] == "@i", domain)
    return result


def article(phrase):
    return ("an " if re.match(r"[aeiou](?!ni[^nm]|se|sa|uro|ne\b)|hour|hono|heir", phrase.lower()) else "a ") + phrase


def sentence(text):
    text = text.strip()
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def ask(sense, random_source):
    """One (question, answer) about a word."""
    pick = random_source.choice
    word, gloss = sense.word, sense.gloss
    if sense.part == "noun":
        proper = word[0].isupper()
        thing = sense.domain in THINGS and not re.search(r"[^s]s$", word)
        counted = not proper and (thing or bool(re.match(r"(a|an|any|one|someone|anyone|something) ", gloss)))
        name = article(word) if counted else word
        if thing:
            gloss = with_article(gloss)
        person = sense.domain == 18 and sense.instance
        be = "was" if person else "is"
        gloss_text = re.sub(r"^someone\b", "a person", gloss)
        answer = sentence(f"{name} {be} {gloss_text}")
        kinds = [f"What is {name}?"] * 5 + [
            f"What's {name}?", f"What is {name}", f"what is {name}?", f"Define {word}.", f"What does {word} mean?",
            f'What does the word "{word}" mean?', f"Tell me what {name} is.", f"Can you tell me what {name} is?",
            f"Explain what {name} is.", f"What is the meaning of {word}?", f"Please define {word}."
        ]
        if person:
            kinds = [f"Who was {word}?"] * 4 + [f"Who is {word}?", f"Tell me about {word}."]
        elif proper and sense.domain == 15:
            kinds = [f"What is {word}?", f"Where is {word}?", f"Tell me about {word}."]
        elif not proper and random_source.random() < 0.08:
            kinds = [f"What is a {word}?" if not counted else f"What is {word}?"]
        if not proper and sense.parent and random_source.random() < 0.07:
            if sense.parent[0].islower():
                return f"What kind of thing is {name}?", sentence(f"{name} is a kind of {sense.parent}")
    elif sense.part == "verb":
        answer = sentence(f"to {word} is to {gloss}")
        kinds = [f"What does it mean to {word}?"] * 3 + [
            f'What does "{word}" mean?', f"What does {word} mean?", f"Define {word}."
        ]
    elif sense.part == "adj":
        answer = sentence(f'"{word}" means {gloss}') if " " not in word else sentence(f"{word} means {gloss}")
        kinds = [
            f'What does "{word}" mean?', f"What does {word} mean?", f"Define {word}.",
            f"What does it mean to be {word}?"
        ]
    else:
        answer = sentence(f"{word} means {gloss}")
        kinds = [f"What does {word} mean?", f'What does "{word}" mean?']
    chance = random_source.random()
    if sense.example and 15 < len(sense.example) < 120 and chance < 0.1:
        return pick([
            f"Use the word {word} in a sentence.", f'Can you use "{word}" in a sentence?',
            f"Give me an example of {word}."
        ]), sentence(sense.example)
    if sense.synonyms and chance > 0.95 and sense.part != "noun":
        return f"What is another word for {word}?", sentence(f"another word for {word} is {sense.synonyms[0]}")
    if sense.example and chance > 0.8:
        answer += " For example: " + sentence(sense.example)
    return pick(kinds), answer


SMALL_TALK = [
    (["Hello", "Hello!", "Hi", "Hi!", "Hello there.", "Good morning.", "hi",
      "hello"], "Hello! Ask me what a word means, or give me the beginning of a story."),
    (["Who are you?", "What are you?", "What is your name?", "who are you?", "Tell me about yourself."],
     "I am a small language model. I learned from old books and from a dictionary, so I can tell you what many words mean."
    ),
    (["What can you do?", "How can you help me?", "What can I ask you?", "Help",
      "help me"], "You can ask me what a word means, for example: What is a harbor? I am small, and I am often wrong."),
    (["How are you?", "How are you today?",
      "How do you do?"], "I am very well, thank you. What would you like to know?"),
    (["Thank you.", "Thanks!", "Thank you very much.", "thanks"], "You are welcome."),
    (["Goodbye.", "Bye!", "Good night."], "Goodbye!"),
    (["Are you human?", "Are you a person?",
      "Are you alive?"], "No. I am a small language model, a computer program that continues text."),
    (["Can you be trusted?", "Are you always right?",
      "Do you make mistakes?"], "I am small, and I make many mistakes. Please check what I say in a good book."),
    (["Who made you?", "How were you made?", "Where do you come from?"],
     "I was trained on a computer, on old books that belong to everybody and on a dictionary called WordNet."),
    (["What is RWKV?", "What does RWKV mean?"],
     "RWKV is a kind of neural network that reads text one token at a time and keeps a state of fixed size."),
]


def dialogue(pairs, source, most):
    """Documents of 1 to `most` turns from shuffled (question, answer) pairs."""
    source.shuffle(pairs)
    while pairs:
        turns = [pairs.pop() for _ in range(min(len(pairs), source.randint(1, most)))]
        yield "".join(f"User: {q}\n\nAssistant: {a}\n\n" for q, a in turns)


def drill(folder, book_words, words=600, copies=24):
    """The commonest nouns for things, in the plainest wordings, often enough that even a short training learns them by
    heart."""
    source = random.Random(11)
    uses, other_uses = collections.Counter(), collections.Counter()
    with open(os.path.join(folder, "cntlist.rev"), encoding="latin-1") as f:
        for line in f:  # how often each sense was met in WordNet's own tagged texts
            key, _, count = line.split()
            lemma, _, rest = key.partition("%")
            (uses if rest[0] == "1" else other_uses)[lemma] += int(count)
    ranked = []
    for lemma, sense in wordnet(folder)["noun"].items():
        concrete = sense.domain in THINGS | {13, 15, 19, 27, 28}  # and food, place, phenomenon, substance, time
        if re.fullmatch("[a-z]{3,}", sense.word) and concrete and len(
                sense.gloss) < 90 and uses[lemma] >= other_uses[lemma]:
            frequency = max(book_words[w.lower()] for w in [lemma] + sense.synonyms if len(w) > 2)
            ranked.append(((uses[lemma] + 1) * frequency**0.5, lemma, sense))
    ranked.sort(key=lambda row: (-row[0], row[1]))
    pairs = []
    for _, _, sense in ranked[:words]:
        plain = sense._replace(example="", synonyms=[], parent="")
        for _ in range(copies):
            question, answer = ask(plain, source)
            name = re.match(r"(.*?) is ", answer).group(1)
            name = name[0].lower() + name[1:]
            pairs.append((f"What is {name}?" if source.random() < 0.6 else question, answer))
    for questions, answer in SMALL_TALK:
        pairs += [(source.choice(questions), answer) for _ in range(2 * copies)]
    for text in dialogue(pairs, source, 4):
        yield "train", text


def chat(folder, book_words):
    """Documents of 1 to 8 question/answer turns. Words that the books use often come up several times, in other
    wordings."""
    source = random.Random(7)
    tables = wordnet(folder)
    pairs = {"train": [], "heldout": []}
    for part, table in tables.items():
        for lemma, sense in sorted(table.items()):
            # The other words for the same sense count too: the books write harbour where WordNet has harbor first.
            frequency = max(book_words[w.lower()] for w in [lemma] + sense.synonyms)
            if part == "adv" and not frequency:
                continue
            common = frequency >= 20 and " " not in lemma
            # Many words are noun and verb both: only the part of speech with the most frequent use should be drilled.
            if part != "noun" and lemma in tables["noun"]:
                common = False
            rare = not frequency or " " in lemma
            if rare and digest("rare " + lemma) % 4:
                continue  # species, towns, set phrases: a sample will do
            split = "heldout" if is_heldout("word " + lemma) and not common else "train"
            copies = 1
            if common:
                copies = 2 if part != "noun" else 4 if frequency < 200 else 8 if frequency < 2000 else 12
            for _ in range(copies):
                pairs[split].append(ask(sense, source))
    for questions, answer in SMALL_TALK:
        pairs["train"] += [(source.choice(questions), answer) for _ in range(120)]
    for split, items in pairs.items():
        for text in dialogue(items, source, 8):
            yield split, text


# ---- all --------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the text; downloads go to OUT/work")
    parser.add_argument("--books-git", help="a git directory that already has the pinned commit")
    parser.add_argument("--debs", help="folder with packages already downloaded")
    options = parser.parse_args()
    with open(os.path.join(HERE, "sources.json"), encoding="utf-8") as f:
        sources = json.load(f)
    work = os.path.join(options.out, "work")
    os.makedirs(work, exist_ok=True)
    roots = {p["name"]: unpack(p, work, options.debs) for p in sources["packages"]}

    def write(part, documents):
        files = {s: open(os.path.join(options.out, f"{part}.{s}.txt"), "wb") for s in ("train", "heldout")}
        count = collections.Counter()
        for split, text in documents:
            data = text.replace("\0", "").encode("utf-8")
            files[split].write((b"\0" if count[split] else b"") + data)
            count[split] += 1
        for split, f in files.items():
            print(f"{part}.{split}: {count[split]} documents, {f.tell() / 1e6:.2f} MB", flush=True)
            f.close()

    write("books", books(sources["books"], work, options.books_git))
    write("reference", reference(roots))
    with open(os.path.join(options.out, "books.train.txt"), encoding="utf-8") as f:
        book_words = collections.Counter(re.findall(r"[a-z]+", f.read().lower()))
    write("chat", chat(roots["wordnet-base"] + "/usr/share/wordnet", book_words))
    write("drill", drill(roots["wordnet-base"] + "/usr/share/wordnet", book_words))


if __name__ == "__main__":
    main()
