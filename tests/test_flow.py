"""Flow maths, sampler and shared-prefix training, against second formulations of the same equations."""

import math

import pytest
import torch

import model

SCHEDULER = dict(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=True, base_shift=0.5,
                 max_shift=0.9,
                 base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02,
                 time_shift_type="exponential",
                 invert_sigmas=False, stochastic_sampling=False, use_karras_sigmas=False,
                 use_exponential_sigmas=False, use_beta_sigmas=False)
TURBO = SCHEDULER | dict(use_dynamic_shifting=False, shift_terminal=None)
TURBO_SIGMAS = [1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568]
TRANSFORMER = dict(in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
                   context_in_dim=12, mlp_ratio=2, axes_dims_rope=(4, 6, 6), eps=1e-6)
GRID = (4, 6)
TOKENS = 24


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomise(network, seed):
    """Random weights, norms included, in place."""
    generator = torch.Generator().manual_seed(seed)
    for param in network.parameters():
        mean, scale = (1, 0.5) if param.ndim == 1 else (0, 1.2 / param.shape[1] ** 0.5)
        param.data.copy_(mean + scale * torch.randn(param.shape, generator=generator))
    return network


def make_prompt(seed, texts, sizes=()):
    """A prompt of len(texts) text runs with a source image of sizes[i] latents after run i."""
    slots = []
    for i, length in enumerate(texts):
        slots += [False] * length + ([True] * (sizes[i][0] * sizes[i][1] // 4) if i < len(sizes) else [])
    sources = [randn(4, *size, seed=100 * seed + i) for i, size in enumerate(sizes)]
    return model.EncodedPrompt(3 * randn(len(slots), 12, seed=seed), slots, sources)


@pytest.fixture
def network():
    return randomise(model.FlowTransformer(TRANSFORMER), 0)


# Schedule


def their_timesteps(scheduler, tokens, sigmas):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_shift

    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler)
    theirs.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens, *(scheduler[key] for key in keys)))
    return theirs.sigmas


@pytest.mark.parametrize("side", [256, 512, 1024, 2048])
@pytest.mark.parametrize("sample_sigmas", [None, TURBO_SIGMAS], ids=["40 steps", "sample_sigmas"])
@pytest.mark.parametrize("scheduler", [SCHEDULER, TURBO, TURBO | {"shift": 3.0}],
                         ids=["2.1", "Turbo", "shift 3"])
def test_timesteps_equal_diffusers_exactly(scheduler, sample_sigmas, side):
    tokens = (side // 16) ** 2
    sigmas = [1 - i / 40 for i in range(40)] if sample_sigmas is None else sample_sigmas
    ours = model.timesteps(scheduler, tokens, 40, sample_sigmas)
    assert torch.equal(ours, their_timesteps(scheduler, tokens, sigmas))


def test_timesteps_known_values():
    """The figures of a 1024 px image; four decimals."""
    t = model.timesteps(SCHEDULER, 4096)
    assert len(t) == 41 and t.dtype == torch.float32
    assert torch.allclose(t[[0, 1, 2, -3, -2, -1]], torch.tensor([1, 0.9870, 0.9736, 0.0679, 0.02, 0]),
                          atol=5e-5)


@pytest.mark.parametrize("flag",
                         ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
                                  "stochastic_sampling"])
def test_unsupported_schedules_are_refused(flag):
    with pytest.raises(model.UserError, match=flag):
        model.timesteps(SCHEDULER | {flag: True}, 256)


def test_linear_time_shift_is_refused():
    with pytest.raises(model.UserError, match="linear"):
        model.timesteps(SCHEDULER | {"time_shift_type": "linear"}, 256)


# Eq. 1-5


def test_ode_step_follows_a_straight_path():
    """Eq. 1-3 in float64: the exact velocity eps - x0 leads from x_t to x_{t+dt}, whatever dt; 1e-14."""
    x0, eps = randn(2, 5, 3, dtype=torch.float64), randn(2, 5, 3, seed=1, dtype=torch.float64)
    path = lambda t: (1 - t) * x0 + t * eps
    t = model.timesteps(SCHEDULER, 256, 10).double()
    for now, after in zip(t, t[1:]):
        mean, std = model.sde_mean_std(path(now), eps - x0, now, after - now,
                                       torch.zeros((), dtype=torch.float64))
        assert std == 0 and (mean - path(after)).abs().max() < 1e-14


def test_without_noise_the_step_is_eulers_bit_for_bit():
    x, v = randn(3, 7, 4), randn(3, 7, 4, seed=1)
    for t, dt in [(1.0, -0.02), (0.7, -0.1), (0.02, -0.02)]:
        t, dt = torch.tensor(t), torch.tensor(dt)
        mean, _ = model.sde_mean_std(x, v, t, dt, torch.tensor(0.0))
        assert torch.equal(mean, x + v * dt)


def test_sde_step_equals_the_form_with_the_score():
    """Eq. 5 in float64, 1e-12: the reverse-time SDE's drift is v - sigma^2/2 score, the score -E[eps|x]/t."""
    x, v = randn(3, 7, 4, dtype=torch.float64), randn(3, 7, 4, seed=1, dtype=torch.float64)
    t, dt = torch.tensor([0.95, 0.5, 0.1]).double()[:, None, None], torch.tensor(-0.03, dtype=torch.float64)
    sigma = torch.tensor([0.7, 0.4, 1.5]).double()[:, None, None]
    mean, std = model.sde_mean_std(x, v, t, dt, sigma)
    score = -(x + (1 - t) * v) / t  # x0 = x - t v, so eps = x + (1-t) v
    assert torch.allclose(mean, x + dt * (v - sigma**2 / 2 * score), rtol=0, atol=1e-12)
    assert torch.allclose(std**2, -dt * sigma**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("t, sigma", [(0.9, 2.0), (0.5, 0.7), (0.2, 0.7)])
def test_sde_step_preserves_the_marginal_variance(t, sigma):
    """Data N(0, 1): one step of dt = -0.01 from N(0, V(t)) gives V(t + dt) up to O(dt^2).

    Monte Carlo with 4e6 samples has a standard error below 6e-4; without the noise or without the score term
    the variance would be off by sigma^2 |dt| >= 4.9e-3.
    """
    variance = lambda t: (1 - t) ** 2 + t**2
    x = variance(t) ** 0.5 * randn(1, 4_000_000, 1)
    velocity = x * (2 * t - 1) / variance(t)  # E[eps - x0 | x_t] of jointly Gaussian variables
    mean, std = model.sde_mean_std(x, velocity, torch.tensor(t), torch.tensor(-0.01), torch.tensor(sigma))
    after = mean + std * randn(1, 4_000_000, 1, seed=1)
    assert abs(after.double().var().item() - variance(t - 0.01)) < 2.5e-3


def end_variance(steps, stochastic, noise_level):
    """Variance of x_0, and of the state after the first step, over the ODE's. Data N(0, 0.25), whose velocity
    is linear: exact.
    """
    t, found = model.timesteps(SCHEDULER, 1024, steps).double(), []
    for chosen in (stochastic, []):
        sigma, variance = model.noise_levels(t, list(chosen),
                                             noise_level), [torch.ones((), dtype=torch.float64)]
        for k in range(steps):
            velocity = (t[k] - (1 - t[k]) * 0.25) / ((1 - t[k])**2 * 0.25 + t[k]**2)  # E[eps - x0 | x] / x
            mean, std = model.sde_mean_std(1.0, velocity, t[k], t[k + 1] - t[k], sigma[k])
            variance.append(mean**2 * variance[-1] + std**2)
        found.append(torch.stack(variance))
    return (found[0][-1] / found[1][-1]).item(), (found[0][1] / found[1][1]).item()


def test_small_stochastic_steps_keep_the_marginals_but_for_the_first():
    """README: at t = 1, where t_1 stands in, the variance grows by a^4 / 4 (6% at 0.7, 52% at 1.2) even if
    steps are small.
    """
    assert end_variance(1000, range(1, 500), 0.7)[0] == pytest.approx(1, abs=0.01)
    for noise_level, bar in ((0.7, 1.06), (1.2, 1.52)):
        end, first = end_variance(1000, [0, 166, 333, 499], noise_level)
        assert first == pytest.approx(1 + noise_level**4 / 4, abs=0.01) and end == pytest.approx(bar,
                                                                                                 abs=0.02)
    assert end_variance(40, [0, 6, 13, 19], 0.7)[0] < 1.07
    for noise_level, bar in ((0.7, 1.29), (1.2, 1.66)):
        assert end_variance(8, [0, 1, 2, 3], noise_level)[0] == pytest.approx(bar, abs=0.01)


def test_mean_shift_is_the_derivative_of_the_mean():
    x, v = randn(2, 7, 4, dtype=torch.float64), randn(2, 7, 4, seed=1, dtype=torch.float64).requires_grad_()
    for step in ((1.0, -0.1, 2.0), (0.8, -0.05, 0.9), (0.3, -0.2, 0.1)):
        step = [torch.tensor(value, dtype=torch.float64) for value in step]
        mean, std = model.sde_mean_std(x, v, *step)
        (slope,) = torch.autograd.grad(mean.sum(), v)
        torch.testing.assert_close(-slope / std, model.mean_shift(*step).expand_as(v))


def test_noise_levels():
    """a sqrt(t/(1-t)) on the chosen steps, with t_1 in the place of t_0 = 1, else 0; relative 1e-5."""
    t = model.timesteps(SCHEDULER, 1024, 10)
    sigma = model.noise_levels(t, [0, 1, 4, 9], 0.7)
    formula = lambda t: 0.7 * math.sqrt(t.item() / (1 - t.item()))
    expected = torch.zeros(10)
    for step, time in {0: t[1], 1: t[1], 4: t[4], 9: t[9]}.items():
        expected[step] = formula(time)
    assert torch.allclose(sigma, expected, rtol=1e-5, atol=0)
    assert torch.equal(model.noise_levels(t, [], 0.7), torch.zeros(10))


# Sampler


def draws(key, count=2):
    generator = model.noise_stream(*key)
    return [torch.randn(TOKENS, 4, generator=generator) for _ in range(count)]


def test_noise_stream_depends_on_its_key_only():
    keys = [(0, 1, 2, 3), (1, 1, 2, 3), (0, 0, 2, 3), (0, 1, 3, 3), (0, 1, 2, 0), (0, 12, 3, 3),
            (0, 1, 23, 3)]
    first = {key: draws(key) for key in keys}
    torch.manual_seed(5)
    generators = {key: model.noise_stream(*key) for key in reversed(keys)}
    for number in range(2):  # the images take turns
        for key, generator in generators.items():
            assert torch.equal(torch.randn(TOKENS, 4, generator=generator), first[key][number])
    starts = torch.stack([noise[0].flatten() for noise in first.values()])
    assert (torch.cdist(starts, starts) + 99 * torch.eye(len(keys))).min() > 1


def make_pairs(before=(), sources=()):
    """Two prompts of different lengths, with the same text before the same source images; the first has two
    images.
    """
    a, b = ([make_prompt(seed + i, [*before, length], sources) for i, length in enumerate(lengths)]
            for seed, lengths in ((1, (5, 2)), (3, (8, 3))))
    return [a, a, b]


WITH_SOURCES = pytest.mark.parametrize("layout", [(), ([2], [(4, 2)])], ids=["text", "a source"])


def generators(count):
    return [model.noise_stream(0, 1, 2, image) for image in range(count)]


SCHEDULE = model.timesteps(SCHEDULER, TOKENS, 6)
MIXED = model.noise_levels(SCHEDULE, [0, 1, 3], 0.7)


def naive_sample(network, pairs, generators, t, sigma, cfg):
    """Every state of a plain loop over the steps; the prefixes are recomputed in each."""
    def prefix(side):
        first, second = pairs[0][side], pairs[-1][side]
        index = torch.tensor([int(pair[side] is second) for pair in pairs])
        return network.prefix([first, second], GRID)._replace(index=index)

    draw = lambda: torch.stack([torch.randn(TOKENS, 4, generator=g) for g in generators])
    states = [draw()]
    for k in range(len(sigma)):
        x, times = states[-1], t[k].repeat(len(pairs))
        v = network.velocity(x, times, prefix(0))
        if cfg != 1:
            u = network.velocity(x, times, prefix(1))
            v = u + cfg * (v - u)
        dt = t[k + 1] - t[k]
        if sigma[k] > 0:
            mean, std = model.sde_mean_std(x, v, t[k], dt, sigma[k])
            states.append(mean + std * draw())
        else:
            states.append(x + dt * v)
    return states


@WITH_SOURCES
@pytest.mark.parametrize("cfg", [1, 3])
@torch.no_grad()
def test_sampler_equals_a_naive_loop_bit_for_bit(network, cfg, layout):
    pairs = make_pairs(*layout)
    states = naive_sample(network, pairs, generators(3), SCHEDULE, MIXED, cfg)
    x, kept = model.Sampler(network, graphs=False)(pairs, generators(3), GRID, SCHEDULE, MIXED, cfg,
                                                   keep=range(7))
    assert sorted(kept) == list(range(7)) and torch.equal(x, kept[6][0])
    for k, state in enumerate(states):
        assert torch.equal(kept[k][0], state)


@torch.no_grad()
def test_kept_states_are_steps_of_the_sde(network):
    """x_{k+1} = mean + std noise, the noise being the next of the image's own stream; deterministic steps
    draw none.
    """
    pair, sampler = make_pairs()[0], model.Sampler(network, graphs=False)
    noise = draws((0, 1, 2, 0), 4)
    _, kept = sampler([pair], generators(1), GRID, SCHEDULE, MIXED, 1, keep=[0, 1, 2, 3, 4])
    assert torch.equal(kept[0][0][0], noise[0])
    for k, eps in {0: noise[1], 1: noise[2], 2: None, 3: noise[3]}.items():
        x, z = kept[k]
        v = network.velocity(x, SCHEDULE[k:k + 1], network.prefix([pair[0]], GRID))
        mean, std = model.sde_mean_std(x, v, SCHEDULE[k], SCHEDULE[k + 1] - SCHEDULE[k], MIXED[k])
        assert z is None if eps is None else torch.equal(z[0], eps)
        assert torch.equal(kept[k + 1][0], mean if eps is None else mean + std * eps)


@torch.no_grad()
def test_refilled_weights_act_through_the_same_buffers(network):
    sampler, arguments = model.Sampler(network, graphs=False), (GRID, SCHEDULE, MIXED, 3)
    before, _ = sampler(make_pairs(), generators(3), *arguments)
    (buffers,) = sampler.entries.values()
    randomise(network, 1)
    after, _ = sampler(make_pairs(), generators(3), *arguments)
    assert [id(b) for b in sampler.entries.values()] == [id(buffers)]
    fresh, _ = model.Sampler(network, graphs=False)(make_pairs(), generators(3), *arguments)
    assert torch.equal(after, fresh) and not torch.allclose(before, after, atol=1e-2)


@torch.no_grad()
def test_same_buffers_serve_other_prompts_of_the_same_shape(network):
    sampler, arguments = model.Sampler(network, graphs=False), (SCHEDULE, MIXED, 3)
    first, other = ((make_prompt(seed, [5]), make_prompt(seed + 1, [2])) for seed in (1, 7))
    sampler([first] * 2, generators(2), GRID, *arguments)
    for grid in (GRID, GRID[::-1]):  # the grid only moves positions
        x, _ = sampler([other] * 2, generators(2), grid, *arguments)
        fresh, _ = model.Sampler(network, graphs=False)([other] * 2, generators(2), grid, *arguments)
        assert torch.equal(x, fresh)
    assert len(sampler.entries) == 1


@torch.no_grad()
def test_shapes_take_turns_in_one_arena(network):
    """A longer prompt needs a larger arena, which sends every other entry away, unless it was made for the
    longest.
    """
    sampler, arguments = model.Sampler(network, graphs=False), (GRID, SCHEDULE, MIXED, 3)
    pairs = {length: (make_prompt(length, [length]), make_prompt(1, [2])) for length in (4, 9, 6)}
    for length, entries in ((4, 1), (9, 1), (6, 2), (4, 3), (9, 3), (6, 3)):
        x, _ = sampler([pairs[length]] * 2, generators(2), *arguments)
        fresh, _ = model.Sampler(network, graphs=False)([pairs[length]] * 2, generators(2), *arguments)
        assert torch.equal(x, fresh) and len(sampler.entries) == entries
    places = {kv.untyped_storage().data_ptr() for b in sampler.entries.values()
              for pair in b.cond.kv + b.uncond.kv for kv in pair}
    assert places == {sampler.arena.untyped_storage().data_ptr()}
    sampler = model.Sampler(network, graphs=False, longest=11)
    for length, entries in ((4, 1), (9, 2), (6, 3)):
        sampler([pairs[length]] * 2, generators(2), *arguments)
        assert len(sampler.entries) == entries


def test_a_batch_holds_one_prompt_unless_pictures_are_small():
    """Small ones share a batch with those of other prompts of the same image layout."""
    text, source = [(make_prompt(i, [i + 3]),) for i in range(3)], [(make_prompt(i, [2, i + 3], [(2, 2)]),)
                                                                    for i in range(2)]
    encoded = dict(enumerate(text + source))
    images = [(0, prompt, image) for prompt in encoded for image in range(3)]

    def prompts_of_batches(size, tokens):
        batches = list(model.split_batches(images, encoded, size, tokens))
        assert sum(batches, []) == images
        return [[prompt for _, prompt, _ in batch] for batch in batches]

    assert prompts_of_batches(2, 4096) == [[i] * n for i in range(5) for n in (2, 1)]
    assert prompts_of_batches(8, 4096) == [[i] * 3 for i in range(5)]
    assert prompts_of_batches(64, 16) == [[0] * 3 + [1] * 3 + [2] * 3, [3] * 3 + [4] * 3]
    assert prompts_of_batches(64, 256) == [[0] * 3 + [1], [1] * 2 + [2] * 2, [2], [3] * 3 + [4], [4] * 2]


def test_prompts_of_different_image_layouts_are_not_one_batch(network):
    for other in (make_prompt(2, [3, 4], [(2, 2)]), make_prompt(2, [2, 4], [(2, 4)]), make_prompt(2, [9])):
        with pytest.raises(ValueError, match="source images of the same sizes at the same places"):
            network.prefix([make_prompt(1, [2, 3], [(2, 2)]), other], GRID)


@pytest.mark.parametrize("rows", [[2] * 5, [0, 1, 2, 2, 0]], ids=["one prompt", "two prompts"])
@torch.no_grad()
@WITH_SOURCES
def test_splitting_a_batch_does_not_change_the_images(network, rows, layout):
    """Images sampled together, or two and then three; relative error 1e-5."""
    pairs, sampler = make_pairs(*layout), model.Sampler(network, graphs=False)
    pairs = [pairs[row] for row in rows]
    together, _ = sampler(pairs, generators(5), GRID, SCHEDULE, MIXED, 3)
    alone = [sampler(pairs[part], generators(5)[part], GRID, SCHEDULE, MIXED, 3)[0]
             for part in (slice(2), slice(2, 5))]
    assert together.std(0).mean() > 0.1
    assert (together - torch.cat(alone)).norm() < 1e-5 * together.norm()


# Training with a shared prefix


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", [([7],), ([3, 2, 5], [(4, 6), (2, 4)])], ids=["text", "two sources"])
def test_shared_prefix_gradients_equal_plain_autograd(network, layout, checkpointing):
    """Micro-batches on detached keys and values, then one prefix backward; relative error 1e-5 per parameter.
    """
    prompt = make_prompt(1, *layout)
    x, target, t = randn(5, TOKENS, 4), randn(5, TOKENS, 4, seed=1), torch.linspace(0.1, 1, 5)

    for i in range(5):
        (network.velocity(x[i:i + 1], t[i:i + 1],
                          network.prefix([prompt], GRID)) - target[i:i + 1]).pow(2).sum().backward()
    expected = {name: param.grad for name, param in network.named_parameters()}
    network.zero_grad(set_to_none=True)

    network.checkpointing = checkpointing
    prefix = network.prefix([prompt], GRID)
    leaves = model.detach_prefix(prefix)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        (network.velocity(x[rows], t[rows], leaves) - target[rows]).pow(2).sum().backward()
    assert all(param.grad is None for param in network.txt_in.parameters())
    model.backward_prefixes([prefix], [leaves])

    for name, param in network.named_parameters():
        assert expected[name].norm() > 0, name
        assert (param.grad - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_prompts_with_and_without_images_give_gradients_to_the_same_parameters(network):
    """Ranks reduce gradients together, and one may have a text prompt where another has an edit."""
    sets = []
    for prompt in (make_prompt(1, (5,)), make_prompt(2, (3, 2), ((2, 2),))):
        network.zero_grad(set_to_none=True)
        sum(x.sum() for kv in network.prefix([prompt], GRID).kv for x in kv).backward()
        sets.append({name for name, param in network.named_parameters() if param.grad is not None})
    assert sets[0] == sets[1] and "img_in.weight" in sets[0]
