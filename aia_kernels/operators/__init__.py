"""Whole layers as registered operators, the road of torch.compile and torch.export. One file per family."""
