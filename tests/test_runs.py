"""What both policy optimizers promise: resume, kill -9, Ctrl-C, two runs of one name, other rank counts, full
disks, updates that are not finite, the three CFG strategies, timestep selection, mixed tasks."""

import json
import math
import random
import re
import resource
import shutil
import subprocess
import sys
import time

import pytest

import grpo
from model import UserError
from runs import (
    ENVIRONMENT, ORACLE, ROOT, SMALL, assert_same_bits, checkpoint, command, printed_by, read_log,
    run_script, start_script)

BOTH = pytest.mark.parametrize("script", ["grpo.py", "nft.py"])
EVERY_STEP = ["--save-every", "1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """script -> the folder of a run of four steps."""
    folders = {}

    def run(script):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp(script[:-3])
            run_script(folders[script], "--reward", ORACLE, "--steps", "4", *SMALL, script=script)
        return folders[script]

    return run


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A run of three steps of grpo.py."""
    folder = tmp_path_factory.mktemp("three")
    run_script(folder, "--reward", ORACLE, "--steps", "3", *SMALL)
    return folder


@pytest.mark.parametrize("script, flags", [pytest.param("grpo.py", [], marks=pytest.mark.slow),
                                           ("nft.py", ["--offload"])])
def test_resume_gives_the_same_bits(undisturbed, tmp_path, script, flags):
    """Also where the first half of the run had its weights and moments in host memory. (For grpo.py Ctrl-C,
    below, shows the same.)
    """
    run_script(tmp_path, "--reward", ORACLE, "--steps", "2", *SMALL, *flags, script=script)
    log = run_script(tmp_path, "--reward", ORACLE, "--steps", "4", *SMALL, "--resume", script=script)
    whole = undisturbed(script)
    assert_same_bits(checkpoint(whole), checkpoint(tmp_path))
    assert [line["step"] for line in log] == [0, 1, 2, 3]
    assert log[-1]["reward"] == read_log(whole)[-1]["reward"]


def test_checkpoints_resume_on_another_number_of_ranks(tmp_path):
    """One rank, then two, against one all the way. A group is a rollout batch, so that both sample the same
    states. (From two ranks to one: the slow test in test_sharding.py.)
    """
    arguments, alone, mixed = ["--reward", ORACLE, *SMALL, "--rollout-batch",
                               "4"], tmp_path / "alone", tmp_path / "mixed"
    alone.mkdir(), mixed.mkdir()
    for step, processes in enumerate((1, 2), 1):
        resume = ["--resume"] if step > 1 else []
        run_script(mixed, *arguments, "--steps", str(step), *resume, script="nft.py", processes=processes)
    lines, again = run_script(alone, *arguments, "--steps", "2", script="nft.py"), read_log(mixed)
    one, other = checkpoint(alone), checkpoint(mixed)
    for kind in ("model", "old"):
        for name, value in one[kind].items():
            assert (other[kind][name] - value).abs().max() <= 1e-5, (kind, name)  # Adam's steps are 1.6e-4
    assert lines[0]["grad_norm"] == again[0]["grad_norm"]  # so two ranks begin with the very weights of one
    assert again[1]["loss"][0] == pytest.approx(lines[1]["loss"][0], rel=1e-6)
    assert again[1]["grad_norm"][0] == pytest.approx(lines[1]["grad_norm"][0], rel=1e-5)
    for a, b in zip(lines, again, strict=True):
        assert b["reward"]["aesthetic"] == pytest.approx(a["reward"]["aesthetic"], rel=5e-4)


def killed_and_resumed(folder, script, kills, seed, steps):
    """Run to the end, with kill -9 at `kills` random moments; returns how many hit."""
    arguments, rng, hits = ["--reward", ORACLE, "--steps", str(steps), *SMALL,
                            *EVERY_STEP], random.Random(seed), 0
    while True:
        resume = ["--resume"] if (folder / "runs" / "run" / "args.json").exists() else []
        process = subprocess.Popen(command(script, *arguments, *resume), cwd=folder, env=ENVIRONMENT,
                                   stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        if hits < kills:
            try:  # after the imports, so that most kills hit the run itself
                _, printed = process.communicate(timeout=5 + rng.uniform(0, 5))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                hits += 1
                continue
        else:
            _, printed = process.communicate(timeout=300)
        assert process.returncode == 0, printed[-3000:]
        return hits


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(undisturbed, tmp_path):
    """(What kill -9 can leave is in the test below, which is not slow.)"""
    killed_and_resumed(tmp_path, "nft.py", 1, seed=0, steps=4)
    assert_same_bits(checkpoint(undisturbed("nft.py")), checkpoint(tmp_path))
    assert len(read_log(tmp_path)) == 4


@pytest.mark.slow
@BOTH
def test_a_run_killed_twenty_times_ends_with_the_same_bits(tmp_path, script):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    run_script(one, "--reward", ORACLE, "--steps", "24", *SMALL, script=script)
    assert killed_and_resumed(two, script, 20, seed=1, steps=24) >= 5
    assert_same_bits(checkpoint(one), checkpoint(two))
    assert [line["step"] for line in read_log(two)] == list(range(24))


def test_a_torn_log_line_and_a_torn_checkpoint_are_done_again(undisturbed, three_steps, tmp_path):
    shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True, symlinks=True)
    run = tmp_path / "runs" / "run"
    shutil.copytree(run / "checkpoint" / "step-000003", run / "checkpoint" / "step-000004.part")
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    log = run_script(tmp_path, "--reward", ORACLE, "--steps", "4", *SMALL, "--resume", script="grpo.py")
    assert [line["step"] for line in log] == [0, 1, 2, 3]
    assert_same_bits(checkpoint(undisturbed("grpo.py")), checkpoint(tmp_path))


INTERRUPTED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import grpo, model

phase, calls = os.environ.get("PHASE"), []
score = model.load_function({oracle!r})

def count(number):
    calls.append(1)
    if len(calls) == number:
        open("interrupted", "w").close()
        os.kill(os.getpid(), signal.SIGINT)
    return len(calls)

def interrupted(function, number):
    return lambda *arguments: count(number) and function(*arguments)

def hanging(images, prompts, sources):
    if phase == "scoring" and count(2) == 2:
        time.sleep(100)
    return score(images, prompts, sources)

if __name__ == "__main__":
    if phase == "rollout":
        grpo.generate = interrupted(grpo.generate, 3)
    if phase == "table":
        model.generate = interrupted(model.generate, 2)
    if phase == "update":
        grpo.grpo_loss = interrupted(grpo.grpo_loss, 7)
    model.command_line(grpo.main)
"""


@pytest.mark.parametrize("phase", [pytest.param("rollout", marks=pytest.mark.slow), "scoring",
                                   pytest.param("update", marks=pytest.mark.slow),
                                   pytest.param("table", marks=pytest.mark.slow)])
def test_ctrl_c_ends_soon_and_the_printed_command_goes_on_to_the_same_bits(undisturbed, tmp_path, phase):
    (tmp_path / "script.py").write_text(INTERRUPTED.format(root=str(ROOT), oracle=ORACLE.partition("=")[2]))
    heldout = (ROOT / "tests/tiny/heldout.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "heldout.jsonl").write_text("".join(heldout[:8]))
    arguments = ["--reward", "aesthetic=script.py:hanging", "--steps", "4", *SMALL, "--eval-prompts",
                 "heldout.jsonl", "--eval-images", "8"]
    process = subprocess.Popen([sys.executable, "script.py", *arguments], cwd=tmp_path,
                               env=ENVIRONMENT | {"PHASE": phase}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed, _ = process.communicate(timeout=200)
    seconds = time.time() - (tmp_path / "interrupted").stat().st_mtime
    again = re.search("(?:continue|make it): python (script.py --resume --name run)", printed)
    assert again and "Traceback" not in printed and seconds < 10, (seconds, printed)
    steps = len(read_log(tmp_path))
    assert process.returncode == (130 if phase == "table" else 0) and steps == {"rollout": 2, "scoring": 1,
                                                                                "update": 2,
                                                                                "table": 4}[phase]
    script, *resume = again[1].split()
    printed, failed = start_script(tmp_path, *resume, script=tmp_path / script)
    assert not failed and "8 held-out prompts x 1 images" in printed, printed
    assert_same_bits(checkpoint(undisturbed("grpo.py")), checkpoint(tmp_path))


def test_a_name_that_another_process_writes_to_is_refused(tmp_path):
    """Two runs at once would mix their files; the name is free again when the other is gone."""
    code = "import model, sys; print(model.claim(model.Path('runs/run')), flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "True\n"
    with pytest.raises(UserError, match="runs/run is being written by another process; choose another"):
        run_script(tmp_path, "--reward", ORACLE, "--steps", "1", *SMALL)
    assert not (tmp_path / "runs/run/args.json").exists()
    other.communicate()
    assert len(run_script(tmp_path, "--reward", ORACLE, "--steps", "1", *SMALL)) == 1


def test_changed_prompts_are_not_resumed_and_a_log_without_a_checkpoint_is_kept(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n" * 4)
    run_script(tmp_path, "--reward", ORACLE, "--steps", "1", *SMALL, "--save-every", "0", "--prompts",
               "p.txt")
    printed = printed_by(tmp_path, "grpo.py", "--resume", "--name", "run")
    said = "there is no checkpoint, so it starts again from step 0; the log so far is log.old.jsonl"
    assert said in printed
    assert len(read_log(tmp_path)) == len((tmp_path / "runs/run/log.old.jsonl").read_text().splitlines()) == 1
    (tmp_path / "p.txt").write_text("a blue circle\n" * 4)
    with pytest.raises(UserError, match="p.txt is not what it was when .*run was started"):
        run_script(tmp_path, "--resume", "--name", "run")


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(undisturbed, three_steps, tmp_path):
    """A limit on the size of files stands for the full disk; a checkpoint is the largest file."""
    shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True, symlinks=True)
    arguments = ["--reward", ORACLE, "--steps", "4", *SMALL, "--resume"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2**20, 5 * 2**20))

    done = subprocess.run(command("grpo.py", *arguments), cwd=tmp_path, env=ENVIRONMENT, preexec_fn=limit,
                          capture_output=True,
                          text=True)
    assert done.returncode != 0
    assert "step-000004.part could not be written; what was saved before is as it was" in done.stderr
    assert (tmp_path / "runs/run/checkpoint/step-000003").is_dir()
    run_script(tmp_path, *arguments)
    assert_same_bits(checkpoint(undisturbed("grpo.py")), checkpoint(tmp_path))


def test_few_prompts_and_one_held_out(tmp_path, capsys):
    """Fewer prompts than a step usually takes; a table of one prompt has no interval and valid JSON; a
    constant reward is said. Then what the last words name is there, and the command among them goes on.
    """
    (tmp_path / "three.txt").write_text("a red circle\na blue square\na green star\n")
    (tmp_path / "one.txt").write_text("a red circle\n")
    (tmp_path / "same.py").write_text("def same(images, prompts, sources):\n    return [3] * len(images)\n")
    printed = printed_by(tmp_path, "grpo.py", "--reward", "r=same.py:same", "--prompts", "three.txt",
                         "--eval-prompts", "one.txt", "--steps", "1",
                         "--group-size", "2", "--eval-images", "2", "--name", "run")
    assert "2 prompts x 2 images" in printed and "+0.000   too few prompts, n = 1" in printed
    said = "step 0: no group has a preference, its scores are all equal or missing"
    assert said in capsys.readouterr().err + printed
    table = json.loads((tmp_path / "runs/run/eval.json").read_text(), parse_constant=pytest.fail)
    assert table["rewards"]["r"]["interval"] is None
    left = re.findall(r"^(?:before, after|curve|model): +(\S+)$", printed, re.M)
    assert len(left) == 3 and all((tmp_path / path).exists() for path in left)
    (again,) = re.findall(r"(--resume --name run --steps 2)$", printed, re.M)
    assert "2 prompts x 2 images" in printed_by(tmp_path, "grpo.py", *again.split())


def spoil(monkeypatch, when):
    """Make the losses of some micro-batches NaN: those whose number `when` accepts."""
    loss, calls = grpo.grpo_loss, []

    def spoiled(*arguments):
        calls.append(1)
        total, ratio = loss(*arguments)
        return (total * math.nan if when(len(calls)) else total), ratio

    monkeypatch.setattr(grpo, "grpo_loss", spoiled)


def test_an_update_that_is_not_finite_is_not_applied(tmp_path, monkeypatch):
    """Four micro-batches a step of four groups: the second update of the first step is spoiled."""
    arguments = ["--reward", ORACLE, *SMALL]
    spoil(monkeypatch, lambda number: number == 3)
    log = run_script(tmp_path, *arguments, "--steps", "2")
    assert [line["skipped_updates"] for line in log] == [1, 0]
    assert all(state["step"] == 3 for state in checkpoint(tmp_path)["optimizer"]["state"].values())
    assert log[0]["grad_norm"][1] != log[0]["grad_norm"][1] and log[1]["ratio_dev"][0] == 0.0


def test_three_updates_in_a_row_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
    """Those of step 1 and the first of step 2; its second is finite, and applied."""
    spoil(monkeypatch, lambda number: 4 < number <= 10)
    with pytest.raises(UserError, match="before step 3: 3 updates in a row had a loss or gradient"):
        run_script(tmp_path, "--reward", ORACLE, *SMALL, "--steps", "4")
    monkeypatch.undo()
    assert all(state["step"] == 3 for state in checkpoint(tmp_path)["optimizer"]["state"].values())
    # as the message says
    run_script(tmp_path, "--reward", ORACLE, *SMALL, "--steps", "4", "--lr", "1e-6", "--resume")
    assert {group["lr"] for group in checkpoint(tmp_path)["optimizer"]["param_groups"]} == {1e-6}


ALL = "1.000, 0.903, 0.795, 0.675, 0.540, 0.389, 0.217, 0.020"


@pytest.mark.parametrize("script, cfg, steps, shown", [
    ("grpo.py", ["--guided-objective"], "all", f"{ALL}, guided objective"),
    ("grpo.py", ["--cfg", "1"], "1,6", "0.903, 0.217, unguided objective"),
    ("nft.py", ["--guided-objective"], "1,6", "0.903, 0.217, guided objective"),
    ("nft.py", ["--cfg", "1", "--guided-objective"], "all", f"{ALL}, unguided objective")])
def test_cfg_strategies_and_trained_timesteps(tmp_path, capsys, script, cfg, steps, shown):
    """The old velocities are those of the objective, whichever it is: nothing has moved before the first
    update.
    """
    arguments = ["--reward", ORACLE, "--steps", "1", *SMALL, *cfg, "--train-timesteps", steps]
    (line,) = run_script(tmp_path, *arguments, script=script)
    sampling = json.loads((ROOT / "tests/tiny/model/model_index.json").read_text())["_sampling"]
    printed, guidance = capsys.readouterr().out, 1 if "--cfg" in cfg else sampling["guidance_scale"]
    lr = {"grpo.py": "0.00013", "nft.py": "0.00016"}[script]
    source = "--cfg" if "--cfg" in cfg else f"of {ROOT / 'tests' / 'tiny' / 'model'}"
    assert f"sampler: 8 steps, guidance {guidance} ({source}); trained at t = {shown}; lr {lr}" in printed
    assert "memory of each cpu, MiB: loading " in printed
    assert "parameters stay gathered during an update" in printed
    if script == "grpo.py":
        assert line["ratio_dev"][0] == 0.0 < line["ratio_dev"][1] and line["skipped_updates"] == 0
        assert len(line["ratio_std"]) == len(line["step_share"]) == len(shown.split(",")) - 1
        assert min(line["ratio_std"]) > 0 and sum(line["step_share"]) == pytest.approx(1)
        assert min(line["step_share"]) > 0
    else:
        assert line["velocity_shift"][0] == 0.0 < line["velocity_shift"][1] and line["skipped_updates"] == 0
    index = json.loads((tmp_path / "runs/run/model/model_index.json").read_text())
    assert index["_sampling"]["guidance_scale"] == guidance
    assert index["_sampling"]["trained_on"] == ["aesthetic"]


def test_mixed_tasks_are_a_prompt_file(tmp_path):
    """Text-to-image and edits in one step; a reward is asked only where its category gives it weight."""
    world, lines = ROOT / "tests/tiny/world.py", []
    for line in (ROOT / "tests/tiny/mixed.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "source" not in record and len(lines) < 4 or "source" in record and len(lines) < 8:
            lines.append(record
                         | ({"source": str(ROOT / "tests/tiny" / record["source"])} if "source" in record
                            else {}))
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = json.loads((ROOT / "tests/tiny/rewards_mixed.json").read_text())
    for name, entry in table["rewards"].items():  # the oracle instead of the VLMs
        entry["source"] = f"{world}:{'embed_faces' if name == 'identity' else name + '_reward'}"
    (tmp_path / "rewards.json").write_text(json.dumps(table))
    arguments = ["--reward", "rewards.json", "--prompts", "mixed.jsonl", "--steps", "1", *SMALL,
                 "--prompts-per-step", "8"]
    (line,) = run_script(tmp_path, *arguments, script="nft.py")
    assert line["failed"] == 0 and {"alignment", "aesthetic", "instruction",
                                    "consistency"} <= set(line["reward"])
    assert line["undefined"] <= 16 and line["constant_groups"] < 0.5  # identity: edits without a face
