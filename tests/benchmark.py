"""Speed of this project against plain versions of the same computation, side by side in one process.

    python tests/benchmark.py [pretrain ...]        # all parts, or those named; needs a quiet machine, a few minutes

Every figure is a median over alternating rounds, so that a machine that drifts does not favour either side.
"""
import io
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from models import MODELS, normalize  # noqa: E402


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
    """Softmax attention written out, as a plain ViT has it."""
    B, T, D = x.shape
    q, k, v = attn.qkv(x).reshape(B, T, 3, attn.num_heads, D // attn.num_heads).permute(2, 0, 3, 1, 4)
    probs = ((q @ k.transpose(-2, -1)) * (D // attn.num_heads) ** -0.5).softmax(dim=-1)
    return attn.proj((probs @ v).transpose(1, 2).reshape(B, T, D)), q, k


def explicit_block(block, x):
    y, q, k = explicit_attention(block.attn, block.norm1(x))
    x = x + y
    return x + block.mlp(block.norm2(x)), q, k


def plain_encoder(vit, images, ids_keep, taps=()):
    """Every patch embedded, the visible ones picked, every block run with explicit attention -> taps, last q and k."""
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
    x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[2]))
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    features = {}
    for number, block in enumerate(vit.blocks, start=1):
        x, q, k = explicit_block(block, x)
        features[number] = x
    return features, q, k


def plain_loss(model, images, noise, teacher=None):
    """The textbook step: embed all, decode all, predict all, keep the masked part of the loss."""
    B, N = noise.shape
    ids = noise.argsort(dim=1)
    ids_keep, restore = ids[:, :N // 4], ids.argsort(dim=1)
    features, _, _ = plain_encoder(model.encoder, images, ids_keep)
    x = model.decoder_embed(model.encoder.norm(features[model.decoder_tap]))
    full = torch.cat([x[:, 1:], model.mask_token.expand(B, N - N // 4, -1)], dim=1)
    full = full.gather(1, restore[..., None].expand(-1, -1, full.shape[2]))
    x = torch.cat([x[:, :1], full], dim=1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x, _, _ = explicit_block(block, x)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    p = model.encoder.patch_size
    target = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).reshape(B, N, -1)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    masked = torch.ones(B, N, device=images.device).scatter(1, ids_keep, 0)
    loss = (((pred - target) ** 2).mean(-1) * masked).sum() / masked.sum()
    if teacher is not None:
        with torch.no_grad():
            _, q, k = plain_encoder(teacher, images, ids_keep)
            truth = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        x = model.extra_norm(features[model.encoder.depth])
        q, k = model.extra_qk(x).unflatten(2, (2, 12, -1)).permute(2, 0, 3, 1, 4)
        student = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        loss = loss + nn.functional.mse_loss(model.adapters["12"](student), truth)
    return loss


def bench_pretrain():
    """D2-MAE and MAE steps at 224 px, batch 32, and the loading of 500x375 JPEGs."""
    import pretrain_d2mae as P
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    batch = 32
    images, noise = torch.randn(batch, 3, 224, 224, device=device), torch.rand(batch, 196, device=device)
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    for method, tap in (("d2-mae", 8), ("mae", 12)):
        teacher = None
        if method == "d2-mae":
            teacher = MODELS["vit_base"](fixed_pos_embed=True).to(device).eval().requires_grad_(False)
        student = P.MaskedAutoencoder(MODELS["vit_tiny"](fixed_pos_embed=True), tap, teacher=teacher, decoupled=bool(teacher),
                                      layers=[12] if teacher else []).to(device)
        optimizer = torch.optim.AdamW(P.param_groups(student, 0.05), lr=1e-5, fused=True)

        def ours():
            ids = P.random_masking(noise, 0.75)
            signals = P.teacher_signals(teacher, images, ids[0], [12]) if teacher else ()
            student(images, *ids, signals)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        def plain():
            plain_loss(student, images, noise, teacher).backward()
            optimizer.step()
            optimizer.zero_grad()

        with torch.no_grad():    # the same numbers, or the race means nothing
            ids = P.random_masking(noise, 0.75)
            loss = student(images, *ids, P.teacher_signals(teacher, images, ids[0], [12]) if teacher else ())["loss"]
            assert torch.allclose(loss, plain_loss(student, images, noise, teacher), rtol=1e-4)
        with FlopCounterMode(display=False) as counter:
            ours()
        fast, slow, matmul = race(ours, plain, lambda: [a @ b for _ in range(5)], synchronize=wait)
        rate, peak = counter.get_total_flops() / fast / 1e9, 5 * 2 * 2048 ** 3 / matmul / 1e9
        print(f"{method}: {batch / fast:.1f} images/s, plain {batch / slow:.1f}: {slow / fast:.2f}x; "
              f"{rate:.0f} GFLOP/s = {rate / peak:.0%} of a 2048^3 matmul ({peak:.0f}); peak memory {P.memory_gb(device):.1f} GB")

    from torchvision import transforms as T
    rng, folder = np.random.default_rng(0), tempfile.TemporaryDirectory()
    for i in range(64):    # photographs have smooth regions and texture; so do these
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        picture = np.asarray(coarse).astype(int) + rng.normal(0, 6, (375, 500, 1))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(f"{folder.name}/{i}.jpg", quality=92)
    files, threads = P.list_images(folder.name), torch.get_num_threads()
    torch.set_num_threads(1)    # as in a loader process
    ours = P.Images(files, P.read_image, (224, 224), 196)
    plain = T.Compose([T.RandomResizedCrop(224, (0.08, 1), interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
                       T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    fast, slow, bare = race(lambda: [ours[0, i] for i in range(64)],
                            lambda: [plain(Image.open(f).convert("RGB")) for f in files],
                            lambda: [P.read_image(f) for f in files], rounds=5)
    torch.set_num_threads(threads)
    print(f"loading 500x375 JPEGs, one core: {64 / fast:.0f} images/s, Pillow float pipeline {64 / slow:.0f}: {slow / fast:.2f}x; "
          f"{bare / fast:.2f} of bare decoding ({64 / bare:.0f})")
    folder.cleanup()


if __name__ == "__main__":
    parts = {name[6:]: function for name, function in globals().items() if name.startswith("bench_")}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {'cuda' if torch.cuda.is_available() else 'cpu'}")
    for part in sys.argv[1:] or parts:
        parts[part]()
