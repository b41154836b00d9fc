"""The commands: ``mllm-protector COMMAND`` and the scripts of the repository, both from one table."""

import sys
from difflib import get_close_matches
from typing import NamedTuple

from mllm_protector.helping import version_line

_USAGE = "Train, measure and run a guard for any multimodal LLM: mllm-protector COMMAND [key=value ...]"
_MORE = "mllm-protector COMMAND --help explains the keys of a command, --version gives the version."
HELP, VERSION = ("--help", "-h"), "--version"


class Command(NamedTuple):
    """One command.

    Attributes:
        config: the name of its YAML, and of its script.
        summary: what it does.
        target: the full name of its function.
        then: the full name of the function that gets what ``target`` returns.
        arguments: what its help shows behind its name.
    """

    config: str
    summary: str
    target: str
    then: str | None = None
    arguments: str = "[key=value ...]"

    def run(self, name: str) -> None:
        """Follow the command line; ``name`` is what the user typed before the arguments."""
        from mllm_protector.config import launch

        usage = f"{self.summary}: {name} {self.arguments}"
        launch(usage, self.target, self.then, config=self.config)


_PACKAGE = "mllm_protector"
COMMANDS = {
    "train-detector": Command(
        "train_detector", "Train the harm detector", f"{_PACKAGE}.training.detector.train_detector"
    ),
    "train-detoxifier": Command(
        "train_detoxifier", "Train the detoxifier", f"{_PACKAGE}.training.detoxifier.train_detoxifier"
    ),
    "eval": Command(
        "eval_mmsafety",
        "Measure a guard on MM-SafetyBench and other benchmarks",
        f"{_PACKAGE}.evaluation.run.evaluate",
        f"{_PACKAGE}.reporting.report.report",
    ),
    "eval-detector": Command(
        "eval_detector",
        "Measure a saved detector",
        f"{_PACKAGE}.evaluation.detector.eval_detector",
        f"{_PACKAGE}.reporting.parts.report_detector",
    ),
    "eval-detoxifier": Command(
        "eval_detoxifier",
        "Measure a saved detoxifier",
        f"{_PACKAGE}.evaluation.detoxifier.eval_detoxifier",
        f"{_PACKAGE}.reporting.parts.report_detoxifier",
    ),
    "calibrate": Command(
        "calibrate_detector",
        "Choose a detector's threshold again",
        f"{_PACKAGE}.training.recalibration.calibrate_detector",
    ),
    "serve": Command(
        "serve",
        "Guard a served model",
        f"{_PACKAGE}.serving.serve.serve",
        arguments="[url=http://...] [key=value ...]",
    ),
    "robustness": Command(
        "eval_robustness",
        "Attack a detector with rewritten answers",
        f"{_PACKAGE}.evaluation.robustness.eval_robustness",
        f"{_PACKAGE}.reporting.robustness.report_robustness",
    ),
    "prepare-data": Command(
        "prepare_data",
        "Say what a training would learn from",
        f"{_PACKAGE}.data.preparation.prepare_data",
        arguments="data=... [key=value ...]",
    ),
    "generate-pairs": Command(
        "generate_pairs",
        "Let a language model write training pairs",
        f"{_PACKAGE}.generation.run.generate_pairs",
    ),
    "export": Command(
        "export_detector",
        "Write a detector as one model for stock tools",
        f"{_PACKAGE}.models.export.export_detector",
    ),
    "export-answers": Command(
        "export_answers",
        "Write a run's answers as files of VLMEvalKit or lmms-eval",
        f"{_PACKAGE}.evaluation.answer_export.export_answers",
        arguments="run=outputs/mmsafety [key=value ...]",
    ),
    "compare": Command(
        "compare_runs",
        "Compare evaluations",
        f"{_PACKAGE}.reporting.compare.compare",
        arguments="runs=[outputs/a,outputs/b] [key=value ...]",
    ),
    "list-questions": Command(
        "list_questions",
        "List the questions of benchmarks with their ids",
        f"{_PACKAGE}.evaluation.items.list_questions",
        arguments="benchmark=[mmsafety] [key=value ...]",
    ),
    "measure-latency": Command(
        "measure_latency",
        "Time what a guard adds to an answer",
        f"{_PACKAGE}.evaluation.latency.measure_latency",
        f"{_PACKAGE}.reporting.latency.report_latency",
    ),
    "measure-streaming": Command(
        "measure_streaming",
        "Measure what judged streams let pass",
        f"{_PACKAGE}.evaluation.streaming.measure_streaming",
        f"{_PACKAGE}.reporting.streaming.report_streaming",
    ),
    "import-official": Command(
        "import_official",
        "Turn the paper's published detector into one of ours",
        f"{_PACKAGE}.models.official.import_official_detector",
    ),
}


def main() -> None:
    """``mllm-protector COMMAND [key=value ...]``."""
    name = sys.argv[1] if len(sys.argv) > 1 else HELP[0]
    if name in COMMANDS:
        del sys.argv[1]
        COMMANDS[name].run(f"mllm-protector {name}")
    elif name in HELP:
        width = max(map(len, COMMANDS))
        lines = [f"  {each:{width}}  {command.summary}" for each, command in COMMANDS.items()]
        sys.stdout.write("\n".join([_USAGE, "", *lines, "", _MORE, ""]))
    elif name == VERSION:
        sys.stdout.write(version_line())
    else:
        known = {each.config.replace("_", "-"): key for key, each in COMMANDS.items()}
        close = get_close_matches(name.replace("_", "-"), [*COMMANDS, *known], n=1, cutoff=0.4)
        advice = f" (did you mean {known.get(close[0], close[0])}?)" if close else ""
        sys.stderr.write(f"error: {name}: unknown command{advice}; mllm-protector --help lists them\n")
        sys.exit(2)


def run_script(config: str) -> None:
    """``python scripts/<config>.py [key=value ...]``: the command with this config."""
    [command] = [each for each in COMMANDS.values() if each.config == config]
    command.run(f"python scripts/{config}.py")
