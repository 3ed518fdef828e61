"""One run under each way to start loader processes: fork, forkserver (Linux from Python 3.14 on) and
spawn (macOS, Windows)."""
import multiprocessing
import sys

import pytest
import torch
from conftest import ROOT, read_log, run, same_weights

import models
import toy

OPTIONS = ["--method", "mae", "--model", "vit_pico", "--image-size", 32, "--patch-size", 8, "--epochs",
           1, "--batch-size", 16, "--workers", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """The data, and a run of this system's own start method."""
    folder = tmp_path_factory.mktemp("forked")
    toy.write_images(folder / "data", 32, 4)
    run("pretrain_d2mae.py", *OPTIONS, "--data", folder / "data", "--out", folder / "out")
    return folder


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_run_is_the_same_under_every_start_method(method, forked, tmp_path):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{method} does not exist on this system")
    argv = ["pretrain_d2mae.py", *map(str, OPTIONS), "--data", str(forked / "data"), "--out",
            str(tmp_path)]
    code = f"""
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    sys.argv = {argv!r}
    runpy.run_path("pretrain_d2mae.py", run_name="__main__")
"""
    run("-c", code, PYTHONPATH=str(ROOT))
    assert same_weights(forked / "out", tmp_path)
    assert read_log(forked / "out/log.jsonl")[1:] == read_log(tmp_path / "log.jsonl")[1:]


def own_memory(names):
    """Mebibytes that this process has to itself after it has read all names."""
    total = sum(len(names[i]) for i in range(len(names)))
    with open("/proc/self/smaps_rollup") as file:
        private = [int(line.split()[1]) for line in file if line.startswith("Private")]
    return total, sum(private) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_names_cost_a_process_that_is_not_forked_nothing():
    """A list of 200,000 names takes 30 MB in each process; shared names take as much as two."""
    names = [f"data/imagenet/train/n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(200_000)]
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        few = pool.apply(own_memory, [models.Names(names[:2])])[1]
        total, many = pool.apply(own_memory, [models.Names(names)])
        _, listed = pool.apply(own_memory, [names])
    assert total == sum(map(len, names))
    assert many - few < 8 < listed - few
