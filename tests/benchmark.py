"""Speed of this project against plain versions of the same computation, in one process.

    python tests/benchmark.py [pretrain ...]    # all parts, or those named; on a quiet machine

Every figure is a median over alternating rounds: a machine that drifts favours neither side.
"""
import copy
import functools
import itertools
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from models import (MODELS, average_over_processes, choose_device, normalize,  # noqa: E402
                    param_groups)


def race(*functions, rounds=7, synchronize=lambda: None):
    """Median seconds of each function; they take turns, after one warm-up each."""
    times = [[] for _ in functions]
    for i, (function, record) in itertools.product(range(rounds + 1), zip(functions, times)):
        synchronize()
        begun = time.perf_counter()
        function()
        synchronize()
        record.append(time.perf_counter() - begun)
    return [statistics.median(t[1:]) for t in times]


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
    """Every patch embedded, the visible ones picked, every block run with explicit attention ->
    features, logits of the last block."""
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
    x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[2]))
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    features = {}
    for number, block in enumerate(vit.blocks, start=1):
        x, logits = explicit_block(block, x)
        features[number] = x
    return features, logits


def plain_loss(model, images, noise, teacher=None):
    """The textbook step: embed all, decode all, predict all, keep the masked part of the loss."""
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
    if teacher is not None:
        with torch.no_grad():
            _, truth = plain_encoder(teacher, images, ids_keep)
        heads = model.encoder.blocks[-1].attn.num_heads
        x = model.extra_norm(features[model.encoder.depth])
        q, k = model.extra_qk(x).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        student = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        loss = loss + nn.functional.mse_loss(model.attn_adapter(student), truth)
    return loss


def matmul_speed(device, dtype, wait):
    """Operations per second of a 4096^3 (CPU: 2048^3) matrix product."""
    n = 4096 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    (seconds,) = race(lambda: [a @ b for _ in range(5)], synchronize=wait)
    return 5 * 2 * n ** 3 / seconds


def bench_pretrain():
    """D2-MAE and MAE steps at 224 px with ViT-Base as the teacher, and the loading of JPEGs.

    On a GPU in bf16 at the paper's 512 images a process (4096 over 8), with the memory they take
    and the hours of 400 epochs of ImageNet on 8 such GPUs; on a CPU in float32 at 32 images.
    """
    import pretrain_d2mae as P
    device = choose_device("auto")    # with the matmul precision of a run
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    dtype = torch.bfloat16 if on_gpu else torch.float32
    batch = 512 if on_gpu else 32
    images = torch.randn(batch, 3, 224, 224, device=device)
    noise = torch.rand(batch, 196, device=device)
    peak = matmul_speed(device, dtype, wait)
    for method, tap in (("d2-mae", 8), ("mae", 12)):
        teacher = None
        if method == "d2-mae":
            teacher = MODELS["vit_base"](fixed_pos_embed=True).to(device).eval()
            teacher.requires_grad_(False)
        model = P.MaskedAutoencoder(MODELS["vit_tiny"](fixed_pos_embed=True), tap, teacher=teacher,
                                    decoupled=teacher is not None).to(device)
        optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=1e-5, fused=True)

        def loss_of():
            with torch.autocast(device.type, dtype, enabled=on_gpu):
                ids_keep, ids_masked = P.random_masking(noise, 0.75)
                target = model.teacher_signal(teacher, images, ids_keep) if teacher else None
                return model(images, ids_keep, ids_masked, target)["loss"]

        def plain_loss_of():
            with torch.autocast(device.type, dtype, enabled=on_gpu):
                return plain_loss(model, images, noise, teacher)

        def step(loss, look=False):
            loss.backward()
            if look:    # the one wait of a step, before the update, as in `train`
                average_over_processes({"loss": loss.detach()}, 1, device)
            optimizer.step()
            optimizer.zero_grad()

        with torch.no_grad():    # the same numbers, or the race means nothing
            assert torch.allclose(loss_of(), plain_loss_of(), rtol=2e-2 if on_gpu else 1e-4)
        with FlopCounterMode(display=False) as counter:
            step(loss_of())
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            step(loss_of())
            memory = torch.cuda.max_memory_allocated() / 2 ** 30
        fast, looking, slow = race(lambda: step(loss_of()), lambda: step(loss_of(), look=True),
                                   lambda: step(plain_loss_of()), synchronize=wait)
        share = counter.get_total_flops() / fast / peak
        print(f"{method}: {batch / fast:.1f} images/s, plain {batch / slow:.1f}: "
              f"{slow / fast:.2f}x; looking at the loss costs {100 * (looking / fast - 1):.1f}%; "
              f"{share:.0%} of the speed of a matrix product ({peak / 1e12:.2f} TFLOP/s)")
        if on_gpu:
            hours = 400 * 1_281_167 / (8 * batch / looking) / 3600
            print(f"  peak memory {memory:.1f} GB; {hours:.1f} h for 400 epochs on "
                  "8 of these")
    bench_loading(P)


def bench_loading(P):
    """Crops of 500x375 JPEGs on one core: `random_crop`, and plain torchvision pipelines."""
    from torchvision import transforms as T
    rng = np.random.default_rng(0)
    folder = tempfile.TemporaryDirectory()
    for i in range(64):    # photographs have smooth regions and texture; so do these
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        picture = (picture + rng.normal(0, 6, (375, 500, 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(f"{folder.name}/{i}.jpg", quality=92)
    files = P.list_images(folder.name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)    # as in a loader process
    args = SimpleNamespace(image_size=(224, 224), crop_scale=(0.08, 1.0), seed=0)
    ours = P.Images(files, args, 196)
    crop = T.RandomResizedCrop(224, (0.08, 1), interpolation=T.InterpolationMode.BICUBIC)
    normalise = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    authors = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalise])
    floats = T.Compose([T.ToTensor(), T.RandomResizedCrop(224, (0.08, 1), antialias=True),
                        T.RandomHorizontalFlip(), normalise])

    def load(transform):
        for file in files:
            transform(Image.open(file).convert("RGB"))

    fast, slow, slower, bare = race(lambda: [ours[0, i] for i in range(64)], lambda: load(authors),
                                    lambda: load(floats), lambda: load(np.asarray), rounds=5)
    print(f"loading, one core: {64 / fast:.0f} images/s; Pillow crop, then float {64 / slow:.0f}: "
          f"{slow / fast:.2f}x; float, then crop {64 / slower:.0f}: {slower / fast:.2f}x; decoding "
          f"alone {64 / bare:.0f}")
    differences = []
    for seed, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        torch.manual_seed(seed)
        fast = P.random_crop(P.open_item(file), (224, 224), (0.08, 1.0)).float()
        torch.manual_seed(seed)
        top, left, h, w = T.RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3])
        image = image.crop((left, top, left + w, top + h)).resize((224, 224), Image.BICUBIC)
        slow = T.functional.pil_to_tensor(image).float()
        differences.append(min((fast - x).abs().mean().item() for x in (slow, slow.flip(2))))
    print(f"pixels differ from crop-then-resize by {np.mean(differences):.2f} of 255 in the mean")
    torch.set_num_threads(threads)
    folder.cleanup()


def plain_classifier(vit, images):
    """All blocks with explicit attention, mean patch token, head."""
    x = vit.embed(images)
    for block in vit.blocks:
        x, _ = explicit_block(block, x)
    return vit.head(vit.fc_norm(x[:, 1:].mean(dim=1)))


def bench_finetune(batch=16):
    """A step of the improved recipe (mixup, AdamW, layer decay) and evaluation, ViT-Tiny at 224;
    RandAugment of one image."""
    import finetune
    args = finetune.plan(finetune.parse_args([]))[0]
    model = finetune.build_model(args, 1000)
    mixing = finetune.build_mixing(args, 1000)
    groups = finetune.build_optimizer(model, args, 1e-5).param_groups
    fused = torch.optim.AdamW(groups, fused=True)
    plain_adamw = torch.optim.AdamW(groups, foreach=False)
    images = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8)
    labels = torch.randint(1000, (batch,))

    def step(forward, optimizer):
        x, targets = mixing(normalize(images), labels)
        nn.functional.cross_entropy(forward(x), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def evaluate(forward):
        return forward(normalize(images))

    plain = functools.partial(plain_classifier, model)
    assert torch.allclose(evaluate(model.eval()), evaluate(plain), atol=1e-4)
    for title, ours, theirs in (
            ("fine-tuning step", lambda: step(model, fused), lambda: step(plain, plain_adamw)),
            ("evaluation", lambda: evaluate(model), lambda: evaluate(plain))):
        fast, slow = race(ours, theirs)
        print(f"{title}: {batch / fast:.1f} images/s, plain {batch / slow:.1f}: {slow / fast:.2f}x")
    image = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    (seconds,) = race(lambda: [finetune.rand_augment(image, 10, (0, 0, 0)) for _ in range(50)])
    print(f"RandAugment of a 224x224 image: {1000 * seconds / 50:.2f} ms")


@torch.no_grad()
def bench_segment(images=4, size=(512, 683), label_size=(600, 800)):
    """Sliding windows of 512, stride 341, 150 classes, ViT-Tiny with relative position bias: all
    windows of an image in one batch, or one at a time."""
    import segment
    F = nn.functional
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    args = segment.resolve(segment.parse_args([]))
    model = segment.build_model(args, segment.class_names(args)).to(device).eval()
    run = (0, 1, device, torch.float32)
    pictures = torch.randint(256, (images, 3, *size), dtype=torch.uint8)

    def plain_labels(image):
        """Each score padded to the whole image."""
        image = normalize(image.to(device))
        (h, w), (H, W) = model.encoder.img_size, image.shape[1:]
        total = torch.zeros(1, 150, H, W, device=device)
        count = torch.zeros(1, 1, H, W, device=device)
        for y in segment.window_starts(H, h, 341):
            for x in segment.window_starts(W, w, 341):
                score = model(image[None, :, y:y + h, x:x + w])
                score = F.interpolate(score, (h, w), mode="bilinear")
                total += F.pad(score, (x, W - x - w, y, H - y - h))
                count[:, :, y:y + h, x:x + w] += 1
        return F.interpolate(total / count, label_size, mode="bilinear").argmax(dim=1)[0]

    def ours():
        return [segment.label_image(run, args, model, image, label_size) for image in pictures]

    for labels, image in zip(ours(), pictures):    # the same labels, or the race means nothing
        assert (labels == plain_labels(image)).float().mean() > 0.999
    fast, slow = race(ours, lambda: [plain_labels(picture) for picture in pictures], rounds=3,
                      synchronize=wait)
    print(f"sliding windows, {size[0]}x{size[1]}: {images / fast:.2f} images/s, one at a time "
          f"{images / slow:.2f}: {slow / fast:.2f}x")


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
def bench_track():
    """One frame at 128 and 256 pixels: against explicit attention in every block, batch norms that
    are not folded, and a template that is embedded again in every frame."""
    import track
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for keep_rate in (0.7, 1.0):
        model = track.Tracker(MODELS["vit_tiny"](), keep_rate=keep_rate).to(device).eval()
        head = copy.deepcopy(model.head)    # OnePassTracker folds the other
        tracker = track.OnePassTracker(model, mean, std, device, torch.float32)
        template = torch.randn(1, 3, 128, 128, device=device)
        search = torch.randn(1, 3, 256, 256, device=device)
        tracker.template = model.embed_template(template)

        def plain():
            z = model.embed_template(template)
            x = model.encoder.patch_embed(search) + model.encoder.search_pos_embed
            Z, S = z.shape[1], x.shape[1]
            x = torch.cat([z, x], dim=1)
            ids = torch.arange(S, device=device)[None]
            for number, block in enumerate(model.encoder.blocks, start=1):
                eliminates = number in model.options["eliminate_blocks"]
                keep = math.ceil(keep_rate * ids.shape[1]) if eliminates else None
                x, ids = plain_tracker_block(block, x, ids, keep, model.centre)
            x = model.encoder.norm(x)[:, Z:]
            places = ids[..., None].expand(-1, -1, x.shape[2])
            x = torch.zeros(1, S, x.shape[2], device=device).scatter(1, places, x)
            maps = x.transpose(1, 2).unflatten(2, (model.search_side, model.search_side))
            score, size, offset = head(maps)
            return track.decode(score * tracker.window, size, offset)[0].tolist()

        box, _ = tracker.locate(search)    # the same box, or the race means nothing
        x, y, w, h = plain()
        assert np.allclose([x - w / 2, y - h / 2, w, h], box, atol=1e-4)
        fast, slow = race(lambda: tracker.locate(search), plain, rounds=40)
        tracker.autocast = torch.autocast(device.type, torch.bfloat16)
        half, = race(lambda: tracker.locate(search), rounds=3)    # slow on a CPU that emulates it
        print(f"tracker, keep rate {keep_rate}: {1 / fast:.1f} frames/s, plain {1 / slow:.1f}: "
              f"{slow / fast:.2f}x; with --dtype bf16 {1 / half:.1f} frames/s")


def bench_analyze(layers=13, batch=128):
    """CKA of two models of 13 layers: every Gram matrix once, against both anew for every pair."""
    from analyze import minibatch_cka
    models = [[torch.randn(batch, 196, 192) for _ in range(layers)] for _ in range(2)]

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
    fast, slow = race(lambda: minibatch_cka([models]), plain, rounds=3)
    print(f"CKA of {layers} x {layers} layers, batch {batch}: {fast:.2f} s, Gram matrices per pair "
          f"{slow:.2f} s: {slow / fast:.1f}x")


if __name__ == "__main__":
    names = ("pretrain", "finetune", "segment", "track", "analyze")
    parts = {name: globals()[f"bench_{name}"] for name in names}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    for part in sys.argv[1:] or parts:
        parts[part]()
