"""A run on two ranks that draws no report: `training_ranks.py FOLDER CONFIG SETTING...`, which keeps their words in FOLDER. Ends well if both do."""

import sys
from pathlib import Path

from forked_ranks import run_ranks, training

from mbcnet_rec.training.hooks import Hooks

if __name__ == "__main__":
    action = training(Path(sys.argv[2]), sys.argv[3:], lambda rank: Hooks(), resume=False)
    result = run_ranks(action, Path(sys.argv[1]), limit=300)
    assert result["codes"] == [0, 0], result
