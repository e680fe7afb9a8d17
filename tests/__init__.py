"""The test suite; a package so that an installed one of the same name cannot hide it."""
