"""OSTrack with a lightweight ViT: training, one-pass evaluation on LaSOT, your own videos (paper Sec. "LaSOT").

    D=lasot=data/lasot,got10k=data/got10k,coco=data/coco,trackingnet=data/trackingnet
    torchrun --nproc_per_node=8 track.py --data $D --init out/pretrain/encoder.pt --out out/track    # the paper's run
    torchrun --nproc_per_node=8 track.py --eval lasot=data/lasot --out out/track                     # AUC, P, P_norm
    python track.py --eval lasot=data/lasot --results DIR --out out/score        # score text files of any tracker
    python track.py --frames DIR_OR_GIF --init 120,80,40,60 --out out/mine       # boxes.txt and overlay.gif
    python track.py --benchmark                                                  # frames per second on this machine
    python track.py --demo                                                       # no files, 2 to 4 minutes

The tokens of a template (the target in the first frame) and of a search region (around the last box) go through the
blocks of the ViT together, so features are extracted and compared at once. Three blocks also throw out the search
tokens that the template's centre token attends to least, `block_with_elimination`. A convolutional head on the search
tokens predicts the target's centre and its box. Read `Tracker.forward_features`, `tracking_losses`, `OnePassTracker`.

Shapes: B pairs, Z template tokens, S search tokens (g x g grid), K of them kept, D width, H heads, d = D / H.
Boxes:  x, y, w, h (upper left corner, size) of pixels in a frame, or of [0, 1] within a square crop.

NOTES, departures from the authors' code:
- The elimination reads one row of the attention map, that of the template's centre token. Only this row is computed
  explicitly; attention itself stays fused, and only for the queries that are kept. Numbers are the same.
- While tracking, sizes and offsets are computed at the peak of the score map alone (see `FusedHead`), batch norms are
  folded into the convolutions, and the template is embedded once. Numbers are the same.
- A box leaves a crop by the exact inverse of the way it came in, and is mirrored about the same middle; the authors
  leave out half a crop pixel on the way back, and one in the mirror.
- The authors flip both frames together and then each crop again, which amounts to flipping each crop on its own.
- Biases, norms and position tables are not decayed; the authors decay all parameters by 1e-4.
"""
import argparse
import contextlib
import csv
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageSequence
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

try:
    import resource    # peak memory; Windows has none
except ImportError:
    resource = None

from models import (IMAGENET_MEAN, IMAGENET_STD, MODELS, InputError, VisionTransformer, infer_model, layer_id,
                    load_encoder, load_state, normalize, read_file, resize_grid)

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}

# the 280 test sequences of LaSOT, category and numbers; the other 1120 are for training
LASOT_TEST = """
airplane 1 9 13 15, basketball 1 6 7 11, bear 2 4 6 17, bicycle 2 7 9 18, bird 2 3 15 17, boat 3 4 12 17, book 3 10 11
19, bottle 1 12 14 18, bus 2 5 17 19, car 2 6 9 17, cat 1 3 18 20, cattle 2 7 12 13, spider 14 16 18 20, coin 3 6 7
18, crab 3 6 12 18, surfboard 12 4 5 8, cup 1 4 7 17, deer 4 8 10 14, dog 1 7 15 19, guitar 3 8 10 16, person 1 5 10
12, pig 2 10 13 18, rubicCube 1 6 14 19, swing 10 14 17 20, drone 13 15 2 7, pool 12 15 3 7, rabbit 10 13 17 19,
racing 10 15 16 20, robot 1 19 5 8, sepia 13 16 6 8, sheep 3 5 7 9, skateboard 16 19 3 8, tank 14 16 6 9, tiger 12 18
4 6, train 1 11 20 7, truck 16 3 6 7, turtle 16 5 8 9, umbrella 17 19 2 9, yoyo 15 17 19 7, zebra 10 14 16 17,
elephant 1 12 16 18, goldfish 3 7 8 10, hat 1 2 5 18, kite 4 6 10 15, motorcycle 1 3 9 18, mouse 1 8 9 17, flag 3 9 5
2, frog 3 4 20 9, gametarget 1 2 7 13, hand 2 3 9 16, helmet 5 11 19 13, licenseplate 6 12 13 15, electricfan 1 10 18
20, chameleon 3 6 11 20, crocodile 3 4 10 14, gecko 1 5 16 19, fox 2 3 5 20, giraffe 2 10 13 15, gorilla 4 6 9 13,
hippo 1 7 9 20, horse 1 4 12 15, kangaroo 2 5 11 14, leopard 1 7 16 20, lion 1 5 12 20, lizard 1 3 6 13, microphone 2
6 14 16, monkey 3 4 9 17, shark 2 3 5 6, squirrel 8 11 13 19, volleyball 1 13 18 19"""
LASOT_TEST = [f"{name}-{n}" for name, *numbers in map(str.split, LASOT_TEST.split(",")) for n in numbers]


# ----------------------------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's recipe
# ----------------------------------------------------------------------------------------------------------------------
DEMO = dict(data="shapes", out="out/demo/track", patch_size=8, template_size=40, search_size=64, search_factor=3.2,
            centre_jitter=1.6, head_channels=64, blocks=4, eliminate_blocks=[3], eliminate_from=3, eliminate_to=5,
            keep_rate=0.8, drop_path=0.0, epochs=7, lr_drop=5, pairs=1200, val_pairs=64, batch_size=8, lr=1e-3,
            encoder_lr=0.5, workers=1, log_every=25, eval_every=7)


def parse_args(argv=None, **defaults):
    """Options of the command line, or of the list `argv`; `defaults` stand in for the paper's values (DEMO)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("method (OSTrack-256, paper Sec. 'LaSOT')").add_argument
    add("--model", choices=["auto", *(m for m in MODELS if not m.startswith("hiera"))], default="auto",
        help="encoder; auto: that of --init, or the paper's vit_tiny (12 heads); DeiT-Tiny has 3: deit_tiny")
    add("--init", help="training: encoder to start from, any file of README 'Checkpoints'; "
                       "with --frames: box x,y,w,h of the target in the first frame")
    add("--patch-size", type=int, default=16, help="side of a patch in pixels, if there is no --init to tell")
    add("--blocks", type=int, help="use only so many blocks of the encoder, from the first on; all if absent")
    add("--template-size", type=int, default=128, help="side of the template crop in pixels")
    add("--search-size", type=int, default=256, help="side of the search crop in pixels")
    add("--template-factor", type=float, default=2.0, help="side of the template crop over sqrt(w * h) of the box")
    add("--search-factor", type=float, default=4.0, help="side of the search crop over sqrt(w * h) of the last box")
    add("--head-channels", type=int, default=256,
        help="channels after the head's first convolution; each of the next three halves them")
    add("--eliminate-blocks", type=int, nargs="*", default=[4, 7, 10],
        help="blocks that remove search tokens, counted from 1")
    add("--keep-rate", type=float, default=0.7, help="share of the search tokens that such a block keeps; 1: all")
    add("--eliminate-from", type=int, default=20, help="the keep rate falls from 1 at this epoch ...")
    add("--eliminate-to", type=int, default=100, help="... along half a cosine, to --keep-rate at this epoch")

    add = parser.add_argument_group("data").add_argument
    add("--data", default="lasot=data/lasot,got10k=data/got10k,coco=data/coco,trackingnet=data/trackingnet",
        help="training sets as NAME=FOLDER,...; or 'shapes' for drawn videos")
    add("--data-weights", type=float, nargs="+", help="shares of the sets of --data; equal if absent, as in the paper")
    add("--val-data", help="held-out sets, as --data; if absent, every 50th sequence of each set of --data")
    add("--pairs", type=int, default=60_000, help="template-search pairs per epoch")
    add("--val-pairs", type=int, default=1000, help="held-out pairs")
    add("--max-gap", type=int, default=200, help="frames between template and search, at most")
    add("--centre-jitter", type=float, default=3.0, help="of the search region: uniform in +- half of it * sqrt(w h)")
    add("--scale-jitter", type=float, default=0.25, help="of the search region: standard deviation of log w and log h")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--workers", type=int, default=max(1, min(16, (os.cpu_count() or 2) // processes)),
        help="loader processes per training process")

    add = parser.add_argument_group("recipe (paper Sec. 'LaSOT')").add_argument
    add("--epochs", type=int, default=300)
    add("--batch-size", type=int, default=128, help="pairs per optimizer step over all processes")
    add("--accum-steps", type=int, default=1, help="micro-steps that one batch is split into, per process")
    add("--lr", type=float, default=4e-4, help="learning rate of the head (AdamW)")
    add("--encoder-lr", type=float, default=0.1, help="the encoder's rate is this times --lr")
    add("--lr-drop", type=int, default=240, help="both rates are a tenth from this epoch on")
    add("--weight-decay", type=float, default=1e-4)
    add("--drop-path", type=float, default=0.1, help="of the last block; rates grow linearly from 0")
    add("--clip-grad", type=float, default=0.1, help="largest gradient norm; 0: no clipping")

    add = parser.add_argument_group("use of a trained tracker").add_argument
    add("--eval", help="one-pass evaluation on lasot=FOLDER (the 280 test sequences), or 'shapes'")
    add("--results", help="with --eval: score the text files of this folder, NAME.txt with one x,y,w,h per frame, "
                          "instead of running a tracker")
    add("--allow-partial", action="store_true", help="end without an error although test sequences are missing")
    add("--frames", help="track the target of --init through this folder of images or animated GIF")
    add("--fps", type=float, default=30.0, help="frame rate that 'real time' stands for")
    add("--benchmark", action="store_true", help="frames per second, model alone and end to end")
    add("--checkpoint", help="tracker for all of these; best.pt in --out if absent")
    add("--int", action="store_true", help="write whole pixels, as OSTrack does")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="out/track",
        help="folder for checkpoints, log and results; the same command resumes training there")
    add("--no-resume", action="store_true", help="start again although --out holds a checkpoint")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 on GPUs that have it, fp16 with loss scaling on others, fp32 on mps and cpu")
    add("--seed", type=int, default=0)
    add("--max-steps", type=int, help="stop after so many optimizer steps (the schedule stays that of --epochs)")
    add("--log-every", type=int, default=50, help="optimizer steps per line of log.jsonl")
    add("--eval-every", type=int, default=5, help="epochs between validations; the last epoch always")
    add("--demo", action="store_true", help="defaults for a run without files: train, evaluate, track on drawn videos")
    parser.set_defaults(**defaults)
    return check_numbers(parser.parse_args(argv), zero="workers seed eliminate_from eliminate_to lr_drop")


# ----------------------------------------------------------------------------------------------------------------------
# Data: videos with a box per frame
# ----------------------------------------------------------------------------------------------------------------------
class Sequence(NamedTuple):
    """A video: items that `read` turns into frames (3, H, W) uint8, boxes (N, 4) float64, visible (N,) bool."""
    name: str
    frames: list
    boxes: np.ndarray
    visible: np.ndarray
    read: Callable


class Videos:
    """The sequences of a data set; annotations are read when a sequence is asked for, frames when they are needed."""

    def __init__(self, items, read):
        self.items, self.read = items, read

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.read(self.items[i])


def to_tensor(image):
    """Pillow image of any mode -> (3, H, W) uint8."""
    if image.mode.startswith("I"):    # 16-bit grey, which convert() would clip
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def to_image(frame):
    return Image.fromarray(frame.permute(1, 2, 0).numpy())


def read_frame(file):
    try:
        with Image.open(file) as image:
            return to_tensor(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read frame {file} ({type(error).__name__}): replace it by a good copy") from None


def read_numbers(path, columns):
    """Text file of numbers divided by commas, tabs, spaces or lines -> (N, columns) float64."""
    try:
        text = Path(path).read_text("utf-8-sig").replace(",", " ")
        numbers, lines = text.split(), sum(not line.isspace() for line in text.splitlines() if line)
        if columns > 1 and len(numbers) != columns * lines:
            raise ValueError
        return np.array(numbers, dtype=np.float64).reshape(-1, columns)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: is the data set unpacked completely?") from None
    except ValueError:
        raise InputError(f"{path} does not hold {columns} number(s) per line: replace it by a good copy") from None


def make_sequence(name, frames, boxes, visible=True, read=read_frame):
    """A box without area counts as not visible, whatever the labels say, so it is never sampled."""
    valid = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    if np.ndim(visible) and len(visible) != len(boxes):
        raise InputError(f"sequence {name} has {len(boxes)} boxes and {len(visible)} visibility labels: "
                         "get its files again")
    return Sequence(name, frames, boxes, valid & visible, read)


def read_lasot(folder):
    folder = Path(folder)
    boxes = read_numbers(folder / "groundtruth.txt", 4)
    absent = [read_numbers(folder / f"{label}.txt", 1)[:, 0] > 0 for label in ("full_occlusion", "out_of_view")]
    if len(absent[0]) != len(absent[1]):
        raise InputError(f"{folder}: full_occlusion.txt and out_of_view.txt differ in length: get the files again")
    frames = [f"{folder}/img/{i + 1:08}.jpg" for i in range(len(boxes))]
    return make_sequence(folder.name, frames, boxes, ~(absent[0] | absent[1]))


def read_got10k(folder):
    folder = Path(folder)
    boxes = read_numbers(folder / "groundtruth.txt", 4)
    absent, cover = (read_numbers(folder / f"{label}.label", 1)[:, 0] for label in ("absence", "cover"))
    if len(absent) != len(cover):
        raise InputError(f"{folder}: absence.label and cover.label differ in length: get the files again")
    frames = [f"{folder}/{i + 1:08}.jpg" for i in range(len(boxes))]
    return make_sequence(folder.name, frames, boxes, (absent == 0) & (cover > 0))


def read_trackingnet(annotation):
    annotation = Path(annotation)
    boxes = read_numbers(annotation, 4)
    folder = annotation.parent.parent / "frames" / annotation.stem
    return make_sequence(annotation.stem, [f"{folder}/{i}.jpg" for i in range(len(boxes))], boxes)


def read_still(row, folder):
    """One object of a COCO image, a video of a single frame. row: image id and box."""
    name = f"{int(row[0]):012}.jpg"
    return make_sequence(name, [f"{folder}/{name}"], row[None, 1:])


def list_coco(folder):
    """-> rows (image id, x, y, w, h) of all single objects, and the folder of the images."""
    for file in sorted(folder.glob("annotations/instances_train*.json")):
        split = file.stem.removeprefix("instances_")
        for images in (folder / split, folder / "images" / split):
            if images.is_dir():
                try:
                    rows = [(a["image_id"], *a["bbox"]) for a in json.loads(file.read_text())["annotations"]
                            if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
                    return np.array(rows, dtype=np.float64).reshape(-1, 5), images
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{file} is no COCO annotation of boxes ({type(error).__name__}: {error}): get it "
                                     "again") from None
    return [], folder


def lasot_folders(folder):
    """Sequence name -> folder, for sequences in category folders (airplane/airplane-1) or side by side (airplane-1)."""
    found = [p.parent for pattern in ("*/groundtruth.txt", "*/*/groundtruth.txt") for p in Path(folder).glob(pattern)]
    return {p.name: p for p in sorted(found)}


def open_set(name, folder):
    """A training set by its name in --data -> Videos. Raises InputError if the folder does not hold what it should."""
    folder, read = Path(folder), {"lasot": read_lasot, "got10k": read_got10k, "trackingnet": read_trackingnet}.get(name)
    if name == "lasot":
        items = [str(p) for n, p in lasot_folders(folder).items() if n not in LASOT_TEST]
        layout = "FOLDER/airplane/airplane-2/groundtruth.txt or FOLDER/airplane-2/groundtruth.txt, not in the test list"
    elif name == "got10k":
        items = sorted(str(p.parent) for pattern in ("GOT-10k*/groundtruth.txt", "train/*/groundtruth.txt")
                       for p in folder.glob(pattern))
        layout = "FOLDER/train/GOT-10k_Train_000001/groundtruth.txt"
    elif name == "trackingnet":
        items = sorted(str(p) for pattern in ("anno/*.txt", "TRAIN_*/anno/*.txt") for p in folder.glob(pattern))
        layout = "FOLDER/TRAIN_0/anno/*.txt with frames in FOLDER/TRAIN_0/frames/*/0.jpg (videos unpacked to frames)"
    elif name == "coco":
        items, images = list_coco(folder)
        read = functools.partial(read_still, folder=images)
        layout = "FOLDER/annotations/instances_train2017.json and FOLDER/train2017"
    else:
        raise InputError(f"--data {name}={folder}: the data sets are lasot, got10k, trackingnet and coco, or 'shapes'")
    if not len(items):
        raise InputError(f"--data {name}={folder} holds no training sequence: expected {layout}")
    videos = Videos(items, read)
    first = videos[0]
    for frame in first.frames[:1] + first.frames[-1:]:    # a wrong folder is told now, not in the middle of an epoch
        if not Path(frame).is_file():
            raise InputError(f"sequence {first.name} of --data {name}={folder} lacks its frame {frame}")
    return videos


def open_sets(text):
    """--data or --val-data -> {name: Videos}."""
    if text == "shapes":
        return {"shapes": Videos(range(400), draw_sequence)}
    pairs = [entry.strip().partition("=") for entry in text.split(",")]
    if any(not folder for _, _, folder in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise InputError(f"'{text}' is not a list of data sets: write NAME=FOLDER,NAME=FOLDER,... (each name once), or "
                         "shapes")
    return {name: open_set(name, folder) for name, _, folder in pairs}


def draw_sequence(index, length=60, size=(150, 200)):
    """Video number `index` of an endless toy set: a striped shape among moving shapes that resemble it."""
    rng = np.random.default_rng([11, index])
    h, w = size
    t, n = np.arange(length), 3                                                                # object 0 is the target
    span, speed, phase = rng.uniform(0.2, 0.42, (n, 2)), rng.uniform(0.03, 0.09, (n, 2)), rng.uniform(0, 6.28, (n, 2))
    centres = (0.5 + span * np.sin(speed * t[:, None, None] + phase)) * (w, h)                 # (length, n, 2)
    sides = rng.uniform(14, 24, (n, 2)) * (1 + 0.2 * np.sin(0.1 * t[:, None, None] + rng.uniform(0, 6.28, (n, 1))))
    kinds, colors = rng.integers(0, 4, n), rng.uniform(0, 1, (n, 2, 3))
    stripes = np.stack([rng.uniform(2, 7, n), rng.uniform(0, np.pi, n)], axis=1)               # frequency, direction
    kinds[1], colors[2] = kinds[0], colors[0]                                                  # two resemble it most
    ground = rng.uniform(0.2, 0.8, 3), rng.normal(0, 0.15, 2)
    frames = [(index, size, centres[i], sides[i], kinds, colors, stripes, ground) for i in range(length)]
    boxes = np.concatenate([centres - sides / 2, sides], axis=2)[:, 0]
    return make_sequence(f"shapes-{index}", frames, boxes, read=draw_frame)


def draw_frame(frame):
    """Frame of `draw_sequence` -> (3, H, W) uint8. A shape touches all four sides of its box; the target is on top."""
    index, (h, w), centres, sides, kinds, colors, stripes, (color, slope) = frame
    y, x = np.mgrid[:h, :w] + 0.5
    image = color + (slope[0] * (x / w - 0.5) + slope[1] * (y / h - 0.5))[..., None]
    for i in reversed(range(len(kinds))):
        (cx, cy), (sw, sh), (frequency, angle) = centres[i], sides[i], stripes[i]
        top, left = max(0, int(cy - sh / 2)), max(0, int(cx - sw / 2))
        window = image[top:int(cy + sh / 2) + 1, left:int(cx + sw / 2) + 1]    # a view: writes go through
        y, x = np.mgrid[top:top + window.shape[0], left:left + window.shape[1]] + 0.5
        u, v = 2 * (x - cx) / sw, 2 * (y - cy) / sh
        radius = np.hypot(u, v)
        inside = (radius < 1, np.maximum(abs(u), abs(v)) < 1, abs(u) + abs(v) < 1, abs(radius - 0.75) < 0.25)[kinds[i]]
        stripe = np.sin(frequency * (np.cos(angle) * u + np.sin(angle) * v)) > 0
        window[inside] = colors[i][stripe[inside].astype(int)]
    return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Data: crops and pairs
# ----------------------------------------------------------------------------------------------------------------------
def crop_square(image, box, factor, size):
    """Square around a box, side ceil(factor * sqrt(w * h)), zeros outside the image -> (3, size, size) uint8, side.

    Corners are whole pixels; bilinear without antialiasing, as OSTrack does.
    """
    x, y, w, h = (float(v) for v in box)
    if not (w > 0 and h > 0):
        raise InputError(f"box {x:g},{y:g},{w:g},{h:g} has no area: give x,y,w,h with positive width and height")
    side = math.ceil(math.sqrt(w * h) * factor)
    x1, y1 = round(x + w / 2 - side / 2), round(y + h / 2 - side / 2)
    H, W = image.shape[1:]
    crop = image[:, min(max(y1, 0), H):max(y1 + side, 0), min(max(x1, 0), W):max(x1 + side, 0)]
    left, top = min(max(-x1, 0), side), min(max(-y1, 0), side)
    crop = F.pad(crop, (left, side - left - crop.shape[2], top, side - top - crop.shape[1]))
    return F.interpolate(crop[None], (size, size), mode="bilinear", align_corners=False)[0], side


def box_to_crop(box, around, side, size):
    """Box of a frame -> box of [0, 1] in the crop of `side` around the box `around`, resized to `size` pixels.

    Pixel centres are whole numbers in OSTrack, so the middle of the crop is (size - 1) / 2.
    """
    centre = (box[:2] + box[2:] / 2 - around[:2] - around[2:] / 2) / side + (size - 1) / (2 * size)
    return np.concatenate([centre - box[2:] / side / 2, box[2:] / side])


def box_from_crop(box, around, side, size):
    """The inverse of `box_to_crop`."""
    centre = (box[:2] + box[2:] / 2 - (size - 1) / (2 * size)) * side + around[:2] + around[2:] / 2
    return np.concatenate([centre - box[2:] * side / 2, box[2:] * side])


def jitter_box(rng, box, centre, scale):
    """Where the target may have been found last: w, h times exp(N(0, scale)), off by up to centre / 2 * sqrt(w * h)."""
    extent = box[2:] * np.exp(rng.normal(0, scale, 2))
    middle = box[:2] + box[2:] / 2 + math.sqrt(extent.prod()) * centre * (rng.random(2) - 0.5)
    return np.concatenate([middle - extent / 2, extent])


def sample_pair(rng, visible, max_gap):
    """Causal sampling: a visible template frame, then a visible search frame at most max_gap later -> two indices.

    A still image is paired with itself. None if there is no such pair.
    """
    ids = np.flatnonzero(visible)
    if len(visible) == 1 and len(ids):
        return 0, 0
    ids = ids[:-1][np.diff(ids) <= max_gap] if len(ids) > 1 else ids[:0]    # those with a visible frame close behind
    if not len(ids):
        return None
    template = rng.choice(ids)
    return template, template + 1 + rng.choice(np.flatnonzero(visible[template + 1:template + 1 + max_gap]))


class Pairs(Dataset):
    """Template and search crops of random pairs of frames.

    Item (epoch, index) -> template (3, z, z) and search (3, s, s) uint8, the target's box in the search crop, name.
    All randomness comes from (seed, epoch, index). With train=False, the same pairs every epoch and no augmentation but
    the jitter of the search region, without which there would be nothing to find.
    """

    def __init__(self, sets, weights, n, args, train=True):
        self.sets, self.weights, self.n, self.args, self.train = sets, np.array(weights) / sum(weights), n, args, train

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        args, (epoch, index) = self.args, key if self.train else (0, key)
        rng = np.random.default_rng([args.seed, epoch, index, int(self.train)])
        for _ in range(100):
            videos = self.sets[rng.choice(len(self.sets), p=self.weights)]
            sequence = videos[rng.integers(len(videos))]
            pair = sample_pair(rng, sequence.visible, args.max_gap)
            if pair is None:
                continue
            images = [sequence.read(sequence.frames[i]) for i in pair]
            target, box = (sequence.boxes[i] for i in pair)
            if any(not intersects(b, image) for b, image in zip((target, box), images)):
                continue
            around = jitter_box(rng, box, args.centre_jitter, args.scale_jitter)
            template, _ = crop_square(images[0], target, args.template_factor, args.template_size)
            search, side = crop_square(images[1], around, args.search_factor, args.search_size)
            box, crops = box_to_crop(box, around, side, args.search_size), [template, search]
            if self.train:
                if rng.random() < 0.05:    # grey, both
                    crops = [v2.functional.rgb_to_grayscale(c, 3) for c in crops]
                flips, light = rng.random(2) < 0.5, rng.uniform(0.8, 1.2, 2)
                crops = [c.flip(2) if f else c for c, f in zip(crops, flips)]
                crops = [(c * float(b)).clamp(0, 255).to(torch.uint8) for c, b in zip(crops, light)]
                box[0] = 1 - 1 / args.search_size - box[0] - box[2] if flips[1] else box[0]
            return *crops, torch.from_numpy(box).float(), f"{sequence.name} frames {pair[0]} and {pair[1]}"
        raise InputError("100 sequences drawn at random had no two frames with a visible box inside the image: is the "
                         "annotation of --data complete?")


def intersects(box, image):
    """Whether a box (x, y, w, h) has area inside an image (3, H, W), and is not of another scale than it."""
    H, W = image.shape[1:]
    return (box[0] < W and box[1] < H and box[0] + box[2] > 0 and box[1] + box[3] > 0 and min(box[2:]) > 0
            and max(box[2:]) < 4 * max(H, W))


# ----------------------------------------------------------------------------------------------------------------------
# Method: joint encoder with candidate elimination
# ----------------------------------------------------------------------------------------------------------------------
def block_with_elimination(block, x, ids, keep, centre):
    """A transformer block that keeps `keep` search tokens -> x (B, Z + keep, D), ids (B, keep).

    x (B, Z + S, D), template tokens first; ids (B, S): raster places of the search tokens; centre: the template token
    whose attention (after the softmax over all tokens, mean over heads) ranks the search tokens. What is removed still
    serves as key and value in this block, and is gone before its MLP.
    """
    B, T, D = x.shape
    Z = T - ids.shape[1]
    qkv = block.attn.qkv(block.norm1(x)).view(B, T, 3, block.attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                                                      # 3 x (B, H, T, d)
    row = (q[:, :, centre:centre + 1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)            # (B, H, 1, T)
    top = row.float().softmax(dim=-1).mean(dim=(1, 2))[:, Z:].topk(keep, dim=1).indices       # (B, keep)
    stay = torch.cat([torch.arange(Z, device=x.device).expand(B, -1), Z + top], dim=1)        # (B, Z + keep)
    x = x.gather(1, stay[..., None].expand(-1, -1, D))
    q = q.gather(2, stay[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))            # nobody reads the others
    y = block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
    x = x + block.drop_path(block.ls1(y))
    return x + block.drop_path(block.ls2(block.mlp(block.norm2(x)))), ids.gather(1, top)


class Tracker(nn.Module):
    """OSTrack: a VisionTransformer over template and search tokens together, and a centre head on the search tokens.

    The position tables of both grids are made from the encoder's own, bicubically, and trained in its place.
    """

    def __init__(self, encoder, template_size=128, search_size=256, template_factor=2.0, search_factor=4.0,
                 keep_rate=0.7, eliminate_blocks=(4, 7, 10), head_channels=256, **_):
        super().__init__()
        self.sizes, self.factors = (template_size, search_size), (template_factor, search_factor)
        self.keep_rate, self.eliminate_blocks, p = keep_rate, tuple(eliminate_blocks), encoder.patch_size
        if any(size % p or size < p for size in self.sizes):
            raise InputError(f"--template-size {template_size} and --search-size {search_size} must be multiples of the"
                             f" patch size {p}")
        if not 0 < keep_rate <= 1 or any(not 1 <= b <= encoder.depth for b in self.eliminate_blocks):
            raise InputError(f"--keep-rate must lie in (0, 1], --eliminate-blocks among the blocks 1..{encoder.depth}")
        self.template_side, self.search_side = template_size // p, search_size // p
        self.centre = (self.template_side - 1) // 2 * (self.template_side + 1)    # token in row 3, column 3 of 8 x 8
        tables = [resize_grid(encoder.pos_embed.detach().cpu()[:, 1:], encoder.grid, (n, n)).clone()
                  for n in (self.template_side, self.search_side)]
        self.encoder = encoder
        encoder.template_pos_embed, encoder.search_pos_embed = (nn.Parameter(t) for t in tables)
        encoder.cls_token.requires_grad_(False)    # not used here; kept so that the file is an encoder checkpoint, too
        encoder.pos_embed.requires_grad_(False)
        self.head = CenterHead(encoder.embed_dim, head_channels)
        self.arch = encoder.arch | dict(
            template_size=template_size, search_size=search_size, template_factor=template_factor,
            search_factor=search_factor, keep_rate=keep_rate, eliminate_blocks=list(eliminate_blocks),
            head_channels=head_channels)

    def embed_template(self, images):
        """(B, 3, z, z) normalised -> tokens (B, Z, D). While tracking, this is done once per video."""
        return self.encoder.patch_embed(images) + self.encoder.template_pos_embed

    def forward_features(self, template, images, keep_rate):
        """Template tokens (B, Z, D), search images (B, 3, s, s) -> normalised tokens (B, Z + S, D), template first.

        Search tokens that were eliminated on the way are zero, at their raster place.
        """
        search = self.encoder.patch_embed(images) + self.encoder.search_pos_embed
        (B, Z, D), S = template.shape, search.shape[1]
        x, ids = torch.cat([template, search], dim=1), torch.arange(S, device=search.device).expand(B, -1)
        for number, block in enumerate(self.encoder.blocks, start=1):
            if number in self.eliminate_blocks and keep_rate < 1:
                x, ids = block_with_elimination(block, x, ids, math.ceil(keep_rate * ids.shape[1]), self.centre)
            else:
                x = block(x)
        x = self.encoder.norm(x)
        if ids.shape[1] == S:
            return x
        places = torch.cat([torch.arange(Z, device=ids.device).expand(B, -1), Z + ids], dim=1)    # (B, Z + K)
        return x.new_zeros(B, Z + S, D).scatter(1, places[..., None].expand(-1, -1, D), x)

    def feature_map(self, template, images, keep_rate):
        """-> search tokens as a map (B, D, g, g)."""
        x = self.forward_features(template, images, keep_rate)[:, template.shape[1]:]
        return x.transpose(1, 2).unflatten(2, (self.search_side, self.search_side))

    def forward(self, template, search, keep_rate):
        """Normalised images -> score (B, 1, g, g), size and offset (B, 2, g, g)."""
        return self.head(self.feature_map(self.embed_template(template), search, keep_rate))


# ----------------------------------------------------------------------------------------------------------------------
# Method: centre head
# ----------------------------------------------------------------------------------------------------------------------
class CenterHead(nn.Module):
    """Three stacks of convolutions on the search tokens: score of the centre, box size, offset within the cell."""

    def __init__(self, dim, channels=256):
        super().__init__()
        if channels < 8:
            raise InputError(f"--head-channels {channels} must be at least 8: three layers halve them")
        widths = [dim, channels, channels // 2, channels // 4, channels // 8]
        for branch, outputs in (("ctr", 1), ("size", 2), ("offset", 2)):
            for i in range(1, 5):
                layers = nn.Conv2d(widths[i - 1], widths[i], 3, padding=1), nn.BatchNorm2d(widths[i]), nn.ReLU()
                self.add_module(f"conv{i}_{branch}", nn.Sequential(*layers))
            self.add_module(f"conv5_{branch}", nn.Conv2d(widths[4], outputs, 1))
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def stack(self, branch):
        return [getattr(self, f"conv{i}_{branch}") for i in range(1, 6)]

    def forward(self, x):
        """(B, D, g, g) -> score (B, 1, g, g), size (B, 2, g, g) in [0, 1] of the crop, offset (B, 2, g, g) in cells."""
        score, size, offset = (functools.reduce(lambda y, layer: layer(y), self.stack(branch), x).float()
                               for branch in ("ctr", "size", "offset"))
        return clamped_sigmoid(score), clamped_sigmoid(size), offset


def clamped_sigmoid(x):
    return x.sigmoid().clamp(1e-4, 1 - 1e-4)


def boxes_at(peak, size, offset, side):
    """Cells `peak` (B,) of a side x side grid, size and offset (B, 2) -> boxes (B, 4): centre x, y, width, height."""
    return torch.cat([(torch.stack([peak % side, peak // side], dim=1) + offset) / side, size], dim=1)


def decode(score, size, offset):
    """Head maps -> boxes (B, 4): centre x, y, width, height, at the highest score."""
    peak = score.flatten(1).argmax(dim=1)
    size, offset = (m.flatten(2).gather(2, peak[:, None, None].expand(-1, 2, 1))[..., 0] for m in (size, offset))
    return boxes_at(peak, size, offset, score.shape[-1])


class FusedHead:
    """A trained CenterHead for tracking. Batch norms are folded into the convolutions; size and offset are computed at
    the peak of the score map alone, from the 9 x 9 cells that four 3 x 3 convolutions can see. Same numbers."""

    def __init__(self, head):
        fold = torch.nn.utils.fusion.fuse_conv_bn_eval
        stacks = {branch: [fold(*layer[:2]) for layer in head.stack(branch)[:4]] + head.stack(branch)[4:]
                  for branch in ("ctr", "size", "offset")}
        self.score = stacks["ctr"]
        self.box = [(torch.cat([a.weight, b.weight]), torch.cat([a.bias, b.bias]))    # two groups of one stack
                    for a, b in zip(stacks["size"], stacks["offset"])]

    def __call__(self, x, window):
        """x (B, D, g, g), window (g, g) -> boxes (B, 4), centre x, y, width, height, and scores (B,) at the peak of
        score * window."""
        (B, _, g, _), y = x.shape, x
        for conv in self.score[:-1]:
            y = F.relu(conv(y))
        score = clamped_sigmoid(self.score[-1](y).float())[:, 0]
        peak = (score * window).flatten(1).argmax(dim=1)

        cells = torch.arange(9, device=x.device)
        rows, cols = (peak // g)[:, None] + cells, (peak % g)[:, None] + cells                 # in the map padded by 4
        place = torch.arange(B, device=x.device)[:, None, None], rows[:, :, None], cols[:, None]
        inside = F.pad(x.new_ones(B, g, g), (4, 4, 4, 4))[place][:, None]                      # (B, 1, 9, 9)
        y = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)[place].permute(0, 3, 1, 2).contiguous()    # (B, D, 9, 9)
        for i, (weight, bias) in enumerate(self.box[:-1], start=1):
            y = F.relu(F.conv2d(y, weight, bias, groups=1 if i == 1 else 2))                  # (B, 2 C, 9 - 2i, 9 - 2i)
            y = y * inside[..., i:9 - i, i:9 - i]    # beyond the map the next layer sees zeros, not this one's output
        y = F.conv2d(y, *self.box[-1], groups=2).flatten(1).float()                             # (B, 4)
        return boxes_at(peak, clamped_sigmoid(y[:, :2]), y[:, 2:], g), score.flatten(1).gather(1, peak[:, None])[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Method: losses
# ----------------------------------------------------------------------------------------------------------------------
def gaussian_radius(w, h, overlap=0.7):
    """Radius in cells: boxes whose corners move that far still overlap that much. All roots over 2, as in CornerNet."""
    b1, c1 = w + h, w * h * (1 - overlap) / (1 + overlap)
    b2, c2 = 2 * (w + h), (1 - overlap) * w * h
    b3, c3 = -2 * overlap * (w + h), (overlap - 1) * w * h
    roots = ((b1 + (b1 ** 2 - 4 * c1).sqrt()) / 2, (b2 + (b2 ** 2 - 16 * c2).sqrt()) / 2,
             (b3 + (b3 ** 2 - 16 * overlap * c3).sqrt()) / 2)
    return torch.stack(roots).min(dim=0).values.clamp(min=0).floor()


def gaussian_target(boxes, side):
    """Score map to learn (B, side, side) for boxes (B, 4), x, y, w, h in [0, 1]: 1 in the cell of the centre, around it
    a Gaussian of sigma = (2 r + 1) / 6, zero farther than r cells away."""
    w, h = (boxes[:, 2:] * side).clamp(min=0).unbind(1)
    cx, cy = ((boxes[:, :2] + boxes[:, 2:] / 2) * side).round().unbind(1)
    radius, cells = gaussian_radius(w, h)[:, None], torch.arange(side, device=boxes.device)
    dx, dy, sigma = cells - cx[:, None], cells - cy[:, None], (2 * radius + 1) / 6
    gx, gy = (torch.exp(-d ** 2 / (2 * sigma ** 2)) * (d.abs() <= radius) for d in (dx, dy))   # (B, side) each
    return gy[:, :, None] * gx[:, None]


def focal_loss(score, target, alpha=2, beta=4):
    """CornerNet's focal loss of probabilities (B, 1, g, g), summed and divided by the number of ones in the target."""
    hit = target == 1
    positive = (1 - score) ** alpha * score.log()
    negative = (1 - target) ** beta * score ** alpha * (1 - score).log()
    return -torch.where(hit, positive, negative).sum() / hit.sum().clamp(min=1)


def corners(boxes):
    """x, y, w, h -> x1, y1, x2, y2."""
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def box_iou(a, b):
    """IoU of boxes (N, 4) with boxes (N, 4), x, y, w, h -> (N,); 0 where both are empty."""
    extent = (torch.minimum(corners(a), corners(b))[:, 2:] - torch.maximum(a, b)[:, :2]).clamp(min=0)
    inter = extent.prod(dim=1)
    return inter / (a[:, 2:].prod(dim=1) + b[:, 2:].prod(dim=1) - inter).clamp(min=1e-12)


def to_xywh(boxes):
    """Centre x, y, w, h -> x, y, w, h."""
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], dim=1)


def tracking_losses(score, size, offset, boxes):
    """L = L_focal + 2 L_GIoU + 5 L_1 of head maps against boxes (B, 4), x, y, w, h in the crop -> dict of scalars."""
    focal = focal_loss(score, gaussian_target(boxes, score.shape[-1])[:, None])
    pred = to_xywh(decode(score, size, offset))
    a, b = corners(pred), corners(boxes).clamp(0, 1)    # what reaches out of the crop cannot be seen
    giou, l1 = torchvision.ops.generalized_box_iou_loss(a, b, reduction="mean"), F.l1_loss(a, b)
    iou = box_iou(pred.detach(), boxes).mean()
    return {"loss": focal + 2 * giou + 5 * l1, "focal": focal, "giou": giou, "l1": l1, "iou": iou}


def keep_rate_at(epoch, args):
    """Share of search tokens kept: 1 until --eliminate-from, then half a cosine to --keep-rate at --eliminate-to."""
    t = (epoch - args.eliminate_from) / max(1, args.eliminate_to - args.eliminate_from)
    return args.keep_rate + (1 - args.keep_rate) / 2 * (1 + math.cos(math.pi * min(max(t, 0), 1)))


# ----------------------------------------------------------------------------------------------------------------------
# Method: following a target
# ----------------------------------------------------------------------------------------------------------------------
def hann_window(side):
    """Hann window (side, side) without its zero border: prefers the middle of the region, where the target was."""
    line = 0.5 * (1 - torch.cos(2 * math.pi * torch.arange(1, side + 1) / (side + 1)))
    return line[:, None] * line


def clip_box(box, height, width, margin=10):
    """Box with at least `margin` pixels of it inside the frame and at least that wide and high."""
    (x1, y1), (x2, y2) = box[:2], box[:2] + box[2:]
    x1, x2 = min(max(0, x1), width - margin), min(max(margin, x2), width)
    y1, y2 = min(max(0, y1), height - margin), min(max(margin, y2), height)
    return np.array([x1, y1, max(margin, x2 - x1), max(margin, y2 - y1)])


class OnePassTracker:
    """Follows one target: start(frame, box), then step(frame) -> box, score for every further frame.

    Frames are (3, H, W) uint8, boxes x, y, w, h in pixels.
    """

    def __init__(self, model, mean, std, device, dtype=torch.float32):
        self.model, self.mean, self.std, self.device, self.dtype = model.to(device).eval(), mean, std, device, dtype
        self.head, self.window = FusedHead(self.model.head), hann_window(model.search_side).to(device)

    def crop(self, frame, box, which):
        crop, side = crop_square(frame, box, self.model.factors[which], self.model.sizes[which])
        return normalize(crop[None].to(self.device), self.mean, self.std).contiguous(), side

    @torch.inference_mode()
    def start(self, frame, box):
        if not intersects(box, frame):
            H, W = frame.shape[1:]
            raise InputError(f"box {','.join(f'{v:g}' for v in box)} has no area inside the frame of {W} x {H} pixels: "
                             "give x,y,w,h of the target")
        self.box = np.asarray(box, dtype=np.float64)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            self.template = self.model.embed_template(self.crop(frame, self.box, 0)[0])

    @torch.inference_mode()
    def locate(self, search):
        """Normalised search crop (1, 3, s, s) -> [centre x, y, width, height, score] in the crop."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.model.feature_map(self.template, search, self.model.keep_rate)
            box, score = self.head(x, self.window)
        return torch.cat([to_xywh(box)[0], score]).tolist()    # the one wait for the device per frame

    def step(self, frame):
        search, side = self.crop(frame, self.box, 1)
        *box, score = self.locate(search)
        box = box_from_crop(np.array(box), self.box, side, self.model.sizes[1])
        self.box = clip_box(box, *frame.shape[1:])
        return self.box, score

    def follow(self, frames, box):
        """All frames of an iterable -> yields box, score; the first box is the given one, its score 1."""
        for number, frame in enumerate(frames):
            if number == 0:
                self.start(frame, box)
            yield (self.box, 1.0) if number == 0 else self.step(frame)


def build_tracker(args):
    """Tracker on a fresh encoder, or on that of --init -> tracker, mean, std that the encoder was trained with."""
    name, patch, info, side = "vit_tiny", args.patch_size, {}, 14 * args.patch_size
    if args.init:
        state, info = load_state(args.init)
        name, patch = infer_model(args.init)
        side = patch * round((state["pos_embed"].shape[1] - 1) ** 0.5)    # of a square grid; own files tell, see below
    name, arch = name if args.model == "auto" else args.model, info.get("arch", {})
    if name.startswith("hiera") or arch.get("rel_pos_bias"):
        kind = "a Hiera" if name.startswith("hiera") else "an encoder with relative position bias"
        raise InputError(f"--init {args.init} is {kind}: template and search tokens go through the blocks together, "
                         "which needs a plain ViT")
    encoder = MODELS[name](img_size=arch.get("img_size", side), patch_size=patch, drop_path=args.drop_path,
                           layer_scale=arch.get("layer_scale"))
    if args.init:
        load_encoder(encoder, args.init)
    if args.blocks:
        if args.blocks > encoder.depth:
            raise InputError(f"--blocks {args.blocks}: the encoder has {encoder.depth}")
        encoder.blocks = encoder.blocks[:args.blocks]
        for i, block in enumerate(encoder.blocks):
            block.drop_path.rate = args.drop_path * i / max(1, args.blocks - 1)
        encoder.depth = encoder.arch["depth"] = len(encoder.blocks)
    return Tracker(encoder, **vars(args)), info.get("mean", IMAGENET_MEAN), info.get("std", IMAGENET_STD)


def load_tracker(args, device):
    """The trained tracker of --checkpoint, ready to follow."""
    path = args.checkpoint or Path(args.out) / "best.pt"
    file = read_file(path)
    arch = file.get("arch") if isinstance(file, dict) else None
    if not isinstance(arch, dict) or "search_size" not in arch:
        raise InputError(f"checkpoint {path} is no tracker: train one, and give its best.pt by --checkpoint")
    try:
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "layer_scale")
        model = Tracker(VisionTransformer(**{k: arch[k] for k in names}), **arch)
        model.load_state_dict(file["model"])
        return OnePassTracker(model, file["mean"], file["std"], device, amp_dtype(args.dtype, device))
    except (KeyError, RuntimeError) as error:
        raise InputError(f"checkpoint {path} is no complete tracker: {str(error).splitlines()[0]}") from None


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
# Evaluation: validation pairs, one-pass evaluation
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def validate(model, loader, args, world, device):
    """Mean IoU and score over held-out pairs at the final keep rate, each pair once at any world size -> dict."""
    model.eval()
    sums, dtype = torch.zeros(3, device=device), amp_dtype(args.dtype, device)
    for buffer in model.buffers() if world > 1 else ():    # batch statistics of process 0, which also saves
        dist.broadcast(buffer, 0)
    for template, search, boxes, _ in loader:
        template, search = (normalize(x.to(device), args.mean, args.std) for x in (template, search))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            score, size, offset = model(template, search, args.keep_rate)
        iou = box_iou(to_xywh(decode(score, size, offset)), boxes.to(device))
        sums += torch.stack([iou.sum(), score.flatten(1).amax(dim=1).sum(), iou.new_tensor(len(iou))])
    if world > 1:
        dist.all_reduce(sums)
    iou, score, n = sums.tolist()
    return {"val_iou": iou / n, "val_score": score / n, "val_pairs": int(n)}


SUCCESS, PIXELS, NORMED = torch.arange(21) / 20, torch.arange(51.0), torch.arange(51) / 100    # thresholds of curves


def score_sequence(boxes, truth, visible):
    """One-pass evaluation of one video, arrays (N, 4), (N, 4), (N,) -> success (21,), precision (51,), normalised
    precision (51,): shares of frames with IoU > t, centre error <= t pixels, centre error over box size <= t.

    As the toolkits of LaSOT and OSTrack do: the first box counts as the true one, a box without size is the one before
    it, a frame in which the target is absent or has no box fails, but counts.
    """
    boxes = np.array(boxes, dtype=np.float64)
    boxes[0] = truth[0]
    for i in range(1, len(boxes)):
        if not (np.isfinite(boxes[i]).all() and (boxes[i, 2:] > 0).all()):
            boxes[i] = boxes[i - 1]
    boxes, truth = torch.from_numpy(boxes), torch.from_numpy(np.asarray(truth, dtype=np.float64))
    present = torch.from_numpy(np.asarray(visible)) & (truth[:, 2:] > 0).all(dim=1)
    iou = torch.where(present, box_iou(boxes, truth), -1.0)
    shift = (boxes[:, :2] + boxes[:, 2:] / 2) - (truth[:, :2] + truth[:, 2:] / 2)
    error, normed = (torch.where(present, e.norm(dim=1), torch.inf) for e in (shift, shift / truth[:, 2:]))
    return ((iou[:, None] > SUCCESS).double().mean(dim=0), (error[:, None] <= PIXELS).double().mean(dim=0),
            (normed[:, None] <= NORMED).double().mean(dim=0))


def open_test_set(text):
    """--eval -> names that make up the set, {name: function that opens the sequence}."""
    if text == "shapes":
        found = {f"shapes-{i}": functools.partial(draw_sequence, i) for i in range(2000, 2012)}
        return list(found), found
    name, _, folder = text.partition("=")
    if name != "lasot" or not folder:
        raise InputError(f"--eval {text}: write lasot=FOLDER, or shapes")
    found = {n: functools.partial(read_lasot, p) for n, p in lasot_folders(folder).items() if n in LASOT_TEST}
    if not found:
        raise InputError(f"--eval {text}: none of the 280 test sequences is there; expected "
                         "FOLDER/airplane/airplane-1/groundtruth.txt or FOLDER/airplane-1/groundtruth.txt")
    return LASOT_TEST, found


def read_ahead(items, read):
    """Frames of `items`, each read in another thread while the one before is tracked."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, items[0])
        for item in items[1:]:
            frame, coming = coming.result(), pool.submit(read, item)
            yield frame
        yield coming.result()


def write_boxes(path, boxes, whole=False):
    """One x,y,w,h per line and frame; whole: without decimals, cut off as OSTrack does."""
    text = "\n".join(",".join(f"{int(v)}" if whole else f"{v:.2f}" for v in box) for box in boxes) + "\n"
    Path(f"{path}.tmp").write_text(text)
    os.replace(f"{path}.tmp", path)


def evaluate(args):
    """One-pass evaluation of a tracker, or of text files: results/*.txt, sequences.csv, curves.csv, curves.png."""
    rank, world, device = init_distributed(args.device)
    say = print if rank == 0 else lambda *_: None
    names, found = open_test_set(args.eval)
    out, folder = Path(args.out), Path(args.results or Path(args.out) / "results")
    out.mkdir(parents=True, exist_ok=True)
    if args.results:
        found = {n: read for n, read in found.items() if (folder / f"{n}.txt").is_file()}
        if not found:
            raise InputError(f"--results {folder} holds no {names[0]}.txt nor any other of the {len(names)} sequences: "
                             "one x,y,w,h per frame in a file named after the sequence")
    else:
        tracker = load_tracker(args, device)
        folder.mkdir(exist_ok=True)
    chosen, missing = [n for n in names if n in found], [n for n in names if n not in found]

    # sequences are dealt out to the processes; every row of the table is filled by one of them
    table, frames, begun = torch.zeros(len(chosen), 21 + 51 + 51 + 2), 0, time.perf_counter()
    for i in tqdm(range(rank, len(chosen), world), desc="sequences", disable=rank != 0):
        sequence, file = found[chosen[i]](), folder / f"{chosen[i]}.txt"
        n = len(sequence.boxes)
        if not n or not sequence.boxes[0, 2:].min() > 0:
            raise InputError(f"sequence {chosen[i]} has no box with area in its first frame: get its files again")
        if not args.results:
            following = tracker.follow(read_ahead(sequence.frames, sequence.read), sequence.boxes[0])
            bar = tqdm(following, total=n, desc=sequence.name, leave=False, disable=rank != 0)
            write_boxes(file, [box for box, _ in bar], args.int)
        boxes, still = read_numbers(file, 4), sequence.boxes[:1].repeat(n, axis=0)
        if len(boxes) < n:
            raise InputError(f"{file} has {len(boxes)} boxes, the sequence {n} frames: track it again")
        curves = score_sequence(boxes[:n], sequence.boxes, sequence.visible)
        still = score_sequence(still, sequence.boxes, sequence.visible)[0].mean()
        table[i], frames = torch.cat([*curves, torch.tensor([still, n])]), frames + n
    speed = frames / (time.perf_counter() - begun)
    if world > 1:
        table = table.to(device)
        dist.all_reduce(table)
        table = table.cpu()

    success, precision, normed, still, n = table.split((21, 51, 51, 1, 1), dim=1)
    scores = 100 * torch.stack([success.mean(dim=1), precision[:, 20], normed[:, 20]], dim=1)    # AUC, P, P_norm
    auc, p, p_norm = scores.mean(dim=0).tolist()
    partial = " PARTIAL" if missing else ""
    if rank == 0:
        with open(out / "sequences.csv", "w", newline="") as file:
            rows = [(name, int(k), *(f"{v:.2f}" for v in row)) for name, k, row in zip(chosen, n, scores.tolist())]
            csv.writer(file).writerows([("sequence", "frames", "AUC", "P", "P_norm"), *rows])
        curves = {f"success by IoU, AUC {auc:.1f}{partial}": (SUCCESS, success),
                  f"precision by pixels, P {p:.1f}{partial}": (PIXELS, precision),
                  f"normalised precision, P_norm {p_norm:.1f}{partial}": (NORMED, normed)}
        curves = {title: list(zip(x.tolist(), y.mean(dim=0).tolist())) for title, (x, y) in curves.items()}
        with open(out / "curves.csv", "w", newline="") as file:
            rows = [(k.split()[0], f"{x:.2f}", f"{y:.5f}") for k, curve in curves.items() for x, y in curve]
            csv.writer(file).writerows([("curve", "threshold", "share of frames"), *rows])
        draw_curves(out / "curves.png", {title: {"": curve} for title, curve in curves.items()})
    say(f"evaluated {len(chosen)}/{len(names)} sequences, {int(n.sum())} frames"
        + (f", {speed:.1f} frames/s per process" if not args.results else "")
        + (f":{partial}, without {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}" if missing else ""))
    say(f"AUC {auc:.1f}, P {p:.1f}, P_norm {p_norm:.1f}{partial}; a box that never moves: AUC {100 * still.mean():.1f}")
    say(f"{folder}/*.txt, {out}/sequences.csv, {out}/curves.csv, {out}/curves.png")
    if missing and not args.allow_partial:
        raise InputError(f"{len(missing)} of {len(names)} sequences are missing, so these are no scores of the whole "
                         "set; --allow-partial accepts that")


# ----------------------------------------------------------------------------------------------------------------------
# Your own frames, frames per second
# ----------------------------------------------------------------------------------------------------------------------
def read_gif(path):
    try:
        with Image.open(path) as gif:
            return [to_tensor(frame) for frame in ImageSequence.Iterator(gif)]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read --frames {path} ({type(error).__name__}): is it a complete GIF?") from None


def track_frames(args):
    """--frames: boxes.txt, one x,y,w,h per frame, and overlay.gif."""
    _, _, device = init_distributed(args.device)
    path, out = Path(args.frames), Path(args.out)
    if not 0.1 <= args.fps <= 1000:
        raise InputError(f"--fps {args.fps} must lie between 0.1 and 1000")
    try:
        box = [float(v) for v in (args.init or "").split(",")]
        x, y, w, h = box
    except ValueError:
        raise InputError("--frames needs --init x,y,w,h, the target's box in the first frame in pixels, not "
                         f"'{args.init or ''}'") from None
    if path.is_dir():
        items, read = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_TYPES], read_frame
        items.sort(key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)])    # 2 before 10
    elif path.suffix.lower() == ".gif" and path.is_file():
        items, read = read_gif(path), lambda frame: frame
    else:
        items, read = [], None
    if not items:
        raise InputError(f"--frames {path} is neither a folder with images ({', '.join(sorted(IMAGE_TYPES))}) nor a "
                         "GIF; ffmpeg -i video.mp4 folder/%06d.jpg unpacks a video")
    tracker = load_tracker(args, device)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    found = list(tqdm(tracker.follow(read_ahead(items, read), box), total=len(items), desc="frames"))
    speed = len(items) / (time.perf_counter() - begun)
    write_boxes(out / "boxes.txt", [b for b, _ in found], args.int)
    draw_overlay(out / "overlay.gif", items, read, found, args.fps)
    print(f"{len(items)} frames at {speed:.1f} frames/s, reading included, {speed / args.fps:.2f} x real time (of "
          f"{args.fps:g} frames/s); mean score {np.mean([s for _, s in found]):.2f}\n{out}/boxes.txt, "
          f"{out}/overlay.gif")


def draw_overlay(path, items, read, found, fps, most=150):
    """Animated GIF of the frames with box and score; a long video is thinned out to `most` frames at its own speed."""
    every, pictures = math.ceil(len(items) / most), []
    for item, (box, score) in list(zip(items, found))[::every]:
        frame = to_image(read(item))
        zoom = min(480 / max(frame.size), 3)
        frame = frame.resize([max(1, round(v * zoom)) for v in frame.size], Image.Resampling.BOX)
        frame = frame.quantize(253, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)    # keeps rare colours
        used = (frame.getpalette() + [0] * 3 * 253)[:3 * 253]
        frame.putpalette(used + [255, 32, 32, 255, 255, 255, 0, 0, 0])                             # red, white, black
        draw, (x, y, w, h) = ImageDraw.Draw(frame), box * zoom
        draw.rectangle([x - 2, y - 2, x + w + 1, y + h + 1], outline=253, width=3)
        draw.text((6, 4), f"score {score:.2f}", 254, ImageFont.load_default(16), stroke_width=2, stroke_fill=255)
        pictures.append(frame)
    pace = max(20, round(1000 * every / fps))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=pace, loop=0)


def benchmark(args, seconds=5.0, warmup=10):
    """--benchmark: frames per second of the model alone, and from JPEG bytes to a box in pixels -> both."""
    _, _, device = init_distributed(args.device)
    path = Path(args.checkpoint or Path(args.out) / "best.pt")
    if path.is_file() or args.checkpoint:
        tracker, said = load_tracker(args, device), str(path)
    else:
        tracker, said = OnePassTracker(*build_tracker(args), device, amp_dtype(args.dtype, device)), "random head"
    scene = draw_sequence(0, length=16, size=(720, 1280))
    files = [io.BytesIO() for _ in scene.frames]
    for frame, file in zip(scene.frames, files):
        to_image(draw_frame(frame)).save(file, "JPEG", quality=90)
    box = np.array([600.0, 300.0, 120.0, 90.0])
    tracker.start(draw_frame(scene.frames[0]), box)
    search = tracker.crop(draw_frame(scene.frames[1]), box, 1)[0]

    def end_to_end(i):
        tracker.box = box    # a random head would let it grow
        tracker.step(read_frame(files[i % len(files)]))

    rates = []
    for step in (lambda i: tracker.locate(search), end_to_end):    # `locate` waits for the device, so times are true
        for i in range(warmup):
            step(i)
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            begun = time.perf_counter()
            step(len(times))
            times.append(time.perf_counter() - begun)
        rates.append(1 / np.median(times))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{said}: {'/'.join(map(str, tracker.model.sizes))} pixels, keep rate {tracker.model.keep_rate} in blocks "
          f"{tracker.model.eliminate_blocks}\n{device} ({name}), {tracker.dtype}, median of {seconds:g} s after a "
          f"warm-up of {warmup} frames\n"
          f"model only {rates[0]:.1f} frames/s; end to end, from 1280 x 720 JPEG to box, {rates[1]:.1f} frames/s")
    return rates


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------
def make_data(args):
    """-> training pairs, held-out pairs, one line that says what they are."""
    sets = open_sets(args.data)
    weights = args.data_weights or [1.0] * len(sets)
    if len(weights) != len(sets) or min(weights) < 0 or sum(weights) <= 0:
        raise InputError(f"--data-weights {weights} must be {len(sets)} shares, one for each set of --data")
    if args.val_data:
        held, train, said = list(open_sets(args.val_data).values()), list(sets.values()), args.val_data
    else:    # a set of one sequence has none to spare: it is validated on it
        held = [Videos(v.items[::50], v.read) for v in sets.values()]
        train = [Videos([x for i, x in enumerate(v.items) if i % 50] or v.items, v.read) for v in sets.values()]
        said = "every 50th sequence"
    counts = ", ".join(f"{name} {len(v)}" for name, v in zip(sets, train))
    said = f"training sequences: {counts}; held out: {sum(map(len, held))} ({said})"
    return Pairs(train, weights, args.pairs, args), Pairs(held, [1.0] * len(held), args.val_pairs, args, False), said


def train(args):
    """One training run with resume and validation: last.pt, best.pt, log.jsonl, training.png."""
    rank, world, device = init_distributed(args.device)
    say = print if rank == 0 else lambda *_: None
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    # tracker
    raw, args.mean, args.std = build_tracker(args)
    raw.to(device)
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (raw.encoder, raw.head)]
    say(f"encoder {sizes[0]:.2f}M parameters{f' from {args.init}' if args.init else ', random'}, head {sizes[1]:.2f}M; "
        f"{raw.template_side ** 2} template + {raw.search_side ** 2} search tokens")

    # data
    train_set, val_set, said = make_data(args)
    say(said)
    batches = EpochBatches(len(train_set), args.batch_size, args.accum_steps, rank, world, args.seed)
    loading = dict(num_workers=args.workers, pin_memory=device.type == "cuda")
    loader = DataLoader(train_set, batch_sampler=batches, persistent_workers=args.workers > 0, **loading)
    val_loader = DataLoader(Subset(val_set, range(rank, len(val_set), world)), batches.per_process, **loading)

    # recipe
    total = args.epochs * batches.steps
    until = min(total, args.max_steps or total)
    dtype = amp_dtype(args.dtype, device)
    say(f"{batches.per_process} pairs x {world} process(es) x {args.accum_steps} accumulation = batch {batches.batch}; "
        f"lr {args.lr:g}, encoder {args.encoder_lr * args.lr:g}, both a tenth from epoch {args.lr_drop} on; "
        f"{batches.steps} steps per epoch; {device}, {dtype}")
    groups = [group | {"lr_scale": scale} for part, scale in ((raw.encoder, args.encoder_lr), (raw.head, 1.0))
              for group in param_groups(part, args.weight_decay)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, state = 0, -1.0, resume(out / "last.pt", args, len(train_set))
    if state:
        raw.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
        say(f"{out}/last.pt: {'finished already' if step >= until else 'going on'} after step {step} of {total}")
    open_log(out / "log.jsonl", rank, args, step)
    model = raw
    if world > 1:
        model = DistributedDataParallel(raw, device_ids=[device.index] if device.type == "cuda" else None,
                                        gradient_as_bucket_view=True)

    def losses_of(model, batch):
        template, search = (normalize(x.to(device, non_blocking=True), args.mean, args.std) for x in batch[:2])
        maps = model(template, search, keep_rate_at(batches.epoch + 1, args))    # OSTrack counts epochs from 1
        with torch.autocast(device.type, enabled=False):
            return tracking_losses(*maps, batch[2].to(device, non_blocking=True))

    def names_of(batch):
        return list(batch[3])

    def lr_of(step):
        return args.lr * (0.1 if step // batches.steps >= args.lr_drop else 1)

    def save(name, **training):
        if rank == 0:
            save_checkpoint(out / name, model=raw.state_dict(), arch=raw.arch, mean=list(args.mean), std=list(args.std),
                            args=json.loads(json.dumps(vars(args))), step=step, best=best, **training)

    def save_last():
        save("last.pt", optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), images=len(train_set))

    def judge():
        nonlocal best
        values = validate(raw, val_loader, args, world, device)
        log_line(out / "log.jsonl", rank, step=step, **values)
        say(f"step {step}: held-out IoU {values['val_iou']:.3f}, score {values['val_score']:.2f}")
        if values["val_iou"] > best:
            best = values["val_iou"]
            save("best.pt")

    # training
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while step < until:
        batches.epoch, batches.start = divmod(step, batches.steps)
        step, stopped = train_epoch(model, loader, losses_of, names_of, optimizer, scaler, lr_of, step, until, total,
                                    args, rank, world, device, stop)
        save_last()
        if stopped:
            raise SystemExit(f"stopped by SIGTERM after step {step}; the same command goes on from {out}/last.pt")
        if step < until and step % (batches.steps * args.eval_every) == 0:
            judge()
            save_last()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)    # nothing left to save
    judge()
    save_last()

    if rank == 0:
        lines = read_log(out / "log.jsonl")
        losses, ious = ({k: [(v["step"], v[k]) for v in lines if k in v] for k in keys}
                        for keys in (("focal", "giou", "l1"), ("iou", "val_iou")))
        draw_curves(out / "training.png", {"losses by step": losses, "IoU by step": ious})
        print(f"best held-out IoU {best:.3f}; {out}/best.pt, {out}/training.png, {out}/log.jsonl")


def main(args):
    task = evaluate if args.eval else track_frames if args.frames else benchmark if args.benchmark else train
    if args.results and not args.eval:
        raise InputError("--results holds boxes, --eval says of what: give --eval lasot=FOLDER, too")
    return task(args)


def demo():
    """Train, evaluate and track on drawn videos, three ordinary runs."""
    args, encoder = parse_args(**DEMO), "out/demo/encoder.pt"    # of pretrain_d2mae.py --demo
    args.init = args.init or (encoder if Path(encoder).is_file() else None)
    main(args)
    args.eval = "shapes"
    main(args)
    video, folder = draw_sequence(2001), Path(args.out) / "frames"
    folder.mkdir(exist_ok=True)
    for i, frame in enumerate(video.frames):
        to_image(draw_frame(frame)).save(folder / f"{i}.png")
    args.eval, args.frames, args.init = None, folder, ",".join(map(str, video.boxes[0]))
    main(args)


if __name__ == "__main__":
    try:
        arguments = parse_args()
        demo() if arguments.demo else main(arguments)
    except (InputError, FloatingPointError, OSError) as error:    # after a loader process's traceback, its last line
        sys.exit(f"error: {str(error).strip().splitlines()[-1].removeprefix('models.InputError: ')}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
