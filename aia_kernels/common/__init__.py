"""What the layers of the package stand on: types, geometry, storage, process groups and what torch says of a call."""
