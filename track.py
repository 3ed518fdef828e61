"""OSTrack with a lightweight ViT: training, evaluation on LaSOT, own videos (Sec. "transfer").

    D=lasot=data/lasot,got10k=data/got10k,coco=data/coco,trackingnet=data/trackingnet
    torchrun --nproc_per_node=4 track.py --data $D --init out/pretrain/encoder.pt   # the paper's
    torchrun --nproc_per_node=8 track.py --eval --data lasot=data/lasot         # AUC, P, P_norm
    python track.py --eval --data lasot=data/lasot --results DIR   # boxes of any tracker
    python track.py --frames DIR --box 120 80 40 60                 # boxes.txt and overlay.gif
    python track.py --benchmark                                     # frames per second
    python track.py --demo                                          # needs no files

The tokens of a template (the target in the first frame) and of a search region (around the last
box) go through the blocks of the ViT together, so features are extracted and compared at once.
Three blocks also throw out the search tokens that the template's centre token attends to least. A
convolutional head on the search tokens predicts the target's centre and its box. Read
`block_with_elimination`, `Tracker`, `tracking_losses`, `OnePassTracker` next to the paper, then
`train`.

Shapes: B pairs, Z template tokens, S search tokens (a g x g grid), K of them kept, D width,
        H heads, d = D / H, T tokens of both; z and s pixels along the template and search crops.
Boxes:  x, y, w, h (upper left corner, size) in pixels of a frame, or in [0, 1] of a square crop.

NOTES, departures from the authors' code:
- The elimination reads one row of the attention map, that of the template's centre token, so only
  this row is written out (in float32); attention itself stays fused, for the queries that are
  kept. While tracking, batch norms are folded into the convolutions, and the template is embedded
  once. The numbers are the same.
- Boxes are mapped out of a crop by the exact inverse of the mapping in, and mirrored about the same
  centre, (size - 1) / 2. The authors map in with that centre but out, and mirror, with size / 2.
- Each crop is flipped on its own. The authors flip both frames and then each crop again, which has
  the same distribution.
- A template has a visible frame at most 200 later, or is not drawn; the authors start at 199 and
  widen the gap by 5 until one is found. Where a sequence does not serve, another set may be drawn,
  too; theirs stays.
- A crop that reaches the right or lower edge keeps the frame's last column or row; theirs loses it.
- Batch norms of the head see one process's pairs, as theirs: 32 with their 4 GPUs. Other numbers of
  processes or --accum-steps change that.
- Biases, norms and position tables are not decayed; the authors decay all parameters by 1e-4.
- Nothing is withheld to watch the training, as the authors watch GOT-10k's validation set: the IoU
  in log.jsonl is of pairs that are new in every epoch. As theirs, the tracker is the last epoch's.
- All of GOT-10k trains; the authors take the 7,086 sequences of their list `vottrain`.
- A file that cannot be read makes another pair stand in, as theirs, and is counted in log.jsonl.
- A frame whose true box has no extent counts as absent, in P_norm too. Boxes are saved with two
  decimals (--int cuts them off, as the authors do).
- Evaluation is in float32, as theirs. Training is in bfloat16 or float16 on a GPU; theirs is in
  float32, which --dtype fp32 gives.
"""
import argparse
import datetime
import functools
import hashlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.ops import box_area, box_convert, generalized_box_iou_loss
from torchvision.transforms.v2.functional import (adjust_brightness, resize, resized_crop,
                                                  rgb_to_grayscale)
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

from models import (IMAGENET_MEAN, IMAGENET_STD, MODELS, READ_ERRORS, InputError,
                    VisionTransformer, add_run_options, attention_logits, average_over_processes,
                    check_step, choose_device, choose_dtype, endless_batches, fingerprint,
                    infer_model, list_images, load_encoder, load_state, log_line, mix_seed,
                    normalize, number, parallel, param_groups, plain, plain_errors, read_file,
                    read_image, resize_grid, resume, save_checkpoint, start_log, to_tensor,
                    toy_picture)

TRACKER = dict(    # OSTrack-256; a checkpoint stores these beside its weights
    template_size=128, search_size=256,         # pixels along the crops
    template_factor=2.0, search_factor=4.0,     # side of a crop over sqrt(w * h) of the box
    eliminate_blocks=(4, 7, 10),                # they remove search tokens; counted from 1
    keep_rate=0.7,                              # share of the search tokens that each of them keeps
    head_channels=256                           # halved by each of the next three layers
)
RECIPE = dict(    # what a run rarely changes; the rest are options, see `parse_args`
    patch_size=None,                            # of an encoder without --init; None: its usual one
    max_gap=200,                                # frames between template and search, at most
    drop_path=0.1,                              # of the last block; grows linearly from 0
    centre_jitter=3.0,                          # of the search region: +- half of it * sqrt(w * h)
    scale_jitter=0.25,                          # of the search region: deviation of log w and log h
    encoder_lr=0.1, weight_decay=1e-4,          # AdamW; the encoder's rate is this times --lr
    log_every=20,                               # optimizer steps per line of log.jsonl
    skip_corrupt=True,                          # another pair stands in
    compile=False                               # keep rates that change would be compiled anew
)
DEMO = dict(data="toy", out="out/demo/track", model="vit_pico", patch_size=8, template_size=40,
            search_size=64, head_channels=64, keep_rate=0.8, drop_path=0.0, epochs=7, pairs=1200,
            batch_size=8, lr=1e-3, encoder_lr=0.5, workers=1)
TOY = dict(size=(120, 160), frames=40, train=range(60), test=range(7000, 7008))    # videos


# --------------------------------------------------------------------------------------------------
# Method: joint encoder with candidate elimination
# --------------------------------------------------------------------------------------------------
def block_with_elimination(block, x, ids, keep, centre):
    """A transformer block that keeps `keep` search tokens -> x (B, Z + keep, D), ids (B, keep).

    x (B, Z + S, D), template tokens first; ids (B, S): raster places of the search tokens; centre:
    the template token whose attention (after the softmax over all tokens, mean over heads) ranks
    the search tokens. What is removed still serves as key and value, and is gone before the MLP.
    """
    B, T, D = x.shape
    Z = T - ids.shape[1]
    qkv = block.attn.qkv(block.norm1(x)).view(B, T, 3, block.attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # 3 x (B, H, T, d)

    row = attention_logits(q[:, :, centre:centre + 1], k).softmax(dim=-1)   # (B, H, 1, T)
    top = row.mean(dim=(1, 2))[:, Z:].topk(keep, dim=1).indices             # (B, keep)
    template = torch.arange(Z, device=x.device).expand(B, -1)
    kept = torch.cat([template, Z + top], dim=1)                            # (B, Z + keep)
    batch = torch.arange(B, device=x.device)[:, None]

    x = x[batch, kept]                                                      # (B, Z + keep, D)
    q = q.transpose(1, 2)[batch, kept].transpose(1, 2)                      # (B, H, Z + keep, d)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    x = x + block.drop_path(block.ls1(block.attn.proj(y)))
    return x + block.drop_path(block.ls2(block.mlp(block.norm2(x)))), ids.gather(1, top)


class Tracker(nn.Module):
    """OSTrack: a VisionTransformer over template and search tokens together, and a centre head on
    the search tokens. options: those of TRACKER that differ from the paper's.

    The position tables of both grids are made from the encoder's own, bicubically, and trained in
    its place. Raises InputError if a crop is no multiple of the patch size.
    """

    def __init__(self, encoder, **options):
        super().__init__()
        self.options = {**TRACKER, **options}
        self.arch = {**encoder.arch, "tracker": self.options}
        self.encoder = encoder
        patches = encoder.pos_embed.detach()[:, 1:]
        for crop in ("template", "search"):
            size = self.options[f"{crop}_size"]
            if size % encoder.patch_size:
                raise InputError(f"the {crop} crop of {size} pixels is no multiple of the patch "
                                 f"size {encoder.patch_size}")
            side = size // encoder.patch_size
            table = resize_grid(patches, encoder.grid, (side, side)).clone()
            setattr(encoder, f"{crop}_pos_embed", nn.Parameter(table))
            setattr(self, f"{crop}_side", side)
        encoder.cls_token.requires_grad_(False)    # unused, kept: the file is an encoder, too
        encoder.pos_embed.requires_grad_(False)
        row = (self.template_side - 1) // 2
        self.centre = row * (self.template_side + 1)    # token in row 3, column 3 of 8 x 8
        self.head = CenterHead(encoder.embed_dim, self.options["head_channels"])

    def embed_template(self, images):
        """(B, 3, z, z) normalised -> tokens (B, Z, D). While tracking, done once per video."""
        return self.encoder.patch_embed(images) + self.encoder.template_pos_embed

    def forward_features(self, template, images, keep_rate):
        """Template tokens (B, Z, D), search images (B, 3, s, s) -> normalised tokens
        (B, Z + S, D), template first. Eliminated search tokens are zero, at their raster place."""
        search = self.encoder.patch_embed(images) + self.encoder.search_pos_embed
        B, S, D = search.shape
        Z = template.shape[1]
        x = torch.cat([template, search], dim=1)                            # (B, Z + S, D)
        ids = torch.arange(S, device=x.device).expand(B, -1)
        for i, block in enumerate(self.encoder.blocks, start=1):
            if i in self.options["eliminate_blocks"] and keep_rate < 1:
                keep = math.ceil(keep_rate * ids.shape[1])
                x, ids = block_with_elimination(block, x, ids, keep, self.centre)
            else:
                x = block(x)
        x = self.encoder.norm(x)                                            # (B, Z + K, D)
        search = x.new_zeros(B, S, D)
        search[torch.arange(B, device=x.device)[:, None], ids] = x[:, Z:]
        return torch.cat([x[:, :Z], search], dim=1)

    def forward(self, template, images, keep_rate):
        """Template images or tokens, search images -> score (B, 1, g, g), size and offset
        (B, 2, g, g)."""
        if template.dim() == 4:
            template = self.embed_template(template)
        x = self.forward_features(template, images, keep_rate)[:, template.shape[1]:]
        return self.head(x.transpose(1, 2).unflatten(2, (self.search_side, self.search_side)))


def keep_rate_at(epoch, keep_rate=0.7, first=20, last=100):
    """Share of search tokens kept in an epoch (from 1): 1 until `first`, then half a cosine down
    to keep_rate at `last`."""
    done = min(max((epoch - first) / max(1, last - first), 0), 1)
    return keep_rate + (1 - keep_rate) / 2 * (1 + math.cos(math.pi * done))


# --------------------------------------------------------------------------------------------------
# Method: centre head
# --------------------------------------------------------------------------------------------------
class CenterHead(nn.Module):
    """Three stacks of convolutions on the search tokens: score of the target's centre, size of its
    box, offset of the centre within its cell."""

    def __init__(self, dim, channels=256):
        super().__init__()
        self.score = convolutions(dim, channels, 1)
        self.size = convolutions(dim, channels, 2)
        self.offset = convolutions(dim, channels, 2)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, x):
        """(B, D, g, g) -> score (B, 1, g, g), size (B, 2, g, g) as a share of the crop, offset
        (B, 2, g, g) in cells; the last two ordered x, y."""
        score = clamped_sigmoid(self.score(x).float())
        size = clamped_sigmoid(self.size(x).float())
        return score, size, self.offset(x).float()


def convolutions(dim, channels, outputs):
    """Four times 3x3 convolution, batch norm, ReLU, with ever half the channels; then 1x1."""
    layers = []
    for _ in range(4):
        layers += [nn.Conv2d(dim, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        dim = channels
        channels = channels // 2
    return nn.Sequential(*layers, nn.Conv2d(dim, outputs, 1))


def clamped_sigmoid(x):
    return x.sigmoid().clamp(1e-4, 1 - 1e-4)


def fold_batch_norms(head):
    """Make the batch norms of a trained head part of its convolutions: same numbers, faster."""
    for stack in head.children():
        for i in (0, 3, 6, 9):
            stack[i] = fuse_conv_bn_eval(stack[i], stack[i + 1])
            stack[i + 1] = nn.Identity()


def decode(score, size, offset):
    """Head maps -> boxes (B, 4) in the crop, centre x, y, width, height, at the highest score."""
    g = score.shape[-1]
    peak = score.flatten(1).argmax(dim=1)                                   # (B,)
    x = peak % g
    y = peak // g
    batch = torch.arange(len(peak), device=peak.device)
    centre = torch.stack([x, y], dim=1) + offset[batch, :, y, x]            # (B, 2), in cells
    return torch.cat([centre / g, size[batch, :, y, x]], dim=1)


# --------------------------------------------------------------------------------------------------
# Method: losses
# --------------------------------------------------------------------------------------------------
def box_centre(boxes):
    """Centres (..., 2) of boxes (..., 4), x, y, w, h."""
    return boxes[..., :2] + boxes[..., 2:] / 2


def gaussian_radius(w, h, overlap=0.7):
    """CornerNet's radius in cells: the least, over three ways in which corners shift until the IoU
    is `overlap`, of the larger root of p x^2 - q x + r = 0. Its code divides by 2, not by 2 p, and
    so does this: boxes at that radius overlap less."""
    b = w + h
    c = w * h
    roots = []
    for p, q, r in ((1, b, c * (1 - overlap) / (1 + overlap)),
                    (4, 2 * b, c * (1 - overlap)),
                    (4 * overlap, -2 * overlap * b, c * (overlap - 1))):
        roots.append((q + (q ** 2 - 4 * p * r).sqrt()) / 2)    # not / (2 * p)
    return torch.stack(roots).amin(dim=0).clamp(min=0).floor()


def gaussian_target(boxes, side):
    """Score map to learn (B, side, side) for boxes (B, 4), x, y, w, h in [0, 1]: 1 in the cell of
    the centre, around it a Gaussian of sigma = (2 r + 1) / 6, zero farther than r cells away."""
    w, h = (boxes[:, 2:] * side).clamp(min=0).unbind(1)
    radius = gaussian_radius(w, h)[:, None, None]
    sigma = (2 * radius + 1) / 6
    centres = (box_centre(boxes) * side).round()                                # (B, 2), x and y
    distance = torch.arange(side, device=boxes.device) - centres[..., None]     # (B, 2, side)
    lines = torch.exp(-distance ** 2 / (2 * sigma ** 2)) * (distance.abs() <= radius)
    return lines[:, 1, :, None] * lines[:, 0, None]


def focal_loss(score, target):
    """CornerNet's focal loss (alpha 2, beta 4) of probabilities (B, 1, g, g), summed and divided by
    the number of ones in the target."""
    hit = target == 1
    positive = (1 - score) ** 2 * score.log()
    negative = (1 - target) ** 4 * score ** 2 * (1 - score).log()
    return -torch.where(hit, positive, negative).sum() / hit.sum().clamp(min=1)


def box_iou(a, b):
    """IoU of boxes (N, 4) with boxes (N, 4), x1, y1, x2, y2, one to one -> (N,); 0 if both are
    empty."""
    extent = torch.minimum(a, b)[:, 2:] - torch.maximum(a, b)[:, :2]
    inter = extent.clamp(min=0).prod(dim=1)
    return inter / (box_area(a) + box_area(b) - inter).clamp(min=1e-12)


def tracking_losses(score, size, offset, boxes):
    """L = L_focal + 2 L_GIoU + 5 L_1 of head maps against boxes (B, 4), x, y, w, h in the crop ->
    dict of scalars."""
    focal = focal_loss(score, gaussian_target(boxes, score.shape[-1])[:, None])
    pred = box_convert(decode(score, size, offset), "cxcywh", "xyxy")
    truth = box_convert(boxes, "xywh", "xyxy").clamp(0, 1)    # beyond the crop nothing is seen
    giou = generalized_box_iou_loss(pred, truth, reduction="mean")
    l1 = F.l1_loss(pred, truth)
    iou = box_iou(pred.detach(), truth).mean()
    return {"loss": focal + 2 * giou + 5 * l1, "focal": focal, "giou": giou, "l1": l1, "iou": iou}


# --------------------------------------------------------------------------------------------------
# Method: crops and following a target
# --------------------------------------------------------------------------------------------------
def crop_square(image, box, factor, size):
    """Square around a box, side ceil(factor * sqrt(w * h)), zeros outside the image
    -> (3, size, size) uint8, side. Corners are whole pixels; bilinear without antialiasing."""
    side = math.ceil(math.sqrt(box[2] * box[3]) * factor)
    left, top = (round(v) for v in box_centre(box) - side / 2)
    return resized_crop(image, top, left, side, side, [size, size], antialias=False), side


def box_around(centre, extent):
    return np.concatenate([centre - extent / 2, extent])


def box_to_crop(box, around, side, size):
    """Box of a frame -> box in [0, 1] of the crop of `side` around the box `around`, resized to
    `size` pixels. Pixel centres are whole numbers in OSTrack: the middle is (size - 1) / 2."""
    centre = (box_centre(box) - box_centre(around)) / side + (size - 1) / (2 * size)
    return box_around(centre, box[2:] / side)


def box_from_crop(box, around, side, size):
    """The inverse of `box_to_crop`."""
    centre = (box_centre(box) - (size - 1) / (2 * size)) * side + box_centre(around)
    return box_around(centre, box[2:] * side)


def hann_window(side):
    """Hann window (side, side) without its zero border: prefers the middle of the region, where
    the target was."""
    line = torch.hann_window(side + 2, periodic=False)[1:-1]
    return line[:, None] * line


def clip_box(box, height, width, margin=10):
    """Box with at least `margin` pixels of it inside the frame, and at least that wide and high."""
    limit = np.array([width, height])
    corner = np.clip(box[:2], 0, limit - margin)
    end = np.clip(box[:2] + box[2:], margin, limit)
    return np.concatenate([corner, np.maximum(end - corner, margin)])


class OnePassTracker:
    """Follows one target: start(frame, box), then step(frame) -> box, score for every other frame.

    Frames are (3, H, W) uint8, boxes arrays x, y, w, h in pixels. Raises InputError if the first
    box has no area inside its frame.
    """

    def __init__(self, model, mean, std, device, dtype):
        self.model = model.to(device).eval()
        fold_batch_norms(model.head)
        self.window = hann_window(model.search_side).to(device)
        self.mean = mean
        self.std = std
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def crop(self, frame, name):
        """Template or search crop around the last box -> normalised (1, 3, size, size), side."""
        factor = self.model.options[f"{name}_factor"]
        size = self.model.options[f"{name}_size"]
        crop, side = crop_square(frame, self.box, factor, size)
        return normalize(crop[None].to(self.window.device), self.mean, self.std), side

    @torch.inference_mode()
    def start(self, frame, box):
        x, y, w, h = box
        _, H, W = frame.shape
        if not (0 < w < 4 * W and 0 < h < 4 * H and -w < x < W and -h < y < H):
            raise InputError(f"box {x:g} {y:g} {w:g} {h:g} has no area inside the frame of {W} x "
                             f"{H} pixels: give x y w h of the target")
        self.box = np.array(box, dtype=np.float64)
        with self.autocast:
            self.template = self.model.embed_template(self.crop(frame, "template")[0])
        return self.box, 1.0

    @torch.inference_mode()
    def locate(self, search):
        """Normalised search crop (1, 3, s, s) -> box x, y, w, h in the crop, windowed score."""
        with self.autocast:
            keep_rate = self.model.options["keep_rate"]
            score, size, offset = self.model(self.template, search, keep_rate)
        response = score * self.window
        box = box_convert(decode(response, size, offset), "cxcywh", "xywh")[0]
        *box, score = torch.cat([box, response.amax()[None]]).tolist()    # waits for the device
        return np.array(box), score

    def step(self, frame):
        search, side = self.crop(frame, "search")
        box, score = self.locate(search)
        box = box_from_crop(box, self.box, side, self.model.options["search_size"])
        self.box = clip_box(box, *frame.shape[1:])
        return self.box, score

    def follow(self, items, box, workers):
        """Frames for `read_frame`, read ahead by other processes -> yields box, score of each; the
        first box is the given one."""
        frames = DataLoader(items, batch_size=None, collate_fn=read_frame,
                            num_workers=min(workers, 4))
        for i, frame in enumerate(frames):
            yield self.step(frame) if i else self.start(frame, box)


def build_tracker(args):
    """Tracker on a fresh encoder, or on that of --init -> tracker, mean and std of its pixels."""
    name = args.model or "vit_tiny"
    patch = args.patch_size or MODELS[name].keywords.get("patch_size")
    info = {}
    if args.init:
        found, patch = infer_model(args.init)
        name = args.model or found
        _, info = load_state(args.init)
    if name.startswith("hiera"):
        raise InputError(f"{name} does not serve: template and search tokens go through the blocks "
                         "together, which needs a plain ViT")
    image_size = info.get("arch", {}).get("img_size", 14 * patch)
    encoder = MODELS[name](img_size=image_size, patch_size=patch, drop_path=args.drop_path)
    if args.init:
        load_encoder(encoder, args.init)
    tracker = Tracker(encoder, **{option: getattr(args, option) for option in TRACKER})
    return tracker, info.get("mean", IMAGENET_MEAN), info.get("std", IMAGENET_STD)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def train(args):
    """One training run into args.out, from an encoder or on from its last.pt."""
    rank, world, device, dtype = init_distributed(args)
    torch.manual_seed(args.seed)
    model, args.mean, args.std = build_tracker(args)
    model.to(device)
    sets = open_sets(args.data)
    args.init_sha = fingerprint(args.init)    # in FIXED: the same encoder, the same videos
    args.sequences = {name: len(items) for name, (items, _) in sets.items()}
    train_set = Pairs(list(sets.values()), args)

    sampler = EpochSampler(train_set, args.batch_size, args.accum_steps, rank, world, args.seed)
    epoch_steps = sampler.steps_per_epoch
    last_step = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    groups = param_groups(model.encoder, args.weight_decay)
    for group in groups:
        group["lr_scale"] = args.encoder_lr
    groups += param_groups(model.head, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if rank == 0:
        describe(args, sampler, world, device, dtype)

    step = resume(args, FIXED, model, optimizer, scaler, rank, world)["step"]
    sampler.first_step = step
    tracker = parallel(model, args, device, world)
    batches = endless_batches(train_set, sampler, args, device)
    log = RunLog(args, step, last_step, sampler.batch_size, rank)

    while step < last_step:
        # forward and backward, in micro-steps
        started = time.perf_counter()
        waited = 0.0
        totals = {}
        items = []
        epoch = step // epoch_steps
        keep_rate = keep_rate_at(epoch + 1, args.keep_rate, *args.eliminate_epochs)
        tracker.train()
        torch.manual_seed(mix_seed(args.seed, step, rank))
        for micro_step in range(args.accum_steps):
            before = time.perf_counter()
            images, boxes, keys, unreadable = next(batches)
            waited += time.perf_counter() - before
            items += zip(keys.tolist(), unreadable.tolist())
            template, search = (normalize(x.to(device, non_blocking=True), args.mean, args.std)
                                for x in images)
            tracker.require_backward_grad_sync = micro_step == args.accum_steps - 1    # for DDP
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                maps = tracker(template, search, keep_rate)
            losses = tracking_losses(*maps, boxes.to(device, non_blocking=True))
            scaler.scale(losses["loss"] / args.accum_steps).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / args.accum_steps

        # clip, and look at the losses before they can harm the weights: the one wait of a step
        lr = args.lr if epoch < args.lr_drop else args.lr / 10
        scaler.unscale_(optimizer)
        totals["grad_norm"] = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        totals["unreadable"] = world * sum(unreadable for _, unreadable in items)
        totals["stop"] = log.stop.is_set()
        totals["keep_rate"] = keep_rate
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
        if step % epoch_steps == 0 or step == last_step or values["stop"]:
            save(args, model, optimizer, scaler, step, rank)
        if values["stop"]:
            break

    log.close(step)


def save(args, model, optimizer, scaler, step, rank):
    """last.pt, all that the run needs to go on and that tracking needs; it is an encoder, too."""
    if rank == 0:
        save_checkpoint(f"{args.out}/last.pt", model=model.state_dict(),
                        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                        arch=model.arch, mean=list(args.mean), std=list(args.std),
                        args=plain(args), step=step)


def describe(args, sampler, world, device, dtype):
    """Print what this run is."""
    print(f"encoder from {args.init or 'random weights'}; training sequences: {args.sequences}")
    print(f"batch {sampler.batch_size} = {sampler.micro_batch} pairs x {world} process(es) x "
          f"{args.accum_steps} micro-steps; {sampler.steps_per_epoch} steps an epoch; {device}, "
          f"{dtype}")
    print(f"lr {args.lr:g}, encoder x {args.encoder_lr}, both a tenth after {args.lr_drop} of "
          f"{args.epochs}; keep rate 1 -> {args.keep_rate} in epochs {args.eliminate_epochs}")


# --------------------------------------------------------------------------------------------------
# Data: pairs of crops
# --------------------------------------------------------------------------------------------------
def sample_pair(rng, visible, max_gap):
    """Causal sampling: a visible template frame, then a visible search frame at most max_gap later
    -> two frame numbers. A still image is paired with itself. None if there is no such pair, or in
    a video of fewer than 20 frames or 5 visible ones, as in OSTrack."""
    ids = np.flatnonzero(visible)
    if len(visible) == 1 and len(ids):
        return 0, 0
    if len(visible) < 20 or len(ids) < 5:
        return None
    ids = ids[:-1][np.diff(ids) <= max_gap]    # followed by a visible one within max_gap
    if not len(ids):
        return None
    template = rng.choice(ids)
    later = np.flatnonzero(visible[template + 1:template + 1 + max_gap])
    return template, template + 1 + rng.choice(later)


def jitter_box(rng, box, centre, scale):
    """Where the target may have been found last: w and h times exp(N(0, scale)), the middle off by
    up to centre / 2 * sqrt(w * h)."""
    extent = box[2:] * np.exp(rng.normal(0, scale, 2))
    shift = math.sqrt(extent.prod()) * centre * (rng.random(2) - 0.5)
    return box_around(box_centre(box) + shift, extent)


class Pairs(Dataset):
    """Template and search crops of random pairs of frames, from all sets in equal shares.

    sets: list of (items, function that reads the sequence of an item). Item (epoch, index) ->
    (template (3, z, z), search (3, s, s)) uint8, the target's box in the search crop, the key of
    the pair, and whether a file could not be read, so that another pair stands in. All randomness
    comes from (seed, epoch, index).
    """

    def __init__(self, sets, args):
        self.sets = sets
        self.args = args

    def __len__(self):
        return self.args.pairs

    def draw(self, key):
        """Key (epoch, index, attempt) -> generator, frames and boxes of a random sequence, numbers
        of two frames or None."""
        rng = np.random.default_rng(mix_seed(self.args.seed, *key))
        items, read = self.sets[rng.integers(len(self.sets))]
        frames, boxes, visible = read(items[rng.integers(len(items))])
        return rng, frames, boxes, sample_pair(rng, visible, self.args.max_gap)

    def name(self, key):
        _, frames, _, (template, search) = self.draw(key)
        return f"{frames[template]} and {frames[search]}"

    def __getitem__(self, key):
        args = self.args
        unreadable = None
        for attempt in range(100):
            try:
                rng, frames, boxes, pair = self.draw((*key, attempt))
                if pair is None:
                    continue
                first, second = (read_frame(frames[i]) for i in pair)
                break
            except InputError as error:
                unreadable = error
        else:
            raise OSError("of 100 sequences of --data none had two readable frames with a visible "
                          f"box (the last: {unreadable or frames[0]}): is it complete?")
        target, box = boxes[list(pair)]
        template, _ = crop_square(first, target, args.template_factor, args.template_size)
        around = jitter_box(rng, box, args.centre_jitter, args.scale_jitter)
        search, side = crop_square(second, around, args.search_factor, args.search_size)
        box = box_to_crop(box, around, side, args.search_size)
        template, search, box = augment(rng, template, search, box)
        key = torch.tensor([*key, attempt])
        return (template, search), torch.from_numpy(box).float(), key, unreadable is not None


def augment(rng, template, search, box):
    """Both crops grey (5 %); each brighter or darker by up to 20 %; each mirrored (50 %)."""
    if rng.random() < 0.05:
        template, search = (rgb_to_grayscale(crop, 3) for crop in (template, search))
    template = adjust_brightness(template, rng.uniform(0.8, 1.2))
    search = adjust_brightness(search, rng.uniform(0.8, 1.2))
    if rng.random() < 0.5:
        template = template.flip(2)
    if rng.random() < 0.5:
        search = search.flip(2)
        box[0] = 1 - 1 / search.shape[2] - box[0] - box[2]
    return template, search, box


# --------------------------------------------------------------------------------------------------
# Data: sequences, that is frames (files or toy pictures), boxes (N, 4) and visible (N,) bool
# --------------------------------------------------------------------------------------------------
def read_frame(item):
    """Image file, or arguments of `toy_picture` -> (3, H, W) uint8. Raises InputError."""
    if isinstance(item, tuple):
        return to_tensor(Image.fromarray(toy_picture(*item)[0]))
    try:
        return read_image(item)
    except READ_ERRORS as error:
        raise InputError(f"cannot read frame {item} ({type(error).__name__}): replace it by a good "
                         "copy") from None


def read_numbers(path, columns=None):
    """Text file of numbers divided by commas, tabs or spaces -> (lines, columns) float64."""
    try:
        text = Path(path).read_text("utf-8-sig").replace(",", " ")
        numbers = np.loadtxt(io.StringIO(text), ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table of numbers ({error}): get it again") from None
    if columns and numbers.shape[1] != columns:
        raise InputError(f"{path} does not hold {columns} numbers per line: get it again")
    return numbers


def make_sequence(frames, boxes, *labels):
    """-> frames, boxes, visible. labels: arrays (N,), all true where the target is visible. A box
    without area counts as not visible, whatever the labels say, so it is never sampled."""
    visible = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    for label in labels:
        if len(label) != len(boxes):
            raise InputError(f"the sequence of {frames[0]} has {len(boxes)} boxes and "
                             f"{len(label)} labels of visibility: get its files again")
        visible &= label
    return frames, boxes, visible


def read_lasot(file):
    folder = Path(file).parent
    boxes = read_numbers(file, 4)
    occluded = read_numbers(folder / "full_occlusion.txt").ravel()
    outside = read_numbers(folder / "out_of_view.txt").ravel()
    frames = [f"{folder}/img/{i + 1:08}.jpg" for i in range(len(boxes))]
    return make_sequence(frames, boxes, occluded == 0, outside == 0)


def read_got10k(file):
    folder = Path(file).parent
    boxes = read_numbers(file, 4)
    absence = read_numbers(folder / "absence.label").ravel()
    cover = read_numbers(folder / "cover.label").ravel()
    frames = [f"{folder}/{i + 1:08}.jpg" for i in range(len(boxes))]
    return make_sequence(frames, boxes, absence == 0, cover > 0)


def read_trackingnet(file):
    file = Path(file)
    boxes = read_numbers(file, 4)
    folder = file.parent.parent / "frames" / file.stem
    return make_sequence([f"{folder}/{i}.jpg" for i in range(len(boxes))], boxes)


def read_coco(file):
    """-> numbers of all single objects, and a function that makes one a video of one frame."""
    file = Path(file)
    folder = file.parent.parent / file.stem.removeprefix("instances_")
    try:
        content = json.loads(file.read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        objects = [a for a in content["annotations"]
                   if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
        files = np.array([names[a["image_id"]] for a in objects])    # one array for all loaders
        boxes = np.array([a["bbox"] for a in objects], dtype=np.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no COCO annotation of boxes ({type(error).__name__}: "
                         f"{error}): get it again") from None
    return np.arange(len(objects)), functools.partial(read_still, folder, files, boxes)


def read_still(folder, files, boxes, index):
    return make_sequence([f"{folder}/{files[index]}"], boxes[index:index + 1])


def read_toy(index):
    frames = [(index, TOY["size"], t / 10, 0.4) for t in range(TOY["frames"])]
    boxes = np.array([toy_picture(*frame)[3] for frame in frames])
    return make_sequence(frames, boxes)


LAYOUTS = {    # where the annotations lie below the folder of a set, how one of them is read
    "lasot": (("*/groundtruth.txt", "*/*/groundtruth.txt"), read_lasot),
    "got10k": (("GOT-10k*/groundtruth.txt", "train/*/groundtruth.txt"), read_got10k),
    "trackingnet": (("TRAIN_*/anno/*.txt",), read_trackingnet),
    "coco": (("annotations/instances_train*.json",), read_coco)
}


def find_annotations(text):
    """--data lasot=DIR,coco=DIR -> {"lasot": its annotation files, "coco": ...}."""
    found = {}
    for entry in text.split(","):
        name, _, folder = entry.strip().partition("=")
        if name not in LAYOUTS or name in found or not folder:
            raise InputError(f"--data {text}: write toy, or NAME=FOLDER,NAME=FOLDER,... with each "
                             f"of {', '.join(LAYOUTS)} at most once")
        patterns, _ = LAYOUTS[name]
        found[name] = sorted(file for pattern in patterns for file in Path(folder).glob(pattern))
    return found


def open_sets(text):
    """--data -> {name: (array of items, function that reads the sequence of an item)}."""
    if text == "toy":
        return {"toy": (np.array(TOY["train"]), read_toy)}
    sets = {}
    for name, files in find_annotations(text).items():
        patterns, read = LAYOUTS[name]
        items = np.array([str(file) for file in files if file.parent.name not in LASOT_TEST])
        if name == "coco" and len(items):
            items, read = read_coco(items[-1])    # of 2014 and 2017 the later
        if not len(items):
            raise InputError(f"--data {text}: no training sequence of {name}, looked for "
                             f"{' and '.join(patterns)} in its folder")
        frames, _, _ = read(items[0])
        read_frame(frames[-1])    # a wrong folder is told here, not in the middle of an epoch
        sets[name] = (items, read)
    return sets


def open_test_set(text):
    """--data -> all names of the test set, {name: function that reads it}, the longest first."""
    if text == "toy":
        found = {f"toy-{i}": functools.partial(read_toy, i) for i in TOY["test"]}
        return list(found), found
    files = sorted(find_annotations(text).get("lasot", []), key=os.path.getsize, reverse=True)
    found = {file.parent.name: functools.partial(read_lasot, file) for file in files
             if file.parent.name in LASOT_TEST}
    if not found:
        raise InputError(f"--data {text}: --eval needs lasot=FOLDER with some of the 280 test "
                         "sequences, such as FOLDER/airplane/airplane-1/groundtruth.txt")
    return LASOT_TEST, found


# --------------------------------------------------------------------------------------------------
# One-pass evaluation
# --------------------------------------------------------------------------------------------------
def score_sequence(boxes, truth, visible):
    """One-pass evaluation of one video, arrays (N, 4), (N, 4), (N,) -> success (21,), precision
    (51,), normalised precision (51,): shares of frames with IoU > t, t = 0, 0.05 .. 1; centre error
    <= t, t = 0, 1 .. 50 pixels; centre error over box size <= t, t = 0, 0.01 .. 0.5.

    As the toolkits of LaSOT and OSTrack do: the first box counts as the true one, a box without
    size is the one before it, a frame without the target or its box fails, but counts.
    """
    boxes = torch.tensor(boxes, dtype=torch.float64)
    truth = torch.tensor(truth, dtype=torch.float64)
    boxes[0] = truth[0]
    for i in range(1, len(boxes)):
        if not (boxes[i].isfinite().all() and boxes[i, 2:].min() > 0):
            boxes[i] = boxes[i - 1]
    present = torch.from_numpy(visible) & (truth[:, 2:] > 0).all(dim=1)
    iou = box_iou(box_convert(boxes, "xywh", "xyxy"), box_convert(truth, "xywh", "xyxy"))
    shift = box_centre(boxes) - box_centre(truth)
    error = shift.norm(dim=1)
    relative_error = (shift / truth[:, 2:]).norm(dim=1)
    hits = (iou[:, None] > torch.arange(21).double() / 20, error[:, None] <= torch.arange(51),
            relative_error[:, None] <= torch.arange(51) / 100)
    return [(hit & present[:, None]).double().mean(dim=0) for hit in hits]


def load_tracker(args, device, dtype):
    """The trained tracker of --init, or of --out, ready to follow."""
    path = args.init or f"{args.out}/last.pt"
    file = read_file(path)
    try:
        arch = {**file["arch"]}
        options = arch.pop("tracker")
        arch.pop("kind")
    except (KeyError, TypeError):
        raise InputError(f"checkpoint {path} is no tracker: give last.pt of a training") from None
    model = Tracker(VisionTransformer(**arch), **options)
    model.load_state_dict(file["model"])
    return OnePassTracker(model, file["mean"], file["std"], device, dtype)


def write_boxes(path, boxes, whole):
    """One x,y,w,h per line and frame; whole: cut off to whole pixels, as OSTrack does."""
    np.savetxt(f"{path}.tmp", boxes, "%d" if whole else "%.2f", ",")
    os.replace(f"{path}.tmp", path)


def evaluate(args):
    """One-pass evaluation of a tracker, or of the text files of --results, on LaSOT's test set:
    prints AUC, P, P_norm; writes results/*.txt. InputError if sequences are missing."""
    rank, world, device, dtype = init_distributed(args, minutes=24 * 60)    # processes may differ
    names, found = open_test_set(args.data)
    folder = Path(args.results or f"{args.out}/results")
    tracker = None
    if args.results:
        found = {name: read for name, read in found.items() if (folder / f"{name}.txt").is_file()}
    else:
        tracker = load_tracker(args, device, dtype)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            keep_results(args, folder)
        if world > 1:
            dist.barrier()

    # AUC, P, P_norm, AUC of a box that never moves, frames
    sums = torch.zeros(5, device=device)
    for name in tqdm(list(found)[rank::world], disable=rank != 0):
        try:
            row = evaluate_sequence(args, tracker, found[name](), folder / f"{name}.txt")
            sums += row.to(device)
        except InputError as error:
            if rank == 0:
                raise
            text = str(error).splitlines()[-1].removeprefix("models.InputError: ")
            sys.exit(f"\nerror: {text}")    # the others do not know of it
    if world > 1:
        dist.all_reduce(sums)

    missing = len(names) - len(found)
    if rank == 0 and found:
        partial = " PARTIAL" if missing else ""
        auc, p, p_norm, still, _ = (100 * sums / len(found)).tolist()
        print(f"evaluated {len(found)}/{len(names)} sequences, {sums[-1]:.0f} frames; boxes in "
              f"{folder}")
        print(f"AUC {auc:.1f}, P {p:.1f}, P_norm {p_norm:.1f}{partial}; a box that never moves: "
              f"AUC {still:.1f}")
    if missing and not (args.allow_partial and found):
        raise InputError(f"{missing} of {len(names)} sequences are missing in {folder} or --data, "
                         "so these are no scores of the set; --allow-partial accepts that")


def keep_results(args, folder):
    """Keep text files that an evaluation left, if weights and settings are the same."""
    weights = Path(args.init or f"{args.out}/last.pt").read_bytes()
    settings = f"{hashlib.sha256(weights).hexdigest()} --dtype {args.dtype} --int {args.int}"
    path = folder / "settings"
    os.makedirs(folder, exist_ok=True)
    if path.exists() and path.read_text() == settings:
        print(f"{folder}: {len(list(folder.glob('*.txt')))} sequences are done already")
        return
    for file in folder.glob("*.txt"):
        file.unlink(missing_ok=True)    # another machine may have been faster
    path.write_text(settings)


def evaluate_sequence(args, tracker, sequence, file):
    """Track a sequence from its true first box, unless its file is there, and score it
    -> tensor (5,): AUC, P, P_norm, AUC of a box that never moves, frames."""
    frames, truth, visible = sequence
    n = len(frames)
    if tracker and not file.exists():
        following = tracker.follow(frames, truth[0], args.workers)
        write_boxes(file, [box for box, _ in following], args.int)
    boxes = read_numbers(file, 4)
    if len(boxes) < n:
        raise InputError(f"{file} has {len(boxes)} boxes, the sequence {n} frames: track it again")
    success, precision, norm_precision = score_sequence(boxes[:n], truth, visible)
    still, _, _ = score_sequence(truth[:1].repeat(n, 0), truth, visible)
    row = (success.mean(), precision[20], norm_precision[20], still.mean(), n)
    return torch.tensor(row, dtype=torch.float32)


# --------------------------------------------------------------------------------------------------
# Your own frames, frames per second
# --------------------------------------------------------------------------------------------------
def track_frames(args, frames, box):
    """Follow the target of a box in the first frame: boxes.txt, a line a frame, and overlay.gif."""
    _, _, device, dtype = init_distributed(args)
    tracker = load_tracker(args, device, dtype)
    os.makedirs(args.out, exist_ok=True)
    found = list(tqdm(tracker.follow(frames, box, args.workers), total=len(frames)))
    write_boxes(f"{args.out}/boxes.txt", [box for box, _ in found], args.int)
    draw_overlay(f"{args.out}/overlay.gif", frames, found)
    print(f"{len(frames)} frames; in {args.out}: boxes.txt, overlay.gif")


def draw_overlay(path, frames, found):
    """Animated GIF of the frames with box and score; a long video is thinned out to 150 of them."""
    every = math.ceil(len(frames) / 150)
    pictures = []
    for item, (box, score) in list(zip(frames, found))[::every]:
        frame = read_frame(item)
        zoom = 300 / min(frame.shape[1:])
        frame = resize(frame, 300)
        corners = box_convert(torch.from_numpy(box[None] * zoom), "xywh", "xyxy")
        frame = draw_bounding_boxes(frame, corners, colors="red", width=3)
        pictures.append(Image.fromarray(frame.permute(1, 2, 0).numpy()))
        ImageDraw.Draw(pictures[-1]).text((6, 4), f"score {score:.2f}", "white", font_size=18,
                                          stroke_width=2, stroke_fill="black")
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=33 * every, loop=0)


def benchmark(args, frames=100, warmup=10):
    """Print frames per second of the model alone, and from a JPEG in memory to a box in pixels, of
    the tracker that the options describe; its weights do not matter."""
    _, _, device, dtype = init_distributed(args)
    tracker = OnePassTracker(*build_tracker(args), device, dtype)
    file = io.BytesIO()
    Image.fromarray(toy_picture(0, (720, 1280))[0]).save(file, "JPEG")
    box = np.array([600.0, 300.0, 120.0, 90.0])
    tracker.start(read_frame(file), box)
    search, _ = tracker.crop(read_frame(file), "search")
    name = f"{torch.get_num_threads()} CPU thread(s)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{tracker.model.options}\n{device} ({name}), {dtype}; median of {frames} frames after a "
          f"warm-up of {warmup}")
    for title, statement in (    # both wait for the device, so times are true
            ("model only", "tracker.locate(search)"),
            ("end to end, from a JPEG of 1280 x 720 to a box",
             "tracker.box = box; tracker.step(read_frame(file))")):
        variables = {**globals(), **locals()}
        times = timeit.repeat(statement, globals=variables, repeat=warmup + frames, number=1)
        print(f"{title}: {1 / np.median(times[warmup:]):.1f} frames/s")


# --------------------------------------------------------------------------------------------------
# The test split of LaSOT
# --------------------------------------------------------------------------------------------------
# 280 sequences; the other 1120 are for training
LASOT_TEST = """
airplane-1 airplane-9 airplane-13 airplane-15 basketball-1 basketball-6 basketball-7 basketball-11
bear-2 bear-4 bear-6 bear-17 bicycle-2 bicycle-7 bicycle-9 bicycle-18 bird-2 bird-3 bird-15 bird-17
boat-3 boat-4 boat-12 boat-17 book-3 book-10 book-11 book-19 bottle-1 bottle-12 bottle-14 bottle-18
bus-2 bus-5 bus-17 bus-19 car-2 car-6 car-9 car-17 cat-1 cat-3 cat-18 cat-20 cattle-2 cattle-7
cattle-12 cattle-13 spider-14 spider-16 spider-18 spider-20 coin-3 coin-6 coin-7 coin-18 crab-3
crab-6 crab-12 crab-18 surfboard-12 surfboard-4 surfboard-5 surfboard-8 cup-1 cup-4 cup-7 cup-17
deer-4 deer-8 deer-10 deer-14 dog-1 dog-7 dog-15 dog-19 guitar-3 guitar-8 guitar-10 guitar-16
person-1 person-5 person-10 person-12 pig-2 pig-10 pig-13 pig-18 rubicCube-1 rubicCube-6
rubicCube-14 rubicCube-19 swing-10 swing-14 swing-17 swing-20 drone-13 drone-15 drone-2 drone-7
pool-12 pool-15 pool-3 pool-7 rabbit-10 rabbit-13 rabbit-17 rabbit-19 racing-10 racing-15 racing-16
racing-20 robot-1 robot-19 robot-5 robot-8 sepia-13 sepia-16 sepia-6 sepia-8 sheep-3 sheep-5 sheep-7
sheep-9 skateboard-16 skateboard-19 skateboard-3 skateboard-8 tank-14 tank-16 tank-6 tank-9 tiger-12
tiger-18 tiger-4 tiger-6 train-1 train-11 train-20 train-7 truck-16 truck-3 truck-6 truck-7
turtle-16 turtle-5 turtle-8 turtle-9 umbrella-17 umbrella-19 umbrella-2 umbrella-9 yoyo-15 yoyo-17
yoyo-19 yoyo-7 zebra-10 zebra-14 zebra-16 zebra-17 elephant-1 elephant-12 elephant-16 elephant-18
goldfish-3 goldfish-7 goldfish-8 goldfish-10 hat-1 hat-2 hat-5 hat-18 kite-4 kite-6 kite-10 kite-15
motorcycle-1 motorcycle-3 motorcycle-9 motorcycle-18 mouse-1 mouse-8 mouse-9 mouse-17 flag-3 flag-9
flag-5 flag-2 frog-3 frog-4 frog-20 frog-9 gametarget-1 gametarget-2 gametarget-7 gametarget-13
hand-2 hand-3 hand-9 hand-16 helmet-5 helmet-11 helmet-19 helmet-13 licenseplate-6 licenseplate-12
licenseplate-13 licenseplate-15 electricfan-1 electricfan-10 electricfan-18 electricfan-20
chameleon-3 chameleon-6 chameleon-11 chameleon-20 crocodile-3 crocodile-4 crocodile-10 crocodile-14
gecko-1 gecko-5 gecko-16 gecko-19 fox-2 fox-3 fox-5 fox-20 giraffe-2 giraffe-10 giraffe-13
giraffe-15 gorilla-4 gorilla-6 gorilla-9 gorilla-13 hippo-1 hippo-7 hippo-9 hippo-20 horse-1 horse-4
horse-12 horse-15 kangaroo-2 kangaroo-5 kangaroo-11 kangaroo-14 leopard-1 leopard-7 leopard-16
leopard-20 lion-1 lion-5 lion-12 lion-20 lizard-1 lizard-3 lizard-6 lizard-13 microphone-2
microphone-6 microphone-14 microphone-16 monkey-3 monkey-4 monkey-9 monkey-17 shark-2 shark-3
shark-5 shark-6 squirrel-8 squirrel-11 squirrel-13 squirrel-19 volleyball-1 volleyball-13
volleyball-18 volleyball-19""".split()


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
FIXED = (*TRACKER, "init_sha", "model", "patch_size", "sequences", "pairs", "max_gap",
         "centre_jitter", "scale_jitter", "epochs", "eliminate_epochs", "lr_drop", "batch_size",
         "encoder_lr", "weight_decay", "drop_path", "seed")    # see `models.resume`


def parse_args(argv=None, **defaults):
    """Options of the command line, or of the list `argv`; `defaults` stand in for the paper's."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]",
                                     description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count = number(int, "[1, inf)")
    add = parser.add_argument_group("method (OSTrack-256)").add_argument
    add("--init", help="checkpoint: to train, an encoder to start from (README, 'Checkpoints'), "
                       "else random weights; to use, a tracker, else last.pt in --out")
    add("--model", choices=tuple(MODELS),
        help="encoder; default: that of --init, or the paper's vit_tiny (12 heads)")
    add("--template-size", type=count, help="pixels along the template crop")
    add("--search-size", type=count, help="pixels along the search crop")
    add("--keep-rate", type=number(float, "(0, 1]"),
        help="share of the search tokens that blocks 4, 7 and 10 keep; 1: all. The rate falls from "
             "1 between 1/15 and 1/3 of the epochs, 20 and 100 of the paper's 300")

    add = parser.add_argument_group("training (OSTrack-256), data").add_argument
    add("--data",
        default="lasot=data/lasot,got10k=data/got10k,coco=data/coco,trackingnet=data/trackingnet",
        help="sets as NAME=FOLDER,..., of which --eval reads LaSOT's 280 test sequences and a "
             "training all else; or 'toy' for drawn ones")
    add("--pairs", type=count, default=60_000, help="pairs per epoch")
    add("--epochs", type=count, default=300, help="paper: 300")
    add("--batch-size", type=count, default=128,
        help="pairs per optimizer step over all processes; paper: 128")
    add("--lr", type=number(float, "[0, 1e9]"), default=4e-4,
        help="of the head, the encoder's is a tenth; both fall to a tenth after 4/5 of the epochs")
    add("--clip-grad", type=number(float, "[0, inf)"), default=0.1,
        help="largest gradient norm; 0: no clipping")

    add = parser.add_argument_group("use of a trained tracker").add_argument
    add("--eval", action="store_true", help="one-pass evaluation on the test sequences of --data")
    add("--results", help="with --eval: score the text files of this folder, NAME.txt with one "
                          "x,y,w,h per frame, instead of running a tracker")
    add("--allow-partial", action="store_true",
        help="with --eval: end without an error although test sequences are missing")
    add("--frames", help="track the target of --box through the images of this folder")
    add("--box", type=float, nargs=4, help="x, y, w, h of the target in the first frame, in pixels")
    add("--int", action="store_true", help="write boxes as whole pixels, cut off as OSTrack does")
    add("--benchmark", action="store_true", help="frames per second, model alone and end to end")

    add = add_run_options(parser, "out/track")
    add("--seed", type=number(int, "[0, 4294967296)"), default=0)
    add("--max-steps", type=count,
        help="stop after so many optimizer steps (the schedule stays that of --epochs)")
    add("--demo", action="store_true",
        help="a few minutes on drawn videos: train, evaluate, track one of them")
    parser.set_defaults(**{**TRACKER, **RECIPE, **defaults})
    args = parser.parse_args(argv)
    if args.demo and not defaults:
        return parse_args(argv, **DEMO)
    return args


def resolve(args):
    """Fill in the defaults that depend on other options; refuse what has no meaning. InputError."""
    args.lr_drop = max(1, args.epochs * 4 // 5)    # 240 of 300 epochs
    args.eliminate_epochs = [args.epochs // 15, args.epochs // 3]    # 20 and 100 of 300
    if args.results and not args.eval:
        raise InputError("--results holds boxes of a test set: give --eval, too")
    if args.frames and not args.box:
        raise InputError("--frames needs --box X Y W H, the target's box in its first frame")
    if args.dtype == "auto" and (args.eval or args.frames or args.benchmark):
        args.dtype = "fp32"
    return args


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------
def main(args):
    """What the options ask for; in a demo: train, evaluate and track on drawn videos."""
    resolve(args)
    if args.eval:
        evaluate(args)
    elif args.frames:
        frames = sorted(list_images(args.frames), key=len)    # sorted by name: 2.jpg before 10.jpg
        track_frames(args, frames, np.array(args.box))
    elif args.benchmark:
        benchmark(args)
    elif args.demo:
        encoder = "out/demo/pretrain/encoder.pt"    # of pretrain_d2mae.py --demo
        if not args.init and Path(encoder).is_file():
            args.init = encoder
        train(args)
        args.init = None
        args.eval = True
        evaluate(resolve(args))
        frames, boxes, _ = read_toy(TOY["test"][0])
        track_frames(args, frames, boxes[0])
    else:
        train(args)


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
