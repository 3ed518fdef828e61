#!/usr/bin/env bash
# One would guess: division of whole numbers rounds down and the remainder belongs to it, so that
# (x // 16) * 16 + x % 16 is x again, for negative x as well, as PyTorch does it.
# What happens: each of two runtimes gets the other half wrong. OpenVINO rounds towards zero in Divide,
# although its attribute m_pythondiv is set, and its FloorMod is right. ExecuTorch rounds down in // and
# gives % the sign of x. In neither do the two parts add up to x.
# Why it matters: the crop of a tracker starts at negative coordinates when the target leaves the frame.
# The patch, and the place in it, that such a pixel belongs to then differ between training and device.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 executorch==1.5.1 openvino==2026.4.1 numpy==2.4.6
cat > "$folder/run.py" <<'EOF'
import sys
from importlib.metadata import version

import numpy as np
import openvino as ov
import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from openvino import opset13 as ops

class Cells(torch.nn.Module):
    def forward(self, x):
        return x // 16, x % 16

print("torch", version("torch"), "executorch", version("executorch"), "openvino", version("openvino"))
x = torch.tensor([-20, -16, -7, -1, 0, 7, 20])

def in_openvino():
    parameter = ops.parameter([len(x)], np.int64)
    patch = ops.constant(np.array(16))
    divide = ops.divide(parameter, patch)
    print("attributes of OpenVINO's Divide:", divide.get_attributes())
    assert divide.get_attributes()["m_pythondiv"] is True
    model = ov.Model([divide, ops.floor_mod(parameter, patch)], [parameter])
    return [torch.tensor(v) for v in ov.Core().compile_model(model, "CPU")([x.numpy()]).values()]

def in_executorch():
    program = to_edge_transform_and_lower(torch.export.export(Cells(), (x,))).to_executorch()
    loaded = Runtime.get().load_program(program.buffer)
    return loaded.load_method("forward").execute([x])

results = {"PyTorch": Cells()(x), "OpenVINO": in_openvino(), "ExecuTorch": in_executorch()}
print("x                     ", x.tolist())
for name, (quotient, remainder) in results.items():
    print(f"{name:10} x // 16    {quotient.tolist()}\n{'':10} x % 16     {remainder.tolist()}")
    print(f"{'':10} their sum  {(quotient * 16 + remainder).tolist()}")

quotient, remainder = results["PyTorch"]
assert torch.equal(quotient * 16 + remainder, x)
same = {name: (torch.equal(q, quotient), torch.equal(r, remainder)) for name, (q, r) in results.items()}
if same != {"PyTorch": (True, True), "OpenVINO": (False, True), "ExecuTorch": (True, False)}:
    sys.exit(f"changed: agreement with PyTorch (quotient, remainder) is now {same}")
print("For negative x OpenVINO's quotient and ExecuTorch's remainder differ from PyTorch's.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
