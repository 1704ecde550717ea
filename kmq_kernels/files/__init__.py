"""Strangers' files read safely, and files that appear only when they are complete."""

from .content import file_record
from .json import dump_json, parse_json, read_json
from .locking import locked
from .manifest import MANIFEST, DamagedError, check_files, manifest_digest, read_manifest, verify_files
from .opening import CheckpointError, files_below, one_line, open_regular, read_exactly
from .publishing import publish, publish_file, sync, write_json
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
    "INDEX",
    "MANIFEST",
    "OTHER_WEIGHTS",
    "PICKLES",
    "WEIGHTS",
    "CheckpointError",
    "DamagedError",
    "StoredTensor",
    "check_files",
    "dump_json",
    "file_record",
    "files_below",
    "header_bytes",
    "locked",
    "manifest_digest",
    "one_line",
    "open_regular",
    "parse_json",
    "publish",
    "publish_file",
    "read_exactly",
    "read_header",
    "read_json",
    "read_manifest",
    "stored_part",
    "stored_tensors",
    "sync",
    "verify_files",
    "weight_files",
    "write_json",
]
