"""Speeds: models, peers, operations, conversion. `models` times candidates in turns; `cli` is `blockffn bench`."""
