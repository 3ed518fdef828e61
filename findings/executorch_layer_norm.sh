#!/usr/bin/env bash
# One would guess: LayerNorm in ExecuTorch agrees with PyTorch to 1e-2 for tokens whose channels lie around
# 1000 with a spread of 1, since 32-bit floats hold such numbers to 6e-5.
# What happens: the runtime in ExecuTorch's wheel answers with NaN for some tokens, GroupNorm is off by more
# than 1, and at 100 the error is already a thousand times PyTorch's. This is what one sees when the
# variance is computed as the mean of the squares minus the square of the mean.
# Why it matters: where the tokens of a transformer, or the features of a head with GroupNorm, have an offset
# much greater than their spread, a network that is right in PyTorch and exports without a message fails on
# the device.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 executorch==1.5.1
cat > "$folder/run.py" <<'EOF'
import sys
from importlib.metadata import version

import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

def on_device(module, x):
    program = to_edge_transform_and_lower(torch.export.export(module.eval(), (x,))).to_executorch()
    loaded = Runtime.get().load_program(program.buffer)
    return loaded.load_method("forward").execute([x])[0]

@torch.no_grad()
def errors(module, x):
    exact = module.double()(x.double()).float()
    module.float()
    return [(y - exact).abs().max().item() for y in (module(x), on_device(module, x))]

print("torch", version("torch"), "executorch", version("executorch"))
noise = torch.randn(1, 50, 192, generator=torch.Generator().manual_seed(0))
measured = {}
for offset in (0, 10, 100, 1000):
    measured[offset] = errors(torch.nn.LayerNorm(192), noise + offset)
    print("LayerNorm, mean %4d, spread 1: largest error PyTorch %.1e  ExecuTorch %.1e"
          % (offset, *measured[offset]))
groups = errors(torch.nn.GroupNorm(4, 192), noise.transpose(1, 2).contiguous() + 1000)
print("GroupNorm, mean 1000, spread 1: largest error PyTorch %.1e  ExecuTorch %.1e" % tuple(groups))

assert all(torch_error < 1e-2 for torch_error, _ in [*measured.values(), groups])
if not measured[0][1] < 1e-4:
    sys.exit("changed: LayerNorm is wrong without an offset too")
if measured[100][1] < 300 * measured[100][0] or measured[1000][1] < 0.1 or groups[1] < 0.1:
    sys.exit("changed: the normalisations of ExecuTorch are now exact for tokens with a large mean")
print("ExecuTorch's LayerNorm and GroupNorm lose the variance of tokens with a large mean.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
