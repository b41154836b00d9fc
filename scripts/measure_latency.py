"""Time what a guard adds to an answer: ``python scripts/measure_latency.py [key=value ...]``, ``--help``."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(
        __doc__,
        "mllm_protector.evaluation.latency.measure_latency",
        "mllm_protector.reporting.latency.report_latency",
    )
