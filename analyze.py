"""Layer similarity, attention statistics, probes, cost and curves for any checkpoints (paper Figs. 1, 3, 4 and 5).

    python analyze.py cka DeiT=deit_tiny:deit.pth MAE=mae.pt D2-MAE=out/pretrain/encoder.pt                 # Fig. 3
    python analyze.py attention MAE=mae.pt D2-MAE=out/pretrain/encoder.pt --data data/imagenet/val          # Fig. 5
    python analyze.py probe random MAE=mae.pt D2-MAE=out/pretrain/encoder.pt --data FOLDER_OF_CLASS_FOLDERS
    python analyze.py layers MAE=out/sweep_mae/fig4.csv D2-MAE=out/sweep_d2/fig4.csv                        # Fig. 4
    python analyze.py cost vit_tiny vit_tiny+rpe hiera_tiny --points tests/assets/fig1.csv                  # Fig. 1
    python analyze.py curves MAE=out/mae/log.jsonl D2-MAE=out/pretrain/log.jsonl
    python analyze.py --demo                                                                                # all of it

A model is [LABEL=]SOURCE. SOURCE is a checkpoint of README, "Checkpoints"; MODEL:FILE, where the head count is not the
one of vit_tiny, vit_base, ... (it cannot be seen in weights); the name of an untrained model (vit_tiny, vit_tiny+rpe,
hiera_tiny, ...); or `random`, an untrained copy of the first other model. Every command writes a picture and the
numbers behind it as .csv to --out. Nothing here trains, and every map and feature is an explicit return value.

Shapes: B images, N patches, D width, H heads, Q queries and K keys of an attention map, n images of a CKA batch.
        Layers are counted from 1, as in the paper; layer 0 is the patch embedding.

NOTES, departures from the authors' code:
- Attention distance is in pixels: grid distance times patch size. The authors multiply by 14 for patches of 16 pixels,
  so their numbers are 14/16 of these. Entropy has no + 1e-6 inside the logarithm (a difference below 2e-4 nats).
- CKA centres each Gram matrix once per layer and batch and takes the HSICs of all pairs of layers from one product.
- The representation of a layer is the next block's first LayerNorm of its output, the final norm for the last (Fig. 2).
  In D2-MAE files that final norm was trained on block 8. Hiera has none before its decoder: a LayerNorm without scale
  and bias stands for it.
- Hiera: maps of mask-unit blocks are over the tokens of one unit; pooled queries lie at the centre of their 4 tokens.
"""
import argparse
import csv
import io
import json
import math
import os
import statistics
import sys
import textwrap
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.ImageColor import getrgb
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from models import (IMAGENET_MEAN, IMAGENET_STD, MODELS, InputError, infer_model, load_encoder, load_state, normalize,
                    unroll)

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """A command with its options; each command is the function of that name below."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--demo", action="store_true", help="every command on drawn images, with the encoders that the "
                        "--demo of the other scripts left in out/demo, else untrained ones")
    commands = parser.add_subparsers(title="commands (each has its own --help)", metavar="COMMAND")

    def command(run, help, *, inputs="models", data=False):
        """Subparser that calls `run`, with the options that commands share -> its add_argument."""
        sub = commands.add_parser(run.__name__, help=help, description=help,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        add = sub.add_argument
        add(inputs, nargs="+", metavar=f"LABEL={inputs[:-1].upper()}", help="'LABEL=' may be absent; the head of "
            "this file lists what can be given")
        add("--out", default="out/analyze", help="folder for pictures and tables")
        if inputs == "models":
            add("--image-size", type=int, nargs="+", help="side, or height and width, in pixels; if absent, the "
                "largest that the files store, else 224; position tables are resized to it")
            add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
            add("--seed", type=int, default=0, help="of the choice of images and of untrained weights")
        if data:
            add("--data", default="data/imagenet/val", help="folder of images, or 'shapes' for drawn ones")
            add("--images", type=int, default=1024, help="at most so many, drawn at random from all of --data")
            add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that read images")
        return add

    add = command(cka, "similarity of the layers of the first model with those of each other one (Fig. 3)", data=True)
    add("--batch-size", type=int, default=128, help="images per minibatch of the unbiased HSIC")
    add = command(attention, "distance and entropy of every attention head (Fig. 5)", data=True)
    add("--batch-size", type=int, default=32, help="images per forward pass; the result does not depend on it")
    add = command(probe, "few-shot accuracy of each layer's features; --data has one folder per class", data=True)
    add("--batch-size", type=int, default=64, help="images per forward pass; the result does not depend on it")
    add("--shots", type=lambda s: [int(v) for v in s.split(",")], default="2,5,10", help="training images per class")
    add("--draws", type=int, default=20, help="random choices of the training images, shared by all models and layers")
    add("--neighbours", type=int, default=5, help="k of the k-nearest-neighbour classifier")
    add("--ridge", type=float, default=0.01, help="penalty of the ridge classifier, in mean squared feature norms")
    command(layers, "accuracy against the number of pre-trained blocks kept (Fig. 4), from the fig4.csv files of "
            "finetune.py --sweep-keep-blocks", inputs="files")
    add = command(cost, "parameters, multiply-adds, latency and throughput; accuracy against latency (Fig. 1)")
    add("--batch-size", type=int, default=64, help="images per forward pass when measuring throughput")
    add("--seconds", type=float, default=5.0, help="time per measurement, after a third of it for warm-up")
    add("--threads", type=int, help="CPU threads; if absent, as PyTorch chooses")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights and activations")
    add("--points", help="CSV with columns label, model, top1, latency_ms, source for the picture; an empty latency_ms "
        "is filled in from the model of that label measured here")
    add = command(curves, "what log.jsonl files of any of the scripts hold, one panel per quantity", inputs="files")
    add("--keys", nargs="+", help="quantities to draw; if absent, all losses and metrics")
    args = parser.parse_args(argv)
    if not args.demo and not hasattr(args, "run"):
        parser.error("give a command (cka, attention, probe, layers, cost, curves) or --demo")
    for name, value in vars(args).items():
        for v in value if isinstance(value, list) else [value]:
            if type(v) in (int, float) and not v >= (name not in ("seed", "workers", "ridge", "seconds")):
                raise InputError(f"--{name.replace('_', '-')} {v} is too small")
    return args


def named(argument):
    """[LABEL=]PATH -> label, path. Without a label: the last folder and the name of the file, or the name as it is."""
    label, equals, source = argument.partition("=")
    if equals and not Path(argument).exists() and not set(label) & set("/:"):
        return label, source
    path = Path(argument.rpartition(":")[2])
    return ("/".join(filter(None, (path.parent.name, path.stem))) if path.suffix else argument), argument


def named_inputs(arguments):
    """[LABEL=]PATH ... -> [(label, path)]; different files need different labels, or their rows would be mixed."""
    inputs = [named(argument) for argument in arguments]
    for label, source in inputs:
        if any(label == other and source != path for other, path in inputs):
            raise InputError(f"several inputs are labelled {label}: tell them apart by LABEL=PATH")
    return inputs


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------
class Encoder(NamedTuple):
    label: str
    model: nn.Module
    mean: tuple    # of the pixels it was trained on
    std: tuple


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"--device {name} is not available on this machine: choose another, or auto")
    return torch.device(name)


def architecture(source):
    """Checkpoint, MODEL:FILE or untrained model -> name in MODELS, options, (H, W) or None, file or None."""
    name, _, file = source.partition(":")
    if name in MODELS and not file:
        return name, {}, None, None
    if name.endswith("+rpe") and name.startswith(("vit", "deit")) and name[:-4] in MODELS:
        return name[:-4], dict(rel_pos_bias=True), None, None
    name, file = (name, file) if name in MODELS else (None, source)
    if not Path(file).exists():
        raise InputError(f"{file} does not exist, and is none of {', '.join(MODELS)} (ViTs also with +rpe)")
    (inferred, patch), (state, info) = infer_model(file), load_state(file)
    name = name or inferred
    if name.startswith("hiera"):    # a classifier pools three times, an encoder is analysed as it was pre-trained
        options = dict(q_pool=3 if any(k.startswith("head.") for k in state) else 2)
    else:
        options = dict(patch_size=patch, rel_pos_bias=any(k.endswith("relative_position_bias_table") for k in state),
                       layer_scale=1.0 if any(k.endswith("ls1.gamma") for k in state) else None)
    return name, options, info.get("arch", {}).get("img_size"), file


def load_models(args, **options):
    """The models named on the command line, all for the same image size -> [Encoder]; args.image_size is filled in."""
    inputs = named_inputs(args.models)
    sources = [source for _, source in inputs if source != "random"]
    if not sources:
        raise InputError("`random` copies the first other model, and there is none: name a checkpoint or one of "
                         f"{', '.join(MODELS)}")
    known = {source: architecture(source) for source in sources}
    size = args.image_size or max((size for _, _, size, _ in known.values() if size), default=[224])
    args.image_size, encoders = tuple(size) * 2 if len(size) == 1 else tuple(size), []
    if len(args.image_size) != 2:
        raise InputError(f"--image-size takes one number, or height and width, not {len(size)} numbers")
    for label, source in inputs:
        torch.manual_seed(args.seed)
        name, own, _, file = known.get(source, (*known[sources[0]][:3], None))
        own = {k: v for k, v in own.items() if k != "q_pool" or "num_classes" not in options}    # classifiers pool
        model = MODELS[name](img_size=args.image_size, **own, **options)
        info = load_encoder(model, file) if file else {}
        model.eval().requires_grad_(False).to(pick_device(args.device))
        encoders.append(Encoder(label, model, info.get("mean", IMAGENET_MEAN), info.get("std", IMAGENET_STD)))
    return encoders


def representations(model, images):
    """Patch tokens after the embedding (index 0) and the normalised representation of each block (Fig. 2).

    images (B, 3, H, W) -> depth + 1 tensors (B, N, D), without the class token; Hiera: tokens in unrolled order, fewer
    and wider with each stage.
    """
    features = model.forward_features(images, range(model.depth + 1))
    if model.arch["kind"] == "vit":
        return [(model.representation(x, k) if k else x)[:, 1:] for k, x in features.items()]
    norms = [nn.Identity(), *(block.norm1 for block in model.blocks[1:])]
    last = features[model.depth]
    return [norm(features[k]) for k, norm in enumerate(norms)] + [F.layer_norm(last, last.shape[-1:], eps=1e-6)]


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------
def load_image(item, size):
    """Image file, or (kind, number) of a drawn image -> (3, H, W) uint8 RGB: the central 224/256 of the picture, in the
    shape of `size`, bicubic and antialiased."""
    image = draw_image(*item) if isinstance(item, tuple) else Image.open(item)
    if image.mode.startswith("I"):                                             # 16-bit grey, which convert() would clip
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    image = ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.BICUBIC, bleed=1 / 16)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def draw_image(kind, number, side=96):
    """Drawn image `number` of class `kind` (0-7: disc, square, triangle or ring, with wide or narrow stripes)."""
    rng = np.random.default_rng([11, kind, number])
    y, x = np.mgrid[0:side, 0:side] / side
    ground, dark, light = (rng.uniform(-0.08, 0.08, 3) + level for level in (rng.uniform(0.3, 0.7), 0.1, 0.9))
    picture = ground * (1 - 0.3 * rng.uniform() * y)[..., None] + rng.normal(0, 0.02, (side, side, 3))
    cx, cy, radius, turn = *rng.uniform(0.4, 0.6, 2), rng.uniform(0.3, 0.4), rng.uniform(0, 2 * math.pi)
    u = ((x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)) / radius    # coordinates of the shape, about -1 .. 1
    v = ((y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)) / radius
    r = np.hypot(u, v)
    shapes = r < 1, np.maximum(abs(u), abs(v)) < 0.85, (v < 0.6) & (2 * abs(u) - v < 1), (r < 1) & (r > 0.55)
    inside = shapes[kind % 4]
    stripes = np.sin((6 if kind < 4 else 14) * u + rng.uniform(0, 6)) > 0
    picture[inside] = np.where(stripes[..., None], light, dark)[inside]
    return Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))


class Images(Dataset):
    """Items as `load_image` takes them -> (3, H, W) uint8."""

    def __init__(self, items, size):
        self.items, self.size = items, size

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        try:
            return load_image(self.items[index], self.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"cannot read image {self.items[index]} ({type(error).__name__}): remove it from "
                             "--data") from None


def list_items(args):
    """All items of --data in a seeded random order, at most --images of them -> items, their class names."""
    if args.data == "shapes":
        items = [(kind, number) for kind in range(8) for number in range(args.images // 8 + 1)]
        classes = [str(kind) for kind, _ in items]
    else:
        folder = Path(args.data)
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: give --data a folder of images (ImageNet: data/imagenet/val)")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES)
        items = [str(p) for p in files]
        classes = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in files]
    order = np.random.default_rng(args.seed).permutation(len(items))[:args.images]
    if len(order) < 4:
        raise InputError(f"--data {args.data} gives {len(order)} image(s) ({', '.join(sorted(IMAGE_TYPES))}): four are "
                         "the least")
    return [items[i] for i in order], [classes[i] for i in order]


def image_batches(items, args, batch_size, drop_last=False):
    loader = DataLoader(Images(items, args.image_size), batch_size, num_workers=args.workers, drop_last=drop_last)
    return tqdm(loader, desc=args.run.__name__, leave=False)


def prepare(images, encoder):
    """uint8 images -> on the encoder's device, normalised as it was trained."""
    return normalize(images.to(next(encoder.model.parameters()).device), encoder.mean, encoder.std)


# ----------------------------------------------------------------------------------------------------------------------
# Layer similarity (Fig. 3)
# ----------------------------------------------------------------------------------------------------------------------
def centred_gram(features):
    """Gram matrix of (n, ...) features, centred so that HSIC_1(K, L) = sum(K~ * L~) / (n (n - 3)) -> (n * n,) float64.

    That is the unbiased HSIC of arXiv 2010.15327, Eq. 3, for K and L with zeroed diagonals,

        HSIC_1 = [tr KL + 1'K1 1'L1 / ((n-1)(n-2)) - 2 / (n-2) 1'KL1] / (n (n-3)),

    where K~ = K - r 1' - 1 r' + s, r_i = sum_j K_ij / (n-2), s = sum_i r_i / (n-1), and the diagonal is zeroed again.
    An offset common to all samples has no effect, so the mean is removed first, which saves digits. On the host:
    float64 does not exist on every device.
    """
    x, n = features.flatten(1).cpu().to(torch.float64, copy=True), len(features)
    x -= x.mean(dim=0)
    gram = (x @ x.T).fill_diagonal_(0)
    rows = gram.sum(dim=1) / (n - 2)
    return (gram - rows[:, None] - rows + rows.sum() / (n - 1)).fill_diagonal_(0).flatten()


def minibatch_cka(batches):
    """CKA of each layer of model 0 with each layer of the others: HSICs summed over batches *before* the ratio.

    batches yields lists over models of lists over layers of features (n, ...), n >= 4 -> for every other model m a
    (layers of model 0, layers of model m) float64 matrix. A layer whose features never vary has similarity 0.
    """
    cross, own = defaultdict(float), defaultdict(float)
    for models in batches:
        n = len(models[0][0])
        grams = [torch.stack([centred_gram(x) for x in layers]) for layers in models]            # (layers, n * n) each
        for m, gram in enumerate(grams):
            cross[m] += grams[0] @ gram.T / (n * (n - 3))
            own[m] += gram.square().sum(dim=1) / (n * (n - 3))                    # HSIC of a layer with itself
    return [cross[m] / (own[0][:, None] * own[m]).sqrt().clamp(min=1e-300) for m in range(1, len(own))]


@torch.no_grad()
def cka(args):
    """Fig. 3: heatmaps cka.png and the matrices in cka.csv, every other model against the first."""
    encoders = load_models(args)
    if len(encoders) < 2:
        raise InputError("cka compares two models or more: name the reference first, then the others "
                         "(the same one twice is fine)")
    items, _ = list_items(args)
    batch = min(args.batch_size, len(items))
    if batch < 4:
        raise InputError(f"--batch-size {batch}: the unbiased HSIC needs 4 images or more in a batch")
    matrices = minibatch_cka([representations(e.model, prepare(images, e)) for e in encoders]
                             for images in image_batches(items, args, batch, drop_last=True))
    reference, others, said = encoders[0], encoders[1:], f"{len(items) // batch} batches of {batch} images"
    write_csv(args, ("reference", "layer_of_reference", "model", "layer_of_model", "cka"),
              [(reference.label, i, other.label, j, f"{value:.6f}") for other, matrix in zip(others, matrices)
               for i, row in enumerate(matrix.tolist()) for j, value in enumerate(row)])
    print(f"for each layer of a model, the layer of {reference.label} most similar to it, and their CKA over {said}:")
    sheet = Sheet(len(others), min(3, len(others)), 360, 330,
                  note=f"layer 0: patch embedding; unbiased minibatch CKA, {said}")
    for number, (other, matrix) in enumerate(zip(others, matrices)):
        best = matrix.argmax(dim=0).tolist()
        print(f"  {other.label}: " + ", ".join(f"{j}~{i} {matrix[i, j]:.2f}" for j, i in enumerate(best)))
        h, w = matrix.shape
        axes = Axes(sheet, number, f"{other.label} and {reference.label}", f"layer of {other.label}",
                    f"layer of {reference.label}", (-0.5, w - 0.5), (-0.5, h - 0.5), right=58)
        axes.heatmap(matrix.tolist())
    sheet.save(output(args, ".png"))


# ----------------------------------------------------------------------------------------------------------------------
# Attention distance and entropy (Fig. 5)
# ----------------------------------------------------------------------------------------------------------------------
def attention_statistics(logits, distance):
    """Attention distance and entropy of every image and head -> two (B, H), the means over queries i of

        sum_j p_ij |x_i - x_j|   and   -sum_j p_ij log p_ij (nats),   p = softmax of the logits over the keys j.

    logits (B, H, Q, K) before the softmax, of patch tokens alone: the class token is removed *before* the softmax.
    distance (Q, K): Euclidean, in the unit that the result is to have.
    """
    log_p = logits.float().log_softmax(dim=-1)
    p = log_p.exp()
    return torch.einsum("bhqk,qk->bh", p, distance) / len(distance), -(p * log_p).sum(dim=(-2, -1)) / len(distance)


def token_distances(model):
    """Distances in pixels between the tokens whose maps `attention_map` gives -> one (Q, K) matrix per block.

    ViT: raster patches. Hiera: unrolled tokens of the image, or of one mask unit in blocks that attend within units
    (all units look alike); a pooled query lies at the centre of its four tokens.
    """
    hiera = model.arch["kind"] == "hiera"
    y, x = (torch.arange(n) * float(model.patch_stride if hiera else model.patch_size) for n in model.grid)
    keys = torch.cartesian_prod(y, x)[None]                                                      # (1, N, 2), raster
    if not hiera:
        return [torch.cdist(keys[0], keys[0])] * model.depth
    keys, distances = unroll(keys, model.grid), []
    for block in model.blocks:
        queries = keys.unflatten(1, (4, -1)).mean(dim=1) if block.attn.q_pool else keys
        windows = keys.shape[1] // (block.attn.tokens_per_unit or keys.shape[1])                 # unit index fastest
        distances.append(torch.cdist(queries[0, ::windows], keys[0, ::windows]))
        keys = queries
    return distances


@torch.no_grad()
def attention(args):
    """Fig. 5: box plots attention.png over the heads of each block, every head in attention.csv."""
    encoders = load_models(args)
    items, _ = list_items(args)
    distances = [token_distances(e.model) for e in encoders]
    sums = defaultdict(float)                                                             # (model, block) -> (2, H)
    for images in image_batches(items, args, args.batch_size):
        for m, e in enumerate(encoders):
            features = e.model.forward_features(prepare(images, e), range(e.model.depth))
            for k in range(1, e.model.depth + 1):
                logits = e.model.attention_map(features[k - 1], k)
                logits = logits[:, :, 1:, 1:] if e.model.arch["kind"] == "vit" else logits       # no class token
                values = attention_statistics(logits, distances[m][k - 1].to(logits.device))
                sums[m, k] += torch.stack(values).mean(dim=1) * len(images)               # over images [and units]
    means = {key: (total / len(items)).tolist() for key, total in sums.items()}

    rows, deepest = [], max(e.model.depth for e in encoders)
    for (m, k), pair in means.items():
        units = getattr(encoders[m].model.blocks[k - 1].attn, "tokens_per_unit", 0)
        rows += [(encoders[m].label, k, head, "mask unit" if units else "global", f"{distance:.6g}", f"{entropy:.6g}")
                 for head, (distance, entropy) in enumerate(zip(*pair), start=1)]
    for label in dict.fromkeys(row[0] for row in rows if row[3] == "mask unit"):
        blocks = sorted({row[1] for row in rows if row[0] == label and row[3] == "mask unit"})
        print(f"{label}: blocks {', '.join(map(str, blocks))} attend within mask units of 32x32 pixels, which bounds "
              "both values")
    write_csv(args, ("model", "block", "head", "attention", "distance_px", "entropy_nats"), rows)
    sheet = Sheet(2, 1, 900, 270, list(zip((e.label for e in encoders), COLORS)),
                  f"{len(items)} images; a box per block over its heads: quartiles and median, whiskers within 1.5 box "
                  "heights, circles beyond")
    for number, name in enumerate(("attention distance (pixels)", "attention entropy (nats)")):
        every, width = [value for pair in means.values() for value in pair[number]], 0.8 / len(encoders)
        axes = Axes(sheet, number, name, "block", "", (0.5, deepest + 0.5), limits(every), range(1, deepest + 1))
        for m, e in enumerate(encoders):
            heads = [means[m, k][number] for k in range(1, e.model.depth + 1)]
            print(f"{name}, mean over heads, {e.label}: " + " ".join(f"{statistics.mean(v):.4g}" for v in heads))
            for k, values in enumerate(heads, start=1):
                axes.box(k + (m - (len(encoders) - 1) / 2) * width, values, 0.8 * width, COLORS[m])
    sheet.save(output(args, ".png"))


# ----------------------------------------------------------------------------------------------------------------------
# Few-shot probes of every layer
# ----------------------------------------------------------------------------------------------------------------------
def knn_scores(train, onehot, test, neighbours=5, temperature=0.07):
    """k nearest neighbours by cosine similarity, each voting with weight exp(similarity / temperature).
    train (t, D), onehot (t, C), test (s, D) -> (s, C)."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    near, ids = similarity.topk(min(neighbours, len(train)), dim=1)
    return torch.einsum("sk,skc->sc", (near / temperature).exp(), onehot[ids])


def ridge_scores(train, onehot, test, strength=0.01):
    """Ridge regression onto one-hot labels, in its dual form: the features outnumber the images.

    W = argmin |X W - Y|^2 + lambda |W|^2 gives X* W = X* X' (X X' + lambda I)^-1 Y; lambda = strength * mean |x|^2, so
    that it does not depend on the scale of the features. train (t, D), onehot (t, C), test (s, D) -> (s, C).
    """
    gram = train @ train.T
    penalty = (strength * gram.diagonal().mean()).clamp(min=1e-12)
    return test @ train.T @ torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), onehot)


def draw_shots(labels, shots, seed):
    """One random choice of `shots` training images per class -> their indices, those of all others. labels (n,) int."""
    rng, train = np.random.default_rng(seed), []
    for kind in range(int(labels.max()) + 1):
        train += rng.permutation(np.flatnonzero(labels == kind))[:shots].tolist()
    return train, sorted(set(range(len(labels))) - set(train))


def probe_accuracy(features, labels, shots, draws, seed, neighbours=5, strength=0.01):
    """Accuracy of both classifiers on the images that were not drawn -> (2, draws) float64: k-NN, ridge.

    features (n, D), labels (n,) int. Features are centred by the mean of the training images. Accuracy is the mean over
    classes, so that features that say nothing score 1 / classes whatever the sizes of the classes.
    """
    features, labels = features.double(), np.asarray(labels)
    onehot, result = F.one_hot(torch.from_numpy(labels)).double(), []
    for draw in range(draws):
        train, test = draw_shots(labels, shots, [seed, shots, draw])
        mean = features[train].mean(dim=0)
        parts = features[train] - mean, onehot[train], features[test] - mean
        truth = onehot[test]
        for scores in (knn_scores(*parts, neighbours), ridge_scores(*parts, strength)):
            hits = F.one_hot(scores.argmax(dim=1), truth.shape[1]) * truth
            result.append((hits.sum(dim=0) / truth.sum(dim=0)).mean())
    return torch.stack(result).view(draws, 2).T


@torch.no_grad()
def probe(args):
    """Few-shot accuracy of every layer's frozen features: curves probe.png, means and standard errors in probe.csv."""
    encoders = load_models(args)
    items, names = list_items(args)
    classes = sorted(set(names))
    labels = np.array([classes.index(name) for name in names])
    fewest = np.bincount(labels).min()
    if len(classes) < 2 or "" in classes:
        raise InputError(f"--data {args.data} has no classes: probe needs one folder of images per class")
    if fewest <= max(args.shots):
        raise InputError(f"class {classes[np.bincount(labels).argmin()]} has {fewest} of the {len(items)} images, so "
                         f"--shots {max(args.shots)} leaves none to test on: lower --shots, or raise --images")
    pooled = [defaultdict(list) for _ in encoders]                                               # layer -> [(B, D)]
    for images in image_batches(items, args, args.batch_size):
        for e, layers in zip(encoders, pooled):
            for layer, tokens in enumerate(representations(e.model, prepare(images, e))):
                layers[layer].append(tokens.mean(dim=1).cpu())
    kinds, chance = (f"{args.neighbours}-NN", "ridge"), 100 / len(classes)
    summary, deepest = {}, max(e.model.depth for e in encoders)    # (model, layer, classifier, shots) -> mean, error
    for m, layers in enumerate(pooled):
        for layer in tqdm(layers, desc=f"probe {encoders[m].label}", leave=False):
            features = torch.cat(layers[layer])
            for shots in args.shots:
                accuracy = probe_accuracy(features, labels, shots, args.draws, args.seed, args.neighbours, args.ridge)
                for kind, values in zip(kinds, 100 * accuracy):
                    summary[m, layer, kind, shots] = mean_and_error(values.tolist())
    write_csv(args, ("model", "layer", "classifier", "shots", "top1", "standard_error"),
              [(encoders[m].label, *key, f"{mean:.3f}", f"{error:.3f}")
               for (m, *key), (mean, error) in summary.items()])
    legend = [*zip((e.label for e in encoders), COLORS), ("chance", "#888888")]
    sheet = Sheet(2 * len(args.shots), len(args.shots), 340, 270, legend,
                  f"accuracy in % on {len(items)} images of {len(classes)} classes, mean and standard error over "
                  f"{args.draws} draws; mean patch token, layer 0: patch embedding")
    for number, (kind, shots) in enumerate((kind, shots) for kind in kinds for shots in args.shots):
        here = [value for key, value in summary.items() if key[2:] == (kind, shots)]
        axes = Axes(sheet, number, f"{kind}, {shots} image{'s' * (shots > 1)} per class", "layer", "accuracy (%)",
                    (0, deepest), limits([chance, *error_ends(here)]), range(0, deepest + 1, 2 if deepest < 20 else 4))
        axes.line([(0, chance), (deepest, chance)], "#888888")
        for m, e in enumerate(encoders):
            means, errors = zip(*(summary[m, layer, kind, shots] for layer in pooled[m]))
            axes.line(list(enumerate(means)), COLORS[m], errors=errors)
            print(f"{kind}, {shots} per class, {e.label}: " + " ".join(f"{v:.1f}" for v in means))
    sheet.save(output(args, ".png"))


# ----------------------------------------------------------------------------------------------------------------------
# Pre-trained layers kept (Fig. 4)
# ----------------------------------------------------------------------------------------------------------------------
def layers(args):
    """fig4.csv of finetune.py: one row per run with keep_blocks, data_fraction, seed and top1 (percent)."""
    runs = defaultdict(list)                                                              # (label, fraction, blocks)
    for label, path in named_inputs(args.files):
        for row in read_csv(path, ("keep_blocks", "data_fraction", "top1"), numbers=True):
            runs[label, row["data_fraction"], int(row["keep_blocks"])].append(row["top1"])
    summary = {key: mean_and_error(values) for key, values in sorted(runs.items())}
    write_csv(args, ("label", "data_fraction", "keep_blocks", "runs", "top1", "standard_error"),
              [(*key, len(runs[key]), f"{mean:.3f}", f"{error:.3f}") for key, (mean, error) in summary.items()])
    legend = list(zip(dict.fromkeys(key[0] for key in runs), COLORS))
    fractions = sorted({key[1] for key in runs}, reverse=True)
    sheet = Sheet(len(fractions), min(3, len(fractions)), 360, 290, legend,
                  "the other blocks start from random weights; mean and standard error over runs")
    for number, fraction in enumerate(fractions):
        here = {key: value for key, value in summary.items() if key[1] == fraction}
        deepest = max(1, *(key[2] for key in here))
        axes = Axes(sheet, number, f"fine-tuned on {100 * fraction:g}% of the images", "pre-trained blocks kept",
                    "top-1 (%)", (0, deepest), limits(error_ends(here.values())),
                    range(0, deepest + 1, 2 if deepest > 6 else 1))
        for label, color in legend:
            points = [(key[2], *value) for key, value in here.items() if key[0] == label]
            axes.line([p[:2] for p in points], color, errors=[p[2] for p in points])
            print(f"{label}, {100 * fraction:g}% of the images: "
                  + ", ".join(f"{blocks} blocks {mean:.2f}" for blocks, mean, _ in points))
    sheet.save(output(args, ".png"))


# ----------------------------------------------------------------------------------------------------------------------
# Cost (Fig. 1)
# ----------------------------------------------------------------------------------------------------------------------
def timings(run, device, seconds):
    """Milliseconds that run() takes -> median, 10th and 90th percentile of what fits into `seconds` (5 times at least),
    after a warm-up of a third of that."""
    for budget, least in ((seconds / 3, 2), (seconds, 5)):    # the times of the warm-up are thrown away
        times, start = [], time.perf_counter()
        while len(times) < least or time.perf_counter() - start < budget:
            begun = time.perf_counter()
            run()
            if device.type != "cpu":
                getattr(torch, device.type).synchronize()
            times.append((time.perf_counter() - begun) * 1000)
    return np.quantile(times, (0.5, 0.1, 0.9)).tolist()


def multiply_adds(run):
    """Multiply-adds of run(), the "FLOPs" of papers (ViT-Tiny: 1.25e9). Attention counts as its two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() / 2


@torch.no_grad()
def cost(args):
    """Models with a classifier of 1000 classes; or any network exported by torch.export.save (FILE.pt2: a tracker, a
    segmenter), which is measured on the inputs that it was exported with."""
    points = read_csv(args.points, ("label", "model", "top1", "latency_ms", "source")) if args.points else []
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    exported = [argument for argument in args.models if argument.endswith(".pt2")]
    args.models = [argument for argument in args.models if argument not in exported]
    networks = [(e.label, e.model.to(dtype), (torch.zeros(1, 3, *args.image_size, dtype=dtype, device=device),), e)
                for e in (load_models(args, num_classes=1000) if args.models else ())]
    for label, path in map(named, exported):
        try:
            program = torch.export.load(path)
        except Exception as error:    # of many kinds
            raise InputError(f"{path} is no network of torch.export.save ({type(error).__name__})") from None
        networks.append((label, program.module(), program.example_inputs[0], None))
    where = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    threads = torch.get_num_threads()
    print(f"{where}, {threads} CPU threads, {args.dtype}, torch {torch.__version__}; median [10th-90th percentile] "
          f"over {args.seconds:g} s after {args.seconds / 3:.2g} s of warm-up")
    jpeg, rows, latency = io.BytesIO(), [], {}
    draw_image(0, 0, side=448).save(jpeg, "JPEG")
    for label, model, inputs, encoder in networks:
        parameters, macs = sum(p.numel() for p in model.parameters()), multiply_adds(lambda: model(*inputs))
        print(f"{label}: {parameters / 1e6:.2f}M parameters, {macs / 1e9:.2f}G multiply-adds")
        runs = [("model alone", len(inputs[0]), lambda: model(*inputs))]
        if encoder:
            batch = inputs[0].expand(args.batch_size, -1, -1, -1).contiguous()
            runs += [("end to end, from a JPEG of 448x448 pixels", 1,
                      lambda: model(prepare(load_image(jpeg, args.image_size)[None], encoder).to(dtype))),
                     ("model alone", args.batch_size, lambda: model(batch))]
        for what, n, run in runs:
            ms, low, high = timings(run, device, args.seconds)
            latency.setdefault(label, ms)
            print(f"  {what}, batch {n}: {ms:.2f} ms [{low:.2f}-{high:.2f}], {1000 * n / ms:.0f} fps")
            rows.append((label, parameters, int(macs), what, n, *(f"{v:.4g}" for v in (ms, low, high, 1000 * n / ms)),
                         where, threads, args.dtype))
    write_csv(args, ("model", "parameters", "multiply_adds", "measured", "batch_size", "ms", "p10", "p90", "fps",
                     "device", "threads", "dtype"), rows)
    if points:
        draw_accuracy_latency(args, points, latency)


def draw_accuracy_latency(args, rows, measured):
    """Fig. 1: top-1 accuracy against latency at batch 1. rows: of --points; measured: label of a model -> ms."""
    points = []
    for row in rows:
        latency = row["latency_ms"] or measured.get(row["model"])
        if latency:
            points.append((float(latency), float(row["top1"]), row["label"], row["source"]))
        else:
            print(f"{args.points}: {row['label']} is left out, as {row['model']} was not measured")
    if not points:
        raise InputError(f"--points {args.points} has no row with a latency: fill in latency_ms, or measure its models")
    legend, (xs, ys, *_) = dict(zip(dict.fromkeys(source for *_, source in points), COLORS)), zip(*points)
    sheet = Sheet(1, 1, 720, 440, legend.items())
    axes = Axes(sheet, 0, "accuracy and latency", "latency at batch 1 (ms)", "top-1 (%)", limits(xs, 0.6), limits(ys))
    axes.scatter([(x, y, label, legend[source]) for x, y, label, source in points])
    sheet.save(output(args, ".png"))


# ----------------------------------------------------------------------------------------------------------------------
# Training curves
# ----------------------------------------------------------------------------------------------------------------------
def curves(args):
    """log.jsonl of any script: one JSON object per line; those with a "step" are drawn, whatever they hold."""
    bookkeeping = {"step", "epoch", "lr", "grad_norm", "img_s", "data_share", "memory_gb", "eta_h", "val_images"}
    logs = []                                                       # (label, {key: [(step, value)]})
    for label, path in named_inputs(args.files):
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist: give log.jsonl files")
        points = defaultdict(list)
        for number, text in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
            try:
                line = json.loads(text)
                steps = isinstance(line.get("step"), int)
            except (json.JSONDecodeError, AttributeError):
                raise InputError(f"{path}, line {number}, is no JSON object: is it the log.jsonl of a run?") from None
            for key, value in line.items() if steps else ():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    points[key].append((line["step"], value))
        logs.append((label, points))
    found = [*dict.fromkeys(key for _, points in logs for key in points)]
    keys = args.keys or [key for key in found if key not in bookkeeping]
    missing = [key for key in keys if key not in found]
    if missing or not keys:
        raise InputError(f"no line has {', '.join(missing) or 'a loss'}; these files hold: "
                         f"{', '.join(found) or 'no steps at all'}")
    write_csv(args, ("label", "key", "step", "value"),
              [(label, key, *point) for label, points in logs for key in keys for point in points[key]])
    legend = list(zip((label for label, _ in logs), COLORS))
    sheet = Sheet(len(keys), min(3, len(keys)), 360, 270, legend)
    for number, key in enumerate(keys):
        xs, ys = zip(*(point for _, points in logs for point in points[key]))
        axes = Axes(sheet, number, key, "step", "", (0, max(1, *xs)), limits(ys))
        for (_, points), (_, color) in zip(logs, legend):
            axes.line(points[key], color)
    for label, points in logs:
        print(f"{label}: " + ", ".join(f"{key} {points[key][-1][1]:.4g}" for key in keys if points[key]))
    sheet.save(output(args, ".png"))


# ----------------------------------------------------------------------------------------------------------------------
# Plotting with Pillow
# ----------------------------------------------------------------------------------------------------------------------
SCALE = 2    # everything is drawn at twice its size and then reduced, which smooths lines and letters
COLORS = 9 * ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")    # colour-blind safe


def magma(value):
    """Color of a value in 0 .. 1, from black over purple and orange to pale yellow -> (r, g, b)."""
    channels = (0, 79, 181, 251, 252), (0, 18, 54, 135, 253), (4, 123, 122, 97, 191)
    return tuple(round(float(np.interp(value, (0, 0.25, 0.5, 0.75, 1), channel))) for channel in channels)


def round_ticks(low, high, count=5):
    """Multiples of 1, 2, 2.5 or 5 times a power of ten inside [low, high], about `count` of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count > 0.999 * (high - low))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def scaled(*points):
    return [v * SCALE for point in points for v in point]


class Sheet:
    """`panels` panels of equal size, filled row by row; legend [(label, color)] above, note below; save() crops."""

    def __init__(self, panels, columns, width, height, legend=(), note=""):
        self.columns, self.width, self.height, self.font = columns, width, height, ImageFont.load_default(13 * SCALE)
        rows, room, x, y = math.ceil(panels / columns), 60 + 20 * len(legend) + len(note), 16, 8
        self.image = Image.new("RGB", scaled((columns * width, rows * height + room)), "white")
        self.draw = ImageDraw.Draw(self.image)
        for label, color in legend:
            advance = 40 + self.font.getlength(label) / SCALE
            x, y = (16, y + 20) if x + advance > columns * width and x > 16 else (x, y)
            self.draw.rectangle(scaled((x, y + 3), (x + 14, y + 13)), color)
            self.text(x + 20, y, label)
            x += advance
        self.top = y + 24 if legend else 4
        self.bottom = self.top + rows * height
        for line in textwrap.wrap(note, columns * width // 7):
            self.text(16, self.bottom, line)
            self.bottom += 18

    def text(self, x, y, text, anchor="la"):
        self.draw.text((x * SCALE, y * SCALE), text, "black", self.font, anchor=anchor)

    def save(self, path):
        self.image.crop((0, 0, self.image.width, (self.bottom + 6) * SCALE)).reduce(SCALE).save(path)


class Axes:
    """Panel `number` of a sheet. `place` maps data to pixels of the picture; the others draw in data coordinates."""

    def __init__(self, sheet, number, title, xlabel, ylabel, xlim, ylim, xticks=None, right=16):
        row, column = divmod(number, sheet.columns)
        self.sheet, self.draw, self.xlim, self.ylim = sheet, sheet.draw, xlim, ylim
        self.left, self.right = column * sheet.width + 68, (column + 1) * sheet.width - right
        self.top, self.bottom = sheet.top + row * sheet.height + 28, sheet.top + (row + 1) * sheet.height - 46
        sheet.text((self.left + self.right) / 2, self.top - 22, title, "ma")
        sheet.text((self.left + self.right) / 2, self.bottom + 24, xlabel, "ma")
        label = Image.new("L", (math.ceil(sheet.font.getlength(ylabel)) + 1, 18 * SCALE))        # drawn, then turned
        ImageDraw.Draw(label).text((0, 0), ylabel, 255, sheet.font)
        sheet.image.paste("black", ((self.left - 60) * SCALE, (self.top + self.bottom) * SCALE // 2 - label.width // 2),
                          label.rotate(90, expand=True))
        for value in round_ticks(*xlim) if xticks is None else xticks:
            self.line([(value, ylim[0]), (value, ylim[1])], "#e0e0e0", 1)
            sheet.text(self.place(value, 0)[0], self.bottom + 5, f"{value:.6g}", "ma")
        for value in round_ticks(*ylim):
            self.line([(xlim[0], value), (xlim[1], value)], "#e0e0e0", 1)
            sheet.text(self.left - 6, self.place(0, value)[1], f"{value:.6g}", "rm")
        self.draw.rectangle(scaled((self.left, self.top), (self.right, self.bottom)), None, "black", SCALE)

    def place(self, x, y):
        x, y = ((v - low) / (high - low) for v, (low, high) in ((x, self.xlim), (y, self.ylim)))
        return self.left + x * (self.right - self.left), self.bottom - y * (self.bottom - self.top)

    def dot(self, x, y, color, radius, fill=None):
        x, y = self.place(x, y)
        self.draw.ellipse(scaled((x - radius, y - radius), (x + radius, y + radius)), fill, color, SCALE)

    def line(self, points, color, width=2, errors=()):
        """Segment or polyline, bars of +- errors; dots on a polyline of few points."""
        self.draw.line(scaled(*(self.place(*p) for p in points)), color, width * SCALE, joint="curve")
        for (x, y), error in zip(points, errors):
            self.line([(x, y - error), (x, y + error)], color, 1)
        for x, y in points if len(points) != 2 and len(points) < 40 else ():
            self.dot(x, y, color, 3, color)

    def scatter(self, points):
        """Dots [(x, y, label, color)], each label on the first side where no frame, dot or label is in its way."""
        taken = [(x - 7, x + 7, y) for x, y in (self.place(*p[:2]) for p in points)]
        for x, y, label, color in points:
            self.dot(x, y, color, 5, color)
            (x, y), w = self.place(x, y), self.sheet.font.getlength(label) / SCALE
            sides = [(x + 10, y), (x - 10 - w, y), (x - w / 2, y - 14), (x - w / 2, y + 14)]
            x, y = next(((a, b) for a, b in sides if self.left < a and a + w < self.right and all(
                a > right or a + w < left or abs(b - row) > 11 for left, right, row in taken)), sides[0])
            taken.append((x, x + w, y))
            self.sheet.text(x, y, label, "lm")

    def box(self, x, values, width, color):
        """Box and whiskers: quartiles, median, the last values within 1.5 quartile ranges, circles beyond."""
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        inside = [v for v in values if low - 1.5 * (high - low) <= v <= high + 1.5 * (high - low)]
        self.line([(x, min(inside)), (x, max(inside))], color, 1)
        (x0, y1), (x1, y0) = self.place(x - width / 2, low), self.place(x + width / 2, high)
        self.draw.rectangle(scaled((x0, y0), (x1, y1)), tuple((255 + v) // 2 for v in getrgb(color)), color, SCALE)
        self.line([(x - width / 2, median), (x + width / 2, median)], color)
        for v in set(values) - set(inside):
            self.dot(x, v, color, 2)

    def heatmap(self, rows):
        """Cells of values 0 .. 1 centred on whole coordinates, row 0 at the bottom; a colour bar on the right."""
        for x, y, value in ((x, y, value) for y, row in enumerate(rows) for x, value in enumerate(row)):
            (x0, y1), (x1, y0) = self.place(x - 0.5, y - 0.5), self.place(x + 0.5, y + 0.5)
            self.draw.rectangle([round(v) for v in scaled((x0, y0), (x1, y1))], magma(value))
        height = self.bottom - self.top
        for y in range(height + 1):
            ends = scaled((self.right + 10, self.bottom - y), (self.right + 22, self.bottom - y))
            self.draw.line(ends, magma(y / height), SCALE)
        for value in (0, 0.5, 1):
            self.sheet.text(self.right + 26, self.bottom - value * height, f"{value:g}", "lm")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers, tables, demo, main
# ----------------------------------------------------------------------------------------------------------------------
def mean_and_error(values):
    """-> mean, its standard error (0 for a single value)."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def limits(values, margin=0.06):
    """Range of the values and a margin on either side, never empty."""
    pad = margin * (max(values) - min(values)) or 0.1 * abs(max(values)) or 1.0
    return min(values) - pad, max(values) + pad


def error_ends(pairs):
    """(mean, error) pairs -> mean - error and mean + error of each, for `limits`."""
    return [mean + sign * error for mean, error in pairs for sign in (-1, 1)]


def output(args, suffix):
    """--out/COMMAND.suffix, said aloud."""
    path = Path(args.out) / f"{args.run.__name__}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"writing {path}")
    return path


def write_csv(args, header, rows):
    with open(output(args, ".csv"), "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read_csv(path, columns, numbers=False):
    """Rows of a CSV file as dictionaries; every column of `columns` has to be there, and be a number if asked for."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: give a .csv file")
    with open(path, newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    missing = [c for c in columns if not rows or c not in rows[0]]
    if missing:
        raise InputError(f"{path} lacks the column(s) {', '.join(missing)}, or has no row")
    try:
        return [{c: float(row[c]) for c in columns} for row in rows] if numbers else rows
    except (TypeError, ValueError):
        raise InputError(f"{path} has a row in which {', '.join(columns)} are not all numbers") from None


def demo(folder=Path("out/demo")):
    """Every command above on drawn images, as a user would type them."""
    trained = {"MAE": folder / "teacher/encoder.pt", "D2-MAE": folder / "encoder.pt"}
    for number, (label, path) in enumerate(list(trained.items()), start=1):
        if not path.exists():
            print(f"{path} is not there (pretrain_d2mae.py --demo makes it): an untrained encoder stands in for it")
            torch.manual_seed(number)
            model = MODELS["vit_tiny"](img_size=64, patch_size=8)
            (folder / "analyze").mkdir(parents=True, exist_ok=True)
            trained[f"untrained-{number}"] = folder / f"analyze/untrained-{number}.pt"
            torch.save(dict(model=model.state_dict(), arch=model.arch), trained[f"untrained-{number}"])
            del trained[label]
    models = [f"{label}={path}" for label, path in trained.items()]
    points = Path(__file__).parent / "tests/assets/fig1.csv"
    sweeps, logs = sorted(folder.rglob("fig4.csv")), [path.with_name("log.jsonl") for path in trained.values()]
    runs = [["cka", models[0], "random", *models, "--data", "shapes", "--images", 384],
            ["attention", "random", *models, "--data", "shapes", "--images", 128],
            ["probe", "random", *models, "--data", "shapes", "--images", 800, "--draws", 10],
            ["cost", "vit_tiny", "vit_tiny+rpe", "hiera_tiny", "--seconds", 1, "--batch-size", 16,
             *(["--points", os.path.relpath(points)] if points.exists() else [])]]
    runs += [["layers", *sweeps]] if sweeps else []
    if all(log.exists() for log in logs):
        runs.append(["curves", *(f"{label}={log}" for label, log in zip(trained, logs))])
    for run in runs:
        run = [str(word) for word in (*run, "--out", folder / "analyze")]
        print("\n$ python analyze.py", *run)
        args = parse_args(run)
        args.run(args)


if __name__ == "__main__":
    try:
        arguments = parse_args()
        demo() if arguments.demo else arguments.run(arguments)
    except (InputError, OSError) as error:    # loader processes put their traceback before the sentence
        sys.exit(f"error: {str(error).strip().splitlines()[-1].removeprefix('models.InputError: ')}")
