"""The demo: the layers, and a network of them, on a real video, fused and as published; a picture for each family."""
