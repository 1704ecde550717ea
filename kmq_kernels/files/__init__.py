"""Strangers' files read safely, files that appear only when they are complete, models found, sizes as people write them."""

from typing import TYPE_CHECKING

from ..imports import on_first_use

if TYPE_CHECKING:
    from .beside import NOT_DOWNLOADED, files_left_out, side_files
    from .content import file_record
    from .hub import find_source, looks_local, model_folder
    from .json import dump_json, parse_json, read_json
    from .locking import locked
    from .manifest import MANIFEST, DamagedError, check_files, manifest_digest, read_manifest, verify_files
    from .opening import CheckpointError, cache_of, files_below, one_line, open_regular, read_exactly
    from .publishing import publish, publish_file, sync, write_json
    from .sizes import parse_size
    from .stopped import FINISHED, check_output, stopped_in, unfinished
    from .tensors import (
        DTYPE_NAMES,
        DTYPES,
        INDEX,
        OTHER_WEIGHTS,
        PICKLES,
        WEIGHTS,
        StoredTensor,
        header_bytes,
        read_header,
        stored_part,
        stored_tensors,
        weight_files,
    )

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "FINISHED",
    "INDEX",
    "MANIFEST",
    "NOT_DOWNLOADED",
    "OTHER_WEIGHTS",
    "PICKLES",
    "WEIGHTS",
    "CheckpointError",
    "DamagedError",
    "StoredTensor",
    "cache_of",
    "check_files",
    "check_output",
    "dump_json",
    "file_record",
    "files_below",
    "files_left_out",
    "find_source",
    "header_bytes",
    "locked",
    "looks_local",
    "manifest_digest",
    "model_folder",
    "one_line",
    "open_regular",
    "parse_json",
    "parse_size",
    "publish",
    "publish_file",
    "read_exactly",
    "read_header",
    "read_json",
    "read_manifest",
    "side_files",
    "stopped_in",
    "stored_part",
    "stored_tensors",
    "sync",
    "unfinished",
    "verify_files",
    "weight_files",
    "write_json",
]

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "beside": ("NOT_DOWNLOADED", "files_left_out", "side_files"),
        "content": ("file_record",),
        "hub": ("find_source", "looks_local", "model_folder"),
        "json": ("dump_json", "parse_json", "read_json"),
        "locking": ("locked",),
        "manifest": ("MANIFEST", "DamagedError", "check_files", "manifest_digest", "read_manifest", "verify_files"),
        "opening": ("CheckpointError", "cache_of", "files_below", "one_line", "open_regular", "read_exactly"),
        "publishing": ("publish", "publish_file", "sync", "write_json"),
        "sizes": ("parse_size",),
        "tensors": (
            "DTYPES", "DTYPE_NAMES", "INDEX", "OTHER_WEIGHTS", "PICKLES", "WEIGHTS", "StoredTensor", "header_bytes",
            "read_header", "stored_part", "stored_tensors", "weight_files",
        ),
        "stopped": ("FINISHED", "check_output", "stopped_in", "unfinished"),
    },
)  # fmt: skip
