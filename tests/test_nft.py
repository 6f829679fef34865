"""nft.py: its equations against second formulations, and what enters a checkpoint."""

import pytest
import torch

from nft import draw_steps, nft_loss, optimality
from runs import ORACLE, SMALL, checkpoint, run_script


def loss_inputs(count=6):
    torch.manual_seed(0)
    return *torch.randn(3, count, 16, 4, dtype=torch.float64), torch.rand(count, dtype=torch.float64)


def test_loss_is_equation_8_element_by_element():
    v, v_old, v_target, r = loss_inputs()
    expected, beta = 0.0, 0.7
    for b in range(6):
        for new, old, target in zip(v[b].flatten().tolist(), v_old[b].flatten().tolist(),
                                    v_target[b].flatten().tolist()):
            plus, minus = beta * new + (1 - beta) * old, (1 + beta) * old - beta * new
            expected += (r[b].item() * (plus - target) ** 2 + (1 - r[b].item()) * (minus - target) ** 2) / 64
    assert nft_loss(v, v_old, v_target, r, beta).item() == pytest.approx(expected)


def gradient(v_old, v_target, r, beta):
    v = v_old.clone().requires_grad_()
    return torch.autograd.grad(nft_loss(v, v_old, v_target, r, beta), v)[0]


def test_gradient_where_nothing_has_moved_yet():
    """2 beta (2r - 1) (v_old - v_target), for the mean over 64 dimensions; r and 1 - r are opposites, r = 1/2
    is indifferent.
    """
    _, v_old, v_target, r = loss_inputs()
    grad = gradient(v_old, v_target, r, 0.7)
    torch.testing.assert_close(grad, 2 * 0.7 * (2 * r - 1)[:, None, None] * (v_old - v_target) / 64)
    torch.testing.assert_close(gradient(v_old, v_target, 1 - r, 0.7), -grad)
    good, bad = (gradient(v_old, v_target, torch.full_like(r, value), 0.7) for value in (1.0, 0.0))
    # descent goes towards the target, or away
    assert (good * (v_old - v_target)).min() >= 0 and (good + bad).abs().max() < 1e-12
    assert gradient(v_old, v_target, torch.full_like(r, 0.5), 0.7).abs().max() < 1e-12


def test_a_shift_common_to_a_group_cancels():
    """Difference 4: an offset that guidance gives to all targets of a group adds nothing to the group's
    gradient on a shared v.
    """
    v_old = torch.randn(1, 16, 4, dtype=torch.float64).expand(8, -1, -1)
    v_target, shift = torch.randn(2, 8, 16, 4, dtype=torch.float64)
    # beyond 2 std, as one of 8 can be
    advantage = torch.randn(8, dtype=torch.float64).index_fill(0, torch.tensor([0]), 9.0)
    r = optimality((advantage - advantage.mean()) / advantage.std(correction=0), 7**0.5)
    plain, shifted = (gradient(v_old, target, r, 1.0).sum(0) for target in (v_target, v_target + shift[:1]))
    torch.testing.assert_close(plain, shifted)


def test_optimality_maps_clipped_advantages_to_0_1():
    assert optimality(torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.0, 5.0]), 2.0).tolist() == [0, 0, 0.25, 0.5,
                                                                                         0.75, 1]


def test_drawn_steps_are_stratified(monkeypatch):
    generator, steps = torch.Generator().manual_seed(0), list(range(20))
    drawn = torch.tensor([draw_steps(steps, 4, generator) for _ in range(400)])
    assert all(((drawn[:, m] >= 5 * m) & (drawn[:, m] < 5 * m + 5)).all() for m in range(4))
    assert drawn.flatten().bincount(minlength=20).min() > 40  # 80 expected
    assert draw_steps([3, 5], 2, generator) == [3, 5] and set(draw_steps([7], 3, generator)) == {7}
    # the largest number there is
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1 - 2**-24))
    assert draw_steps(steps, 4, None)[-1] == 19


# The script


def old_and_new(folder):
    state = checkpoint(folder)
    return [torch.cat([value.flatten() for value in state[kind].values()]) for kind in ("old", "model")]


def test_the_old_policy_follows_by_its_schedule(tmp_path):
    arguments = ["--reward", ORACLE, *SMALL]
    run_script(tmp_path, *arguments, "--steps", "1", script="nft.py")
    first, weights = old_and_new(tmp_path)
    torch.testing.assert_close(first, weights, rtol=0, atol=1e-7)  # d = 0 in the first step
    run_script(tmp_path, *arguments, "--steps", "2", "--resume", script="nft.py")
    second, weights = old_and_new(tmp_path)
    torch.testing.assert_close(second, first / 11 + weights * 10 / 11, rtol=0, atol=1e-6)
    assert (second - weights).abs().max() > 1e-6


def test_loss_does_not_depend_on_micro_batch(tmp_path):
    logs = []
    for name, extra in (("one", []), ("micro", ["--micro-batch", "3"])):
        (tmp_path / name).mkdir()
        logs += run_script(tmp_path / name, "--reward", ORACLE, "--steps", "1", *SMALL, *extra,
                           script="nft.py")
    one, micro = logs
    assert micro["velocity_shift"][0] == 0.0 == micro["kl"][0] < micro["kl"][1]
    assert micro["loss"][0] == pytest.approx(one["loss"][0], rel=1e-6)
    assert micro["grad_norm"][0] == pytest.approx(one["grad_norm"][0], rel=1e-5)
