"""An S3 server on this machine for tests, and the variables by which clients find it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import boto3

CODE = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server(bucket: str) -> Iterator[tuple[int, Any]]:
    """Start one with an empty bucket; yields its port and a client, with the variables set by which others find it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", CODE], text=True, **pipes)
    assert process.stdin and process.stdout
    port = next(int(line.split()[1]) for line in process.stdout if line.startswith("port "))
    others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    variables = others | keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    try:
        with patch.dict(os.environ, variables, clear=True):
            client = boto3.client("s3")
            client.create_bucket(Bucket=bucket)
            yield port, client
    finally:
        process.stdin.close()  # at which it ends
        process.wait()
        process.stdout.close()
