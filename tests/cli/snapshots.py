"""Texts kept beside the tests: KMQ_WRITE_SNAPSHOTS=1 writes them anew, to be looked at before they are committed."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "snapshots"


def assert_snapshot(name: str, text: str) -> None:
    """`text` is what is kept under this name."""
    path = FOLDER / f"{name}.txt"
    if os.environ.get("KMQ_WRITE_SNAPSHOTS"):
        path.write_text(text)
    assert text == path.read_text()
