"""ViT and Hiera encoders, written out, and the loading of every public checkpoint of them (paper Sec. 3 and appendix).

Every script of this repository imports this file and nothing else of it. Read it for the two things that differ from
an ordinary ViT: `forward_features` embeds and encodes **only the visible patches** it is given, and `attention_map`
returns the pre-softmax map that the distillation reads, projecting q and k alone.

    vit = MODELS["vit_tiny"](num_classes=1000)                       # 5,717,416 parameters, random weights
    load_encoder(vit, "out/encoder.pt")                              # any file of README, "Checkpoints"
    logits = vit(normalize(uint8_images))                            # (B, 1000)
    tokens = vit.forward_features(images, taps=(8, 12))              # {8: (B, 197, 192), 12: (B, 197, 192)}

Shapes: B images, h x w patch grid, N = h * w patches, V visible patches, T tokens (1 + V with the class token),
        D width, H heads, d = D / H, U mask units of Hiera. Blocks count from 1, as in the paper; 0 is the embedding.
Masks:  `ids_keep` (B, V) holds raster indices of visible patches (Hiera: of visible mask units). A boolean mask is
        called `masked` and is True where a patch was removed, in every file.
"""
import argparse
import importlib
import os
import pickle
import re
from collections import OrderedDict
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LayerNorm = partial(nn.LayerNorm, eps=1e-6)    # everywhere, decoders included


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one sentence; scripts print it without a traceback."""


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """(B, 3, H, W) uint8 -> float32 of about zero mean and unit variance, on whatever device the images are."""
    mean, std = channel_constants(tuple(mean), tuple(std), images.device)
    return (images - mean) / std


@lru_cache(maxsize=8)    # a copy to the device in every step would make the host wait for it
def channel_constants(mean, std, device):
    return [255 * torch.tensor(c, device=device).view(3, 1, 1) for c in (mean, std)]


def pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


# ----------------------------------------------------------------------------------------------------------------------
# Position tables
# ----------------------------------------------------------------------------------------------------------------------
def sincos_2d(dim, grid, class_token=True):
    """Fixed 2-D sin-cos position embedding of MAE -> (1, N [+ 1], dim), the class row zero.

    The first half of the channels encodes the column, the second the row; in each half all sines stand before all
    cosines, at frequencies omega_i = 10000^(-i / (dim / 4)).
    """
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))    # float64, on the host only
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (cols, rows)]            # 2 x (N, dim / 4)
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
    return torch.cat([table.new_zeros(int(class_token), dim), table])[None]


def resize_grid(table, old, new):
    """Bicubic resize of a raster table, no antialiasing, corners not aligned: (1, old_h * old_w, D) -> (1, N, D)."""
    if tuple(old) == tuple(new):
        return table
    x = table.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    return F.interpolate(x, size=tuple(new), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def relative_position_index(grid):
    """Row of the bias table for every (query, key) pair, as in BEiT -> (N + 1, N + 1) int64, class token first.

    Patch to patch: (dy + h - 1) * (2w - 1) + dx + w - 1, with (dy, dx) = query minus key. The last three rows of the
    table are class -> patch, patch -> class and class -> class.
    """
    h, w = grid
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, x = y.flatten(), x.flatten()
    rows = (2 * h - 1) * (2 * w - 1)
    index = torch.empty(h * w + 1, h * w + 1, dtype=torch.long)
    index[1:, 1:] = (y[:, None] - y + h - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)
    index[0, :], index[:, 0], index[0, 0] = rows, rows + 1, rows + 2
    return index


# ----------------------------------------------------------------------------------------------------------------------
# Parts shared by ViT and Hiera
# ----------------------------------------------------------------------------------------------------------------------
class DropPath(nn.Module):
    """Stochastic depth: a residual branch is dropped for whole samples, the others are scaled by 1 / keep."""

    def __init__(self, rate):
        super().__init__()
        if not 0 <= rate < 1:
            raise InputError(f"--drop-path {rate} must lie in [0, 1): it is the share of samples that skip a branch")
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


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

    In float32 also under autocast: the distillation loss squares differences of these logits, which can be large.
    """
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)


def init_mae(module):
    """Weights as in MAE: Xavier-uniform linear layers with zero biases, norms that start as the identity."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_patch_embed(proj):
    """As in MAE, the patch embedding starts like the linear layer that it is."""
    nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))


# ----------------------------------------------------------------------------------------------------------------------
# ViT
# ----------------------------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention; `rel_pos_rows` > 0 adds a BEiT relative position bias table of so many rows."""

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
        table = self.relative_position_bias_table.t().contiguous()    # heads first, as attention reads it
        return table.index_select(1, index.flatten()).view(-1, *index.shape)

    def forward(self, x, rel_pos_index=None):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)           # 3 x (B, H, T, d)
        bias = self.bias(rel_pos_index)
        x = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias[None].to(q.dtype))
        return self.proj(x.transpose(1, 2).reshape(B, T, D))

    def logits(self, x, rel_pos_index=None):
        """Pre-softmax map (B, H, T, T) in float32 of the tokens (B, T, D). Only q and k are projected."""
        B, T, D = x.shape
        qk = F.linear(x, self.qkv.weight[:2 * D], self.qkv.bias[:2 * D])
        q, k = qk.view(B, T, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)                       # 2 x (B, H, T, d)
        bias = self.bias(rel_pos_index)
        return attention_logits(q, k) if bias is None else attention_logits(q, k) + bias.float()


class Block(nn.Module):
    """Pre-norm transformer block; `layer_scale` is None or the initial value of its two gammas."""

    def __init__(self, dim, num_heads, drop_path=0.0, layer_scale=None, rel_pos_rows=0):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, rel_pos_rows)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, rel_pos_index=None):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rel_pos_index)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Linear embedding of p x p patches, of all of them or of the visible ones only."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)    # a convolution for the name and shape of its weight

    def forward(self, images, ids_keep=None):
        """(B, 3, H, W) -> (B, N, D) in raster order, or (B, V, D) in the order of ids_keep (B, V)."""
        B, p = images.shape[0], self.patch_size
        h, w = images.shape[2] // p, images.shape[3] // p
        patches = images.view(B, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5)                        # (B, h, w, 3, p, p)
        if ids_keep is None:
            patches = patches.flatten(1, 2)
        else:    # indexing a view copies the visible patches and never touches the others
            patches = patches[torch.arange(B, device=images.device)[:, None], ids_keep // w, ids_keep % w]
        return F.linear(patches.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """Plain ViT with a class token. The classifier reads the mean patch token: head(fc_norm(mean)) (Sec. 3).

    img_size: int or (H, W), multiples of patch_size. num_classes=0 builds an encoder that ends in `norm` instead.
    fixed_pos_embed: sin-cos table that is not trained (pre-training); else a trained table.
    rel_pos_bias: BEiT relative position bias in every block. layer_scale: None or the gammas' initial value.
    drop_path: rate of the last block; the rates grow linearly from 0.
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=12, num_classes=0,
                 drop_path=0.0, rel_pos_bias=False, layer_scale=None, fixed_pos_embed=False):
        super().__init__()
        self.img_size, self.patch_size, self.embed_dim, self.depth = pair(img_size), patch_size, embed_dim, depth
        if any(s % patch_size or s < patch_size for s in self.img_size):
            raise InputError(f"image size {'x'.join(map(str, self.img_size))} is not a multiple of the patch size "
                             f"{patch_size}: choose multiples of {patch_size}")
        self.grid = tuple(s // patch_size for s in self.img_size)
        self.arch = dict(kind="vit", img_size=list(self.img_size), patch_size=patch_size, embed_dim=embed_dim,
                         depth=depth, num_heads=num_heads, rel_pos_bias=rel_pos_bias, layer_scale=layer_scale)

        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_2d(embed_dim, self.grid), requires_grad=not fixed_pos_embed)
        rel_pos_rows = (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) + 3 if rel_pos_bias else 0
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, r, layer_scale, rel_pos_rows) for r in rates])
        self.register_buffer("rel_pos_index", relative_position_index(self.grid) if rel_pos_bias else None,
                             persistent=False)
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
            nn.init.trunc_normal_(self.head.weight, std=2e-5)    # as MAE fine-tunes: logits start at zero

    def embed(self, images, ids_keep=None):
        """(B, 3, H, W) -> (B, 1 + V, D): class token, then the patches of ids_keep (all in raster order if None)."""
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(f"images of {tuple(images.shape[2:])} given to a ViT built for {self.img_size}")
        if ids_keep is not None and self.rel_pos_index is not None:
            raise ValueError("relative position bias needs all patches: build the model without it to use ids_keep")
        pos = self.pos_embed[:, 1:] if ids_keep is None else self.pos_embed[0, 1:][ids_keep]
        x = self.patch_embed(images, ids_keep) + pos
        cls_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)

    def forward_features(self, images, taps, ids_keep=None):
        """Tokens after the blocks in `taps` -> {tap: (B, T, D)}, not normalised. No block after the last tap runs."""
        x = self.embed(images, ids_keep)
        features = {0: x} if 0 in taps else {}
        for number, block in enumerate(self.blocks[:max(taps)], start=1):
            x = block(x, self.rel_pos_index)
            if number in taps:
                features[number] = x
        return features

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, classes); without a classifier, all normalised tokens (B, 1 + N, D)."""
        x = self.forward_features(images, (self.depth,))[self.depth]
        return self.head(self.fc_norm(x[:, 1:].mean(dim=1))) if hasattr(self, "head") else self.norm(x)

    def feature_maps(self, images, taps):
        """Patch tokens after the blocks in `taps` as a list of raster maps (B, D, h, w), not normalised."""
        features = self.forward_features(images, taps)
        return [features[t][:, 1:].transpose(1, 2).unflatten(2, self.grid) for t in taps]

    def attention_map(self, x, block):
        """Pre-softmax map of `block` (1-based) from its input, i.e. the tokens after block - 1 -> (B, H, T, T)."""
        block = self.blocks[block - 1]
        return block.attn.logits(block.norm1(x), self.rel_pos_index)

    def representation(self, x, block):
        """Normalised representation of `block` (Fig. 2) from its output: next block's norm1, `norm` for the last."""
        return self.blocks[block].norm1(x) if block < self.depth else self.norm(x)


# ----------------------------------------------------------------------------------------------------------------------
# Hiera (arXiv 2306.00989), 2-D
# ----------------------------------------------------------------------------------------------------------------------
def unroll(x, grid, rounds=3):
    """Raster tokens (B, h * w, C) -> the same tokens reordered, so that 2x2 pooling needs no 2-D layout.

    Each round splits the grid into 2x2 cells and moves (row bit, column bit) to the front. The token axis becomes
    [4 (finest), 4, 4 (coarsest), units in raster order]: pooling is a max over its first axis of 4, and the tokens of
    one mask unit are those with the same last index. One round on a 4x4 grid of tokens

         0  1 |  2  3
         4  5 |  6  7       gives   0 2 8 10 | 1 3 9 11 | 4 6 12 14 | 5 7 13 15
        ------+------               top-left   top-right  bottom-left  bottom-right of each of the 4 cells:
         8  9 | 10 11               the max over the four groups pools 0,1,4,5 and 2,3,6,7 and 8,9,12,13 and ...
        12 13 | 14 15
    """
    (h, w), (B, _, C) = grid, x.shape
    x = x.reshape(B, 1, h, w, C)
    for _ in range(rounds):
        h, w = h // 2, w // 2
        x = x.view(B, -1, h, 2, w, 2, C).permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 3)              # (B, 4^r, h, w, C)
    return x.flatten(1, 3)


def reroll(x, units, rounds):
    """Inverse of `unroll`: (B, 4^rounds * U, C), U = units[0] * units[1] -> raster map (B, h, w, C)."""
    (h, w), (B, _, C) = units, x.shape
    x = x.reshape(B, -1, h, w, C)
    for _ in range(rounds):
        x = x.reshape(B, -1, 2, 2, h, w, C).permute(0, 1, 4, 2, 5, 3, 6)                         # (B, ., h, 2, w, 2, C)
        h, w = 2 * h, 2 * w
        x = x.reshape(B, -1, h, w, C)
    return x[:, 0]


class MaskUnitAttention(nn.Module):
    """Attention over unrolled tokens, inside mask units (tokens_per_unit > 0) or global (0), queries pooled or not."""

    def __init__(self, dim, dim_out, num_heads, q_pool, tokens_per_unit):
        super().__init__()
        self.num_heads, self.q_pool, self.tokens_per_unit = num_heads, q_pool, tokens_per_unit
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def split(self, x, n):
        """Projected tokens (B, T, n * D) -> n x (B * windows, H, S, d), the first one pooled if it has to be."""
        B, T, _ = x.shape
        S = self.tokens_per_unit or T
        x = x.view(B, S, T // S, n, self.num_heads, -1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # unit index fastest
        q, *rest = x
        return (q.unflatten(2, (4, -1)).amax(dim=2) if self.q_pool else q, *rest)

    def forward(self, x):
        B = x.shape[0]
        x = F.scaled_dot_product_attention(*self.split(self.qkv(x), 3))                   # (B * windows, H, S, d)
        x = x.unflatten(0, (B, -1)).permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)       # (B, T, D)
        return self.proj(x)

    def logits(self, x):
        """Pre-softmax map (B * windows, H, queries, keys) in float32, from q and k alone."""
        rows = 2 * self.proj.in_features
        return attention_logits(*self.split(F.linear(x, self.qkv.weight[:rows], self.qkv.bias[:rows]), 2))


class HieraBlock(nn.Module):
    """Pre-norm block. One that opens a stage widens the tokens and, while pooling lasts, keeps 1 token of 4."""

    def __init__(self, dim, dim_out, num_heads, q_pool=False, tokens_per_unit=0, drop_path=0.0):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = MaskUnitAttention(dim, dim_out, num_heads, q_pool, tokens_per_unit)
        self.norm2 = LayerNorm(dim_out)
        self.mlp = Mlp(dim_out, 4 * dim_out)
        self.drop_path = DropPath(drop_path)
        if dim != dim_out:
            self.proj = nn.Linear(dim, dim_out)

    def forward(self, x):
        y = self.norm1(x)
        if hasattr(self, "proj"):    # the skip goes through the norm, a linear layer and the same pooling as q
            x = self.proj(y)
            x = x.unflatten(1, (4, -1)).amax(dim=1) if self.attn.q_pool else x
        x = x + self.drop_path(self.attn(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Hiera(nn.Module):
    """Hierarchical ViT of four stages; width and heads double with each. Tokens stay unrolled (see `unroll`).

    img_size: int or (H, W), multiples of 32 (one mask unit = 8x8 tokens = 32x32 pixels).
    q_pool: stages that open with 2x2 pooling; 3 for classification (last grid 7x7 at 224), 2 in pre-training (14x14).
    Mask-unit attention in stages 1-2, global in 3-4; the block that opens a stage still attends as the stage before.
    """
    unit, patch_stride = 8, 4

    def __init__(self, img_size=224, embed_dim=46, num_heads=1, stages=(1, 2, 7, 2), q_pool=3, num_classes=0,
                 drop_path=0.0):
        super().__init__()
        self.img_size, self.depth, self.q_pool = pair(img_size), sum(stages), q_pool
        if any(s % 32 or s < 32 for s in self.img_size):
            nearest = "x".join(str(max(1, round(s / 32)) * 32) for s in self.img_size)
            raise InputError(f"Hiera cannot take images of {'x'.join(map(str, self.img_size))}: both sides must be "
                             f"multiples of 32; the nearest valid size is {nearest}")
        self.grid = tuple(s // self.patch_stride for s in self.img_size)    # 56 x 56 tokens at 224
        self.unit_grid = tuple(s // self.unit for s in self.grid)           # 7 x 7 mask units
        self.stage_ends = tuple(sum(stages[:i + 1]) for i in range(4))      # 1-based numbers of each stage's last block
        self.arch = dict(kind="hiera", img_size=list(self.img_size), embed_dim=embed_dim, num_heads=num_heads,
                         stages=list(stages), depth=self.depth)

        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, embed_dim, 7, self.patch_stride, 3)))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dim))
        self.blocks = nn.ModuleList()
        dim, tokens_per_unit = embed_dim, self.unit ** 2
        for i in range(self.depth):
            stage, stage_before = (sum(end <= j for end in self.stage_ends) for j in (i, max(0, i - 1)))
            pool = stage_before < stage <= q_pool
            dim_out = embed_dim * 2 ** stage
            self.blocks.append(HieraBlock(dim, dim_out, num_heads * 2 ** stage, pool,
                                          tokens_per_unit if stage_before < 2 else 0, drop_path * i / (self.depth - 1)))
            dim, tokens_per_unit = dim_out, tokens_per_unit // 4 if pool else tokens_per_unit
        self.embed_dim = dim
        if num_classes:
            self.norm = LayerNorm(dim)
            self.head = nn.Sequential(OrderedDict(projection=nn.Linear(dim, num_classes)))

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():    # as in Hiera, whose small positive biases are meant
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                nn.init.constant_(module.bias, 0.02)
        if num_classes:
            for p in self.head.parameters():
                p.data.mul_(0.001)

    def embed(self, images, ids_keep=None):
        """(B, 3, H, W) -> unrolled tokens (B, 64 * U, D), of the mask units in ids_keep (B, V) only if given.

        The patch convolution overlaps its neighbours, so masked units are zeroed *before* it: nothing leaks.
        """
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(f"images of {tuple(images.shape[2:])} given to a Hiera built for {self.img_size}")
        if ids_keep is not None:
            visible = images.new_zeros(len(images), self.unit_grid[0] * self.unit_grid[1]).scatter_(1, ids_keep, 1)
            images = images * F.interpolate(visible.view(-1, 1, *self.unit_grid), scale_factor=32.0)
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        x = unroll(x, self.grid)
        if ids_keep is not None:
            x = x.unflatten(1, (self.unit ** 2, -1))                                             # (B, 64, U, D)
            x = x.gather(2, ids_keep[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])).flatten(1, 2)
        return x

    def forward_features(self, images, taps, ids_keep=None):
        """Unrolled tokens after the blocks in `taps` -> {tap: (B, T, D of the block)}. No block after the last runs."""
        x = self.embed(images, ids_keep)
        features = {0: x} if 0 in taps else {}
        for number, block in enumerate(self.blocks[:max(taps)], start=1):
            x = block(x)
            if number in taps:
                features[number] = x
        return features

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, classes), head(norm(mean token)); without a classifier, all tokens, unrolled."""
        x = self.forward_features(images, (self.depth,))[self.depth]
        return self.head(self.norm(x.mean(dim=1))) if hasattr(self, "head") else x

    def feature_maps(self, images, taps=None):
        """Raster maps (B, C, h, w) after the blocks in `taps`; by default after each of the four stages."""
        taps = taps or self.stage_ends
        features = self.forward_features(images, taps)
        rounds = [3 - min(sum(end < t for end in self.stage_ends), self.q_pool) for t in taps]
        return [reroll(features[t], self.unit_grid, r).permute(0, 3, 1, 2) for t, r in zip(taps, rounds)]

    def attention_map(self, x, block):
        """Pre-softmax map of `block` (1-based) from its input, the unrolled tokens after block - 1.

        (B, H, T, T) for a global block, (B * U, H, queries, keys) for one that attends within mask units.
        """
        block = self.blocks[block - 1]
        return block.attn.logits(block.norm1(x))


MODELS = {    # parameters: the encoder alone / with a classifier of 1000 classes
    "vit_tiny": partial(VisionTransformer, embed_dim=192, depth=12, num_heads=12),  # 5.52M / 5.72M
    "deit_tiny": partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3),  # 5.52M / 5.72M
    "vit_base": partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12),  # 85.8M / 86.6M
    "vit_large": partial(VisionTransformer, embed_dim=1024, depth=24, num_heads=16),  # 303.3M / 304.3M
    "vit_huge": partial(VisionTransformer, patch_size=14, embed_dim=1280, depth=32, num_heads=16),  # 630.8M / 632.0M
    "hiera_tiny": partial(Hiera, embed_dim=46, num_heads=1, stages=(1, 2, 7, 2)),  # 6.33M / 6.69M
    "hiera_base": partial(Hiera, embed_dim=96, num_heads=1, stages=(2, 3, 16, 3)),  # 50.8M / 51.5M
}


def layer_id(name, depth):
    """Layer of a parameter for layer-wise lr decay: 0 embeddings and tokens, k for block k, depth + 1 for the rest."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("patch_embed", "pos_embed", "cls_token")) else depth + 1


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------
HUGGING_FACE_NAMES = (    # files first; the second of a pair is what state_dict() says since transformers 5
    ("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."), ("encoder.layer.", "blocks."),
    ("layers.", "blocks."),
    ("attention.attention.query.", "attention.q_proj."), ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."), ("attention.output.dense.", "attn.proj."),
    ("attention.o_proj.", "attn.proj."), ("intermediate.dense.", "mlp.fc1."), ("output.dense.", "mlp.fc2."),
    ("layernorm_before.", "norm1."), ("layernorm_after.", "norm2."), ("layernorm.", "norm."))


def read_file(path):
    """The object in a checkpoint file, on the CPU. Never unpickles code. Raises InputError in one sentence."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist: give the path of a file, or leave the option out")
    head = path.open("rb").read(64)
    if head.startswith(b"version https://git-lfs") or head.lstrip().startswith(b"<"):
        what = "Git LFS pointer" if b"git-lfs" in head else "web page"
        raise InputError(f"checkpoint {path} holds no weights but a {what}: download the real file")
    if path.suffix == ".safetensors":
        try:
            return importlib.import_module("safetensors.torch").load_file(path)
        except ImportError:
            raise InputError(f"reading {path} needs the safetensors package: pip install safetensors") from None
        except Exception as error:    # a class of that package
            raise InputError(f"checkpoint {path} is not a readable safetensors file ({type(error).__name__}): is it "
                             "complete?") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):    # MAE training files keep their options in one
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, IndexError, ValueError, pickle.UnpicklingError) as error:
        name = re.search(r"GLOBAL (\S+)|type (\S+)", str(error))
        if name and isinstance(error, pickle.UnpicklingError):
            raise InputError(f"checkpoint {path} pickles {name.group(0)}, which could run code when loaded: re-save "
                             "only its tensors and plain Python types") from None
        raise InputError(f"checkpoint {path} is not a readable PyTorch file ({type(error).__name__}): is it complete?"
                         ) from None


def load_state(path):
    """Encoder tensors of any file named in README "Checkpoints", under timm / MAE / Hiera names -> (state, info).

    Unwraps {'model'}, {'model_state'}, {'state_dict'}, drops prefixes (DistributedDataParallel, torch.compile,
    MAE-Lite, MoCo-v3, Hugging Face) and joins q, k, v. A file with several encoders gives the student, not the teacher.
    `info` holds what this project's own files store besides: 'arch', 'mean', 'std', 'args'; empty for others.
    """
    file = read_file(path)
    state = next((file[k] for k in ("model", "model_state", "state_dict") if isinstance(file, dict)
                  and isinstance(file.get(k), dict)), file)
    state = {str(k): v for k, v in state.items() if torch.is_tensor(v)} if isinstance(state, dict) else {}
    stems = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    prefixes = {k[:-len(s)] for k in state for s in stems if k.endswith(s)}
    if len(prefixes) > 1:
        prefixes = {p for p in prefixes if not re.search("tch_model|teacher|momentum", p)}
    if len(prefixes) != 1:
        raise InputError(f"checkpoint {path} has {'several encoders: ' + str(sorted(prefixes)) if prefixes else 'no'} "
                         f"ViT or Hiera encoder (looked for a key ending in {stems[0]})")
    prefix = prefixes.pop()
    info = {k: file[k] for k in ("arch", "mean", "std", "args", "norm_pix") if k in file}
    if not (isinstance(info.get("arch"), dict) and "img_size" in info["arch"]):    # MoCo-v3 and timm store a name
        info.pop("arch", None)
    state = {k[len(prefix):] if k.startswith(prefix) else k: v for k, v in state.items()}

    if any(k.startswith("embeddings.") for k in state):    # Hugging Face
        renamed = {}
        for key, value in state.items():
            if not key.startswith("decoder."):
                for old, new in HUGGING_FACE_NAMES:
                    key = key.replace(old, new)
            renamed[key] = value
        for key in [k for k in renamed if k.startswith("blocks.") and ".attention.q_proj." in k]:
            parts = [key.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            if all(part in renamed for part in parts):
                renamed[key.replace("attention.q_proj", "attn.qkv")] = torch.cat([renamed.pop(p) for p in parts])
        state = renamed
    return state, info


def infer_model(path):
    """Name in MODELS and patch size of the encoder in a file -> ('vit_base', 16). Head counts cannot be seen in
    weights: own files store them, others get those of the standard model of that width and depth."""
    state, info = load_state(path)
    width, *_, patch = state["patch_embed.proj.weight"].shape
    depth = 1 + max([int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.", k)], default=-1)
    heads = info.get("arch", {}).get("num_heads")
    known = {(192, 12): "deit_tiny" if heads == 3 else "vit_tiny", (192, 13): "vit_tiny", (768, 12): "vit_base",
             (1024, 24): "vit_large", (1280, 32): "vit_huge", (46, 12): "hiera_tiny", (96, 24): "hiera_base"}
    if (width, depth) not in known:
        raise InputError(f"checkpoint {path} has an encoder of width {width} and {depth} blocks, which is none of "
                         f"{', '.join(MODELS)}: name the model yourself if it is one of them")
    return known[width, depth], patch


def load_encoder(model, path, keep_blocks=None):
    """Load an encoder from any file of README "Checkpoints" into a VisionTransformer or Hiera, in place -> info.

    Every encoder tensor must be there in the right shape. Position tables are resized to the model's grid; what the
    file was trained without (relative position bias, LayerScale) and a norm that it lacks keep their initial values.
    keep_blocks: load only the embedding and the first so many blocks (Fig. 4); the others stay random.
    Raises InputError naming the file, the keys and what to do.
    """
    state, info = load_state(path)
    own = model.state_dict()
    arch = info.get("arch", {})
    for key in ("kind", "patch_size", "embed_dim", "depth", "num_heads", "stages"):
        if key in arch and key in model.arch and arch[key] != model.arch[key]:
            raise InputError(f"checkpoint {path} has {key} = {arch[key]}, the model {key} = {model.arch[key]}: "
                             "choose the --model that the file was written for")
    if "norm.weight" in own and "norm.weight" not in state and "fc_norm.weight" in state:    # timm with average pooling
        state.update({f"norm.{p}": state.pop(f"fc_norm.{p}") for p in ("weight", "bias")})

    # what belongs to the encoder on either side; the rest (decoder, adapters, teacher, heads, a 13th block) is ignored
    def is_encoder(key):
        number = int(key.split(".")[1]) if re.match(r"blocks\.\d+\.", key) else 0
        return key.startswith(("patch_embed.", "pos_embed", "cls_token", "blocks.")) and number < model.depth \
            and not key.endswith("relative_position_index")
    depth = 1 + max((int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.", k)), default=-1)
    if depth > model.depth + 1:    # one more is the 13th block of a D2-MAE file
        raise InputError(f"checkpoint {path} has {depth} blocks, the model {model.depth}: choose the right --model")
    wanted = {k for k in own if is_encoder(k) and not k.endswith(("relative_position_bias_table", ".gamma"))}
    missing = sorted(wanted - set(state))
    surplus = sorted(k for k in state if is_encoder(k) and k not in own)
    for keys, problem in ((missing, "lacks"), (surplus, "has, and the model lacks,")):
        if keys:
            raise InputError(f"checkpoint {path} {problem} {len(keys)} encoder tensor(s): {', '.join(keys[:5])}"
                             f"{' ...' if len(keys) > 5 else ''}; is it a file for this --model (and --rpe)?")

    extra = 1 if model.arch["kind"] == "vit" else 0    # class token row
    patch = model.patch_size if extra else model.patch_stride
    for key in [k for k in state if k in own]:
        if key == "pos_embed" or key.endswith("relative_position_bias_table"):
            old = [s // patch for s in arch["img_size"]] if arch else None
            state[key] = resize_position_table(key, state[key], own[key], old, model.grid, extra, path)
        if state[key].shape != own[key].shape and (is_encoder(key) or key.startswith("norm.")):
            raise InputError(f"checkpoint {path}: {key} is {tuple(state[key].shape)}, the model needs "
                             f"{tuple(own[key].shape)}: choose the --model that the file was written for")
    load = {k: v for k, v in state.items() if k in own and (is_encoder(k) or k.startswith("norm.") and extra)}
    if keep_blocks is not None:
        load = {k: v for k, v in load.items() if layer_id(k, model.depth) <= keep_blocks}
    model.load_state_dict(load, strict=False)
    if int(os.environ.get("RANK", 0)) == 0:
        fresh, ignored = ({re.sub(r"\.?\d.*|\.(weight|bias|proj)+$", "", k) for k in keys} for keys in
                          (set(own) - set(load), set(state) - set(load)))
        print(f"{path}: loaded {len(load)} tensors, fresh: {', '.join(sorted(fresh)) or 'none'}, "
              f"ignored {len(set(state) - set(load))}: {', '.join(sorted(ignored)) or 'none'}"
              + (f"; {model.arch['num_heads']} heads assumed, which weights do not tell" if extra and not arch else ""))
    return info


def resize_position_table(key, table, target, old, new, extra, path):
    """Absolute (1, extra + N, D) or relative (rows, H) position table of grid `old` (square if None) -> grid `new`."""
    if key == "pos_embed":
        n = table.shape[1] - extra
        old = old or [round(n ** 0.5)] * 2
        if old[0] * old[1] != n or table.shape[2] != target.shape[2]:
            raise InputError(f"checkpoint {path}: pos_embed of shape {tuple(table.shape)} does not fit the model's "
                             f"{tuple(target.shape)}: choose the --model that the file was written for")
        return torch.cat([table[:, :extra], resize_grid(table[:, extra:], old, new)], dim=1)
    old = [2 * s - 1 for s in old] if old else [round((table.shape[0] - 3) ** 0.5)] * 2    # offsets -(h-1) .. h-1
    body = resize_grid(table[None, :-3], old, [2 * s - 1 for s in new])[0]
    return torch.cat([body, table[-3:]])
