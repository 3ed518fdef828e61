import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import rel_error, run, seeded
from PIL import Image

import analyze
from models import MODELS, InputError, reroll


def commanded(*argv):
    """Run a command in this process, as the command line would."""
    args = analyze.parse_args([str(a) for a in argv])
    args.run(args)


def table(path):
    return list(csv.DictReader(open(path, newline="")))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two small encoders of 48 pixels, one Hiera of 64, and a folder of two classes of images in several formats."""
    folder = tmp_path_factory.mktemp("analyze")
    for name, make in (("a", lambda: MODELS["vit_tiny"](img_size=48, patch_size=8)), ("b", lambda: MODELS["vit_tiny"](img_size=48, patch_size=8)),
                       ("rpe", lambda: MODELS["vit_tiny"](img_size=48, patch_size=16, rel_pos_bias=True)), ("hiera", lambda: MODELS["hiera_tiny"](img_size=64))):
        torch.manual_seed(len(name) + ord(name[0]))
        model = make()
        torch.save(dict(model=model.state_dict(), arch=model.arch, mean=[0.5] * 3, std=[0.3] * 3), folder / f"{name}.pt")
    rng = np.random.default_rng(0)
    for kind in range(2):    # the second class is bright on the right
        (folder / f"images/class{kind}").mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 100, (60, 70, 3)).astype(np.uint8)
            pixels[:, 35:] += np.uint8(120 * kind)
            Image.fromarray(pixels).convert(("RGB", "L", "P", "RGBA")[i % 4]).save(folder / f"images/class{kind}/{i}.png")
    return folder


# ------------------------------------------------------------------------------------------------------------ similarity
def test_cka_matches_golden(golden):
    a = [seeded((48, 5, 7), f"featA{i}") for i in range(3)]
    b = [seeded((48, 5, 9), f"featB{i}") + a[i].mean(2, keepdim=True) for i in range(2)]
    batches = [[[x[s:s + 16] for x in a], [x[s:s + 16] for x in b]] for s in (0, 16, 32)]
    assert rel_error(analyze.minibatch_cka(batches)[0], golden["analyze/cka"]) < 1e-5


def slow_hsic(x, y):
    """Eq. 3 of arXiv 2010.15327, term by term."""
    n = len(x)
    k, l = ([[0.0 if i == j else float(z[i] @ z[j]) for j in range(n)] for i in range(n)] for z in (x, y))
    kl = [[sum(k[i][m] * l[m][j] for m in range(n)) for j in range(n)] for i in range(n)]
    total = lambda a: sum(map(sum, a))
    trace = sum(kl[i][i] for i in range(n))
    return (trace + total(k) * total(l) / ((n - 1) * (n - 2)) - 2 / (n - 2) * total(kl)) / (n * (n - 3))


def test_cka_matches_direct_hsic_averaged_before_the_ratio():
    torch.manual_seed(0)
    batches = []
    for n in (6, 8):    # unequal batches: HSICs have to be normalised by n (n - 3)
        x = [torch.randn(n, 2, 3) + 5, torch.randn(n, 4, 2)]
        batches.append([x, [x[0] @ torch.randn(3, 4), torch.randn(n, 3, 3) * 7]])
    flat = [[[z.flatten(1).double() for z in layers] for layers in models] for models in batches]
    for i in range(2):
        for j in range(2):
            xy, xx, yy = (sum(slow_hsic(m[p][a], m[q][b]) for m in flat) for p, a, q, b in ((0, i, 1, j), (0, i, 0, i), (1, j, 1, j)))
            assert float(analyze.minibatch_cka(batches)[0][i, j]) == pytest.approx(xy / math.sqrt(xx * yy), rel=1e-9)


def test_cka_invariances_and_no_nan():
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(40, 40)).Q
    batches = []
    for _ in range(300):
        x = torch.randn(16, 40)
        batches.append([[x, torch.ones(16, 40)], [x, 100 + 3 * x @ rotation, torch.randn(16, 40), torch.zeros(16, 5)]])
    matrix = analyze.minibatch_cka(batches)[0]
    assert matrix.isfinite().all()
    assert matrix[0, 0] == pytest.approx(1, abs=1e-9) and matrix[0, 1] == pytest.approx(1, abs=1e-6)
    assert abs(matrix[0, 2]) < 0.02                       # the biased estimate is 0.7 here
    assert (matrix[1].abs() < 1e-6).all() and matrix[0, 3] == 0    # layers that never vary


# ------------------------------------------------------------------------------------------------------------- attention
def test_attention_statistics_match_golden(golden):
    vit = MODELS["vit_tiny"](img_size=64)                 # a grid of 4x4
    patches = analyze.token_distances(vit)[0] / 16
    logits = 2 * seeded((2, 3, 17, 17), "attn_logits")
    distance, entropy = analyze.attention_statistics(logits[:, :, 1:, 1:], patches)
    assert rel_error(distance.mean(0), golden["analyze/attention_distance_patches"]) < 1e-5
    assert rel_error(entropy.mean(0), golden["analyze/attention_entropy_nats"]) < 1e-4


def test_attention_statistics_closed_forms():
    distance = analyze.token_distances(MODELS["vit_tiny"](img_size=32))[0]           # 2x2 patches of 16 pixels
    uniform = analyze.attention_statistics(torch.full((1, 2, 4, 4), 3.0), distance)
    assert uniform[0][0].tolist() == pytest.approx([16 * (2 + math.sqrt(2)) / 4] * 2)
    assert uniform[1][0].tolist() == pytest.approx([math.log(4)] * 2)
    identity = analyze.attention_statistics(100 * torch.eye(4)[None, None], distance)
    assert identity[0].item() == pytest.approx(0, abs=1e-6) and identity[1].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("q_pool", (2, 3))
def test_hiera_distances_are_those_of_the_rerolled_tokens(q_pool):
    model = MODELS["hiera_tiny"](img_size=(64, 96), q_pool=q_pool)
    before = 0                                            # rounds of pooling before the block
    for block, distance in zip(model.blocks, analyze.token_distances(model)):
        after = before + block.attn.q_pool
        centers = []
        for pooled in (after, before):                    # where each unrolled token lies, found by rerolling its number
            side, count = 4 * 2 ** pooled, model.grid[0] * model.grid[1] // 4 ** pooled
            raster = reroll(torch.arange(count).view(1, -1, 1), model.unit_grid, 3 - pooled)[0, :, :, 0]
            place = {int(raster[y, x]): ((y + 0.5) * side, (x + 0.5) * side) for y in range(raster.shape[0]) for x in range(raster.shape[1])}
            step = 6 if block.attn.tokens_per_unit else 1    # six mask units, unit index fastest: the tokens of unit 0
            centers.append([place[i] for i in range(0, count, step)])
        direct = torch.tensor([[math.dist(q, k) for k in centers[1]] for q in centers[0]])
        assert distance.shape == direct.shape == block.attn.logits(torch.zeros(1, centers_count(model, before), block.norm1.weight.numel())).shape[-2:]
        assert rel_error(distance, direct) < 1e-6
        before = after


def centers_count(model, pooled):
    return model.grid[0] * model.grid[1] // 4 ** pooled


def test_attention_command(files, tmp_path):
    for batch in (3, 8):    # the result does not depend on it
        commanded("attention", f"A={files}/a.pt", f"rpe={files}/rpe.pt", f"hiera={files}/hiera.pt", "--data", files / "images", "--images", 8, "--image-size", 64,
                  "--batch-size", batch, "--workers", 0, "--device", "cpu", "--out", tmp_path / str(batch))
    rows = [table(tmp_path / f"{batch}/attention.csv") for batch in (3, 8)]
    assert [r["model"] for r in rows[0]].count("A") == 144 and {r["attention"] for r in rows[0] if r["model"] == "hiera"} == {"mask unit", "global"}
    for one, other in zip(*rows):
        for key in ("distance_px", "entropy_nats"):
            assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-4)
        assert float(one["distance_px"]) < 64 * math.sqrt(2) and 0 < float(one["entropy_nats"]) <= math.log(256)
    assert Image.open(tmp_path / "3/attention.png").width == 900


# ---------------------------------------------------------------------------------------------------------------- probes
def test_knn_and_ridge_match_slow_forms():
    torch.manual_seed(0)
    train, test, labels = torch.randn(12, 5).double(), torch.randn(7, 5).double(), torch.arange(12) % 3
    onehot = torch.nn.functional.one_hot(labels).double()
    votes = torch.zeros(7, 3).double()
    for i in range(7):
        similarity = [(float(test[i] @ train[j] / test[i].norm() / train[j].norm()), int(labels[j])) for j in range(12)]
        for value, label in sorted(similarity, reverse=True)[:4]:
            votes[i, label] += math.exp(value / 0.07)
    assert rel_error(analyze.knn_scores(train, onehot, test, neighbours=4), votes) < 1e-9
    penalty = 0.3 * train.square().sum(1).mean()
    primal = torch.linalg.inv(train.T @ train + penalty * torch.eye(5).double()) @ train.T @ onehot
    assert rel_error(analyze.ridge_scores(train, onehot, test, strength=0.3), test @ primal) < 1e-9


def test_probe_accuracy():
    labels = np.repeat([0, 1, 2, 3], [9, 12, 20, 30])     # unequal classes
    constant = analyze.probe_accuracy(torch.ones(71, 6) * 0.3, labels, 3, 5, seed=0)
    assert torch.allclose(constant, torch.full((2, 5), 0.25).double())
    torch.manual_seed(0)
    separable = torch.nn.functional.one_hot(torch.from_numpy(labels)).float() + 0.01 * torch.randn(71, 4) + 10
    assert (analyze.probe_accuracy(separable, labels, 3, 5, seed=0) == 1).all()
    train, test = analyze.draw_shots(labels, 3, [0, 3, 1])
    assert sorted(train + test) == list(range(71)) and np.bincount(labels[train]).tolist() == [3] * 4
    assert analyze.draw_shots(labels, 3, [0, 3, 1])[0] == train != analyze.draw_shots(labels, 3, [0, 3, 2])[0]


def test_probe_command(files, tmp_path):
    commanded("probe", "random", f"A={files}/a.pt", f"hiera={files}/hiera.pt", "--data", files / "images", "--shots", "1,3", "--draws", 3,
              "--image-size", 64, "--workers", 0, "--device", "cpu", "--out", tmp_path)
    rows = table(tmp_path / "probe.csv")
    assert len(rows) == 3 * 13 * 2 * 2 and {r["classifier"] for r in rows} == {"5-NN", "ridge"}
    assert min(float(r["top1"]) for r in rows if r["layer"] == "1" and r["shots"] == "3") > 90    # brightness is easy to see


# ----------------------------------------------------------------------------------------------------- cka, models, cost
def test_cka_command(files, tmp_path, capsys):
    commanded("cka", files / "a.pt", f"A={files}/a.pt", f"B={files}/b.pt", f"hiera={files}/hiera.pt", "random", "--data", files / "images", "--image-size", 64,
              "--batch-size", 8, "--workers", 0, "--device", "cpu", "--out", tmp_path)
    rows = table(tmp_path / "cka.csv")
    assert len(rows) == 4 * 13 * 13 and "over 2 batches of 8 images:" in capsys.readouterr().out
    same = [float(r["cka"]) for r in rows if r["model"] == "A" and r["layer_of_reference"] == r["layer_of_model"]]
    assert len(same) == 13 and all(v == pytest.approx(1, abs=1e-6) for v in same)
    assert not any(r["cka"] == "nan" for r in rows)
    random, other = ([r["cka"] for r in rows if r["model"] == m] for m in ("random", "A"))
    assert random != other


def test_representations_and_pixels_of_a_file(files):
    args = analyze.parse_args(["cka", f"{files}/a.pt", "random", "vit_tiny+rpe", "--device", "cpu"])
    a, random, rpe = analyze.load_models(args)
    assert args.image_size == (48, 48) and a.mean == [0.5] * 3 and random.model.patch_size == 8
    assert rpe.model.patch_size == 16 and rpe.model.rel_pos_index is not None
    torch.save(a.model.state_dict(), files / "bare.pth")    # a public file does not say how many heads it has
    named = analyze.load_models(analyze.parse_args(["cka", f"deit_tiny:{files}/bare.pth", f"ours={files}/bare.pth", "--device", "cpu"]))
    assert [e.model.arch["num_heads"] for e in named] == [3, 12] and named[0].label.endswith("/bare")
    assert torch.equal(named[0].model.blocks[3].attn.qkv.weight, a.model.blocks[3].attn.qkv.weight)
    with pytest.raises(InputError, match="labelled .*/bare"):
        analyze.load_models(analyze.parse_args(["cka", f"deit_tiny:{files}/bare.pth", f"{files}/bare.pth"]))
    with pytest.raises(InputError, match="num_heads"):
        analyze.load_models(analyze.parse_args(["cka", f"deit_tiny:{files}/a.pt", "--device", "cpu"]))
    images = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    x = analyze.prepare(images, a)
    assert torch.allclose(x, torch.full_like(x, -0.5 / 0.3))
    tokens = analyze.representations(a.model, x)
    assert [t.shape for t in tokens] == [(2, 36, 192)] * 13
    assert torch.allclose(tokens[-1], a.model(x)[:, 1:], atol=1e-6)                                  # the final norm for the last
    assert torch.allclose(tokens[4], a.model.blocks[4].norm1(a.model.forward_features(x, (4,))[4])[:, 1:])


def test_cost_command(files, tmp_path, capsys):
    head = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.ReLU()).eval()
    torch.export.save(torch.export.export(head, (torch.zeros(2, 3, 32, 32),)), tmp_path / "head.pt2")
    (tmp_path / "points.csv").write_text("label,model,top1,latency_ms,source\none,A,75.8,,paper\ntwo,A,78.7,,paper\nthree,x,70,3.5,other\nfour,x,70,,other\n")
    commanded("cost", f"A={files}/a.pt", "vit_tiny", tmp_path / "head.pt2", "--image-size", 224, "--seconds", 0.01, "--batch-size", 2, "--device", "cpu", "--points",
              tmp_path / "points.csv", "--out", tmp_path)
    rows = table(tmp_path / "cost.csv")
    assert [r["measured"] for r in rows] == [*["model alone", "end to end, from a JPEG of 448x448 pixels", "model alone"] * 2, "model alone"]
    assert [int(r["batch_size"]) for r in rows] == [1, 1, 2, 1, 1, 2, 2] and all(float(r["p10"]) <= float(r["ms"]) <= float(r["p90"]) for r in rows)
    tiny, head = rows[3], rows[6]
    assert int(tiny["parameters"]) == 5_717_416
    blocks = 12 * (12 * 197 * 192 ** 2 + 2 * 197 ** 2 * 192)
    assert int(tiny["multiply_adds"]) == blocks + 196 * 768 * 192 + 192 * 1000
    assert int(head["multiply_adds"]) == 2 * 32 * 32 * 8 * 27 and int(head["parameters"]) == 8 * 27
    said = capsys.readouterr().out
    assert "cpu, " in said and "CPU threads, fp32" in said and "s of warm-up" in said and "four is left out" in said
    assert said.count("end to end, from a JPEG of 448x448 pixels, batch 1: ") == 2 and said.count("model alone, batch 2: ") == 3
    assert Image.open(tmp_path / "cost.png").size[0] == 720


# --------------------------------------------------------------------------------------------------------- layers, curves
def test_layers_command(tmp_path, capsys):
    for name, gain in (("mae", 1), ("d2", 2)):
        rows = [f"{k},{fraction},{seed},{50 + gain * k + seed}" for fraction in (1.0, 0.1) for k in (0, 6, 12) for seed in (0, 1)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["keep_blocks,data_fraction,seed,top1", *rows]))
    commanded("layers", f"MAE={tmp_path}/mae.csv", f"D2-MAE={tmp_path}/d2.csv", "--out", tmp_path)
    rows = table(tmp_path / "layers.csv")
    assert len(rows) == 12
    last = next(r for r in rows if (r["label"], r["data_fraction"], r["keep_blocks"]) == ("D2-MAE", "0.1", "12"))
    assert last["runs"] == "2" and float(last["top1"]) == 74.5 and float(last["standard_error"]) == 0.5
    assert "MAE, 10% of the images: 0 blocks 50.50, 6 blocks 56.50, 12 blocks 62.50" in capsys.readouterr().out


def test_curves_command(tmp_path):
    for name, top in (("a", 1.0), ("b", 2.0)):
        lines = [{"args": {"lr": 1}}] + [{"step": s, "loss": top / s, "lr": 0.1} for s in range(1, 9)] + [{"step": 8, "val_miou": 30 * top}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    commanded("curves", f"A={tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl", "--out", tmp_path)
    rows = table(tmp_path / "curves.csv")
    assert {r["key"] for r in rows} == {"loss", "val_miou"} and len(rows) == 18
    commanded("curves", f"A={tmp_path}/a.jsonl", "--keys", "lr", "--out", tmp_path)
    assert {r["value"] for r in table(tmp_path / "curves.csv")} == {"0.1"}


# -------------------------------------------------------------------------------------------------------------- pictures
def test_pictures_show_the_data_where_they_are(tmp_path):
    sheet = analyze.Sheet(4, 2, 300, 250, [("first", "#0072b2"), ("second", "#d55e00")], "a note " * 30)
    line = analyze.Axes(sheet, 0, "line", "x", "y", (0, 10), (0, 1))
    line.line([(0, 0), (10, 1)], "#0072b2", errors=[0, 0.1])
    box = analyze.Axes(sheet, 1, "box", "x", "y", (0, 2), (0, 30), range(3))
    box.box(1, [1, 8, 9, 10, 11, 12, 28], 0.5, "#d55e00")
    box.box(1.7, [0.1 + 0.2] * 5, 0.2, "#0072b2")         # all heads alike
    heat = analyze.Axes(sheet, 2, "heat", "x", "y", (-0.5, 2.5), (-0.5, 1.5), right=58)
    heat.heatmap([[0, 0.5, 1], [1, 0.25, 0]])
    dots = analyze.Axes(sheet, 3, "dots", "x", "y", (0, 10), (0, 10))
    dots.scatter([(5, 5, "left", "#0072b2"), (5.2, 5.2, "over it", "#d55e00"), (9.9, 9, "no room on the right", "#000000")])
    sheet.save(tmp_path / "sheet.png")
    picture = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert picture.width == 600

    def near(axes, x, y, color, tolerance=40):
        pixel = picture.getpixel(tuple(int(v) for v in axes.place(x, y)))
        return max(abs(a - b) for a, b in zip(pixel, analyze.getrgb(color) if isinstance(color, str) else color)) <= tolerance

    assert near(line, 5, 0.5, "#0072b2") and not near(line, 5, 0.7, "#0072b2") and near(line, 10, 0.92, "#0072b2", 140)
    assert near(box, 1, 10, "#d55e00") and near(box, 1, 9.4, (234, 174, 127)) and near(box, 1.5, 20, "white")
    assert near(box, 1, 8.2, "#d55e00", 140) and near(box, 1, 6.5, "white")     # whisker, gap
    assert all(any(near(box, 1, v + d, "#d55e00", 90) for d in (-0.4, -0.3, 0.3, 0.4)) for v in (1, 28))    # outliers
    for y, row in enumerate([[0, 0.5, 1], [1, 0.25, 0]]):
        for x, value in enumerate(row):
            assert near(heat, x, y, analyze.magma(value), 2)
    assert near(dots, 5, 5, "#0072b2") and near(dots, 5.2, 5.2, "#d55e00")
    for axes in (line, heat):    # the frame; and nothing clipped at the edges of the picture
        assert near(axes, axes.xlim[0], sum(axes.ylim) / 2, "black", 130)
    pixels = np.asarray(picture)
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


@pytest.mark.parametrize("low, high, ticks", [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.5, 12.5, [0, 5, 10]), (61, 64, [61, 62, 63, 64]),
                                              (0, 3e4, [0, 1e4, 2e4, 3e4]), (-1.1e-3, 1e-3, [-1e-3, -5e-4, 0, 5e-4, 1e-3])])
def test_round_ticks(low, high, ticks):
    assert analyze.round_ticks(low, high) == pytest.approx(ticks)


# ------------------------------------------------------------------------------------------------------------- bad input
def test_bad_input(files, tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one/a.png")
    (tmp_path / "bad").mkdir()
    for i in range(5):
        (tmp_path / f"bad/{i}.png").write_bytes(b"no picture")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    (tmp_path / "wrong.jsonl").write_text("hello\n")
    out = ["--workers", 0, "--device", "cpu", "--out", tmp_path / "out"]
    images = ["--data", files / "images", *out]
    for argv, message in (
            (["cka", files / "a.pt", *images], "two models or more"),
            (["cka", "random", "random", *images], "name a checkpoint"),
            (["cka", files / "a.pt", "nothing.pt", *images], "nothing.pt does not exist"),
            (["cka", files / "a.pt", "random", "--data", tmp_path / "nowhere", *out], "not a folder"),
            (["cka", files / "a.pt", "random", "--data", tmp_path / "one", *out], "four are the least"),
            (["cka", files / "a.pt", "random", "--batch-size", 3, *images], "4 images or more"),
            (["attention", files / "a.pt", "--data", tmp_path / "bad", *out], "cannot read image .*bad/"),
            (["attention", files / "a.pt", "--image-size", 50, *images], "multiple of the patch size"),
            (["probe", files / "a.pt", "--data", files / "images/class0", *out], "one folder of images per class"),
            (["probe", files / "a.pt", "--shots", "10", *images], "leaves none to test"),
            (["layers", tmp_path / "nothing.csv"], "does not exist"),
            (["layers", tmp_path / "wrong.csv"], "lacks the column.*keep_blocks, data_fraction, top1"),
            (["curves", tmp_path / "wrong.jsonl"], "line 1, is no JSON")):
        with pytest.raises(InputError, match=message):
            commanded(*argv)


@pytest.mark.parametrize("command", ("cka", "attention", "probe", "layers", "cost", "curves"))
def test_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        analyze.parse_args([command, "--help"])
    assert "usage: " in capsys.readouterr().out


def test_command_line_says_one_sentence(files, tmp_path):
    done = run("analyze.py", "attention", files / "a.pt", "--data", tmp_path, "--out", tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: --data ") and "Traceback" not in done.stderr
    bad = tmp_path / "images"
    bad.mkdir()
    for i in range(4):
        (bad / f"{i}.png").write_bytes(b"no picture")
    done = run("analyze.py", "attention", files / "a.pt", "--data", bad, "--workers", 1, "--out", tmp_path, check=False)
    assert done.returncode == 1 and "error: cannot read image" in done.stderr.strip().splitlines()[-1]
    done = run("analyze.py", check=False)
    assert done.returncode == 2 and "give a command" in done.stderr
