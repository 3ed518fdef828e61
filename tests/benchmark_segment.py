"""python tests/benchmark_segment.py: sliding-window evaluation at the paper's size, project against a plain version."""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import segment


@torch.no_grad()
def plain_labels(model, image, size, stride):
    """One window at a time, each score padded to the whole image, all classes resized at once."""
    (h, w), (H, W) = model.encoder.img_size, image.shape[1:]
    total, count = torch.zeros(1, model.num_classes, H, W), torch.zeros(1, 1, H, W)
    for y in segment.window_starts(H, h, stride):
        for x in segment.window_starts(W, w, stride):
            score = F.interpolate(model(image[None, :, y:y + h, x:x + w]), (h, w), mode="bilinear")
            total += F.pad(score, (x, W - x - w, y, H - y - h))
            count[:, :, y:y + h, x:x + w] += 1
    return F.interpolate(total / count, size, mode="bilinear").argmax(dim=1)[0]


@torch.no_grad()
def project_labels(model, images, size, stride):
    return [segment.classify(logits, size) for logits in segment.sliding_logits(model, images, stride)]


def bench_segment(images=4, rounds=3, size=(512, 683), label_size=(600, 800)):
    """ViT-Tiny with relative position bias, window 512, stride 341, 150 classes, random weights: images per second."""
    torch.manual_seed(0)
    model = segment.build_model(segment.resolve(segment.parse_args([]))).eval()
    pictures = [torch.randn(3, *size) for _ in range(images)]
    plain = lambda: [plain_labels(model, picture, label_size, 341) for picture in pictures]
    project = lambda: project_labels(model, pictures, label_size, 341)
    times = {"plain": [], "project": []}
    same = [(a == b).float().mean().item() for a, b in zip(plain(), project())]    # warm-up, and the same answer
    for _ in range(rounds):
        for name, run in (("plain", plain), ("project", project)):
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
    rate = {name: images / statistics.median(t) for name, t in times.items()}
    print(f"sliding windows {size[0]}x{size[1]}, {torch.get_num_threads()} threads: plain {rate['plain']:.3f} images/s, "
          f"project {rate['project']:.3f} images/s, {rate['project'] / rate['plain']:.2f}x; equal labels {min(same):.4%}")
    return rate


if __name__ == "__main__":
    bench_segment()
