"""Stands in for NVIDIA's libraries when it is imported, which must be before torch is."""

import rehearsal

rehearsal.install()
