"""grpo.py: its equations against second formulations, and the script itself in one process and in two."""

import pytest
import torch

from grpo import group_advantage, grpo_loss, guided_offset, kl_loss, prompt_ids, rank_share, trained_steps
from model import sde_mean_std
from runs import ORACLE, ROOT, SMALL, checkpoint, run_script

# Equations


def test_advantage_is_the_weighted_sum_of_group_z_scores():
    scores, weights = torch.randn(3, 5, 8) * torch.tensor([1.0, 10.0, 0.01])[:, None, None] + 3, torch.tensor([0.5, 0.3, 0.2])
    expected = torch.zeros(5, 8)
    for k in range(3):
        for p in range(5):
            group = scores[k, p].double().numpy()
            expected[p] += weights[k] * torch.from_numpy((group - group.mean()) / group.std()).float()
    a = group_advantage(scores, weights[:, None].expand(3, 5))
    torch.testing.assert_close(a, expected)
    assert a.sum(-1).abs().max() < 1e-5


def test_advantage_ignores_constant_groups_and_failed_scores():
    scores = torch.rand(1, 3, 6) + 1
    scores[0, 0] = 2 + 1e-5 * torch.rand(6)  # constant up to noise
    scores[0, 1, 2] = float("nan")
    a = group_advantage(scores, torch.ones(1, 3))
    assert a[0].abs().max() == 0 and a[1, 2] == 0
    rest = torch.cat([scores[0, 1, :2], scores[0, 1, 3:]])
    torch.testing.assert_close(torch.cat([a[1, :2], a[1, 3:]]), (rest - rest.mean()) / rest.std(correction=0))
    assert group_advantage(torch.full((2, 1, 4), float("nan")), torch.full((2, 1), 0.5)).abs().max() == 0


def loss_inputs():
    torch.manual_seed(0)
    v_old, x, x_next = torch.randn(3, 6, 16, 4, dtype=torch.float64)
    t, dt, sigma = (torch.full((6, 1, 1), value, dtype=torch.float64) for value in (0.8, -0.1, 0.9))
    return v_old, x, x_next, t, dt, sigma, torch.randn(6, dtype=torch.float64)


def test_loss_equals_the_clipped_surrogate_with_torch_distributions():
    v_old, x, x_next, t, dt, sigma, advantage = loss_inputs()
    v = v_old + torch.tensor([0.001, 0.002, 0.02, 0.03, 0.05, 0.1])[:, None, None] * torch.randn_like(v_old)
    loss, ratio = grpo_loss(v, v_old, x, x_next, t, dt, sigma, advantage, 1e-3)

    def log_prob(velocity):  # reverse-time SDE written through the score of the marginal
        score = -(x + (1 - t) * velocity) / t
        mean = x + (velocity - sigma**2 / 2 * score) * dt
        return torch.distributions.Normal(mean, sigma * (-dt) ** 0.5).log_prob(x_next).mean((1, 2))

    r = (log_prob(v) - log_prob(v_old)).exp()
    expected = torch.stack([-min(r_i * a, max(min(r_i, 1.001), 0.999) * a) for r_i, a in zip(r, advantage)]).sum()
    torch.testing.assert_close(ratio, r)
    torch.testing.assert_close(loss, expected)
    assert ((r - 1).abs() > 1e-3).any() and ((r - 1).abs() < 1e-3).any()  # both branches of the clip were met


def test_gradient_at_ratio_one_is_reinforce():
    v_old, x, x_next, t, dt, sigma, advantage = loss_inputs()
    v = v_old.clone().requires_grad_()
    loss, ratio = grpo_loss(v, v_old, x, x_next, t, dt, sigma, advantage, 1e-3)
    assert (ratio == 1).all()
    w = v_old.clone().requires_grad_()
    mean = x + (w + sigma**2 / (2 * t) * (x + (1 - t) * w)) * dt
    logp = torch.distributions.Normal(mean, sigma * (-dt) ** 0.5).log_prob(x_next).mean((1, 2))
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0], torch.autograd.grad(-(advantage * logp).sum(), w)[0])


def test_guided_offset_is_how_far_the_mean_was_moved():
    """x_next drawn around a mean that is moved by 0.7 std."""
    torch.manual_seed(0)
    v_old, x = torch.randn(2, 6, 400, 16)
    t, dt, sigma = (torch.full((6, 1, 1), value) for value in (0.8, -0.1, 0.9))
    mean, std = sde_mean_std(x, v_old, t, dt, sigma)
    x_next = mean + std * (0.7 + torch.randn_like(x))
    assert guided_offset(v_old, x, x_next, t, dt, sigma).mean().sqrt().item() == pytest.approx(0.7, abs=0.02)


def test_kl_is_the_mean_square_velocity_difference():
    v, v_ref = torch.randn(2, 6, 16, 4)
    torch.testing.assert_close(kl_loss(v, v_ref), ((v - v_ref) ** 2).sum() / (16 * 4))


def test_trained_steps_prefer_high_noise():
    assert trained_steps("3", 8) == [0, 2, 3] and trained_steps("1", 8) == [0] and trained_steps("4", 40) == [0, 6, 13, 19]
    assert trained_steps("half", 8) == [0, 1, 2, 3] and trained_steps("all", 3) == [0, 1, 2] and trained_steps("5,0,", 8) == [0, 5]
    for spec in ("5", "0", "-1", "x", "", ",", "8,", "0,-1", "0,1,2-5", "0,,2"):
        with pytest.raises(ValueError, match=f"--train-timesteps {spec}: want 1 to 4"):
            trained_steps(spec, 8)


def test_prompts_of_a_step_depend_on_seed_and_step_alone_and_are_shared_out_evenly():
    epoch = sorted(i for step in range(4) for i in prompt_ids(step, 32, 8, seed=3))
    assert epoch == list(range(32)) and prompt_ids(5, 32, 8, 3) == prompt_ids(5, 32, 8, 3) != prompt_ids(5, 32, 8, 4)
    ids = prompt_ids(0, 32, 8, 3)
    one, two = rank_share(ids, 2, 0, 1), [rank_share(ids, 2, rank, 2) for rank in (0, 1)]
    assert sorted(one) == ids and [sorted(two[0][u] + two[1][u]) for u in (slice(2), slice(2, 4))] == [one[:4], one[4:]]


# The script


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return folder, run_script(folder, "--reward", ORACLE, "--steps", "4", *SMALL, "--sample-every", "20")


def test_first_ratio_is_exactly_one_and_the_second_is_not(four_steps):
    for line in four_steps[1]:
        assert line["ratio_dev"][0] == 0.0 < line["ratio_dev"][1] < 0.1
        assert line["failed"] == 0 and len(line["grad_norm"]) == 2


def test_run_directory_is_complete(four_steps):
    run = four_steps[0] / "runs" / "run"
    for name in ("args.json", "curve.png", "samples/000000.png", "model/model_index.json", "model/vae/config.json",
                 "model/transformer/diffusion_pytorch_model.safetensors"):
        assert (run / name).stat().st_size > 0


def test_two_processes_agree_with_one(tmp_path):
    """The first gradient's norm to 1e-5, Adam's first moments after four updates to 1e-3, log lines to three digits.

    A group is a rollout batch, so that both sample the same states; other batch shapes round differently.
    """
    folders, logs = [tmp_path / "one", tmp_path / "two"], []
    for processes, folder in enumerate(folders, 1):
        folder.mkdir()
        logs.append(run_script(folder, "--reward", ORACLE, "--steps", "2", *SMALL, "--rollout-batch", "4", processes=processes))
    states = [checkpoint(folder)["optimizer"]["state"] for folder in folders]
    one, two = (torch.cat([state[name]["exp_avg"].flatten() for name in sorted(state)]) for state in states)
    assert (one - two).norm() <= 1e-3 * one.norm()
    assert logs[1][0]["grad_norm"][0] == pytest.approx(logs[0][0]["grad_norm"][0], rel=1e-5)
    for one, two in zip(*logs):
        assert one["ratio_dev"][0] == two["ratio_dev"][0] == 0.0 < two["ratio_dev"][1]
        for key in ("reward", "reward_std"):
            assert two[key]["aesthetic"] == pytest.approx(one[key]["aesthetic"], rel=5e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=5e-4)
        assert two["advantage_abs"] == pytest.approx(one["advantage_abs"], rel=5e-4)


def test_a_slot_that_differs_from_the_policy_is_seen_in_the_first_ratio(tmp_path):
    code = ("import sys, torch, grpo\n"
            "fill = grpo.fill\n"
            "def perturbed(slot, rows):\n"
            "    fill(slot, rows)\n"
            "    slot.proj_out.weight.data.mul_(1.001)\n"
            "grpo.fill = perturbed\n"
            "grpo.main(sys.argv[1:])\n")
    (line,) = run_script(tmp_path, "--reward", ORACLE, "--steps", "1", *SMALL, code=code)
    assert line["ratio_dev"][0] > 0


def test_editing_with_the_kl_and_several_rewards(tmp_path):
    (line,) = run_script(
        tmp_path, "--reward", ORACLE, f"alignment={ROOT / 'tests/tiny/world.py'}:alignment_reward", "--steps", "1", "--kl-coef", "0.1",
        "--prompts", str(ROOT / "tests/tiny/edits.jsonl"), "--eval-prompts", str(ROOT / "tests/tiny/edits_heldout.jsonl"),
        "--micro-batch", "5", "--rollout-batch", "6", "--checkpointing", "--cudnn", *SMALL)
    assert line["ratio_dev"][0] == line["kl"][0] == 0.0 < line["kl"][1] and set(line["reward"]) == {"aesthetic", "alignment"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_compiled_blocks_train_the_same(tmp_path, processes):
    """With recomputed activations; slot and policy are compiled alike, so the first ratio is still 1, and so is the gradient nearly."""
    logs = []
    for flags in ([], ["--compile"]):
        (tmp_path / f"with{len(flags)}").mkdir()
        logs.append(run_script(tmp_path / f"with{len(flags)}", "--reward", ORACLE, "--steps", "1", "--checkpointing", *flags, *SMALL,
                               processes=processes)[0])
    plain, compiled = logs
    assert compiled["ratio_dev"][0] < 1e-6 and compiled["loss"][0] == pytest.approx(plain["loss"][0], abs=1e-6)
    assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=2e-2)
