"""ViT and Hiera from scratch, the checkpoints they read, and what all scripts share.

Part 1, models: `VisionTransformer`, `Hiera`, `load_encoder`. The models differ from other
implementations in two ways: `forward_features` embeds and encodes **only the visible patches**, and
`attention_map` returns the pre-softmax map that the distillation compares.
Part 2, runs: processes, loaders, log, checkpoints of a run, errors, options, images.

    vit = build_model("vit_tiny", num_classes=1000)          # 5,717,416 parameters, random weights
    load_encoder(vit, "out/pretrain/encoder.pt")             # any file of README, "Checkpoints"
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
import datetime
import functools
import importlib
import json
import math
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import crop, pil_to_tensor, resize
from tqdm import tqdm

try:
    import fcntl
except ImportError:    # on Windows
    fcntl = None

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)    # everywhere, decoders included


class InputError(ValueError):
    """Raised for an option, a file or data that cannot be used. Scripts print its message, one
    sentence, without a traceback."""


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Normalise (B, 3, H, W) uint8 to float32 of about zero mean and unit variance, on its device.

    mean, std: of pixels in [0, 1], one number per channel. They stay Python numbers: the host would
    wait for the copy of a tensor to the device.
    """
    channels = zip(images.unbind(1), mean, std)
    return torch.stack([(x - 255 * m) / (255 * s) for x, m, s in channels], dim=1)


# --------------------------------------------------------------------------------------------------
# Part 1: models. ViT
# --------------------------------------------------------------------------------------------------
class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))    # the exact, erf form of GELU


def attention_logits(q, k):
    """Compute the pre-softmax attention map A = q k^T / sqrt(d): two (..., T, d) -> (..., T, T).

    It is computed in float32 even under autocast: the distillation loss squares differences of
    these logits, which can be large.
    """
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)


def attend(q, k, v, bias=None):
    """Compute softmax(q k^T / sqrt(d) + bias) v by PyTorch's fused kernels: three (..., T, d) ->
    the same shape.

    A CPU computes it in float32 even under autocast: in bfloat16 the backward pass of heads with 16
    dimensions takes 7 times as long (torch 2.14).
    """
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias)


class Attention(nn.Module):
    """Multi-head self-attention. dim_out: width of its output, by default that of its input."""

    def __init__(self, dim, num_heads, dim_out=None):
        super().__init__()
        dim_out = dim_out or dim
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def bias(self):
        """Return the bias of the logits, (1, H, T, T) or None; see `RelativeAttention`."""
        return None

    def project(self, x):
        """Tokens (B, T, D) -> q, k, v, 3 x (B, H, T, d)."""
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        x = attend(*self.project(x), self.bias())                             # (B, H, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))

    def logits(self, x):
        """Compute the float32 pre-softmax map (B, H, T, T) of tokens (B, T, D) from q, k alone."""
        rows = 2 * x.shape[2]
        qk = F.linear(x, self.qkv.weight[:rows], self.qkv.bias[:rows])
        qk = qk.unflatten(2, (2, self.num_heads, -1))
        return attention_logits(*qk.permute(2, 0, 3, 1, 4))                   # 2 x (B, H, T, d)


class Block(nn.Module):
    """Pre-norm transformer block. attention: class of its attention."""

    def __init__(self, dim, num_heads, drop_path=0.0, attention=Attention):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = attention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")    # drops the branch of a sample

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Embed patches of p x p pixels linearly, either all of them or only the visible ones."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)    # Conv2d for timm's key and shape

    def forward(self, images, ids_keep=None):
        """(B, 3, H, W) -> (B, N, D) in raster order, or (B, V, D) in the order of ids_keep (B, V).
        """
        patches = F.pixel_unshuffle(images, self.patch_size)                  # (B, 3 p p, h, w)
        patches = patches.flatten(2).transpose(1, 2)                          # (B, N, 3 p p)
        if ids_keep is not None:
            batch = torch.arange(len(images), device=images.device)[:, None]
            patches = patches[batch, ids_keep]                                # (B, V, 3 p p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """Base class of ViT and Hiera, which define `embed`, `blocks`, `img_size` and `grid`."""

    def forward_features(self, images, taps, ids_keep=None):
        """Encode normalised images (B, 3, H, W) -> {tap: tokens after block `tap` (B, T, D of the
        block), not normalised}; those of Hiera stay unrolled.

        Tap 0 is the embedding. Blocks after the last tap do not run. ids_keep: visible patches,
        None for all. Raises ValueError for another size of images than the model's.
        """
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(f"images of {images.shape} given to a model for {self.img_size}")
        features = {}
        for k in range(max(taps) + 1):
            x = self.blocks[k - 1](x) if k else self.embed(images, ids_keep)
            if k in taps:
                features[k] = x
        return features

    def attention_map(self, x, k):
        """Compute the pre-softmax map of block k from its input x (B, T, D): (B, H, T, T), but
        (B * U, H, queries, keys) for a block of Hiera that attends within mask units."""
        block = self.blocks[k - 1]
        return block.attn.logits(block.norm1(x))

    def resize_tables(self, state, grid):
        """Resize the position table in a state, in place, from `grid` to that of this model."""
        table = state["pos_embed"]
        first = table.shape[1] - math.prod(grid)    # 1 for the class token, 0 in Hiera
        patches = resize_grid(table[:, first:], grid, self.grid)
        state["pos_embed"] = torch.cat([table[:, :first], patches], dim=1)


class VisionTransformer(Encoder):
    """Plain ViT with a class token. A classifier computes head(fc_norm(mean patch token)) (Sec. 3).

    img_size: side or (H, W) in pixels, multiples of patch_size. num_classes: 0 builds an encoder,
    which ends in `norm`. drop_path: rate of the last block; the rates grow linearly from 0. mean,
    std: statistics of the pixels in [0, 1] that it reads, for `normalize`. block, attention:
    classes of its parts. Raises InputError if img_size is not a multiple of patch_size.
    """

    kind = "vit"

    def __init__(self, img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=12,
                 num_classes=0, drop_path=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD, block=Block,
                 attention=Attention):
        super().__init__()
        self.img_size = pair(img_size, patch_size)
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.grid = tuple(side // patch_size for side in self.img_size)
        self.arch = dict(kind="vit", img_size=list(self.img_size), patch_size=patch_size,
                         embed_dim=embed_dim, depth=depth, num_heads=num_heads)

        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), embed_dim))
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList([block(embed_dim, num_heads, rate, attention)
                                     for rate in rates])
        if num_classes:
            self.fc_norm = LayerNorm(embed_dim)
            self.head = nn.Linear(embed_dim, num_classes)
        else:
            self.norm = LayerNorm(embed_dim)

        init_mae(self)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if num_classes:
            nn.init.trunc_normal_(self.head.weight, std=2e-5)    # as in MAE: logits start near zero

    def embed(self, images, ids_keep=None):
        """(B, 3, H, W) -> (B, 1 + V, D): class token, then the patches ids_keep (None: all)."""
        pos = self.pos_embed[:, 1:] if ids_keep is None else self.pos_embed[0, 1:][ids_keep]
        x = self.patch_embed(images, ids_keep) + pos
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls_token.to(x.dtype), x], dim=1)

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, classes), or without a head tokens after `norm` (B, T, D)."""
        x = self.forward_features(images, [self.depth])[self.depth]
        if hasattr(self, "head"):
            return self.head(self.fc_norm(x[:, 1:].mean(dim=1)))
        return self.norm(x)

    def feature_maps(self, images, taps):
        """(B, 3, H, W) -> patch tokens after the blocks in `taps`, a list of maps (B, D, h, w)."""
        features = self.forward_features(images, taps)
        return [features[tap][:, 1:].transpose(1, 2).unflatten(2, self.grid) for tap in taps]

    def representation(self, x, k):
        """Normalise the output x (B, T, D) of block k by norm1 of the next block, of the last block
        by `norm`: the representation that Fig. 2 compares."""
        return self.blocks[k].norm1(x) if k < self.depth else self.norm(x)


# --------------------------------------------------------------------------------------------------
# Hiera (arXiv 2306.00989), 2-D
# --------------------------------------------------------------------------------------------------
def unroll(x, rounds=3):
    """Order the tokens of a raster map (B, C, h, w) so that pooling needs no 2-D layout
    -> (B, h * w, C).

    Each round splits the grid into 2x2 cells and makes the place in the cell an axis of 4. The
    token axis becomes [4 (finest), 4, 4 (coarsest), units in raster order]: pooling is a max over
    its first axis of 4, and the tokens of one mask unit are those with the same last index. One
    round on a 4x4 grid of tokens

         0  1 |  2  3
         4  5 |  6  7       gives   0 2 8 10 | 1 3 9 11 | 4 6 12 14 | 5 7 13 15
        ------+------               top-left   top-right  bottom-left  bottom-right of the 4 cells:
         8  9 | 10 11               the max over the four groups pools 0,1,4,5 and 2,3,6,7 and ...
        12 13 | 14 15
    """
    channels = x.shape[1]
    for _ in range(rounds):
        x = F.pixel_unshuffle(x, 2)                          # (B, C * 4^r, h / 2^r, w / 2^r)
    return x.flatten(1).unflatten(1, (channels, -1)).transpose(1, 2)


def reroll(x, units):
    """Undo `unroll`: tokens (B, 4^rounds * U, C) of a grid of U = units[0] * units[1] mask units
    -> raster map (B, C, h, w)."""
    channels = x.shape[2]
    x = x.transpose(1, 2).flatten(1).unflatten(1, (-1, *units))
    while x.shape[1] > channels:
        x = F.pixel_shuffle(x, 2)
    return x


class MaskUnitAttention(Attention):
    """Attention over unrolled tokens, within mask units (tokens_per_unit > 0) or global (0).
    q_pool: pool the queries of each 2x2 tokens by their maximum."""

    def __init__(self, dim, num_heads, dim_out, q_pool, tokens_per_unit):
        super().__init__(dim, num_heads, dim_out)
        self.q_pool = q_pool
        self.tokens_per_unit = tokens_per_unit

    def project(self, x):
        """Tokens (B, T, D) -> q, k, v, 3 x (B * units, H, S, d)."""
        if self.tokens_per_unit:
            x = x.unflatten(1, (self.tokens_per_unit, -1))                  # (B, S, units, D)
            x = x.transpose(1, 2).flatten(0, 1)
        q, k, v = super().project(x)
        if self.q_pool:
            q = q.unflatten(2, (4, -1)).amax(dim=2)
        return q, k, v

    def forward(self, x):
        y = super().forward(x).unflatten(0, (x.shape[0], -1))               # (B, units, S, D)
        return y.transpose(1, 2).flatten(1, 2)

    def logits(self, x):
        """Compute the float32 pre-softmax map (B * units, H, queries, keys)."""
        q, k, _ = self.project(x)
        return attention_logits(q, k)


class HieraBlock(nn.Module):
    """Pre-norm block. A block that opens a stage doubles the width and, with q_pool, pools each 2x2
    tokens by their maximum."""

    def __init__(self, dim, dim_out, num_heads, q_pool, tokens_per_unit, drop_path):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = MaskUnitAttention(dim, num_heads, dim_out, q_pool, tokens_per_unit)
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


class Hiera(Encoder):
    """Hierarchical ViT of four stages; each stage doubles width and heads. Tokens stay unrolled.

    Stages 1, 2 and the first block of stage 3 attend within mask units, the other blocks globally.
    img_size: side or (H, W) in pixels, multiples of 32 (one mask unit = 8x8 tokens = 32x32 pixels).
    stages: blocks of each stage. q_pool: number of stages that open with 2x2 pooling; 3 for
    classification (last grid 7x7 at 224), 2 in pre-training (14x14). Raises InputError if img_size
    is not a multiple of 32.
    """

    kind = "hiera"
    patch_size = 16    # in pre-training: the pixels that a token predicts, after two poolings

    def __init__(self, img_size=224, embed_dim=46, num_heads=1, stages=(1, 2, 7, 2), q_pool=3,
                 num_classes=0, drop_path=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.img_size = pair(img_size, 32)
        self.grid = tuple(side // 4 for side in self.img_size)            # 56 x 56 tokens at 224
        self.unit_grid = tuple(side // 32 for side in self.img_size)      # 7 x 7 mask units
        self.depth = sum(stages)
        self.stage_ends = tuple(np.cumsum(stages).tolist())               # last blocks
        self.stage_dims = [embed_dim * 2 ** stage for stage in range(4)]
        self.arch = dict(kind="hiera", img_size=list(self.img_size), embed_dim=embed_dim,
                         num_heads=num_heads, stages=list(stages), depth=self.depth)

        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, embed_dim, 7, 4, 3)))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), embed_dim))
        self.blocks = nn.ModuleList()
        rates = torch.linspace(0, drop_path, self.depth).tolist()
        before = 0    # stage of the previous block: a block that opens a stage still attends as it
        for stage, rate in zip(np.repeat(range(4), stages).tolist(), rates):
            in_unit = (64, 16, 0, 0)[before]    # tokens of a mask unit; 0: global
            block = HieraBlock(self.stage_dims[before], self.stage_dims[stage],
                               num_heads * 2 ** stage, before < stage <= q_pool, in_unit, rate)
            self.blocks.append(block)
            before = stage
        self.embed_dim = self.stage_dims[-1]
        if num_classes:
            self.norm = LayerNorm(self.embed_dim)
            head = nn.Linear(self.embed_dim, num_classes)
            self.head = nn.Sequential(OrderedDict(projection=head))

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():    # Hiera initialises biases to 0.02 on purpose
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                nn.init.constant_(module.bias, 0.02)
        if num_classes:
            for p in self.head.parameters():
                p.data.mul_(0.001)

    def embed(self, images, ids_keep=None):
        """(B, 3, H, W) -> unrolled tokens (B, 64 * U, D), or (B, 64 * V, D) of the mask units
        ids_keep (B, V).

        The patch convolutions overlap: masked units are zeroed *before* them, so nothing leaks.
        """
        h, w = self.unit_grid
        if ids_keep is not None:
            visible = images.new_zeros(images.shape[0], h * w).scatter_(1, ids_keep, 1)
            images = images * F.interpolate(visible.view(-1, 1, h, w), scale_factor=32.0)
        table = self.pos_embed.transpose(1, 2).unflatten(2, self.grid)
        x = unroll(self.patch_embed(images) + table)
        if ids_keep is not None:
            x = x.unflatten(1, (64, h * w))                                 # (B, 64, U, D)
            x = x.take_along_dim(ids_keep[:, None, :, None], dim=2).flatten(1, 2)
        return x

    def forward(self, images):
        """(B, 3, H, W) -> logits head(norm(mean token)) (B, classes), or without a head the
        unrolled tokens of the last block."""
        x = self.forward_features(images, [self.depth])[self.depth]
        if hasattr(self, "head"):
            return self.head(self.norm(x.mean(dim=1)))
        return x

    def feature_maps(self, images, taps):
        """(B, 3, H, W) -> tokens after the blocks in `taps`, such as `stage_ends`, a list of raster
        maps (B, D of the block, h, w)."""
        features = self.forward_features(images, taps)
        return [reroll(features[tap], self.unit_grid) for tap in taps]

    def unit_maps(self, x, units):
        """Unrolled tokens (B, 4^r * V, C) of V = `units` mask units -> raster maps of the units,
        one below the other (B, C, 2^r * V, 2^r)."""
        return reroll(x, (units, 1))


# --------------------------------------------------------------------------------------------------
# ViT with relative position bias, RPE (arXiv 2106.08254)
# --------------------------------------------------------------------------------------------------
class RelativeAttention(Attention):
    """Attention with BEiT's relative position bias. index (T, T): the row of the bias table for
    each (query, key), see `relative_position_index`."""

    def __init__(self, dim, num_heads, index):
        super().__init__(dim, num_heads)
        table = torch.zeros(int(index.max()) + 1, num_heads)
        self.relative_position_bias_table = nn.Parameter(table)
        self.register_buffer("index", index, persistent=False)

    def bias(self):
        table = self.relative_position_bias_table.t().contiguous()    # heads first, as it is read
        return table.index_select(1, self.index.flatten()).view(1, -1, *self.index.shape)

    def logits(self, x):
        return super().logits(x) + self.bias().float()


class RelativeVisionTransformer(VisionTransformer):
    """VisionTransformer whose blocks add a relative position bias, zero at first, to the attention
    logits."""

    def __init__(self, img_size=224, patch_size=16, **options):
        grid = [side // patch_size for side in pair(img_size, patch_size)]
        index = relative_position_index(grid)
        attention = functools.partial(RelativeAttention, index=index)
        super().__init__(img_size, patch_size, **options, attention=attention)
        self.arch["rel_pos_bias"] = True

    def resize_tables(self, state, grid):
        super().resize_tables(state, grid)
        rows = math.prod(2 * side - 1 for side in grid) + 3
        for key, table in state.items():
            if key.endswith("bias_table") and len(table) == rows:
                state[key] = resize_relative_table(table, grid, self.grid)


def relative_position_index(grid):
    """Number the rows of BEiT's bias table for each (query, key) pair -> (1 + N, 1 + N) int32.

    Patch to patch: (dy + h - 1) * (2w - 1) + dx + w - 1, with (dy, dx) = query minus key. The last
    three rows of the table are class -> patch, patch -> class and class -> class.
    """
    h, w = grid
    coords = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    dy, dx = (coords[:, None] - coords).unbind(dim=2)                   # query minus key, (N, N)
    index = F.pad((dy + h - 1) * (2 * w - 1) + dx + w - 1, (1, 0, 1, 0))
    rows = (2 * h - 1) * (2 * w - 1)
    index[0, :] = rows
    index[:, 0] = rows + 1
    index[0, 0] = rows + 2
    return index.int()


def resize_relative_table(table, old, new):
    """Resize a relative position table ((2h - 1)(2w - 1) + 3, H) of the grid `old` to `new`."""
    rows, columns = (torch.from_numpy(spline_matrix(*sides)).float() for sides in zip(old, new))
    body = table[:-3].float().view(2 * old[0] - 1, 2 * old[1] - 1, -1)
    body = torch.einsum("yi,xj,ijh->yxh", rows, columns, body)
    return torch.cat([body.flatten(0, 1), table[-3:]])      # the class token's rows stay


def spline_matrix(old, new):
    """Compute the matrix (2 new - 1, 2 old - 1) that resizes one axis of a relative position table,
    as BEiT and mmsegmentation do.

    Offsets near 0 matter most. The rows of the table are placed at distances 1, 1 + q, 1 + q + q^2,
    ... on both sides of 0, the last at new - 1. A cubic spline through them (not-a-knot) is
    evaluated at the offsets -(new - 1) .. new - 1. For a smaller grid q = 1: the rows of its own
    offsets are returned. As in BEiT q is at most 1.5; offsets beyond the last place, which occur
    for fewer than 6 tokens, get the last row.
    """
    ratios = np.linspace(1, 1.5, 10_001)[:, None]
    last_places = (ratios ** np.arange(old - 1)).sum(axis=1)
    q = np.interp(new - 1, last_places, ratios[:, 0])       # clamps to 1 and 1.5
    places = np.cumsum(q ** np.arange(old - 1))
    x = np.concatenate([-places[::-1], [0], places])

    def basis(at):    # 1, x, x^2, x^3, and (x - knot)^3 above each knot; not-a-knot: x[1], x[-2]
        at = at[:, None] / new
        return np.hstack([at ** np.arange(min(4, len(x))), (at - x[2:-2] / new).clip(min=0) ** 3])

    offsets = np.arange(1.0 - new, new).clip(x[0], x[-1])
    return basis(offsets) @ np.linalg.inv(basis(x))


# --------------------------------------------------------------------------------------------------
# What the models are built with
# --------------------------------------------------------------------------------------------------
def pair(size, cell):
    """Turn a side or (height, width) into (height, width). Raises InputError unless both are
    multiples of `cell` pixels, the side of a patch or mask unit."""
    height, width = (size, size) if isinstance(size, int) else size
    if height % cell or width % cell:
        nearest = tuple(max(1, round(side / cell)) * cell for side in (height, width))
        raise InputError(f"image size {height} x {width} is not a multiple of {cell} pixels, the "
                         f"side of a patch or mask unit: the nearest valid size is {nearest}")
    return height, width


def init_mae(model):
    """Initialise linear layers as MAE does: Xavier-uniform weights and zero biases. The patch
    embedding counts as linear. Norms keep PyTorch's initialisation, the identity."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith("patch_embed.proj"):
            nn.init.xavier_uniform_(module.weight.view(module.out_channels, -1))


def resize_grid(table, old, new):
    """Resize a position table in raster order bicubically, without antialiasing, from grid `old`
    to `new`: (1, old_h * old_w, D) -> (1, new_h * new_w, D)."""
    x = table.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=tuple(new), mode="bicubic", align_corners=False)
    return x.flatten(2).transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# Sizes, layer numbers, optimizer groups
# --------------------------------------------------------------------------------------------------
MODELS = {    # parameters: the encoder alone / with a classifier of 1000 classes
    "vit_pico": dict(embed_dim=48, depth=12, num_heads=3),                         # 0.39M / 0.43M
    "vit_nano": dict(embed_dim=96, depth=12, num_heads=3),                         # 1.44M / 1.53M
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=12),                       # 5.52M / 5.72M
    "deit_tiny": dict(embed_dim=192, depth=12, num_heads=3),                       # 5.52M / 5.72M
    "vit_small": dict(embed_dim=384, depth=12, num_heads=12),                      # 21.7M / 22.1M
    "deit_small": dict(embed_dim=384, depth=12, num_heads=6),                      # 21.7M / 22.1M
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),                       # 85.8M / 86.6M
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),                     # 303.3M / 304.3M
    "vit_huge": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),       # 630.8M / 632.0M
    "hiera_tiny": dict(embed_dim=46, stages=[1, 2, 7, 2]),                         # 6.33M / 6.69M
    "hiera_base": dict(embed_dim=96, stages=[2, 3, 16, 3]),                        # 50.8M / 51.5M
}


def model_sizes(name=None, file=None, **options):
    """Collect the constructor arguments of a model in MODELS, or of the model that the encoder in a
    file fits -> dict.

    file: what `read_encoder` returns; it supplies name, image size, patch size, mean and std unless
    these are given. options: further arguments; None stands for the default. A ViT gets no q_pool.
    Raises InputError.
    """
    name = name or (model_name(file) if file else "vit_tiny")
    if name not in MODELS:
        raise InputError(f"model {name} is none of {', '.join(MODELS)}")
    arch = file.arch if file else {}
    stored = {k: arch.get(k) for k in ("img_size", "patch_size", "mean", "std")}
    sources = (MODELS[name], stored, options)    # the last one that has a value decides
    sizes = {k: v for source in sources for k, v in source.items() if v is not None}
    if "stages" not in sizes:
        sizes.pop("q_pool", None)
    elif "patch_size" in sizes:
        raise InputError(f"a patch size has no effect on {name}: leave it out, or choose a ViT if "
                         "it is that of the file")
    return sizes


def build_model(name=None, file=None, rel_pos_bias=False, **options):
    """Build the ViT or Hiera of `model_sizes` with random weights. rel_pos_bias: give a ViT a
    relative position bias even if the file has none. Raises InputError."""
    sizes = model_sizes(name, file, **options)
    if file:
        rel_pos_bias |= any(k.endswith("bias_table") for k in file.state)
    if "stages" not in sizes:
        return (RelativeVisionTransformer if rel_pos_bias else VisionTransformer)(**sizes)
    if rel_pos_bias:
        raise InputError("relative position bias is defined for ViT: Hiera attends in windows and "
                         "pools its tokens")
    return Hiera(**sizes)


def load_model(kind, file=None, name=None, **options):
    """Build a model of class `kind` with the encoder of a file or, without one, with random weights
    -> model, what `read_encoder` returns for the file. file: as of `load_encoder`; name, options:
    as of `model_sizes`. Raises InputError, also if file or name is of another kind."""
    file = read_encoder(file)
    sizes = model_sizes(name, file, **options)
    if kind.kind != ("hiera" if "stages" in sizes else "vit"):
        raise InputError(f"{file.path if file else name} is not a {kind.kind} model: choose "
                         "another")
    model = kind(**sizes)
    if file:
        load_encoder(model, file)
    return model, file


def model_name(file):
    """Find the name in MODELS of the encoder in a file. If the file does not store the number of
    heads, the first name that fits is returned. Raises InputError."""
    for name, sizes in MODELS.items():
        if ("stages" in sizes) == ("stages" in file.arch) and all(
                file.arch.get(k, v) == v for k, v in sizes.items() if k != "patch_size"):
            return name
    raise InputError(f"checkpoint {file.path} holds an encoder of {file.arch}, which is none of "
                     f"{', '.join(MODELS)}; hiera_tiny is 46 wide, with stages [1, 2, 7, 2]")


def layer_id(name, depth):
    """Return a parameter's layer: 0 for embeddings and tokens, k for block k, else depth + 1."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("patch_embed", "pos_embed", "cls_token")) else depth + 1


def param_groups(model, weight_decay, layer_decay=1.0, depth=12):
    """Divide trained parameters into optimizer groups with lr_scale = layer_decay^(depth + 1 -
    layer), as in fine-tuning (Sec. "experiments"). Biases, norms, tokens and position tables get no
    weight decay. Names may start with 'encoder.'."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = layer_id(name.removeprefix("encoder."), depth)
            scale = layer_decay ** (depth + 1 - layer)
            decayed = p.dim() > 1 and not name.endswith(("cls_token", "mask_token", "pos_embed"))
            groups.setdefault((scale, decayed), []).append(p)
    return [{"params": params, "lr_scale": scale, "weight_decay": weight_decay if decayed else 0.0}
            for (scale, decayed), params in sorted(groups.items())]


# --------------------------------------------------------------------------------------------------
# Reading checkpoints
# --------------------------------------------------------------------------------------------------
def load_encoder(model, file, keep_blocks=None):
    """Load the encoder of a file into a ViT or Hiera, in place -> names of the loaded tensors.

    file: a path, or what `read_encoder` returns. It must hold every tensor of the encoder, except
    the final norm, and no unknown one, in the model's shapes and finite; position tables are
    resized to the model's grid. A relative position bias or LayerScale that only the model has
    keeps its initial value. A classifier loads the final norm only if the file was trained with
    labels. keep_blocks: load only the embedding and the first `keep_blocks` blocks (Fig. 4). Raises
    InputError that states the file and the tensors.
    """
    file = read_encoder(file)
    target = model.state_dict()
    state = fit_state(file, model, target)
    optional = ("bias_table", ".gamma")    # of the model alone
    needed = [k for k in target if layer_id(k, model.depth) <= model.depth
              and not k.endswith(optional)]
    ours = {**model.arch, **shapes(target)}
    theirs = {**model.arch, **file.arch, **shapes(state)}    # a file may not store all sizes
    sizes = ("kind", "patch_size", "embed_dim", "depth", "num_heads", "stages")
    wrong = [f"{k} is {theirs.get(k, 'absent')} in the file, {ours.get(k, 'absent')} in the model"
             for k in dict.fromkeys([*sizes, *needed, *state]) if theirs.get(k) != ours.get(k)]
    if wrong:
        raise InputError(f"checkpoint {file.path} does not fit the model: {'; '.join(wrong[:5])}; "
                         "choose a model of the file's sizes, also of its image size, with "
                         "relative position bias if the file has bias tables, or another file")

    if keep_blocks is not None:
        state = {k: v for k, v in state.items() if layer_id(k, model.depth) <= keep_blocks}
    model.load_state_dict(state, strict=False)
    if os.getenv("RANK", "0") == "0":
        text = f"loaded {len(state)} tensors; {len(target) - len(state)} left at initialisation"
        if "num_heads" not in file.arch:
            text += f"; assuming {model.arch['num_heads']} heads (not stored in the file)"
        if not file.arch.get("mean"):
            text += f"; no pixel statistics in the file: assuming mean {model.mean}"
        print(f"{file.path}: {text}")
    return list(state)


def shapes(state):
    """Describe the tensors of a state -> {name: shape, or "NaN or infinite"}."""
    return {k: tuple(v.shape) if v.isfinite().all() else "NaN or infinite"
            for k, v in state.items()}


def fit_state(file, model, target):
    """Adapt the tensors of a file to a model with the state `target`: rename or drop the final
    norm, fold LayerScale unless the model has it, resize position tables."""
    state = {}
    for key, value in file.state.items():
        if key.startswith("norm."):
            key = key if key in target else f"fc_{key}"
            if key not in target or (hasattr(model, "head") and not file.supervised):
                continue
        state[key] = value
    fold_layer_scale(state, target)

    table = state["pos_embed"]
    own = "num_heads" in file.arch    # a file of this project, which stores its image size
    if own or table.shape != target["pos_embed"].shape:
        cell = file.arch.get("patch_size", 4)    # of Hiera 4
        grid = tuple(side // cell for side in file.arch.get("img_size", ())) or model.grid
        if not own and "cls_token" in state and table.shape[1] == math.prod(grid):
            state["pos_embed"] = F.pad(table, (0, 0, 1, 0))    # DeiT III: no row of the class token
        if grid != model.grid:
            model.resize_tables(state, grid)
    return state


def fold_layer_scale(state, target):
    """Fold LayerScale that the state `target` lacks, in place, into the linear layer before it,
    which computes the same."""
    for key in [k for k in state if k.endswith(".gamma") and k not in target]:
        gamma = state.pop(key)
        layer = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        state[f"{layer}.weight"] = gamma[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gamma * state[f"{layer}.bias"]


def read_encoder(path):
    """Read the encoder in any file of README, "Checkpoints" -> SimpleNamespace of the fields below.
    In the place of the path, None and a SimpleNamespace are returned unchanged.

    path; state: tensors of the encoder by the names of timm, MAE and Hiera; others: other tensors
    under the same prefix, such as heads; arch: sizes, see `infer_arch`, and all that a file of this
    project stores about its model, mean and std of its pixels included; supervised: whether it has
    a classifier; pooled: whether that reads the mean patch token; content: all that the file holds.

    Removes what stands before the names (dicts such as 'model' around the tensors,
    DistributedDataParallel, torch.compile, MAE-Lite, MoCo-v3, Hugging Face, Lightning) and joins q,
    k, v. If a file has several encoders, the student is read. Raises InputError.
    """
    if path is None or isinstance(path, SimpleNamespace):
        return path
    content = read_file(path)
    state = {}
    for outer, inner in {"": content, **content}.items():    # a dict in the file is one more prefix
        if isinstance(inner, dict):
            state.update({f"{outer}.{k}": v for k, v in inner.items() if torch.is_tensor(v)})
    for pattern, name in RENAMED:
        state = {re.sub(pattern, name, k): v for k, v in state.items()}

    # one encoder, without its prefix
    stem = "patch_embed.proj.weight"
    found = [k.removesuffix(stem) for k in state if k.endswith(stem)]
    students = [p for p in found
                if not re.search(r"tch_model|teacher|momentum|(\b|_)ema", p)] or found
    if len(students) != 1:
        raise InputError(f"checkpoint {path} has no ViT or Hiera encoder, or several: expected one "
                         f"tensor {stem}, found it under the prefixes {found}")
    [prefix] = students
    pooled = any(f"{prefix}{k}.weight" in state for k in ("fc_norm", "head.projection"))
    supervised = (pooled or f"{prefix}head.weight" in state
                  or any(k.endswith("classifier.weight") for k in state))    # of Hugging Face
    state = {re.sub("^fc_norm", "norm", k.removeprefix(prefix)): v
             for k, v in state.items() if k.startswith(prefix)}
    join_qkv(state)

    # the encoder alone
    arch = infer_arch(state, path)
    stored = content.get("arch")
    if isinstance(stored, dict) and "img_size" in stored:    # files of others may store a name
        arch.update(stored, mean=content.get("mean"), std=content.get("std"))
    others = {k: state.pop(k) for k in list(state)
              if layer_id(k, -1) > arch["depth"] or re.search(OTHERS, k)}
    return SimpleNamespace(path=path, state=state, others=others, arch=arch, supervised=supervised,
                           pooled=pooled, content=content)


def join_qkv(state):
    """Join q, k and v of each block, in place. BEiT and the authors have no bias of k, which is the
    same as a bias of zero."""
    for key in [k for k in state if ".attn.q." in k]:
        parts = [key.replace(".q.", f".{part}.") for part in "qkv"]
        if key.endswith("bias"):
            state.setdefault(parts[1], torch.zeros_like(state[key]))
        joined = torch.cat([state.pop(part) for part in parts if part in state])
        state[key.replace(".q.", ".qkv.")] = joined


def infer_arch(state, path):
    """Infer the sizes of an encoder from its tensors -> dict with the keys of
    `VisionTransformer.arch` or `Hiera.arch`.

    Tensors do not show the number of heads, nor the shape of the grid: img_size is that of a
    square, and missing if the patches do not fill one. Raises InputError.
    """
    weight = state["patch_embed.proj.weight"]
    is_vit = "cls_token" in state
    if "pos_embed" not in state or not (is_vit or weight.shape[-1] == 7):
        raise InputError(f"checkpoint {path} is of none of this project's models: ViT with "
                         "cls_token and pos_embed, or Hiera, both for images (not for videos)")
    depth = max(layer_id(k, -1) for k in state)             # 0 for tensors outside blocks
    if is_vit:
        depth = 12 if depth == 13 else depth                # a student of D2-MAE
        cell = weight.shape[-1]
        arch = dict(kind="vit", patch_size=cell)
    else:
        cell = 4
        opens = [k for k in range(depth) if f"blocks.{k}.proj.weight" in state]
        arch = dict(kind="hiera", stages=np.diff([0, *opens, depth]).tolist())
    arch.update(embed_dim=len(weight), depth=depth)
    rows = state["pos_embed"].shape[1]
    side = math.isqrt(rows)
    scaled = "blocks.0.ls1.gamma" in state    # as in DeiT III, which has no row for the class token
    if rows - side ** 2 in (is_vit, is_vit and not scaled):
        arch["img_size"] = [side * cell] * 2
    return arch


def read_file(path):
    """Read the dict in a checkpoint file to the CPU. Never unpickles code. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist, or is a folder: give a file, such as "
                         "encoder.pt")
    try:
        if path.suffix.lower() == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):    # of MAE's training files
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError:
        raise InputError(f"{path} needs one more package: pip install safetensors") from None
    except Exception as error:    # torch and safetensors raise many kinds
        pickled = re.search(r"(GLOBAL|type) \S+|$", str(error))[0]
        raise InputError(f"checkpoint {path} is not a readable PyTorch or safetensors file "
                         f"({pickled or type(error).__name__}): download it again, if it is "
                         "incomplete, a Git LFS pointer or an HTML page; if it pickles code, which "
                         "loading could run, re-save only its tensors and plain types") from None


RENAMED = (    # in published files -> here; q_proj, layers: names of transformers 5
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"(encoder\.layer|layers)\.", "blocks."),
    (r"attention\.(attention\.)?", "attn."),
    (r"attn\.(output\.dense|o_proj)", "attn.proj"),
    (r"attn\.([qkv])(uery|ey|alue|_proj)\.", r"attn.\1."),
    (r"attn\.([qv])_bias", r"attn.\1.bias"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"layernorm\.", "norm."),
    (r"head\.norm\.", "norm."),             # Hiera of timm
    (r"head\.fc\.", "head.projection."),
    (r"gamma_([12])", r"ls\1.gamma"),
)
OTHERS = (    # not of an encoder: decoders, heads, adapters, a teacher, constants
    r"^(decoder|mask_token|embeddings.mask_token|head|classifier|pooler|lm_head|predictor"
    r"|projector|encoder_norm|multi_scale|attn_adapter|adapter|distillation|extra|tch_model"
    r"|teacher|template_pos_embed|search_pos_embed)|(relative_position|rel_pos)_index$")


# ==================================================================================================
# Part 2: runs. Processes and loaders
# ==================================================================================================
def init_distributed(device="auto", dtype="auto", minutes=10):
    """Join torchrun's process group, if there is one -> rank, world, torch.device, torch.dtype.

    device "auto": the first available of cuda, mps and cpu. dtype "auto": bf16 on CUDA GPUs
    that support it, fp16 on others, else float32. minutes: timeout of collective operations. Raises
    InputError.
    """
    check_launcher()
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    name = best if device == "auto" else device
    if name not in (best, "cpu"):
        raise InputError(f"--device {name} is not available on this machine: choose another")
    device = torch.device(name)
    if name == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        if dtype == "auto":    # GPUs before Ampere emulate bf16, which is slow
            dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if world > 1:
        warnings.filterwarnings("ignore", "Grad strides")    # of 1x1 kernels: one layout in memory
        backend = "nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=minutes))
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return rank, world, device, dtypes.get(dtype, torch.float32)


def check_launcher():
    """Raise InputError if a launcher other than torchrun has started several processes, each of
    which would train alone."""
    if "RANK" in os.environ:
        return
    for name in ("WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        if int(os.environ.get(name) or 0) > (name == "WORLD_SIZE"):
            raise InputError(f"{name} is {os.environ[name]}, but RANK is not set: start several "
                             "processes by torchrun, under srun or mpirun one torchrun a machine")


class EpochSampler(DistributedSampler):
    """Sample keys (epoch, index) for this process, its share of the whole batches of an epoch. A
    batch has the same items for any number of processes and micro-batches.

    total_batch: items of an optimizer step, over all processes. micro_batch: items that a process
    computes at once, accum_steps times in a step. accum_steps=None chooses the fewest micro-batches
    of at most `most` items. A data set smaller than the batch gives one batch, rounded down.
    Libraries that wrap loaders (Lightning Fabric, Accelerate) count epochs themselves: call
    `set_epoch(epoch)` on this object before every epoch, not on their wrapper. Raises InputError.
    """

    def __init__(self, dataset, batch_size, accum_steps, most, rank, world, seed):
        super().__init__(dataset, world, rank, seed=mix_seed(seed), drop_last=True)
        items = min(batch_size, len(dataset))
        fewest = math.ceil(items / (most * world))
        whole = (n for n in range(fewest, items) if batch_size % (n * world) == 0)
        self.accum_steps = accum_steps or next(whole, fewest)
        parts = self.accum_steps * world
        self.micro_batch = items // parts
        self.total_batch = self.micro_batch * parts
        if batch_size % parts or not self.total_batch:
            raise InputError(f"--batch-size {batch_size}, for {len(dataset)} items, must be a "
                             f"multiple of processes x --accum-steps = {parts}, and no less")
        self.num_samples = len(dataset) // self.total_batch * self.total_batch // world
        self.total_size = self.num_samples * world

    def __iter__(self):
        return ((self.epoch, index) for index in super().__iter__())


class DeviceLoader(DataLoader):
    """A DataLoader with batches on the device and persistent workers. A batch is copied to a GPU
    from pinned memory, in a stream of its own, while the step before it runs."""

    def __init__(self, dataset, batch_size, sampler, workers, device):
        multiprocessing.set_forkserver_preload(    # no effect under fork and spawn
            ["torch", "torchvision.transforms.v2", "PIL.Image"])
        super().__init__(dataset, batch_size, sampler=sampler, num_workers=workers,
                         persistent_workers=workers > 0, pin_memory=device.type == "cuda",
                         generator=torch.Generator())    # the global one is left alone
        self.device = device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self):
        ahead = []
        for batch in super().__iter__():
            if self.copies:    # earlier steps may still read the memory that is reused
                self.copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.copies):    # None has no effect
                batch = [x.to(self.device, non_blocking=True) for x in batch]
            yield from ahead
            if self.copies:
                torch.cuda.current_stream().wait_stream(self.copies)
            ahead = [batch]
        yield from ahead


def train_loader(dataset, batch_size, accum_steps, most, workers, seed, run):
    """Build the loader of this process's micro-batches; its `sampler` is an `EpochSampler`.

    most: largest micro-batch if accum_steps is None. workers: loader processes. run: what
    `init_distributed` returned. Raises InputError if the data sets of the processes, for example on
    two machines, differ in size.
    """
    rank, world, device, _ = run
    if dist.is_initialized():
        sizes = [None] * world
        dist.all_gather_object(sizes, len(dataset))
        if min(sizes) < max(sizes):    # each would wait for gradients that another never sends
            raise InputError(f"the processes found {sizes} training items: give every machine the "
                             "same --data")
    sampler = EpochSampler(dataset, batch_size, accum_steps, most, rank, world, seed)
    if rank == 0:
        print(f"batch {sampler.total_batch} = {sampler.micro_batch} x {world} process(es) x "
              f"{sampler.accum_steps} micro-batches of at most {most} items; "
              f"{len(dataset) // sampler.total_batch} steps per epoch of {len(dataset)} items")
    return DeviceLoader(dataset, sampler.micro_batch, sampler, workers, device)


def eval_loader(dataset, batch_size, workers, run):
    """Build the loader of an evaluation: each item once, with key (0, index), divided among the
    processes."""
    rank, world, device, _ = run
    own = [(0, index) for index in range(rank, len(dataset), world)]
    return DeviceLoader(dataset, batch_size, own, workers, device)


def mix_seed(*numbers):
    """Mix whole numbers into one seed in [0, 2^63) by steps of a linear congruential generator. An
    item seeded so is the same in every process, and no RNG state has to be saved."""
    seed = 0
    for n in numbers:
        seed = ((seed ^ n) * 6364136223846793005 + 1442695040888963407) % 2 ** 63
    return seed


# --------------------------------------------------------------------------------------------------
# Log and checkpoints of a run
# --------------------------------------------------------------------------------------------------
def log(args, rank, world, **values):
    """Append values to args.out/log.jsonl, on process 0 -> the values as Python numbers.

    Tensors are averaged over processes first, which is the only device-to-host sync of a training
    loop. Numbers that are not finite, such as the norm of gradients that the loss scaler skips,
    become null. Raises FloatingPointError, on all processes, if `loss` is not finite.
    """
    names = [k for k, v in values.items() if torch.is_tensor(v)]
    if names:
        vector = torch.stack([values[k].detach().float() for k in names])
        if world > 1:
            dist.all_reduce(vector)
        values.update(zip(names, (vector / world).tolist()))
    check_finite(values.get("loss", 0.0), f"the loss in epoch {values['epoch']}")
    if rank == 0:
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in values.items()}
        with open(Path(args.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
    return values


def read_log(path):
    """Read the objects in a log.jsonl. A truncated line is skipped."""
    values = []
    for line in read_text(path).splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            values.append(json.loads(line))
    return values


def check_finite(value, what):
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{what} is not finite ({value}); last.pt, if there is one, was saved before: rerun "
            "with --dtype fp32, --clip-grad 1 or a lower learning rate to resume")


def save(args, rank, name, model, **state):
    """Write args.out/name on process 0: the weights of a model, its arch, mean and std, the
    options, `state` (plain types) and, in last.pt, the size of log.jsonl in bytes.

    The write is atomic: a killed process or a full disk leaves the old file. Raises
    FloatingPointError, on all processes, if a weight is not finite, so checkpoints are always
    finite; OSError if the file cannot be written.
    """
    weights = model.state_dict()
    total = sum(w.float().sum() for w in weights.values()).item()
    check_finite(total, "the sum of the weights")
    scale = state.get("scaler", {}).get("scale", 1)    # 65536, halved by every skipped update
    check_finite(scale if scale > 2 ** -4 else math.inf, "the gradient of 20 updates in fp16")
    if rank > 0:
        return
    path = Path(args.out, name)
    scratch = path.with_suffix(".tmp")
    state.update(model=weights, arch=model.arch, mean=list(model.mean), std=list(model.std),
                 args=vars(args))
    log_file = path.with_name("log.jsonl")
    if name == "last.pt" and log_file.exists():
        state["log_size"] = log_file.stat().st_size
    try:
        with open(scratch, "wb") as file:    # given a path, torch.save crashes on a full disk
            torch.save(state, file)
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:
        scratch.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}; is the disk full?); the file before it is "
                      "kept") from None


MAY_CHANGE = {"out", "data", "init", "teacher", "no_resume", "device", "dtype", "workers",
              "accum_steps", "compile", "clip_grad", "base_lr", "lr", "eval_every",
              "log_every"}    # on resuming; all other options define the run
RUN_FILES = ("last.pt", "encoder.pt", "classifier.pt", "segmenter.pt", "tracker.pt", "log.jsonl",
             "reconstruction.png", "attention.png", "input_truth_prediction_*.png")


def resume(args, run, steps, model, optimizer, scaler, **data):
    """Load args.out/last.pt, if it exists, into model, optimizer and scaler -> number of finished
    epochs, 0 for a new run. Process 0 locks args.out and reads the file for all processes.

    steps: optimizer steps per epoch. data: facts about the data, such as the number of images; they
    are compared with those in the file, to which `save` must write them. Raises InputError if
    last.pt is of another run, or if another process is writing to args.out.
    """
    rank, world, _, _ = run
    states = [None]
    if rank == 0:
        optimizer.lock = lock_folder(Path(args.out))    # lives as long as the optimizer
        states = [open_run(args, dict(data, arch=model.arch))]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        lr = optimizer.defaults["lr"]
        print(f"{args.out}: {trained:.2f}M trained parameters, peak lr {lr:.3g}")
        if "base_lr" in args and (steps * args.epochs < 1000 or lr < 2.4e-4):
            print(f"{steps * args.epochs} steps, peak lr {lr:.2g}: a model learns little in fewer "
                  "than 1,000 steps, or below 2.4e-4, a tenth of the paper's; see 'Your own "
                  "images' in the README")
    if world > 1:
        dist.broadcast_object_list(states, src=0)
    [state] = states
    if state["epoch"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:    # empty if the run had no loss scaler until now
            scaler.load_state_dict(state["scaler"])
    return state["epoch"]


def lock_folder(out):
    """Create the folder of a run and lock it -> file that holds the lock until it is closed or this
    process ends, even by SIGKILL. Raises InputError if another process holds the lock."""
    if out.is_file():
        raise InputError(f"--out {out} is a file: give a folder")
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "a")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is writing to --out {out}: wait for it, or give another "
                         "folder") from None
    return file


def open_run(args, facts):
    """Read args.out/last.pt -> state, of epoch 0 if it does not exist, and cut log.jsonl to its
    size when last.pt was saved: what came later will be logged again. A new log begins with the
    options, `facts` and the git commit. Raises InputError if last.pt is of another run."""
    out = Path(args.out).resolve()
    written = {file for name in RUN_FILES for file in out.glob(name)}
    starts = {Path(vars(args).get(option) or "").resolve() for option in ("init", "teacher")}
    own = starts & written
    if own:
        raise InputError(f"--out {args.out} would overwrite {own.pop()}, its own start: give "
                         "another")
    if args.no_resume:
        for file in written:
            file.unlink()
    state = {"epoch": 0}
    if (out / "last.pt").exists():
        state = read_file(out / "last.pt")
        check_same_run(state, {**vars(args), **facts})
    with open(out / "log.jsonl", "a") as file:
        size = min(file.tell(), state.get("log_size", 0))
        file.truncate(size)
        if size == 0:
            commit = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True,
                                    cwd=Path(__file__).parent, text=True).stdout
            first = dict(epoch=0, args=vars(args), **facts, commit=commit.strip())
            file.write(json.dumps(first) + "\n")
    return state


def check_same_run(state, options):
    """Raise InputError if a checkpoint is of another run; print which options have changed."""
    if not {"args", "optimizer", "epoch"} <= set(state):
        raise InputError(f"last.pt in {options['out']} is no training state: give another --out, "
                         "or --no-resume")
    before = {**state, **state["args"]}
    changes = {name: f"{name} is now {value!s:.160}, was {before.get(name)!s:.160}"
               for name, value in options.items() if value != before.get(name)}
    refused = [text for name, text in changes.items() if name not in MAY_CHANGE]
    if refused:
        raise InputError(f"last.pt in {options['out']} is of another run: "
                         f"{'; '.join(refused[:5])}: give the same options to resume it, another "
                         "--out, or --no-resume to start again")
    finished = f"{state['epoch']} of {options['epochs']} epochs are finished"
    print(f"{options['out']}: {'; '.join([finished, *changes.values()])}")


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------
RUNTIME_ERRORS = {    # pattern in the message of a RuntimeError -> what to say
    "invalid device ordinal": "this machine has more processes than GPUs: start fewer",
    "out of memory|can't allocate memory|not enough memory":
        "out of memory: in training, --accum-steps 2 (or twice the number of micro-batches that "
        "was printed) halves the micro-batch; else give a smaller --batch-size or fewer --workers",
    r"worker \(pid|shared memory|/torch_":
        "a loader process was killed, most often for lack of memory: give fewer --workers or, in "
        "a container, more shared memory (docker run --shm-size=16g)",
    "connectFullMesh|Connection refused":
        "the processes cannot reach each other: if torchrun has restarted them, rerun the command "
        "instead; on several machines without GPUs set GLOO_SOCKET_IFNAME to the network interface",
    "by peer":
        "the connection to another process was lost: its own message, if any, states the cause",
    r"C\+\+ compiler|CppCompileError|gcc":
        "--compile needs a C++ compiler (g++), which was not found or failed: leave --compile out",
}


@contextlib.contextmanager
def plain_errors():
    """Print errors that the user can fix as one sentence, without a traceback, and exit with status
    1 immediately: leaving the process group first would deadlock, since the other processes wait
    for gradients. torchrun ends them.

    All processes raise InputError and FloatingPointError alike, and the first one of each machine
    prints them. An unreadable file, a full disk or a full GPU is printed by the process concerned.
    """
    alone = False
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except (InputError, FloatingPointError) as error:
        message = str(error)
        alone = "DataLoader worker" in message
    except KeyboardInterrupt:
        message = "interrupted; rerun a training command to resume after its last saved epoch"
    except OSError as error:
        message = str(error).strip() or repr(error)
        alone = True
    except (RuntimeError, MemoryError) as error:
        text = f"{error} out of memory" if isinstance(error, MemoryError) else str(error)
        known = [said for pattern, said in RUNTIME_ERRORS.items() if re.search(pattern, text)]
        if not known:
            raise
        message = known[0]
        alone = not re.search("by peer|[Cc]onnect", text)
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        message = re.sub(r"^[\w.]*Error: ", "", message.splitlines()[-1])    # of a loader process
        tqdm.write(f"error: {message}", sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


# --------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------
def bounded(convert, low, high):
    """Make an argparse type for an int or float in [low, high]."""
    def parse(text):
        value = convert(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie in [{low}, {high}]")
        return value

    parse.__name__ = convert.__name__    # argparse names it if the text is no number
    return parse


class Size(argparse.Action):
    """Store one number or two as (height, width)."""

    def __call__(self, parser, args, values, option):
        if len(values) > 2:
            parser.error(f"{option} takes a side, or height and width, not {len(values)} numbers")
        setattr(args, self.dest, (values[0], values[-1]))


class Parser(argparse.ArgumentParser):
    """ArgumentParser with groups, bounded numbers, and defaults in the help texts."""

    def __init__(self, doc, **options):
        super().__init__(usage="%(prog)s [options]", description=doc.split("\n\n")[0], **options)

    def group(self, title):
        """Begin a group -> function that adds an option to it; low and high bound a number."""
        group = self.add_argument_group(title)

        def add(name, help, low=None, high=math.inf, **options):
            if low is not None:
                options["type"] = bounded(options.get("type", int), low, high)
            if options.get("default") is not None:
                help += " (default: %(default)s)"
            group.add_argument(name, help=help, **options)

        return add

    def check_unread(self, args, mode, read):
        """Exit with a usage error if an option was given that `mode` does not read. read: names of
        the options that it reads."""
        for name, value in vars(args).items():
            if value != self.get_default(name) and name not in read.split():
                self.error(f"{mode} does not read --{name.replace('_', '-')}: leave it out")

    def pixel_options(self, add, default="that of the checkpoint, else 224",
                      use="default: that of the checkpoint, or ImageNet's"):
        """Add the size and statistics of the pixels that an encoder reads."""
        add("--image-size", low=1, nargs="+", action=Size,
            help=f"side, or height and width, in pixels; default: {default}")
        for name in ("mean", "std"):
            add(f"--{name}", type=float, low=1e-3 * (name == "std"), high=1, nargs=3,
                help=f"{name} of pixels in [0, 1] (divide those of 0..255 by 255); {use}")

    def run_options(self, out, batch_size, eval_every, clip_grad=0.0):
        """Add the options that all training scripts share -> function that adds more of them."""
        add = self.group("run")
        add("--out", default=out,
            help="folder for checkpoints, log and pictures; rerunning the command resumes")
        add("--no-resume", action="store_true",
            help="delete checkpoints, log and pictures of an older run in --out")
        add("--batch-size", low=1, default=batch_size,
            help="items per optimizer step, over all processes; the default is the paper's")
        add("--accum-steps", low=1,
            help="micro-batches per process and step; default: the fewest that a limit allows")
        add("--clip-grad", type=float, low=0, default=clip_grad,
            help="largest gradient norm; 0: no clipping")
        cores = (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        add("--workers", low=0, default=max(1, min(16, cores)),
            help="loader processes per training process")
        add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
            help="auto: the first available of cuda, mps and cpu")
        add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
            help="auto: bf16 on CUDA GPUs that support it, fp16 with loss scaling on others, else "
                 "fp32; bf16 is faster on CPUs with AVX512-BF16 or AMX")
        add("--seed", low=0, high=2 ** 32 - 1, default=0, help="seed of all random numbers")
        add("--log-every", low=1, default=20, help="updates per line of log.jsonl")
        add("--eval-every", low=1, default=eval_every, help="epochs between evaluations")
        return add


# --------------------------------------------------------------------------------------------------
# Files and images
# --------------------------------------------------------------------------------------------------
class Names(Sequence):
    """Sequence of strings in shared memory: loader processes need no copy of their own, whatever
    their start method. In a list, a million file names take 180 MB in each process. A slice, a
    tensor of indices or a mask selects Names from Names."""

    def __init__(self, names):
        if not torch.is_tensor(names):
            table = np.array([os.fsencode(name) for name in names], dtype="S")    # padded by zeros
            names = torch.from_numpy(table.view(np.uint8).reshape(len(table), table.itemsize))
        self.rows = names.share_memory_()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return Names(row) if row.dim() > 1 else os.fsdecode(row.numpy().tobytes().rstrip(b"\0"))


def read_text(path):
    """Read a text file in UTF-8, with or without a byte order mark. Raises OSError."""
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): save it as "
                      "UTF-8") from None


IMAGE_TYPES = (*IMG_EXTENSIONS, ".jpe", ".jfif", ".gif", ".avif", ".jp2", ".pbm", ".pnm", ".tga")


def list_images(folder, out=None):
    """List all image files below a folder, flat or nested -> sorted `Names`. Hidden files are
    skipped, and so are `out` and nested outputs of other runs (they hold .lock). Raises InputError
    if no image is found."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder: give a folder of images")
    files = []
    skipped = Counter()
    seen = {out and os.path.realpath(out)}
    folders = [str(folder)]
    for place in folders:    # which grows
        real = os.path.realpath(place)
        is_run = place != str(folder) and os.path.exists(f"{place}/.lock")
        if real in seen or is_run:    # links may form a loop
            continue
        seen.add(real)
        for entry in os.scandir(place):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith(IMAGE_TYPES):
                files.append(entry.path)
            else:
                skipped[os.path.splitext(entry.name)[1]] += 1
    kinds = dict(skipped.most_common(5))
    if not files:
        raise InputError(f"{folder} holds no image outside --out, but {kinds or 'no files'}")
    if skipped and os.getenv("RANK", "0") == "0":
        print(f"{folder}: {skipped.total()} files of other types skipped ({kinds})")
    return Names(sorted(files))


def open_image(path):
    """Read an image file, the first frame if there are several -> upright Pillow RGB image.

    Grey of 16 or 32 bits is divided by 257. Float grey is read as [0, 1], or as [0, 255] if a value
    exceeds 1. Transparency is dropped. Raises OSError with the name of the file.
    """
    try:
        image = Image.open(path)
        image.load()
        with contextlib.suppress(SyntaxError, struct.error):    # broken EXIF: assumed upright
            image.getexif()
        image.info.clear()    # of transparency, and of tags that exif_transpose fails to rewrite
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            grey = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=1)
            white = 65535 if image.mode != "F" else 255 if grey.max() > 1 else 1
            image = Image.fromarray((255 * (grey / white).clip(0, 1)).round().astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:    # Pillow's plugins raise many kinds
        raise OSError(f"cannot read image {path} ({type(error).__name__}: {error}): put a good "
                      "copy there; tests/tools/check.py lists all such files") from None


class ImageDataset(Dataset):
    """Image files, read by keys (epoch, index), such as data[0, 7]. files: sequence of paths, best
    `Names`, which loader processes share.

    A subclass defines `transform(image, index)` of a Pillow RGB image. It may draw from torch's
    global generator, which is seeded by (seed, epoch, index) and restored afterwards. An unreadable
    file raises OSError.
    """

    def __init__(self, files, seed):
        self.files = files
        self.seed = seed

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        epoch, index = key    # see EpochSampler
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.transform(open_image(self.files[index]), index)


def random_crop(image, size, scale):
    """Crop a Pillow RGB image at random, resize it to `size` (h, w), flip it with probability 1/2
    -> (3, h, w) uint8. scale: range of the crop's share of the area; its aspect ratio is 3/4 .. 4/3
    times w / h. Draws from torch's global generator.

    torch resizes uint8 three times as fast as Pillow, to the same pixels up to rounding.
    """
    h, w = size
    ratio = [3 / 4 * w / h, 4 / 3 * w / h]
    box = RandomResizedCrop.get_params(image, list(scale), ratio)    # top, left, height, width
    pixels = resize(pil_to_tensor(crop(image, *box)), [h, w], InterpolationMode.BICUBIC)
    return pixels.flip(2) if torch.rand(()) < 0.5 else pixels
