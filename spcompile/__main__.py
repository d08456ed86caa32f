"""``python -m spcompile``: the same as the command ``spcompile``."""

from spcompile.cli import main

raise SystemExit(main())
