"""What all layers of the package share: types, maps, storage orders, process groups, how a call is recorded."""
