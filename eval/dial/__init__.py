"""What the dial of ReLU routing costs in quality and gives in speed: `blockffn eval dial`."""
