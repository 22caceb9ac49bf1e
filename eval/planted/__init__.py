"""Models of the published shapes with random weights, whose greedy text and sparsity are planted: for benchmarks."""
