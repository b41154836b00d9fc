"""Attack a detector with rewritten answers: ``python scripts/eval_robustness.py [key=value ...]``."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("eval_robustness")
