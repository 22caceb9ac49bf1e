"""The measures of `blockffn eval`: arguments, and results as text and JSON."""
