"""Opening and writing Lance datasets by the same URIs that pyarrow takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import pyarrow as pa

from unime_ray.errors import ArtifactError

if TYPE_CHECKING:  # Lance starts threads when imported, and complains of every fork after that
    import lance

# pyarrow's names (in a URI's query) and Lance's for the same settings; credentials come from the environment.
_OPTIONS = {"endpoint_override": "aws_endpoint", "region": "aws_region"}


def lance_location(uri: str) -> tuple[str, dict[str, str] | None]:
    """(`uri` without its query, storage options): what `lance.dataset` and `ray.data.read_lance` take.

    `s3://bucket/x?endpoint_override=localhost:9000&scheme=http` becomes `s3://bucket/x` with `aws_endpoint` and
    `allow_http`. A local path has no options.
    """
    base, _, query = uri.partition("?") if "://" in uri else (uri, "", "")
    values = {key: found[-1] for key, found in parse_qs(query).items()}
    options = {_OPTIONS[key]: value for key, value in values.items() if key in _OPTIONS}
    scheme = values.get("scheme", "https")
    if "aws_endpoint" in options and "://" not in options["aws_endpoint"]:
        options["aws_endpoint"] = f"{scheme}://{options['aws_endpoint']}"
    if scheme == "http":
        options["allow_http"] = "true"
    return base, options or None


def open_lance(uri: str) -> lance.LanceDataset:
    """The dataset at `uri`.

    Raises:
        ArtifactError: there is none, or it cannot be opened.
    """
    import lance

    base, options = lance_location(uri)
    try:
        return lance.dataset(base, storage_options=options)
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{base}: no readable Lance dataset; run ingest") from error


def write_fragments(batches: Iterable[pa.RecordBatch], schema: pa.Schema, uri: str) -> list[lance.FragmentMetadata]:
    """Write one part of a dataset as data files; nothing is visible until `commit_fragments`."""
    import lance

    base, options = lance_location(uri)
    reader = pa.RecordBatchReader.from_batches(schema, batches)
    return lance.fragment.write_fragments(reader, base, schema=schema, mode="create", storage_options=options)


def commit_fragments(fragments: Sequence[lance.FragmentMetadata], schema: pa.Schema, uri: str) -> None:
    """Make `fragments`, in their order, the content of the dataset at `uri`."""
    import lance

    base, options = lance_location(uri)
    operation = lance.LanceOperation.Overwrite(schema, list(fragments))
    lance.LanceDataset.commit(base, operation, storage_options=options)
