"""The part of the Hub that an upload needs, on a local port, for the real client: repositories in memory."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_writes"


class Handler(BaseHTTPRequestHandler):
    """One request of huggingface_hub."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.reply(409 if name in hub.repositories else 200, {"url": f"{hub.url}/{name}"})
            hub.repositories.setdefault(name, {})
            hub.visibility.setdefault(name, asked.get("visibility"))
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.reply(200, {"files": files})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.reply(200, {"errors": [], "warnings": []})  # /api/validate-yaml

    def commit(self, lines):
        """Take the files of a commit, when the gate is open."""
        hub = self.server
        hub.arrived.set()
        hub.gate.wait(30)
        if hub.failing:
            return self.reply(400, {"error": "the disk of the Hub is full"})
        name = "/".join(self.path.split("/")[3:5])
        repository = hub.repositories[name]
        for line in lines:
            if line["key"] == "file":
                repository[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del repository[line["value"]["path"]]
        hub.commits.append(lines[0]["value"]["summary"])
        return self.reply(200, {"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1"})

    def do_GET(self):
        names = self.server.repositories.get("/".join(self.path.split("/")[3:5]))
        if names is None or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid username or password."})
            return
        listed = [{"type": "file", "path": name, "size": len(data), "oid": "1"} for name, data in names.items()]
        self.reply(200, listed if "/tree/" in self.path else {"id": "a/b", "siblings": [], "sha": "1"})

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        """Nothing in the test's output."""


@contextmanager
def hub_server():
    """A Hub with `repositories`, `commits` (their messages), a `gate` that holds commits back, and `failing`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.repositories, server.visibility, server.commits, server.failing = {}, {}, [], False
    server.gate, server.arrived = threading.Event(), threading.Event()
    server.gate.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
