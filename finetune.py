"""Fine-tuning and transfer of a pre-trained encoder to image classification (Sec. "experiments").

    torchrun --nproc_per_node=8 finetune.py --data data/imagenet --init out/pretrain/encoder.pt
    torchrun --nproc_per_node=8 finetune.py --data data/imagenet --init encoder.pt --rpe \
        --epochs 1000
    torchrun --nproc_per_node=2 finetune.py --recipe transfer --dataset cifar100 --download \
        --init encoder.pt
    python finetune.py --data my_pictures --init encoder.pt --shots 10 --batch-size 32
    python finetune.py --data data/imagenet --init encoder.pt --keep-blocks 6 \
        --data-fraction 0.1 --seed 1                                  # one point of Fig. 4
    python finetune.py --init out/finetune/best.pt --predict cat.jpg my_folder
    python tests/tools/demo.py finetune                                     # needs no files

The classifier is head(fc_norm(mean patch token)). Its encoder starts from --init, whole or up to
one of its blocks, or from random weights; its head starts from random weights. A recipe is one dict
of RECIPES; `--recipe mae mixup=0 erasing=0` overrides entries of it. Read RECIPES, then `train`.

Shapes: B images, K classes, H x W pixels.

NOTES, departures from the authors' code:
- Crops, flips and RandAugment are a function of (seed, epoch, image), mixing, erasing and
  stochastic depth one of (seed, epoch, process): a run does not depend on the number of workers,
  and one that was killed resumes to the same bits (on a CPU, or on GPUs of one kind with
  deterministic kernels).
- Every test image is counted once for any number of processes; the authors repeat some to fill a
  batch. Evaluation runs in float32, as theirs does; GPUs from Ampere on multiply in TensorFloat-32.
- best.pt is the best of all evaluations, one every epoch by default, on the images that are scored;
  the authors evaluate every 10 epochs.
- Mixup, CutMix and the rectangles of random erasing are torchvision's: a batch is mixed with itself
  shifted by one image (timm: reversed), and CutMix rounds its rectangle differently.
- The final norm is loaded from supervised files alone, as in the authors' DeiT rows; after
  pre-training it starts as the identity.
- Random weights of a plain ViT, also of the blocks that --keep-blocks leaves out, are MAE's (Xavier
  uniform, a head of std 2e-5); the authors' are timm's (truncated normal of std 0.02, the head
  too). With --rpe both follow BEiT, with a head of std 2e-5.
- With --rpe, the qkv biases of --init are loaded. The authors' model has a q_bias and a v_bias in
  their place, so those of a plain MAE file are not found, and start at zero; that k has no bias
  changes nothing, as the softmax cancels it.
- Transfer: the authors publish epochs, warm-up and rate of CIFAR-100, and one rate for the other
  data sets; all other entries of DATASETS are chosen here, in the proportions of CIFAR-100.
"""
import argparse
import math
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
from torchvision import datasets
from torchvision.transforms import RandomErasing, v2
from torchvision.transforms.v2.functional import (center_crop, pil_to_tensor, resize,
                                                  to_pil_image)
from tqdm import tqdm

from models import (ImageDataset, InputError, Parser, bounded, build_model, eval_loader,
                    init_distributed, list_images, log, lr_at, mix_seed, normalize, open_image,
                    param_groups, plain_errors, random_crop, read_file, resume, save, train_loader)

BICUBIC = Image.Resampling.BICUBIC
IMPROVED = dict(    # the paper's: light augmentation suits a small model
    epochs=300, warmup_epochs=5, batch_size=1024, base_lr=1e-3,    # each has an option
    clip_grad=0.0,                              # so has this
    optimizer="adamw", min_lr=1e-6, weight_decay=0.05,
    layer_decay=0.85,     # block k of n trains at lr * decay^(n + 1 - k), the embedding as k = 0
    drop_path=0.0,        # stochastic depth of the last block; grows linearly from 0
    smoothing=0.0,        # of labels
    mixup=0.2,            # alpha of Beta(alpha, alpha); if both are on, each batch takes one
    cutmix=0.0,
    rand_augment=10.0,    # mean level in 0 .. 10; torchvision counts to 30
    erasing=0.0,          # probability
    min_crop=0.08)        # smallest area of a crop
RECIPES = {    # the others override IMPROVED
    "improved": IMPROVED,
    "mae": dict(         # that of MAE, made for large models
        IMPROVED, epochs=100, drop_path=0.1, smoothing=0.1, mixup=0.8, cutmix=1.0,
        rand_augment=9.0, erasing=0.25),
    "transfer": dict(    # other data sets: crop and flip alone; DATASETS overrides it
        IMPROVED, epochs=50, warmup_epochs=10, batch_size=512, optimizer="sgd", base_lr=0.05,
        weight_decay=0.0, layer_decay=0.75, clip_grad=1.0, mixup=0.0, rand_augment=0.0),
}
# make: a data set of torchvision (loader=str: its items are file names, which are not read); train,
# val: its parts for training and testing; recipe: entries of "transfer" that differ from CIFAR's.
CIFAR = dict(train=[True], val=[False], recipe={})
SMALL = dict(train=["trainval"], val=["test"],
             recipe=dict(epochs=100, warmup_epochs=20, base_lr=0.015))
DATASETS = {
    "folder": dict(recipe={}),
    "cifar10": dict(CIFAR, make=datasets.CIFAR10),
    "cifar100": dict(CIFAR, make=datasets.CIFAR100),
    "flowers": dict(SMALL, make=partial(datasets.Flowers102, loader=str), train=["train", "val"],
                    recipe=dict(epochs=150, warmup_epochs=30, base_lr=0.015)),
    "pets": dict(SMALL, make=datasets.OxfordIIITPet),
    "aircraft": dict(SMALL, make=partial(datasets.FGVCAircraft, loader=str)),
    "cars": dict(SMALL, make=partial(datasets.StanfordCars, loader=str), train=["train"]),
}


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
    """Keep the upper `bits` bits of all values; 0, which ImageOps refuses, gives black."""
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


def build_mixing(args):
    """Mixup (arXiv 1710.09412) or CutMix (1905.04899); if both are on, one of them at random for
    each batch: images (B, 3, H, W), labels (B,) -> images, targets (B, K). If neither is on, images
    and labels pass through."""
    kinds = ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix))
    choices = [kind(alpha=alpha, num_classes=len(args.classes)) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(choices or [v2.Identity()])


# --------------------------------------------------------------------------------------------------
# Method: model and optimizer
# --------------------------------------------------------------------------------------------------
def build_classifier(args):
    """Classifier of args.classes, its encoder from --init if given; the defaults that depend on
    that file are filled in."""
    model = build_model(args.model, args.init, args.keep_blocks, img_size=args.image_size,
                        patch_size=args.patch_size, num_classes=len(args.classes),
                        drop_path=args.drop_path, vit=dict(rel_pos_bias=args.rpe))
    args.arch = model.arch
    args.image_size = model.img_size
    args.mean = args.mean or model.mean
    args.std = args.std or model.std
    if args.rpe and model.arch["kind"] != "vit":
        raise InputError("--rpe is defined for ViT: Hiera attends in windows and pools its tokens")
    if (args.keep_blocks or 0) > model.depth:
        raise InputError(f"--keep-blocks {args.keep_blocks}: {args.init} has {model.depth} blocks")
    if args.rpe:
        init_beit(model)
    return model


def init_beit(model):
    """Initialise the matrices that --init has not filled as BEiT (arXiv 2106.08254), and so the
    authors' models with relative position bias: normal, of std 0.02, which attn.proj and mlp.fc2 of
    block k divide by sqrt(2 k)."""
    kept = {"head.weight", *getattr(model, "loaded", ())}
    for name, p in model.named_parameters():
        if p.dim() > 1 and name.endswith("weight") and name not in kept:
            std = 0.02
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                std /= math.sqrt(2 + 2 * int(name.split(".")[1]))    # which counts from 0
            nn.init.trunc_normal_(p, std=std)


def build_optimizer(model, args, lr):
    """AdamW or SGD over the layers' groups, whose rates are lr * lr_scale."""
    groups = param_groups(model, args.weight_decay, args.layer_decay, model.depth)
    if args.optimizer == "adamw":
        return AdamW(groups, lr, betas=(0.9, 0.999), fused=True)
    return SGD(groups, lr, momentum=0.9, nesterov=True)    # in fp16 the scaler syncs once a step


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def train(args):
    """Train into args.out: a new run, or the one that last.pt there continues."""
    rank, world, device, dtype = run = init_distributed(args, minutes=120 if args.download else 10)
    torch.manual_seed(args.seed)
    train_set, test_set = make_data(args, rank, world)
    model = build_classifier(args).to(device)
    mixing = build_mixing(args)
    loader = train_loader(train_set, args, run)
    steps = len(loader) // args.accum_steps    # optimizer steps per epoch
    peak_lr = args.base_lr * loader.sampler.batch_size / 256
    optimizer = build_optimizer(model, args, peak_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = resume(args, rank, world, model, optimizer, scaler)
    kept = state["epoch"] and Path(args.out, "best.pt").exists()
    best = state["best"] if kept else {"top1": -1.0}

    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)

    for epoch in range(state["epoch"], args.epochs):
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(mix_seed(args.seed, epoch, rank))    # of mixing, erasing and drop path
        network.train()
        bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", disable=rank > 0)
        for i, (images, labels) in enumerate(bar):
            step = epoch * steps + i // args.accum_steps
            update = (i + 1) % args.accum_steps == 0
            images = normalize(images, args.mean, args.std)
            random_erasing(images, args.erasing)
            images, targets = mixing(images, labels)
            network.require_backward_grad_sync = update    # DistributedDataParallel reads it
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = network(images)                                        # (B, K)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
            scaler.scale(loss / args.accum_steps).backward()
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
                             grad_norm=grad_norm, loss=loss)
                bar.set_postfix(loss=f"{values['loss']:.4f}")

        if (epoch + 1) % args.eval_every == 0 and epoch + 1 < args.epochs:
            best = report(args, run, model, test_set, epoch + 1, steps, best)
        save(args, rank, "last.pt", model, epoch=epoch + 1, best=best,
             optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    report(args, run, model, test_set, args.epochs, steps, best)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
def centre_crop(image, size):
    """The authors' test image: shorter side to size / 0.875 (256 for 224), bicubic, then the centre
    -> Pillow RGB of `size`, height and width."""
    return center_crop(resize(image, [int(max(size) / 0.875)], BICUBIC), size)


class LabelledImages(ImageDataset):
    """Item (epoch, index) -> image (3, h, w) uint8, label. All randomness comes from (seed, epoch,
    index).

    items: [(picture, label)], a picture being a path or pixels (H, W, 3). Training images are
    cropped, flipped and RandAugmented, test images centre crops.
    """

    def __init__(self, items, args, train=True):
        pictures, self.labels = zip(*items)
        super().__init__(pictures, args, train)

    def transform(self, image, index):
        args = self.args
        label = self.labels[index]
        if not self.train:
            return pil_to_tensor(centre_crop(image, args.image_size)), label
        pixels = random_crop(image, args.image_size, (args.min_crop, 1))
        if args.rand_augment:
            fill = tuple(round(255 * value) for value in args.mean)
            image = rand_augment(to_pil_image(pixels), args.rand_augment, fill)
            pixels = pil_to_tensor(image)
        return pixels, label


def make_data(args, rank, world):
    """-> training set, test set, of the same classes. With --download, process 0 comes first."""
    if args.download and rank > 0:
        dist.barrier()
    items, args.classes = list_items(args, "train")
    test_items, test_classes = list_items(args, "val")
    if args.download and rank == 0 and world > 1:
        dist.barrier()
    check_classes(args.classes, test_classes, "the training set", "the test set")
    items = select(items, args.data_fraction, args.shots, args.seed)
    args.train_images = len(items)    # compared on resuming, as are the classes
    args.test_images = len(test_items)
    return LabelledImages(items, args), LabelledImages(test_items, args, train=False)


def list_items(args, split):
    """Split "train" or "val" of --dataset -> [(picture, label)], class names; or InputError."""
    if args.dataset == "folder":
        return list_folder(Path(args.data).resolve(), split)
    items = []
    for part in DATASETS[args.dataset][split]:
        try:
            pairs, classes = list_torchvision(args, part)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise InputError(f"--dataset {args.dataset} cannot be read from {args.data} "
                             f"({str(error).splitlines()[0]}): add --download, or give its folder "
                             "as --data; the cars: github.com/pytorch/vision/issues/7545") from None
        items += [(picture, int(label)) for picture, label in pairs]
    return items, list(classes)


def list_folder(root, split):
    """root/split/CLASS/... -> [(file, label)], class names, or InputError."""
    folders = sorted(f for f in (root / split).glob("[!.]*") if f.is_dir())
    if not folders:
        remedy = "it must hold train/CLASS/ and val/CLASS/ (ImageNet's val: see valprep.sh)"
        if root.name in ("train", "val"):
            remedy = f"give the folder above, {root.parent}"
        raise InputError(f"--data {root} has no folders of classes in {split}: {remedy}")
    items = [(file, label) for label, folder in enumerate(folders) for file in list_images(folder)]
    return items, [folder.name for folder in folders]


def list_torchvision(args, part):
    """A part of a data set of torchvision -> [(file or pixels, label)], class names."""
    data = DATASETS[args.dataset]["make"](args.data, part, download=args.download)
    if args.dataset.startswith("cifar"):
        return zip(data.data, data.targets), data.classes
    if args.dataset != "pets":
        return [data[i] for i in range(len(data))], data.classes
    root = Path(args.data, "oxford-iiit-pet")    # this set takes no loader: read its list of files
    rows = Path(root, "annotations", f"{part}.txt").read_text().splitlines()
    pairs = [(f"{root}/images/{name}.jpg", int(label) - 1)    # of name, label from 1, and two more
             for name, label, _, _ in map(str.split, rows)]
    return pairs, data.classes


def select(items, fraction, shots, seed):
    """Keep a fraction or `shots` of each class's items (at least one), in their order. Subsets are
    nested."""
    members = {}    # of each class
    for index, (_, label) in enumerate(items):
        members.setdefault(label, []).append(index)
    kept = []
    for label, indices in members.items():
        generator = torch.Generator().manual_seed(mix_seed(seed, label))
        order = torch.randperm(len(indices), generator=generator).tolist()
        share = max(1, round(fraction * len(indices)))
        kept += [indices[i] for i in order[:share][:shots]]
    return [items[i] for i in sorted(kept)]


def check_classes(a, b, name_a, name_b):
    """Raise InputError unless the two lists of class names are the same."""
    if a != b:
        alone = sorted(set(a) ^ set(b))
        raise InputError(f"{name_a} has {len(a)} classes, {name_b} {len(b)}, not the same: only "
                         f"one of them has {', '.join(alone[:5])}")


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
def report(args, run, model, test_set, epoch, steps, best):
    """Evaluate on all processes; process 0 logs, saves the best classifier until now, and prints
    the result of a finished run -> top1 and epoch of the best."""
    rank, world, _, _ = run
    values = evaluate(args, run, model, test_set)
    if values["top1"] > best["top1"]:
        best = dict(top1=values["top1"], epoch=epoch)
        save(args, rank, "best.pt", model, **best)
    log(args, rank, world, epoch=epoch, step=epoch * steps, **values)
    if rank == 0 and epoch == args.epochs:
        print(f"finished: top-1 {values['top1']:.2f} in the last epoch, {epoch}, and "
              f"{best['top1']:.2f} in the best, {best['epoch']}, which {args.out}/best.pt holds "
              "and which was chosen on the test images")
        if values["mean_class"] < 110 / len(args.classes):
            print("that is no better than chance: give more --epochs, a higher --base-lr or an "
                  "--init (README, 'Your own images')")
    return best


@torch.no_grad()
def evaluate(args, run, model, test_set):
    """Accuracies in % and loss over the test images, in float32, each image once for any number of
    processes -> dict, which process 0 prints."""
    rank, world, device, _ = run
    model.eval()
    sums = torch.zeros(len(args.classes), 4, device=device)    # images, right, in five, loss
    for images, labels in eval_loader(test_set, 128, args, run):
        logits = model(normalize(images, args.mean, args.std))                  # (B, K)
        guesses = logits.topk(min(5, len(args.classes))).indices                # best first
        right = guesses == labels[:, None]                                      # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="none")
        row = torch.stack([torch.ones_like(loss), right[:, 0], right.any(dim=1), loss], dim=1)
        sums.index_add_(0, labels, row)
    if world > 1:
        dist.all_reduce(sums)
    n, right, in_five, loss = sums.sum(dim=0).tolist()
    if not n:
        raise InputError("no test image can be read: nothing is left to evaluate on")
    of_class = 100 * sums[:, 1] / sums[:, 0]                # NaN for a class without images
    values = dict(top1=100 * right / n, top5=100 * in_five / n, val_loss=loss / n,
                  mean_class=of_class.nanmean().item(), test_images=int(n))
    if rank == 0:
        tqdm.write("top-1 {top1:.2f}, top-5 {top5:.2f}, mean over classes {mean_class:.2f}, loss "
                   "{val_loss:.4f} on {test_images} images, ".format(**values)
                   + ("TF32" if device.type == "cuda" else "float32"))
    return values


def load_classifier(args):
    """The classifier of --init, by default best.pt of --out; by default its data set is that of
    its training."""
    args.init = args.init or f"{args.out}/best.pt"
    file = read_file(args.init)
    stored = file.get("args", {})
    if "recipe" not in stored:
        raise InputError(f"{args.init} is no classifier: give best.pt of this script as --init")
    args.classes = stored["classes"]
    args.rpe = stored["rpe"]
    args.drop_path = 0.0
    args.data = args.data or (f"data/{args.dataset}" if args.dataset else stored["data"])
    args.dataset = args.dataset or stored["dataset"]
    model = build_classifier(args)
    head = {k: v for k, v in file["model"].items() if k.startswith("head.")}
    model.load_state_dict(head, strict=False)
    print(f"{args.init}: epoch {file['epoch']}, {len(args.classes)} classes, images of "
          f"{args.image_size} pixels")
    return model.eval()


@torch.no_grad()
def predict(args, model, device):
    """Print the five likeliest classes of each image of --predict and their probabilities. Raises
    OSError at the end if some images cannot be read."""
    files = []
    for name in args.predict:
        files += list_images(name) if Path(name).is_dir() else [name]
    bad = []
    for file in files:
        try:
            image = centre_crop(open_image(file), args.image_size)
        except OSError as error:
            bad.append(str(error))
            continue
        pixels = pil_to_tensor(image)[None].to(device)
        logits = model(normalize(pixels, args.mean, args.std))[0]
        top = logits.softmax(0).topk(min(5, len(args.classes)))
        print(f"{file}: " + ", ".join(f"{args.classes[k]} {100 * p:.1f}%" for p, k in zip(*top)))
    if bad:
        raise OSError("; ".join(bad))


# --------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's recipes
# --------------------------------------------------------------------------------------------------
def recipe_word(text):
    """An argparse type: the name of a recipe, or KEY=VALUE for a number in it, as a pair."""
    if text in RECIPES:
        return text
    key, _, value = text.partition("=")
    if not isinstance(IMPROVED.get(key), float):
        raise argparse.ArgumentTypeError(f"{text} is neither a recipe ({', '.join(RECIPES)}) nor "
                                         "KEY=VALUE for a number in IMPROVED of finetune.py")
    return key, bounded(float, 0, 10)(value)


USED = "eval predict init out model image_size mean std device"    # by --eval and --predict
EVALUATED = " dataset data download workers skip_corrupt"          # by --eval alone


def parse_args(argv=None):
    """Options of the command line, or of the list `argv`."""
    parser = Parser(__doc__)
    add = parser.group("model")
    add("--init", help="checkpoint to start from (README, 'Checkpoints'); default: random weights; "
                       "with --eval, --predict the classifier, by default best.pt of --out")
    add("--keep-blocks", low=0,
        help="load only the embedding and the first KEEP_BLOCKS blocks of --init (Fig. 4)")
    add("--model", help="default: that of --init, else vit_tiny, the paper's; for small images "
                        "vit_nano (1.4M parameters), vit_pico (0.4M)")
    add("--rpe", action="store_true",
        help="relative position bias in every block, zero where --init has none")
    add("--image-size", low=1, nargs="+",
        help="side, or height and width, in pixels; default: that of --init, else 224")
    add("--patch-size", low=1, help="side of a ViT patch; default: that of --init, else of --model")

    add = parser.group("data")
    add("--dataset", choices=tuple(DATASETS),
        help="folder (default): train/CLASS and val/CLASS in --data; others: of torchvision")
    add("--data", help="root of the data set; default: data/imagenet, or data/DATASET")
    add("--download", action="store_true", help="let torchvision download it into --data first")
    add("--data-fraction", type=float, low=0, high=1, default=1.0,
        help="share of each class's training images (Fig. 4)")
    add("--shots", low=1, help="training images per class; default: all")
    parser.pixel_options(add)

    add = parser.group("recipe; these options override its entries")
    add("--recipe", type=recipe_word, nargs="+",
        help="improved, mae or transfer, then KEY=VALUE for entries to override; default: improved")
    add("--epochs", low=1, help="paper: improved 300 (1000 with --rpe), mae 100, CIFAR-100 50")
    add("--warmup-epochs", type=float, low=0,
        help="linear from 0; default: the recipe's, scaled down for shorter runs")
    add("--base-lr", type=float, low=0,
        help="per 256 images: lr = base_lr * batch_size / 256; paper: 1e-3, CIFAR-100 0.05")
    add("--lr", choices=["--base-lr"], help=argparse.SUPPRESS)    # argparse then names --base-lr

    add = parser.group("evaluation")
    add("--eval", action="store_true", help="evaluate a classifier on the test images, and exit")
    add("--predict", nargs="+", metavar="PATH",
        help="print the likeliest classes of images, or of all images in folders, and exit")

    add = parser.run_options("out/finetune", batch_size=None, eval_every=1, clip_grad=None)
    add("--compile", action="store_true", help="torch.compile the model for training")
    args = parser.parse_args(argv)
    if args.eval or args.predict:
        parser.check_unread(args, "a trained classifier", USED + EVALUATED * args.eval)
    return args


def resolve(args):
    """Fill in the recipe and the defaults that depend on other options; raise InputError for
    contradictory ones."""
    args.dataset = args.dataset or "folder"
    args.data = args.data or f"data/{'imagenet' if args.dataset == 'folder' else args.dataset}"
    words = ["improved", *(args.recipe or [])]
    changes = [word for word in words if word not in RECIPES]
    args.recipe = [word for word in words if word in RECIPES][-1]
    recipe = dict(RECIPES[args.recipe])
    if args.recipe == "transfer":
        recipe.update(DATASETS[args.dataset]["recipe"])
    recipe.update(changes)
    if args.epochs:    # a shorter run warms up less, a longer one as long
        recipe["warmup_epochs"] *= min(1, args.epochs / recipe["epochs"])
    for key, value in recipe.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)

    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup-epochs must be fewer than --epochs {args.epochs}")
    if args.keep_blocks is not None and not args.init:
        raise InputError("--keep-blocks takes blocks of a pre-trained encoder: give --init FILE")
    if args.download and args.dataset == "folder":
        raise InputError("--download has no effect on folders: give --dataset")
    return args


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------
def main(args):
    """The run that the options describe: training, --eval or --predict."""
    if not (args.eval or args.predict):
        train(resolve(args))
        return
    run = init_distributed(args)
    device = run[2]
    model = load_classifier(args).to(device)
    if args.eval:
        items, classes = list_items(args, "val")
        check_classes(args.classes, classes, args.init, args.data)
        evaluate(args, run, model, LabelledImages(items, args, train=False))
    if args.predict:
        predict(args, model, device)


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
