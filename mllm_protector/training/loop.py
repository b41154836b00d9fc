"""The one training loop. It knows neither the detector nor the detoxifier.

A loss is the *sum* over its targets; a step divides it by the number of targets, or of examples, in the whole
global step. Micro-batches and any number of processes then give the gradient of one big batch, not a mean of
means.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import psutil
import torch
from accelerate.utils import set_seed
from transformers import get_scheduler

from mllm_protector.data.batching import GlobalStep, plan_epoch, steps_per_epoch
from mllm_protector.data.encoding import Batch
from mllm_protector.data.tokenized import lengths_digest, lengths_of
from mllm_protector.errors import InputError, RunError
from mllm_protector.models.packing import body
from mllm_protector.models.tuning import weight_count
from mllm_protector.processes import Processes, start_accelerator
from mllm_protector.training.checkpoints import CHECKPOINTS, BestCheckpoint, Fitted
from mllm_protector.training.dropout import attention_dropout
from mllm_protector.training.logging import MetricLogger, Tracker
from mllm_protector.training.losses import LossFunction
from mllm_protector.training.parallel import Objective, Parallel, micro_batches, prepare, take_step
from mllm_protector.training.resume import Interruption, Resumption, Stopped, TrainingState
from mllm_protector.training.settings import CheckpointConfig, FitConfig, Resume, out_of_memory_help

log = logging.getLogger(__name__)

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to learn.

    Attributes:
        model: its parameters that require a gradient are trained.
        examples: encoded; the length of one is its number of tokens.
        collate: examples to a batch with ``labels`` (``IGNORED`` where there is no target), packed if
            ``fit.packing``.
        loss: the *sum* of the losses over a batch's targets, a scalar.
        evaluate: metrics on the validation split; called on every process, must return the same on all.
        save: writes weights and their metrics to a folder; called on the first process.
        identity: what else the result depends on, such as the data and the base model; JSON. A checkpoint
            with another one is refused.
    """

    model: torch.nn.Module
    examples: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    loss: LossFunction
    evaluate: Callable[[torch.nn.Module, Processes[Any]], dict[str, float]]
    save: Callable[[Path, dict[str, float], Weights], None]
    identity: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How and where to train.

    Attributes:
        fit: how to optimise.
        checkpoint: when to write to ``output_dir/checkpoints``; ``Fitted.write`` removes them.
        resume: ``auto`` continues from the newest intact checkpoint if there is one, ``never`` starts over.
        tracker: takes the metrics as they arise, besides ``metrics.jsonl``.
        output_dir: where everything goes.
        seed: of the order of examples and of dropout.
    """

    fit: FitConfig
    checkpoint: CheckpointConfig
    resume: Resume
    tracker: Tracker
    output_dir: Path
    seed: int


def fit(task: Task, run: Run) -> Fitted:
    """Train a model; keep the best weights in ``run.output_dir``, and the last in ``last`` if they differ.

    Raises:
        RunError: the loss or the gradient is not finite, and nothing of that step is saved; or a checkpoint
            cannot be written or read; or the memory ran out.
        Stopped: SIGTERM or SIGINT came; the step was finished and a checkpoint written.
        InputError: no examples, ``fit.best_metric`` is not a metric that ``evaluate`` gives, or the
            checkpoints in ``output_dir`` are of another training.
    """
    if not task.examples:
        raise InputError("the training split is empty")
    config, model = run.fit, task.model
    accelerator = start_accelerator(config.precision)
    processes: Processes[Any] = Processes(accelerator.process_index, accelerator.num_processes)
    set_seed(run.seed, device_specific=True)
    plan = Plan(lengths_of(task.examples), config, processes.count, run.seed)
    _announce(model, plan)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if config.compile:
        body(model).compile(dynamic=True)
    longest = max(plan.lengths)
    memory_help = partial(out_of_memory_help, model, config, longest=longest, processes=processes.count)
    with memory_help():
        parallel = prepare(accelerator, Objective(model, task.loss), partial(_optimizer, config=config))
    # Not prepared by accelerate, which would step it once for each process.
    scheduler = get_scheduler(
        config.schedule,
        parallel.optimizer,
        num_warmup_steps=round(config.warmup * plan.total),
        num_training_steps=plan.total,
    )
    settings = {**config.of_influence(), "seed": run.seed, "lengths": lengths_digest(plan.lengths)}
    resumption = Resumption(
        run.output_dir / CHECKPOINTS,
        run.checkpoint,
        run.resume,
        identity={**task.identity, **settings},
        state=TrainingState(model, parallel.optimizer, scheduler, processes),
    )

    def save(folder: Path, metrics: dict[str, float]) -> None:
        weights = parallel.weights(model)  # gathered by all processes
        if accelerator.is_main_process:
            task.save(folder, metrics, weights)

    # "keeper" is the key that earlier releases wrote to their checkpoints.
    best = BestCheckpoint(config.best_metric, run.output_dir, save, **resumption.progress.get("keeper", {}))
    logger = MetricLogger(
        run.output_dir,
        run.tracker,
        config,
        {"seed": run.seed, "processes": processes.count},
        done=resumption.step,
        validated=best.step,
        total=plan.total,
        active=accelerator.is_main_process,
    )

    def validate(step: int) -> None:
        metrics = _validated(task, parallel, processes, step)
        best.update(metrics, step)
        logger.validated(step, metrics)

    model.train()
    with logger, memory_help(), Interruption() as interruption:
        resumption.restore()
        if plan.is_validated(resumption.step) and best.step < resumption.step:
            validate(resumption.step)  # the signal that stopped it came first
        for step, epoch, shares in plan.steps_after(resumption.step):
            begun, rows = time.perf_counter(), task.examples
            batches = micro_batches(shares, processes.index, rows, task.collate, seed=run.seed, step=step)
            result = take_step(accelerator, parallel, batches, config.clip_norm, config.normalise)
            if not result.finite:
                raise RunError(
                    f"step {step}: the loss is {result.loss}, the gradient norm {result.gradient_norm}; "
                    "nothing of this step was saved. Lower fit.learning_rate (now "
                    f"{config.learning_rate}) or look at the data"
                )
            scheduler.step()
            metrics = {
                "loss": result.loss,
                "gradient_norm": result.gradient_norm,
                "learning_rate": scheduler.get_last_lr()[0],
                "padded_over_real": result.positions / result.tokens,
                "epoch": epoch,
            }
            logger.trained(step, metrics, tokens=result.tokens, seconds=time.perf_counter() - begun)
            signal = processes.largest(interruption.signal or 0)
            if not signal and plan.is_validated(step):
                validate(step)
                signal = processes.largest(interruption.signal or 0)  # a validation may take long
            resumption.after_step(step, lambda: {"keeper": best.state()}, stopping=bool(signal))
            if signal:
                raise Stopped(Signals(signal), step)
        fitted = best.finish(plan.total)
    accelerator.wait_for_everyone()
    return fitted


@dataclass(frozen=True, slots=True)
class Plan:
    """Which steps a training makes, and after which of them it validates; ``lengths`` are in tokens."""

    lengths: Sequence[int]
    config: FitConfig
    processes: int
    seed: int

    @property
    def epoch(self) -> int:
        """Steps in one pass over the examples."""
        return steps_per_epoch(len(self.lengths), batch_size=self.config.batch_size)

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        steps = self.config.epochs * self.epoch
        return min(steps, self.config.max_steps or steps)

    def is_validated(self, step: int) -> bool:
        """Whether a validation follows a step."""
        return step % (self.config.validate_every or self.epoch) == 0 or step == self.total

    def steps_after(self, done: int) -> Iterator[tuple[int, int, GlobalStep]]:
        """(step from 1, epoch from 1, examples of each process) of the steps after the first ``done``."""
        for epoch in range(done // self.epoch + 1, -(-self.total // self.epoch) + 1):
            before = (epoch - 1) * self.epoch
            first = max(done, before)
            plans = plan_epoch(
                self.lengths,
                batch_size=self.config.batch_size,
                limit=self.config.micro_batch,
                processes=self.processes,
                seed=self.seed,
                epoch=epoch,
                done=first - before,
            )
            for step, plan in zip(range(first + 1, self.total + 1), plans, strict=False):
                yield step, epoch, plan


def _announce(model: torch.nn.Module, plan: Plan) -> None:
    """Log what is trained, on what, and what memory is free."""
    parameters = sum(map(weight_count, model.parameters()))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log.info(
        "training %s of %s parameters (%.1f %%) on %s examples of %s tokens: %s steps of %d examples, "
        "%d process(es), %.1f GiB of memory free",
        f"{trained:,}",
        f"{parameters:,}",
        100 * trained / parameters,
        f"{len(plan.lengths):,}",
        f"{sum(plan.lengths):,}",
        f"{plan.total:,}",
        plan.config.batch_size,
        plan.processes,
        _free_memory() / 2**30,
    )
    if dropped := attention_dropout(model):
        log.info(
            "the backbone drops %.0f %% of its attention weights; which ones depends on micro-batches and "
            "the number of processes",
            100 * dropped,
        )


def _free_memory() -> int:
    """Bytes that this process can still take, of the GPU if there is one."""
    if not torch.cuda.is_available():
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + cached


def _optimizer(objective: torch.nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _validated(task: Task, parallel: Parallel, processes: Processes[Any], step: int) -> dict[str, float]:
    # The unwrapped model: a wrapped one talks to the other processes, which may have no batch left.
    with parallel.whole_model():
        metrics = task.evaluate(task.model, processes)
    task.model.train()
    if not all(map(math.isfinite, metrics.values())):
        raise RunError(f"step {step}: a validation metric is not a finite number: {metrics}")
    return metrics
