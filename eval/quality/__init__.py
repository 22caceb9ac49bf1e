"""What a model is worth: parity with the torch reference, perplexity and divergence, sparsity."""
