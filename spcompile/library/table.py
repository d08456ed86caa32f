"""THE table: each function of a library that spcompile knows, and the adapter that says what it computes.

To add a function, add its row, and its sample in tests/library_samples.py; a row without a sample fails.
"""

from __future__ import annotations

from spcompile.library import rows_fla, rows_others, rows_transformers
from spcompile.library.row import Row

__all__ = ["BY_FILE", "BY_MODULE", "TABLE"]

TABLE: dict[str, Row] = {
    row.path: row for row in [*rows_transformers.ROWS, *rows_fla.ROWS, *rows_others.ROWS]
}

BY_MODULE: dict[str, list[Row]] = {}
BY_FILE: dict[str, list[Row]] = {}
for _row in TABLE.values():
    BY_MODULE.setdefault(_row.module, []).append(_row)
for _rows in BY_MODULE.values():
    _end = "/".join(_rows[0].file.rsplit("/", 2)[-2:])
    assert _end not in BY_FILE, f"two libraries have a {_end}"
    BY_FILE[_end] = _rows
