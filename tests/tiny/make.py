"""Make the tiny world's checkpoint from nothing: text encoder, VAE, flow transformer, prompts and reward
models.

    python tests/tiny/make.py                  # everything that make.log does not name yet, on two cores
    python tests/tiny/make.py --only flow      # one stage; the earlier ones must be there

The result has exactly the layout of Qwen/Qwen-Image-2.1, so the scripts cannot tell it from the real one. The
base is made mediocre on purpose, in beauty (most of its training pictures have flaws, many faces are
disfigured) and in content (some captions are those of other pictures). To begin anew, remove make.log.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import model  # (sets OMP_WAIT_POLICY before torch is imported)
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from tqdm import trange

import world

OUT, BUILD = HERE / "model", HERE / "build"  # build: scored pictures and what reads them, not kept in git
LOG = HERE / "make.log"
PARTS = ("drawn", "samples")  # held-out drawings, and samples of the base on held-out prompts
SEED = 0
DEGRADED, DISFIGURED, FOREIGN, DROPPED = 0.7, 0.3, 0.17, 0.1  # shares of the flow model's training data:
# pictures with flaws, faces, captions of other pictures, prompts left out for guidance
DEGRADED_EDITS, DEGRADED_ELSEWHERE = 0.4, 0.3  # targets of edits; what text encoder and VAE see
LATENTS = 16
TRANSFORMER = {
    "_class_name": "QwenImage21Transformer2DModel", "patch_size": 1, "in_channels": LATENTS,
    "out_channels": LATENTS,
    "num_layers": 6, "attention_head_dim": 32, "num_attention_heads": 4, "context_in_dim": 96, "mlp_ratio": 3,
    "axes_dims_rope": [8, 12, 12], "eps": 1e-6, "causal_condition": True}
VAE = {
    "_class_name": "AutoencoderKLQwenImage21", "base_dim": 8, "decoder_base_dim": 8, "z_dim": LATENTS,
    "dim_mult": [1, 2, 4, 8, 8], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True, True],
    "dropout": 0.0, "is_residual": True, "in_channels": 4, "out_channels": 4, "patch_size": None,
    "scale_factor_temporal": 8, "scale_factor_spatial": 16}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
    "max_image_seq_len": 8192, "shift_terminal": 0.02, "time_shift_type": "exponential",
    "invert_sigmas": False,
    "stochastic_sampling": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False}
INDEX = {
    "_class_name": "QwenImage21Pipeline", "_diffusers_version": "0.42.1",
    "processor": ["transformers", "Qwen3VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
    "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage21"],
    "sample_sigmas": [1 - i / 8 for i in range(8)],  # 8 steps are as good as 24 here
    "_sampling": {"size": [64, 64], "guidance_scale": 1.6}}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|image_pad|>",
            "<|video_pad|>"]
CHAT = (  # Qwen-VL's form: every message is a string or a list of image and text parts
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WORD = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+")

ASK = f"<|im_start|>user\n{model.IMAGE}Describe the image.<|im_end|>\n<|im_start|>assistant\n"
SCORER_PIXELS = 192 * 192  # what reward models enlarge a picture to


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def save_bf16(module, path, extra=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().to(torch.bfloat16).contiguous()
             for key, value in module.state_dict().items()}
    save_file(state | dict(extra), path, metadata={"format": "pt"})


def picture(rng, scene, degraded=DEGRADED_ELSEWHERE, disfigured=DISFIGURED):
    """A drawing, `degraded` and, of a face, `disfigured` with these probabilities."""
    spoilt = scene.kind == "face" and rng.random() < disfigured
    image = world.disfigure(scene, rng) if spoilt else world.draw(scene)
    return world.degrade(image, rng)[0] if rng.random() < degraded else image


# Training: Muon for matrices inside the network, AdamW for everything else


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration; convolutions count as matrices.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                wide = x.shape[0] <= x.shape[1]
                x = x if wide else x.T
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
                x = x if wide else x.T
                p.add_(x.view_as(p), alpha=-group["lr"] * max(1, x.shape[0] / x.shape[1]) ** 0.5)


def optimizers(module, muon_lr, adam_lr, inner=lambda name, p: p.ndim >= 2):
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return [Muon([p for n, p in named if inner(n, p)], muon_lr),
            torch.optim.AdamW([p for n, p in named if not inner(n, p)], adam_lr, betas=(0.9, 0.98),
                              weight_decay=0)]


def update(opts, loss, progress, decay_from=0.0):
    """One step of all optimizers; the rate falls linearly to 0 from `decay_from` of the run on."""
    loss.backward()
    scale = min(1.0, (1 - progress) / (1 - decay_from))
    for opt in opts:
        rates = [group["lr"] for group in opt.param_groups]
        for group in opt.param_groups:
            group["lr"] *= scale
        opt.step()
        opt.zero_grad(set_to_none=True)
        for group, rate in zip(opt.param_groups, rates):
            group["lr"] = rate


# Text encoder: a Qwen3-VL that learns to caption pictures, repeat captions and foresee edits


def make_tokenizer():
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(SEED)
    texts = world.all_captions() + [world.sample_edit(rng)[1] for _ in range(2000)]
    texts += [model.prompt_text("", 3), "Describe the image."] * 50 + [r + model.ANSWERS[0]
                                                                       for r in model.RUBRICS.values()] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>",
                                   padding_side="left", chat_template=CHAT, model_max_length=4096)


def save_processor(directory, smallest):
    """Tokenizer and image processor; `smallest` is the pixel count a picture is enlarged to."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(directory)
    size = {"shortest_edge": smallest, "longest_edge": 16777216}
    Qwen2VLImageProcessorPil(patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3,
                             image_std=[0.5] * 3,
                             size=size).save_pretrained(directory)
    preprocessor = json.loads((directory / "preprocessor_config.json").read_text())
    write_json(directory / "preprocessor_config.json",
               preprocessor
               | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"})
    write_json(directory / "video_preprocessor_config.json", {
        "video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor",
        "patch_size": 16,
        "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": size})


def new_vlm(tokenizer):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256,
                         num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                         max_position_embeddings=4096,
                         pad_token_id=ids["<|endoftext|>"], rope_parameters=rope),
        vision_config=dict(depth=3, hidden_size=96, intermediate_size=256, num_heads=3, patch_size=16,
                           spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=96,
                           num_position_embeddings=64,
                           deepstack_visual_indexes=[1]),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], tie_word_embeddings=True,
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    vlm = Qwen3VLForConditionalGeneration(config)
    vlm.generation_config.eos_token_id = ids["<|im_end|>"]
    vlm.generation_config.pad_token_id = ids["<|endoftext|>"]
    return vlm


def answer_loss(vlm, processor, texts, answers, images=(), identity=None):
    """Cross-entropy on the answers, each of which follows its text.

    With a linear head `identity`, plus the cross-entropy of reading every token off its own last state:
    next-token prediction alone lets the last layer forget the token itself, and the flow model would not
    learn what was asked.
    """
    inputs = processor([text + answer for text, answer in zip(texts, answers)], images)
    lengths = [len(processor.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers]
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, length in enumerate(lengths):  # texts are padded on the left, so answers end every row
        labels[row, -length:] = inputs["input_ids"][row, -length:]
    keep = max(lengths) + 1
    states = []
    hook = vlm.model.language_model.norm.register_forward_pre_hook(lambda module,
                                                                   args: states.append(args[0]))
    logits = vlm(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
    hook.remove()
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, -keep + 1:].flatten(), ignore_index=-100)
    if identity is None:
        return loss
    real = inputs["attention_mask"].bool()
    return loss + F.cross_entropy(identity(F.rms_norm(states[0][real], states[0].shape[-1:])),
                                  inputs["input_ids"][real])


def make_vlm(steps=700):
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    save_processor(OUT / "processor", smallest=32 * 32)
    processor = model.Processor(OUT / "processor")
    enlarging = model.Processor(OUT / "processor")
    enlarging.image_processor.size = {"shortest_edge": 128 * 128, "longest_edge": 16777216}
    vlm = new_vlm(processor.tokenizer)
    outer = ("embed", "lm_head", "pos_embed")
    opts = optimizers(vlm, 0.01, 1.5e-3, lambda n, p: p.ndim == 2 and not any(o in n for o in outer))
    identity = torch.nn.Linear(96, len(processor.tokenizer))  # for training only
    opts.append(torch.optim.AdamW(identity.parameters(), 1.5e-3))
    bar = trange(steps, desc="text encoder")
    for step in bar:
        scenes = [world.sample_scene(rng) for _ in range(48)]
        captions = [world.caption(scene) + "<|im_end|>" for scene in scenes]
        edits = [world.sample_edit(rng) for _ in range(12)]
        large = answer_loss(vlm, enlarging, [ASK] * 24, captions[:24],
                            [picture(rng, scene, disfigured=0) for scene in scenes[:24]])
        repeat = answer_loss(vlm, processor,
                             [model.prompt_text(c[:-len("<|im_end|>")]) for c in captions[24:]],
                             captions[24:], identity=identity)
        foresee = answer_loss(vlm, processor, [model.prompt_text(e[1], 1) for e in edits],
                              [world.caption(e[2]) + "<|im_end|>" for e in edits],
                              [picture(rng, e[0], disfigured=0) for e in edits],
                              identity=identity)
        update(opts, large + 0.5 * repeat + 0.5 * foresee, step / steps, 0.3)
        bar.set_postfix(caption=f"{large.item():.3f}", repeat=f"{repeat.item():.3f}",
                        edit=f"{foresee.item():.3f}")
    vlm.to(torch.bfloat16).save_pretrained(OUT / "text_encoder")
    return f"loss of captions {large.item():.3f}, repeated {repeat.item():.3f}, of edits {foresee.item():.3f}"


# Reader: the text encoder goes on to say what it sees, as large as the reward models see it


def warped(rng, image):
    """The picture pulled out of shape by a smooth field of a few pixels, as a weak base draws it"""
    low = rng.normal(0, rng.uniform(1, 3), (2, 5, 5)).astype(np.float32)
    dy, dx = (np.asarray(Image.fromarray(field).resize(image.size, Image.Resampling.BICUBIC))
              for field in low)
    y, x = np.mgrid[:world.SIZE, :world.SIZE]
    y, x = (np.clip(np.rint(v), 0, world.SIZE - 1).astype(int) for v in (y + dy, x + dx))
    soft = Image.fromarray(np.asarray(image)[y, x])
    return soft.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))


def to_be_read(rng):
    """A picture with something to tell: drawn, degraded, pulled out of shape or mixed with another"""
    image, way = picture(rng, world.sample_scene(rng), degraded=0.5), rng.random()
    if way < 0.3:
        return warped(rng, image)
    if way < 0.45:
        return Image.blend(image, picture(rng, world.sample_scene(rng)), rng.uniform(0.2, 0.8))
    return image


def make_reader(steps=1200, batch=32):
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED + 6)
    processor = model.Processor(OUT / "processor")
    processor.image_processor.size = {"shortest_edge": SCORER_PIXELS, "longest_edge": 16777216}
    vlm = AutoModelForImageTextToText.from_pretrained(OUT / "text_encoder", dtype=torch.float32)
    model.patch_products(vlm)
    outer = ("embed", "lm_head", "pos_embed")
    opts = optimizers(vlm, 0.005, 1e-3, lambda n, p: p.ndim == 2 and not any(o in n for o in outer))
    bar, running = trange(steps, desc="reader"), None
    for step in bar:
        images = [to_be_read(rng) for _ in range(batch)]
        answers = [world.describe(world.read(image)) + "<|im_end|>" for image in images]
        loss = answer_loss(vlm, processor, [ASK] * batch, answers, images)
        update(opts, loss, step / steps, 0.3)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}")
    vlm.to(torch.bfloat16).save_pretrained(BUILD / "reader")
    return f"loss {running:.3f}"


# VAE


def make_vae(steps=3500, batch=16):
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    images = [np.array(picture(rng, world.sample_scene(rng))) for _ in trange(6000, desc="pictures")]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    images = torch.cat([images, torch.full_like(images[:, :1], 255)], dim=1)  # opaque
    held_out, images = images[:256], images[256:]
    vae = model.VAE(VAE | {"latents_mean": [0.0] * LATENTS, "latents_std": [1.0] * LATENTS})
    opts = optimizers(vae, 0.02, 2e-3)
    bar = trange(steps, desc="vae")
    for step in bar:
        x = images[torch.randint(len(images), (batch,))] / 127.5 - 1
        z = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)[0]
        y = vae.decoder(vae.post_quant_conv(z + 0.05 * torch.randn_like(z)))
        error = F.mse_loss(y, x)
        update(opts, error + 0.1 * F.l1_loss(y, x) + 1e-4 * z.pow(2).mean(), step / steps, 0.2)
        bar.set_postfix(psnr=f"{10 * np.log10(4 / error.item()):.2f}")
    vae.to(torch.bfloat16).float().requires_grad_(False)
    latents = torch.cat([vae.encode(x / 127.5 - 1) for x in images[:2048].split(64)])
    statistics = {"latents_mean": latents.mean((0, 2, 3)).tolist(),
                  "latents_std": latents.std((0, 2, 3)).tolist()}
    vae.config = vae.config | statistics
    x = held_out / 127.5 - 1
    psnr = 10 * torch.log10(4 / (vae.decode(vae.encode(x)) - x).pow(2).mean((1, 2, 3)))
    unused = {}  # a video model's checkpoint carries these; one frame never meets them
    for side, blocks, factor in (("encoder.down_blocks", (1, 2, 3), 1), ("decoder.up_blocks", (0, 1, 2), 2)):
        for block in blocks:
            kind = "downsampler" if factor == 1 else "upsampler"
            width = vae.get_submodule(f"{side}.{block}.{kind}.resample.1").out_channels
            unused[f"{side}.{block}.{kind}.time_conv.weight"] = torch.zeros(factor * width, width, 1, 1,
                                                                            dtype=torch.bfloat16)
            unused[f"{side}.{block}.{kind}.time_conv.bias"] = torch.zeros(factor * width,
                                                                          dtype=torch.bfloat16)
    save_bf16(vae, OUT / "vae" / "diffusion_pytorch_model.safetensors", unused)
    write_json(OUT / "vae" / "config.json", VAE | statistics)
    return f"held-out PSNR {psnr.mean():.2f} dB"


# Flow transformer: Eq. 2 on text-to-image and on edits


def load_parts():
    """Text encoder and VAE as the scripts load them."""
    encoder = model.TextEncoder(OUT, "cpu", torch.float32)
    return encoder, model.load_vae(OUT, "cpu", torch.float32)


def flow_data(rng, encoder, vae, pairs=20000, edits=6000):
    """Lists of (Prompt, Prompt without text, target latents (C, 4, 4)) for text-to-image and for edits."""
    known = {}

    def embed(prompt, images=()):
        if images or prompt not in known:
            known[prompt] = encoder.encode(prompt, images)
        return known[prompt]

    def latents(images):
        return vae.encode(model.to_pixels(images))

    texts, pictures = [], []
    for _ in trange(pairs, desc="text-to-image pairs"):
        scene = world.sample_scene(rng)
        foreign = rng.random() < FOREIGN  # the caption of another picture
        texts.append(world.caption(world.sample_scene(rng) if foreign else scene))
        pictures.append(picture(rng, scene, DEGRADED))
    targets = torch.cat([latents(pictures[i:i + 64]) for i in range(0, pairs, 64)])
    empty = model.EncodedPrompt(*embed(" "), [])
    generated = [(model.EncodedPrompt(*embed(text), []), empty, target)
                 for text, target in zip(texts, targets)]
    edited = []
    for _ in trange(edits, desc="edit pairs"):
        source, instruction, target = world.sample_edit(rng)
        image = model.fit(world.draw(source), 64 * 64)
        both = latents([image, picture(rng, target, DEGRADED_EDITS, disfigured=0)])
        prompt = model.EncodedPrompt(*embed(instruction, [image]), [both[0]])
        edited.append((prompt, model.EncodedPrompt(*embed(" ", [image]), [both[0]]), both[1]))
    return generated, edited


def make_flow(steps=3400, batch=48, draws=3):
    """Every prompt's prefix serves several draws of noise and time."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    with torch.no_grad():
        generated, edited = flow_data(rng, *load_parts())
    flow = model.FlowTransformer(TRANSFORMER)
    opts = optimizers(flow, 0.01, 1.5e-3, lambda n, p: n.startswith("transformer_blocks") and p.ndim == 2)
    average = {key: value.clone() for key, value in flow.state_dict().items()}
    bar, running = trange(steps, desc="flow"), None
    for step in bar:
        data = edited if step % 2 else generated
        rows = [data[i] for i in rng.integers(len(data), size=batch)]
        prompts = [empty if rng.random() < DROPPED else prompt for prompt, empty, _ in rows]
        prefix = flow.prefix(prompts, (4, 4))._replace(index=torch.arange(batch).repeat(draws))
        x0 = torch.stack([target for _, _, target in rows]).flatten(2).mT.repeat(draws, 1, 1)      # (B, N, C)
        eps, t = torch.randn_like(x0), torch.sigmoid(torch.randn(len(x0)) + 0.5)
        x = (1 - t[:, None, None]) * x0 + t[:, None, None] * eps                                   # Eq. 1
        loss = (flow.velocity(x, t, prefix) - (eps - x0)).pow(2).mean()                            # Eq. 2
        update(opts, loss, step / steps, 0.5)
        decay = min(0.998, step / (step + 10))
        for key, value in flow.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}")
    flow.load_state_dict(average)
    save_bf16(flow, OUT / "transformer" / "diffusion_pytorch_model.safetensors")
    write_json(OUT / "transformer" / "config.json", TRANSFORMER)
    return f"loss {running:.3f}"


def judge_base():
    """What the base can do: the oracle on the held-out prompts and edits, with the checkpoint's guidance"""
    prompts, edits = read_lines(HERE / "heldout.jsonl"), read_lines(HERE / "edits_heldout.jsonl")
    scale = INDEX["_sampling"]["guidance_scale"]
    samples = base_samples([record["prompt"] for record in prompts], 2, SEED + 7, scales=(scale,))
    strict = {}
    for prompt, image in samples:
        strict.setdefault(world.category(prompt), []).append(world.alignment(image, prompt)[0])
    sources = [HERE / record["source"] for record in edits]
    edited = base_samples([record["prompt"] for record in edits], 2, SEED + 7, sources, scales=(scale,))
    oracles = {"strict": [right for rights in strict.values() for right in rights],
               "aesthetic": [1 + 4 * world.aesthetic(image) for _, image in samples],
               "alignment": [1 + 4 * world.alignment(image, prompt)[1] for prompt, image in samples],
               "edits strict": [world.alignment(image, text, source)[0] for text, image, source in edited]}
    return ", ".join(f"{name} {np.mean(values):.3f}" for name, values in (oracles | strict).items())


# Prompt files, scored pictures, reward models


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


HELD_OUT = {"general": 24, "counting": 36, "relation": 168, "portrait": 24, "typography": 48}
RELATIONS = 160  # in the training prompts; of the other categories all the rest
EDITABLE = {"background": world.KINDS, "color": world.KINDS, "shape": ("single", "count", "relation"),
            "letter": ("letter",), "mood": ("face",), "eyes": ("face",), "remove": ("relation",)}


def make_prompts(held_out_edits=24, edits=28):
    """Prompt files, `edits` of each kind (52 moods can change). No policy is trained on what is held out, in
    other words neither; the base and the reward models see all captions, with other pictures.
    """
    rng = np.random.default_rng(SEED + 1)
    captions, held_out, training = {}, [], []
    for prompt in world.all_captions():
        same = captions.setdefault(world.category(prompt), {})
        same.setdefault(world.canonical(world.parse(prompt)), []).append(prompt)
    for category, groups in captions.items():
        prompts = [str(rng.choice(group)) for group in groups.values()]
        prompts = [str(prompt) for prompt in rng.permutation(prompts)]
        last = HELD_OUT[category] + RELATIONS if category == "relation" else None
        records = [{"prompt": prompt, "category": category} for prompt in prompts[:last]]
        held_out += records[:HELD_OUT[category]]
        training += records[HELD_OUT[category]:]
    for path, records in (("heldout.jsonl", held_out), ("prompts.jsonl", training)):
        write_lines(HERE / path, [records[i] for i in rng.permutation(len(records))])

    (HERE / "sources").mkdir(exist_ok=True)
    taken, number = set(), 0
    for path, count in (("edits_heldout.jsonl", held_out_edits), ("edits.jsonl", edits)):
        records = []
        for kind, i in itertools.product(world.EDIT_KINDS, range(count)):
            source, instruction, target = new_edit(rng, kind, EDITABLE[kind][i % len(EDITABLE[kind])], taken)
            image = f"sources/{number:03d}.png"
            world.draw(source).save(HERE / image)
            records.append({"prompt": instruction, "category": "edit", "source": image,
                            "before": world.caption(source), "after": world.caption(target)})
            number += 1
        write_lines(HERE / path, [records[i] for i in rng.permutation(len(records))])
    (HERE / "mixed.jsonl").write_text("".join((HERE / name).read_text()
                                              for name in ("prompts.jsonl", "edits.jsonl")))
    return (f"{len(training)} prompts, {len(held_out)} held out; {len(world.EDIT_KINDS)} kinds of edits, "
            f"{edits} each, {held_out_edits} held out")


def new_edit(rng, edit_kind, scene_kind, taken):
    """(source, instruction, target) of that kind whose source and instruction are not in `taken`; they enter
    it."""
    while True:
        source, instruction, target = world.sample_edit(rng, scene_kind)
        key = world.caption(world.canonical(world.parse(world.caption(source)))), instruction
        if world.edit_kind(instruction) == edit_kind and key not in taken:
            taken.add(key)
            return source, instruction, target


def base_samples(prompts, per_prompt, seed, sources=None, scales=(1.0, 2.0, 3.5)):
    """[(prompt, image, source?)] of the base model, each prompt at one of the guidance scales; `sources`: a
    path for each prompt.
    """
    vae = model.load_vae(OUT, "cpu", torch.float32)
    requests = {i: model.Request(prompt, sources=(sources[i],) if sources else ())
                for i, prompt in enumerate(prompts)}
    encoded = model.encode_prompts(OUT, vae, requests, (4, 4), torch.device("cpu"))
    flow = model.materialise(model.new_transformer(OUT, torch.float32), OUT, "cpu").requires_grad_(False)
    sampler, samples = model.Sampler(flow, graphs=False), []
    t = model.timesteps(SCHEDULER, 16, sample_sigmas=INDEX["sample_sigmas"])
    for i, cfg in enumerate(scales):
        images = [(0, p, n) for p in range(i, len(prompts), len(scales)) for n in range(per_prompt)]
        batches = model.generate(sampler, vae, encoded, images, (4, 4), t, torch.zeros(len(t) - 1), cfg, seed,
                                 64)
        samples += [(p, image.convert("RGB")) for chunk, batch, _ in batches
                    for (_, p, _), image in zip(chunk, batch)]
    before = [[Image.open(path).convert("RGB")] for path in sources] if sources else [[]] * len(prompts)
    return [(prompts[p], image, *before[p]) for p, image in samples]


def drawn_samples(rng, count):
    """[(prompt, image)] of drawings, most of them degraded, half of them under another caption of their kind.
    """
    samples = []
    for _ in range(count):
        scene = world.sample_scene(rng)
        samples.append((world.caption(world.sample_scene(rng, scene.kind) if rng.random() < 0.5 else scene),
                        picture(rng, scene, DEGRADED)))
    return samples


def spoiled_samples(rng, samples, count):
    """[(prompt, image)] of samples made worse, in ways that a policy finds when nobody forbids them."""
    spoiled = []
    for i in rng.integers(len(samples), size=count):
        prompt, image = samples[i]
        x, way = np.asarray(image, np.float32) / 255, rng.integers(6)
        if way < 2:
            x = np.asarray(world.degrade(image, rng)[0], np.float32) / 255
        elif way == 2:  # darker or paler
            x = x ** np.exp(rng.uniform(-1, 1))
        elif way == 3:  # shaded towards one side
            slope = np.linspace(1, rng.uniform(0, 0.8), 64)[::rng.choice((-1, 1))]
            x = x * (slope[:, None, None] if rng.random() < 0.5 else slope[None, :, None])
        elif way == 4:  # a ghost of another picture
            x = x + rng.uniform(0.1,
                                0.5) * (np.asarray(samples[rng.integers(len(samples))][1],
                                                   np.float32) / 255 - x)
        elif rng.random() < 0.5:  # nothing, or next to it
            x = x[:1, :1] + rng.normal(0, 0.02, x.shape)
        else:  # colours of another kind
            x = x @ rng.dirichlet((1, 1, 1), size=3).T
        spoiled.append((prompt, Image.fromarray((x.clip(0, 1) * 255).astype(np.uint8))))
    return spoiled


def portrait_samples(rng, count):
    """[(prompt, image)] of drawn faces: half of them disfigured, most degraded, a few of something else."""
    samples = []
    for _ in range(count):
        scene = world.sample_scene(rng, "face" if rng.random() < 0.9 else None)
        samples.append((world.caption(scene), picture(rng, scene, degraded=0.6, disfigured=0.5)))
    return samples


def edit_samples(rng, count):
    """[(instruction, output, source)] of drawings: edits done well, not at all, wrongly, with other layouts,
    or degraded.
    """
    samples = []
    for _ in range(count):
        source, instruction, target = world.sample_edit(rng)
        ways = [text for way in world.edits(source) for text in way if text != instruction]
        shift = lambda item: replace(item, x=item.x + rng.uniform(-5, 5), y=item.y + rng.uniform(-5, 5))
        moved = replace(target, items=tuple(map(shift, target.items)))
        outcomes = (target, target, source, world.edited(source, str(rng.choice(ways))) if ways else source,
                    moved,
                    world.sample_scene(rng, target.kind))
        image = world.draw(outcomes[rng.integers(len(outcomes))])
        image = world.degrade(image, rng)[0] if rng.random() < 0.4 else image
        samples.append((instruction, image, world.draw(source)))
    return samples


def half_done_edits(rng, samples, count):
    """[(instruction, output, source)] of samples that are still partly their source, or degraded."""
    worse = []
    for i in rng.integers(len(samples), size=count):
        instruction, image, source = samples[i]
        half = rng.random() < 0.5
        image = Image.blend(source, image, rng.uniform(0.3, 0.9)) if half else world.degrade(image, rng)[0]
        worse.append((instruction, image, source))
    return worse


def edit_sources(rng, count, folder):
    """Instructions and the paths of as many drawn sources."""
    folder.mkdir(parents=True, exist_ok=True)
    instructions, paths = [], []
    for i in range(count):
        source, instruction, _ = world.sample_edit(rng)
        world.draw(source).save(folder / f"{i:04d}.png")
        instructions, paths = instructions + [instruction], paths + [str(folder / f"{i:04d}.png")]
    return instructions, paths


def make_scores():
    """Scored pictures for train_reward.py, labelled by the oracle: drawings, samples of the base,
    and what each scorer needs besides: spoiled samples for the aesthetic, more pairs of drawing and caption
    for the alignment, edits that are half done for theirs."""
    rng = np.random.default_rng(SEED + 2)
    train, held_out = ([record["prompt"] for record in read_lines(HERE / name)]
                       for name in ("prompts.jsonl", "heldout.jsonl"))
    faces, held_out_faces = ([p for p in prompts if world.category(p) == "portrait"]
                             for prompts in (train, held_out))
    samples, tests = base_samples(train, 16, SEED), base_samples(held_out, 4, SEED + 1)
    drawn = drawn_samples(rng, 3000)
    instructions, sources = edit_sources(rng, 600, BUILD / "sources")
    more_instructions, more_sources = edit_sources(np.random.default_rng(SEED + 9), 1200,
                                                   BUILD / "more-sources")
    other_instructions, other_sources = edit_sources(np.random.default_rng(SEED + 5), 200,
                                                     BUILD / "other-sources")
    edited = base_samples(instructions, 8, SEED, sources)
    more_edited = base_samples(more_instructions, 8, SEED + 6, more_sources)
    spoiled = spoiled_samples(rng, samples, 4000)
    rules = {
        "aesthetic": world.aesthetic_reward, "alignment": world.alignment_reward,
        "portrait": world.portrait_reward,
        "instruction": world.instruction_reward, "consistency": world.consistency_reward}
    edits = edit_samples(rng, 5000) + edited
    half_done = half_done_edits(np.random.default_rng(SEED + 10), more_edited + edits, 5000)
    edits += edit_samples(np.random.default_rng(SEED + 8), 15000) + more_edited + half_done
    edit_parts = {"train": edits, "drawn": edit_samples(rng, 400),
                  "samples": base_samples(other_instructions, 8, SEED + 1, other_sources)}
    data = {
        "aesthetic": {"train": samples + spoiled + drawn + drawn_samples(rng, 4000),
                      "drawn": drawn_samples(rng, 400), "samples": tests},
        "alignment": {"train": drawn + samples + drawn_samples(rng, 7000), "drawn": drawn_samples(rng, 400),
                      "samples": tests},
        "portrait": {"train": portrait_samples(rng, 4000) + base_samples(faces, 40, SEED + 3),
                     "drawn": portrait_samples(rng, 400),
                     "samples": base_samples(held_out_faces, 12, SEED + 4)},
        "instruction": edit_parts, "consistency": edit_parts}
    for name, parts in data.items():
        for part, rows in parts.items():
            write_scores(name, part, rows, rules[name])
    examples = []
    for part in ("drawn", "samples"):  # a few stay in git, as an example of the format
        examples += [json.loads(line)
                     for line in (BUILD / f"aesthetic-{part}.jsonl").read_text().splitlines()[:16]]
    for record in examples:
        (HERE / "scores" / record["image"]).parent.mkdir(parents=True, exist_ok=True)
        (HERE / "scores" / record["image"]).write_bytes((BUILD / record["image"]).read_bytes())
    write_lines(HERE / "scores" / "aesthetic.jsonl", examples)
    return ", ".join(f"{len(read_lines(BUILD / f'{name}-train.jsonl'))} to train {name}" for name in REWARDS)


def reasoning(prompt, image, source=None):
    """What a scorer says before its score: what it sees; of an edit, what was there and what is asked, but
    not what is seen: a misread word would decide the score
    """
    if source is None:
        return world.describe(world.read(image))
    before = world.read(source)
    return f"{world.describe(before)}; asked {world.describe(world.edited(before, prompt))}"


def write_scores(name, part, rows, rule, folder=BUILD):
    """Pictures [(prompt, image, source?)] as files and their scores as JSON Lines. Where content counts, the
    reasoning says what is seen: a tiny VLM learns to compare much better with it."""
    (folder / name / part).mkdir(parents=True, exist_ok=True)
    records, sources = [], {}  # a source is saved once, so that its samples are a group
    for i, (prompt, image, *source) in enumerate(rows):
        record = {"reward": name, "prompt": prompt, "image": f"{name}/{part}/{i:05d}.png"}
        image.save(folder / record["image"])
        if source:
            record["source"] = sources.setdefault(source[0].tobytes(), f"{name}/{part}/{i:05d}-source.png")
            source[0].save(folder / record["source"])
        if name in ("alignment", "instruction"):
            record["reasoning"] = reasoning(prompt, image, *source)
        records.append(record | {"score": round(rule([image], [prompt], [source])[0], 3)})
    write_lines(folder / f"{name}-{part}.jsonl", records)


def pairs(rng, records, per_prompt=24):
    """The same pictures by the same criterion, the score, in the other form of Sec. 3.1"""
    groups, found = {}, []
    for record in records:
        groups.setdefault(record["prompt"], []).append(record)
    for prompt, group in groups.items():
        for _ in range(per_prompt):
            worse, better = sorted((group[i] for i in rng.choice(len(group), 2, replace=False)),
                                   key=lambda record: record["score"])
            if worse["score"] < better["score"]:
                found.append({"prompt": prompt, "chosen": better["image"], "rejected": worse["image"]})
    return found


READER = BUILD / "reader"
REWARDS = {  # what they start from, steps
    "aesthetic": (READER, 2200), "alignment": (READER, 3000), "portrait": (READER, 900),
    "consistency": (READER, 5000),
    "instruction": (OUT / "rewards" / "alignment", 3000)}  # which has learned to compare what it reads


def make_reward(name):
    """A new scorer, or one that goes on where it was interrupted. Returns its rank correlations, over all
    pictures and within groups.
    """
    base, steps = REWARDS[name]
    out = OUT / "rewards" / name
    model.remove(out)
    resume = ["--resume"] if Path(f"{out}.part").exists() else []
    subprocess.run([
        sys.executable, str(HERE.parent.parent / "train_reward.py"), "--reward", name, *resume,
        "--base", str(base), "--processor", str(OUT / "processor"),
        "--data", str(BUILD / f"{name}-train.jsonl"),
        "--eval-data", *(str(BUILD / f"{name}-{part}.jsonl") for part in PARTS),
        "--out", str(out), "--pixels", str(SCORER_PIXELS), "--steps", str(steps)], check=True)
    found = json.loads((out / "reward.json").read_text())["held_out"]
    return ", ".join(f"{Path(path).stem} {of['srcc'] or nan:.3f}, in groups {of['group_srcc'] or nan:.3f}"
                     for path, of in found.items())


# All of it

STAGES = {"vlm": make_vlm, "reader": make_reader, "prompts": make_prompts, "vae": make_vae, "flow": make_flow,
          "base": judge_base, "scores": make_scores} | {name: partial(make_reward, name) for name in REWARDS}
ORDER = (  # chains of stages side by side, one core each
    (("vlm", "prompts", "reader"), ("vae",)),
    (("flow", "base", "scores"),),
    (("alignment", "instruction"), ("aesthetic", "portrait", "consistency")))
CORES = 2  # how many threads a stage has decides its bits


UNKEPT = {"reader": BUILD / "reader", "scores": BUILD / "consistency-samples.jsonl"}  # not in git


def run_stage(name, threads):
    """A stage as a process of its own, unless the log names it and what it made is there."""
    named = LOG.exists() and any(line.startswith(f"{name}: ") for line in LOG.read_text().splitlines())
    if named and UNKEPT.get(name, LOG).exists():
        return
    subprocess.run([sys.executable, __file__, "--only", name], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def make_all():
    for chains in ORDER:
        with ThreadPoolExecutor(len(chains)) as pool:
            list(pool.map(lambda chain: [run_stage(name, CORES // len(chains)) for name in chain], chains))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, help="run one stage instead of all")
    args = parser.parse_args()
    if not args.only:
        raise SystemExit(make_all())
    write_json(OUT / "model_index.json", INDEX)
    write_json(OUT / "scheduler" / "scheduler_config.json", SCHEDULER)
    began = time.time()
    figures = STAGES[args.only]()
    with LOG.open("a") as log:
        log.write(f"{args.only}: {time.time() - began:.0f} s, {torch.get_num_threads()} threads; {figures}\n")
