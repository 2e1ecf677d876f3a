"""A process of its own that rewrites Parquet files as Arrow files, for `infir2.data.parquet`.

A damaged Parquet file can end the process that reads it (Arrow aborts), fill its memory or keep it
busy; here it ends only this one. It runs as a script and does not import infir2, to start fast. A
line {"path", "to", "columns"} of standard input gives {"fields"} or {"error"} on standard output.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_READ = 8  # memory is bounded by these rows, not by the row group
ROWS_PER_BATCH, BYTES_PER_BATCH = 1 << 16, 1 << 26
MAX_RATIO, FREE_BYTES = 250, 16 << 30  # a dictionary has a text once that many rows repeat
MAX_MEMORY_BYTES = 8 << 30  # address space
PR_SET_PDEATHSIG = 1


def convert(path: str, to: str, columns: list[str]) -> list[str]:
    """Write `columns` of a Parquet file, or all if it has none of them, to an Arrow file.

    Returns the names of all columns. Raises ValueError for a file that cannot be used, and whatever
    Arrow raises.
    """
    size = os.stat(path).st_size
    _limit_cpu_seconds(300 + size / 1e6)
    limit, written = max(FREE_BYTES, MAX_RATIO * size), 0
    # Without pre_buffer, Arrow reads pages one by one instead of whole row groups.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as parquet:
        stored = parquet.schema_arrow
        _check_unique(list(stored), "")
        names = [name for name in stored.names if name in columns] or stored.names
        schema = pa.schema([_plain(stored.field(name)) for name in names])
        with pa.OSFile(to, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in _join_batches(_read(parquet, names, schema)):
                written += batch.nbytes
                if written > limit:
                    raise ValueError(f"it unpacks to more than {limit:,} bytes")
                writer.write_batch(batch)
    return list(stored.names)


def _read(parquet: Any, names: list[str], schema: Any) -> Iterator[Any]:
    # By row group: Arrow cannot join the dictionaries of two of them in a nested column.
    for group in range(parquet.num_row_groups):
        for batch in parquet.iter_batches(ROWS_PER_READ, [group], names, use_threads=False):
            yield batch.select(names).cast(schema)


def _join_batches(batches: Iterator[Any]) -> Iterator[Any]:
    """Join small batches, since each takes a kilobyte of the file."""
    parts: list[Any] = []
    rows = size = 0
    for batch in batches:
        parts.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows >= ROWS_PER_BATCH or size >= BYTES_PER_BATCH:
            yield pa.concat_batches(parts) if parts[1:] else batch
            parts, rows, size = [], 0, 0
    if parts:
        yield pa.concat_batches(parts)


def _check_unique(fields: list[Any], parent: str) -> None:
    """Raise ValueError for two columns, or two keys of a struct, of one name."""
    names = [field.name for field in fields]
    for field in fields:
        if names.count(field.name) > 1:
            raise ValueError(f"it has two columns named `{parent}{field.name}`")
        _check_unique([field.type.field(i) for i in range(field.type.num_fields)], f"{field.name}.")


def _plain(field: Any) -> Any:
    """Return an Arrow field without dictionaries and without keys that are null in every row.

    An Arrow file allows one dictionary per column, and Arrow gives the keys a wrong length.
    """
    kind = field.type
    if pa.types.is_dictionary(kind):
        return _plain(field.with_type(kind.value_type))
    if pa.types.is_struct(kind):
        kept = [_plain(child) for child in kind if not pa.types.is_null(child.type)]
        return field.with_type(pa.struct(kept))
    if pa.types.is_list(kind):
        return field.with_type(pa.list_(_plain(kind.value_field)))
    if pa.types.is_large_list(kind):
        return field.with_type(pa.large_list(_plain(kind.value_field)))
    if pa.types.is_fixed_size_list(kind):
        return field.with_type(pa.list_(_plain(kind.value_field), kind.list_size))
    return field


def _limit_cpu_seconds(seconds: float) -> None:
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _limit(resource.RLIMIT_CPU, int(used + seconds))


def _limit(kind: int, value: int) -> None:
    """Set a limit, unless the user's own is lower."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MAX_MEMORY_BYTES)
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            answer = {"fields": convert(**json.loads(line))}
        except Exception as error:  # a damaged file may raise anything
            answer = {"error": str(error).strip().split("\n")[0] or type(error).__name__}
        os.write(sys.stdout.fileno(), json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
