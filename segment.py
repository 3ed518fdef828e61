"""Semantic segmentation of ADE20K by Semantic FPN on a lightweight ViT (Sec. "transfer").

    torchrun --nproc_per_node=8 segment.py --init out/pretrain/encoder.pt    # D2-MAE: 39.0 mIoU
    torchrun --nproc_per_node=8 segment.py --init out/rpe/best.pt            # fine-tuned, RPE: 42.8
    python segment.py --eval                                                 # score of best.pt
    python segment.py --predict photo.jpg                                    # or a folder
    python segment.py --demo                                          # after that of pre-training

A plain ViT gives four maps of one size, after blocks 4, 6, 8 and 12. `Pyramid` makes them strides
4, 8, 16 and 32; `SemanticFPN` brings them all to stride 4, adds and classifies. Position tables
belong to one size, so an image is scored by overlapping windows of the training crop, whose logits
are averaged (`sliding_logits`). Read `SemanticFPN`, `segmentation_loss`, `augment`, then `train`.

Shapes: B images, K classes, h x w patch grid, D width of the encoder, C = D / 4 of the pyramid,
        s = patch size / 4, the stride of the class scores.
Labels: (H, W) uint8, 0 .. K - 1, and 255 for pixels that are neither trained on nor scored.
Data:   DIR/{images,annotations}/{training,validation}, as in ADEChallengeData2016; label files are
        PNG of the image's name. Class names: DIR/objectInfo150.txt, or a name a line there.

NOTES, departures from the authors' code (mmsegmentation):
- Relative position tables are resized bicubically like the absolute one, not over a geometric grid.
- Crops, flips and colours are a function of (seed, epoch, image), whatever the number of workers
  and processes (dropout and drop path are drawn in each process). A run resumes as if never
  interrupted.
- Training and evaluation run in bfloat16 or float16 on a GPU, as the paper says. The authors'
  configuration asks for it by a key that MMEngine does not read, so their code runs in float32:
  --dtype fp32.
- best.pt is the best of the evaluations, every 16,000 steps, on the images that are scored; the
  authors select nothing. The last line of log.jsonl is the score to compare with theirs.
- The position table and the class token are not decayed; mmsegmentation means to spare them, but
  compares names without their prefix.
- Hue shifts are continuous, not whole steps of OpenCV's 180.
- Images smaller than a window are padded to it with the mean colour, zero once normalised.
- All label files are read before training, in the loader processes: a wrong number shows then, not
  at step 16,000.
- `--predict` classifies the resized photograph and enlarges labels, not all logits, to its size.
- Without GPUs several processes have batch statistics of their own, since PyTorch's SyncBatchNorm
  needs GPUs; those of the first process are evaluated and saved.
"""
import argparse
import datetime
import functools
import itertools
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import adjust_hue, pad, resize
from torchvision.utils import draw_segmentation_masks, make_grid
from tqdm import tqdm

from models import (IMAGENET_MEAN, IMAGENET_STD, MODELS, READ_ERRORS, TOY_CLASSES, InputError,
                    add_run_options, average_over_processes, check_readable, check_step,
                    choose_device, choose_dtype, endless_batches, fingerprint, infer_model,
                    list_images, load_encoder, load_state, log_line, mix_seed, normalize, number,
                    open_image, open_item, own_batches, parallel, param_groups, plain, plain_errors,
                    print_comparison, read_file, read_image, resume, save_checkpoint, start_log,
                    to_tensor, toy_picture)

RECIPE = dict(    # what a run rarely changes. The rest are options, see `parse_args`
    drop_path=0.1, dropout=0.1,             # of the encoder's last block; before the classifier
    layer_decay=0.8,                        # factor on the rate for every block towards the input
    betas=(0.9, 0.999), weight_decay=0.05,  # AdamW; no decay of biases, norms and tokens
    warmup=1500 / 160_000,                  # share of --iters, if --warmup-iters is not given
    stride=2 / 3,                           # from one window to the next, of a window: 341 of 512
    log_every=50,                           # optimizer steps per line of log.jsonl
    toy_images=40,                          # training pictures of --data toy
)
DEMO = dict(data="toy", seeds=6, out="out/demo/segment",
            init="out/demo/pretrain/encoder.pt", model="vit_pico", image_size=[48], patch_size=8,
            iters=150, batch_size=8, lr=8e-3, drop_path=0.0, workers=0, eval_every=1000,
            save_every=1000, log_every=10)
IGNORE = 255    # label of pixels that are neither trained on nor scored


# --------------------------------------------------------------------------------------------------
# Method: pyramid, head and loss
# --------------------------------------------------------------------------------------------------
class Pyramid(nn.Module):
    """From the maps after the blocks `taps` to four (B, C, ., .), each half the size of the one
    before. Those of a plain ViT have one size and are enlarged or reduced; Hiera's stages are a
    pyramid already.
    """

    def __init__(self, encoder, channels):
        super().__init__()
        dim = encoder.embed_dim
        if encoder.arch["kind"] == "hiera":
            self.taps = encoder.stage_ends
            widths = [encoder.blocks[end - 1].mlp.fc2.out_features for end in self.taps]
            self.levels = nn.ModuleList([nn.Conv2d(width, channels, 1) for width in widths])
            return
        self.taps = [encoder.depth * k // 12 for k in (4, 6, 8, 12)]
        self.levels = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(dim, channels, 2, 2), nn.BatchNorm2d(channels),
                          nn.GELU(), nn.ConvTranspose2d(channels, channels, 2, 2)),    # x 4
            nn.ConvTranspose2d(dim, channels, 2, 2),                                   # x 2
            nn.Conv2d(dim, channels, 1),                                               # x 1
            nn.Sequential(nn.Conv2d(dim, channels, 1), nn.MaxPool2d(2, 2))])           # x 1/2

    def forward(self, maps):
        return [level(x) for level, x in zip(self.levels, maps)]


class SemanticFPN(nn.Module):
    """Encoder, pyramid and the head of Panoptic FPN (arXiv 1901.02446), for images of one size.

    In the head each level passes 3x3 convolutions, one per doubling (at least one) with a bilinear
    doubling after each, up to the size of the first level; the sum is classified.
    """

    def __init__(self, encoder, num_classes, width=128, dropout=0.1):
        super().__init__()
        self.encoder = encoder
        encoder.norm = nn.Identity()    # not used; DDP wants a gradient for all parameters
        channels = encoder.embed_dim // 4                               # 48 for ViT-Tiny
        self.pyramid = Pyramid(encoder, channels)
        self.scale_heads = nn.ModuleList()
        for level in range(4):
            layers = []
            for k in range(max(1, level)):
                conv = nn.Conv2d(width if k else channels, width, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                if level:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images):
        """Normalised (B, 3, H, W) -> logits (B, K, H/s, W/s). At the right: ViT-Tiny at 512."""
        maps = self.encoder.feature_maps(images, self.pyramid.taps)     # 4 x (B, 192, 32, 32)
        maps = self.pyramid(maps)                                       # (B, 48, 128, 128) .. 16
        x = sum(head(m) for head, m in zip(self.scale_heads, maps))     # (B, 128, 128, 128)
        return self.classifier(self.dropout(x))                         # (B, 150, 128, 128)


def segmentation_loss(logits, labels):
    """Cross entropy of logits (B, K, ., .), enlarged bilinearly, with labels (B, H, W).

    The mean is over ignored pixels too, as in the authors' code: every process and micro-step has
    the same denominator, so their average is the loss of the whole batch.
    """
    logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
    total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")
    return total / labels.numel()


def build_model(args, names):
    """SemanticFPN on --model, for classes of these names. A ViT gets relative position bias and
    LayerScale that starts at 1."""
    vit = dict(patch_size=args.patch_size, rel_pos_bias=True, layer_scale=1.0)
    options = {} if args.model.startswith("hiera") else vit
    encoder = MODELS[args.model](img_size=args.image_size, drop_path=args.drop_path, **options)
    model = SemanticFPN(encoder, len(names), dropout=args.dropout)
    model.classes = names
    if dist.is_initialized() and dist.get_backend() == "nccl":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def linear_lr(step, total, warmup, lr):
    """Learning rate of optimizer step `step` (from 0): linear warm-up from a millionth of lr, then
    linear to 0."""
    if step < warmup:
        return lr * (1e-6 + (1 - 1e-6) * step / warmup)
    return lr * (total - step) / max(1, total - warmup)


def train(args):
    """One run into args.out, from --init or on from its last.pt -> best mIoU."""
    run = init_distributed(args)
    rank, world, device, dtype = run
    torch.manual_seed(args.seed)
    train_set = open_set(args, "training")
    val_set = open_set(args, "validation")
    model = build_model(args, class_names(args)).to(device)
    if args.init:
        load_encoder(model.encoder, args.init)

    sampler = EpochSampler(train_set, args.batch_size, args.accum_steps, rank, world, args.seed)
    args.train_images = len(train_set)
    last_step = min(args.iters, args.max_steps or args.iters)
    groups = param_groups(model, args.weight_decay, args.layer_decay, model.encoder.depth)
    optimizer = torch.optim.AdamW(groups, args.lr, args.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    describe(run, args, model, train_set, val_set, sampler)

    state = resume(args, FIXED, model, optimizer, scaler, rank, world)
    step = sampler.first_step = state["step"]
    best = state.get("best", -1.0)
    network = parallel(model, args, device, world)
    batches = endless_batches(train_set, sampler, args, device)
    log = RunLog(args, step, last_step, sampler.batch_size, rank)

    while True:
        # evaluate every few thousand steps and at the end
        if step >= last_step or (step and step % args.eval_every == 0):
            best = report(run, args, model, val_set, step, best)
        if step >= last_step:
            break

        # forward and backward, in micro-steps
        started = time.perf_counter()
        waited = 0.0
        totals = {"loss": 0.0}
        items = []
        network.train()
        torch.manual_seed(mix_seed(args.seed, step, rank))
        for micro_step in range(args.accum_steps):
            before = time.perf_counter()
            images, labels, index, unreadable = next(batches)
            waited += time.perf_counter() - before
            items += zip(index.tolist(), unreadable.tolist())
            images = normalize(images.to(device, non_blocking=True), args.mean, args.std)
            labels = labels.to(device, non_blocking=True)
            network.require_backward_grad_sync = micro_step == args.accum_steps - 1    # for DDP
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = segmentation_loss(network(images), labels)
            scaler.scale(loss / args.accum_steps).backward()
            totals["loss"] += loss.detach() / args.accum_steps

        # clip, and look at the loss before it can harm the weights: the one wait of a step
        lr = linear_lr(step, args.iters, args.warmup_iters, args.lr)
        scaler.unscale_(optimizer)
        totals["grad_norm"] = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        totals["unreadable"] = world * sum(unreadable for _, unreadable in items)
        totals["stop"] = log.stop.is_set()
        values = average_over_processes(totals, world, device)
        check_step(values, totals["loss"], items, train_set, args, step, lr, scaler)

        # update
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # log, save
        log.add(step, lr, values, time.perf_counter() - started, waited)
        if step % args.save_every == 0 or step == last_step or values["stop"]:
            save(args, model, step, best, rank, "last.pt", optimizer=optimizer.state_dict(),
                 scaler=scaler.state_dict())
        if values["stop"] and step < last_step:
            break

    log.close(step)
    return best


def save(args, model, step, best, rank, file, **more):
    """last.pt, all that the run needs to go on, or best.pt, what --eval and --predict read."""
    if rank == 0:
        save_checkpoint(Path(args.out, file), model=model.state_dict(), arch=model.encoder.arch,
                        classes=model.classes, mean=list(args.mean), std=list(args.std),
                        args=plain(args), step=step, best=best, **more)


def describe(run, args, model, train_set, val_set, sampler):
    """Print what this run is, once."""
    rank, world, device, dtype = run
    if rank == 0:
        print(f"Semantic FPN on {args.model}, taps after blocks {model.pyramid.taps}; "
              f"{args.num_classes} classes, {len(train_set)} training images, {len(val_set)} for "
              f"validation; {args.iters} steps, warm-up {args.warmup_iters}")
        print(f"batch {sampler.batch_size} = {sampler.micro_batch} images x {world} process(es) x "
              f"{args.accum_steps} micro-steps; lr {args.lr:.3g}, x {args.layer_decay} for each "
              f"block towards the input; {device}, {dtype}")


# --------------------------------------------------------------------------------------------------
# Data: images and augmentation
# --------------------------------------------------------------------------------------------------
def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def resized_shape(shape, short, long):
    """The largest (H, W) of the same ratio with sides of at most `short` and `long`."""
    factor = min(short / min(shape), long / max(shape))
    return [max(1, int(side * factor + 0.5)) for side in shape]


def resize_for_test(image, size):
    """(3, H, W) with the short side of a window `size`, but a long side of at most 4 times it."""
    shape = resized_shape(image.shape[1:], min(size), 4 * min(size))
    return resize(image, shape, antialias=False)


def class_ratio_crop(labels, size, ratio=0.75, tries=10):
    """Rows and columns (slices) of a random crop of `size` (h, w) out of labels (H, W), drawn
    again, at most `tries` times, until two classes occur and none covers `ratio` of the labelled
    pixels."""
    for _ in range(tries + 1):
        crop = []
        for have, want in zip(labels.shape, size):
            first = int(torch.randint(max(0, have - want) + 1, ()))
            crop.append(slice(first, first + want))
        counts = torch.bincount(labels[tuple(crop)].flatten(), minlength=256)[:IGNORE]
        if counts.count_nonzero() > 1 and counts.max() < ratio * counts.sum():
            break
    return crop


def saturate(x, factor):
    """S of HSV times `factor`, at most 1, of (3, H, W) in [0, 1]; the hue and V, the brightest
    channel, stay."""
    value = x.amax(dim=0)
    chroma = (value - x.amin(dim=0)).clamp(min=1e-6)
    return value - (value - x) * (value / chroma).clamp(max=factor)


def distort(image):
    """Photometric distortion of (3, H, W) uint8: brightness, saturation, hue and, before or after
    these two, contrast, each with probability 0.5."""
    x = image.float() / 255
    brighter, contrasted, contrast_first, saturated, shifted = torch.rand(5) < 0.5
    contrast = uniform(0.5, 1.5) if contrasted else 1.0
    if brighter:
        x = (x + uniform(-32, 32) / 255).clamp(0, 1)
    if contrast_first:
        x = (x * contrast).clamp(0, 1)
    if saturated:
        x = saturate(x, uniform(0.5, 1.5))
    if shifted:
        x = adjust_hue(x, uniform(-0.1, 0.1))    # of a turn: 18 of OpenCV's 180 steps
    if not contrast_first:
        x = (x * contrast).clamp(0, 1)
    return (x * 255).round().to(torch.uint8)


def augment(image, labels, size, fill):
    """The paper's augmentation: image (3, H, W), labels (H, W) -> both of `size` (h, w).

    Short side U(0.5, 2) times the crop's (long side at most 4 times that), class-ratio crop, flip,
    photometric distortion, and padding at the right and below with the colour `fill` and IGNORE.
    """
    scale = uniform(0.5, 2) * min(size)
    shape = resized_shape(labels.shape, scale, 4 * scale)
    image = resize(image, shape, antialias=False)                        # bilinear
    labels = resize(labels[None], shape, InterpolationMode.NEAREST)[0]
    rows, columns = class_ratio_crop(labels, size)
    image = distort(image[:, rows, columns])
    labels = labels[rows, columns]
    if torch.rand(()) < 0.5:
        image = image.flip(-1)
        labels = labels.flip(-1)
    missing = [0, 0, size[1] - labels.shape[1], size[0] - labels.shape[0]]    # right, below
    return pad(image, missing, fill), pad(labels[None], missing, IGNORE)[0]


class SegmentationSet(Dataset):
    """Images with a class for every pixel. items: pairs of files, or of numbers of toy pictures.

    Item (epoch, index) -> image (3, H, W) uint8, labels (H, W) uint8, index, and whether the file
    could not be read (all its pixels are ignored then). train=True: augmented crops; all randomness
    comes from (seed, epoch, index). train=False: the image resized for windows, labels in their own
    size.
    """

    def __init__(self, items, args, train):
        self.items = items
        self.args = args
        self.train = train
        self.table = label_table(args.num_classes, args.zero_is_class)

    def __len__(self):
        return len(self.items)

    def name(self, index):
        return str(self.items[index][0])

    def load(self, index):
        image, labels = self.items[index]
        try:
            image = to_tensor(open_item(image))
        except READ_ERRORS:
            blank = torch.zeros(self.args.image_size, dtype=torch.uint8)
            return blank.expand(3, -1, -1), blank + IGNORE, True
        if isinstance(labels, int):
            return image, torch.tensor(toy_picture(labels)[2]), False
        return image, read_labels(labels, self.table), False

    def __getitem__(self, key):
        epoch, index = key
        image, labels, unreadable = self.load(index)
        size = self.args.image_size
        if not self.train:
            return resize_for_test(image, size), labels, index, unreadable
        fill = [round(255 * c) for c in self.args.mean]
        with torch.random.fork_rng(devices=[]):    # the process's own generator is left alone
            torch.default_generator.manual_seed(mix_seed(self.args.seed, epoch, index))
            image, labels = augment(image, labels, size, fill)
        return image, labels, index, unreadable


def list_pairs(root, split):
    """(image, label) files of a split, matched by name. Raises InputError where one is missing."""
    pairs = []
    images = Path(root, "images", split)
    for file in list_images(images):
        labels = Path(root, "annotations", split, os.path.relpath(file, images)).with_suffix(".png")
        if not labels.exists():
            raise InputError(f"image {file} has no labels: {labels} does not exist")
        pairs.append((file, str(labels)))
    return pairs


def open_set(args, split):
    """The "training" or "validation" set of --data. Every process checks all its label files, so
    that all end with the same sentence."""
    training = split == "training"
    if args.data == "toy":
        numbers = range(args.toy_images) if training else range(7000, 7100)
        return SegmentationSet([(i, i) for i in numbers], args, training)
    pairs = list_pairs(args.data, split)
    check = functools.partial(check_pair, table=label_table(args.num_classes, args.zero_is_class))
    checks = DataLoader(pairs, None, num_workers=args.workers, collate_fn=check)
    for _ in tqdm(checks, f"reading {split} labels", disable="RANK" in os.environ, leave=False):
        pass    # the work is done in the loader processes
    return SegmentationSet(pairs, args, training)


# --------------------------------------------------------------------------------------------------
# Data: labels
# --------------------------------------------------------------------------------------------------
def label_table(num_classes, zero_is_class):
    """Class of every number in a label file -> (257,) int16: IGNORE for unlabelled pixels, -1 for
    invalid numbers; the last entry stands for all above 255.

    ADE20K: 0 is ignored, 1 .. 150 are classes 0 .. 149. Labels are shifted here and nowhere else.
    """
    table = np.full(257, -1, np.int16)
    first = 0 if zero_is_class else 1
    table[[0, IGNORE]] = IGNORE
    table[first:first + num_classes] = np.arange(num_classes)
    return table


def read_labels(path, table):
    """Label PNG (grey or palette) -> (H, W) uint8 classes by `label_table`. Raises InputError."""
    try:
        with Image.open(path) as image:
            numbers = np.asarray(image).astype(np.int64)    # a one-bit image has booleans
    except READ_ERRORS as error:
        raise InputError(f"cannot read labels {path} ({type(error).__name__}): replace them, or "
                         "remove them with their image") from None
    if numbers.ndim != 2:
        raise InputError(f"labels {path} are a colour image: they must be one class number per "
                         "pixel, grey or palette")
    labels = table[numbers.clip(max=256)]
    if labels.min() < 0:
        raise InputError(f"labels {path} hold the number {numbers[labels < 0][0]}, which is no "
                         "class: check --num-classes and --zero-is-class")
    return torch.from_numpy(labels.astype(np.uint8))


def check_pair(pair, table):
    """Raise InputError if the labels of a pair of files are wrong, or not of the image's size. An
    image that cannot be read is left for training to report."""
    image, labels = pair
    height, width = read_labels(labels, table).shape
    try:
        size = open_image(image).size    # JPEGs are not decoded
    except READ_ERRORS:
        return
    if size != (width, height):
        raise InputError(f"{image} has {size[0]}x{size[1]} pixels, its labels {labels} "
                         f"{width}x{height}: they must have the same size")


def class_names(args):
    """From objectInfo150.txt in --data, which comes with ADE20K, or numbers."""
    listed = Path(args.data, "objectInfo150.txt")
    names = [f"class {k}" for k in range(args.num_classes)]
    if args.data == "toy":
        names = ["ground", *TOY_CLASSES]
    elif listed.exists():    # a header; the last of 5 columns is like "wall, wall panel"
        rows = [row for row in listed.read_text().splitlines() if not row.startswith("Idx")]
        names = [row.split("\t")[-1].split(",")[0] for row in rows]
    if len(names) != args.num_classes:
        raise InputError(f"{listed} has {len(names)} names, --num-classes is {args.num_classes}")
    return names


# --------------------------------------------------------------------------------------------------
# Evaluation: sliding windows and mean IoU
# --------------------------------------------------------------------------------------------------
def window_starts(length, window, stride):
    """First pixels of the windows that cover `length` pixels: 0, stride, 2 stride, ..., and the
    last flush with the end."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


@torch.no_grad()
def sliding_logits(model, image, stride):
    """Class logits (K, H, W) float32 of a normalised image (3, H, W) of any size: the average over
    overlapping windows of the size that the encoder is built for, in one batch."""
    h, w = model.encoder.img_size
    H, W = image.shape[1:]
    image = F.pad(image, (0, max(0, w - W), 0, max(0, h - H)))
    corners = list(itertools.product(window_starts(H, h, stride), window_starts(W, w, stride)))
    scores = model(torch.stack([image[:, y:y + h, x:x + w] for y, x in corners]))
    scores = scores.contiguous()    # channels may stand last in memory: slow sums
    total = image.new_zeros(len(scores[0]), *image.shape[1:])
    count = image.new_zeros(image.shape[1:])
    for (y, x), score in zip(corners, scores):                                   # (K, h/s, w/s)
        score = F.interpolate(score[None].float(), (h, w), mode="bilinear")[0]
        total[:, y:y + h, x:x + w] += score
        count[y:y + h, x:x + w] += 1
    return total.div_(count)[:, :H, :W]


@torch.no_grad()
def label_image(run, args, model, image, size):
    """Classes (H, W) uint8, in the given size, of an image (3, ., .) uint8 by sliding windows."""
    _, _, device, dtype = run
    image = normalize(image.to(device), args.mean, args.std)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = sliding_logits(model, image, args.stride)
    logits = F.interpolate(logits[None], tuple(size), mode="bilinear")[0]
    return logits.argmax(dim=0).byte()


def confusion_matrix(predicted, labels, num_classes):
    """Pixels of every (true, predicted) pair of classes -> (K, K) int64, without ignored ones."""
    labelled = labels != IGNORE
    cells = labels[labelled].long() * num_classes + predicted[labelled]
    return cells.bincount(minlength=num_classes ** 2).view(num_classes, num_classes)


def class_iou(confusion):
    """IoU = true positives / (labelled or predicted as the class) -> (K,), NaN where neither is."""
    hits = confusion.diagonal()
    return hits / (confusion.sum(dim=0) + confusion.sum(dim=1) - hits)


def summarize(confusion):
    """Scores in per cent from the confusion matrix of the whole set -> dict. The mean IoU is over
    the classes that occur in labels or predictions; `absent` counts the others."""
    if not confusion.sum():
        raise InputError("no pixel of the validation labels has a class: check --zero-is-class")
    confusion = confusion.cpu().double()
    iou = class_iou(confusion)
    return {"miou": 100 * iou.nanmean().item(),
            "pixel_accuracy": 100 * (confusion.trace() / confusion.sum()).item(),
            "absent": int(iou.isnan().sum()),
            "iou": [round(100 * v, 2) for v in iou.nan_to_num().tolist()]}


def evaluate(run, args, model, val_set):
    """-> confusion matrix (K, K) of the validation set, each image once at any world size, and some
    of this process's images, truths and predictions."""
    rank, world, device, _ = run
    model.eval()
    if world > 1:    # batch statistics of the first process; SyncBatchNorm's are the same anyway
        for name, buffer in model.named_buffers():
            if "running" in name:
                dist.broadcast(buffer, 0)
    confusion = torch.zeros(args.num_classes, args.num_classes, dtype=torch.long, device=device)
    examples = []
    bad = []
    loader = tqdm(own_batches(val_set, None, args, rank, world), "evaluation", disable=rank != 0,
                  leave=False)
    for image, labels, index, unreadable in loader:
        if unreadable:
            bad.append(index)
        predicted = label_image(run, args, model, image, labels.shape)
        confusion += confusion_matrix(predicted, labels.to(device), args.num_classes)
        if len(examples) < 5:
            examples.append((image, labels, predicted.cpu()))
    if world > 1:
        dist.all_reduce(confusion)
    check_readable(val_set, bad, args, world, device)
    return confusion, examples


def report(run, args, model, val_set, step, best=math.inf):
    """Evaluate on all processes; log, print and draw on process 0, and save a model whose mIoU is
    the best until now -> best mIoU."""
    confusion, examples = evaluate(run, args, model, val_set)
    values = summarize(confusion)
    if run[0] == 0:
        log_line(Path(args.out, "eval.jsonl" if args.eval else "log.jsonl"), step=step, **values)
        tqdm.write(f"step {step}: mIoU {values['miou']:.2f} ({values['absent']} classes absent), "
                   f"pixel accuracy {values['pixel_accuracy']:.2f}; {len(val_set)} images, "
                   f"slide, window {args.image_size}, stride {args.stride}")
        draw_overlays(f"{args.out}/overlay.png", ("input", "truth", "prediction"), examples,
                      model.classes)
    if values["miou"] <= best:
        return best
    save(args, model, step, values["miou"], run[0], "best.pt")
    return values["miou"]


# --------------------------------------------------------------------------------------------------
# Pictures and predictions
# --------------------------------------------------------------------------------------------------
def draw_overlays(path, titles, rows, names, width=200):
    """PNG of rows: a picture (3, H, W) uint8, and the same under each of its label maps (H, W).
    Ignored pixels are not coloured; the classes' names stand at the right, in their colours."""
    classes = torch.arange(len(names))[:, None, None]
    colors = [f"hsl({137.5 * k % 360}, 90%, {65 - 20 * (k % 2)}%)" for k in range(len(names))]
    found = set()
    strips = []
    for picture, *maps in rows:
        shape = [max(1, width * picture.shape[1] // picture.shape[2]), width]
        picture = resize(picture, shape)
        strip = [picture]
        for labels in maps:
            labels = resize(labels[None], shape, InterpolationMode.NEAREST)
            strip.append(draw_segmentation_masks(picture, labels == classes, 0.6, colors))
            found.update(labels.unique().tolist())
        strips.append(make_grid(strip, padding=4))
    pixels = torch.cat(strips, dim=1).permute(1, 2, 0).numpy()
    found = sorted(found - {IGNORE})
    height = 30 + max(len(pixels), 20 * len(found))
    sheet = Image.new("RGB", (pixels.shape[1] + 180, height))
    sheet.paste(Image.fromarray(pixels), (0, 24))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((4 + column * (width + 4), 4), title, "white", font)
    legend = pixels.shape[1] + 8
    for line, k in enumerate(found):
        draw.text((legend, 24 + 20 * line), names[k][:22], colors[k], font)
    sheet.save(path)


def predict(run, args, model):
    """Label every image of --predict, into OUT/predict: NAME.jpg_labels.png, with the numbers of
    label files, and NAME.jpg_overlay.png. Raises OSError at the end if some cannot be read."""
    rank, world, _, _ = run
    path = Path(args.predict)
    files = list_images(path) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    bad = []
    for file in tqdm(files[rank::world], "prediction", disable=rank != 0):
        try:
            image = read_image(file)
        except READ_ERRORS as error:
            bad.append(f"{file} ({type(error).__name__})")
            continue
        small = resize_for_test(image, args.image_size)    # 150 maps of a photo would fill memory
        labels = label_image(run, args, model, small, small.shape[1:]).cpu()
        labels = resize(labels[None], list(image.shape[1:]), InterpolationMode.NEAREST)[0]
        target = Path(args.out, "predict", os.path.relpath(file, root))
        target.parent.mkdir(parents=True, exist_ok=True)
        numbers = labels + (0 if args.zero_is_class else 1)
        Image.fromarray(numbers.numpy()).save(f"{target}_labels.png")
        rows = [(image, labels)]
        draw_overlays(f"{target}_overlay.png", ("input", "prediction"), rows, model.classes, 480)
    if world > 1:
        dist.barrier()    # an error ends the other processes
    if bad:
        raise OSError(f"cannot read {', '.join(bad)}; every other image was labelled")


# --------------------------------------------------------------------------------------------------
# Process group, sampler, log (the same text in every training script)
# --------------------------------------------------------------------------------------------------
def init_distributed(args, minutes=10):
    """Join torchrun's process group, if there is one -> rank, world, torch.device, torch.dtype."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=minutes))
    return rank, world, device, choose_dtype(args.dtype, device)


class EpochSampler(DistributedSampler):
    """Yields (epoch, index) for this process without end, starting at optimizer step `first_step`.
    A batch is the same for any number of processes and micro-steps; a data set smaller than it
    gives one batch, rounded down to a multiple of processes x micro-steps."""

    def __init__(self, dataset, batch_size, accum_steps, rank, world, seed):
        super().__init__(dataset, world, rank, seed=mix_seed(seed), drop_last=True)
        parts = accum_steps * world
        self.micro_batch = min(batch_size, len(dataset)) // parts
        self.batch_size = self.micro_batch * parts
        if batch_size % parts or not self.batch_size:
            raise InputError(f"--batch-size {batch_size} of {len(dataset)} items cannot be dealt "
                             f"out to {world} process(es) x --accum-steps {accum_steps}: choose "
                             f"a multiple of {parts}, and no fewer items than that")
        self.steps_per_epoch = len(dataset) // self.batch_size
        self.first_step = 0

    def __iter__(self):
        share = self.batch_size // self.num_replicas
        epoch, done = divmod(self.first_step, self.steps_per_epoch)
        while True:
            self.set_epoch(epoch)
            indices = list(super().__iter__())[share * done:share * self.steps_per_epoch]
            yield from ((epoch, index) for index in indices)
            epoch += 1
            done = 0


class RunLog:
    """Progress bar and log.jsonl, written by process 0. SIGTERM sets `stop`: finish the step, save
    and leave, which `train` does once any process was asked to."""

    def __init__(self, args, step, last_step, batch_size, rank):
        self.path = Path(args.out, "log.jsonl") if rank == 0 else None
        start_log(self.path, args, step)
        self.every = args.log_every
        self.batch_size = batch_size
        self.window = []
        self.stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self.stop.set())
        self.bar = tqdm(total=last_step, initial=step, unit="step", disable=rank != 0)

    def add(self, step, lr, values, seconds, waited):
        """Note a step: its values, how long it took and waited for data. A line every few steps."""
        self.window.append({**values, "lr": lr, "seconds": seconds, "data_share": waited / seconds})
        self.bar.update()
        if step % self.every and step < self.bar.total and not values["stop"]:
            return
        means = {k: sum(v[k] for v in self.window) / len(self.window) for k in self.window[0]}
        rate = self.batch_size / means.pop("seconds")
        hint = ", more --workers would help" if means["data_share"] > 0.3 else ""
        self.bar.set_postfix_str(f"loss {means['loss']:.4f}, {rate:.0f} img/s, waiting for data "
                                 f"{means['data_share']:.0%}{hint}", refresh=False)
        log_line(self.path, step=step, **means, img_s=rate,
                 eta_h=(self.bar.total - step) * self.batch_size / rate / 3600,
                 memory_gb=torch.cuda.max_memory_allocated() / 2 ** 30)
        self.window = []

    def close(self, step):
        """End the bar; after SIGTERM, exit with status 1."""
        self.bar.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if step < self.bar.total:
            message = f"stopped by SIGTERM after step {step}; the same command goes on from there"
            sys.exit(message if self.path else 1)


# --------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's
# --------------------------------------------------------------------------------------------------
FIXED = ("init_sha", "model", "image_size", "patch_size", "drop_path", "dropout", "num_classes",
         "zero_is_class", "mean", "std", "iters", "warmup_iters", "batch_size", "layer_decay",
         "weight_decay", "betas", "seed", "train_images")    # the run's meaning; see `resume`


def parse_args(argv=None, **defaults):
    """Options of the command line, or of the list `argv`; `defaults` stand in for the paper's."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]",
                                     description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    positive = number(int, "[1, inf)")
    add = parser.add_argument_group("model and classes; --eval takes the file's").add_argument
    add("--model", choices=tuple(MODELS), default="vit_tiny", help="encoder; paper: vit_tiny")
    add("--init", help="checkpoint of the encoder (README, 'Checkpoints'); default: random; "
                       "with --eval, --predict: of this script; default: best.pt of --out")
    add("--image-size", type=positive, nargs="+", default=[512],
        help="side, or height and width, of crops and windows; paper: 512")
    add("--patch-size", type=positive,
        help="side of a ViT patch; default: that of --init, else of --model")

    add = parser.add_argument_group("data").add_argument
    add("--data", default="data/ADEChallengeData2016",
        help="folder with {images,annotations}/{training,validation}, or 'toy' for drawn pictures")
    add("--num-classes", type=number(int, "[2, 254]", ": labels are bytes, 255 means ignored"),
        default=150, help="label files hold 1 .. this, and 0 for ignored pixels")
    add("--zero-is-class", action="store_true",
        help="label files hold 0 .. num-classes - 1, and 255 for ignored pixels")
    add("--skip-corrupt", action="store_true",
        help="go on without unreadable images, and count them; default: stop")

    add = parser.add_argument_group("recipe (Sec. 'transfer', ADE20K)").add_argument
    add("--iters", type=positive, default=160_000, help="paper: 160000")
    add("--warmup-iters", type=number(int, "[0, inf)"),
        help="linear from a millionth of --lr; default: 1500 of 160000, as the paper's")
    add("--batch-size", type=positive, default=16,
        help="images per optimizer step over all processes; paper: 16")
    add("--lr", type=number(float, "[0, inf)"), default=1e-4,
        help="of pyramid and head; falls to 0 linearly; paper: 1e-4")
    add("--clip-grad", type=number(float, "[0, inf)"), default=0.0,
        help="largest gradient norm; 0: no clipping, as in the paper")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="score a checkpoint instead of training")
    add("--predict", metavar="PATH", help="label an image, or all images below a folder")

    add = add_run_options(parser, "out/segment")
    add("--compile", action="store_true", help="torch.compile the network for training")
    add("--seed", type=number(int, "[0, 4294967296)"), default=0)
    add("--max-steps", type=positive,
        help="stop after so many optimizer steps (the schedule stays that of --iters)")
    add("--save-every", type=positive, default=2000, help="steps between last.pt")
    add("--eval-every", type=positive, default=16_000,
        help="steps between evaluations; there is always one at the end")
    add("--demo", action="store_true",
        help="a few minutes on drawn pictures: random weights against pretrain_d2mae.py --demo")
    parser.set_defaults(**{**RECIPE, **defaults})
    args = parser.parse_args(argv)
    if args.demo and not defaults:
        return parse_args(argv, **DEMO)
    return args


def resolve(args):
    """Fill in the defaults that depend on other options or on files; refuse what has no meaning.
    InputError."""
    if args.eval or args.predict:
        args.init = args.init or f"{args.out}/best.pt"
        file = read_file(args.init)
        keys = ("model", "image_size", "patch_size", "num_classes", "zero_is_class")
        try:
            vars(args).update({key: file["args"][key] for key in keys})
        except (KeyError, TypeError):
            raise InputError(f"{args.init} is no segmentation model: give best.pt of this script "
                             "as --init") from None

    # what the encoder's file tells
    hiera = args.model.startswith("hiera")
    info = load_state(args.init)[1] if args.init else {}
    args.init_sha = fingerprint(args.init)
    args.mean = tuple(info.get("mean", IMAGENET_MEAN))
    args.std = tuple(info.get("std", IMAGENET_STD))
    if not args.patch_size:
        args.patch_size = MODELS[args.model].keywords.get("patch_size", 16)
        if args.init and not hiera:
            found, args.patch_size = infer_model(args.init)
            if found.startswith("hiera"):
                raise InputError(f"--init {args.init} is a {found}: choose --model {found}")

    # sizes, classes, schedule
    cell = 32 if hiera else 2 * args.patch_size
    if len(args.image_size) > 2 or any(side % cell for side in args.image_size):
        raise InputError(f"--image-size {' '.join(map(str, args.image_size))} must be one or two "
                         f"multiples of {cell}, the pixels of one cell of the coarsest map")
    args.image_size = (args.image_size[0], args.image_size[-1])
    args.stride = int(min(args.image_size) * args.stride)
    if args.data == "toy":
        args.num_classes = 1 + len(TOY_CLASSES)
        args.zero_is_class = True
    if args.warmup_iters is None:
        args.warmup_iters = int(args.iters * args.warmup)
    if args.warmup_iters >= args.iters:
        raise InputError(f"--warmup-iters {args.warmup_iters} must be fewer than --iters "
                         f"{args.iters}")
    return args


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------
def demo(args):
    """Is a pre-trained encoder worth having when few pictures are labelled? Runs from random
    weights and from the encoder of the pre-training demo, with the same seeds."""
    if not Path(args.init).exists():
        raise InputError(f"no {args.init} to start from: run pretrain_d2mae.py --demo first")
    miou = {"scratch": [], "pre-trained": []}
    seeds = range(args.seed, args.seed + args.seeds)
    for seed, name in itertools.product(seeds, miou):
        init = args.init if name == "pre-trained" else None
        options = {**vars(args), "init": init, "seed": seed, "out": f"{args.out}/{name}{seed}"}
        miou[name].append(train(resolve(argparse.Namespace(**options))))
    print(f"mIoU from {args.toy_images} labelled pictures, {args.seeds} seeds, mean and standard "
          "error")
    print_comparison(*miou.values())


def main(args):
    """The run that the options describe: the demo, training, --eval or --predict."""
    if args.demo:
        demo(args)
        return
    args = resolve(args)
    if not (args.eval or args.predict):
        train(args)
        return
    run = init_distributed(args)
    file = read_file(args.init)
    model = build_model(args, file["classes"]).to(run[2]).eval()
    model.load_state_dict(file["model"])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.predict:
        predict(run, args, model)
    else:
        report(run, args, model, open_set(args, "validation"), file["step"])


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
