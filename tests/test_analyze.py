import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, here, rel_error, run, seeded
from PIL import Image
from PIL.ImageColor import getrgb

import analyze
from models import MODELS, InputError, reroll


def table(path):
    return list(csv.DictReader(open(path, newline="")))


def small_encoder(name, path, seed, **options):
    torch.manual_seed(seed)
    model = MODELS[name](**options)
    about = dict(arch=model.arch, mean=[0.5] * 3, std=[0.3] * 3)
    torch.save(dict(model=model.state_dict(), **about), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small encoders, and a folder of two classes of images in several formats."""
    folder = tmp_path_factory.mktemp("analyze")
    small_encoder("vit_nano", folder / "a.pt", 1, img_size=48, patch_size=8)
    small_encoder("vit_nano", folder / "b.pt", 2, img_size=48, patch_size=8)
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
    for n in (6, 8):    # unequal batches: HSICs have to be normalised by n (n - 3)
        x = [torch.randn(n, 2, 3) + 5, torch.randn(n, 4, 2)]
        batches.append([x, [x[0] @ torch.randn(3, 4), torch.randn(n, 3, 3) * 7]])
    flat = [[[z.flatten(1).double() for z in layers] for layers in models] for models in batches]
    matrix = analyze.minibatch_cka(batches)[0]
    for i in range(2):
        for j in range(2):
            xy = sum(slow_hsic(m[0][i], m[1][j]) for m in flat)
            xx = sum(slow_hsic(m[0][i], m[0][i]) for m in flat)
            yy = sum(slow_hsic(m[1][j], m[1][j]) for m in flat)
            assert float(matrix[i, j]) == pytest.approx(xy / math.sqrt(xx * yy), rel=1e-9)


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
    assert Image.open(tmp_path / "cka.png").width == 1080


# -------------------------------------------------------------------------------------- attention
def test_attention_statistics_match_golden(golden):
    vit = MODELS["vit_tiny"](img_size=64)                 # a grid of 4x4
    patches = analyze.token_distances(vit)[1] / 16
    logits = 2 * seeded((2, 3, 17, 17), "attn_logits")
    distance, entropy = analyze.attention_statistics(logits[:, :, 1:, 1:], patches)
    assert rel_error(distance.mean(0), golden["analyze/attention_distance_patches"]) < 1e-5
    assert rel_error(entropy.mean(0), golden["analyze/attention_entropy_nats"]) < 1e-4


def test_uniform_attention_has_the_closed_forms():
    distance = analyze.token_distances(MODELS["vit_tiny"](img_size=32))[1]    # 2x2 of 16 pixels
    uniform = analyze.attention_statistics(torch.full((1, 2, 4, 4), 3.0), distance)
    assert uniform[0][0].tolist() == pytest.approx([16 * (2 + math.sqrt(2)) / 4] * 2)
    assert uniform[1][0].tolist() == pytest.approx([math.log(4)] * 2)


def test_attention_to_oneself_has_neither_distance_nor_entropy():
    distance = analyze.token_distances(MODELS["vit_tiny"](img_size=32))[1]
    identity = analyze.attention_statistics(100 * torch.eye(4)[None, None], distance)
    assert identity[0].item() == pytest.approx(0, abs=1e-6)
    assert identity[1].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("q_pool", (2, 3))
def test_hiera_distances_are_those_of_the_rerolled_tokens(q_pool):
    model = MODELS["hiera_tiny"](img_size=(64, 96), q_pool=q_pool)
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
    raster = reroll(torch.arange(count).view(1, -1, 1), model.unit_grid, 3 - pooled)[0, :, :, 0]
    places = {int(raster[y, x]): ((y + 0.5) * side, (x + 0.5) * side)
              for y in range(raster.shape[0]) for x in range(raster.shape[1])}
    return [places[i] for i in range(count)]


def test_attention_command(files, tmp_path, capsys):
    for batch in (3, 8):    # the result does not depend on it
        here(analyze, "attention", f"A={files}/a.pt", f"rpe={files}/rpe.pt",
             f"hiera={files}/hiera.pt", "--data", files / "images", "--images", 8, "--image-size",
             64, "--batch-size", batch, "--device", "cpu", "--out", tmp_path / str(batch))
    assert "hiera: left out are blocks that attend within mask units" in capsys.readouterr().out
    rows = [table(tmp_path / f"{batch}/attention.csv") for batch in (3, 8)]
    heads = [r["model"] for r in rows[0]]
    assert heads.count("rpe") == 144
    assert {r["block"] for r in rows[0] if r["model"] == "hiera"} == {str(k) for k in range(5, 13)}
    for one, other in zip(*rows):
        for key in ("distance_px", "entropy_nats"):
            assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-4)
        assert float(one["distance_px"]) < 64 * math.sqrt(2)
        assert 0 < float(one["entropy_nats"]) <= math.log(64)
    assert Image.open(tmp_path / "3/attention.png").width == 1080


# ----------------------------------------------------------------------------------------- probes
def test_knn_matches_its_slow_form():
    torch.manual_seed(0)
    train, test, labels = torch.randn(12, 5), torch.randn(7, 5), torch.arange(12) % 3
    onehot = torch.nn.functional.one_hot(labels).float()
    votes = torch.zeros(7, 3)
    for i in range(7):
        cosine = torch.cosine_similarity(test[i:i + 1], train)
        for value, label in sorted(zip(cosine.tolist(), labels.tolist()), reverse=True)[:4]:
            votes[i, label] += math.exp(value / 0.07)
    assert rel_error(analyze.knn_scores(train, onehot, test, neighbours=4), votes) < 1e-5


def test_ridge_matches_its_primal_form():
    torch.manual_seed(0)
    train, test = torch.randn(12, 5).double(), torch.randn(7, 5).double()
    onehot = torch.nn.functional.one_hot(torch.arange(12) % 3).double()
    penalty = 0.3 * train.square().sum(1).mean()
    primal = torch.linalg.inv(train.T @ train + penalty * torch.eye(5).double()) @ train.T @ onehot
    scores = analyze.ridge_scores(train, onehot, test, strength=0.3)
    assert rel_error(scores, test @ primal) < 1e-9


LABELS = np.repeat([0, 1, 2, 3], [9, 12, 20, 30])    # unequal classes


@pytest.mark.parametrize("classifier", (analyze.knn_scores, analyze.ridge_scores))
def test_probe_accuracy(classifier):
    constant = torch.ones(71, 6) * 0.3
    assert analyze.probe_accuracy(constant, LABELS, classifier, 3, 5, 0) == pytest.approx([25] * 5)
    torch.manual_seed(0)
    noise = 0.01 * torch.randn(71, 4)
    separable = torch.nn.functional.one_hot(torch.from_numpy(LABELS)).float() + noise + 10
    assert analyze.probe_accuracy(separable, LABELS, classifier, 3, 5, 0) == [100] * 5


def test_shots_are_drawn_per_class_and_by_seed():
    train, test = analyze.draw_shots(LABELS, 3, [0, 3, 1])
    assert sorted([*train, *test]) == list(range(71))
    assert np.bincount(LABELS[train]).tolist() == [3] * 4
    assert (analyze.draw_shots(LABELS, 3, [0, 3, 1])[0] == train).all()
    assert (analyze.draw_shots(LABELS, 3, [0, 3, 2])[0] != train).any()


def test_mean_and_standard_error():
    assert analyze.mean_and_error([2.0, 4.0]) == pytest.approx((3, 1))
    assert analyze.mean_and_error([5.0]) == (5, 0)


def test_probe_command(files, tmp_path):
    here(analyze, "probe", "random", f"A={files}/a.pt", f"hiera={files}/hiera.pt", "--data",
         files / "images", "--shots", 1, 3, "--image-size", 64, "--device", "cpu",
         "--out", tmp_path)
    rows = [r for r in table(tmp_path / "probe.csv") if r["label"] != "chance"]
    assert len(rows) == 3 * 13 * 2 * 2
    assert {r["quantity"][:5] for r in rows} == {"5-NN ", "ridge"}
    easy = [float(r["value"]) for r in rows if r["layer"] == "1" and "3 per" in r["quantity"]]
    assert min(easy) > 90    # brightness is easy to see


# ----------------------------------------------------------------------------------------- models
def loaded(*argv):
    args = analyze.parse_args([str(a) for a in ("cka", *argv, "--device", "cpu")])
    return analyze.load_models(args), args


def test_size_patch_and_pixels_come_from_the_file(files):
    models, args = loaded(f"A={files}/a.pt", "random", "vit_tiny+rpe")
    assert args.image_size == (48, 48) and models["A"].mean == [0.5] * 3
    assert models["random"].patch_size == 8 and models["vit_tiny+rpe"].rel_pos_index is not None
    x = analyze.prepare(models["A"], torch.zeros(2, 3, 48, 48, dtype=torch.uint8))
    assert torch.allclose(x, torch.full_like(x, -0.5 / 0.3))


def test_heads_of_a_public_file_are_named(files, tmp_path):
    model = MODELS["vit_tiny"](img_size=32)
    public = {f"module.base_encoder.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": public, "arch": "vit_tiny"}, tmp_path / "moco.pth")
    models, _ = loaded(f"DeiT=deit_tiny:{tmp_path}/moco.pth", f"ours={tmp_path}/moco.pth",
                       "--image-size", 32)
    assert [m.arch["num_heads"] for m in models.values()] == [3, 12]
    assert torch.equal(models["DeiT"].blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)


def test_representations_are_normalised_by_the_next_block(files):
    models, _ = loaded(f"A={files}/a.pt")
    model = models["A"]
    x = torch.randn(2, 3, 48, 48)
    tokens = analyze.representations(model, x)
    assert [t.shape for t in tokens] == [(2, 36, 96)] * 13
    assert torch.allclose(tokens[-1], model(x)[:, 1:], atol=1e-6)    # the final norm for the last
    direct = model.blocks[4].norm1(model.forward_features(x, (4,))[4])[:, 1:]
    assert torch.allclose(tokens[4], direct)


def test_a_sideways_photo_is_turned_upright(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                                      # to be shown turned clockwise
    Image.fromarray(pixels).save(tmp_path / "phone.jpg", exif=exif)
    image = analyze.load_image(str(tmp_path / "phone.jpg"), (48, 32))
    assert image.shape == (3, 48, 32)
    assert image[:, :20].float().mean() > 250 and image[:, 28:].float().mean() < 5


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
    assert Image.open(tmp_path / "cost.png").width == 1080


@pytest.mark.parametrize("row, message", (
    ("one,vit_tiny,,", "line 2: could not convert string to float"),
    ("one,vit_tiny,good,", "line 2: could not convert"),
    ("one,vit_tiny,7800,", r"line 2: 7800 must lie in \[0, 100\]"),
    ("one,hiera_tiny,70,", "model hiera_tiny is not among those")))
def test_points_are_checked_before_anything_is_measured(row, message, tmp_path, monkeypatch):
    monkeypatch.delattr(analyze, "timings")
    (tmp_path / "points.csv").write_text(f"label,model,top1,source\n{row}\n")
    with pytest.raises(InputError, match=message):
        here(analyze, "cost", "vit_tiny", "--points", tmp_path / "points.csv", "--out", tmp_path)


# ----------------------------------------------------------------------------------------- curves
def write_log(path, top):
    lines = [{"step": 0, "args": {"lr": 1}, "commit": "abc"}]
    lines += [{"step": s, "loss": top / s, "lr": 0.1 / s, "grad_norm": None, "unreadable": 0.0,
               "stop": 0.0, "img_s": 100.0 * s} for s in range(1, 9)]
    lines += [{"step": s, "val_base": 0.99, "val_images": 100 + s} for s in (1, 8)]
    lines += [{"step": 8, "val_miou": 30 * top}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')


def test_curves_draw_what_is_measured_and_no_constant(tmp_path):
    write_log(tmp_path / "a.jsonl", 1.0)    # the last line was cut by a kill
    write_log(tmp_path / "b.jsonl", 2.0)
    here(analyze, "curves", f"A={tmp_path}/a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path)
    rows = table(tmp_path / "curves.csv")
    assert {r["quantity"] for r in rows} == {"loss", "lr", "val_miou"}
    assert len(rows) == 2 * (8 + 8 + 1)
    assert Image.open(tmp_path / "curves.png").width == 1080


def test_curves_draw_figure_4_a_line_per_share_of_the_data(tmp_path):
    for name, gain in (("mae", 1), ("d2", 2)):
        rows = [f"{k},{fraction},{seed},{50 + gain * k + seed}"
                for fraction in (1.0, 0.1) for k in (0, 6, 12) for seed in (0, 1)]
        head = "keep_blocks,data_fraction,seed,top1"
        (tmp_path / f"{name}.csv").write_text("\n".join([head, *rows]))
    here(analyze, "curves", f"MAE={tmp_path}/mae.csv", f"D2-MAE={tmp_path}/d2.csv",
         "--out", tmp_path)
    rows = table(tmp_path / "fig4.csv")
    assert len(rows) == 12 and len({r["label"] for r in rows}) == 4
    last = next(r for r in rows if r["label"] == "D2-MAE, 10% of the images"
                and r["pre-trained blocks kept"] == "12")
    assert float(last["value"]) == 74.5
    assert float(last["standard_error"]) == pytest.approx(0.5)


# --------------------------------------------------------------------------------------- pictures
@pytest.fixture(scope="module")
def figure():
    """One figure with a line, two boxes and a heatmap, and where these panels map data to."""
    figure = analyze.Figure(3, 3, {"first": "#0072b2", "second": "#d55e00"}, "a note")
    axes = []
    figure.panel("x", "line", (0, 10), (0, 1))
    figure.line([(0, 0, 0), (10, 1, 0.1)], "#0072b2")
    axes.append((figure.x_axis, figure.y_axis))
    figure.panel("x", "box", (0, 2), (0, 30))
    figure.box(1, [1, 8, 9, 10, 11, 12, 28], 0.5, "#d55e00")
    figure.box(1.7, [0.1 + 0.2] * 5, 0.2, "#0072b2")      # all heads alike
    axes.append((figure.x_axis, figure.y_axis))
    figure.panel("x", "heat", (-0.5, 2.5), (-0.5, 1.5))
    figure.heatmap(torch.tensor([[0, 0.5, 1], [1, 0.25, 0]]))
    axes.append((figure.x_axis, figure.y_axis))
    return figure.image.reduce(2), axes


def near(figure, panel, x, y, color, tolerance=60):
    picture, axes = figure
    place = [int(np.interp(v, *axis) / 2) for v, axis in zip((x, y), axes[panel])]
    color = getrgb(color) if isinstance(color, str) else color
    return max(abs(a - b) for a, b in zip(picture.getpixel(tuple(place)), color)) <= tolerance


def test_a_line_runs_through_its_points(figure):
    assert near(figure, 0, 5, 0.5, "#0072b2") and not near(figure, 0, 5, 0.7, "#0072b2")
    assert near(figure, 0, 10, 0.93, "#0072b2", 140)      # the error bar


def test_a_box_shows_median_and_extremes(figure):
    assert near(figure, 1, 1, 10, "#d55e00") and near(figure, 1, 1, 9.2, "white")
    assert near(figure, 1, 1, 25, "#d55e00", 140)         # the whisker
    assert near(figure, 1, 1.7, 0.3, "#0072b2")


def test_a_heatmap_has_row_0_at_the_bottom(figure):
    for y, row in enumerate([[0, 0.5, 1], [1, 0.25, 0]]):
        for x, value in enumerate(row):
            assert near(figure, 2, x, y, analyze.magma(value), 2)


def test_nothing_is_clipped_at_the_edges(figure):
    pixels = np.asarray(figure[0])
    assert pixels.shape[1] == 1080
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


@pytest.mark.parametrize("low, high, ticks", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (-0.5, 12.5, [0, 2, 4, 6, 8, 10, 12]),
    (61, 64, [61, 61.5, 62, 62.5, 63, 63.5, 64]),
    (0, 3e4, [0, 5e3, 1e4, 1.5e4, 2e4, 2.5e4, 3e4]),
    (-1.1e-3, 1e-3, [-1e-3, -5e-4, 0, 5e-4, 1e-3])])
def test_round_ticks(low, high, ticks):
    assert analyze.round_ticks(low, high).tolist() == pytest.approx(ticks)


# -------------------------------------------------------------------------------- demo, bad input
def test_demo(files, tmp_path, monkeypatch, capsys):
    assert analyze.parse_args(["--demo", "--out", "x"]).out == "x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analyze, "DRAWS", 2)
    with pytest.raises(InputError, match="run pretrain_d2mae.py --demo"):
        here(analyze, "--demo")
    shutil.copytree(ROOT / "tests/assets", "tests/assets")
    for folder, name in (("pretrain", "a"), ("pretrain/teacher", "b")):
        (tmp_path / "out/demo" / folder).mkdir(parents=True)
        shutil.copy(files / f"{name}.pt", f"out/demo/{folder}/encoder.pt")
        write_log(tmp_path / f"out/demo/{folder}/log.jsonl", 1.0)
    here(analyze, "--demo")
    names = sorted(path.name for path in (tmp_path / "out/demo/analyze").iterdir())
    assert names == [f"{command}.{kind}" for command in sorted(analyze.COMMANDS)
                     for kind in ("csv", "png")]
    assert "$ python analyze.py probe teacher=" in capsys.readouterr().out


def test_bad_input(files, tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one/a.png")
    (tmp_path / "bad").mkdir()
    for i in range(5):
        (tmp_path / f"bad/{i}.png").write_bytes(b"no picture")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    (tmp_path / "wrong.jsonl").write_text("hello\n")
    (tmp_path / "broken.jsonl").write_text("{hello}\n")
    out = ["--device", "cpu", "--out", tmp_path / "out"]
    images = ["--data", files / "images", *out]
    a = files / "a.pt"
    for argv, message in (
            (["cka", a, *images], "two models or more"),
            (["cka", a, a, *images], "two inputs are labelled"),
            (["cka", "random", *images], "name one"),
            (["cka", a, "nothing.pt", *images], "nothing.pt is no file"),
            (["cka", f"deit_tiny:{a}", *images], "choose the --model of the file|width|patch"),
            (["cka", a, "random", "--data", tmp_path / "nowhere", *out], "not a folder"),
            (["cka", a, "random", "--data", tmp_path / "one", *out], "needs 4 images or more"),
            (["cka", a, "random", "--batch-size", 3, *images], "needs 4 images or more"),
            (["attention", a, "--data", tmp_path / "bad", *out], "cannot read image .*bad/"),
            (["attention", a, "--image-size", 50, *images], "multiple of the patch size"),
            (["probe", a, "--data", files / "images/class0", *out], "one folder per class"),
            (["probe", a, "--shots", "10", *images], "more images than --shots"),
            (["curves", tmp_path / "wrong.csv", *out], "columns keep_blocks, data_fraction, top1"),
            (["curves", tmp_path / "wrong.jsonl", *out], "nothing to draw"),
            (["curves", tmp_path / "broken.jsonl", *out], "is not the log.jsonl of a run")):
        with pytest.raises(InputError, match=message):
            here(analyze, *argv)


@pytest.mark.parametrize("argv", (["cka", "a", "--seed", "5000000000"], ["cka"], [],
                                  ["probe", "a", "--shots", "0"], ["plot", "a"]))
def test_bad_options_end_in_a_usage_message(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        analyze.parse_args(argv)
    assert "error: " in capsys.readouterr().err


def test_help_needs_no_data(capsys):
    with pytest.raises(SystemExit, match="0"):
        analyze.parse_args(["--help"])
    assert "usage: " in capsys.readouterr().out


def test_command_line_says_one_sentence(files, tmp_path):
    done = run("analyze.py", "attention", files / "a.pt", "--data", tmp_path / "no", "--out",
               tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("give --data a folder of images")
