"""Make the README's numbers and pictures: the first command in three seeds, judged by the oracle as well.

    python tests/reproduce.py            # about 15 minutes on two cores; writes assets/ and prints the table
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORACLES = [f"oracle-{name}={ROOT / 'tests/tiny/world.py'}:{name}_reward" for name in ("aesthetic", "strict", "alignment")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    assets, lines = ROOT / "assets", []
    assets.mkdir(exist_ok=True)
    for seed in range(args.seeds):
        name = f"reproduce-grpo-{seed}"
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
        start = time.time()
        subprocess.run([sys.executable, "grpo.py", "--reward", "aesthetic", "--judge", *ORACLES, "--seed", str(seed), "--name", name],
                       cwd=ROOT, check=True)
        seconds = time.time() - start
        rewards = json.loads((ROOT / "runs" / name / "eval.json").read_text())["rewards"]
        for reward, row in rewards.items():
            low, high = row["interval"]
            lines.append(f"| {seed} | {reward} | {row['base']:.3f} | {row['trained']:.3f} | {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] | {seconds:.0f} s |")
    for picture in ("samples/before_after.png", "curve.png"):
        shutil.copy(ROOT / "runs" / "reproduce-grpo-0" / picture, assets / f"grpo_{Path(picture).name}")
    print("| seed | reward | base | trained | difference [95% interval] | time |\n|---|---|---|---|---|---|\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
