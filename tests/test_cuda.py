"""The same numbers on a GPU as on a CPU, in every precision; skipped where there is no GPU."""
import copy
import os

import pytest
import torch
import torch.distributed as dist
from conftest import here, same_weights, seed_weights

import finetune
import pretrain_d2mae as P
import segment
import track
from models import MODELS, normalize, parallel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
QUICK = ["--data", "toy", "--image-size", 32, "--patch-size", 8, "--model", "vit_nano",
         "--workers", 0, "--method", "mae", "--epochs", 1, "--batch-size", 16]


def vit(name="vit_nano", size=64, **options):
    return MODELS[name](img_size=size, patch_size=8, **options)


def pretraining(decoder_tap=8, decoupled=True, distill=None):
    teacher = seed_weights(vit(fixed_pos_embed=True), "teacher").requires_grad_(False)
    encoder = vit(fixed_pos_embed=True)
    if distill:
        model = P.AblatedAutoencoder(encoder, teacher, (10, 12), distill, decoder_tap=8)
    else:
        model = P.MaskedAutoencoder(encoder, decoder_tap, teacher=teacher, decoupled=decoupled)
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
    model = seed_weights(MODELS[name](img_size=64, num_classes=5, **options))
    inputs = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])

    def loss(model, images, labels):
        return torch.nn.functional.cross_entropy(model(images).float(), labels)
    return model, inputs, loss


def segmentation():
    model = segment.SemanticFPN(seed_weights(vit()), 5, dropout=0.0)
    inputs = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))

    def loss(model, images, labels):
        return segment.segmentation_loss(model(images), labels)
    return model, inputs, loss


def tracking():
    options = track.parse_args(["--template-size", "32", "--search-size", "64"])
    model = track.Tracker(seed_weights(vit(size=32)),
                          **{name: getattr(options, name) for name in track.TRACKER})
    inputs = (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 64),
              torch.tensor([[0.3, 0.3, 0.2, 0.4], [0.5, 0.1, 0.3, 0.3]]))

    def loss(model, template, search, boxes):
        keep_rate = 1 if torch.is_autocast_enabled("cuda") else 0.7    # rounding changes a choice
        maps = model(model.embed_template(template), search, keep_rate)
        return track.tracking_losses(*maps, boxes)["loss"]
    return model, inputs, loss


CASES = {
    "d2-mae": pretraining,
    "d-mae": lambda: pretraining(12, decoupled=False),
    "hidden states": lambda: pretraining(distill="hidden"),
    "hiera mae": hiera_pretraining,
    "vit": classification,
    "vit with rpe": lambda: classification(rel_pos_bias=True),
    "hiera": lambda: classification("hiera_tiny"),
    "segmentation": segmentation,
    "tracking": tracking,
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
        gradients.append({name: p.grad.cpu() for name, p in copied.named_parameters()
                          if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE[dtype])
    largest = max(grad.norm() for grad in gradients[0].values())
    for name, grad in gradients[0].items():    # each tensor, so that a small one counts
        error = (gradients[1][name] - grad).norm() / (grad.norm() + 0.01 * largest)
        assert error < 5 * TOLERANCE[dtype], name


@pytest.mark.parametrize("case", ["d2-mae", "hiera mae"])
def test_a_compiled_step_is_the_eager_one(case):
    """Loss, gradients and an update."""
    torch.manual_seed(0)
    model, inputs, loss_of = CASES[case]()
    inputs = [x.to("cuda") for x in inputs]
    weights = []
    losses = []
    for compiled in (False, True):
        copied = copy.deepcopy(model).to("cuda")
        optimizer = torch.optim.SGD(copied.parameters(), 0.01)
        if compiled:
            copied.compile()
        loss = loss_of(copied, *inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weights.append(torch.cat([p.detach().flatten() for p in copied.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).to("cuda")
    assert (weights[1] - weights[0]).norm() < 1e-2 * (weights[0] - before).norm()


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


def test_a_group_of_one_process_talks_over_nccl(monkeypatch):
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29531"), ("RANK", "0"),
                        ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("nccl")
    try:
        model, inputs, loss_of = pretraining()
        device = torch.device("cuda")
        args = P.parse_args(["--method", "mae"])
        network = parallel(model.to(device), args, device, world=2)    # wraps it for DDP
        assert isinstance(network, torch.nn.parallel.DistributedDataParallel)
        ids_keep, ids_masked = P.random_masking(inputs[1].to(device), 0.75)
        target = torch.zeros(4, 3, 17, 17, device=device)
        network(inputs[0].to(device), ids_keep, ids_masked, target)["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        answer = [{"step": 3}]
        dist.broadcast_object_list(answer, src=0)
        assert answer == [{"step": 3}]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("module", [finetune, segment, track])
def test_every_script_takes_the_gpu(module, tmp_path):
    args = module.parse_args(["--demo", "--out", str(tmp_path)])
    assert module.init_distributed(args)[2].type == "cuda"
