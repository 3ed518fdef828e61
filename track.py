"""OSTrack with a lightweight ViT: training, evaluation on LaSOT, own videos (Sec. "transfer").

    D=lasot=data/lasot,got10k=data/got10k,coco=data/coco,trackingnet=data/trackingnet
    torchrun --nproc_per_node=4 track.py --data $D --init out/pretrain/encoder.pt   # the paper's
    torchrun --nproc_per_node=8 track.py --eval --data lasot=data/lasot         # AUC, P, P_norm
    python track.py --eval --data lasot=data/lasot --results DIR    # boxes of any tracker
    python track.py --frames DIR --box 120 80 40 60                 # boxes.txt and overlay.gif
    python tests/tools/demo.py track                                      # needs no files

The tokens of a template (the target in the first frame) and of a search region (around the last
box) go through the blocks of the ViT together, so features are extracted and compared at once.
Three blocks also remove the search tokens that the template's centre token attends to least. A
convolutional head on the search tokens predicts the target's centre and its box. Read
`block_with_elimination`, `Tracker`, `tracking_losses`, `OnePassTracker` next to the paper, then
`train`.

Shapes: B pairs, Z template tokens, S search tokens (a g x g grid), K of them kept, D width,
        H heads, d = D / H, T tokens of both; z and s pixels along the template and search crops.
Boxes:  x, y, w, h (upper left corner, size) in pixels of a frame, or in [0, 1] of a square crop.

NOTES, details that the paper does not give, and departures from the authors' code (OSTrack):
1. The elimination reads one row of the attention map, that of the template's centre token. Only
   this row is computed (in float32); attention itself stays fused, for the queries that are kept.
   The authors compute the whole map (attn_blocks.py). The numbers are the same.
2. While tracking, the template is embedded once. The authors embed it again for every frame
   (lib/test/tracker/ostrack.py). The numbers are the same.
3. Boxes are mapped out of a crop by the exact inverse of the mapping in, about the centre
   (size - 1) / 2. The authors map in with that centre (processing_utils.py,
   transform_image_to_crop), but out with size / 2 (ostrack.py, map_box_back).
4. Boxes are mirrored about the same centre; the authors mirror them about size / 2.
5. Each crop is mirrored on its own. The authors mirror both frames and then each crop again
   (base_functions.py), which has the same distribution.
6. Only frames that a visible frame follows within 200 become templates. The authors start at 199
   and widen the gap by 5 until they find one (sampler.py).
7. If a sequence has no such pair, another one is drawn from any of the sets; the authors stay in
   the same set (sampler.py).
8. The authors redraw a pair if a crop is all padding (processing.py). Here this happens only if the
   centre of the box lies outside the frame, and such pairs are kept.
9. A crop that reaches the right or lower edge keeps the frame's last column or row. The authors
   lose it (processing_utils.py, sample_target).
10. The batch norms of the head see the pairs of one process, as the authors' do: 32 with their 4
    GPUs. Another number of processes or --accum-steps changes that.
11. Biases, norms and position tables are not decayed. The authors decay all parameters by 1e-4
    (base_functions.py).
12. No videos are held out. Every --eval-every epochs, process 0 logs the mean loss and IoU of fixed
    pairs from the training videos (val_loss, val_iou). The authors watch GOT-10k's validation set.
    The tracker is that of the last epoch, as theirs.
13. Training uses all of GOT-10k. The authors use the 7,086 sequences of their list `vottrain`.
14. An unreadable file ends the run. The authors silently draw another pair.
15. A frame whose true box has no extent fails in every metric, see `score_sequence`.
16. Boxes are saved with two decimals. The authors truncate them to whole pixels.
17. Evaluation runs in float32, as theirs; GPUs from Ampere on multiply float32 matrices in
    TensorFloat-32. Training runs in bfloat16 or float16 on a GPU; theirs in float32 (--dtype fp32).
18. Results are stored in a folder named by a checksum of the checkpoint. An interrupted evaluation
    resumes from it, and results of other checkpoints are neither mixed in nor deleted.
"""
import json
import math
import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert, box_iou, generalized_box_iou
from torchvision.transforms.v2.functional import (adjust_brightness, pil_to_tensor, resized_crop,
                                                  rgb_to_grayscale)
from tqdm import tqdm

from models import (InputError, Names, Parser, VisionTransformer, attend, attention_logits,
                    eval_loader, init_distributed, list_images, load_model, log, mix_seed,
                    normalize, open_image, param_groups, plain_errors, resize_grid, resume, save,
                    train_loader)

TRACKER = dict(    # OSTrack-256; stored beside the weights
    template_size=128, search_size=256,         # pixels along the crops
    template_factor=2.0, search_factor=4.0,     # side of a crop over sqrt(w * h) of the box
    eliminate_blocks=(4, 7, 10),                # they remove search tokens; counted from 1
    keep_rate=0.7,                              # share of the search tokens that each of them keeps
    head_channels=256,                          # halved by each of the next three layers
)
RECIPE = dict(    # OSTrack-256; settings without an option. All others: `parse_args`, `Pairs`
    weight_decay=1e-4,                          # AdamW; no decay of biases, norms, position tables
    val_pairs=256,                              # of each evaluation during training
)


# --------------------------------------------------------------------------------------------------
# Method: joint encoder with candidate elimination
# --------------------------------------------------------------------------------------------------
def block_with_elimination(block, x, ids, Z, keep, centre):
    """Run a transformer block that keeps only `keep` search tokens -> x (B, Z + keep, D), its ids.

    x (B, T, D): Z template tokens, then search tokens. ids (B, T): places of these tokens before
    any was removed. centre: the template token whose attention (after the softmax over all tokens,
    mean over heads) ranks the search tokens. Removed tokens still serve as keys and values, but
    skip the MLP.
    """
    q, k, v = block.attn.project(block.norm1(x))                            # 3 x (B, H, T, d)
    row = attention_logits(q[:, :, centre, None], k).softmax(dim=-1)        # (B, H, 1, T)
    row = row.mean(dim=(1, 2))                                              # (B, T)
    row[:, :Z] = math.inf                                                   # the template stays
    kept = row.topk(Z + keep).indices.sort().values                         # (B, Z + keep)
    batch = torch.arange(x.shape[0], device=x.device)[:, None]

    x = x[batch, kept]                                                      # (B, Z + keep, D)
    q = q.transpose(1, 2)[batch, kept].transpose(1, 2)                      # (B, H, Z + keep, d)
    y = attend(q, k, v).transpose(1, 2).flatten(2)
    x = x + block.drop_path(block.attn.proj(y))
    return x + block.drop_path(block.mlp(block.norm2(x))), ids.gather(1, kept)


def position_table(encoder, size):
    """Resize the encoder's position table, without the class token, to crops of `size` pixels
    -> patches along the crop, trainable (1, N, D). Raises InputError if they do not fill it."""
    side, rest = divmod(size, encoder.patch_size)
    if rest:
        raise InputError(f"crops of {size} pixels are no multiple of the patch size "
                         f"{encoder.patch_size}: change --template-size or --search-size")
    table = resize_grid(encoder.pos_embed.detach()[:, 1:], encoder.grid, (side, side))
    return side, nn.Parameter(table.contiguous())


class Tracker(nn.Module):
    """OSTrack: a ViT over template and search tokens together, and a centre head on the search
    tokens.

    encoder: a VisionTransformer without a head. Its position table is replaced by one for each
    crop. options: entries of TRACKER that differ from the paper's.
    """

    def __init__(self, encoder, **options):
        super().__init__()
        self.options = options = {**TRACKER, **options}
        self.arch = {**encoder.arch, "tracker": options}
        self.mean, self.std = encoder.mean, encoder.std
        self.crops = {name: (options[f"{name}_factor"], options[f"{name}_size"])
                      for name in ("template", "search")}    # for `crop_square`
        self.encoder = encoder
        side, encoder.template_pos_embed = position_table(encoder, options["template_size"])
        self.centre = (side - 1) // 2 * (side + 1)    # row 3, column 3 (from 0) of 8 x 8
        side, encoder.search_pos_embed = position_table(encoder, options["search_size"])
        self.search_side = side                                                 # g
        encoder.cls_token.requires_grad_(False)    # unused, but saved: the file is an encoder, too
        encoder.pos_embed.requires_grad_(False)
        self.head = CenterHead(encoder.embed_dim, options["head_channels"])

    def embed_template(self, images):
        """(B, 3, z, z) normalised -> tokens (B, Z, D)."""
        return self.encoder.patch_embed(images) + self.encoder.template_pos_embed

    def forward_features(self, template, images, keep_rate):
        """Template tokens (B, Z, D), search images (B, 3, s, s) -> normalised tokens
        (B, Z + S, D), template first. Eliminated search tokens are zero, at their raster place."""
        search = self.encoder.patch_embed(images) + self.encoder.search_pos_embed
        x = torch.cat([template, search], dim=1)                            # (B, Z + S, D)
        B, T, _ = shape = x.shape
        Z = template.shape[1]
        ids = torch.arange(T, device=x.device).expand(B, -1)
        for i, block in enumerate(self.encoder.blocks, start=1):
            if i in self.options["eliminate_blocks"] and keep_rate < 1:
                keep = math.ceil(keep_rate * (ids.shape[1] - Z))
                x, ids = block_with_elimination(block, x, ids, Z, keep, self.centre)
            else:
                x = block(x)
        x = self.encoder.norm(x)                                            # (B, Z + K, D)
        return x.new_zeros(shape).scatter(1, ids[..., None].expand_as(x), x)

    def forward(self, template, images, keep_rate):
        """Locate targets: template images (B, 3, z, z) or tokens (B, Z, D), search images
        (B, 3, s, s) -> score (B, 1, g, g), size and offset (B, 2, g, g)."""
        if template.dim() == 4:
            template = self.embed_template(template)
        x = self.forward_features(template, images, keep_rate)[:, template.shape[1]:]
        return self.head(x.transpose(1, 2).unflatten(2, (self.search_side, -1)))


def keep_rate_at(epoch, keep_rate=0.7, first=20, last=100):
    """Compute the share of search tokens that an epoch (from 1) keeps: 1 until `first`, then half a
    cosine down to keep_rate at `last`."""
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
    """Stack four 3x3 convolutions with batch norm and ReLU, each with half the channels of the one
    before, and a 1x1 convolution."""
    layers = []
    for _ in range(4):
        layers += [nn.Conv2d(dim, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        dim, channels = channels, channels // 2
    return nn.Sequential(*layers, nn.Conv2d(dim, outputs, 1))


def clamped_sigmoid(x):
    return x.sigmoid().clamp(1e-4, 1 - 1e-4)


def decode(score, size, offset):
    """Read the box at the highest score off the head's maps -> (B, 4) in the crop: centre x, y,
    width, height."""
    g = score.shape[-1]
    peak = score.flatten(1).argmax(dim=1)                                   # (B,)
    x = peak % g
    y = peak // g
    batch = torch.arange(peak.shape[0], device=peak.device)
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
    terms = ((1, b, c * (1 - overlap) / (1 + overlap)),
             (4, 2 * b, c * (1 - overlap)),
             (4 * overlap, -2 * overlap * b, c * (overlap - 1)))
    roots = [(q + (q ** 2 - 4 * p * r).sqrt()) / 2 for p, q, r in terms]    # not / (2 * p)
    return torch.stack(roots).amin(dim=0).clamp(min=0).floor()


def gaussian_target(boxes, side):
    """Compute the target score map (B, side, side) of boxes (B, 4), x, y, w, h in [0, 1]: 1 in the
    cell of the centre, around it a Gaussian of sigma = (2 r + 1) / 6, zero beyond r cells."""
    boxes = boxes * side                                                        # in cells
    radius = gaussian_radius(*boxes[:, 2:].T)[:, None, None]
    sigma = (2 * radius + 1) / 6
    centres = box_centre(boxes).round()[..., None]                              # (B, 2, 1): x, y
    distance = torch.arange(side, device=boxes.device) - centres                # (B, 2, side)
    lines = torch.exp(-distance ** 2 / (2 * sigma ** 2)) * (distance.abs() <= radius)
    return lines[:, 1, :, None] * lines[:, 0, None]


def focal_loss(score, target):
    """CornerNet's focal loss (alpha 2, beta 4) of probabilities (B, 1, g, g), summed and divided by
    the number of ones in the target."""
    hit = target == 1
    positive = (1 - score) ** 2 * score.log()
    negative = (1 - target) ** 4 * score ** 2 * (1 - score).log()
    return -torch.where(hit, positive, negative).sum() / hit.sum().clamp(min=1)


def tracking_losses(score, size, offset, boxes):
    """Compute L = L_focal + 2 L_GIoU + 5 L_1 of the head's maps against boxes (B, 4), x, y, w, h in
    [0, 1] of the crop -> dict of scalars: loss, focal, giou, l1, iou."""
    focal = focal_loss(score, gaussian_target(boxes, score.shape[-1])[:, None])
    pred = box_convert(decode(score, size, offset), "cxcywh", "xyxy")
    truth = box_convert(boxes, "xywh", "xyxy").clamp(0, 1)    # beyond the crop nothing is seen
    iou = box_iou(pred, truth).diagonal().mean()    # (B, B) of all pairs: those one to one
    giou = 1 - generalized_box_iou(pred, truth).diagonal().mean()
    l1 = F.l1_loss(pred, truth)
    loss = focal + 2 * giou + 5 * l1
    return {"loss": loss, "focal": focal, "giou": giou, "l1": l1, "iou": iou}


# --------------------------------------------------------------------------------------------------
# Method: crops and following a target
# --------------------------------------------------------------------------------------------------
def crop_square(image, box, factor, size):
    """Cut a square of side ceil(factor * sqrt(w * h)) around a box, zero outside the image, and
    resize it bilinearly, without antialiasing -> (3, size, size) uint8, side, origin.

    (box - origin) / side maps a box of the image to [0, 1] of the crop, box * side + origin maps it
    back. In OSTrack the middle of a crop is (size - 1) / 2: pixel centres are whole numbers.
    """
    side = math.ceil(math.sqrt(box[2] * box[3]) * factor)
    corner = box_centre(box) - side / 2
    left, top = (max(round(v), -side) for v in corner)    # torchvision misreads crops farther out
    crop = resized_crop(image, top, left, side, side, [size, size], antialias=False)
    middle = side * (size - 1) / (2 * size)
    return crop, side, np.append(box_centre(box) - middle, [0, 0])


def hann_window(side):
    """Hann window (side, side) without its zero border. It prefers the middle of the search region,
    where the target was."""
    line = torch.hann_window(side + 2, periodic=False)[1:-1]
    return torch.outer(line, line)


def clip_box(box, height, width, margin=10):
    """Clip a box to the frame, leaving it at least `margin` pixels wide and high."""
    limit = np.array([width, height])
    corner = box[:2].clip(0, limit - margin)
    end = (box[:2] + box[2:]).clip(margin, limit)
    return np.append(corner, (end - corner).clip(margin))


class OnePassTracker:
    """Follow one target: start(frame, box), then step(frame) -> box, score for every other frame.

    model: a trained `Tracker`. Frames are (3, H, W) uint8, boxes arrays x, y, w, h in pixels.
    Computed in float32.
    """

    def __init__(self, model, device):
        self.model = model.to(device).eval()
        self.window = hann_window(model.search_side).to(device)

    def crop(self, frame, name):
        """Cut the template or search crop around the last box -> (1, 3, size, size) normalised,
        side, origin, see `crop_square`."""
        crop, *place = crop_square(frame, self.box, *self.model.crops[name])
        crop = crop[None].to(self.window.device)
        return normalize(crop, self.model.mean, self.model.std), *place

    @torch.inference_mode()
    def start(self, frame, box):
        self.box = np.array(box)
        crop, *_ = self.crop(frame, "template")
        self.template = self.model.embed_template(crop)
        return self.box, 1.0

    @torch.inference_mode()
    def locate(self, search):
        """Normalised search crop (1, 3, s, s) -> box x, y, w, h in the crop, its windowed score."""
        keep_rate = self.model.options["keep_rate"]
        score, size, offset = self.model(self.template, search, keep_rate)
        response = score * self.window
        box = box_convert(decode(response, size, offset), "cxcywh", "xywh")[0]
        return box.cpu().numpy(), response.amax().item()

    def step(self, frame):
        search, side, origin = self.crop(frame, "search")
        box, score = self.locate(search)
        self.box = clip_box(box * side + origin, *frame.shape[1:])
        return self.box, score


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def train(args):
    """Train, resuming from args.out/last.pt if it exists, and save args.out/tracker.pt."""
    rank, world, device, dtype = run = init_distributed(args.device, args.dtype)
    torch.manual_seed(args.seed)
    model = build_tracker(args).to(device)
    loader, val_loader = build_loaders(args, model, run)
    accum_steps = loader.sampler.accum_steps
    steps = len(loader) // accum_steps    # optimizer steps per epoch
    groups = [dict(group, lr_scale=args.encoder_lr)
              for group in param_groups(model.encoder, args.weight_decay)]
    groups += param_groups(model.head, args.weight_decay)
    optimizer = AdamW(groups, args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    data = dict(sequences=[len(items) for items, _ in loader.dataset.sets])    # of each set
    first_epoch = resume(args, run, steps, model, optimizer, scaler, **data)
    tracker = model
    if world > 1:
        tracker = DistributedDataParallel(model)

    for epoch in range(first_epoch, args.epochs):
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(mix_seed(args.seed, epoch, rank))    # of drop path
        tracker.train()
        keep_rate = keep_rate_at(epoch + 1, args.keep_rate, args.epochs // 15, args.epochs // 3)
        lr = args.lr if epoch < max(1, args.epochs * 4 // 5) else args.lr / 10
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", disable=rank > 0)
        means = {}    # each loss, averaged over the micro-batches of a step
        for i, (template, search, boxes) in enumerate(bar):
            step = epoch * steps + i // accum_steps
            update = (i + 1) % accum_steps == 0
            template, search = (normalize(x, model.mean, model.std) for x in (template, search))
            tracker.require_backward_grad_sync = update    # DistributedDataParallel reads it
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                maps = tracker(template, search, keep_rate)
            losses = tracking_losses(*maps, boxes)
            scaler.scale(losses["loss"] / accum_steps).backward()
            means = {k: means.get(k, 0) + v.detach() / accum_steps for k, v in losses.items()}
            if not update:
                continue

            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            if step % args.log_every == 0:    # the only device-to-host sync
                values = log(args, rank, world, epoch=epoch + 1, step=step, lr=lr,
                             keep_rate=keep_rate, grad_norm=grad_norm, **means)
                bar.set_postfix(loss=f"{values['loss']:.4f}")
            means = {}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            report(args, rank, model, val_loader, epoch=epoch + 1, step=(epoch + 1) * steps)
        save(args, rank, "last.pt", model, epoch=epoch + 1, **data,
             optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    save(args, rank, "tracker.pt", model, epoch=args.epochs)


@torch.no_grad()
def report(args, rank, model, val_loader, epoch, step):
    """Log and print the mean loss and IoU on fixed pairs, in float32 and at the final keep rate.
    Process 0 does it alone: its batch norms are those that are saved."""
    if rank > 0:
        return
    model.eval()
    [(template, search, boxes)] = val_loader
    template, search = (normalize(x, model.mean, model.std) for x in (template, search))
    losses = tracking_losses(*model(template, search, args.keep_rate), boxes)
    log(args, rank, 1, epoch=epoch, step=step, val_loss=losses["loss"], val_iou=losses["iou"])
    tqdm.write(f"epoch {epoch}: IoU {losses['iou']:.3f} on fixed pairs")


def build_tracker(args):
    """Build the tracker of the options, on the encoder of --init or one with random weights."""
    encoder, _ = load_model(VisionTransformer, args.init, args.model, mean=args.mean, std=args.std,
                            img_size=args.image_size, drop_path=args.drop_path)
    return Tracker(encoder, **{name: getattr(args, name) for name in TRACKER})


def build_loaders(args, model, run):
    """Build the loaders of the training pairs, and of fixed pairs of the same sequences: one batch,
    which process 0 alone computes. Raises InputError."""
    pairs = Pairs(open_sets(args.data), args.pairs, args.seed, **model.crops)
    loader = train_loader(pairs, args.batch_size, args.accum_steps, 128, args.workers, args.seed,
                          run)
    pairs = replace(pairs, count=args.val_pairs, seed=args.seed + 1)
    return loader, eval_loader(pairs, len(pairs), args.workers, (0, 1, *run[2:]))


# --------------------------------------------------------------------------------------------------
# Data: pairs of crops
# --------------------------------------------------------------------------------------------------
def sample_pair(rng, visible, max_gap=200):
    """Draw a visible template frame, then a visible search frame at most max_gap later (causal
    sampling) -> two frame numbers. A still image is paired with itself. None if there is no such
    pair, and for a video of fewer than 20 frames or 5 visible ones, as in OSTrack."""
    ids = np.flatnonzero(visible)
    if len(visible) == len(ids) == 1:
        return 0, 0
    followed = ids[:-1][np.diff(ids) <= max_gap]    # by a visible frame within max_gap
    if len(visible) < 20 or len(ids) < 5 or not len(followed):
        return None
    template = rng.choice(followed)
    later = ids[(ids > template) & (ids <= template + max_gap)]
    return template, rng.choice(later)


def jitter_box(rng, box):
    """Draw a box where the target may have been found last: w and h times exp(N(0, 0.25)), the
    middle off by up to 1.5 sqrt(w * h)."""
    extent = box[2:] * np.exp(rng.normal(0, 0.25, 2))
    shift = math.sqrt(extent.prod()) * 3 * (rng.random(2) - 0.5)
    return np.append(box_centre(box) + shift - extent / 2, extent)


@dataclass
class Pairs(Dataset):
    """Item (epoch, index) -> template (3, z, z) and search crop (3, s, s) uint8 of a random pair of
    frames, and the target's box (4,) in the search crop. All randomness comes from (seed, epoch,
    index).

    sets: see `open_sets`; they are drawn in equal shares. count: items of an epoch. template,
    search: (factor, size) of the crops, see `crop_square`.
    """

    sets: list
    count: int
    seed: int
    template: tuple
    search: tuple

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        epoch, index = key    # see EpochSampler
        rng = np.random.default_rng(mix_seed(self.seed, epoch, index))
        (first, second), (target, box) = self.read_pair(rng)
        template, *_ = crop_square(first, target, *self.template)
        search, side, origin = crop_square(second, jitter_box(rng, box), *self.search)
        return augment(rng, template, search, (box - origin) / side)

    def read_pair(self, rng):
        """Read two frames (3, H, W) of a random sequence and their boxes (2, 4). Raises OSError."""
        for _ in range(100):
            items, read = self.sets[rng.integers(len(self.sets))]
            frames, boxes, visible, size = read(items[rng.integers(len(items))])
            has_area = boxes[:, 2:].min(axis=1) > 0
            pair = sample_pair(rng, visible & has_area)
            if pair:
                return [read_frame(frames[i], size) for i in pair], boxes[list(pair)]
        raise OSError("none of 100 sequences drawn from --data has 20 frames, 5 of them with a "
                      "visible box: tests/tools/check.py lists what they hold")


def augment(rng, template, search, box):
    """Turn both crops grey (5 %), change the brightness of each by up to 20 %, mirror each (50 %)
    -> template, search (uint8), box of the search crop (4,) float32, x, y, w, h in [0, 1]."""
    crops = template, search
    if rng.random() < 0.05:
        crops = [rgb_to_grayscale(crop, 3) for crop in crops]
    template, search = (adjust_brightness(crop, rng.uniform(0.8, 1.2)) for crop in crops)
    if rng.random() < 0.5:
        template = template.flip(2)
    if rng.random() < 0.5:
        search = search.flip(2)
        box[0] = 1 - 1 / search.shape[2] - box[0] - box[2]
    return template, search, torch.from_numpy(box).float()


# --------------------------------------------------------------------------------------------------
# Data: sequences, one function for each data set
# --------------------------------------------------------------------------------------------------
class Sequence(NamedTuple):
    """N frames of one target. size: (width, height) that the boxes refer to, if it is stated."""
    frames: list           # image files
    boxes: np.ndarray      # (N, 4)
    visible: np.ndarray    # (N,) bool
    size: tuple = None


def read_lasot(file):
    """Read NAME/groundtruth.txt of LaSOT, which stands beside the folder img of its frames."""
    file = Path(file)
    boxes = read_numbers(file)
    hidden = [read_numbers(file.with_name(name), len(boxes), ()) == 1
              for name in ("full_occlusion.txt", "out_of_view.txt")]
    frames = [f"{file.parent}/img/{i:08}.jpg" for i in range(1, len(boxes) + 1)]
    return Sequence(frames, boxes, ~np.any(hidden, axis=0))


def read_got10k(file):
    """Read train/NAME/groundtruth.txt of GOT-10k, which stands among its frames. Own videos in this
    layout may lack label files: the target is then visible in all frames."""
    file = Path(file)
    boxes = read_numbers(file)
    visible = np.ones(len(boxes), bool)
    for label, hidden in ((file.with_name("absence.label"), 1), (file.with_name("cover.label"), 0)):
        if label.exists():
            visible &= read_numbers(label, len(boxes), ()) != hidden
    frames = [f"{file.parent}/{i:08}.jpg" for i in range(1, len(boxes) + 1)]
    return Sequence(frames, boxes, visible)


def read_trackingnet(file):
    """Read TRAIN_*/anno/NAME.txt of TrackingNet, whose frames are those of TRAIN_*/frames/NAME. The
    target is always visible."""
    file = Path(file)
    boxes = read_numbers(file)
    folder = file.parents[1] / "frames" / file.stem
    frames = [f"{folder}/{i}.jpg" for i in range(len(boxes))]
    return Sequence(frames, boxes, np.ones(len(boxes), bool))


def read_coco(text):
    """Read an object of COCO from a text of `list_coco`: a sequence of one frame."""
    file, width, height, *box = json.loads(text)
    return Sequence([file], np.array([box]), np.array([True]), (width, height))


def list_coco(file):
    """List the single objects in annotations/instances_*.json of COCO -> JSON texts of image file,
    width, height, x, y, w, h. Raises InputError."""
    year = file.stem.removeprefix("instances_")
    folder = file.parents[1] / year
    if not folder.exists():
        folder = folder.parent / "images" / year    # OSTrack's layout
    try:
        content = json.loads(file.read_bytes())
        images = {image["id"]: (f"{folder}/{image['file_name']}", image.get("width", 0),
                                image.get("height", 0)) for image in content["images"]}
        objects = [a for a in content["annotations"] if not a.get("iscrowd")]
        found = [json.dumps((*images[a["image_id"]], *map(float, a["bbox"]))) for a in objects
                 if a["image_id"] in images and len(a.get("bbox") or ()) == 4]
    except Exception as error:    # of many kinds: anything may be missing, or of another type
        raise InputError(f"{file} is no annotation file of COCO ({type(error).__name__}: {error})"
                         ) from None
    lost = len(objects) - len(found)
    if lost and os.getenv("RANK", "0") == "0":
        print(f"{file}: {lost} of {len(objects)} annotations skipped: no box, or no such image")
    return found


SETS = {    # annotation files, and what reads an item of a set
    "lasot": ("[!.]*/groundtruth.txt [!.]*/[!.]*/groundtruth.txt", read_lasot),
    "got10k": ("train/[!.]*/groundtruth.txt", read_got10k),
    "trackingnet": ("TRAIN_*/anno/[!.]*.txt", read_trackingnet),
    "coco": ("annotations/instances_train*.json", read_coco),
}


def find_annotations(text):
    """Find the annotation files of --data lasot=DIR,coco=DIR -> {"lasot": files, "coco": files}.
    Raises InputError."""
    found = {}
    for entry in text.split(","):
        name, _, folder = entry.partition("=")
        if name not in SETS or name in found:
            raise InputError(f"--data {text}: give NAME=FOLDER,... of {', '.join(SETS)}, each once")
        patterns = SETS[name][0].split()
        files = [file for pattern in patterns for file in Path(folder).glob(pattern)]
        if name == "lasot":    # a sequence may lie there in both layouts
            files = {file.parent.name: file for file in files}.values()
        found[name] = sorted(files)
    return found


def open_sets(text):
    """Open the training sets of --data -> for each of them its items, and the function that reads
    the `Sequence` of an item. Raises InputError."""
    sets = []
    for name, items in find_annotations(text).items():
        if name == "lasot":
            items = [file for file in items if file.parent.name not in LASOT_TEST]
        if name == "coco" and items:
            items = list_coco(items[-1])    # of 2014 and 2017 the later
        if not items:
            raise InputError(f"--data {text}: {name} has no training sequence (README, 'Data')")
        sets.append((Names(items), SETS[name][1]))
    return sets


def read_frame(file, size=None):
    """Read an image file -> (3, H, W) uint8, upright. size: (width, height) that boxes refer to;
    where the upright image has them swapped, its pixels are left as they are stored."""
    image = open_image(file)
    if size and size != image.size == size[::-1]:
        image = Image.open(file).convert("RGB")
    return pil_to_tensor(image)


def read_numbers(path, lines=None, row=(4,)):
    """Read a text file of numbers divided by commas, tabs or spaces -> float64 (lines, *row), the
    first `lines` or all. Single numbers, row=(), may also stand in one line. Raises OSError."""
    try:
        text = path.read_text("utf-8-sig").replace(",", " ")
        numbers = np.loadtxt(text.splitlines(), ndmin=1 + len(row))[:lines]
        if numbers.shape != (lines or len(numbers), *row):
            raise ValueError(f"{numbers.shape}, not {(lines, *row)}")
        return numbers
    except (OSError, ValueError) as error:
        raise OSError(f"{path} is no UTF-8 text of {math.prod(row)} numbers per frame ({error}); "
                      "tests/tools/check.py lists all such files") from None


# --------------------------------------------------------------------------------------------------
# One-pass evaluation
# --------------------------------------------------------------------------------------------------
def score_sequence(boxes, truth, visible):
    """Score one video: float64 arrays (N, 4), (N, 4), bool (N,) -> success (21,), precision (51,),
    normalised precision (51,). These are shares of frames with IoU > t, t = 0, 0.05 .. 1; centre
    error <= t, t = 0, 1 .. 50 pixels; centre error over box size <= t, t = 0, 0.01 .. 0.5.

    As in the toolkits of LaSOT and OSTrack, the first box is set to the true one, a box without
    extent to the one before it, and a frame without the target fails, but counts. Where the target
    is visible but its true box has no extent, the toolkits set some centre errors to -1, which is a
    hit: OSTrack's the normalised one, LaSOT's both. Here such a frame fails in all metrics.
    """
    boxes, truth, visible = map(torch.tensor, (boxes, truth, visible))
    boxes[0] = truth[0]
    has_size = (boxes[:, 2:] > 0).all(dim=1)
    boxes = boxes[(has_size * torch.arange(len(boxes))).cummax(dim=0).values]
    present = visible & (truth[:, 2:] > 0).all(dim=1)
    corners = [box_convert(x, "xywh", "xyxy")[:, None] for x in (boxes, truth)]
    iou = torch.vmap(box_iou)(*corners)[:, 0]                                   # (N, 1)
    shift = box_centre(boxes) - box_centre(truth)
    hits = (iou > torch.arange(21).double() / 20,
            shift.norm(dim=1, keepdim=True) <= torch.arange(51),
            (shift / truth[:, 2:]).norm(dim=1, keepdim=True) <= torch.arange(51) / 100)
    return [(hit & present[:, None]).float().mean(dim=0) for hit in hits]


def evaluate(args):
    """Evaluate a tracker, or the text files of --results, in one pass over LaSOT's test sequences,
    and print AUC, P and P_norm. Processes share the sequences. Those that have a text file are not
    tracked again. If sequences or text files are missing, the score is labelled PARTIAL."""
    rank, world, device, _ = init_distributed(args.device, minutes=24 * 60)    # shares may differ
    files = [file for file in find_annotations(args.data).get("lasot", [])
             if file.parent.name in LASOT_TEST]
    folder = args.results
    if not folder:
        tracker = load_tracker(args.init, device)
        folder = f"{args.out}/results/{zlib.crc32(Path(args.init).read_bytes()):08x}"
    sums = torch.zeros(4, device=device)    # AUC, P, P_norm, sequences
    for file in tqdm(files[rank::world], disable=rank > 0):
        path = Path(folder, f"{file.parent.name}.txt")
        frames, truth, visible, _ = read_lasot(file)
        if not args.results and not path.exists():
            boxes, _ = zip(*follow(tracker, frames, truth[0], args.workers))
            write_boxes(path, boxes)
        if path.exists():
            boxes = read_numbers(path, len(truth))
            check_format(path, boxes[0], truth[0])
            success, precision, normed = score_sequence(boxes, truth, visible)
            sums += torch.tensor([success.mean(), precision[20], normed[20], 1], device=device)
    if world > 1:
        dist.all_reduce(sums)

    count = int(sums[3])
    if not count:
        raise InputError(f"none of LaSOT's {len(LASOT_TEST)} test sequences is in --data "
                         f"{args.data} and in {folder}")
    if rank == 0:
        auc, p, p_norm = (100 * sums[:3] / count).tolist()
        partial = "" if count == len(LASOT_TEST) else " PARTIAL"
        print(f"AUC {auc:.1f}, P {p:.1f}, P_norm {p_norm:.1f}{partial}, {count} of "
              f"{len(LASOT_TEST)} sequences in {'TF32' if device.type == 'cuda' else 'float32'}; "
              f"boxes in {folder}")


def load_tracker(path, device):
    """Load the tracker in a tracker.pt or last.pt -> `OnePassTracker`. Raises InputError."""
    encoder, file = load_model(VisionTransformer, path)
    if "tracker" not in file.arch:
        raise InputError(f"checkpoint {path} is no tracker: give the tracker.pt of a run")
    model = Tracker(encoder, **file.arch["tracker"])
    model.load_state_dict(file.content["model"])
    return OnePassTracker(model, device)


def follow(tracker, files, box, workers):
    """Follow the target in `box` of the first frame through image files, which `workers` processes
    read ahead. Yield box and score of each frame; the first box is the given one. Raises OSError.
    """
    if not 0 < box[2:].min() <= box.max() < math.inf:
        raise OSError(f"{files[0]}: the first box {box} has no extent: correct groundtruth.txt")
    frames = iter(DataLoader(files, batch_size=None, collate_fn=read_frame,
                             num_workers=workers))
    yield tracker.start(next(frames), box)
    yield from map(tracker.step, frames)


def check_format(path, box, truth):
    """Raise OSError unless the first `box` (4,) of a result, read as x, y, w, h, has an IoU of at
    least 0.5 with the box that a tracker is given, `truth` (4,)."""
    box, truth = (box_convert(torch.tensor(x)[None], "xywh", "xyxy") for x in (box, truth))
    if box_iou(box, truth) < 0.5:
        raise OSError(f"line 1 of {path} is not the given box as x,y,w,h (upper left corner and "
                      "size in pixels): convert the boxes; tests/tools/check.py names the format")


def write_boxes(path, boxes):
    """Write one line x,y,w,h per frame, with two decimals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")    # two evaluations may run at once
    np.savetxt(scratch, boxes, "%.2f", ",")
    scratch.replace(path)


# --------------------------------------------------------------------------------------------------
# Own frames
# --------------------------------------------------------------------------------------------------
def track_frames(args):
    """Follow the target of --box through --frames, and write boxes.txt and overlay.gif."""
    if Path(args.frames).is_file():
        raise InputError("--frames takes a folder of frames: write those of a video by mkdir "
                         f"frames; ffmpeg -i {args.frames} frames/%08d.jpg")
    files = sorted(list_images(args.frames, args.out), key=natural_order)
    box = np.array(re.findall(r"[-+.\d]+", str(args.box)), float)    # 303 2 60 80 or 303,2,60,80
    x, y, w, h = box if len(box) == 4 else np.zeros(4)
    width, height = open_image(files[0]).size
    if not (0 <= x < x + w <= width and 0 <= y < y + h <= height):
        corners = x < w <= width and y < h <= height
        hint = f"; if yours is x1 y1 x2 y2, give --box {x:g} {y:g} {w - x:g} {h - y:g}"
        raise InputError(f"--frames needs --box X Y W H within a frame of {width} x {height}"
                         f"{hint * bool(corners)}")
    _, _, device, _ = init_distributed(args.device)
    tracker = load_tracker(args.init, device)
    boxes, scores = zip(*tqdm(follow(tracker, files, box, args.workers), total=len(files)))
    write_boxes(Path(args.out, "boxes.txt"), boxes)
    draw_overlay(f"{args.out}/overlay.gif", files, boxes, scores)
    Path(args.out, ".lock").touch()    # `list_images` skips folders that hold it
    print(f"{len(files)} frames of {len(set(map(os.path.dirname, files)))} folder(s); {args.out} "
          "has boxes.txt, overlay.gif")


def natural_order(file):
    """Key for sorting: numbers in a name count as numbers, 2.jpg < 10.jpg, 0.08.jpg < 0.1.jpg."""
    stem, _ = os.path.splitext(file)
    return re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):050.9f}", stem)


def draw_overlay(path, files, boxes, scores):
    """Draw frames with box and score into an animated GIF, 400 pixels along its longer side, of 30
    frames a second; of a long video every n-th frame, at most 150."""
    step = math.ceil(len(files) / 150)
    pictures = []
    for i in range(0, len(files), step):
        frame = open_image(files[i])
        picture = ImageOps.contain(frame, (400, 400))
        x, y, w, h = boxes[i] * 400 / max(frame.size)
        draw = ImageDraw.Draw(picture)
        draw.rectangle((x, y, x + w, y + h), outline="red", width=3)
        draw.text((6, 4), f"score {scores[i]:.2f}", "red", font_size=18)
        pictures.append(picture)
    # 33.3 ms each, of which a GIF stores whole 10 ms
    pictures[0].save(path, save_all=True, append_images=pictures[1:], loop=0,
                     duration=[30 * step, 30 * step, 40 * step] * len(pictures))


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
# Arguments: the defaults are the paper's
# --------------------------------------------------------------------------------------------------
USED = "eval frames box data init results workers out device"


def parse_args(argv=None):
    """Parse the command line, or the list `argv`."""
    parser = Parser(__doc__)
    add = parser.group("method (OSTrack-256)")
    add("--init", help="encoder to start from (README, 'Checkpoints'; default: random weights); "
                       "with --eval or --frames, the tracker (default: tracker.pt in --out)")
    add("--model", help="encoder; default: that of --init, else the paper's vit_tiny (12 heads)")
    add("--template-size", low=1,
        help="side of the template crop in pixels; default: 128, the paper's")
    add("--search-size", low=1,
        help="side of the search crop in pixels; default: 256, the paper's")
    add("--keep-rate", type=float, low=0.01,
        help="share of search tokens that blocks 4, 7 and 10 each keep; default: 0.7, reached by a "
             "cosine from 1 between 1/15 and 1/3 of the epochs, 20 and 100 of the paper's 300")
    add("--head-channels", low=8,
        help="channels of the head's first layer; default: 256, the paper's")
    add("--drop-path", type=float, default=0.1,
        help="drop path rate of the last block; the rates grow linearly from 0; paper: 0.1")
    parser.pixel_options(add, "that of --init, else 224; it is the size that the encoder was "
                              "trained at, not that of the crops")

    add = parser.group("training (OSTrack-256), data")
    add("--data",
        default="lasot=data/lasot,got10k=data/got10k,coco=data/coco,trackingnet=data/trackingnet",
        help="sets as NAME=FOLDER,...; --eval reads LaSOT's 280 test sequences, training all other "
             "sequences")
    add("--pairs", low=1, default=60_000, help="pairs per epoch; paper: 60,000")
    add("--epochs", low=1, default=300, help="epochs of --pairs pairs; paper: 300")
    add("--lr", type=float, default=4e-4,
        help="learning rate of the head at any --batch-size; falls to a tenth after 4/5 of the "
             "epochs; paper: 4e-4")
    add("--encoder-lr", type=float, default=0.1,
        help="learning rate of the encoder as a share of --lr; paper: 0.1")

    add = parser.group("use of a trained tracker")
    add("--eval", action="store_true", help="one-pass evaluation on the test sequences of --data")
    add("--results", help="with --eval: score the files NAME.txt of this folder, one line x,y,w,h "
                          "per frame, instead of a tracker")
    add("--frames", help="follow the target of --box through the images of this folder")
    add("--box", nargs="+", help="target in the first frame, x y w h in pixels")

    parser.run_options("out/track", batch_size=128, eval_every=10, clip_grad=0.1)
    parser.set_defaults(**TRACKER, **RECIPE)
    args = parser.parse_args(argv)
    if args.eval or args.frames:
        parser.check_unread(args, "a trained tracker", USED)
    return args


def resolve(args):
    """Fill in the default that depends on other options: the tracker of --eval and --frames."""
    if args.eval or args.frames:
        args.init = args.init or f"{args.out}/tracker.pt"
    return args


def main(args):
    """Train, or run --eval or --frames."""
    args = resolve(args)
    if args.eval:
        evaluate(args)
    elif args.frames:
        track_frames(args)
    else:
        train(args)


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
