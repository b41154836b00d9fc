"""List the questions of benchmarks with ids: ``python scripts/list_questions.py benchmark=[mmsafety]``."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.evaluation.items.list_questions")
