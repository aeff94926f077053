"""Fresh runs of every method, for one to be held against those of another process.

PYTHONHASHSEED=1 python -m tests.repeats MATERIAL FOLDER --workers 2 --log_every 3
"""

import argparse
import sys
from pathlib import Path

import torch

from cli import main as cli_main
from tests.kills import METHODS, command


def main() -> int:
    """Train them into the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("material", type=Path, help="of tests.kills")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--log_every", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.argv = ["cli.py"]
    for method in METHODS:
        arguments = command(options.material, options.folder / method, method, workers=options.workers)
        if code := cli_main([*arguments, "--trainer.log_every_n_steps", str(options.log_every)]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
