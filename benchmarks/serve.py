"""What a reward server costs: `python -m benchmarks.serve`.

It measures two things on loopback, with images of 512 x 512. First, the time per image that client and server add to a
reward that takes no time. Second, the images per second with 32 concurrent clients, compared to the reward alone; this
reward waits for a fixed time per image and needs no CPU, like a reward on a GPU.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import urllib3

from fastflowgrpo.rewards import RewardBatch
from fastflowgrpo.scoring.client import RemoteReward


def instant(batch: RewardBatch) -> list[float]:
    return [0.0] * len(batch.prompts)


def waiting(batch: RewardBatch, seconds: float = 0.005) -> list[float]:
    """A reward that waits for `seconds` per image."""
    time.sleep(seconds * len(batch.prompts))
    return [0.0] * len(batch.prompts)


@contextmanager
def server(*options: str) -> Iterator[str]:
    """Start a reward server in another process; yields its URL."""
    command = [sys.executable, "-m", "fastflowgrpo.serve", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            if found is None:
                raise RuntimeError(f"the server did not start: {line or 'it printed nothing'}")
            yield found[0]
        finally:
            process.terminate()


def images(count: int, side: int) -> RewardBatch:
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    return RewardBatch(pixels, ["a prompt"] * count, [{}] * count, torch.arange(count))


def overhead(batch: RewardBatch, repeats: int) -> float:
    """Measure the milliseconds per image that client and server add: the median of the repeats."""
    with server("--rewards", "benchmarks.serve:instant") as url:
        reward = RemoteReward("benchmarks.serve:instant", url)
        reward(batch)
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            reward(batch)
            times.append((time.perf_counter() - begin) * 1e3 / len(batch.prompts))
    return statistics.median(times)


def throughput(batch: RewardBatch, clients: int, seconds: float, wait: float) -> tuple[float, float]:
    """Measure the images per second of the reward alone, and of the server for all clients together."""
    count, begin = len(batch.prompts), time.perf_counter()
    alone = sum(len(waiting(batch, wait)) for _ in range(100)) / (time.perf_counter() - begin)
    settings = {"benchmarks.serve:waiting": {"seconds": wait}}
    with server("--rewards", json.dumps(settings)) as url:
        rewards = [RemoteReward("benchmarks.serve:waiting", url, batch_size=count) for _ in range(clients)]
        metrics = urllib3.PoolManager()

        def scored() -> float:
            """Images that the server has scored so far: the clients start and stop at different times."""
            text = metrics.request("GET", f"{url}/metrics").data.decode()
            found = re.search(r"^fastflowgrpo_images_total\{.*\} (\S+)$", text, re.MULTILINE)
            return float(found[1]) if found else 0.0

        end = time.perf_counter() + seconds + 2.0

        def client(reward: RemoteReward) -> None:
            while time.perf_counter() < end:
                reward(batch)

        with ThreadPoolExecutor(clients) as pool:
            running = [pool.submit(client, reward) for reward in rewards]
            time.sleep(1.0)
            before, begin = scored(), time.perf_counter()
            time.sleep(seconds)
            served = (scored() - before) / (time.perf_counter() - begin)
            for future in running:
                future.result()
    return alone, served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="height and width of the images")
    parser.add_argument("--images", type=int, default=96, help="images of a batch, for the overhead")
    parser.add_argument("--repeats", type=int, default=20, help="batches, for the overhead")
    parser.add_argument("--clients", type=int, default=32, help="clients at once, for the throughput")
    parser.add_argument("--request", type=int, default=8, help="images of a client's request, for the throughput")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the throughput's measurement")
    parser.add_argument("--wait", type=float, default=0.005, help="seconds per image of its scorer")
    options = parser.parse_args()
    added = overhead(images(options.images, options.side), options.repeats)
    print(f"client and server: {added:.2f} ms per image of {options.side} x {options.side} (target: below 2)")
    alone, served = throughput(images(options.request, options.side), options.clients, options.seconds, options.wait)
    share = f"{served:.0f} images/s of the scorer's {alone:.0f}, {served / alone:.1%}"
    print(f"{options.clients} clients: {share} (target: at least 95%)")
    print(f"python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
