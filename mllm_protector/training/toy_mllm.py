"""A toy model to guard: a tiny LLaVA trained to fail in the way the paper describes.

It refuses most harmful requests that come as text and complies when an image comes with them: the paper's
finding in miniature, made on purpose. It demonstrates the pipeline and measures nothing. PyTorch is only
imported when the model is wanted: a server that guards another model never needs it.
"""

import os
from pathlib import Path

from mllm_protector.data.toy import mllm_turns
from mllm_protector.errors import InputError
from mllm_protector.files import content_key, read_json, write_json
from mllm_protector.outputs import claimed
from mllm_protector.protocols import MLLM
from mllm_protector.ranges import Count, Rate, Seed

NOTE = (
    "The MLLM is a toy: a tiny LLaVA that was trained here, on purpose, to comply with most harmful requests "
    "that come with an image and to refuse most of them as text. It shows the paper's finding in miniature; "
    "its numbers say nothing about any real model."
)
SETTINGS = "toy_mllm.json"


def toy_mllm(
    *, folder: str, epochs: Count, batch_size: Count, learning_rate: Rate, max_new_tokens: Count, seed: Seed
) -> MLLM:
    """The toy MLLM from a folder, trained first if it is not there.

    ``learning_rate`` is the peak; ``max_new_tokens`` limits an answer, and the rest is about the training.

    Raises:
        InputError: the folder holds a toy MLLM of other settings, or files of somebody else, or several
            processes would train one.
    """
    from mllm_protector.models.mllm import load_mllm
    from mllm_protector.training import toy_training

    path, turns = Path(folder), mllm_turns()
    settings = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    learnt = settings | {"turns": content_key([(turn.question.id, turn.answer) for turn in turns])}
    found = read_json(path / SETTINGS) if (path / SETTINGS).is_file() else {}
    if found and {name: found.get(name) for name in settings} != settings:
        raise InputError(
            f"{path}: holds a toy MLLM of other settings ({found}); remove it or choose another folder"
        )
    if found != learnt:  # none yet, or one that an earlier release taught other words
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                f"{path}: the toy MLLM is not there yet, and one process trains it: use python once"
            )
        with claimed(path, "toy_mllm", key="mllm.folder"):
            toy_training.train(
                path, turns, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed
            )
            write_json(path / SETTINGS, learnt)
    mllm = load_mllm(name=folder, batch_size=batch_size, max_new_tokens=max_new_tokens)
    mllm.source["note"] = NOTE
    return mllm
