"""What only a GPU can show: the numbers of the CPU in every precision, whole runs of all scripts,
steps without a host sync, several processes, memory that runs out. Skipped without a GPU, but

    CUDA_TEST_DEVICE=cpu python -m pytest tests/test_cuda.py

runs everything on the CPU in which the device is only a name.
"""
import contextlib
import copy
import itertools
import os
from pathlib import Path

import pytest
import toy
import torch
import torch.distributed as dist
from benchmark import FLOAT32_ONLY, NETWORKS, PRECISIONS, errors, full_float32
from conftest import here, run, same_weights, state_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import finetune
import models
import pretrain_d2mae
import segment
import track

DEVICE = os.environ.get("CUDA_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU")

WITH_CONVOLUTIONS = ("Hiera", "Hiera, MAE", "Hiera, D-MAE", "segmentation", "tracking")
LOSS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}    # tolerances
GRADIENT = {torch.float32: 5e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
CONVOLUTION = {torch.float32: 5e-3, torch.bfloat16: 0.4, torch.float16: 0.2}

SMALL = ["--model", "vit_pico", "--workers", "0", "--log-every", "1000",
         "--device", "auto" if ON_GPU else DEVICE]
VIT = [*SMALL, "--image-size", "48", "--patch-size", "8"]
RUNS = {    # two epochs each, with rates at which the weights move
    pretrain_d2mae: [*VIT, "--method", "mae", "--epochs", "2", "--batch-size", "32", "--base-lr",
                     "1e-2", "--warmup-epochs", "0", "--data", "images"],
    finetune: [*VIT, "--shots", "8", "--epochs", "2", "--batch-size", "32", "--base-lr", "1e-2",
               "--data", "images"],
    segment: [*VIT, "--num-classes", "17", "--zero-is-class", "--iters", "16", "--batch-size", "4",
              "--lr", "1e-3", "--warmup-iters", "0", "--data", "segmentation"],
    track: [*SMALL, "--template-size", "32", "--search-size", "64", "--epochs", "2", "--pairs",
            "64", "--batch-size", "8", "--lr", "1e-3", "--data", "lasot=videos"],
}


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """Toy data in the current folder."""
    folder = tmp_path_factory.mktemp("data")
    toy.write_images(folder / "images", train=256, val=16)
    toy.write_segmentation(folder / "segmentation", train=32, val=4)
    toy.write_videos(folder / "videos", train=6, test=0)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def no_tensorfloat():
    full_float32()


# ---- numbers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_loss_and_gradients_are_those_of_the_cpu(name, dtype):
    if name in FLOAT32_ONLY and dtype != torch.float32:
        pytest.skip("rounding changes which tokens are kept")
    loss, gradients = errors(name, DEVICE, dtype)
    assert loss < LOSS[dtype]
    tolerance = CONVOLUTION if name in WITH_CONVOLUTIONS else GRADIENT
    wrong = {k: error for k, error in gradients.items() if not error < tolerance[dtype]}
    assert not wrong


@pytest.mark.parametrize("name", ["D2-MAE", "Hiera, MAE"])
def test_a_compiled_step_is_the_eager_one(name):
    """Loss and an update."""
    torch.manual_seed(0)
    model, inputs, loss_of = NETWORKS[name]()
    model = model.to(DEVICE)
    start = copy.deepcopy(model.state_dict())
    weights = []
    losses = []
    for compiled in (False, True):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        if compiled:
            model.compile(backend="inductor" if ON_GPU else "aot_eager")
        loss = loss_of(model, *(x.to(DEVICE) for x in inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weights.append(flat(model.state_dict()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert distance(*weights) < 1e-2 * distance(weights[0], flat(start))


def flat(weights):
    """All weights as one vector, without the statistics of batch norms, which move much farther."""
    return torch.cat([w.detach().cpu().flatten() for name, w in weights.items()
                      if "running" not in name and "num_batches" not in name])


def distance(a, b):
    return (a - b).norm().item()


# ---- whole runs --------------------------------------------------------------------------------
def interrupt(monkeypatch, module, *options):
    """A run that ends after it has saved its first epoch."""
    def save_once(args, rank, name, *state, **more):
        save(args, rank, name, *state, **more)
        if name == "last.pt":
            raise KeyboardInterrupt

    save = module.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save", save_once)
        here(module, *options)


@pytest.mark.parametrize("module,dtype", [(module, "auto") for module in RUNS] + [
    (pretrain_d2mae, "fp32"), (pretrain_d2mae, "fp16"), (finetune, "fp16")])
def test_a_run_resumes(module, dtype, tmp_path, monkeypatch):
    """Weights after an interruption are those of an uninterrupted run: they differ by far less than
    the second epoch moves them (kernels of GPUs add in no fixed order)."""
    options = [*RUNS[module], "--dtype", dtype, "--out"]
    here(module, *options, tmp_path / "straight")
    interrupt(monkeypatch, module, *options, tmp_path / "resumed")
    first = flat(state_of(tmp_path / "resumed/last.pt")["model"])
    here(module, *options, tmp_path / "resumed")
    straight, resumed = (flat(state_of(tmp_path / name / "last.pt")["model"])
                         for name in ("straight", "resumed"))
    moved = distance(straight, first)
    assert moved > 1e-3 * first.norm()
    assert distance(straight, resumed) < 0.25 * moved
    assert ON_GPU or same_weights(tmp_path / "straight", tmp_path / "resumed")


def test_a_run_without_a_scaler_resumes_with_one(tmp_path, monkeypatch):
    options = [*RUNS[pretrain_d2mae], "--out", tmp_path, "--dtype"]
    interrupt(monkeypatch, pretrain_d2mae, *options, "bf16")
    assert not state_of(tmp_path / "last.pt")["scaler"]
    here(pretrain_d2mae, *options, "fp16")
    assert state_of(tmp_path / "last.pt")["scaler"]["scale"] > 1


class Enough(Exception):
    pass


@pytest.mark.parametrize("module,dtype", list(itertools.product(RUNS, ("auto", "fp16"))))
def test_a_step_that_does_not_log_never_waits_for_the_device(module, dtype, tmp_path, monkeypatch):
    """The body of the script's own loop, after the first step, which loads constants and logs."""
    class Watched(module.tqdm):
        def __iter__(self):
            training = self.desc.startswith("epoch")
            for i, batch in enumerate(super().__iter__()):
                watch("error" if training and i else "default")
                yield batch
                watch("default")
                if training and i == 3:
                    raise Enough

    monkeypatch.setattr(module, "tqdm", Watched)
    try:
        with pytest.raises(Enough):
            here(module, *RUNS[module], "--dtype", dtype, "--out", tmp_path)
        watch("error")
        with pytest.raises(RuntimeError) if ON_GPU else contextlib.nullcontext():
            torch.ones(1, device=DEVICE).item()    # or the test would prove nothing
    finally:
        watch("default")


class Levels(torch.utils.data.Dataset):
    """Item (epoch, index) -> an image of the value `index`, index."""

    def __len__(self):
        return 200

    def __getitem__(self, key):
        return torch.full((3, 256, 256), key[1], dtype=torch.uint8), key[1]


def test_batches_that_are_copied_beside_a_step_arrive_whole():
    run = 0, 1, torch.device(DEVICE), None
    loader = models.train_loader(Levels(), 20, 1, 20, workers=1, seed=0, run=run)
    matrix = torch.randn(4096 if ON_GPU else 64, 64, device=DEVICE)
    errors = []
    for _ in range(2):
        for images, levels in loader:
            assert images.device.type == levels.device.type == DEVICE
            for _ in range(100):    # the next batch arrives before this one is read
                matrix @ matrix.T
            errors.append((images.float().mean(dim=(1, 2, 3)) - levels).abs().amax())
    assert len(errors) == 20 and torch.stack(errors).amax().item() == 0


def watch(mode):
    if ON_GPU:
        torch.cuda.set_sync_debug_mode(mode)


# ---- processes and memory --------------------------------------------------------------------
def test_a_group_of_one_process_talks_over_nccl(monkeypatch):
    """DistributedDataParallel, its batch norms and objects; without GPUs over gloo."""
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29531"), ("RANK", "0"),
                        ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    try:
        for name in ("D2-MAE", "segmentation"):
            model, inputs, loss_of = NETWORKS[name]()
            if ON_GPU:    # as in segment.py
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            model = model.to(DEVICE)
            network = DistributedDataParallel(model, broadcast_buffers=False)
            loss_of(network, *(x.to(DEVICE) for x in inputs)).backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
            assert model.encoder.patch_embed.proj.weight.grad.norm() > 0
        answer = [{"step": 3}]
        dist.broadcast_object_list(answer, src=0)
        assert answer == [{"step": 3}]
    finally:
        dist.destroy_process_group()


TWO_ON_ONE_GPU = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
import pretrain_d2mae

def start(backend, **options):
    join("gloo", **options)    # NCCL refuses two processes on one GPU
    os.environ["LOCAL_RANK"] = rank

def run_out(*unused):
    raise torch.OutOfMemoryError("out of memory")

rank = os.environ["RANK"]
join, dist.init_process_group = dist.init_process_group, start
os.environ["LOCAL_RANK"] = "0"
if rank == {short_of_memory!r} and {on_gpu}:
    torch.cuda.set_per_process_memory_fraction(2 ** 26 / torch.cuda.mem_get_info()[1])
elif rank == {short_of_memory!r}:
    pretrain_d2mae.random_masking = run_out
with pretrain_d2mae.plain_errors():
    pretrain_d2mae.main(pretrain_d2mae.parse_args())
"""


def two_on_one_gpu(folder, *options, short_of_memory=None, **more):
    """Run pretrain_d2mae.py in two processes on one device; one of them may be given 64 MiB."""
    script = folder / "two.py"
    root = str(Path(pretrain_d2mae.__file__).parent)
    script.write_text(TWO_ON_ONE_GPU.format(root=root, on_gpu=ON_GPU,
                                            short_of_memory=short_of_memory))
    return run(script, *options, torchrun=2, **more)


@pytest.fixture
def one_epoch(data):
    return [*RUNS[pretrain_d2mae], "--data", data / "images", "--epochs", "1", "--dtype", "fp32"]


def test_two_processes_on_one_gpu_equal_one(one_epoch, tmp_path):
    here(pretrain_d2mae, *one_epoch, "--out", tmp_path / "start", "--base-lr", 0)
    here(pretrain_d2mae, *one_epoch, "--out", tmp_path / "one")
    two_on_one_gpu(tmp_path, *one_epoch, "--out", tmp_path / "two")
    start, one, two = (flat(state_of(tmp_path / name / "last.pt")["model"])
                       for name in ("start", "one", "two"))
    assert distance(one, two) < 0.1 * distance(one, start)


def test_a_process_that_runs_out_of_memory_says_so_and_ends_the_run(one_epoch, tmp_path):
    options = [*one_epoch, "--out", tmp_path, "--model", "vit_base"]
    done = two_on_one_gpu(tmp_path, *options, short_of_memory="1", check=False, timeout=100)
    assert done.returncode
    assert done.stderr.count("error: out of memory: in training, --accum-steps 2") == 1
