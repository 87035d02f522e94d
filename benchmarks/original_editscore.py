"""Compares `editscore` with the package of its authors: ``python -m benchmarks.original_editscore``.

Both ask the same server, on this machine, whose answer depends on the text of the question alone. So equal scores mean
equal questions and an equal formula. The package is needed with what it imports:

    pip install --no-deps editscore && pip install json-repair regex requests
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from editscore import EditScore as Original
from PIL import Image

from fastflowgrpo.rewards import RewardBatch
from fastflowgrpo.rewards.editscore import RANGE, EditScore

INSTRUCTIONS = ("make the car red", "remove <the> dog, keep 10 others", 'write "naïve café" 10 times', "")
DETAILS = {"instruction": "prompt_following", "consistency": "consistency"}


class Handler(BaseHTTPRequestHandler):
    """Answers with two numbers from 0 to RANGE that are made from the question's longest text."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = max((part.get("text", "") for part in request["messages"][0]["content"]), key=len)
        score = [byte / 255 * RANGE for byte in hashlib.sha256(question.encode()).digest()[:2]]
        content = json.dumps({"reasoning": "It is [1, 2].", "score": score})
        body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def main() -> None:
    """Print the largest difference of the scores and of the two details that both report."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    count = len(INSTRUCTIONS)
    batch = RewardBatch(
        image.expand(count, -1, -1, -1), list(INSTRUCTIONS), [{}] * count, torch.arange(count), [image] * count
    )
    scores = EditScore(url)(batch)
    original = Original("openai", f"{url}/chat/completions", "key", "model", score_range=RANGE)
    pictures = [Image.new("RGB", (64, 64))] * 2
    expected = [original.evaluate(pictures, instruction) for instruction in INSTRUCTIONS]
    overall = torch.tensor([each["overall"] / 10 for each in expected])
    print(f"scores {overall.min():.3f} to {overall.max():.3f}, differ by {(scores.values - overall).abs().max():.1e}")
    for ours, theirs in DETAILS.items():
        numbers = torch.tensor([each[theirs] / 10 for each in expected])
        print(f"{ours} differs by {(scores.details[ours] - numbers).abs().max():.1e}")


if __name__ == "__main__":
    main()
