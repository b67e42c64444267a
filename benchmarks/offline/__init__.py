"""What can be known of the GPU kernels without a GPU: their machine code, and the bytes and launches of every layer."""
