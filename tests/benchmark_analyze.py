"""CKA of two models of 13 layers at batch 128: every Gram matrix once, against both of them anew for every pair of layers.

    python tests/benchmark_analyze.py
"""
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analyze import minibatch_cka


def plain_hsic(k, l):
    """Eq. 3 of arXiv 2010.15327 from two Gram matrices."""
    n, k, l = len(k), k.clone().fill_diagonal_(0), l.clone().fill_diagonal_(0)
    kl = k @ l
    return (kl.trace() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * kl.sum()) / (n * (n - 3))


def plain_cka(x, y):
    x, y = x.flatten(1).double(), y.flatten(1).double()
    k, l = x @ x.T, y @ y.T
    return plain_hsic(k, l) / (plain_hsic(k, k) * plain_hsic(l, l)).sqrt()


def bench_analyze(layers=13, batch=128, shape=(196, 192), rounds=3):
    torch.manual_seed(0)
    models = [[torch.randn(batch, *shape) for _ in range(layers)] for _ in range(2)]
    times = {"project": [], "plain": []}
    for _ in range(rounds):
        start = time.perf_counter()
        ours = minibatch_cka([models])[0]
        times["project"].append(time.perf_counter() - start)
        start = time.perf_counter()
        plain = torch.stack([torch.stack([plain_cka(x, y) for y in models[1]]) for x in models[0]])
        times["plain"].append(time.perf_counter() - start)
        assert torch.allclose(ours, plain, atol=1e-9)
    project, plain = (statistics.median(times[k]) for k in ("project", "plain"))
    print(f"analyze: CKA of {layers} x {layers} layers, {batch} images of {shape[0]}x{shape[1]} features: Gram matrices once {project:.2f} s, "
          f"per pair {plain:.2f} s, {plain / project:.1f}x (target 8x); median of {rounds}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    bench_analyze()
