#!/usr/bin/env bash
# One would guess: the overlap of the VOT toolkit is the usual IoU of two shapes. A box moved by 0.4 of its 10
# pixels has 0.923, a box and the polygon of its four corners have 1, and two boxes that are far apart have 0.
# What happens: the toolkit draws the shapes on pixels first. The moved box still has 1.0. The polygon covers
# one more row and column than the box, so the two overlap by 0.826 only, or by 0.64 at 4 pixels. Boxes too
# small to cover a pixel are empty, and two empty shapes have an overlap of 1.0 wherever they lie.
# Why it matters: a tracker that answers with boxes loses on data annotated by polygons, and the other way
# round, most of all for small targets; and a collapsed box on a collapsed annotation counts as perfect.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq vot-toolkit==0.9.0 attributee==0.1.8 numpy==2.4.6
cat > "$folder/run.py" <<'EOF'
import sys
from importlib.metadata import version

from vot.region import Polygon, Rectangle, calculate_overlap

def polygon(x, y, width, height):
    return Polygon([(x, y), (x + width, y), (x + width, y + height), (x, y + height)])

print(*(f"{name} {version(name)}" for name in ("vot-toolkit", "numpy")))
box = Rectangle(20, 20, 10, 10)
overlaps = {
    "box of 10 and the same moved by 0.4": calculate_overlap(box, Rectangle(20.4, 20, 10, 10)),
    "box of 10 and the same moved by 0.6": calculate_overlap(box, Rectangle(20.6, 20, 10, 10)),
    "box of 10 and its polygon": calculate_overlap(box, polygon(20, 20, 10, 10)),
    "box of 4 and its polygon": calculate_overlap(Rectangle(20, 20, 4, 4), polygon(20, 20, 4, 4)),
    "two boxes of 0.3, 85 pixels apart": calculate_overlap(Rectangle(5.1, 5.1, 0.3, 0.3),
                                                           Rectangle(90.1, 5.1, 0.3, 0.3)),
}
usual = [9.6 / 10.4, 9.4 / 10.6, 1, 1, 0]
for (name, overlap), iou in zip(overlaps.items(), usual):
    print(f"{name:36} usual IoU {iou:.3f}   VOT toolkit {overlap:.3f}")

if [round(value, 3) for value in overlaps.values()] != [1.0, 0.818, 0.826, 0.64, 1.0]:
    sys.exit(f"changed: the overlaps are now {overlaps}")
print("The VOT toolkit compares shapes as pixels: boxes and polygons of one target differ, empty shapes agree.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
