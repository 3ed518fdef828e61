#!/usr/bin/env bash
# One would guess: kornia moves a box the same way whether it is given as corners (bbox_xyxy) or as corner and
# size (bbox_xywh). In a picture 32 pixels wide, the flip of the box from x=0 to x=10 lies from 22 to 32, and
# a picture of twice the size has a box of twice the size.
# What happens: with bbox_xyxy the flipped box lies from 21 to 31, one pixel further left than with bbox_xywh.
# When the picture grows from 32 to 64 pixels, the width of 10 becomes 20.32 with bbox_xyxy and 19.29 with
# bbox_xywh, and never 20.
# Why it matters: half of the training boxes move by a pixel with flips, and sizes are off by up to 4 per cent,
# which a tracker on small crops learns and its IoU shows.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 kornia==0.9.0
cat > "$folder/run.py" <<'EOF'
import sys
from importlib.metadata import version

import kornia.augmentation as K
import torch

print("torch", version("torch"), "kornia", version("kornia"))
picture = torch.zeros(1, 3, 32, 32)
boxes = {"bbox_xyxy": [0.0, 0.0, 10.0, 10.0], "bbox_xywh": [0.0, 0.0, 10.0, 10.0]}
span = {}
for name, augmentation in dict(flip=K.RandomHorizontalFlip(p=1.0), enlarge=K.Resize((64, 64))).items():
    for key, box in boxes.items():
        sequence = K.AugmentationSequential(augmentation, data_keys=["input", key])
        output, moved = sequence(picture, torch.tensor([[box]]))
        left, _, right, _ = moved[0, 0].tolist()
        right = right + left if key == "bbox_xywh" else right
        span[name, key] = round(left, 2), round(right, 2)
        print(f"{name:8} {key}: picture {tuple(output.shape[-2:])}, x = 0..10 becomes {left:.2f}..{right:.2f}")

expected = {("flip", "bbox_xyxy"): (21.0, 31.0), ("flip", "bbox_xywh"): (22.0, 32.0),
            ("enlarge", "bbox_xyxy"): (0.0, 20.32), ("enlarge", "bbox_xywh"): (0.0, 19.29)}
if span != expected:
    sys.exit(f"changed: the boxes are now {span}")
print("kornia moves one and the same box differently by its notation, and doubles no box exactly.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
