"""The demo: the layers on a real video, fused and as published, in one table and a picture for each family."""
