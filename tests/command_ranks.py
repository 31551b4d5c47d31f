"""`mbcnet ARGS` on two ranks: `command_ranks.py FOLDER ARGS`, which keeps their words in FOLDER. Ends well if both do."""

import sys
from pathlib import Path

from forked_ranks import mbcnet, run_ranks

if __name__ == "__main__":
    result = run_ranks(mbcnet(sys.argv[2:]), Path(sys.argv[1]), limit=300)
    assert result["codes"] == [0, 0], result
