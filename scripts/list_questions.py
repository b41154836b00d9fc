"""List the questions of benchmarks with ids: ``python scripts/list_questions.py benchmark=[mmsafety]``."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("list_questions")
