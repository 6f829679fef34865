"""The one shared file: networks, prompts, checkpoints, flow maths, sampler, rewards and sharding for
Qwen-Image-2.1.

  1. networks      FlowTransformer (prefix, velocity), VAE
  2. prompts       Qwen3-VL condition encoder through transformers
  3. family        what the rest asks of 1 and 2, and what a fork to another model replaces
  4. checkpoints   the hub layout: find, load, save
  5. flow maths    schedule, noise, Eq. 5 step, guidance; the sampler and its CUDA graph
  6. rewards       VLM scorers (Eq. 12) local and remote, face identity, reward files
  7. sharding      process group, FSDP2, weights between networks
  8. memory        what a step takes, and what there is room for
  9. reports       intervals, the final table, contact sheets, the line chart
 10. runs          user errors, flags, signals, run directories, logs, prompt order

Architecture, for the reader who knows transformers: one stream of text, source-image and target tokens with
shared weights; no biases; LayerNorm without parameters, modulated by one projection of the timestep that all
blocks share; tanh gates; RMSNorm on queries and keys; rotary positions on (frame, y, x); SwiGLU. Attention is
block-causal: text is causal, every image sees itself and what precedes it. Text and source images are
modulated at t = 0. Equation numbers are the report's.

Words used throughout:

  request         a line of a prompt file; an encoded prompt is what the encoders make of it
  branches        an encoded prompt and the same without its text, for guidance
  prefix          the keys and values of a prompt's text and source images
  targets         the latents of the images to be drawn, which attend to the prefix and to themselves
  group           the images of one prompt; an image's key is (step, prompt id, number in the group)
  t, grid         the sampler's schedule, which falls from 1 to 0; (h, w) of an image in latents
  shards          a rank's rows of every weight
  frozen network  a whole one on every rank, never trained, which takes turns as policy, base and teacher
  judge           a VLM that scores
"""

import os

# before torch: spinning threads slow shared CPUs several times
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# as torchrun does; sharing the tiny model's operators costs more than it gains
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF",
                      os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))
# without expandable segments phases of different sizes fragment a GPU's memory to twice what they use

import argparse
import base64
import codecs
import contextlib
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import mmap
import random
import re
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint


# ---- 1. networks -------------------------------------------------------------------------------------------
#
# Axes: B images in a batch · P prompts · S prefix tokens · N target tokens (= h*w latent pixels)
# C latent channels · D width · H heads. Notation: x_t = (1-t) x0 + t eps, v = eps - x0, t from 1 (noise)
# to 0 (data).


@dataclass
class EncodedPrompt:
    """One encoded prompt: everything the prefix is made from. `encode` on TextEncoder makes it.

    embeds   (L, E)  text-encoder states, one per encoder token; rows at image slots are ignored
    slots    L bools, True at an image slot (each stands for 2x2 latents of a source image)
    sources  normalised latents (C, h, w) of the source images, in slot order; empty for text-to-image
    """

    embeds: torch.Tensor
    slots: list
    sources: list


class Prefix(NamedTuple):
    """What targets need to know of their prompts; computed once, valid for every timestep and every image.

    kv     one (k, v) per block, each (P, H, S, head_dim); prompts are padded on the right to the longest
    rope   (P, N, head_dim/2, 2) fp32, cos and sin of the target tokens
    mask   (P, 1, 1, S+N) bool, True where a target may look; None when no prompt is padded
    index  (B,) the prompt of each image; None when there is one prompt, or exactly one per image
    """

    kv: list
    rope: torch.Tensor
    mask: torch.Tensor | None
    index: torch.Tensor | None


class Layout(NamedTuple):
    """Where the tokens of a prompt's prefix stand.

    positions  S (frame, y, x)
    segments   [(first, last, is_image)]: the runs of text and the source images, in order, that make up the S
               tokens
    end        the position after the last token
    """

    positions: list
    segments: list
    end: int


def prefix_layout(prompt):
    """Interleave text tokens and source images.

    Text advances one position shared by the three axes; an image freezes the frame axis at the position
    reached, lays its tokens on a grid centred on zero and then advances the position by its longer side.
    """
    positions, segments, position, token = [], [], 0, 0
    images = iter(prompt.sources)
    while token < len(prompt.slots):
        first, is_image = len(positions), prompt.slots[token]
        if is_image:
            latents = next(images, None)
            if latents is None:
                raise ValueError(f"the prompt has image slots for more than its {len(prompt.sources)} source "
                                 "images")
            height, width = latents.shape[-2:]
            positions += [(position, *yx) for yx in pixel_positions(height, width)]
            position, token = position + max(height, width), token + height * width // 4
        else:
            while token < len(prompt.slots) and not prompt.slots[token]:
                positions.append((position, position, position))
                position, token = position + 1, token + 1
        segments.append((first, len(positions), is_image))
    return Layout(positions, segments, position)


def pixel_positions(height, width):
    """(y, x) of every latent pixel in raster order, centred on zero."""
    return [(y - (height - height // 2), x - (width - width // 2)) for y in range(height)
            for x in range(width)]


def rotate(x, rope):
    """Rotary embedding of adjacent channel pairs, in fp32. x (B, T, H, head_dim), rope (B|1, T, head_dim/2,
    2).
    """
    pairs, rope = x.float().unflatten(-1, (-1, 2)), rope.unsqueeze(2)
    if torch.compiler.is_compiling():  # which cannot fuse complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)
    rotated = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
    return torch.view_as_real(rotated).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Of a prefix to itself, block-causal (past=None), or of targets to their prefix and to themselves: x (B,
    T, D) -> (B, T, D), and the keys and values (B, H, T, head_dim) of a prefix.
    """

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim // heads, eps=eps), nn.RMSNorm(dim // heads, eps=eps)

    def forward(self, x, rope, past, index, mask, segments):
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.to_q, self.to_k, self.to_v))
        q, k = rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope)              # (B, T, H, head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)              # (B, H, T, head_dim)
        if past is None:  # the prefix stream keeps its keys and values for the targets
            k, v = k.contiguous(), v.contiguous()
            return self.project(block_causal_attention(q, k, v, segments)), (k, v)
        past_k, past_v = past
        k = torch.cat([select_prompts(past_k, index, len(x)).to(k.dtype), k], dim=2)   # (B, H, S+N, head_dim)
        v = torch.cat([select_prompts(past_v, index, len(x)).to(v.dtype), v], dim=2)
        return self.project(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), None

    def project(self, out):
        return self.to_out[0](out.transpose(1, 2).flatten(2))


def block_causal_attention(q, k, v, segments):
    """Text is causal, an image sees all of itself, and both see what precedes them; q, k, v (B, H, S,
    head_dim).

    Segment by segment, so that no (S, S) mask exists and an image, where the work is, takes the fastest
    kernel.
    """
    parts = []
    for first, last, is_image in segments:
        query, keys, values = q[:, :, first:last], k[:, :, :last], v[:, :, :last]
        if is_image:
            parts.append(F.scaled_dot_product_attention(query, keys, values))
        elif first == 0:
            parts.append(F.scaled_dot_product_attention(query, keys, values, is_causal=True))
        else:  # is_causal would align the two sequences at their beginnings
            mask = torch.ones(last - first, last, dtype=torch.bool, device=q.device).tril(first)
            parts.append(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask))
    return torch.cat(parts, dim=2)


def select_prompts(x, index, batch):
    """Rows of a per-prompt tensor (P, ...) for every image of the batch (B, ...)."""
    return x.expand(batch, *x.shape[1:]) if index is None else x[index]


class SwiGLU(nn.Module):
    """(..., D) -> (..., D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)
        self.gate_layer = nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        return self.out(F.silu(self.gate_layer(x)) * self.proj(x))


class Block(nn.Module):
    """One transformer block; the same weights serve the prefix stream (past=None) and the target stream."""

    def __init__(self, dim, heads, mlp_ratio, eps):
        super().__init__()
        self.attn = Attention(dim, heads, eps)
        self.img_mlp = SwiGLU(dim, dim * mlp_ratio)
        self.eps = eps

    def forward(self, h, modulation, rope, past=None, index=None, mask=None, segments=()):
        scale1, gate1, scale2, gate2 = modulation                                           # (B|1, 1, D) each
        x = F.layer_norm(h, h.shape[-1:], eps=self.eps) * (1 + scale1)
        x, kv = self.attn(x, rope, past, index, mask, segments)
        h = h + gate1 * x
        x = F.layer_norm(h, h.shape[-1:], eps=self.eps) * (1 + scale2)
        return h + gate2 * self.img_mlp(x), kv


class ZeroCentredRMSNorm(nn.Module):
    """RMSNorm that stores scale - 1, computed in fp32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float() + 1, self.eps).type_as(x)


class FlowTransformer(nn.Module):
    """Qwen-Image-2.1's block-causal flow transformer; parameter names are the checkpoint's.

    Text and source-image tokens are modulated at t=0 and never see the noisy image, so the network splits
    into a `prefix` computed once per prompt and a `velocity` of the target tokens, which look at the prefix
    and at themselves. One prefix serves all images of a group and all timesteps, exactly.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim = network_width(config)
        eps = config.get("eps", 1e-6)
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": nn.ModuleDict({
            "linear_1": nn.Linear(256, dim, bias=False), "linear_2": nn.Linear(dim, dim, bias=False)})})
        self.txt_in = nn.ModuleDict({
            "text_norm": ZeroCentredRMSNorm(config["context_in_dim"], eps),
            "in_layer": nn.Linear(config["context_in_dim"], dim, bias=False),
            "out_layer": nn.Linear(dim, dim, bias=False)})
        self.img_in = nn.Linear(config["in_channels"], dim, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim, bias=False))  # one for all blocks
        self.transformer_blocks = nn.ModuleList(
            Block(dim, config["num_attention_heads"], config["mlp_ratio"], eps)
            for _ in range(config["num_layers"]))
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(dim, dim, bias=False)})
        self.proj_out = nn.Linear(dim, config["out_channels"], bias=False)
        # recompute each block in the backward pass instead of keeping its activations
        self.eps, self.checkpointing = eps, False

    def embed_time(self, t):
        """Sinusoid of 1000 t in fp32, cos before sin, then two layers. t (B,) fp32 -> (B, D)."""
        index = torch.arange(128, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10000) * index / 128)
        angles = 1000 * t[:, None] * frequencies  # (B, 128): the one place that fixes the timestep convention
        embedder = self.time_text_embed["timestep_embedder"]
        x = torch.cat([angles.cos(), angles.sin()], dim=-1).to(embedder["linear_1"].weight.dtype)
        return embedder["linear_2"](F.silu(embedder["linear_1"](x)))

    def modulate(self, time):
        """Scales and gates shared by all blocks: time (B, D) -> four (B, 1, D)."""
        scale1, gate1, scale2, gate2 = self.modulation(time).unsqueeze(1).chunk(4, dim=-1)
        return scale1, gate1.tanh(), scale2, gate2.tanh()

    def rope(self, positions):
        """positions (..., 3) -> cos and sin (..., head_dim/2, 2) fp32: theta 10^4, axes (frame, y, x)."""
        dims, device = self.config["axes_dims_rope"], positions.device
        powers = [10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
                  for dim in dims]
        angles = torch.cat([x.float()[..., None] / power for x, power in zip(positions.unbind(-1), powers)],
                           dim=-1)
        return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))

    def run_block(self, block, *args):
        """With `checkpointing` and gradients, so that it is computed again in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    def prefix(self, prompts, grid, into=None):
        """Keys and values of P prompts, for targets of grid = (h, w) latents. Returns a Prefix.

        Prompts of a batch share their image layout and are padded on the right to the longest, S tokens; no
        real token sees padding and positions are per prompt, so a prompt does not depend on its neighbours.
        `into`: one (k, v) per block to write them to, block by block; else they are new.
        """
        device, dtype = self.img_in.weight.device, self.img_in.weight.dtype
        layouts = [prefix_layout(prompt) for prompt in prompts]
        if len({image_layout(prompt) for prompt in prompts}) > 1:
            raise ValueError("prompts of a batch need source images of the same sizes at the same places")
        lengths = [len(layout.positions) for layout in layouts]
        size = max(lengths)
        *segments, (first, _, is_image) = layouts[0].segments
        segments = (*segments, (first, size, is_image))
        positions = [layout.positions + [(0, 0, 0)] * (size - length)
                     for layout, length in zip(layouts, lengths)]
        rope = self.rope(torch.tensor(positions, device=device))

        h = pad_sequence(self.embed_prompts(prompts, layouts, device, dtype), batch_first=True)    # (P, S, D)
        modulation, kv = self.modulate(self.embed_time(torch.zeros(1, device=device))), []
        for i, block in enumerate(self.transformer_blocks):
            h, keys_values = self.run_block(block, h, modulation, rope, None, None, None, segments)
            if into is not None:
                for buffer, new in zip(into[i], keys_values):
                    buffer.copy_(new)
                keys_values = into[i]
            kv.append(keys_values)

        targets = torch.tensor([[(layout.end, *yx) for yx in pixel_positions(*grid)] for layout in layouts],
                               device=device)
        mask = None
        if min(lengths) < size:
            real = torch.arange(size, device=device) < torch.tensor(lengths, device=device)[:, None]
            mask = torch.cat([real, real.new_ones(targets.shape[:2])], dim=1)[:, None, None]
        return Prefix(kv, self.rope(targets), mask, None)

    def embed_prompts(self, prompts, layouts, device, dtype):
        """What enters the first block, per prompt (S, D): text and source images in their order."""
        embeds = [prompt.embeds[~torch.tensor(prompt.slots, device=prompt.embeds.device)]
                  for prompt in prompts]
        text = self.txt_in["in_layer"](self.txt_in["text_norm"](torch.cat(embeds).to(device, dtype)))
        # all text tokens of all prompts, (-, D)
        text = self.txt_in["out_layer"](F.gelu(text, approximate="tanh"))
        latents = [source.flatten(1).T.to(device, dtype) for prompt in prompts for source in prompt.sources]
        # of all images, (-, D)
        image = self.img_in(torch.cat([text.new_empty(0, self.config["in_channels"]), *latents]))
        found, used = [], {False: 0, True: 0}
        for layout in layouts:
            parts = [image[:0]]  # keeps img_in in every graph: all ranks must reduce the same gradients
            for first, last, is_image in layout.segments:
                start = used[is_image]
                parts.append((image if is_image else text)[start:start + last - first])
                used[is_image] += last - first
            found.append(torch.cat(parts))
        return found

    def velocity(self, x, t, prefix):
        """Velocity of the target tokens, without guidance. x (B, N, C) fp32, t (B,) fp32 -> (B, N, C) fp32.
        """
        rope = select_prompts(prefix.rope, prefix.index, len(x))
        mask = None if prefix.mask is None else select_prompts(prefix.mask, prefix.index, len(x))
        time = self.embed_time(t)
        h, modulation = self.img_in(x.to(self.img_in.weight.dtype)), self.modulate(time)  # h (B, N, D)
        for block, past in zip(self.transformer_blocks, prefix.kv):
            h, _ = self.run_block(block, h, modulation, rope, past, prefix.index, mask)
        h = F.layer_norm(h, h.shape[-1:],
                         eps=self.eps) * (1 + self.norm_out["linear"](F.silu(time)).unsqueeze(1))
        return self.proj_out(h).float()

    def anchor(self, zero):
        """Zero, with a graph: its backward pass changes no gradient, but lets FSDP reduce those that are
        there. (Before torch 2.13 FSDP fails on a GPU where the root is called without an argument.)"""
        return zero * self.img_in.weight.sum()


class ChannelNorm(nn.Module):
    """RMS norm over channels of a (B, C, h, w) map; gamma keeps the checkpoint's trailing singleton axes."""

    def __init__(self, channels, axes=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x):
        return F.normalize(x.float(), dim=1).type_as(x) * (x.shape[1] ** 0.5 * self.gamma.view(-1, 1, 1))


class ResBlock(nn.Module):
    """(B, C, h, w) -> (B, out, h, w)."""

    def __init__(self, channels, out):
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = ChannelNorm(out), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.conv_shortcut(x)


class PixelAttention(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels):
        super().__init__()
        self.norm = ChannelNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.proj(out.unflatten(2, x.shape[-2:]))


class MiddleBlock(nn.Module):
    """(B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(channels, channels), ResBlock(channels, channels)])
        self.attentions = nn.ModuleList([PixelAttention(channels)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nn.Module):
    """Residual blocks, a 2x downsampling unless `temporal` is None, and a parameter-free shortcut around
    both.

    The shortcut averages the 2x2 pixels (and, in temporal stages, an empty earlier frame) of a channel into
    the output channels: the video autoencoder's shortcut for a single frame.
    """

    def __init__(self, channels, out, blocks, temporal):
        super().__init__()
        self.resnets = nn.Sequential(*(ResBlock(channels if i == 0 else out, out) for i in range(blocks)))
        self.downsampler = None if temporal is None else nn.ModuleDict({"resample": nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(out, out, 3, stride=2))})
        self.out, self.temporal = out, temporal

    def forward(self, x):
        h = self.resnets(x)
        if self.downsampler is None:
            return h + x.unflatten(1, (self.out, -1)).mean(2)
        pixels = F.pixel_unshuffle(x, 2).unflatten(1, (x.shape[1], 4))                   # (B, C, 4, h/2, w/2)
        if self.temporal:
            pixels = torch.cat([torch.zeros_like(pixels), pixels], dim=2)
        shortcut = pixels.flatten(1, 2).unflatten(1, (self.out, -1)).mean(2)
        return self.downsampler["resample"](h) + shortcut


class UpBlock(nn.Module):
    """Mirror of DownBlock: the shortcut repeats channels into the 2x2 pixels (and the last of two frames)."""

    def __init__(self, channels, out, blocks, temporal):
        super().__init__()
        self.resnets = nn.Sequential(*(ResBlock(channels if i == 0 else out, out) for i in range(blocks + 1)))
        self.upsampler = None if temporal is None else nn.ModuleDict({"resample": nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(out, out, 3, padding=1))})
        self.out, self.frames = out, 2 if temporal else 1

    def forward(self, x):
        h = self.resnets(x)
        if self.upsampler is None:
            return h
        pixels = x.repeat_interleave(self.out * self.frames * 4 // x.shape[1], dim=1)
        pixels = pixels.unflatten(1, (self.out, self.frames, 4))[:, :, -1]                 # (B, out, 4, h, w)
        return self.upsampler["resample"](h) + F.pixel_shuffle(pixels.flatten(1, 2), 2)


class Encoder(nn.Module):
    """(B, channels, H, W) -> (B, latent, h, w), halved by all stages but the last."""

    def __init__(self, channels, dims, latent, blocks, temporal):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, dims[0], 3, padding=1)
        stages = zip(dims, dims[1:], [*temporal, None])
        self.down_blocks = nn.Sequential(*(DownBlock(dim, out, blocks, kind) for dim, out, kind in stages))
        self.mid_block = MiddleBlock(dims[-1])
        self.norm_out, self.conv_out = ChannelNorm(dims[-1]), nn.Conv2d(dims[-1], latent, 3, padding=1)

    def forward(self, x):
        return self.conv_out(F.silu(self.norm_out(self.mid_block(self.down_blocks(self.conv_in(x))))))


class Decoder(nn.Module):
    """(B, latent, h, w) -> (B, channels, H, W)."""

    def __init__(self, channels, dims, latent, blocks, temporal):
        super().__init__()
        self.conv_in = nn.Conv2d(latent, dims[0], 3, padding=1)
        self.mid_block = MiddleBlock(dims[0])
        stages = zip(dims, dims[1:], [*temporal, None])
        self.up_blocks = nn.Sequential(*(UpBlock(dim, out, blocks, kind) for dim, out, kind in stages))
        self.norm_out, self.conv_out = ChannelNorm(dims[-1]), nn.Conv2d(dims[-1], channels, 3, padding=1)

    def forward(self, x):
        return self.conv_out(F.silu(self.norm_out(self.up_blocks(self.mid_block(self.conv_in(x))))))


class VAE(nn.Module):
    """Qwen-Image-2.1's autoencoder for one still RGBA image: 16x downsampling, `z_dim` channels, plain 2D
    operations.

    Its checkpoint is a video model's; the temporal convolutions (`UNUSED_VAE_KEYS`) never act on a single
    frame.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        base, decoder_base = config["base_dim"], config["decoder_base_dim"] or config["base_dim"]
        mult, blocks, z_dim = config["dim_mult"], config["num_res_blocks"], config["z_dim"]
        temporal = config["temperal_downsample"]
        self.encoder = Encoder(config["in_channels"], [base * m for m in [1] + mult], 2 * z_dim, blocks,
                               temporal)
        self.quant_conv = nn.Conv2d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = nn.Conv2d(z_dim, z_dim, 1)
        dims = [decoder_base * m for m in [mult[-1]] + mult[::-1]]
        self.decoder = Decoder(config["out_channels"], dims, z_dim, blocks, temporal[::-1])

    def normalisation(self, device):
        """Latent mean and std of the config, each (C, 1, 1) fp32."""
        return (torch.tensor(self.config[key], device=device)[:, None, None]
                for key in ("latents_mean", "latents_std"))

    def encode(self, images):
        """images (B, 4, H, W) in [-1, 1] -> normalised latents (B, C, H/16, W/16) fp32, the posterior's mode.
        """
        mean, std = self.normalisation(images.device)
        moments = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))
        return (moments.float().chunk(2, dim=1)[0] - mean) / std

    def decode(self, latents):
        """normalised latents (B, C, h, w) -> images (B, 4, 16h, 16w) fp32 in [-1, 1]."""
        mean, std = self.normalisation(latents.device)
        latents = (latents.float() * std + mean).to(self.quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(latents)).float().clamp(-1, 1)


# ---- 2. prompts: Qwen3-VL through transformers -------------------------------------------------------------

SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


CUT = "\ue000"  # a private character: where `Processor` tokenizes what stands before and after it apart


def as_text(text):
    """A user's text in which control tokens such as <|im_end|> are words like others. (`Processor` takes the
    character out again; a server behind `RemoteScorer` sees it.)
    """
    return re.sub(r"<(?=\|\w+\|>)", "<" + CUT, text)


def prompt_text(prompt, images=0):
    """The template the checkpoint was trained with; an empty prompt becomes a space because Qwen has no BOS
    token.
    """
    pictures = " ".join(f"<image{i + 1}>{IMAGE}" for i in range(images))
    return f"{SYSTEM}<|im_start|>user\n{pictures}{as_text(prompt) or ' '}<|im_end|>\n<|im_start|>assistant\n"


class Processor:
    """Tokenizer and image processor of a Qwen-VL directory, without the stock class, whose video part needs
    torchvision.
    """

    def __init__(self, directory):
        from transformers import AutoTokenizer
        # the public name wants torchvision before 5.19
        from transformers.models.auto.image_processing_auto import AutoImageProcessor
        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        # the same pixels with torchvision or not
        self.image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
        self.image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, texts, images=()):
        """texts hold one <|image_pad|> per image; images is the flat list of RGB images in the order of the
        texts.

        Returns the model's keyword arguments as CPU tensors (`.to(device)` moves them), texts padded on the
        left.
        """
        from transformers import BatchEncoding
        if images:
            pixels = self.image_processor(images=list(images), return_tensors="pt")
            counts = iter((pixels["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
            texts = [re.sub(r"<\|image_pad\|>", lambda _: "<|image_pad|>" * next(counts), text)
                     for text in texts]
        ids = [self.tokenize(text) for text in texts]
        padding = [max(map(len, ids)) - len(row) for row in ids]
        inputs = BatchEncoding({
            "input_ids": torch.tensor([[self.tokenizer.pad_token_id] * n + row
                                       for n, row in zip(padding, ids)]),
            "attention_mask": torch.tensor([[0] * n + [1] * len(row) for n, row in zip(padding, ids)])})
        if images:
            inputs.update(pixels, mm_token_type_ids=(inputs["input_ids"] == self.image_token).long())
        return inputs

    def tokenize(self, text):
        """Token ids; nothing is added."""
        return [token for part in text.split(CUT)
                for token in self.tokenizer(part, add_special_tokens=False).input_ids]


def load_vlm(directory, device, dtype):
    """Any image-text-to-text checkpoint transformers knows, frozen. Its logits are fp32: see `fp32_logits`;
    its patches meet a matrix: see `patch_products`.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    vlm = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
    return patch_products(fp32_logits(vlm.to(device).eval().requires_grad_(False)))


def fp32_logits(vlm):
    """Make the output head multiply in fp32, whatever the rest computes in: near 20 logits in bf16 are 0.125
    apart, so that the scores of Eq. 12 would come in steps wider than what the pictures of a group differ by.
    """
    head = vlm.get_output_embeddings()
    head.forward = lambda hidden: F.linear(hidden.float(), head.weight.float(), head.bias)
    return vlm


def patch_products(vlm):
    """Make Qwen-VL's first layer, a convolution that sees one patch at a time, the matrix product that it is:
    the same to rounding, and torch's convolution is slow at it on a CPU.
    """
    for conv in vlm.modules():
        if isinstance(conv, torch.nn.Conv3d) and conv.padding == (0, 0, 0):
            conv.forward = functools.partial(patch_product, conv)
    return vlm


def patch_product(conv, patches):
    """The convolution of patches (N, C, T, H, W): (N, features, 1, 1, 1) where a patch is as large as the
    kernel.
    """
    if patches.shape[2:] != conv.kernel_size:
        return conv._conv_forward(patches, conv.weight, conv.bias)
    return F.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)[..., None, None, None]


@contextlib.contextmanager
def one_rank_at_a_time():
    """The ranks of a machine enter one after another, all of them: what they read takes host memory once."""
    turns = max(all_gather_list([int(os.environ.get("LOCAL_WORLD_SIZE", 1))])) if dist.is_initialized() else 1
    for turn in range(turns):
        if turn == int(os.environ.get("LOCAL_RANK", 0)) or turns == 1:
            yield
        if turns > 1:
            dist.barrier()


MAX_SIDES, MAX_PIXELS = 16, 64 * 2**20  # of a picture: longer side over shorter, and all


def open_picture(path):
    """Any picture file as RGBA, turned as its camera says, whole. 16 bits of grey are scaled to 8; what has
    no such reading is a UserError that names the file."""
    try:
        image = Image.open(path)
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDES * min(width, height):
            raise UserError(f"{path}: {width} x {height} pixels; want at most {MAX_PIXELS / 1e6:.0f} "
                            f"million, and sides of at most {MAX_SIDES}:1")
        # a camera's JPEG with a second, smaller picture
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise UserError(f"{path}: {image.n_frames} pictures in one file; save the one that is meant")
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode == "I" and image.getextrema()[1] > 65535:
            raise UserError(f"{path}: numbers whose range is not known (mode {image.mode}); save it with 8 "
                            "bits a channel")
        if image.mode.startswith("I"):  # PIL's own conversion would clip 16 bits to white
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
        return image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a whole picture ({error})") from None


def check_pictures(places):
    """Open every picture of {path: where it is named} now and not in the middle of a run. The ranks share the
    work; all ranks call.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def trouble(path):
        try:
            open_picture(path)
        except UserError as error:
            return f"{places[path]}: {error}"

    with ThreadPoolExecutor() as pool:  # decoding is done outside Python's lock
        found = [why for why in pool.map(trouble, sorted(places)[rank::world]) if why]
    found = all_gather_list(found) if dist.is_initialized() else found
    if found:
        raise UserError(found[0] + f" (and {len(found) - 1} more)" * (len(found) > 1))


def on_white(image):
    """What a VLM sees of an image: its colours over white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


@dataclass
class Request:
    """One line of a prompt file. category chooses reward weights, task a teacher; sources are paths of source
    images (edits); record is the whole line, for function rewards that ask for more."""

    prompt: str
    category: str = "general"
    sources: tuple = ()
    task: str = ""
    record: dict = field(default_factory=dict, compare=False)

    def __post_init__(self):
        self.task = self.task or ("edit" if self.sources else "t2i")

    def images(self):
        """Its source images, RGBA."""
        return [open_picture(path) for path in self.sources]


PROMPT_KEYS = ("prompt", "category", "source", "task")


def read_text(path):
    """A UTF-8 text file, without its byte-order mark."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None


def read_lines(path):
    """(number, line) of a text file's lines that are not empty."""
    lines = ((number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1))
    return [(number, line) for number, line in lines if line]


def check_keys(where, record, known):
    """Refuse keys that look like known ones: "sorce". Others may stand there for a user's own ends."""
    for key in record.keys() - known:
        if meant := difflib.get_close_matches(key, known, cutoff=0.75):
            raise UserError(f'{where}: unknown key "{key}"; is "{meant[0]}" meant?')


def load_prompts(path):
    """Prompt file -> [Request], text-to-image first; a prompt's id is its place in this list. All ranks call.

    JSON Lines: {"prompt": ..., "category"?: ..., "source"?: path or [paths], relative to the file, "task"?:
    ...}, and further keys for function rewards. A file whose name ends in .txt holds one prompt a line.
    """
    path, requests, places = Path(path), [], {}
    if path.suffix not in (".txt", ".json", ".jsonl"):
        raise UserError(f"{path}: want a prompt file: JSON Lines (.jsonl), or one prompt a line (.txt)")
    for number, line in read_lines(path):
        try:
            record = {"prompt": line} if path.suffix == ".txt" else json.loads(line)
            sources = record.get("source") or ()
            sources = tuple(str(path.parent / source)
                            for source in ([sources] if isinstance(sources, str) else sources))
            request = Request(record["prompt"], record.get("category", "general"), sources,
                              record.get("task", ""), record)
            if {type(x) for x in (request.prompt, request.category, request.task)} != {str}:
                raise TypeError('"prompt", "category" and "task" are strings')
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{path}:{number}: want a JSON object with "prompt" ({error!r})') from None
        check_keys(f"{path}:{number}", record, PROMPT_KEYS)
        if not request.prompt.strip():
            raise UserError(f"{path}:{number}: the prompt is empty")
        for source in sources:
            if not Path(source).is_file():
                raise UserError(f"{path}:{number}: there is no source image {source}")
            places.setdefault(source, f"{path}:{number}")
        requests.append(request)
    if not requests:
        raise UserError(f"{path} holds no prompts")
    check_pictures(places)
    return sorted(requests, key=lambda request: request.task, reverse=True)


class TextEncoder:
    """Qwen3-VL as condition encoder: the last layer's output before the final norm, without the system turn.
    """

    def __init__(self, directory, device, dtype):
        self.processor = Processor(os.path.join(directory, "processor"))
        with one_rank_at_a_time():
            self.vlm = load_vlm(os.path.join(directory, "text_encoder"), device, dtype)
        self.device = device

    @torch.no_grad()
    def encode(self, prompt, images=()):
        """One prompt and its source images (as the VAE gets them) -> (embeds (L, E) on the CPU, slots [bool]
        * L).

        One at a time, so that an embedding never depends on what else was in a batch.
        """
        inputs = self.processor([prompt_text(prompt, len(images))],
                                [on_white(image) for image in images]).to(self.device)
        states, norm = [], self.vlm.model.language_model.norm
        hook = norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        self.vlm.model(**inputs, use_cache=False)
        hook.remove()
        ids = inputs["input_ids"][0].tolist()
        start = self.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
        user = [i for i, token in enumerate(ids) if token == start][1]  # the system turn is dropped
        return states[0][0, user:].cpu(), [token == self.processor.image_token for token in ids[user:]]


def free_memory():
    """Give back what nothing refers to any more; transformers models are reference cycles, which only gc
    frees.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # expandable segments wait for one stream only before they are unmapped
        torch.cuda.empty_cache()


# ---- 3. the model family -----------------------------------------------------------------------------------
#
# A fork to another family replaces section 1, TextEncoder in section 2, and this one. All else, the scripts
# too, asks of them only this:
#
#   PIPELINE             _class_name in model_index.json
#   LATENT, SIDE         pixels of a latent's side; what the sides of a picture are multiples of
#   FlowTransformer      made of a config; new_transformer: from a checkpoint, without storage; it has
#                          prefix(prompts, grid, into) -> Prefix, velocity(x, t, prefix) -> v (B, N, C),
#                          anchor(zero): 0, whose graph reaches a parameter of the root,
#                          transformer_blocks, which are sharded one by one, checkpointing, and
#                          config with num_layers, for the memory plan
#   Prefix               what `prefix` makes of P prompts: the sampler holds it in place, the trainer cuts its
#                        graph at the keys and values
#   compile_blocks       of some networks
#   latent_shape         (N, C) of an image; in_pixels: its size in words
#   kv_shape             of the keys and values of a Prefix, which the sampler keeps in place
#   network_width        for the learning rate; forward_flops: for the figures of speed
#   VAE, load_vae        with decode, and in config base_dim, decoder_base_dim; to_images: pictures of what
#                        decode gives
#   encode_prompts       {id: two of what `prefix` takes, with text and without}; image_layout: which of them
#                        may share a batch; prefix_tokens, longest_prefix: how long they are

PIPELINE = "QwenImage21Pipeline"
LATENT, SIDE = 16, 32
# temporal; never act on one frame
UNUSED_VAE_KEYS = re.compile(r"\.(up|down)sampler\.time_conv\.(weight|bias)$")


def without_storage(kind, path, name, dtype):
    """A network of the config at `path`, whose _class_name is `name`, on the meta device; what the config
    lacks is named.
    """
    config = read_config(path, name)
    try:
        with torch.device("meta"):
            return kind(config).to(dtype)
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing") from None


def new_transformer(root, dtype):
    """The checkpoint's transformer without storage; shard it or not, then `materialise` it."""
    path = root / "transformer" / "config.json"
    network = without_storage(FlowTransformer, path, "QwenImage21Transformer2DModel", dtype)
    for key, value in {"patch_size": 1, "causal_condition": True}.items():
        if network.config.get(key, value) != value:
            raise UserError(f"{path}: {key} is {network.config[key]!r}, only {value!r} is supported")
    return network


def compile_blocks(*networks):
    """Fuse the elementwise work of the blocks (--compile). Prefix and targets, with and without mask and
    gradient, are more variants than the usual limit of 8."""
    limit = {"recompile_limit": 64}
    # before torch 2.13 the setting holds for all threads
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        torch._dynamo.config.recompile_limit, limit = limit["recompile_limit"], {}
    for network in networks:
        for block in network.transformer_blocks:
            block.compile(dynamic=True, **limit)


def network_width(config):
    """Of the transformer's stream."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def latent_shape(config, grid):
    """(N, C) of one image of grid = (h, w) latents."""
    return grid[0] * grid[1], config["in_channels"]


def in_pixels(grid):
    """The size of a picture of (h, w) latents, in words."""
    return f"{LATENT * grid[1]}x{LATENT * grid[0]}"


def forward_flops(config, tokens, prompt):
    """Multiply-adds x 2 of one velocity of `tokens` target tokens that look at a prompt and at themselves."""
    prefix = prefix_tokens(prompt)
    dim, layers = network_width(config), config["num_layers"]
    matrices = layers * (4 + 3 * config["mlp_ratio"]) * dim**2 + 2 * config["in_channels"] * dim
    return 2 * tokens * matrices + 4 * layers * tokens * (tokens + prefix) * dim


def kv_shape(config, prompts):
    """Shape of the keys and values of all blocks for P different prompts: (layers, 2, P, H, S, head_dim)."""
    longest = max(map(prefix_tokens, prompts))
    return (config["num_layers"], 2, len(prompts), config["num_attention_heads"], longest,
            config["attention_head_dim"])


def image_layout(prompt):
    """What prompts must share to be computed as one batch: all segments, but for the length of a last one of
    text.
    """
    *segments, (first, last, is_image) = prefix_layout(prompt).segments
    return (*segments, (first, last if is_image else None, is_image))


def prefix_tokens(prompt):
    """Tokens of a prompt's prefix; a slot stands for 2x2 latents of a source image."""
    return len(prompt.slots) + 3 * sum(prompt.slots)


def longest_prefix(encoded, branches):
    """Most prefix tokens of any of {id: (EncodedPrompt, the same without the text)}; branches: 1 counts the
    first alone, 2 both.
    """
    return max(sum(map(prefix_tokens, pair[:branches])) for pair in encoded.values())


def load_vae(root, device, dtype):
    """The checkpoint's frozen VAE."""
    vae = without_storage(VAE, root / "vae" / "config.json", "AutoencoderKLQwenImage21",
                          dtype).to_empty(device=device)
    vae.to(memory_format=torch.channels_last)  # in which convolutions take half the time
    return load_weights(vae, root / "vae", UNUSED_VAE_KEYS).requires_grad_(False)


def fit(image, area):
    """The image resized to about `area` pixels, sides multiples of SIDE, as RGBA."""
    ratio = image.width / image.height
    width = math.sqrt(area * ratio)
    sides = (max(1, round(side / SIDE)) * SIDE for side in (width, width / ratio))
    return image.convert("RGBA").resize(tuple(sides), Image.Resampling.LANCZOS)


def to_pixels(images):
    """PIL images of one size -> (B, 4, H, W) in [-1, 1]."""
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGBA"))) for image in images])
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1


def check_finite(pixels):
    """Refuse pictures that no file can hold."""
    if not pixels.isfinite().all():
        raise UserError("the network draws NaN: its weights are damaged or overflow; go back to an earlier "
                        "model, with a lower --lr")


def to_images(pixels):
    """(B, 4, H, W) in [-1, 1] -> PIL RGBA images."""
    check_finite(pixels)
    return [Image.fromarray(rgba)
            for rgba in ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()]


@torch.no_grad()
def encode_prompts(root, vae, requests, grid, device):
    """{id: Request} -> {id: (EncodedPrompt, the same without the text)}, the two branches of guidance.

    The branch without text keeps its images; without images it is one object for all. grid: the output's
    latents, (height, width); each source is resized to as many pixels. The text encoder is loaded for this
    call and released.
    """
    encoder = TextEncoder(root, device, compute_dtype(device))
    empty, encoded, odd = EncodedPrompt(*encoder.encode(" "), []), {}, 0
    for i, request in requests.items():
        images = [fit(image, LATENT**2 * grid[0] * grid[1]) for image in request.images()]
        odd += any(abs(math.log(image.width / image.height * grid[0] / grid[1])) > 0.1 for image in images)
        latents = [vae.encode(to_pixels([image]).to(device))[0].cpu() for image in images]
        without = EncodedPrompt(*encoder.encode(" ", images), latents) if images else empty
        encoded[i] = EncodedPrompt(*encoder.encode(request.prompt, images), latents), without
    if odd and is_first("aspect"):
        print(f"{odd} edits have a source of another aspect than their output, which is "
              f"{in_pixels(grid)} for all")
    del encoder
    free_memory()
    return encoded


# ---- 4. checkpoints ----------------------------------------------------------------------------------------
#
# The hub layout: model_index.json, transformer/, vae/, text_encoder/, processor/, scheduler/ (and rewards/ if
# any).

WEIGHTS = "diffusion_pytorch_model"
SHARD_BYTES = 5 * 10**9


def find_model(name):
    """A local directory or a hub id -> the directory, checked to be a model of this architecture. All ranks
    call.
    """
    directory = download(name, check=lambda fetch: read_config(fetch("model_index.json"), PIPELINE))
    read_config(directory / "model_index.json", PIPELINE)
    for part in ("transformer", "vae", "text_encoder", "processor", "scheduler"):
        if (directory / part).is_symlink() and not (directory / part).exists():
            raise UserError(f"{directory / part} is a link to {os.readlink(directory / part)}, which is "
                            "gone: put the base model back there")
        if not (directory / part).is_dir():
            raise UserError(f"{directory}: there is no {part}/; the directory is not a complete model")
    return directory


def download(name, check=None):
    """A local directory, or a hub id, which is fetched once per machine -> the directory. check(fetch),
    fetch(file) -> path of one file of a repository, may refuse it before all of it is fetched."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.endswith((".gguf", ".safetensors", ".ckpt", ".pt")):
        raise UserError(f"{name}: want a directory in the hub's layout or a hub id; single files, such as "
                        "GGUF, are not supported")
    from huggingface_hub import hf_hub_download, snapshot_download
    try:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            if check:
                check(lambda file: hf_hub_download(name, file))
            snapshot_download(name)
        if dist.is_initialized():
            dist.barrier()
        return Path(snapshot_download(name))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: no such directory, and not to be had from the hub ({error})") from error


def read_config(path, kind=None):
    """A JSON config; `kind` is the _class_name it must carry."""
    if not Path(path).is_file():
        raise UserError(f"{path} is missing")
    try:
        config = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    if kind and config.get("_class_name") != kind:
        raise UserError(f"{path}: _class_name is {config.get('_class_name')!r}, expected {kind!r}")
    return config


def weight_files(directory):
    """{key: file} of a component, from its index or its single file."""
    index, single = directory / f"{WEIGHTS}.safetensors.index.json", directory / f"{WEIGHTS}.safetensors"
    if index.exists():
        weight_map = read_config(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: no weight_map")
        for key, name in weight_map.items():
            if Path(name).name != name:
                raise UserError(f"{index}: {key} is in {name!r}; want the name of a file beside the index")
        return {key: directory / name for key, name in weight_map.items()}
    with open_weights(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_weights(path):
    """A safetensors file; what is wrong with it is a UserError."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the directory is not a complete checkpoint") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated ({error})") from None


@torch.no_grad()
def load_weights(module, directory, unused=None):
    """Fill a module's storage from safetensors, in place, in its own dtype and on its own device.

    Keys must be equal as sets, except those that match the pattern `unused`; shapes must be equal and dtypes
    floating. Each tensor is read on its own; of a sharded parameter a rank reads only its rows, and nothing
    is communicated.
    """
    files, params = weight_files(directory), dict(module.named_parameters())
    found = {key for key in files if not (unused and unused.search(key))}
    for title, keys in (("missing", params.keys() - found), ("unexpected", found - params.keys())):
        if keys:
            raise UserError(f"{directory}: {len(keys)} {title} tensors, among them "
                            f"{', '.join(sorted(keys)[:5])}")
    for path in sorted(set(files.values())):
        with open_weights(path) as file:
            for key in sorted(key for key in found if files[key] == path):
                load_tensor(file, path, key, params[key])
    return module


def load_tensor(file, path, key, param):
    """One tensor of the open `file` at `path` into a parameter, or this rank's rows of it."""
    if key not in file.keys():
        raise UserError(f"{path}: {key} is missing, though the index says it is there")
    stored = file.get_slice(key)
    if list(stored.get_shape()) != list(param.shape):
        raise UserError(f"{path}: {key} has shape {stored.get_shape()}, the model wants {list(param.shape)}")
    if stored.get_dtype() not in ("BF16", "F16", "F32", "F64"):
        raise UserError(f"{path}: {key} is {stored.get_dtype()}; want BF16, F16 or F32: quantised weights "
                        "(fp8, int8) are not supported")
    local = param.to_local() if isinstance(param, DTensor) else param.data
    first = dist.get_rank() * len(local) if isinstance(param, DTensor) else 0
    local.copy_(stored[first:first + len(local)])


def materialise(module, root, device):
    """Give a transformer its storage and the checkpoint's weights."""
    return load_weights(module.to_empty(device=device), root / "transformer")


def save_model(directory, base, transformer, guidance, trained_on):
    """Write a model directory in the hub layout: bf16 transformer shards, everything frozen linked to `base`.

    Every rank calls it, rank 0 writes. guidance: the recommended scale, and trained_on: names of rewards, are
    kept in model_index.json. The directory appears under its name only when it is complete.
    """
    from huggingface_hub import save_torch_state_dict
    directory = Path(directory)
    part = directory.with_name(directory.name + ".part")
    if directory.resolve() in (base.resolve(), *(path.resolve().parent for path in base.iterdir())):
        raise UserError(f"{directory} holds parts of the base model {base}; save somewhere else")
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        remove(part)
        (part / "transformer").mkdir(parents=True)
        for path in base.iterdir():
            if path.name not in ("transformer", "model_index.json"):
                (part / path.name).symlink_to(path.resolve())
        index = read_config(base / "model_index.json")
        old = index.get("_sampling", {})
        index["_sampling"] = old | {"guidance_scale": guidance,
                                    "trained_on": sorted({*old.get("trained_on", ()), *trained_on})}
        write_text(part / "model_index.json", json.dumps(index, indent=2))
        write_text(part / "transformer" / "config.json", json.dumps(transformer.config, indent=2))
    weights = full_weights(transformer)
    if rank == 0:
        save_torch_state_dict(weights, part / "transformer",
                              filename_pattern=WEIGHTS + "{suffix}.safetensors",
                              max_shard_size=SHARD_BYTES)
        as_umask_says(part / "transformer")
        remove(directory)
        part.rename(directory)
    if dist.is_initialized():
        dist.barrier()


def as_umask_says(directory):
    """Give the weights in a directory the permissions of their config; safetensors makes them readable by
    their owner alone.
    """
    for path in directory.glob("*.safetensors"):
        shutil.copymode(directory / "config.json", path)


@torch.no_grad()
def full_weights(model):
    """All weights of a sharded or plain model, in bf16 on the CPU, on rank 0; nothing elsewhere. All ranks
    call.
    """
    release(model)
    weights, keep = {}, not dist.is_initialized() or dist.get_rank() == 0
    # rounded before they are gathered: one at a time, half the bytes
    for name, param in model.state_dict().items():
        whole = param.to(torch.bfloat16)
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if keep:
            weights[name] = whole.cpu()
    return weights


def checkpoint_state(model, optimizer, old):
    """What a checkpoint holds. old: this rank's shards of other weights of the same model in host memory, if
    there are any.
    """
    weights, moments = get_state_dict(model, optimizer)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    old = {name: DTensor.from_local(shard, mesh, [Shard(0)])
           for (name, _), shard in zip(model.named_parameters(), old or ())}
    return {"model": weights, "optimizer": moments, "old": old}


def save_checkpoint(directory, step, model, optimizer, old=None, keep=False):
    """Everything needed to go on bit for bit, as directory/step-N; older ones go once it is complete, or
    `keep`. All ranks call.
    """
    name, part = directory / f"step-{step:06d}", directory / f"step-{step:06d}.part"
    if dist.get_rank() == 0:
        remove(part)
    dist.barrier()
    release(model)
    try:
        dcp.save(checkpoint_state(model, optimizer, old), checkpoint_id=part)
    except (Exception, CheckpointException) as error:
        raise UserError(f"{part} could not be written; what was saved before is as it was: {error}") from None
    dist.barrier()
    if dist.get_rank() == 0:
        remove(name)
        part.rename(name)
        for path in set() if keep else {*directory.glob("step-*")} - {name}:
            remove(path)
    dist.barrier()


def load_checkpoint(directory, model, optimizer, old=None):
    """Restore the newest complete checkpoint, written by any number of ranks; returns its step, 0 without
    one.

    Its metadata are pickled: resume only runs of your own.
    """
    complete = sorted(path for path in directory.glob("step-*") if path.suffix != ".part")
    if not complete:
        return 0  # stopped before the first save: start over
    state = checkpoint_state(model, optimizer, old)
    dcp.load(state, checkpoint_id=complete[-1])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(complete[-1].name.removeprefix("step-"))


def create_shared(directory):
    """Make a directory that all ranks write to, checked to be one on a shared disk. All ranks call.

    Making directories asks the file server, whatever a machine remembers of a path.
    """
    token, apart = directory / f".{all_gather_list([time.time_ns()])[0]}", False
    directory.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        token.mkdir()
    dist.barrier()
    if dist.get_rank() > 0:
        try:
            token.mkdir()  # rank 0 has, if this is the same directory
            token.rmdir()
            apart = True
        except FileExistsError:
            pass
    hosts = [host for host, failed in all_gather_list([(socket.gethostname(), apart)]) if failed]
    if dist.get_rank() == 0:
        token.rmdir()
    if hosts:
        raise UserError(f"{directory.resolve()} on {hosts[0]} is not the directory of that name that rank 0 "
                        "has: start all nodes in the "
                      "same directory of a disk that they share")


def write_text(path, text):
    """A UTF-8 file that ends with a newline."""
    Path(path).write_text(text + "\n", encoding="utf-8")


def remove(directory):
    """A directory with all that is in it, if it is there."""
    if directory.exists():
        shutil.rmtree(directory)


# ---- 5. flow maths and sampler -----------------------------------------------------------------------------


def timesteps(scheduler, tokens, steps=40, sample_sigmas=None):
    """The sampling grid t_0 = 1 > ... > t_T = 0 of a FlowMatchEuler scheduler config: (T+1,) fp32.

    tokens: target tokens of one image (they set the dynamic shift). sample_sigmas override `steps` and still
    pass through the shift, as in diffusers.
    """
    flags = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
             "stochastic_sampling")
    unsupported = [flag for flag in flags if scheduler.get(flag)]
    if unsupported or scheduler.get("time_shift_type", "exponential") != "exponential":
        raise UserError(f"scheduler_config.json: {unsupported or scheduler['time_shift_type']} is not "
                        "supported")
    t = np.asarray(np.linspace(1, 1 / max(1, steps), max(0, steps)) if sample_sigmas is None
                   else sample_sigmas, np.float32)
    if len(t) < 2 or not (np.diff(t) < 0).all():
        raise UserError("the sampler needs at least 2 steps, and sigmas that fall")
    if scheduler.get("use_dynamic_shifting"):
        low, high = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
        slope = (scheduler["max_shift"] - scheduler["base_shift"]) / (high - low)
        shift = math.exp(tokens * slope + (scheduler["base_shift"] - slope * low))
        t = shift / (shift + (1 / t - 1))
    else:
        shift = scheduler.get("shift", 1.0)
        t = shift * t / (1 + (shift - 1) * t)
    if scheduler.get("shift_terminal"):
        t = 1 - (1 - t) / ((1 - t)[-1] / (1 - scheduler["shift_terminal"]))
    return torch.cat([torch.from_numpy(t), torch.zeros(1)])


def sampling_settings(root, size=None, steps=None, cfg=None):
    """What a run samples with: its own values, else the checkpoint's. Returns grid (h, w) of latents, t
    (T+1,), guidance scale; where neither names one it is 1, none, as Qwen-Image-2.1 is meant to be
    used."""
    index = read_config(root / "model_index.json")
    own = index.get("_sampling", {})
    height, width = size or own.get("size", (512, 512))
    if height % SIDE or width % SIDE:
        raise UserError(f"{height} x {width} pixels: sides must be multiples of {SIDE}")
    grid = height // LATENT, width // LATENT
    t = timesteps(read_config(root / "scheduler" / "scheduler_config.json"), grid[0] * grid[1],
                  40 if steps is None else steps,
                  index.get("sample_sigmas") if steps is None else None)
    return grid, t, own.get("guidance_scale", 1.0) if cfg is None else cfg


def guidance_source(root, cfg, flag="--cfg"):
    """Where a run's guidance scale comes from, for its header: the flag, if it was given, or the checkpoint.
    """
    if cfg is not None:
        return flag
    named = "guidance_scale" in read_config(root / "model_index.json").get("_sampling", {})
    return f"of {root}" if named else f"default: {root} names none"


def noise_levels(t, steps, noise_level):
    """sigma_t = a sqrt(t/(1-t)) of the steps to be sampled stochastically, 0 elsewhere: t (T+1,) -> (T,).

    At t = 1 the formula diverges; the second grid value stands in for it.
    """
    sigma = torch.zeros_like(t[:-1])
    finite = t[:-1].clamp(max=t[1])
    sigma[steps] = noise_level * (finite / (1 - finite)).sqrt()[steps]
    return sigma


def noise_stream(seed, step, prompt_id, image):
    """The CPU random stream of one image: its initial noise, then the noise of each stochastic step.

    It depends on nothing else: neither batch layout nor world size nor device.
    """
    key = hashlib.blake2b(f"{seed} {step} {prompt_id} {image}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)


def sde_mean_std(x, v, t, dt, sigma):
    """Euler-Maruyama step of Eq. 5: the mean and std of x_{t+dt} given x_t. sigma = 0 is the Euler step of
    Eq. 3.

    x, v (B, N, C); t, dt (negative) and sigma broadcast against them. The SDE runs backward in time, so its
    drift is that of Eq. 5 times dt and its noise is sigma sqrt(-dt). All fp32.
    """
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)                                                 # Eq. 5
    return x + drift * dt, sigma * (-dt).sqrt()


def mean_shift(t, dt, sigma):
    """kappa_t = |d(mean)/dv| / std of `sde_mean_std`: by how many of its std a step's mean moves with the
    velocity.
    """
    return (-dt).sqrt() * (1 + sigma**2 * (1 - t) / (2 * t)) / sigma


def guided_velocity(model, x, t, cond, uncond=None, cfg=1.0):
    """Classifier-free guidance v_u + cfg (v_c - v_u); without a second prefix, the conditional velocity."""
    v = model.velocity(x, t, cond)
    if uncond is None:
        return v
    u = model.velocity(x, t, uncond)
    return u + cfg * (v - u)


def denoise_step(model, b):
    """One sampler step on static buffers `b`, in place: b.x becomes the next state. The definition the graph
    replays.
    """
    t, dt, sigma = b.step
    v = guided_velocity(model, b.x, t.expand(len(b.x)), b.cond, b.uncond, b.cfg)
    mean, std = sde_mean_std(b.x, v, t, dt, sigma)
    b.x.copy_(mean + std * b.noise)


def unique_prompts(prompts):
    """One prompt per image -> the different ones (repeated prompts are the same object), and the place of
    each image's among them.
    """
    unique = list({id(prompt): prompt for prompt in prompts}.values())
    place = {id(prompt): i for i, prompt in enumerate(unique)}
    return unique, [place[id(prompt)] for prompt in prompts]


class Sampler:
    """Mixed ODE/SDE sampling with a frozen model whose weights stay at fixed addresses.

    A step works on static buffers, kept by their exact shapes; with `graphs` the first step of a new
    shape runs eagerly, is captured as a CUDA graph and replayed from then on. Refilling the model's weights
    in place needs no new capture. The prompts' keys and values are written into one arena, where those of all
    shapes lie in turn; it is made for `longest` prefix tokens, so that it need not grow for a single prompt.
    `cudnn` takes cuDNN's attention, which the trainer does not use. `drop` frees buffers and graphs.
    """

    def __init__(self, model, graphs, longest=0, cudnn=False):
        if graphs and not torch.cuda.is_available():
            raise UserError("--graph needs a CUDA GPU")
        self.model, self.graphs, self.longest, self.cudnn = model, graphs, longest, cudnn
        # its own: with a graph torch frees the cuBLAS workspace of all that were captured on its stream
        self.stream = torch.cuda.Stream() if graphs else None
        self.entries, self.pool, self.arena = {}, None, next(model.parameters()).new_empty(0)

    def drop(self):
        """Give the memory of buffers and graphs back; the next call captures anew."""
        synchronize(self.arena.device)  # else a graph's memory is unmapped while its replays run
        self.entries.clear()
        self.pool, self.arena = None, self.arena.new_empty(0)
        free_memory()

    @torch.no_grad()
    def __call__(self, pairs, generators, grid, t, sigma, cfg, keep=()):
        """Sample one image per pair (EncodedPrompt, the same without text); images of a prompt share the
        pair's objects.

        generators: one per image; grid: (h, w) latents; t (T+1,), sigma (T,) as from `timesteps` and
        `noise_levels`; cfg: guidance scale, 1 for none. Returns x_0 (B, N, C) and {k: (x_k, z_k)} for k in
        keep, z_k None where no noise was added after x_k; all fp32.
        """
        device, shape = self.arena.device, latent_shape(self.model.config, grid)
        branches = [[prompt for prompt, _ in pairs]] + ([[empty for _, empty in pairs]] if cfg != 1 else [])
        b = self.buffers(len(pairs), shape, branches)
        for prefix, prompts in zip((b.cond, b.uncond), branches):
            self.write_prefix(prefix, prompts, grid)
        b.x.copy_(draw_noise(generators, shape))
        b.cfg.fill_(cfg)
        states, steps = {}, torch.stack([t[:-1], t[1:] - t[:-1], sigma], dim=1).to(device)
        for k, step in enumerate(steps):
            b.step.copy_(step)
            if sigma[k] > 0:
                b.noise.copy_(draw_noise(generators, shape))
            if k in keep:
                states[k] = b.x.clone(), b.noise.clone() if sigma[k] > 0 else None
            self.step(b)
        if len(steps) in keep:
            states[len(steps)] = b.x.clone(), None
        return b.x.clone(), states

    def step(self, b):
        """One sampler step: the graph of these buffers, or the eager step, which is the graph's warm-up."""
        if b.graph:
            b.graph.replay()
            return
        with cudnn_attention() if self.cudnn else contextlib.nullcontext():
            denoise_step(self.model, b)
            if self.graphs:
                b.graph = self.capture(b)

    def buffers(self, count, shape, branches):
        """Static buffers for so many images of this shape, whose prompts are one list per branch of guidance.
        """
        unique = [unique_prompts(prompts) for prompts in branches]
        shapes = [kv_shape(self.model.config, prompts) for prompts, _ in unique]
        padded = [len({prefix_tokens(prompt) for prompt in prompts}) > 1 for prompts, _ in unique]
        indexed = [len(prompts) not in (1, count) for prompts, _ in unique]
        key = (count, shape, *zip(shapes, padded, indexed))
        if key in self.entries:
            return self.entries[key]
        sizes = [math.prod(shape) for shape in shapes]
        if sum(sizes) > len(self.arena) or len(self.entries) == 32:
            self.drop()  # graphs hold the arena's address, and shapes must not pile up
            layers, two, _, heads, _, head_dim = shapes[0]
            longest = layers * two * heads * head_dim * self.longest
            self.arena = self.arena.new_empty(max(sum(sizes), longest))
        prefixes = [self.prefix_buffers(count, shape[0], part, *kind)
                    for part, *kind in zip(self.arena[:sum(sizes)].split(sizes), shapes, padded, indexed)]
        x = torch.zeros(count, *shape, device=self.arena.device)
        self.entries[key] = SimpleNamespace(x=x, noise=torch.zeros_like(x), step=x.new_zeros(3),
                                            cfg=x.new_ones(()), graph=None,
                                            cond=prefixes[0],
                                            uncond=prefixes[1] if len(prefixes) > 1 else None)
        return self.entries[key]

    def prefix_buffers(self, count, tokens, part, shape, padded, indexed):
        """A Prefix whose keys and values lie in this part of the arena."""
        device, (_, _, prompts, _, length, head_dim) = part.device, shape
        rope = torch.zeros(prompts, tokens, head_dim // 2, 2, device=device)
        mask = torch.ones(prompts, 1, 1, length + tokens, dtype=torch.bool,
                          device=device) if padded else None
        index = torch.zeros(count, dtype=torch.long, device=device) if indexed else None
        return Prefix([tuple(block) for block in part.view(shape)], rope, mask, index)

    def write_prefix(self, buffer, prompts, grid):
        """Compute the prefix of one prompt per image into its buffers; repeated prompts are computed once."""
        unique, places = unique_prompts(prompts)
        prefix = self.model.prefix(unique, grid, into=buffer.kv)
        buffer.rope.copy_(prefix.rope)
        if buffer.mask is not None:
            buffer.mask.copy_(prefix.mask)
        if buffer.index is not None:
            buffer.index.copy_(torch.tensor(places))

    def capture(self, b):
        """denoise_step on these buffers as a graph; a reward thread may use CUDA meanwhile, but not wait for
        the whole device.
        """
        graph, self.pool = torch.cuda.CUDAGraph(), self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            denoise_step(self.model, b)
        return graph


def draw_noise(generators, shape):
    """One sample per image, drawn on the CPU, so that every device sees the same noise: (B, *shape)."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def cudnn_attention():
    """cuDNN's attention first, for what runs inside."""
    kinds = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
             SDPBackend.MATH]
    return sdpa_kernel(kinds, set_priority=True)


# target tokens up to which a batch may hold several prompts; beyond, one prompt fills the machine
MIXED_TOKENS = 1024


def split_batches(keys, encoded, size, tokens):
    """[(step, prompt id, image number)], ordered by prompt, in batches of at most `size`.

    A batch holds one prompt: no mask, the fastest attention, and the keys and values of one prefix. Only
    small pictures (`tokens` each) share a batch with those of other prompts, as long as these have the same
    image layout.
    """
    batch = []
    for key in keys:
        if batch:
            first, new = batch[0][1], key[1]
            few = (len(batch) + 1) * tokens <= MIXED_TOKENS
            mixes = few and image_layout(encoded[first][0]) == image_layout(encoded[new][0])
            if len(batch) == size or not (new == first or mixes):
                yield batch
                batch = []
        batch.append(key)
    if batch:
        yield batch


def sample(sampler, encoded, keys, grid, t, sigma, cfg, seed, batch, keep=()):
    """Sample [(step, prompt id, image number)], each with its own noise, at most `batch` at once. Yields
    (part of the list, x_0 (B, N, C), states {k: (x_k, z_k) (B, N, C)})."""
    for part in split_batches(keys, encoded, batch, grid[0] * grid[1]):
        pairs, generators = [encoded[i] for _, i, _ in part], [noise_stream(seed, *key) for key in part]
        yield part, *sampler(pairs, generators, grid, t, sigma, cfg, keep)


def generate(sampler, vae, encoded, keys, grid, t, sigma, cfg, seed, batch, keep=()):
    """`sample`, decoded: yields (part of the list, PIL images, states). Decoding one 1024 px image takes 3
    GiB at the real size.
    """
    for part, x0, states in sample(sampler, encoded, keys, grid, t, sigma, cfg, seed, batch, keep):
        latents = x0.mT.unflatten(2, grid).split(max(1, min(4, 4096 // x0.shape[1])))          # (B', C, h, w)
        yield part, [image for few in latents for image in to_images(vae.decode(few))], states


def matmul_peak(device):
    """Measured FLOP/s of a large matrix product in the compute dtype: the denominator of MFU."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=compute_dtype(device))
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).mean for _ in range(10))


def detach_prefix(prefix):
    """The same prefix with its keys and values as leaves, so that many backward passes can share one prefix
    graph.

    Leaves are fp32, so that gradients of many micro-batches are summed in fp32.
    """
    return prefix._replace(kv=[tuple(x.detach().float().requires_grad_() for x in kv) for kv in prefix.kv])


def backward_prefixes(prefixes, leaves):
    """Push the gradients that the leaves of `detach_prefix` have gathered through the prefixes, once."""
    kv, gathered = ([x for prefix in part for pair in prefix.kv for x in pair] for part in (prefixes, leaves))
    torch.autograd.backward(kv, [leaf.grad.to(x.dtype) for x, leaf in zip(kv, gathered)])


# ---- 6. rewards --------------------------------------------------------------------------------------------

RUBRICS = {  # Sec. 3.2, 3.3
    "alignment":
        "Rate from 1 to 5 how faithfully the image shows what the prompt asks for; ignore beauty. Judge in "
        "this order: objects and their number, then attributes (colour, size, shape, material), then spatial "
        "relations, then actions and poses. If an object is missing, wrong or miscounted, the score is at "
        "most 2.\nPrompt: {prompt}",
    "aesthetic":
        "Rate the visual quality of the image from 1 to 5: balanced composition, realistic light, faithful "
        "texture, a coherent whole. Blur, colour casts, washed-out contrast and artefacts lower the score. "
        "Do not judge what it shows.",
    "portrait":
        "Rate the portrait from 1 to 5: an attractive face in right proportions with its own details, "
        "realistic skin and hair, sound anatomy. Wrong numbers of fingers, distorted features or an "
        "unnatural body lower the score.",
    "instruction":
        "The last image is an edit of the images before it. Rate from 1 to 5 how well it carries out the "
        "instruction: split it into core and auxiliary requirements; is the core met, are the auxiliary "
        "ones, is the whole coherent? If the core is not met, the score is at most 2.\nInstruction: {prompt}",
    "consistency":
        "The last image is an edit of the images before it. Rate from 1 to 5 how well everything that the "
        "instruction does not touch is preserved: objects, people, background, layout, light, style.\n"
        "Instruction: {prompt}",
}
ANSWERS = ("\nAnswer with <score>N</score>, N from 1 to 5.",  # without and with reasoning
           "\nFirst describe the image and judge it, then answer with <score>N</score>, N from 1 to 5.")
SCORES = ("1", "2", "3", "4", "5")
FAILED, UNDEFINED = math.nan, math.inf  # in score tensors
VLM_LOCK = threading.Lock()  # local VLMs score one batch at a time


@dataclass
class Reward:
    """One term R_k of Eq. 13.

    score(images, prompts, sources) -> per image a number; None where the reward does not apply (no face to
    preserve); an exception, or NaN, where scoring failed. A function with a parameter `records` gets the
    lines of the prompt file as well. `categories` {category: weight} takes precedence over `weight`; where
    the weight is 0 nothing is asked. `range` is the scale on which rewards are compared outside of training,
    None if it is not known.
    """

    name: str
    weight: float
    source: str
    score: Callable
    range: tuple | None = (1.0, 5.0)
    categories: dict = field(default_factory=dict)
    traceback_shown: bool = False

    def weigh(self, request):
        """w_k of Eq. 13 for a request."""
        return self.categories.get(request.category, self.weight)

    def __call__(self, images, requests):
        """[(score, why)] for every image: (number, ""), (UNDEFINED, ""), or (FAILED, the reason). Never
        raises.
        """
        answers = [(UNDEFINED, "")] * len(images)
        asked = [i for i, request in enumerate(requests) if self.weigh(request)]
        if not asked:
            return answers
        records = {"records": [requests[i].record for i in asked]} if wants_records(self.score) else {}
        where = ""
        try:  # with copies of the images, as a function may change them
            scores = self.score([images[i].copy() for i in asked], [requests[i].prompt for i in asked],
                                [requests[i].images() for i in asked], **records)
            if len(scores) != len(asked):
                raise ValueError(f"{len(scores)} scores for {len(asked)} images")
            scores = [score if score is None or isinstance(score, Exception) else float(score)
                      for score in scores]
        # a reward is anyone's code or service: its failure is counted, not fatal
        except (Exception, SystemExit) as error:
            scores, where = [error] * len(asked), raised_at(error)
            if not self.traceback_shown:  # one is enough
                traceback.print_exception(error)
            self.traceback_shown = True
            error.__traceback__ = error.__context__ = error.__cause__ = None  # frames keep a judge's memory
        for i, score in zip(asked, scores):
            if score is not None:
                bad = isinstance(score, BaseException) or not abs(score) < 1e30
                answers[i] = (FAILED, f"{self.name}: {score!r}{where}") if bad else (score, "")
        return answers


def wants_records(score):
    """Whether a function reward has a parameter for the lines of the prompt file."""
    ours = isinstance(score, (VLMScorer, RemoteScorer))
    return not ours and "records" in inspect.signature(score).parameters


def raised_at(error):
    """" at FILE:LINE" where the user's code was when an exception came."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename != __file__ and not frame.filename.startswith((sys.prefix, "<"))]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def expected_score(logits, tokens):
    """Eq. 12 with the mass renormalised over the five score tokens: logits (B, V) -> score (B,), mass (B,).
    """
    logits = logits.float()
    p = logits[:, tokens].softmax(-1)                                                               # p(s|x,c)
    mass = (logits[:, tokens].logsumexp(-1) - logits.logsumexp(-1)).exp()
    return p @ torch.arange(1.0, 6.0, device=p.device), mass                                        # Eq. 12


def check_mass(score, mass):
    """The score, or an exception where the VLM puts too little of its probability on the five scores to have
    answered.
    """
    return score if mass >= 0.5 else ValueError(f"only {mass:.2g} of the probability is on the scores 1-5")


def score_tokens(tokenizer):
    """Token ids of the answers 1..5, each of which must be a single token."""
    ids = [tokenizer(score, add_special_tokens=False).input_ids for score in SCORES]
    if any(len(i) != 1 for i in ids):
        raise UserError(f"{tokenizer.name_or_path}: the scores 1-5 are not single tokens, so Eq. 12 cannot "
                        "be read off")
    return [i[0] for i in ids]


def question(rubric, prompt, reasoning):
    """What a judge is asked beside the pictures."""
    return rubric.replace("{prompt}", as_text(prompt)) + ANSWERS[bool(reasoning)]


def score_text(tokenizer, rubric, prompt, images, reasoning):
    """The conversation up to the VLM's answer: pictures (sources first), then the question."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question(rubric, prompt, reasoning)}]
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)


class VLMScorer:
    """A VLM that rates pictures from 1 to 5 by the distribution over its score tokens (Eq. 12).

    vlm: the model, or its directory until `load_vlms` loads it; processor: directory of tokenizer and image
    processor; rubric: what is asked, with {prompt} where the prompt goes; reasoning: tokens that it may think
    before it answers, 0 for none. Source images come first.
    """

    BATCH, PIXELS = 32, 8 * 2**20  # at most so many answers at once, or so many pixels of their pictures

    def __init__(self, vlm, processor, rubric, reasoning=0):
        self.vlm, self.processor, self.rubric, self.reasoning = vlm, Processor(processor), rubric, reasoning
        # mass on the scores, mean of the last batch
        self.tokens, self.mass = score_tokens(self.processor.tokenizer), None

    def __call__(self, images, prompts, sources):
        with VLM_LOCK:
            scores, masses, _ = zip(*self.read(images, prompts, sources))
        self.mass = sum(masses) / len(masses)
        return scores

    @torch.no_grad()
    def read(self, images, prompts, sources):
        """Per image (score or exception, probability mass on the five scores, reasoning)."""
        answers, asked = [], [[*before, image] for before, image in zip(sources, images)]
        for batch in self.batches(asked):
            pictures = [asked[i] for i in batch]
            texts = [score_text(self.processor.tokenizer, self.rubric, prompts[i], len(p), self.reasoning)
                     for i, p in zip(batch, pictures)]
            flat = [on_white(image) for p in pictures for image in p]
            thoughts = self.reason(texts, flat) if self.reasoning else [""] * len(texts)
            texts = [f"{text}{thought or ''}<score>" for text, thought in zip(texts, thoughts)]
            inputs = self.processor(texts, flat).to(self.vlm.device)
            logits = self.vlm(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            scores, masses = expected_score(logits, self.tokens)
            for score, mass, thought in zip(scores.tolist(), masses.tolist(), thoughts):
                if thought is None:
                    score = ValueError(f"no <score> within {self.reasoning + 16} tokens")
                else:
                    score = check_mass(score, mass)
                answers.append((score, mass, thought))
        return answers

    def batches(self, asked):
        """Cut lists of pictures into batches by their pixels, at least one a batch; yields their row numbers.
        """
        batch, pixels = [], 0
        for i, pictures in enumerate(asked):
            size = sum(picture.width * picture.height for picture in pictures)
            if batch and (len(batch) == self.BATCH or pixels + size > self.PIXELS):
                yield batch
                batch, pixels = [], 0
            batch.append(i)
            pixels += size
        if batch:
            yield batch

    def reason(self, texts, images):
        """The VLM's own words up to <score>, None where it never got there."""
        inputs = self.processor(texts, images).to(self.vlm.device)
        ids = self.vlm.generate(**inputs, max_new_tokens=self.reasoning + 16, do_sample=False)
        ids = ids[:, inputs["input_ids"].shape[1]:]
        words = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True,
                                                      clean_up_tokenization_spaces=False)
        return [text.rpartition("<score>")[0] if "<score>" in text else None for text in words]


class RemoteScorer:
    """A VLM behind an OpenAI-compatible endpoint (vLLM, SGLang), read through its top log-probs (Eq. 12).

    The VLM writes its whole answer; the score is found from its end. What cannot be read is returned as an
    exception. model: the name it is served under, needed where there are several and none is called as the
    reward. The key is OPENAI_API_KEY_NAME, NAME that of the reward in capitals, or OPENAI_API_KEY.
    """

    # seconds: for an answer; for a server to come back, or to be left alone; between looks for it
    TIMEOUT, AWAY, PAUSE = 120, 300, 2
    # after the first try; requests at a time; time-outs in a row that are enough
    RETRIES, CONCURRENCY, SILENT = 3, 16, 8

    def __init__(self, name, url, rubric="", reasoning=0, model=None):
        self.name, self.url, self.rubric, self.reasoning = name, url.rstrip("/"), rubric, reasoning
        self.mass = None  # on the scores, mean of the last batch
        keys = (f"OPENAI_API_KEY_{name.upper()}", "OPENAI_API_KEY")
        self.key = next((os.environ[key] for key in keys if os.environ.get(key)), "none")
        here = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        # no proxy leads back to this machine
        self.opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * here)
        self.pool, self.told = ThreadPoolExecutor(self.CONCURRENCY), set()
        self.silent, self.muted, self.away = 0, 0.0, None  # time-outs in a row; not asked until; away since
        try:
            served = [entry["id"] for entry in self.request("/models")["data"]]
            if not served:
                raise ValueError("it serves no model")
        except Exception as error:
            message = f"{self.url}/models does not answer as an OpenAI-compatible server: {error!r}"
            raise UserError(message) from None
        named = [each for each in served if Path(each).name == name] if len(served) > 1 else served
        named = [model] if model else named
        if len(named) != 1 or named[0] not in served:
            raise UserError(f'{self.url} serves {", ".join(served)}: say which is reward {name} with "model" '
                            'in a reward file')
        self.model = named[0]

    def __call__(self, images, prompts, sources):
        pictures = [[*before, image] for before, image in zip(sources, images)]
        answers = [*self.pool.map(self.ask, prompts, pictures)]
        masses = [mass for _, mass in answers if mass is not None]
        self.mass = sum(masses) / len(masses) if masses else None
        return [score for score, _ in answers]

    def ask(self, prompt, pictures):
        """(score or exception, probability mass on the scores or None) of one picture."""
        try:
            if time.monotonic() < self.muted:
                raise TimeoutError(f"not asked, as {self.url} let {self.silent} requests in a row wait")
            content = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
            content.append({"type": "text", "text": question(self.rubric, prompt, self.reasoning)})
            body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0,
                    "max_tokens": self.reasoning + 16, "logprobs": True, "top_logprobs": 20}
            choice = self.request("/chat/completions", body)["choices"][0]
            p = score_probabilities((choice.get("logprobs") or {}).get("content") or [])
            if p is None:
                raise ValueError(f"no log-probs of <score>1-5</score> (finish_reason "
                                 f"{choice.get('finish_reason')}); a VLM that thinks "
                                 'first needs "reasoning": TOKENS in a reward file, as train_reward.py '
                                 'prints it')
        except Exception as error:  # whatever a server does wrong costs one score, with its reason
            return error, None
        mass = sum(p)
        return check_mass(sum(s * q for s, q in enumerate(p, 1)) / max(mass, 1e-9), mass), mass       # Eq. 12

    def request(self, path, body=None):
        """The server's JSON. One that is away is waited for; overload and garbage are tried again; time-outs
        and refusals are not.
        """
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url + path, body and json.dumps(body).encode(), headers)
        timeout, tries, faults = self.TIMEOUT if body else min(self.TIMEOUT, 15), 0, []
        while True:
            try:
                with self.opener.open(request, timeout=timeout) as reply:
                    answer = json.load(reply)
                self.silent, self.away = 0, None
                return answer
            except Exception as error:
                fault, words = self.fault(error)
                faults.append(words)
            if fault == "silent":
                self.silent += 1
                if self.silent >= self.SILENT:  # what is queued, and the rest of the step, fails at once
                    self.muted = time.monotonic() + self.AWAY
                self.tell(f"{self.url} has not answered for {timeout} s")
            elif fault == "away":
                self.away = self.away or time.monotonic()  # since when; it is waited for once, whoever asks
                self.tell(f"{self.url} is not there ({words}); waiting up to {self.AWAY} s for it")
            tries += fault == "again"
            back = fault == "away" and time.monotonic() < (self.away or math.inf) + self.AWAY
            hopeful = back or fault == "again" and tries <= self.RETRIES
            if STOP.is_set() or not hopeful:
                raise ConnectionError("; at last ".join(dict.fromkeys((faults[0], words))))
            STOP.wait(self.PAUSE if fault == "away" else 0.5 * 2**tries * (1 + random.random()))

    def fault(self, error):
        """What to do about an error ("away": wait, "again": try again, "silent" or "final": give up), and
        what it is, with its remedy.
        """
        error = error.reason if isinstance(getattr(error, "reason", None), Exception) else error
        if isinstance(error, TimeoutError):
            return "silent", "TimeoutError: no answer in time"
        if isinstance(error, ConnectionRefusedError):
            return "away", "connection refused"
        if isinstance(error, socket.gaierror):
            return "final", f"there is no such host ({error})"
        if not isinstance(error, urllib.error.HTTPError):
            return "again", repr(error)
        words = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
        if error.code in (401, 403):
            words += f" (the key is taken from OPENAI_API_KEY_{self.name.upper()} or OPENAI_API_KEY)"
        if error.code == 404 and not self.url.endswith("/v1"):
            words += " (the address of vLLM and SGLang ends in /v1)"
        again = error.code >= 500 or error.code in (408, 429)
        return "away" if error.code in (502, 503) else "again" if again else "final", words

    def tell(self, message):
        """Print what happened to the server, each thing once."""
        if message not in self.told:
            self.told.add(message)
            print(f"\nreward {self.name}: {message}", file=sys.stderr)


def data_url(image):
    """As PNG: JPEG would hide the artefacts that a reward must see."""
    on_white(image).save(buffer := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def score_probabilities(answer):
    """p(1) .. p(5) at the last of 1-5 that follows <score> in an answer's `logprobs.content`; None without
    one.
    """
    tokens = [entry["token"] for entry in answer]
    for i in reversed(range(len(tokens))):
        if tokens[i].strip() in SCORES and "".join(tokens[:i]).rstrip().endswith("<score>"):
            tops = [(top["token"].strip(), math.exp(top["logprob"])) for top in answer[i]["top_logprobs"]]
            return [sum(p for token, p in tops if token == score) for score in SCORES]


def face_identity(embed):
    """A reward: whether an edit keeps who is in the picture (Sec. 3.3). embed(image) -> one vector per face.

    For each source face the best cosine among the output's faces, averaged, at least 0; None (undefined)
    where the sources show no face, 0 where only the output shows none.
    """
    def similarity(image, sources):
        old, new = [face for source in sources for face in embed(source)], [*embed(image)]
        if not old or not new:
            return 0.0 if old else None
        # (faces, d)
        old, new = (torch.as_tensor(np.array(faces), dtype=torch.float64) for faces in (old, new))
        return F.cosine_similarity(old[:, None], new, dim=-1).amax(1).clamp(min=0).mean().item()

    def score(images, prompts, sources):
        return [*map(similarity, images, sources)]

    score.range = 0.0, 1.0
    return score


def insightface_embed():
    """embed(image) by insightface's detector and ArcFace."""
    try:
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise UserError("--reward identity: `pip install insightface onnxruntime` (its weights are for "
                        "non-commercial "
                          "research only), or bring identity=file.py:embed") from error
    app = FaceAnalysis(allowed_modules=["detection", "recognition"])
    app.prepare(ctx_id=-1)
    # BGR
    return lambda image: [face.normed_embedding for face in app.get(np.asarray(on_white(image))[:, :, ::-1])]


REWARD_KEYS = ("weight", "source", "range", "rubric", "reasoning", "model")
EDITS_ONLY = ("instruction", "consistency", "identity")  # what they judge is the change


def load_rewards(specs, root):
    """`--reward` values -> [Reward]: NAME, NAME=SOURCE, or one JSON file of

        {"rewards": {NAME: {"weight", "source"?, "range"?, "rubric"?, "reasoning"?, "model"?}}, "categories"?:
        {CATEGORY: {NAME: weight}}}

    Names alone weigh 1/K; weights that do not sum to 1 are an error. A source is a VLM (directory or hub id),
    the URL of an OpenAI-compatible endpoint, or file.py:function, in a JSON file relative to it. VLMs are
    found here and loaded by `load_vlms`.
    """
    where, folder, entries, categories = "--reward", Path(), {}, {}
    if len(specs) == 1 and specs[0].endswith(".json"):
        where, folder = specs[0], Path(specs[0]).parent
        entries, categories = read_reward_file(specs[0])
    else:
        for spec in specs:
            name, _, source = spec.partition("=")
            if name in entries or not name or name.endswith(".json"):
                raise UserError(f"--reward {' '.join(specs)}: want different names, or one JSON file alone")
            entries[name] = {"weight": 1 / len(specs), "source": source}
    rewards = []
    for name, entry in entries.items():
        source, score = open_source(name, entry, folder, root)
        span = (1.0, 5.0) if isinstance(score, (VLMScorer, RemoteScorer)) else getattr(score, "range", None)
        span = check_range(where, name, entry.get("range", span))
        weights = {category: float(vector.get(name, 0)) for category, vector in categories.items()}
        rewards.append(Reward(name, float(entry["weight"]), source, score, span, weights))
    return rewards


def read_reward_file(path):
    """The entries {NAME: {"weight": ...}} and {CATEGORY: {NAME: weight}} of a reward file, checked."""
    table = read_config(path)
    entries, categories = table.get("rewards"), table.get("categories", {})
    dicts = [entries, *entries.values()] if isinstance(entries, dict) and entries else [None]
    dicts += [categories, *categories.values()] if isinstance(categories, dict) else [None]
    if not all(isinstance(each, dict) for each in dicts):
        form = '{"rewards": {NAME: {"weight": number, ...}}, "categories"?: {CATEGORY: {NAME: weight}}}'
        raise UserError(f"{path}: want {form}")
    if unknown := table.keys() - {"rewards", "categories"}:
        raise UserError(f"{path}: unknown key {', '.join(sorted(unknown))}; there are rewards and categories")
    for name, entry in entries.items():
        if unknown := entry.keys() - REWARD_KEYS:
            raise UserError(f"{path}: reward {name}: unknown key {', '.join(sorted(unknown))}; there are "
                            f"{', '.join(REWARD_KEYS)}")
        for key in ("source", "rubric", "model"):
            if not isinstance(entry.get(key, ""), str):
                raise UserError(f'{path}: reward {name}: "{key}" is {entry[key]!r}, want a string')
        if type(entry.get("reasoning", 0)) is not int or entry.get("reasoning", 0) < 0:
            raise UserError(f'{path}: reward {name}: "reasoning" is {entry["reasoning"]!r}, want a number of '
                            'tokens')
    for label, vector in [("rewards", {name: entry.get("weight") for name, entry in entries.items()}),
                          *categories.items()]:
        if unknown := vector.keys() - entries.keys():
            raise UserError(f"{path}: {label}: there is no reward {', '.join(sorted(unknown))}")
        for name, weight in vector.items():
            if type(weight) not in (int, float) or not 0 <= weight <= 1:
                raise UserError(f"{path}: {label}: the weight of {name} is {weight!r}, want a number from 0 "
                                "to 1")
        if abs(sum(vector.values()) - 1) > 1e-6:
            raise UserError(f"{path}: {label}: the weights sum to {sum(vector.values()):g}, not to 1")
    return entries, categories


def check_range(where, name, span):
    """The scale of a reward as two numbers, or None."""
    if span is None:
        return None
    if not (isinstance(span, (list, tuple)) and len(span) == 2 and all(type(x) in (int, float) for x in span)
            and span[0] < span[1]):
        raise UserError(f"{where}: the range of {name} is {span!r}, want two numbers, the lower first")
    return float(span[0]), float(span[1])


def check_rewards(rewards, requests):
    """Refuse rewards that no prompt of [Request] can be judged by; say which categories no prompt has."""
    for reward in rewards:
        asked = [request for request in requests if reward.weigh(request)]
        if asked and reward.name in EDITS_ONLY and not any(request.sources for request in asked):
            raise UserError(f"reward {reward.name} judges edits, and no prompt has a source image")
    known = {request.category for request in requests}
    unknown = {category for reward in rewards for category in reward.categories} - known
    if unknown and is_first(f"{unknown}"):
        print(f"reward weights for {', '.join(sorted(unknown))}: no prompt is of such a category")


def open_source(name, entry, folder, root):
    """One reward's source, in words, and its scoring function; a VLM is not loaded yet."""
    source, brought = entry.get("source", ""), root / "rewards" / name
    if "://" in source:
        scorer = RemoteScorer(name, source, model=entry.get("model"))
        # a server names the directory that it serves
        _, rubric, reasoning = read_card(Path(scorer.model), name)
        scorer.rubric = entry.get("rubric") or rubric or find_rubric(name)
        scorer.reasoning = entry.get("reasoning", reasoning)
        return source, scorer
    if name == "identity":
        embed = load_function(folder / source) if source else insightface_embed()
        return source or "insightface", face_identity(embed)
    if source.partition(":")[0].endswith(".py"):
        return source, load_function(folder / source)
    note = ""
    if source:
        directory = folder / source if (folder / source).is_dir() else download(source)
    elif brought.is_dir():
        directory = brought
    else:
        directory, note = root / "text_encoder", f" (zero-shot: there is no {brought})"
    directory, rubric, reasoning = read_card(directory, name)
    read_config(directory / "config.json")
    scorer = VLMScorer(directory, root / "processor" if note else directory,
                       entry.get("rubric") or rubric or find_rubric(name),
                       entry.get("reasoning", reasoning))
    return f"{directory}{note}", scorer


def read_card(directory, name):
    """What train_reward.py wrote beside a VLM: the directory of its weights, the rubric to ask (None: none),
    tokens of reasoning.
    """
    card = read_config(directory / "reward.json") if (directory / "reward.json").exists() else {}
    if "weights" in card:  # shared with another reward
        directory = directory / card["weights"]
        card = read_config(directory / "reward.json")
    # a VLM with one rubric is asked that one, whatever the reward is called
    rubrics = card.get("rubrics", {})
    rubric = [*rubrics.values()][0] if len(rubrics) == 1 else rubrics.get(name)
    return directory.resolve(), rubric, card.get("reasoning", 0)


def load_vlms(rewards, device):
    """Load the VLMs of these rewards, each once. On a GPU they wait in host memory for `seat_judges`. All
    ranks call.
    """
    scorers = [reward.score for reward in rewards if isinstance(reward.score, VLMScorer)]
    vlms = {}
    for directory in dict.fromkeys(scorer.vlm for scorer in scorers):
        with one_rank_at_a_time():
            vlms[directory] = load_vlm(directory, "cpu", compute_dtype(device))
            if device.type == "cuda":
                unseat(vlms[directory])
    for scorer in scorers:
        scorer.vlm = vlms[scorer.vlm]


def local_vlms(rewards):
    """The VLMs that score on this machine, each once."""
    return list({id(reward.score.vlm): reward.score.vlm
                 for reward in rewards if isinstance(reward.score, VLMScorer)}.values())


def unseat(vlm):
    """Leave the GPU: every rank keeps a share of each weight in host memory, so that all together hold the
    VLM once.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for x in (*vlm.parameters(), *vlm.buffers()):
        if not hasattr(x, "share"):  # its weights never change
            length = -(-x.numel() // world)
            share = F.pad(x.data.flatten(),
                          (0, length * world - x.numel()))[rank * length:(rank + 1) * length]
            x.whole, x.share = x.shape, pinned(share.cpu().clone())
        x.data = x.new_empty(0)


@torch.no_grad()
def seat(vlm, device):
    """Back to where scores are computed: the ranks' shares become whole weights again. All ranks call."""
    for x in (*vlm.parameters(), *vlm.buffers()):
        if hasattr(x, "share") and x.shape != x.whole:
            share = x.share.to(device, non_blocking=True)
            world = dist.get_world_size() if dist.is_initialized() else 1
            gathered = share.new_empty(world * len(share))
            gather(gathered, share)
            x.data = gathered[:x.whole.numel()].view(x.whole)
    if device.type == "cuda":
        torch.cuda.synchronize()  # reward threads have streams of their own


def seat_judges(rewards, device):
    """`seat` every local VLM of these rewards."""
    for vlm in local_vlms(rewards):
        seat(vlm, device)


def unseat_judges(rewards):
    """`unseat` every local VLM of these rewards."""
    for vlm in local_vlms(rewards):
        unseat(vlm)


def reward_threads(rewards, device):
    """A thread for each reward, which is asked batch by batch; rewards do not wait for each other.

    On a GPU each has a stream of its own, before the sampler's in priority: on the same one an answer would
    wait for all the sampler's steps that are queued.
    """
    def begin():
        if device.type == "cuda":
            torch.cuda.set_device(device)  # threads start on GPU 0
            torch.cuda.set_stream(torch.cuda.Stream(device, priority=-1))

    return [ThreadPoolExecutor(1, initializer=begin) for _ in rewards]


def find_rubric(name):
    """The rubric of a reward of this name, or a UserError."""
    if name in RUBRICS:
        return RUBRICS[name]
    raise UserError(f'reward {name}: no such rubric; there are {", ".join(RUBRICS)}; in a reward file, '
                    '"rubric" brings one')


def load_function(source):
    """file.py:function -> the function (images, prompts, sources) -> [float]. The file may import its
    neighbours.

    Its range, where rewards are compared outside of training, is an attribute: function.range = (0, 1).
    """
    path, _, name = str(source).rpartition(":")
    if not path or not name.isidentifier():
        raise UserError(f"--reward {source}: want file.py:function")
    if not Path(path).is_file():
        raise UserError(f"--reward {source}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    sys.path.append(str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        why = f"{error!r}{raised_at(error)}"
        raise UserError(f"--reward {source}: {path} cannot be imported: {why}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward {source}: {path} has no function {name}")
    return getattr(module, name)


# ---- 7. sharding -------------------------------------------------------------------------------------------


def setup():
    """Process group for any world size, with or without torchrun, CUDA or not: (rank, world, device)."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # may differ with and without gradients; the ratio must be exactly 1
        torch.backends.cuda.enable_cudnn_sdp(False)
        # for --offload
        torch.set_num_threads(max(1,
                                  len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2), **alone)
    return dist.get_rank(), dist.get_world_size(), device


def compute_dtype(device):
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def shard(model, device, offload=False):
    """FSDP2: blocks, then root. fp32 masters and gradients; bf16 compute on CUDA. The model casts its own
    inputs, so that the timestep stays fp32. Works at world size 1 too. offload: masters, gradients and
    thereby Adam in host memory."""
    world = dist.get_world_size()
    for name, param in model.named_parameters():
        if len(param) % world:
            raise UserError(f"{name} has {len(param)} rows, which {world} ranks cannot share evenly")
    shard_blocks(model, model.transformer_blocks, init_device_mesh(device.type, (world,)), offload)
    for method in ("prefix", "velocity", "anchor"):
        register_fsdp_forward_method(model, method)
    return model


def shard_blocks(model, blocks, mesh, offload=False):
    """fully_shard of each block, then of what is left."""
    dtype, cuda = compute_dtype(torch.device(mesh.device_type)), mesh.device_type == "cuda"
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    where = CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy()
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=mixed, offload_policy=where)


def keep_gathered(model, parameters, gradients):
    """How an update treats the network: `parameters` stay gathered in bf16 from the first micro-batch to the
    last, instead of block by block in every pass; `gradients` are added up in fp32 on each rank until
    `reduce_gradients`."""
    model.set_reshard_after_forward(not parameters)
    model.set_reshard_after_forward(False, recurse=False)  # the root's own are needed again at once
    model.set_reshard_after_backward(not parameters)
    model.set_requires_gradient_sync(not gradients)


def reduce_gradients(model):
    """Reduce what every rank has added up. (The last backward pass could do it, but not where it is the first
    to reach a parameter: FSDP would find gradients in bf16 beside those added up in fp32.)"""
    model.set_requires_gradient_sync(True)
    model.anchor(0.0).backward()


def release(model):
    """Every rank holds its own rows only again: before the optimizer, which works on those."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_shards(model):
    """This rank's rows of every parameter of a sharded model, fp32, in parameter order."""
    release(model)  # the root stays gathered after a forward without backward
    return [param.to_local().detach() for param in model.parameters()]


def pinned(x):
    """A copy of a host tensor in locked pages, from which copies to the GPU are fast; without a GPU the
    tensor as it is.

    `pin_memory` would round its size up to a power of two.
    """
    if not torch.cuda.is_available() or x.numel() == 0:
        return x
    pages = torch.frombuffer(mmap.mmap(-1, x.nbytes), dtype=x.dtype).view(x.shape).copy_(x)
    error = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, 0))
    if error:
        raise UserError(f"{x.nbytes / 2**20:.0f} MiB of host memory cannot be locked for the GPU (CUDA error "
                        f"{error})")
    weakref.finalize(pages, torch.cuda.cudart().cudaHostUnregister, pages.data_ptr()).atexit = False
    return pages


def to_host(shards, dtype):
    """A copy of this rank's shards in host memory, pinned where there is a GPU: weights that wait for their
    turn in the frozen network.
    """
    return [pinned(shard.to(dtype, copy=True).cpu()) for shard in shards]


def gather(out, share):
    """All ranks' shares of a tensor, one after another, into `out`."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(out, share)
    else:
        out.copy_(share)


@torch.no_grad()
def gather_weights(network, shards):
    """All ranks' shards become the whole weights of a network, in its storage and dtype; addresses never
    change.
    """
    for param, shard in zip(network.parameters(), shards, strict=True):
        # one host thread converts slowly
        gather(param.data, shard.to(param.device, non_blocking=True).to(param.dtype).contiguous())


def all_gather_list(values):
    """Every rank's list, concatenated in rank order."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


# ---- 8. memory ---------------------------------------------------------------------------------------------

# peaks that shapes do not tell, in activations (tokens x width, in the compute dtype) or pixels x channels of
# the VAE
FORWARD, BACKWARD, DECODING = 14, 41, 11
JUDGING = 0.35  # of a judge's own bytes, when it works: its head in fp32, the pictures of a batch
# what the allocator holds beyond what is allocated: up to 5.6 GiB in simulations of all modes
SLACK = 6 * 2**30
HOST_SLACK = 6 * 2**30  # Python, torch and CUDA in host memory


class Job(NamedTuple):
    """The sizes that decide what memory a training run takes.

    tokens, batch     of an image; images sampled at once
    micro_batch       (image, timestep) pairs of a micro-batch
    rollout_prefix    prefix tokens of the longest prompt, with all branches of the rollout
    objective_prefix  the same with those that an update looks at
    kept              bytes of states and frozen velocities that wait for the updates
    encoder           bytes of the text encoder
    judges, table     bytes of the local VLMs that score rollouts; of these and of those for the final table
                      alone
    waiting           bytes of this rank's shards that wait in host memory for the frozen network
    """

    tokens: int
    batch: int
    micro_batch: int
    rollout_prefix: int
    objective_prefix: int
    kept: int = 0
    encoder: int = 0
    judges: int = 0
    table: int = 0
    waiting: int = 0
    offload: bool = False
    checkpointing: bool = True


class Mode(NamedTuple):
    """What there is room for: the two of `keep_gathered`, and local judges that stay on the device during
    updates.
    """

    keep_weights: bool = True
    reduce_once: bool = True
    judges_stay: bool = True


# the fastest first
MODES = [Mode(weights, once, stay) for weights, once in ((True, True), (True, False), (False, False))
         for stay in (True, False)]


def parameter_counts(config, vae_config):
    """Numbers of parameters: of the network, of one of its blocks, of the VAE."""
    with torch.device("meta"):
        network, vae = FlowTransformer(config), VAE(vae_config)
    return [sum(param.numel() for param in module.parameters())
            for module in (network, network.transformer_blocks[0], vae)]


def memory_phases(config, vae_config, counts, world, job, mode, width=2):
    """Bytes on a device of `world` at the peak of every phase of a step, as torch allocates them; CUDA's
    context and NCCL's buffers come on top. counts: `parameter_counts`; width: bytes of a number in the
    compute dtype; masters, gradients and Adam are fp32."""
    dim, layers = network_width(config), config["num_layers"]
    count, block, decoder = counts[0], counts[1], width * counts[2]
    share, token, kv = (0 if job.offload else count // world), width * dim, 2 * layers * width * dim
    # frozen network, VAE, masters and Adam
    resident = width * count + decoder + 12 * share + (job.judges if mode.judges_stay else 0)
    scoring = JUDGING * job.judges + (0 if mode.judges_stay else job.judges)

    pixels = LATENT**2 * job.tokens * max(1, min(4, 4096 // job.tokens))  # of the images decoded at once
    decoding = DECODING * width * (vae_config["decoder_base_dim"] or vae_config["base_dim"]) * pixels
    # the sampler's arena, and what its graph works on
    sampling = kv * job.rollout_prefix + FORWARD * token * job.batch * job.tokens
    prefix = FORWARD * token * job.rollout_prefix
    looked_at = job.micro_batch * (job.tokens + job.objective_prefix)  # keys of a micro-batch
    frozen = kv * job.objective_prefix + FORWARD * token * max(looked_at, job.objective_prefix)

    # activations that a forward pass leaves for the backward pass
    inputs = layers if job.checkpointing else layers * BACKWARD
    # keys and values, the fp32 leaves, the gradients of these
    update = (kv + 16 * layers * dim + inputs * token) * job.objective_prefix
    update += max((inputs + BACKWARD) * token * job.micro_batch * job.tokens + 8 * token * looked_at,
                  BACKWARD * token * job.objective_prefix)
    weights = count if mode.keep_weights else count - layers * block + 2 * block
    gradients = 4 * (count if mode.reduce_once else share) + 8 * block
    pictures = sampling + max(decoding, prefix)
    return {
        "loading": job.encoder + decoder + decoding,
        "sample pictures": resident + pictures,
        "rollout": resident + job.kept + pictures + scoring,
        "frozen velocities": resident + job.kept + sampling + frozen + scoring,
        "updates": resident + job.kept + gradients + width * weights + update,
        "optimizer": resident + job.kept + 4 * share,
        "saving": resident + 4 * block,
        "final table": resident - 8 * share + pictures + scoring + (1 + JUDGING) * (job.table - job.judges),
    }


def host_bytes(config, world, job, cuda):
    """{what: bytes} that all ranks together have in host memory. For a GPU FSDP locks its part, in powers of
    two.
    """
    with torch.device("meta"):
        sizes = [4 * param.numel() // world for param in FlowTransformer(config).parameters()]
    locked = sum(2 ** math.ceil(math.log2(size)) if cuda else size for size in sizes)
    offloaded = {"fp32 weights and gradients": 2 * world * locked,
                 "Adam": 2 * world * sum(sizes)} if job.offload else {}
    return offloaded | {"waiting weights": world * job.waiting, "judges": job.table * cuda}


def context_bytes(world):
    """About what CUDA, cuBLAS and NCCL take on a GPU beside the allocator."""
    return (3 if world > 1 else 1.5) * 2**30


def choose_mode(config, vae_config, world, job, size, width=2):
    """The fastest `Mode` whose phases fit `size` bytes of a device, or where none does, of those that need
    least; and its phases.
    """
    counts = parameter_counts(config, vae_config)
    found = [memory_phases(config, vae_config, counts, world, job, mode, width) for mode in MODES]
    limit = max(size, min(max(phases.values()) for phases in found))
    return next((mode, phases) for mode, phases in zip(MODES, found) if max(phases.values()) <= limit)


def describe(mode):
    """A `Mode` in words, one phrase per field."""
    return ("parameters stay gathered during an update" if mode.keep_weights
            else "parameters are gathered block by block",
            "gradients are reduced once an update" if mode.reduce_once
            else "gradients are reduced after every micro-batch",
            "local judges stay" if mode.judges_stay else "local judges leave the GPU during updates")


def in_words(table):
    """{what: bytes} as "GiB: what 1.2, ...", in MiB where that is all."""
    unit, size = ("GiB", 2**30) if max(table.values()) >= 2**30 else ("MiB", 2**20)
    return f"{unit}: " + ", ".join(f"{name} {value / size:.1f}" for name, value in table.items())


def plan_memory(config, vae_config, device, job):
    """The fastest `Mode` that fits the device, the same on all ranks; prints it, or raises MemoryError with
    what does not fit.
    """
    world, cuda = dist.get_world_size(), device.type == "cuda"
    parts = all_gather_list([(job, device_memory(device), host_memory(),
                              int(os.environ.get("LOCAL_WORLD_SIZE", 1)))])
    # ranks must agree, so the longest prompt and the smallest machine count
    jobs, sizes, machines, neighbours = zip(*parts)
    job = job._replace(**{name: max(getattr(other, name) for other in jobs)
                          for name in ("rollout_prefix", "objective_prefix", "kept")})
    size, machine = min(sizes) - (context_bytes(world) if cuda else 0), min(machines)
    mode, phases = choose_mode(config, vae_config, world, job, size - (SLACK if cuda else 0),
                               compute_dtype(device).itemsize)
    host = host_bytes(config, world, job, cuda)
    here = sum(host.values()) * max(neighbours) // world + HOST_SLACK * cuda
    text = (f"memory of each {device.type}, {in_words(phases)}, of {size / 2**30:.0f} GiB\n"
            f"host memory for all ranks, {in_words(host)}, of {machine / 2**30:.0f} GiB a machine")
    if max(phases.values()) > size or here > machine:
        raise UserError(f"this run does not fit:\n{text}\nLess memory takes: --offload, --micro-batch 1, "
                        "--rollout-batch 1, a smaller "
                          "--size, more GPUs; in host memory: --kl-coef 0")
    if dist.get_rank() == 0:
        print(f"{text}\n{'; '.join(describe(mode)[:2 + bool(job.judges)])}")
    return mode


def weight_bytes(directory):
    """Bytes of a component's weight files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def vlm_bytes(rewards):
    """Bytes of the local VLMs of some rewards, each counted once."""
    tensors = [x for vlm in local_vlms(rewards) for x in (*vlm.parameters(), *vlm.buffers())]
    return sum(math.prod(getattr(x, "whole", x.shape)) * x.element_size() for x in tensors)


def device_memory(device):
    """Bytes of one device; of a rank's part of the host where the host computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def host_memory():
    """Bytes of this machine, or of the container it lets us use."""
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total if allowed == "max" else min(total, int(allowed))


# ---- 9. reports --------------------------------------------------------------------------------------------

FEW = 5  # prompts below which a mean has no interval: its standard error is itself hardly known


def half_interval(values):
    """Half the 95% confidence interval of the mean of n values by Student's t with n - 1 degrees of freedom;
    NaN if n < FEW.
    """
    if len(values) < FEW:
        return math.nan
    z, free = 1.959964, len(values) - 1
    quantile = (z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
                # Cornish and Fisher's expansion: right to 0.5%
                + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3))
    return quantile * torch.as_tensor(values, dtype=torch.float64).std().item() / len(values) ** 0.5


def report(run, rewards, before, after, title):
    """Print and save the before/after table; scores (K, prompts, images), NaN where there is none."""
    print(f"{title}\n{'':<16}{'base':>8}{'trained':>9}{'difference':>12}   95% interval")
    table = {}
    for reward, a, b in zip(rewards, before, after):
        gain = (b - a).nanmean(dim=1)  # paired by prompt
        gain = gain[gain.isfinite()]  # prompts without a score are left out
        if not len(gain):
            print(f"{reward.name:<16} no score in both")
            table[reward.name] = {"base": None, "trained": None, "difference": None, "interval": None,
                                  "prompts": 0}
            continue
        base, trained = a.nanmean().item(), b.nanmean().item()
        difference, half = gain.mean().item(), half_interval(gain)
        bounds = [difference - half, difference + half] if len(gain) >= FEW else None
        table[reward.name] = {"base": base, "trained": trained, "difference": difference, "interval": bounds,
                              "prompts": len(gain)}
        shown = "[{:+.3f}, {:+.3f}]".format(*bounds) if bounds else "too few prompts"
        print(f"{reward.name:<16}{base:>8.3f}{trained:>9.3f}{difference:>+12.3f}   {shown}, n = {len(gain)}")
    write_text(run / "eval.json", json.dumps({"title": title, "rewards": table}, indent=2))


WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSansSC-Regular.otf",
              "wqy-microhei.ttc", "wqy-zenhei.ttc",
              "DroidSansFallback.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "simsun.ttc")


def caption_font(captions):
    """A font for captions: Pillow's own, which is Latin, or one of the system's that knows Chinese too; None
    where that is missing.
    """
    if all(ord(character) < 0x250 for caption in captions for character in caption):
        return ImageFont.load_default(10)
    for name in WIDE_FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, 10)


def contact_sheet(path, *rows, columns=8, titles=()):
    """Save lists of (caption, PIL image) pairs as rows of a picture, with a title beside each if there are
    any; longer lists are cut into several, which interleave. Captions that no font can show are numbers, and
    what they mean is in a text file beside the picture.
    """
    captions = [caption for row in rows for caption, _ in row]
    font, notes = caption_font(captions), path.with_suffix(".txt")
    if font is None:
        words = [" ".join(caption.split()) for caption in captions if caption]
        write_text(notes, "\n".join(f"#{i} {caption}" for i, caption in enumerate(words, 1)))
        numbers, font = (f"#{i}, see {notes.name}" for i in itertools.count(1)), ImageFont.load_default(10)
        rows = [[(caption and next(numbers), image) for caption, image in row] for row in rows]
    drawn = rows[-1][0][1]  # a first row may be of source images, of any shape
    cell = max(96, drawn.width)
    height = cell * drawn.height // drawn.width
    kinds, heading = len(rows), ImageFont.load_default(14)
    margin = 12 + math.ceil(max(map(heading.getlength, titles))) if any(titles) else 0
    rows = [[(fold(caption, cell), image) for caption, image in row[i:i + columns]]
            for i in range(0, max(map(len, rows)), columns) for row in rows]
    lines = [max((caption.count("\n") + bool(caption) for caption, _ in row), default=0) for row in rows]
    heights = [height + 4 + 13 * count for count in lines]
    sheet = Image.new("RGB", (margin + max(map(len, rows)) * (cell + 4) + 4, sum(heights) + 4), "white")
    draw, top = ImageDraw.Draw(sheet), 4
    for y, row in enumerate(rows):
        if any(titles):
            draw.text((6, top + height // 2), titles[y % kinds], fill="black", font=heading, anchor="lm")
        for x, (caption, image) in enumerate(row):
            left = margin + 4 + x * (cell + 4)
            picture = ImageOps.pad(on_white(image), (cell, height), Image.Resampling.BICUBIC, "white")
            sheet.paste(picture, (left, top))
            draw.rectangle((left - 1, top - 1, left + cell, top + height), outline="#cccccc")
            draw.text((left, top + height + 1), caption, fill="black", font=font, spacing=1)
        top += heights[y]
    sheet.save(path)


def fold(caption, width):
    """At most six lines of a caption that fit so many pixels."""
    lines = []
    for line in caption.splitlines():
        wide = max(map(ord, line), default=0) > 0x2e80
        lines += textwrap.wrap(line, width // (10 if wide else 5))
    return "\n".join(lines[:6])


def round_ticks(low, high):
    """Between three and nine round numbers from `low` to `high`."""
    wanted = (high - low) / 8
    unit = 10.0 ** math.floor(math.log10(wanted))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= wanted * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line_chart(path, series, title, x_label, size=(720, 420), dots=False, bands=None):
    """Save a line chart, or one of dots, as PNG. series: {name: [(x, y), ...]}; bands around them, if any:
    {name: [(x, low, high), ...]}.
    """
    colours = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f"]
    series = {name: [p for p in line if all(map(math.isfinite, p))] for name, line in series.items()}
    points = [point for line in series.values() for point in line]
    points += [(x, y) for band in (bands or {}).values() for x, *both in band for y in both]
    if not points:
        return
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*points))
    right, high = right + (right == left), high + (high == low) * (abs(high) or 1)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    box = (64, 36, size[0] - 20, size[1] - 48)

    def place(x, y):
        return (box[0] + (x - left) / (right - left) * (box[2] - box[0]),
                box[3] - (y - low) / (high - low) * (box[3] - box[1]))

    image, font = Image.new("RGB", size, "white"), ImageFont.load_default(12)
    draw = ImageDraw.Draw(image, "RGBA")  # bands are translucent
    draw.text((box[0], 8), title, fill="black", font=ImageFont.load_default(15))
    for y in round_ticks(low, high):
        draw.line((*place(left, y), *place(right, y)), fill="#e5e5e5")
        draw.text((box[0] - 6, place(left, y)[1]), f"{y:.4g}", fill="black", font=font, anchor="rm")
    for x in round_ticks(left, right):
        draw.text((place(x, low)[0], box[3] + 6), f"{x:.4g}", fill="black", font=font, anchor="mt")
    for name, band in (bands or {}).items():
        upper, lower = [place(x, high) for x, _, high in band], [place(x, low) for x, low, _ in band]
        draw.polygon([*upper, *lower[::-1]], fill=colours[list(series).index(name) % 8] + "30")
    draw.rectangle(box, outline="#888888")
    draw.text(((box[0] + box[2]) / 2, size[1] - 8), x_label, fill="black", font=font, anchor="mb")
    # then the lower right corner is free
    rises = dots or sum(line[-1][1] - line[0][1] for line in series.values() if line) > 0
    for i, (name, line) in enumerate(series.items()):
        colour, line = colours[i % 8], [place(*p) for p in line]
        y = (box[3] - 18 * len(series) if rises else box[1] + 10) + 18 * i
        for x, y_dot in line if dots or len(line) == 1 else ():
            draw.ellipse((x - 2, y_dot - 2, x + 2, y_dot + 2), fill=colour)
        draw.line([] if dots else line, fill=colour, width=2, joint="curve")
        draw.rectangle((box[2] - 22, y, box[2] - 12, y + 10), fill=colour)
        draw.text((box[2] - 28, y - 2), name, fill="black", font=font, anchor="ra")
    image.save(path)


# ---- 10. runs: what the scripts do around their algorithm --------------------------------------------------

STOP = threading.Event()  # the run was asked to end: what waits gives up, the step is finished and saved


class UserError(Exception):
    """What a user can put right: the message names the file, line, key or flag and what to do, and is all
    that is shown.
    """


class StopTraining(Exception):
    """Ends a run before the present step, of which nothing has been trained: because it was asked to, or of
    the trouble that is named.
    """


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def command_line(main):
    """A script's main as a process. A UserError or a full disk ends it with code 2 and a message, once for
    all ranks; any other exception is a bug and keeps its traceback."""
    code = 0
    try:
        main()
        gc.collect()  # no FSDP module may outlive the process group
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        code = 130
        if is_first("interrupted"):
            print("interrupted", file=sys.stderr)
    except Exception as error:
        if isinstance(error, UserError) or getattr(error, "errno", 0) in DISK_FULL:
            code = 2
            if is_first(str(error)):
                print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        elif dist.is_initialized() and dist.get_world_size() > 1:
            code = 1  # at once: the others wait for this rank, which must not wait for its queued rewards
            traceback.print_exc()
        else:
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    if code or STOP.is_set():
        os._exit(code)  # reward threads may be waiting for a server that never answers


def is_first(message):
    """Whether this rank is the first to come with a message."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    key = hashlib.sha256(message.encode()).hexdigest()
    return dist.distributed_c10d._get_default_store().add(key, 1) == 1


class ArgumentParser(argparse.ArgumentParser):
    """A script's flags between the two halves of its docstring, the second of which says where it differs
    from the paper. A wrong flag is a UserError.
    """

    def __init__(self, doc):
        about, line, differences = doc.partition("Differs from the paper:")
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=about, epilog=line + differences, formatter_class=form)

    def error(self, message):
        raise UserError(f"{message} (--help explains all flags)")


def bounded(kind, low, high=math.inf, above=False):
    """An argparse type: int or float from low to high, both ends included, but for low if `above`."""
    words = {int: "a whole number", float: "a number"}[kind]
    words += f" above {low:g}" if above else f" of at least {low:g}"
    words += f" and at most {high:g}" if high < math.inf else ""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or abs(value) == math.inf or above and value == low:
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value

    return read


def image_side(text):
    """An argparse type: pixels, a multiple of SIDE."""
    if not text.isdecimal() or int(text) < SIDE or int(text) % SIDE:
        raise argparse.ArgumentTypeError(f"{text}: a side of the image is a multiple of {SIDE} pixels")
    return int(text)


def directory_name(text):
    """An argparse type: the name of a directory to be made."""
    if Path(text).name != text or text in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r}: want a name, without / and not ..")
    return text


def parse_run(parser, argv, needed, free, name, folder):
    """The flags of a new run, which must have those `needed`; or with --resume those that the run in
    folder(args), which flag `name` names, was started with, of which the `free` may be given anew."""
    args = parser.parse_args(argv)
    if not args.resume:
        missing = [flag(name) for name in needed if not getattr(args, name)]
        if missing:
            parser.error(f"{' and '.join(missing)} must be given")
        return args
    if not getattr(args, name):
        parser.error(f"--resume continues a run: say which with {flag(name)}")
    before = folder(args) / "args.json"
    if not before.exists():
        raise UserError(f"--resume: there is no run {before.parent} to continue")
    before = read_config(before)
    if before.get("script", args.script) != args.script:
        raise UserError(f"--resume: {folder(args)} is a run of {before['script']}.py")
    args = parser.parse_args(argv, argparse.Namespace(**before | {"resume": True}))
    fixed = before.keys() - {"resume", *free}
    changed = [flag(name) for name in before if name in fixed and getattr(args, name) != before[name]]
    if changed:
        raise UserError(f"--resume: {folder(args)} was started with other values of {', '.join(changed)}")
    return args


def tiny_prompts(args, tiny, prompts, heldout):
    """The arguments with the prompt files of the tiny world for its model and what was trained from it; any
    other needs its own.
    """
    defaults = {"prompts": str(tiny / prompts), "eval_prompts": str(tiny / heldout)}
    missing = [name for name in defaults if not getattr(args, name)]
    encoder, tiny_encoder = (Path(model, "text_encoder").resolve() for model in (args.model, tiny / "model"))
    if missing and encoder != tiny_encoder:
        raise UserError(f"--model {args.model} needs {' and '.join(map(flag, missing))} FILE: the default "
                        "prompts are the tiny world's")
    for name in missing:
        setattr(args, name, defaults[name])
    return args


def flag(name):
    """An argument's name as it is typed."""
    return "--" + name.replace("_", "-")


def resume_command(args, where):
    """What continues a run: `where` are the flags that name it."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    return f"{f'torchrun --nproc_per_node={ranks}' if ranks else 'python'} {sys.argv[0]} --resume {where}"


def stopping():
    """Whether some rank was asked to stop, so that now all are. All ranks call."""
    if any(all_gather_list([STOP.is_set()])):
        STOP.set()
    return STOP.is_set()


def stopped(args, step, where):
    """What a run that was asked to end says last: `step` steps are trained and saved."""
    if dist.get_rank() == 0:
        print(f"stopped after {step} of {args.steps} steps; continue: {resume_command(args, where)}")


def what_now(folder, args):
    """The last words of a run: what it left, and how to go on."""
    model = folder / "model"
    if args.eval_images:
        print(f"before, after: {folder / 'samples' / 'before_after.png'}")
    print(f"curve:         {folder / 'curve.png'}")
    print(f"model:         {model}\n\nnext, for example:")
    if args.save_every:
        print(f"  {resume_command(args, f'--name {folder.name} --steps {2 * args.steps}')}")
    print(f"  python rollout.py --model {model} --prompts {args.eval_prompts} --name "
          f"{folder.name}-{args.steps}")


def stop_gently(rank):
    """From here on Ctrl-C and SIGTERM set STOP. A second one ends the process at once; torchrun passes Ctrl-C
    on, so that it comes twice in a moment."""
    STOP.clear()
    times = []

    def stop(*_):
        times.append(time.monotonic())
        if times[-1] - times[0] > 2:
            os._exit(130)
        if not STOP.is_set() and rank == 0:
            print("\nstopping as soon as the run can be saved (once more: at once)", file=sys.stderr)
        STOP.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def stop_at_once(rank, message):
    """From here on Ctrl-C and SIGTERM end the process, with a message."""
    def stop(*_):
        if rank == 0:
            print(f"\n{message}", file=sys.stderr)
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if STOP.is_set():
        stop()


def claim(folder):
    """Make a directory this process's own as long as it lives: whether no other has it. Two runs must not
    write to one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"{folder}: its disk knows no locks ({error}); see to it that no other run writes there")
    LOCKS.append(lock)  # released when the process ends
    return True


LOCKS = []


def open_run(args, specs, rank):
    """runs/NAME, claimed for this run, with its args.json; NAME is made from `specs` if there is none. All
    ranks call.
    """
    names = [Path(spec.partition("=")[0]).stem for spec in specs]
    stem = args.name or "-".join([args.script, *names, f"s{args.seed}"])
    run, count, trouble = Path("runs") / stem, 1, None
    files = [args.prompts, args.eval_prompts, *(spec for spec in specs if spec.endswith(".json"))]
    files = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files}
    before = getattr(args, "files", {})
    if changed := [path for path in files if before.get(path, files[path]) != files[path]]:
        raise UserError(f"--resume: {changed[0]} is not what it was when {run} was started; put it back, or "
                        "start a new run")
    args.files = files
    while rank == 0 and trouble is None:
        free = claim(run)
        fresh = not (run / "log.jsonl").exists()
        if free and (fresh or args.resume):
            break
        if free:  # another run's, which may be resumed meanwhile
            LOCKS.pop().close()
        if args.name:
            trouble = (f"{run} exists; continue it with --resume, or choose another --name" if free else
                       f"{run} is being written by another process; choose another --name")
        run, count = Path("runs") / f"{stem}-{count + 1}", count + 1
    run, trouble = all_gather_list([(run, trouble)])[0]
    if trouble:
        raise UserError(trouble)
    args.name = run.name
    if rank == 0:
        write_text(run / "args.json", json.dumps(vars(args), indent=2))
    return run


class Clock:
    """Seconds of the phases of a step; a phase ends when the GPU has done what was asked of it."""

    def __init__(self, device):
        self.device, self.seconds, self.began = device, {}, time.perf_counter()

    def lap(self, name):
        """End a phase."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name], self.began = now - self.began, now


def synchronize(device):
    """Wait for what was asked of a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def heldout_id(i):
    """The prompt id of the held-out prompt i, beside 0, 1, ... of those to train on."""
    return "heldout", i


class Evaluator:
    """Held-out prompts, shared out over the ranks and drawn by the ODE with fixed noise: the same pictures
    for the same weights.

    requests [Request] of all ranks; ids those of this rank; encoded {heldout_id: prompts} of these; batch
    images at once.
    """

    SHOWN = 24  # of them in pictures

    def __init__(self, requests, ids, encoded, sampler, vae, grid, t, seed, batch):
        self.requests, self.ids, self.encoded, self.sampler, self.vae = requests, ids, encoded, sampler, vae
        self.grid, self.t, self.seed, self.batch = grid, t, seed, batch

    def images(self, ids, number, cfg):
        """[(id, image)] of `number` images for each prompt, by what is in the sampler's network."""
        keys = [(0, heldout_id(i), n) for i in ids for n in range(number)]
        ode = torch.zeros(len(self.t) - 1)
        batches = generate(self.sampler, self.vae, self.encoded, keys, self.grid, self.t, ode, cfg, self.seed,
                           self.batch)
        return [(i, image) for chunk, pictures, _ in batches
                for (_, (_, i), _), image in zip(chunk, pictures)]

    def gather(self, values):
        """[(id, value)] of all ranks -> the values in the order of the prompt file."""
        return [value for _, value in sorted(all_gather_list(values), key=lambda pair: pair[0])]

    def shown(self, images, notes=None):
        """[(caption, image)] of all ranks, from [(id, image)] of this one; a caption is a note, if there are
        any, and the prompt.
        """
        notes = [f"{note}\n" for note in notes] if notes else [""] * len(images)
        return self.gather([(i, (note + self.requests[i].prompt, image))
                            for note, (i, image) in zip(notes, images)])

    def save_sheet(self, path, rows):
        """Rows {title: [(caption, image)]} of the first prompts, below their source images if there are any.
        """
        requests = self.requests[:self.SHOWN]
        if any(request.sources for request in requests):
            blank = Image.new("RGB", (32, 32), "white")
            sources = [("", request.images()[0] if request.sources else blank) for request in requests]
            rows = {"source": sources} | rows
        contact_sheet(path, *(row[:self.SHOWN] for row in rows.values()), titles=tuple(rows))

    def save_samples(self, path, cfg):
        """A sheet of the first prompts. All ranks call, rank 0 writes."""
        shown = self.shown(self.images([i for i in self.ids if i < self.SHOWN], 1, cfg))
        if dist.get_rank() == 0:
            self.save_sheet(path, {"": shown})

    def scores(self, rewards, number, cfg):
        """Scores by all rewards (K, prompts, number), NaN where there is none, and [(caption, image)] of the
        first image of each prompt, with its scores by the first rewards. All ranks call.
        """
        images = self.images(self.ids, number, cfg)
        found = [reward([image for _, image in images], [self.requests[i] for i, _ in images])
                 for reward in rewards]
        failed = Counter(why for row in found for _, why in row if why)
        for why, count in failed.most_common(3):
            print(f"held-out scores that failed: {count} x {why}")
        scores = torch.tensor([[score if math.isfinite(score) else math.nan for score, _ in row]
                               for row in found])
        scores = scores.view(len(found), len(self.ids), number).transpose(0, 1)         # (prompts, K, number)
        notes = ["\n".join(f"{reward.name} {score:.2f}" for reward, score in zip(rewards[:2], row)
                           if math.isfinite(score)) for row in scores[:, :, 0].tolist()]
        few = sum(i < self.SHOWN for i in self.ids)
        shown = self.shown(images[::number][:few], notes[:few])
        scores = torch.tensor(self.gather(list(zip(self.ids, scores.tolist())))).transpose(0, 1)
        return scores, shown

    def final_table(self, folder, root, shards, rewards, images, guidance):
        """Draw with the base of `root`, then with the weights of which this rank has `shards`; leave the
        pictures in `folder` and, if there are rewards, print the table. All ranks call.

        guidance: {name: scale} of the two; about so many `images` each, the same number for every prompt.
        """
        (base, base_cfg), (trained, cfg) = guidance.items()
        number = math.ceil(images / len(self.requests))
        load_weights(self.sampler.model, root / "transformer")
        before, pictures_before = self.scores(rewards, number, base_cfg)
        gather_weights(self.sampler.model, shards)
        after, pictures_after = self.scores(rewards, number, cfg)
        if dist.get_rank() > 0:
            return
        scales = f"{cfg:g}" if cfg == base_cfg else f"{base_cfg:g} for the {base}, {cfg:g} for the {trained}"
        if rewards:
            report(folder, rewards, before, after,
                   f"{len(self.requests)} held-out prompts x {number} images, guidance {scales}, same seeds")
        self.save_sheet(folder / "samples" / "before_after.png",
                        {base: pictures_before, trained: pictures_after})


def check_disk(folder, network, bytes_each):
    """Refuse to begin what could not be saved on the disk of `folder`: two checkpoints, the last one and the
    next, of so many bytes per parameter of the network, and the model in bf16."""
    free = shutil.disk_usage(folder).free
    needed = (2 * bytes_each + 2) * sum(param.numel() for param in network.parameters())
    if needed > free:
        raise UserError(f"{folder}: its disk has {free / 2**30:.1f} GiB left, and two checkpoints and the "
                        f"model take {needed / 2**30:.1f}; --save-every 0 does without checkpoints")


def prompt_ids(step, count, per_step, seed):
    """The prompts of a step, a function of (seed, step) alone: every epoch is a new permutation, cut into
    whole steps.
    """
    epoch, part = divmod(step, count // per_step)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000003 + epoch))
    return sorted(order[part * per_step:(part + 1) * per_step].tolist())  # by task, as the prompt file is


def prompts_per_step(given, count, ranks, updates):
    """How many prompts a step takes: `given`, checked, or a multiple of ranks x updates, the first from 16 on
    that there are.
    """
    unit = ranks * updates
    if given is None:
        given = max(unit, min(unit * math.ceil(16 / unit), count // unit * unit))
    if given % unit:
        below, above = max(unit, given // unit * unit), (given // unit + 1) * unit
        raise UserError(f"--prompts-per-step {given} is not a multiple of {ranks} ranks x {updates} updates; "
                        f"nearest: {below}, {above}")
    if given > count:
        raise UserError(f"--prompts-per-step {given}: the prompt file has only {count}")
    return given


def rank_share(ids, updates, rank, world):
    """This rank's prompt ids, update by update: an update has the same prompts whatever the number of ranks.
    """
    return [i for update in range(updates) for i in ids[update::updates][rank::world]]


def read_log(path, steps):
    """The first `steps` lines: what a killed run wrote after its last checkpoint is done again. Without a
    checkpoint the log moves aside."""
    if not path.exists():
        return []
    if steps == 0 and dist.get_rank() == 0:
        with open(path.with_name("log.old.jsonl"), "a") as old:
            old.write(path.read_text())
        path.unlink()
        print(f"{path.parent}: there is no checkpoint, so it starts again from step 0; the log so far is "
              "log.old.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()[:steps]] if steps else []


def describe_run(run, args, policy, device, images, requests, heldout):
    """The header's first lines, on rank 0. images: those of a step, in words."""
    size = sum(param.numel() for param in policy.parameters())
    print(f"{run}: {size:,} parameters on {dist.get_world_size()} x {device.type}; {images} a step")
    print(f"prompts: {args.prompts} ({len(requests)}); held out: {args.eval_prompts} ({len(heldout)})")


def describe_rewards(rewards):
    """The header's lines on rewards."""
    for reward in rewards:
        weights = "".join(f", {category} {weight:.3g}" for category, weight in reward.categories.items())
        print(f"reward {reward.name}: weight {reward.weight:.3g}{weights}; {reward.source}")


def speed_record(seconds, images, flops, peak, device):
    """A log line's figures of speed and memory. seconds {phase: seconds}; images, and flops of the model, by
    all ranks; peak FLOP/s of one.
    """
    total, cuda = sum(seconds.values()), device.type == "cuda"
    return {
        "seconds": seconds, "images_per_second": images / total,
        "mfu": flops / (total * peak * dist.get_world_size()),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None}


def write_log(path, log, new):
    """Append the last line; a new or resumed run writes all of its lines."""
    with open(path, "w" if new else "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in (log if new else log[-1:]))
