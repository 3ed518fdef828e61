#!/usr/bin/env bash
# One would guess: labels resized by torch's mode "nearest-exact" equal Pillow's NEAREST, as the documentation
# of torch.nn.functional.interpolate says, with the exception of one pair of sizes in a thousand.
# What happens: of all pairs of lengths up to 128 nearly one in five differs. They differ only where the
# wanted position lies exactly between two pixels: torch nearly always takes the right one, and Pillow (with
# OpenCV's INTER_NEAREST_EXACT on its side) takes now the left one and now the right one.
# Why it matters: 512 pixels to 768, or 224 to 336, are such pairs. Label maps prepared by Pillow and by torch
# then differ at the borders of the classes, and no setting of torch brings Pillow's result back.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 pillow==13.0.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
cat > "$folder/run.py" <<'EOF'
import sys
from importlib.metadata import version

import cv2
import numpy as np
import torch
from PIL import Image

print(*(f"{name} {version(name)}" for name in ("torch", "pillow", "opencv-python-headless", "numpy")))
words = " ".join(torch.nn.functional.interpolate.__doc__.split())
start = words.index("matches Scikit-Image")
print("torch's documentation: nearest-exact", words[start:start + 70], "...")

def torch_labels(labels, height, width):
    x = torch.from_numpy(labels)[None, None]
    return torch.nn.functional.interpolate(x, size=(height, width), mode="nearest-exact")[0, 0].numpy()

def pillow_labels(labels, height, width):
    return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))

different = only_halves = torch_rounds_up = 0
for old in range(1, 129):
    row = np.arange(old, dtype=np.uint8)[None]
    for new in range(1, 129):
        ours, theirs = torch_labels(row, 1, new)[0], pillow_labels(row, 1, new)[0]
        wrong = ours != theirs
        if wrong.any():
            twice = (2 * np.arange(new) + 1) * old        # the position, times 2 * new
            different += 1
            only_halves += (twice[wrong] % (2 * new) == 0).all()
            torch_rounds_up += (ours[wrong] == twice[wrong] // (2 * new)).all()
print(f"lengths 1..128: {different} of {128 * 128} pairs differ, {only_halves} of them only between two pixels,"
      f" in {torch_rounds_up} torch took the right one everywhere")

labels = np.random.default_rng(0).integers(0, 151, (512, 512), dtype=np.uint8)
ours, theirs = torch_labels(labels, 768, 768), pillow_labels(labels, 768, 768)
opencv = cv2.resize(labels, (768, 768), interpolation=cv2.INTER_NEAREST_EXACT)
share = (ours != theirs).mean()
print(f"random labels 512 -> 768: {share:.1%} of the pixels differ, OpenCV and Pillow {(opencv != theirs).mean():.1%}")

if not (different > 2000 and only_halves == different and torch_rounds_up > 0.8 * different and share > 0.05):
    sys.exit("changed: torch and Pillow now agree, or differ elsewhere")
if (opencv != theirs).any():
    sys.exit("changed: OpenCV no longer agrees with Pillow")
print("torch's nearest-exact and Pillow's NEAREST choose different pixels at ties, which are common.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
