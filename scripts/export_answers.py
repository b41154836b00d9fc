"""Write a run's answers for other tools: ``python scripts/export_answers.py run=outputs/mmsafety``."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("export_answers")
