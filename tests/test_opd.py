"""opd.py: its loss against a second formulation, its teachers, and the script in one process and in two."""

import json
import re
import shutil

import pytest
import torch

import model
import opd
from runs import ROOT, SMALL, assert_same_bits, checkpoint, run_script, start_script

BASE = ROOT / "tests/tiny/model"
TEACHERS = ["--teacher", f"t2i={BASE}", f"edit={BASE}"]
GUIDED = ["--teacher-cfg", "2.5"]  # so that there is something to learn in three steps


def inputs():
    torch.manual_seed(0)
    return *torch.randn(2, 6, 16, 4, dtype=torch.float64), torch.rand(6, dtype=torch.float64)


def test_loss_is_equation_14_element_by_element():
    v, v_teacher, weight = inputs()
    expected = sum(weight[b].item() * sum((x - y) ** 2
                                          for x, y in zip(v[b].flatten().tolist(),
                                                   v_teacher[b].flatten().tolist())) / 64
                   for b in range(6))
    loss, error = opd.opd_loss(v, v_teacher, weight)
    assert loss.item() == pytest.approx(expected) and (weight * error).sum().item() == pytest.approx(expected)
    assert opd.opd_loss(v, v, weight)[0] == 0


def test_gradient_of_rows_is_that_of_one_joint_loss():
    """Row by row, as the script does it, against the mean over all states at once."""
    v, v_teacher, _ = inputs()
    one, other = v.clone().requires_grad_(), v.clone().requires_grad_()
    for part in (slice(0, 2), slice(2, 6)):
        (opd.opd_loss(one[part], v_teacher[part], torch.ones(1))[0] / 6).backward()
    torch.nn.functional.mse_loss(other, v_teacher).backward()
    torch.testing.assert_close(one.grad, other.grad)


# The script


def test_a_student_that_is_its_teacher_stays_put(tmp_path):
    """Unguided, the loss is exactly 0, and weight decay is off: nothing moves. Without judges there are
    pictures, but no table.
    """
    lines = (ROOT / "tests/tiny/heldout.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:3]))
    arguments = [*SMALL, "--teacher-cfg", "1", "--steps", "1", "--eval-prompts", "few.jsonl", "--eval-images",
                 "6"]
    (line,) = run_script(tmp_path, *TEACHERS, *arguments, script="opd.py")
    assert line["loss"] == [0.0] and line["grad_norm"] == [0.0]
    assert (tmp_path / "runs/run/samples/before_after.png").exists()
    assert not (tmp_path / "runs/run/eval.json").exists()
    saved = model.materialise(model.new_transformer(tmp_path / "runs/run/model", torch.float32),
                              tmp_path / "runs/run/model", "cpu")
    base = model.materialise(model.new_transformer(BASE, torch.float32), BASE, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), base.parameters()))


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    return folder, run_script(folder, *TEACHERS, *GUIDED, "--steps", "3", *SMALL, script="opd.py")


def test_the_student_learns_guidance(three_steps):
    folder, log = three_steps
    assert set(log[0]["velocity_error"]) == {"t2i", "edit"} and len(log[0]["velocity_error"]["t2i"]) == 8
    assert log[-1]["loss"][0] < log[0]["loss"][0]
    index = json.loads((folder / "runs/run/model/model_index.json").read_text())
    assert index["_sampling"]["guidance_scale"] == 1.0
    assert (folder / "runs/run/curve.png").exists()


def test_resume_gives_the_same_bits(three_steps, tmp_path):
    """Also where the run began with its weights and moments in host memory."""
    run_script(tmp_path, *TEACHERS, *GUIDED, "--steps", "1", *SMALL, "--offload", script="opd.py")
    log = run_script(tmp_path, *TEACHERS, *GUIDED, "--steps", "3", *SMALL, "--resume", script="opd.py")
    assert_same_bits(checkpoint(three_steps[0]), checkpoint(tmp_path))
    assert log[-1]["velocity_error"] == three_steps[1][-1]["velocity_error"]


def test_two_processes_agree_with_one(tmp_path):
    """First update's gradient norm and loss; a group is a rollout batch, so that both sample the same states.
    """
    logs = []
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        logs += run_script(tmp_path / str(processes), *TEACHERS, "--steps", "1", "--rollout-batch", "4",
                           *SMALL, script="opd.py",
                           processes=processes)
    assert logs[1]["loss"][0] == pytest.approx(logs[0]["loss"][0], rel=1e-5)
    assert logs[1]["grad_norm"][0] == pytest.approx(logs[0]["grad_norm"][0], rel=1e-4)
    for task in ("t2i", "edit"):
        assert logs[1]["velocity_error"][task] == pytest.approx(logs[0]["velocity_error"][task], rel=1e-4)


def test_every_prompt_has_its_tasks_teacher(tmp_path, three_steps):
    """An edit teacher whose velocities are zero: the error of edits is the student's own velocity, that of
    the others is as before.
    """
    network = model.materialise(model.new_transformer(BASE, torch.float32), BASE, "cpu")
    torch.nn.init.zeros_(network.proj_out.weight)
    network.requires_grad_(False)
    model.save_model(tmp_path / "saved", BASE, network, guidance=2.0, trained_on=["b"])
    arguments = ["--teacher", f"t2i={BASE}", f"edit={tmp_path / 'saved'}", *GUIDED, "--steps", "1", *SMALL]
    (line,) = run_script(tmp_path, *arguments, script="opd.py")
    before = three_steps[1][0]["velocity_error"]
    assert line["velocity_error"]["t2i"] == before["t2i"]
    assert min(line["velocity_error"]["edit"]) > 5 * min(before["edit"])
    index = json.loads((tmp_path / "runs/run/model/model_index.json").read_text())
    assert index["_sampling"]["trained_on"] == ["b"]


def test_more_teachers_stay_in_host_memory(tmp_path, capsys):
    """What the compute device holds does not depend on the number of teachers; "task" in the prompt file
    makes a third task.
    """
    records = [json.loads(line) for line in (ROOT / "tests/tiny/prompts.jsonl").read_text().splitlines()[:16]]
    held = []
    for count in (1, 3):
        tasks, folder = ("t2i", "faces", "letters")[:count], tmp_path / str(count)
        folder.mkdir()
        (folder / "prompts.jsonl").write_text("\n".join(json.dumps(r | {"task": tasks[i % count]})
                                                        for i, r in enumerate(records)))
        arguments = ["--prompts", "prompts.jsonl", "--teacher", *(f"{task}={BASE}" for task in tasks),
                     "--steps", "1", *SMALL, "--prompts-per-step", "16", "--group-size", "1"]
        (line,) = run_script(folder, *arguments, script="opd.py")
        assert set(line["velocity_error"]) == set(tasks) and min(line["seconds"].values()) >= 0
        printed = capsys.readouterr().out
        device, host = (re.search(f"{what}, MiB: (.*),", printed)[1]
                        for what in ("memory of each cpu", "host memory for all ranks"))
        held.append((device, float(re.search("waiting weights ([0-9.]+)", host)[1])))
    (one, waiting), (three, more) = held
    assert one == three and more == pytest.approx(3 * waiting, abs=0.2) and waiting > 5


def test_a_teacher_of_another_shape_is_named(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(BASE, other, symlinks=True)
    config = json.loads((other / "transformer/config.json").read_text()) | {"num_layers": 2}
    small = model.FlowTransformer(config)
    model.save_model(tmp_path / "small", BASE, small, guidance=2.0, trained_on=[])
    arguments = ["--teacher", f"t2i={tmp_path / 'small'}", f"edit={BASE}", "--steps", "1", *SMALL]
    printed, failed = start_script(tmp_path, *arguments, script="opd.py")
    assert failed and "small/transformer" in printed and "missing tensors" in printed
