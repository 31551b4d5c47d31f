"""An S3 server on this machine for tests, and the variables by which clients find it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import boto3

import data.reading.storage

CODE = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server(bucket: str) -> Iterator[dict[str, str]]:
    """Start one with an empty bucket; yields the variables."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    port = next(int(line.split()[1]) for line in process.stdout if line.startswith("port "))
    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AWS_")}
    os.environ |= variables
    data.reading.storage._s3.cache_clear()
    try:
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket=bucket)
        yield variables
    finally:
        process.kill()
        process.wait()
        for name in variables:
            del os.environ[name]
        os.environ |= before
        data.reading.storage._s3.cache_clear()
