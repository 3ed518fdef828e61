#!/usr/bin/env bash
# One would guess: the Hiera of the package hiera-transformer and the one of timm, with the same weights, give the
# same outputs, and these are logits in training and in evaluation.
# What happens: hiera-transformer gives logits after train() and probabilities after eval(); timm gives logits
# in both. The largest class is the same, so top-1 agrees.
# Why it matters: a cross-entropy on top of probabilities is wrong without a message. With 1000 classes it can't
# fall below 5.9, so that the validation loss of a perfect network looks like that of an untrained one; and
# distillation from such a teacher has a softmax of a softmax as its target.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 torchvision==0.29.1 timm==1.0.31 hiera-transformer==0.1.4
cat > "$folder/run.py" <<'EOF'
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import torch
from hiera import Hiera
from timm.models.hiera import Hiera as TimmHiera

print(*(f"{name} {version(name)}" for name in ("torch", "hiera-transformer", "timm")))
sizes = dict(embed_dim=16, num_heads=1, stages=(1, 1, 1, 1), num_classes=1000)
torch.manual_seed(0)
original, other = Hiera(**sizes), TimmHiera(**sizes)
with torch.no_grad():
    original.head.projection.bias[7] = 30.0               # a network that is sure of class 7
weights = {key.replace("head.projection", "head.fc"): value for key, value in original.state_dict().items()}
weights = {f"head.{key}" if key.startswith("norm.") else key: value for key, value in weights.items()}
other.load_state_dict(weights)

picture, label = torch.randn(1, 3, 224, 224), torch.tensor([7])
loss = {}
for name, network in (("hiera-transformer", original), ("timm", other)):
    for mode in ("train", "eval"):
        with torch.no_grad():
            output = getattr(network, mode)()(picture)
        loss[name, mode] = torch.nn.functional.cross_entropy(output, label).item()
        print(f"{name:17} {mode + '()':7} outputs from {output.min():8.4f} to {output.max():.4f}, sum "
              f"{output.sum():9.4f}, class {output.argmax().item()}, cross-entropy {loss[name, mode]:.3f}")

for key in (("hiera-transformer", "train"), ("timm", "train"), ("timm", "eval")):
    assert loss[key] < 0.01, key
if loss["hiera-transformer", "eval"] < 5:
    sys.exit("changed: hiera-transformer gives logits in evaluation")
print("hiera-transformer answers with probabilities after eval() and with logits after train(); timm never does.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
