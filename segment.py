"""Semantic segmentation of ADE20K by Semantic FPN on a lightweight ViT (Sec. "transfer").

    torchrun --nproc_per_node=8 segment.py --init out/pretrain/encoder.pt    # D2-MAE: 39.0 mIoU
    torchrun --nproc_per_node=8 segment.py --init out/rpe/classifier.pt      # fine-tuned, RPE: 42.8
    python segment.py --eval                                                 # scores segmenter.pt
    python segment.py --predict photo.jpg                                    # or a folder
    python tests/tools/demo.py segment                                       # needs no files

A plain ViT gives four maps of one size, after blocks 4, 6, 8 and 12. `Pyramid` converts them to
strides 4, 8, 16 and 32; `SemanticFPN` brings all of them to stride 4, adds them and classifies the
sum. Position tables belong to one image size, so an image is scored by overlapping windows of the
size of a training crop, whose logits are averaged (`sliding_logits`). Read `SemanticFPN`,
`segmentation_loss`, `augment`, then `train`.

Shapes: B images, K classes, H x W pixels, C = a quarter of the encoder's width, s = a quarter of
        its patch size, the stride of the class scores.
Labels: (H, W) uint8, 0 .. K - 1, and 255 for pixels that are neither trained on nor scored.
Data:   DIR/{images,annotations}/{training,validation}, as in ADEChallengeData2016. A label file is
        a PNG of the image's name. DIR/objectInfo150.txt holds the names of the classes, one a line.

NOTES, details that the paper does not give, and departures from the authors' code, which runs in
mmsegmentation:
1. The loss is averaged over all pixels, ignored ones included, as by mmsegmentation's default
   (avg_non_ignore=False in cross_entropy_loss.py).
2. Training runs in bfloat16 or float16 on GPUs, as the paper says. The authors' configuration asks
   for it by a key that MMEngine does not read, so their code trains in float32 (--dtype fp32).
3. Evaluation runs in float32, as the authors' does. GPUs from Ampere on multiply float32 matrices
   in TensorFloat-32.
4. Warm-up reaches the full rate at iteration 1500, MMEngine's one iteration earlier.
5. The position table and the class token are not decayed. mmsegmentation intends to exempt them,
   but compares names without their prefix (layer_decay_optimizer_constructor.py).
6. Hue shifts are continuous, not whole steps of OpenCV's 180.
7. Images smaller than a window are padded to its size with the mean colour, zero once normalised.
8. Crops and test images are scaled by the shorter side of --image-size, whatever the shape of the
   image: its aspect ratio is kept, in training as in evaluation.
9. Crops, flips and colours depend on (seed, epoch, image), not on the number of workers or
   processes. Dropout and drop path depend on (seed, epoch, process).
10. With --accum-steps, batch statistics are those of a micro-batch. Without GPUs they are those of
    each process, since PyTorch's SyncBatchNorm needs GPUs.
11. `--predict` classifies the resized photograph and enlarges its labels, not the logits of all
    classes, to the size of the photograph.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torchvision.transforms.v2 import RandomCrop, RandomHorizontalFlip
from torchvision.transforms.v2.functional import (adjust_hue, crop, pad, pil_to_tensor, resize,
                                                  to_pil_image)
from torchvision.tv_tensors import Mask
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

from models import (Block, ImageDataset, InputError, Parser, RelativeVisionTransformer,
                    eval_loader, init_distributed, list_images, load_model, log, mix_seed,
                    normalize, open_image, param_groups, plain_errors, read_encoder, read_text,
                    resume, save, train_loader)

RECIPE = dict(    # Sec. "transfer"; settings without an option. All others: `parse_args`
    dropout=0.1,                              # before the classifier
    betas=(0.9, 0.999), weight_decay=0.05,    # AdamW; no decay of biases, norms and tokens
)
IGNORE = 255    # label of pixels that are neither trained on nor scored


# --------------------------------------------------------------------------------------------------
# Method: encoder, pyramid, head and loss
# --------------------------------------------------------------------------------------------------
class ScaledBlock(Block):
    """Block of a `VisionTransformer` with LayerScale: at the end of both branches each channel is
    multiplied by a trained factor gamma, which starts at 1."""

    def __init__(self, dim, *args):
        super().__init__(dim, *args)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(dim)})    # ls1.gamma, as in timm's files
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(dim)})

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)) * self.ls1.gamma)
        return x + self.drop_path(self.mlp(self.norm2(x)) * self.ls2.gamma)


class Pyramid(nn.Module):
    """Convert the maps (B, D, h, w) after blocks 4, 6, 8 and 12, which have one size, to four maps
    (B, C, ., .), each half the size of the one before."""

    def __init__(self, dim, channels):
        super().__init__()
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

    Level k = 0 .. 3 of the head doubles its map k times, each time by a 3x3 convolution and
    bilinear interpolation; level 0 has one convolution. The sum of the levels is classified.
    Raises InputError if the image size is not a multiple of twice the patch size.
    """

    def __init__(self, encoder, num_classes, width=128, dropout=0.1):
        super().__init__()
        cell = 2 * encoder.patch_size    # of the coarsest map
        if any(side % cell for side in encoder.img_size):
            raise InputError(f"--image-size {encoder.img_size} is not a multiple of {cell}, the "
                             "stride of the coarsest map")
        self.encoder = encoder
        self.arch, self.img_size = encoder.arch, encoder.img_size
        self.mean, self.std = encoder.mean, encoder.std
        encoder.norm = nn.Identity()    # unused; DDP expects gradients for all parameters
        channels = encoder.embed_dim // 4                               # 48 for ViT-Tiny
        self.taps = [encoder.depth * k // 12 for k in (4, 6, 8, 12)]
        self.pyramid = Pyramid(encoder.embed_dim, channels)
        self.scale_heads = nn.ModuleList()
        for level in range(4):
            layers = []
            for k in range(max(1, level)):
                conv = nn.Conv2d(width if k else channels, width, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out")
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                if level:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images):
        """Normalised images (B, 3, H, W) -> logits (B, K, H/s, W/s); shapes of ViT-Tiny at 512."""
        maps = self.encoder.feature_maps(images, self.taps)             # 4 x (B, 192, 32, 32)
        maps = self.pyramid(maps)                                       # (B, 48, 128, 128) .. 16
        x = sum(head(m) for head, m in zip(self.scale_heads, maps))     # (B, 128, 128, 128)
        return self.classifier(self.dropout(x))                         # (B, 150, 128, 128)


def segmentation_loss(logits, labels):
    """Compute the cross entropy of logits (B, K, ., .), enlarged bilinearly, and labels (B, H, W).

    The mean includes ignored pixels: every process and micro-batch has the same denominator, so
    their average is the loss of the whole batch.
    """
    logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
    total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")
    return total / labels.numel()


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def train(args):
    """Train, resuming from args.out/last.pt if it exists, and save args.out/segmenter.pt."""
    rank, world, device, dtype = run = init_distributed(args.device, args.dtype)
    torch.manual_seed(args.seed)
    model = build_segmenter(args).to(device)
    if world > 1 and device.type == "cuda":    # PyTorch has it for GPUs alone
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    loader, val_loader, classes = build_loaders(args, model, run)
    accum_steps = loader.sampler.accum_steps
    steps = len(loader) // accum_steps        # optimizer steps per epoch
    epochs = math.ceil(args.iters / steps)    # the last one may be cut short
    groups = param_groups(model, args.weight_decay, args.layer_decay, model.encoder.depth)
    optimizer = AdamW(groups, args.lr, args.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    data = dict(train_images=len(loader.dataset), classes=classes, epochs=epochs)
    first_epoch = resume(args, run, steps, model, optimizer, scaler, **data)
    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = DistributedDataParallel(network)

    for epoch in range(first_epoch, epochs):
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(mix_seed(args.seed, epoch, rank))    # of dropout and drop path
        network.train()
        bar = tqdm(loader, f"epoch {epoch + 1}/{epochs}", disable=rank > 0)
        for i, (images, labels) in enumerate(bar):
            step = epoch * steps + i // accum_steps
            if step == args.iters:
                break
            update = (i + 1) % accum_steps == 0
            images = normalize(images, model.mean, model.std)
            network.require_backward_grad_sync = update    # DistributedDataParallel reads it
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = segmentation_loss(network(images), labels)
            scaler.scale(loss / accum_steps).backward()
            mean_loss = (mean_loss if i % accum_steps else 0) + loss.detach() / accum_steps
            if not update:
                continue

            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            lr = linear_lr(step, args.iters, args.warmup_iters, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            if step % args.log_every == 0:    # the only device-to-host sync
                values = log(args, rank, world, epoch=epoch + 1, step=step, lr=lr,
                             grad_norm=grad_norm, loss=mean_loss)
                bar.set_postfix(loss=f"{values['loss']:.4f}")

        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == epochs:
            log(args, rank, world, epoch=epoch + 1, step=min((epoch + 1) * steps, args.iters),
                **evaluate(model, val_loader, classes, args.out, run))
        save(args, rank, "last.pt", model, epoch=epoch + 1, **data,
             optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    save(args, rank, "segmenter.pt", model, epoch=epochs, **data)


def linear_lr(step, total, warmup, lr):
    """Compute the learning rate of step `step` (from 0) of `total`: linear warm-up from a millionth
    of lr, then linear decay to 0. warmup: steps, fewer than `total`."""
    if step < warmup:
        return lr * (1e-6 + (1 - 1e-6) * step / warmup)
    return lr * (total - step) / (total - warmup)


def build_segmenter(args):
    """Build the SemanticFPN of the options, on the encoder of --init or on random weights.

    Relative position bias and LayerScale start at 0 and 1 where --init has none. By default crops
    have the paper's 512 pixels, or 512/224 of the image size of a smaller encoder.
    """
    file = read_encoder(args.init)
    arch = file.arch if file else {}
    cell = 2 * (args.patch_size or arch.get("patch_size", 16))
    sides = arch.get("img_size", (224, 224))
    size = [round(min(512, side * 512 / 224) / cell) * cell for side in sides]
    encoder, _ = load_model(RelativeVisionTransformer, file, args.model,
                            img_size=args.image_size or size, patch_size=args.patch_size,
                            mean=args.mean, std=args.std, drop_path=args.drop_path,
                            block=ScaledBlock)
    return SemanticFPN(encoder, args.num_classes, dropout=args.dropout)


# --------------------------------------------------------------------------------------------------
# Data: images and augmentation
# --------------------------------------------------------------------------------------------------
def uniform(low, high):
    """Draw a number between `low` and `high`."""
    return low + (high - low) * torch.rand(()).item()


def resized_shape(shape, short, long):
    """Compute the largest [H, W] of the same ratio with sides of at most `short` and `long`."""
    factor = min(short / min(shape), long / max(shape))
    return [max(1, int(side * factor + 0.5)) for side in shape]


def rescale(image, short):
    """Resize an image (3, H, W) bilinearly, or a Mask (H, W) to nearest pixels, to a short side of
    `short`, but to a long side of at most 4 times that."""
    shape = resized_shape(image.shape[-2:], short, 4 * short)
    return resize(image, shape, antialias=False)


def class_ratio_crop(labels, size, ratio=0.75, tries=10):
    """Draw a random crop of `size` (h, w) from labels (H, W), and redraw it, at most `tries` times,
    until two classes occur and none covers `ratio` of the labelled pixels -> (top, left, height,
    width)."""
    size = [min(sides) for sides in zip(labels.shape, size)]
    for _ in range(tries + 1):
        box = RandomCrop.get_params(labels, size)
        counts = crop(labels, *box).flatten().bincount()[:IGNORE]
        if counts.max() < ratio * counts.sum():    # false also for no label or one class
            break
    return box


def saturate(x, factor):
    """Multiply S of HSV by `factor`, up to 1, in an image (3, H, W) in [0, 1]. The hue and V, the
    brightest channel, stay."""
    value = x.amax(dim=0)
    chroma = (value - x.amin(dim=0)).clamp(min=1e-6)
    return value - (value - x) * (value / chroma).clamp(max=factor)


def distort(image):
    """Distort the colours of an image (3, H, W) uint8: brightness, saturation, hue and, before or
    after these two, contrast, each with probability 0.5."""
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
    """Augment as the paper does: image (3, H, W), labels (H, W) -> both of `size` (h, w).

    The short side becomes U(0.5, 2) times the crop's, the long side at most 4 times that. Then come
    the class-ratio crop, photometric distortion, a random flip, and padding at the right and below
    with the colour `fill` and IGNORE.
    """
    scale = uniform(0.5, 2) * min(size)
    image = rescale(image, scale)
    labels = rescale(Mask(labels), scale)
    box = class_ratio_crop(labels, size)
    image = distort(crop(image, *box))
    image, labels = RandomHorizontalFlip()(image, crop(labels, *box))
    missing = [0, 0, size[1] - box[3], size[0] - box[2]]    # right, below
    return pad(image, missing, fill), pad(labels, missing, IGNORE)


class SegmentationSet(ImageDataset):
    """Item (epoch, index) -> image (3, H, W) uint8, labels (H, W) uint8. All randomness comes from
    (seed, epoch, index). Pairs of files are in ROOT/{images,annotations}/SPLIT. Raises InputError.

    num_classes, zero_is_class: see `read_labels`. size: (h, w) of crops and windows. out: folder
    below which nothing is data. fill: colour, three numbers in 0 .. 255, that pads augmented crops;
    None: images are resized for windows, and labels keep their size.
    """

    def __init__(self, root, split, num_classes, zero_is_class, size, out=None, seed=0, fill=None):
        self.folder = Path(root, "images", split)
        if not self.folder.is_dir():
            found = sorted(path.name for path in self.folder.parent.glob("*"))[:8]
            raise InputError(f"{self.folder} is not a folder: --data must hold images and "
                             f"annotations, each with {split}; {self.folder.parent} holds {found}")
        super().__init__(list_images(self.folder, out), seed)
        self.label_folder = Path(root, "annotations", split)
        self.num_classes = num_classes
        self.zero_is_class = zero_is_class
        self.size = size
        self.fill = fill

    def label_file(self, index):
        """Path of the label file of an image: a PNG of the same name."""
        name = Path(self.files[index]).relative_to(self.folder)
        return self.label_folder / name.with_suffix(".png")

    def transform(self, image, index):
        path = self.label_file(index)
        image = pil_to_tensor(image)
        labels = read_labels(path, self.num_classes, self.zero_is_class)
        if labels.shape != image.shape[1:]:
            raise OSError(f"image {self.files[index]} and its labels {path} differ in size: "
                          f"{tuple(image.shape[1:])}, upright by EXIF, and {tuple(labels.shape)}, "
                          "as stored; tests/tools/check.py lists all such pairs")
        if self.fill:
            return augment(image, labels, self.size, self.fill)
        return rescale(image, min(self.size)), labels


def build_loaders(args, model, run):
    """Build the loaders of training and validation -> both, and the names of the classes. Process 0
    checks the labels first."""
    shared = args.num_classes, args.zero_is_class, model.img_size, args.out
    fill = [round(255 * value) for value in model.mean]
    train_set = SegmentationSet(args.data, "training", *shared, args.seed, fill)
    val_set = SegmentationSet(args.data, "validation", *shared)
    if run[0] == 0:
        check_labels(train_set)
        check_labels(val_set)
    loader = train_loader(train_set, args.batch_size, args.accum_steps, 16, args.workers, args.seed,
                          run)
    names = class_names(args.data, args.num_classes, args.zero_is_class)
    return loader, eval_loader(val_set, 1, args.workers, run), names    # images differ in size


# --------------------------------------------------------------------------------------------------
# Data: labels
# --------------------------------------------------------------------------------------------------
def read_numbers(path):
    """Read the numbers (H, W) int32 in a label file: a grey or palette image in a lossless format,
    whose transparency is dropped. Raises OSError."""
    try:
        image = Image.open(path)
        bands = image.split()
    except Exception as error:    # Pillow's plugins raise many kinds
        raise OSError(f"cannot read labels {path} ({type(error).__name__}: {error}): replace them "
                      "by a good copy; tests/tools/check.py lists all such files") from None
    if len(bands) > 2 or image.format not in ("PNG", "BMP", "TIFF"):
        raise OSError(f"labels {path} are {image.format} of mode {image.mode}: give a grey or "
                      "palette PNG of class numbers, since JPEG would change them")
    return np.asarray(bands[0], np.int32)    # of a palette image its indices


def read_labels(path, num_classes, zero_is_class=False):
    """Read the classes (H, W) uint8 in a label file. 255 becomes IGNORE. By default, as in ADE20K,
    0 does too, and 1 .. K become 0 .. K - 1; with zero_is_class, 0 .. K - 1 stay. Raises OSError
    for other numbers."""
    first = 1 - zero_is_class
    numbers = read_numbers(path)
    classes = np.where(numbers == IGNORE, -1, numbers - first)
    wrong = numbers[(classes >= num_classes) | (numbers < 0)]
    if wrong.size:
        raise OSError(f"labels {path} hold the number {wrong.max()}, which is no class: "
                      "check --num-classes and --zero-is-class; tests/tools/check.py shows all "
                      "numbers")
    return torch.from_numpy(classes.astype(np.uint8))    # -1 becomes IGNORE


def check_labels(dataset, enough=256):
    """Read `enough` evenly spaced label files of a SegmentationSet, and more until they show two
    classes; print how many classes they need. Raises InputError if the options do not fit them,
    OSError for a bad file."""
    ignored = {IGNORE} if dataset.zero_is_class else {0, IGNORE}
    numbers = set()
    step = math.ceil(len(dataset) / enough)
    for count, i in enumerate(sorted(range(len(dataset)), key=lambda i: i % step)):
        if count >= enough and len(numbers - ignored) > 1:
            break
        numbers.update(np.unique(read_numbers(dataset.label_file(i))).tolist())
    if len(numbers - ignored) < 2:
        raise InputError(f"the labels in {dataset.label_folder} hold {sorted(numbers)} alone, and "
                         "two classes are needed: 255 is ignored, and so is 0 without "
                         "--zero-is-class; for masks of 0 and 255 write 1 for 255 and give "
                         "--zero-is-class")
    needed = max(numbers - ignored) + dataset.zero_is_class
    text = f"{dataset.folder}: {len(dataset)} images; the label files that were read need " \
           f"--num-classes {needed}; given is {dataset.num_classes}"
    if needed > dataset.num_classes:
        raise InputError(f"{text}: check it and --zero-is-class; tests/tools/check.py shows all "
                         "numbers")
    if 0 in numbers & ignored and needed + 1 == dataset.num_classes:
        text += "; 0 is ignored: give --zero-is-class if it is a class"
    print(text)


def class_names(root, num_classes, zero_is_class):
    """Read the names of the classes from root/objectInfo150.txt, which comes with ADE20K, if it
    lists `num_classes` of them; else make names of the numbers in label files."""
    listed = Path(root, "objectInfo150.txt")
    rows = read_text(listed).splitlines() if listed.exists() else []
    rows = [row for row in rows if row.strip() and not row.startswith("Idx")]    # the header
    if len(rows) == num_classes:    # 5 columns, the last like "wall, panel"
        return [row.split("\t")[-1].split(",")[0] for row in rows]
    return [f"class {k + 1 - zero_is_class}" for k in range(num_classes)]


# --------------------------------------------------------------------------------------------------
# Evaluation: sliding windows and mean IoU
# --------------------------------------------------------------------------------------------------
def window_starts(length, window, stride):
    """List the first pixels of the windows that cover `length` pixels: 0, stride, 2 stride, ...;
    the last window ends where the pixels end."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


@torch.no_grad()
def sliding_logits(model, image, window, stride):
    """Compute class logits (K, H, W) of a normalised image (3, H, W) of any size, averaged over
    overlapping windows in one batch. window: (h, w) that the model is built for; stride: pixels
    between windows."""
    h, w = window
    H, W = image.shape[1:]
    image = F.pad(image, (0, max(0, w - W), 0, max(0, h - H)))
    places = [(..., slice(y, y + h), slice(x, x + w))
              for y in window_starts(H, h, stride) for x in window_starts(W, w, stride)]
    scores = model(torch.stack([image[place] for place in places]))              # (., K, h/s, w/s)
    scores = scores.contiguous()    # sums are slow where channels are last in memory
    total = image.new_zeros(scores.shape[1], *image.shape[1:])
    count = torch.zeros_like(image[0])
    for place, score in zip(places, scores):
        total[place] += F.interpolate(score[None], (h, w), mode="bilinear")[0]
        count[place] += 1
    return total.div_(count)[:, :H, :W]


def label_image(model, image, size):
    """Predict the classes (H, W) uint8, in the given size, of an image (3, ., .) uint8 by sliding
    windows."""
    window = model.img_size
    image = normalize(image[None], model.mean, model.std)[0]
    logits = sliding_logits(model, image, window, 2 * min(window) // 3)    # stride 341 of 512
    logits = F.interpolate(logits[None], size, mode="bilinear")[0]
    return logits.argmax(dim=0).byte()


def confusion_matrix(predicted, labels, num_classes):
    """Count the pixels of every (true, predicted) pair of classes -> (K, K) int64. Ignored pixels
    do not count."""
    labelled = labels != IGNORE
    cells = labels[labelled].long() * num_classes + predicted[labelled]
    return cells.bincount(minlength=num_classes ** 2).view(num_classes, num_classes)


def class_iou(confusion):
    """Compute the IoU of each class -> (K,): hits / pixels that are labelled or predicted as it,
    NaN for a class without such pixels."""
    hits = confusion.diagonal()
    return hits / (confusion.sum(dim=0) + confusion.sum(dim=1) - hits)


def summarize(confusion):
    """Compute scores in per cent from the confusion matrix of the whole set -> dict. The mean is
    over the classes that occur in labels or predictions; the IoU of the others is None."""
    confusion = confusion.cpu().double()
    iou = 100 * class_iou(confusion)
    return {"miou": iou.nanmean().item(),
            "pixel_accuracy": (100 * confusion.trace() / confusion.sum()).item(),
            "pixels": int(confusion.sum()),
            "iou": [None if math.isnan(v) else round(v, 2) for v in iou.tolist()]}


def evaluate(model, val_loader, classes, out, run):
    """Evaluate in float32, each image once for any number of processes -> dict of scores, which
    process 0 prints. It also draws its first images, with truth and prediction, into the folder
    `out`. classes: their names."""
    rank, world, device, _ = run
    model.eval()
    if world > 1:    # without SyncBatchNorm running statistics differ; those of process 0 are saved
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    counts = torch.zeros(len(classes), len(classes), dtype=torch.long, device=device)
    bar = tqdm(val_loader, "evaluation", leave=False, disable=rank > 0)
    for i, (images, labels) in enumerate(bar):
        predicted = label_image(model, images[0], labels.shape[1:])
        counts += confusion_matrix(predicted, labels[0], len(classes))
        if rank == 0 and i < 5:
            draw_overlay(f"{out}/input_truth_prediction_{i + 1}.png", classes,
                         images[0], labels[0], predicted)
    if world > 1:
        dist.all_reduce(counts)
    values = summarize(counts)
    if rank == 0:
        tqdm.write(f"mIoU {values['miou']:.2f}, pixel accuracy {values['pixel_accuracy']:.2f} on "
                   f"{values['pixels']} labelled pixels; windows of {model.img_size}, "
                   f"{'TF32' if device.type == 'cuda' else 'float32'}")
    return values


# --------------------------------------------------------------------------------------------------
# Pictures and predictions
# --------------------------------------------------------------------------------------------------
def class_colors(n):
    """Colours of n classes -> [(r, g, b)]."""
    return [ImageColor.getrgb(f"hsl({137.5 * k % 360}, 90%, {65 - 20 * (k % 2)}%)")
            for k in range(n)]


def draw_overlay(path, classes, picture, *maps):
    """Save a PNG of a picture (3, H, W) uint8 and, beside it, the same under each of its label maps
    (H, W), each of at most 480 pixels. Ignored pixels are not coloured. A legend at the right lists
    the names in `classes` that occur, as many as fit. Marks the folder as the output of a run."""
    shape = resized_shape(picture.shape[1:], 480, 480)
    picture = resize(picture.cpu(), shape)
    maps = [resize(Mask(labels.cpu()), shape) for labels in maps]    # nearest
    numbers = torch.arange(len(classes))[:, None, None]
    colors = class_colors(len(classes))
    overlays = [draw_segmentation_masks(picture, labels == numbers, 0.6, colors) for labels in maps]
    pixels = torch.cat([picture, *overlays], dim=2)
    sheet = to_pil_image(pad(pixels, [0, 0, 200, 480 - shape[0]]))    # right, below
    draw = ImageDraw.Draw(sheet)
    for line, k in enumerate(torch.cat(maps).unique().tolist()):
        if k != IGNORE:
            draw.text((pixels.shape[2] + 8, 20 * line), classes[k], colors[k], font_size=14)
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    Path(folder, ".lock").touch()    # `list_images` skips folders that hold it
    sheet.save(path)


def load_segmenter(path, img_size=None):
    """Load segmenter.pt or last.pt, for its own image size or another -> model, names of its
    classes, options of its training (dict). Raises InputError for a file of another script."""
    file = read_encoder(path)
    stored = file.content.get("args", {})
    if "zero_is_class" not in stored:
        raise InputError(f"{path} is no segmentation model: give segmenter.pt of segment.py")
    encoder, _ = load_model(RelativeVisionTransformer, file, img_size=img_size, block=ScaledBlock)
    model = SemanticFPN(encoder, stored["num_classes"])
    resized = encoder.state_dict(prefix="encoder.")    # its position tables fit img_size
    model.load_state_dict(file.content["model"] | resized)
    classes = (stored | file.content)["classes"]    # an option in older files
    return model.eval(), classes, stored


def use_segmenter(args):
    """Run --eval and --predict: score the model in --init, or label images."""
    rank, _, device, _ = run = init_distributed(args.device)
    model, classes, stored = load_segmenter(args.init, args.image_size)
    model.to(device)
    zero_is_class = stored["zero_is_class"]
    if args.eval:
        val_set = SegmentationSet(args.data or stored["data"], "validation", len(classes),
                                  zero_is_class, model.img_size, args.out)
        if rank == 0:
            check_labels(val_set)
        evaluate(model, eval_loader(val_set, 1, args.workers, run), classes, args.out, run)
    if args.predict:
        predict(model, classes, zero_is_class, args.predict, args.out, device)


def predict(model, classes, zero_is_class, path, out, device):
    """Label an image, or every image below a folder but outside `out`, into out/predict:
    NAME_labels.png, a palette image with the numbers of label files, and NAME_overlay.png. classes:
    their names. Raises OSError for an unreadable file."""
    root = Path(path)
    folder, files = root.parent, [root]
    if root.is_dir():
        folder, files = root, list_images(root, out)
    first = 1 - zero_is_class
    palette = sum(class_colors(len(classes)), (0, 0, 0) * first)
    for file in files:
        image = pil_to_tensor(open_image(file))
        small = rescale(image, min(model.img_size))    # full-size logits need too much memory
        labels = label_image(model, small.to(device), small.shape[1:]).cpu()
        labels = resize(Mask(labels), image.shape[1:])    # nearest
        target = Path(out, "predict", Path(file).relative_to(folder)).with_suffix("")
        draw_overlay(f"{target}_overlay.png", classes, image, labels)
        numbers = to_pil_image(labels + first)
        numbers.putpalette(palette)
        numbers.save(f"{target}_labels.png")
        print(f"{target}_labels.png, {target}_overlay.png")


# --------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's
# --------------------------------------------------------------------------------------------------
USED = "eval predict init out image_size device data workers"    # by --eval and --predict


def parse_args(argv=None):
    """Parse the command line, or the list `argv`."""
    parser = Parser(__doc__)
    add = parser.group("model and classes; --eval and --predict take the file's")
    add("--model", help="encoder; default: that of --init, else the paper's vit_tiny (12 heads)")
    add("--init",
        help="encoder to start from (README, 'Checkpoints'; default: random weights); with --eval "
             "or --predict, the segmenter (default: segmenter.pt in --out)")
    add("--patch-size", low=1,
        help="side of a ViT patch in pixels; default: that of --init, else of --model")
    add("--drop-path", type=float, low=0, high=1, default=0.1,
        help="drop path rate of the last block; the rates grow linearly from 0; paper: 0.1")

    add = parser.group("data")
    add("--data",
        help="folder that holds images and annotations, each with training and validation; "
             "default: data/ADEChallengeData2016, with --eval that of the model's training")
    add("--num-classes", low=2, high=254, default=150,
        help="number K of classes; label files hold 1 .. K, and 0 or 255 for ignored pixels")
    add("--zero-is-class", action="store_true",
        help="label files hold 0 .. K - 1, and 255 for ignored pixels")
    parser.pixel_options(add, "the paper's 512 for crops and windows, or 512/224 of a smaller "
                              "--init; with --eval, --predict that of the file")

    add = parser.group("recipe (Sec. 'transfer', ADE20K)")
    add("--iters", low=1, default=160_000,
        help="optimizer steps, which this recipe counts instead of epochs; paper: 160000")
    add("--warmup-iters", low=0,
        help="steps of linear warm-up from a millionth of --lr; default: the paper's 1500, scaled "
             "with --iters")
    add("--lr", type=float, low=0, default=1e-4,
        help="peak rate of pyramid and head at any --batch-size; decays linearly to 0; paper: 1e-4")
    add("--layer-decay", type=float, low=0, high=1, default=0.8,
        help="factor on the rate for each block towards the input; paper: 0.8")

    add = parser.group("evaluation (by default every 13 epochs, the paper's 16,000 iterations)")
    add("--eval", action="store_true", help="score a checkpoint instead of training")
    add("--predict", metavar="PATH", help="label an image, or all images below a folder")

    add = parser.run_options("out/segment", batch_size=16, eval_every=13)
    add("--compile", action="store_true", help="apply torch.compile to the model in training")
    parser.set_defaults(**RECIPE)
    args = parser.parse_args(argv)
    if args.eval or args.predict:
        parser.check_unread(args, "a trained model", USED)
    return args


def resolve(args):
    """Fill in the defaults that depend on other options. Raises InputError if the warm-up is not
    shorter than the run."""
    if args.eval or args.predict:
        args.init = args.init or f"{args.out}/segmenter.pt"
        return args
    args.data = args.data or "data/ADEChallengeData2016"
    if args.warmup_iters is None:
        args.warmup_iters = args.iters * 1500 // 160_000
    if args.warmup_iters >= args.iters:
        raise InputError(f"--warmup-iters must be fewer than --iters {args.iters}")
    return args


def main(args):
    """Train, or run --eval or --predict."""
    args = resolve(args)
    if args.eval or args.predict:
        use_segmenter(args)
    else:
        train(args)


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
