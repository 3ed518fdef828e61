#!/usr/bin/env bash
# One would guess: whole-number boxes that torchvision converts from corners to centre and size and back are the
# same boxes, or at most one pixel off, however often this is done.
# What happens: three of four boxes change in the first round trip, and every further round trip moves them one
# pixel more towards the upper left corner, because both directions round half a pixel down.
# Why it matters: the boxes of LaSOT and of many detection data sets are whole numbers, and torch.tensor keeps
# them so. A chain of transforms that changes the notation twice moves small targets without a message.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 torchvision==0.29.1
cat > "$folder/run.py" <<'EOF'
import sys
from importlib.metadata import version

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import convert_bounding_box_format as convert

print("torch", version("torch"), "torchvision", version("torchvision"))
generator = torch.Generator().manual_seed(0)
corner = torch.randint(50, 100, (1000, 2), generator=generator)
size = torch.randint(1, 50, (1000, 2), generator=generator)
corners = torch.cat([corner, corner + size], 1)

def drift(start, rounds):
    boxes = tv_tensors.BoundingBoxes(start, format="XYXY", canvas_size=(200, 200))
    for _ in range(rounds):
        boxes = convert(convert(boxes, new_format="CXCYWH"), new_format="XYXY")
    assert boxes.dtype == start.dtype
    return (boxes - start).abs().amax(1)

whole = [drift(corners, rounds) for rounds in (1, 2, 3, 10)]
decimal = drift(corners.float(), 10)
share = (whole[0] > 0).float().mean().item()
print(f"int64 boxes: {share:.0%} change in the first round trip; "
      f"largest error after 1, 2, 3, 10: {[int(error.max()) for error in whole]} pixels")
print(f"float32 boxes: largest error after 10 round trips {decimal.max():.1e} pixels")
example = tv_tensors.BoundingBoxes([[10, 10, 21, 21]], format="XYXY", canvas_size=(200, 200))
steps = [example.tolist()[0]]
for _ in range(3):
    example = convert(convert(example, new_format="CXCYWH"), new_format="XYXY")
    steps.append(example.tolist()[0])
print("one box, round trip by round trip:", *steps)

if not (share > 0.5 and [int(error.max()) for error in whole] == [1, 2, 3, 10] and decimal.max() < 1e-3):
    sys.exit("changed: whole-number boxes no longer move by a pixel per round trip")
print("Whole-number boxes move by one pixel per round trip between corners and centre in torchvision.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
