"""`python -m blockffn` is the `blockffn` command."""

import sys

from blockffn.cli import main

sys.exit(main())
