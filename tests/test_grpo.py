"""grpo.py: its equations against second formulations, and the script itself in one process and in two."""

import numpy as np
import pytest
import torch

import model
from grpo import group_advantage, grpo_loss, kl_loss, trained_steps
from model import mean_shift, sde_mean_std
from runs import ORACLE, ROOT, SMALL, checkpoint, run_script

# Equations


def test_advantage_is_the_weighted_sum_of_group_z_scores():
    scores, weights = torch.randn(3, 5, 8) * torch.tensor([1.0, 10.0, 0.01])[:, None,
                                                                             None] + 3, torch.tensor([0.5,
                                                                                                      0.3,
                                                                                                      0.2])
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


def log_prob(x_next, x, v, t, dt, sigma):
    """Of a stochastic step, per dimension: the reverse-time SDE written through the score of the marginal."""
    score = -(x + (1 - t) * v) / t
    return torch.distributions.Normal(x + (v - sigma**2 / 2 * score) * dt,
                                      sigma * (-dt) ** 0.5).log_prob(x_next)


def loss_inputs():
    torch.manual_seed(0)
    v_old, x, z = torch.randn(3, 6, 16, 4, dtype=torch.float64)
    t, dt, sigma = (torch.full((6, 1, 1), value, dtype=torch.float64) for value in (0.8, -0.1, 0.9))
    return v_old, x, z, (t, dt, sigma), torch.randn(6, dtype=torch.float64)


def test_printed_loss_equals_the_clipped_surrogate_with_torch_distributions():
    """Eq. 6 with the joint density, at the state to which the noise leads from the old policy's mean."""
    v_old, x, z, step, advantage = loss_inputs()
    v = v_old + torch.tensor([0.001, 0.002, 0.02, 0.03, 0.05, 0.1])[:, None, None] * torch.randn_like(v_old)
    loss, ratio = grpo_loss(v, v_old, z, mean_shift(*step), advantage, 0.02)
    mean_old, std = sde_mean_std(x, v_old, *step)
    x_next = mean_old + std * z
    r = (log_prob(x_next, x, v, *step) - log_prob(x_next, x, v_old, *step)).sum((1, 2)).exp()
    expected = torch.stack([-min(r_i * a, max(min(r_i, 1.02), 0.98) * a)
                            for r_i, a in zip(r, advantage)]).sum()
    torch.testing.assert_close(ratio, r)
    torch.testing.assert_close(loss, expected)
    assert ((r - 1).abs() > 0.02).any() and ((r - 1).abs() < 0.02).any()  # both branches of the clip were met


def test_gradient_at_ratio_one_is_reinforce():
    v_old, x, z, step, advantage = loss_inputs()
    v = v_old.clone().requires_grad_()
    loss, ratio = grpo_loss(v, v_old, z, mean_shift(*step), advantage, 1e-3)
    assert (ratio == 1).all()
    w = v_old.clone().requires_grad_()
    mean_old, std = sde_mean_std(x, v_old, *step)
    logp = log_prob(mean_old + std * z, x, w, *step).sum((1, 2))
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0],
                               torch.autograd.grad(-(advantage * logp).sum(), w)[0])


@pytest.mark.parametrize("w, bias", [(1.0, 0.0), (2.0, 0.143), (4.0, 0.004)])
def test_hybrid_gradient_is_that_of_the_guided_sampler(w, bias):
    """One dimension, v_c = theta x + 0.3 trained, v_u = -0.2 x frozen, two stochastic steps and two of the
    ODE, reward -(x_0 - 1)^2.

    Everything is a polynomial in the initial and the two steps' noises, so that Gauss-Hermite quadrature is
    exact: the loss's gradient is 1/w of the expected reward's, which is differentiated through the sampler
    itself. That of the unguided densities at the sampled states is biased.
    """
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(6))
    noise = torch.cartesian_prod(nodes, nodes, nodes).T                              # x_1, z_1, z_2  (3, 216)
    weights = torch.cartesian_prod(weights, weights, weights).prod(1) / (2 * torch.pi) ** 1.5
    t = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.0], dtype=torch.float64)
    sigma = model.noise_levels(t, [0, 1], 0.7).double()

    def sample(theta):
        x, states = noise[0], []
        for k in range(4):
            v_c = (theta if k < 2 else theta.detach()) * x + 0.3  # the loss is of the stochastic steps alone
            mean, std = sde_mean_std(x, -0.2 * x + w * (v_c + 0.2 * x), t[k], t[k + 1] - t[k], sigma[k])
            states.append(x)
            x = mean + std * noise[k + 1] if k < 2 else mean
        reward = -((x - 1) ** 2)
        return reward - (weights * reward).sum().detach(), states  # less its mean, as an advantage is

    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad((weights * sample(theta)[0]).sum(), theta)
    reward, states = sample(theta.detach())
    found = {}
    for name in ("printed", "default"):
        rows = [((theta * x + 0.3)[:, None, None], noise[k + 1][:, None, None],
                 mean_shift(t[k], t[k + 1] - t[k], sigma[k]))
                for k, x in enumerate(states[:2])]
        losses = [grpo_loss(v, v.detach(), z, kappa if name == "printed" else 1.0, weights * reward, 0.1)[0]
                  for v, z, kappa in rows]
        found[name] = [torch.autograd.grad(-loss, theta, retain_graph=True)[0] for loss in losses]
    assert abs(exact) > 1e-3 and w * sum(found["printed"]).item() == pytest.approx(exact.item(), rel=1e-10)
    # the default drops kappa_t, the weight of a step, and nothing else
    for a, b, (*_, kappa) in zip(*found.values(), rows):
        torch.testing.assert_close(a, kappa * b)
    sampled = [log_prob(states[k + 1], x, theta * x + 0.3, t[k], t[k + 1] - t[k], sigma[k])
               for k, x in enumerate(states[:2])]
    (displaced,) = torch.autograd.grad((weights * reward * sum(sampled)).sum(), theta)
    assert (w * displaced / exact - 1).item() == pytest.approx(bias, abs=1e-3)


def test_hybrid_gradient_on_the_tiny_model():
    """Equals 1/w of that of the guided policy's log-density at the sampled states, whose unconditional branch
    is left alone.
    """
    root, w, steps = ROOT / "tests" / "tiny" / "model", 3.0, [0, 2]
    network = model.materialise(model.new_transformer(root, torch.float32), root, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    pair = tuple(model.EncodedPrompt(torch.randn(n, network.config["context_in_dim"], generator=generator),
                              [False] * n, []) for n in (7, 3))
    grid, t, _ = model.sampling_settings(root, (64, 64), 6)
    sigma, generators = model.noise_levels(t, steps, 0.7), [model.noise_stream(0, 0, 0, g)
                                                            for g in range(4)]
    _, states = model.Sampler(network, graphs=False)([pair] * 4, generators, grid, t, sigma, w, [0, 1, 2, 3])
    advantage, gradients = torch.tensor([1.0, -0.5, 0.25, -0.75]), []
    for hybrid in (True, False):
        prefixes, total = [network.prefix([prompt], grid) for prompt in pair], 0.0
        for k in steps:
            x, z, x_next = *states[k], states[k + 1][0]
            step = t[k], t[k + 1] - t[k], sigma[k]
            v = network.velocity(x, t[k].expand(4), prefixes[0])
            if hybrid:
                total += grpo_loss(v, v.detach(), z, mean_shift(*step), advantage, 0.1)[0]
            else:
                u = network.velocity(x, t[k].expand(4), prefixes[1]).detach()
                total -= (advantage * log_prob(x_next, x, u + w * (v - u), *step).sum((1, 2))).sum() / w
        found = torch.autograd.grad(total, [*network.transformer_blocks.parameters()])
        gradients.append(torch.cat([g.flatten() for g in found]))
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3 * gradients[0].abs().max().item())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9999


@pytest.mark.parametrize("tokens, channels", [(16, 16), (1024, 64), (4096, 64)])
def test_the_spread_of_the_ratio_is_the_change_of_velocity(tokens, channels):
    """Whatever the resolution: an rms change of 0.03 spreads the log-ratio by 0.03, around a mean that does
    not matter.
    """
    generator = torch.Generator().manual_seed(0)
    v, parts = 0.03 * torch.randn(1, tokens, channels, generator=generator), []
    for _ in range(10):
        z = torch.randn(30, tokens, channels, generator=generator)
        parts.append(grpo_loss(v, torch.zeros(()), z, (tokens * channels) ** -0.5, torch.ones(30), 0.1)[1])
    ratio = torch.cat(parts)
    assert ratio.log().std().item() == pytest.approx(0.03, rel=0.1) and abs(ratio.log().mean().item()) < 0.006


def test_kl_is_the_mean_square_velocity_difference():
    v, v_ref = torch.randn(2, 6, 16, 4)
    torch.testing.assert_close(kl_loss(v, v_ref), ((v - v_ref) ** 2).sum() / (16 * 4))


def test_trained_steps_prefer_high_noise():
    assert trained_steps("3", 8) == [0, 2, 3] and trained_steps("1", 8) == [0] and trained_steps("4",
                                                                                                 40) == [0, 6,
                                                                                                         13,
                                                                                                         19]
    assert trained_steps("half", 8) == [0, 1, 2, 3] and trained_steps("all", 3) == [0, 1, 2]
    assert trained_steps("5,0,", 8) == [0, 5]
    for spec in ("5", "0", "-1", "x", "", ",", "8,", "0,-1", "0,1,2-5", "0,,2"):
        with pytest.raises(model.UserError, match=f"--train-timesteps {spec}: want 1 to 4"):
            trained_steps(spec, 8)


def test_prompts_of_a_step_depend_on_seed_and_step_alone_and_are_shared_out_evenly():
    epoch = sorted(i for step in range(4) for i in model.prompt_ids(step, 32, 8, seed=3))
    assert epoch == list(range(32))
    assert model.prompt_ids(5, 32, 8, 3) == model.prompt_ids(5, 32, 8, 3) != model.prompt_ids(5, 32, 8, 4)
    ids = model.prompt_ids(0, 32, 8, 3)
    one, two = model.rank_share(ids, 2, 0, 1), [model.rank_share(ids, 2, rank, 2) for rank in (0, 1)]
    assert sorted(one) == ids and [sorted(two[0][u] + two[1][u])
                                   for u in (slice(2), slice(2, 4))] == [one[:4], one[4:]]


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
    for name in ("args.json", "curve.png", "samples/000000.png", "model/model_index.json",
                 "model/vae/config.json",
                 "model/transformer/diffusion_pytorch_model.safetensors"):
        assert (run / name).stat().st_size > 0


def test_two_processes_agree_with_one(tmp_path):
    """The first gradient's norm to 1e-5, Adam's first moments after four updates to 1e-3, log lines to three
    digits.

    A group is a rollout batch, so that both sample the same states; other batch shapes round differently.
    """
    folders, logs = [tmp_path / "one", tmp_path / "two"], []
    for processes, folder in enumerate(folders, 1):
        folder.mkdir()
        logs.append(run_script(folder, "--reward", ORACLE, "--steps", "2", *SMALL, "--rollout-batch", "4",
                               processes=processes))
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


def test_a_frozen_network_that_differs_from_the_policy_is_seen_in_the_first_ratio(tmp_path):
    code = ("import sys, torch, grpo\n"
            "gather_weights = grpo.gather_weights\n"
            "def perturbed(network, shards):\n"
            "    gather_weights(network, shards)\n"
            "    network.proj_out.weight.data.mul_(1.001)\n"
            "grpo.gather_weights = perturbed\n"
            "grpo.main(sys.argv[1:])\n")
    (line,) = run_script(tmp_path, "--reward", ORACLE, "--steps", "1", *SMALL, code=code)
    assert line["ratio_dev"][0] > 0


def test_editing_with_the_kl_and_several_rewards(tmp_path):
    (line,) = run_script(
        tmp_path, "--reward", ORACLE, f"alignment={ROOT / 'tests/tiny/world.py'}:alignment_reward", "--steps",
        "1", "--kl-coef", "0.1",
        "--prompts", str(ROOT / "tests/tiny/edits.jsonl"), "--eval-prompts",
        str(ROOT / "tests/tiny/edits_heldout.jsonl"),
        "--micro-batch", "5", "--rollout-batch", "6", "--checkpointing", "--cudnn", *SMALL)
    assert line["ratio_dev"][0] == line["kl"][0] == 0.0 < line["kl"][1]
    assert set(line["reward"]) == {"aesthetic", "alignment"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_compiled_blocks_train_the_same(tmp_path, processes):
    """With recomputed activations; frozen network and policy are compiled alike, so the first ratio is still
    1, and so is the gradient nearly.
    """
    logs = []
    for flags in ([], ["--compile"]):
        (tmp_path / f"with{len(flags)}").mkdir()
        logs.append(run_script(tmp_path / f"with{len(flags)}", "--reward", ORACLE, "--steps", "1",
                               "--checkpointing", *flags, *SMALL,
                               processes=processes)[0])
    plain, compiled = logs
    assert compiled["ratio_dev"][0] < 1e-6 and compiled["loss"][0] == pytest.approx(plain["loss"][0],
                                                                                    abs=1e-6)
    assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=2e-2)
