"""A scripted OpenAI-compatible endpoint on a local port, which can fail in every way that endpoints fail."""

import json
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Script = Callable[[dict, int], object]


def verdict(value=True, **more):
    """A script's answer: a well-formed reply with the verdict that was asked for."""
    return lambda body: {
        "reason": "because",
        **dict.fromkeys(body["response_format"]["json_schema"]["schema"]["required"][1:], value),
        **more,
    }


class Handler(BaseHTTPRequestHandler):
    """Plays what the script says for each request: (status, body, headers), "hang", "reset", "drip" or a verdict."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append(body)
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            number = len(server.requests)
        try:
            self.play(server.script(body, number), body)
        finally:
            with server.lock:
                server.running -= 1

    def play(self, act, body):
        if act == "hang":
            self.server.stop.wait(30)
        elif act == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            self.wfile = self.rfile  # nothing is flushed to a closed socket
        elif act == "drip":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(300):
                if self.server.stop.wait(0.05):
                    break
                self.wfile.write(b" ")
        elif callable(act):
            self.reply(200, completion(json.dumps(act(body))))
        else:
            self.reply(*act)

    def reply(self, status, text, headers=()):
        content = text.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(content),
            **dict(headers),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def completion(content, finish_reason="stop", **message):
    """A chat completion as endpoints send it."""
    message = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


class Server(ThreadingHTTPServer):
    """Keeps what it was asked."""

    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_):
        pass  # clients that give up are what is tested


@contextmanager
def serve(script: Script):
    """The server while it runs; `script(body, number of the request)` says what happens."""
    server = Server(("127.0.0.1", 0), Handler)
    server.script, server.requests, server.lock = script, [], threading.Lock()
    server.running = server.most_running = 0
    server.stop = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()
