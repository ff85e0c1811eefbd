"""A proxy before a rollout server that makes mistakes: each request is passed on, and its answer spoilt as told.

`python tests/rollout_proxy.py SERVER_URL PORT SECONDS` passes everything on, answers SECONDS late: a slow network.
"""

import json
import sys
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit


class Proxy(ThreadingHTTPServer):
    """`spoil` takes path, status and answer, and gives the status and the bytes to send; None hangs up."""

    daemon_threads = True

    def __init__(self, url, port=0, spoil=lambda path, status, content: (status, content)):
        super().__init__(("127.0.0.1", port), Handler)
        self.behind, self.spoil, self.asked = urlsplit(url), spoil, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def start(self):
        Thread(target=self.serve_forever, daemon=True).start()
        return self


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, body))
        connection = HTTPConnection(self.server.behind.hostname, self.server.behind.port)
        connection.request("POST", self.path, body, {"X-Limit": self.headers["X-Limit"]})
        response = connection.getresponse()
        spoilt = self.server.spoil(self.path, response.status, response.read())
        if spoilt is None:
            return
        status, content, *length = spoilt
        self.send_response(status)
        self.send_header("Content-Length", str(length[0] if length else len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def changed(content, change):
    """The answer with its groups, in the order of their prompts, changed in place."""
    *parts, answer = map(json.loads, content.splitlines())
    groups = sorted((told["part"] for told in parts), key=lambda group: group["place"])
    change(groups)
    return b"".join(json.dumps(told).encode() + b"\n" for told in [*({"part": group} for group in groups), answer])


def late(seconds):
    """Every answer to a question for completions comes so much later."""

    def spoil(path, status, content):
        time.sleep(seconds if path == "/generate" else 0)
        return status, content

    return spoil


if __name__ == "__main__":
    Proxy(sys.argv[1], int(sys.argv[2]), late(float(sys.argv[3]))).serve_forever()
