"""Attack a detector with rewritten answers: ``python scripts/eval_robustness.py [key=value ...]``."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(
        __doc__,
        "mllm_protector.evaluation.robustness.eval_robustness",
        "mllm_protector.reporting.robustness.report_robustness",
    )
