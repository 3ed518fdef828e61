r"""Fine-tuning and transfer of a pre-trained encoder to image classification (Sec. "experiments").

    torchrun --nproc_per_node=8 finetune.py --data data/imagenet --init out/pretrain/encoder.pt
    torchrun --nproc_per_node=8 finetune.py --data data/imagenet --init encoder.pt --rpe \
        --epochs 1000 --out out/rpe
    torchrun --nproc_per_node=2 finetune.py --recipe cifar --data data/cifar100 --init encoder.pt
    python finetune.py --data my_pictures --init encoder.pt --shots 10 --batch-size 32
    python finetune.py --data data/imagenet --init encoder.pt --keep-blocks 6 \
        --data-fraction 0.1 --seed 1 --out out/fig4/6-1               # one point of Fig. 4
    python finetune.py --eval --data data/imagenet --init mae_finetuned_vit_base.pth
    python finetune.py --predict cat.jpg my_folder          # with the classifier of out/finetune
    python tests/tools/demo.py finetune                               # needs no files

The classifier is head(fc_norm(mean patch token)). Its encoder starts from --init, whole or up to a
given block, or from random weights; its head always starts from random weights. A recipe is one
dict of RECIPES; `--recipe mae mixup=0 erasing=0` overrides entries of it. Read RECIPES, then
`train`.

Shapes: B images, K classes, H x W pixels.

NOTES, details that the paper does not give, and departures from the authors' code:
1. Crops, flips and RandAugment depend on (seed, epoch, image); mixing, erasing and stochastic depth
   on (seed, epoch, process), and images are mixed within a micro-batch. The number of workers has
   no effect. A killed run finishes with bit-identical weights on the same number of CPU threads, or
   on GPUs of one kind with deterministic kernels.
2. Every test image counts once for any number of processes. The authors' code repeats some to fill
   a batch, and evaluates every 10 epochs.
3. Evaluation runs in float32, as the authors' does. GPUs from Ampere on multiply float32 matrices
   in TensorFloat-32.
4. No epoch is selected on the test images: classifier.pt holds the last one.
5. Mixup, CutMix and the rectangles of random erasing are torchvision's. A batch is mixed with
   itself shifted by one image (timm reverses it), and CutMix rounds its rectangle differently.
6. The final norm is loaded from supervised files alone, as in the authors' DeiT rows. After
   pre-training it starts as the identity.
7. Untrained weights, including blocks that --keep-blocks leaves out, use MAE's initialisation
   (Xavier uniform, a head of std 2e-5). The authors' code uses timm's (truncated normal of std
   0.02, the head too). With --rpe both follow BEiT, here with a head of std 2e-5.
8. With --rpe, the qkv biases of --init are loaded. The authors' model has a q_bias and a v_bias in
   their place, so it does not find those of a plain MAE file and starts them at zero. Its k has no
   bias, which changes nothing, since the softmax cancels a bias of k.
9. Images need not be square: a random crop has a ratio of 3/4 .. 4/3 times width / height, and a
   test image is resized to cover 256/224 of both sides.
10. The authors publish epochs, warm-up and rate for CIFAR-100, and one rate for the other small
    data sets. The other entries of "flowers" and "small" are chosen here, in the proportions of
    CIFAR-100's.
"""
import argparse
import math
import os
from bisect import bisect_left
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW
from torchvision.transforms import RandomErasing, v2
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, to_pil_image
from tqdm import tqdm

from models import (ImageDataset, InputError, Parser, bounded, build_model, eval_loader,
                    init_distributed, list_images, load_encoder, log, mix_seed, normalize,
                    open_image, param_groups, plain_errors, random_crop, read_encoder, resume, save,
                    train_loader)

BICUBIC = Image.Resampling.BICUBIC
IMPROVED = dict(    # the paper's (finetuning_exp.py): light augmentation suits a small model
    epochs=300, warmup_epochs=5.0, batch_size=1024, base_lr=1e-3, clip_grad=0.0,    # have options
    optimizer="adamw", min_lr=1e-6, weight_decay=0.05,
    layer_decay=0.85,     # block k of n trains at lr * decay^(n + 1 - k), the embedding as k = 0
    drop_path=0.0,        # stochastic depth of the last block; grows linearly from 0
    smoothing=0.0,        # of labels
    mixup=0.2,            # alpha of Beta(alpha, alpha)
    cutmix=0.0,           # the same; if both are above 0, each batch draws one of them
    rand_augment=10.0,    # mean level in 0 .. 10 (in torchvision 0 .. 30)
    erasing=0.0,          # probability of random erasing
    min_crop=0.08)        # smallest area of a crop
CIFAR = dict(             # transfer: crops and flips alone
    IMPROVED, epochs=50, warmup_epochs=10.0, batch_size=512, optimizer="sgd", base_lr=0.05,
    weight_decay=0.0, layer_decay=0.75, clip_grad=1.0, mixup=0.0, rand_augment=0.0)
RECIPES = {
    "improved": IMPROVED,
    "mae": dict(          # MAE's, which was made for large models (finetuning_mae_exp.py)
        IMPROVED, epochs=100, drop_path=0.1, smoothing=0.1, mixup=0.8, cutmix=1.0,
        rand_augment=9.0, erasing=0.25),
    "cifar": CIFAR,
    "flowers": dict(CIFAR, epochs=150, warmup_epochs=30.0, base_lr=0.015),
    "small": dict(CIFAR, epochs=100, warmup_epochs=20.0, base_lr=0.015),    # pets, aircraft, cars
}


# --------------------------------------------------------------------------------------------------
# Method: augmentation
# --------------------------------------------------------------------------------------------------
def affine(image, fill, shear_x=0, shift_x=0, shear_y=0, shift_y=0):
    """Move pixels of a Pillow image: that at (x, y) comes from (x + shear_x y + shift_x,
    shear_y x + y + shift_y)."""
    coefficients = (1, shear_x, shift_x, shear_y, 1, shift_y)
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, BICUBIC,
                           fillcolor=fill)


def enhance(kind):
    """Make an operation of a class of ImageEnhance; its factor is 0.1 .. 1.9, and 1 at level 0."""
    return lambda x, m, f: kind(x).enhance(1 + 0.09 * m)


RAND_AUGMENT = {    # (RGB image x, level m in -10 .. 10, fill colour f) -> image
    "AutoContrast": lambda x, m, f: ImageOps.autocontrast(x),
    "Equalize": lambda x, m, f: ImageOps.equalize(x),
    "Invert": lambda x, m, f: ImageOps.invert(x),
    "Rotate": lambda x, m, f: x.rotate(3 * m, BICUBIC, fillcolor=f),               # degrees
    "Posterize": lambda x, m, f: x.point(    # of 8 bits the upper 4 - 0.4 |m| stay
        lambda value: value & (256 - 2 ** (4 + int(0.4 * abs(m))))),
    "Solarize": lambda x, m, f: ImageOps.solarize(x, 256 - int(25.6 * abs(m))),    # threshold
    "SolarizeAdd": lambda x, m, f: x.point(
        lambda value: min(255, value + int(11 * abs(m))) if value < 128 else value),
    "Color": enhance(ImageEnhance.Color),
    "Contrast": enhance(ImageEnhance.Contrast),
    "Brightness": enhance(ImageEnhance.Brightness),
    "Sharpness": enhance(ImageEnhance.Sharpness),
    "ShearX": lambda x, m, f: affine(x, f, shear_x=0.03 * m),
    "ShearY": lambda x, m, f: affine(x, f, shear_y=0.03 * m),
    "TranslateX": lambda x, m, f: affine(x, f, shift_x=0.045 * m * x.width),
    "TranslateY": lambda x, m, f: affine(x, f, shift_y=0.045 * m * x.height),
}


def rand_augment(image, magnitude, fill):
    """Apply RandAugment to a Pillow RGB image, as timm's "rand-m{magnitude}-mstd0.5-inc1" does.

    Two operations are drawn with replacement. Each is applied with probability 1/2, at a level
    ~ N(magnitude, 0.5) clipped to [0, 10] and of random sign; 10 is the strongest. Pixels that it
    uncovers get the colour `fill`.
    """
    operations = list(RAND_AUGMENT.values())
    for _ in range(2):
        operation = operations[torch.randint(len(operations), ())]
        level = (magnitude + 0.5 * torch.randn(())).clamp(0, 10).item()
        sign = 1 if torch.rand(()) < 0.5 else -1
        if torch.rand(()) < 0.5:
            image = operation(image, sign * level, fill)
    return image


def random_erasing(images, probability):
    """Fill a random rectangle of some images with normal noise, in place (arXiv 1708.04896, the
    "pixel" mode of timm). images: (B, 3, H, W), normalised. Does not synchronise with the device.
    """
    for image in images:
        if torch.rand(()) < probability:
            top, left, h, w, _ = RandomErasing.get_params(
                image, (0.02, 1 / 3), (0.3, 1 / 0.3), [0.0])    # area, aspect, unused value
            image[:, top:top + h, left:left + w].normal_()


def build_mixing(mixup, cutmix, classes):
    """Build Mixup (arXiv 1710.09412) or CutMix (1905.04899) of the given alphas -> a function of
    images (B, 3, H, W) and labels (B,) that returns images and targets (B, K). If both alphas are
    above 0, each batch draws one of the two; if neither is, images and labels pass through."""
    kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    choices = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(choices or [v2.Identity()])


# --------------------------------------------------------------------------------------------------
# Method: model and optimizer
# --------------------------------------------------------------------------------------------------
def build_classifier(args, classes):
    """Build the classifier of the options, with the encoder of --init if given. classes: their
    number. Raises InputError for options that do not fit the model."""
    file = read_encoder(args.init)
    model = build_model(args.model, file, mean=args.mean, std=args.std, img_size=args.image_size,
                        patch_size=args.patch_size, num_classes=classes, drop_path=args.drop_path,
                        rel_pos_bias=args.rpe)
    keep = args.keep_blocks
    if keep is not None and not (file and keep <= model.depth):
        raise InputError(f"--keep-blocks {keep} keeps blocks of a pre-trained encoder: give --init "
                         f"FILE, of {keep} blocks or more")
    if args.rpe:
        init_beit(model)
    if file:
        load_encoder(model, file, keep)
    return model


def init_beit(model):
    """Initialise all matrices but the head's as BEiT does (arXiv 2106.08254), and so the authors'
    models with relative position bias: truncated normal of std 0.02, in attn.proj and mlp.fc2 of
    block k divided by sqrt(2 k)."""
    for name, p in model.named_parameters():
        if p.dim() > 1 and name.endswith("weight") and name != "head.weight":
            std = 0.02
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                std /= math.sqrt(2 + 2 * int(name.split(".")[1]))    # names count from 0
            nn.init.trunc_normal_(p, std=std)


def build_optimizer(model, args, lr):
    """Build AdamW or SGD over one or two groups per layer, whose rate is lr * lr_scale."""
    groups = param_groups(model, args.weight_decay, args.layer_decay, model.depth)
    if args.optimizer == "adamw":
        return AdamW(groups, lr, fused=True)    # betas 0.9 and 0.999
    return SGD(groups, lr, momentum=0.9, nesterov=True)    # in fp16 the scaler syncs once a step


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def train(args):
    """Train, resuming from args.out/last.pt if it exists, and save args.out/classifier.pt."""
    rank, world, device, dtype = run = init_distributed(args.device, args.dtype)
    torch.manual_seed(args.seed)
    *train_items, classes = list_split(args.data, "train", args.out)
    model = build_classifier(args, len(classes)).to(device)
    mixing = build_mixing(args.mixup, args.cutmix, len(classes))
    loader, test_loader = build_loaders(args, model, train_items, classes, run)
    accum_steps = loader.sampler.accum_steps
    steps = len(loader) // accum_steps    # optimizer steps per epoch
    peak_lr = args.base_lr * loader.sampler.total_batch / 256
    optimizer = build_optimizer(model, args, peak_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    data = dict(train_images=len(loader.dataset), classes=classes)    # compared on resuming
    first_epoch = resume(args, run, steps, model, optimizer, scaler, **data)
    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = DistributedDataParallel(network)

    for epoch in range(first_epoch, args.epochs):
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(mix_seed(args.seed, epoch, rank))    # of mixing, erasing and drop path
        network.train()
        bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", disable=rank > 0)
        for i, (images, labels) in enumerate(bar):
            step = epoch * steps + i // accum_steps
            update = (i + 1) % accum_steps == 0
            images = normalize(images, model.mean, model.std)
            random_erasing(images, args.erasing)
            images, targets = mixing(images, labels)
            network.require_backward_grad_sync = update    # DistributedDataParallel reads it
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = network(images)                                        # (B, K)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
            scaler.scale(loss / accum_steps).backward()
            mean_loss = (mean_loss if i % accum_steps else 0) + loss.detach() / accum_steps
            if not update:
                continue

            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            lr = lr_at(step, args.epochs * steps, args.warmup_epochs * steps, peak_lr, args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            if step % args.log_every == 0:    # the only device-to-host sync
                values = log(args, rank, world, epoch=epoch + 1, step=step, lr=lr,
                             grad_norm=grad_norm, loss=mean_loss)
                bar.set_postfix(loss=f"{values['loss']:.4f}")

        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            log(args, rank, world, epoch=epoch + 1, step=(epoch + 1) * steps,
                **evaluate(model, test_loader, len(classes), run))
        save(args, rank, "last.pt", model, epoch=epoch + 1, **data,
             optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    save(args, rank, "classifier.pt", model, epoch=args.epochs, **data)


def lr_at(step, total, warmup, lr, min_lr):
    """Compute the learning rate of a step (from 0) of `total`: linear warm-up from 0, then half a
    cosine from lr to min_lr. warmup: steps, fewer than `total`."""
    if step < warmup:
        return lr * step / warmup
    done = (step - warmup) / (total - warmup)
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * done))


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
def centre_crop(image, size):
    """Make the authors' test image: resize a Pillow RGB image bicubically to cover `size` (h, w) /
    0.875, which is 256 for 224, and crop the centre -> (3, h, w) uint8."""
    h, w = (int(side / 0.875) for side in size)
    width = max(w, int(h * image.width / image.height))     # one of the two sides fits exactly
    height = max(h, int(w * image.height / image.width))
    return pil_to_tensor(center_crop(image.resize((width, height), BICUBIC), size))


def augment(image, size, min_crop, magnitude, fill):
    """Augment a Pillow RGB image by a random crop and RandAugment -> (3, h, w) uint8. size: (h, w);
    min_crop: smallest share of the area of a crop; magnitude: of RandAugment, 0 for none; fill:
    colour of the pixels that it uncovers."""
    pixels = random_crop(image, size, (min_crop, 1))
    if magnitude:
        image = rand_augment(to_pil_image(pixels), magnitude, fill)
        pixels = pil_to_tensor(image)
    return pixels


class LabelledImages(ImageDataset):
    """Item (epoch, index) -> image (3, h, w) uint8, label. All randomness comes from (seed, epoch,
    index). labels: (n,) int64. prepare: function of a Pillow RGB image that returns the pixels,
    `centre_crop` or `augment` of a size."""

    def __init__(self, files, labels, prepare, seed=0):
        super().__init__(files, seed)
        self.labels = labels
        self.prepare = prepare

    def transform(self, image, index):
        return self.prepare(image), self.labels[index].item()


def build_loaders(args, model, train_items, classes, run):
    """Build the loaders of the training images that --shots and --data-fraction leave, and of the
    test images. train_items, classes: of `list_split`. Raises InputError."""
    files, labels = train_items
    *test_items, _ = list_split(args.data, "val", args.out, classes)
    kept = select(labels, args.data_fraction, args.shots, args.seed)
    fill = tuple(round(255 * value) for value in model.mean)
    prepare = partial(augment, size=model.img_size, min_crop=args.min_crop,
                      magnitude=args.rand_augment, fill=fill)
    train_set = LabelledImages(files[kept], labels[kept], prepare, args.seed)
    loader = train_loader(train_set, args.batch_size, args.accum_steps, 256, args.workers,
                          args.seed, run)
    test_set = LabelledImages(*test_items, partial(centre_crop, size=model.img_size))
    return loader, eval_loader(test_set, 128, args.workers, run)


def list_split(root, split, out, expected=None):
    """List the images root/split/CLASS/... -> files, labels (n,) int64, sorted names of classes.
    Nothing below `out` is data. Raises InputError, also if the names are not `expected`, those of
    the training set."""
    root = Path(root).resolve()
    folder = root / split
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in root.glob("*"))[:8])
        raise InputError(f"--data {root} has no folder {split}: it must hold train/CLASS/ and "
                         f"val/CLASS/, and holds {found or 'nothing'}")
    files = list_images(folder, out)
    start = len(str(folder)) + 1
    try:
        names = [file[start:file.index(os.sep, start)] for file in files]
    except ValueError:
        raise InputError(f"{folder} holds images outside of class folders: it must hold CLASS/* "
                         "(valprep.sh moves those of ImageNet's val)") from None
    classes = sorted(set(names))    # a label is an index into this list
    if len(classes) == 1:
        raise InputError(f"{folder} has one class, {classes[0]}: its folders are the classes; if "
                         f"those of {folder / classes[0]} are meant, move them up")
    if expected and classes != expected:
        alone = sorted(set(classes) ^ set(expected))
        raise InputError(f"{folder} has {len(classes)} classes, the training set {len(expected)}, "
                         f"and not the same: only one of them has {', '.join(alone[:5])}")
    labels = torch.tensor([bisect_left(classes, name) for name in names])
    return files, labels, classes


def select(labels, fraction, shots, seed):
    """Keep a fraction of each class's items, at least one and at most `shots` -> sorted indices.
    Smaller subsets are parts of larger ones. labels: (n,) int64."""
    kept = []
    members = labels.argsort(stable=True).split(labels.bincount().tolist())    # of each class
    for label, indices in enumerate(members):
        generator = torch.Generator().manual_seed(mix_seed(seed, label))
        order = torch.randperm(len(indices), generator=generator)
        share = max(1, round(fraction * len(indices)))
        kept.append(indices[order[:share][:shots]])
    return torch.cat(kept).sort().values


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, test_loader, classes, run):
    """Evaluate in float32, each test image once for any number of processes -> dict of accuracies
    in % and the loss, which process 0 prints. classes: their number."""
    rank, world, device, _ = run
    model.eval()
    sums = torch.zeros(classes, 4, device=device)    # images, right, in five, loss
    for images, labels in tqdm(test_loader, "evaluation", leave=False, disable=rank > 0):
        logits = model(normalize(images, model.mean, model.std))                # (B, K)
        hits = logits.topk(min(5, classes)).indices == labels[:, None]          # (B, 5), best first
        loss = F.cross_entropy(logits, labels, reduction="none")
        row = torch.stack([torch.ones_like(loss), hits[:, 0], hits.any(dim=1), loss], dim=1)
        sums.index_add_(0, labels, row)
    if world > 1:
        dist.all_reduce(sums)
    n, right, in_five, loss = sums.sum(dim=0).tolist()
    of_class = 100 * sums[:, 1] / sums[:, 0]                # NaN for a class without images
    values = dict(top1=100 * right / n, top5=100 * in_five / n, val_loss=loss / n,
                  mean_class=of_class.nanmean().item(), test_images=int(n))
    if rank == 0:
        tqdm.write("top-1 {top1:.2f}, top-5 {top5:.2f}, mean over classes {mean_class:.2f}, loss "
                   "{val_loss:.4f} on {test_images} images ".format(**values)
                   + f"of {model.img_size}, {'TF32' if device.type == 'cuda' else 'float32'}")
    return values


def load_classifier(file, name=None, **options):
    """Load a classifier of any publisher whose head reads the mean patch token -> model, number of
    its classes. file: see `read_encoder`; name, options: see `build_model`. Raises InputError."""
    head = {k: v for k, v in file.others.items() if k.startswith("head.")}
    if not (head and file.pooled):
        raise InputError(f"checkpoint {file.path} holds no head over the mean patch token (without "
                         "fc_norm, a head reads the class token): fine-tune it to get one")
    classes = len(next(iter(head.values())))
    model = build_model(name, file, num_classes=classes, **options)
    file.state.update(head)    # loaded with the encoder
    lacking = model.state_dict().keys() - load_encoder(model, file)
    if lacking:
        raise InputError(f"checkpoint {file.path} is an incomplete classifier: it lacks "
                         f"{', '.join(lacking)}")
    return model.eval(), classes


def use_classifier(args):
    """Run --eval and --predict: score the classifier in --init, or in --out, and print its
    predictions."""
    _, _, device, _ = run = init_distributed(args.device)
    file = read_encoder(args.init or f"{args.out}/classifier.pt")
    model, classes = load_classifier(file, args.model, mean=args.mean, std=args.std,
                                     img_size=args.image_size)
    model.to(device)
    stored = file.content
    if isinstance(stored.get("args"), dict):    # MAE's files hold a Namespace
        stored = stored["args"] | stored
    names = stored.get("classes")    # None in files of other publishers
    if args.eval or args.data:
        root = args.data or stored.get("data", "data/imagenet")
        files, labels, names = list_split(root, "val", args.out, names)
        if len(names) != classes:
            raise InputError(f"{file.path} has {classes} classes, but {root} has {len(names)} "
                             "folders in val: give the data set that it was trained on")
    if args.eval:
        test_set = LabelledImages(files, labels, partial(centre_crop, size=model.img_size))
        evaluate(model, eval_loader(test_set, 128, args.workers, run), classes, run)
    if args.predict:
        predict(model, names or [f"class {k}" for k in range(classes)], args.predict, device)


@torch.no_grad()
def predict(model, classes, paths, device):
    """Print the five likeliest classes of each image file, and of each image in a folder, with
    their probabilities. classes: their names. Raises OSError for an unreadable file."""
    for path in paths:
        for file in list_images(path) if Path(path).is_dir() else [path]:
            pixels = centre_crop(open_image(file), model.img_size)[None]
            logits = model(normalize(pixels.to(device), model.mean, model.std))[0]
            top = logits.softmax(0).topk(min(5, len(classes)))
            print(f"{file}: " + ", ".join(f"{classes[k]} {100 * p:.1f}%" for p, k in zip(*top)))


# --------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's recipes
# --------------------------------------------------------------------------------------------------
LARGEST = dict(layer_decay=1, drop_path=1, smoothing=1, rand_augment=10, erasing=1, min_crop=1)
USED = "eval predict init out model image_size mean std device data workers"    # with --eval


def recipe_word(text):
    """An argparse type: the name of a recipe, or KEY=VALUE for an entry of it -> (key, value)."""
    if text in RECIPES:
        return "recipe", text
    key, _, value = text.partition("=")
    kind = type(IMPROVED.get(key))
    if kind is str and value in ("adamw", "sgd"):
        return key, value
    if kind not in (int, float):
        raise argparse.ArgumentTypeError(f"{text} is neither a recipe ({', '.join(RECIPES)}) nor "
                                         "KEY=VALUE for an entry of IMPROVED in finetune.py; the "
                                         "optimizer is adamw or sgd")
    return key, bounded(kind, int(kind is int), LARGEST.get(key, math.inf))(value)


def parse_args(argv=None):
    """Parse the command line, or the list `argv`."""
    parser = Parser(__doc__)
    add = parser.group("model")
    add("--init",
        help="encoder to start from (README, 'Checkpoints'; default: random weights); with --eval "
             "or --predict, the classifier (default: classifier.pt in --out)")
    add("--keep-blocks", low=0,
        help="load only the embedding and the first KEEP_BLOCKS blocks of --init (Fig. 4)")
    add("--model", help="encoder; default: that of --init, else the paper's vit_tiny (12 heads); "
                        "for small images vit_nano (1.4M parameters), vit_pico (0.4M)")
    add("--rpe", action="store_true",
        help="add a relative position bias to every block, zero at first; one in --init is loaded, "
             "also without this option")
    add("--patch-size", low=1,
        help="side of a ViT patch in pixels; default: that of --init, else of --model")

    add = parser.group("data")
    add("--data",
        help="folder that holds train/CLASS/ and val/CLASS/ (tests/tools/datasets.py writes some); "
             "default: data/imagenet, with --eval that of the classifier's training")
    add("--data-fraction", type=float, low=0, high=1, default=1.0,
        help="share of each class's training images (Fig. 4)")
    add("--shots", low=1, help="largest number of training images per class; default: all")
    parser.pixel_options(add)

    add = parser.group("recipe; these options override its entries")
    add("--recipe", type=recipe_word, nargs="+",
        help="improved, mae, cifar, flowers or small (pets, aircraft, cars), then KEY=VALUE for "
             "entries to override; default: improved")
    add("--epochs", low=1, help="passes over the data; paper: improved 300 (1000 with --rpe), mae "
                                  "100, cifar 50")
    add("--warmup-epochs", type=float, low=0,
        help="epochs of linear warm-up from 0; default: the recipe's, fewer in shorter runs")
    add("--base-lr", type=float, low=0,
        help="peak rate per 256 images: lr = base_lr * batch_size / 256; paper: 1e-3, cifar 0.05")

    add = parser.group("evaluation")
    add("--eval", action="store_true", help="score a classifier instead of training")
    add("--predict", nargs="+", metavar="PATH",
        help="print the likeliest classes of images, or of all images below folders; if the file "
             "stores no class names, --data supplies those of its folders")

    add = parser.run_options("out/finetune", batch_size=None, eval_every=1, clip_grad=None)
    add("--compile", action="store_true", help="apply torch.compile to the model in training")
    args = parser.parse_args(argv)
    recipes = [value for key, value in args.recipe or [] if key == "recipe"]
    if len(recipes) > 1:
        parser.error(f"--recipe takes one recipe, not {' and '.join(recipes)}")
    if args.eval or args.predict:
        parser.check_unread(args, "a trained classifier", USED)
    return args


def resolve(args):
    """Fill in the recipe and the defaults that depend on other options. Raises InputError if the
    warm-up is not shorter than the run."""
    args.data = args.data or "data/imagenet"
    changes = dict(args.recipe or [])    # pairs of `recipe_word`
    recipe = dict(RECIPES[changes.setdefault("recipe", "improved")])
    changes |= {k: v for k, v in vars(args).items() if k in recipe and v is not None}
    if "epochs" in changes:    # a shorter run warms up less, a longer one as long
        recipe["warmup_epochs"] *= min(1, changes["epochs"] / recipe["epochs"])
    vars(args).update(recipe | changes)
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup-epochs must be fewer than --epochs {args.epochs}")
    return args


def main(args):
    """Train, or run --eval or --predict."""
    if args.eval or args.predict:
        use_classifier(args)
    else:
        train(resolve(args))


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
