#!/usr/bin/env bash
# One would guess: the CKA of torch_cka is symmetric, at most 1, and does not change if a constant is added to all
# features, since HSIC centres the Gram matrices.
# What happens: it multiplies and sums Gram matrices of raw float32 features and centres afterwards. Where the mean of
# the features is ten times their standard deviation, few digits are left of the difference: two layers of similarity
# -0.01 get -0.27 in one direction and 0.13 in the other, and with a larger mean the comparison ends in "HSIC
# computation resulted in NANs". Subtracting the mean of each feature over the batch first gives -0.01 again.
# Why it matters: the residual stream of ViTs has channels with large constant values, so a similarity map of layers
# is noise in its upper part, with nothing to show for it but values outside of 0 .. 1.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 torchvision==0.29.1 torch_cka==0.21 matplotlib tqdm
cat > "$folder/run.py" <<'EOF'
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_cka import CKA

print(*(f"{name} {version(name)}" for name in ("torch", "torch_cka")))


class Net(nn.Module):
    """Two layers of different features, both with the mean `offset`."""

    def __init__(self, offset, centred):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 4096), nn.Linear(64, 4096)
        self.features = nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()})
        self.offset, self.centred = offset, centred

    def forward(self, x):
        for name, y in (("a", self.a(x)), ("b", self.b(x.square()))):
            y = y + self.offset
            self.features[name](y - y.mean(dim=0) if self.centred else y)


inputs = DataLoader(TensorDataset(torch.randn(256, 64, generator=torch.Generator().manual_seed(0))), 64)
layers = ["features.a", "features.b"]


@torch.no_grad()
def similarity(offset, centred=False):
    cka = CKA(Net(offset, centred), Net(offset, centred), model1_layers=layers, model2_layers=layers)
    try:
        cka.compare(inputs)
    except AssertionError as error:
        return str(error)
    return [[round(value, 3) for value in row] for row in cka.export()["CKA"].tolist()]


found = {offset: similarity(offset) for offset in (0, 1, 10, 30)}
centred = similarity(10, centred=True)
for offset, value in found.items():
    print(f"features + {offset}: {value}")
print(f"features + 10, centred before torch_cka sees them: {centred}")
assert abs(found[0][0][1]) < 0.1 and abs(centred[0][1] - found[0][0][1]) < 0.01
if all(abs(found[10][i][1 - i] - found[0][i][1 - i]) < 0.1 for i in (0, 1)):
    sys.exit("changed: a constant that is added to the features no longer changes the CKA")
print("A constant that is added to all features changes the CKA of torch_cka.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
