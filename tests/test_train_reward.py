"""train_reward.py: Eq. 10-12 against second formulations, its data, the script end to end, and the tiny
scorers' bars.
"""

import copy
import functools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import make
import model
import train_reward
import world
from runs import loaded_rewards, printed_by, start_script
from train_reward import Example, correlation, ranks

ROOT = Path(__file__).resolve().parent.parent
SCORES = ROOT / "tests/tiny/scores/aesthetic.jsonl"
ORACLE = f"{ROOT / 'tests/tiny/world.py'}:aesthetic_reward"


# Equations


def test_expected_score_is_the_renormalised_expectation():
    logits, tokens = 3 * torch.randn(4, 50, dtype=torch.float64).float(), [7, 3, 20, 21, 49]
    p = logits.double().softmax(-1)[:, tokens]
    score, mass = model.expected_score(logits, tokens)
    expected = sum(s * p[:, i] for i, s in enumerate((1, 2, 3, 4, 5))) / p.sum(-1)                    # Eq. 12
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass.double(), p.sum(-1), rtol=1e-5, atol=1e-6)
    sharp = torch.full((1, 50), -50.0)
    sharp[0, tokens[3]] = 50
    assert model.expected_score(sharp, tokens)[0].item() == pytest.approx(4)


def test_pointwise_loss_is_the_squared_distance_to_the_human_score():
    score, y = 1 + 4 * torch.rand(2, 7, dtype=torch.float64)
    expected = sum((r - human) ** 2 for r, human in zip(score.tolist(), y.tolist()))                  # Eq. 11
    assert train_reward.pointwise_loss(score, y).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_pairwise_loss_is_bradley_terry(scale):
    score = 1 + 4 * torch.rand(10, dtype=torch.float64)
    # Eq. 10
    expected = -sum(math.log(1 / (1 + math.exp(-scale * (a - b)))) for a, b in score.view(5, 2).tolist())
    assert train_reward.pairwise_loss(score, scale).item() == pytest.approx(expected, rel=1e-12)


def test_answer_loss_is_the_mean_cross_entropy_of_each_answer():
    logits, labels = 2 * torch.randn(3, 6, 20, dtype=torch.float64), torch.randint(20, (3, 6))
    labels[0, :4] = labels[1, 2] = labels[:, -2] = -100
    expected = 0.0
    for row in range(3):
        terms = [math.log(sum(math.exp(z) for z in logits[row, i].tolist())) - logits[row, i,
                                                                                      labels[row, i]].item()
                 for i in range(6) if labels[row, i] != -100]
        expected += sum(terms) / len(terms)
    assert train_reward.answer_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_rank_correlation():
    a, b = [3, 1, 2, 2, 9], [30, 10, 20, 20, 31]
    assert ranks(a).tolist() == [3, 0, 1.5, 1.5, 4]
    assert correlation(ranks(a), ranks(b)) == pytest.approx(1)
    x, y = np.random.default_rng(0).normal(size=(2, 40))
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert np.isnan(correlation([1, 1, 1], [1, 2, 3]))


def test_held_out_statistics_leave_failures_out_and_compare_within_a_prompt():
    rows = [(Example(prompt, ["x.png"], "aesthetic", score),)
            for prompt, score in zip("aaaabbbb", (1, 2, 3, 4, 1, 2, 2, 5))]
    scores = np.array([1.5, 1.0, 3.0, 4.5, math.nan, 2.0, 3.0, 1.0])
    table = train_reward.statistics(rows, scores, np.full(8, 0.5))
    assert (table["n"], table["failed"], table["groups"], table["mass"]) == (8, 1, 2, 0.5)
    # of a: all but (2, 1); of b: neither 5 over 2
    assert table["pair_accuracy"] == pytest.approx((5 + 0) / (6 + 2))
    assert table["group_srcc"] == pytest.approx((0.8 - math.sqrt(3) / 2) / 2)
    kept = [0, 1, 2, 3, 5, 6, 7]
    truth = np.array([row[0].score for row in rows])[kept]
    assert table["mae"] == pytest.approx(np.abs(scores[kept] - truth).mean())
    assert table["plcc"] == pytest.approx(np.corrcoef(scores[kept], truth)[0, 1])
    pairs = [(Example("a", ["x.png"], "aesthetic"),) * 2] * 4
    table = train_reward.statistics(pairs, np.array([2, 1, 1, 2, 3, 3, math.nan, 1]), np.ones(8))
    assert table == {"n": 4, "failed": 1, "mass": 1.0, "pair_accuracy": 0.5}  # right, wrong, a tie, a failure
    assert train_reward.statistics(pairs, np.full(8, math.nan), np.zeros(8)) == {"n": 4, "failed": 8,
                                                                                 "mass": 0.0}


# Data

SCORED = {"prompt": "a", "image": "x.png", "score": 3}
PAIR = {"prompt": "a", "chosen": "x.png", "rejected": "y.png"}


def write(folder, *records):
    """A data file with the pictures x.png and y.png beside it."""
    for name, color in (("x.png", "red"), ("y.png", "blue")):
        Image.new("RGB", (64, 64), color).save(folder / name)
    (folder / "data.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n"
                                               for r in records))
    return folder / "data.jsonl"


def test_scores_are_numbers_or_means_of_dimensions(tmp_path):
    dimensions = {"quality": 4, "fidelity": 1.5}
    path = write(tmp_path, SCORED | {"score": 2.5}, "", SCORED | {"score": dimensions},
                 SCORED | {"reward": "portrait"})
    rows, note = train_reward.load_data(path, "aesthetic")
    assert [(row[0].score, row[0].reward, row[0].reasoning) for row in rows] == [
        (2.5, "aesthetic", ""), (2.75, "aesthetic", ""), (3, "portrait", "")]
    assert note == ", score = mean of quality, fidelity (1)"


def test_sources_come_before_what_was_made_of_them(tmp_path):
    names = lambda rows: [[path.name for path in example.pictures] for row in rows for example in row]
    one, several = {"source": "y.png"}, {"source": ["y.png", "x.png"]}
    rows, _ = train_reward.load_data(write(tmp_path, SCORED | one, SCORED | several), "instruction")
    assert names(rows) == [["y.png", "x.png"], ["y.png", "x.png", "x.png"]]
    rows, _ = train_reward.load_data(write(tmp_path, PAIR | one), "instruction")
    assert names(rows) == [["y.png", "x.png"], ["y.png", "y.png"]]


def test_pairs_are_chosen_first_and_their_attributes_count(tmp_path):
    figure = {"valid": True, "text_distortion": False, "figure_distortion": True}
    rows, note = train_reward.load_data(write(
        tmp_path, PAIR, PAIR | {"attributes": figure}, PAIR | {"attributes": {"valid": False}},
        PAIR | {"attributes": {"text_distortion": True, "figure_distortion": True}}), "aesthetic")
    assert [[example.pictures[0].name for example in row] for row in rows] == [["x.png", "y.png"]] * 3
    assert all(math.isnan(example.score) for row in rows for example in row)
    for part in ("pairs with figure distortion (2)", "pairs with text distortion (1)",
                 "invalid pairs dropped (1)"):
        assert part in note


@pytest.mark.parametrize("line, message", [
    ({"prompt": "a"}, "want .*chosen"), ("not json", "want "), ("[1, 2]", "want "),
    ({"image": "x.png", "score": 3}, "want .*prompt"),
    ({"prompt": "a", "image": "x.png"}, "want .*score"),
    ({"prompt": "a", "chosen": "x.png"}, "want .*rejected"),
    (SCORED | {"image": "none.png"}, "there is no picture .*none.png"),
    (SCORED | {"source": "none.png"}, "there is no picture .*none.png"),
    (SCORED | {"score": 7}, "score 7 is not between 1 and 5"), (SCORED | {"score": 0.5}, "score 0.5 is not"),
    (SCORED | {"score": math.nan}, "score nan is not"), (SCORED | {"score": "good"}, "could not convert"),
    (SCORED | {"score": {"quality": None}}, "want "),
    (SCORED | {"image": "data.jsonl"}, ".*data.jsonl: not a whole picture"),
    (SCORED | {"prompt": 5}, "want .*prompt and reasoning are strings"),
    (PAIR | {"reasoning": "so"}, "a pair has no reasoning"),
    (PAIR | {"attributes": {"ugly": True}}, "attributes are valid, text_distortion, figure_distortion")])
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(model.UserError, match=f"data.jsonl:2: {message}"):
        train_reward.load_data(write(tmp_path, SCORED, line), "aesthetic")


@pytest.mark.parametrize("records, message", [
    ([], "holds nothing to learn from"),
    ([PAIR | {"attributes": {"valid": False}}], "holds nothing to learn from"),
    ([SCORED, PAIR], "mixes scored pictures and pairs"),
    ([SCORED, SCORED | {"reasoning": "red"}], "some lines have reasoning")])
def test_bad_files_are_refused(tmp_path, records, message):
    with pytest.raises(model.UserError, match=f"data.jsonl.* {message}"):
        train_reward.load_data(write(tmp_path, *records), "aesthetic")


@pytest.mark.parametrize("records, arguments, message", [
    ([SCORED], ["--objective", "pairwise"], "--objective pairwise: .* holds scored pictures"),
    ([PAIR], [], "--objective pointwise: .* holds pairs"),
    ([SCORED], ["--batch", "4"], "--batch 4 is not a multiple of 3 ranks"),
    ([SCORED], ["--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    ([SCORED | {"reward": "beauty"}], [], "beauty: no such rubric"),
    ([SCORED], ["--base", "nowhere"], "nowhere: no such directory")])
def test_bad_arguments_are_refused_before_anything_is_trained(tmp_path, monkeypatch, records, arguments,
                                                              message):
    monkeypatch.setattr(train_reward, "setup", lambda: (0, 3, torch.device("cpu")))
    paths = ["--data", str(write(tmp_path, *records)), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["", "--reward", "aesthetic", *paths, "--batch", "3", *arguments])
    with pytest.raises(model.UserError, match=message):
        train_reward.main()
    assert not (tmp_path / "out").exists()


def test_rows_of_a_step_are_a_function_of_seed_and_step_and_epochs_are_permutations():
    for count, batch in ((12, 4), (10, 4), (3, 8), (7, 7)):
        rows = [train_reward.batch_rows(step, count, batch, seed=3) for step in range(3 * count)]
        assert all(len(numbers) == batch for numbers in rows)
        stream = sum(rows, [])
        epochs = [stream[i:i + count] for i in range(0, len(stream) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count))
                   for epoch in epochs) and len(set(map(tuple, epochs))) > 1
        assert rows[5] == train_reward.batch_rows(5, count, batch, 3)
        assert stream != sum((train_reward.batch_rows(step, count, batch, 4) for step in range(3 * count)),
                             [])
        assert sorted(rows[1][0::2] + rows[1][1::2]) == sorted(rows[1])  # what two ranks take


# What the VLM is asked and taught


@pytest.fixture(scope="module")
def processor():
    return model.Processor(make.OUT / "processor")


def examples_of(folder, thoughts):
    write(folder)
    return [Example("a", [folder / "x.png"], "aesthetic", 4.4, thoughts[0]),
            Example("make it much more blue", [folder / "y.png", folder / "x.png"], "consistency", 2.0,
                    thoughts[1]),
            Example("a longer one", [folder / "y.png"], "alignment", math.nan, thoughts[2])]


THOUGHTS = [["", "", ""], ["a red circle", "two blue squares on a white background", "nothing."]]


@pytest.mark.parametrize("thoughts", THOUGHTS)
def test_labels_are_the_answer_without_its_score(tmp_path, processor, thoughts):
    decode = processor.tokenizer.decode
    inputs, labels, place, y = train_reward.collate(processor, model.RUBRICS, examples_of(tmp_path, thoughts),
                                                    "cpu")
    assert y[:2].tolist() == pytest.approx([4.4, 2.0]) and y[2].isnan()
    for row, (thought, digit) in enumerate(zip(thoughts, "423")):
        ids = inputs["input_ids"][row].tolist()
        start = next(i for i in range(len(ids), 0, -1) if decode(ids[:i]).endswith("<|im_start|>assistant\n"))
        assert decode(ids[start:]) == (thought and thought + "\n") + f"<score>{digit}</score><|im_end|>"
        assert decode(ids[-place]) == digit and decode(ids[-place - 1]).endswith(">")
        taught = [ids[i] if i >= start and i != len(ids) - place else -100 for i in range(len(ids))]
        assert labels[row].tolist() == taught[-labels.shape[1]:] and set(taught[:-labels.shape[1]]) <= {-100}


@pytest.mark.parametrize("thoughts", THOUGHTS)
def test_scoring_asks_what_training_asked(tmp_path, processor, thoughts):
    """Tokens up to the score and pixels, sources first; the VLM thinks here what it was taught to think."""
    tokenizer, examples, seen = processor.tokenizer, examples_of(tmp_path, thoughts), []

    class Vlm:
        device = "cpu"

        def __call__(self, use_cache, logits_to_keep, **inputs):
            seen.append(inputs)
            return SimpleNamespace(logits=torch.zeros(len(inputs["input_ids"]), logits_to_keep,
                                                      len(tokenizer)))

        def generate(self, input_ids, max_new_tokens, do_sample, **inputs):
            answers = [thought + "\n<score>3</score><|im_end|>" for thought in thoughts]
            return torch.cat([input_ids,
                              tokenizer(answers, padding=True, padding_side="right",
                                        return_tensors="pt").input_ids], dim=1)

    inputs, _, place, _ = train_reward.collate(processor, dict.fromkeys(model.RUBRICS, "Nice? {prompt}"),
                                               examples, "cpu")
    scorer = model.VLMScorer(Vlm(), make.OUT / "processor", "Nice? {prompt}",
                             reasoning=20 if thoughts[0] else 0)
    pictures = [[Image.open(path) for path in example.pictures] for example in examples]
    answers = scorer.read([p[-1] for p in pictures], [example.prompt for example in examples],
                          [p[:-1] for p in pictures])
    assert torch.equal(seen[0]["input_ids"], inputs["input_ids"][:, :-place])
    assert torch.equal(seen[0]["pixel_values"],
                       inputs["pixel_values"]) and seen[0]["image_grid_thw"].shape == (4, 3)
    assert [thought for _, _, thought in answers] == [thought and thought + "\n" for thought in thoughts]
    assert all("of the probability" in str(score) and mass == pytest.approx(5 / len(tokenizer))
               for score, mass, _ in answers)


def test_scores_that_are_not_single_tokens_are_refused():
    class Tokenizer:
        name_or_path = "odd"

        def __call__(self, text, add_special_tokens):
            return SimpleNamespace(input_ids=[ord(character) for character in f"{int(text):02d}"])

    with pytest.raises(model.UserError, match="odd: the scores 1-5 are not single tokens"):
        model.score_tokens(Tokenizer())


# The script

STOP = """
import os, train_reward
save = train_reward.save_checkpoint
def stop(*arguments):
    save(*arguments)
    os._exit(9)
train_reward.save_checkpoint = stop
train_reward.main()
"""


def run(out, *arguments, processes=1, stop=False):
    """Run train_reward.py; with `stop`, until it is killed right after its first checkpoint."""
    arguments = ["--out", out, *arguments]
    if not stop:
        return printed_by(ROOT, "train_reward.py", *arguments, processes=processes)
    script = out.with_name("stop.py")
    script.write_text(STOP)
    printed, code = start_script(ROOT, *arguments, script=script, processes=processes)
    assert code, printed[-3000:]


def records(**changes):
    """The example scores, to be put elsewhere."""
    lines = [json.loads(line) for line in SCORES.read_text().splitlines()]
    return [line | {"image": str(SCORES.parent / line["image"])} | changes for line in lines]


def card(out):
    return json.loads((out / "reward.json").read_text())


@pytest.fixture(scope="module")
def niceness(tmp_path_factory):
    """A scorer trained on the example scores under a rubric of its own."""
    folder = tmp_path_factory.mktemp("niceness")
    (folder / "rubric.txt").write_text("How nice is this from 1 to 5? {prompt}\n")
    data = write(folder, *records(reward="niceness"))
    run(folder / "out", "--reward", "niceness", "--rubric", folder / "rubric.txt", "--data", data,
        "--eval-data", data, "--steps", 80,
        "--batch", 8, "--pixels", 64 * 64, "--lr", 3e-3, "--mass-coef", 1)
    return folder / "out"


def test_trained_scorer_loads_and_scores_with_the_rubric_it_was_trained_on(niceness):
    table = card(niceness)["held_out"]["data.jsonl"]
    assert card(niceness)["rubrics"] == {"niceness": "How nice is this from 1 to 5? {prompt}"}
    assert card(niceness)["reasoning"] == 0
    assert table["n"] == 32 and table["failed"] == 0 and table["srcc"] > 0.3 and table["mass"] > 0.9
    assert Image.open(niceness / "scatter.png").size == (720, 420)
    (reward,) = loaded_rewards([f"niceness={niceness}"], make.OUT)
    text = model.score_text(reward.score.processor.tokenizer, reward.score.rubric, "a red circle", 1, False)
    assert "How nice is this from 1 to 5? a red circle" in text and text.endswith("<|im_start|>assistant\n")
    rows = [row[0] for row in train_reward.load_data(SCORES, "niceness")[0]]
    images = [Image.open(example.pictures[0]) for example in rows]
    together = reward.score(images, [example.prompt for example in rows], [[]] * 32)
    alone = [reward.score([image], [example.prompt], [[]])[0] for image, example in zip(images[:5], rows)]
    assert np.abs(np.array(together[:5]) - alone).max() < 1e-4 and all(1 < score < 5 for score in together)
    assert correlation(ranks(together),
                       ranks([example.score for example in rows])) == pytest.approx(table["srcc"])


def test_pairs_teach_which_picture_is_better(tmp_path):
    best = sorted(records(), key=lambda record: record["score"])[-16:]
    for i, record in enumerate(best):
        image = Image.open(record["image"]).convert("RGB")
        Image.blend(image, Image.new("RGB", image.size, (128, 128, 128)), 0.7).save(tmp_path / f"{i}.png")
    pairs = [{"prompt": "a", "chosen": record["image"], "rejected": f"{i}.png"}
             for i, record in enumerate(best)]
    data = write(tmp_path, *pairs, pairs[0] | {"attributes": {"valid": False}})
    printed = run(tmp_path / "out", "--reward", "aesthetic", "--objective", "pairwise", "--data", data,
                  "--eval-data", data, SCORES,
                  "--steps", 60, "--batch", 4, "--pixels", 64 * 64, "--lr", 3e-3, "--mass-coef", 0.3,
                  "--margin-scale", 2)
    assert "16 pairs, invalid pairs dropped (1), 60 steps of 4" in printed
    held_out = card(tmp_path / "out")["held_out"]
    assert held_out["data.jsonl"]["n"] == 16 and held_out["data.jsonl"]["pair_accuracy"] > 0.9
    assert held_out["aesthetic.jsonl"]["n"] == 32 and "srcc" in held_out["aesthetic.jsonl"]
    (reward,) = loaded_rewards([f"aesthetic={tmp_path / 'out'}"], make.OUT)
    images = [Image.open(example.pictures[0]) for row in train_reward.load_data(data, "aesthetic")[0]
              for example in row]
    scores = reward.score(images, ["a"] * 32, [[]] * 32)
    assert np.mean(np.subtract(scores[0::2], scores[1::2])) > 1


def test_reasoning_is_learnt_and_read_before_the_score(tmp_path):
    rng, lines, images = np.random.default_rng(0), [], []
    for i in range(8):
        scene = world.sample_scene(rng, "single")
        images.append(world.degrade(world.draw(scene), rng)[0] if i % 2 else world.draw(scene))
        images[i].save(tmp_path / f"{i}.png")
        lines.append({"prompt": "a", "image": f"{i}.png", "reasoning": world.caption(scene),
                      "score": 2 if i % 2 else 5})
    data = write(tmp_path, *lines)
    printed = run(tmp_path / "out", "--reward", "aesthetic", "--data", data, "--eval-data", data, "--steps",
                  100, "--batch", 8,
                  "--pixels", 64 * 64, "--lr", 3e-3)
    assert "with reasoning" in printed and 16 < card(tmp_path / "out")["reasoning"] < 64
    (reward,) = loaded_rewards([f"aesthetic={tmp_path / 'out'}"], make.OUT)
    scores, masses, thoughts = zip(*reward.score.read(images, ["a"] * 8, [[]] * 8))
    assert sum(thought == line["reasoning"] + "\n" for thought, line in zip(thoughts, lines)) >= 7
    assert sum(abs(score - line["score"]) < 0.5
               for score, line in zip(scores, lines)) >= 7 and min(masses) > 0.5
    assert card(tmp_path / "out")["held_out"]["data.jsonl"]["failed"] == 0


def test_reasoning_without_end_is_a_failure():
    scorer = model.VLMScorer(model.load_vlm(make.OUT / "text_encoder", "cpu", torch.float32),
                             make.OUT / "processor", "Nice?", 8)
    for score in scorer([world.draw(world.sample_scene(np.random.default_rng(i))) for i in range(2)],
                        ["a"] * 2, [[]] * 2):
        # it was not taught to answer
        assert isinstance(score, ValueError) and "no <score> within" in str(score)


FOUR_STEPS = ["--reward", "aesthetic", "--data", SCORES, "--steps", 4, "--batch", 4, "--pixels", 64 * 64,
              "--save-every", 2]


def checkpoint(out):
    """The one checkpoint of a stopped run as {kind: {name: tensor}}."""
    (path,) = (out.with_name(out.name + ".part") / "checkpoint").iterdir()
    dcp_to_torch_save(path, out.with_name("state.pt"))
    return torch.load(out.with_name("state.pt"), weights_only=False)


UNCLIPPED = [*FOUR_STEPS, "--grad-clip", 1e9]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Where a run was killed right after its first checkpoint, and the state of that."""
    out = tmp_path_factory.mktemp("killed") / "out"
    run(out, *UNCLIPPED, stop=True)
    return out, checkpoint(out)


def test_two_processes_agree_with_one(killed, tmp_path):
    """Gradients (Adam's first moments after two steps, the norm not clipped) and fp32 weights to 1e-4 of
    their movement.
    """
    run(tmp_path / "out", *UNCLIPPED, processes=2, stop=True)
    states = [killed[1], checkpoint(tmp_path / "out")]
    moments = [{name: state["exp_avg"] for name, state in s["optimizer"]["state"].items()} for s in states]
    base = {name: value.float()
            for name, value in load_file(make.OUT / "text_encoder" / "model.safetensors").items()}
    weights = [{name: value - base[name] for name, value in s["model"].items() if name in base}
               for s in states]
    for (one, two), bar in ((moments, 1e-5), (weights, 1e-3)):
        assert one.keys() == two.keys() and len(one) >= len(base)
        one, two = (torch.cat([part[name].flatten() for name in sorted(part)]) for part in (one, two))
        assert (one - two).norm() <= bar * one.norm()


def test_a_killed_run_resumes_with_the_same_bits(killed, tmp_path):
    """It goes on with its weights and moments in host memory."""
    out, _ = killed
    with pytest.raises(model.UserError, match="was started with other values of --lr"):
        run(out, *UNCLIPPED, "--resume", "--lr", 9)
    with pytest.raises(model.UserError, match="--resume: there is no .*nothing.part"):
        run(tmp_path / "nothing", *UNCLIPPED, "--resume")
    run(out, *UNCLIPPED, "--resume", "--offload")
    run(tmp_path / "whole", *UNCLIPPED)
    whole, resumed = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", out))
    assert all(torch.equal(value, resumed[name])
               for name, value in whole.items()) and whole.keys() == resumed.keys()
    assert not (out / "checkpoint").exists() and not Path(f"{out}.part").exists()


def test_ctrl_c_saves_and_the_printed_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train_reward, "stop_gently", lambda rank: model.STOP.set())
    printed = run(tmp_path / "out", *FOUR_STEPS)
    monkeypatch.undo()
    model.STOP.clear()
    again = f"python {sys.argv[0]} --resume --out {tmp_path / 'out'}"
    assert f"stopped after 1 of 4 steps; continue: {again}" in printed
    printed = printed_by(tmp_path, "train_reward.py", "--resume", "--out", tmp_path / "out")
    assert f"wrote {tmp_path / 'out'}" in printed
    assert '"aesthetic": {"weight": 1.0, "source": "http://HOST:8000/v1", "rubric": "Rate' in printed


def test_a_divergence_stops_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(train_reward, "pointwise_loss", lambda score, y: (score * math.nan).sum())
    with pytest.raises(model.UserError,
                       match="step 0: the loss is nan and the gradient's norm nan; start again with a lower "
                             "--lr"):
        run(tmp_path / "out", *FOUR_STEPS)
    assert not (tmp_path / "out").exists()


def test_frozen_vision_stays_and_the_language_model_moves(tmp_path):
    run(tmp_path / "out", *FOUR_STEPS, "--steps", 2, "--lr", 1e-2, "--freeze-vision")
    base = load_file(make.OUT / "text_encoder" / "model.safetensors")
    trained = load_file(tmp_path / "out" / "model.safetensors")
    same = {name: torch.equal(value, base[name]) for name, value in trained.items()}
    assert same.keys() == base.keys() and all(kept for name, kept in same.items() if ".visual." in name)
    assert not any(kept
                   for name, kept in same.items() if ".visual." not in name and name.endswith("proj.weight"))


def test_any_qwen_vl_can_be_trained_on_several_rewards_and_edits(tmp_path, processor):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                   processor.tokenizer(
        ["<|image_pad|><|video_pad|><|vision_start|><|vision_end|>"]).input_ids[0]))
    eos = processor.tokenizer.eos_token_id
    pad = processor.tokenizer.pad_token_id
    size = dict(hidden_size=32, intermediate_size=32)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=size
        | dict(vocab_size=len(processor.tokenizer), num_hidden_layers=2, num_attention_heads=2,
               num_key_value_heads=1,
                                bos_token_id=None, eos_token_id=eos, pad_token_id=pad, rope_parameters=rope),
        vision_config=size
        | dict(depth=2, num_heads=2, out_hidden_size=32, patch_size=16, window_size=64,
               fullatt_block_indexes=[1]),
        **ids)).save_pretrained(tmp_path / "base")
    names = ["instruction", "consistency"]
    data = write(tmp_path,
                 *(SCORED | {"source": "y.png", "reward": name, "score": score} for name in names
                   for score in (1, 4)))
    run(tmp_path / "out", "--reward", "instruction", "--base", tmp_path / "base", "--processor",
        make.OUT / "processor",
        "--data", data, "--eval-data", data, "--steps", 2, "--batch", 4, "--pixels", 64 * 64)
    assert card(tmp_path / "out")["rubrics"] == {name: model.RUBRICS[name]
                                                 for name in ("consistency", "instruction")}
    assert card(tmp_path / "out")["held_out"]["data.jsonl"]["n"] == 4
    rewards = loaded_rewards([f"{name}={tmp_path / 'out'}" for name in names], make.OUT)
    assert len(model.local_vlms(rewards)) == 1
    assert type(rewards[0].score.vlm).__name__ == "Qwen2_5_VLForConditionalGeneration"
    picture = Image.open(tmp_path / "x.png")
    for reward in rewards:
        assert reward.score.rubric == model.RUBRICS[reward.name]
        assert reward.score.processor.image_processor.size["shortest_edge"] == 64 * 64
        ((_, mass, _),) = reward.score.read([picture], ["a"], [[picture]])
        assert 0 < mass < 1


# Where rewards come from


def test_reward_sources(tmp_path, niceness):
    """A model's own reward, one that shares its weights, a directory, a function; what has one rubric is
    asked that one.
    """
    for path in make.OUT.iterdir():
        if path.name != "rewards":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "rewards" / "shared").mkdir(parents=True)
    (tmp_path / "rewards" / "shared" / "reward.json").write_text('{"weights": "../niceness"}')
    (tmp_path / "rewards" / "niceness").symlink_to(niceness)
    rewards = loaded_rewards(["niceness", "shared", f"other={niceness}", f"oracle={ORACLE}"], tmp_path)
    assert [reward.weight for reward in rewards] == [1 / 4] * 4 and len(model.local_vlms(rewards)) == 1
    assert all(str(niceness.resolve()) in r.source and r.score.rubric.startswith("How nice")
               for r in rewards[:3])
    with pytest.raises(model.UserError, match="no such rubric"):
        loaded_rewards(["beauty"], tmp_path)
    with pytest.raises(model.UserError, match="no file nowhere.py"):
        loaded_rewards(["x=nowhere.py:f"], tmp_path)
    with pytest.raises(model.UserError, match="no function missing"):
        loaded_rewards([f"x={ORACLE.partition(':')[0]}:missing"], tmp_path)


def test_text_encoder_judges_zero_shot_when_there_is_no_trained_model(tmp_path):
    for path in make.OUT.iterdir():
        if path.name != "rewards":
            (tmp_path / path.name).symlink_to(path)
    reward, other = loaded_rewards(["aesthetic", "alignment"], tmp_path)
    assert "zero-shot" in reward.source and reward.score.vlm is other.score.vlm
    (score,) = reward.score([world.draw(world.sample_scene(np.random.default_rng(0)))], ["a red circle"],
                            [[]])
    # the tiny one cannot judge
    assert isinstance(score, ValueError) and "of the probability is on the scores 1-5" in str(score)


def test_judges_come_back_as_they_left(niceness):
    rewards = loaded_rewards([f"a={niceness}", f"b={niceness}"], make.OUT)
    (vlm,), size = model.local_vlms(rewards), model.vlm_bytes(rewards)
    before = [(x, x.clone()) for x in (*vlm.parameters(), *vlm.buffers())]
    (score,) = rewards[0].score([world.draw(world.sample_scene(np.random.default_rng(0)))], ["a red circle"],
                                [[]])
    for _ in range(2):
        model.unseat_judges(rewards)
        assert all(x.numel() == 0 for x, _ in before) and model.vlm_bytes(rewards) == size
        model.seat_judges(rewards, torch.device("cpu"))
        assert all(torch.equal(x, value) for x, value in before)
    assert rewards[0].score([world.draw(world.sample_scene(np.random.default_rng(0)))], ["a red circle"],
                            [[]]) == (score,)


HALVES = """
import sys, torch, torch.distributed as dist, model
rank, world, device = model.setup()
rewards = model.load_rewards(["x=" + sys.argv[1]], model.Path(sys.argv[2]))
model.load_vlms(rewards, device)
vlm = rewards[0].score.vlm
before = {name: x.clone() for name, x in (*vlm.named_parameters(), *vlm.named_buffers())}
model.unseat_judges(rewards)
held = sum(x.share.nbytes for x in (*vlm.parameters(), *vlm.buffers()))
model.seat_judges(rewards, device)
after = dict((*vlm.named_parameters(), *vlm.named_buffers()))
same = all(torch.equal(after[name], x) for name, x in before.items())
found = model.all_gather_list([(held / model.vlm_bytes(rewards), same)])
if rank == 0:
    print("SHARES", found)
del vlm, rewards
dist.destroy_process_group()
"""


def test_a_machine_holds_a_judge_once(niceness, tmp_path):
    (tmp_path / "halves.py").write_text(HALVES)
    printed, failed = start_script(tmp_path, niceness, make.OUT, script=tmp_path / "halves.py", processes=2)
    shares = re.findall(r"\((0\.\d+), True\)", printed)
    assert not failed and len(shares) == 2 and all(abs(float(share) - 0.5) < 0.01
                                                   for share in shares), printed[-2000:]


def test_pictures_are_batched_by_their_pixels():
    scorer = model.VLMScorer.__new__(model.VLMScorer)
    picture = lambda side: Image.new("RGB", (side, side))
    assert list(scorer.batches([[picture(64)]] * 40)) == [list(range(32)), list(range(32, 40))]
    assert list(scorer.batches([[picture(1024), picture(1024)]] * 5)) == [[0, 1, 2, 3], [4]]
    # one a batch at least
    assert list(scorer.batches([[picture(4096)], [picture(64)], [picture(64)]])) == [[0], [1, 2]]


def test_patches_meet_a_matrix_as_they_meet_the_convolution():
    """Values and gradients of Qwen-VL's first layer; what is no patch is convolved as before."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)).double()
    product = model.patch_products(copy.deepcopy(torch.nn.Sequential(convolution)))
    for shape in ((20, 3, 2, 4, 4), (2, 3, 2, 8, 4)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(product(x), convolution(x))
        grads = [torch.autograd.grad(module(x).square().sum(), module.parameters())
                 for module in (product, convolution)]
        torch.testing.assert_close(*grads)
    product[0]._conv_forward = None  # no patch comes there
    product(torch.randn(20, 3, 2, 4, 4, dtype=torch.float64))
    vlm = model.load_vlm(make.OUT / "text_encoder", "cpu", torch.float32)
    assert vlm.model.visual.patch_embed.proj.forward.func is model.patch_product


def test_scores_are_as_fine_in_bf16_as_in_fp32():
    """Hidden states in bf16, logits near 20, as large VLMs have them: the head's product must not round
    scores to a grid.
    """
    torch.manual_seed(0)
    vlm = model.load_vlm(make.OUT / "text_encoder", "cpu", torch.bfloat16)
    head = vlm.get_output_embeddings()
    hidden = torch.randn(64, 1, 1).expand(64, 1, vlm.config.text_config.hidden_size) * 0.02 + 1
    rows = torch.linspace(19, 21, 5)[:, None] / hidden.shape[-1]
    head.weight.data[:5] = rows.to(torch.bfloat16)
    head.weight.data[5:] = -rows[0].to(torch.bfloat16)
    tokens, hidden = list(range(5)), hidden.to(torch.bfloat16)
    exact, _ = model.expected_score((hidden[:, 0].double() @ head.weight.double().T), tokens)
    ours, _ = model.expected_score(head(hidden)[:, 0], tokens)
    coarse, _ = model.expected_score(torch.nn.functional.linear(hidden, head.weight)[:, 0], tokens)
    assert len(set(hidden[:, 0, 0].tolist())) == len(set(ours.tolist())) > 1.5 * len(set(coarse.tolist()))
    assert (ours - exact).abs().max() < 1e-5 < 3e-3 < (coarse - exact).abs().max()


# The tiny scorers


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """{kind: {part: [(prompt, picture, source?)]}}: drawings, and samples of the base on held-out prompts."""
    rng = np.random.default_rng(77)
    prompts = [record["prompt"] for record in make.read_lines(ROOT / "tests/tiny/heldout.jsonl")]
    faces = [prompt for prompt in prompts if world.category(prompt) == "portrait"]
    instructions, sources = make.edit_sources(rng, 20, tmp_path_factory.mktemp("sources"))
    return {
        "picture": {"drawn": make.drawn_samples(rng, 160), "samples": make.base_samples(prompts[:30], 6, 77)},
        "portrait": {"drawn": make.portrait_samples(rng, 160),
                     "samples": make.base_samples(faces, 240 // len(faces), 78)},
        "edit": {"drawn": make.edit_samples(rng, 80),
                 "samples": make.base_samples(instructions, 6, 77, sources)}}


KINDS = {"aesthetic": "picture", "alignment": "picture", "portrait": "portrait", "instruction": "edit",
         "consistency": "edit"}


@pytest.fixture(scope="module")
def scored(fresh):
    """(reward, part) -> scores, the oracle's scores, prompts and sources; what failed, which few may, is left
    out.
    """

    @functools.cache
    def score(name, part):
        prompts, images, sources = zip(*((row[0], row[1], list(row[2:])) for row in fresh[KINDS[name]][part]))
        (reward,) = loaded_rewards([name], make.OUT)
        scores = reward.score(images, prompts, sources)
        truth = getattr(world, f"{name}_reward")(images, prompts, sources)
        valid = [i for i, found in enumerate(scores) if not isinstance(found, Exception)]
        assert len(valid) >= 0.95 * len(scores), [found
                                                  for found in scores if isinstance(found, Exception)][:3]
        groups = [(prompts[i], *(source.tobytes() for source in sources[i])) for i in valid]
        return np.array([scores[i] for i in valid]), np.array([truth[i] for i in valid]), groups

    return score


SLOW = pytest.mark.slow  # these reason, one word at a time


# reward.json has the figures on 400 and more pictures
@pytest.mark.parametrize("name, drawn, samples", [
    ("aesthetic", 0.9, 0.6), ("portrait", 0.8, 0.6), ("consistency", 0.6, 0.6),
    pytest.param("alignment", 0.75, 0.5, marks=SLOW), pytest.param("instruction", 0.7, 0.5, marks=SLOW)])
def test_scorers_rank_pictures_as_the_oracle_does(scored, name, drawn, samples):
    for part, bar in (("drawn", drawn), ("samples", samples)):
        scores, truth, _ = scored(name, part)
        assert correlation(ranks(scores), ranks(truth)) >= bar


@pytest.mark.parametrize("name", ["aesthetic", "portrait"])
def test_scorers_rank_pictures_of_one_prompt(scored, name):
    scores, truth, groups = scored(name, "samples")
    rows = [[i for i, other in enumerate(groups) if other == group] for group in sorted(set(groups))]
    within = [correlation(ranks(scores[g]), ranks(truth[g])) for g in rows]
    assert np.nanmean(within) >= 0.4


def objects(text):
    """(colour, form) of all objects in the words of world.describe, sorted."""
    subject = text.rpartition(" on a")[0]
    if found := re.fullmatch(r"the letter (\w) in (\w+)", subject):
        return [found.groups()[::-1]]
    if found := re.fullmatch(r"an? \w+ (\w+) face with \w+ eyes", subject):
        return [(found[1], "face")]
    colors, forms = "|".join((*world.PALETTE_NAMES, "unclear")), "|".join((*world.FORMS, "face", "unclear"))
    count = {word: number for number, word in world.COUNTS.items()}.get(subject.partition(" ")[0], 1)
    return sorted(re.findall(rf"({colors}) ({forms})s?\b", subject)) * count


def test_descriptions_can_be_taken_apart():
    rng = np.random.default_rng(0)
    for scene in (world.sample_scene(rng) for _ in range(200)):
        expected = [(item.color, item.form) for item in scene.items]
        assert objects(world.describe(scene)) == sorted(expected)
    assert objects("an unclear unclear and a red E on an unclear background") == [("red", "E"),
                                                                                  ("unclear", "unclear")]
    assert objects("nothing on a white background") == [] == objects("a a a red")


def test_the_alignment_scorer_says_what_is_in_the_picture(fresh):
    """Number, colours and forms of all objects as the oracle reads them, where it can; half of the drawings
    are miscaptioned.
    """
    rng = np.random.default_rng(79)
    scenes = [world.sample_scene(rng) for _ in range(80)]
    asked = [world.sample_scene(rng, scene.kind) if i % 2 else scene for i, scene in enumerate(scenes)]
    rows = [(world.caption(other), world.draw(scene))
            for scene, other in zip(scenes, asked)] + fresh["picture"]["samples"]
    seen = [objects(world.describe(world.read(image))) for _, image in rows]
    clear = [i for i, things in enumerate(seen) if not any("unclear" in thing for thing in things)]
    prompts, images = zip(*(rows[i] for i in clear))
    (reward,) = loaded_rewards(["alignment"], make.OUT)
    answers = reward.score.read(images, prompts, [[]] * len(images))
    said, seen = [objects(thought or "") for _, _, thought in answers], [seen[i] for i in clear]
    right = np.array([a == b for a, b in zip(said, seen)])
    chance = np.mean([a == b for a in said for b in seen])  # the mean over all permutations
    assert len(clear) >= 180 and right.mean() >= 0.6 and chance < 0.1
    # copying the prompt is never right here
    assert right[[objects(prompt) != b for prompt, b in zip(prompts, seen)]].mean() >= 0.4
