"""Numeric agreement with diffusers: random weights (norm weights too, their defaults hide bugs), fp32."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

import model

diffusers = pytest.importorskip("diffusers")
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import AutoencoderKLQwenImage21
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Transformer2DModel

TRANSFORMER = dict(patch_size=1, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=32,
                   num_attention_heads=4, context_in_dim=24, mlp_ratio=3, axes_dims_rope=(8, 12, 12),
                   eps=1e-6)
TINY = Path(__file__).resolve().parent / "tiny" / "model"


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
    return model.EncodedPrompt(embeds, slots, [torch.randn(16, *size, generator=generator) for size in sizes])


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
        assert relative(ours.velocity(x, t, ours.prefix([prompt], grid)),
                        their_velocity(theirs, x, t, prompt, grid)) < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_velocity_of_a_padded_batch_equals_single_runs(transformers, name):
    """Prompts of different lengths in one batch, several images and timesteps per prompt."""
    ours, theirs = transformers
    (*before, length), sources = LAYOUTS[name]
    prompts = [make_prompt(i, [*before, length - 2 * i], sources) for i in range(4)]
    x, t = torch.randn(12, 16, 16), torch.linspace(0.05, 1, 12)
    index = torch.arange(4).repeat_interleave(3)
    v = ours.velocity(x, t, ours.prefix(prompts, (4, 4))._replace(index=index))
    for i in range(12):
        assert relative(v[i:i + 1],
                        their_velocity(theirs, x[i:i + 1], t[i:i + 1], prompts[index[i]], (4, 4))) < 1e-5


@pytest.mark.parametrize("mult, blocks", [([1, 2, 4, 8, 8], 2), ([1, 1, 1, 1, 1], 1)])
def test_vae(mult, blocks):
    config = dict(base_dim=4, decoder_base_dim=8, z_dim=6, dim_mult=mult, num_res_blocks=blocks,
                  attn_scales=[],
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


# The whole pipeline: 64 px, the tiny checkpoint with another transformer and another final norm of the text
# encoder


class ImageProcessorOnly(Qwen3VLProcessor):
    """Qwen3VLProcessor without its video part, which needs torchvision: the signature declares the parts."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)


def load_pipeline(root):
    processor = ImageProcessorOnly.from_pretrained(root / "processor")
    pipeline = diffusers.QwenImage21Pipeline.from_pretrained(root, processor=processor, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The tiny checkpoint with a random transformer and a final norm that betrays embeddings taken after it.
    """
    root = tmp_path_factory.mktemp("pipeline")
    for name in ("model_index.json", "processor", "scheduler", "vae"):
        (root / name).symlink_to(TINY / name)
    encoder = Qwen3VLForConditionalGeneration.from_pretrained(TINY / "text_encoder", dtype=torch.float32)
    norm = encoder.model.language_model.norm.weight
    norm.data = torch.linspace(0.5, 2, len(norm))
    encoder.save_pretrained(root / "text_encoder")
    config = TRANSFORMER | {"context_in_dim": len(norm)}
    randomise(QwenImage21Transformer2DModel(**config), 0).save_pretrained(root / "transformer")
    return root


@pytest.fixture(scope="module")
def pipeline(root):
    return load_pipeline(root)


def source_image(path, seed, size):
    """Save smooth coloured noise with a varying alpha channel."""
    pixels = torch.randint(0, 256, (5, 4, 4), generator=torch.Generator().manual_seed(seed),
                           dtype=torch.uint8)
    Image.fromarray(pixels.numpy(), "RGBA").resize(size, Image.Resampling.BICUBIC).save(path)
    return str(path)


def our_picture(root, request, cfg):
    """The picture as the scripts make it (PIL) and before rounding to 8 bits, (4, 64, 64) in [0, 1]."""
    device = torch.device("cpu")
    transformer = model.materialise(model.new_transformer(root, torch.float32), root, device)
    vae = model.load_vae(root, device, torch.float32)
    encoded = model.encode_prompts(root, vae, {0: request}, (4, 4), device)
    sigmas = model.read_config(root / "model_index.json")["sample_sigmas"]
    t = model.timesteps(model.read_config(root / "scheduler" / "scheduler_config.json"), 16,
                        sample_sigmas=sigmas)
    sampler, last = model.Sampler(transformer, graphs=False), len(sigmas)
    ((_, (image,), states),) = model.generate(
        sampler, vae, encoded, [(0, 0, 0)], (4, 4), t, torch.zeros(last), cfg, seed=0, batch=1, keep=[last])
    return image, vae.decode(states[last][0].mT.unflatten(2, (4, 4)))[0] / 2 + 0.5


def their_picture(pipeline, request, cfg):
    latents = torch.randn(1, 16, 16, generator=model.noise_stream(0, 0, 0, 0))
    return pipeline(request.prompt, image=request.images() or None, negative_prompt=" " if cfg != 1 else None,
                    true_cfg_scale=cfg, latents=latents, height=64, width=64, output_resolution=64,
                    output_type="pt").images[0]


def compare(root, pipeline, request, cfg):
    """Equal to 1e-3 of the range; the 8-bit picture may be half a level further. The picture must not be
    trivial.
    """
    (image, ours), theirs = our_picture(root, request, cfg), their_picture(pipeline, request, cfg)
    assert theirs[:3].std() > 0.05 and ((theirs[:3] > 0) & (theirs[:3] < 1)).float().mean() > 0.5
    assert ours.shape == theirs.shape == (4, 64, 64)
    assert (ours - theirs).abs().max() < 1e-3
    assert image.mode == "RGBA" and image.size == (64, 64)
    assert (model.to_pixels([image])[0] / 2 + 0.5 - theirs).abs().max() < 0.5 / 255 + 1e-3


SOURCES = {"text": [], "one source": [(80, 64)], "two sources": [(64, 64), (150, 60)]}


@pytest.mark.parametrize("layout, cfg", [("text", 1), ("text", 3), ("one source", 3), ("two sources", 3)])
def test_pipeline(root, pipeline, tmp_path, layout, cfg):
    sources = [source_image(tmp_path / f"{i}.png", i, size) for i, size in enumerate(SOURCES[layout])]
    compare(root, pipeline, model.Request("two red circles above a blue square", sources=tuple(sources)), cfg)


def test_saved_model_loads_in_diffusers(root, tmp_path, monkeypatch, caplog):
    """Sharded, and diffusers says no word about the private key; the picture is that of our own loader."""
    transformer = model.materialise(model.new_transformer(root, torch.float32), root, "cpu")
    monkeypatch.setattr(model, "SHARD_BYTES", 500_000)
    model.save_model(tmp_path / "saved", root, transformer, guidance=3.0, trained_on=[])
    assert model.read_config(tmp_path / "saved" / "model_index.json")["_sampling"]["guidance_scale"] == 3.0
    assert len(list((tmp_path / "saved" / "transformer").glob("*.safetensors"))) > 1
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to caplog
    pipeline = load_pipeline(tmp_path / "saved")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [text for text in warnings if "accelerate" not in text]
    source = source_image(tmp_path / "0.png", 0, (64, 64))
    compare(tmp_path / "saved", pipeline, model.Request("add a circle", sources=(source,)), 3)
