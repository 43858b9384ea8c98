"""An S3 of this process (moto's server), for runs and models that lie there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

REGION = "us-east-1"
NAMES = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": REGION}
BUCKET = "bucket"


@contextmanager
def s3_bucket(files: dict[str, bytes]) -> Iterator[tuple[str, dict[str, str]]]:
    """A bucket that holds `files`: its URI, and the environment of its users."""
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name=REGION,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )
    client.create_bucket(Bucket=BUCKET)
    for key, data in files.items():
        client.put_object(Bucket=BUCKET, Key=key, Body=data)
    environment = os.environ | NAMES | {"AWS_EC2_METADATA_DISABLED": "true", "RAY_AUTH_MODE": "disabled"}
    try:
        yield f"s3://{BUCKET}?endpoint_override={host}:{port}&scheme=http&region={REGION}", environment
    finally:
        server.stop()
