"""The published eager flows, the baselines whose cost the fused layers are measured against. One file per family."""
