"""What several test files use: seeded weights, runs as a user starts them, kill and resume."""
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "tools"))    # toy, demo
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)    # as in `run`: sums depend on the number of threads

from models import read_log  # noqa: E402


def pytest_configure(config):
    for module in ("models", "pretrain_d2mae", "finetune", "segment", "track", "analyze"):
        for kind in ("DeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", f"error::{kind}:{module}")


def seeded(shape, name):
    """Standard normal float32 numbers that depend on the name alone: the weights of golden.npz."""
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


@torch.no_grad()
def seed_weights(model, prefix="", rename=lambda name: name):
    """Fill trainable parameters by public name: 0.05 * normal, plus 1 for the scale of a norm."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = rename(name)
            is_scale = p.dim() == 1 and name.endswith("weight")
            p.copy_(0.05 * seeded(tuple(p.shape), prefix + name) + float(is_scale))
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
    """Run a script of the repository as a user would -> CompletedProcess; torchrun: processes."""
    launch = [sys.executable]
    if torchrun:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    done = subprocess.run([*launch, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, **env})
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def here(module, *options):
    """The same in this process, which saves the start: module.main on a list of options."""
    return module.main(module.parse_args([str(option) for option in options]))


def state_of(path):
    return torch.load(path, weights_only=True)


def same_weights(a, b, tolerance=0.0):
    """Whether the last.pt of two folders hold the same weights."""
    a, b = (state_of(Path(folder, "last.pt"))["model"] for folder in (a, b))
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tolerance for k in a)


def kill(module, options, out, line):
    """Start a run with a loader process, and SIGKILL both once its log holds a line for which
    line(values) is true, that is in the middle of the epoch after the last save. The run must not
    have ended by itself."""
    command = [sys.executable, module.__file__, *map(str, options), "--workers", "1", "--out",
               str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    log = Path(out, "log.jsonl")
    while process.poll() is None:
        if log.exists() and any(map(line, read_log(log))):
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait(timeout=120)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


def check_kill_and_resume(module, options, tmp_path, line):
    """A run killed in the middle of an epoch goes on by the same command to the same bits and to
    the same log -> the folder of the uninterrupted run."""
    here(module, *options, "--out", tmp_path / "straight")
    kill(module, options, tmp_path / "killed", line)
    last = tmp_path / "killed/last.pt"
    assert last.exists() and state_of(last)["epoch"] < state_of(tmp_path / "straight/last.pt")["epoch"]
    here(module, *options, "--out", tmp_path / "killed")
    assert same_weights(tmp_path / "killed", tmp_path / "straight")
    logs = [read_log(tmp_path / name / "log.jsonl")[1:] for name in ("killed", "straight")]
    assert logs[0] == logs[1]
    return tmp_path / "straight"
