#!/usr/bin/env bash
# One would guess: a NaN inside a network survives ReLU, clamp and maximum in OpenVINO as it does in
# PyTorch and NumPy, so that broken weights or a broken input show up as NaN in the output.
# What happens: on x86 processors OpenVINO's ReLU, clamp, maximum, hard sigmoid and the reduction to a
# maximum turn NaN into an ordinary number. A picture of nothing but NaN leaves a convolution with ReLU
# as exact zeros. Sigmoid, GELU and sums keep the NaN.
# Why it matters: a check for NaN in the output of a deployed network finds nothing, and a tracker goes on
# with a score map of zeros.
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

def run(build, values):
    parameter = ops.parameter(list(values.shape), np.float32)
    model = ov.Model([build(parameter)], [parameter])
    return list(ov.Core().compile_model(model, "CPU")([values]).values())[0]

print("openvino", ov.__version__, "numpy", np.__version__)
first = ops.constant(np.array([0]))
zeros = ops.constant(np.zeros(4, np.float32))
operations = {
    "relu": ops.relu,
    "clamp to 0..1": lambda x: ops.clamp(x, 0.0, 1.0),
    "maximum with 0": lambda x: ops.maximum(x, zeros),
    "hard sigmoid": ops.hsigmoid,
    "largest element": lambda x: ops.reduce_max(x, first, False),
    "sigmoid": ops.sigmoid,
    "gelu": lambda x: ops.gelu(x, "erf"),
    "sum": lambda x: ops.reduce_sum(x, first, False),
}
values = np.array([np.nan, -1.0, 0.5, 2.0], np.float32)
assert np.isnan(np.maximum(values, 0)[0]) and np.isnan(values.max())
kept = {}
for name, build in operations.items():
    result = np.atleast_1d(run(build, values))
    kept[name] = bool(np.isnan(result[0]))
    print(f"{name:16} {values} -> {result}")

kernel = ops.constant(np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32))
picture = np.full((1, 3, 32, 32), np.nan, np.float32)
output = run(lambda x: ops.relu(ops.convolution(x, kernel, [1, 1], [1, 1], [1, 1], [1, 1])), picture)
print("convolution and relu of a picture of NaN:", np.unique(output))

expected = {name: name in ("sigmoid", "gelu", "sum") for name in operations}
if kept != expected:
    sys.exit(f"changed: the operations that keep NaN are now {kept}")
if not (output == 0).all():
    sys.exit("changed: the convolution with relu no longer gives zeros")
print("OpenVINO replaces NaN by an ordinary number in ReLU, clamp and maximum, where NumPy keeps it.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
