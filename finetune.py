"""Fine-tuning and transfer of a pre-trained encoder to image classification (paper Sec. "experiments", Fig. 4).

    torchrun --nproc_per_node=8 finetune.py --data data/imagenet --init out/pretrain/encoder.pt           # 300 epochs
    torchrun --nproc_per_node=8 finetune.py --data data/imagenet --init encoder.pt --rpe --epochs 1000    # paper: 79.4
    torchrun --nproc_per_node=2 finetune.py --recipe transfer --dataset cifar100 --download --init encoder.pt
    python finetune.py --data my_pictures --init encoder.pt --shots 10 --batch-size 32                    # your own
    python finetune.py --init out/finetune/best.pt --predict cat.jpg dog.jpg
    python finetune.py --demo                                                                   # no files, 3 minutes

A recipe is one dict of RECIPES; an option on the command line overrides its entry. The classifier is
head(fc_norm(mean patch token)); norm and head always start fresh, the encoder comes from --init, whole or up to block
--keep-blocks. From scratch is the absence of --init.

Shapes: B images, K classes, D width, H x W pixels.

NOTES, departures from the authors' code:
- Crops, flips and RandAugment are a function of (seed, epoch, image), and every test image is counted once, at any
  number of processes; theirs follow the process, and their sampler repeats images to fill the last batch.
- RandAugment, erasing, mixup and cutmix are written out here, as timm, which the authors use, defines them.
- The probes on a frozen encoder (linear, knn) are no part of the paper. They average the last block's patch tokens and
  normalise them by a norm without learned scale: D2-MAE's own final norm was trained on block 8.
"""
import argparse
import contextlib
import copy
import csv
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

try:
    import resource    # peak memory; Windows has none
except ImportError:
    resource = None

from models import (IMAGENET_MEAN, IMAGENET_STD, MODELS, InputError, infer_model, layer_id, load_encoder, load_state,
                    normalize, read_file)

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
BICUBIC = v2.InterpolationMode.BICUBIC


# ----------------------------------------------------------------------------------------------------------------------
# Recipes and data sets
# ----------------------------------------------------------------------------------------------------------------------
RECIPES = {
    # the paper's improved recipe: light augmentation suits a small model
    "improved": dict(epochs=300, warmup_epochs=5, batch_size=1024, optimizer="adamw", base_lr=1e-3, min_lr=1e-6,
                     weight_decay=0.05, layer_decay=0.85, drop_path=0.0, clip_grad=0.0, smoothing=0.0,
                     rand_augment=10, mixup=0.2, cutmix=0.0, erasing=0.0),
    # that of MAE, made for large models
    "mae": dict(epochs=100, warmup_epochs=5, batch_size=1024, optimizer="adamw", base_lr=1e-3, min_lr=1e-6,
                weight_decay=0.05, layer_decay=0.85, drop_path=0.1, clip_grad=0.0, smoothing=0.1,
                rand_augment=9, mixup=0.8, cutmix=1.0, erasing=0.25),
    # other data sets, crop and flip alone; epochs, warm-up and rate are those of CIFAR-100 unless DATASETS has others
    "transfer": dict(epochs=50, warmup_epochs=10, batch_size=512, optimizer="sgd", base_lr=0.05, min_lr=1e-6,
                     weight_decay=0.0, layer_decay=0.75, drop_path=0.0, clip_grad=1.0, smoothing=0.0,
                     rand_augment=0, mixup=0.0, cutmix=0.0, erasing=0.0),
    # frozen encoder -> mean patch token, LayerNorm and BatchNorm without learned scale -> linear head
    "linear": dict(epochs=90, warmup_epochs=10, batch_size=1024, optimizer="sgd", base_lr=0.1, min_lr=0.0,
                   weight_decay=0.0, layer_decay=1.0, drop_path=0.0, clip_grad=0.0, smoothing=0.0,
                   rand_augment=0, mixup=0.0, cutmix=0.0, erasing=0.0),
    # frozen encoder -> mean patch token, LayerNorm, unit length -> weighted vote of the nearest training images
    "knn": dict(neighbours=20, temperature=0.07, batch_size=256),
}

# torchvision class, its arguments for the parts of the training and the test split, entries of the transfer recipe.
# CIFAR-100 is the authors' projects/eval_tools/scripts/transfer.sh: rate 0.1 at batch 512, 50 epochs, 10 of warm-up.
# CIFAR-10 takes the same here. For the others their finetuning_transfer_exp.py has rate 0.03 at batch 512 and leaves
# the epochs to the user: chosen here, a fifth of them warm-up as for CIFAR-100.
DATASETS = {
    "folder": dict(),
    "imagenet": dict(),
    "toy": dict(),
    "cifar10": dict(make=datasets.CIFAR10, train=[dict(train=True)], test=[dict(train=False)],
                    recipe=dict(epochs=50, warmup_epochs=10, base_lr=0.05)),
    "cifar100": dict(make=datasets.CIFAR100, train=[dict(train=True)], test=[dict(train=False)],
                     recipe=dict(epochs=50, warmup_epochs=10, base_lr=0.05)),
    "flowers": dict(make=datasets.Flowers102, train=[dict(split="train"), dict(split="val")], test=[dict(split="test")],
                    recipe=dict(epochs=150, warmup_epochs=30, base_lr=0.015)),
    "pets": dict(make=datasets.OxfordIIITPet, train=[dict(split="trainval")], test=[dict(split="test")],
                 recipe=dict(epochs=100, warmup_epochs=20, base_lr=0.015)),
    "aircraft": dict(make=datasets.FGVCAircraft, train=[dict(split="trainval")], test=[dict(split="test")],
                     recipe=dict(epochs=100, warmup_epochs=20, base_lr=0.015)),
    "cars": dict(make=datasets.StanfordCars, train=[dict(split="train")], test=[dict(split="test")],
                 recipe=dict(epochs=100, warmup_epochs=20, base_lr=0.015)),
}

# --demo: 30 pictures of each of 4 shapes, at the size of the encoder that `pretrain_d2mae.py --demo` leaves
DEMO = dict(dataset="toy", out="out/demo/finetune", shots=50, epochs=16, warmup_epochs=2, batch_size=25, base_lr=8e-3,
            rand_augment=0.0, mixup=0.0, crop_scale=(0.5, 1.0), eval_every=8, workers=2, log_every=10)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's recipes
# ----------------------------------------------------------------------------------------------------------------------
def parse_args(argv=None, **defaults):
    """Options of the command line, or of the list `argv`; `defaults` stand in for the paper's values (DEMO)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    cores = (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add = parser.add_argument_group("model").add_argument
    add("--init", help="checkpoint to start from (README, 'Checkpoints'); absent: from scratch. With --eval and "
                       "--predict the classifier to use, by default best.pt in --out")
    add("--model", choices=("auto", *MODELS), default="auto", help="auto: that of --init, or vit_tiny")
    add("--rpe", action="store_true", help="relative position bias in every block, zero where --init has none")
    add("--keep-blocks", type=int, help="load only the embedding and so many blocks (Fig. 4), the rest random")
    add("--image-size", type=int, nargs="+", help="side, or height and width; default: that of --init, or 224")
    add("--patch-size", type=int, help="side of a ViT patch; default: that of --init, or of the model")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=tuple(DATASETS), default="folder",
        help="folder: train/CLASS/*.jpg and val/CLASS/*.jpg; imagenet: such a folder, 1000 classes; toy: drawn shapes")
    add("--data", help="where it lies; default: data/DATASET")
    add("--download", action="store_true", help="let torchvision download the set into --data first")
    add("--data-fraction", type=float, nargs="+", default=[1.0], help="share of each class's training images (Fig. 4); "
                                                                      "several values with --sweep-keep-blocks")
    add("--shots", type=int, help="so many training images per class, seeded; fewer are a part of more")
    add("--mean", type=float, nargs=3, help="per channel, of pixels in [0, 1]; default: --init's, or ImageNet's")
    add("--std", type=float, nargs=3, help="per channel, of pixels in [0, 1]; default: --init's, or ImageNet's")
    add("--crop-scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of RandomResizedCrop")
    add("--skip-corrupt", action="store_true", help="leave out unreadable files and count them; default: stop")
    add("--workers", type=int, default=max(1, min(16, cores)), help="loader processes per training process")

    add = parser.add_argument_group("recipe: an option given overrides the recipe's entry").add_argument
    add("--recipe", choices=tuple(RECIPES), default="improved", help="a dict of RECIPES at the top of finetune.py")
    add("--epochs", type=int, help="paper: improved 300 (1000 with --rpe), mae 100, CIFAR-100 50")
    add("--warmup-epochs", type=float, help="linear from 0")
    add("--batch-size", type=int, help="images per optimizer step over all processes")
    add("--accum-steps", type=int, default=1, help="micro-steps that one batch is split into, per process")
    add("--optimizer", choices=("adamw", "sgd"), help="adamw: betas 0.9, 0.999; sgd: momentum 0.9")
    add("--base-lr", type=float, help="per 256 images: lr = base_lr * batch_size / 256")
    add("--min-lr", type=float, help="end of the cosine")
    add("--weight-decay", type=float, help="none on biases, norms, tokens and position tables")
    add("--layer-decay", type=float, help="block k of n trains at lr * decay^(n + 1 - k), embeddings at decay^(n + 1)")
    add("--drop-path", type=float, help="stochastic depth of the last block")
    add("--clip-grad", type=float, help="largest gradient norm; 0: no clipping")
    add("--smoothing", type=float, help="label smoothing")
    add("--rand-augment", type=float, help="mean level of timm's RandAugment, 0 to 10 (torchvision: to 30); 0: none")
    add("--mixup", type=float, help="alpha; 0: none")
    add("--cutmix", type=float, help="alpha; 0: none. With both, each batch takes one of the two")
    add("--erasing", type=float, help="probability of random erasing")
    add("--ema", type=float, help="decay of averaged weights, which are then what is evaluated; default: none")
    add("--neighbours", type=int, help="of the k-NN probe")
    add("--temperature", type=float, help="of the k-NN probe: a vote weighs exp(cosine / temperature)")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="out/finetune", help="folder for checkpoints, log, pictures; the same command resumes there")
    add("--eval", action="store_true", help="evaluate a classifier on the test split, and no more")
    add("--predict", nargs="+", metavar="IMAGE", help="print the five likeliest classes of each image, and no more")
    add("--sweep-keep-blocks", type=int, nargs="*", metavar="K", help="Fig. 4: one run per K (default: 0..depth), "
        "--data-fraction and --sweep-seeds -> fig4.csv, fig4.png")
    add("--sweep-seeds", type=int, nargs="+", help="seeds of the sweep; default: --seed")
    add("--no-resume", action="store_true", help="start again although --out holds a checkpoint")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 on GPUs that have it, fp16 with loss scaling on others, fp32 on mps and cpu")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--seed", type=int, default=0)
    add("--max-steps", type=int, help="stop after so many optimizer steps (the schedule stays that of --epochs)")
    add("--log-every", type=int, default=20, help="optimizer steps per line of log.jsonl")
    add("--eval-every", type=int, default=1, help="epochs between evaluations; the last epoch always")
    add("--demo", action="store_true", help="defaults for two small runs on drawn shapes: from scratch, and from "
                                            "out/demo/encoder.pt once pretrain_d2mae.py --demo has been run")
    parser.set_defaults(**defaults)
    return check_numbers(parser.parse_args(argv), zero="workers seed keep_blocks sweep_keep_blocks sweep_seeds")


def change(args, **values):
    """A copy of the options with other values for some."""
    return argparse.Namespace(**{**vars(args), **values})


def resolve(args):
    """Options of one run, all defaults filled in: the given option, else the data set's, the recipe's or --init's."""
    if len(args.data_fraction) > 1:
        raise InputError("several values of --data-fraction belong to --sweep-keep-blocks")
    args = change(args, data_fraction=args.data_fraction[0], data=args.data or f"data/{args.dataset}")
    if not 0 < args.data_fraction <= 1 or (args.shots is not None and args.shots < 1):
        raise InputError("--data-fraction must lie in (0, 1] and --shots be at least 1")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        raise InputError(f"--crop-scale {args.crop_scale[0]} {args.crop_scale[1]} must be a range within (0, 1]")
    if not args.init and (args.keep_blocks is not None or args.recipe in ("linear", "knn")):
        option = f"--recipe {args.recipe}" if args.keep_blocks is None else "--keep-blocks"
        raise InputError(f"{option} uses a pre-trained encoder: give --init FILE")
    of_set = DATASETS[args.dataset].get("recipe", {}) if args.recipe == "transfer" else {}
    for key, value in {**RECIPES[args.recipe], **of_set}.items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))

    info = load_state(args.init)[1] if args.init else {}
    arch, patch = info.get("arch", {}), None
    if args.model == "auto":
        args.model, patch = infer_model(args.init) if args.init else ("vit_tiny", None)
    if args.model.startswith("hiera"):
        args.patch_size = None
        if args.rpe:
            raise InputError("--rpe is defined for ViT: Hiera attends in windows and pools its tokens")
    else:
        standard = MODELS[args.model].keywords.get("patch_size", 16)
        args.patch_size = args.patch_size or patch or arch.get("patch_size") or standard
    size = args.image_size or arch.get("img_size") or [224]
    args.image_size = list(size) * 2 if len(size) == 1 else list(size)
    if len(args.image_size) != 2:
        raise InputError(f"--image-size takes one number, or height and width, not {len(args.image_size)} numbers")
    if max(args.smoothing or 0, args.ema or 0) >= 1 or args.temperature == 0:
        raise InputError("--smoothing and --ema must lie below 1, --temperature above 0")
    args.mean = list(args.mean or info.get("mean") or IMAGENET_MEAN)
    args.std = list(args.std or info.get("std") or IMAGENET_STD)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------
def read_image(path):
    """Any image file -> (3, H, W) uint8 RGB: grey, palette, CMYK, 16-bit and alpha (dropped) included."""
    with open(path, "rb") as file:
        png = file.read(4) == b"\x89PNG"    # a damaged one crashes torchvision's decoder and the process with it
    try:
        if not png:
            image = torchvision.io.decode_image(str(path), mode=torchvision.io.ImageReadMode.RGB)
            return image[0] if image.dim() == 4 else image                     # first frame of an animation
    except (RuntimeError, AttributeError):    # a format that only Pillow reads, a broken file, a torchvision without it
        pass
    with Image.open(path) as image:
        if image.mode.startswith("I"):                                         # 16-bit grey, which convert() would clip
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        image.info.pop("transparency", None)                                   # of a palette: dropped like any other
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


TOY_CLASSES = ["disc", "square", "triangle", "ring"]


@functools.lru_cache(maxsize=None)
def draw_toy(index, size=64):
    """Image number `index` of the toy set -> (3, size, size) uint8: a striped shape, TOY_CLASSES[index % 4], on shaded,
    noisy ground. Place, size, angle, colours and stripes are random, so that no pixel tells the class."""
    rng = np.random.default_rng([11, index])
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    direction, angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(-0.4, 0.4), rng.uniform(0.5, 0.7)
    shade = 0.25 * (np.cos(direction) * x + np.sin(direction) * y)
    image = rng.uniform(0.2, 0.8, 3) + shade[..., None] + rng.normal(0, 0.02, (size, size, 3))
    x, y = x - rng.uniform(-0.2, 0.2), y - rng.uniform(-0.2, 0.2)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / radius, (y * np.cos(angle) - x * np.sin(angle)) / radius
    inside = (np.hypot(u, v) < 1, np.maximum(abs(u), abs(v)) < 0.8, (v < 0.6) & (v > 1.9 * abs(u) - 0.9),
              (np.hypot(u, v) < 1) & (np.hypot(u, v) > 0.55))[index % 4]
    stripes, colors = np.sin(rng.uniform(4, 12) * u + rng.uniform(0, 6)) > 0, rng.uniform(0, 1, (2, 3))
    image[inside] = colors[stripes[inside].astype(int)]
    return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1)


def read_item(dataset, index):
    """Image `index` of a torchvision data set -> (3, H, W) uint8."""
    return TF.pil_to_tensor(dataset[index][0].convert("RGB"))


class LabelledImages(Dataset):
    """Training item (epoch, index) -> image (3, H, W) uint8 cropped, flipped and RandAugmented by (seed, epoch, index),
    label, index of the item that was read, 1 if that one stands in for an unreadable one.

    items: list of (what load() takes, label). With train=False a key is an index and the image the centre crop after
    its short side was resized to size / 0.875 (256 for 224), bicubic; an unreadable one has label -1.
    """

    def __init__(self, items, load, size, classes, train=True, crop_scale=(0.08, 1.0), magnitude=0, seed=0,
                 skip_corrupt=False):
        self.items, self.load, self.size, self.train = items, load, size, train
        self.magnitude, self.seed, self.skip_corrupt = magnitude, seed, skip_corrupt
        for what, label in items:
            if not 0 <= label < classes:    # on a GPU it would end in a device-side assertion, far from its cause
                raise InputError(f"image {what} has label {label}, the {classes} classes are 0..{classes - 1}")
        self.transform = v2.Compose([
            v2.RandomResizedCrop(size, tuple(crop_scale), ratio=(3 / 4, 4 / 3), interpolation=BICUBIC, antialias=True),
            v2.RandomHorizontalFlip()]) if train else v2.Compose([
                v2.Resize(round(max(size) / 0.875), interpolation=BICUBIC, antialias=True), v2.CenterCrop(size)])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key if self.train else (0, key)
        torch.default_generator.manual_seed(hash((self.seed, epoch, index)) % 2 ** 63)
        for tries in range(100):
            what, label = self.items[index]
            try:
                image = self.load(what)
            except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                if not self.skip_corrupt:
                    raise InputError(f"cannot read image {what} ({type(error).__name__}): remove it, or go on without "
                                     "it by --skip-corrupt") from None
                if not self.train:
                    return torch.zeros(3, *self.size, dtype=torch.uint8), -1, index, 1
                index = (index + 1) % len(self.items)
            else:
                image = self.transform(image)
                image = rand_augment(image, self.magnitude) if self.train and self.magnitude else image
                return image, label, index, int(tries > 0)
        raise InputError(f"100 unreadable images in a row, up to {what}: is --data a folder of images?")


def list_folder(folder):
    """A folder of class folders -> class names, [(file, label)]. Raises InputError if flat or a class is empty."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: --data needs train/CLASS/*.jpg and val/CLASS/*.jpg below it")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if not classes:
        flat = sum(p.suffix.lower() in IMAGE_TYPES for p in folder.iterdir())
        raise InputError(f"{folder} holds {flat} images and no class folders: move each image into a folder named "
                         f"after its class, {folder}/CLASS/ (ImageNet's val comes flat: use valprep.sh)")
    items = [(str(file), label) for label, name in enumerate(classes)
             for file in sorted((folder / name).rglob("*")) if file.suffix.lower() in IMAGE_TYPES]
    empty = [classes[k] for k in sorted(set(range(len(classes))) - {label for _, label in items})]
    if empty:
        raise InputError(f"{folder} has {len(empty)} class folder(s) without an image: {', '.join(empty[:5])}; remove "
                         "or fill them")
    return classes, items


def torchvision_items(name, folder, split, download=False):
    """Split 'train' or 'test' of a torchvision data set -> class names, [(index, label)], loader."""
    parts, labels = [], []
    for arguments in DATASETS[name][split]:
        try:
            part = DATASETS[name]["make"](folder, download=download, **arguments)
        except ModuleNotFoundError as error:
            raise InputError(f"--dataset {name} is read with {error.name}: pip install {error.name}") from None
        except (RuntimeError, FileNotFoundError, ValueError) as error:
            raise InputError(f"--dataset {name} is not complete in {folder} ({str(error).splitlines()[0]}): "
                             "add --download, or give its folder by --data") from None
        parts.append(part)    # torchvision has no common name for labels
        labels += getattr(part, "targets", None) or getattr(part, "_labels", None) or [s[1] for s in part._samples]
    return list(parts[0].classes), list(enumerate(map(int, labels))), functools.partial(read_item, ConcatDataset(parts))


def select(items, fraction=1.0, shots=None, seed=0):
    """A share, or so many, of each class's items (at least one), in their order. Less is always a part of more."""
    kept, by_class = [], {}
    for number, (_, label) in enumerate(items):
        by_class.setdefault(label, []).append(number)
    for label, numbers in by_class.items():
        generator = torch.Generator().manual_seed(seed * 100_003 + label)
        count = min(shots or len(numbers), max(1, round(fraction * len(numbers))))
        kept += [numbers[i] for i in torch.randperm(len(numbers), generator=generator)[:count].tolist()]
    return [items[number] for number in sorted(kept)]


def make_data(args, train=True):
    """-> training set (None with train=False), test set, class names, one line that says what they are."""
    if args.dataset == "toy":
        names = classes = TOY_CLASSES
        load = test_load = draw_toy
        items, test_items = ([(i, i % 4) for i in numbers] for numbers in (range(1200), range(1200, 1500)))
    elif args.dataset in ("folder", "imagenet"):
        load = test_load = read_image
        names, test_items = list_folder(Path(args.data, "val"))
        classes, items = list_folder(Path(args.data, "train")) if train else (names, [])
    else:
        names, test_items, test_load = torchvision_items(args.dataset, args.data, "test")
        classes, items, load = torchvision_items(args.dataset, args.data, "train") if train else (names, [], None)
    if names != classes:
        missing, extra = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
        raise InputError(f"{args.data}/train has {len(classes)} classes, {args.data}/val {len(names)}, not the same: "
                         f"val lacks {', '.join(missing[:5]) or 'none'}, train lacks {', '.join(extra[:5]) or 'none'}")
    if args.dataset == "imagenet" and len(classes) != 1000:
        raise InputError(f"--dataset imagenet has 1000 classes, {args.data} {len(classes)}: for a part of it give "
                         "--dataset folder")
    make = functools.partial(LabelledImages, size=args.image_size, classes=len(classes), skip_corrupt=args.skip_corrupt)
    test_set = make(test_items, test_load, train=False)
    said = f"{len(test_set)} test images, {len(classes)} classes"
    if not train:
        return None, test_set, classes, f"{args.dataset}: {said}"
    chosen = select(items, args.data_fraction, args.shots, args.seed)
    train_set = make(chosen, load, crop_scale=args.crop_scale, magnitude=args.rand_augment or 0, seed=args.seed)
    return train_set, test_set, classes, f"{args.dataset}: {len(chosen)} of {len(items)} training images, {said}"


# ----------------------------------------------------------------------------------------------------------------------
# Method: augmentation, mixing, loss
# ----------------------------------------------------------------------------------------------------------------------
def move(image, shear=(0, 0), shift=(0, 0)):
    """Shear (pixels per pixel, from the upper left corner) and shift (share of the side) of a Pillow image, bicubic."""
    return TF.affine(image, 0, [shift[0] * image.width, shift[1] * image.height], 1,
                     [math.degrees(math.atan(s)) for s in shear], BICUBIC, FILL, center=[0, 0])


FILL = [124, 116, 104]    # the mean colour of ImageNet
RAND_AUGMENT = {    # operation: (level m in 0..10, random sign s) -> argument v; (Pillow image x, v) -> image
    "AutoContrast": (lambda m, s: None, lambda x, v: TF.autocontrast(x)),
    "Equalize": (lambda m, s: None, lambda x, v: TF.equalize(x)),
    "Invert": (lambda m, s: None, lambda x, v: TF.invert(x)),
    "Rotate": (lambda m, s: s * 3 * m, lambda x, v: TF.rotate(x, v, BICUBIC, fill=FILL)),    # degrees
    "Posterize": (lambda m, s: 4 - int(0.4 * m),                                             # bits that stay, 0: black
                  lambda x, v: x.point([i & (256 - 2 ** (8 - v)) for i in range(256)] * 3)),
    "Solarize": (lambda m, s: 256 - int(25.6 * m), lambda x, v: TF.solarize(x, v)),          # inverted from there on
    "SolarizeAdd": (lambda m, s: int(11 * m),
                    lambda x, v: x.point([min(255, i + v) if i < 128 else i for i in range(256)] * 3)),
    "Color": (lambda m, s: 1 + s * 0.09 * m, lambda x, v: TF.adjust_saturation(x, v)),
    "Contrast": (lambda m, s: 1 + s * 0.09 * m, lambda x, v: TF.adjust_contrast(x, v)),
    "Brightness": (lambda m, s: 1 + s * 0.09 * m, lambda x, v: TF.adjust_brightness(x, v)),
    "Sharpness": (lambda m, s: 1 + s * 0.09 * m, lambda x, v: TF.adjust_sharpness(x, v)),
    "ShearX": (lambda m, s: s * 0.03 * m, lambda x, v: move(x, shear=(v, 0))),
    "ShearY": (lambda m, s: s * 0.03 * m, lambda x, v: move(x, shear=(0, v))),
    "TranslateX": (lambda m, s: s * 0.045 * m, lambda x, v: move(x, shift=(v, 0))),
    "TranslateY": (lambda m, s: s * 0.045 * m, lambda x, v: move(x, shift=(0, v))),
}


def rand_augment(image, magnitude, std=0.5, count=2):
    """RandAugment as timm counts it, "rand-m{magnitude}-mstd{std}-inc1": (3, H, W) uint8 -> the same.

    `count` operations, drawn with replacement, each applied with probability 1/2 at a level ~ N(magnitude, std) clipped
    to [0, 10], where 10 is the strongest. On Pillow images, where they are Pillow's own and faster than on tensors.
    """
    picture = None
    for _ in range(count):
        argument, operation = list(RAND_AUGMENT.values())[torch.randint(len(RAND_AUGMENT), ()).item()]
        (apply, sign), noise = torch.rand(2).tolist(), torch.randn(()).item()
        if apply < 0.5:
            picture = picture or TF.to_pil_image(image)
            level = min(10.0, max(0.0, magnitude + std * noise))
            picture = operation(picture, argument(level, 1 if sign < 0.5 else -1))
    return image if picture is None else TF.pil_to_tensor(picture)


def random_erasing(images, probability, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)):
    """Fill a rectangle of an image with normal noise, with this probability. (B, 3, H, W) normalised -> the same.

    Each image draws ten rectangles of random area (share of the image) and aspect and takes the first that fits.
    Nothing here waits for the device.
    """
    B, _, H, W = images.shape
    new = functools.partial(torch.empty, device=images.device)
    pixels, log_aspect = H * W * new(B, 10).uniform_(*area), new(B, 10).uniform_(*map(math.log, aspect))
    h, w = ((pixels * ratio).sqrt().round() for ratio in (log_aspect.exp(), (-log_aspect).exp()))    # (B, 10)
    fits = (h < H) & (w < W)
    first = fits.float().argmax(dim=1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)                                                    # (B, 1)
    top, left = ((new(B, 1).uniform_() * (total - side + 1)).floor() for total, side in ((H, h), (W, w)))
    y, x = (torch.arange(n, device=images.device) for n in (H, W))
    inside = ((y >= top) & (y < top + h))[:, :, None] & ((x >= left) & (x < left + w))[:, None]      # (B, H, W)
    hit = (new(B, 1).uniform_() < probability) & fits.any(dim=1, keepdim=True)
    return torch.where((inside & hit[:, :, None])[:, None], torch.randn_like(images), images)


def soft_targets(labels, classes, smoothing=0.0):
    """Labels (B,) -> (B, K): 1 - smoothing on the label, plus smoothing / K everywhere."""
    off = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return off.scatter_add(1, labels[:, None], off.new_full((len(labels), 1), 1 - smoothing))


def mix_batch(images, targets, mixup, cutmix):
    """Mix each image with its partner in the reversed batch, one lam ~ Beta(alpha, alpha) for all, of any number.

    Mixup: lam * x + (1 - lam) * partner. CutMix: a rectangle of area 1 - lam, cut off at the border, is the partner's,
    and lam becomes the share of pixels kept. With both, a coin decides. images (B, 3, H, W), targets (B, K).
    """
    cut = cutmix > 0 and (mixup == 0 or torch.rand(()).item() < 0.5)
    alpha, (H, W) = cutmix if cut else mixup, images.shape[2:]
    lam = torch.distributions.Beta(alpha, alpha).sample().item()
    if cut:
        half, mixed = math.sqrt(1 - lam) / 2, images.clone()
        (top, bottom), (left, right) = ((round(max(0, c - half) * n), round(min(1, c + half) * n))
                                        for c, n in zip(torch.rand(2).tolist(), (H, W)))
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / (H * W)
    else:
        mixed = lam * images + (1 - lam) * images.flip(0)
    return mixed, lam * targets + (1 - lam) * targets.flip(0)


def soft_cross_entropy(logits, targets):
    """L = mean over images of -sum_k t_k log p_k. logits, targets (B, K); in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Method: model and probes
# ----------------------------------------------------------------------------------------------------------------------
def build_model(args, classes):
    """Classifier of --model with fresh norm and head; with --recipe linear and knn on a frozen encoder."""
    vit_only = {} if args.model.startswith("hiera") else dict(patch_size=args.patch_size, rel_pos_bias=args.rpe)
    model = MODELS[args.model](args.image_size, num_classes=classes, drop_path=args.drop_path or 0.0, **vit_only)
    if args.recipe in ("linear", "knn"):
        model.requires_grad_(False)
        model.head = nn.Identity()
    if args.recipe == "linear":    # the BatchNorm puts the features of any encoder on one scale, for one learning rate
        model.head = nn.Sequential(nn.BatchNorm1d(model.embed_dim, affine=False), nn.Linear(model.embed_dim, classes))
        nn.init.normal_(model.head[1].weight, std=0.01)
        nn.init.zeros_(model.head[1].bias)
    return model


def knn_scores(features, train_features, train_labels, classes, neighbours=20, temperature=0.07, chunk=512):
    """Weighted k-NN: scores (n, K), at each class the sum of exp((cosine - 1) / temperature) over the nearest training
    images of it. features (n, D) and train_features (N, D) of length 1; `chunk` rows at a time bound the memory."""
    scores = features.new_zeros(len(features), classes)
    for start in range(0, len(features), chunk):
        cosine, nearest = (features[start:start + chunk] @ train_features.T).topk(min(neighbours, len(train_features)))
        scores[start:start + chunk].scatter_add_(1, train_labels[nearest], ((cosine - 1) / temperature).exp())
    return scores


@torch.no_grad()
def extract(model, loader, args, device):
    """-> features (n, D) of length 1 and labels (n,), on the device."""
    features, labels, dtype = [], [], amp_dtype(args.dtype, device)
    for images, target, _, _ in loader:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x = model(normalize(images.to(device), args.mean, args.std))
        features.append(F.normalize(x.float(), dim=1))
        labels.append(target.to(device))
    return torch.cat(features), torch.cat(labels)


def gather_rows(x, world):
    """Rows of all processes, whose numbers may differ -> one tensor, the same everywhere."""
    if world == 1:
        return x
    sizes = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor(len(x), device=x.device))
    padded = torch.cat([x, x.new_zeros(int(max(sizes)) - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:int(n)] for part, n in zip(parts, sizes)])


def lr_at(step, total, warmup, lr, min_lr):
    """Learning rate of optimizer step `step` (from 0): linear warm-up from 0, then half a cosine down to min_lr."""
    if step < warmup:
        return lr * step / warmup
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ----------------------------------------------------------------------------------------------------------------------
# Process group, batches, optimizer groups, checkpoint, log, training epoch (the same text in every training script)
# ----------------------------------------------------------------------------------------------------------------------
def init_distributed(device):
    """torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without them this is one process. -> rank, world, torch.device"""
    rank, local_rank, world = (int(os.environ.get(*v)) for v in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in available if available[name])
    if not available[device]:
        raise InputError(f"--device {device} is not available on this machine: choose another, or auto")
    device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def amp_dtype(name, device):
    """--dtype as a torch.dtype; auto takes bf16 on GPUs that have it, fp16 on other GPUs, fp32 elsewhere."""
    if name == "auto":
        name = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


class EpochBatches:
    """Batch sampler: lists of (epoch, index) keys, the same global batches for any number of processes, micro-steps.

    An epoch is a seeded permutation cut into batches of `batch` (an incomplete last one is left out), each dealt out to
    accum_steps x world. A set smaller than `batch` makes one batch of all it has. Set `epoch`, and `start` to the
    optimizer steps of it that are already done, before iterating.
    """

    def __init__(self, n, batch, accum_steps, rank, world, seed):
        self.n, self.accum_steps, self.rank, self.world, self.seed = n, accum_steps, rank, world, seed
        self.per_process = min(batch, n) // (accum_steps * world)
        if batch % (accum_steps * world) or not self.per_process:
            raise InputError(f"--batch-size {batch} cannot be dealt out evenly to {world} process(es) x --accum-steps "
                             f"{accum_steps} from {n} images: choose a multiple of {accum_steps * world}, and at least "
                             "as many images")
        self.batch = self.per_process * accum_steps * world
        self.steps, self.epoch, self.start = n // self.batch, 0, 0

    def __len__(self):
        return (self.steps - self.start) * self.accum_steps

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.n, generator=generator).tolist()
        for micro in range(self.start * self.accum_steps, self.steps * self.accum_steps):
            first = (micro * self.world + self.rank) * self.per_process
            yield [(self.epoch, i) for i in order[first:first + self.per_process]]


def check_numbers(args, zero):
    """Refuse integer options below 1 (those named in `zero`: below 0), negative and NaN ones -> args."""
    for name, value in vars(args).items():
        for v in value if isinstance(value, (list, tuple)) else [value]:
            low = int(isinstance(v, int) and name not in zero.split())
            if isinstance(v, (int, float)) and not isinstance(v, bool) and not v >= low:
                raise InputError(f"--{name.replace('_', '-')} {v} must be at least {low}")
    return args


def param_groups(model, weight_decay, layer_decay=1.0, depth=12):
    """Optimizer groups: lr_scale = layer_decay^(depth + 1 - layer); no weight decay on biases, norms, tokens, position
    tables. Names may start with 'encoder.'."""
    groups, undecayed = {}, ("cls_token", "mask_token", "pos_embed", "relative_position_bias_table")
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = depth + 1 if layer_decay == 1 else layer_id(name.removeprefix("encoder."), depth)
            groups.setdefault((layer, p.dim() > 1 and not name.endswith(undecayed)), []).append(p)
    return [{"params": params, "weight_decay": weight_decay if decayed else 0.0, "layer": layer,
             "lr_scale": layer_decay ** (depth + 1 - layer)} for (layer, decayed), params in sorted(groups.items())]


def save_checkpoint(path, **state):
    """Write plain types and tensors atomically: a killed job never leaves half a file under the name `path`."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def resume(path, args, images):
    """State saved in `path`, or None. The options must be those of the interrupted run, but for the free ones, and so
    must the number of training images."""
    free = "workers device compile max_steps log_every eval_every save_every no_resume eval predict mode stride".split()
    if args.no_resume or not Path(path).exists():
        return None
    state = read_file(path)
    if not isinstance(state, dict) or not {"args", "images", "optimizer"} <= state.keys():
        raise InputError(f"{path} is no checkpoint to go on from: give another --out, or --no-resume to start again")
    now, before = json.loads(json.dumps(vars(args))), state["args"]
    changed = [f"--{k.replace('_', '-')} {before.get(k)}" for k in now if k not in free and before.get(k) != now[k]]
    changed += [f"{state['images']} training images, not {images}"] if state["images"] != images else []
    if changed:
        raise InputError(f"{path} was written with {', '.join(changed[:5])}: give the same options to go on, another "
                         "--out, or --no-resume to start again")
    return state


def log_line(path, rank, **values):
    """Append one JSON object to log.jsonl (rank 0 only)."""
    if rank == 0:
        values = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")


def read_log(path):
    """The objects in log.jsonl, but for a line that a killed run left unfinished."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]


def open_log(path, rank, args, step):
    """Keep what a resumed run logged up to its checkpoint; a new log begins with the options and the git commit."""
    if rank == 0:
        lines = read_log(path) if step and Path(path).exists() else []
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        lines = [v for v in lines if v.get("step", 0) <= step] or [{"args": vars(args), "commit": commit}]
        Path(path).write_text("".join(json.dumps(v) + "\n" for v in lines))


def memory_gb(device):
    """Peak memory: allocated on a GPU, resident of this process elsewhere (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit if resource else 0.0


def train_epoch(model, loader, losses_of, names_of, optimizer, scaler, lr_of, step, until, total, args, rank, world,
                device, stop):
    """Optimizer steps from `step` to the end of the epoch or to `until` -> next step, True if SIGTERM asked to stop.

    losses_of(model, batch) -> dict of scalars, "loss" first; names_of(batch) -> its images, for error messages;
    lr_of(step) -> learning rate; `total` steps of the whole run, for the estimate of the time left. Losses stay on the
    device and are read every --log-every steps, when they are also averaged over processes and written to log.jsonl.
    Raises FloatingPointError on every process if a loss is not finite on any; nothing has been saved since.
    """
    model.train()
    sampler, dtype, log = loader.batch_sampler, amp_dtype(args.dtype, device), Path(args.out) / "log.jsonl"
    params = [p for group in optimizer.param_groups for p in group["params"]]
    end, asked, finite, window = min(step + sampler.steps - sampler.start, until), False, None, []
    batches, waited, begun, first = iter(loader), 0.0, time.perf_counter(), step
    bar = tqdm(total=end - step, desc=f"epoch {sampler.epoch + 1}", disable=rank != 0, leave=False)
    while step < end and not asked:
        for micro in range(args.accum_steps):
            waiting = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - waiting
            torch.manual_seed((args.seed * 1_000_003 + step) * 4096 + micro * world + rank)   # no RNG state to save
            last = micro == args.accum_steps - 1
            with contextlib.nullcontext() if world == 1 or last else model.no_sync():         # one all-reduce a step
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    losses = losses_of(model, batch)
                scaler.scale(losses["loss"] / args.accum_steps).backward()
            window.append((step, names_of(batch), {k: v.detach().float() for k, v in losses.items()}))
        lr = lr_of(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(params, args.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_every and step < end and not (stop.is_set() and world == 1):
            continue

        # the only place where the host waits for the device, and processes for each other's losses
        own = torch.stack([torch.stack([*values.values()]) for _, _, values in window])       # (micro-steps, losses)
        mean, flag = own / world, torch.tensor([float(stop.is_set())], device=device)
        if world > 1:
            dist.all_reduce(mean)
            dist.all_reduce(flag)
        asked, bad = flag.item() > 0, (~mean.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            where, names, _ = window[bad[0]]
            for r in range(world):    # every process names its own images, one after another
                if r == rank and not own[bad[0]].isfinite().all():
                    print(f"non-finite loss in process {rank}, images: {', '.join(names)}", file=sys.stderr, flush=True)
                if world > 1:
                    dist.barrier()
            finite = mean[bad[0] - 1, 0].item() if bad[0] else finite
            raise FloatingPointError(
                f"the loss is {mean[bad[0], 0].item()} at step {where}, lr {lr_of(where):.3g}, last finite {finite};"
                f" checkpoints in {args.out} are from before; try --dtype fp32, --clip-grad 1 or a lower learning rate")
        finite, seconds = mean[-1, 0].item(), time.perf_counter() - begun
        means, rate, share = mean.mean(dim=0).tolist(), (step - first) * sampler.batch / seconds, waited / seconds
        eta, memory = (total - step) * sampler.batch / rate / 3600, memory_gb(device)
        log_line(log, rank, step=step, epoch=sampler.epoch + 1, **dict(zip(window[0][2], means)), lr=lr,
                 grad_norm=grad_norm.item(), img_s=rate, data_share=share, memory_gb=memory, eta_h=eta)
        bar.update(step - first)
        bar.set_postfix_str(f"loss {means[0]:.4f}, {rate:.0f} img/s, data {share:.0%}, {eta:.2g} h left")
        if rank == 0 and step >= 50 > first:
            bar.write(f"after {step} steps: {rate:.0f} images/s, {memory:.1f} GB, {eta:.2g} hours to go")
        if rank == 0 and share > 0.3 and step == end:
            bar.write(f"waiting for data {share:.0%} of the time: more --workers, or a faster disk, would help")
        window, waited, begun, first = [], 0.0, time.perf_counter(), step
    bar.close()
    if not torch.stack([p.isfinite().all() for p in params]).all():    # a last update can do it; once per epoch
        raise FloatingPointError(f"weights are not finite after step {step}; checkpoints in {args.out} are from before;"
                                 " try a lower learning rate")
    return step, asked


def draw_curves(path, panels):
    """Line charts side by side as a PNG. panels: title -> {label: [(x, y), ...]}."""
    font, width, height = ImageFont.load_default(13), 430, 300
    colors = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")
    image = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(image)
    for i, (title, lines) in enumerate(panels.items()):
        left, top, right, bottom = i * width + 62, 34, (i + 1) * width - 16, height - 34
        xs, ys = ([p[axis] for line in lines.values() for p in line] or [0, 1] for axis in (0, 1))
        (x0, x1), (y0, y1) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in (xs, ys))

        def place(x, y):
            return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

        draw.text((left, 8), title, "black", font)
        for k in range(5):
            x, y = x0 + (x1 - x0) * k / 4, y0 + (y1 - y0) * k / 4
            draw.line([place(x0, y), place(x1, y)], "#dddddd")
            draw.text((left - 6, place(x0, y)[1]), f"{y:.3g}", "black", font, anchor="rm")
            draw.text((place(x, y0)[0], bottom + 6), f"{x:.4g}", "black", font, anchor="ma" if k < 4 else "ra")
        for k, (label, line) in enumerate(lines.items()):
            points = [place(*p) for p in line]
            draw.line(points, colors[k % 5], 2)
            for x, y in points if len(points) < 40 else ():
                draw.ellipse([x - 2, y - 2, x + 2, y + 2], colors[k % 5])
            draw.text((right - 4, top + 4 + 16 * k), label, colors[k % 5], font, anchor="ra")
    image.save(path)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and pictures
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(classify, classes, loader, args, world, device):
    """Accuracies in % and loss over the test images, each counted once at any world size -> dict, confusion matrix.

    classify: normalised images (B, 3, H, W) -> scores (B, K). The matrix (K, K) has true classes in rows.
    """
    sums, confusion = torch.zeros(4, device=device), torch.zeros(classes * classes, device=device)
    dtype, begun = amp_dtype(args.dtype, device), time.perf_counter()
    for images, target, _, _ in loader:
        images, target = (x.to(device, non_blocking=True) for x in (images, target))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores = classify(normalize(images, args.mean, args.std)).float()
        seen, truth = (target >= 0).float(), target.clamp(min=0)                     # unreadable files have -1
        top = scores.topk(min(5, classes)).indices                                   # (B, 5), best first
        right = (top == truth[:, None]) * seen[:, None]
        loss = F.cross_entropy(scores, truth, reduction="none") * seen
        sums += torch.stack([seen.sum(), right[:, 0].sum(), right.sum(), loss.sum()])
        confusion.index_add_(0, truth * classes + top[:, 0], seen)
    if world > 1:
        dist.all_reduce(sums)
        dist.all_reduce(confusion)
    (n, top1, top5, loss), confusion = sums.tolist(), confusion.view(classes, classes).cpu()
    if not n:
        raise InputError("no test image could be read: is the test split of --data complete?")
    images = confusion.sum(dim=1)
    mean_class = (confusion.diagonal() / images)[images > 0].mean().item()
    return {"top1": 100 * top1 / n, "top5": 100 * top5 / n, "mean_class": 100 * mean_class, "val_loss": loss / n,
            "test_images": int(n), "test_img_s": n / (time.perf_counter() - begun)}, confusion


def sentence(values):
    return (f"top-1 {values['top1']:.2f}, top-5 {values['top5']:.2f}, mean over classes {values['mean_class']:.2f}, "
            f"loss {values['val_loss']:.4f} on {values['test_images']} images")


def write_classes(out, classes, confusion):
    """classes.csv: images and top-1 of each class, and the class it is most often taken for. Up to 100 classes:
    confusion.png, each row (true class) in shares of its images, white 0, dark blue 1."""
    with open(Path(out, "classes.csv"), "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "images", "top1", "most_confused_with", "confused_images"))
        for k, (name, row) in enumerate(zip(classes, confusion)):
            images, top1 = int(row.sum()), 100 * row[k].item() / max(1, row.sum().item())
            wrong, other = row.index_fill(0, torch.tensor(k), 0).max(dim=0)
            writer.writerow((name, images, f"{top1:.2f}", classes[other] if wrong else "", int(wrong)))
    K, font = len(classes), ImageFont.load_default(12)
    if K > 100:
        return
    cell = max(8, min(30, 900 // K))
    names = [name if len(name) <= 24 else name[:23] + "..." for name in classes] if cell >= 12 else [""] * K
    side, width = K * cell, max(90, 12 + max(int(font.getlength(name)) for name in names))
    rows, columns = (Image.new("RGB", (width, side), "white") for _ in range(2))
    for k, name in enumerate(names):
        ImageDraw.Draw(rows).text((width - 4, (k + 0.5) * cell), name, "black", font, anchor="rm")
        ImageDraw.Draw(columns).text((4, (k + 0.5) * cell), name, "black", font, anchor="lm")
    share = (confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    pixels = Image.fromarray((255 - share[..., None] * np.array([235, 180, 110])).astype(np.uint8))
    sheet = Image.new("RGB", (width + side + 12, width + side + 12), "white")
    sheet.paste(rows, (0, width))
    sheet.paste(columns.transpose(Image.Transpose.ROTATE_90), (width, 0))
    ImageDraw.Draw(sheet).rectangle([width - 1, width - 1, width + side, width + side], outline="black")
    sheet.paste(pixels.resize((side, side), Image.Resampling.NEAREST), (width, width))
    ImageDraw.Draw(sheet).text((8, 8), "rows: true\ncolumns:\npredicted", "black", font)
    sheet.save(Path(out, "confusion.png"))


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------
def shard(dataset, batch_size, args, rank, world, device):
    """Loader over this process's part of a data set, each item once over all processes."""
    return DataLoader(Subset(dataset, range(rank, len(dataset), world)), batch_size, num_workers=args.workers,
                      pin_memory=device.type == "cuda")


def make_optimizer(model, args, say):
    """AdamW or SGD over the layers' groups; says the rate of each layer and what of it decays."""
    groups = param_groups(model, args.weight_decay, args.layer_decay, model.depth)
    for layer in sorted({group["layer"] for group in groups}):
        own = [group for group in groups if group["layer"] == layer]
        parts = [f"{sum(p.numel() for p in g['params']):,} values at weight decay {g['weight_decay']:g}" for g in own]
        scale = own[0]["lr_scale"]
        say(f"  layer {layer:2d}: lr {args.lr * scale:.3g} = {args.lr:.3g} * {scale:.4f}; {', '.join(parts)}")
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)


def update_ema(pairs, decay):
    """averaged = decay * averaged + (1 - decay) * now, for pairs (averaged, now) of tensors; counters are copied."""
    for averaged, now in pairs:
        averaged.lerp_(now, 1 - decay) if averaged.is_floating_point() else averaged.copy_(now)


def run(args, rank, world, device):
    """One run: data, model, training with resume, evaluation, pictures -> the last evaluation, with 'seconds'."""
    args, say = resolve(args), print if rank == 0 else lambda *_: None
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    entries = {key: (getattr(args, key), value) for key, value in RECIPES[args.recipe].items()}
    say(f"\nrecipe {args.recipe}: " + ", ".join(f"{key} {now}" + (f" (recipe: {value})" if now != value else "")
                                                for key, (now, value) in entries.items()))
    # data
    if args.download:
        if rank == 0 and "make" in DATASETS[args.dataset]:
            for split in ("train", "test"):
                torchvision_items(args.dataset, args.data, split, download=True)
        if world > 1:
            dist.barrier()
        args.download = False    # no part of the run: the same command without it goes on
    train_set, test_set, classes, said = make_data(args)
    say(said)

    # model
    model = build_model(args, len(classes))
    if args.keep_blocks is not None and not 0 <= args.keep_blocks <= model.depth:
        raise InputError(f"--keep-blocks {args.keep_blocks} must lie in 0..{model.depth}")
    if args.init:
        load_encoder(model, args.init, args.keep_blocks)
    model.to(device)
    kept = "" if args.keep_blocks is None else f", its embedding and blocks 1..{args.keep_blocks} alone"
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    start = args.init + kept if args.init else "scratch"
    say(f"{args.model} at {'x'.join(map(str, args.image_size))}: {millions:.2f}M parameters, starting from {start}")
    if args.recipe == "knn":
        return run_knn(model, train_set, test_set, classes, args, rank, world, device)

    # recipe
    batches = EpochBatches(len(train_set), args.batch_size, args.accum_steps, rank, world, args.seed)
    loader = DataLoader(train_set, batch_sampler=batches, num_workers=args.workers, persistent_workers=args.workers > 0,
                        pin_memory=device.type == "cuda")
    test_loader = shard(test_set, max(64, batches.per_process), args, rank, world, device)
    if args.recipe == "linear" and batches.per_process < 2:
        raise InputError("the BatchNorm of --recipe linear needs 2 images per process: raise --batch-size")
    args.lr = args.base_lr * batches.batch / 256
    total, warmup = args.epochs * batches.steps, int(args.warmup_epochs * batches.steps)
    until, dtype = min(total, args.max_steps or total), amp_dtype(args.dtype, device)
    smaller = "" if batches.batch == args.batch_size else f" (not {args.batch_size}: the data set is smaller)"
    say(f"{batches.per_process} images x {world} process(es) x {args.accum_steps} accumulation = batch {batches.batch}"
        f"{smaller}; lr {args.lr:.3g} = {args.base_lr:g} * {batches.batch} / 256; {batches.steps} steps per epoch; "
        f"{device}, {dtype}")
    optimizer = make_optimizer(model, args, say)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    judged = copy.deepcopy(model) if args.ema else model    # what is evaluated, and saved in best.pt
    step, best, state = 0, {"top1": -1.0}, resume(out / "last.pt", args, len(train_set))
    if state and state["classes"] != classes:
        raise InputError(f"{out}/last.pt was trained on other classes than those of {args.data}: give another --out")
    if state:
        model.load_state_dict(state["model"])
        judged.load_state_dict(state["ema"] or state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
        say(f"{out}/last.pt: {'finished already' if step >= until else 'going on'} after step {step} of {total}")
    open_log(out / "log.jsonl", rank, args, step)
    if args.ema:
        pairs = list(zip(judged.state_dict().values(), model.state_dict().values()))
        optimizer.register_step_post_hook(lambda *_: update_ema(pairs, args.ema))
    student = torch.compile(model) if args.compile else model
    if world > 1:
        student = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None,
                                          gradient_as_bucket_view=True)
    skipped = 0

    def losses_of(student, batch):
        nonlocal skipped
        images, labels, _, unreadable = batch
        skipped += int(unreadable.sum())
        images = normalize(images.to(device, non_blocking=True), args.mean, args.std)
        targets = soft_targets(labels.to(device, non_blocking=True), len(classes), args.smoothing)
        if args.erasing:
            images = random_erasing(images, args.erasing)
        if args.mixup or args.cutmix:
            images, targets = mix_batch(images, targets, args.mixup, args.cutmix)
        return {"loss": soft_cross_entropy(student(images), targets)}

    def names_of(batch):
        return [str(train_set.items[i][0]) for i in batch[2].tolist()]

    def lr_of(step):
        return lr_at(step, total, warmup, args.lr, args.min_lr)

    def save(name, model, **training):
        if rank == 0:
            save_checkpoint(out / name, model=model.state_dict(), arch=model.arch, classes=classes, mean=args.mean,
                            std=args.std, step=step, best=best, args=json.loads(json.dumps(vars(args))), **training)

    def save_last():
        save("last.pt", model, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), images=len(train_set),
             ema=judged.state_dict() if args.ema else None)

    def report():
        nonlocal best
        judged.eval()
        for buffer in judged.buffers() if world > 1 else ():    # the probe's BatchNorm: that of the first
            dist.broadcast(buffer, 0)
        values, confusion = evaluate(judged, len(classes), test_loader, args, world, device)
        log_line(out / "log.jsonl", rank, step=step, **values)
        say(f"epoch {step // batches.steps}: {sentence(values)}")
        if values["top1"] > best["top1"]:
            best = dict(values, step=step)
            save("best.pt", judged)
        return values, confusion

    # training
    stop, begun = threading.Event(), time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while step < until:
        batches.epoch, batches.start = divmod(step, batches.steps)
        step, stopped = train_epoch(student, loader, losses_of, names_of, optimizer, scaler, lr_of, step, until, total,
                                    args, rank, world, device, stop)
        if skipped:
            say(f"epoch {batches.epoch + 1}: {skipped} unreadable files replaced in process {rank}")
        save_last()
        if stopped:
            raise SystemExit(f"stopped by SIGTERM after step {step}; the same command goes on from {out}/last.pt")
        if step < until and step % (batches.steps * args.eval_every) == 0:
            report()
            save_last()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)    # nothing left to save
    seconds = time.perf_counter() - begun
    values, confusion = report()
    save_last()
    if rank == 0:
        write_classes(out, classes, confusion)
        lines = read_log(out / "log.jsonl")
        curve = lambda key: [(v["step"], v[key]) for v in lines if key in v]
        draw_curves(out / "curves.png", {"loss by step": {"train": curve("loss"), "test": curve("val_loss")},
                                         "top-1 by step, %": {"test": curve("top1")}})
        print(f"last top-1 {values['top1']:.2f}, best {best['top1']:.2f} after epoch {best['step'] // batches.steps}; "
              f"{seconds:.0f} s\nlast.pt, best.pt, classes.csv and pictures are in {out}")
    return dict(values, seconds=seconds)


def run_knn(model, train_set, test_set, classes, args, rank, world, device):
    """The k-NN probe: features of the training images under test crops, then a weighted vote for each test image."""
    model.eval()
    train_set = LabelledImages(train_set.items, train_set.load, args.image_size, len(classes), train=False,
                               skip_corrupt=args.skip_corrupt)
    own = tqdm(shard(train_set, args.batch_size, args, rank, world, device), "features", disable=rank != 0, leave=False)
    features, labels = (gather_rows(x, world) for x in extract(model, own, args, device))
    features, labels = features[labels >= 0], labels[labels >= 0]

    def vote(images):    # -> logarithm of the share of votes, so that the loss is that of the votes as probabilities
        x = F.normalize(model(images).float(), dim=1)
        with torch.autocast(device.type, enabled=False):
            votes = knn_scores(x, features, labels, len(classes), args.neighbours, args.temperature)
        return (votes / votes.sum(dim=1, keepdim=True).clamp(min=1e-30)).clamp(min=1e-12).log()
    loader = shard(test_set, args.batch_size, args, rank, world, device)
    values, confusion = evaluate(vote, len(classes), loader, args, world, device)
    log_line(Path(args.out, "log.jsonl"), rank, args=vars(args), **values)
    if rank == 0:
        write_classes(args.out, classes, confusion)
        print(f"{args.neighbours} nearest neighbours: {sentence(values)}")
    return values


def sweep(args, rank, world, device):
    """Fig. 4: accuracy against the number of pre-trained blocks that are kept, one line per share of the data."""
    known = MODELS[resolve(change(args, data_fraction=[1.0])).model].keywords
    depth = known.get("depth") or sum(known["stages"])
    blocks = args.sweep_keep_blocks or range(depth + 1)
    if max(blocks) > depth or not all(0 < share <= 1 for share in args.data_fraction):    # now, not after hours
        raise InputError(f"--sweep-keep-blocks must lie in 0..{depth}, --data-fraction in (0, 1]")
    if not args.init or len(args.data_fraction) > 5:
        raise InputError("--sweep-keep-blocks needs --init FILE, and takes at most 5 values of --data-fraction")
    rows, seeds = [], args.sweep_seeds or [args.seed]
    for share, seed, k in ((share, seed, k) for share in args.data_fraction for seed in seeds for k in blocks):
        one = change(args, keep_blocks=k, data_fraction=[share], seed=seed, sweep_keep_blocks=None, sweep_seeds=None,
                     out=f"{args.out}/blocks{k}-data{share:g}-seed{seed}")
        rows.append((k, share, seed, round(run(one, rank, world, device)["top1"], 3)))
        if rank == 0:    # after every run, so that an interrupted sweep has its part
            with open(Path(args.out, "fig4.csv"), "w", newline="") as file:
                csv.writer(file).writerows([("keep_blocks", "data_fraction", "seed", "top1"), *rows])
            lines = {}    # label -> points, means over the seeds
            for x, y in sorted({r[:2] for r in rows}):
                values = [r[3] for r in rows if r[:2] == (x, y)]
                lines.setdefault(f"{100 * y:g}% of the data", []).append((x, sum(values) / len(values)))
            draw_curves(Path(args.out, "fig4.png"), {"top-1 in % by pre-trained blocks kept": lines})
    if rank == 0:
        print(f"\nFig. 4: {args.out}/fig4.csv, {args.out}/fig4.png")


def compare(args, rank, world, device):
    """The demo: the same training from scratch and from an encoder, side by side."""
    encoder, runs = args.init or "out/demo/encoder.pt", {}
    if Path(encoder).exists():
        like = resolve(change(args, init=encoder))
        args = change(args, model=like.model, patch_size=like.patch_size, image_size=like.image_size)
        runs[encoder] = run(change(args, init=encoder, out=f"{args.out}/pretrained"), rank, world, device)
    else:
        args = change(args, patch_size=args.patch_size or 8, image_size=args.image_size or [64])
    runs["scratch"] = run(change(args, init=None, out=f"{args.out}/scratch"), rank, world, device)
    if rank == 0:
        print(f"\n{'start':32s} top-1 %  seconds")
        for name, values in runs.items():
            print(f"{name:32s} {values['top1']:7.2f}  {values['seconds']:7.0f}")
        if len(runs) == 1:
            print(f"for the comparison run python pretrain_d2mae.py --demo first: it writes {encoder}")


def load_classifier(args, device):
    """The classifier of --init, or best.pt in --out -> model, class names, its options, path."""
    path = args.init or f"{args.out}/best.pt"
    file = read_file(path)
    if not isinstance(file, dict) or "classes" not in file or "recipe" not in file.get("args", ()):
        raise InputError(f"{path} holds no classifier with class names: give a best.pt of finetune.py by --init")
    stored = argparse.Namespace(**file["args"])
    model = build_model(stored, len(file["classes"]))
    model.load_state_dict(file.get("ema") or file["model"])
    return model.to(device).eval(), file["classes"], stored, path


@torch.no_grad()
def predict(args, device):
    """--predict: a line per image with its five likeliest classes and their probabilities."""
    model, classes, stored, _ = load_classifier(args, device)
    images = LabelledImages([(name, 0) for name in args.predict], read_image, stored.image_size, 1, train=False)
    for i, name in enumerate(args.predict):
        try:
            image = images[i][0]
        except InputError:
            raise InputError(f"--predict {name} is no readable image file") from None
        logits = model(normalize(image[None].to(device), stored.mean, stored.std))[0]
        top = logits.softmax(dim=0).topk(min(5, len(classes)))
        print(f"{name}: " + ", ".join(f"{classes[k]} {100 * p:.1f}%" for p, k in zip(*map(torch.Tensor.tolist, top))))


def evaluate_file(args, rank, world, device):
    """--eval: a classifier on the test split of --data, by default that of its training; the classes must agree."""
    model, classes, stored, path = load_classifier(args, device)
    where = dict(dataset=stored.dataset, data=stored.data)
    if args.data or args.dataset != "folder":    # another set than that of the training
        where = dict(data=args.data or f"data/{args.dataset}")
    args = change(args, image_size=stored.image_size, mean=stored.mean, std=stored.std, data_fraction=1.0, **where)
    _, test_set, names, said = make_data(args, train=False)
    if names != classes:
        first = next((i for i, (a, b) in enumerate(zip(classes, names)) if a != b), min(len(classes), len(names)))
        here, there = ((of + ["absent"])[min(first, len(of))] for of in (names, classes))
        raise InputError(f"{args.data} has {len(names)} classes, {path} was trained on {len(classes)}: class {first} "
                         f"is {here} here and {there} there; give the data set of the training")
    loader = tqdm(shard(test_set, args.batch_size or 64, args, rank, world, device), disable=rank != 0, leave=False)
    values, confusion = evaluate(model, len(classes), loader, args, world, device)
    if rank == 0:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        write_classes(args.out, classes, confusion)
        print(f"{said}\n{path}: {sentence(values)}; {values['test_img_s']:.0f} images/s\n{args.out}/classes.csv")


def main(args):
    rank, world, device = init_distributed(args.device)
    if args.predict:
        return predict(args, device)
    job = evaluate_file if args.eval else sweep if args.sweep_keep_blocks is not None else compare if args.demo else run
    job(args, rank, world, device)


if __name__ == "__main__":
    try:
        arguments = parse_args()
        main(parse_args(**DEMO) if arguments.demo else arguments)
    except (InputError, FloatingPointError, OSError) as error:    # after a loader process's traceback, its last line
        sys.exit(f"error: {str(error).strip().splitlines()[-1].removeprefix('models.InputError: ')}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
