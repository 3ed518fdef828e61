"""Tracking speed: track.py against a plain OSTrack (explicit attention in every block, batch norms and three full head
branches, the template embedded again in every frame), side by side on one search crop of 256 pixels.

    python tests/benchmark_track.py
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
import track


def plain_block(block, x, ids, keep=None, centre=0):
    """Explicit attention map; with `keep`, search tokens are ranked by its centre row and sorted."""
    B, T, D = x.shape
    Z = T - ids.shape[1]
    q, k, v = block.attn.qkv(block.norm1(x)).reshape(B, T, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    x = x + block.attn.proj((attention @ v).transpose(1, 2).reshape(B, T, D))
    if keep:
        order = attention[:, :, centre, Z:].mean(dim=1).sort(dim=1, descending=True).indices[:, :keep]
        search = x[:, Z:].gather(1, order[..., None].expand(-1, -1, D))
        x, ids = torch.cat([x[:, :Z], search], dim=1), ids.gather(1, order)
    return x + block.mlp(block.norm2(x)), ids


def plain_locate(model, template, search, window):
    z, x = model.embed_template(template), model.encoder.patch_embed(search) + model.encoder.search_pos_embed
    Z, S = z.shape[1], x.shape[1]
    x, ids = torch.cat([z, x], dim=1), torch.arange(S)[None]
    for number, block in enumerate(model.encoder.blocks, start=1):
        keep = int(np.ceil(model.keep_rate * ids.shape[1])) if number in model.eliminate_blocks else None
        x, ids = plain_block(block, x, ids, keep, model.centre)
    x = model.encoder.norm(x)[:, Z:]
    x = torch.zeros(1, S, x.shape[2]).scatter(1, ids[..., None].expand(-1, -1, x.shape[2]), x)
    score, size, offset = model.head(x.transpose(1, 2).reshape(1, -1, model.search_side, model.search_side))
    return track.to_xywh(track.decode(score * window, size, offset))[0].tolist()


@torch.inference_mode()
def bench_track(rounds=40, keep_rate=0.7):
    """-> frames per second of the plain version and of track.py, medians of interleaved runs."""
    torch.manual_seed(0)
    model = track.Tracker(models.MODELS["vit_tiny"](), keep_rate=keep_rate).eval()
    tracker = track.OnePassTracker(model, models.IMAGENET_MEAN, models.IMAGENET_STD, torch.device("cpu"))
    template, search = torch.randn(1, 3, 128, 128), torch.randn(1, 3, 256, 256)
    tracker.template = model.embed_template(template)
    steps = {"plain": lambda: plain_locate(model, template, search, tracker.window),
             "track.py": lambda: tracker.locate(search)}
    assert np.allclose(steps["plain"](), steps["track.py"]()[:4], atol=1e-4)
    times = {name: [] for name in steps}
    for i in range(rounds + 3):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if i >= 3:
                times[name].append(time.perf_counter() - begun)
    plain, fast = (1 / float(np.median(t)) for t in times.values())
    said = f"track, 128/256 pixels, keep rate {keep_rate}, {torch.get_num_threads()} threads"
    print(f"{said}: plain {plain:.1f} frames/s, "
          f"track.py {fast:.1f} frames/s, {fast / plain:.2f}x")
    return plain, fast


if __name__ == "__main__":
    bench_track()
    bench_track(keep_rate=1.0)
