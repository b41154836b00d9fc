"""What the site needs beyond its pages: the pictures of the repository, and formulas as MathML."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pictures lie beside docs/, where the README has them too."""
    for path in sorted((ROOT / "assets").iterdir()):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the pictures, and blocks of ``math`` in the form that every browser draws by itself."""
    pictures = markdown.replace("](../assets/", "](assets/")
    return re.sub(
        r"^```math\n(.*?)^```$",
        lambda block: convert(block.group(1).strip(), display="block"),
        pictures,
        flags=re.DOTALL | re.MULTILINE,
    )
