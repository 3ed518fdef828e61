r"""Fine-tuning and transfer of a pre-trained encoder to image classification (Sec. "experiments").

    torchrun --nproc_per_node=8 finetune.py --data data/imagenet --init out/pretrain/encoder.pt
    torchrun --nproc_per_node=8 finetune.py --data data/imagenet --init encoder.pt --rpe \
        --epochs 1000
    torchrun --nproc_per_node=2 finetune.py --recipe transfer --dataset cifar100 --download \
        --init encoder.pt
    python finetune.py --data my_pictures --init encoder.pt --shots 10 --batch-size 32
    python finetune.py --data data/imagenet --init encoder.pt --sweep-keep-blocks 0 3 6 9 12 \
        --data-fraction 0.1 1 --seed 0 1 2                                  # Fig. 4
    python finetune.py --init out/finetune/best.pt --predict cat.jpg dog.jpg
    python finetune.py --demo                                               # needs no files

A recipe is one dict of RECIPES; `--recipe mae mixup=0 erasing=0` changes some of its entries. The
classifier is head(fc_norm(mean patch token)). Norm and head always start fresh, the encoder from
--init, whole or up to one of its blocks; without --init everything starts fresh. Read RECIPES, then
`train`.

Shapes: B images, K classes, H x W pixels.

NOTES, departures from the authors' code:
- Crops, flips and RandAugment are a function of (seed, epoch, image), mixing and erasing one of
  (seed, step, process): a run does not depend on its workers, and resumes as if never interrupted.
- Every test image is counted once at any number of processes; theirs repeat some to fill a batch.
- Mixup, CutMix and the rectangles of random erasing are torchvision's: a batch mixes with itself
  shifted by one image (timm: reversed), and CutMix rounds its rectangle another way.
- A JPEG is decoded at reduced size where a crop would be reduced by as much anyway.
- A plain ViT without --init has MAE's initial weights (Xavier, a head of std 2e-5); theirs has
  timm's (truncated normal of std 0.02, the head too). With --rpe both follow BEiT.
- --rpe takes the qkv biases of --init; the authors' model has q and v biases of its own, which
  start at zero.
- Transfer: the authors give epochs, warm-up and rate of CIFAR-100 alone, and one rate for the other
  sets; the rest of the entries of DATASETS is chosen here, in the proportions of CIFAR-100.
"""
import argparse
import datetime
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
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset, DistributedSampler
from torchvision import datasets
from torchvision.transforms import RandomErasing, v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from models import (IMAGENET_MEAN, IMAGENET_STD, MODELS, READ_ERRORS, TOY_CLASSES, InputError,
                    add_run_options, average_over_processes, check_readable, check_step,
                    choose_device, choose_dtype, depth_of, endless_batches, fingerprint,
                    infer_model, load_encoder, load_state, log_line, mix_seed, normalize, number,
                    open_item, own_batches, parallel, param_groups, plain, plain_errors,
                    print_comparison, random_crop, read_file, read_or_next, resume, save_checkpoint,
                    start_log, to_tensor, toy_picture)

BICUBIC = Image.Resampling.BICUBIC
IMPROVED = dict(    # the paper's: light augmentation suits a small model
    epochs=300, warmup_epochs=5, batch_size=1024, optimizer="adamw",
    base_lr=1e-3, min_lr=1e-6, weight_decay=0.05, layer_decay=0.85, clip_grad=0.0,
    drop_path=0.0, smoothing=0.0, mixup=0.2, cutmix=0.0,
    rand_augment=10.0, erasing=0.0, min_crop=0.08)
RECIPES = {    # the other two as far as they differ
    "improved": IMPROVED,
    "mae": dict(         # that of MAE, made for large models
        IMPROVED, epochs=100, drop_path=0.1, smoothing=0.1, mixup=0.8, cutmix=1.0,
        rand_augment=9.0, erasing=0.25),
    "transfer": dict(    # other data sets: crop and flip alone; DATASETS has entries of its own
        IMPROVED, epochs=50, warmup_epochs=10, batch_size=512, optimizer="sgd",
        base_lr=0.05, weight_decay=0.0, layer_decay=0.75, clip_grad=1.0,
        mixup=0.0, rand_augment=0.0),
}
RANGES = dict(    # of the entries that --recipe NAME KEY=VALUE changes; the others are options
    min_lr="[0, inf)", weight_decay="[0, inf)",
    layer_decay="(0, 1]",     # block k of n trains at lr * decay^(n + 1 - k), embeddings as k = 0
    drop_path="[0, 1)",       # stochastic depth of the last block
    smoothing="[0, 1)",       # of labels
    mixup="[0, inf)",         # alpha of Beta(alpha, alpha); with both, each batch takes one
    cutmix="[0, inf)",
    rand_augment="[0, 10]",   # mean level; torchvision counts to 30
    erasing="[0, 1]",         # probability
    min_crop="(0, 1]",        # smallest area of a crop
)
# make: torchvision's class; train, test: its arguments, a dict for each part of the split; fields:
# its attributes with pictures and labels; recipe: entries of "transfer" that differ from CIFAR's.
CIFAR = dict(train=[dict(train=True)], test=[dict(train=False)], fields=("data", "targets"))
SMALL = dict(train=[dict(split="trainval")], test=[dict(split="test")],
             recipe=dict(epochs=100, warmup_epochs=20, base_lr=0.015))
DATASETS = {
    "folder": {},
    "imagenet": {},
    "toy": {},
    "cifar10": dict(CIFAR, make=datasets.CIFAR10),
    "cifar100": dict(CIFAR, make=datasets.CIFAR100),
    "flowers": dict(SMALL, make=datasets.Flowers102, fields=("_image_files", "_labels"),
                    train=[dict(split="train"), dict(split="val")],
                    recipe=dict(epochs=150, warmup_epochs=30, base_lr=0.015)),
    "pets": dict(SMALL, make=datasets.OxfordIIITPet, fields=("_images", "_labels")),
    "aircraft": dict(SMALL, make=datasets.FGVCAircraft, fields=("_image_files", "_labels")),
    "cars": dict(SMALL, make=datasets.StanfordCars, fields=("_samples",),
                 train=[dict(split="train")],
                 source="nobody hosts it for download any more; its files, found as told in "
                        "github.com/pytorch/vision/issues/7545, belong into stanford_cars/ there"),
}
DEMO = dict(dataset="toy", out="out/demo/finetune", model="vit_pico", image_size=[48], patch_size=8,
            shots=5, seed=list(range(8)), epochs=30, batch_size=16, base_lr=6.4e-2,
            rand_augment=0.0, mixup=0.0, smoothing=0.1, min_crop=0.7, workers=0, eval_every=30)


# --------------------------------------------------------------------------------------------------
# Method: augmentation
# --------------------------------------------------------------------------------------------------
def affine(image, coefficients, fill):
    """Pillow image whose pixel (x, y) is that of (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, BICUBIC,
                           fillcolor=fill)


def solarize_add(image, value):
    """Add to the dark half of all values."""
    return image.point([min(255, i + value) if i < 128 else i for i in range(256)] * 3)


def posterize(image, bits):
    """Keep so many bits of all values; 0, which ImageOps refuses, is black."""
    return image.point([i & (256 - 2 ** (8 - bits)) for i in range(256)] * 3)


RAND_AUGMENT = {    # (RGB image x, level m in -10..10, its sign random, fill colour f) -> image
    "AutoContrast": lambda x, m, f: ImageOps.autocontrast(x),
    "Equalize": lambda x, m, f: ImageOps.equalize(x),
    "Invert": lambda x, m, f: ImageOps.invert(x),
    "Rotate": lambda x, m, f: x.rotate(3 * m, BICUBIC, fillcolor=f),               # degrees
    "Posterize": lambda x, m, f: posterize(x, 4 - int(0.4 * abs(m))),              # bits that stay
    "Solarize": lambda x, m, f: ImageOps.solarize(x, 256 - int(25.6 * abs(m))),    # threshold
    "SolarizeAdd": lambda x, m, f: solarize_add(x, int(11 * abs(m))),
    "Color": lambda x, m, f: ImageEnhance.Color(x).enhance(1 + 0.09 * m),
    "Contrast": lambda x, m, f: ImageEnhance.Contrast(x).enhance(1 + 0.09 * m),
    "Brightness": lambda x, m, f: ImageEnhance.Brightness(x).enhance(1 + 0.09 * m),
    "Sharpness": lambda x, m, f: ImageEnhance.Sharpness(x).enhance(1 + 0.09 * m),
    "ShearX": lambda x, m, f: affine(x, (1, 0.03 * m, 0, 0, 1, 0), f),
    "ShearY": lambda x, m, f: affine(x, (1, 0, 0, 0.03 * m, 1, 0), f),
    "TranslateX": lambda x, m, f: affine(x, (1, 0, 0.045 * m * x.width, 0, 1, 0), f),
    "TranslateY": lambda x, m, f: affine(x, (1, 0, 0, 0, 1, 0.045 * m * x.height), f),
}


def rand_augment(image, magnitude, fill):
    """RandAugment as timm counts it, "rand-m{magnitude}-mstd0.5-inc1", of a Pillow RGB image.

    Two operations, drawn with replacement, each applied with probability 1/2 at a level
    ~ N(magnitude, 0.5) clipped to [0, 10], 10 being the strongest. Uncovered pixels get `fill`.
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
    """Fill a random rectangle of some of the images with normal noise, in place (arXiv 1708.04896,
    the "pixel" mode of timm). (B, 3, H, W), normalised. The host never waits for the device."""
    for image in images:
        if torch.rand(()) < probability:
            top, left, h, w, _ = RandomErasing.get_params(
                image, (0.02, 1 / 3), (0.3, 1 / 0.3), [0.0])    # area, aspect, unused value
            if (h, w) != tuple(image.shape[1:]):    # what ten failed draws give
                image[:, top:top + h, left:left + w].normal_()


def build_mixing(args, classes):
    """Mixup (arXiv 1710.09412) or CutMix (1905.04899), of both a random one for each batch: images
    (B, 3, H, W), labels (B,) -> images, targets (B, K); of neither, what came in."""
    kinds = {v2.MixUp: args.mixup, v2.CutMix: args.cutmix}
    choices = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds.items() if alpha]
    return v2.RandomChoice(choices or [v2.Identity()])


# --------------------------------------------------------------------------------------------------
# Method: model and optimizer
# --------------------------------------------------------------------------------------------------
def build_model(args, classes):
    """Classifier of --model, its encoder from --init if there is one."""
    kind = {}
    if not args.model.startswith("hiera"):
        kind = dict(patch_size=args.patch_size, rel_pos_bias=args.rpe)
    model = MODELS[args.model](img_size=args.image_size, num_classes=classes,
                               drop_path=args.drop_path, **kind)
    if args.rpe:
        init_beit(model)
    if args.init:
        load_encoder(model, args.init, args.keep_blocks)
    return model


def init_beit(model):
    """Initial weights of the authors' models with relative position bias, those of BEiT (arXiv
    2106.08254): truncated normal; attn.proj and mlp.fc2 of block k are divided by sqrt(2 k)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module is not model.head:
            nn.init.trunc_normal_(module.weight, std=0.02)
    for k, block in enumerate(model.blocks, start=1):
        block.attn.proj.weight.data /= math.sqrt(2 * k)
        block.mlp.fc2.weight.data /= math.sqrt(2 * k)


def build_optimizer(model, args, lr):
    """AdamW or SGD over the layers' groups, whose rates are lr * lr_scale."""
    groups = param_groups(model, args.weight_decay, args.layer_decay, model.depth)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), fused=True)
    return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)


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
    """One run into args.out, from scratch, --init or its last.pt -> the last evaluation, a dict."""
    run = init_distributed(args, minutes=120 if args.download else 10)
    rank, world, device, dtype = run
    torch.manual_seed(args.seed)
    train_set, test_set = make_data(args, rank, world)
    classes = train_set.classes
    model = build_model(args, len(classes)).to(device)
    mixing = build_mixing(args, len(classes))
    sampler = EpochSampler(train_set, args.batch_size, args.accum_steps, rank, world, args.seed)
    steps_per_epoch = sampler.steps_per_epoch
    last_step = args.epochs * steps_per_epoch
    peak_lr = args.base_lr * sampler.batch_size / 256
    optimizer = build_optimizer(model, args, peak_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    describe(run, args, model, train_set, test_set, sampler, optimizer)
    state = resume(args, FIXED, model, optimizer, scaler, rank, world)
    check_classes(classes, state.get("classes", classes), args.data, f"{args.out}/last.pt")
    step = sampler.first_step = state["step"]
    best = state.get("best", -1.0)    # top-1
    network = parallel(model, args, device, world)
    batches = endless_batches(train_set, sampler, args, device)
    log = RunLog(args, step, last_step, sampler.batch_size, rank)

    while True:
        # evaluate every few epochs and at the end
        if step >= last_step or (step and step % (args.eval_every * steps_per_epoch) == 0):
            result = report(run, args, model, test_set, step, best)
            best = max(best, result["top1"])
        if step >= last_step:
            break

        # forward and backward, in micro-steps in which the host never waits for the device
        started = time.perf_counter()
        waited = total_loss = 0.0
        items = []
        network.train()
        torch.manual_seed(mix_seed(args.seed, step, rank))
        for micro_step in range(args.accum_steps):
            before = time.perf_counter()
            images, labels, index, unreadable = next(batches)
            waited += time.perf_counter() - before
            items += zip(index.tolist(), unreadable.tolist())
            images = normalize(images.to(device, non_blocking=True), args.mean, args.std)
            random_erasing(images, args.erasing)
            images, targets = mixing(images, labels.to(device, non_blocking=True))
            network.require_backward_grad_sync = micro_step == args.accum_steps - 1    # for DDP
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = network(images).float()    # (B, K)
            loss = F.cross_entropy(logits, targets, label_smoothing=args.smoothing)
            scaler.scale(loss / args.accum_steps).backward()
            total_loss += loss.detach() / args.accum_steps

        # clip, and look at the loss before it can harm the weights: the one wait of a step
        lr = lr_at(step, last_step, args.warmup_epochs * steps_per_epoch, peak_lr, args.min_lr)
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        values = dict(loss=total_loss, grad_norm=grad_norm, stop=log.stop.is_set(),
                      unreadable=world * sum(unreadable for _, unreadable in items))
        values = average_over_processes(values, world, device)
        check_step(values, total_loss, items, train_set, args, step, lr, scaler)

        # update
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # log, save
        log.add(step, lr, values, time.perf_counter() - started, waited)
        if step % steps_per_epoch == 0 or step == last_step or values["stop"]:
            save("last.pt", rank, args, model, classes, step, best,
                 optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        if values["stop"] and step < last_step:
            break

    log.close(step)
    return result


def save(name, rank, args, model, classes, step, best, **training):
    """A classifier: best.pt, or last.pt, with all that its run needs to go on."""
    if rank == 0:
        save_checkpoint(Path(args.out, name), model=model.state_dict(), arch=model.arch,
                        classes=classes, mean=args.mean, std=args.std, args=plain(args),
                        step=step, best=best, **training)


def describe(run, args, model, train_set, test_set, sampler, optimizer):
    """Print what this run is, once."""
    rank, world, device, dtype = run
    if rank != 0:
        return
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"\n{args.out}: {args.model} of {parameters:.2f}M parameters, from "
          f"{args.init or 'scratch'}; {args.dataset}: {len(train_set)} training images, "
          f"{len(test_set)} test images")
    peak_lr = optimizer.defaults["lr"]
    print(f"recipe {args.recipe}, {sampler.steps_per_epoch} steps an epoch, warm-up "
          f"{args.warmup_epochs:.3g} of {args.epochs} epochs; {device}, {dtype}\n"
          f"batch {sampler.batch_size} = {sampler.micro_batch} images x {world} process(es) x "
          f"{args.accum_steps} micro-steps; lr {peak_lr:.3g} = {args.base_lr:g} * batch / 256")
    scales = {group["layer"]: group["lr_scale"] for group in optimizer.param_groups}
    rates = " ".join(f"{peak_lr * scale:.2g}" for scale in scales.values())
    print(f"lr of layers {min(scales)} (embedding) to {max(scales)} (head): {rates}; weight decay "
          f"{args.weight_decay:g} on matrices, 0 on biases, norms and tokens")


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
def centre_crop(image, size):
    """The authors' test image: shorter side to size / 0.875 (256 for 224), bicubic, then the centre
    -> Pillow RGB of `size`, height and width."""
    image = TF.resize(image.convert("RGB"), [int(max(size) / 0.875)], BICUBIC)
    return TF.center_crop(image, size)


class LabelledImages(Dataset):
    """Item (epoch, index) -> image (3, h, w) uint8, label, index, and whether the file could not be
    read (another image stands in for it). All randomness comes from (seed, epoch, index).

    items: [(picture, label)], a picture being a path, the number of a toy picture, or pixels
    (H, W, 3). Training images are cropped, flipped and RandAugmented, test images centre crops.
    """

    def __init__(self, items, classes, args, train=True):
        self.items = items
        self.classes = classes
        self.args = args
        self.train = train
        strange = {label for _, label in items} - set(range(len(classes)))
        if strange:    # on a GPU a crash, far from its cause
            raise InputError(f"labels {sorted(strange)[:5]} are none of the {len(classes)} classes "
                             "from 0 on: is --data complete?")

    def __len__(self):
        return len(self.items)

    def name(self, index):
        picture = self.items[index][0]
        return f"number {index}" if isinstance(picture, np.ndarray) else str(picture)

    def __getitem__(self, key):
        epoch, index = key
        with torch.random.fork_rng(devices=[]):    # the process's own generator is left alone
            torch.default_generator.manual_seed(mix_seed(self.args.seed, epoch, index))
            (image, label), unreadable = read_or_next(self.crop, self.items, index)
            if self.train and self.args.rand_augment:
                fill = tuple(round(255 * value) for value in self.args.mean)
                image = rand_augment(TF.to_pil_image(image), self.args.rand_augment, fill)
                image = to_tensor(image)
        return image, label, index, unreadable

    def crop(self, item):
        picture, label = item
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else open_item(picture)
        if self.train:
            return random_crop(image, self.args.image_size, (self.args.min_crop, 1)), label
        return to_tensor(centre_crop(image, self.args.image_size)), label


def list_items(args, split):
    """Split "train" or "test" of --dataset -> [(picture, label)], class names; or InputError."""
    if args.dataset == "toy":
        numbers = range(2000) if split == "train" else range(7000, 7800)
        return [(i, toy_picture(i)[1]) for i in numbers], list(TOY_CLASSES)
    if args.dataset in ("folder", "imagenet"):
        return list_folder(Path(args.data, "train" if split == "train" else "val"))
    return list_torchvision(args, split)


def list_folder(folder):
    """A folder of class folders -> [(file, label)], class names, or InputError."""
    try:
        found = datasets.ImageFolder(folder)
    except OSError as error:
        raise InputError(f"{folder} has no images in class folders ({error}): --data needs "
                         "train/CLASS/ and val/CLASS/ below it, none of them empty; ImageNet's val "
                         "comes flat and is sorted by valprep.sh") from None
    return found.samples, found.classes


def list_torchvision(args, split):
    """Split of a data set of torchvision -> [(file or pixels, label)], class names."""
    known = DATASETS[args.dataset]
    items = []
    for arguments in known[split]:
        try:
            part = known["make"](args.data, download=args.download, **arguments)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            remedy = known.get("source", "add --download, or give its folder by --data")
            raise InputError(f"--dataset {args.dataset} cannot be read from {args.data} "
                             f"({str(error).splitlines()[0]}): {remedy}") from None
        columns = [getattr(part, field) for field in known["fields"]]
        items += zip(*columns) if len(columns) == 2 else columns[0]
    items = [(picture, int(label)) for picture, label in items]
    numbers = map(str, range(1, 103))    # of flowers, whose names old versions lack
    return items, list(getattr(part, "classes", numbers))


def select(items, fraction, shots, seed):
    """A share, or so many, of each class's items (at least one), in their order. Smaller choices
    lie within larger ones."""
    labels = np.array([label for _, label in items])
    kept = []
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        generator = torch.Generator().manual_seed(mix_seed(seed, label))
        order = torch.randperm(len(members), generator=generator)
        count = min(shots or len(members), max(1, round(fraction * len(members))))
        kept += members[order[:count].numpy()].tolist()
    return [items[i] for i in sorted(kept)]


def make_data(args, rank, world):
    """-> training set, test set, of the same classes. With --download, process 0 comes first."""
    if args.download and rank > 0:
        dist.barrier()
    items, classes = list_items(args, "train")
    test_items, test_classes = list_items(args, "test")
    if args.download and rank == 0 and world > 1:
        dist.barrier()
    check_classes(classes, test_classes, f"{args.data}/train", f"{args.data}/val")
    if args.dataset == "imagenet" and len(classes) != 1000:
        raise InputError(f"--dataset imagenet has 1000 classes, {args.data} {len(classes)}: for a "
                         "part of it give --dataset folder")
    items = select(items, args.data_fraction, args.shots, args.seed)
    args.train_images = len(items)    # both in FIXED
    args.classes = len(classes)
    return (LabelledImages(items, classes, args),
            LabelledImages(test_items, classes, args, train=False))


def check_classes(a, b, name_a, name_b):
    """Raise InputError unless the two lists of class names are the same."""
    for k, (class_a, class_b) in enumerate(itertools.zip_longest(a, b, fillvalue="absent")):
        if class_a != class_b:
            raise InputError(f"{name_a} has {len(a)} classes, {name_b} {len(b)}, not the same: "
                             f"class {k} is {class_a} here and {class_b} there")


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
def report(run, args, model, test_set, step, best):
    """Evaluate on all processes -> values; process 0 logs them, and keeps the best classifier."""
    values = evaluate(run, args, model, test_set)
    if run[0] == 0:
        log_line(Path(args.out, "log.jsonl"), step=step, **values)
    if values["top1"] > best:
        save("best.pt", run[0], args, model, test_set.classes, step, values["top1"])
    return values


@torch.no_grad()
def evaluate(run, args, model, test_set):
    """Accuracies in % and loss over the test images, each once at any world size -> dict, which
    process 0 prints. Unreadable images are left out."""
    rank, world, device, dtype = run
    model.eval()
    sums = torch.zeros(len(test_set.classes), 4, device=device)    # images, right, in five, loss
    bad = []
    for images, labels, index, unreadable in own_batches(test_set, 128, args, rank, world):
        bad += index[unreadable].tolist()
        if unreadable.all():
            continue
        images = normalize(images[~unreadable].to(device), args.mean, args.std)
        labels = labels[~unreadable].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images).float()                                      # (B, K)
        guesses = logits.topk(min(5, logits.shape[1])).indices                  # (B, 5), best first
        right = guesses == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="none")
        row = torch.stack([torch.ones_like(loss), right[:, 0], right.any(dim=1), loss], dim=1)
        sums.index_add_(0, labels, row)
    if world > 1:
        dist.all_reduce(sums)
    check_readable(test_set, bad, args, world, device)
    n, right, in_five, loss = sums.sum(dim=0).tolist()
    of_class = sums[sums[:, 0] > 0]
    mean_class = (of_class[:, 1] / of_class[:, 0]).mean().item()
    values = dict(top1=100 * right / n, top5=100 * in_five / n, mean_class=100 * mean_class,
                  val_loss=loss / n, test_images=int(n))
    if rank == 0:
        tqdm.write("top-1 {top1:.2f}, top-5 {top5:.2f}, mean over classes {mean_class:.2f}, loss "
                   "{val_loss:.4f} on {test_images} images".format(**values))
    return values


def load_classifier(args):
    """The classifier of --init, or best.pt in --out -> model, class names, options of its run."""
    path = args.init or f"{args.out}/best.pt"
    file = read_file(path)
    if not isinstance(file, dict) or "recipe" not in file.get("args", ()):
        raise InputError(f"{path} holds no classifier with class names: give a best.pt of "
                         "finetune.py by --init")
    stored = argparse.Namespace(**dict(file["args"], init=None))    # its weights are in this file
    model = build_model(stored, len(file["classes"]))
    model.load_state_dict(file["model"])
    return model.eval(), file["classes"], stored


def evaluate_file(args):
    """--eval: a classifier on the test images of --data, by default those of its training."""
    run = init_distributed(args)
    model, classes, stored = load_classifier(args)
    for key in ("dataset", "data", "download", "workers", "skip_corrupt"):
        if getattr(args, key) is not None:
            setattr(stored, key, getattr(args, key))
    items, names = list_items(stored, "test")
    check_classes(names, classes, stored.data, "the classifier")
    evaluate(run, stored, model.to(run[2]), LabelledImages(items, classes, stored, train=False))


@torch.no_grad()
def predict(args):
    """--predict: a line per image with its five likeliest classes and their probabilities."""
    device = choose_device(args.device)
    model, classes, stored = load_classifier(args)
    model.to(device)
    for name in args.predict:
        try:
            image = centre_crop(open_item(name), stored.image_size)
        except READ_ERRORS as error:
            raise InputError(f"--predict {name} cannot be read as an image "
                             f"({type(error).__name__})") from None
        logits = model(normalize(to_tensor(image)[None].to(device), stored.mean, stored.std))[0]
        top = logits.softmax(0).topk(min(5, len(classes)))
        print(f"{name}: " + ", ".join(f"{classes[k]} {100 * p:.1f}%" for p, k in zip(*top)))


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
# Arguments: the defaults are the paper's recipes
# --------------------------------------------------------------------------------------------------
FIXED = ("init_sha", "keep_blocks", "model", "rpe", "image_size", "patch_size", "dataset",
         "data_fraction", "train_images", "classes", "shots", "mean", "std", "recipe", "optimizer",
         "epochs", "warmup_epochs", "batch_size", "seed", *RANGES)    # see `models.resume`


def recipe_word(text):
    """An argparse type: the name of a recipe, or KEY=VALUE for one of its entries, as a pair."""
    if text in RECIPES:
        return text
    key, _, value = text.partition("=")
    if key not in RANGES:
        raise argparse.ArgumentTypeError(f"{text} is neither a recipe nor KEY=VALUE for one of the "
                                         "entries named in RANGES, at the top of finetune.py")
    return key, number(float, RANGES[key])(value)


def parse_args(argv=None, **defaults):
    """Options of the command line, or of the list `argv`; `defaults` stand in for the paper's."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--init", help="checkpoint to start from (README, 'Checkpoints'); absent: from scratch. "
                       "For --eval and --predict the classifier, by default best.pt in --out")
    add("--keep-blocks", "--sweep-keep-blocks", type=number(int, "[0, inf)"), nargs="+",
        help="load only the embedding and so many blocks of --init, the rest random; several "
             "numbers: a run each, and fig4.csv (Fig. 4)")
    add("--model", choices=tuple(MODELS), help="default: that of --init, or vit_tiny")
    add("--rpe", action="store_true",
        help="relative position bias in every block, zero where --init has none")
    add("--image-size", type=number(int, "[1, inf)"), nargs="+",
        help="side, or height and width, in pixels; default: that of --init, or 224")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=tuple(DATASETS),
        help="folder (the default): train/CLASS/*.jpg and val/CLASS/*.jpg; imagenet: the same, of "
             "1000 classes; toy: drawn pictures")
    add("--data", help="where it lies; default: data/DATASET")
    add("--download", action="store_true", help="let torchvision download it into --data first")
    add("--data-fraction", type=number(float, "(0, 1]"), nargs="+", default=[1.0],
        help="share of each class's training images; several: a run each (Fig. 4)")
    add("--shots", type=number(int, "[1, inf)"), help="so many training images of each class")
    hint = ": of pixels in [0, 1], so divide values of 0..255 by 255"
    add("--mean", type=number(float, "[0, 1]", hint), nargs=3,
        help="of pixels in [0, 1]; default: --init's, or ImageNet's")
    add("--std", type=number(float, "(0, 1]", hint), nargs=3,
        help="of pixels in [0, 1]; default: --init's, or ImageNet's")
    add("--skip-corrupt", action="store_true",
        help="replace unreadable files by others and count them; default: stop")

    add = parser.add_argument_group("recipe; an option stands above its entry").add_argument
    add("--recipe", type=recipe_word, nargs="+", default=["improved"],
        help="improved, mae or transfer, then KEY=VALUE for entries of it to change")
    add("--epochs", type=number(int, "[1, inf)"),
        help="paper: improved 300 (1000 with --rpe), mae 100, CIFAR-100 50")
    add("--warmup-epochs", type=number(float, "[0, inf)"),
        help="linear from 0; default: the recipe's, in a shorter run fewer in proportion")
    add("--batch-size", type=number(int, "[1, inf)"),
        help="images per optimizer step over all processes; paper: 1024, transfer 512")
    add("--base-lr", type=number(float, "[0, 1e9]"),
        help="per 256 images: lr = base_lr * batch_size / 256; paper: 1e-3, CIFAR-100 0.05")
    add("--clip-grad", type=number(float, "[0, inf)"),
        help="largest gradient norm; 0: no clipping; paper: 0, transfer 1")

    add = add_run_options(parser, "out/finetune")
    add("--eval", action="store_true", help="evaluate a classifier on the test images, and no more")
    add("--predict", nargs="+", help="print the likeliest classes of image files, and no more")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--seed", type=number(int, "[0, 4294967296)"), nargs="+", default=[0],
        help="several: a run each (Fig. 4)")
    add("--demo", action="store_true", help="a few minutes on drawn pictures: from scratch against "
                                            "the encoder of `pretrain_d2mae.py --demo`")
    parser.set_defaults(patch_size=None, eval_every=1, log_every=20)    # epochs, steps
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.demo and not defaults:
        return parse_args(argv, **DEMO)
    return args


def resolve(args, **values):
    """Options of one run, a copy: `values` in place of some, and the defaults that depend on others
    filled in, by the recipe, the data set and --init. InputError for what has no meaning."""
    args = argparse.Namespace(**{**vars(args), **values})
    args.dataset = args.dataset or "folder"
    args.data = args.data or f"data/{args.dataset}"

    # recipe
    recipe = {}
    for word in ["improved", *args.recipe]:
        recipe.update(dict(RECIPES[word], name=word) if word in RECIPES else [word])
    args.recipe = recipe.pop("name")
    if args.recipe == "transfer":
        recipe.update(DATASETS[args.dataset].get("recipe", {}))
    if args.epochs:    # a shorter run warms up less, a longer one no more
        recipe["warmup_epochs"] *= min(1, args.epochs / recipe["epochs"])
    for key, value in recipe.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup-epochs {args.warmup_epochs:g} must be fewer than --epochs "
                         f"{args.epochs}")

    # model, image size, normalisation
    info = {}
    name = "vit_tiny"
    patch = None
    if args.init:
        info = load_state(args.init)[1]
        name, patch = infer_model(args.init)
    args.init_sha = fingerprint(args.init)
    args.model = args.model or name
    hiera = args.model.startswith("hiera")
    args.patch_size = 32 if hiera else patch or (
        args.patch_size or MODELS[args.model].keywords["patch_size"])
    size = args.image_size or info.get("arch", {}).get("img_size", [224])
    args.image_size = [size[0], size[-1]]
    if len(size) > 2 or any(side % args.patch_size for side in size):
        raise InputError(f"--image-size {size} must be a side, or height and width, multiples of "
                         f"{args.patch_size} for this --model")
    args.mean = args.mean or info.get("mean") or IMAGENET_MEAN
    args.std = args.std or info.get("std") or IMAGENET_STD
    if hiera and args.rpe:
        raise InputError("--rpe is defined for ViT: Hiera attends in windows and pools its tokens")

    depth = depth_of(args.model)
    if args.keep_blocks is not None and not (args.init and args.keep_blocks <= depth):
        raise InputError(f"--keep-blocks {args.keep_blocks} takes 0..{depth} blocks of a "
                         "pre-trained encoder: give --init FILE, and no more than it has")
    return args


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------
def plan(args):
    """The runs that the options describe, resolved: one, or for Fig. 4 one for each combination of
    several --keep-blocks, --data-fraction and --seed."""
    blocks = args.keep_blocks or [None]
    if max(len(args.data_fraction), len(args.seed)) > 1 and not args.keep_blocks:
        raise InputError("several --seed or --data-fraction belong to --sweep-keep-blocks: give it")
    runs = [resolve(args, keep_blocks=k, data_fraction=fraction, seed=seed,
                    out=f"{args.out}/blocks{k}-data{fraction:g}-seed{seed}")
            for k, fraction, seed in itertools.product(blocks, args.data_fraction, args.seed)]
    if len(runs) == 1:
        runs[0].out = args.out
    return runs


def sweep(args, runs):
    """Fig. 4: accuracy against the number of pre-trained blocks kept -> fig4.csv, written after
    every run. `analyze.py curves` draws it."""
    rows = "keep_blocks,data_fraction,seed,top1\n"
    for run in runs:
        result = train(run)
        rows += f"{run.keep_blocks},{run.data_fraction},{run.seed},{result['top1']:.3f}\n"
        Path(args.out, "fig4.csv").write_text(rows)


def demo(args):
    """A few labelled drawings: training from scratch against training from an encoder."""
    encoder = args.init or "out/demo/pretrain/encoder.pt"
    if not Path(encoder).exists():
        raise InputError(f"no {encoder} to start from: run python pretrain_d2mae.py --demo first")
    top1 = {"scratch": [], "pre-trained": []}
    for seed, start in itertools.product(args.seed, top1):
        init = encoder if start == "pre-trained" else None
        run = resolve(args, init=init, seed=seed, data_fraction=1.0,
                      out=f"{args.out}/{start}-{seed}")
        top1[start].append(train(run)["top1"])
    print(f"\ntop-1 in % from {args.shots} drawings a class, {len(args.seed)} seeds, mean and "
          "standard error")
    print_comparison(*top1.values())


def main(args):
    """What the options ask for: a prediction, an evaluation, the demo, one run, or a sweep."""
    if args.predict:
        return predict(args)
    if args.eval:
        return evaluate_file(args)
    if args.demo:
        return demo(args)
    runs = plan(args)
    if len(runs) > 1:
        return sweep(args, runs)
    train(runs[0])


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
