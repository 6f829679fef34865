"""rollout.py: drawing, continuing, curation, calibration and comparison."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model
import rollout
from runs import printed_by

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red circle above a blue square on a white background"
LETTER = "the letter Z in red on a white background"
ORACLE = [f"{name}={ROOT / 'tests/tiny/world.py'}:{name}_reward" for name in ("aesthetic", "alignment")]


def run(folder, *arguments, processes=1):
    return printed_by(folder, "rollout.py", *arguments, processes=processes)


def pixels(folder, name, i=0, g=0):
    path = folder / "rollouts" / str(name) / "images" / f"{i:06d}-{g:02d}.png"
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Three scored prompts, an edit among them, four images each; and what the script printed."""
    folder = tmp_path_factory.mktemp("drawn")
    edit = json.loads((ROOT / "tests/tiny/edits.jsonl").read_text().splitlines()[0])
    lines = [{"prompt": PROMPT, "category": "relation"}, {"prompt": LETTER, "category": "typography"},
             {"prompt": edit["prompt"], "category": "edit",
              "source": str(ROOT / "tests/tiny" / edit["source"])}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder, run(folder, "--prompts", "prompts.jsonl", "--group-size", 4, "--reward", *ORACLE, "--name",
                       "a")


def records(scores, categories=("x",), trained_on=()):
    """Made-up records from {reward: (P, G)}; the composite is the first reward."""
    names = list(scores)
    count, size = np.shape(scores[names[0]])
    value = lambda name, i, g: None if np.isnan(scores[name][i][g]) else float(scores[name][i][g])
    return [{"id": i, "image": g, "prompt": f"p{i}", "category": categories[i % len(categories)], "seed": 0,
             "source": [],
             "rewards": {name: value(name, i, g) for name in names}, "failed": [],
             "composite": value(names[0], i, g),
             "trained_on": list(trained_on)} for i in range(count) for g in range(size)]


# Drawing


def test_an_image_does_not_depend_on_how_many_are_asked_for_or_on_ranks(tmp_path):
    for count in (1, 8):
        run(tmp_path, PROMPT, "--group-size", count, "--rollout-batch", 8, "--name", count)
    run(tmp_path, PROMPT, LETTER, "--group-size", 3, "--rollout-batch", 8, "--name", "two", processes=2)
    assert (pixels(tmp_path, 1) == pixels(tmp_path, 8)).all()
    assert all((pixels(tmp_path, "two", g=g) == pixels(tmp_path, 8, g=g)).all() for g in range(3))


def test_pictures_agree_to_1e_4_across_batch_shapes_and_noise_to_the_bit():
    root, device = rollout.TINY / "model", torch.device("cpu")
    grid, t, cfg = model.sampling_settings(root)
    vae = model.load_vae(root, device, torch.float32)
    encoded = model.encode_prompts(root, vae, {0: model.Request(PROMPT), 1: model.Request(LETTER)}, (4, 4),
                                   device)
    flow = model.materialise(model.new_transformer(root, torch.float32), root, device).requires_grad_(False)
    images, pictures = [(0, i, g) for i in (0, 1) for g in range(3)], []
    for batch in (1, 2, 6):
        x = torch.cat([model.Sampler(flow, False)([encoded[i] for _, i, _ in chunk],
                                                  [model.noise_stream(0, *key) for key in chunk],
                                                  grid, t, torch.zeros(len(t) - 1), cfg, keep={0})[1][0][0]
                       for chunk in (images[k:k + batch] for k in range(0, 6, batch))])
        parts = model.generate(model.Sampler(flow, False), vae, encoded, images, grid, t,
                               torch.zeros(len(t) - 1), cfg, 0, batch,
                               keep={len(t) - 1})
        x0 = torch.cat([states[len(t) - 1][0] for *_, states in parts])
        with torch.no_grad():
            pictures.append((x, vae.decode(x0.mT.unflatten(2, grid))))
    for noise, picture in pictures[1:]:
        assert torch.equal(noise, pictures[0][0])
        assert (picture - pictures[0][1]).abs().max() < 1e-4


def test_records_hold_scores_and_the_composite(drawn):
    folder, printed = drawn
    found = rollout.read_records(folder / "rollouts" / "a")
    assert [(line["id"], line["image"]) for line in found] == [(i, g) for i in range(3) for g in range(4)]
    for line in found:
        scores = line["rewards"]
        assert line["composite"] == pytest.approx((scores["aesthetic"] + scores["alignment"] - 2) / 8)
        assert (folder / "rollouts" / "a" / line["file"]).exists() and line["failed"] == []
        assert line["seed"] == 0
    assert (folder / "rollouts" / "a" / "grid.png").exists()
    assert "| relation | aesthetic | 4/4 |" in printed and "mean range in a group" in printed


def test_a_killed_job_continues_with_the_same_lines(drawn, tmp_path):
    """kill -9 as soon as something is written, a line cut off; the rest is drawn by two processes."""
    arguments = ["--prompts", str(drawn[0] / "prompts.jsonl"), "--group-size", "4", "--reward", *ORACLE,
                 "--name", "a"]
    process = subprocess.Popen([sys.executable, str(ROOT / "rollout.py"), *arguments], cwd=tmp_path,
                               stderr=subprocess.DEVNULL,
                               env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    folder = tmp_path / "rollouts" / "a"
    part = folder / "rollouts.0.jsonl"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert part.exists(), "it was done before it could be killed"
    lines = part.read_text().splitlines()[:4]
    part.write_text("\n".join(lines) + "\n" + lines[0][:40])
    printed = run(tmp_path, *arguments, processes=2)
    assert "rollouts.0.jsonl:5: the last line was cut off; dropped" in printed
    assert "1 prompts are there already" in printed
    assert "cut off" not in run(tmp_path, "--curate", folder)  # repaired for good
    assert not list(folder.glob("rollouts.*.jsonl"))
    strip = lambda path: [json.loads(line) | {"source": None} for line in path.read_text().splitlines()]
    assert strip(folder / "rollouts.jsonl") == strip(drawn[0] / "rollouts/a/rollouts.jsonl")
    assert (pixels(tmp_path, "a", 2, 3) == pixels(drawn[0], "a", 2, 3)).all()


def test_a_name_is_not_reused_for_other_arguments(drawn):
    with pytest.raises(model.UserError,
                       match="was drawn with other values of --prompt, --prompts, --group-size, --reward"):
        run(drawn[0], PROMPT, "--name", "a", "--group-size", 2)


@pytest.mark.parametrize("line", ['{"id": 0', "5", '{"id": 0}', ""])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    (tmp_path / "rollouts.jsonl").write_text(line + '\n{"id": 0, "image": 0}\n')
    with pytest.raises(model.UserError, match=r"rollouts.jsonl:1: not a line of rollout.py"):
        rollout.read_records(tmp_path)


def test_what_failed_is_tried_again_and_other_prompts_are_refused(tmp_path):
    """A wrong flag, a reward that fails, the same command with the reward repaired; then an edited prompt
    file.
    """
    (tmp_path / "reward.py").write_text("def score(images, prompts, sources):\n    raise "
                                        "OSError('down')\nscore.range = 1, 5\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT, "task": "poster"}) + "\n")
    arguments = ["--prompts", "prompts.jsonl", "--group-size", 2, "--name", "a", "--reward"]
    with pytest.raises(model.UserError, match="no file missing.py"):
        run(tmp_path, *arguments, "r=missing.py:score")
    assert "2 scores failed" in run(tmp_path, *arguments, "r=reward.py:score")
    (tmp_path / "reward.py").write_text("def score(images, prompts, sources):\n    return [3.0] * "
                                        "len(images)\nscore.range = 1, 5\n")
    printed = run(tmp_path, *arguments, "r=reward.py:score")
    assert "scores failed" not in printed and "| r | 2/2 | 3.000 |" in printed
    run(tmp_path, "--curate", "rollouts/a", "--min-range", -1)
    assert [request.task for request in model.load_prompts(tmp_path / "curated.jsonl")] == ["poster"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": LETTER}) + "\n")
    with pytest.raises(model.UserError, match="prompt 0 was 'a red circle"):
        run(tmp_path, *arguments, "r=reward.py:score")


def test_composite_drops_what_is_undefined_and_refuses_what_failed():
    a, b = model.Reward("a", 0.75, "", None), model.Reward("b", 0.25, "", None, (0.0, 1.0), {"portrait": 1.0})
    assert rollout.composite({"a": 3.0, "b": 1.0}, [a, b], "general") == pytest.approx(0.75 * 0.5 + 0.25)
    other = model.Reward("a", 0.75, "", None, categories={"portrait": 0.0})
    assert rollout.composite({"a": 3.0, "b": 0.2}, [other, b], "portrait") == pytest.approx(0.2)
    assert rollout.composite({"a": 3.0, "b": model.UNDEFINED}, [a, b], "general") == 0.5
    assert rollout.composite({"a": model.FAILED, "b": 1.0}, [a, b], "general") is None
    assert rollout.composite({"a": model.UNDEFINED, "b": model.UNDEFINED}, [a, b], "general") is None


# Curation and calibration


def test_curation_keeps_groups_whose_range_is_large():
    rng = np.random.default_rng(0)
    scores = rng.random((40, 6)) * rng.random((40, 1))
    scores[3, 2] = np.nan
    ranges, keep = rollout.curate(records({"r": scores}, ("x", "y")), 0.3, 0.5)
    found = [[s for s in row if s == s] for row in scores]
    assert [max(row) - min(row) for row in found] == pytest.approx(list(ranges))
    assert list(keep) == [max(row) - min(row) > 0.3 for row in found]
    _, keep = rollout.curate(records({"r": scores}, ("x", "y")), None, 0.75)
    assert keep[::2].sum() == keep[1::2].sum() == 5


def test_curation_keeps_by_rank_where_ranges_tie():
    """A reward of 0 or 1: 20 of 24 prompts have the largest range; half of the prompts are kept, and none
    that agrees.
    """
    scores = np.zeros((24, 4))
    scores[4:, 0] = 1
    for quantile, kept in ((0.5, 12), (0.25, 18), (0, 20)):
        _, keep = rollout.curate(records({"r": scores}), None, quantile)
        assert keep.sum() == kept and not keep[:4].any() and keep[4:4 + kept].all()


def test_curated_prompts_load_as_a_prompt_file(drawn, tmp_path):
    printed = run(tmp_path, "--curate", drawn[0] / "rollouts" / "a", "--min-range", -1, "--out",
                  tmp_path / "sub" / "curated.jsonl")
    requests = model.load_prompts(tmp_path / "sub" / "curated.jsonl")
    assert {request.category for request in requests} == {"relation", "typography",
                                                          "edit"} and "| relation | 1 | 1 |" in printed
    assert all(Path(source).is_file() for request in requests for source in request.sources)
    assert any(r.sources for r in requests)
    line = json.loads((tmp_path / "sub" / "curated.jsonl").read_text().splitlines()[0])
    composites = [r["composite"] for r in rollout.read_records(drawn[0] / "rollouts" / "a") if r["id"] == 0]
    assert line["range"] == pytest.approx(max(composites) - min(composites), abs=1e-4)


def test_several_rollouts_are_numbered_through(drawn):
    folder = drawn[0] / "rollouts" / "a"
    assert [r["id"] for r in rollout.by_prompt(rollout.read_all([folder, folder]))] == list(range(6))


def test_calibration_correlates_within_groups_only():
    rng = np.random.default_rng(1)
    level, noise = 100 * rng.random((30, 1)), rng.normal(size=(30, 8))
    text = rollout.calibration_table(records({"a": level + noise, "b": level - noise,
                                              "c": np.full((30, 8), 2.0)}))
    rows = {line.split("|")[2].strip(): [cell.strip() for cell in line.split("|")[3:-1]]
            for line in text.splitlines()[2:]}
    assert rows["a"][0] == "0.0%" and rows["a"][2:] == ["+1.00", "-1.00", "-"] and rows["c"][0] == "100.0%"


# Comparison


def log_posterior(x, wins):
    likelihood = torch.from_numpy(wins) * torch.nn.functional.logsigmoid(x[:, None] - x[None])
    return likelihood.sum() - (x**2).sum() / (2 * rollout.PRIOR**2)



def test_ratings_maximise_the_posterior_and_ties_count_half():
    rng = np.random.default_rng(2)
    wins = rng.integers(1, 30, (4, 4)) + 0.5 * rng.integers(0, 5, (4, 4))
    np.fill_diagonal(wins, 0)
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([x], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -log_posterior(x, wins)
        value.backward()
        return value

    optimizer.step(loss)
    expected = 1000 + 400 / np.log(10) * (x - x.mean()).detach().numpy()
    assert np.abs(rollout.ratings(wins) - expected).max() < 1e-3
    assert rollout.ratings(np.array([[0, 5.0], [5.0, 0]])) == pytest.approx([1000, 1000])
    assert np.isfinite(rollout.ratings(np.array([[0, 40.0], [0, 0]]))).all()


def test_rating_intervals_cover_the_truth():
    """Votes on 80 prompts x 4 images between three players of known ratings, a fifth of them ties."""
    rng, truth, covered = np.random.default_rng(3), np.array([0.0, 0.3, 0.8]), []
    for _ in range(60):
        votes = np.zeros((80, 3, 3))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            p = 1 / (1 + np.exp(truth[j] - truth[i]))
            # ties keep the expectation
            won = np.where(rng.random((80, 4)) < 0.2, 0.5, rng.random((80, 4)) < (p - 0.1) / 0.8)
            votes[:, i, j], votes[:, j, i] = won.sum(1), (1 - won).sum(1)
        _, low, high = rollout.rating_intervals(votes, draws=200)
        expected = 1000 + rollout.ELO * (truth - truth.mean())
        covered += ((low <= expected) & (expected <= high)).tolist()
    assert 0.88 <= np.mean(covered) <= 0.99


def test_checkpoints_that_no_vote_joins_are_refused():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 0] = wins[2, 3] = wins[3, 2] = 3
    with pytest.raises(model.UserError, match="no chain of votes"):
        rollout.ratings(wins)


def test_votes_count_ties_half_and_skip_what_failed():
    scores = np.array([[[1.0, 2.0, 3.0, np.nan]], [[1.0, 1.0, 9.0, 1.0]]])
    assert rollout.count_votes(scores, 0.01).tolist() == [[[0, 1.5], [1.5, 0]]]


def test_differences_are_paired_by_prompt():
    rng = np.random.default_rng(4)
    base = rng.random((50, 4)) + 10 * rng.random((50, 1))
    gain = 0.1 + 0.05 * rng.normal(size=(50, 4))
    gain[7, 1] = np.nan
    difference, low, high = rollout.mean_difference(base, base + gain)
    per_prompt = np.nanmean(gain, 1)
    assert difference == pytest.approx(per_prompt.mean())
    half = 2.0096 * per_prompt.std(ddof=1) / 50**0.5  # the quantile of Student's t with 49 degrees of freedom
    assert (low, high) == pytest.approx((per_prompt.mean() - half, per_prompt.mean() + half), rel=1e-4)
    assert np.isnan(rollout.mean_difference(base[:4], base[:4] + gain[:4])[1:]).all()  # 4 prompts are too few


@pytest.mark.parametrize("n, quantile",
                         [(5, 2.7764), (6, 2.5706), (10, 2.2622), (33, 2.0369), (1000, 1.9623)])
def test_intervals_are_students(n, quantile):
    values = np.random.default_rng(n).normal(size=n)
    assert model.half_interval(list(values)) == pytest.approx(quantile * values.std(ddof=1) / n**0.5,
                                                              rel=5e-3)


def test_comparison_marks_judges_that_were_trained_on():
    base = np.random.default_rng(5).random((30, 4))
    players = {"base": records({"r": base, "s": base}, ("x", "y")),
               "rl": records({"r": base + 0.1, "s": base}, ("x", "y"), ["r"])}
    means, elo = rollout.compare_means(players), rollout.compare_ratings(players, "r", 0.02)
    text = rollout.comparison_text(players, means, elo, "r", 0.02)
    rows = [line for line in text.splitlines() if line.startswith("| all |")]
    assert f"{base.mean() + 0.1:.3f}* (+0.100 [+0.100, +0.100])" in rows[0] and "* (" not in rows[1]
    assert rows[0].startswith("| all | r | 30 |")
    assert rows[-1].count("*") == 1 and set(elo) == {"all", "x", "y"}
    with pytest.raises(model.UserError, match="--vote q: these images were scored by r, s, composite"):
        rollout.compare_ratings(players, "q", 0.02)


def test_a_reward_that_never_applies_is_left_open():
    base = {"r": np.ones((3, 2)), "s": np.full((3, 2), np.nan)}
    players = {"base": records(base), "rl": records(base)}
    means = rollout.compare_means(players)
    assert means["all"]["s"]["rl"] == {"mean": None, "difference": None, "interval": None, "prompts": 0,
                                         "trained_on": False}
    text = rollout.comparison_text(players, means, rollout.compare_ratings(players, "r", 0.02), "r", 0.02)
    assert "| all | s | 0 | - | - (- too few prompts) |" in text
    assert json.loads(json.dumps(means, allow_nan=False)) == means


def test_votes_of_a_reward_that_some_categories_never_ask():
    scores = {"r": np.ones((4, 2)), "s": np.full((4, 2), np.nan)}
    players = {"base": records(scores, ("x", "y")), "rl": records(scores, ("x", "y"))}
    for part, value in (("base", 1.0), ("rl", 2.0)):
        for record in players[part]:
            record["rewards"]["s"] = value if record["category"] == "y" else None
    assert set(rollout.compare_ratings(players, "s", 0.02)) == {"all", "y"}


def test_other_rewards_are_not_compared():
    a, b = records({"r": np.ones((3, 2))}), records({"r": np.ones((3, 2)), "s": np.ones((3, 2))})
    with pytest.raises(model.UserError,
                       match="rl: 6 images are of other prompts, categories or seeds than base's, or scored "
                             "by other"):
        rollout.check_comparable({"base": a, "rl": b})


def test_other_prompts_or_seeds_are_not_compared():
    a, b = records({"r": np.ones((3, 2))}), records({"r": np.ones((3, 2))})
    b[0]["prompt"] = "another"
    with pytest.raises(model.UserError, match="rl: 1 images are of other prompts"):
        rollout.check_comparable({"base": a, "rl": b})


def test_compare_writes_its_figures(drawn, tmp_path):
    folder = drawn[0] / "rollouts" / "a"
    printed = run(tmp_path, "--compare", f"base={folder}", f"same={folder}", "--out", tmp_path / "c")
    assert "1000 too few prompts" in printed  # three of them
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"comparison.md", "comparison.json",
                                                                  "comparison.png"}
    means = json.loads((tmp_path / "c" / "comparison.json").read_text())["means"]
    assert means["all"]["aesthetic"]["same"]["difference"] == 0
