#!/usr/bin/env bash
# One would guess: a mask that supervision writes as COCO covers the same pixels when COCO's own tools read
# it, at least for a square, and a line one pixel wide stays an object.
# What happens: supervision writes polygons through the centres of the border pixels, while pycocotools
# takes polygons as outlines. A square of 20 x 20 pixels loses a row and a column, a bar two pixels thick
# loses more than half of its pixels, and of a line only an empty list remains (supervision warns of this one
# case), which pycocotools refuses.
# The "area" in the same file is the full one, and supervision's own reader gives the full square back.
# Why it matters: a round trip inside supervision looks perfect, and the loss shows up only as a lower IoU in
# another tool, most of all for thin and small objects (poles, signs, distant targets).
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq supervision==0.31.2 pycocotools==2.0.11 opencv-python-headless==5.0.0.93 numpy==2.4.6
cat > "$folder/run.py" <<'EOF'
import json
import sys
import warnings
from importlib.metadata import version

import cv2
import numpy as np
import supervision as sv
from pycocotools.coco import COCO

warnings.simplefilter("ignore")
print(*(f"{name} {version(name)}" for name in ("supervision", "pycocotools", "opencv-python-headless")))
names = ["square", "bar", "line"]
masks = np.zeros((3, 60, 60), bool)
masks[0, 5:25, 5:25] = True
masks[1, 35:37, 5:25] = True
masks[2, 50:51, 5:25] = True
cv2.imwrite("picture.png", np.zeros((60, 60, 3), np.uint8))
objects = sv.Detections(xyxy=sv.mask_to_xyxy(masks).astype(float), mask=masks, class_id=np.arange(3))
dataset = sv.DetectionDataset(classes=names, images=["picture.png"], annotations={"picture.png": objects})
dataset.as_coco(annotations_path="coco.json")

coco = COCO("coco.json")
read = {}
for annotation in coco.dataset["annotations"]:
    name = coco.cats[annotation["category_id"]]["name"]
    try:
        read[name] = int(coco.annToMask(annotation).sum())
    except IndexError:
        read[name] = None
    print(f"{name:6} drawn {masks[names.index(name)].sum():3} pixels, area in the file {annotation['area']:.0f},"
          f" read by pycocotools {read[name]}, segmentation {json.dumps(annotation['segmentation'])}")
_, _, back = next(iter(sv.DetectionDataset.from_coco(".", "coco.json", force_masks=True)))
print("supervision reads its own file as", [int(mask.sum()) for mask in back.mask], "pixels")

if read != dict(square=361, bar=19, line=None):
    sys.exit(f"changed: pycocotools now reads {read}")
if [int(mask.sum()) for mask in back.mask][:2] != [400, 40]:
    sys.exit("changed: supervision no longer reads its own squares in full")
print("The COCO file of supervision shrinks masks for pycocotools: 400 pixels become 361, and a line is lost.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
