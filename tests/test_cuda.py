"""The same numbers on a GPU as on a CPU, in every precision; skipped where there is no GPU."""
import copy
import os

import pytest
import torch
import torch.distributed as dist
from conftest import here, same_weights

import finetune
import pretrain_d2mae as P
import segment
import track
from models import MODELS, normalize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
QUICK = ["--data", "toy", "--image-size", 32, "--patch-size", 8, "--model", "vit_nano",
         "--workers", 0, "--method", "mae", "--epochs", 1, "--batch-size", 16]


def pretraining():
    teacher = MODELS["vit_nano"](img_size=64, patch_size=8, fixed_pos_embed=True).eval()
    teacher.requires_grad_(False)
    encoder = MODELS["vit_nano"](img_size=64, patch_size=8, fixed_pos_embed=True)
    model = P.MaskedAutoencoder(encoder, 8, teacher=teacher, decoupled=True)
    inputs = torch.randn(4, 3, 64, 64), torch.rand(4, 64)

    def loss(model, images, noise):
        ids_keep, ids_masked = P.random_masking(noise, 0.75)
        target = model.teacher_signal(teacher.to(images.device), images, ids_keep)
        return model(images, ids_keep, ids_masked, target)["loss"]
    return model, inputs, loss


def hiera_pretraining():
    model = P.HieraMaskedAutoencoder(MODELS["hiera_tiny"](img_size=64, q_pool=2), 12)
    inputs = torch.randn(4, 3, 64, 64), torch.rand(4, 4)

    def loss(model, images, noise):
        return model(images, *P.random_masking(noise, 0.4))["loss"]
    return model, inputs, loss


def classification(name="vit_tiny", **options):
    model = MODELS[name](img_size=64, num_classes=5, **options)
    inputs = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])

    def loss(model, images, labels):
        return torch.nn.functional.cross_entropy(model(images).float(), labels)
    return model, inputs, loss


CASES = {
    "d2-mae": pretraining,
    "hiera mae": hiera_pretraining,
    "vit": classification,
    "vit with rpe": lambda: classification(rel_pos_bias=True),
    "hiera": lambda: classification("hiera_tiny"),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_cpu(case, dtype):
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    model, inputs, loss_of = CASES[case]()
    gradients = []
    losses = []
    for device in ("cpu", "cuda"):
        copied = copy.deepcopy(model).to(device)
        reduced = device == "cuda" and dtype != torch.float32
        with torch.autocast(device, dtype, enabled=reduced):
            loss = loss_of(copied, *(x.to(device) for x in inputs))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in copied.parameters()
                                    if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE[dtype])
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 3 * TOLERANCE[dtype]


def test_a_compiled_step_gives_the_eager_loss():
    torch.manual_seed(0)
    model, inputs, loss_of = hiera_pretraining()
    model = model.to("cuda")
    inputs = [x.to("cuda") for x in inputs]
    eager = loss_of(model, *inputs).item()
    assert loss_of(torch.compile(model), *inputs).item() == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_run_resumes_in_its_precision(dtype, tmp_path):
    options = [*QUICK, "--dtype", dtype]
    here(P, *options, "--max-steps", 4, "--out", tmp_path / "straight")
    here(P, *options, "--max-steps", 2, "--out", tmp_path / "resumed")
    here(P, *options, "--max-steps", 4, "--out", tmp_path / "resumed")
    assert same_weights(tmp_path / "straight", tmp_path / "resumed", 1e-5)


def test_a_run_without_a_scaler_goes_on_with_one(tmp_path):
    here(P, *QUICK, "--dtype", "bf16", "--max-steps", 2, "--out", tmp_path)
    here(P, *QUICK, "--dtype", "fp16", "--max-steps", 4, "--out", tmp_path)


def test_micro_steps_never_wait_for_the_device():
    model, (images, noise), loss_of = pretraining()
    model = model.to("cuda")
    images = torch.randint(0, 256, images.shape, dtype=torch.uint8).pin_memory()
    noise = noise.pin_memory()

    def micro_step():
        on_device = normalize(images.to("cuda", non_blocking=True))
        loss_of(model, on_device, noise.to("cuda", non_blocking=True)).backward()

    micro_step()    # constants and kernels are loaded once
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_group_of_one_process_trains_over_nccl(tmp_path, monkeypatch):
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29531"), ("RANK", "0"),
                        ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("nccl")
    try:
        assert dist.get_backend() == "nccl"
        here(P, *QUICK, "--max-steps", 2, "--out", tmp_path)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("module", [finetune, segment, track])
def test_every_script_takes_the_gpu(module, tmp_path):
    args = module.parse_args(["--demo", "--out", str(tmp_path)])
    assert module.init_distributed(args)[2].type == "cuda"
