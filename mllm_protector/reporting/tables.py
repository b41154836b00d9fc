"""The numbers of ``asr.json`` arranged for tables. Formats nothing and computes nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_protector.scenarios import HARM, POLICY

GLOSSARY = {
    "none": "no guard",
    "refusal": "detector + fixed refusal",
    "protector": "detector + detoxifier",
    "IMAGES": "all pictures pooled",
    "TEXT": "no picture",
    "SD": "generated picture",
    "TYPO": "picture of words",
    "SD_TYPO": "both",
}
"""What the usual arms and variants are; others have to speak for themselves."""

Entry = Mapping[str, Any]
"""A JSON object of ``asr.json``."""

Block = list[list[str]]
"""Rows of a table that belong together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One judge's numbers of one benchmark, by name.

    Attributes:
        judge: its name.
        title: the name, marked if the judge is circular.
        facts: what stands beside its numbers everywhere.
        benchmark: the benchmark's entry in ``asr.json``.
        arms: in the order of the columns.
        variants: how questions were asked.
        kinds: the variants, and before them what pools them.
        blocks: group -> the scenarios that stand above its own row.
        cells: by variant, scenario and arm.
        means: by kind, group and arm.
    """

    judge: str
    title: str
    facts: Entry
    benchmark: Entry
    arms: Sequence[str]
    variants: Sequence[str]
    kinds: Sequence[str]
    blocks: Mapping[str, Sequence[str]]
    cells: Mapping[tuple[str, str, str], Entry]
    means: Mapping[tuple[str, str, str], Entry]

    def rows(self, variants: Sequence[str], show: Callable[[Entry], str]) -> list[Block]:
        """The scenarios of each group and then the group pooled; columns are variants and, inside, arms."""
        columns = [(variant, arm) for variant in variants for arm in self.arms]
        return [
            [
                *(
                    [name, *(show(self.cells[kind, name, arm]) for kind, arm in columns)]
                    for name in scenarios
                ),
                [f"{group} pooled", *(show(self.means[kind, group, arm]) for kind, arm in columns)],
            ]
            for group, scenarios in self.blocks.items()
        ]

    def mean_rows(self, kinds: Sequence[str], show: Callable[[Entry], str]) -> list[Block]:
        """The groups of each kind; columns are arms."""
        return [
            [
                [kind, group, *(show(self.means[kind, group, arm]) for arm in self.arms)]
                for group in self.blocks
            ]
            for kind in kinds
        ]

    def of_judge(self, name: str, kind: str, group: str) -> list[Entry]:
        """The judge's entries of one kind and group in a list such as ``paired``."""
        return [
            entry
            for entry in self.benchmark[name]
            if (entry["judge"], entry["variant"], entry["group"]) == (self.judge, kind, group)
        ]


def views(result: Entry, name: str) -> Iterator[View]:
    """A benchmark as each judge sees it."""
    benchmark = result["benchmarks"][name]
    for judge, facts in result["judges"].items():
        cells = [cell for cell in benchmark["cells"] if cell["judge"] == judge]
        means = [mean for mean in benchmark["means"] if mean["judge"] == judge]
        yield View(
            judge=judge,
            title=f"{judge} (circular)" if facts["circular"] else judge,
            facts=facts,
            benchmark=benchmark,
            arms=list(dict.fromkeys(cell["arm"] for cell in cells)),
            variants=list(dict.fromkeys(cell["variant"] for cell in cells)),
            kinds=list(dict.fromkeys(mean["variant"] for mean in means)),
            blocks=shown_groups(benchmark["groups"]),
            cells={(cell["variant"], cell["scenario"], cell["arm"]): cell for cell in cells},
            means={(mean["variant"], mean["group"], mean["arm"]): mean for mean in means},
        )


def shown_groups(groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The groups worth a mean of their own, each with those of its scenarios that no group before it has."""
    found: dict[str, list[str]] = {}
    for group, members in groups.items():
        own = [name for name in members if not any(name in names for names in found.values())]
        if own or len(found) > 1:  # "all" after a single group would say the same twice
            found[group] = own
    return found


def harm_groups(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The groups of scenarios alone that ask for harmful content."""
    return [group for group, members in groups.items() if members and set(members) <= set(HARM)]


def policy_groups(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The groups of scenarios alone in which an ordinary helpful answer counts as harmful."""
    return [group for group, members in groups.items() if members and set(members) <= set(POLICY)]
