"""What a clip costs: time, memory, passes over the tree, compilation; `python -m benchmarks`."""
