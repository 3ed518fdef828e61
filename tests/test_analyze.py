import argparse
import csv
import importlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import here, rel_error, run, seeded
from PIL import Image
from PIL.ImageColor import getrgb

import analyze
import demo
import miniature
from models import IMAGENET_MEAN, InputError, build_model, normalize, reroll


def table(path):
    return list(csv.DictReader(open(path, newline="")))


def small_encoder(name, path, seed, **options):
    torch.manual_seed(seed)
    model = build_model(name, **options)
    about = dict(arch=model.arch, mean=[0.5] * 3, std=[0.3] * 3)
    torch.save(dict(model=model.state_dict(), **about), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small encoders, and a folder of two classes of images in several formats."""
    folder = tmp_path_factory.mktemp("analyze")
    small_encoder("vit_pico", folder / "a.pt", 1, img_size=48, patch_size=8)
    small_encoder("vit_pico", folder / "b.pt", 2, img_size=48, patch_size=8)
    small_encoder("vit_tiny", folder / "rpe.pt", 3, img_size=48, rel_pos_bias=True)
    small_encoder("hiera_tiny", folder / "hiera.pt", 4, img_size=64)
    rng = np.random.default_rng(0)
    for kind in range(2):    # the second class is bright on the right
        (folder / f"images/class{kind}").mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 100, (60, 70, 3)).astype(np.uint8)
            pixels[:, 35:] += np.uint8(120 * kind)
            image = Image.fromarray(pixels).convert(("RGB", "L", "P", "RGBA")[i % 4])
            image.save(folder / f"images/class{kind}/{i}.png")
    return folder


# ------------------------------------------------------------------------------------- similarity
def test_a_layer_is_like_itself():
    x = torch.randn(16, 10)
    assert float(analyze.minibatch_cka([[[x], [x]]])[0]) == pytest.approx(1)


def test_cka_matches_golden(golden):
    a = [seeded((48, 5, 7), f"featA{i}") for i in range(3)]
    b = [seeded((48, 5, 9), f"featB{i}") + a[i].mean(2, keepdim=True) for i in range(2)]
    batches = [[[x[s:s + 16] for x in a], [x[s:s + 16] for x in b]] for s in (0, 16, 32)]
    assert rel_error(analyze.minibatch_cka(batches)[0], golden["analyze/cka"]) < 1e-5


def slow_hsic(x, y):
    """Eq. 3 of arXiv 2010.15327, term by term."""
    n = len(x)
    k, l = ([[0.0 if i == j else float(z[i] @ z[j]) for j in range(n)] for i in range(n)]
            for z in (x, y))
    kl = [[sum(k[i][m] * l[m][j] for m in range(n)) for j in range(n)] for i in range(n)]
    sum_k, sum_l, sum_kl = (sum(map(sum, a)) for a in (k, l, kl))
    trace = sum(kl[i][i] for i in range(n))
    total = trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * sum_kl
    return total / (n * (n - 3))


def test_cka_matches_direct_hsic_averaged_before_the_ratio():
    torch.manual_seed(0)
    batches = []
    for _ in range(2):
        x = [torch.randn(7, 2, 3) + 5, torch.randn(7, 4, 2)]
        batches.append([x, [x[0] @ torch.randn(3, 4), torch.randn(7, 3, 3) * 7]])
    flat = [[[z.flatten(1).double() for z in layers] for layers in models] for models in batches]
    matrix = analyze.minibatch_cka(batches)[0]
    for i in range(2):
        for j in range(2):
            xy = sum(slow_hsic(m[0][i], m[1][j]) for m in flat)
            xx = sum(slow_hsic(m[0][i], m[0][i]) for m in flat)
            yy = sum(slow_hsic(m[1][j], m[1][j]) for m in flat)
            assert float(matrix[i, j]) == pytest.approx(xy / math.sqrt(xx * yy), rel=1e-9)


@pytest.mark.parametrize("sizes", ([(8, 8), (6, 6)], [(8, 6)], [(3, 3)]))
def test_cka_needs_batches_of_one_size(sizes):
    with pytest.raises(ValueError, match="batches of one size, at least 4"):
        analyze.minibatch_cka([[[torch.randn(n, 5)] for n in pair] for pair in sizes])


def test_cka_invariances_and_no_nan():
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(40, 40)).Q
    batches = []
    for _ in range(300):
        x = torch.randn(16, 40)
        others = [x, 100 + 3 * x @ rotation, torch.randn(16, 40), torch.zeros(16, 5)]
        batches.append([[x, torch.ones(16, 40)], others])
    matrix = analyze.minibatch_cka(batches)[0]
    assert matrix.isfinite().all()
    assert matrix[0, 0] == pytest.approx(1, abs=1e-9)
    assert matrix[0, 1] == pytest.approx(1, abs=1e-6)
    assert abs(matrix[0, 2]) < 0.02                       # the biased estimate is 0.7 here
    assert (matrix[1].abs() < 1e-6).all() and matrix[0, 3] == 0    # layers that never vary


def test_cka_command(files, tmp_path):
    here(analyze, "cka", files / "a.pt", f"A={files}/a.pt", f"B={files}/b.pt",
         f"hiera={files}/hiera.pt", "random", "--data", files / "images", "--image-size", 64,
         "--batch-size", 8, "--device", "cpu", "--out", tmp_path)
    rows = table(tmp_path / "cka.csv")
    assert len(rows) == 4 * 13 * 13 and not any(r["cka"] == "nan" for r in rows)
    same = [float(r["cka"]) for r in rows
            if r["model"] == "A" and r["layer_of_reference"] == r["layer_of_model"]]
    assert same == pytest.approx([1] * 13, abs=1e-6)
    random, other = ([r["cka"] for r in rows if r["model"] == m] for m in ("random", "A"))
    assert random != other
    assert Image.open(tmp_path / "cka.png").size == (540, 1250)    # 4 x 280 and 6 lines of text


# -------------------------------------------------------------------------------------- attention
def test_attention_statistics_match_golden(golden):
    vit = build_model("vit_tiny", img_size=64)                 # a grid of 4x4
    patches = analyze.token_distances(vit)[1] / 16
    logits = 2 * seeded((2, 3, 17, 17), "attn_logits")
    distance, entropy = analyze.attention_statistics(logits[:, :, 1:, 1:], patches)
    assert rel_error(distance.mean(0), golden["analyze/attention_distance_patches"]) < 1e-5
    assert rel_error(entropy.mean(0), golden["analyze/attention_entropy_nats"]) < 1e-4


def test_uniform_attention_has_the_closed_forms():
    vit = build_model("vit_tiny", img_size=32)            # 2x2 patches of 16 pixels
    distance = analyze.token_distances(vit)[1]
    uniform = analyze.attention_statistics(torch.full((1, 2, 4, 4), 3.0), distance)
    assert uniform[0][0].tolist() == pytest.approx([16 * (2 + math.sqrt(2)) / 4] * 2)
    assert uniform[1][0].tolist() == pytest.approx([math.log(4)] * 2)


def test_attention_to_oneself_has_neither_distance_nor_entropy():
    distance = analyze.token_distances(build_model("vit_tiny", img_size=32))[1]
    identity = analyze.attention_statistics(100 * torch.eye(4)[None, None], distance)
    assert identity[0].item() == pytest.approx(0, abs=1e-6)
    assert identity[1].item() == pytest.approx(0, abs=1e-6)


def test_masked_keys_add_neither_distance_nor_entropy():
    distance = analyze.token_distances(build_model("vit_tiny", img_size=32))[1]
    logits = torch.randn(1, 2, 4, 4)
    logits[..., 3] = -math.inf
    masked = analyze.attention_statistics(logits, distance)
    assert torch.allclose(masked, analyze.attention_statistics(logits[..., :3], distance[:, :3]))


@pytest.mark.parametrize("q_pool", (2, 3))
def test_hiera_distances_are_those_of_the_rerolled_tokens(q_pool):
    model = build_model("hiera_tiny", img_size=(64, 96), q_pool=q_pool)
    distances = analyze.token_distances(model)
    before = 0                                            # rounds of pooling before the block
    for number, block in enumerate(model.blocks, start=1):
        after = before + block.attn.q_pool
        assert (number in distances) == (block.attn.tokens_per_unit == 0)
        if number in distances:
            queries, keys = (token_centres(model, pooled) for pooled in (after, before))
            direct = torch.tensor([[math.dist(q, k) for k in keys] for q in queries])
            logits = block.attn.logits(torch.zeros(1, len(keys), block.norm1.weight.numel()))
            assert distances[number].shape == direct.shape == logits.shape[-2:]
            assert rel_error(distances[number], direct) < 1e-6
        before = after


def token_centres(model, pooled):
    """Where each unrolled token lies in pixels, found by rerolling its number."""
    side = 4 * 2 ** pooled
    count = model.grid[0] * model.grid[1] // 4 ** pooled
    raster = reroll(torch.arange(count).view(1, -1, 1), model.unit_grid)[0, 0]
    places = {int(raster[y, x]): ((y + 0.5) * side, (x + 0.5) * side)
              for y in range(raster.shape[0]) for x in range(raster.shape[1])}
    return [places[i] for i in range(count)]


def test_attention_command(files, tmp_path):
    for batch in (3, 8):    # the result does not depend on it
        here(analyze, "attention", f"A={files}/a.pt", f"rpe={files}/rpe.pt",
             f"hiera={files}/hiera.pt", "--data", files / "images", "--images", 8, "--image-size",
             64, "--batch-size", batch, "--device", "cpu", "--out", tmp_path / str(batch))
    rows = [table(tmp_path / f"{batch}/attention.csv") for batch in (3, 8)]
    heads = [r["model"] for r in rows[0]]
    assert heads.count("rpe") == 144
    assert {r["block"] for r in rows[0] if r["model"] == "hiera"} == {str(k) for k in range(5, 13)}
    for one, other in zip(*rows):
        for key in ("distance_px", "entropy_nats"):
            assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-4)
        assert float(one["distance_px"]) < 64 * math.sqrt(2)
        assert 0 < float(one["entropy_nats"]) <= math.log(64)
    assert Image.open(tmp_path / "3/attention.png").size == (540, 650)


# ----------------------------------------------------------------------------------------- models
def loaded(*argv):
    args = analyze.parse_args([str(a) for a in ("cka", *argv, "--device", "cpu")])
    return analyze.load_models(args)


def test_size_patch_and_pixels_come_from_the_file(files):
    models = loaded("random", f"A={files}/a.pt", "vit_tiny+rpe")
    assert [m.img_size for m in models.values()] == [(48, 48)] * 3
    assert models["A"].mean == (0.5, 0.5, 0.5) and models["random"].patch_size == 8
    assert (models["random"].mean, models["random"].std) == (models["A"].mean, models["A"].std)
    assert models["vit_tiny+rpe"].mean == IMAGENET_MEAN    # untrained
    assert models["vit_tiny+rpe"].arch["rel_pos_bias"]
    assert loaded("random")["random"].arch["embed_dim"] == 192
    both = next(analyze.batches(models, [files / f"images/class1/{i}.png" for i in range(2)], 2))
    assert [label for label, _, _ in both] == ["random", "A", "vit_tiny+rpe"]
    raw = (both[1][2] * 0.3 + 0.5) * 255                  # of A: mean 0.5, std 0.3
    again = normalize(raw.round().byte(), [0.5] * 3, [0.3] * 3)
    assert torch.allclose(again, both[1][2], atol=1e-4)


def test_all_models_get_the_size_of_the_first(files):
    for first in ("vit_pico", "hiera_tiny"):              # untrained: 224
        models = loaded("random", first, f"A={files}/a.pt")
        assert {m.img_size for m in models.values()} == {(224, 224)}
    assert {m.img_size for m in loaded(files / "a.pt", "vit_pico").values()} == {(48, 48)}


def test_hiera_is_analysed_as_it_was_trained(files, tmp_path):
    pre_trained = loaded(files / "hiera.pt").popitem()[1]
    assert sum(block.attn.q_pool for block in pre_trained.blocks) == 2
    small_encoder("hiera_tiny", tmp_path / "classifier.pt", 0, img_size=64, num_classes=5)
    classifier = loaded(tmp_path / "classifier.pt").popitem()[1]
    assert sum(block.attn.q_pool for block in classifier.blocks) == 3


def test_heads_of_a_public_file_are_named(files, tmp_path):
    model = build_model("vit_tiny", img_size=32)
    public = {f"module.base_encoder.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": public, "arch": "vit_tiny"}, tmp_path / "moco.pth")
    models = loaded(f"DeiT=deit_tiny:{tmp_path}/moco.pth", f"ours={tmp_path}/moco.pth",
                    "--image-size", 32)
    assert [m.arch["num_heads"] for m in models.values()] == [3, 12]
    assert torch.equal(models["DeiT"].blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)


def test_representations_are_normalised_by_the_next_block(files):
    models = loaded(f"A={files}/a.pt")
    model = models["A"]
    x = torch.randn(2, 3, 48, 48)
    tokens = analyze.representations(model, x)
    assert [t.shape for t in tokens] == [(2, 36, 48)] * 13
    assert torch.allclose(tokens[-1], model(x)[:, 1:], atol=1e-6)    # the final norm for the last
    direct = model.blocks[4].norm1(model.forward_features(x, (4,))[4])[:, 1:]
    assert torch.allclose(tokens[4], direct)


def test_paths_may_hold_colons_and_equals_signs(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("C:a.pt", "x=y.pt"):
        shutil.copy(files / "a.pt", name)
    models = loaded("C:a.pt", "vit_pico:C:a.pt", "x=y.pt", "L=C:a.pt")
    assert list(models) == ["C:a.pt", "vit_pico:C:a.pt", "x=y.pt", "L"]
    assert analyze.open_source("deit_tiny") == ("deit_tiny", False, None)
    with pytest.raises(InputError, match=r"C:\\mae.pt does not exist"):
        loaded(r"C:\mae.pt")


def test_statistics_of_pixels_are_those_of_the_file_else_of_the_options(files, tmp_path):
    model = build_model("vit_pico", img_size=48, patch_size=8)
    torch.save(model.state_dict(), tmp_path / "bare.pth")    # as trained by others, on 0.5 and 0.5
    half = ["--mean", 0.5, 0.5, 0.5, "--std", 0.4, 0.4, 0.4]
    models = loaded(f"A={files}/a.pt", f"bare={tmp_path}/bare.pth", *half)
    assert models["A"].std == (0.3, 0.3, 0.3) and models["bare"].std == (0.4, 0.4, 0.4)
    assert loaded("random", f"bare={tmp_path}/bare.pth", *half)["random"].std == (0.4, 0.4, 0.4)
    assert loaded(f"bare={tmp_path}/bare.pth")["bare"].mean == IMAGENET_MEAN


def test_a_file_of_beits_layout_is_analysed_whole(tmp_path):
    """gamma_1, gamma_2, q_bias and v_bias, as in the BEiT-, MaskFeat- and BootMAE-Tiny files."""
    torch.manual_seed(0)
    model = build_model("vit_tiny", img_size=32, rel_pos_bias=True)
    for p in model.parameters():
        p.data.normal_(std=0.1)
    x = torch.randn(2, 3, 32, 32)
    state = dict(model.state_dict(), mask_token=torch.ones(1, 1, 192))
    for k, block in enumerate(model.blocks):
        q, key, v = state.pop(f"blocks.{k}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{k}.attn.q_bias": q, f"blocks.{k}.attn.v_bias": v}
        key.zero_()    # of the model, too: k has no bias in BEiT
        for gamma, layer in (("gamma_1", "attn.proj"), ("gamma_2", "mlp.fc2")):
            scale = state[f"blocks.{k}.{gamma}"] = torch.rand(192) + 0.5
            for name in ("weight", "bias"):    # the file holds the layer before its scale
                value = state[f"blocks.{k}.{layer}.{name}"]
                state[f"blocks.{k}.{layer}.{name}"] = value / scale.view(-1, *[1] * (value.dim() - 1))
    torch.save({"model": state}, tmp_path / "beit.pth")
    copy = loaded(f"BEiT=vit_tiny:{tmp_path}/beit.pth")["BEiT"]
    model.requires_grad_(False)
    expected, found = (analyze.representations(m, x) for m in (model, copy))
    assert max(rel_error(a, b) for a, b in zip(found, expected)) < 1e-5
    tokens = model.forward_features(x, [4])[4]
    assert rel_error(copy.attention_map(tokens, 5), model.attention_map(tokens, 5)) < 1e-5


def test_a_foreign_grid_that_is_no_square_is_read_as_it_is(tmp_path):
    model = build_model("vit_tiny", img_size=(64, 256))    # 4 x 16 patches, as many as 8 x 8
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    copy = loaded(tmp_path / "wide.pth", "--image-size", 64, 256).popitem()[1]
    assert torch.equal(copy.pos_embed, model.pos_embed)


def test_what_a_run_wrote_is_no_data(files, tmp_path):
    shutil.copytree(files / "images", tmp_path / "data")
    draw = [tmp_path / "data", 100, 0, tmp_path / "data/out"]
    before = analyze.draw_files(*draw)
    (tmp_path / "data/out").mkdir()
    shutil.copy(before[0], tmp_path / "data/out/cka.png")
    assert analyze.draw_files(*draw) == before and len(before) == 20


class Frozen(argparse.Namespace):
    def __setattr__(self, name, value):
        raise AttributeError(f"args.{name} is written after parsing")


SMALL = ["--image-size", "32", "--device", "cpu"]


@pytest.mark.parametrize("argv", (
    ["cka", "vit_pico", "random", "--images", "4", *SMALL],
    ["attention", "random", "--images", "4", *SMALL], ["cost", "vit_pico", *SMALL],
    ["curves", "run"], ["fig4", "run"]))
def test_nothing_writes_to_the_options(argv, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure_at_once(monkeypatch)
    fine_tuning_run(tmp_path / "run", 6, 0, 50.0)
    shutil.copytree(files / "images", "data/imagenet/val")
    args = Frozen()
    args.__dict__.update(vars(analyze.parse_args(argv)))
    analyze.main(args)
    assert Path(f"out/analyze/{argv[0]}.csv").exists()


def test_default_labels_are_short():
    assert list(analyze.named(["a/b/c/encoder.pt", "vit_tiny", "L=a/b"])) == [
        "c/encoder.pt", "vit_tiny", "L"]


def test_a_sideways_photo_is_turned_upright(files, tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                                      # to be shown turned clockwise
    Image.fromarray(pixels).save(tmp_path / "phone.jpg", exif=exif)
    models = loaded(files / "a.pt", "--image-size", 48, 32)
    _, model, images = next(analyze.batches(models, [tmp_path / "phone.jpg"], 1))[0]
    assert images.shape == (1, 3, 48, 32) and model.img_size == (48, 32)
    assert images[0, :, :20].mean() > 1.5 and images[0, :, 28:].mean() < -1.5


# ------------------------------------------------------------------------------------------- cost
def test_cost_command(files, tmp_path, capsys):
    (tmp_path / "points.csv").write_text(
        "label,model,top1,source\none,vit_tiny,75.8,paper\ntwo,vit_tiny,78.7,paper\n")
    here(analyze, "cost", f"A={files}/a.pt", "vit_tiny", "--image-size", 224, "--seconds", 0.01,
         "--device", "cpu", "--points", tmp_path / "points.csv", "--out", tmp_path)
    rows = {(r["quantity"], r["label"]): r for r in table(tmp_path / "cost.csv")}
    assert float(rows["parameters (M)", "vit_tiny"]["value"]) == 5.717416
    blocks = 12 * (12 * 197 * 192 ** 2 + 2 * 197 ** 2 * 192)
    operations = blocks + 196 * 768 * 192 + 192 * 1000
    assert float(rows["multiply-adds (G)", "vit_tiny"]["value"]) == operations / 1e9
    one = rows["top-1 (%)", "one"]
    assert one["value"] == "75.8"
    assert one["latency (ms)"] == rows["parameters (M)", "vit_tiny"]["latency (ms)"]
    assert "cpu, 1 CPU thread(s), float32" in capsys.readouterr().out
    assert Image.open(tmp_path / "cost.png").size == (540, 950)


def measure_at_once(monkeypatch):
    monkeypatch.setattr(analyze.Timer, "autorange", lambda *_: (1, 1.0))
    monkeypatch.setattr(analyze.Timer, "repeat", lambda *_, **__: [1.0])


@pytest.mark.parametrize("row, message", (
    ("one,vit_tiny,,", "could not convert string to float: ''"),
    ("one,vit_tiny,good,", "could not convert string to float: 'good'"),
    ("one,hiera_tiny,70,", "points.csv needs label, model .* in each row: 'hiera_tiny'")))
def test_bad_points_end_in_one_sentence(row, message, tmp_path, monkeypatch):
    measure_at_once(monkeypatch)
    (tmp_path / "points.csv").write_text(f"label,model,top1,source\n{row}\n")
    with pytest.raises(InputError, match=message):
        here(analyze, "cost", "vit_tiny", "--points", tmp_path / "points.csv", "--out", tmp_path)


# ----------------------------------------------------------------------------------------- curves
def write_log(folder, top, **options):
    """Log of a run in which the loss falls to top / 8, and the last mIoU is 30 top."""
    folder.mkdir(parents=True)
    lines = [{"epoch": 0, "args": options, "commit": "abc"},
             {"epoch": 0, "step": 0, "val_rec": 2 * top}]
    lines += [{"epoch": 1, "step": s, "loss": top / (s + 1), "lr": 0.1 * s, "grad_norm": None}
              for s in range(8)]
    lines += [{"epoch": 1, "step": 8, "val_rec": top, "val_images": 9, "miou": 30 * top}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + '{"step": 9, "lo')    # cut short by a kill


def test_curves_of_folders_and_files(tmp_path, capsys):
    write_log(tmp_path / "a", 1.0)
    write_log(tmp_path / "b", 2.0)
    here(analyze, "curves", f"A={tmp_path}/a", tmp_path / "b/log.jsonl", "--out", tmp_path)
    rows = table(tmp_path / "curves.csv")
    assert {r["quantity"] for r in rows} == {"val_rec", "loss", "lr", "miou"}
    assert {r["label"] for r in rows} == {"A", "b/log.jsonl"}
    assert len(rows) == 2 * (2 + 8 + 8 + 1)
    losses = [r for r in rows if r["quantity"] == "val_rec" and r["label"] == "A"]
    assert [(r["step"], r["value"]) for r in losses] == [("0", "2.0"), ("8", "1.0")]    # the start
    text = capsys.readouterr().out
    assert "loss, A: 1 at the start, 0.125 at the end, lowest 0.125, highest 1" in text
    assert Image.open(tmp_path / "curves.png").size == (540, 1190)


def fine_tuning_run(folder, keep, seed, top1, init="encoder.pt", finished=True, old=False,
                    **options):
    """Log of a fine-tuning run; old: as scripts wrote it that kept what they found in the options.
    """
    options = dict(init=init, keep_blocks=keep, seed=seed, epochs=2, data_fraction=1.0, **options)
    found = dict(arch=dict(depth=12), train_images=50)
    first = {"epoch": 0, "args": {**options, **found}} if old else {
        "epoch": 0, "args": options, **found, "commit": "abc"}
    lines = [first, {"epoch": 1, "step": 9, "top1": 1.0}]
    if finished:
        lines.append({"epoch": 2, "step": 18, "top1": top1})
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("old", (True, False))
def test_figure_4_is_drawn_from_the_logs_of_runs(tmp_path, capsys, old):
    for name, gain in (("mae", 1), ("d2", 2)):
        for keep in (0, 6, None):    # None: all 12
            for seed in (0, 1):
                folder = tmp_path / name / f"{keep}-{seed}"
                blocks = 12 if keep is None else keep
                fine_tuning_run(folder, keep, seed, 50 + gain * blocks + seed, old=old,
                                out=str(folder), workers=seed)
    fine_tuning_run(tmp_path / "mae/half", 6, 2, 0.0, finished=False, old=old)
    write_log(tmp_path / "mae/segmentation", 1.0)
    here(analyze, "fig4", f"MAE={tmp_path}/mae", f"D2-MAE={tmp_path}/d2", "--out", tmp_path)
    text = capsys.readouterr().out
    assert text.count("skipped, this is not the log of a finished fine-tuning run") == 2
    assert "MAE, 6 blocks kept: 56.50 +- 0.50 of 2 runs" in text
    rows = table(tmp_path / "fig4.csv")
    assert len(rows) == 6 and {r["label"] for r in rows} == {"MAE", "D2-MAE"}
    last = next(r for r in rows if r["label"] == "D2-MAE" and r["pre-trained blocks kept"] == "12")
    assert float(last["value"]) == 74.5
    assert float(last["standard_error"]) == pytest.approx(0.5)
    assert [int(r["pre-trained blocks kept"]) for r in rows[:3]] == [0, 6, 12]


def test_only_runs_that_differ_in_their_seed_make_a_point(tmp_path, capsys):
    fine_tuning_run(tmp_path / "runs/a", 0, 0, 60.0)
    fine_tuning_run(tmp_path / "runs/b", 0, 1, 62.0, base_lr=None)    # an option that "a" lacks
    fine_tuning_run(tmp_path / "runs/scratch", None, 0, 50.0, init=None)    # also 0 blocks
    fine_tuning_run(tmp_path / "runs/recipe", 0, 0, 70.0, base_lr=0.1)
    fine_tuning_run(tmp_path / "runs/model", 0, 0, 80.0, model="vit_nano")
    here(analyze, "fig4", f"all={tmp_path}/runs", "--out", tmp_path)
    text = capsys.readouterr().out
    for line in ("all, init encoder.pt, 0 blocks kept: 61.00 +- 1.00 of 2 runs",
                 "all, 0 blocks kept: 50.00 of 1 run",        # no init
                 "all, base_lr 0.1, init encoder.pt, 0 blocks kept: 70.00 of 1 run",
                 "all, init encoder.pt, model vit_nano, 0 blocks kept: 80.00 of 1 run"):
        assert line in text
    assert len({r["label"] for r in table(tmp_path / "fig4.csv")}) == 4


def test_an_error_is_stated_only_where_it_was_measured(tmp_path, capsys, monkeypatch):
    for keep, seed, top1 in ((0, 0, 60.0), (6, 0, 70.0), (6, 1, 70.0), (12, 0, 70.0),
                             (12, 1, 74.0)):
        fine_tuning_run(tmp_path / f"runs/{keep}-{seed}", keep, seed, top1)
    panels = []
    draw = analyze.draw_panel
    monkeypatch.setattr(analyze, "draw_panel", lambda *panel: panels.append(panel) or draw(*panel))
    here(analyze, "fig4", f"A={tmp_path}/runs", "--out", tmp_path)
    text = capsys.readouterr().out
    assert "A, 0 blocks kept: 60.00 of 1 run\n" in text
    assert "A, 6 blocks kept: 70.00 +- 0.00 of 2 runs\n" in text    # measured, and 0
    assert [r["standard_error"] for r in table(tmp_path / "fig4.csv")] == ["", "0.0", "2.0"]
    [(_, _, marks)] = panels
    assert [points for points, _, width in marks if width == 2] == [[(12, 70), (12, 74)]]    # bars


def test_long_settings_are_shortened_but_told_apart(tmp_path, capsys):
    names = [f"n{k:08d}" for k in range(1000)]
    for run_name, classes in (("a", names), ("b", [*names[:-1], "other"]), ("c", names)):
        fine_tuning_run(tmp_path / f"runs/{run_name}", 6, 0, 50.0, classes=classes)
    here(analyze, "fig4", f"all={tmp_path}/runs", "--out", tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "blocks kept" in line]
    assert len(lines) == 2 and max(map(len, lines)) < 110
    assert all(line.startswith("all, classes ['n00000000', 'n00000001', ") for line in lines)
    assert sorted(line.split(" of ")[-1] for line in lines) == ["1 run", "2 runs"]


def test_mean_and_standard_error():
    assert analyze.mean_and_error([2.0, 4.0]) == pytest.approx((3, 1))
    assert analyze.mean_and_error([5.0]) == (5, None)


# --------------------------------------------------------------------------------------- pictures
BLUE, RED = "#0072b2", "#d55e00"


class Drawn:
    """A panel of marks, and how near the colour at a place in data coordinates is to another."""

    def __init__(self, marks):
        xs, ys = np.concatenate([points for points, _, _ in marks]).T
        self.places = analyze.axis(xs, 110, 1048)[1], analyze.axis(ys, 468, 60)[1]
        self.image = analyze.draw_panel("x", "y", marks)

    def near(self, x, y, color, tolerance=60):
        pixel = self.image.getpixel([int(place(v)) for place, v in zip(self.places, (x, y))])
        return max(abs(a - b) for a, b in zip(pixel, getrgb(color))) <= tolerance


def panels_of(monkeypatch, function, *arguments):
    """Marks of the panels that a command or function draws -> {(x label, y label): marks}."""
    found = {}
    monkeypatch.setattr(analyze, "write", lambda *values: found.update(values[4]))
    function(*arguments)
    return found


def test_a_line_runs_through_its_points(monkeypatch, tmp_path):
    lines = {("y", "a"): [(0, 0, None), (10, 1, 0.1)]}
    [marks] = panels_of(monkeypatch, analyze.draw_lines, tmp_path, "n", lines, "x", "").values()
    line = Drawn(marks)
    assert line.near(5, 0.5, BLUE) and not line.near(5, 0.7, BLUE)
    assert line.near(10, 1.08, BLUE)                      # the error bar
    assert line.near(0, 0.01, BLUE)                       # the dot


def test_a_box_shows_median_and_extremes(files, monkeypatch, tmp_path):
    boxes = {1: torch.tensor([1.0, 8, 9, 10, 15, 16, 28]),
             2: torch.full((7,), 0.1 + 0.2)}              # all heads alike
    maps = {k: torch.ones(4, 4) for k in boxes}
    monkeypatch.setattr(analyze, "token_distances", lambda model: maps)
    blocks = iter(boxes.values())
    monkeypatch.setattr(analyze, "attention_statistics",
                        lambda logits, distance: next(blocks).expand(2, 1, 7))
    found = panels_of(monkeypatch, here, analyze, "attention", "vit_pico", "--images", 1, "--data",
                      files / "images", *SMALL, "--out", tmp_path)
    assert list(found) == [("block", "attention distance (pixels)"),
                           ("block", "attention entropy (nats)")]
    for marks in found.values():
        box = Drawn(marks)
        assert box.near(1, 10, "white") and box.near(1.005, 14, BLUE)    # median, quartiles
        assert box.near(1, 25, BLUE) and not box.near(1.02, 25, BLUE)    # extremes
        assert box.near(2 + 6 / 938, 0.3, BLUE)           # the ring around the median


def test_a_heatmap_has_row_0_at_the_bottom(files, tmp_path):
    here(analyze, "cka", files / "a.pt", f"B={files}/b.pt", "--data", files / "images", "--device",
         "cpu", "--out", tmp_path)
    values = {(int(r["layer_of_reference"]), int(r["layer_of_model"])): float(r["cka"])
              for r in table(tmp_path / "cka.csv")}
    picture = Image.open(tmp_path / "cka.png")
    assert picture.width == 540 and picture.height == 410    # nothing wraps, whatever the width
    place_x, place_y = (analyze.axis(range(13), *ends)[1] for ends in ((110, 1048), (468, 60)))
    for (i, j), value in values.items():
        x, y = place_x(j), place_y(i)
        pixel = picture.getpixel((int(x / 2), int(y / 2) + 130))
        assert max(abs(a - b) for a, b in zip(pixel, getrgb(analyze.shade(value)))) <= 2


@pytest.mark.parametrize("labels", (1, 2, 11))
def test_nothing_is_clipped_or_wrapped(tmp_path, labels):
    lines = {("quantity", f"{k} out/pretrain/of-this-week/encoder.pt"): [(0, 1e-4, 0), (1e6, k, 0)]
             for k in range(labels)}
    analyze.draw_lines(tmp_path, "name", lines, "step", "a note " * 8)
    picture = Image.open(tmp_path / "name.png")
    assert picture.size == (540, 20 * labels + 30 + 280)
    pixels = np.asarray(picture)
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


@pytest.mark.parametrize("values, ticks", [
    ((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (range(13), [0, 2, 4, 6, 8, 10, 12]),
    ((61.2, 64), [61, 61.5, 62, 62.5, 63, 63.5, 64]),
    ((0, 3e4), [0, 5e3, 1e4, 1.5e4, 2e4, 2.5e4, 3e4]),
    ((-1.1e-3, 1e-3), [-1e-3, -5e-4, 0, 5e-4, 1e-3]),    # the first value is near enough
    ((-1.2e-3, 1e-3), [-1.5e-3, -1e-3, -5e-4, 0, 5e-4, 1e-3]),
    ((0.5, 3.5e12), [0, 1e12, 2e12, 3e12, 4e12]),
    ((-0.5, 12.5), [0, 2, 4, 6, 8, 10, 12]),              # the edges of a heat map
    ((-0.5, 14.5), [0, 2, 4, 6, 8, 10, 12, 14]),
    ((1.1e-9,), [1e-9, 1.2e-9]),
    ((5.0,), [5]),
    ((0.0, 0.0), [0])])
def test_an_axis_encloses_its_values_by_round_numbers(values, ticks):
    found, place = analyze.axis(values, 0, 100)
    assert found.tolist() == pytest.approx(ticks)
    assert 0 <= place(min(values)) <= place(max(values)) <= 100
    assert 0 < place(min(ticks)) <= place(max(ticks)) < 100
    width = max(values) - min(values)                     # nothing is clipped
    assert place(max(values)) - place(min(values)) == pytest.approx(
        width * (place(ticks[-1]) - place(ticks[0])) / ((ticks[-1] - ticks[0]) or 1), rel=1e-6)


# ------------------------------------------------------------------- demo, arguments, bad input
def test_the_demo_runs_every_analysis(files, tmp_path, monkeypatch):
    """Its commands, from another folder, on small stand-ins for its data and encoders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(miniature, "DRAWS", 1)
    monkeypatch.setattr(demo, "run", lambda script, *options: here(
        importlib.import_module(Path(script).stem), *options))
    monkeypatch.setattr(demo, "data_folder", lambda *_: tmp_path)
    measure_at_once(monkeypatch)
    for kind in range(2):
        for i in range(12):
            (tmp_path / f"val/{kind}").mkdir(parents=True, exist_ok=True)
            shutil.copy(files / f"images/class{kind}/{i % 10}.png", f"val/{kind}/{i}.png")
    for folder, name in (("pretrain", "a"), ("pretrain/teacher", "b")):
        write_log(tmp_path / "demo" / folder, 1.0)
        shutil.copy(files / f"{name}.pt", f"demo/{folder}/encoder.pt")
    demo.analyze(tmp_path / "demo")
    names = sorted(path.name for path in (tmp_path / "demo/analyze").iterdir())
    assert names == [f"{command}.{kind}" for command in
                     ("attention", "cka", "cost", "curves", "probe") for kind in ("csv", "png")]


def test_bad_input(files, tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one/a.png")
    (tmp_path / "bad").mkdir()
    for i in range(5):
        (tmp_path / f"bad/{i}.png").write_bytes(b"no picture")
    (tmp_path / "wrong.jsonl").write_text("hello\n")
    (tmp_path / "empty.jsonl").write_text('{"epoch": 0, "args": {}}\n')
    device = ["--device", "cpu", "--out", tmp_path / "out"]
    images = ["--data", files / "images", *device]
    out = ["--out", tmp_path / "out"]
    a = files / "a.pt"
    for argv, message in (
            (["cka", a, *images], "two models or more"),
            (["cka", a, a, *images], "two inputs are labelled"),
            (["cka", a, "nothing.pt", *images], "nothing.pt does not exist"),
            (["cka", a, "hiera_tiny+rpe", *images], "defined for ViT"),
            (["cka", a, tmp_path, *images], "is a folder: give a file"),
            (["cka", f"deit_tiny:{a}", *images], "does not fit the model: embed_dim|patch_size"),
            (["cka", a, "random", "--data", tmp_path / "nowhere", *device], "not a folder"),
            (["cka", a, "random", "--data", tmp_path / "one", *device], "4 images or more"),
            (["cka", a, "random", "--batch-size", 3, *images], "4 images or more"),
            (["attention", a, "--image-size", 50, *images], "not a multiple of 8 pixels"),
            (["curves", tmp_path / "wrong.jsonl", *out], "is not the log.jsonl of a run"),
            (["curves", tmp_path / "empty.jsonl", *out], "nothing to draw"),
            (["fig4", tmp_path, *out], "nothing to draw")):
        with pytest.raises(InputError, match=message):
            here(analyze, *argv)
    with pytest.raises(OSError, match="a.pt is no UTF-8 text"):
        here(analyze, "curves", a, *out)
    with pytest.raises(OSError, match="cannot read image .*bad/"):
        here(analyze, "attention", a, "--data", tmp_path / "bad", *device)


@pytest.mark.parametrize("argv", (["cka", "a", "--seed", "-1"], ["cka"], [], ["plot", "a"],
                                  ["curves", "a", "--images", "2"],
                                  ["cost", "a", "--data", "b"]))
def test_bad_options_end_in_a_usage_message(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        analyze.parse_args(argv)
    assert "error: " in capsys.readouterr().err


def help_of(capsys, *argv):
    with pytest.raises(SystemExit, match="0"):
        analyze.parse_args([*argv, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: None" not in text
    return text


def test_each_command_has_its_own_help(capsys):
    text = help_of(capsys)
    for command in ("cka", "attention", "cost", "curves", "fig4"):
        assert f" {command} " in text
        own = help_of(capsys, command)
        assert f" {command} [LABEL=]SOURCE ... [options]" in own
        assert ": compares " in own
        assert ("--mean" in own) == (command in ("cka", "attention", "cost"))
        assert ("--data" in own) == (command in ("cka", "attention"))
    assert "compares every input with the first" in help_of(capsys, "cka")


def test_command_line_says_one_sentence(files, tmp_path):
    done = run("analyze.py", "attention", files / "a.pt", "--data", tmp_path / "no", "--out",
               tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("give a folder of images")
