"""Which C++ sources a library was built from. setup.py runs this file by its path: it imports nothing else of ours."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".h", ".cpp", ".cuh", ".cu")


def digest(csrc: Path) -> str:
    """The SHA-256 of the sources and headers below ``csrc``, names and contents, in hexadecimal digits."""
    found = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES):
        found.update(f"{path.relative_to(csrc)}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()
