"""Quantization types of one model side by side: size, quality, speed: `blockffn eval types`."""
