"""What judged streams let pass: ``python scripts/measure_streaming.py [key=value ...]``, ``--help``."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("measure_streaming")
