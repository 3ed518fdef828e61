r"""MAE pre-training of lightweight ViTs with decoupled attention distillation, D2-MAE (Sec. 4).

    torchrun --nproc_per_node=8 pretrain_d2mae.py --teacher mae_base.pt     # the paper's D2-MAE
    torchrun --nproc_per_node=8 pretrain_d2mae.py --method mae              # its MAE baseline
    torchrun --nproc_per_node=8 pretrain_d2mae.py --model hiera_tiny --method d-mae \
        --teacher mae_hiera_base_224.pth
    python pretrain_d2mae.py --demo                                         # needs no files

The student sees a quarter of the patches and learns two things. Its block 8 feeds a small decoder
that paints the other patches (L_rec). The attention map of one extra, 13th attention after block 12
imitates, through a learned mix of heads, that of the teacher's last block over the same visible
patches (L_attn). So reconstruction shapes the lower layers, distillation all of them, and nothing
is traded off. Read `MaskedAutoencoder.forward` next to the paper, then `train`.

Shapes: B images, N patches, V visible, M = N - V masked, T = 1 + V tokens, D width, H heads,
        P = 3 * patch_size^2. Hiera: N, V, M count mask units of 32x32 pixels; each holds 4 tokens
        of 16x16 pixels where pixels are predicted, and T = 4 V where maps are compared.
Masks:  ids_keep (B, V) and ids_masked (B, M) are raster indices, together all of range(N).

NOTES, departures from the authors' code:
- The decoder keeps the shuffled order [class, visible, masked] (attention does not care), so that
  the masked tokens are a slice and only their pixels are predicted. The numbers are the same.
- The 13th block is a LayerNorm and the q and k rows of a qkv projection; v and all that follows the
  map are never created (the authors keep v, unused).
- Tokens and position tables get no weight decay; the authors' code decays those that are trained.
- Crops, flips and masks are a function of (seed, epoch, image), not of the process that makes them:
  a run does not depend on the number of workers or processes, and resumes as if never interrupted.
- A JPEG is decoded at reduced size where a crop would be reduced by as much anyway.
- Attention maps are compared in float32, the authors' in float16; GPUs from Ampere on multiply
  float32 matrices in TensorFloat-32.
- The losses are read on the host once per optimizer step, before the update: a loss that is not
  finite stops every process while the weights are still good.
"""
import argparse
import datetime
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.data import Dataset, DistributedSampler
from torchvision.utils import draw_bounding_boxes, make_grid
from tqdm import tqdm

from models import (IMAGENET_MEAN, IMAGENET_STD, MODELS, Block, HieraBlock, InputError, LayerNorm,
                    add_run_options, attention_logits, average_over_processes, check_readable,
                    check_step, choose_device, choose_dtype, depth_of, endless_batches, fingerprint,
                    infer_model, init_mae, init_patch_embed, list_images, load_encoder, load_state,
                    log_line, mix_seed, normalize, number, open_item, own_batches, parallel,
                    param_groups, plain, plain_errors, random_crop, read_log, read_or_next, reroll,
                    resume, save_checkpoint, sincos_2d, start_log, take_patches, to_tensor)

RECIPE = dict(    # Sec. 4; settings without an option. All others: `parse_args`
    decoder_dim=96, decoder_depth=1, decoder_heads=3,
    norm_pix=True,                          # targets normalised per patch
    betas=(0.9, 0.95), weight_decay=0.05,   # AdamW; no decay of biases, norms and tokens
    min_lr=0.0,                             # end of the cosine
    val_images=512,                         # held-out images at most
    eval_every=10,                          # epochs between evaluations with pictures
    log_every=20,                           # optimizer steps per line of log.jsonl
)
DEMO = dict(data="toy", out="out/demo/pretrain", model="vit_pico", image_size=[48], patch_size=8,
            crop_scale=(1.0, 1.0), epochs=14, batch_size=64, base_lr=1.2e-2, val_images=128,
            workers=1, eval_every=4)
DEMO_TEACHER = dict(    # a higher rate makes attention logits too large to be imitated
    method="mae", model="vit_nano", epochs=12, base_lr=6e-3, decoder_tap=None,
    distill="attention", distill_layers=None)


# --------------------------------------------------------------------------------------------------
# Method: masking, targets and losses
# --------------------------------------------------------------------------------------------------
def random_masking(noise, mask_ratio):
    """Random masking per sample: noise (B, N) is sorted, the V = int(N (1 - mask_ratio)) smallest
    stay visible -> ids_keep (B, V), ids_masked (B, M)."""
    ids = noise.argsort(dim=1)
    keep = int(noise.shape[1] * (1 - mask_ratio))
    return ids[:, :keep], ids[:, keep:]


def patch_pixels(images, ids, patch_size, channels_last=True):
    """Pixels of the patches `ids` (B, M) of images (B, 3, H, W) -> (B, M, P), ordered (row, column,
    channel) as in MAE, or (channel, row, column) as in Hiera. Only those patches are copied."""
    patches = take_patches(images, patch_size, ids)                          # (B, M, 3, p, p)
    if channels_last:
        patches = patches.permute(0, 1, 3, 4, 2)
    return patches.flatten(2)


def paste_patches(images, patches, ids, patch_size, channels_last=True):
    """Inverse of `patch_pixels`: a copy of the images with these pixels in the patches' place."""
    B, p = len(images), patch_size
    w = images.shape[3] // p
    shape = (p, p, 3) if channels_last else (3, p, p)
    patches = patches.unflatten(2, shape)                                    # (B, M, 3, p, p) or so
    if channels_last:
        patches = patches.permute(0, 1, 4, 2, 3)
    images = images.clone()
    grid = images.view(B, 3, -1, p, w, p).permute(0, 2, 4, 1, 3, 5)          # written through
    batch = torch.arange(B, device=images.device)[:, None]
    grid[batch, ids // w, ids % w] = patches
    return images


def normalize_patches(patches):
    """norm_pix: (x - mean) / sqrt(variance + 1e-6) of each patch (B, M, P), variance unbiased."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def reconstruction_loss(pred, target):
    """L_rec: mean squared error over the masked patches alone. Two (B, M, P); in float32."""
    return F.mse_loss(pred.float(), target.float())


def attention_loss(student, teacher, adapter):
    """L_attn = MSE(A_T, M A_S), A = q k^T / sqrt(d) before the softmax.

    student (B, H_S, T, T), teacher (B, H_T, T, T) over the same visible tokens, class token
    included; the adapter M is a learned bias-free 1x1 convolution over heads, H_S -> H_T. In
    float32, since logits can be large. (An ablation compares hidden states (B, T, D) by it.)
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(adapter(student.float()), teacher.float())


# --------------------------------------------------------------------------------------------------
# Method: student, decoder, adapter
# --------------------------------------------------------------------------------------------------
class MaskedAutoencoder(nn.Module):
    """Student of MAE, D-MAE and D2-MAE on a ViT: encoder, decoder, and what distillation adds.

    encoder: VisionTransformer without a head. decoder_tap: block whose normalised output the
    decoder reads. teacher: read for its number of heads only, not stored. decoupled: D2-MAE, the
    student's map comes from a 13th attention behind the last block. HieraMaskedAutoencoder
    overrides build_decoder, latent, position_rows, patches and paste.
    """

    def __init__(self, encoder, decoder_tap=12, decoder_dim=96, decoder_depth=1, decoder_heads=3,
                 norm_pix=True, teacher=None, alpha=1.0, decoupled=False):
        super().__init__()
        self.encoder = encoder
        self.decoder_tap = decoder_tap
        self.norm_pix = norm_pix
        self.alpha = alpha
        self.decoupled = decoupled
        self.taps = {decoder_tap}    # blocks whose outputs the losses read
        self.build_decoder(decoder_dim, decoder_depth, decoder_heads)
        self.apply(init_mae)    # the encoder too: Hiera's own initialisation is for classifiers
        init_patch_embed(encoder.patch_embed.proj)
        if teacher is not None:
            self.build_distillation(teacher)

    def build_decoder(self, dim, depth, heads):
        """The decoder of MAE: embedding, mask token, fixed positions, blocks, norm, pixels."""
        self.cells = self.encoder.grid[0] * self.encoder.grid[1]    # patches; of Hiera, mask units
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        positions = sincos_2d(dim, self.encoder.grid)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.decoder_norm = LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, 3 * self.encoder.patch_size ** 2)

    def build_distillation(self, teacher):
        """The adapter over heads and, for D2-MAE, the 13th attention."""
        heads = self.encoder.blocks[-1].attn.num_heads
        self.attn_adapter = nn.Conv2d(heads, teacher.blocks[-1].attn.num_heads, 1, bias=False)
        if self.decoupled:
            self.build_extra_attention()
            self.taps |= {self.encoder.depth}
        else:
            self.taps |= {self.encoder.depth - 1}    # the input of the last block gives its map

    def build_extra_attention(self):
        """The 13th block, as far as its attention map: LayerNorm, q and k."""
        dim = self.encoder.embed_dim
        self.extra_norm = LayerNorm(dim)
        self.extra_qk = nn.Linear(dim, 2 * dim)
        bound = math.sqrt(6 / (dim + 3 * dim))    # Xavier as if v were there, as the authors do
        nn.init.uniform_(self.extra_qk.weight, -bound, bound)
        nn.init.zeros_(self.extra_qk.bias)

    def forward(self, images, ids_keep, ids_masked, teacher_map=None):
        """L = L_rec + alpha * L_attn -> dict of scalars: loss, rec and, with a teacher, attn.

        images (B, 3, H, W) normalised; teacher_map (B, H_T, T, T): pre-softmax map of the teacher's
        last block for the same images and ids_keep, see `teacher_signal`.
        """
        features = self.encoder.forward_features(images, self.taps, ids_keep)   # block -> (B, T, D)

        # reconstruction: the decoder reads block 8 (D2-MAE) or the last block (MAE, D-MAE)
        latent = self.latent(features)                                          # (B, T, D)
        pred = self.forward_decoder(latent, ids_keep, ids_masked)               # (B, M, P)
        target = self.target(images, ids_masked)                                # (B, M, P)
        rec = reconstruction_loss(pred, target)
        if teacher_map is None:
            return {"loss": rec, "rec": rec}

        # distillation: the map of the 13th attention (D2-MAE) or of the last block (D-MAE)
        attn = self.distillation_loss(features, teacher_map)
        return {"loss": rec + self.alpha * attn, "rec": rec, "attn": attn}

    def distillation_loss(self, features, teacher_map):
        """L_attn between the student's and the teacher's map. The ablations override it."""
        student_map = self.student_map(features)                                # (B, H_S, T, T)
        return attention_loss(student_map, teacher_map, self.attn_adapter)

    def latent(self, features):
        # In D2-MAE this norm, and so the one in encoder.pt, belongs to block 8, not to block 12.
        return self.encoder.norm(features[self.decoder_tap])

    def forward_decoder(self, latent, ids_keep, ids_masked):
        """Visible tokens (B, T, D) -> pixels of the masked patches (B, M, P), in their order.

        Tokens stand as [class, ids_keep, ids_masked].
        """
        x = self.decoder_embed(latent)                                          # (B, 1 + V, D_dec)
        B, T, _ = x.shape
        rows = self.position_rows(ids_keep, ids_masked)                         # (B, 1 + N)
        mask_tokens = self.mask_token.expand(B, rows.shape[1] - T, -1).to(x.dtype)
        x = torch.cat([x, mask_tokens], dim=1) + self.decoder_pos_embed[0][rows]
        for block in self.decoder_blocks:
            x = block(x)                                                        # (B, 1 + N, D_dec)
        return self.decoder_pred(self.decoder_norm(x[:, T:]))

    def position_rows(self, ids_keep, ids_masked):
        """Row of the decoder's position table for each token; row 0 is the class token's."""
        class_row = ids_keep.new_zeros(len(ids_keep), 1)
        return torch.cat([class_row, ids_keep + 1, ids_masked + 1], dim=1)

    def target(self, images, ids_masked):
        """What the decoder should predict: pixels of the masked patches (B, M, P)."""
        patches = self.patches(images, ids_masked).float()
        return normalize_patches(patches) if self.norm_pix else patches

    def patches(self, images, ids):
        return patch_pixels(images, ids, self.encoder.patch_size)

    def paste(self, images, patches, ids):
        return paste_patches(images, patches, ids, self.encoder.patch_size)

    def student_map(self, features):
        """The student's pre-softmax map (B, H_S, T, T) that imitates the teacher's last one."""
        depth = self.encoder.depth
        if not self.decoupled:
            return self.encoder.attention_map(features[depth - 1], depth)
        heads = self.encoder.blocks[-1].attn.num_heads
        qk = self.extra_qk(self.extra_norm(features[depth]))                    # (B, T, 2 D)
        q, k = qk.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)           # 2 x (B, H, T, d)
        return attention_logits(q, k)

    @torch.no_grad()
    def teacher_signal(self, teacher, images, ids_keep):
        """What the loss reads of the frozen teacher, and nothing more: blocks 1 to last - 1, then
        LayerNorm, q and k of the last -> pre-softmax map (B, H_T, T, T)."""
        x = teacher.forward_features(images, [teacher.depth - 1], ids_keep)[teacher.depth - 1]
        return teacher.attention_map(x, teacher.depth)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def lr_at(step, total, warmup, lr, min_lr):
    """Learning rate of step `step` (from 0): linear warm-up from 0, then half a cosine."""
    if step < warmup:
        return lr * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * done))


def train(args):
    """Train into args.out: a new run, or the one that last.pt there continues."""
    run = init_distributed(args)
    rank, world, device, dtype = run
    teacher = load_teacher(args, device) if args.teacher else None
    torch.manual_seed(args.seed)    # after the teacher: every method starts from one encoder
    model = build_student(args, teacher).to(device)
    train_set, val_set = make_data(args, model.cells)
    args.train_images = len(train_set)    # resuming needs the same, and the same teacher
    args.teacher_sha = fingerprint(args.teacher)

    sampler = EpochSampler(train_set, args.batch_size, args.accum_steps, rank, world, args.seed)
    steps_per_epoch = sampler.steps_per_epoch
    total = args.epochs * steps_per_epoch
    last_step = min(total, args.max_steps or total)
    peak_lr = args.base_lr * sampler.batch_size / 256
    optimizer = AdamW(param_groups(model, args.weight_decay), peak_lr, args.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    describe(run, args, model, train_set, val_set, sampler, peak_lr)

    step = resume(args, FIXED, model, optimizer, scaler, rank, world)["step"]
    sampler.first_step = step
    student = parallel(model, args, device, world)
    batches = endless_batches(train_set, sampler, args, device)
    log = RunLog(args, step, last_step, sampler.batch_size, rank)

    while True:
        # evaluate: at the top, so that a run killed while it evaluates repeats it when it goes on
        if step % (args.eval_every * steps_per_epoch) == 0 or step >= last_step:
            report(run, args, model, teacher, val_set, step)
        if step >= last_step:
            break

        # forward and backward, in micro-steps in which the host never waits for the device
        started = time.perf_counter()
        waited = 0.0
        totals = {}
        items = []
        student.train()    # nothing below draws random numbers: masks come with the data
        for micro_step in range(args.accum_steps):
            before = time.perf_counter()
            images, noise, index, unreadable = next(batches)
            waited += time.perf_counter() - before
            items += zip(index.tolist(), unreadable.tolist())
            images = normalize(images.to(device, non_blocking=True), args.mean, args.std)
            noise = noise.to(device, non_blocking=True)
            ids_keep, ids_masked = random_masking(noise, args.mask_ratio)
            student.require_backward_grad_sync = micro_step == args.accum_steps - 1    # for DDP
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                teacher_map = model.teacher_signal(teacher, images, ids_keep) if teacher else None
                losses = student(images, ids_keep, ids_masked, teacher_map)
            scaler.scale(losses["loss"] / args.accum_steps).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / args.accum_steps

        # clip, and look at the losses before they can harm the weights: the one wait of a step
        lr = lr_at(step, total, args.warmup_epochs * steps_per_epoch, peak_lr, args.min_lr)
        scaler.unscale_(optimizer)
        totals["grad_norm"] = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        totals["unreadable"] = world * sum(unreadable for _, unreadable in items)
        totals["stop"] = log.stop.is_set()
        values = average_over_processes(totals, world, device)
        check_step(values, totals["loss"], items, train_set, args, step, lr, scaler)

        # update
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # log, save
        log.add(step, lr, values, time.perf_counter() - started, waited)
        if step % steps_per_epoch == 0 or step == last_step or values["stop"]:
            save(args, model, optimizer, scaler, step, rank)
        if values["stop"] and step < last_step:
            break

    log.close(step)


def save(args, model, optimizer, scaler, step, rank):
    """encoder.pt, what the other scripts start from; then last.pt, all that the run needs to go
    on: a run killed between the two makes both again."""
    if rank == 0:
        about = dict(arch=model.encoder.arch, mean=list(args.mean), std=list(args.std),
                     norm_pix=args.norm_pix, args=plain(args), step=step)
        save_checkpoint(Path(args.out, "encoder.pt"), model=model.encoder.state_dict(), **about)
        save_checkpoint(Path(args.out, "last.pt"), model=model.state_dict(),
                        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), **about)


def describe(run, args, model, train_set, val_set, sampler, peak_lr):
    """Print what this run is, once."""
    rank, world, device, dtype = run
    if rank != 0:
        return
    encoder = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"{args.method} on {args.model}: encoder {encoder:.2f}M parameters, {trained:.2f}M "
          f"trained with decoder and adapter; decoder on block {args.decoder_tap}, distilled: "
          f"{args.distill_layers or 'none'}")
    print(f"{len(train_set)} training images, {len(val_set)} held out; {sampler.steps_per_epoch} "
          f"steps an epoch, warm-up {args.warmup_epochs:g} of {args.epochs} epochs")
    print(f"batch {sampler.batch_size} = {sampler.micro_batch} images x {world} process(es) x "
          f"{args.accum_steps} micro-steps; lr {peak_lr:.3g} = {args.base_lr:g} * "
          f"{sampler.batch_size} / 256; {device}, {dtype}")


# --------------------------------------------------------------------------------------------------
# Variants of the method: Hiera, and the ablations of what is distilled
# --------------------------------------------------------------------------------------------------
class HieraMaskedAutoencoder(MaskedAutoencoder):
    """MAE and D-MAE on Hiera (with q_pool=2): the decoder fuses stages 1, 2 and the last block.

    ids_keep and ids_masked count mask units; each has 2x2 decoder tokens of 16x16 pixels, kept
    together: token 4 u + i is token i (raster) of unit u.
    """

    def build_decoder(self, dim, depth, heads):
        """Fusion heads, then MAE's decoder without a class token and with learned positions."""
        encoder = self.encoder
        h, w = encoder.unit_grid
        self.cells = h * w
        width = encoder.embed_dim
        first, second, _, last = encoder.stage_ends
        self.taps = {first, second, last}
        widths = [encoder.blocks[end - 1].mlp.fc2.out_features for end in (first, second)]
        self.multi_scale_fusion_heads = nn.ModuleList([
            nn.Conv2d(widths[0], width, 4, 4),      # stage 1: 8x8 tokens of a unit -> 2x2
            nn.Conv2d(widths[1], width, 2, 2)])     # stage 2: 4x4 tokens of a unit -> 2x2
        self.encoder_norm = LayerNorm(width)
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 4 * h * w, dim))    # raster, learned
        self.decoder_blocks = nn.ModuleList([HieraBlock(dim, dim, heads) for _ in range(depth)])
        self.decoder_norm = LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, 3 * 16 * 16)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.decoder_pos_embed, std=0.02)
        raster = torch.arange(4 * h * w).view(h, 2, w, 2).transpose(1, 2).reshape(h * w, 4)
        self.register_buffer("unit_tokens", raster, persistent=False)            # of each unit

    def raster_ids(self, units):
        """Mask units (B, V) -> raster indices (B, 4 V) of their tokens in the 16-pixel grid."""
        return self.unit_tokens[units].flatten(1)

    def latent(self, features):
        """Stages 1, 2 and the last block, fused at 2x2 tokens a unit, normalised -> (B, 4 V, D)."""
        first, second, _, last = self.encoder.stage_ends
        head1, head2 = self.multi_scale_fusion_heads
        B = len(features[last])
        fused = self.units(features[last], 1)                                   # (B V, D, 2, 2)
        fused = fused + head1(self.units(features[first], 3))
        fused = fused + head2(self.units(features[second], 2))
        return self.encoder_norm(fused.flatten(2).transpose(1, 2).reshape(B, -1, fused.shape[1]))

    def units(self, x, rounds):
        """Unrolled tokens (B, 4^rounds * V, C) -> raster map of each unit (B V, C, 2^r, 2^r)."""
        x = x.unflatten(1, (4 ** rounds, -1)).transpose(1, 2).flatten(0, 1)     # (B V, 4^r, C)
        return reroll(x, (1, 1), rounds).permute(0, 3, 1, 2)

    def position_rows(self, ids_keep, ids_masked):
        """There is no class token: rows are the raster indices of 4 tokens a unit."""
        return self.raster_ids(torch.cat([ids_keep, ids_masked], dim=1))

    def patches(self, images, ids):
        return patch_pixels(images, self.raster_ids(ids), 16, channels_last=False)

    def paste(self, images, patches, ids):
        return paste_patches(images, patches, self.raster_ids(ids), 16, channels_last=False)


class AblatedAutoencoder(MaskedAutoencoder):
    """D-MAE or D2-MAE with another signal: several student blocks `layers` (from 1), attention
    before or after the softmax, or hidden states ("representation" of Fig. 2, through a bias-free
    linear layer). The loss is the sum over the layers."""

    def __init__(self, encoder, teacher, layers, distill="attention", **options):
        super().__init__(encoder, **options)
        self.layers = list(layers)
        self.distill = distill
        if self.decoupled:
            self.build_extra_attention()
            if distill == "hidden":
                del self.extra_qk    # the normalised tokens are read, no map is
        self.adapters = nn.ModuleDict()
        for k in layers:
            if distill == "hidden":
                adapter = nn.Linear(encoder.embed_dim, teacher.embed_dim, bias=False)
            else:
                heads = [model.blocks[-1].attn.num_heads for model in (encoder, teacher)]
                adapter = nn.Conv2d(*heads, 1, bias=False)
            self.adapters[str(k)] = adapter
            reads_output = distill == "hidden" or self.is_extra(k)
            self.taps |= {k if reads_output else k - 1}    # a map needs the block's input

    def is_extra(self, k):
        return self.decoupled and k == self.encoder.depth

    def distillation_loss(self, features, teacher_signals):
        """The sum of the layers' losses."""
        loss = 0.0
        for k, teacher in zip(self.layers, teacher_signals):
            student = self.student_signal(features, k)
            if self.distill == "probabilities":
                student, teacher = student.softmax(dim=-1), teacher.softmax(dim=-1)
            loss = loss + attention_loss(student, teacher, self.adapters[str(k)])
        return loss

    def student_signal(self, features, k):
        """Map (B, H, T, T), or hidden state (B, T, D), that imitates the teacher's at block k."""
        if self.distill == "hidden" and self.is_extra(k):
            return self.extra_norm(features[k])
        if self.distill == "hidden":
            return self.encoder.representation(features[k], k)
        if self.is_extra(k):
            return self.student_map(features)
        return self.encoder.attention_map(features[k - 1], k)

    @torch.no_grad()
    def teacher_signal(self, teacher, images, ids_keep):
        """Maps or hidden states of the teacher at the same relative depths, a list."""
        blocks = [max(1, k * teacher.depth // self.encoder.depth) for k in self.layers]
        if self.distill == "hidden":
            features = teacher.forward_features(images, blocks, ids_keep)
            return [teacher.representation(features[k], k) for k in blocks]
        features = teacher.forward_features(images, [k - 1 for k in blocks], ids_keep)
        return [teacher.attention_map(features[k - 1], k) for k in blocks]


# --------------------------------------------------------------------------------------------------
# Student and teacher, from the options
# --------------------------------------------------------------------------------------------------
def load_teacher(args, device):
    """The frozen teacher of --teacher, checked against the student: same tokens, same pixels."""
    name, patch = infer_model(args.teacher)
    hiera = args.model.startswith("hiera")
    if name.startswith("hiera") != hiera:
        raise InputError(f"--teacher {args.teacher} is a {name}, the student a {args.model}: their "
                         "tokens differ")
    if not hiera and patch != args.patch_size:
        raise InputError(f"--teacher {args.teacher} has patches of {patch} pixels, the student of "
                         f"{args.patch_size}: their tokens differ; give --patch-size {patch}")
    kind = dict(q_pool=2) if hiera else dict(patch_size=patch, fixed_pos_embed=True)
    teacher = MODELS[name](img_size=args.image_size, **kind)
    info = load_encoder(teacher, args.teacher)
    if args.distill == "hidden":
        state, _ = load_state(args.teacher)
        if not {"norm.weight", "fc_norm.weight"} & state.keys():
            raise InputError(f"--teacher {args.teacher} has no final norm, which --distill hidden "
                             "needs")
    for key in ("mean", "std"):
        if key in info and not np.allclose(info[key], getattr(args, key)):
            raise InputError(f"--teacher {args.teacher} was trained with --{key} {info[key]}, this "
                             f"run has {getattr(args, key)}: both must see the same pixels")
    if args.compile:
        teacher.forward_features = torch.compile(teacher.forward_features)
    return teacher.to(device).eval().requires_grad_(False)


def build_student(args, teacher):
    """Encoder, decoder and adapters by --model, --method and the ablation options."""
    decoder = dict(decoder_tap=args.decoder_tap, decoder_dim=args.decoder_dim,
                   decoder_depth=args.decoder_depth, decoder_heads=args.decoder_heads,
                   norm_pix=args.norm_pix, alpha=args.alpha)
    if args.model.startswith("hiera"):
        encoder = MODELS[args.model](img_size=args.image_size, q_pool=2)
        return HieraMaskedAutoencoder(encoder, teacher=teacher, **decoder)
    encoder = MODELS[args.model](img_size=args.image_size, patch_size=args.patch_size,
                                 fixed_pos_embed=True)
    decoupled = args.method == "d2-mae"
    if teacher and (args.distill != "attention" or args.distill_layers != [encoder.depth]):
        return AblatedAutoencoder(encoder, teacher, args.distill_layers, args.distill,
                                  decoupled=decoupled, **decoder)
    return MaskedAutoencoder(encoder, teacher=teacher, decoupled=decoupled, **decoder)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
class Images(Dataset):
    """Crops for pre-training, and the noise that decides their masks.

    Item (epoch, index) -> image (3, h, w) uint8, noise (N,), index, and whether the file could not
    be read (another image stands in for it). All randomness comes from (seed, epoch, index). With
    train=False (keys of epoch 0): the resized centre crop, always the same noise.
    """

    def __init__(self, items, args, cells, train=True):
        self.items = items
        self.args = args
        self.cells = cells
        self.train = train

    def __len__(self):
        return len(self.items)

    def name(self, index):
        return str(self.items[index])

    def __getitem__(self, key):
        epoch, index = key
        with torch.random.fork_rng(devices=[]):    # the process's own generator is left alone
            torch.default_generator.manual_seed(mix_seed(self.args.seed, epoch, index))
            noise = torch.rand(self.cells)
            image, unreadable = read_or_next(self.crop, self.items, index)
        return image, noise, index, unreadable

    def crop(self, item):
        image = open_item(item)
        size = self.args.image_size
        if self.train:
            return random_crop(image, size, self.args.crop_scale)
        return to_tensor(ImageOps.fit(image, size[::-1], Image.BICUBIC))


def make_data(args, cells):
    """-> training set and held-out set: a folder `val` beside `train`, else every 50th image."""
    sibling = Path(args.data).parent / "val"
    if args.data == "toy":
        train = range(6000)
        val = range(6000, 6000 + args.val_images)
    elif Path(args.data).name == "train" and sibling.is_dir():
        train = list_images(args.data)
        val = list_images(sibling)
    else:
        files = list_images(args.data)
        train = [file for i, file in enumerate(files) if i % 50]
        val = files[::50]
    if not train:
        raise InputError(f"--data {args.data} holds a single image: give more")
    spread = max(1, len(val) // args.val_images)    # over all folders
    val = val[::spread][:args.val_images]
    return Images(train, args, cells), Images(val, args, cells, train=False)


# --------------------------------------------------------------------------------------------------
# Evaluation and pictures
# --------------------------------------------------------------------------------------------------
def report(run, args, model, teacher, val_set, step):
    """Evaluate on all processes; process 0 logs, prints, and draws once training has begun."""
    values = evaluate(run, args, model, teacher, val_set)
    rank, _, device, _ = run
    if rank != 0:
        return
    out = Path(args.out)
    log_line(out / "log.jsonl", step=step, **values)
    losses = ", ".join(f"{k[4:]} {v:.4f}" for k, v in values.items() if k != "val_images")
    tqdm.write(f"step {step}: held-out {losses}")
    if step == 0:
        return
    shown = range(0, len(val_set), max(1, len(val_set) // 9))[:8]
    items = [val_set[0, i] for i in shown]
    images = torch.stack([item[0] for item in items]).to(device)
    noise = torch.stack([item[1] for item in items]).to(device)
    images = normalize(images, args.mean, args.std)
    masked, filled = reconstruct(model, images, *random_masking(noise, args.mask_ratio))
    rows = zip(*(to_pixels(x, args) for x in (images, masked, filled)))
    draw_sheet(out / "reconstruction.png", rows, ("input", "masked", "prediction"),
               "masked patches are predicted; with norm_pix their mean and std come from the input")
    if teacher and type(model) is MaskedAutoencoder:
        draw_attention(model, teacher, images, args, out / "attention.png")


@torch.no_grad()
def evaluate(run, args, model, teacher, val_set):
    """Mean losses over held-out images with fixed masks, each image once at any world size -> dict.

    'base' is the loss of predicting the mean of each masked patch: what a model that knows only
    brightness reaches. Unreadable images are left out.
    """
    rank, world, device, dtype = run
    model.eval()
    sums = torch.zeros(4, device=device)
    bad = []
    for images, noise, index, unreadable in own_batches(val_set, 64, args, rank, world):
        bad += index[unreadable].tolist()
        images = normalize(images[~unreadable].to(device), args.mean, args.std)
        if not len(images):
            continue
        ids_keep, ids_masked = random_masking(noise[~unreadable].to(device), args.mask_ratio)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            teacher_map = model.teacher_signal(teacher, images, ids_keep) if teacher else None
            losses = model(images, ids_keep, ids_masked, teacher_map)
        base = model.target(images, ids_masked).var(dim=-1, unbiased=False).mean()
        means = (torch.ones_like(base), losses["rec"], base, losses.get("attn", 0 * base))
        sums += torch.stack([mean.float() for mean in means]) * len(images)
    if world > 1:
        dist.all_reduce(sums)
    check_readable(val_set, bad, args, world, device)
    n, rec, base, attn = sums.tolist()
    values = {"val_rec": rec / n, "val_base": base / n, "val_images": int(n)}
    if teacher:
        values["val_attn"] = attn / n
    return values


@torch.no_grad()
def reconstruct(model, images, ids_keep, ids_masked):
    """Images with masked patches greyed out, and with predicted ones in their place -> two
    (B, 3, H, W), normalised.

    A model trained with norm_pix predicts patches of zero mean and unit variance; their mean and
    standard deviation are taken from the input.
    """
    features = model.encoder.forward_features(images, model.taps, ids_keep)
    pred = model.forward_decoder(model.latent(features), ids_keep, ids_masked).float()
    if model.norm_pix:
        variance, mean = torch.var_mean(model.patches(images, ids_masked), dim=-1, keepdim=True)
        pred = pred * (variance + 1e-6).sqrt() + mean
    masked = model.paste(images, torch.zeros_like(pred), ids_masked)
    return masked, model.paste(images, pred, ids_masked)


@torch.no_grad()
def draw_attention(model, teacher, images, args, path):
    """PNG: softmax attention of one patch an image in the student's last map, after the adapter
    over heads, and in the teacher's; mean over heads, all patches visible."""
    h, w = model.encoder.grid
    side = model.encoder.patch_size
    ids = torch.arange(model.cells, device=images.device).expand(len(images), -1)
    features = model.encoder.forward_features(images, model.taps, ids)
    student = model.attn_adapter(model.student_map(features).float())
    teacher_map = model.teacher_signal(teacher, images, ids)
    query = (h // 2) * w + w // 2
    heats = []
    for logits in (student, teacher_map):
        attention = logits.softmax(dim=-1).mean(dim=1)[:, 1 + query, 1:]    # (B, N), no class token
        attention = attention / attention.amax(dim=1, keepdim=True)
        attention = (255 * attention).byte().cpu().view(-1, 1, h, w).expand(-1, 3, -1, -1)
        heats.append(attention.repeat_interleave(side, 2).repeat_interleave(side, 3))
    corner = torch.tensor([query % w, query // w]) * side
    box = torch.cat([corner, corner + side - 1])[None]
    marked = [draw_bounding_boxes(p, box, colors="red") for p in to_pixels(images, args)]
    draw_sheet(path, zip(marked, *heats), ("query", "student", "teacher"),
               "attention of the framed patch, in parts of its maximum (white)")


def to_pixels(images, args):
    """Normalised (B, 3, H, W) -> uint8 on the CPU."""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (args.mean, args.std))
    return ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()


def draw_sheet(path, rows, titles, note):
    """PNG of rows of pictures (3, h, w) uint8, two rows side by side, titles above, note below."""
    pictures = [picture for row in rows for picture in row]
    zoom = max(1, 150 // pictures[0].shape[1])
    pictures = [p.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2) for p in pictures]
    columns = 2 * len(titles)
    grid = make_grid(pictures, columns, padding=6, pad_value=255).permute(1, 2, 0)
    font = ImageFont.load_default(14)
    sheet = Image.new("RGB", (grid.shape[1], grid.shape[0] + 44), "white")
    sheet.paste(Image.fromarray(grid.numpy()), (0, 20))
    draw = ImageDraw.Draw(sheet)
    for i in range(columns):
        draw.text((6 + i * (pictures[0].shape[2] + 6), 4), titles[i % len(titles)], "black", font)
    draw.text((6, sheet.height - 22), note, "black", font)
    sheet.save(path)


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
FIXED = ("method", "model", "teacher_sha", "decoder_tap", "decoder_dim", "decoder_depth",
         "decoder_heads", "distill", "distill_layers", "alpha", "mask_ratio", "norm_pix",
         "image_size", "patch_size", "crop_scale", "mean", "std", "epochs", "warmup_epochs",
         "batch_size", "weight_decay", "betas", "seed", "train_images")    # see `models.resume`


def parse_args(argv=None, **defaults):
    """Options of the command line, or of the list `argv`; `defaults` stand in for the paper's."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]",
                                     description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("method (Sec. 4)").add_argument
    add("--method", choices=("d2-mae", "d-mae", "mae"), default="d2-mae",
        help="d2-mae: decoder on an inner block, distillation on a 13th attention; d-mae: both on "
             "the last block; mae: no teacher")
    add("--model", choices=tuple(MODELS), default="vit_tiny",
        help="student; the paper's are vit_tiny (12 heads) and hiera_tiny")
    add("--teacher", help="checkpoint of the frozen teacher (README, 'Checkpoints'); paper: MAE "
                          "ViT-Base, 1600 epochs")
    add("--alpha", type=number(float, "[0, inf)"), default=1.0,
        help="weight of L_attn in L = L_rec + alpha * L_attn")
    add("--mask-ratio", type=number(float, "(0, 1)"),
        help="share of patches removed; default: ViT 0.75, Hiera 0.4 of its mask units")
    add("--decoder-tap", type=number(int, "[1, inf)"),
        help="block whose normalised output the decoder reads; default: d2-mae 8, else the last")
    add("--distill", choices=("attention", "probabilities", "hidden"), default="attention",
        help="ablation: maps before or after the softmax, or hidden states")
    add("--distill-layers", type=number(int, "[1, inf)"), nargs="+",
        help="ablation: student blocks, counted from 1; default: the last")

    add = parser.add_argument_group("data").add_argument
    add("--data", default="data/imagenet/train",
        help="folder of images, flat or nested, or 'toy' for drawn ones; held out are those of a "
             "folder 'val' beside a folder 'train', else every 50th image")
    add("--image-size", type=number(int, "[1, inf)"), nargs="+", default=[224],
        help="side, or height and width, in pixels")
    add("--patch-size", type=number(int, "[1, inf)"), help="side of a ViT patch; default: 16")
    add("--crop-scale", type=number(float, "(0, 1]"), nargs=2, default=(0.08, 1.0),
        help="area range of the random crop")
    hint = ": of pixels in [0, 1], so divide values of 0..255 by 255"
    add("--mean", type=number(float, "[0, 1]", hint), nargs=3, default=IMAGENET_MEAN,
        help="of pixels in [0, 1]; stored and reused")
    add("--std", type=number(float, "(0, 1]", hint), nargs=3, default=IMAGENET_STD,
        help="of pixels in [0, 1]; stored and reused")
    add("--skip-corrupt", action="store_true",
        help="replace unreadable files by others and count them; default: stop")

    add = parser.add_argument_group("recipe (Sec. 4, pre-training)").add_argument
    add("--epochs", type=number(int, "[1, inf)"), default=400, help="paper: 400")
    add("--warmup-epochs", type=number(float, "[0, inf)"),
        help="linear from 0; default: a tenth of --epochs, as the paper's 40 of 400")
    add("--batch-size", type=number(int, "[1, inf)"), default=4096,
        help="images per optimizer step over all processes; paper: 4096")
    add("--base-lr", type=number(float, "[0, 1e9]"), default=1.5e-4,
        help="per 256 images: lr = base_lr * batch_size / 256; paper: 1.5e-4")
    add("--clip-grad", type=number(float, "[0, inf)"), default=0.0,
        help="largest gradient norm; 0: no clipping, as in the paper")

    add = add_run_options(parser, "out/pretrain")
    add("--compile", action="store_true", help="torch.compile the student and the teacher")
    add("--seed", type=number(int, "[0, 4294967296)"), default=0)
    add("--max-steps", type=number(int, "[1, inf)"),
        help="stop after so many optimizer steps (the schedule stays that of --epochs)")
    add("--demo", action="store_true",
        help="a few minutes on drawn pictures: a small teacher, then its student")
    parser.set_defaults(**{**RECIPE, **defaults})
    args = parser.parse_args(argv)
    if args.demo and not defaults:
        return parse_args(argv, **DEMO)
    return args


def resolve(args):
    """Fill in the defaults that depend on other options; refuse what has no meaning. InputError."""
    hiera = args.model.startswith("hiera")
    depth = depth_of(args.model)
    unit = 32 if hiera else args.patch_size or MODELS[args.model].keywords["patch_size"]
    args.patch_size = unit

    # sizes, masks, schedule
    if len(args.image_size) > 2:
        raise InputError("--image-size takes a side, or height and width, not "
                         f"{len(args.image_size)} numbers")
    args.image_size = (args.image_size[0], args.image_size[-1])
    if any(side % unit for side in args.image_size):
        nearest = [max(1, round(side / unit)) * unit for side in args.image_size]
        raise InputError(f"--image-size {args.image_size} must be a multiple of {unit}, the mask "
                         f"unit of Hiera or the --patch-size of a ViT: the nearest is {nearest}")
    if args.mask_ratio is None:
        args.mask_ratio = 0.4 if hiera else 0.75
    cells = math.prod(side // unit for side in args.image_size)
    if not 0 < int(cells * (1 - args.mask_ratio)) < cells:
        raise InputError(f"--mask-ratio {args.mask_ratio} of {cells} patches or mask units must "
                         "leave at least one visible and one masked")
    if args.crop_scale[0] > args.crop_scale[1]:
        raise InputError(f"--crop-scale {args.crop_scale[0]} {args.crop_scale[1]} must be a range")
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup-epochs {args.warmup_epochs:g} must be fewer than --epochs "
                         f"{args.epochs}")

    # teacher, taps, layers
    if args.method == "mae" and args.teacher:
        raise InputError("--method mae has no teacher: leave --teacher out, or choose another one")
    if args.method != "mae" and not args.teacher:
        raise InputError(f"--method {args.method} distils from a teacher: give --teacher FILE "
                         "(README, 'Checkpoints'), or choose --method mae")
    if hiera and args.method == "d2-mae":
        raise InputError("--method d2-mae is defined for plain ViTs: Hiera's decoder fuses stages "
                         "1, 2 and 4, so there is no inner block to tap; choose d-mae or mae")
    if hiera and (args.distill != "attention" or args.distill_layers or args.decoder_tap):
        raise InputError("--distill, --distill-layers and --decoder-tap are ablations on ViT and "
                         "have no counterpart on Hiera")
    if args.decoder_tap and args.method != "d2-mae":
        raise InputError(f"--decoder-tap belongs to --method d2-mae; {args.method} decodes the "
                         "last block")
    args.decoder_tap = args.decoder_tap or (8 if args.method == "d2-mae" else depth)
    args.distill_layers = sorted(set(args.distill_layers or [depth])) if args.teacher else []
    if max([args.decoder_tap, *args.distill_layers]) > depth:
        raise InputError(f"--decoder-tap {args.decoder_tap} and --distill-layers "
                         f"{args.distill_layers} must be among the blocks 1..{depth}")
    if args.method == "d2-mae" and args.distill_layers[-1] != depth:
        raise InputError(f"--method d2-mae needs block {depth} among --distill-layers: nothing "
                         f"else trains the blocks above --decoder-tap {args.decoder_tap}")
    return args


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------
def main(args):
    """Run what the options say. A demo without --teacher first trains one."""
    if args.demo and args.method != "mae" and not args.teacher:
        if args.model.startswith("hiera"):
            raise InputError("--demo makes a ViT teacher: choose a ViT --model, or give --teacher")
        teacher = argparse.Namespace(**{**vars(args), **DEMO_TEACHER})
        teacher.out = f"{args.out}/teacher"
        main(teacher)
        args.teacher = f"{teacher.out}/encoder.pt"
    args = resolve(args)
    train(args)
    if int(os.environ.get("RANK", 0)) != 0:
        return
    evaluations = [v for v in read_log(Path(args.out, "log.jsonl")) if "val_rec" in v]
    before = evaluations[0]
    after = evaluations[-1]
    print(f"\nheld-out reconstruction loss {after['val_rec']:.3f} (before training "
          f"{before['val_rec']:.3f}; predicting the mean of each patch {after['val_base']:.3f})")
    if args.teacher:
        print(f"held-out {args.distill} loss {after['val_attn']:.4g} (before training "
              f"{before['val_attn']:.4g})")


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
