"""The subcommands of `blockffn`: one module each, with `add_arguments(parser)` and `run(args)`.

They are imported only when they are called, so that `blockffn --help` is quick.
"""
