"""One script per table of docs/results.md."""
