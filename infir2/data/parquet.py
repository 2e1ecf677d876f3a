"""Random access to the rows of Parquet files.

The requested columns are written to a temporary Arrow file, which is memory-mapped.
"""

import bisect
import itertools
import json
import mmap
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from infir2.data.types import MAX_ROW_BYTES, MAX_ROW_VALUES, RowError
from infir2.errors import DataError, first_line
from infir2.files import require_regular

SCRIPT = Path(__file__).with_name("parquet_to_arrow.py")
RELEASE_BYTES = 1 << 26


class ParquetConverter:
    """Rewrites Parquet files as Arrow files in one child process, which starts with the first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "ParquetConverter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def convert(self, path: Path, to: str, columns: Collection[str]) -> list[str]:
        """Write `columns`, or all if the file has none of them; return the names of all.

        Raises:
            DataError: the file is damaged.
        """
        self._process = process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"path": str(path), "to": to, "columns": sorted(columns)}
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):  # the process has ended
            self._process, code = None, process.wait()
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            answer = {"error": f"Arrow ended with {cause}"}
        if "error" in answer:
            raise DataError(
                f"{path} cannot be read as Parquet ({answer['error'].rstrip('.')}): "
                "write it again, or remove it from the sources."
            )
        fields: list[str] = answer["fields"]
        return fields

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)],  # -P: types.py beside it is not Python's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )


class ParquetRows:
    """Rows of a .parquet file.

    Only `columns` are read, or all columns if the file has none of them. Keys of a struct that are
    null in every row are absent.

    Raises:
        DataError: the file is not readable as Parquet, or two columns have one name.
    """

    def __init__(self, path: Path, columns: Collection[str], converter: ParquetConverter) -> None:
        import pyarrow as pa

        self.path = path
        require_regular(path)
        with tempfile.NamedTemporaryFile(prefix="infir2-", suffix=".arrow") as file:
            fields = converter.convert(path, file.name, columns)
            # `infir2 tokenize` reads in forked processes, which have none of Arrow's threads.
            options = pa.ipc.IpcReadOptions(use_threads=False)
            # The mapping stays valid after the temporary file is deleted.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._batches = pa.ipc.open_file(pa.py_buffer(self._map), options=options)
            self.num_bytes, self._bytes_read = len(self._map), 0
        numbers = range(self._batches.num_record_batches)
        sizes = [self._batches.get_batch(number).num_rows for number in numbers]
        self._ends = list(itertools.accumulate(sizes))
        self.fields = frozenset(fields if len(self) else ())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def number(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> dict[str, Any]:
        batch = bisect.bisect_right(self._ends, index)
        first = self._ends[batch - 1] if batch else 0
        row = self._batches.get_batch(batch).slice(index - first, 1)
        if row.nbytes > MAX_ROW_BYTES:
            raise RowError("too_large", f"{row.nbytes:,} bytes, more than {MAX_ROW_BYTES:,}")
        if (num_values := sum(map(_num_values, row.columns))) > MAX_ROW_VALUES:
            raise RowError("too_large", f"{num_values:,} values, more than {MAX_ROW_VALUES:,}")
        self._bytes_read += row.nbytes
        if self._bytes_read > RELEASE_BYTES:  # pages that were read would count as our memory
            self._map.madvise(mmap.MADV_DONTNEED)
            self._bytes_read = 0
        try:
            return row.to_pylist(maps_as_pydicts="strict")[0]
        except UnicodeDecodeError:
            raise RowError("bad_utf8", "a string of the row is not UTF-8") from None
        except (ArithmeticError, LookupError, ValueError) as error:
            raise RowError("bad_field", f"not a value of Python: {first_line(error)}") from None


def _num_values(array: Any) -> int:
    """Values of an Arrow array, with those in its lists and structs: a boolean takes only a bit."""
    import pyarrow as pa

    if pa.types.is_map(array.type):
        offsets = array.offsets
        pairs = slice(offsets[0].as_py(), offsets[-1].as_py())
        inner = [array.keys[pairs], array.items[pairs]]
    elif array.type.num_fields:
        inner = array.flatten()
    else:
        return len(array)
    return len(array) + sum(map(_num_values, inner if isinstance(inner, list) else [inner]))
