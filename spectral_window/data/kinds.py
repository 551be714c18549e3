"""The kind of a file, by its name: text, records, or refused with advice.

A structured file that is read as text would silently become one document of syntax. So every suffix
of a format other than plain text is either read as records or refused. All other files are read as
text, and must be UTF-8 without NUL.
"""

from __future__ import annotations

import os
import re

from spectral_window.errors import UserError

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
TEXT = ".txt"  # the kind of text files without a kind of their own
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
KINDS = (".txt", ".md", ".py", *RECORDS)
# A folder stands for its files of these kinds; others must be named. A single .json or .csv often
# holds settings or figures; data sets are often published as compressed JSON.
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
    """Return the suffix of a file's content and that of its compression, in lower case."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    if suffix in COMPRESSION:
        return os.path.splitext(stem)[1], suffix
    return suffix, ""


def kind_of(path: str) -> str:
    """Return the kind of a file that was named; raise UserError for a format without text."""
    suffix, _ = split_suffix(path)
    if _ARCHIVE.search(os.path.basename(path).lower()):
        raise UserError(f"archives are not read ({path}): {_ADVICE['.tar']}")
    if suffix in _ADVICE:
        raise UserError(f"{suffix} files are not read ({path}): {_ADVICE[suffix]}")
    return suffix if suffix in KINDS else TEXT


def kind_in_folder(path: str) -> str:
    """Return the kind of a file in a folder; "" if it is left out there."""
    suffix, compression = split_suffix(path)
    included = suffix in IN_FOLDERS or suffix + compression in IN_FOLDERS
    return suffix if included else ""
