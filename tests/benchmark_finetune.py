"""Fine-tuning and evaluation images/s of finetune.py against a plain version, side by side in one process.

    python tests/benchmark_finetune.py
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune
from models import normalize


class PlainAttention(nn.Module):
    """Attention with its softmax map written out, on the weights of another."""

    def __init__(self, attn):
        super().__init__()
        self.qkv, self.proj, self.num_heads = attn.qkv, attn.proj, attn.num_heads

    def forward(self, x, rel_pos_index=None):
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, T, D))


def bench_finetune(batch=16, repeats=5):
    """ViT-Tiny at 224, improved recipe (mixup 0.2, AdamW, layer decay): explicit attention, one-hot targets and an
    optimizer that walks over the tensors, against the project's step. Then evaluation, and RandAugment of one image."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = finetune.resolve(finetune.parse_args(["--batch-size", str(batch)]))
    models = {name: finetune.build_model(args, 1000).to(device) for name in ("plain", "project")}
    for block in models["plain"].blocks:
        block.attn = PlainAttention(block.attn)
    optimizers = {name: torch.optim.AdamW(finetune.param_groups(model, 0.05, 0.85, 12), lr=1e-4, foreach=False,
                                          fused=name == "project") for name, model in models.items()}
    images, labels = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8).to(device), torch.randint(1000, (batch,)).to(device)

    def step(name):
        model, optimizer = models[name].train(), optimizers[name]
        x, targets = finetune.mix_batch(normalize(images), finetune.soft_targets(labels, 1000), 0.2, 0.0)
        finetune.soft_cross_entropy(model(x), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def evaluation(name):
        models[name].eval()(normalize(images))

    def seconds(work, name):
        start = time.perf_counter()
        work(name)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    threads = f"{torch.get_num_threads()} thread(s)" if device.type == "cpu" else torch.cuda.get_device_name()
    for work, title in ((step, "fine-tuning step"), (evaluation, "evaluation")):
        times = {"plain": [], "project": []}
        for repeat in range(repeats + 1):
            for name in times:                                       # in turns, so that a busy machine hits both
                times[name].append(seconds(work, name))
        plain, project = (batch / statistics.median(times[name][1:]) for name in ("plain", "project"))
        print(f"{title}, ViT-Tiny 224, batch {batch}, {threads}: plain {plain:.1f}, project {project:.1f} images/s "
              f"({project / plain:.2f} x)")

    image = images[0].cpu()
    times = [seconds(lambda _: [finetune.rand_augment(image, 10) for _ in range(50)], "") / 50 for _ in range(repeats)]
    print(f"RandAugment level 10 of a 224x224 image: {1000 * statistics.median(times):.2f} ms")


if __name__ == "__main__":
    torch.manual_seed(0)
    bench_finetune()
