"""Semantic segmentation of ADE20K with Semantic FPN on a light-weight ViT (paper Sec. "transfer", segmentation table).

    torchrun --nproc_per_node=8 segment.py --init out/supervised/best.pt --out out/segment1         # paper: 38.0 mIoU
    torchrun --nproc_per_node=8 segment.py --init out/pretrain/encoder.pt --out out/segment2        # D2-MAE: 39.0
    torchrun --nproc_per_node=8 segment.py --init out/supervised_rpe/best.pt --out out/segment3     # + RPE: 41.5
    torchrun --nproc_per_node=8 segment.py --init out/finetune_rpe/best.pt --out out/segment4       # D2-MAE + RPE: 42.8
    python segment.py --eval --out out/segment4                                                     # score of best.pt
    python segment.py --predict photo.jpg --out out/segment4                                        # labels of pictures
    python segment.py --demo                                                                        # needs no files

The plain ViT gives four maps of the same size, after blocks 4, 6, 8 and 12. `Pyramid` makes them a pyramid of strides
4, 8, 16 and 32, `SemanticFPN` brings them to stride 4, sums and classifies. An image is scored by overlapping windows
of the training crop, since the position tables belong to one size; windows run through the network together.

Shapes: B images, K classes, h x w patch grid, D width of the encoder, C = D / 4 of the pyramid, s = patch size / 4
        (stride of the class scores). Labels are (H, W) uint8: 0 .. K - 1, and 255 for pixels that nobody scores.

NOTES, departures from the authors' code (mmsegmentation):
- Relative position bias tables are resized bicubically like the absolute one, not over a geometric grid. Neither kind
  of table is weight-decayed.
- Crops, flips and colours are a function of (seed, epoch, image): a resumed run is the run that was interrupted.
- Images smaller than a window are padded to it. Padding is the mean colour, which is zero once normalised.
- Without GPUs, several processes keep batch statistics of their own, since PyTorch's SyncBatchNorm needs GPUs; those of
  the first process are evaluated and saved.
"""
import argparse
import colorsys
import contextlib
import copy
import csv
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

try:
    import resource    # peak memory; Windows has none
except ImportError:
    resource = None

from models import (IMAGENET_MEAN, IMAGENET_STD, MODELS, InputError, layer_id, load_encoder, load_state, normalize,
                    read_file)

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
IGNORE = 255    # label of pixels that are neither trained on nor scored


# ----------------------------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's recipe
# ----------------------------------------------------------------------------------------------------------------------
DEMO = dict(data="shapes", out="out/demo_segment", num_classes=5, image_size=[64], patch_size=8, iters=340,
            warmup_iters=30, batch_size=8, lr=2e-3, drop_path=0.0, workers=1, eval_every=170, save_every=170,
            log_every=10)


def parse_args(argv=None, **defaults):
    """Options of the command line, or of the list `argv`; `defaults` stand in for the paper's values (DEMO)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model (with --eval and --predict, that of the checkpoint)").add_argument
    add("--model", choices=tuple(MODELS), default="vit_tiny", help="encoder; the paper's is vit_tiny")
    add("--init", help="checkpoint of the encoder (README, 'Checkpoints'); from scratch if absent. With --eval and "
                       "--predict: the file of this script to use, best.pt of --out if absent")
    add("--image-size", type=int, nargs="+", default=[512], help="side, or height and width, of crops and windows")
    add("--patch-size", type=int, help="side of a ViT patch in pixels; if absent that of --init, else 16")
    add("--drop-path", type=float, default=0.1, help="stochastic depth of the last block; paper: 0.1")

    add = parser.add_argument_group("data (a folder like ADEChallengeData2016: README, 'Segmentation')").add_argument
    add("--data", default="data/ADEChallengeData2016",
        help="folder with {images,annotations}/{training,validation}, or 'shapes' for drawn scenes")
    add("--num-classes", type=int, default=150, help="classes; label files hold 1 .. this, and 0 for ignored pixels")
    add("--zero-is-class", action="store_true", help="label files hold 0 .. num-classes - 1, 255 for ignored pixels")
    add("--class-names", help="text file, one name per line; if absent objectInfo150.txt of --data, else numbers")
    add("--mean", type=float, nargs=3, help="per channel, of pixels in [0, 1]; if absent --init's, else ImageNet's")
    add("--std", type=float, nargs=3, help="per channel, of pixels in [0, 1]; if absent --init's, else ImageNet's")
    cpus = (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--workers", type=int, default=max(1, min(16, cpus)), help="loader processes per training process")

    add = parser.add_argument_group("recipe (paper Sec. 'transfer', ADE20K)").add_argument
    add("--iters", type=int, default=160_000, help="optimizer steps; paper: 160000")
    add("--warmup-iters", type=int, default=1500, help="linear from a millionth of --lr, then linear to 0; paper: 1500")
    add("--batch-size", type=int, default=16, help="images per optimizer step over all processes; paper: 16")
    add("--accum-steps", type=int, default=1, help="micro-steps that one batch is split into, per process")
    add("--lr", type=float, default=1e-4, help="learning rate of pyramid and head; paper: 1e-4")
    add("--layer-decay", type=float, default=0.8, help="factor on the rate per block towards the input; paper: 0.8")
    add("--weight-decay", type=float, default=0.05, help="none on biases, norms, tokens, position tables; paper: 0.05")
    add("--betas", type=float, nargs=2, default=(0.9, 0.999), help="of AdamW")
    add("--clip-grad", type=float, default=0.0, help="largest gradient norm; 0: no clipping, as in the paper")

    add = parser.add_argument_group("evaluation").add_argument
    add("--mode", choices=("slide", "whole"), default="slide",
        help="slide: short side to the window's, overlapping windows; whole: the image shrunk into one window")
    add("--stride", type=int, help="pixels between windows; if absent two thirds of a window (paper: 341)")

    add = parser.add_argument_group("run").add_argument
    add("--eval", action="store_true", help="score a checkpoint on the validation images instead of training")
    add("--predict", metavar="PATH", help="label an image, or every image below a folder, instead of training")
    add("--out", default="out/segment", help="folder for checkpoints, log and pictures; the same command resumes there")
    add("--no-resume", action="store_true", help="start again although --out holds a checkpoint")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 on GPUs that have it, fp16 with loss scaling on others, fp32 on mps and cpu")
    add("--compile", action="store_true", help="torch.compile the network for training")
    add("--seed", type=int, default=0)
    add("--max-steps", type=int, help="stop after so many optimizer steps (the schedule stays that of --iters)")
    add("--log-every", type=int, default=50, help="optimizer steps per line of log.jsonl")
    add("--save-every", type=int, default=2000, help="optimizer steps between writings of last.pt")
    add("--eval-every", type=int, default=16_000, help="steps between evaluations with pictures; the last always")
    add("--demo", action="store_true",
        help="defaults for a run without files: drawn scenes, from the encoder of pretrain_d2mae.py --demo if there")
    parser.set_defaults(**defaults)
    return check_numbers(parser.parse_args(argv), zero="workers seed warmup_iters")


def resolve(args):
    """Fill in the defaults that depend on other options and on the checkpoint, and refuse what has no meaning."""
    if args.eval or args.predict:
        args.init = args.init or f"{args.out}/best.pt"
        file = read_file(args.init)
        stored = file.get("args") if isinstance(file, dict) else None
        keys = ("model", "image_size", "patch_size", "num_classes", "zero_is_class", "mean", "std")
        if not isinstance(stored, dict) or any(key not in stored for key in keys):
            raise InputError(f"{args.init} is no segmentation model: give best.pt of this script as --init")
        vars(args).update({key: stored[key] for key in keys})
    state, info = load_state(args.init) if args.init else ({}, {})
    args.image_size = tuple(args.image_size) * (2 if len(args.image_size) == 1 else 1)
    vit_file = args.init and "cls_token" in state    # the kernel of a Hiera is not its patch
    args.patch_size = args.patch_size or (state["patch_embed.proj.weight"].shape[-1] if vit_file else 16)
    args.mean, args.std = (tuple(own or info.get(key) or default) for key, own, default in
                           (("mean", args.mean, IMAGENET_MEAN), ("std", args.std, IMAGENET_STD)))
    args.stride = args.stride or min(args.image_size) * 2 // 3
    cell = 32 if args.model.startswith("hiera") else 2 * args.patch_size
    if len(args.image_size) != 2 or any(s % cell or s < cell for s in args.image_size):
        raise InputError(f"--image-size {' '.join(map(str, args.image_size))} must be one or two multiples of {cell}, "
                         "the pixels of one cell of the pyramid's coarsest map")
    if not 1 <= args.stride <= min(args.image_size):
        raise InputError(f"--stride {args.stride} must lie between 1 and the window's side {min(args.image_size)}, "
                         "or pixels would be left out")
    if not 2 <= args.num_classes <= 254:
        raise InputError(f"--num-classes {args.num_classes} must lie between 2 and 254: labels are bytes, 255 means "
                         "ignored")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------
def read_image(path, upright=False):
    """Any image file -> (3, H, W) uint8 RGB. upright: turned as its EXIF tag says, which label files do not follow."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image) if upright else image
            if image.mode.startswith("I"):                                     # 16-bit grey, which convert() would clip
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {path} ({type(error).__name__}): remove or replace it") from None


def label_table(num_classes, zero_is_class):
    """Class of every byte of a label file -> (256,) int16: IGNORE for unlabelled pixels, -1 for invalid bytes.

    ADE20K: 0 is ignored, 1 .. 150 are classes 0 .. 149. This table is the only place where labels are shifted.
    """
    table = np.full(256, -1, np.int16)
    table[[IGNORE] if zero_is_class else [0, IGNORE]] = IGNORE
    first = 0 if zero_is_class else 1
    table[first:first + num_classes] = np.arange(num_classes)
    return table


def read_labels(path, table):
    """Label PNG (grey or palette) -> (H, W) uint8 classes by `label_table`. Raises InputError on an invalid number."""
    try:
        with Image.open(path) as image:
            raw = np.asarray(image).astype(np.int64)    # also of a one-bit image, whose pixels are booleans
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read labels {path} ({type(error).__name__}): replace them, or remove them with "
                         "their image") from None
    if raw.ndim != 2:
        raise InputError(f"labels {path} are a colour image: they must be one class number per pixel, grey or palette")
    labels = table[raw] if raw.max() < 256 else np.array([-1])
    if labels.min() < 0:
        wrong = next(v for v in np.unique(raw) if v > 255 or table[v] < 0)
        valid = np.flatnonzero((table >= 0) & (table < IGNORE))
        ignored = " and ".join(map(str, np.flatnonzero(table == IGNORE)))
        raise InputError(f"labels {path} hold the number {wrong}; classes are {valid[0]} .. {valid[-1]}, ignored is "
                         f"{ignored}: check --num-classes and --zero-is-class")
    return torch.from_numpy(labels.astype(np.uint8))


def draw_scene(index, size=(96, 144)):
    """Scene `index` of an endless toy set -> image (3, H, W) uint8, labels (H, W) uint8: 0 ground, 1 disc, 2 square,
    3 triangle, 4 ring. Only the outline tells the classes apart: colours and sizes are random."""
    rng = np.random.default_rng([11, index])
    h, w = size
    y, x = (np.mgrid[:h, :w] + 0.5) * 2 / h - np.array([1, w / h])[:, None, None]     # from -1 to 1 over the height
    image = rng.uniform(0.2, 0.8, 3) + (rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.2) * y)[..., None]
    image, labels = image + rng.normal(0, 0.02, (h, w, 3)), np.zeros((h, w), np.uint8)
    for _ in range(rng.integers(2, 5)):
        kind, angle, radius = rng.integers(4), rng.uniform(0, np.pi), rng.uniform(0.45, 0.75)
        dx, dy = x - rng.uniform(-0.9, 0.9) * w / h, y - rng.uniform(-0.7, 0.7)
        u, v = (dx * np.cos(angle) + dy * np.sin(angle)) / radius, (dy * np.cos(angle) - dx * np.sin(angle)) / radius
        r = np.hypot(u, v)
        inside = (r < 1, np.maximum(abs(u), abs(v)) < 0.8, (v < 0.6) & (v > 1.9 * abs(u) - 0.9),
                  abs(r - 0.78) < 0.22)[kind]
        image[inside] = rng.uniform(0, 1, 3) + 0.15 * np.sin(rng.uniform(4, 12) * u[inside, None])
        labels[inside] = kind + 1
    return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1), torch.from_numpy(labels)


def resized_shape(shape, short, long):
    """The largest (H, W) of the same ratio whose short side is at most `short` and whose long side at most `long`."""
    factor = min(short / min(shape), long / max(shape))
    return [max(1, int(side * factor + 0.5)) for side in shape]


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def class_ratio_crop(labels, size, ratio=0.75, tries=10):
    """Corner (top, left) of a random crop of `size` (h, w) out of labels (H, W). Crops are drawn again, at most `tries`
    times, until two classes occur and none covers `ratio` of the labelled pixels."""
    for _ in range(tries + 1):
        top, left = (int(torch.randint(max(0, have - want) + 1, ())) for have, want in zip(labels.shape, size))
        counts = torch.bincount(labels[top:top + size[0], left:left + size[1]].flatten(), minlength=256)[:IGNORE]
        if counts.count_nonzero() > 1 and counts.max() < ratio * counts.sum():
            break
    return top, left


def saturate(x, factor):
    """S of HSV times `factor`, at most 1, of (3, H, W) in [0, 1]: the brightest channel V and the hue stay."""
    value = x.amax(dim=0)
    return value - (value - x) * (value / (value - x.amin(dim=0)).clamp(min=1e-6)).clamp(max=factor)


def distort(image):
    """Photometric distortion of (3, H, W) uint8: brightness, saturation, hue and, before or after these two, contrast,
    each with probability 0.5."""
    x, contrast_first = image.float() / 255, torch.rand(()) < 0.5
    factor = uniform(0.5, 1.5) if torch.rand(()) < 0.5 else 1.0
    if torch.rand(()) < 0.5:
        x = (x + uniform(-32, 32) / 255).clamp(0, 1)
    if contrast_first:
        x = (x * factor).clamp(0, 1)
    if torch.rand(()) < 0.5:
        x = saturate(x, uniform(0.5, 1.5))
    if torch.rand(()) < 0.5:    # 18 of OpenCV's 180 steps around the circle
        x = v2.functional.adjust_hue(x, uniform(-0.1, 0.1))
    if not contrast_first:
        x = (x * factor).clamp(0, 1)
    return (x * 255).round().to(torch.uint8)


def augment(image, labels, size, fill):
    """The paper's augmentation: image (3, H, W), labels (H, W) -> both of `size`. Short side U(0.5, 2) times the crop's
    (long side at most 4 times that), class-ratio crop, photometric distortion, flip, and padding at the right and below
    with the colour `fill` and IGNORE."""
    image, labels, scale = tv_tensors.Image(image), tv_tensors.Mask(labels), uniform(0.5, 2) * min(size)
    shape = resized_shape(labels.shape, scale, 4 * scale)
    image, labels = v2.Resize(shape, antialias=False)(image, labels)           # bilinear, and nearest for the mask
    top, left = class_ratio_crop(labels, size)
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    image, labels = tv_tensors.Image(distort(image[:, rows, columns])), tv_tensors.Mask(labels[rows, columns])
    image, labels = v2.RandomHorizontalFlip()(image, labels)
    missing = [0, 0, size[1] - labels.shape[1], size[0] - labels.shape[0]]     # left, top, right, bottom
    return v2.Pad(missing, {tv_tensors.Image: fill, tv_tensors.Mask: IGNORE})(image, labels)


class Scenes(Dataset):
    """Images with a class for every pixel. Item -> image (3, H, W) uint8, labels (H, W) uint8, index.

    train=True: keys (epoch, index), crops of `size`, all randomness from (seed, epoch, index).
    train=False: the image resized for `mode`, the labels in their own size.
    """

    def __init__(self, items, load, size, fill, mode="slide", train=True, seed=0):
        self.items, self.load, self.size, self.fill = items, load, size, fill
        self.mode, self.train, self.seed = mode, train, seed

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key if self.train else (0, key)
        image, labels = self.load(self.items[index])
        if self.train:
            torch.default_generator.manual_seed(hash((self.seed, epoch, index)) % 2 ** 63)
            image, labels = augment(image, labels, self.size, self.fill)
        else:
            image = resize_for_test(image, self.size, self.mode)
        return image.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor), index


def resize_for_test(image, size, mode):
    """slide: short side that of a window (long side at most 4 times it); whole: the image just fits into a window."""
    shape = image.shape[1:]
    if mode == "slide":
        return v2.functional.resize(image, resized_shape(shape, min(size), 4 * min(size)), antialias=False)
    factor = min(have / want for have, want in zip(size, shape))
    return v2.functional.resize(image, [max(1, int(side * factor + 0.5)) for side in shape], antialias=False)


def list_images(folder):
    """All image files below a folder, sorted."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_TYPES)


def read_pair(files, table):
    """(image file, label file) -> image (3, H, W), labels (H, W), both uint8."""
    image, labels = read_image(files[0]), read_labels(files[1], table)
    if image.shape[1:] != labels.shape:
        raise InputError(f"{files[0]} has {image.shape[2]}x{image.shape[1]} pixels, its labels {files[1]} "
                         f"{labels.shape[1]}x{labels.shape[0]}: they must have the same size")
    return image, labels


def list_pairs(root, split):
    """(image, annotation) files of a split, matched by name. Raises InputError where one half is missing."""
    images, annotations = (Path(root) / kind / split for kind in ("images", "annotations"))
    if not images.is_dir() or not annotations.is_dir():
        raise InputError(f"--data {root} must hold the folders images/{split} and annotations/{split}, as "
                         "ADEChallengeData2016 does")
    pairs = [(p, annotations / p.relative_to(images).with_suffix(".png")) for p in list_images(images)]
    if not pairs:
        raise InputError(f"{images} holds no image ({', '.join(sorted(IMAGE_TYPES))})")
    for image, labels in pairs:
        if not labels.exists():
            raise InputError(f"image {image} has no labels: {labels} does not exist")
    return pairs


def class_names(args):
    """--class-names, the list that comes with ADE20K, or numbers."""
    listed = Path(args.data) / "objectInfo150.txt"
    if args.class_names:
        if not Path(args.class_names).is_file():
            raise InputError(f"--class-names {args.class_names} does not exist: give a file with one name per line")
        names = [line.strip() for line in open(args.class_names) if line.strip()]
    elif args.data == "shapes":
        names = ["ground", "disc", "square", "triangle", "ring"]
    elif listed.exists() and args.num_classes == 150:
        names = [line.strip().split("\t")[-1].split(",")[0] for line in open(listed)][-150:]
    else:
        names = [f"class {k}" for k in range(args.num_classes)]
    if len(names) != args.num_classes:
        raise InputError(f"{args.class_names or args.data} has {len(names)} class names, --num-classes is "
                         f"{args.num_classes}")
    return names


def make_data(args):
    """-> training set, validation set. Some label files of each are read now: wrong numbers show at the start."""
    if args.data == "shapes":
        if args.num_classes != 5:
            raise InputError("--data shapes has 5 classes: give --num-classes 5")
        load, train, val = draw_scene, range(2000), range(2000, 2060)
    else:
        table = label_table(args.num_classes, args.zero_is_class)
        load = functools.partial(read_pair, table=table)
        train, val = (list_pairs(args.data, split) for split in ("training", "validation"))
        for pairs in (train, val):
            for _, labels in pairs[::max(1, len(pairs) // 32)]:
                read_labels(labels, table)
    fill = [round(255 * c) for c in args.mean]
    return [Scenes(items, load, args.image_size, fill, args.mode, items is train, args.seed) for items in (train, val)]


# ----------------------------------------------------------------------------------------------------------------------
# Model and loss
# ----------------------------------------------------------------------------------------------------------------------
class Pyramid(nn.Module):
    """Four maps (B, C, ., .), each half the size of the one before, from the encoder's maps of width dims[i].

    A plain ViT has four maps of one size, which are enlarged and reduced; Hiera's stages are a pyramid already.
    """

    def __init__(self, dims, out, hierarchical):
        super().__init__()
        if hierarchical:
            self.levels = nn.ModuleList([nn.Conv2d(dim, out, 1) for dim in dims])
            return
        self.levels = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(dims[0], out, 2, 2), nn.BatchNorm2d(out), nn.GELU(),
                          nn.ConvTranspose2d(out, out, 2, 2)),                                # x 4
            nn.ConvTranspose2d(dims[1], out, 2, 2),                                           # x 2
            nn.Conv2d(dims[2], out, 1),                                                       # x 1
            nn.Sequential(nn.Conv2d(dims[3], out, 1), nn.MaxPool2d(2, 2))])                   # x 1/2

    def forward(self, maps):
        return [level(x) for level, x in zip(self.levels, maps)]


class SemanticFPN(nn.Module):
    """Encoder, pyramid and the head of Panoptic FPN (arXiv 1901.02446), for images of the encoder's size.

    In the head each level passes 3x3 convolutions, one per doubling (at least one) with a bilinear doubling after each,
    up to the size of the first level; the sum is classified.
    """

    def __init__(self, encoder, num_classes, width=128):
        super().__init__()
        self.encoder, self.num_classes = encoder, num_classes
        encoder.norm = nn.Identity()    # taps are not normalised, and a parameter without gradient would stop DDP
        if encoder.arch["kind"] == "vit":
            self.taps, dims = [encoder.depth * k // 12 for k in (4, 6, 8, 12)], [encoder.embed_dim] * 4
        else:
            self.taps = encoder.stage_ends
            dims = [encoder.blocks[end - 1].mlp.fc2.out_features for end in self.taps]
        channels = encoder.embed_dim // 4                                                     # 48 for ViT-Tiny
        self.pyramid = Pyramid(dims, channels, encoder.arch["kind"] == "hiera")
        self.scale_heads = nn.ModuleList()
        for level in range(4):
            layers = []
            for k in range(max(1, level)):
                layers += [nn.Conv2d(width if k else channels, width, 3, padding=1, bias=False),
                           nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                layers += [nn.Upsample(scale_factor=2, mode="bilinear")] if level else []
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        for module in self.scale_heads.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images):                                     # (B, 3, H, W)         at 512, patches of 16:
        maps = self.encoder.feature_maps(images, self.taps)        # 4 x (B, D, h, w)     192 x 32 x 32 each
        maps = self.pyramid(maps)                                  # 4 x (B, C, ., .)     48 x 128 x 128, 64, 32, 16
        x = sum(head(m) for head, m in zip(self.scale_heads, maps))   # (B, 128, H/s, W/s)   128 x 128 x 128
        return self.classifier(self.dropout(x))                    # (B, K, H/s, W/s)     150 x 128 x 128


def segmentation_loss(logits, labels):
    """Cross entropy of logits (B, K, ., .), enlarged bilinearly, with labels (B, H, W); 0 at ignored pixels.

    The mean is over ignored pixels too, as in the authors' code: every process and micro-step has the same denominator,
    so their average is the loss of the whole batch, and a crop without labels gives 0.
    """
    logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum") / labels.numel()


def build_model(args):
    """SemanticFPN on the encoder of --model. A ViT gets relative position bias and LayerScale starting at 1."""
    vit = dict(patch_size=args.patch_size, rel_pos_bias=True, layer_scale=1.0)
    options = {} if args.model.startswith("hiera") else vit
    encoder = MODELS[args.model](img_size=args.image_size, drop_path=args.drop_path, **options)
    return SemanticFPN(encoder, args.num_classes)


def count_flops(model):
    """Floating-point operations for one image of the model's size; a multiply-add counts as two."""
    model = copy.deepcopy(model).to("meta").eval()    # shapes without numbers: no time, no memory
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *model.encoder.img_size, device="meta"))
    return counter.get_total_flops()


def linear_lr(step, total, warmup, lr):
    """Learning rate of optimizer step `step` (from 0): linear warm-up from a millionth of lr, then linear to 0."""
    if step < warmup:
        return lr * (1e-6 + (1 - 1e-6) * step / warmup)
    return lr * (total - step) / max(1, total - warmup)


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
# Evaluation: sliding windows and mean IoU
# ----------------------------------------------------------------------------------------------------------------------
def window_starts(length, window, stride):
    """First pixels of the windows that cover `length` pixels: 0, stride, 2 stride, ..., the last flush with the end."""
    last = max(0, length - window)
    return [min(i * stride, last) for i in range(math.ceil(last / stride) + 1)]


@torch.no_grad()
def sliding_logits(model, images, stride, at_once=None):
    """Class logits averaged over overlapping windows: list of (3, H, W) of any sizes -> list of (K, H, W) float32.

    images: normalised, on the model's device. A window has the size that the encoder is built for; smaller images are
    padded. Windows of all images pass the network together, `at_once` at a time: 16 if absent, on a CPU one, which
    fills it and stays in its caches.
    """
    at_once = at_once or (1 if images[0].device.type == "cpu" else 16)
    (h, w), windows, places = model.encoder.img_size, [], []
    for i, image in enumerate(images):
        H, W = image.shape[1:]
        padded = F.pad(image, (0, max(0, w - W), 0, max(0, h - H)))
        for y in window_starts(H, h, stride):
            for x in window_starts(W, w, stride):
                windows.append(padded[:, y:y + h, x:x + w])
                places.append((i, y, x))
    scores = torch.cat([model(torch.stack(windows[k:k + at_once])) for k in range(0, len(windows), at_once)])
    sums = [image.new_zeros(model.num_classes, *image.shape[1:]) for image in images]
    counts = [image.new_zeros(image.shape[1:]) for image in images]
    for (i, y, x), score in zip(places, scores):                                              # (K, h/s, w/s)
        score = F.interpolate(score[None].float(), (h, w), mode="bilinear")[0]
        part = sums[i][:, y:y + h, x:x + w]                                                   # without the padding
        part += score[:, :part.shape[1], :part.shape[2]]
        counts[i][y:y + h, x:x + w] += 1
    return [s.div_(c) for s, c in zip(sums, counts)]


def classify(logits, size, chunk=16):
    """Class of the largest logit after bilinear resizing to `size`: (K, h, w) -> (H, W) uint8. A few classes at a time:
    all 150 maps of a large photograph would not fit into memory."""
    best = labels = None
    for first in range(0, len(logits), chunk):
        value, index = F.interpolate(logits[None, first:first + chunk], tuple(size), mode="bilinear")[0].max(dim=0)
        labels = index + first if best is None else torch.where(value > best, index + first, labels)
        best = value if best is None else torch.maximum(value, best)
    return labels.to(torch.uint8)


def confusion_matrix(predicted, labels, num_classes):
    """Pixels of every (true, predicted) pair of classes -> (K, K) int64; ignored pixels are left out."""
    cell = torch.where(labels == IGNORE, num_classes ** 2, labels.long() * num_classes + predicted)
    return torch.bincount(cell.flatten(), minlength=num_classes ** 2 + 1)[:-1].view(num_classes, num_classes)


def class_iou(confusion):
    """IoU = true positives / (labelled or predicted as the class) -> (K,), NaN for a class that is neither."""
    hits = confusion.diagonal()
    return hits / (confusion.sum(dim=0) + confusion.sum(dim=1) - hits)


def summarize(confusion):
    """Scores in per cent from the confusion matrix of the whole set -> dict. The mean IoU is over classes that occur in
    labels or predictions, `absent` counts the others. baseline_*: predicting the most frequent class everywhere."""
    confusion = confusion.cpu().double()
    if not confusion.sum():
        raise InputError("no pixel of the validation labels has a class: check --zero-is-class and the label files")
    iou, labelled = class_iou(confusion), confusion.sum(dim=1)
    share = (labelled.max() / labelled.sum()).item()
    return {"miou": 100 * iou.nanmean().item(), "pixel_accuracy": 100 * (confusion.trace() / confusion.sum()).item(),
            "absent": int(iou.isnan().sum()), "baseline_miou": 100 * share / int((labelled > 0).sum()),
            "baseline_pixel_accuracy": 100 * share}


@torch.no_grad()
def label_images(model, images, sizes, args, device):
    """Classes (H, W) uint8, in the given sizes, of uint8 images (3, ., .) by sliding windows. model: in eval mode."""
    dtype = amp_dtype(args.dtype, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        images = [normalize(image.to(device, non_blocking=True), args.mean, args.std) for image in images]
        return [classify(logits, size) for logits, size in zip(sliding_logits(model, images, args.stride), sizes)]


def evaluate(model, loader, args, rank, world, device):
    """Confusion matrix (K, K) over the validation set, each image once at any world size; mean IoU of every image."""
    model.eval()
    confusion = torch.zeros(args.num_classes, args.num_classes, dtype=torch.long, device=device)
    scores = torch.zeros(len(loader.dataset.dataset), device=device)
    if world > 1:    # batch statistics of the first process; SyncBatchNorm's are the same anyway
        for name, buffer in model.named_buffers():
            if "running" in name:
                dist.broadcast(buffer, 0)
    for batch in tqdm(loader, "evaluation", disable=rank != 0, leave=False):
        images, labels, indices = zip(*batch)
        predictions = label_images(model, images, [truth.shape for truth in labels], args, device)
        for predicted, truth, index in zip(predictions, labels, indices):
            counts = confusion_matrix(predicted, truth.to(device), args.num_classes)
            confusion += counts
            scores[index] = class_iou(counts).nanmean()
    if world > 1:
        dist.all_reduce(confusion)
        dist.all_reduce(scores)
    return confusion, scores.cpu()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------
def palette(num_classes):
    """A fixed colour for every class -> (256, 3) uint8; hues by the golden ratio, ignored pixels grey."""
    colors = np.full((256, 3), 128, np.uint8)
    for k in range(num_classes):
        hue, saturation, value = (0.3 + 0.618034 * k) % 1, (0.9, 0.6)[k // 5 % 2], (1.0, 0.7)[k // 10 % 2]
        colors[k] = [round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value)]
    return colors


def overlay(image, labels, colors):
    """(H, W, 3) uint8 image under the colours of labels (H, W)."""
    return (0.4 * image + 0.6 * colors[labels]).astype(np.uint8)


def draw_overlays(path, columns, rows, names, colors, side=230):
    """PNG of rows (pictures (H, W, 3) side by side under `columns`, labels that say what the legend names, caption)."""
    font, gap, line, legend = ImageFont.load_default(13), 8, 18, 150
    sheets = []
    for pictures, labels, caption in rows:
        classes, areas = np.unique(labels[labels != IGNORE], return_counts=True)
        classes = classes[np.argsort(-areas)][:12]                                            # the largest ones
        h, w = pictures[0].shape[:2]
        w, h = max(1, round(w * side / max(h, w))), max(1, round(h * side / max(h, w)))
        height = max(h, line * len(classes)) + line + gap
        sheet = Image.new("RGB", (len(pictures) * (side + gap) + gap + legend, height), "white")
        draw = ImageDraw.Draw(sheet)
        draw.text((gap, 0), caption, "black", font)
        for c, picture in enumerate(pictures):
            resized = Image.fromarray(picture).resize((w, h), Image.Resampling.BICUBIC)
            sheet.paste(resized, (gap + c * (side + gap), line))
        for k, label in enumerate(classes):
            name, x, y = names[label], gap + len(pictures) * (side + gap), line * (k + 1)
            while draw.textlength(name, font) > legend - 26:
                name = name.rstrip(".")[:-1] + ".."
            draw.rectangle([x, y + 2, x + 13, y + 15], tuple(int(v) for v in colors[label]))
            draw.text((x + 20, y + 1), name, "black", font)
        sheets.append(sheet)
    page = Image.new("RGB", (sheets[0].width, 24 + sum(s.height for s in sheets)), "white")
    for c, title in enumerate(columns):
        ImageDraw.Draw(page).text((gap + c * (side + gap), 5), title, "black", font)
    for k, sheet in enumerate(sheets):
        page.paste(sheet, (0, 24 + sum(s.height for s in sheets[:k])))
    page.save(path)


def draw_extremes(model, val_set, scores, names, args, device, out, count=4):
    """overlay_best.png and overlay_worst.png: images of highest and lowest mean IoU, with labels and predictions."""
    colors, order = palette(args.num_classes), scores.argsort(descending=True).tolist()
    order = [i for i in order if not scores[i].isnan()]    # images without any label have no score
    for name, indices in (("best", order[:count]), ("worst", order[::-1][:count])):
        rows = []
        for index in indices:
            image, truth, _ = val_set[index]
            predicted = label_images(model, [image], [truth.shape], args, device)[0].cpu().numpy()
            picture = v2.functional.resize(image, list(truth.shape)).permute(1, 2, 0).numpy()
            truth, item = truth.numpy(), val_set.items[index]
            name_of = item[0].name if isinstance(item, tuple) else f"scene {item}"
            rows.append(([picture, overlay(picture, truth, colors), overlay(picture, predicted, colors)],
                         np.stack([truth, predicted]), f"{name_of}: IoU {100 * scores[index]:.0f}"))
        if rows:
            columns = ("input", "truth (grey: ignored)", "prediction")
            draw_overlays(out / f"overlay_{name}.png", columns, rows, names, colors)


def predict(model, path, names, args, device, out):
    """Label every image of `path`: NAME_label.png (numbers as in the label files), NAME_color.png, overlay_NAME.png."""
    path = Path(path)
    files = list_images(path) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise InputError(f"--predict {path} is neither an image nor a folder of images")
    model.eval()
    colors = palette(args.num_classes)
    for file in tqdm(files, "prediction", leave=False):
        folder = out / file.relative_to(path).parent if path.is_dir() else out
        folder.mkdir(parents=True, exist_ok=True)
        image = read_image(file, upright=True)
        resized = resize_for_test(image, args.image_size, args.mode)
        labels = label_images(model, [resized], [image.shape[1:]], args, device)[0].cpu().numpy()
        picture = image.permute(1, 2, 0).numpy()
        Image.fromarray(labels if args.zero_is_class else labels + 1).save(folder / f"{file.stem}_label.png")
        Image.fromarray(colors[labels]).save(folder / f"{file.stem}_color.png")
        draw_overlays(folder / f"overlay_{file.stem}.png", ("input", "prediction"),
                      [([picture, overlay(picture, labels, colors)], labels, file.name)], names, colors, 460)
        shares = np.bincount(labels.flatten(), minlength=args.num_classes) / labels.size
        print(f"{file}: " + ", ".join(f"{names[k]} {shares[k]:.0%}" for k in np.argsort(-shares)[:5] if shares[k]))


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------
def main(args):
    """Training with resume and evaluation, or --eval, or --predict."""
    args = resolve(args)
    rank, world, device = init_distributed(args.device)
    say = print if rank == 0 else lambda *_: None
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    # network
    model = build_model(args)
    window = "x".join(map(str, args.image_size))
    parameters, encoder = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, model.encoder))
    say(f"Semantic FPN on {args.model}: {parameters:.2f}M parameters, {encoder:.2f}M of them in the encoder; "
        f"{count_flops(model) / 1e9:.1f} GFLOPs for {window} (2 per multiply-add); taps after blocks "
        f"{', '.join(map(str, model.taps))}")
    if args.eval or args.predict:
        file = read_file(args.init)
        model.load_state_dict(file["model"])
        names = file["classes"]
    else:
        names = class_names(args)
        if args.init:
            load_encoder(model.encoder, args.init)
    model = model.to(device)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.predict:
        if rank == 0:
            predict(model, args.predict, names, args, device, out / "predict")
            print(f"pictures: {out}/predict")
        return

    # data
    train_set, val_set = make_data(args)
    say(f"{len(train_set)} training images, {len(val_set)} for validation, {args.num_classes} classes")
    loading = dict(num_workers=args.workers, pin_memory=device.type == "cuda")
    val_loader = DataLoader(Subset(val_set, range(rank, len(val_set), world)), 4, collate_fn=list, **loading)

    def report(step):
        """Scores of the model on the validation images, with files and pictures -> mean IoU."""
        confusion, scores = evaluate(model, val_loader, args, rank, world, device)
        values = summarize(confusion)
        log_line(out / ("eval.jsonl" if args.eval else "log.jsonl"), rank, step=step, **values)
        stride = f", stride {args.stride}" if args.mode == "slide" else ""
        say(f"step {step}: mIoU {values['miou']:.2f} over {args.num_classes - values['absent']} classes "
            f"({values['absent']} absent), pixel accuracy {values['pixel_accuracy']:.2f}, {len(val_set)} images; "
            f"{args.mode}, window {window}{stride}")
        if rank == 0:
            iou, pixels = (100 * class_iou(confusion.cpu().double())).tolist(), confusion.sum(dim=1).tolist()
            with open(out / "classes.csv", "w", newline="") as file:
                rows = zip(range(args.num_classes), names, iou, pixels)
                csv.writer(file).writerows([("class", "name", "iou", "pixels"), *rows])
            draw_extremes(model, val_set, scores, names, args, device, out)
        return values["miou"]

    if args.eval:
        report(file["step"])
        return

    # recipe
    batches = EpochBatches(len(train_set), args.batch_size, args.accum_steps, rank, world, args.seed)
    loader = DataLoader(train_set, batch_sampler=batches, persistent_workers=args.workers > 0, **loading)
    total, until, dtype = args.iters, min(args.iters, args.max_steps or args.iters), amp_dtype(args.dtype, device)
    groups = param_groups(model, args.weight_decay, args.layer_decay, model.encoder.depth)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    say(f"{batches.per_process} images x {world} process(es) x {args.accum_steps} accumulation = batch "
        f"{batches.batch}; {total} steps, {batches.steps} per epoch; {device}, {dtype}")
    scales = dict(sorted((group["layer"], group["lr_scale"]) for group in groups)).values()
    embedding, *blocks, rest = [f"{args.lr * scale:.2g}" for scale in (scales if len(scales) > 1 else [1.0, 1.0])]
    decayed, others = (sum(len(g["params"]) for g in groups if bool(g["weight_decay"]) == w) for w in (True, False))
    say(f"peak learning rates: embeddings {embedding}, blocks {' '.join(blocks)}, pyramid and head {rest}; weight "
        f"decay {args.weight_decay} on {decayed} tensors, none on {others} biases, norms, tokens and position tables")

    step, best, state = 0, -1.0, resume(out / "last.pt", args, len(train_set))
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
        say(f"{out}/last.pt: {'finished already' if step >= until else 'going on'} after step {step} of {total}")
    open_log(out / "log.jsonl", rank, args, step)

    student = torch.compile(model) if args.compile else model
    if world > 1:
        student = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None,
                                          broadcast_buffers=False, gradient_as_bucket_view=True)

    def losses_of(student, batch):
        images, labels, _ = (x.to(device, non_blocking=True) for x in batch)
        return {"loss": segmentation_loss(student(normalize(images, args.mean, args.std)), labels)}

    def names_of(batch):
        return [str(train_set.items[i]) for i in batch[2].tolist()]

    def lr_of(step):
        return linear_lr(step, total, args.warmup_iters, args.lr)

    def save(path, **more):
        if rank == 0:
            plain = json.loads(json.dumps(vars(args)))
            save_checkpoint(path, model=model.state_dict(), arch=model.encoder.arch, classes=names, step=step,
                            best=best, mean=list(args.mean), std=list(args.std), args=plain, **more)

    def save_last():
        save(out / "last.pt", optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), images=len(train_set))

    def judge():
        nonlocal best
        miou = report(step)
        if miou > best:
            best = miou
            save(out / "best.pt")

    # training
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while step < until:
        batches.epoch, batches.start = divmod(step, batches.steps)
        pause = min(until, *((step // every + 1) * every for every in (args.save_every, args.eval_every)))
        step, stopped = train_epoch(student, loader, losses_of, names_of, optimizer, scaler, lr_of, step, pause, total,
                                    args, rank, world, device, stop)
        save_last()
        if stopped:
            raise SystemExit(f"stopped by SIGTERM after step {step}; the same command goes on from {out}/last.pt")
        if step < until and step % args.eval_every == 0:
            judge()
            save_last()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)    # nothing left to save
    judge()
    save_last()

    if rank == 0:
        lines = read_log(out / "log.jsonl")
        curve = lambda *keys: {k: [(v["step"], v[k]) for v in lines if k in v] for k in keys}
        draw_curves(out / "curves.png", {"cross entropy by step": curve("loss"),
                                         "mean IoU (%) by step": curve("miou", "baseline_miou")})
        last = [v for v in lines if "miou" in v][-1]
        print(f"\nmIoU {last['miou']:.1f}, pixel accuracy {last['pixel_accuracy']:.1f} (the most frequent class "
              f"everywhere: {last['baseline_miou']:.1f} and {last['baseline_pixel_accuracy']:.1f}); "
              f"best mIoU {best:.1f} in {out}/best.pt")
        print(f"pictures: {', '.join(str(p) for p in sorted(out.glob('*.png')))}\nper class: {out}/classes.csv\n"
              f"log: {out}/log.jsonl")


if __name__ == "__main__":
    try:
        arguments = parse_args()
        if arguments.demo:
            made = "out/demo/encoder.pt"
            trains = not (arguments.eval or arguments.predict)
            arguments = parse_args(**DEMO, init=made if trains and Path(made).exists() else None)
        main(arguments)
    except (InputError, FloatingPointError, OSError) as error:    # after a loader process's traceback, its last line
        sys.exit(f"\nerror: {str(error).strip().splitlines()[-1].removeprefix('models.InputError: ')}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
