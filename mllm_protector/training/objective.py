"""A model and its loss as one module."""

from collections.abc import Callable

import torch

from mllm_protector.data.encoding import Batch
from mllm_protector.training.dropout import KEYS, use_keyed_dropout

LossFunction = Callable[[torch.nn.Module, Batch], torch.Tensor]


class Objective(torch.nn.Module):
    """What is wrapped for several processes, so that the wrapper sees every use of the model's weights.

    A loss may call a part of the model (its body, the weight of its head): behind the back of a wrapper
    around the model alone, gradients would not be exchanged and sharded weights would not be there.
    """

    def __init__(self, model: torch.nn.Module, loss_fn: LossFunction) -> None:
        """Bind a model to a loss.

        Args:
            model: what is trained; its dropout layers are replaced by keyed ones.
            loss_fn: maps the model and a batch to the *sum* of the losses over the batch's targets.
        """
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn
        self._keys = use_keyed_dropout(model)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The summed loss of a batch, with the dropout of its ``KEYS`` if it has any; a scalar."""
        self._keys.current = batch.get(KEYS)
        return self._loss_fn(self.model, {name: each for name, each in batch.items() if name != KEYS})
