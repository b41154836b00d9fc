"""The one optimisation loop. It knows neither the detector nor the detoxifier.

A loss function returns the *sum* over its targets; a step divides by the number of targets, or of examples,
in the whole global step. Micro-batches and any number of processes then give the gradient of one big batch,
not a mean of means.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar

import torch
from accelerate.utils import set_seed
from transformers import get_scheduler

from mllm_protector.data.batching import GlobalStep, plan_epoch, steps_per_epoch
from mllm_protector.data.encoding import Batch
from mllm_protector.data.tokenized import lengths_digest, lengths_of
from mllm_protector.errors import InputError, RunError
from mllm_protector.models.packing import body
from mllm_protector.processes import Processes, start_accelerator
from mllm_protector.training.checkpoint import CHECKPOINTS, CheckpointConfig, Resume
from mllm_protector.training.dropout import attention_dropout
from mllm_protector.training.estimate import estimate
from mllm_protector.training.interruption import Interruption, Stopped
from mllm_protector.training.keeping import Fitted, Journal, Keeper, Meter
from mllm_protector.training.memory import out_of_memory_help
from mllm_protector.training.objective import LossFunction, Objective
from mllm_protector.training.resume import Resumption
from mllm_protector.training.settings import FitConfig
from mllm_protector.training.sharding import prepare
from mllm_protector.training.step import slots_of, take_step
from mllm_protector.training.tracking import Tracker

log = logging.getLogger(__name__)

E = TypeVar("E", bound=Sized)

Weights = dict[str, torch.Tensor]


def fit(
    model: torch.nn.Module,
    *,
    train: Sequence[E],
    collate: Callable[[Sequence[E]], Batch],
    loss_fn: LossFunction,
    evaluate: Callable[[torch.nn.Module, Processes[Any]], dict[str, float]],
    save: Callable[[Path, dict[str, float], Weights], None],
    config: FitConfig,
    checkpoint: CheckpointConfig,
    resume: Resume,
    tracker: Tracker,
    output_dir: Path,
    identity: Mapping[str, Any],
    seed: int,
) -> Fitted:
    """Train a model; the weights with the best validation figure end up in ``output_dir``.

    The weights of the last step are kept in ``output_dir/last`` where they are not the best ones.

    Args:
        model: parameters that require a gradient are trained.
        train: encoded examples; their length is that in tokens.
        collate: examples to a batch with ``labels`` (``IGNORED`` where there is no target), packed if
            ``config.packing``.
        loss_fn: the *sum* of the losses over a batch's targets, a scalar.
        evaluate: figures on the validation split; called on every process, must return the same on all.
        save: writes the given weights, and what belongs to them, to a folder; called on the first process.
        config: how to optimise.
        checkpoint: when to write one to ``output_dir/checkpoints``. They are removed by
            ``Fitted.write``.
        resume: ``auto`` goes on from the newest intact checkpoint if there is one, ``never`` starts over.
        tracker: takes the figures as they arise, besides ``metrics.jsonl``.
        output_dir: where everything goes.
        identity: what else the training depends on, such as its data and base model: a checkpoint of
            another one is refused. JSON takes it.
        seed: of the order of examples and of dropout.

    Raises:
        RunError: the loss or the gradient is no longer a finite number; nothing of that step is saved. Or
            a checkpoint cannot be written or read.
        Stopped: SIGTERM or SIGINT came; the step was finished and a checkpoint written.
        InputError: nothing to train on, ``config.best_metric`` is not a figure that ``evaluate`` gives, or
            the checkpoints in ``output_dir`` are of another training.
    """
    if not train:
        raise InputError("the training split is empty")
    accelerator = start_accelerator(config.precision)
    processes: Processes[Any] = Processes(accelerator.process_index, accelerator.num_processes)
    set_seed(seed, device_specific=True)
    lengths = lengths_of(train)
    an_epoch = steps_per_epoch(len(train), batch_size=config.batch_size)
    total = min(config.epochs * an_epoch, config.max_steps or config.epochs * an_epoch)
    expected = estimate(model, lengths=lengths, config=config, processes=processes.count, steps=total)
    log.info(
        "training %s of %s parameters (%.1f %%) on %s examples: %s steps of %d, %d process(es)",
        f"{expected.trainable:,}",
        f"{expected.parameters:,}",
        100 * expected.trainable / expected.parameters,
        f"{len(train):,}",
        f"{total:,}",
        config.batch_size,
        processes.count,
    )
    expected.report()
    if dropped := attention_dropout(model):
        log.info(
            "the backbone drops %.0f %% of its attention weights; which ones depends on micro-batches and "
            "processes",
            100 * dropped,
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if config.compile:
        body(model).compile(dynamic=True)
    helped = partial(out_of_memory_help, model, config, longest=max(lengths), processes=processes.count)
    with helped():
        shared = prepare(
            accelerator, Objective(model, loss_fn), lambda objective: _optimizer(objective, config)
        )
    # Not prepared by accelerate, which would step it once for each process.
    scheduler = get_scheduler(
        config.schedule,
        shared.optimizer,
        num_warmup_steps=round(config.warmup * total),
        num_training_steps=total,
    )
    resumption = Resumption(
        checkpoint,
        resume,
        output_dir / CHECKPOINTS,
        run={**identity, **config.of_influence(), "seed": seed, "lengths": lengths_digest(lengths)},
        model=model,
        shared=shared,
        scheduler=scheduler,
        processes=processes,
    )

    def write(folder: Path, metrics: dict[str, float]) -> None:
        weights = shared.weights(model)
        if accelerator.is_main_process:
            save(folder, metrics, weights)

    keeper = Keeper(config.best_metric, output_dir, write, **resumption.state.get("keeper", {}))
    meter = Meter(**resumption.state.get("meter", {}))
    journal = Journal(
        output_dir,
        tracker,
        {"fit": asdict(config), "seed": seed, "processes": processes.count},
        done=resumption.step,
        validated=keeper.step,
        total=total,
        every=config.log_every,
        best_metric=config.best_metric,
        active=accelerator.is_main_process,
    )

    def is_validated(step: int) -> bool:
        return step % (config.validate_every or an_epoch) == 0 or step == total

    def validate(step: int) -> None:
        # The bare model: a wrapped one talks to the other processes, which may have no batch left.
        with shared.whole():
            metrics = evaluate(model, processes)
        model.train()
        if not all(map(math.isfinite, metrics.values())):
            raise RunError(f"step {step}: a validation figure is not a finite number: {metrics}")
        keeper.offer(metrics, step)
        journal.validated(step, metrics)

    def state() -> dict[str, Any]:
        return {"keeper": keeper.state(), "meter": asdict(meter)}

    model.train()
    with journal, helped(), Interruption() as interruption:
        resumption.restore()
        if is_validated(resumption.step) and keeper.step < resumption.step:
            validate(resumption.step)  # it was stopped before it could
        for step, epoch, plan in _steps(lengths, config, processes.count, seed, resumption.step, total):
            with meter.measuring():
                slots = slots_of(plan, processes.index, train, collate, seed=seed, step=step)
                taken = take_step(accelerator, shared, slots, config.clip_norm, config.normalise)
            meter.count(tokens=taken.tokens, positions=taken.positions)
            if not taken.finite:
                raise RunError(
                    f"step {step}: the loss is {taken.loss}, the gradient norm {taken.gradient_norm}; "
                    "nothing of this step was saved. "
                    f"Lower fit.learning_rate (now {config.learning_rate}) or look at the data"
                )
            scheduler.step()
            journal.trained(
                step,
                {
                    "loss": taken.loss,
                    "gradient_norm": taken.gradient_norm,
                    "learning_rate": scheduler.get_last_lr()[0],
                    **meter.figures(),
                    "epoch": epoch,
                },
            )
            signal = processes.largest(interruption.signal or 0)
            if not signal and is_validated(step):
                validate(step)
                signal = processes.largest(interruption.signal or 0)  # it may have taken long
            resumption.after_step(step, state, stopping=bool(signal))
            if signal:
                raise Stopped(Signals(signal), step)
        fitted = keeper.finish(total)
    accelerator.wait_for_everyone()
    return fitted


def _steps(
    lengths: Sequence[int], config: FitConfig, processes: int, seed: int, done: int, total: int
) -> Iterator[tuple[int, int, GlobalStep]]:
    """(step from 1, epoch from 1, plan) of the steps after the first ``done`` ones."""
    an_epoch = steps_per_epoch(len(lengths), batch_size=config.batch_size)
    for epoch in range(done // an_epoch + 1, -(-total // an_epoch) + 1):
        before = (epoch - 1) * an_epoch
        first = max(done, before)
        plans = plan_epoch(
            lengths,
            batch_size=config.batch_size,
            limit=config.micro_batch,
            processes=processes,
            seed=seed,
            epoch=epoch,
            done=first - before,
        )
        for step, plan in zip(range(first + 1, total + 1), plans, strict=False):
            yield step, epoch, plan


def _optimizer(objective: torch.nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
