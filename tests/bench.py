"""Measurements that are too slow or too noisy to be tests. Each prints one table.

    python tests/bench.py rewards      # what slow rewards cost a GRPO step: Sec. 4.1's asynchronous pipeline
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BATCH, BATCHES = 16, 4  # images a rollout batch, batches a step


def free(images, prompts, sources):
    return [float(np.asarray(image).mean()) for image in images]


def slow(images, prompts, sources):
    """As long as the rollout of a batch."""
    time.sleep(float(os.environ["REWARD_SECONDS"]))
    return free(images, prompts, sources)


def grpo_seconds(folder, name, rewards, steps, seconds=0.0):
    """Seconds of every step but the first, by part."""
    command = [sys.executable, str(ROOT / "grpo.py"), "--name", name, "--steps", str(steps), "--rollout-batch", str(BATCH),
               "--group-size", "8", "--prompts-per-step", str(BATCH * BATCHES // 8), "--eval-images", "0", "--sample-every", "0",
               "--save-every", "0", "--reward", *rewards]
    environment = os.environ | {"REWARD_SECONDS": str(seconds), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    lines = (Path(folder) / "runs" / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines[1:]]


def bench_rewards(rounds=3, steps=7):
    """Free, one slow and four slow rewards, interleaved: seconds a step and the share spent waiting."""
    table = {"free": [], "one slow": [], "four slow": []}
    with tempfile.TemporaryDirectory() as folder:
        first = grpo_seconds(folder, "warm-up", [f"r={__file__}:free"], steps)
        pause = float(np.median([line["rollout"] for line in first])) / BATCHES
        for turn in range(rounds):
            for kind, count, function in (("free", 1, "free"), ("one slow", 1, "slow"), ("four slow", 4, "slow")):
                specs = [f"r{i}={__file__}:{function}" for i in range(count)]
                table[kind] += grpo_seconds(folder, f"{kind} {turn}".replace(" ", "-"), specs, steps, pause)
    print(f"a slow reward takes {pause:.2f} s a batch, as long as its rollout; {BATCHES} batches of {BATCH} images a step")
    print(f"{'rewards':<12}{'s/step':>8}{'waiting':>9}{'over free':>11}")
    base = np.median([sum(line.values()) for line in table["free"]])
    for kind, lines in table.items():
        total = np.median([sum(line.values()) for line in lines])
        waiting = np.median([line["reward_wait"] for line in lines])
        print(f"{kind:<12}{total:>8.2f}{waiting:>9.2f}{total / base - 1:>+11.1%}")


BENCHES = {"rewards": bench_rewards}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or BENCHES:
        if chosen not in BENCHES:
            raise SystemExit(f"no bench {chosen!r}; there are {', '.join(BENCHES)}")
        BENCHES[chosen]()
