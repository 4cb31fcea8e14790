"""`python -m minivlm` is the command `minivlm`."""

import sys

from minivlm.cli import main

sys.exit(main())
