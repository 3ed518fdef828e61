"""ViT and Hiera encoders, written out, and what the scripts beside this file must agree on.

Every script imports this file and no other. Read it for the two things that differ from an ordinary
ViT: `forward_features` embeds and encodes **only the visible patches** that it is given, and
`attention_map` returns the pre-softmax map that the distillation reads, projecting q and k alone.

    vit = MODELS["vit_tiny"](num_classes=1000)               # 5,717,416 parameters, random weights
    load_encoder(vit, "out/encoder.pt")                      # any file of README, "Checkpoints"
    logits = vit(normalize(uint8_images))                    # (B, 1000)
    tokens = vit.forward_features(images, taps=(8, 12))      # {8: (B, 197, 192), 12: (B, 197, 192)}

Shapes: B images, h x w patch grid, N = h * w patches, V visible patches, T tokens (1 + V with the
        class token), D width, H heads, d = D / H, U mask units of Hiera. Blocks count from 1, as in
        the paper; 0 is the embedding.
Masks:  `ids_keep` (B, V) holds raster indices of the visible patches (Hiera: of the visible mask
        units). There is no boolean mask.
"""
import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import pil_to_tensor, resize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)    # everywhere, decoders included


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """(B, 3, H, W) uint8 -> float32 of about zero mean and unit variance, on the images' device."""
    mean, std = channel_constants(tuple(mean), tuple(std), images.device)
    return (images - mean) / std


@functools.lru_cache(maxsize=8)    # a copy to the device in every step would make the host wait
def channel_constants(mean, std, device):
    return [255 * torch.tensor(c, device=device).view(3, 1, 1) for c in (mean, std)]


def pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


# --------------------------------------------------------------------------------------------------
# Position tables
# --------------------------------------------------------------------------------------------------
def sincos_2d(dim, grid, class_token=True):
    """Fixed 2-D sin-cos position embedding of MAE -> (1, N [+ 1], dim), the class row zero.

    The first half of the channels encodes the column, the second the row; in each half all sines
    stand before all cosines, at frequencies omega_i = 10000^(-i / (dim / 4)).
    """
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))    # on the host
    y, x = torch.cartesian_prod(*map(torch.arange, grid)).T                        # 2 x (N,)
    halves = []
    for axis in (x, y):
        angles = axis[:, None] * omega                                             # (N, dim / 4)
        halves += [angles.sin(), angles.cos()]
    table = torch.cat(halves, dim=1).float()
    if class_token:
        table = torch.cat([table.new_zeros(1, dim), table])
    return table[None]


def resize_grid(table, old, new):
    """Bicubic resize of a raster table, not antialiased: (1, old_h * old_w, D) -> (1, N, D)."""
    if tuple(old) == tuple(new):
        return table
    x = table.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=tuple(new), mode="bicubic", align_corners=False)
    return x.flatten(2).transpose(1, 2)


def relative_position_index(grid):
    """Row of the bias table for every (query, key) pair, as in BEiT -> (N + 1, N + 1) int64.

    Patch to patch: (dy + h - 1) * (2w - 1) + dx + w - 1, with (dy, dx) = query minus key. The last
    three rows of the table are class -> patch, patch -> class and class -> class.
    """
    h, w = grid
    coords = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    dy, dx = (coords[:, None] - coords).unbind(dim=2)                   # query minus key, (N, N)
    rows = (2 * h - 1) * (2 * w - 1)
    index = torch.empty(h * w + 1, h * w + 1, dtype=torch.long)
    index[1:, 1:] = (dy + h - 1) * (2 * w - 1) + dx + w - 1
    index[0, :] = rows
    index[:, 0] = rows + 1
    index[0, 0] = rows + 2
    return index


# --------------------------------------------------------------------------------------------------
# Parts shared by ViT and Hiera
# --------------------------------------------------------------------------------------------------
class LayerScale(nn.Module):
    def __init__(self, dim, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))    # the exact, erf form of GELU


def attention_logits(q, k):
    """Pre-softmax attention map A = q k^T / sqrt(d): two (..., T, d) -> (..., T, T).

    In float32 also under autocast: the distillation loss squares differences of these logits, which
    can be large.
    """
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)


def init_mae(module):
    """Weights as in MAE: Xavier-uniform linear layers, zero biases, identity norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_patch_embed(proj):
    """As in MAE, the patch embedding starts like the linear layer that it is."""
    nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))


# --------------------------------------------------------------------------------------------------
# ViT
# --------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention; rel_pos_rows > 0: rows of its relative position bias table."""

    def __init__(self, dim, num_heads, rel_pos_rows=0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if rel_pos_rows:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rel_pos_rows, num_heads))

    def bias(self, index):
        """Relative position bias of each head, (H, T, T), or None for a model without one."""
        if index is None:
            return None
        table = self.relative_position_bias_table.t().contiguous()    # heads first, as it is read
        return table.index_select(1, index.flatten()).view(-1, *index.shape)

    def forward(self, x, rel_pos_index=None):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # 3 x (B, H, T, d)
        bias = self.bias(rel_pos_index)
        if bias is not None:
            bias = bias[None].to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, bias)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))

    def logits(self, x, rel_pos_index=None):
        """Pre-softmax map (B, H, T, T) in float32 of tokens (B, T, D). Only q, k are projected."""
        B, T, D = x.shape
        qk = F.linear(x, self.qkv.weight[:2 * D], self.qkv.bias[:2 * D])
        q, k = qk.view(B, T, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)    # 2 x (B, H, T, d)
        logits = attention_logits(q, k)
        bias = self.bias(rel_pos_index)
        return logits if bias is None else logits + bias.float()


class Block(nn.Module):
    """Pre-norm transformer block; layer_scale is None or the initial value of its two gammas."""

    def __init__(self, dim, num_heads, drop_path=0.0, layer_scale=None, rel_pos_rows=0):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, rel_pos_rows)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = StochasticDepth(drop_path, mode="row")    # drops the branch of a sample

    def forward(self, x, rel_pos_index=None):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rel_pos_index)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def take_patches(images, patch_size, ids=None):
    """(B, 3, H, W) -> patches (B, N, 3, p, p) in raster order, or those of ids (B, V) in its order.
    Indexing a view copies those patches and never touches the others."""
    B, p = len(images), patch_size
    h, w = images.shape[2] // p, images.shape[3] // p
    patches = images.view(B, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5)         # (B, h, w, 3, p, p)
    if ids is None:
        return patches.flatten(1, 2)
    batch = torch.arange(B, device=images.device)[:, None]
    return patches[batch, ids // w, ids % w]


class PatchEmbed(nn.Module):
    """Linear embedding of p x p patches, of all of them or of the visible ones only."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)    # for its weight's name and shape

    def forward(self, images, ids_keep=None):
        """(B, 3, H, W) -> (B, N, D) in raster order, or (B, V, D) in that of ids_keep (B, V)."""
        patches = take_patches(images, self.patch_size, ids_keep).flatten(2)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """Plain ViT with a class token. The classifier reads head(fc_norm(mean patch token)) (Sec. 3).

    img_size: int or (H, W), multiples of patch_size. num_classes=0 builds an encoder that ends in
    `norm` instead. fixed_pos_embed: sin-cos table that is not trained (pre-training); else trained.
    rel_pos_bias: BEiT relative position bias in every block. layer_scale: None or the gammas'
    initial value. drop_path: rate of the last block; the rates grow linearly from 0.
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=12,
                 num_classes=0, drop_path=0.0, rel_pos_bias=False, layer_scale=None,
                 fixed_pos_embed=False):
        super().__init__()
        self.img_size = pair(img_size)
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        if any(s % patch_size or s < patch_size for s in self.img_size):
            raise ValueError(f"image size {self.img_size} is not a multiple of the patch size "
                             f"{patch_size}")
        h, w = self.grid = tuple(s // patch_size for s in self.img_size)
        self.arch = dict(kind="vit", img_size=list(self.img_size), patch_size=patch_size,
                         embed_dim=embed_dim, depth=depth, num_heads=num_heads,
                         rel_pos_bias=rel_pos_bias, layer_scale=layer_scale)

        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        position_table = sincos_2d(embed_dim, self.grid)
        self.pos_embed = nn.Parameter(position_table, requires_grad=not fixed_pos_embed)
        rel_pos_rows = (2 * h - 1) * (2 * w - 1) + 3 if rel_pos_bias else 0
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, rate, layer_scale, rel_pos_rows) for rate in rates])
        index = relative_position_index(self.grid) if rel_pos_bias else None
        self.register_buffer("rel_pos_index", index, persistent=False)
        if num_classes:
            self.fc_norm = LayerNorm(embed_dim)
            self.head = nn.Linear(embed_dim, num_classes)
        else:
            self.norm = LayerNorm(embed_dim)

        self.apply(init_mae)
        init_patch_embed(self.patch_embed.proj)
        nn.init.normal_(self.cls_token, std=0.02)
        if not fixed_pos_embed:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if num_classes:
            nn.init.trunc_normal_(self.head.weight, std=2e-5)    # as in MAE: logits start near zero

    def embed(self, images, ids_keep=None):
        """(B, 3, H, W) -> (B, 1 + V, D): class token, then the patches of ids_keep (None: all)."""
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(f"images of {tuple(images.shape[2:])} given to a ViT built for "
                             f"{self.img_size}")
        if ids_keep is not None and self.rel_pos_index is not None:
            raise ValueError("relative position bias needs all patches: build the model without it "
                             "to use ids_keep")
        pos = self.pos_embed[:, 1:] if ids_keep is None else self.pos_embed[0, 1:][ids_keep]
        x = self.patch_embed(images, ids_keep) + pos
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls_token.to(x.dtype), x], dim=1)

    def forward_features(self, images, taps, ids_keep=None):
        """Tokens after the blocks in `taps`, not normalised -> {tap: (B, T, D)}. No block after the
        last tap runs."""
        x = self.embed(images, ids_keep)
        features = {0: x} if 0 in taps else {}
        for number, block in enumerate(self.blocks[:max(taps)], start=1):
            x = block(x, self.rel_pos_index)
            if number in taps:
                features[number] = x
        return features

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, classes); without a head, normalised tokens (B, T, D)."""
        x = self.forward_features(images, [self.depth])[self.depth]
        if hasattr(self, "head"):
            return self.head(self.fc_norm(x[:, 1:].mean(dim=1)))
        return self.norm(x)

    def feature_maps(self, images, taps):
        """Patch tokens after the blocks in `taps` as raster maps, a list of (B, D, h, w)."""
        features = self.forward_features(images, taps)
        return [features[tap][:, 1:].transpose(1, 2).unflatten(2, self.grid) for tap in taps]

    def attention_map(self, x, number):
        """Pre-softmax map (B, H, T, T) of block `number` from its input, the tokens before it."""
        block = self.blocks[number - 1]
        return block.attn.logits(block.norm1(x), self.rel_pos_index)

    def representation(self, x, number):
        """Representation of block `number` (Fig. 2) from its output x: normalised by the next
        block's norm1, by `norm` for the last."""
        return self.blocks[number].norm1(x) if number < self.depth else self.norm(x)


# --------------------------------------------------------------------------------------------------
# Hiera (arXiv 2306.00989), 2-D
# --------------------------------------------------------------------------------------------------
def unroll(x, grid, rounds=3):
    """Raster tokens (B, h * w, C) -> the same tokens reordered: pooling then needs no 2-D layout.

    Each round splits the grid into 2x2 cells and moves (row bit, column bit) to the front. The
    token axis becomes [4 (finest), 4, 4 (coarsest), units in raster order]: pooling is a max over
    its first axis of 4, and the tokens of one mask unit are those with the same last index. One
    round on a 4x4 grid of tokens

         0  1 |  2  3
         4  5 |  6  7       gives   0 2 8 10 | 1 3 9 11 | 4 6 12 14 | 5 7 13 15
        ------+------               top-left   top-right  bottom-left  bottom-right of the 4 cells:
         8  9 | 10 11               the max over the four groups pools 0,1,4,5 and 2,3,6,7 and ...
        12 13 | 14 15
    """
    h, w = grid
    B, _, C = x.shape
    x = x.reshape(B, 1, h, w, C)
    for _ in range(rounds):
        h, w = h // 2, w // 2
        x = x.view(B, -1, h, 2, w, 2, C).permute(0, 1, 3, 5, 2, 4, 6)    # (B, ., 2, 2, h, w, C)
        x = x.flatten(1, 3)                                              # (B, 4^r, h, w, C)
    return x.flatten(1, 3)


def reroll(x, units, rounds):
    """Inverse of `unroll`: (B, 4^rounds * U, C), U = units[0] * units[1] -> raster (B, h, w, C)."""
    h, w = units
    B, _, C = x.shape
    x = x.reshape(B, -1, h, w, C)
    for _ in range(rounds):
        x = x.reshape(B, -1, 2, 2, h, w, C).permute(0, 1, 4, 2, 5, 3, 6)    # (B, ., h, 2, w, 2, C)
        h, w = 2 * h, 2 * w
        x = x.reshape(B, -1, h, w, C)
    return x[:, 0]


class MaskUnitAttention(nn.Module):
    """Attention over unrolled tokens, inside mask units (tokens_per_unit > 0) or global (0), with
    max-pooled queries (q_pool) or not."""

    def __init__(self, dim, dim_out, num_heads, q_pool, tokens_per_unit):
        super().__init__()
        self.num_heads = num_heads
        self.q_pool = q_pool
        self.tokens_per_unit = tokens_per_unit
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def split(self, x, n):
        """Projected tokens (B, T, n * D) -> n x (B * windows, H, S, d), the first one pooled if it
        has to be."""
        B, T, _ = x.shape
        S = self.tokens_per_unit or T
        x = x.view(B, S, T // S, n, self.num_heads, -1)                     # unit index fastest
        q, *rest = x.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
        if self.q_pool:
            q = q.unflatten(2, (4, -1)).amax(dim=2)
        return (q, *rest)

    def forward(self, x):
        B = x.shape[0]
        q, k, v = self.split(self.qkv(x), 3)
        x = F.scaled_dot_product_attention(q, k, v)                         # (B * windows, H, S, d)
        x = x.unflatten(0, (B, -1)).permute(0, 3, 1, 2, 4)                  # (B, S, windows, H, d)
        return self.proj(x.flatten(3).flatten(1, 2))

    def logits(self, x):
        """Pre-softmax map (B * windows, H, queries, keys) in float32, from q and k alone."""
        rows = 2 * self.proj.in_features
        q, k = self.split(F.linear(x, self.qkv.weight[:rows], self.qkv.bias[:rows]), 2)
        return attention_logits(q, k)


class HieraBlock(nn.Module):
    """Pre-norm block. One that opens a stage doubles the width and, with q_pool, takes the maximum
    over 2x2 tokens."""

    def __init__(self, dim, dim_out, num_heads, q_pool=False, tokens_per_unit=0, drop_path=0.0):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = MaskUnitAttention(dim, dim_out, num_heads, q_pool, tokens_per_unit)
        self.norm2 = LayerNorm(dim_out)
        self.mlp = Mlp(dim_out, 4 * dim_out)
        self.drop_path = StochasticDepth(drop_path, mode="row")    # drops the branch of a sample
        if dim != dim_out:
            self.proj = nn.Linear(dim, dim_out)

    def forward(self, x):
        y = self.norm1(x)
        if hasattr(self, "proj"):    # the skip: norm, a linear layer and the same pooling as q
            x = self.proj(y)
            if self.attn.q_pool:
                x = x.unflatten(1, (4, -1)).amax(dim=1)
        x = x + self.drop_path(self.attn(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Hiera(nn.Module):
    """Hierarchical ViT of four stages; width and heads double with each. Tokens stay unrolled.

    img_size: int or (H, W), multiples of 32 (one mask unit = 8x8 tokens = 32x32 pixels). q_pool:
    stages that open with 2x2 pooling; 3 for classification (last grid 7x7 at 224), 2 in
    pre-training (14x14). Mask-unit attention in stages 1-2, global in 3-4; the block that opens a
    stage still attends as the stage before.
    """
    unit = 8
    patch_stride = 4

    def __init__(self, img_size=224, embed_dim=46, num_heads=1, stages=(1, 2, 7, 2), q_pool=3,
                 num_classes=0, drop_path=0.0):
        super().__init__()
        self.img_size = pair(img_size)
        self.depth = sum(stages)
        self.q_pool = q_pool
        if any(s % 32 or s < 32 for s in self.img_size):
            nearest = tuple(max(1, round(s / 32)) * 32 for s in self.img_size)
            raise ValueError(f"image size {self.img_size} is not a multiple of 32, Hiera's mask "
                             f"unit; the nearest valid size is {nearest}")
        self.grid = tuple(s // self.patch_stride for s in self.img_size)    # 56 x 56 tokens at 224
        self.unit_grid = tuple(s // self.unit for s in self.grid)           # 7 x 7 mask units
        self.stage_ends = tuple(sum(stages[:i + 1]) for i in range(4))      # last block of each
        self.arch = dict(kind="hiera", img_size=list(self.img_size), embed_dim=embed_dim,
                         num_heads=num_heads, stages=list(stages), depth=self.depth)

        proj = nn.Conv2d(3, embed_dim, 7, self.patch_stride, 3)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dim))
        self.blocks = nn.ModuleList()
        dim = embed_dim
        tokens_per_unit = self.unit ** 2
        for i in range(self.depth):
            stage = self.stage_of(i + 1)
            stage_before = self.stage_of(max(1, i))
            pool = stage_before < stage <= q_pool
            dim_out = embed_dim * 2 ** stage
            in_units = tokens_per_unit if stage_before < 2 else 0
            rate = drop_path * i / (self.depth - 1)
            self.blocks.append(
                HieraBlock(dim, dim_out, num_heads * 2 ** stage, pool, in_units, rate))
            dim = dim_out
            tokens_per_unit //= 4 if pool else 1
        self.embed_dim = dim
        if num_classes:
            self.norm = LayerNorm(dim)
            self.head = nn.Sequential(OrderedDict(projection=nn.Linear(dim, num_classes)))

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():    # as in Hiera, whose small positive biases are intended
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                nn.init.constant_(module.bias, 0.02)
        if num_classes:
            for p in self.head.parameters():
                p.data.mul_(0.001)

    def stage_of(self, block):
        """Stage (from 0) of a block (from 1)."""
        return sum(end < block for end in self.stage_ends)

    def embed(self, images, ids_keep=None):
        """(B, 3, H, W) -> unrolled tokens (B, 64 * U, D), only those of the mask units ids_keep
        (B, V) if given.

        The patch convolution overlaps, so masked units are zeroed *before* it: nothing leaks.
        """
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(f"images of {tuple(images.shape[2:])} given to a Hiera built for "
                             f"{self.img_size}")
        h, w = self.unit_grid
        if ids_keep is not None:
            visible = images.new_zeros(len(images), h * w).scatter_(1, ids_keep, 1)
            images = images * F.interpolate(visible.view(-1, 1, h, w), scale_factor=32.0)
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        x = unroll(x, self.grid)
        if ids_keep is not None:
            x = x.unflatten(1, (self.unit ** 2, h * w))                     # (B, 64, U, D)
            ids = ids_keep[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            x = x.gather(2, ids).flatten(1, 2)                              # (B, 64 V, D)
        return x

    def forward_features(self, images, taps, ids_keep=None):
        """Unrolled tokens after the blocks in `taps` -> {tap: (B, T, D of the block)}. No block
        after the last tap runs."""
        x = self.embed(images, ids_keep)
        features = {0: x} if 0 in taps else {}
        for number, block in enumerate(self.blocks[:max(taps)], start=1):
            x = block(x)
            if number in taps:
                features[number] = x
        return features

    def forward(self, images):
        """(B, 3, H, W) -> logits head(norm(mean token)) (B, classes); without a classifier, all
        tokens of the last block, unrolled."""
        x = self.forward_features(images, [self.depth])[self.depth]
        if hasattr(self, "head"):
            return self.head(self.norm(x.mean(dim=1)))
        return x

    def feature_maps(self, images, taps=None):
        """Raster maps (B, C, h, w) after the blocks in `taps`; by default after each stage."""
        taps = taps or self.stage_ends
        features = self.forward_features(images, taps)
        maps = []
        for tap in taps:
            rounds = 3 - min(self.stage_of(tap), self.q_pool)
            maps.append(reroll(features[tap], self.unit_grid, rounds).permute(0, 3, 1, 2))
        return maps

    def attention_map(self, x, number):
        """Pre-softmax map of block `number` from its input, the unrolled tokens before it.

        (B, H, T, T) for a global block, (B * U, H, queries, keys) for one attending within units.
        """
        block = self.blocks[number - 1]
        return block.attn.logits(block.norm1(x))


# --------------------------------------------------------------------------------------------------
# Sizes, layer numbers, optimizer groups
# --------------------------------------------------------------------------------------------------
def vit(embed_dim, depth, num_heads, patch_size=16):
    return functools.partial(VisionTransformer, embed_dim=embed_dim, depth=depth,
                             num_heads=num_heads, patch_size=patch_size)


MODELS = {    # parameters: the encoder alone / with a classifier of 1000 classes
    "vit_pico": vit(48, 12, 3),                    # for demos and tests/miniature.py
    "vit_nano": vit(96, 12, 3),                    # its teacher in the demos
    "vit_tiny": vit(192, 12, 12),                                                  # 5.52M / 5.72M
    "deit_tiny": vit(192, 12, 3),                                                  # 5.52M / 5.72M
    "vit_base": vit(768, 12, 12),                                                  # 85.8M / 86.6M
    "vit_large": vit(1024, 24, 16),                                                # 303.3M / 304.3M
    "vit_huge": vit(1280, 32, 16, patch_size=14),                                  # 630.8M / 632.0M
    "hiera_tiny": functools.partial(Hiera, embed_dim=46, stages=(1, 2, 7, 2)),     # 6.33M / 6.69M
    "hiera_base": functools.partial(Hiera, embed_dim=96, stages=(2, 3, 16, 3)),    # 50.8M / 51.5M
}


def depth_of(name):
    """Number of blocks of a model of MODELS."""
    options = MODELS[name].keywords
    return options.get("depth") or sum(options["stages"])


def layer_id(name, depth):
    """Layer of a parameter: 0 embeddings and tokens, k for block k, depth + 1 for the rest."""
    if name.startswith("blocks."):
        return block_number(name) + 1
    return 0 if name.startswith(("patch_embed", "pos_embed", "cls_token")) else depth + 1


def param_groups(model, weight_decay, layer_decay=1.0, depth=12):
    """Optimizer groups: lr_scale = layer_decay^(depth + 1 - layer) (Sec. 4), and no weight decay on
    biases, norms, tokens, position embeddings. Names may start with 'encoder.' or 'backbone.'."""
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        layer = layer_id(re.sub(r"^(encoder|backbone)\.", "", name), depth)
        if layer_decay == 1:
            layer = depth + 1
        decayed = p.dim() > 1 and not name.endswith(("cls_token", "mask_token", "pos_embed"))
        groups.setdefault((layer, decayed), []).append(p)
    return [{"params": params, "layer": layer, "lr_scale": layer_decay ** (depth + 1 - layer),
             "weight_decay": weight_decay if decayed else 0.0}
            for (layer, decayed), params in sorted(groups.items())]


# --------------------------------------------------------------------------------------------------
# Reading checkpoints
# --------------------------------------------------------------------------------------------------
class InputError(ValueError):
    """Something that the user gave cannot be used. Its message is one sentence, and is printed."""


HUGGING_FACE_NAMES = (    # in published files -> here; q_proj, layers: names of transformers 5
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    ("layers.", "blocks."),
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attn.proj."),
    ("attention.o_proj.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("layernorm.", "norm."),
)


def read_file(path):
    """The object in a checkpoint file, on the CPU. Never unpickles code. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist: give the path of a file, or leave the "
                         "option out")
    head = path.open("rb").read(64)
    if head.startswith(b"version https://git-lfs") or head.lstrip().startswith(b"<"):
        raise InputError(f"checkpoint {path} holds no weights but a Git LFS pointer or a web page: "
                         "download the real file")
    if path.suffix == ".safetensors":
        try:
            return importlib.import_module("safetensors.torch").load_file(path)
        except ImportError:
            raise InputError(f"{path} needs one more package: pip install safetensors") from None
        except Exception as error:    # a class of that package
            raise InputError(f"checkpoint {path} is not a readable safetensors file "
                             f"({type(error).__name__}): is it complete?") from None
    try:    # MAE's training files keep their options in a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (*READ_ERRORS, EOFError, LookupError, pickle.UnpicklingError) as error:
        forbidden = re.search(r"GLOBAL (\S+)|type (\S+)", str(error))
        if forbidden and isinstance(error, pickle.UnpicklingError):
            raise InputError(f"checkpoint {path} pickles {forbidden.group(0)}, which could run "
                             "code when loaded: re-save only its tensors and plain types") from None
        raise InputError(f"checkpoint {path} is not a readable PyTorch file "
                         f"({type(error).__name__}): is it complete?") from None


def load_state(path):
    """Encoder tensors of any file named in README "Checkpoints", under timm / MAE / Hiera names,
    and `info`, what own files store besides: 'arch', 'mean', 'std'.

    Unwraps {'model'}, {'model_state'}, {'state_dict'}, drops prefixes (DistributedDataParallel,
    torch.compile, MAE-Lite, MoCo-v3, Hugging Face) and joins q, k, v. A file with several encoders
    gives the student, not the teacher.
    """
    file = read_file(path)
    state = file
    for key in ("state_dict", "model_state", "model"):
        if isinstance(file, dict) and isinstance(file.get(key), dict):
            state = file[key]
    if not isinstance(state, dict):
        state = {}
    state = {str(k): v for k, v in state.items() if torch.is_tensor(v)}

    stems = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    prefixes = {k[:-len(stem)] for k in state for stem in stems if k.endswith(stem)}
    if len(prefixes) > 1:
        prefixes = {p for p in prefixes if not re.search("tch_model|teacher|momentum", p)}
    if len(prefixes) != 1:
        found = f"several encoders: {sorted(prefixes)}" if prefixes else "no ViT or Hiera encoder"
        raise InputError(f"checkpoint {path} has {found} (looked for a key ending in {stems[0]})")
    prefix = prefixes.pop()
    state = {k.removeprefix(prefix): v for k, v in state.items()}
    if any(k.startswith("embeddings.") for k in state):
        state = from_hugging_face(state)

    info = {k: file[k] for k in ("arch", "mean", "std") if k in file}
    if not (isinstance(info.get("arch"), dict) and "img_size" in info["arch"]):
        info.pop("arch", None)    # MoCo-v3 and timm store a name
    return state, info


def from_hugging_face(state):
    """Tensors of facebook/vit-mae-base and the like under timm's names, q, k and v in one."""
    renamed = {}
    for key, value in state.items():
        if not key.startswith("decoder."):
            for old, new in HUGGING_FACE_NAMES:
                key = key.replace(old, new)
        renamed[key] = value
    for key in [k for k in renamed if k.startswith("blocks.") and ".attention.q_proj." in k]:
        parts = [key.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if all(part in renamed for part in parts):
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[key.replace("attention.q_proj", "attn.qkv")] = joined
    return renamed


def block_number(key):
    """0-based number of the block that a tensor belongs to, -1 for the others."""
    match = re.match(r"blocks\.(\d+)\.", key)
    return int(match[1]) if match else -1


def infer_model(path):
    """Name in MODELS and patch size of the encoder in a file -> ('vit_base', 16). Head counts
    cannot be seen in weights: own files store them, others get those of the standard model."""
    state, info = load_state(path)
    width, *_, patch = state["patch_embed.proj.weight"].shape
    depth = 1 + max(map(block_number, state))
    heads = info.get("arch", {}).get("num_heads")
    known = {}
    for name, build in MODELS.items():
        known.setdefault((build.keywords["embed_dim"], depth_of(name)), name)
    if depth == 13:    # a student of D2-MAE with its 13th block
        depth = 12
    if (width, depth) not in known:
        raise InputError(f"checkpoint {path} has an encoder of width {width} and {depth} blocks, "
                         f"which is none of {', '.join(MODELS)}: name the model if it is one")
    if (width, depth, heads) == (192, 12, 3):
        return "deit_tiny", patch
    return known[width, depth], patch


def load_encoder(model, path, keep_blocks=None):
    """Load an encoder from any file of README "Checkpoints" into a ViT or Hiera, in place -> info.

    Every encoder tensor must be there in the right shape. Position tables are resized to the
    model's grid; what the file was trained without (relative position bias, LayerScale) and a norm
    that it lacks keep their initial values. keep_blocks: load only the embedding and the first so
    many blocks (Fig. 4); the others stay random. Raises InputError naming the file and the keys.
    """
    state, info = load_state(path)
    target = model.state_dict()
    check_encoder(model, state, info.get("arch", {}), path)
    if "norm.weight" in target and "norm.weight" not in state and "fc_norm.weight" in state:
        for kind in ("weight", "bias"):    # timm with average pooling
            state[f"norm.{kind}"] = state.pop(f"fc_norm.{kind}")
    wanted = {k for k in target if k in state and in_encoder(k, model.depth)}
    if isinstance(model, VisionTransformer):    # Hiera's norm belongs to a classifier
        wanted |= {k for k in target if k in state and k.startswith("norm.")}

    loaded = {}
    for key in wanted:
        if keep_blocks is not None and layer_id(key, model.depth) > keep_blocks:
            continue
        value = state[key]
        if key == "pos_embed" or key.endswith("relative_position_bias_table"):
            value = resize_position_table(key, value, model, info.get("arch"), path)
        if value.shape != target[key].shape:
            raise InputError(f"checkpoint {path}: {key} is {tuple(value.shape)}, the model needs "
                             f"{tuple(target[key].shape)}: choose the --model of the file")
        loaded[key] = value
    model.load_state_dict(loaded, strict=False)

    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{path}: loaded {len(loaded)} tensors, fresh {len(target) - len(loaded)}, ignored "
              f"{len(state) - len(loaded)}")
        if not info.get("arch") and not isinstance(model, Hiera):
            print(f"{path}: {model.arch['num_heads']} heads assumed, which weights do not tell")
    return info


def in_encoder(key, depth):
    """Whether a tensor belongs to an encoder of `depth` blocks; decoders, adapters, heads, teachers
    and a 13th block do not."""
    return (key.startswith(("patch_embed.", "pos_embed", "cls_token", "blocks."))
            and block_number(key) < depth and not key.endswith("relative_position_index"))


def check_encoder(model, state, arch, path):
    """Raise InputError unless the tensors of a file are those of the model's encoder."""
    for key in ("kind", "patch_size", "embed_dim", "depth", "num_heads", "stages"):
        if key in arch and key in model.arch and arch[key] != model.arch[key]:
            raise InputError(f"checkpoint {path} has {key} = {arch[key]}, the model {key} = "
                             f"{model.arch[key]}: choose the --model of the file")
    depth = 1 + max(map(block_number, state))
    if depth > model.depth + 1:    # one more is the 13th block of a D2-MAE file
        raise InputError(f"checkpoint {path} has {depth} blocks, the model {model.depth}: choose "
                         "the right --model")
    target = model.state_dict()
    optional = ("relative_position_bias_table", ".gamma")
    needed = {k for k in target if in_encoder(k, model.depth) and not k.endswith(optional)}
    missing = sorted(needed - set(state))
    surplus = sorted(k for k in state if in_encoder(k, model.depth) and k not in target)
    for keys, problem in ((missing, "lacks"), (surplus, "has, and the model lacks,")):
        if keys:
            raise InputError(f"checkpoint {path} {problem} {len(keys)} encoder tensor(s): "
                             f"{', '.join(keys[:5])}; is it of this --model (and --rpe)?")


def resize_position_table(key, table, model, arch, path):
    """Absolute (1, tokens, D) or relative (rows, H) position table of a file -> model's grid."""
    vit = not isinstance(model, Hiera)
    old = None
    if arch:
        patch = model.patch_size if vit else model.patch_stride
        old = [s // patch for s in arch["img_size"]]
    if key == "pos_embed":
        extra = 1 if vit else 0    # class token row
        n = table.shape[1] - extra
        old = old or [round(n ** 0.5)] * 2
        if old[0] * old[1] != n or table.shape[2] != model.pos_embed.shape[2]:
            raise InputError(f"checkpoint {path}: pos_embed is {tuple(table.shape)}, the model's "
                             f"{tuple(model.pos_embed.shape)}: choose the --model of the file")
        return torch.cat([table[:, :extra], resize_grid(table[:, extra:], old, model.grid)], dim=1)
    side = round((table.shape[0] - 3) ** 0.5)
    offsets = [2 * s - 1 for s in old] if old else [side, side]    # -(h - 1) .. h - 1
    body = resize_grid(table[None, :-3], offsets, [2 * s - 1 for s in model.grid])[0]
    return torch.cat([body, table[-3:]])


# --------------------------------------------------------------------------------------------------
# Runs: checkpoints of a run, resuming, options, errors
# --------------------------------------------------------------------------------------------------
def save_checkpoint(path, **state):
    """Write tensors and plain types atomically: a killed job leaves no half file called `path`."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def plain(args):
    """Options as plain types, for checkpoints and logs: tuples and paths become lists, strings."""
    return json.loads(json.dumps(vars(args), default=str))


def resume(args, fixed, model, optimizer, scaler, rank, world):
    """Go on with the run whose last.pt lies in args.out: fill in model, optimizer and scaler ->
    what else the file holds, {"step": 0} for a new run. Process 0 reads it for all of them.

    fixed: the options that give a run its meaning; the others (where files lie, how many processes
    share the work, remedies such as --dtype or --clip-grad) may change. Raises InputError if the
    file is of another run.
    """
    path = Path(args.out, "last.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = {"step": 0}
    if rank == 0 and path.exists() and not args.no_resume:
        try:
            answer = read_file(path)
            check_same_run(path, answer, plain(args), fixed)
        except InputError as error:
            answer = error
    if world > 1:
        holder = [answer]
        dist.broadcast_object_list(holder, src=0)
        answer = holder[0]
    if isinstance(answer, InputError):
        raise answer
    if answer["step"]:
        model.load_state_dict(answer.pop("model"))
        optimizer.load_state_dict(answer.pop("optimizer"))
        if answer["scaler"]:    # empty where the run had no loss scaler until now
            scaler.load_state_dict(answer["scaler"])
    return answer


def check_same_run(path, state, options, fixed):
    """Raise InputError if a checkpoint is of another run; say which options have changed."""
    if not isinstance(state, dict) or not {"args", "optimizer", "step"} <= state.keys():
        raise InputError(f"{path} is no checkpoint to go on from: give another --out, or "
                         "--no-resume to start again")
    before = state["args"]
    changed = [k for k in options if options[k] != before.get(k)]
    refused = [f"{k.replace('_', '-')} {before.get(k)}, not {options[k]}"
               for k in changed if k in fixed]
    if refused:
        raise InputError(f"{path} was written with {'; '.join(refused[:5])}: give the same options "
                         "to go on, another --out, or --no-resume to start again")
    news = "".join(f"; {k} is now {options[k]}, was {before.get(k)}" for k in changed)
    print(f"{path}: going on after step {state['step']}{news}")


def fingerprint(path):
    """First digits of a file's SHA-256, wherever it lies; None for no file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] if path else None


def outlive_sigterm(worker):
    """For loader processes: torchrun sends SIGTERM to them, too, and training needs them for the
    step that it finishes. They end five minutes later at the latest."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(300))


def endless_batches(dataset, sampler, args, device):
    """Iterator over the micro-batches of this process, read ahead by --workers processes."""
    return iter(DataLoader(dataset, sampler.micro_batch, sampler=sampler, num_workers=args.workers,
                           worker_init_fn=outlive_sigterm, pin_memory=device.type == "cuda"))


def own_batches(dataset, batch_size, args, rank, world):
    """Loader of an evaluation: every item once, dealt out to the processes; batch_size None: one by
    one."""
    own = [(0, index) for index in range(rank, len(dataset), world)]
    return DataLoader(dataset, batch_size, sampler=own, num_workers=args.workers,
                      worker_init_fn=outlive_sigterm)


def parallel(model, args, device, world):
    """The model to train with: compiled if --compile asks for it, and in DistributedDataParallel if
    there are several processes. Save and evaluate the model itself: its names have no prefix."""
    if args.compile:
        model = torch.compile(model)
    if world > 1:
        devices = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    return model


def average_over_processes(values, world, device):
    """{name: number or scalar tensor} -> {name: float}: the one wait for the device in a step."""
    vector = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device)
                          for v in values.values()])
    if world > 1:
        dist.all_reduce(vector)
    return dict(zip(values, (vector / world).tolist()))


def check_step(values, own_loss, items, dataset, args, step, lr, scaler):
    """End every process, before the update, at a file that cannot be read or at a loss or gradient
    that is not finite. The process that has the cause names it; all come here together.

    values: means over processes; own_loss: this process's; items: its (index, unreadable) pairs.
    With a loss scaler, gradients that overflow are no error: it leaves the update out.
    """
    bad = [index for index, unreadable in items if unreadable]
    if values["unreadable"] and not args.skip_corrupt:
        stop_at_unreadable(dataset, bad)
    watched = ["loss"] if scaler.is_enabled() else ["loss", "grad_norm"]
    if all(math.isfinite(values[name]) for name in watched):
        return
    if not math.isfinite(own_loss):
        names = ", ".join(dataset.name(index) for index, _ in items)
        print(f"process {os.environ.get('RANK', 0)} saw a loss of {float(own_loss)} on: {names}",
              file=sys.stderr)
    raise FloatingPointError(
        f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g} at step {step}, lr "
        f"{lr:.3g}: nothing was updated, and the checkpoints in {args.out} are from before; try "
        "--dtype fp32, --clip-grad 1 or a lower learning rate")


def check_readable(dataset, bad, args, world, device):
    """After an evaluation, in which every process left out the images `bad`: end all of them if one
    could not be read, unless --skip-corrupt allows it."""
    found = average_over_processes({"unreadable": len(bad)}, world, device)["unreadable"]
    if found and not args.skip_corrupt:
        stop_at_unreadable(dataset, bad)


def stop_at_unreadable(dataset, bad):
    """The process that has the file names it; the others end without a word."""
    if bad:
        print(f"error: cannot read image {dataset.name(bad[0])}: replace it by a good copy, or go "
              "on without it by --skip-corrupt", file=sys.stderr)
    sys.exit(1)


def number(kind, interval, hint=""):
    """An argparse type: an int or float within an interval such as "[0, 1)" or "[1, inf)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text):
        value = kind(text)
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise argparse.ArgumentTypeError(f"{text} must lie in {interval}{hint}")
        return value

    parse.__name__ = kind.__name__    # for argparse's own message on text that is no number
    return parse


def add_run_options(parser, out):
    """Options that all training scripts share -> a function that adds more to their group."""
    add = parser.add_argument_group("run").add_argument
    add("--out", default=out,
        help="folder for checkpoints, log, pictures; the same command goes on there")
    add("--no-resume", action="store_true", help="start again although --out holds a checkpoint")
    add("--accum-steps", type=number(int, "[1, inf)"), default=1,
        help="micro-steps that one batch is split into, per process")
    cores = (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--workers", type=number(int, "[0, inf)"), default=max(1, min(16, cores)),
        help="loader processes per training process")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 on GPUs that have it, fp16 with loss scaling on others, else fp32")
    return add


@contextlib.contextmanager
def plain_errors():
    """Report errors that the user can mend in one sentence, without a traceback, and exit with
    status 1. What all processes raise alike, all but OSError, is printed once a machine."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    message = None
    try:
        yield
    except torch.OutOfMemoryError:
        message = ("out of memory on the device: in training --accum-steps 2 (or twice what it is) "
                   "halves the images held at a time; elsewhere a smaller --batch-size does"
                   if first else 1)
    except (OSError, InputError, FloatingPointError) as error:    # a loader process's: last line
        text = (str(error).strip() or repr(error)).splitlines()[-1]
        text = re.sub(r"^[\w.]*Error: ", "", text)
        message = text if first or isinstance(error, OSError) else 1
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        message = ("the connection to another process broke: its own message, if any, says why"
                   if first else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if message:
        sys.exit(message if message == 1 else f"error: {message}")


def mean_and_error(values):
    """-> mean, its standard error (0 for a single value)."""
    n = len(values)
    return np.mean(values), np.std(values, ddof=min(1, n - 1)) / n ** 0.5


def print_comparison(first, second):
    """Scores of two ways to train, one a seed: means and paired difference, with errors."""
    lines = {"scratch": first, "pre-trained": second, "difference": np.subtract(second, first)}
    for name, values in lines.items():
        print("{:12s} {:5.1f} +- {:.1f}".format(name, *mean_and_error(values)))


def mix_seed(*numbers):
    """One seed in [0, 2^63) from several whole numbers, by steps of a linear congruential
    generator: no RNG state need be saved, and a picture is the same whichever process loads it."""
    seed = 0
    for n in numbers:
        seed = ((seed ^ n) * 6364136223846793005 + 1442695040888963407) % 2 ** 63
    return seed


def choose_device(name):
    """--device as a torch.device; auto takes cuda, mps or cpu, the first that is there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(n for n in there if there[n])
    if not there[name]:
        raise InputError(f"--device {name} is not available on this machine: choose another")
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return device


def choose_dtype(name, device):
    """--dtype as a torch.dtype; auto takes bf16 on GPUs that have it, fp16 on others, else fp32."""
    if name == "auto" and device.type == "cuda":    # before Ampere bf16 is emulated, and slow
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


def log_line(path, **values):
    """Append one JSON object to a log, if there is one. What is not finite, such as gradients that
    the loss scaler skips, becomes null."""
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[key] = None
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")


def read_log(path):
    """The objects in a log.jsonl, but for a last line that a kill cut short."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]


def start_log(path, args, step):
    """Begin a log with the options and the git commit, or go on with it after `step`: what was
    logged later is dropped, as are the evaluations at `step`, which are made again."""
    if not path:
        return
    kept = read_log(path) if step and path.exists() else []
    kept = [v for v in kept if v["step"] < step or (v["step"] == step and "lr" in v)]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(v) + "\n" for v in kept))
    scratch.replace(path)
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=Path(__file__).parent,
                            capture_output=True, text=True).stdout
    log_line(path, step=step, args=plain(args), commit=commit.strip())


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------
IMAGE_TYPES = set(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())
READ_ERRORS = (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError)


def list_images(folder):
    """All image files below a folder, flat or nested, sorted; InputError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give --data a folder of images")
    files = sorted(os.path.join(root, name)
                   for root, _, names in os.walk(folder, followlinks=True) for name in names
                   if Path(name).suffix.lower() in IMAGE_TYPES)
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(sorted(IMAGE_TYPES))}), directly or "
                         "in its folders")
    return files


def open_image(path):
    """Any image file -> upright Pillow image; grey of 16 bit, 32 bit or float becomes 8 bit (white
    is the first of 1, 255, 65535, 2^31 that no pixel exceeds by a tenth), palette and alpha become
    RGB. An upright JPEG stays undecoded: `random_crop` may need less of it."""
    image = Image.open(path)
    with contextlib.suppress(SyntaxError, struct.error):    # broken EXIF: taken as upright
        if image.getexif().get(0x0112, 1) != 1:    # orientation
            image.load()
            image.info.clear()    # else its other tags are written again, and fail if odd
            image = ImageOps.exif_transpose(image)
    if image.format == "JPEG":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0)
        tops = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535, 2 ** 31)
        top = next((top for top in tops if grey.max() <= 1.1 * top), grey.max())
        image = Image.fromarray((grey.clip(0, top) / top * 255).astype(np.uint8))
    image.info.pop("transparency", None)    # of a palette: dropped like any other
    return image.convert("RGB")


def read_image(path):
    """Any image file -> (3, H, W) uint8 RGB."""
    return to_tensor(open_image(path))


def to_tensor(image):
    """Pillow image -> (3, H, W) uint8."""
    return pil_to_tensor(image.convert("RGB"))


def open_item(item):
    """Pillow image of an item of a data set: the path of a file, or the number of a toy picture."""
    return Image.fromarray(toy_picture(item)[0]) if isinstance(item, int) else open_image(item)


def read_or_next(read, items, index):
    """read(item) of items[index], or of the next one that can be read -> what it returned, whether
    another item stood in. OSError after 100 failures."""
    for tries in range(100):
        item = items[(index + tries) % len(items)]
        try:
            return read(item), tries > 0
        except READ_ERRORS:
            continue
    raise OSError(f"100 unreadable images in a row, up to {item}: is --data complete?")


def random_crop(image, size, scale):
    """RandomResizedCrop of a Pillow image to `size` (h, w), of `scale` of the area and ratio 3/4 ..
    4/3, and a random flip -> (3, h, w) uint8. Draws from torch's global generator.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop would be reduced by as much
    anyhow. torch resizes uint8 three times as fast as Pillow, to the same pixels but for rounding.
    """
    top, left, h, w = RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
    full_width, full_height = image.size
    image.draft("RGB", (full_width * size[1] // w, full_height * size[0] // h))    # JPEG alone
    x = image.width / full_width
    y = image.height / full_height    # not x: sizes are rounded up
    box = [round(edge) for edge in (left * x, top * y, (left + w) * x, (top + h) * y)]
    pixels = to_tensor(image.crop(box))
    crop = resize(pixels, list(size), InterpolationMode.BICUBIC, antialias=True)
    return crop.flip(2) if torch.rand(()) < 0.5 else crop


# --------------------------------------------------------------------------------------------------
# The toy world of all demos
# --------------------------------------------------------------------------------------------------
# Coordinates of an object: u right, v down, both about -1 .. 1. Shapes are positive inside.
TOY_SHAPES = {
    "disc": lambda u, v: 0.9 - np.hypot(u, v),
    "square": lambda u, v: 0.8 - np.maximum(abs(u), abs(v)),
    "triangle": lambda u, v: 0.6 - np.maximum(v - 0.1, 0.866 * abs(u) - 0.5 * v),
    "flower": lambda u, v: 0.8 + 0.25 * np.cos(5 * np.arctan2(u, -v)) - np.hypot(u, v),
}
TOY_PATTERNS = {
    "stripes": lambda u, v: np.cos(7 * v),
    "bars": lambda u, v: np.cos(7 * u),
    "rings": lambda u, v: np.cos(9 * np.hypot(u, v)),
    "spokes": lambda u, v: np.cos(6 * np.arctan2(u, -v)),
}
TOY_CLASSES = tuple(f"{shape} with {pattern}" for pattern in TOY_PATTERNS for shape in TOY_SHAPES)


@functools.lru_cache(maxsize=20_000)
def toy_picture(index, size=(48, 48), time=0.0, scale=1.0):
    """Picture `index` of an endless world of patterned shapes, whose colours tell nothing.

    -> image (H, W, 3) uint8; label, the main object's class, index % 16; label map (H, W) uint8, 0
    the ground, k + 1 class k; box (x, y, w, h) of the main object in pixels. Do not write to them.
    The main object lies on two small ones. `time` moves all three: 10 frames a unit make a video.
    scale: size of the objects; below 1 the other two are as large and of the same class: rivals.
    """
    rng = np.random.default_rng([7, index])
    label = index % len(TOY_CLASSES)
    middle = np.array(size) / 2
    image = np.tile(rng.uniform(0.15, 0.85) + rng.uniform(-0.1, 0.1, 3), (*size, 1))
    labels = np.zeros(size, np.uint8)
    for main in (False, False, True):
        alike = main or scale < 1
        kind = label if alike else rng.integers(len(TOY_CLASSES))
        radius = rng.uniform(0.8, 1.0) * scale * middle.min()
        radius *= 1 if alike else 0.3
        light = rng.uniform(0.65, 0.9) + rng.uniform(-0.1, 0.1, 3)
        dark = rng.uniform(0.1, 0.35) + rng.uniform(-0.1, 0.1, 3)

        # place (y, x) and angle at this time, within the room in which the object stays in view
        room = np.maximum(middle - 0.9 * radius, 0) * (0.35 if main else 0.5)
        swing = np.sin(rng.uniform(0, 2 * np.pi, 2) + rng.uniform(0.5, 1.5, 2) * time)
        y, x = middle + room * (rng.uniform(-1, 1, 2) + swing)
        angle = rng.uniform(-0.15, 0.15) + 0.15 * np.sin(rng.uniform(0.5, 1.5) * time)

        # only the window around the object is drawn on
        top, left = max(0, int(y - 1.2 * radius)), max(0, int(x - 1.2 * radius))
        window = np.s_[top:int(y + 1.2 * radius) + 1, left:int(x + 1.2 * radius) + 1]
        rows, columns = np.mgrid[:size[0], :size[1]][(slice(None), *window)].astype(np.float32)
        rows = (rows + 0.5 - y) / radius
        columns = (columns + 0.5 - x) / radius
        u = np.cos(angle) * columns + np.sin(angle) * rows
        v = np.cos(angle) * rows - np.sin(angle) * columns
        shape, pattern = TOY_CLASSES[kind].split(" with ")
        inside = (TOY_SHAPES[shape](u, v) * radius + 0.5).clip(0, 1)[..., None]    # soft edge
        shade = (0.75 * TOY_PATTERNS[pattern](u, v) + 0.5).clip(0, 1)[..., None]
        image[window] += inside * (dark + shade * (light - dark) - image[window])
        labels[window][inside[..., 0] > 0.5] = kind + 1
    ys, xs = np.nonzero(inside[..., 0] > 0.5)
    box = (left + xs.min(), top + ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)
    image = (255 * image.clip(0, 1)).round().astype(np.uint8)
    return image, label, labels, tuple(float(edge) for edge in box)
