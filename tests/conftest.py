import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)    # as in `run`: sums depend on the number of threads, and resumed runs are compared bit for bit


def seeded(shape, name):
    """Standard normal float32 numbers that depend on the name alone: how the weights behind golden.npz were made."""
    return torch.from_numpy(np.random.default_rng([0, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32))


@torch.no_grad()
def seed_weights(model, prefix="", rename=lambda name: name):
    """Fill every trainable parameter by its public name: 0.05 * normal, plus 1 for the scale of a norm."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = rename(name)
            p.copy_(0.05 * seeded(tuple(p.shape), prefix + name) + float(p.dim() == 1 and name.endswith("weight")))
    return model.eval()


def rel_error(a, b):
    """max|a - b| / max|b| over the whole array."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


@pytest.fixture(scope="session")
def golden():
    return np.load(Path(__file__).parent / "golden.npz")


def run(*command, torchrun=0, check=True, timeout=240, **env):
    """Run a script of the repository as a user would -> CompletedProcess; `torchrun` > 0 starts that many processes."""
    launch = [sys.executable] if not torchrun else \
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    done = subprocess.run([*launch, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
