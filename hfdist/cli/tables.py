"""Tables that can be read: whole in a pipe, with fewer columns on a narrow terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

_UNLIMITED = 10_000


def print_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    dispensable: Sequence[str] = (),
    best: Mapping[str, Any] | None = None,
) -> None:
    """Print rows of the same keys.

    Args:
        rows: Numbers stand to the right, with four digits; None is empty.
        title: A line above.
        dispensable: Columns that a narrow terminal goes without, the first one first; then those at the
            right.
        best: The row that stands out.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_UNLIMITED)
    columns = list(rows[0])
    while len(columns) > 1 and _width(console, rows, columns) > console.width:
        gone = next((key for key in dispensable if key in columns), columns[-1])
        columns.remove(gone)
    console.print(_table(rows, columns, title, best), crop=False)
    if len(columns) < len(rows[0]):
        missing = ", ".join(key for key in rows[0] if key not in columns)
        console.print(
            f"not shown: {missing} (a wider window, a pipe or --json has all)", style="dim"
        )


def _table(
    rows: Sequence[Mapping[str, Any]],
    columns: Collection[str],
    title: str,
    best: Mapping[str, Any] | None = None,
) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for key in columns:
        numeric = any(_is_number(row.get(key)) for row in rows)
        table.add_column(
            Text(key), justify="right" if numeric else "left", no_wrap=True, overflow="fold"
        )
    for row in rows:
        style = "bold green" if row is best and best is not None else None
        table.add_row(*(Text(_shown(row.get(key))) for key in columns), style=style)
    return table


def _width(console: Any, rows: Sequence[Mapping[str, Any]], columns: Collection[str]) -> int:
    from rich.measure import Measurement

    options = console.options.update(max_width=_UNLIMITED)
    return Measurement.get(console, options, _table(rows, columns, "")).maximum


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
