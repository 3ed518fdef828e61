"""MAE pre-training of lightweight ViTs with decoupled attention distillation, D2-MAE (paper Sec. "distillation").

    torchrun --nproc_per_node=8 pretrain_d2mae.py --data data/imagenet/train --teacher mae_base.pt    # the paper's run
    torchrun --nproc_per_node=8 pretrain_d2mae.py --method mae                                        # its MAE baseline
    torchrun --nproc_per_node=8 pretrain_d2mae.py --model hiera_tiny --method d-mae --teacher mae_hiera_base_224.pth
    python pretrain_d2mae.py --demo                                                                   # needs no files

The student sees a quarter of the patches and learns two things. Its block 8 feeds a small decoder that paints the
other patches (L_rec). The attention map of one extra, 13th attention after block 12 imitates, through a learned mix of
heads, that of the teacher's last block over the same visible patches (L_attn). So reconstruction shapes the lower
layers, distillation all of them, and nothing is traded off. Read `MaskedAutoencoder.forward` next to the paper.

Shapes: B images, N patches, V visible, M = N - V masked, T = 1 + V tokens, D width, H heads, P = 3 * patch_size^2.
        Hiera: N, V, M count mask units of 32x32 pixels; each holds 4 tokens of 16x16 pixels where pixels are predicted.
Masks:  ids_keep (B, V) and ids_masked (B, M) are raster indices; together they are a permutation of range(N).

NOTES, departures from the authors' code:
- The decoder keeps the shuffled order [class, visible, masked] (attention does not care), so that the masked tokens are
  a slice and only their pixels are predicted. Numbers are the same.
- The 13th block is a LayerNorm and the q, k half of a qkv projection; what follows its map is never created.
- Crops, flips and masks are a function of (seed, epoch, image), not of the process that makes them: a run does not
  depend on the number of workers or processes, and a resumed one is the run that was interrupted.
- Attention maps are compared in float32; the authors compare them in float16.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

try:
    import resource    # peak memory; Windows has none
except ImportError:
    resource = None

from models import (IMAGENET_MEAN, IMAGENET_STD, MODELS, Block, HieraBlock, InputError, LayerNorm, attention_logits,
                    infer_model, init_mae, init_patch_embed, layer_id, load_encoder, load_state, normalize,
                    read_file, reroll, sincos_2d)

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


# ----------------------------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's recipe
# ----------------------------------------------------------------------------------------------------------------------
DEMO = dict(data="shapes", out="out/demo", image_size=[64], patch_size=8, crop_scale=(0.4, 1.0), epochs=6,
            warmup_epochs=1, batch_size=32, base_lr=1e-2, val_images=128, workers=0, log_every=10, eval_every=1)


def parse_args(argv=None, **defaults):
    """Options of the command line, or of the list `argv`; `defaults` stand in for the paper's values (DEMO)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("method (paper Sec. 'distillation')").add_argument
    add("--method", choices=("d2-mae", "d-mae", "mae"), default="d2-mae",
        help="d2-mae: decoder on an inner block, distillation on an extra attention; d-mae: both on the last block; "
             "mae: no teacher")
    add("--model", choices=tuple(MODELS), default="vit_tiny",
        help="student; the paper's are vit_tiny (12 heads) and hiera_tiny")
    add("--teacher", help="checkpoint of the frozen teacher (README, 'Checkpoints'); paper: MAE ViT-Base, 1600 epochs")
    add("--teacher-model", default="auto", help="the teacher's model; auto reads it off the shapes of its weights")
    add("--decoder-tap", type=int, help="block whose normalised output the decoder reads; d2-mae: 8, others: the last")
    add("--distill", choices=("attention", "hidden"), default="attention", help="what is distilled (ablation)")
    add("--distill-layers", type=int, nargs="+", help="student blocks, counted from 1; the last block if absent")
    add("--distill-map", choices=("logits", "probs"), default="logits", help="before or after the softmax (ablation)")
    add("--alpha", type=float, default=1.0, help="weight of the distillation loss in L = L_rec + alpha * L_attn")
    add("--mask-ratio", type=float, help="share of patches removed; ViT 0.75, Hiera 0.4 (of mask units)")
    add("--norm-pix", action=argparse.BooleanOptionalAction, default=True, help="targets normalised per patch")
    add("--decoder-dim", type=int, default=96, help="width of the decoder (paper: 96)")
    add("--decoder-depth", type=int, default=1, help="blocks of the decoder (paper: 1)")
    add("--decoder-heads", type=int, default=3, help="heads of the decoder (paper: 3)")

    add = parser.add_argument_group("data").add_argument
    add("--data", default="data/imagenet/train", help="folder of images, flat or nested, or 'shapes' for drawn ones")
    add("--val-data", help="folder of held-out images; if absent, 'val' beside --data, else every 50th image of --data")
    add("--val-images", type=int, default=512, help="evaluate on at most so many held-out images")
    add("--image-size", type=int, nargs="+", default=[224], help="side, or height and width, in pixels")
    add("--patch-size", type=int, default=16, help="side of a ViT patch in pixels")
    add("--crop-scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of RandomResizedCrop")
    add("--mean", type=float, nargs=3, default=IMAGENET_MEAN, help="of pixels in [0, 1]; stored and reused")
    add("--std", type=float, nargs=3, default=IMAGENET_STD, help="of pixels in [0, 1]; stored and reused")
    add("--skip-corrupt", action="store_true", help="replace unreadable files by others and count them; default: stop")
    cpus = (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--workers", type=int, default=max(1, min(16, cpus)), help="loader processes per training process")

    add = parser.add_argument_group("recipe (paper Sec. 'experimental setup', pre-training)").add_argument
    add("--epochs", type=int, default=400, help="paper: 400")
    add("--warmup-epochs", type=float, default=40, help="linear from 0; paper: 40")
    add("--batch-size", type=int, default=4096, help="images per optimizer step over all processes; paper: 4096")
    add("--accum-steps", type=int, default=1, help="micro-steps that one batch is split into, per process")
    add("--base-lr", type=float, default=1.5e-4, help="per 256 images: lr = base_lr * batch_size / 256; paper: 1.5e-4")
    add("--min-lr", type=float, default=0.0, help="end of the cosine")
    add("--weight-decay", type=float, default=0.05, help="none on biases, norms, tokens; paper: 0.05")
    add("--betas", type=float, nargs=2, default=(0.9, 0.95), help="of AdamW; paper: 0.9 0.95")
    add("--clip-grad", type=float, default=0.0, help="largest gradient norm; 0: no clipping, as in the paper")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="out/pretrain", help="folder for checkpoints, log, pictures; the same command resumes")
    add("--no-resume", action="store_true", help="start again although --out holds a checkpoint")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 on GPUs that have it, fp16 with loss scaling on others, fp32 on mps and cpu")
    add("--compile", action="store_true", help="torch.compile the student and the teacher")
    add("--seed", type=int, default=0)
    add("--max-steps", type=int, help="stop after so many optimizer steps (the schedule stays that of --epochs)")
    add("--log-every", type=int, default=20, help="optimizer steps per line of log.jsonl")
    add("--eval-every", type=int, default=10, help="epochs between evaluations with pictures; the last epoch always")
    add("--demo", action="store_true", help="defaults for a run on drawn shapes: a small teacher, then its student")
    parser.set_defaults(**defaults)
    return check_numbers(parser.parse_args(argv), zero="workers seed")


def resolve(args):
    """Fill in the defaults that depend on other options and refuse combinations that have no meaning."""
    hiera = args.model.startswith("hiera")
    depth = MODELS[args.model].keywords.get("depth") or sum(MODELS[args.model].keywords["stages"])
    args.image_size = tuple(args.image_size) * 2 if len(args.image_size) == 1 else tuple(args.image_size)
    args.mask_ratio = args.mask_ratio if args.mask_ratio is not None else 0.4 if hiera else 0.75
    if not 0 < args.mask_ratio < 1:
        raise InputError(f"--mask-ratio {args.mask_ratio} must lie between 0 and 1")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        raise InputError(f"--crop-scale {args.crop_scale[0]} {args.crop_scale[1]} must be a range within (0, 1]")
    if len(args.image_size) != 2:
        raise InputError(f"--image-size takes one number, or height and width, not {len(args.image_size)} numbers")
    if args.decoder_dim % 4 or args.decoder_dim % args.decoder_heads:
        raise InputError(f"--decoder-dim {args.decoder_dim} must be a multiple of 4 and of --decoder-heads "
                         f"{args.decoder_heads}")
    if args.method == "mae":
        args.teacher = None
    elif args.teacher is None:
        raise InputError(f"--method {args.method} distils from a teacher: give --teacher FILE (README, 'Checkpoints'), "
                         "or choose --method mae")
    if hiera and args.method == "d2-mae":
        raise InputError("--method d2-mae is defined for plain ViTs: Hiera's decoder fuses stages 1, 2 and 4, so there "
                         "is no inner block to tap; choose --method d-mae (the paper's Hiera run) or mae")
    if hiera and (args.distill == "hidden" or args.decoder_tap):
        raise InputError("--distill hidden and --decoder-tap are ablations on ViT and have no counterpart on Hiera")
    if args.decoder_tap and args.method != "d2-mae" and args.decoder_tap != depth:
        raise InputError(f"--decoder-tap belongs to --method d2-mae; {args.method} decodes the last block")
    args.decoder_tap = args.decoder_tap or (8 if args.method == "d2-mae" else depth)
    if not 1 <= args.decoder_tap <= depth:
        raise InputError(f"--decoder-tap {args.decoder_tap} is not one of the blocks 1..{depth}")
    args.distill_layers = [] if args.method == "mae" else sorted(set(args.distill_layers or [depth]))
    if args.distill_layers and not 1 <= args.distill_layers[0] <= args.distill_layers[-1] <= depth:
        raise InputError(f"--distill-layers {args.distill_layers} are not all among the blocks 1..{depth}")
    if args.method == "d2-mae" and args.distill_layers[-1] != depth:
        raise InputError(f"--method d2-mae needs block {depth} among --distill-layers: the decoder reads block "
                         f"{args.decoder_tap}, so nothing else would train the blocks above")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------
def read_image(path):
    """Any image file -> (3, H, W) uint8 RGB: grey, palette, CMYK, 16-bit and alpha (dropped) included."""
    with open(path, "rb") as file:
        png = file.read(4) == b"\x89PNG"    # a damaged one crashes torchvision's decoder and the process with it
    try:
        if not png:
            image = torchvision.io.decode_image(str(path), mode=torchvision.io.ImageReadMode.RGB)
            return image[0] if image.dim() == 4 else image                     # first frame of an animation
    except (RuntimeError, AttributeError):    # a format that only Pillow reads, a broken file, a torchvision without it
        pass
    with Image.open(path) as image:
        if image.mode.startswith("I"):                                         # 16-bit grey, which convert() would clip
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        image.info.pop("transparency", None)                                   # of a palette: dropped like any other
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@functools.lru_cache(maxsize=None)
def draw_shapes(index, size=64):
    """Image number `index` of an endless toy set -> (3, size, size) uint8: textured shapes on textured ground."""
    rng = np.random.default_rng([7, index])
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)

    def texture(u, v, contrast):
        angle, frequency, phase = rng.uniform((0, 1, 0), (np.pi, 3, 2 * np.pi))
        wave = np.sin(frequency * (np.cos(angle) * u + np.sin(angle) * v) + phase)
        return rng.uniform(0.15, 0.85, 3) + contrast * wave[..., None] * rng.uniform(-1, 1, 3)

    image = texture(x, y, 0.15)
    for _ in range(rng.integers(1, 3)):
        cx, cy, radius, angle = rng.uniform((-0.5, -0.5, 0.45, 0), (0.5, 0.5, 0.8, np.pi))
        u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / radius
        v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / radius
        r = np.hypot(u, v)
        inside = (r < 1, np.maximum(abs(u), abs(v)) < 0.8, (v < 0.7) & (v > 2 * abs(u) - 0.9), (r < 1) & (r > 0.5))
        inside = inside[rng.integers(4)]                                       # disc, square, triangle or ring
        image[inside] = texture(u, v, 0.3)[inside]
    return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1)


class Images(Dataset):
    """Crops for pre-training, and the noise that will decide their masks.

    Item (epoch, index) -> image (3, H, W) uint8, noise (N,), index of the item that was read, 1 if it stands in for an
    unreadable one. All randomness comes from (seed, epoch, index). With train=False: resized centre crop, fixed noise.
    """

    def __init__(self, items, load, size, cells, crop_scale=(0.08, 1.0), train=True, seed=0, skip_corrupt=False):
        self.items, self.load, self.cells, self.train = items, load, cells, train
        self.seed, self.skip_corrupt = seed, skip_corrupt
        how = dict(interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        self.transform = v2.Compose([v2.RandomResizedCrop(size, tuple(crop_scale), (3 / 4, 4 / 3), **how),
                                     v2.RandomHorizontalFlip()] if train else
                                    [v2.Resize(max(size), **how), v2.CenterCrop(size)])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key if self.train else (0, key)
        torch.default_generator.manual_seed(hash((self.seed, epoch, index)) % 2 ** 63)
        noise = torch.rand(self.cells)
        for tries in range(100):
            try:
                image = self.load(self.items[index])
            except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                if not self.skip_corrupt:
                    raise InputError(f"cannot read image {self.items[index]} ({type(error).__name__}): remove it, or "
                                     "go on without it by --skip-corrupt") from None
                index = (index + 1) % len(self.items)
            else:
                return self.transform(image), noise, index, int(tries > 0)
        raise InputError(f"100 unreadable images in a row, up to {self.items[index]}: is --data a folder of images?")


def list_images(folder):
    """All image files below a folder, sorted. Raises InputError if there is no folder or no image."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give --data a folder of images (ImageNet: data/imagenet/train)")
    files = sorted(os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names
                   if Path(name).suffix.lower() in IMAGE_TYPES)
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(sorted(IMAGE_TYPES))}), directly or in its folders")
    return files


def make_data(args, cells):
    """-> training set, held-out set, one line that says what they are."""
    if args.data == "shapes":
        load, train, val, said = draw_shapes, range(2000), range(2000, 2000 + args.val_images), "drawn shapes"
    else:
        load, train = read_image, list_images(args.data)
        sibling = Path(args.data).parent / "val"
        folder = args.val_data or (sibling if Path(args.data).name == "train" and sibling.is_dir() else None)
        if folder:
            val, said = list_images(folder), f"held-out images from {folder}"
        else:
            train, val, said = [f for i, f in enumerate(train) if i % 50], train[::50], "every 50th image held out"
        val = val[::max(1, len(val) // args.val_images)][:args.val_images]      # spread over all folders
    if not train:
        raise InputError(f"--data {args.data} holds a single image: give more, or --val-data besides")
    make = functools.partial(Images, load=load, size=args.image_size, cells=cells, seed=args.seed,
                             crop_scale=args.crop_scale, skip_corrupt=args.skip_corrupt)
    return make(train), make(val, train=False), f"{len(train)} training images, {len(val)} held out ({said})"


# ----------------------------------------------------------------------------------------------------------------------
# Method: masking, targets and losses
# ----------------------------------------------------------------------------------------------------------------------
def random_masking(noise, mask_ratio):
    """Random masking per sample, by sorting noise (B, N) -> ids_keep (B, V), ids_masked (B, M). V = int(N (1 - r))."""
    ids = noise.argsort(dim=1)
    keep = int(noise.shape[1] * (1 - mask_ratio))
    return ids[:, :keep], ids[:, keep:]


def patch_pixels(images, ids, patch_size, channels_last=True):
    """Pixels of the patches `ids` (B, M) of images (B, 3, H, W) -> (B, M, P), ordered (row, column, channel) as in MAE,
    or (channel, row, column) as in Hiera. Only those patches are copied."""
    B, p = len(images), patch_size
    h, w = images.shape[2] // p, images.shape[3] // p
    patches = images.view(B, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5)                          # (B, h, w, 3, p, p)
    patches = patches[torch.arange(B, device=images.device)[:, None], ids // w, ids % w]       # (B, M, 3, p, p)
    return (patches.permute(0, 1, 3, 4, 2) if channels_last else patches).flatten(2)


def normalize_patches(patches):
    """norm_pix: (x - mean) / sqrt(unbiased variance + 1e-6) of each patch (B, M, P). A layer norm has the biased
    variance instead, so its eps and its result are scaled."""
    n = patches.shape[-1]
    ratio = (n - 1) / n    # biased over unbiased variance
    return F.layer_norm(patches, (n,), eps=1e-6 * ratio) * ratio ** 0.5


def reconstruction_loss(pred, target):
    """L_MAE: mean squared error over the masked patches alone. pred, target (B, M, P); computed in float32."""
    return F.mse_loss(pred.float(), target.float())


def attention_loss(student, teacher, adapter, probs=False):
    """L_attn = MSE(A_T, M A_S), A = q k^T / sqrt(d) before the softmax (after it with probs=True).

    student (B, H_S, T, T), teacher (B, H_T, T, T) over the same visible tokens, class token included; the adapter M is
    a learned bias-free 1x1 convolution over heads, H_S -> H_T. Computed in float32, since logits can be large.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.float(), teacher.float()
        if probs:
            student, teacher = student.softmax(dim=-1), teacher.softmax(dim=-1)
        return F.mse_loss(adapter(student), teacher)


def hidden_loss(student, teacher, adapter):
    """The hidden-state ablation: MSE(h_T, W h_S) of normalised block outputs (Fig. 2), W a bias-free linear layer.
    student (B, T, D_S), teacher (B, T, D_T)."""
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(adapter(student.float()), teacher.float())


@torch.no_grad()
def teacher_signals(teacher, images, ids_keep, layers, distill="attention"):
    """What the loss reads of the frozen teacher at its blocks `layers`, and nothing more: for the map of block 12,
    blocks 1-11, then LayerNorm, q and k of block 12. -> list of maps (B, H, T, T) or hidden states (B, T, D)."""
    if distill == "hidden":
        features = teacher.forward_features(images, layers, ids_keep)
        return [teacher.representation(features[k], k) for k in layers]
    features = teacher.forward_features(images, [k - 1 for k in layers], ids_keep)
    return [teacher.attention_map(features[k - 1], k) for k in layers]


# ----------------------------------------------------------------------------------------------------------------------
# Method: student, decoder, adapters
# ----------------------------------------------------------------------------------------------------------------------
class MaskedAutoencoder(nn.Module):
    """Student of MAE, D-MAE and D2-MAE on a ViT: encoder, decoder and what the distillation adds to them.

    encoder: VisionTransformer without a head. decoder_tap: the decoder reads norm(output of this block).
    teacher: only its widths are looked at; it is no part of this module. layers: student blocks that are distilled.
    decoupled: D2-MAE, the map of the last block comes from an extra attention behind it.
    """

    def __init__(self, encoder, decoder_tap=12, decoder_dim=96, decoder_depth=1, decoder_heads=3, norm_pix=True,
                 teacher=None, layers=(), distill="attention", distill_map="logits", alpha=1.0, decoupled=False):
        super().__init__()
        self.encoder, self.decoder_tap, self.norm_pix = encoder, decoder_tap, norm_pix
        self.layers, self.distill, self.probs, self.alpha = list(layers), distill, distill_map == "probs", alpha
        self.decoupled = decoupled
        self.build_decoder(decoder_dim, decoder_depth, decoder_heads)
        self.apply(init_mae)
        init_patch_embed(encoder.patch_embed.proj)

        # The 13th block of D2-MAE: LayerNorm, q and k. Xavier as if v were there, as the authors initialise it.
        if decoupled:
            dim = encoder.embed_dim
            self.extra_norm = LayerNorm(dim)
            if distill == "attention":
                self.extra_qk = nn.Linear(dim, 2 * dim)
                bound = math.sqrt(6 / (dim + 3 * dim))
                nn.init.uniform_(self.extra_qk.weight, -bound, bound)
                nn.init.zeros_(self.extra_qk.bias)
        self.adapters = nn.ModuleDict()
        for k in self.layers:
            if distill == "hidden":
                self.adapters[str(k)] = nn.Linear(encoder.embed_dim, teacher.embed_dim, bias=False)
            else:
                blocks = encoder.blocks[k - 1], teacher.blocks[teacher_layer(k, encoder, teacher) - 1]
                self.adapters[str(k)] = nn.Conv2d(*(b.attn.num_heads for b in blocks), 1, bias=False)

    def build_decoder(self, dim, depth, heads):
        """The decoder of MAE: embedding, mask token, fixed sin-cos positions, blocks, norm, pixels."""
        p = self.encoder.patch_size
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.decoder_pos_embed = nn.Parameter(sincos_2d(dim, self.encoder.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.decoder_norm = LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, 3 * p * p)

    @property
    def cells(self):
        """Number of things that are masked or kept as a whole: patches (Hiera: mask units)."""
        return self.encoder.grid[0] * self.encoder.grid[1]

    def encoder_taps(self):
        """Blocks whose outputs the losses read. For the map of block k that is its input, the output of block k - 1."""
        depth = self.encoder.depth
        inner = [k for k in self.layers if not (self.decoupled and k == depth)]
        taps = {self.decoder_tap} | {k - (self.distill == "attention") for k in inner}
        return taps | {depth} if self.decoupled else taps

    def forward(self, images, ids_keep, ids_masked, signals=()):
        """L = L_rec + alpha * L_attn -> dict of scalars: loss, rec and, with a teacher, attn.

        images (B, 3, H, W) normalised; signals: `teacher_signals` of the same images and ids_keep, a list per layer.
        """
        features = self.encoder.forward_features(images, self.encoder_taps(), ids_keep)       # block -> (B, 1 + V, D)
        tokens = self.forward_decoder(features, ids_keep, ids_masked)                          # (B, 1 + N, decoder D)
        pred = self.predict(tokens, self.masked_tokens(ids_masked))                            # (B, M, P)
        rec = reconstruction_loss(pred, self.targets(images, ids_masked))
        if not self.layers:
            return {"loss": rec, "rec": rec}
        loss = functools.partial(attention_loss, probs=self.probs) if self.distill == "attention" else hidden_loss
        attn = sum(loss(self.student_signal(features, k), signal, self.adapters[str(k)])
                   for k, signal in zip(self.layers, signals))
        return {"loss": rec + self.alpha * attn, "rec": rec, "attn": attn}

    def student_signal(self, features, k):
        """The student's map (B, H, T, T), or hidden state (B, T, D), that imitates the teacher's at block k."""
        depth = self.encoder.depth
        if self.decoupled and k == depth:    # D2-MAE: one attention more, behind the last block
            x = self.extra_norm(features[depth])
            if self.distill == "hidden":
                return x
            qk = self.extra_qk(x).unflatten(2, (2, self.encoder.blocks[-1].attn.num_heads, -1))
            return attention_logits(*qk.permute(2, 0, 3, 1, 4))
        if self.distill == "hidden":
            return self.encoder.representation(features[k], k)
        return self.encoder.attention_map(features[k - 1], k)

    def forward_decoder(self, features, ids_keep, ids_masked):
        """Encoder features -> tokens (B, 1 + N, D) before the last block, as [class, ids_keep, ids_masked]."""
        x = self.decoder_embed(self.encoder.norm(features[self.decoder_tap]))                 # (B, 1 + V, D)
        x = torch.cat([x, self.mask_token.expand(*ids_masked.shape, -1).to(x.dtype)], dim=1)  # (B, 1 + N, D)
        order = torch.cat([ids_keep, ids_masked], dim=1) + 1
        pos = self.decoder_pos_embed[0]
        x = x + torch.cat([pos[:1].expand(len(x), 1, -1), pos[order]], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return x

    def predict(self, x, n):
        """Last decoder block, norm and pixels (B, n, P) of the last n of the tokens x (B, T, D), the masked ones: all
        tokens serve as keys and values, but nothing is computed for outputs that no loss reads."""
        block, (B, T, D) = self.decoder_blocks[-1], x.shape
        qkv = block.attn.qkv(block.norm1(x)).view(B, T, 3, block.attn.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                                   # 3 x (B, H, T, d)
        y = F.scaled_dot_product_attention(q[:, :, -n:], k, v).transpose(1, 2).reshape(B, n, D)
        x = x[:, -n:] + block.attn.proj(y)
        return self.decoder_pred(self.decoder_norm(x + block.mlp(block.norm2(x))))

    def masked_tokens(self, ids_masked):
        return ids_masked.shape[1]

    def patches(self, images, ids):
        """Pixels (B, M, P) behind the decoder tokens of `ids`, in their order."""
        return patch_pixels(images, ids, self.encoder.patch_size)

    def targets(self, images, ids_masked):
        patches = self.patches(images, ids_masked).float()
        return normalize_patches(patches) if self.norm_pix else patches


class HieraMaskedAutoencoder(MaskedAutoencoder):
    """MAE and D-MAE on Hiera (built with q_pool=2): the decoder fuses the ends of stages 1, 2 and the last block.

    ids_keep and ids_masked count mask units; each has 2x2 decoder tokens of 16x16 pixels, kept together: token 4 u + i
    is token i (raster) of unit u.
    """

    def build_decoder(self, dim, depth, heads):
        """Fusion heads, then the decoder of MAE without a class token and with learned positions."""
        encoder = self.encoder
        width, (h, w) = encoder.embed_dim, encoder.unit_grid
        widths = [encoder.blocks[end - 1].mlp.fc2.out_features for end in encoder.stage_ends[:2]]
        self.multi_scale_fusion_heads = nn.ModuleList([    # stage 1: 8x8 tokens per unit -> 2x2, stage 2: 4x4 -> 2x2
            nn.Conv2d(widths[0], width, 4, 4), nn.Conv2d(widths[1], width, 2, 2)])
        self.encoder_norm = LayerNorm(width)
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 4 * h * w, dim))                 # raster, learned
        self.decoder_blocks = nn.ModuleList([HieraBlock(dim, dim, heads) for _ in range(depth)])
        self.decoder_norm = LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, 3 * 16 * 16)
        for p in (self.mask_token, self.decoder_pos_embed):
            nn.init.trunc_normal_(p, std=0.02)
        raster = torch.arange(4 * h * w).view(h, 2, w, 2).transpose(1, 2).reshape(h * w, 4)   # tokens of each unit
        self.register_buffer("unit_tokens", raster, persistent=False)

    @property
    def cells(self):
        return self.encoder.unit_grid[0] * self.encoder.unit_grid[1]

    def encoder_taps(self):
        ends = self.encoder.stage_ends
        return {ends[0], ends[1], ends[3]} | {k - 1 for k in self.layers}

    def raster_ids(self, units):
        """Mask units (B, V) -> raster indices (B, 4 V) of their tokens in the 16-pixel grid."""
        return self.unit_tokens[units].flatten(1)

    def forward_decoder(self, features, ids_keep, ids_masked):
        """-> tokens (B, 4 N, D) before the last block, as [ids_keep, ids_masked], 4 per unit."""
        B, V = ids_keep.shape
        ends, x, (head1, head2) = self.encoder.stage_ends, 0, self.multi_scale_fusion_heads
        for end, rounds, head in ((ends[0], 3, head1), (ends[1], 2, head2), (ends[3], 1, nn.Identity())):
            units = features[end].unflatten(1, (-1, V)).transpose(1, 2).flatten(0, 1)         # (B V, tokens, C)
            x = x + head(reroll(units, (1, 1), rounds).permute(0, 3, 1, 2))                   # (B V, D, 2, 2)
        x = self.encoder_norm(x.flatten(2).transpose(1, 2).reshape(B, 4 * V, -1))
        x = self.decoder_embed(x)
        x = torch.cat([x, self.mask_token.expand(B, self.masked_tokens(ids_masked), -1).to(x.dtype)], dim=1)
        x = x + self.decoder_pos_embed[0][self.raster_ids(torch.cat([ids_keep, ids_masked], dim=1))]
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return x

    def masked_tokens(self, ids_masked):
        return 4 * ids_masked.shape[1]

    def patches(self, images, ids):
        return patch_pixels(images, self.raster_ids(ids), 16, channels_last=False)


def teacher_layer(k, encoder, teacher):
    """Teacher block for student block k: the same one, or the one at the same relative depth of a deeper teacher."""
    return max(1, k * teacher.depth // encoder.depth)


def build_teacher(args):
    """The frozen teacher of --teacher, checked against the student: same kind of model, same tokens. On the CPU."""
    name, patch = infer_model(args.teacher) if args.teacher_model == "auto" else (args.teacher_model, args.patch_size)
    if name not in MODELS:
        raise InputError(f"--teacher-model {name} is not one of {', '.join(MODELS)}")
    if name.startswith("hiera") != args.model.startswith("hiera"):
        raise InputError(f"--teacher {args.teacher} is a {name}, the student a {args.model}: their tokens differ")
    if name.startswith("hiera"):
        teacher = MODELS[name](img_size=args.image_size, q_pool=2)
    elif patch != args.patch_size:
        raise InputError(f"--teacher {args.teacher} has patches of {patch} pixels, the student of {args.patch_size}: "
                         f"their tokens differ; give --patch-size {patch}")
    else:
        teacher = MODELS[name](img_size=args.image_size, patch_size=patch, fixed_pos_embed=True)
    info = load_encoder(teacher, args.teacher)
    if args.distill == "hidden" and not {"norm.weight", "fc_norm.weight"} & load_state(args.teacher)[0].keys():
        raise InputError(f"--teacher {args.teacher} has no final norm, and --distill hidden needs one")
    for key in ("mean", "std"):
        if key in info and not np.allclose(info[key], getattr(args, key)):
            raise InputError(f"--teacher {args.teacher} was trained with --{key} {info[key]}, this run has "
                             f"{getattr(args, key)}: student and teacher must see the same pixels")
    return teacher.eval().requires_grad_(False)


def build_student(args, teacher=None):
    """Encoder, decoder and adapters by --model, --method and the ablation options."""
    hiera = args.model.startswith("hiera")
    encoder = MODELS[args.model](img_size=args.image_size, **(dict(q_pool=2) if hiera else
                                 dict(patch_size=args.patch_size, fixed_pos_embed=True)))
    if hiera and teacher is not None:    # both maps must be over the same tokens: global attention, nothing pooled
        for k in args.distill_layers:
            for model, layer in ((encoder, k), (teacher, teacher_layer(k, encoder, teacher))):
                attn = model.blocks[layer - 1].attn
                if attn.tokens_per_unit or attn.q_pool:
                    raise InputError(f"--distill-layers {k} is no global attention over all visible tokens in Hiera: "
                                     f"choose among blocks {encoder.stage_ends[1] + 2}..{encoder.depth}")
    return (HieraMaskedAutoencoder if hiera else MaskedAutoencoder)(
        encoder, args.decoder_tap, args.decoder_dim, args.decoder_depth, args.decoder_heads, args.norm_pix, teacher,
        args.distill_layers, args.distill, args.distill_map, args.alpha, args.method == "d2-mae")


def lr_at(step, total, warmup, lr, min_lr):
    """Learning rate of optimizer step `step` (from 0): linear warm-up from 0, then half a cosine down to min_lr."""
    if step < warmup:
        return lr * step / warmup
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ----------------------------------------------------------------------------------------------------------------------
# Process group, batches, optimizer groups, checkpoint, log, training epoch (the same text in every training script)
# ----------------------------------------------------------------------------------------------------------------------
def init_distributed(device):
    """torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without them this is one process. -> rank, world, torch.device"""
    rank, local_rank, world = (int(os.environ.get(*v)) for v in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in available if available[name])
    if not available[device]:
        raise InputError(f"--device {device} is not available on this machine: choose another, or auto")
    device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def amp_dtype(name, device):
    """--dtype as a torch.dtype; auto takes bf16 on GPUs that have it, fp16 on other GPUs, fp32 elsewhere."""
    if name == "auto":
        name = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


class EpochBatches:
    """Batch sampler: lists of (epoch, index) keys, the same global batches for any number of processes, micro-steps.

    An epoch is a seeded permutation cut into batches of `batch` (an incomplete last one is left out), each dealt out to
    accum_steps x world. A set smaller than `batch` makes one batch of all it has. Set `epoch`, and `start` to the
    optimizer steps of it that are already done, before iterating.
    """

    def __init__(self, n, batch, accum_steps, rank, world, seed):
        self.n, self.accum_steps, self.rank, self.world, self.seed = n, accum_steps, rank, world, seed
        self.per_process = min(batch, n) // (accum_steps * world)
        if batch % (accum_steps * world) or not self.per_process:
            raise InputError(f"--batch-size {batch} cannot be dealt out evenly to {world} process(es) x --accum-steps "
                             f"{accum_steps} from {n} images: choose a multiple of {accum_steps * world}, and at least "
                             "as many images")
        self.batch = self.per_process * accum_steps * world
        self.steps, self.epoch, self.start = n // self.batch, 0, 0

    def __len__(self):
        return (self.steps - self.start) * self.accum_steps

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.n, generator=generator).tolist()
        for micro in range(self.start * self.accum_steps, self.steps * self.accum_steps):
            first = (micro * self.world + self.rank) * self.per_process
            yield [(self.epoch, i) for i in order[first:first + self.per_process]]


def check_numbers(args, zero):
    """Refuse integer options below 1 (those named in `zero`: below 0), negative and NaN ones -> args."""
    for name, value in vars(args).items():
        for v in value if isinstance(value, (list, tuple)) else [value]:
            low = int(isinstance(v, int) and name not in zero.split())
            if isinstance(v, (int, float)) and not isinstance(v, bool) and not v >= low:
                raise InputError(f"--{name.replace('_', '-')} {v} must be at least {low}")
    return args


def param_groups(model, weight_decay, layer_decay=1.0, depth=12):
    """Optimizer groups: lr_scale = layer_decay^(depth + 1 - layer); no weight decay on biases, norms, tokens, position
    tables. Names may start with 'encoder.'."""
    groups, undecayed = {}, ("cls_token", "mask_token", "pos_embed", "relative_position_bias_table")
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = depth + 1 if layer_decay == 1 else layer_id(name.removeprefix("encoder."), depth)
            groups.setdefault((layer, p.dim() > 1 and not name.endswith(undecayed)), []).append(p)
    return [{"params": params, "weight_decay": weight_decay if decayed else 0.0, "layer": layer,
             "lr_scale": layer_decay ** (depth + 1 - layer)} for (layer, decayed), params in sorted(groups.items())]


def save_checkpoint(path, **state):
    """Write plain types and tensors atomically: a killed job never leaves half a file under the name `path`."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def resume(path, args, images):
    """State saved in `path`, or None. The options must be those of the interrupted run, but for the free ones, and so
    must the number of training images."""
    free = "workers device compile max_steps log_every eval_every save_every no_resume eval predict mode stride".split()
    if args.no_resume or not Path(path).exists():
        return None
    state = read_file(path)
    if not isinstance(state, dict) or not {"args", "images", "optimizer"} <= state.keys():
        raise InputError(f"{path} is no checkpoint to go on from: give another --out, or --no-resume to start again")
    now, before = json.loads(json.dumps(vars(args))), state["args"]
    changed = [f"--{k.replace('_', '-')} {before.get(k)}" for k in now if k not in free and before.get(k) != now[k]]
    changed += [f"{state['images']} training images, not {images}"] if state["images"] != images else []
    if changed:
        raise InputError(f"{path} was written with {', '.join(changed[:5])}: give the same options to go on, another "
                         "--out, or --no-resume to start again")
    return state


def log_line(path, rank, **values):
    """Append one JSON object to log.jsonl (rank 0 only)."""
    if rank == 0:
        values = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")


def read_log(path):
    """The objects in log.jsonl, but for a line that a killed run left unfinished."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]


def open_log(path, rank, args, step):
    """Keep what a resumed run logged up to its checkpoint; a new log begins with the options and the git commit."""
    if rank == 0:
        lines = read_log(path) if step and Path(path).exists() else []
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        lines = [v for v in lines if v.get("step", 0) <= step] or [{"args": vars(args), "commit": commit}]
        Path(path).write_text("".join(json.dumps(v) + "\n" for v in lines))


def memory_gb(device):
    """Peak memory: allocated on a GPU, resident of this process elsewhere (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit if resource else 0.0


def train_epoch(model, loader, losses_of, names_of, optimizer, scaler, lr_of, step, until, total, args, rank, world,
                device, stop):
    """Optimizer steps from `step` to the end of the epoch or to `until` -> next step, True if SIGTERM asked to stop.

    losses_of(model, batch) -> dict of scalars, "loss" first; names_of(batch) -> its images, for error messages;
    lr_of(step) -> learning rate; `total` steps of the whole run, for the estimate of the time left. Losses stay on the
    device and are read every --log-every steps, when they are also averaged over processes and written to log.jsonl.
    Raises FloatingPointError on every process if a loss is not finite on any; nothing has been saved since.
    """
    model.train()
    sampler, dtype, log = loader.batch_sampler, amp_dtype(args.dtype, device), Path(args.out) / "log.jsonl"
    params = [p for group in optimizer.param_groups for p in group["params"]]
    end, asked, finite, window = min(step + sampler.steps - sampler.start, until), False, None, []
    batches, waited, begun, first = iter(loader), 0.0, time.perf_counter(), step
    bar = tqdm(total=end - step, desc=f"epoch {sampler.epoch + 1}", disable=rank != 0, leave=False)
    while step < end and not asked:
        for micro in range(args.accum_steps):
            waiting = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - waiting
            torch.manual_seed((args.seed * 1_000_003 + step) * 4096 + micro * world + rank)   # no RNG state to save
            last = micro == args.accum_steps - 1
            with contextlib.nullcontext() if world == 1 or last else model.no_sync():         # one all-reduce a step
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    losses = losses_of(model, batch)
                scaler.scale(losses["loss"] / args.accum_steps).backward()
            window.append((step, names_of(batch), {k: v.detach().float() for k, v in losses.items()}))
        lr = lr_of(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(params, args.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_every and step < end and not (stop.is_set() and world == 1):
            continue

        # the only place where the host waits for the device, and processes for each other's losses
        own = torch.stack([torch.stack([*values.values()]) for _, _, values in window])       # (micro-steps, losses)
        mean, flag = own / world, torch.tensor([float(stop.is_set())], device=device)
        if world > 1:
            dist.all_reduce(mean)
            dist.all_reduce(flag)
        asked, bad = flag.item() > 0, (~mean.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            where, names, _ = window[bad[0]]
            for r in range(world):    # every process names its own images, one after another
                if r == rank and not own[bad[0]].isfinite().all():
                    print(f"non-finite loss in process {rank}, images: {', '.join(names)}", file=sys.stderr, flush=True)
                if world > 1:
                    dist.barrier()
            finite = mean[bad[0] - 1, 0].item() if bad[0] else finite
            raise FloatingPointError(
                f"the loss is {mean[bad[0], 0].item()} at step {where}, lr {lr_of(where):.3g}, last finite {finite};"
                f" checkpoints in {args.out} are from before; try --dtype fp32, --clip-grad 1 or a lower learning rate")
        finite, seconds = mean[-1, 0].item(), time.perf_counter() - begun
        means, rate, share = mean.mean(dim=0).tolist(), (step - first) * sampler.batch / seconds, waited / seconds
        eta, memory = (total - step) * sampler.batch / rate / 3600, memory_gb(device)
        log_line(log, rank, step=step, epoch=sampler.epoch + 1, **dict(zip(window[0][2], means)), lr=lr,
                 grad_norm=grad_norm.item(), img_s=rate, data_share=share, memory_gb=memory, eta_h=eta)
        bar.update(step - first)
        bar.set_postfix_str(f"loss {means[0]:.4f}, {rate:.0f} img/s, data {share:.0%}, {eta:.2g} h left")
        if rank == 0 and step >= 50 > first:
            bar.write(f"after {step} steps: {rate:.0f} images/s, {memory:.1f} GB, {eta:.2g} hours to go")
        if rank == 0 and share > 0.3 and step == end:
            bar.write(f"waiting for data {share:.0%} of the time: more --workers, or a faster disk, would help")
        window, waited, begun, first = [], 0.0, time.perf_counter(), step
    bar.close()
    if not torch.stack([p.isfinite().all() for p in params]).all():    # a last update can do it; once per epoch
        raise FloatingPointError(f"weights are not finite after step {step}; checkpoints in {args.out} are from before;"
                                 " try a lower learning rate")
    return step, asked


def draw_curves(path, panels):
    """Line charts side by side as a PNG. panels: title -> {label: [(x, y), ...]}."""
    font, width, height = ImageFont.load_default(13), 430, 300
    colors = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")
    image = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(image)
    for i, (title, lines) in enumerate(panels.items()):
        left, top, right, bottom = i * width + 62, 34, (i + 1) * width - 16, height - 34
        xs, ys = ([p[axis] for line in lines.values() for p in line] or [0, 1] for axis in (0, 1))
        (x0, x1), (y0, y1) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in (xs, ys))

        def place(x, y):
            return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

        draw.text((left, 8), title, "black", font)
        for k in range(5):
            x, y = x0 + (x1 - x0) * k / 4, y0 + (y1 - y0) * k / 4
            draw.line([place(x0, y), place(x1, y)], "#dddddd")
            draw.text((left - 6, place(x0, y)[1]), f"{y:.3g}", "black", font, anchor="rm")
            draw.text((place(x, y0)[0], bottom + 6), f"{x:.4g}", "black", font, anchor="ma" if k < 4 else "ra")
        for k, (label, line) in enumerate(lines.items()):
            points = [place(*p) for p in line]
            draw.line(points, colors[k % 5], 2)
            for x, y in points if len(points) < 40 else ():
                draw.ellipse([x - 2, y - 2, x + 2, y + 2], colors[k % 5])
            draw.text((right - 4, top + 4 + 16 * k), label, colors[k % 5], font, anchor="ra")
    image.save(path)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and pictures
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, teacher, loader, args, world, device):
    """Mean losses over held-out images with fixed masks, each image once at any world size -> dict.

    'base' is the loss of predicting the mean of each masked patch: what a model that knows only brightness reaches.
    """
    model.eval()
    sums, dtype = torch.zeros(4, device=device), amp_dtype(args.dtype, device)
    for images, noise, _, _ in loader:
        images = normalize(images.to(device), args.mean, args.std)
        ids_keep, ids_masked = random_masking(noise.to(device), args.mask_ratio)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            signals = teacher_signals(teacher, images, ids_keep, *teacher_reads(model, teacher)) if teacher else ()
            losses = model(images, ids_keep, ids_masked, signals)
        target = model.targets(images, ids_masked)
        base = (target - target.mean(dim=-1, keepdim=True)).square().mean()
        means = base.new_ones(()), losses["rec"], base, losses.get("attn", base.new_zeros(()))
        sums += torch.stack([m.float() for m in means]) * len(images)
    if world > 1:
        dist.all_reduce(sums)
    n, rec, base, attn = sums.tolist()
    values = {"val_rec": rec / n, "val_base": base / n, "val_images": int(n)}
    return {**values, "val_attn": attn / n} if teacher else values


def teacher_reads(model, teacher):
    """Which teacher blocks the student's losses read, and what of them."""
    return [teacher_layer(k, model.encoder, teacher) for k in model.layers], model.distill


def to_pixels(images, args):
    """Normalised (B, 3, H, W) -> uint8 array (B, H, W, 3)."""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (args.mean, args.std))
    return ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def reconstruct(model, images, ids_keep, ids_masked):
    """Images with masked patches greyed out, and with predicted ones in their place -> two (B, 3, H, W), normalised.

    A model trained with norm_pix predicts patches of zero mean and unit variance; mean and std come from the input.
    """
    features = model.encoder.forward_features(images, model.encoder_taps(), ids_keep)
    tokens = model.forward_decoder(features, ids_keep, ids_masked)
    pred = model.predict(tokens, model.masked_tokens(ids_masked)).float()
    if model.norm_pix:
        patches = model.patches(images, ids_masked)
        pred = pred * (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt() + patches.mean(dim=-1, keepdim=True)
    hiera = isinstance(model, HieraMaskedAutoencoder)
    ids, p = (model.raster_ids(ids_masked), 16) if hiera else (ids_masked, model.encoder.patch_size)
    pred = pred.unflatten(2, (3, p, p) if hiera else (p, p, 3)).permute(0, 1, *((2, 3, 4) if hiera else (4, 2, 3)))
    B, w = len(images), images.shape[3] // p
    pictures = []
    for values in (torch.zeros_like(pred), pred):
        picture = images.clone()
        grid = picture.view(B, 3, -1, p, w, p).permute(0, 2, 4, 1, 3, 5)                      # a view to write through
        grid[torch.arange(B, device=ids.device)[:, None], ids // w, ids % w] = values
        pictures.append(picture)
    return pictures


def draw_grid(path, columns, rows, note, groups=2):
    """PNG of pictures (H, W, 3) uint8: `rows` side by side in `groups`, titles `columns` above, a note below."""
    font, gap = ImageFont.load_default(14), 6
    zoom = max(1, round(150 / rows[0][0].shape[0]))
    h, w = (s * zoom for s in rows[0][0].shape[:2])
    lines = math.ceil(len(rows) / groups)
    sheet = Image.new("RGB", (groups * (len(columns) * (w + gap) + 2 * gap), 26 + lines * (h + gap) + 24), "white")
    draw = ImageDraw.Draw(sheet)
    for g in range(groups):
        left = g * (len(columns) * (w + gap) + 2 * gap) + gap
        for c, title in enumerate(columns):
            draw.text((left + c * (w + gap), 5), title, "black", font)
            for r, row in enumerate(rows[g * lines:(g + 1) * lines]):
                picture = Image.fromarray(row[c]).resize((w, h), Image.Resampling.NEAREST)
                sheet.paste(picture, (left + c * (w + gap), 26 + r * (h + gap)))
    draw.text((gap, sheet.height - 20), note, "black", font)
    sheet.save(path)


@torch.no_grad()
def draw_reconstructions(model, images, noise, args, path):
    ids_keep, ids_masked = random_masking(noise, args.mask_ratio)
    masked, filled = reconstruct(model, images, ids_keep, ids_masked)
    rows = list(zip(*(to_pixels(x, args) for x in (images, masked, filled))))
    note = "; patch mean and std taken from the input (norm_pix)" if args.norm_pix else ""
    draw_grid(path, ("input", "masked", "prediction"), rows, "prediction of the masked patches only" + note)


@torch.no_grad()
def draw_attention(model, teacher, images, args, path):
    """Student's (after the head adapter) and teacher's softmax attention at the last distilled layer, mean over heads,
    all patches visible. Two queries per image."""
    layer, encoder, B = model.layers[-1], model.encoder, len(images)
    hiera = isinstance(model, HieraMaskedAutoencoder)
    ids = torch.arange(model.cells, device=images.device).expand(B, -1)
    features = encoder.forward_features(images, model.encoder_taps(), ids)
    student, adapter = model.student_signal(features, layer).float(), model.adapters[str(layer)]
    student = adapter(student.softmax(dim=-1)) if model.probs else adapter(student).softmax(dim=-1)
    truth = teacher_signals(teacher, images, ids, [teacher_layer(layer, encoder, teacher)])[0].float().softmax(dim=-1)
    maps = [a.mean(dim=1).cpu() for a in (student, truth)]                                     # (B, T, T)
    if hiera:    # unrolled -> raster tokens, for queries and for keys
        order = reroll(torch.arange(maps[0].shape[1]).view(1, -1, 1), encoder.unit_grid, 1).flatten()
        maps = [m[:, order][:, :, order] for m in maps]
    else:
        maps = [m[:, 1:, 1:] for m in maps]                                                    # without the class token
    grid = tuple(2 * n for n in encoder.unit_grid) if hiera else encoder.grid
    (h, w), p, pictures, rows = grid, images.shape[2] // grid[0], to_pixels(images, args), []
    for b in range(B):
        for y, x in ((h // 3, w // 3), (2 * h // 3, w // 2)):
            marked = Image.fromarray(pictures[b].copy())
            ImageDraw.Draw(marked).rectangle([x * p - 1, y * p - 1, x * p + p, y * p + p], outline="#ff0000")
            heats = []
            for m in maps:
                a = m[b, y * w + x].view(h, w).numpy()
                a = (a - a.min()) / (a.max() - a.min())
                heat = (np.stack([a ** 0.5, a ** 1.5, 0.3 * a], axis=-1) * 255).astype(np.uint8)      # black to yellow
                heats.append(heat.repeat(p, 0).repeat(p, 1))
            rows.append((np.asarray(marked), *heats))
    draw_grid(path, ("query", "student", "teacher"), rows,
              "attention of the marked patch, mean over heads, each map from its minimum (dark) to its maximum")


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------
def main(args):
    """One pre-training run: teacher, student, data, training with resume, evaluation, pictures, encoder.pt."""
    args = resolve(args)
    rank, world, device = init_distributed(args.device)
    say = print if rank == 0 else lambda *_: None
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    # teacher and student
    teacher = build_teacher(args).to(device) if args.method != "mae" else None
    model = build_student(args, teacher).to(device)
    encoder_size, trained = (sum(p.numel() for p in m.parameters() if p.requires_grad or m is model.encoder)
                             for m in (model.encoder, model))
    say(f"{args.method} on {args.model}: encoder {encoder_size / 1e6:.2f}M parameters, {trained / 1e6:.2f}M trained "
        f"with decoder and adapters; decoder on block {args.decoder_tap}; distilled: {args.distill_layers or 'none'}")

    if not 0 < int(model.cells * (1 - args.mask_ratio)) < model.cells:
        raise InputError(f"--mask-ratio {args.mask_ratio} of {model.cells} patches (Hiera: mask units) must leave at "
                         "least one visible and one masked")

    # data
    train_set, val_set, said = make_data(args, model.cells)
    say(said)
    batches = EpochBatches(len(train_set), args.batch_size, args.accum_steps, rank, world, args.seed)
    loading = dict(num_workers=args.workers, pin_memory=device.type == "cuda")
    loader = DataLoader(train_set, batch_sampler=batches, persistent_workers=args.workers > 0, **loading)
    val_loader = DataLoader(Subset(val_set, range(rank, len(val_set), world)), batches.per_process, **loading)

    # recipe
    args.lr = args.base_lr * batches.batch / 256
    total, warmup = args.epochs * batches.steps, int(args.warmup_epochs * batches.steps)
    until = min(total, args.max_steps or total)
    dtype = amp_dtype(args.dtype, device)
    smaller = "" if batches.batch == args.batch_size else f" (not {args.batch_size}: the data set is smaller)"
    say(f"batch {batches.batch}{smaller} = {batches.per_process} images x {world} process(es) x {args.accum_steps} "
        f"micro-steps; lr {args.lr:.3g} = {args.base_lr:g} * {batches.batch} / 256; {batches.steps} steps per epoch; "
        f"{device}, {dtype}")
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), args.lr, tuple(args.betas), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, state = 0, resume(out / "last.pt", args, len(train_set))
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step = state["step"]
        say(f"{out}/last.pt: {'finished already' if step >= until else 'going on'} after step {step} of {total}")
    open_log(out / "log.jsonl", rank, args, step)

    student = torch.compile(model) if args.compile else model
    if args.compile and teacher:
        teacher.forward_features = torch.compile(teacher.forward_features)
    if world > 1:
        student = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None,
                                          gradient_as_bucket_view=True)
    skipped = 0

    def losses_of(student, batch):
        nonlocal skipped
        images, noise, _, unreadable = batch
        skipped += int(unreadable.sum())
        images = normalize(images.to(device, non_blocking=True), args.mean, args.std)
        ids_keep, ids_masked = random_masking(noise.to(device, non_blocking=True), args.mask_ratio)
        signals = teacher_signals(teacher, images, ids_keep, *teacher_reads(model, teacher)) if teacher else ()
        return student(images, ids_keep, ids_masked, signals)

    def names_of(batch):
        return [str(train_set.items[i]) for i in batch[2].tolist()]

    def lr_of(step):
        return lr_at(step, total, warmup, args.lr, args.min_lr)

    def save():
        if rank == 0:
            about = dict(arch=model.encoder.arch, mean=list(args.mean), std=list(args.std), norm_pix=args.norm_pix,
                         args=json.loads(json.dumps(vars(args))), step=step)
            save_checkpoint(out / "last.pt", model=model.state_dict(), optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict(), images=len(train_set), **about)
            save_checkpoint(out / "encoder.pt", model=model.encoder.state_dict(), **about)

    def report(pictures):
        """Evaluate on all processes; log, print and, if asked, draw on rank 0."""
        values = evaluate(model, teacher, val_loader, args, world, device)
        log_line(out / "log.jsonl", rank, step=step, **values)
        say(f"step {step}: held-out " + ", ".join(f"{k[4:]} {v:.4f}" for k, v in values.items() if k != "val_images"))
        if pictures and rank == 0:
            shown = [val_set[i * len(val_set) // 8] for i in range(min(8, len(val_set)))]
            images, noise = (torch.stack([s[k] for s in shown]).to(device) for k in (0, 1))
            images = normalize(images, args.mean, args.std)
            draw_reconstructions(model, images, noise, args, out / "reconstruction.png")
            if teacher and args.distill == "attention":
                draw_attention(model, teacher, images[:4], args, out / "attention.png")
            lines, panels = read_log(out / "log.jsonl"), {}
            for title, keys in (("reconstruction", ("rec", "val_rec", "val_base")),
                                (args.distill, ("attn", "val_attn"))):
                curves = {k: [(v["step"], v[k]) for v in lines if k in v] for k in keys}
                if any(curves.values()):
                    panels[f"{title} loss by step"] = curves
            draw_curves(out / "curves.png", panels)

    # training
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if step == 0:
        report(pictures=False)
    while step < until:
        batches.epoch, batches.start = divmod(step, batches.steps)
        step, stopped = train_epoch(student, loader, losses_of, names_of, optimizer, scaler, lr_of, step, until, total,
                                    args, rank, world, device, stop)
        save()
        if stopped:
            raise SystemExit(f"stopped by SIGTERM after step {step}; the same command goes on from {out}/last.pt")
        epoch = step // batches.steps
        if skipped:
            say(f"epoch {epoch}: {skipped} unreadable files replaced in process {rank}")
            skipped = 0
        if step % batches.steps == 0 and epoch % args.eval_every == 0 and step < until:
            report(pictures=True)
    report(pictures=True)

    if rank == 0:
        evaluations = [v for v in read_log(out / "log.jsonl") if "val_rec" in v]
        first, last = evaluations[0], evaluations[-1]
        print(f"\nheld-out reconstruction loss {last['val_rec']:.3f} (before training {first['val_rec']:.3f}; "
              f"predicting the mean of each patch {last['val_base']:.3f})")
        if teacher:
            print(f"held-out {args.distill} loss {last['val_attn']:.4g} (before training {first['val_attn']:.4g})")
        print(f"encoder for the other scripts: {out}/encoder.pt\nlog: {out}/log.jsonl\n"
              f"pictures: {', '.join(str(p) for p in sorted(out.glob('*.png')))}")


if __name__ == "__main__":
    try:
        arguments = parse_args()
        if arguments.demo:
            arguments = parse_args(**DEMO)
            if arguments.method != "mae" and not arguments.teacher:    # a teacher first, by an ordinary, shorter run
                teacher = parse_args(**DEMO)
                teacher.method, teacher.out, teacher.decoder_tap = "mae", f"{arguments.out}/teacher", None
                teacher.epochs = math.ceil(arguments.epochs / 2)
                main(teacher)
                arguments.teacher = f"{teacher.out}/encoder.pt"
        main(arguments)
    except (InputError, FloatingPointError, OSError) as error:    # after a loader process's traceback, its last line
        sys.exit(f"\nerror: {str(error).strip().splitlines()[-1].removeprefix('models.InputError: ')}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
