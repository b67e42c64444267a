"""A fuzz of the raw CPU operators: random argument sets, right and wrong, as an exported program might pass them.

Each set either raises RuntimeError and leaves its arguments as they were, or gives the values of a plain float64
computation; the sanitizers must find nothing (sanitized.py). A set is a number: its seed makes its arguments
(arguments.py), spoils some of them (spoiled.py), and ``make fuzz ONLY=SEED`` runs it alone.
"""
