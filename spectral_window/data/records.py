"""Records to text: JSON lines, JSON arrays, CSV, Parquet and the rows of a hub data set.

Every reader is a generator of rows whose memory does not depend on the size of the file: a record
of a text file has at most `MAX_RECORD` bytes. The text of a record is its field `text`. An error
inside a record gives a row without text, which `skip_bad` can leave out; an error that stops the
reading of a file is a UserError.
"""

from __future__ import annotations

import codecs
import csv
import gc
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from spectral_window.data.formats import (
    BAD_CHARACTER,
    BLOCK,
    WHOLE,
    Extent,
    ReadOptions,
    ReadReport,
    UnreadableFile,
    byte_blocks,
    utf8_blocks,
)
from spectral_window.data.kinds import split_suffix
from spectral_window.errors import NetworkError, SpectralWindowError, UserError

MAX_RECORD = 1 << 24  # bytes of a JSON line, or characters in an array: it must fit in memory
CSV_BYTES = 4  # bytes per character in the csv module: the limit of a CSV record is lower by this
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
SPACE = re.compile(r"[ \t\n\r]*")
STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)  # of JSON, as far as its end


class Row(NamedTuple):
    """A record: its place, and its text, or None and the error."""

    where: str
    text: str | None
    fault: str = ""


MakeRow = Callable[[str, Any], Row]  # of a place and a record


def rows_of(
    kind: str,
    name: str,
    options: ReadOptions,
    report: ReadReport,
    make: MakeRow | None = None,
    extent: Extent = WHOLE,
) -> Iterator[Row]:
    """Return the rows of a source, by its kind.

    `make` makes the row of a JSON record; by default its text is the field `text`. Only JSON lines,
    Parquet and data sets have an `extent`.
    """
    make = make or _row
    if kind == "hub":
        return hub_rows(name, extent)
    if kind == ".parquet":
        return parquet_rows(name, extent)
    if kind in (".csv", ".tsv"):
        return csv_rows(name, "," if kind == ".csv" else "\t", options, report)
    if is_array(kind, name):
        return array_rows(name, options, report, make)
    return json_rows(name, make, extent)


def is_array(kind: str, name: str) -> bool:
    """Return whether a file is one JSON array, and not a record a line."""
    return kind == ".json" and _first_byte(name) == b"["


def texts_of(
    rows: Iterable[Row], options: ReadOptions, report: ReadReport
) -> Iterator[tuple[str, str]]:
    """Yield (text, where) of every row; a bad row is a UserError, or counted with `skip_bad`."""
    for where, text, fault in rows:
        report.records += 1
        if text is None:
            if not options.skip_bad:
                raise UserError(f"{fault} ({where}): repair the record, or read with skip_bad")
            report.skipped += 1
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, UTF-8 cannot
            if options.errors == "strict":
                fault = f"a lone surrogate \\u{ord(text[error.start]):04x}"
                raise UserError(
                    f"{fault} ({where}): repair it, or read with errors=replace"
                ) from None
            text, replaced = LONE_SURROGATE.subn(BAD_CHARACTER, text)
            report.replaced += replaced
        yield text, where


def _row(where: str, record: Any) -> Row:
    """Return the row of a dict-like record; its `text` must be a string."""
    if not isinstance(record, dict):
        return Row(where, None, "not an object with a 'text' field")
    if "text" not in record:
        fields = ", ".join(list(record)[:10]) or "none"
        return Row(where, None, f"no 'text' field, only: {fields}")
    value = record["text"]
    if not isinstance(value, str):
        return Row(where, None, f"'text' is {json.dumps(value, default=str)[:40]}, not a string")
    return Row(where, value)


def _check_columns(columns: list[str], where: str) -> None:
    """Raise UserError unless one column is called `text`."""
    names = ", ".join(columns[:20]) or "none"
    if "text" not in columns:
        raise UserError(f"no 'text' column ({where}): its columns are {names}"[:500])
    if columns.count("text") > 1:
        what = f"{columns.count('text')} columns are called 'text'"
        raise UserError(f"{what} ({where}): rename all but one"[:500])


# ---------------------------------------------------------------------------- JSON


def json_rows(path: str, make: MakeRow, extent: Extent = WHOLE) -> Iterator[Row]:
    """Yield a row for every line that is not blank."""
    bad = "bad JSON"
    if split_suffix(path)[0] == ".json":
        bad = "a .json must be a record a line, or one array: bad JSON"
    for number, line in _lines(path, extent):
        where = f"{path}, line {number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode(), object_pairs_hook=_no_key_twice)
        except UnicodeDecodeError as error:
            yield Row(f"{where}, byte {error.start} of the line", None, "not UTF-8")
        except json.JSONDecodeError as error:
            yield Row(f"{where}, column {error.colno}", None, f"{bad}, {error.msg}")
        except (ValueError, RecursionError) as error:
            yield Row(where, None, f"{bad}, {str(error).split(':')[0][:80]}")
        else:
            yield make(where, record)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise UserError("the same key twice")
    return record


def _lines(path: str, extent: Extent) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines; one longer than MAX_RECORD is an error before it is read whole."""
    number, size = extent.records + 1, 0
    parts: list[bytes] = []
    for block in byte_blocks(path, extent):
        *ends, rest = block.split(b"\n")
        for end in ends:
            yield number, b"".join([*parts, end])
            number, parts, size = number + 1, [], 0
        parts.append(rest)
        size += len(rest)
        if size > MAX_RECORD:
            limit = f"{MAX_RECORD >> 20} MiB"
            raise UserError(f"a line of more than {limit} ({path}, line {number}): split it")
    yield number, b"".join(parts)


def _first_byte(path: str) -> bytes:
    """Return the first byte of a file that is not white space or of a byte order mark."""
    blocks, start = byte_blocks(path), b""
    try:
        for block in blocks:
            start = (start[-3:] + block).removeprefix(codecs.BOM_UTF8).lstrip()
            if start:
                break
    finally:
        blocks.close()
    return start[:1]


def array_rows(path: str, options: ReadOptions, report: ReadReport, make: MakeRow) -> Iterator[Row]:
    """Yield a row for every element of a file that is one JSON array."""
    texts = utf8_blocks(path, options, report)
    decode = json.JSONDecoder(object_pairs_hook=_no_key_twice).raw_decode
    # `text` has been parsed up to `at`; `number` elements were read.
    text, at, number, ended = "", 0, 0, False

    def more(wanted: int) -> None:
        """Read until `wanted` characters are available, or to the end."""
        nonlocal text, at, ended
        parts, size, at = [text[at:]], len(text) - at, 0
        while size < wanted and not ended:
            block = next(texts, None)
            ended = block is None
            parts.append(block or "")
            size += len(parts[-1])
        text = "".join(parts)

    def mark() -> str:
        """Return the next character that is not white space, "" at the end, and skip it."""
        nonlocal at
        while True:
            at = SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too
            if at < len(text) or ended:
                at += 1
                return text[at - 1 : at]
            more(BLOCK)

    def fault(what: str) -> UserError:
        return UserError(f"bad JSON, {what} ({path}, record {number + 1}): repair the file")

    mark()  # the opening bracket
    following = mark()
    while following != "]":
        at -= bool(following)
        while True:
            try:
                record, end = decode(text, at)
            except RecursionError:
                raise fault("nested too deeply") from None
            except json.JSONDecodeError as error:
                # If the text only ends too early, the error is at its end or in an open string.
                string_begins = text.startswith('"', error.pos)
                is_open = string_begins and not STRING.match(text, error.pos)
                late = error.pos >= len(text) - 16 or is_open
                if ended or not late:
                    raise fault(error.msg) from None
            except ValueError as error:  # a key twice, a number of 5000 digits
                raise fault(str(error).split(":")[0][:80]) from None
            else:
                if end < len(text) or ended:  # else it may continue in the next block
                    break
            if len(text) - at > MAX_RECORD:
                raise fault(f"a record of more than {MAX_RECORD >> 20} MiB")
            more(max(BLOCK, 2 * (len(text) - at)))
        number, at = number + 1, end
        yield make(f"{path}, record {number}", record)
        following = mark()
        if following == ",":
            following = mark()
            if following == "]":
                raise fault("a ',' before the end of the array")
        elif following != "]":
            raise fault("',' or ']' is missing")
    if mark():
        raise UserError(f"text after the array ({path}): keep one array, or one record a line")


# ---------------------------------------------------------------------------- tables


def csv_rows(path: str, delimiter: str, options: ReadOptions, report: ReadReport) -> Iterator[Row]:
    """Yield a row for every record after the header, which must have one column `text`."""
    # The csv module's limit is global, and smaller than a document can be.
    longest = MAX_RECORD // CSV_BYTES
    csv.field_size_limit(max(csv.field_size_limit(), longest))
    size = 0  # characters of the current record

    def lines() -> Iterator[str]:
        nonlocal size
        buffer = ""
        for block in utf8_blocks(path, options, report):
            *whole, buffer = (buffer + block).split("\n")
            for line in whole:
                size += len(line) + 1
                yield line + "\n"
                if size > longest:
                    raise too_long()
            if size + len(buffer) > longest:
                raise too_long()
        yield buffer

    def too_long() -> UserError:
        what = f"a record of more than {longest:,} characters ({path}, from line {begins})"
        return UserError(f"{what}: close its quote, or split it")

    begins, columns = 1, None
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            where, begins, size = f"{path}, line {begins}", reader.line_num + 1, 0
            if columns is None:
                columns = fields
                _check_columns(columns, path)
            elif len(fields) == len(columns):
                yield Row(where, fields[columns.index("text")])
            elif fields:  # not a blank line
                yield Row(where, None, f"{len(fields)} fields instead of {len(columns)}")
    except csv.Error as error:
        raise UserError(f"bad CSV, {error} ({path}, line {begins}): repair the file") from None


def parquet_rows(path: str, extent: Extent = WHOLE) -> Iterator[Row]:
    """Yield a row for every row of the string column `text`; other columns are not read."""
    import pyarrow
    import pyarrow.parquet

    if split_suffix(path)[1]:
        raise UserError(f"Parquet compresses inside ({path}): unpack the file first")
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            schema = file.schema_arrow
            _check_columns(schema.names, path)
            kind = schema.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"column 'text' is {kind} ({path}): store it as a string column")
            number = extent.records
            groups = range(file.num_row_groups)[extent.start : extent.stop]
            for batch in file.iter_batches(64, list(groups), columns=["text"]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _row(f"{path}, row {number}", {"text": value})
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"not a readable Parquet file ({path}): {_one_line(error)}") from None


def parquet_groups(path: str) -> list[tuple[int, int]]:
    """Return the rows and the bytes of text of each row group; raises as `parquet_rows` does."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            _check_columns(file.schema_arrow.names, path)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"not a readable Parquet file ({path}): {_one_line(error)}") from None
    sizes = []
    for group in groups:
        columns = [group.column(i) for i in range(group.num_columns)]
        text = [column for column in columns if column.path_in_schema == "text"]
        sizes.append((group.num_rows, sum(column.total_uncompressed_size for column in text)))
    return sizes


def hub_rows(spec: str, extent: Extent = WHOLE) -> Iterator[Row]:
    """Yield the rows of `hub:NAME[:CONFIG[:SPLIT]]`; NAME can be a local folder of data files.

    A run of it is of shards: the files that the data set consists of, in the order of the whole.
    """
    records: Any = None
    number = 0
    where = spec
    try:
        stream = _hub_stream(spec)
        runs = [stream]
        if extent != WHOLE:
            count = stream.num_shards
            shards = range(count)[extent.start : extent.stop]
            runs = [stream.shard(num_shards=count, index=i, contiguous=True) for i in shards]
            where = f"{spec}, from shard {extent.start}"
        for run in runs:
            records = iter(run)
            for record in records:
                number += 1
                if number == 1 and "text" not in record:
                    columns = ", ".join(list(record)[:20])
                    raise UserError(f"no 'text' column ({spec}): its columns are {columns}")
                yield _row(f"{where}, row {number}", record)
    except SpectralWindowError:
        raise
    except Exception as error:
        raise _hub_error(error, f"{where}, row {number + 1}" if number else spec) from None
    finally:
        # Arrow's reader, if stopped early, aborts the process when Python ends (apache/arrow
        # issue 45214): delete it now.
        del records
        gc.collect()


def hub_shards(spec: str) -> int:
    """Return how many shards a data set has; raises as `hub_rows` does."""
    try:
        return _hub_stream(spec).num_shards
    except SpectralWindowError:
        raise
    except Exception as error:
        raise _hub_error(error, spec) from None


def _hub_stream(spec: str) -> Any:
    try:
        import datasets
    except ImportError:
        hint = "pip install 'spectral-window[hub]'"
        raise UserError(f"the hub needs the datasets library ({spec}): {hint}") from None
    name, config, split = [*spec.removeprefix("hub:").split(":"), "", ""][:3]
    return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)


def _hub_error(error: Exception, where: str) -> Exception:
    """Return what an error of the library means."""
    if isinstance(error, (FileNotFoundError, ValueError)):  # no such data set, config or split
        return UserError(f"cannot read the data set ({where}): {_one_line(error)}")
    if isinstance(error, OSError):  # no connection, a timeout, HF_HUB_OFFLINE
        return NetworkError(f"the hub did not answer ({where}): {_one_line(error)}")
    return error


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
