"""Are token shards what their manifest says? Cheap checks before a run, the whole digest on request."""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq

from nexus_ray.corpora.manifest import ROW_GROUP_TOKENS, Shard, TokenManifest
from nexus_ray.corpora.tokens import METADATA_KEY
from nexus_ray.errors import DataError


def check_tokenizer(manifest: TokenManifest, tokenizer: str) -> None:
    """Raise DataError unless the shards were made with the tokenizer of this fingerprint."""
    if manifest.tokenizer != tokenizer:
        raise DataError(
            f"the {manifest.split} shards of domain {manifest.domain} at {manifest.root} were tokenised with tokenizer "
            f"{manifest.tokenizer}, this run's is {tokenizer}; run `nexus-ray prepare` with this config"
        )


def check_shard(manifest: TokenManifest, shard: Shard) -> None:
    """Cheap: both files exist, have their size, a readable footer, and the manifest's tokenizer. Raises DataError."""
    for file, size in ((shard.file, shard.bytes), (shard.table, shard.table_bytes)):
        try:
            found = manifest.folder.size(file)
        except OSError as error:
            raise _fault(manifest, file, f"cannot be found ({error.strerror or error})") from None
        if found != size:
            raise _fault(manifest, file, f"has {found} bytes instead of {size}: it was cut short or replaced")
        rows = shard.tokens if file == shard.file else shard.documents
        _check_footer(manifest, file, rows)


def verify_shard(manifest: TokenManifest, shard: Shard) -> None:
    """Complete: `check_shard`, and the digests of both files. Raises DataError naming file and row group."""
    check_shard(manifest, shard)
    for file, digest in ((shard.file, shard.sha256), (shard.table, shard.table_sha256)):
        data = manifest.folder.read_bytes(file)
        if (found := hashlib.sha256(data).hexdigest()) != digest:
            place = _first_bad_group(data)
            raise _fault(manifest, file, f"{place}has SHA-256 {found} instead of {digest}: its content was changed")


def usable(manifest: TokenManifest, on_corrupt: str) -> TokenManifest:
    """The manifest after checks: `stop` raises DataError at the first fault, `quarantine` leaves shards out.

    `stop` makes the cheap checks only (a damaged page stops the run when it is read); `quarantine` reads every shard
    once, since a run's rows must be known before its first step. What is left out is listed in `quarantined`. Raises
    DataError if nothing remains.
    """
    bad: dict[str, DataError] = {}
    check = check_shard if on_corrupt == "stop" else verify_shard
    for shard in manifest.shards:
        try:
            check(manifest, shard)
        except DataError as error:
            if on_corrupt == "stop":
                raise
            bad[shard.file] = error
    if bad and len(bad) == len(manifest.shards):
        first = next(iter(bad.values()))
        raise DataError(
            f"all {len(bad)} {manifest.split} shards of domain {manifest.domain} are corrupt, the first: {first}"
        )
    return manifest.without(bad) if bad else manifest


def _check_footer(manifest: TokenManifest, file: str, rows: int) -> None:
    folder = manifest.folder
    try:
        with folder.filesystem.open_input_file(folder.path(file)) as source:
            metadata = pq.read_metadata(source)
            tag = json.loads((metadata.metadata or {}).get(METADATA_KEY, b"{}"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _fault(manifest, file, f"is no readable Parquet ({error})") from None
    if metadata.num_rows != rows:
        raise _fault(manifest, file, f"has {metadata.num_rows} rows instead of {rows}")
    if tag.get("tokenizer") != manifest.tokenizer:
        raise _fault(
            manifest, file, f"was tokenised with tokenizer {tag.get('tokenizer')}, not with {manifest.tokenizer}"
        )


def _first_bad_group(data: bytes) -> str:
    """`row group 3 (rows 196608 to 262143) ` if a page checksum tells which, else nothing."""
    try:
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return ""
    for group in range(parquet.num_row_groups):
        try:
            parquet.read_row_group(group, use_threads=False)
        except (OSError, pa.ArrowException):
            first = group * ROW_GROUP_TOKENS
            last = first + parquet.metadata.row_group(group).num_rows - 1
            return f"row group {group} (rows {first} to {last}) is damaged; the file "
    return ""


def _fault(manifest: TokenManifest, file: str, what: str) -> DataError:
    return DataError(
        f"{manifest.folder.path(file)} (domain {manifest.domain}) {what}; restore the file, delete {manifest.root} and "
        f"prepare again, or set data.on_corrupt: quarantine (under another name) to leave the shard out"
    )
