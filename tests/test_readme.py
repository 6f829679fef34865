"""Every command block of the README runs (with small settings), and what it says of the files is true."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import run_here

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines()]
TRAINING = ["--steps", "1", "--group-size", "2", "--prompts-per-step", "4", "--eval-images", "6"]
WITHOUT_SAMPLES = [*TRAINING, "--sample-every", "0"]
SMALL = {"grpo.py": TRAINING, "nft.py": WITHOUT_SAMPLES, "opd.py": TRAINING,
         "rollout.py": ["--group-size", "2"], "train_reward.py": ["--steps", "2", "--batch", "4"]}
NOT_RUN = ("pip install", "git clone", "cd ", "diff ", "tail ")
# hours, minutes, this very run
LONG = ("tests/tiny/make.py", "tests/reproduce.py", "tests/bench.py", "-m pytest")


def small(command):
    """A documented command with small settings on the tiny model; None where it cannot be run here."""
    command = command.split("&&")[-1].strip()
    if not command or command.startswith((*NOT_RUN, "PROMPTS=")) or any(part in command for part in LONG):
        return None
    words = shlex.split(command)
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [re.sub(r"--nproc_per_node=\d+", "--nproc_per_node=2", word) for word in words]
    elif words[0] == "python":
        words[0] = sys.executable
    strange = (("--model", 1), ("--size", 2), ("--prompts", 1), ("--eval-prompts", 1),
               ("$PROMPTS", 0)) if "Qwen/" in command else ()
    for flag, values in strange:  # no hub here, and the tiny model's size and prompts
        at = words.index(flag) if flag in words else len(words)
        del words[at:at + 1 + values]
    script = next(word for word in words if word.endswith(".py"))
    # several VLMs, some of which reason: without the final table
    several = ".json " in command + " " or "alignment" in command
    few = ["--eval-prompts",
           "few.jsonl"] * ("--eval-prompts" not in words and script in ("grpo.py", "nft.py", "opd.py"))
    return words + SMALL.get(script, []) + few + ["--eval-images",
                                                  "0"] * (several and script in ("grpo.py", "nft.py"))


# each once, in order
RUN = list({str(small(command)): command for command in COMMANDS if small(command)}.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all commands run, in order: a command finds what an earlier one has made."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "tests").symlink_to(ROOT / "tests")
    few = (ROOT / "tests/tiny/heldout.jsonl").read_text().splitlines(keepends=True)[:6]
    (folder / "few.jsonl").write_text("".join(few))
    return folder


@pytest.mark.parametrize("command", RUN)
def test_documented_command_runs(command, folder):
    words = [str(ROOT / word) if re.fullmatch(r"\w+\.py", word) else word for word in small(command)]
    if "rollout.py" in command:
        words = [word.replace("tests/tiny/heldout.jsonl", "few.jsonl") for word in words]
    if words[1].endswith(".py"):  # in this process: no imports, no waiting
        return run_here(folder, Path(words[1]).name, *words[2:])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_line_counts_are_true():
    counts = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
    assert counts.keys() == {path.name for path in ROOT.glob("*.py")}
    for name, count in counts.items():
        assert int(count) == len((ROOT / name).read_text().splitlines()), name


def test_only_the_seven_packages_are_imported():
    packages = {"torch", "safetensors", "transformers", "PIL", "tqdm", "numpy", "huggingface_hub",
                "insightface", "model"}
    allowed = packages | set(sys.stdlib_module_names)
    for path in ROOT.glob("*.py"):
        lines = re.findall(r"^\s*(?:from (\w+)[\w.]* import|import (\w+))", path.read_text(), re.M)
        found = {one or other for one, other in lines}
        assert found <= allowed, (path.name, found - allowed)


@pytest.mark.parametrize("script", ["grpo", "nft", "opd", "rollout", "train_reward"])
def test_help_reads(capsys, script):
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: ") and text.index("--seed") < text.index("Differs from the paper:")
