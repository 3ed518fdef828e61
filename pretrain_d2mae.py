r"""MAE pre-training of lightweight ViTs with decoupled attention distillation, D2-MAE (Sec. 4).

    torchrun --nproc_per_node=8 pretrain_d2mae.py --teacher mae_base.pt     # the paper's D2-MAE
    torchrun --nproc_per_node=8 pretrain_d2mae.py --method mae --out out/mae    # its MAE baseline
    torchrun --nproc_per_node=8 pretrain_d2mae.py --model hiera_tiny --method d-mae \
        --teacher mae_hiera_base_224.pth --out out/hiera
    python tests/tools/demo.py                                              # needs no files

The student sees a quarter of the patches and is trained by two losses. Its block 8 feeds a small
decoder that predicts the masked patches (L_rec). An extra, 13th attention after block 12 imitates,
through a learned mix of heads, the attention map of the teacher's last block over the same visible
patches (L_attn). Reconstruction trains blocks 1 to 8 and distillation all 12, so the two losses do
not compete in blocks 9 to 12. Read `MaskedAutoencoder.forward` next to the paper, then `train`.

Shapes: B images, N patches, V visible, M = N - V masked, T = 1 + V tokens, D width, H heads,
        P = 3 * patch_size^2. Hiera: N, V, M count mask units of 32x32 pixels; each holds 4 tokens
        of 16x16 pixels where pixels are predicted, and T = 4 V where maps are compared.
Masks:  ids_keep (B, V) and ids_masked (B, M) are raster indices; together they are range(N).

NOTES, details that the paper does not give, and departures from the authors' code:
1. The decoder keeps the shuffled order [class, visible, masked] and predicts only the pixels of the
   masked slice. The authors unshuffle first (models_mae.py, forward_decoder). Attention is
   permutation-equivariant, so the numbers are the same.
2. The 13th block consists of a LayerNorm and a projection to q and k, initialised as if v existed.
   The authors' code also creates v, which it never uses.
3. Tokens and position tables get no weight decay. The authors' code decays those that are trained.
4. Crops, flips and masks depend on (seed, epoch, image), not on the number of workers or processes.
   A killed run finishes with bit-identical weights on the same number of CPU threads, since that
   sets the order of sums in gradients, or on GPUs of one kind with deterministic kernels.
5. Crops are resized bicubically. The authors choose bilinear or bicubic at random.
6. Attention maps are compared in float32, in the authors' code in float16. GPUs from Ampere on
   multiply float32 matrices in TensorFloat-32.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.data import default_collate
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

from models import (Block, Hiera, ImageDataset, InputError, Parser, VisionTransformer,
                    attention_logits, eval_loader, init_distributed, init_mae, list_images,
                    load_model, log, normalize, param_groups, plain_errors, random_crop, resume,
                    save, train_loader)

RECIPE = dict(    # Sec. 4; settings without an option. `parse_args` has all others
    betas=(0.9, 0.95), weight_decay=0.05,   # of AdamW; biases, norms and tokens do not decay
    min_lr=0.0,                             # at the end of the cosine
    val_images=512,                         # largest number of held-out images
)


# --------------------------------------------------------------------------------------------------
# Method: masking, targets and losses
# --------------------------------------------------------------------------------------------------
def random_masking(noise, mask_ratio):
    """Draw masks by sorting noise (B, N): the V = int(N (1 - mask_ratio)) patches of smallest noise
    stay visible -> ids_keep (B, V), ids_masked (B, M)."""
    ids = noise.argsort(dim=1)
    keep = int(noise.shape[1] * (1 - mask_ratio))
    return ids[:, :keep], ids[:, keep:]


def normalize_patches(patches):
    """Normalise each patch of (B, M, P): (x - mean) / sqrt(variance + 1e-6), with the unbiased
    variance (norm_pix_loss of MAE)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def reconstruction_loss(pred, target):
    """Compute L_rec, the mean squared error over the masked patches, in float32. pred, target:
    (B, M, P)."""
    return F.mse_loss(pred.float(), target.float())


def attention_loss(student, teacher, adapter):
    """Compute L_attn = MSE(A_T, M A_S) with A = q k^T / sqrt(d), before the softmax, in float32.

    student: A_S (B, H_S, T, T), teacher: A_T (B, H_T, T, T), over the same visible tokens including
    the class token. adapter: M, a learned 1x1 convolution over heads, H_S -> H_T, without bias. (An
    ablation compares hidden states (B, T, D) through a linear layer.)
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(adapter(student.float()), teacher.float())


def sincos_2d(dim, grid):
    """Compute the fixed 2-D sin-cos position table of MAE -> parameter (1, 1 + N, dim) without
    gradient; row 0, of the class token, is zero. dim must be a multiple of 4.

    The first half of the channels encodes the column, the second half the row; within each half all
    sines precede all cosines, at frequencies omega_i = 10000^(-i / (dim / 4)).
    """
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))    # on the host
    places = torch.cartesian_prod(*map(torch.arange, grid)).flip(1)                # (N, 2): x, y
    angles = places[..., None] * omega                                             # (N, 2, dim / 4)
    table = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)              # (N, dim)
    table = F.pad(table, (0, 0, 1, 0)).float()
    return nn.Parameter(table[None], requires_grad=False)


# --------------------------------------------------------------------------------------------------
# Method: student, decoder, distillation
# --------------------------------------------------------------------------------------------------
class MaskedAutoencoder(nn.Module):
    """Student of MAE, D-MAE and D2-MAE: a ViT encoder, a decoder and, with a teacher, L_attn.

    encoder: VisionTransformer without a head, whose position table becomes the fixed one.
    decoder_tap: block whose normalised output the decoder reads. decoder_dim: width of the decoder,
    one block with heads of 32. norm_pix: predict normalised patches. distillation: `Distillation`
    or None. alpha: weight of L_attn.
    """

    def __init__(self, encoder, decoder_tap=12, decoder_dim=96, norm_pix=True, distillation=None,
                 alpha=1.0):
        super().__init__()
        self.encoder = encoder
        self.arch, self.mean, self.std = encoder.arch, encoder.mean, encoder.std
        self.decoder_tap = decoder_tap
        self.decoder_taps = {decoder_tap}    # Hiera reads several
        self.norm_pix = norm_pix
        self.distillation = distillation
        self.alpha = alpha
        self.cells = math.prod(encoder.grid)    # that can be masked: patches

        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        encoder.pos_embed = sincos_2d(encoder.embed_dim, encoder.grid)
        self.decoder_pos_embed = sincos_2d(decoder_dim, encoder.grid)
        self.decoder_blocks = nn.Sequential(Block(decoder_dim, decoder_dim // 32))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * encoder.patch_size ** 2)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            init_mae(part)

    @property
    def taps(self):
        """Blocks whose outputs the decoder or the distillation reads."""
        return self.decoder_taps | (self.distillation.taps if self.distillation else set())

    def forward(self, images, ids_keep, ids_masked, target_maps=None):
        """Compute L = L_rec + alpha * L_attn -> dict of scalars: loss, rec and, with a teacher,
        attn.

        images: (B, 3, H, W), normalised. target_maps: A_T, the teacher's pre-softmax map of the
        same images and ids_keep, see `Distillation.target_maps`.
        """
        features = self.encoder.forward_features(images, self.taps, ids_keep)   # block -> (B, T, D)

        # reconstruction: the decoder reads block 8 (D2-MAE) or the last block (MAE, D-MAE)
        latent = self.latent(features)                                          # (B, T, D)
        pred = self.forward_decoder(latent, ids_keep, ids_masked)               # (B, M, P)
        target = self.target(images, ids_masked)                                # (B, M, P)
        rec = reconstruction_loss(pred, target)
        if target_maps is None:
            return {"loss": rec, "rec": rec}

        # distillation: the map of the 13th attention (D2-MAE) or of the last block (D-MAE)
        attn = self.distillation(self.encoder, features, target_maps)
        return {"loss": rec + self.alpha * attn, "rec": rec, "attn": attn}

    def latent(self, features):
        """Normalise the tokens that the decoder reads -> (B, T, D). In D2-MAE this norm, which is
        also the one in encoder.pt, is trained on block 8, not on block 12."""
        return self.encoder.norm(features[self.decoder_tap])

    def forward_decoder(self, latent, ids_keep, ids_masked):
        """Predict the masked patches (B, M, P) from the visible tokens `latent` (B, T, D)."""
        T = latent.shape[1]
        rows = self.decoder_rows(torch.cat([ids_keep, ids_masked], dim=1))      # (B, 1 + N)
        pos = self.decoder_pos_embed[0, rows]    # of [class, visible, masked]
        visible = self.decoder_embed(latent) + pos[:, :T]                       # (B, T, D_dec)
        masked = self.mask_token + pos[:, T:]                                   # (B, M, D_dec)
        x = self.decoder_blocks(torch.cat([visible, masked], dim=1))
        return self.decoder_pred(self.decoder_norm(x[:, T:]))

    def decoder_rows(self, ids):
        """Return rows (B, 1 + N) of the decoder's position table: row 0 for the class token, then
        those of the patches ids (B, N)."""
        return F.pad(ids + 1, (1, 0))

    def target(self, images, ids_masked):
        """Compute what the decoder should predict, (B, M, P)."""
        patches = self.masked_pixels(images, ids_masked)
        return normalize_patches(patches) if self.norm_pix else patches

    def masked_pixels(self, images, ids_masked):
        """Cut the masked patches out of images (B, 3, H, W) -> pixels (B, M, P), ordered (row,
        column, channel)."""
        p = self.encoder.patch_size
        patches = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1)
        patches = patches.flatten(3).flatten(1, 2)                              # (B, N, P)
        return patches[torch.arange(len(images), device=images.device)[:, None], ids_masked]


class Distillation(nn.Module):
    """L_attn of D2-MAE: the map A_S of a 13th attention after the student's last block imitates
    A_T, the map of the teacher's last block. The 13th block consists of LayerNorm, q and k.

    A teacher is any module with depth, blocks[-1].attn.num_heads,
    forward_features(images, taps, ids_keep) -> {tap: tokens (B, T, D)}, of all patches if ids_keep
    is None, and attention_map(x, k) -> pre-softmax map (B, H_T, T, T) of block k, from the tokens x
    before it.
    """

    def __init__(self, encoder, teacher):
        super().__init__()
        dim = encoder.embed_dim
        self.heads = encoder.blocks[-1].attn.num_heads
        self.taps = {encoder.depth}    # blocks whose outputs `student_map` reads
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.qk = nn.Linear(dim, 2 * dim)
        self.adapter = nn.Conv2d(self.heads, teacher.blocks[-1].attn.num_heads, 1, bias=False)
        nn.init.xavier_uniform_(self.qk.weight, math.sqrt(3 / 4))    # bound of D -> 3 D: Note 2
        nn.init.zeros_(self.qk.bias)

    def student_map(self, encoder, features):
        """Compute A_S, pre-softmax (B, H_S, T, T), from the student's tokens {tap: (B, T, D)}."""
        qk = self.qk(self.norm(features[encoder.depth]))                        # (B, T, 2 D)
        qk = qk.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)        # 2 x (B, H, T, d)
        return attention_logits(*qk)

    @torch.no_grad()
    def target_maps(self, teacher, images, ids_keep):
        """Compute A_T, pre-softmax (B, H_T, T, T). Only LayerNorm, q and k of the teacher's last
        block run."""
        last = teacher.depth
        features = teacher.forward_features(images, {last - 1}, ids_keep)
        return teacher.attention_map(features[last - 1], last)

    def forward(self, encoder, features, target_maps):
        """Compute L_attn, a scalar, of the student's tokens {tap: (B, T, D)} and A_T."""
        return attention_loss(self.student_map(encoder, features), target_maps, self.adapter)


class CoupledDistillation(Distillation):
    """L_attn of D-MAE: A_S is the map of the student's own last block."""

    def __init__(self, encoder, teacher):
        super().__init__(encoder, teacher)
        del self.norm, self.qk
        self.taps = {encoder.depth - 1}

    def student_map(self, encoder, features):
        return encoder.attention_map(features[encoder.depth - 1], encoder.depth)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def train(args):
    """Train, resuming from args.out/last.pt if it exists, and save args.out/encoder.pt."""
    rank, world, device, dtype = run = init_distributed(args.device, args.dtype)
    torch.manual_seed(args.seed)
    model, teacher = (x and x.to(device) for x in build_student(args))
    loader, val_loader = build_loaders(args, model, run)
    accum_steps = loader.sampler.accum_steps
    steps = len(loader) // accum_steps    # optimizer steps per epoch
    peak_lr = args.base_lr * loader.sampler.total_batch / 256
    optimizer = AdamW(param_groups(model, args.weight_decay), peak_lr, args.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    data = dict(train_images=len(loader.dataset))    # compared on resuming
    first_epoch = resume(args, run, steps, model, optimizer, scaler, **data)
    student = torch.compile(model) if args.compile else model    # `model` itself is saved
    if args.compile and teacher:
        model.distillation.target_maps = torch.compile(model.distillation.target_maps)
    if world > 1:
        student = DistributedDataParallel(student, find_unused_parameters=bool(args.decoder_tap))
    if not first_epoch:
        report(args, run, model, teacher, val_loader, epoch=0, step=0)

    for epoch in range(first_epoch, args.epochs):
        loader.sampler.set_epoch(epoch)
        student.train()    # the loop draws no random numbers: masks come with the data
        bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", disable=rank > 0)
        means = {}    # each loss, averaged over the micro-batches of a step
        for i, (images, noise) in enumerate(bar):
            step = epoch * steps + i // accum_steps
            update = (i + 1) % accum_steps == 0
            images = normalize(images, model.mean, model.std)
            ids_keep, ids_masked = random_masking(noise, args.mask_ratio)
            student.require_backward_grad_sync = update    # DistributedDataParallel reads it
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                maps = teacher and model.distillation.target_maps(teacher, images, ids_keep)
                losses = student(images, ids_keep, ids_masked, maps)
            scaler.scale(losses["loss"] / accum_steps).backward()
            means = {k: means.get(k, 0) + v.detach() / accum_steps for k, v in losses.items()}
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
                             grad_norm=grad_norm, **means)
                bar.set_postfix(loss=f"{values['loss']:.4f}")
            means = {}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            report(args, run, model, teacher, val_loader, epoch=epoch + 1, step=(epoch + 1) * steps)
        save(args, rank, "last.pt", model, epoch=epoch + 1, **data,
             optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    save(args, rank, "encoder.pt", model.encoder, epoch=args.epochs)


def lr_at(step, total, warmup, lr, min_lr):
    """Compute the learning rate of a step (from 0) of `total`: linear warm-up from 0, then half a
    cosine from lr to min_lr. warmup: steps, fewer than `total`."""
    if step < warmup:
        return lr * step / warmup
    done = (step - warmup) / (total - warmup)
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * done))


# --------------------------------------------------------------------------------------------------
# Student and teacher, from the options
# --------------------------------------------------------------------------------------------------
def build_student(args):
    """Build the student of the options and read its teacher -> student, frozen teacher or None.

    The encoder is initialised first: its weights depend on the seed, not on the method. The student
    reads pixels normalised as the teacher's. Raises InputError.
    """
    hiera = args.model.startswith("hiera")
    architecture = Hiera if hiera else VisionTransformer
    options = dict(img_size=args.image_size, mean=args.mean, std=args.std, q_pool=2)
    encoder, _ = load_model(architecture, None, args.model, patch_size=args.patch_size, **options)
    tap = args.decoder_tap or (8 if args.method == "d2-mae" else encoder.depth)
    dim = 96 if hiera else max(96, encoder.embed_dim // 2)    # of the decoder, with heads of 32
    kind = HieraMaskedAutoencoder if hiera else MaskedAutoencoder
    model = kind(encoder, tap, dim, args.norm_pix, alpha=args.alpha)
    if tap > encoder.depth or not 0 < int(model.cells * (1 - args.mask_ratio)) < model.cells:
        raise InputError(f"--decoder-tap {tap} must be among the {encoder.depth} blocks, and "
                         f"--mask-ratio {args.mask_ratio} must leave visible and masked patches")
    if not args.teacher:
        return model, None

    teacher, file = load_model(architecture, args.teacher, **options)
    if teacher.grid != encoder.grid:
        raise InputError(f"--teacher {args.teacher} has {teacher.grid} tokens, the student "
                         f"{encoder.grid}: give the teacher's --image-size and --patch-size")
    if args.distill == "hidden" and "norm.weight" not in file.state:
        raise InputError(f"--teacher {args.teacher} lacks the final norm, which --distill hidden "
                         "needs: give a file that holds it")
    encoder.mean, encoder.std = model.mean, model.std = teacher.mean, teacher.std
    model.distillation = build_distillation(args, encoder, teacher)
    return model, teacher.eval().requires_grad_(False)


def build_distillation(args, encoder, teacher):
    """Build the distillation of --method, or an ablation of it. Raises InputError."""
    decoupled = args.method == "d2-mae"
    if not args.distill_layers and args.distill == "attention":
        kind = Distillation if decoupled else CoupledDistillation
        return kind(encoder, teacher)
    layers = sorted(set(args.distill_layers or [encoder.depth]))
    if max(layers) > encoder.depth or (decoupled and encoder.depth not in layers):
        raise InputError(f"--distill-layers {layers} must be among the blocks 1..{encoder.depth}, "
                         "and --method d2-mae needs the last one")
    if decoupled:
        layers[-1] += 1    # the 13th block in its place
    return AblatedDistillation(encoder, teacher, layers, args.distill)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
class Images(ImageDataset):
    """Item (epoch, index) -> image (3, h, w) uint8, and the noise (cells,) that decides its mask.
    All randomness comes from (seed, epoch, index).

    files: sequence of paths. cells: number of patches or mask units. image_size: (h, w).
    crop_scale: range of a random crop's share of the area; None: resized centre crop.
    """

    def __init__(self, files, seed, cells, image_size, crop_scale=None):
        super().__init__(files, seed)
        self.cells = cells
        self.image_size = image_size
        self.crop_scale = crop_scale

    def transform(self, image, index):
        noise = torch.rand(self.cells)
        if self.crop_scale:
            return random_crop(image, self.image_size, self.crop_scale), noise
        return pil_to_tensor(ImageOps.fit(image, self.image_size[::-1], Image.BICUBIC)), noise


def list_data(root, out):
    """List the training and the held-out images: those of the folders train and val of `root`. If
    there is no val, every 50th image is held out. Nothing below `out` is data. Raises InputError.
    """
    root = Path(root)
    if (root / "annotations").is_dir():
        raise InputError(f"--data {root} holds annotations beside its images: give the folder of "
                         "the images, such as images/training")
    split = (root / "train").is_dir()
    train = list_images(root / "train" if split else root, out)
    if split and (root / "val").is_dir():
        return train, list_images(root / "val", out)
    if len(train) == 1:
        raise InputError(f"--data {root} holds a single image: give more")
    held_out = torch.arange(len(train)) % 50 == 0
    return train[~held_out], train[held_out]


def build_loaders(args, model, run):
    """Build the loaders of the training images and of at most args.val_images held-out images."""
    train, val = list_data(args.data, args.out)
    val = val[::math.ceil(len(val) / args.val_images)]    # from all folders
    size = model.encoder.img_size
    train_set = Images(train, args.seed, model.cells, size, args.crop_scale)
    loader = train_loader(train_set, args.batch_size, args.accum_steps, 512, args.workers,
                          args.seed, run)
    val_set = Images(val, args.seed, model.cells, size)
    return loader, eval_loader(val_set, 64, args.workers, run)


# --------------------------------------------------------------------------------------------------
# Evaluation and pictures
# --------------------------------------------------------------------------------------------------
def report(args, run, model, teacher, val_loader, epoch, step):
    """Evaluate on all processes. Process 0 logs and prints, and draws pictures after epoch 0."""
    rank, world, _, _ = run
    values = log(args, rank, world, epoch=epoch, step=step,
                 **evaluate(model, teacher, val_loader, args.mask_ratio, run))
    if rank > 0:
        return
    text = f"epoch {epoch}: held-out reconstruction loss {values['val_rec']:.4f} (the mean of " \
           f"each patch gives {values['val_base']:.4f})"
    if teacher:
        text += f", {args.distill} loss {values['val_attn']:.4g}"
    if epoch == 0:
        text += f"; {args.mask_ratio:.0%} of the {model.cells} patches or mask units are masked"
    if epoch == args.epochs and values["val_rec"] >= values["val_base"]:
        text += "; that is no better than the mean, see 'Your own images' in the README"
    tqdm.write(text)
    if epoch > 0:
        draw(model, teacher, val_loader, args.mask_ratio, args.out)


@torch.no_grad()
def evaluate(model, teacher, val_loader, mask_ratio, run):
    """Compute this process's share of the mean losses over held-out images with fixed masks -> dict
    for `log`, whose mean over any number of processes counts each image once.

    val_base is the loss of predicting the mean of each masked patch, which a model that has learned
    only brightness reaches.
    """
    rank, world, device, dtype = run
    model.eval()
    names = ("rec", "base", "attn") if teacher else ("rec", "base")
    total = len(val_loader.dataset)
    sums = torch.zeros(len(names), device=device)
    for images, noise in tqdm(val_loader, "evaluation", leave=False, disable=rank > 0):
        images = normalize(images, model.mean, model.std)
        ids_keep, ids_masked = random_masking(noise, mask_ratio)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            maps = teacher and model.distillation.target_maps(teacher, images, ids_keep)
            losses = model(images, ids_keep, ids_masked, maps)
        losses["base"] = model.target(images, ids_masked).var(dim=-1, unbiased=False).mean()
        sums += torch.stack([losses[name] for name in names]) * len(images) * world / total
    return {"val_images": total, **{f"val_{name}": x for name, x in zip(names, sums)}}


@torch.no_grad()
def reconstruct(model, images, ids_keep, ids_masked):
    """Replace the masked patches of normalised images (B, 3, H, W) by grey -> (B, 3, H, W), and by
    predictions -> (B, 3, H, W).

    With norm_pix the model predicts patches of zero mean and unit variance; mean and standard
    deviation are those of the input.
    """
    features = model.encoder.forward_features(images, model.taps, ids_keep)
    pred = model.forward_decoder(model.latent(features), ids_keep, ids_masked)
    if model.norm_pix:
        pixels = model.masked_pixels(images, ids_masked)
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        pred = pred * (variance + 1e-6).sqrt() + mean
    masked = paste(model, images, torch.zeros_like(pred), ids_masked)
    return masked, paste(model, images, pred, ids_masked)


def paste(model, images, pixels, ids_masked):
    """Copy images (B, 3, H, W), with the pixels (B, M, P) in the masked patches."""
    numbers = torch.arange(images[0].numel(), device=images.device).view_as(images[0])
    places = model.masked_pixels(numbers.expand_as(images), ids_masked)    # pixel numbers (B, M, P)
    return images.flatten(1).scatter(1, places.flatten(1), pixels.flatten(1)).view_as(images)


@torch.no_grad()
def draw(model, teacher, val_loader, mask_ratio, out):
    """Draw up to eight held-out images into the folder `out`. reconstruction.png has the rows
    input, masked input and prediction. attention.png, for a ViT with a teacher and no ablation, has
    the rows input, student (M A_S) and teacher (A_T): softmax attention of the central patch to all
    patches, mean over heads, white at its maximum."""
    data = val_loader.dataset
    items = [data[0, i] for i in range(0, len(data), math.ceil(len(data) / 8))]
    images, noise = (x.to(model.mask_token.device) for x in default_collate(items))
    images = normalize(images, model.mean, model.std)
    masks = random_masking(noise, mask_ratio)
    mean, std = (images.new_tensor(c).view(3, 1, 1) for c in (model.mean, model.std))
    rows = [x * std + mean for x in (images, *reconstruct(model, images, *masks))]
    save_image(torch.cat(rows), f"{out}/reconstruction.png", nrow=len(items))
    distillation = model.distillation
    if isinstance(distillation, AblatedDistillation | None) or model.encoder.kind == "hiera":
        return

    h, w = model.encoder.grid
    features = model.encoder.forward_features(images, model.taps)
    student = distillation.adapter(distillation.student_map(model.encoder, features))
    logits = torch.cat([student, distillation.target_maps(teacher, images, None)])
    query = 1 + h // 2 * w + w // 2
    attention = logits.softmax(dim=-1).mean(dim=1)[:, query, 1:]            # (2 B, N)
    attention = F.normalize(attention, math.inf).view(-1, 1, h, w)          # / its maximum
    heat = F.interpolate(attention, images.shape[2:]).expand(-1, 3, -1, -1)
    save_image(torch.cat([rows[0], heat]), f"{out}/attention.png", nrow=len(items))


# --------------------------------------------------------------------------------------------------
# MAE and D-MAE on Hiera
# --------------------------------------------------------------------------------------------------
class HieraMaskedAutoencoder(MaskedAutoencoder):
    """MAE and D-MAE on Hiera (with q_pool=2): the decoder reads stages 1, 2 and the last block.

    ids_keep and ids_masked number mask units. Each unit has 2x2 decoder tokens of 16x16 pixels in
    adjacent places: token 4 u + i is token i (raster) of the unit at place u.
    """

    def __init__(self, encoder, *args, **options):
        trained = encoder.pos_embed
        super().__init__(encoder, *args, **options)
        encoder.pos_embed = trained    # Hiera has no fixed table
        init_mae(encoder)    # its own initialisation is for classifiers
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        h, w = encoder.unit_grid
        self.cells = h * w    # mask units
        table = torch.zeros(1, 4 * self.cells, self.mask_token.shape[2])         # in raster order
        self.decoder_pos_embed = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        raster = F.pixel_unshuffle(torch.arange(4 * h * w).view(1, 2 * h, 2 * w), 2)
        self.register_buffer("unit_tokens", raster.flatten(1).T, persistent=False)    # (U, 4)

        width = encoder.embed_dim
        self.decoder_taps = set(encoder.stage_ends)
        self.multi_scale_fusion_heads = nn.ModuleList([
            nn.Conv2d(width // 8, width, 4, 4),     # stage 1: 8x8 tokens of a unit -> 2x2
            nn.Conv2d(width // 4, width, 2, 2)])    # stage 2: 4x4 tokens of a unit -> 2x2
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)

    def latent(self, features):
        """Fuse stages 1, 2 and the last block at 2x2 tokens per unit, and normalise -> (B, 4 V, D).
        """
        encoder = self.encoder
        last = features[encoder.depth]                                          # (B, 4 V, D)
        units = last.shape[1] // 4
        fused = encoder.unit_maps(last, units)                                  # (B, D, 2 V, 2)
        for tap, head in zip(encoder.stage_ends, self.multi_scale_fusion_heads):
            fused = fused + head(encoder.unit_maps(features[tap], units))
        return self.encoder_norm(fused.flatten(2).mT)

    def decoder_rows(self, ids):
        """Return the raster indices (B, 4 V) of the 16x16-pixel tokens of mask units ids (B, V)."""
        return self.unit_tokens[ids].flatten(1)

    def masked_pixels(self, images, ids_masked):
        """Cut out the masked units -> pixels (B, 4 M, P), ordered (channel, row, column)."""
        pixels = super().masked_pixels(images, self.decoder_rows(ids_masked))
        return pixels.unflatten(2, (-1, 3)).mT.flatten(2)


# --------------------------------------------------------------------------------------------------
# Ablations of the distillation (Fig. 2 and its tables)
# --------------------------------------------------------------------------------------------------
class AblatedDistillation(Distillation):
    """Sum of L_attn over several layers: the student's blocks `layers` (from 1) imitate blocks of
    the teacher at the same relative depth. Layer depth + 1 is the 13th block, which imitates the
    teacher's last block.

    signal: "attention" compares maps before the softmax, "probabilities" maps after it, "hidden"
    `representation`s (B, T, D) through a linear layer without bias. `adapter` and the target maps
    are lists with one entry per layer.
    """

    def __init__(self, encoder, teacher, layers, signal):
        super().__init__(encoder, teacher)
        hidden = signal == "hidden"
        decoupled = max(layers) > encoder.depth
        self.norm.requires_grad_(decoupled)    # frozen where nothing reads them
        self.qk.requires_grad_(decoupled and not hidden)
        self.adapter = nn.ModuleList([
            nn.Linear(encoder.embed_dim, teacher.embed_dim, bias=False) if hidden
            else nn.Conv2d(self.heads, teacher.blocks[-1].attn.num_heads, 1, bias=False)
            for _ in layers])
        self.signal = signal
        self.layers = layers
        self.teacher_layers = [min(max(1, k * teacher.depth // encoder.depth), teacher.depth)
                               for k in layers]
        self.shift = 0 if hidden else 1    # a map needs the tokens before its block
        self.taps = {min(k - self.shift, encoder.depth) for k in layers}

    def read(self, model, features, k):
        """Compute the map (B, H, T, T) or, for "hidden", representation (B, T, D) of block k."""
        extra = k > model.depth
        if self.signal == "hidden":
            return self.norm(features[k - 1]) if extra else model.representation(features[k], k)
        x = self.student_map(model, features) if extra else model.attention_map(features[k - 1], k)
        return x.softmax(dim=-1) if self.signal == "probabilities" else x

    @torch.no_grad()
    def target_maps(self, teacher, images, ids_keep):
        taps = {k - self.shift for k in self.teacher_layers}
        features = teacher.forward_features(images, taps, ids_keep)
        return [self.read(teacher, features, k) for k in self.teacher_layers]

    def forward(self, encoder, features, target_maps):
        maps = [self.read(encoder, features, k) for k in self.layers]
        return sum(map(attention_loss, maps, target_maps, self.adapter))


# --------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's
# --------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """Parse the command line, or the list `argv`."""
    parser = Parser(__doc__)
    add = parser.group("method (Sec. 4)")
    add("--method", choices=("d2-mae", "d-mae", "mae"), default="d2-mae",
        help="d2-mae: the decoder reads an inner block, distillation a 13th attention; d-mae: both "
             "read the last block; mae: no teacher")
    add("--model", default="vit_tiny", help="student; paper: vit_tiny (12 heads), hiera_tiny; for "
        "small images: vit_nano (1.4M parameters), vit_pico (0.4M)")
    add("--teacher", help="checkpoint of the frozen teacher (README, 'Checkpoints'); paper: MAE "
                          "ViT-Base, 1600 epochs")
    add("--alpha", type=float, low=0, default=1.0, help="weight in L = L_rec + alpha * L_attn")
    add("--mask-ratio", type=float, low=0, high=1,
        help="share of patches to mask; default: ViT 0.75, Hiera 0.4 of its mask units")
    add("--no-norm-pix", dest="norm_pix", action="store_false",
        help="predict plain pixels, not patches normalised by their mean and variance")
    add("--decoder-tap", low=1,
        help="ViT block whose normalised output the decoder reads; default: d2-mae 8, else last")
    add("--distill", choices=("attention", "probabilities", "hidden"), default="attention",
        help="ablation: compare maps before the softmax, maps after it, or hidden states")
    add("--distill-layers", low=1, nargs="+",
        help="ablation: student blocks to distil, counted from 1; d2-mae puts the 13th attention "
             "in the place of the last; default: the last")

    add = parser.group("data")
    add("--data", default="data/imagenet", help="folder that holds train and optionally val, or a "
        "folder of images, flat or nested; without val every 50th image is held out")
    add("--patch-size", low=1, help="side of a ViT patch in pixels; default: 16, vit_huge 14")
    add("--crop-scale", type=float, low=0, high=1, nargs=2, default=[0.08, 1.0],
        help="range of the random crop's share of the area")
    parser.pixel_options(add, "224, the paper's")

    add = parser.group("recipe (Sec. 4, pre-training)")
    add("--epochs", low=1, default=400, help="passes over the data; paper: 400")
    add("--warmup-epochs", type=float, low=0,
        help="epochs of linear warm-up from 0; default: a tenth of --epochs, the paper's 40 of 400")
    add("--base-lr", type=float, low=0, default=1.5e-4,
        help="peak rate per 256 images: lr = base_lr * batch_size / 256; paper: 1.5e-4")

    add = parser.run_options("out/pretrain", batch_size=4096, eval_every=10)
    add("--compile", action="store_true", help="apply torch.compile to student and teacher")
    parser.set_defaults(**RECIPE)
    return parser.parse_args(argv)


def resolve(args):
    """Fill in the defaults that depend on other options. Raises InputError if options contradict
    each other."""
    hiera = args.model.startswith("hiera")
    if (args.method == "mae") == bool(args.teacher):
        raise InputError(f"--method {args.method} {'has no' if args.teacher else 'needs a'} "
                         "teacher: d2-mae and d-mae take --teacher FILE (README, 'Checkpoints'), "
                         "mae takes none")
    if hiera and (args.method == "d2-mae" or args.distill != "attention" or args.distill_layers
                  or args.decoder_tap):
        raise InputError("d2-mae, --decoder-tap, --distill and --distill-layers are for ViT: "
                         "Hiera's decoder needs its last block; give --method d-mae or mae alone")
    if args.crop_scale[0] > args.crop_scale[1]:
        raise InputError(f"--crop-scale takes the smaller number first, not {args.crop_scale}")
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
