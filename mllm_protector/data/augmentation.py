"""Training answers that are rewritten as somebody may do to slip harm past a detector."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mllm_protector import prompts
from mllm_protector.data.transformations import VERSION, chosen, rewritten
from mllm_protector.errors import InputError
from mllm_protector.ranges import Share
from mllm_protector.records import LabelledAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """What a training adds to its answers.

    Attributes:
        share: of the answers, harmful and harmless alike, that are also used rewritten; 0 for none.
        transformations: one of these is drawn for each; ``None`` for all that surely keep the label.
    """

    share: Share
    transformations: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            InputError: one is unknown, stands there twice, or may cut off the harm.
        """
        known = chosen("train", names=self.transformations)
        if self.transformations is not None and (cuts := [name for name in known if not known[name].attack]):
            raise InputError(f"transformations: {cuts[0]} may cut off the harm of a harmful answer")

    def identity(self, seed: int) -> list[Any]:
        """What the added answers depend on, for JSON; empty if there are none."""
        return [VERSION, asdict(self), seed] if self.share else []

    def added_to(
        self, records: Iterable[LabelledAnswer], *, template: str = prompts.DETECTOR, seed: int
    ) -> Iterator[LabelledAnswer]:
        """The records, each rewritten one behind its record.

        Which are rewritten, and how, depends on the seed and the record alone. ``template`` is what the
        detector reads.
        """
        known = {
            name: each
            for name, each in chosen("train", template, self.transformations).items()
            if each.attack
        }
        for record in records:
            yield record
            rng = random.Random(f"{seed}\n{record.query}\n{record.answer}")
            if rng.random() < self.share:
                name = rng.choice([*known])
                answer = rewritten(name, known[name], record.answer, seed=seed)
                yield replace(record, answer=answer)
