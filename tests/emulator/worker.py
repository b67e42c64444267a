"""Serves the emulated CUDA passes to a test: pickled calls on standard input, pickled results on standard output.

A process of its own, because the sanitizers must be loaded before Python is.
"""

import importlib.util
import pickle
import sys


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("aia_emulator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (True, (getattr(module, name)(*arguments), arguments))
        except RuntimeError as error:
            answer = (False, str(error))
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
