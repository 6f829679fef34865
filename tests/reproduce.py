"""Make the README's numbers and pictures; every part prints its table and writes its pictures into assets/.

    python tests/reproduce.py first          # the first command in three seeds: 12 minutes on two cores
    python tests/reproduce.py paradigms      # Sec. 3.1, Fig. 2: pointwise against pairwise rewards: 30 minutes
    python tests/reproduce.py curation       # Sec. 4.2: curated against uncurated prompts: 35 minutes
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402

ASSETS, TINY, BUILD = ROOT / "assets", ROOT / "tests" / "tiny", ROOT / "tests" / "tiny" / "build"
ORACLES = [f"oracle-{name}={TINY / 'world.py'}:{name}_reward" for name in ("aesthetic", "strict", "alignment")]
SEEDS = 3


def start(*arguments):
    """A script of this repository as a process."""
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT)


def grpo(name, reward, seed, *more):
    """The first command with the oracle as judge, as a process; an old run of that name is removed unless it is resumed."""
    if "--resume" not in more:
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    return start("grpo.py", "--reward", reward, "--judge", *ORACLES, "--seed", str(seed), "--name", name, *more)


def finish(process):
    if process.wait():
        raise SystemExit(f"{' '.join(process.args)} failed")


def evaluation(name):
    return json.loads((ROOT / "runs" / name / "eval.json").read_text())["rewards"]


def cells(row):
    low, high = row["interval"]
    return f"{row['base']:.3f} | {row['trained']:.3f} | {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def first():
    lines = ["| seed | reward | base | trained | difference [95% interval] | time |", "|---|---|---|---|---|---|"]
    for seed in range(SEEDS):
        name, began = f"reproduce-grpo-{seed}", time.time()
        finish(grpo(name, "aesthetic", seed))
        seconds = time.time() - began
        lines += [f"| {seed} | {reward} | {cells(row)} | {seconds:.0f} s |" for reward, row in evaluation(name).items()]
    for picture in ("samples/before_after.png", "curve.png"):
        shutil.copy(ROOT / "runs" / "reproduce-grpo-0" / picture, ASSETS / f"grpo_{Path(picture).name}")
    return lines


def paradigms():
    """The aesthetic scorer of the tiny world, and its twin trained for as many steps on as many pictures as preferences.

    GRPO on the first is what `first` ran; its runs are needed.
    """
    pairs, twin = BUILD / "aesthetic-pairs.jsonl", BUILD / "rewards" / "pairwise"
    if not pairs.exists() or not (ROOT / "runs" / f"reproduce-grpo-{SEEDS - 1}" / "eval.json").exists():
        raise SystemExit("paradigms needs: python tests/tiny/make.py --only scores && python tests/reproduce.py first")
    if not twin.exists():
        finish(start("train_reward.py", "--reward", "aesthetic", "--objective", "pairwise", "--data", str(pairs), "--eval-data",
                     *(str(BUILD / f"aesthetic-{part}.jsonl") for part in ("drawn", "samples")), "--out", str(twin),
                     "--batch", "16", "--steps", "1500", "--pixels", str(192 * 192)))
    lines = ["| scorer | drawings SRCC | PLCC | pairs | base samples SRCC | pairs | within groups |", "|---|---|---|---|---|---|---|"]
    for name, directory in {"pointwise": TINY / "model" / "rewards" / "aesthetic", "pairwise": twin}.items():
        drawn, samples = json.loads((directory / "reward.json").read_text())["held_out"].values()
        lines.append(f"| {name} | {drawn['srcc']:.3f} | {drawn['plcc']:.3f} | {drawn['pair_accuracy']:.3f} | {samples['srcc']:.3f} | "
                     f"{samples['pair_accuracy']:.3f} | {samples['group_srcc']:.3f} |")
    lines += ["", "| trained on | seed | judge | base | trained | difference [95% interval] |", "|---|---|---|---|---|---|"]
    for seed in range(SEEDS):
        finish(grpo(f"reproduce-pairwise-{seed}", f"pairwise={twin}", seed))
        lines += [f"| {name} | {seed} | {judge} | {cells(row)} |" for name, run in (("pointwise", "grpo"), ("pairwise", "pairwise"))
                  for judge, row in evaluation(f"reproduce-{run}-{seed}").items()]
    grids = [ROOT / "runs" / f"reproduce-{run}-0" / "samples" / "before_after.png" for run in ("grpo", "pairwise")]
    stack([Image.open(grid) for grid in grids], ASSETS / "paradigms.png")
    return lines


def curation(stages=(15, 30, 45)):
    """The half of every category's prompts with the largest ranges against as many at random, judged during training."""
    pool, curated = ROOT / "rollouts" / "reproduce-pool", ROOT / "runs" / "reproduce-curated.jsonl"
    curated.parent.mkdir(exist_ok=True)
    finish(start("rollout.py", "--prompts", str(TINY / "prompts.jsonl"), "--reward", "aesthetic", "--name", pool.name))
    finish(start("rollout.py", "--curate", str(pool), "--out", str(curated)))
    prompts = [json.loads(line) for line in (TINY / "prompts.jsonl").read_text().splitlines()]
    kept = Counter(json.loads(line)["category"] for line in curated.read_text().splitlines())
    table, gains = [], {"curated": {}, "uncurated": {}}
    for seed in range(SEEDS):
        random.Random(seed).shuffle(prompts)
        chosen = [line for name, count in kept.items() for line in [p for p in prompts if p["category"] == name][:count]]
        uncurated = ROOT / "runs" / f"reproduce-uncurated-{seed}.jsonl"
        uncurated.write_text("".join(json.dumps(line) + "\n" for line in chosen))
        for kind, path in (("curated", curated), ("uncurated", uncurated)):
            for steps in stages:
                name = f"reproduce-{kind}-{seed}"
                finish(grpo(name, "aesthetic", seed, "--prompts", str(path), "--save-every", "15", "--steps", str(steps),
                            *(["--resume"] if steps > stages[0] else [])))
                for judge, row in evaluation(name).items():
                    gains[kind].setdefault(judge, {}).setdefault(steps, []).append(row["difference"])
            table += [f"| {kind} | {seed} | {judge} | {cells(row)} |" for judge, row in evaluation(name).items()]
    curves = {f"{kind}, {judge}": [(0, 0), *((steps, sum(values) / SEEDS) for steps, values in gains[kind][judge].items())]
              for judge in ("oracle-aesthetic", "aesthetic") for kind in gains}
    model.line_chart(ASSETS / "curation.png", curves, f"gain over the base on held-out prompts, mean of {SEEDS} seeds", "step")
    return ["| prompts | seed | judge | base | trained | difference [95% interval] |", "|---|---|---|---|---|---|", *table]


def stack(pictures, path):
    """Figures under each other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(p.height for p in pictures[:i])))
    sheet.save(path)


PARTS = {"first": first, "paradigms": paradigms, "curation": curation}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="+", choices=PARTS)
    ASSETS.mkdir(exist_ok=True)
    for part in parser.parse_args().part:
        print("\n".join(PARTS[part]()))
