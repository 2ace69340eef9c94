"""`python -m search` does what `search` does."""

import sys

from search.cli import main

sys.exit(main())
