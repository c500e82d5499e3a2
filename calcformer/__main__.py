"""python -m calcformer"""

import sys

from calcformer.cli import main

sys.exit(main())
