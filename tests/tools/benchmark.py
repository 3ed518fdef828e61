"""Speed and exactness of this project on this machine, measured by one command.

    python tests/tools/benchmark.py              # all rows of the device, on an idle machine
    python tests/tools/benchmark.py --device cpu pretrain    # the given rows
    python tests/tools/benchmark.py --json result.json       # the tables as JSON, too

It needs neither data nor checkpoints: images are drawn, weights are random. On a GPU it takes about
six minutes: errors against the CPU (numerics); images/s of training steps, eager and compiled
(steps); crops/s of the loader (loading); the hours of the paper's runs that follow (hours); and
frames/s of the tracker (fps). On a CPU it compares this project with straightforward
implementations (pretrain, finetune, loading, segment, track, analyze), also of loader processes
under each start method (loaders, epochs), and bfloat16 with float32 (bf16). Sides that are compared
take turns, and each figure is a median over the rounds, so that a machine that drifts favours
neither.
"""
import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import finetune  # noqa: E402
import models  # noqa: E402
import pretrain_d2mae  # noqa: E402
import segment  # noqa: E402
import track  # noqa: E402
from analyze import minibatch_cka  # noqa: E402
from models import (IMAGENET_MEAN, IMAGENET_STD, Names, build_model, eval_loader,  # noqa: E402
                    list_images, normalize, param_groups, train_loader)

IMAGENET = 1_281_167    # training images
RESULTS = {}            # table -> rows, dicts of column -> value


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------
def record(table, **row):
    """Print a row, and keep it for the tables at the end."""
    RESULTS.setdefault(table, []).append(row)
    print(f"{table}: " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def race(args, *functions, rounds=None):
    """Median seconds of each function; they take turns, after one warm-up each."""
    wait = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    times = [[] for _ in functions]
    rounds = 1 + min(args.rounds, rounds or args.rounds)
    for _, (function, record_of) in itertools.product(range(rounds), zip(functions, times)):
        wait()
        begun = time.perf_counter()
        function()
        wait()
        record_of.append(time.perf_counter() - begun)
    return [statistics.median(t[1:]) for t in times]


def compare(args, what, unit, amount, ours, plain, rounds=None):
    """Record `amount` things over the seconds of each of two functions."""
    fast, slow = race(args, ours, plain, rounds=rounds)
    record("against plain versions", what=f"{what} ({unit})", here=f"{amount / fast:.4g}",
           plain=f"{amount / slow:.4g}", ratio=f"{slow / fast:.2f}x")


# --------------------------------------------------------------------------------------------------
# The machine
# --------------------------------------------------------------------------------------------------
def describe(args):
    """Versions, the device, and the kernels of scaled_dot_product_attention that it has."""
    card = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.processor()
    rows = dict(device=card or "cpu", cores=os.cpu_count(), torch=torch.__version__,
                torchvision=torchvision.__version__, python=platform.python_version())
    if args.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        rows.update(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
                    capability=torch.cuda.get_device_capability(),
                    memory=f"{free / 2 ** 30:.0f} of {total / 2 ** 30:.0f} GiB free")
    for dtype, bias in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        name = f"attention in {str(dtype)[6:]}{' with bias' if bias else ''}"
        rows[name] = ", ".join(attention_kernels(args.device, dtype, bias))
    for key, value in rows.items():
        record("machine", what=key, value=value)


def attention_kernels(device, dtype, bias):
    """Names of the kernels that take the tokens of ViT-Tiny, with a trainable bias or without."""
    q = torch.randn(2, 12, 197, 16, device=device, dtype=dtype, requires_grad=True)
    mask = torch.randn(1, 12, 197, 197, device=device, dtype=dtype, requires_grad=True)
    names = []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)), warnings.catch_warnings(action="ignore"):
                F.scaled_dot_product_attention(q, q, q, mask if bias else None).sum().backward()
            names.append(name.split("_")[0].lower())
        except RuntimeError:
            pass    # not on this device
    return names


# --------------------------------------------------------------------------------------------------
# Numerics: every network, in three precisions, against float32 on the CPU
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def fill_weights(model):
    """Random weights that let no branch vanish: 0.05 * normal, plus 1 for the scale of a norm."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.normal_(std=0.05)
            p.add_(float(p.dim() == 1 and name.endswith("weight")))
    return model


def build_student(words, teacher):
    """The student that pretrain_d2mae.py builds for options, and the loss of its step: of (network,
    images (B, 3, H, W) normalised, noise (B, cells)). teacher: a model in memory, or None."""
    args = pretrain_d2mae.parse_args([*words, *(["--teacher", "in memory"] if teacher else [])])
    args = pretrain_d2mae.resolve(args)
    student, _ = pretrain_d2mae.build_student(argparse.Namespace(**{**vars(args), "teacher": None}))
    if teacher:
        student.distillation = pretrain_d2mae.build_distillation(args, student.encoder, teacher)

    def loss(network, images, noise):
        ids_keep, ids_masked = pretrain_d2mae.random_masking(noise, args.mask_ratio)
        maps = teacher and student.distillation.target_maps(teacher, images, ids_keep)
        return network(images, ids_keep, ids_masked, maps)["loss"]
    return student, loss


def small_pretraining(method, model="vit_nano", **options):
    """A method of pretrain_d2mae.py at 64 pixels -> model, inputs, loss."""
    sizes = [] if model == "hiera_tiny" else ["--patch-size", "8"]
    choices = itertools.chain(*((f"--{k}", v) for k, v in options.items()))
    teacher = None
    if method != "mae":
        patch = {} if model == "hiera_tiny" else dict(patch_size=8)
        name = "hiera_tiny" if model == "hiera_tiny" else "vit_nano"
        teacher = build_model(name, img_size=64, **patch)
        teacher = fill_weights(teacher).eval().requires_grad_(False)
    student, step = build_student(["--model", model, "--image-size", "64", "--method", method,
                                   "--mask-ratio", "0.75", *sizes, *choices], teacher)

    def loss(model, images, noise):
        if teacher:
            teacher.to(images.device)
        return step(model, images, noise)
    return fill_weights(student), (torch.randn(4, 3, 64, 64), torch.rand(4, student.cells)), loss


def small_classification(name="vit_tiny", **options):
    model = fill_weights(build_model(name, img_size=64, num_classes=5, **options))

    def loss(model, images, labels):
        return F.cross_entropy(model(images).float(), labels)
    return model, (torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])), loss


def small_segmentation():
    encoder = build_model("vit_nano", img_size=64, patch_size=8, rel_pos_bias=True)
    model = segment.SemanticFPN(fill_weights(encoder), 5, dropout=0.0)

    def loss(model, images, labels):
        return segment.segmentation_loss(model(images), labels)
    return model, (torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))), loss


def small_tracking(keep_rate):
    encoder = fill_weights(build_model("vit_nano", img_size=32, patch_size=8))
    model = track.Tracker(encoder, template_size=32, search_size=64)
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.4], [0.5, 0.1, 0.3, 0.3]])

    def loss(model, template, search, boxes):
        return track.tracking_losses(*model(template, search, keep_rate), boxes)["loss"]
    return model, (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 64), boxes), loss


NETWORKS = {    # -> model, inputs, loss(model, *inputs)
    "MAE": lambda: small_pretraining("mae"),
    "D-MAE": lambda: small_pretraining("d-mae"),
    "D2-MAE": lambda: small_pretraining("d2-mae"),
    "hidden states": lambda: small_pretraining("d-mae", distill="hidden"),
    "Hiera, MAE": lambda: small_pretraining("mae", "hiera_tiny"),
    "Hiera, D-MAE": lambda: small_pretraining("d-mae", "hiera_tiny"),
    "ViT": small_classification,
    "ViT with RPE": lambda: small_classification(rel_pos_bias=True),
    "Hiera": lambda: small_classification("hiera_tiny"),
    "segmentation": small_segmentation,
    "tracking": lambda: small_tracking(1.0),
    "tracking, elimination": lambda: small_tracking(0.7),
}
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32_ONLY = ("tracking, elimination",)    # else rounding changes which tokens are kept


def full_float32():
    """Switch TensorFloat-32 off, in matrix products and convolutions."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def errors(name, device, dtype):
    """Relative errors of a network against float32 on the CPU -> that of the loss, and that of each
    tensor's gradient. Tensors of small gradients are measured by 1 % of the largest norm."""
    torch.manual_seed(0)
    model, inputs, loss_of = NETWORKS[name]()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    results = []
    for where, precision in (("cpu", torch.float32), (device, dtype)):
        model.load_state_dict(state)    # statistics of batch norms move
        model.to(where).zero_grad()
        with torch.autocast(torch.device(where).type, precision, precision != torch.float32):
            loss = loss_of(model, *(x.to(where) for x in inputs))
        (1024 * loss).backward()    # as under a loss scaler
        gradients = {k: p.grad.to("cpu", copy=True) for k, p in model.named_parameters()
                     if p.grad is not None}
        results.append((loss.item(), gradients))
    (loss, gradients), (other_loss, others) = results
    largest = max(g.norm() for g in gradients.values())
    return abs(other_loss / loss - 1), {
        k: ((others[k] - g).norm() / (g.norm() + 0.01 * largest)).item()
        for k, g in gradients.items()}


def bench_numerics(args):
    full_float32()
    for name, dtype in itertools.product(NETWORKS, PRECISIONS):
        if dtype == torch.float32 or name not in FLOAT32_ONLY:
            loss, gradients = errors(name, args.device, dtype)
            worst = max(gradients, key=gradients.get)
            record("relative errors against float32 on the CPU", network=name,
                   precision=str(dtype)[6:], loss=f"{loss:.1e}",
                   gradients=f"{statistics.median(gradients.values()):.1e}",
                   worst=f"{gradients[worst]:.1e}", tensor=worst)


# --------------------------------------------------------------------------------------------------
# Training steps
# --------------------------------------------------------------------------------------------------
METHODS = ("d2-mae", "d-mae", "mae", "fine-tuning")


def build_pretraining(args, method, batch):
    """The paper's student and its teacher, ViT-Base at 224 -> student, teacher, loss, images,
    noise."""
    teacher = None
    if method != "mae":
        teacher = build_model("vit_base")
        teacher = teacher.to(args.device).eval().requires_grad_(False)
    student, loss = build_student(["--method", method], teacher)
    images = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8, device=args.device)
    noise = torch.rand(batch, 196, device=args.device)
    return student.to(args.device), teacher, loss, images, noise


def build_loss(args, method, batch, compiled=False, dtype=None):
    """Model and loss of a training step as in the scripts, on images that are on the device, in
    bfloat16 on a GPU."""
    wrap = torch.compile if compiled else lambda function: function
    dtype = dtype or (torch.bfloat16 if args.device.type == "cuda" else torch.float32)
    autocast = torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32)
    if method == "fine-tuning":
        model, mixing, images, labels = build_finetuning(args, batch)
        network = wrap(model)

        def loss():
            x, targets = mixing(normalize(images), labels)
            with autocast:
                logits = network(x).float()
            return F.cross_entropy(logits, targets)
        return model, loss

    model, teacher, loss_of, images, noise = build_pretraining(args, method, batch)
    network = wrap(model)
    if teacher:
        model.distillation.target_maps = wrap(model.distillation.target_maps)

    def loss():
        with autocast:
            return loss_of(network, normalize(images), noise)
    return model, loss


def update(model, optimizer, loss):
    """The rest of a training step."""
    loss.backward()
    clip_grad_norm_(model.parameters(), math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def matmul_speed(args):
    """Operations per second of a large matrix product, in bfloat16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if args.device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
    (seconds,) = race(args, lambda: [a @ b for _ in range(5)])
    return 5 * 2 * n ** 3 / seconds


def bench_steps(args):
    """Images/s, memory and operations/s of whole steps at 224 pixels, in bf16 on a GPU. Compiled
    ones that would begin after --minutes are left out."""
    torch.set_float32_matmul_precision("high")    # as in a run
    torch.backends.cudnn.allow_tf32 = True
    peak = matmul_speed(args)
    record("machine", what="large matrix product", value=f"{peak / 1e12:.3g} TFLOP/s")
    operations = {}
    for compiled, batch, method in itertools.product((False, True), args.micro_batches, METHODS):
        row = dict(step=method, images=batch, mode="compiled" if compiled else "eager")
        if compiled and time.perf_counter() - args.begun > 60 * args.minutes:
            record("steps", **row, result="left out: --minutes")
            continue
        try:
            seconds = time_step(args, method, batch, compiled, operations)
        except torch.OutOfMemoryError:
            record("steps", **row, result="out of memory")
            continue
        speed = operations.get((method, batch), math.nan) / seconds
        row.update(images_per_s=round(batch / seconds, 1), tflops=round(speed / 1e12, 2),
                   share_of_matmul=f"{speed / peak:.0%}")
        if args.device.type == "cuda":
            row["memory"] = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
        record("steps", **row)


def time_step(args, method, batch, compiled, operations):
    """Median seconds of a step; an eager one also fills in its number of `operations`."""
    torch.compiler.reset()
    model, loss = build_loss(args, method, batch, compiled)
    optimizer = AdamW(param_groups(model, 0.05), 1e-5, fused=True)
    if not compiled:
        with FlopCounterMode(display=False) as counter:
            update(model, optimizer, loss())
        operations[method, batch] = counter.get_total_flops()
    update(model, optimizer, loss())
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return race(args, lambda: update(model, optimizer, loss()))[0]


# --------------------------------------------------------------------------------------------------
# Steps on a CPU, against plain versions
# --------------------------------------------------------------------------------------------------
def explicit_attention(attn, x):
    """Softmax attention written out, as a plain ViT has it -> output, logits, probabilities."""
    B, T, D = x.shape
    qkv = attn.qkv(x).reshape(B, T, 3, attn.num_heads, D // attn.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    logits = (q @ k.transpose(-2, -1)) * (D // attn.num_heads) ** -0.5
    probs = logits.softmax(dim=-1)
    return attn.proj((probs @ v).transpose(1, 2).reshape(B, T, D)), logits, probs


def explicit_block(block, x):
    y, logits, _ = explicit_attention(block.attn, block.norm1(x))
    x = x + y
    return x + block.mlp(block.norm2(x)), logits


def plain_encoder(vit, images, ids_keep):
    """Embeds every patch, picks the visible ones, runs every block with explicit attention ->
    features, logits of the last block."""
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
    x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[2]))
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    features = {}
    for number, block in enumerate(vit.blocks, start=1):
        x, logits = explicit_block(block, x)
        features[number] = x
    return features, logits


def plain_loss(model, teacher, images, noise):
    """The textbook step: embed all, decode all, predict all, keep the masked part of the loss."""
    images = normalize(images)
    B, N = noise.shape
    V = N // 4
    ids = noise.argsort(dim=1)
    ids_keep = ids[:, :V]
    restore = ids.argsort(dim=1)
    features, _ = plain_encoder(model.encoder, images, ids_keep)
    x = model.decoder_embed(model.encoder.norm(features[model.decoder_tap]))
    full = torch.cat([x[:, 1:], model.mask_token.expand(B, N - V, -1)], dim=1)
    full = full.gather(1, restore[..., None].expand(-1, -1, full.shape[2]))
    x = torch.cat([x[:, :1], full], dim=1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x, _ = explicit_block(block, x)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    p = model.encoder.patch_size
    target = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).reshape(B, N, -1)
    variance = target.var(-1, keepdim=True)
    target = (target - target.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    masked = torch.ones(B, N, device=images.device).scatter(1, ids_keep, 0)
    loss = (((pred - target) ** 2).mean(-1) * masked).sum() / masked.sum()
    if teacher is None:
        return loss
    with torch.no_grad():
        _, truth = plain_encoder(teacher, images, ids_keep)
    distillation = model.distillation
    heads = model.encoder.blocks[-1].attn.num_heads
    x = distillation.norm(features[model.encoder.depth])
    q, k = distillation.qk(x).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    student = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return loss + F.mse_loss(distillation.adapter(student), truth)


def bench_pretrain(args, batch=32):
    """D2-MAE and MAE steps at 224 pixels with ViT-Base as the teacher, in float32."""
    full_float32()
    for method in ("d2-mae", "mae"):
        model, teacher, loss_of, images, noise = build_pretraining(args, method, batch)
        optimizer = AdamW(param_groups(model, 0.05), 1e-5, fused=True)

        def loss():
            return loss_of(model, normalize(images), noise)

        plain = functools.partial(plain_loss, model, teacher, images, noise)
        with torch.no_grad():    # the same numbers, or the race means nothing
            assert torch.allclose(loss(), plain(), rtol=1e-4)
        compare(args, f"{method} step, 224 px, batch {batch}", "images/s", batch,
                lambda: update(model, optimizer, loss()),
                lambda: update(model, optimizer, plain()))


def build_finetuning(args, batch):
    """ViT-Tiny at 224 by the paper's recipe -> model, mixing, images, labels."""
    options = finetune.resolve(finetune.parse_args([]))
    model = finetune.build_classifier(options, 1000).to(args.device)
    images = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8, device=args.device)
    labels = torch.randint(1000, (batch,), device=args.device)
    return model, finetune.build_mixing(options.mixup, options.cutmix, 1000), images, labels


def plain_classifier(vit, images):
    """All blocks with explicit attention, mean patch token, head."""
    x = vit.embed(images)
    for block in vit.blocks:
        x, _ = explicit_block(block, x)
    return vit.head(vit.fc_norm(x[:, 1:].mean(dim=1)))


def bench_finetune(args, batch=16):
    """A step with mixup and layer decay, and an evaluation."""
    full_float32()
    model, mixing, images, labels = build_finetuning(args, batch)
    groups = param_groups(model, 0.05, 0.85)
    plain = functools.partial(plain_classifier, model)

    def step(forward, optimizer):
        x, targets = mixing(normalize(images), labels)
        update(model, optimizer, F.cross_entropy(forward(x), targets))

    @torch.inference_mode()
    def evaluate(forward):
        return forward(normalize(images))

    assert torch.allclose(evaluate(model), evaluate(plain), atol=1e-4)
    fused, loop = AdamW(groups, 1e-5, fused=True), AdamW(groups, 1e-5, foreach=False)
    compare(args, f"fine-tuning step, batch {batch}", "images/s", batch,
            lambda: step(model, fused), lambda: step(plain, loop))
    compare(args, f"evaluation, batch {batch}", "images/s", batch,
            lambda: evaluate(model), lambda: evaluate(plain))


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------
FORMATS = {    # size of a picture, options of Pillow's save
    "JPEG 500x375": ((500, 375), dict(format="JPEG", quality=92)),
    "JPEG 341x256": ((341, 256), dict(format="JPEG", quality=90)),
    "PPM 341x256": ((341, 256), dict(format="PPM")),
}


def draw_pictures(folder, size, options, count=64):
    """Files with smooth regions and texture, as photographs have."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        picture = (picture + rng.normal(0, 6, (375, 500, 1))).clip(0, 255).astype(np.uint8)
        picture = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        picture.save(f"{folder}/{i}.{options['format'].lower()}".replace("jpeg", "jpg"), **options)
    return list(list_images(folder))


def peer_pipelines():
    """{name: transform of a Pillow image} with the same crops and flips: torchvision's standard
    pipeline, and timm's, if installed, as its fast loader uses it."""
    peers = {"torchvision": v2.Compose([
        v2.RandomResizedCrop(224, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])}
    try:
        from timm.data import create_transform
        peers["timm"] = create_transform(224, is_training=True, use_prefetcher=True,
                                         color_jitter=None, interpolation="bicubic")
    except ImportError:
        pass
    return peers


def bench_loading(args):
    """Crops of 224 pixels a second: of one core, beside other pipelines, and of the loader with all
    cores, for pre-training and with the RandAugment of fine-tuning."""
    threads = torch.get_num_threads()
    for name, (size, options) in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            files = draw_pictures(folder, size, options)
            row = {}
            torch.set_num_threads(1)    # as in a loader process
            ours = pretrain_set(files)
            peers = peer_pipelines()
            fast, *others = race(args, lambda: [ours[0, i] for i in range(len(files))], *(
                functools.partial(load, transform, files) for transform in peers.values()))
            torch.set_num_threads(threads)
            for peer, seconds in zip(peers, others):
                row[peer] = f"{len(files) / seconds:.0f}"
                row[f"over {peer}"] = f"{seconds / fast:.2f}x"
            for kind, make in (("pretrain", pretrain_set), ("finetune", finetune_set)):
                row[f"loader_{kind}"] = round(loader_speed(args, make, files))
            record("loading", format=name, one_core=f"{len(files) / fast:.0f}", **row)


def load(transform, files):
    for file in files:
        transform(Image.open(file).convert("RGB"))


def pretrain_set(files):
    return pretrain_d2mae.Images(files, 0, 196, (224, 224), (0.08, 1))


def finetune_set(files):
    recipe = finetune.IMPROVED
    labels = torch.zeros(len(files), dtype=torch.int64)
    prepare = functools.partial(finetune.augment, size=(224, 224), min_crop=recipe["min_crop"],
                                magnitude=recipe["rand_augment"], fill=(124, 116, 104))
    return finetune.LabelledImages(files, labels, prepare)


def loader_speed(args, make, files, batch=64):
    """Crops per second of the training loader with one process a core, at most 16, once each has
    delivered its first batch."""
    workers = min(16, os.cpu_count())
    count = (1 + args.rounds) * workers
    dataset = make(files * math.ceil(count * batch / len(files)))
    run = 1, 2, torch.device("cpu"), None
    loader = iter(train_loader(dataset, batch, 1, batch, workers, 0, run))
    for _ in range(workers):
        next(loader)
    begun = time.perf_counter()
    rest = sum(1 for _ in loader)
    return rest * batch / 2 / (time.perf_counter() - begun)


def bench_hours(args):
    """Hours of the paper's runs by the fastest step of each method, and by the loader of this
    machine for each format: the longer time is what a run takes."""
    fastest = {}
    for row in RESULTS.get("steps", []):
        if "images_per_s" in row:
            fastest[row["step"]] = max(fastest.get(row["step"], 0), row["images_per_s"])
    for method, speed in fastest.items():
        kind, epochs = ("finetune", 300) if method == "fine-tuning" else ("pretrain", 400)
        total = epochs * IMAGENET / 3600    # images per second of a run of one hour
        loading = {f"loading {row['format']}": f"{total / row[f'loader_{kind}']:.1f}"
                   for row in RESULTS.get("loading", [])}
        record("hours", run=f"{method}, {epochs} epochs", one_GPU=f"{total / speed:.1f}",
               eight_GPUs=f"{total / speed / 8:.1f}", **loading)


# --------------------------------------------------------------------------------------------------
# The other scripts, against plain versions
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def bench_segment(args, count=4, size=(512, 683), label_size=(600, 800)):
    """Sliding windows of 512, stride 341, 150 classes, ViT-Tiny with relative position bias: all
    windows of an image in one batch, or one at a time."""
    full_float32()
    options = segment.resolve(segment.parse_args([]))
    model = segment.build_segmenter(options).to(args.device).eval()
    images = torch.randint(256, (count, 3, *size), dtype=torch.uint8, device=args.device)

    def plain_labels(image):
        """Each score padded to the whole image."""
        image = normalize(image[None])[0]
        (h, w), (H, W) = model.encoder.img_size, image.shape[1:]
        total = torch.zeros(1, 150, H, W, device=args.device)
        weights = torch.zeros(1, 1, H, W, device=args.device)
        for y, x in itertools.product(segment.window_starts(H, h, 341),
                                      segment.window_starts(W, w, 341)):
            score = model(image[None, :, y:y + h, x:x + w])
            score = F.interpolate(score, (h, w), mode="bilinear")
            total += F.pad(score, (x, W - x - w, y, H - y - h))
            weights[:, :, y:y + h, x:x + w] += 1
        return F.interpolate(total / weights, label_size, mode="bilinear").argmax(dim=1)[0]

    def labels(image):
        return segment.label_image(model, image, label_size)

    assert (labels(images[0]) == plain_labels(images[0])).float().mean() > 0.999
    compare(args, f"sliding windows, {size[0]}x{size[1]}", "images/s", count,
            lambda: [labels(image) for image in images],
            lambda: [plain_labels(image) for image in images], rounds=3)


def plain_tracker_block(block, x, ids, keep=None, centre=0):
    """Explicit attention map; with `keep`, search tokens are ranked by its centre row, sorted."""
    B, T, D = x.shape
    Z = T - ids.shape[1]
    y, _, attention = explicit_attention(block.attn, block.norm1(x))
    x = x + y
    if keep:
        rank = attention[:, :, centre, Z:].mean(dim=1)
        order = rank.sort(dim=1, descending=True).indices[:, :keep]
        search = x[:, Z:].gather(1, order[..., None].expand(-1, -1, D))
        x = torch.cat([x[:, :Z], search], dim=1)
        ids = ids.gather(1, order)
    return x + block.mlp(block.norm2(x)), ids


@torch.inference_mode()
def bench_track(args):
    """One frame at 128 and 256 pixels: against explicit attention in every block, and a template
    that is embedded again in every frame."""
    full_float32()
    for keep_rate in (0.7, 1.0):
        encoder = build_model("vit_tiny")
        model = track.Tracker(encoder, keep_rate=keep_rate)
        tracker = track.OnePassTracker(model, args.device)
        template = torch.randn(1, 3, 128, 128, device=args.device)
        search = torch.randn(1, 3, 256, 256, device=args.device)
        tracker.template = model.embed_template(template)

        def plain():
            z = model.embed_template(template)
            x = model.encoder.patch_embed(search) + model.encoder.search_pos_embed
            Z, S = z.shape[1], x.shape[1]
            x = torch.cat([z, x], dim=1)
            ids = torch.arange(S, device=args.device)[None]
            for number, block in enumerate(model.encoder.blocks, start=1):
                eliminates = number in model.options["eliminate_blocks"]
                keep = math.ceil(keep_rate * ids.shape[1]) if eliminates else None
                x, ids = plain_tracker_block(block, x, ids, keep, model.centre)
            x = model.encoder.norm(x)[:, Z:]
            places = ids[..., None].expand(-1, -1, x.shape[2])
            x = torch.zeros(1, S, x.shape[2], device=args.device).scatter(1, places, x)
            maps = x.transpose(1, 2).unflatten(2, (model.search_side, model.search_side))
            score, size, offset = model.head(maps)
            return track.decode(score * tracker.window, size, offset)[0].tolist()

        box, _ = tracker.locate(search)    # the same box, or the race means nothing
        x, y, w, h = plain()
        assert np.allclose([x - w / 2, y - h / 2, w, h], box, atol=1e-4)
        times = dict(ours=lambda: [tracker.locate(search) for _ in range(5)],
                     plain=lambda: [plain() for _ in range(5)])
        compare(args, f"tracker, keep rate {keep_rate:g}", "frames/s", 5, **times)


@torch.inference_mode()
def bench_fps(args, count=20, size=(1280, 720)):
    """Frames per second of OSTrack-256 with ViT-Tiny: the network alone, one search crop after the
    other, and end to end, from JPEG files, which one process reads ahead, to boxes."""
    full_float32()
    encoder = build_model("vit_tiny")
    model = track.Tracker(encoder)
    tracker = track.OnePassTracker(model, args.device)
    search = torch.randn(1, 3, 256, 256, device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        files = draw_pictures(folder, size, dict(format="JPEG", quality=92), count)
        box = np.array([size[0] / 2, size[1] / 2, size[0] / 10, size[1] / 10])
        for i, _ in enumerate(track.follow(tracker, files * (1 + args.rounds), box, workers=1)):
            if i + 1 == count:    # the end of the warm-up
                begun = time.perf_counter()
            tracker.box = box     # random weights would lose it
        whole = (i + 1 - count) / (time.perf_counter() - begun)
        (seconds,) = race(args, lambda: [tracker.locate(search) for _ in range(count)])
    record("tracking speed", device=str(args.device), threads=torch.get_num_threads(),
           dtype="float32", frames="JPEG of {} x {}".format(*size), warm_up=f"{count} frames",
           network_fps=f"{count / seconds:.1f}", end_to_end_fps=f"{whole:.1f}")


def bench_analyze(args, layers=13, batch=128):
    """CKA of two models of 13 layers: every Gram matrix once, against both anew for every pair."""
    models = [[torch.randn(batch, 196, 192, device=args.device) for _ in range(layers)]
              for _ in range(2)]

    def plain_hsic(k, l):
        """Eq. 3 of arXiv 2010.15327 from two Gram matrices."""
        n = len(k)
        k = k.clone().fill_diagonal_(0)
        l = l.clone().fill_diagonal_(0)
        kl = k @ l
        sums = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * kl.sum()
        return (kl.trace() + sums) / (n * (n - 3))

    def plain_cka(x, y):
        x = x.flatten(1).double()
        y = y.flatten(1).double()
        k = x @ x.T
        l = y @ y.T
        return plain_hsic(k, l) / (plain_hsic(k, k) * plain_hsic(l, l)).sqrt()

    def plain():
        return torch.stack([torch.stack([plain_cka(x, y) for y in models[1]]) for x in models[0]])

    assert torch.allclose(minibatch_cka([models])[0], plain(), atol=1e-9)
    compare(args, f"CKA of {layers} x {layers} layers, batch {batch}", "matrices/s", 1,
            lambda: minibatch_cka([models]), plain, rounds=3)


# --------------------------------------------------------------------------------------------------
# Loader processes under each start method, and bfloat16 on a CPU, each side in its own process
# --------------------------------------------------------------------------------------------------
def race_processes(args, rounds, function, **sides):
    """Call `function`, one of CHILDREN, with the arguments of each side, in a new process each; the
    sides take turns -> {side: medians over the rounds of the numbers that it returns}."""
    found = {side: [] for side in sides}
    for _, (side, values) in itertools.product(range(min(args.rounds, rounds)), sides.items()):
        words = json.dumps([function.__name__, *values])
        done = subprocess.run([sys.executable, __file__, "--child", words], check=True, text=True,
                              stdout=subprocess.PIPE)
        found[side].append(json.loads(done.stdout.splitlines()[-1]))
    return {side: [statistics.median(column) for column in zip(*rows)]
            for side, rows in found.items()}


class NamedItems(Dataset):
    """Item (epoch, index) reads 100 names -> the process that read them, in a tuple."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names) // 100

    def __getitem__(self, key):
        for i in range(100 * key[1], 100 * key[1] + 100):
            self.names[i]
        return (os.getpid(),)


def plain_loader(dataset, batch, workers, persistent):
    keys = [(0, i) for i in range(len(dataset))]
    return DataLoader(dataset, batch, sampler=keys, num_workers=workers,
                      persistent_workers=persistent)


CPU = (0, 1, torch.device("cpu"), None)    # what init_distributed returns


def start_loaders(start, ours, count):
    """Two loader processes with `count` file names -> seconds to their first batch, and MB that a
    process has of its own once all names have been read."""
    multiprocessing.set_start_method(start)
    names = [f"data/imagenet/train/n{i % 1000:08}/n{i % 1000:08}_{i}.JPEG" for i in range(count)]
    begun = time.perf_counter()
    dataset = NamedItems(Names(names) if ours else names)
    del names
    loader = eval_loader(dataset, 1, 2, CPU) if ours else plain_loader(dataset, 1, 2, True)
    batches = iter(loader)
    processes = set(next(batches)[0].tolist())
    seconds = time.perf_counter() - begun
    for (numbers,) in batches:
        processes.update(numbers.tolist())
    memory = [Path(f"/proc/{number}/smaps_rollup").read_text() for number in processes]
    own = [int(kilobytes) for text in memory for kilobytes in re.findall(r"Private.*?(\d+)", text)]
    return seconds, sum(own) / 1024 / len(processes)


def bench_loaders(args):
    """Loader processes that hold file names in shared memory, and under forkserver find the
    packages imported, against plain ones with a list of names."""
    for start, count in itertools.product(("fork", "forkserver", "spawn"), (10_000, args.names)):
        found = race_processes(args, 4, start_loaders, here=(start, True, count),
                               plain=(start, False, count))
        (fast, small), (slow, large) = found["here"], found["plain"]
        record("loader processes", start=start, names=count, first_batch_s=f"{fast:.2f}",
               plain_s=f"{slow:.2f}", ratio=f"{slow / fast:.2f}x", own_MB=f"{small:.0f}",
               plain_MB=f"{large:.0f}")


def epoch_to_epoch(start, ours, epochs=5):
    """Seconds from the last batch of an epoch to the first of the next, an evaluation of 64 images
    with two loader processes between them."""
    multiprocessing.set_start_method(start)
    with tempfile.TemporaryDirectory() as folder:
        dataset = pretrain_set(draw_pictures(folder, *FORMATS["JPEG 341x256"], 64))
        loader = plain_loader(dataset, 32, 2, True)
        if ours:
            loader = train_loader(dataset, 32, 1, 32, 2, 0, CPU)
        val_loader = eval_loader(dataset, 64, 2, CPU) if ours else None
        gaps = []
        for epoch in range(epochs):
            for i, _ in enumerate(loader):
                if epoch and i == 0:
                    gaps.append(time.perf_counter() - ended)
            ended = time.perf_counter()
            list(val_loader if ours else plain_loader(dataset, 64, 2, False))
    return [statistics.median(gaps[1:])]    # the first evaluation of a run starts processes


def bench_epochs(args):
    """From epoch to epoch: evaluation loaders made once against made for each evaluation."""
    for start in ("fork", "forkserver", "spawn"):
        found = race_processes(args, 4, epoch_to_epoch, here=(start, True), plain=(start, False))
        (fast,), (slow,) = found["here"], found["plain"]
        record("from epoch to epoch", start=start, here_s=f"{fast:.2f}", plain_s=f"{slow:.2f}",
               ratio=f"{slow / fast:.2f}x")


def step_seconds(method, dtype, fused, batch):
    """Median seconds of a training step on the CPU; fused: attention in the dtype of autocast."""
    if fused:
        models.attend = F.scaled_dot_product_attention
    args = argparse.Namespace(device=torch.device("cpu"), rounds=3)
    model, loss = build_loss(args, method, batch, dtype=getattr(torch, dtype))
    optimizer = AdamW(param_groups(model, 0.05), 1e-5, fused=True)
    return race(args, lambda: update(model, optimizer, loss()))


def bench_bf16(args):
    """Steps in bfloat16 over float32, with the attention of models.py and with PyTorch's."""
    for method in ("mae", "d2-mae", "fine-tuning"):
        found = race_processes(args, 4, step_seconds,
                               float32=(method, "float32", False, args.batch),
                               bf16=(method, "bfloat16", False, args.batch),
                               plain=(method, "bfloat16", True, args.batch))
        (single,), (half,), (plain,) = found.values()
        record("bfloat16 on a CPU", step=method, images=args.batch, float32_s=f"{single:.3f}",
               bf16_s=f"{half:.3f}", plain_bf16_s=f"{plain:.3f}",
               over_float32=f"{single / half:.2f}x", plain_over_float32=f"{single / plain:.2f}x")


CHILDREN = {f.__name__: f for f in (start_loaders, epoch_to_epoch, step_seconds)}


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
ROWS = {"numerics": bench_numerics, "steps": bench_steps, "pretrain": bench_pretrain,
        "finetune": bench_finetune, "loading": bench_loading, "hours": bench_hours,
        "segment": bench_segment, "track": bench_track, "fps": bench_fps, "analyze": bench_analyze,
        "loaders": bench_loaders, "epochs": bench_epochs, "bf16": bench_bf16}
DEFAULT_ROWS = {"cuda": ("numerics", "steps", "loading", "hours", "fps"),
                "cpu": ("pretrain", "finetune", "loading", "segment", "track", "fps", "analyze",
                        "loaders", "epochs", "bf16")}


def print_tables():
    """All results as Markdown, a table for each set of columns."""
    for title, rows in RESULTS.items():
        columns = list(dict.fromkeys(itertools.chain(*rows)))
        lines = [columns, ["---"] * len(columns), *([r.get(c, "") for c in columns] for r in rows)]
        print(f"\n{title}\n\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda, if there")
    parser.add_argument("--json", help="file for the tables")
    parser.add_argument("--rounds", type=int, default=7, help="at most; default: 7")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[512, 128],
                        help="images of a step; default: the paper's 512 (4096 over 8 GPUs), 128")
    parser.add_argument("--names", type=int, default=1_000_000,
                        help="file names that loader processes hold; default: 1,000,000")
    parser.add_argument("--batch", type=int, default=64, help="images of a bf16 step; default: 64")
    parser.add_argument("--child", help=argparse.SUPPRESS)    # of race_processes
    parser.add_argument("--minutes", type=float, default=5,
                        help="no compiled step begins later; default: 5")
    args = parser.parse_args()
    if args.child:
        name, *values = json.loads(args.child)
        print(json.dumps(CHILDREN[name](*values)))
        return
    args.begun = time.perf_counter()
    args.device = torch.device(args.device)
    describe(args)
    failed = []
    for row in args.rows or DEFAULT_ROWS[args.device.type]:
        try:
            ROWS[row](args)
        except Exception:    # the other rows are worth having
            traceback.print_exc()
            failed.append(row)
        if args.json:
            Path(args.json).write_text(json.dumps(RESULTS, indent=1))
    print_tables()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
