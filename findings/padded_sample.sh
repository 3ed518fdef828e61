#!/usr/bin/env bash
# One would guess: nn.TransformerEncoderLayer gives the same finite numbers with and without gradients, also for
# a sample of a batch whose tokens are all padding.
# What happens: with gradients the sample is finite, in training and in evaluation. Under torch.no_grad() in
# evaluation another code path runs, and every number of this sample is NaN. Its neighbours are right.
# Why it matters: batches of a fixed number of templates or objects, filled up with padding, train without a
# trace of NaN. The first validation then has NaN in its mean, and the training is suspected.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 numpy==2.4.6
cat > "$folder/run.py" <<'EOF'
import sys
import warnings
from importlib.metadata import version

import torch

warnings.simplefilter("ignore")
print("torch", version("torch"))
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
tokens = torch.randn(3, 5, 32)
padding = torch.zeros(3, 5, dtype=torch.bool)
padding[0] = True                                         # nothing but padding
padding[1, 3:] = True                                     # two of five tokens

training = layer.train()(tokens, src_key_padding_mask=padding).detach()
evaluation = layer.eval()(tokens, src_key_padding_mask=padding).detach()
with torch.no_grad():
    validation = layer(tokens, src_key_padding_mask=padding)
outputs = {"train()": training, "eval()": evaluation, "eval() and no_grad()": validation}
for name, output in outputs.items():
    print(f"{name:21} NaN in each sample (of 160 numbers): {output.isnan().flatten(1).sum(1).tolist()}")
assert torch.allclose(training[2], validation[2], atol=1e-5)
assert torch.allclose(training[1, :3], validation[1, :3], atol=1e-5)

if training.isnan().any() or evaluation.isnan().any():
    sys.exit("changed: there is NaN with gradients as well")
if not validation[0].isnan().all() or validation[1:].isnan().any():
    sys.exit("changed: NaN without gradients is gone or elsewhere")
print("A sample of padding alone is finite with gradients and NaN under no_grad() in the same layer.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
