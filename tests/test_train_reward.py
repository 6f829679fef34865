"""train_reward.py and VLM scoring: Eq. 11-12 against second formulations, the script end to end, the tiny scorers' bars."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import make
import model
import train_reward
import world

ROOT = Path(__file__).resolve().parent.parent
SCORES = ROOT / "tests/tiny/scores/aesthetic.jsonl"


# Equations


def test_expected_score_is_the_renormalised_expectation():
    logits, tokens = 3 * torch.randn(4, 50, dtype=torch.float64).float(), [7, 3, 20, 21, 49]
    p = logits.double().softmax(-1)[:, tokens]
    score, mass = model.expected_score(logits, tokens)
    expected = sum(s * p[:, i] for i, s in enumerate((1, 2, 3, 4, 5))) / p.sum(-1)                           # Eq. 12
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass.double(), p.sum(-1), rtol=1e-5, atol=1e-6)
    sharp = torch.full((1, 50), -50.0)
    sharp[0, tokens[3]] = 50
    assert model.expected_score(sharp, tokens)[0].item() == pytest.approx(4)


def test_pointwise_loss():
    logits, tokens, y = torch.randn(6, 30), [1, 2, 3, 4, 5], torch.tensor([1, 2.5, 3, 4, 5, 1.2])
    loss, score = train_reward.pointwise_loss(logits, tokens, y, 0.3)
    p = logits.softmax(-1)[:, tokens]
    expected = sum((score[i] - y[i]) ** 2 for i in range(6)) / 6 - 0.3 * sum(p[i].sum().log() for i in range(6)) / 6  # Eq. 11
    torch.testing.assert_close(loss, expected)


def test_rank_correlation():
    a, b = [3, 1, 2, 2, 9], [30, 10, 20, 20, 31]
    assert train_reward.ranks(a).tolist() == [3, 0, 1.5, 1.5, 4]
    assert train_reward.correlation(train_reward.ranks(a), train_reward.ranks(b)) == pytest.approx(1)
    x, y = np.random.default_rng(0).normal(size=(2, 40))
    assert train_reward.correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert np.isnan(train_reward.correlation([1, 1, 1], [1, 2, 3]))


# The script


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "train_reward.py"), *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, timeout=200)


def test_trained_scorer_loads_and_scores_with_the_rubric_it_was_trained_on(tmp_path):
    (tmp_path / "rubric.txt").write_text("How nice is this from 1 to 5? {prompt}\n")
    done = run("--reward", "niceness", "--rubric", tmp_path / "rubric.txt", "--data", SCORES, "--eval-data", SCORES, "--steps", 30,
               "--batch", 8, "--pixels", 128 * 128, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    card = json.loads((tmp_path / "out" / "reward.json").read_text())
    assert card["rubric"].startswith("How nice") and card["held_out"]["aesthetic.jsonl"]["srcc"] > 0.3
    (reward,) = model.load_rewards([f"niceness={tmp_path / 'out'}"], make.OUT, torch.float32, {})
    text = model.score_text(reward.score.processor.tokenizer, reward.score.rubric, "a red circle", 1)
    assert "How nice is this from 1 to 5? a red circle" in text and text.endswith("<|im_start|>assistant\n<score>")
    rows = train_reward.load_scores(SCORES)[:5]
    images = [model.Image.open(paths[-1]) for _, paths, _ in rows]
    together = reward.score(images, [row[0] for row in rows], [[]] * 5)
    alone = [reward.score([image], [row[0]], [[]])[0] for image, row in zip(images, rows)]
    assert np.abs(np.array(together) - alone).max() < 1e-4 and all(1 < score < 5 for score in together)


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "a"}', "bad.jsonl:2: want"), ("not json", "bad.jsonl:2: want"),
    ('{"prompt": "a", "image": "none.png", "score": 3}', "bad.jsonl:2: no picture"),
    ('{"prompt": "a", "image": "x.png", "score": 7}', "bad.jsonl:2: score 7.0 is not between 1 and 5")])
def test_bad_lines_are_named(tmp_path, line, message):
    model.Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "image": "x.png", "score": 3}\n' + line + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_reward.load_scores(tmp_path / "bad.jsonl")


def test_reward_sources():
    trained, judged, function = model.load_rewards(
        ["aesthetic", f"other={make.OUT / 'rewards' / 'alignment'}", f"oracle={ROOT / 'tests/tiny/world.py'}:aesthetic_reward"],
        make.OUT, torch.float32, {})
    assert [r.weight for r in (trained, judged, function)] == [1 / 3] * 3
    assert trained.score.rubric == model.RUBRICS["aesthetic"] and judged.score.rubric == model.RUBRICS["alignment"]
    with pytest.raises(ValueError, match="no such rubric"):
        model.load_rewards(["beauty"], make.OUT, torch.float32, {})
    with pytest.raises(FileNotFoundError, match="no file nowhere.py"):
        model.load_rewards(["x=nowhere.py:f"], make.OUT, torch.float32, {})
    with pytest.raises(AttributeError, match="no function missing"):
        model.load_rewards([f"x={ROOT / 'tests/tiny/world.py'}:missing"], make.OUT, torch.float32, {})


def test_text_encoder_judges_zero_shot_when_there_is_no_trained_model(tmp_path):
    for path in make.OUT.iterdir():
        if path.name != "rewards":
            (tmp_path / path.name).symlink_to(path)
    vlms = {}
    reward, other = model.load_rewards(["aesthetic", "alignment"], tmp_path, torch.float32, vlms)
    assert "zero-shot" in reward.source and reward.score.vlm is other.score.vlm and len(vlms) == 1
    (score,) = reward.score([world.draw(world.sample_scene(np.random.default_rng(0)))], ["a red circle"], [[]])
    assert 1 <= score <= 5


# The tiny scorers


@pytest.fixture(scope="module")
def scored():
    """{reward: scores, truth, groups} on fresh drawings and on fresh samples of the base on held-out prompts."""
    rng = np.random.default_rng(77)
    prompts = [json.loads(line)["prompt"] for line in (ROOT / "tests/tiny/heldout.jsonl").read_text().splitlines()]
    sets = {"drawn": make.drawn_samples(rng, 160), "samples": make.base_samples(prompts[:30], 8, seed=77)}
    rewards = model.load_rewards(["aesthetic", "alignment"], make.OUT, torch.float32, {})
    result = {}
    for part, samples in sets.items():
        images, texts = [image for _, image in samples], [prompt for prompt, _ in samples]
        truth = {"aesthetic": [world.aesthetic(i) for i in images],
                 "alignment": [world.alignment(i, p)[1] for i, p in zip(images, texts)]}
        for reward in rewards:
            result[reward.name, part] = np.array(reward.score(images, texts, [[]] * len(images))), np.array(truth[reward.name]), texts
    return result


@pytest.mark.parametrize("name, part, bar", [("aesthetic", "drawn", 0.85), ("alignment", "drawn", 0.6), ("aesthetic", "samples", 0.6),
                                             ("alignment", "samples", 0.5)])
def test_scorers_rank_pictures_as_the_oracle_does(scored, name, part, bar):
    scores, truth, _ = scored[name, part]
    assert train_reward.correlation(train_reward.ranks(scores), train_reward.ranks(truth)) >= bar


def test_aesthetic_scorer_ranks_within_groups(scored):
    scores, truth, texts = scored["aesthetic", "samples"]
    within = [train_reward.correlation(train_reward.ranks(scores[i:i + 8]), train_reward.ranks(truth[i:i + 8]))
              for i in range(0, len(texts), 8)]
    assert np.nanmean(within) >= 0.4
