"""Serves the emulated CUDA passes to a test: pickled calls on standard input, pickled results on standard output.

A process of its own, because the sanitizers must be loaded before Python is.
"""

import importlib.util
import pickle
import sys

import numpy


def between_vectors(value):
    """Arrays begin one element behind a multiple of 16 bytes, as slices of a packed batch do; else as they came."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(between_vectors, value))
    if not isinstance(value, numpy.ndarray):
        return value
    buffer = numpy.empty(value.nbytes + 32, numpy.uint8)
    start = -buffer.ctypes.data % 16 + value.itemsize
    moved = buffer[start : start + value.nbytes].view(value.dtype)
    moved[...] = value
    return moved


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("aia_emulator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    while True:
        try:
            name, arguments, misaligned = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if misaligned:
            arguments = between_vectors(arguments)
        try:
            answer = (True, (getattr(module, name)(*arguments), arguments))
        except RuntimeError as error:
            answer = (False, str(error))
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
