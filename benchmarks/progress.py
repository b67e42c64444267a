"""Progress on terminals alone: in a log or a pipe a bar would be one long line."""

from __future__ import annotations

import functools

from tqdm import tqdm

bar = functools.partial(tqdm, dynamic_ncols=True, disable=None)
