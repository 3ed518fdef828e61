#!/usr/bin/env bash
# One would guess: ViTMAEModel of transformers in evaluation, with mask_ratio=0, gives the patch tokens of an image in
# raster order, as ViTModel does, so that they can be laid out as a feature map.
# What happens: the tokens come in a random order, another one in every call. No patch is removed, but they are still
# shuffled. The class token is the same each time, and so is the set of patch tokens. Sorting by the output ids_restore
# restores the raster; passing noise=torch.arange(N) gives it at once.
# Why it matters: probes of the class token or of the mean token are right, while maps, segmentation and everything
# that compares places are scrambled without a message.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 transformers==5.24.0
cat > "$folder/run.py" <<'EOF'
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import torch
from transformers import ViTMAEConfig, ViTMAEModel

print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))
torch.manual_seed(0)
config = ViTMAEConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
                      image_size=64, patch_size=8, mask_ratio=0.0)
model = ViTMAEModel(config).eval()
image = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    first, second = model(image), model(image)
    ordered = model(image, noise=torch.arange(64.0)[None]).last_hidden_state[:, 1:]
cls, patches = (first.last_hidden_state[:, s] for s in (slice(1), slice(1, None)))
cls_2, patches_2 = (second.last_hidden_state[:, s] for s in (slice(1), slice(1, None)))


def restore(output, tokens):
    return tokens.gather(1, output.ids_restore[..., None].expand_as(tokens))


def differ(a, b):
    return (a - b).abs().max().item()


print(f"{patches.shape[1]} patch tokens of 64 patches; largest difference between two calls:")
print(f"class token {differ(cls, cls_2):.1e}, patch tokens {differ(patches, patches_2):.2f}, "
      f"after ids_restore {differ(restore(first, patches), restore(second, patches_2)):.1e}, "
      f"restored against noise=arange {differ(restore(first, patches), ordered):.1e}")
assert patches.shape[1] == 64 and differ(cls, cls_2) < 1e-4
assert differ(restore(first, patches), restore(second, patches_2)) < 1e-4
assert differ(restore(first, patches), ordered) < 1e-4
if differ(patches, patches_2) < 0.1:
    sys.exit("changed: two calls give the patch tokens in one order")
print("With mask_ratio=0 and in evaluation the patch tokens still come in a random order.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
