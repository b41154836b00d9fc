"""The same short training in one process or sharded over several; run as a module by a launcher."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_protector.data.batching import MicroBatchLimit, plan_epoch
from mllm_protector.data.encoding import IGNORED, Batch
from mllm_protector.models.backbone import inference
from mllm_protector.models.tuning import FullTuning, LoraTuning, Tuning
from mllm_protector.processes import Processes, leave_processes, start_accelerator
from mllm_protector.training.parallel import Objective, micro_batches, prepare, take_step

VOCABULARY = 40
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=False,
)
TUNINGS: dict[str, Tuning] = {
    "full": FullTuning(),
    "lora": LoraTuning(rank=2, alpha=4, dropout=0.1, targets=["q_proj", "v_proj"]),
}


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def make_rows(count: int, seed: int) -> list[list[int]]:
    """Random ids of 2 to 9 tokens, so that processes have unequal work."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (count,), generator=draw).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]


VALIDATION = make_rows(5, seed=2)


def collate(rows: Sequence[list[int]]) -> Batch:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Goes around the head's own forward, as a fused loss does."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = torch.nn.functional.linear(hidden[:, :-1], inner.lm_head.weight).float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def train(folder: Path, tuning: str, precision: str) -> None:
    """Steps of 7 and 4 rows, each with a validation of 5 rows one by one; then everything is written."""
    accelerator = start_accelerator(precision)
    processes: Processes[float] = Processes(accelerator.process_index, accelerator.num_processes)
    model = TUNINGS[tuning].prepare(make_base(), "CAUSAL_LM", [])
    model.train()
    parallel = prepare(
        accelerator,
        Objective(model, summed_loss),
        lambda objective: torch.optim.AdamW(
            [parameter for parameter in objective.parameters() if parameter.requires_grad], lr=1e-3
        ),
    )
    rows = make_rows(11, seed=1)
    plans = plan_epoch(
        [len(row) for row in rows],
        batch_size=7,
        limit=MicroBatchLimit(examples=2),
        processes=processes.count,
        seed=0,
        epoch=1,
    )
    norms, losses = [], []
    for step, plan in enumerate(plans, start=1):
        batches = micro_batches(plan, processes.index, rows, collate, seed=0, step=step)
        result = take_step(accelerator, parallel, batches, clip_norm=0.5, normalise="tokens")
        norms.append(result.gradient_norm)
        with parallel.whole_model(), inference(model):
            mine = [summed_loss(model, collate([row])).item() for row in processes.mine(VALIDATION)]
        losses.append(processes.gather(mine, len(VALIDATION)))
    weights = parallel.weights(model)
    if accelerator.is_main_process:
        model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        local = {
            name: parameter.to_local().numel() / parameter.numel() if isinstance(parameter, DTensor) else 1.0
            for name, parameter in model.named_parameters()
        }
        measured = {"norms": norms, "losses": losses, "local": local}
        (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    for each in TUNINGS:
        for each_precision in ("fp32", "bf16"):
            AcceleratorState._reset_state()  # or it would keep the first precision
            train(Path(sys.argv[1]) / each / each_precision, each, each_precision)
    leave_processes()
