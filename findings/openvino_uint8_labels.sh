#!/usr/bin/env bash
# One would guess: "label - 1" in uint8 gives the same numbers in OpenVINO as in NumPy and PyTorch, so
# that 0, the pixels of ADE20K without a label, becomes 255, the usual value to ignore.
# What happens: OpenVINO's CPU device saturates 8-bit integers. 0 - 1 stays 0, and 255 + 1 stays 255.
# 16-bit and 32-bit integers wrap around like NumPy's.
# Why it matters: when the shift of the labels is part of the exported graph, pixels without a label are
# counted as class 0 (wall), which is wrong without any message.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq openvino==2026.4.1 numpy==2.4.6
cat > "$folder/run.py" <<'EOF'
import sys

import numpy as np
import openvino as ov
from openvino import opset13 as ops

def minus_one(values):
    parameter = ops.parameter([len(values)], values.dtype.type)
    one = ops.constant(np.array(1, values.dtype))
    model = ov.Model([ops.subtract(parameter, one)], [parameter])
    return list(ov.Core().compile_model(model, "CPU")([values]).values())[0]

print("openvino", ov.__version__, "numpy", np.__version__)
wraps = {}
for dtype in (np.uint8, np.int8, np.uint16, np.int16, np.int32):
    lowest = np.iinfo(dtype).min
    values = np.array([lowest, lowest + 1, 100], dtype)
    with np.errstate(over="ignore"):
        expected = values - dtype(1)
    result = minus_one(values)
    assert result.dtype == dtype
    wraps[dtype.__name__] = bool((result == expected).all())
    print(f"{dtype.__name__:6} {values} - 1   NumPy: {expected}   OpenVINO: {result}")

if wraps != dict(uint8=False, int8=False, uint16=True, int16=True, int32=True):
    sys.exit(f"changed: which types wrap around is now {wraps}")
if minus_one(np.array([0, 1, 150], np.uint8)).tolist() != [0, 0, 149]:
    sys.exit("changed: the uint8 labels come out differently")
print("OpenVINO saturates 8-bit integers: label 0 minus 1 is 0 and not 255. Wider integers wrap around.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
