"""Make texts that the results of this project were trained on, from packages of Debian.

    python examples/debian_text.py manuals corpus/manuals        # 25 MB: Python, Perl, git, man
    python examples/debian_text.py dictionary corpus/dictionary  # 34 MB: and essays, and sayings

Each folder gets train.txt and valid.txt, a paragraph a block, blank lines between them, and a
paragraph that occurred before is left out. 2 % are held out: of the manuals whole files, of the
others runs of 40 paragraphs, because a dictionary is a single file. The packages of Debian 12
(bookworm) give the bytes whose hashes are below; another release gives a text that is much like it.

Needs `apt-get` (run `apt-get update` once) and `dpkg-deb`; installs nothing. The texts keep their
packages' licences.
"""

import argparse
import gzip
import hashlib
import html
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {
    "manuals": ("python3.11-doc", "perl-doc", "git-doc", "manpages"),
    "dictionary": ("dict-gcide", "anarchism", "dict-foldoc", "fortunes"),
}
HASHES = {  # SHA-256 of train.txt and valid.txt from Debian 12
    "manuals": (
        "a06f6ec4e5514c2f4d9f0c9741ddcfcb5708edb4369cb85c4e80c93209d02b9c",
        "758898d9f05c7b208e1ecbb2f5a54f193d310843638371ffcf01483d266e53c5",
    ),
    "dictionary": (
        "4f8ee6405f405fd73d99675b9ea584ff4a207c27b6b3eeb3cdc28b6f561ca180",
        "73d8fba7f3e11a32665ab3ec11d40e278ccac65ec2bfbf63cd7fcd877db2ce84",
    ),
}
RUN = 40  # paragraphs of the dictionary that are held out together
SUFFIXES = {"", ".txt", ".html", ".htm", ".xhtml", ".md", ".rst", ".page", ".dz", ".pod"}
SUFFIXES |= {f".{section}" for section in range(1, 9)}  # manual pages
TRANSLATED = re.compile(  # a path with the code of another language
    r"[/.](de|fr|es|it|ja|ru|pt|pt-br|zh|zh-cn|zh-tw|ko|cs|ca|hu|sv|nl|pl|da|fi|nb|vi|ar|ro|uk|tr|id"
    r"|sk|hr|sr|he|hi)([/._-]|$)"
)
NOT_PROSE = re.compile(r"<(script|style|pre|nav|head|svg|math|code)\b.*?</\1[^>]*>", re.S | re.I)
ENDS = re.compile(
    r"</?(p|div|li|dd|dt|td|tr|h[1-6]|br|section|ul|ol|table|blockquote)\b[^>]*>", re.I
)
COMMON = re.compile(r"\b(the|and|of|to|is|in|that|for|it|with|you|this|are|be)\b")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=PACKAGES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    paths = args.folder / "train.txt", args.folder / "valid.txt"
    with (
        open(paths[0], "w", encoding="utf-8") as train,
        open(paths[1], "w", encoding="utf-8") as valid,
    ):
        for paragraph, held_out in paragraphs(args.kind):
            (valid if held_out else train).write(f"{paragraph}\n\n")
    for path, expected in zip(paths, HASHES[args.kind], strict=True):
        same = hashlib.sha256(path.read_bytes()).hexdigest() == expected
        about = "as in the results" if same else "not the bytes of the results"
        print(f"{path}: {path.stat().st_size:,} bytes, {about}")
    return 0


def paragraphs(kind: str) -> Iterator[tuple[str, bool]]:
    """Paragraphs of a text, each once, and whether each is held out."""
    seen: set[bytes] = set()
    for package in PACKAGES[kind]:
        for name, text in files(package):
            number = 0
            for paragraph in blocks(text):
                beginning = re.sub(r"[^a-z]", "", paragraph.lower())[:120]
                key = hashlib.md5(beginning.encode()).digest()[:8]
                if key in seen:
                    continue
                seen.add(key)
                unit = package + name + (f"#{number // RUN}" if kind == "dictionary" else "")
                number += 1
                yield paragraph, int(hashlib.sha256(unit.encode()).hexdigest(), 16) % 50 == 0


def files(package: str) -> Iterator[tuple[str, str]]:
    """Path and text of each file of a Debian package that may hold English prose."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "-qq", "download", package], cwd=folder, check=True)
        (archive,) = Path(folder).glob("*.deb")
        root = Path(folder, "content")
        subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
        for path in sorted(root.rglob("*"), key=lambda path: (str(path.parent), path.name)):
            name = str(path).removeprefix(str(root))
            bare = Path(path.name.lower().removesuffix(".gz"))
            if path.is_symlink() or not path.is_file() or TRANSLATED.search(name.lower()):
                continue
            if bare.suffix in SUFFIXES:
                yield name, read(path)


def read(path: Path) -> str:
    """The text of a file, "" where it is not text."""
    opener = gzip.open if path.suffix in (".gz", ".dz") else open
    try:
        with opener(path, "rb") as file:
            data = file.read(30_000_000)
    except (OSError, EOFError):
        return ""
    return "" if b"\0" in data[:4096] else data.decode("utf-8", "replace")


def blocks(text: str) -> Iterator[str]:
    """Paragraphs that look like sentences: long enough, mostly letters, with common words."""
    if "<html" in text[:2000].lower() or "<p>" in text[:20000].lower():
        text = ENDS.sub("\n\n", NOT_PROSE.sub(" ", text))
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
    else:  # requests and escapes of roff
        text = re.sub(r"^[.'].*$|\\f[A-Z]|\\&", "", text, flags=re.M)
    for block in re.split(r"\n\s*\n", text):
        block = re.sub(r"\s+", " ", block).strip()
        words = block.count(" ") + 1
        letters = sum(c.isalpha() or c == " " for c in block)
        long = len(block) >= 80 and words >= 12
        if (
            long
            and letters > 0.8 * len(block)
            and len(COMMON.findall(block)) >= max(2, words // 12)
        ):
            yield block


if __name__ == "__main__":
    sys.exit(main())
