"""Every patch in tests/forks applies to the scripts as they are, trains, and its equation is what its header
says, in a second form.
"""

import importlib.util
import math
import sys

import pytest
import reproduce
import torch
from PIL import Image
from runs import ORACLE, ROOT, SMALL, read_log, start_script

FORKS = sorted(path.stem for path in (ROOT / "tests" / "forks").glob("*.patch"))
FLAGS = {"mixgrpo": ["--window-every", 1], "dpo": ["--kl-coef", 0]}
REWARD = {"refl": f"palette={ROOT / 'tests/forks/palette.py'}:palette"}


@pytest.fixture(scope="module", params=FORKS)
def fork(request, tmp_path_factory):
    """The name of a fork, and its script."""
    patch = ROOT / f"tests/forks/{request.param}.patch"
    return request.param, reproduce.patched(patch, tmp_path_factory.mktemp("forks") / request.param)


def test_it_trains(fork):
    name, script = fork
    printed, failed = start_script(script.parent, "--reward", REWARD.get(name, ORACLE), "--steps", 2, *SMALL,
                                   *FLAGS.get(name, ()), script=script)
    assert not failed, printed[-3000:]
    log = read_log(script.parent)
    assert len(log) == 2 and all(min(line["grad_norm"]) > 0 and not line["skipped_updates"] for line in log)


def imported(script):
    """A fork's script as a module, with the fork's own model.py."""
    before = sys.modules.pop("model")
    try:
        for part in ("model", script.stem):
            spec = importlib.util.spec_from_file_location(part, script.with_name(f"{part}.py"))
            module = importlib.util.module_from_spec(spec)
            if part == "model":
                sys.modules["model"] = module
            spec.loader.exec_module(module)
        return module
    finally:
        sys.modules["model"] = before


def test_its_equation(fork):
    name, script = fork
    torch.manual_seed(0)
    EQUATIONS[name](imported(script))


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def awm(script):
    v, v_old, target, a = random(5, 4, 3), random(5, 4, 3), random(5, 4, 3), random(5)
    v_old = v + 0.1 * v_old
    total = plain = 0
    for i in range(5):
        ratio = math.exp(((v_old[i] - target[i])**2).mean() - ((v[i] - target[i])**2).mean())
        total -= min(ratio * a[i], min(max(ratio, 0.99), 1.01) * a[i])
        plain -= ratio * a[i]
    assert script.awm_loss(v, v_old, target, a, 0.01).item() == pytest.approx(float(total))
    assert abs(total - plain) > 1e-3  # the clip acts


def guard(script):
    """The log-ratio is that of two normal densities less its expectation under the old one."""
    v, v_old, z, a, weight = random(5, 4, 3), random(5, 4, 3), random(5, 4, 3), random(5), random(5).exp()
    kappa = torch.tensor(12.0, dtype=torch.float64) ** -0.5
    new, old = (torch.distributions.Normal(-kappa * u, 1) for u in (v, v_old))
    x = old.mean + z
    log_ratio = (new.log_prob(x) - old.log_prob(x)).sum((1, 2))
    log_ratio += torch.distributions.kl_divergence(old, new).sum((1, 2))
    ratio = log_ratio.exp()
    expected = -(weight * torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a)).sum()
    loss, found = script.grpo_loss(v, v_old, z, kappa, a, 0.1, weight)
    torch.testing.assert_close(found, ratio)
    assert loss.item() == pytest.approx(expected.item())
    # Guard's gradient of a step, z kappa_t sigma sqrt(dt) / dt, is that of z/sqrt(D) but for the weight
    run = script.SimpleNamespace(args=script.SimpleNamespace(noise_level=0.7, printed_ratio=False), T=8, G=2,
                                 t=torch.linspace(1, 0, 9), trained=[0, 1, 2, 3], shape=(4, 3), P=2, U=2,
                                 device="cpu", micro_batch=8, world=1)
    script.make_schedule(run)
    dt = -run.t.diff()
    guards = script.mean_shift(run.t[:-1], -dt, run.sigma) * run.sigma * dt.sqrt() / dt
    torch.testing.assert_close(run.step_weight[:4], guards[:4] / guards[:4].mean())


def mixgrpo(script):
    windows = [script.window(4, step, 15, 8) for step in (0, 14, 15, 44, 45, 1000)]
    assert windows == [[0, 1, 2, 3]] * 2 + [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6], [3, 4, 5, 6]]
    with pytest.raises(script.UserError, match="at most 7 of 8 steps"):
        script.window(8, 0, 15, 8)


def cps(script):
    """Image and noise keep their amounts, known here; without noise it is Euler's step."""
    functions = script.mean_shift.__globals__  # of the fork's model.py
    sde_mean_std, mean_shift = functions["sde_mean_std"], functions["mean_shift"]
    x0, x1, t, dt, sigma, none = random(1, 4, 3), random(1, 4, 3), *torch.tensor([0.8, -0.1, 0.6, 0]).double()
    x, v = (1 - t) * x0 + t * x1, (x1 - x0).requires_grad_()
    mean, std = sde_mean_std(x, v, t, dt, sigma)
    torch.testing.assert_close(mean, 0.3 * x0 + (0.7**2 - std**2).sqrt() * x1)
    assert std.item() == pytest.approx(0.7 * 0.6)
    torch.testing.assert_close(sde_mean_std(x, v, t, dt, none)[0], x + v * dt)
    (moved,) = torch.autograd.grad(mean.sum(), v)
    torch.testing.assert_close(moved, (-mean_shift(t, dt, sigma) * std).expand_as(moved))


def dpo(script):
    v, v_ref, target = random(6, 4, 3), random(6, 4, 3), random(6, 4, 3)
    change = [((v[i] - target[i])**2).mean() - ((v_ref[i] - target[i])**2).mean() for i in range(6)]
    expected = sum(math.log(1 + math.exp(2.0 * (change[i] - change[i + 3]))) for i in range(3))
    assert script.dpo_loss(v, v_ref, target, 2.0).item() == pytest.approx(expected)


def refl(script):
    """The gradient is -dR/dx0 dx0/dv, and dx0/dv is -t."""
    x, t = random(2, 4, 3), torch.tensor([0.5, 0.25], dtype=torch.float64)[:, None, None]
    v = random(2, 4, 3).requires_grad_()
    decode = lambda latents: latents.mT.unflatten(2, (2, 2))
    weights = random(3, 2, 2)
    script.refl_loss(v, x, t, decode, lambda pixels: (pixels * weights).sum((1, 2, 3))).backward()
    torch.testing.assert_close(v.grad, t / 2 * weights.flatten(1).T.expand(2, 4, 3))
    spec = importlib.util.spec_from_file_location("palette", ROOT / "tests/forks/palette.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pixels = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
    found = module.palette.pixels(pixels / 255)
    torch.testing.assert_close(found, torch.tensor(module.palette(images, [""] * 3)), rtol=1e-4, atol=1e-4)


def lora(script):
    """Active adapters and merged weights are one network; fresh ones are the base to the bit."""
    import make

    base = script.materialise(script.new_transformer(make.OUT, torch.float32), make.OUT, "cpu")
    prompts = [script.mean_shift.__globals__["EncodedPrompt"](torch.randn(7, 96), [False] * 7, [])]
    x, t = torch.randn(2, 16, 16), torch.tensor([0.9, 0.3])
    velocity = lambda: base.velocity(x, t, base.prefix(prompts, (4, 4))).detach()
    before, weights = velocity(), [param.detach().clone() for param in base.parameters()]
    adapters = script.Adapters(base, 8, seed=0)
    adapters.active = True
    assert torch.equal(velocity(), before)
    for b in adapters.b.values():
        torch.nn.init.normal_(b, std=0.02)
    apart, adapters.active = velocity(), False
    assert torch.equal(velocity(), before) and (apart - before).abs().max() > 0.01
    names = [name for name, _ in base.named_parameters()]
    for param, merged in zip(base.parameters(), adapters.merged(names, weights, 0, 1)):
        param.data.copy_(merged)
    torch.testing.assert_close(velocity(), apart, rtol=0, atol=1e-4)
    halves = [[weight.chunk(2)[rank] for weight in weights] for rank in (0, 1)]
    rows = zip(*(adapters.merged(names, half, rank, 2) for rank, half in enumerate(halves)))
    for param, two in zip(base.parameters(), rows):
        torch.testing.assert_close(torch.cat(two), param)
    assert len(adapters.a) == 7 * len(base.transformer_blocks)


def rawsum(script):
    scores = torch.randn(2, 3, 8) * torch.tensor([1.0, 10])[:, None, None]
    weights = torch.tensor([[0.3], [0.7]])
    summed = 0.3 * scores[0].double() + 0.7 * scores[1].double()
    expected = (summed - summed.mean(1, keepdim=True)) / summed.std(1, keepdim=True, correction=0)
    found = script.group_advantage(scores, weights.expand(2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    scores[0, 1, 4] = script.FAILED
    assert script.group_advantage(scores, weights.expand(2, 3))[1, 4] == 0


EQUATIONS = {function.__name__: function for function in (awm, guard, mixgrpo, cps, dpo, refl, lora, rawsum)}


def test_every_fork_is_checked_and_says_what_it_is():
    assert set(EQUATIONS) == set(FORKS)
    for name in FORKS:
        header, _, patch = (ROOT / f"tests/forks/{name}.patch").read_text().partition("\ndiff --git")
        assert len(header.splitlines()) <= 12 and max(map(len, header.splitlines())) <= 115
        assert all(word in header for word in ("Paper:", "Equation:", "Changes:", "Found:", "Use: git apply"))
        changed = [line for line in patch.splitlines()
                   if line.startswith(("+", "-")) and not line.startswith(("+++", "---"))]
        assert len(changed) <= (120 if name == "lora" else 60)
