"""One raw pass, ready to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class RawPass(NamedTuple):
    """A call, and the bytes that it must read and write at least."""

    call: Callable[[], object]
    bytes_moved: int
