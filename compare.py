"""The checkout's door to Lockstep's command line: `python compare.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / ".package"))

if __name__ == "__main__":
    from lockstep.cli import run_and_exit

    run_and_exit()
