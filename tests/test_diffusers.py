"""Numeric agreement with diffusers: random weights (norm weights too, their defaults hide bugs), fp32."""

import pytest
import torch

import model

diffusers = pytest.importorskip("diffusers")
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import AutoencoderKLQwenImage21  # noqa: E402
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Transformer2DModel  # noqa: E402

TRANSFORMER = dict(patch_size=1, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=32,
                   num_attention_heads=4, context_in_dim=24, mlp_ratio=3, axes_dims_rope=(8, 12, 12), eps=1e-6)


def randomise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.5 if parameter.ndim == 1 else 1.2 / parameter[0].numel() ** 0.5
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return module.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def transformers():
    theirs = randomise(QwenImage21Transformer2DModel(**TRANSFORMER), 0)
    ours = model.FlowTransformer(dict(theirs.config)).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def make_prompt(seed, texts, sizes):
    """A prompt of len(texts) text runs with an image of sizes[i] latents after run i."""
    generator = torch.Generator().manual_seed(seed)
    slots = []
    for i, length in enumerate(texts):
        slots += [False] * length + ([True] * (sizes[i][0] * sizes[i][1] // 4) if i < len(sizes) else [])
    embeds = 3 * torch.randn(len(slots), 24, generator=generator)
    return model.Prompt(embeds, slots, [torch.randn(16, *size, generator=generator) for size in sizes])


def their_velocity(theirs, x, t, prompt, grid):
    target = grid[0] * grid[1]
    hidden = torch.cat([s.flatten(1).T for s in prompt.sources] + [x[0]])[None]
    shapes = [[(1, *s.shape[-2:]) for s in prompt.sources] + [(1, *grid)]]
    mask = torch.tensor([prompt.slots + [True] * (target // 4)])
    out = theirs(hidden, prompt.embeds[None], t, shapes, mask, return_dict=False)[0]
    return out[:, -target:]


LAYOUTS = {"text": ([7], []), "one source": ([3, 9], [(4, 6)]), "two sources": ([3, 2, 8], [(4, 6), (8, 4)]),
           "adjacent sources": ([3, 0, 8], [(4, 4), (2, 4)])}


@pytest.mark.parametrize("name", LAYOUTS)
def test_velocity(transformers, name):
    ours, theirs = transformers
    prompt = make_prompt(1, *LAYOUTS[name])
    for grid in [(4, 4), (6, 4)]:
        x, t = torch.randn(1, grid[0] * grid[1], 16), torch.tensor([0.7])
        assert relative(ours(x, t, [prompt], grid), their_velocity(theirs, x, t, prompt, grid)) < 1e-5


def test_velocity_of_a_padded_batch_equals_single_runs(transformers):
    """Prompts of different lengths and layouts in one batch, several images and timesteps per prompt."""
    ours, theirs = transformers
    prompts = [make_prompt(i, *layout) for i, layout in enumerate(LAYOUTS.values())]
    x, t = torch.randn(12, 16, 16), torch.linspace(0.05, 1, 12)
    index = torch.arange(4).repeat_interleave(3)
    v = ours.velocity(x, t, ours.prefix(prompts, (4, 4))._replace(index=index))
    for i in range(12):
        assert relative(v[i:i + 1], their_velocity(theirs, x[i:i + 1], t[i:i + 1], prompts[index[i]], (4, 4))) < 1e-5


@pytest.mark.parametrize("mult, blocks", [([1, 2, 4, 8, 8], 2), ([1, 1, 1, 1, 1], 1)])
def test_vae(mult, blocks):
    config = dict(base_dim=4, decoder_base_dim=8, z_dim=6, dim_mult=mult, num_res_blocks=blocks, attn_scales=[],
                  latents_mean=[0.1 * i for i in range(6)], latents_std=[1 + 0.1 * i for i in range(6)])
    theirs = randomise(AutoencoderKLQwenImage21(**config), 0)
    ours = model.VAE(dict(theirs.config)).requires_grad_(False)
    state = {k: v for k, v in theirs.state_dict().items() if "time_conv" not in k}
    ours.load_state_dict(state)
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("latents_mean", "latents_std"))
    images = torch.rand(2, 4, 64, 96) * 2 - 1
    latents = (theirs.encode(images[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    assert relative(ours.encode(images), latents) < 1e-4
    decoded = theirs.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    assert decoded.abs().max() < 1 or decoded.std() > 0.1
    assert (ours.decode(latents) - decoded).abs().max() < 1e-4
