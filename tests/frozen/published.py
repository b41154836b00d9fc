"""The 6,720 questions of MM-SafetyBench as published, by one digest."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.frozen.questions import listed
from tests.frozen.stored import PUBLISHED


def compute(home: Path) -> dict[str, Any]:
    """All questions and the tiny version's; empty files stand for the images, which nothing here opens."""
    place, root = Path(os.environ[PUBLISHED]), home / "published"
    shutil.copytree(place / "processed_questions", root / "processed_questions")
    shutil.copy(place / "TinyVersion_ID_List.json", root)
    for file in root.glob("processed_questions/*.json"):
        for variant in ("SD", "TYPO", "SD_TYPO"):
            folder = root / "imgs" / file.stem / variant
            folder.mkdir(parents=True)
            for key in json.loads(file.read_text()):
                (folder / f"{key}.jpg").touch()
    return {
        "all": listed(root, home),
        "tiny": listed(root, home, "benchmarks.mmsafety.tiny=true"),
        "other words": listed(root, home, "benchmarks.mmsafety.text_field='Changed Question'"),
    }
