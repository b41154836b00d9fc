"""Time what a guard adds to an answer: ``python scripts/measure_latency.py [key=value ...]``, ``--help``."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("measure_latency")
