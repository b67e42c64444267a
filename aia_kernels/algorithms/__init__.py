"""The algorithms of the layers, each written once in terms of the passes of a backend."""
