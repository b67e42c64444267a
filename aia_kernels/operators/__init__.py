"""Whole layers as registered operators: what torch.compile, torch.export, make_fx and selective checkpointing record.
One file per family.

An operator takes its tensors with any strides: what is given to it when a recorded program runs need not be stored as
what it was recorded with. Results are stored as those of the function that recorded it.
"""
