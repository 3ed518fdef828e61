r"""MAE pre-training of lightweight ViTs with decoupled attention distillation, D2-MAE (Sec. 4).

    torchrun --nproc_per_node=8 pretrain_d2mae.py --teacher mae_base.pt     # the paper's D2-MAE
    torchrun --nproc_per_node=8 pretrain_d2mae.py --method mae              # its MAE baseline
    torchrun --nproc_per_node=8 pretrain_d2mae.py --model hiera_tiny --method d-mae \
        --teacher mae_hiera_base_224.pth
    python tests/tools/demo.py                                                    # needs no files

The student sees a quarter of the patches and learns two things. Its block 8 feeds a small decoder
that predicts the masked patches (L_rec). The attention map of one extra, 13th attention after block
12 imitates, through a learned mix of heads, that of the teacher's last block over the same visible
patches (L_attn). So reconstruction shapes the lower blocks, distillation all of them, and the two
losses do not compete in blocks 9 to 12. Read `MaskedAutoencoder.forward` next to the paper, then
`train`.

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
  a run depends neither on the number of workers nor on that of processes, and a run that was killed
  resumes to the same bits (on a CPU, or on GPUs of one kind with deterministic kernels).
- Crops are resized bicubically; the authors draw bilinear or bicubic at random.
- Attention maps are compared in float32, the authors' in float16; GPUs from Ampere on multiply
  float32 matrices in TensorFloat-32.
"""
import math
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import draw_bounding_boxes, make_grid
from tqdm import tqdm

from models import (Block, ImageDataset, InputError, Parser, attention_logits, build_model,
                    eval_loader, init_distributed, init_mae, list_images, log, lr_at, normalize,
                    param_groups, plain_errors, random_crop, resume, save, sincos_2d, train_loader)

RECIPE = dict(    # Sec. 4; settings without an option. All others: `parse_args`
    betas=(0.9, 0.95), weight_decay=0.05,   # AdamW; no decay of biases, norms and tokens
    min_lr=0.0,                             # end of the cosine
    val_images=512,                         # held-out images at most
)


# --------------------------------------------------------------------------------------------------
# Method: masking, targets and losses
# --------------------------------------------------------------------------------------------------
def random_masking(noise, mask_ratio):
    """Random masking per sample: noise (B, N) is sorted, the V = int(N (1 - mask_ratio)) smallest
    stay visible -> ids_keep (B, V), ids_masked (B, M)."""
    ids = noise.argsort(dim=1)
    keep = int(noise.shape[1] * (1 - mask_ratio))
    return ids[:, :keep], ids[:, keep:]


def patch_view(images, patch_size, channels_last):
    """Images (B, 3, H, W) as a view of patches (B, h, w, p, p, 3), MAE's order of pixels, or (B, h,
    w, 3, p, p), Hiera's."""
    p = patch_size
    patches = images.unfold(2, p, p).unfold(3, p, p)                         # (B, 3, h, w, p, p)
    return patches.permute((0, 2, 3, 4, 5, 1) if channels_last else (0, 2, 3, 1, 4, 5))


def patch_pixels(images, ids, patch_size, channels_last=True):
    """Pixels of the patches `ids` (B, M) of images (B, 3, H, W) -> (B, M, P). Only those patches
    are copied."""
    patches = patch_view(images, patch_size, channels_last)
    batch = torch.arange(images.shape[0], device=images.device)[:, None]
    w = patches.shape[2]
    return patches[batch, ids // w, ids % w].flatten(2)


def paste_patches(images, pixels, ids, patch_size, channels_last=True):
    """Inverse of `patch_pixels`: a copy of the images with patches `ids` replaced."""
    images = images.clone()
    patches = patch_view(images, patch_size, channels_last)                  # written through
    batch = torch.arange(images.shape[0], device=images.device)[:, None]
    w = patches.shape[2]
    patches[batch, ids // w, ids % w] = pixels.unflatten(2, patches.shape[3:])
    return images


def normalize_patches(patches):
    """norm_pix: (x - mean) / sqrt(variance + 1e-6) of each patch (B, M, P), variance unbiased."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def reconstruction_loss(pred, target):
    """L_rec: mean squared error over the masked patches alone. pred, target: (B, M, P); computed in
    float32."""
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
# Method: student, decoder, distillation
# --------------------------------------------------------------------------------------------------
class MaskedAutoencoder(nn.Module):
    """Student of MAE, D-MAE and D2-MAE on a ViT: encoder, decoder and, with a teacher, L_attn.

    encoder: VisionTransformer without a head. decoder_tap: block whose normalised output the
    decoder reads. distillation: `Distillation` or None. HieraMaskedAutoencoder overrides
    build_decoder, latent, position_rows, patches and paste.
    """

    def __init__(self, encoder, decoder_tap=12, decoder_dim=96, decoder_depth=1, decoder_heads=3,
                 norm_pix=True, distillation=None, alpha=1.0):
        super().__init__()
        self.encoder = encoder
        self.decoder_tap = decoder_tap
        self.norm_pix = norm_pix
        self.alpha = alpha
        self.taps = {decoder_tap}    # blocks whose outputs the losses read
        self.build_decoder(decoder_dim, decoder_depth, decoder_heads)
        init_mae(self)    # the encoder too: Hiera's own initialisation is for classifiers
        self.distillation = distillation
        if distillation:
            self.taps |= distillation.taps

    def build_decoder(self, dim, depth, heads):
        """The decoder of MAE: embedding, mask token, fixed positions, blocks, norm, pixels."""
        self.cells = math.prod(self.encoder.grid)    # patches; of Hiera, mask units
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        positions = sincos_2d(dim, self.encoder.grid)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, 3 * self.encoder.patch_size ** 2)

    def forward(self, images, ids_keep, ids_masked, teacher_maps=None):
        """L = L_rec + alpha * L_attn -> dict of scalars: loss, rec and, with a teacher, attn.

        images (B, 3, H, W) normalised; teacher_maps: pre-softmax maps of the teacher for the same
        images and ids_keep, see `teacher_maps`.
        """
        features = self.encoder.forward_features(images, self.taps, ids_keep)   # block -> (B, T, D)

        # reconstruction: the decoder reads block 8 (D2-MAE) or the last block (MAE, D-MAE)
        latent = self.latent(features)                                          # (B, T, D)
        pred = self.forward_decoder(latent, ids_keep, ids_masked)               # (B, M, P)
        target = self.target(images, ids_masked)                                # (B, M, P)
        rec = reconstruction_loss(pred, target)
        if teacher_maps is None:
            return {"loss": rec, "rec": rec}

        # distillation: the map of the 13th attention (D2-MAE) or of the last block (D-MAE)
        attn = self.distillation(self.encoder, features, teacher_maps)
        return {"loss": rec + self.alpha * attn, "rec": rec, "attn": attn}

    def latent(self, features):
        # In D2-MAE this norm, and so the one in encoder.pt, belongs to block 8, not to block 12.
        return self.encoder.norm(features[self.decoder_tap])

    def forward_decoder(self, latent, ids_keep, ids_masked):
        """Visible tokens (B, T, D) -> pixels of the masked patches (B, M, P), in their order.

        Tokens are ordered [class, ids_keep, ids_masked].
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
        class_row = ids_keep.new_zeros(ids_keep.shape[0], 1)
        return torch.cat([class_row, ids_keep + 1, ids_masked + 1], dim=1)

    def target(self, images, ids_masked):
        """What the decoder should predict: pixels of the masked patches (B, M, P)."""
        patches = self.patches(images, ids_masked).float()
        return normalize_patches(patches) if self.norm_pix else patches

    def patches(self, images, ids):
        return patch_pixels(images, ids, self.encoder.patch_size)

    def paste(self, images, patches, ids):
        return paste_patches(images, patches, ids, self.encoder.patch_size)

    @torch.no_grad()
    def teacher_maps(self, teacher, images, ids_keep):
        """What the loss reads of the frozen teacher -> list of maps (B, H_T, T, T), one for each
        distilled block; None without a teacher."""
        if teacher is not None:
            return self.distillation.teacher_maps(teacher, images, ids_keep)


class Distillation(nn.Module):
    """L_attn between student and teacher: in the paper between their last blocks.

    decoupled: D2-MAE, where the last block's map A_S is that of a 13th attention behind it. layers,
    signal: ablations. Student blocks (from 1) that imitate the teacher's at the same relative
    depth, with the sum of their losses; "attention" before the softmax, "probabilities" after it,
    or "hidden" states ("representation" of Fig. 2, through a bias-free linear layer).
    """

    def __init__(self, encoder, teacher, decoupled=False, layers=(), signal="attention"):
        super().__init__()
        depth = encoder.depth
        self.layers = list(layers) or [depth]
        self.teacher_layers = [max(1, k * teacher.depth // depth) for k in self.layers]
        self.signal = signal
        self.extra = depth if decoupled else None    # the block that the 13th attention replaces
        dim = encoder.embed_dim
        if signal == "hidden":
            self.taps = set(self.layers)
            adapters = [nn.Linear(dim, teacher.embed_dim, bias=False) for _ in self.layers]
        else:                                        # a map needs the input of its block
            self.taps = {k if k == self.extra else k - 1 for k in self.layers}
            heads = [model.blocks[-1].attn.num_heads for model in (encoder, teacher)]
            adapters = [nn.Conv2d(*heads, 1, bias=False) for _ in self.layers]
        self.adapters = nn.ModuleList(adapters)      # M, one for each layer
        if decoupled:
            self.extra_norm = nn.LayerNorm(dim, eps=1e-6)
        if decoupled and signal != "hidden":
            self.extra_qk = nn.Linear(dim, 2 * dim)
            bound = math.sqrt(6 / (dim + 3 * dim))    # Xavier as if v were there, as the authors do
            nn.init.uniform_(self.extra_qk.weight, -bound, bound)
            nn.init.zeros_(self.extra_qk.bias)

    def forward(self, encoder, features, teacher_maps):
        """features {tap: (B, T, D)} of the student, maps of the teacher -> L_attn, a scalar."""
        loss = 0.0
        for k, adapter, teacher in zip(self.layers, self.adapters, teacher_maps):
            student = self.student_map(encoder, features, k)                    # (B, H_S, T, T)
            if self.signal == "probabilities":
                student, teacher = student.softmax(dim=-1), teacher.softmax(dim=-1)
            loss = loss + attention_loss(student, teacher, adapter)
        return loss

    def student_map(self, encoder, features, k):
        """A_S: pre-softmax map (B, H_S, T, T), or hidden states (B, T, D), of the student's block
        k; of the 13th attention in place of block 12 (D2-MAE)."""
        if k == self.extra:
            x = self.extra_norm(features[k])
            if self.signal == "hidden":
                return x
            heads = encoder.blocks[-1].attn.num_heads
            qk = self.extra_qk(x).unflatten(2, (2, heads, -1))                  # (B, T, 2, H, d)
            return attention_logits(*qk.permute(2, 0, 3, 1, 4))
        if self.signal == "hidden":
            return encoder.representation(features[k], k)
        return encoder.attention_map(features[k - 1], k)

    def teacher_maps(self, teacher, images, ids_keep):
        """A_T of each layer. No more of the teacher is run than: blocks 1 to last - 1, then
        LayerNorm, q and k of the last."""
        hidden = self.signal == "hidden"
        taps = {k: k if hidden else k - 1 for k in self.teacher_layers}
        read = teacher.representation if hidden else teacher.attention_map
        features = teacher.forward_features(images, set(taps.values()), ids_keep)
        return [read(features[taps[k]], k) for k in self.teacher_layers]


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def train(args):
    """Train into args.out: a new run, or the one that last.pt there continues."""
    rank, world, device, dtype = run = init_distributed(args)
    teacher = load_teacher(args, device) if args.teacher else None
    torch.manual_seed(args.seed)    # after the teacher: every method starts from one encoder
    model = build_student(args, teacher).to(device)
    train_set, val_set = make_data(args, model.cells)
    loader = train_loader(train_set, args, run)
    steps = len(loader) // args.accum_steps    # optimizer steps per epoch
    peak_lr = args.base_lr * loader.sampler.batch_size / 256
    optimizer = AdamW(param_groups(model, args.weight_decay), peak_lr, args.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first_epoch = resume(args, rank, world, model, optimizer, scaler)["epoch"]

    student = torch.compile(model) if args.compile else model
    teacher_maps = torch.compile(model.teacher_maps) if args.compile else model.teacher_maps
    if world > 1:
        student = DistributedDataParallel(student, gradient_as_bucket_view=True)
    if not first_epoch:
        report(args, run, model, teacher, val_set, epoch=0, step=0)

    for epoch in range(first_epoch, args.epochs):
        loader.sampler.set_epoch(epoch)
        student.train()    # nothing below draws random numbers: masks come with the data
        bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", disable=rank > 0)
        for i, (images, noise) in enumerate(bar):
            step = epoch * steps + i // args.accum_steps
            update = (i + 1) % args.accum_steps == 0
            images = normalize(images, args.mean, args.std)
            ids_keep, ids_masked = random_masking(noise, args.mask_ratio)
            student.require_backward_grad_sync = update    # DistributedDataParallel reads it
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                maps = teacher_maps(teacher, images, ids_keep)
                losses = student(images, ids_keep, ids_masked, maps)
            scaler.scale(losses["loss"] / args.accum_steps).backward()
            if not update:
                continue

            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            lr = lr_at(step, args.epochs * steps, args.warmup_epochs * steps, peak_lr, args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            if step % args.log_every == 0:    # the only device-to-host sync
                values = log(args, rank, world, epoch=epoch + 1, step=step, lr=lr,
                             grad_norm=grad_norm, **losses)
                bar.set_postfix(loss=f"{values['loss']:.4f}")

        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            report(args, run, model, teacher, val_set, epoch=epoch + 1, step=(epoch + 1) * steps)
        save(args, rank, "last.pt", model, epoch=epoch + 1, norm_pix=args.norm_pix,
             optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    save(args, rank, "encoder.pt", model.encoder, epoch=args.epochs)


# --------------------------------------------------------------------------------------------------
# MAE and D-MAE on Hiera
# --------------------------------------------------------------------------------------------------
class HieraMaskedAutoencoder(MaskedAutoencoder):
    """MAE and D-MAE on Hiera (with q_pool=2): the decoder fuses stages 1, 2 and the last block.

    ids_keep and ids_masked count mask units; each has 2x2 decoder tokens of 16x16 pixels, kept
    together: token 4 u + i is token i (raster) of unit u.
    """

    def build_decoder(self, dim, depth, heads):
        """MAE's decoder with learned positions, and the heads that fuse the stages for it."""
        super().build_decoder(dim, depth, heads)
        encoder = self.encoder
        h, w = encoder.unit_grid
        self.cells = h * w
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 4 * h * w, dim))    # raster
        nn.init.trunc_normal_(self.decoder_pos_embed, std=0.02)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        width = encoder.embed_dim
        first, second, _, last = encoder.stage_ends
        self.taps = {first, second, last}
        widths = [encoder.blocks[end - 1].mlp.fc2.out_features for end in (first, second)]
        self.multi_scale_fusion_heads = nn.ModuleList([
            nn.Conv2d(widths[0], width, 4, 4),      # stage 1: 8x8 tokens of a unit -> 2x2
            nn.Conv2d(widths[1], width, 2, 2)])     # stage 2: 4x4 tokens of a unit -> 2x2
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        raster = torch.arange(4 * h * w).view(h, 2, w, 2).transpose(1, 2).reshape(h * w, 4)
        self.register_buffer("unit_tokens", raster, persistent=False)            # of each unit

    def raster_ids(self, units):
        """Mask units (B, V) -> raster indices (B, 4 V) of their tokens in the 16-pixel grid."""
        return self.unit_tokens[units].flatten(1)

    def latent(self, features):
        """Stages 1, 2 and the last block, fused at 2x2 tokens a unit, normalised -> (B, 4 V, D)."""
        encoder = self.encoder
        first, second, _, last = encoder.stage_ends
        head1, head2 = self.multi_scale_fusion_heads
        fused = encoder.unit_maps(features[last], 1)                            # (B V, D, 2, 2)
        fused = fused + head1(encoder.unit_maps(features[first], 3))
        fused = fused + head2(encoder.unit_maps(features[second], 2))
        return self.encoder_norm(fused.flatten(2).transpose(1, 2).reshape(features[last].shape))

    def position_rows(self, ids_keep, ids_masked):
        """There is no class token: rows are the raster indices of 4 tokens a unit."""
        return self.raster_ids(torch.cat([ids_keep, ids_masked], dim=1))

    def patches(self, images, ids):
        return patch_pixels(images, self.raster_ids(ids), 16, channels_last=False)

    def paste(self, images, patches, ids):
        return paste_patches(images, patches, self.raster_ids(ids), 16, channels_last=False)


# --------------------------------------------------------------------------------------------------
# Student and teacher, from the options
# --------------------------------------------------------------------------------------------------
def load_teacher(args, device):
    """The frozen teacher of --teacher. The student sees the same pixels, normalised as its."""
    teacher = build_model(init=args.teacher, img_size=args.image_size, hiera=dict(q_pool=2),
                          vit=dict(fixed_pos_embed=True))
    if args.mean or args.std:
        raise InputError("--mean and --std are those of --teacher: leave them out")
    args.mean, args.std = teacher.mean, teacher.std
    if args.distill == "hidden" and "norm.weight" not in teacher.loaded:
        raise InputError(f"--teacher {args.teacher} lacks the final norm of --distill hidden")
    return teacher.to(device).eval().requires_grad_(False)


def build_student(args, teacher):
    """Encoder, decoder and distillation by --model, --method and the ablation options; the defaults
    that depend on the encoder are filled in."""
    hiera = args.model.startswith("hiera")
    encoder = build_model(args.model, img_size=args.image_size, patch_size=args.patch_size,
                          hiera=dict(q_pool=2), vit=dict(fixed_pos_embed=True))
    args.arch = encoder.arch
    args.image_size = encoder.img_size
    args.mean = args.mean or encoder.mean
    args.std = args.std or encoder.std
    if teacher and teacher.grid != encoder.grid:
        raise InputError(f"--teacher {args.teacher} has {teacher.grid} tokens, the student "
                         f"{encoder.grid}: choose a --model of its kind, and its --patch-size")
    depth = encoder.depth
    decoupled = args.method == "d2-mae"
    args.decoder_tap = args.decoder_tap or (8 if decoupled else depth)
    distillation = None
    if teacher:
        args.distill_layers = sorted(set(args.distill_layers or [depth]))
        if max(args.decoder_tap, *args.distill_layers) > depth:
            raise InputError(f"--decoder-tap {args.decoder_tap} and --distill-layers "
                             f"{args.distill_layers} must be among the blocks 1..{depth}")
        if decoupled and depth not in args.distill_layers:
            raise InputError(f"--method d2-mae needs the last block, {depth}, in --distill-layers")
        distillation = Distillation(encoder, teacher, decoupled, args.distill_layers, args.distill)
    kind = HieraMaskedAutoencoder if hiera else MaskedAutoencoder
    dim = 96 if hiera else max(96, encoder.embed_dim // 2)    # of the decoder; heads of 32
    model = kind(encoder, args.decoder_tap, dim, 1, dim // 32, args.norm_pix, distillation,
                 args.alpha)
    if not 0 < int(model.cells * (1 - args.mask_ratio)) < model.cells:
        raise InputError(f"--mask-ratio {args.mask_ratio} must leave visible and masked patches")
    return model


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
class Images(ImageDataset):
    """Item (epoch, index) -> image (3, h, w) uint8, and the noise (N,) that decides its mask. All
    randomness comes from (seed, epoch, index). train=False (keys of epoch 0): the resized centre
    crop, always the same noise."""

    def __init__(self, files, args, cells, train=True):
        super().__init__(files, args, train)
        self.cells = cells

    def transform(self, image, index):
        noise = torch.rand(self.cells)
        size = self.args.image_size
        if self.train:
            return random_crop(image, size, self.args.crop_scale), noise
        return pil_to_tensor(ImageOps.fit(image, size[::-1], Image.BICUBIC)), noise


def make_data(args, cells):
    """-> training set and held-out set: the folders train and val of --data; without val, every
    50th image is held out."""
    root = Path(args.data)
    train = list_images(root / "train" if (root / "train").is_dir() else root)
    if (root / "train").is_dir() and (root / "val").is_dir():
        val = list_images(root / "val")
    else:
        val = train[::50]
        train = [file for i, file in enumerate(train) if i % 50]
    if not train:
        raise InputError(f"--data {args.data} holds a single image: give more")
    args.train_images = len(train)    # compared on resuming
    count = min(len(val), args.val_images)
    val = [val[i * len(val) // count] for i in range(count)]    # from all folders
    return Images(train, args, cells), Images(val, args, cells, train=False)


# --------------------------------------------------------------------------------------------------
# Evaluation and pictures
# --------------------------------------------------------------------------------------------------
def report(args, run, model, teacher, val_set, epoch, step):
    """Evaluate on all processes; process 0 logs, prints, and draws once training has begun."""
    rank, world, device, _ = run
    values = evaluate(args, run, model, teacher, val_set)
    log(args, rank, world, epoch=epoch, step=step, **values)
    if rank > 0:
        return
    text = f"epoch {epoch}: held-out reconstruction loss {values['val_rec']:.4f} (the mean of " \
           f"each patch gives {values['val_base']:.4f})"
    if teacher:
        text += f", {args.distill} loss {values['val_attn']:.4g}"
    if epoch == 0:
        visible = int(model.cells * (1 - args.mask_ratio))
        text += f"; an image has {model.cells} patches or mask units, {visible} of them visible"
    if epoch == args.epochs and values["val_rec"] >= values["val_base"]:
        text += "; that is no better than the mean, see 'Your own images' in the README"
    tqdm.write(text)
    if epoch == 0:
        return
    spread = range(0, len(val_set), max(1, len(val_set) // 9))    # over all folders
    shown = islice(filter(None, (val_set[0, i] for i in spread)), 8)
    images, noise = (torch.stack(column).to(device) for column in zip(*shown))
    images = normalize(images, args.mean, args.std)
    masked, filled = reconstruct(model, images, *random_masking(noise, args.mask_ratio))
    rows = zip(*(to_pixels(x, args) for x in (images, masked, filled)))
    note = "masked patches are predicted"
    if args.norm_pix:
        note += " up to their mean and standard deviation, which come from the input"
    draw_sheet(f"{args.out}/reconstruction.png", rows, ("input", "masked", "prediction"), note)
    if teacher and args.distill != "hidden" and not args.model.startswith("hiera"):
        draw_attention(model, teacher, images, args, f"{args.out}/attention.png")


@torch.no_grad()
def evaluate(args, run, model, teacher, val_set):
    """Mean losses over held-out images with fixed masks, each image once for any number of
    processes -> dict.

    val_base is the loss of predicting the mean of each masked patch: what a model that knows only
    brightness reaches.
    """
    rank, world, device, dtype = run
    model.eval()
    sums = torch.zeros(4, device=device)
    for images, noise in eval_loader(val_set, 64, args, run):
        images = normalize(images, args.mean, args.std)
        ids_keep, ids_masked = random_masking(noise, args.mask_ratio)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            maps = model.teacher_maps(teacher, images, ids_keep)
            losses = model(images, ids_keep, ids_masked, maps)
        base = model.target(images, ids_masked).var(dim=-1, unbiased=False).mean()
        means = (torch.ones_like(base), losses["rec"], base, losses.get("attn", 0 * base))
        sums += torch.stack([mean.float() for mean in means]) * images.shape[0]
    if world > 1:
        dist.all_reduce(sums)
    n, rec, base, attn = sums.tolist()
    if not n:
        raise InputError("no held-out image can be read: nothing is left to evaluate on")
    values = {"val_rec": rec / n, "val_base": base / n, "val_images": int(n)}
    return {**values, "val_attn": attn / n} if teacher else values


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
    """PNG: softmax attention of one patch of each image in the student's last distilled map, after
    the adapter over heads, and in the teacher's; mean over heads, all patches visible."""
    h, w = model.encoder.grid
    side = model.encoder.patch_size
    ids = torch.arange(model.cells, device=images.device).expand(images.shape[0], -1)
    features = model.encoder.forward_features(images, model.taps, ids)
    distillation = model.distillation
    student = distillation.student_map(model.encoder, features, distillation.layers[-1])
    student = distillation.adapters[-1](student.float())
    query = (h // 2) * w + w // 2
    heats = []
    for logits in (student, model.teacher_maps(teacher, images, ids)[-1]):
        attention = logits.softmax(dim=-1).mean(dim=1)[:, 1 + query, 1:]    # (B, N), no class token
        attention = attention / attention.amax(dim=1, keepdim=True)
        attention = (255 * attention).byte().cpu().view(-1, 1, h, w).expand(-1, 3, -1, -1)
        heats.append(attention.repeat_interleave(side, 2).repeat_interleave(side, 3))
    corner = torch.tensor([query % w, query // w]) * side
    box = torch.cat([corner, corner + side - 1])[None]
    marked = [draw_bounding_boxes(p, box, colors="red") for p in to_pixels(images, args)]
    draw_sheet(path, zip(marked, *heats), ("query", "student", "teacher"),
               "attention of the framed patch, relative to its maximum (white)")


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
# Arguments: the defaults are the paper's
# --------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """Options of the command line, or of the list `argv`."""
    parser = Parser(__doc__)
    add = parser.group("method (Sec. 4)")
    add("--method", choices=("d2-mae", "d-mae", "mae"), default="d2-mae",
        help="d2-mae: decoder on an inner block, distillation on a 13th attention; d-mae: both on "
             "the last block; mae: no teacher")
    add("--model", default="vit_tiny", help="student; paper: vit_tiny (12 heads), hiera_tiny; for "
        "small images vit_nano (1.4M parameters), vit_pico (0.4M)")
    add("--teacher", help="checkpoint of the frozen teacher (README, 'Checkpoints'); paper: MAE "
                          "ViT-Base, 1600 epochs")
    add("--alpha", type=float, low=0, default=1.0, help="weight in L = L_rec + alpha * L_attn")
    add("--mask-ratio", type=float, low=0, high=1,
        help="share of patches removed; default: ViT 0.75, Hiera 0.4 of its mask units")
    add("--no-norm-pix", dest="norm_pix", action="store_false",
        help="predict plain pixels instead of patches normalised by their mean and variance")
    add("--decoder-tap", low=1,
        help="block whose normalised output the decoder reads; default: d2-mae 8, else the last")
    add("--distill", choices=("attention", "probabilities", "hidden"), default="attention",
        help="ablation: maps before or after the softmax, or hidden states")
    add("--distill-layers", low=1, nargs="+",
        help="ablation: student blocks, counted from 1; default: the last")

    add = parser.group("data")
    add("--data", default="data/imagenet", help="folder that holds train and val (optional), or a "
        "folder of images, flat or nested; without val, every 50th image is held out")
    add("--image-size", low=1, nargs="+", default=[224], help="side, or height and width; pixels")
    add("--patch-size", low=1, help="side of a ViT patch; default: 16, of vit_huge 14")
    add("--crop-scale", type=float, low=0, high=1, nargs=2, default=(0.08, 1.0),
        help="area range of the random crop")
    parser.pixel_options(add)

    add = parser.group("recipe (Sec. 4, pre-training)")
    add("--epochs", low=1, default=400, help="paper: 400")
    add("--warmup-epochs", type=float, low=0,
        help="linear from 0; default: a tenth of --epochs, as the paper's 40 of 400")
    add("--base-lr", type=float, low=0, default=1.5e-4,
        help="per 256 images: lr = base_lr * batch_size / 256; paper: 1.5e-4")

    add = parser.run_options("out/pretrain", batch_size=4096, eval_every=10)
    add("--compile", action="store_true", help="torch.compile the student and the teacher")
    parser.set_defaults(**RECIPE)
    return parser.parse_args(argv)


def resolve(args):
    """Fill in the defaults that depend on other options; raise InputError for contradictory ones.
    """
    hiera = args.model.startswith("hiera")
    if args.method == "mae" and (args.teacher or args.distill_layers
                                 or args.distill != "attention"):
        raise InputError("--method mae has no teacher: leave out --teacher and --distill options")
    if args.method != "mae" and not args.teacher:
        raise InputError(f"--method {args.method} needs --teacher FILE (README, 'Checkpoints')")
    if hiera and args.method == "d2-mae":
        raise InputError("--method d2-mae is for ViT: Hiera's decoder reads all stages; give d-mae")
    if hiera and (args.distill != "attention" or args.distill_layers):
        raise InputError("--distill and --distill-layers are ablations on ViT, not on Hiera")
    if args.decoder_tap and args.method != "d2-mae":
        raise InputError(f"--decoder-tap is for d2-mae alone: {args.method} decodes the last block")
    if args.crop_scale[0] > args.crop_scale[1]:
        raise InputError(f"--crop-scale {args.crop_scale[0]} {args.crop_scale[1]} must be a range")
    if args.mask_ratio is None:
        args.mask_ratio = 0.4 if hiera else 0.75
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup-epochs must be fewer than --epochs {args.epochs}")
    return args


def main(args):
    train(resolve(args))


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
