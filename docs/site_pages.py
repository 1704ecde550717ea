"""A hook of MkDocs: takes results/ and the pages at the root of the repository into the site.

Their links, and those of docs/ to them, name places in the repository, where they can be followed as well; here they become
places in the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
AT_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")  # ](target#anchor), without what has a scheme


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and pictures of results/ under results/, and the pages of the root beside those of docs/."""
    more = [ROOT / name for name in AT_ROOT]
    more += sorted(path for path in (ROOT / "results").iterdir() if path.suffix in (".md", ".svg"))
    for path in more:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between places in the repository -> links between places in the site."""
    here = page.file.src_uri
    in_repository = here if (ROOT / here).is_file() else f"docs/{here}"

    def replace(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), found[2]))
        in_site = target.removeprefix("docs/")
        return found[1] + posixpath.relpath(in_site, posixpath.dirname(here) or ".") + found[3]

    return LINK.sub(replace, markdown)
