"""Writes the stored numbers anew: ``python -m tests.frozen [name ...] [--to folder]``.

``published`` is left as it is unless MM_SAFETYBENCH names the folder of MM-SafetyBench's published files. A
commit that renews numbers says which changed, and why.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from tests.frozen.stored import NAMES, NUMBERS, PUBLISHED, compute, write


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the stored numbers anew.")
    here = [name for name in NAMES if name != "published" or PUBLISHED in os.environ]
    parser.add_argument("names", nargs="*", default=here, help=", ".join(NAMES))
    parser.add_argument("--to", type=Path, default=NUMBERS, help="folder for the files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["MLLM_PROTECTOR_CACHE"] = f"{home}/cache"
        for name in arguments.names:
            write(arguments.to / f"{name}.json", compute(name, Path(home)))


if __name__ == "__main__":
    main()
