#!/usr/bin/env bash
# One would guess: torchmetrics' segmentation.MeanIoU, updated with all images of a set, gives the mIoU that ADE20K,
# Cityscapes and Pascal VOC report: intersections and unions summed over the set, one IoU for each class, their mean.
# What happens: it averages one IoU for each pair of an image and a class that occurs there. A class counts as often
# as it occurs, and a few pixels of it in an image count as much as an image full of it. Of two segmenters the
# better one by the benchmark's mIoU is the worse one here. classification.MulticlassJaccardIndex gives the
# benchmark's mIoU (and takes 255 as ignore_index, which MeanIoU lacks).
# Why it matters: numbers of papers cannot be compared with MeanIoU, and it selects other checkpoints.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 torchmetrics==1.9.0
cat > "$folder/run.py" <<'EOF'
import sys
from importlib.metadata import version

import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

print(*(f"{name} {version(name)}" for name in ("torch", "torchmetrics")))
# ten pictures of 10 x 10 pixels: class 0 everywhere, class 1 in a column of each, class 2 in half of the last one
truth = torch.zeros(10, 10, 10, dtype=torch.long)
truth[:, :, 0] = 1
truth[9, 5:, 1:] = 2
no_rare = truth.where(truth != 2, 0)         # a segmenter that never finds class 2
no_small = truth.where(truth != 1, 0)        # one that finds class 1 in three pictures only
no_small[:3] = truth[:3]


def benchmark(predicted):
    cells = torch.bincount((3 * truth + predicted).flatten(), minlength=9).view(3, 3).double()
    hits = cells.diagonal()
    return (hits / (cells.sum(0) + cells.sum(1) - hits)).mean().item()


scores = {}
for name, predicted in (("no_rare", no_rare), ("no_small", no_small)):
    metrics = MeanIoU(num_classes=3, input_format="index"), MulticlassJaccardIndex(num_classes=3)
    for image, labels in zip(predicted, truth):
        for metric in metrics:
            metric.update(image[None], labels[None])
    scores[name] = (benchmark(predicted), *(metric.compute().item() for metric in metrics))
    print("{:8}  by hand over the set {:.4f}, MeanIoU {:.4f}, MulticlassJaccardIndex {:.4f}".format(
        name, *scores[name]))

(by_hand, mean_iou, jaccard), (by_hand_2, mean_iou_2, jaccard_2) = scores.values()
assert abs(jaccard - by_hand) < 1e-5 and abs(jaccard_2 - by_hand_2) < 1e-5
if not (by_hand < by_hand_2 and mean_iou > mean_iou_2):
    sys.exit("changed: MeanIoU orders the two segmenters as the mIoU of the set does")
print("MeanIoU prefers the segmenter whose mIoU over the set is lower.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
