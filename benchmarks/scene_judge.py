"""A judge that cannot be wrong about the picture task's cards: it sees the scene in the picture's colours and checks a
reasoning against it. An OpenAI-compatible endpoint, to be asked through the real client.

    .venv/bin/python benchmarks/scene_judge.py --port 8010        (then judge.base_url=http://127.0.0.1:8010/v1)

It knows questions of the form `sum` on boards of level 1, and understands terse and wordy traces alike.
"""

import argparse
import base64
import io
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from sail_rl.data.pictures.cards import BOARDS, LABELS
from sail_rl.data.pictures.common import COLOURS, UNITS

READING = re.compile(r"\b([A-D])(?: is)? (\d+)\b")
SUM = re.compile(r"(\d+) \+ (\d+) = (\d+)")
CONCLUSION = re.compile(r"(?:=|\bit is) (\d+)\b")
ASKED = re.compile(r"What is ([A-D]) plus ([A-D])\?")
BOX = re.compile(r"\\boxed\{(\d+)\}")
Cards = dict[str, int]  # label -> digit


def cards_of(picture: Image.Image) -> Cards:
    """The board, read off the lower right corner of each card, where its colour is flat."""
    rows, columns = BOARDS[1]
    digits = {rgb: digit for digit, rgb in enumerate(COLOURS.values())}
    cell = picture.width / UNITS * UNITS / columns
    places = [((column + 0.93) * cell, (row + 0.93) * cell) for row in range(rows) for column in range(columns)]
    return {
        label: digits[picture.convert("RGB").getpixel((int(x), int(y)))]
        for label, (x, y) in zip(LABELS, places, strict=False)
    }


def is_grounded(reasoning: str, cards: Cards) -> bool:
    """Whether cards are read, and all as they are."""
    readings = [(label, int(digit)) for label, digit in READING.findall(reasoning)]
    return bool(readings) and all(cards[label] == digit for label, digit in readings)


def is_logically_sound(reasoning: str, question: str) -> bool:
    """Whether the two numbers asked for are added, in any order, as they were read before, and rightly."""
    labels, sums = ASKED.search(question), SUM.findall(reasoning)
    readings = {label: int(digit) for label, digit in READING.findall(reasoning)}
    if labels is None or len(sums) != 1 or not set(labels.groups()) <= set(readings):
        return False
    first, second, total = map(int, sums[0])
    stated = [readings[label] for label in labels.groups()]
    return sorted([first, second]) == sorted(stated) and first + second == total == conclusion(reasoning)


def is_consistent(reasoning: str, answer: str) -> bool:
    """Whether the answer is what the reasoning comes to."""
    box = BOX.search(answer)
    return box is not None and conclusion(reasoning) == int(box[1])


def conclusion(reasoning: str) -> int | None:
    """The last number that the reasoning says to be something's."""
    found = CONCLUSION.findall(reasoning)
    return int(found[-1]) if found else None


CHECKS: dict[str, Callable[[str, str, Cards, str], bool]] = {
    "is_logically_sound": lambda reasoning, answer, cards, question: is_logically_sound(reasoning, question),
    "is_grounded": lambda reasoning, answer, cards, question: is_grounded(reasoning, cards),
    "is_consistent": lambda reasoning, answer, cards, question: is_consistent(reasoning, answer),
}


def is_sound(reasoning: str, answer: str, cards: Cards, question: str) -> bool:
    """Whether a reasoning passes all three checks."""
    return all(check(reasoning, answer, cards, question) for check in CHECKS.values())


def decide(body: dict[str, Any]) -> dict[str, Any]:
    """The verdict that a request of rewards/judge_prompt.py asks for."""
    criterion = body["response_format"]["json_schema"]["schema"]["required"][1]
    *pictures, text = body["messages"][1]["content"]
    fenced = [match[2] for match in re.finditer(r"BEGIN (\w+)\n(.*?)\nEND \1", text["text"], re.DOTALL)]
    cards = cards_of(decoded(pictures[0]["image_url"]["url"])) if pictures else {}
    value = CHECKS[criterion](fenced[0], fenced[-1], cards, text["text"])
    return {"reason": "The scene says so.", criterion: value}


def decoded(url: str) -> Image.Image:
    """The picture of a data url."""
    return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))


class Handler(BaseHTTPRequestHandler):
    """One chat completion per request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Decide and reply."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": json.dumps(decide(body))}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        reply = {"id": "scene", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """A line per request would hide everything else."""


class Server(ThreadingHTTPServer):
    """Room for as many connections as a client may open at once."""

    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8010, help="0 for any free one")
    server = Server(("127.0.0.1", parser.parse_args().port), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
