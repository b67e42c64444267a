"""Many argument sets under the sanitizers, on every instruction level of the processor (make fuzz N=100000)."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from aia_kernels.backends import extension

from . import sanitized
from .sets import Set


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--sets", type=int, default=10000, help="how many, over sanitizers and levels")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", type=int, help="the set of one seed, on the library as it is installed")
    options = parser.parse_args()
    if (reason := extension.load()) is not None:
        sys.exit(reason)
    if options.only is not None:
        one = Set(options.only)
        print(one)
        print(one.run() or "gives the right values")
        return 0

    choose = ctypes.CDLL(str(extension.LIBRARY)).aia_kernels_cpu_level
    choose.restype = ctypes.c_char_p
    here = [level for level in sanitized.MARCH if choose(level.encode()) is None]
    jobs = []
    for kind in sanitized.KINDS:
        if (reason := sanitized.why_not(kind)) is not None:
            print(f"{kind}: left out: {reason}")
            continue
        print(f"{kind}: building", flush=True)
        library = sanitized.build(kind, tuple(sanitized.MARCH) if len(here) > 1 else ("base",))
        parts = max(1, len(os.sched_getaffinity(0)) // len(here))
        for level in here:
            seeds = range(options.first, options.first + options.sets // (2 * len(here)))
            jobs += [(kind, library, seeds[i::parts], level) for i in range(parts)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = [one for one in pool.map(lambda job: sanitized.run(*job), jobs) if one is not None]
    print("\n\n".join(found) or f"{sum(len(job[2]) for job in jobs)} argument sets: nothing found")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
