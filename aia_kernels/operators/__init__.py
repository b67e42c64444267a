"""Whole layers as registered operators: what torch.compile, torch.export, make_fx and selective checkpointing record.
One file per family.

An operator takes tensors with any strides, as the inputs of a recorded program need not be stored as those that it was
recorded with. Its results are stored as those of the function that recorded it.
"""
