"""The README as package indexes show it: its links to files of the repository must work there too."""

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).parent


def readme_outside(text: str, version: str, repository: str | None) -> str:
    """The README with absolute links.

    Args:
        text: the README, with links relative to the repository.
        version: whose files the links lead to.
        repository: address of the repository on a code host; while there is none, links to files become plain text and
            figures are left out.
    """

    def outside(link: re.Match[str]) -> str:
        is_figure, label, path = link.groups()
        if repository is None:
            return "" if is_figure else label
        kind = "raw" if is_figure else "blob"
        return f"{is_figure}[{label}]({repository}/{kind}/v{version}/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)]+)\)", outside, text)


class ReadmeHook(MetadataHookInterface):
    """Called by hatchling when a wheel or sdist is built."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the long description."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        text = (ROOT / "README.md").read_text()
        repository = project.get("urls", {}).get("Repository")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": readme_outside(text, project["version"], repository),
        }
