"""The former name of evaluate.py, kept for one release."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    print("note: score.py is now called evaluate.py; please use that name", file=sys.stderr)
    runpy.run_path(str(Path(sys.argv[0]).with_name("evaluate.py")), run_name="__main__")
