"""What a study has measured: one JSON line for each row, kept as soon as it is there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FOLDER = Path(__file__).parent / "rows"


@dataclass(frozen=True)
class RowFile:
    """`studies/rows/NAME.jsonl`; iterating gives its rows, none where there is no file."""

    name: str

    @property
    def path(self) -> Path:
        """Of the file."""
        return FOLDER / f"{self.name}.jsonl"

    def __iter__(self) -> Iterator[Row]:
        if not self.path.exists():
            return iter(())
        return iter([json.loads(line) for line in self.path.read_text().splitlines()])

    def append(self, *rows: Mapping[str, object]) -> None:
        """Keep rows, on disk at once."""
        FOLDER.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def replace(self, row: Row, keys: Sequence[str]) -> Row:
        """Put a row in the place of the one with the same `keys`, and give it back as it is kept.

        Of both times, `seconds`, the longer one stays: a second call finds everything done.
        """
        same = [old for old in self if all(old[key] == row[key] for key in keys)]
        row = {**row, "seconds": max(one["seconds"] for one in (*same, row))}
        rows = [*(old for old in self if old not in same), row]
        FOLDER.mkdir(exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text("".join(json.dumps(one) + "\n" for one in rows))
        new.replace(self.path)
        return row
