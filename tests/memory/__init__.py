"""A package, so that a benchmark of this name does not hide it."""
