"""Verdicts that were given before, by the content of their question, in a sqlite file that survives the run."""

import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

AT_ONCE = 500  # sqlite's limit on the parameters of one statement is 999 in old versions
PATIENCE = 30.0  # seconds for another process that is writing


class JudgeCache:
    """A table from question to verdict. Without a file nothing is kept."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            with closing(self.connect()) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, value INTEGER, time REAL)")

    def connect(self) -> sqlite3.Connection:
        """A connection for one use: processes and threads share the file, not the connection."""
        return sqlite3.connect(str(self.file), timeout=PATIENCE)

    def read(self, keys: Sequence[str]) -> dict[str, bool]:
        """The verdicts that are kept of these."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, bool] = {}
        if self.file:
            with closing(self.connect()) as database:
                for start in range(0, len(wanted), AT_ONCE):
                    part = wanted[start : start + AT_ONCE]
                    marks = ",".join("?" * len(part))
                    rows = database.execute(f"SELECT key, value FROM verdicts WHERE key IN ({marks})", part)
                    found |= {key: bool(value) for key, value in rows}
        return found

    def write(self, verdicts: Mapping[str, bool]) -> None:
        """Keep verdicts; the first one given for a question stays."""
        if self.file and verdicts:
            rows = [(key, int(value), time.time()) for key, value in verdicts.items()]
            with closing(self.connect()) as database, database:
                database.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?)", rows)
