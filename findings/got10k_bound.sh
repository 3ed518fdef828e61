#!/usr/bin/env bash
# One would guess: rect_iou(boxes, truth, bound=(width, height)) of the got10k toolkit cuts boxes at the frame and then
# computes the IoU, so that a video and its mirror image give the same score.
# What happens: a box beyond the right or lower edge is cut, one beyond the left or upper edge is moved inside with its
# whole width and height. A box that covers the target exactly, but 10 pixels of it lie outside, has IoU 1 at the right
# and 0.5 at the left edge. The arrays of the caller are changed in place, the true boxes included.
# Why it matters: this is the overlap of the toolkit's report on GOT-10k. A tracker that predicts whole objects at the
# border is punished on one side only, and whoever scores the same arrays twice, with and without bound, gets two
# bounded scores.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq got10k==0.1.3 numpy==1.26.4
cat > "$folder/run.py" <<'EOF'
import sys
from importlib.metadata import version

import numpy as np
from got10k.utils.metrics import rect_iou

print(*(f"{name} {version(name)}" for name in ("got10k", "numpy")))
width, height = 100, 80


def mirrored(box):
    x, y, w, h = box
    return [width - x - w, y, w, h]


whole, visible = [-10.0, 20.0, 20.0, 30.0], [0.0, 20.0, 10.0, 30.0]
ious = {}
for side, box, seen in (("left", whole, visible), ("right", mirrored(whole), mirrored(visible))):
    predicted, truth = np.array([box]), np.array([seen])
    ious[side] = rect_iou(predicted, truth, bound=(width, height))[0]
    print(f"{side:5}: predicted {box}, visible part {seen}: IoU {ious[side]:.2f}; "
          f"predicted is now {predicted[0].tolist()}")
    changed = predicted[0].tolist() != box

if not (abs(ious["left"] - 0.5) < 1e-6 and abs(ious["right"] - 1) < 1e-6 and changed):
    sys.exit("changed: the bound treats both edges alike, or leaves its arguments as they are")
print("Beyond the left edge a box is moved, beyond the right edge it is cut.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
