"""`python -m datadist_hccl.verify`."""

import sys

from datadist_hccl.verify.command import main

sys.exit(main())
