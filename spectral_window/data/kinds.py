"""What a file is, by its name: text, records, or something that is refused with what to do.

A structured file read as text would be one document of syntax, and nothing would say so. So every
suffix that is known to hold something else than plain text is either read as records or refused;
only what is left is read as text, and must then be text (UTF-8, no NUL).
"""

from __future__ import annotations

import os
import re

from spectral_window.errors import UserError

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
TEXT = ".txt"  # the kind of every file that is text and has no kind of its own
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
KINDS = (".txt", ".md", ".py", *RECORDS)
# A folder stands for its files of these kinds; others must be named. A single .json or .csv may be
# anybody's settings or figures; compressed JSON is how data sets are published.
IN_FOLDERS = (".txt", ".md", ".py", ".jsonl", ".ndjson", ".json.gz", ".json.zst", ".parquet")

_REFUSED = {
    "unpack it and name the folder": "tar tgz tbz tbz2 txz zip 7z rar bz2 xz lzma lz4 br z cab iso "
    "dmg jar whl war deb rpm",
    "convert it to .jsonl, .csv or .parquet with a text column": "arrow feather orc avro xls xlsx "
    "xlsm xlsb ods sqlite sqlite3 db db3 mdb duckdb h5 hdf5 hdf tfrecord tfrecords msgpack "
    "mds lmdb rds rdata dta sav",
    "extract its text to .txt or .jsonl": "pdf doc docx docm dotx odt rtf ppt pptx odp epub "
    "mobi azw azw3 djvu ps eps pages chm msg eml mbox warc wet wat ipynb vtt srt",
    "extract its text to .txt or .jsonl, or copy it to a .txt to learn its markup": "html htm "
    "xhtml mhtml xml svg rss atom xsl xsd yaml yml toml json5 jsonc geojson plist",
    "it is not text": "bin npy npz pkl pickle pt pth ckpt safetensors gguf ggml onnx msf pb "
    " tflite joblib mat exe dll so dylib class pyc pyo wasm "
    "png jpg jpeg gif webp bmp tif tiff ico heic psd ai mp3 wav flac ogg opus m4a aac mp4 mkv "
    "avi mov webm wmv ttf otf woff woff2",
}
_ADVICE = {f".{suffix}": advice for advice, names in _REFUSED.items() for suffix in names.split()}
_ARCHIVE = re.compile(r"\.(tar|tgz|zip|7z|rar|bz2|xz)(\.|$)")


def split_suffix(path: str) -> tuple[str, str]:
    """The suffix that says what is in `path`, and that of its compression, in small letters."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    if suffix in COMPRESSION:
        return os.path.splitext(stem)[1], suffix
    return suffix, ""


def kind_of(path: str) -> str:
    """How to read a file that was named. Raises UserError for a file that holds no text."""
    suffix, _ = split_suffix(path)
    if _ARCHIVE.search(os.path.basename(path).lower()):
        raise UserError(f"archives are not read ({path}): {_ADVICE['.tar']}")
    if suffix in _ADVICE:
        raise UserError(f"{suffix} files are not read ({path}): {_ADVICE[suffix]}")
    return suffix if suffix in KINDS else TEXT


def kind_in_folder(path: str) -> str:
    """How to read a file that was found in a folder; "" if it is left out there."""
    suffix, compression = split_suffix(path)
    known = suffix in IN_FOLDERS or suffix + compression in IN_FOLDERS
    return suffix if known else ""
