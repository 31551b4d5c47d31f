"""examples/minimal.py for some epochs, with its log in a folder: `example_script.py FOLDER EPOCHS`."""

import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    tempfile.tempdir = sys.argv[1]
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    import minimal

    minimal.main(int(sys.argv[2]))
