"""moto's S3 server on loopback, which counts what it is asked."""

import socket
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

# Made up: moto takes anything.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "made-up", "AWS_SECRET_ACCESS_KEY": "made-up", "AWS_DEFAULT_REGION": "us-east-1"}


class S3Server:
    """`gets` is a list of (path, range) of all ranged requests; the next `faults` of them are answered by 503.

    `puts` are the paths of all that lies there since it was put; `trouble` may say "503", "stall" (10 s) or "reset" for
    (method, path).
    """

    def __init__(self) -> None:
        self.gets: list[tuple[str, str]] = []
        self.puts: list[str] = []
        self.trouble: Callable[[str, str], str | None] = lambda method, path: None
        self.faults = 0
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._count, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.options = {"endpoint_url": f"http://127.0.0.1:{self._server.server_port}"}

    def _count(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        found = self.trouble(method, path)
        if found == "503":
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"]
        if found == "stall":
            threading.Event().wait(10)
        if found == "reset":
            connection: socket.socket = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        if environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ:
            self.gets.append((environ["PATH_INFO"], environ["HTTP_RANGE"]))
            if self.faults:
                self.faults -= 1
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"]
        answer: Iterable[bytes] = self._app(environ, start_response)
        if method == "PUT":
            self.puts.append(path)
        return answer

    def upload(self, bucket: str, *files: Path, under: str = "") -> None:
        """Make `bucket` hold `files` by their names."""
        client = boto3.client("s3", **self.options)
        client.create_bucket(Bucket=bucket)
        for file in files:
            client.put_object(Bucket=bucket, Key=f"{under}{file.name}", Body=file.read_bytes())

    def stop(self) -> None:
        self._server.shutdown()
