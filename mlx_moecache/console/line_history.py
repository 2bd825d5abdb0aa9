"""What was typed in earlier runs: one JSON string per line, in the user's own state folder, readable only by them.

Losing it is never worth a failure: a file that cannot be read or written is as good as none.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

KEPT = 1000  # entries that come back at the next start
MOST_BYTES = 1_000_000  # of the file; beyond, it is cut to the entries that are kept


def state_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path | None:
    """Where this user's programs keep what should outlive a run; None for a user without a home."""
    try:
        if platform == "darwin":
            return Path.home() / "Library" / "Application Support" / "mlx_moecache"
        given = environment.get("XDG_STATE_HOME", "")
        base = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
        return base / "mlx_moecache"
    except RuntimeError:
        return None


class LineHistory:
    """Entries, oldest first; `add` appends to the file at once, so that several runs can share it."""

    def __init__(self, path: Path | None) -> None:
        """path: None keeps nothing across runs."""
        self._path = path
        self.entries: list[str] = self._read()

    def add(self, text: str) -> bool:
        """Remember `text`; False if it is what was typed last."""
        if not text.strip() or (self.entries and self.entries[-1] == text):
            return False
        self.entries.append(text)
        if self._path is not None:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    os.write(file, f"{json.dumps(text)}\n".encode())  # one write: lines of two runs do not mix
                finally:
                    os.close(file)
        return True

    def _read(self) -> list[str]:
        if self._path is None:
            return []
        try:
            lines = self._path.read_text("utf-8", errors="replace").splitlines()
            size = self._path.stat().st_size
        except OSError:
            return []
        entries = [text for line in lines if isinstance(text := _parsed(line), str)][-KEPT:]
        if size > MOST_BYTES:
            self._rewrite(entries)
        return entries

    def _rewrite(self, entries: list[str]) -> None:
        assert self._path is not None
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with suppress(OSError):
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(file, "w", encoding="utf-8") as stream:
                stream.writelines(f"{json.dumps(text)}\n" for text in entries)
            os.replace(temporary, self._path)


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:  # half a line of a run that was killed, or another program's file
        return None
