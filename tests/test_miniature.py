"""tests/tools/miniature.py: no test picture reaches training; a small study from end to end."""
import contextlib
import csv
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import here, rel_error
from PIL import Image, ImageOps

import miniature
from models import InputError, build_model, read_log


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Three classes: 20 and 24 pictures, some with variants in skin tone, and one of 3."""
    monkeypatch.setattr(miniature, "MIN_PICTURES", 32)
    folder = tmp_path / "pictures of all kinds"
    rng = np.random.default_rng(0)
    for name, count in (("cats", 20), ("dogs", 24), ("few", 3)):
        for i in range(count):
            for tone in ("", "-1f3fb", "-1F3FF") if i % 3 == 0 else ("",):
                path = folder / name / f"1f{i:03x}{tone}-200d-2642.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)).save(path)
    return folder


def prepare(pictures, out):
    """Write the pictures into `out` -> how many there are."""
    miniature.prepare(out, pictures)
    return miniature.count_pictures(out)


def written(out):
    """{folder: {(class, identity): number of files}} of what `prepare` wrote."""
    found = {}
    for part in ("pictures/train", "pictures/val", "labelled/train", "labelled/val",
                 "tuning/train", "tuning/val"):
        files = list((out / part).glob("*/*.png"))
        names = [(f.parent.name, miniature.identity(f)[6:]) for f in files]    # after the number
        found[part] = {name: names.count(name) for name in names}
    return found


def test_test_pictures_are_kept_out_of_all_training(pictures, tmp_path):
    count = prepare(pictures, tmp_path / "out")
    found = written(tmp_path / "out")
    assert len(found["labelled/val"]) == 20 // 3 + 24 // 3 == count["labelled/val"]
    assert len(found["labelled/train"]) == 44 - 14 == count["labelled/train"]
    assert found["pictures/val"] == found["labelled/val"]
    assert not found["labelled/val"].keys() & found["labelled/train"].keys()
    assert not found["labelled/val"].keys() & found["pictures/train"].keys()
    assert found["labelled/train"].keys() < found["pictures/train"].keys()
    tuning = [found["tuning/train"], found["tuning/val"]]    # chooses rates, on labelled pictures
    assert tuning[0] | tuning[1] == found["labelled/train"]
    assert not tuning[0].keys() & tuning[1].keys() and count["tuning/train"] == len(tuning[0])
    assert {name for name, _ in found["pictures/train"]} == {"cats", "dogs", "few"}
    assert {name for name, _ in found["labelled/train"]} == {"cats", "dogs"}
    assert count["classes"] == 2
    # variants serve pre-training alone
    assert set(found["labelled/train"].values()) == set(found["labelled/val"].values()) == {1}
    assert set(found["pictures/train"].values()) == {1, 3}


def test_copies_of_test_pictures_and_unreadable_files_are_left_out(pictures, tmp_path, capsys):
    test, _, _ = miniature.choose(pictures, 1000)
    copy = pictures / "few" / "copy.png"
    copy.write_bytes(test[0][0].read_bytes())
    (pictures / "few" / "broken.png").write_bytes(b"no image")
    ImageOps.mirror(Image.open(test[1][0])).save(pictures / "few" / "mirrored.png")
    (pictures / "few" / ".hidden").mkdir()
    (pictures / "few" / ".hidden" / "copy.png").write_bytes(b"no image")
    count = prepare(pictures, tmp_path / "out")
    assert "unreadable or almost equal to a test picture: 3 files" in capsys.readouterr().out
    names = [name for _, name in written(tmp_path / "out")["pictures/train"]]
    assert not {"copy", "mirrored", "broken"} & set(names) and len(names) == 33
    assert count["labelled/val"] == 14


def test_a_class_of_too_few_readable_pictures_is_not_labelled(pictures, tmp_path, capsys):
    """Probes draw 5 of a class's test pictures, and one more must be left."""
    test, _, _ = miniature.choose(pictures, 1000)
    file = next(file for file, name in test if name == "cats")
    good = file.read_bytes()
    file.write_bytes(b"no image")
    with pytest.raises(InputError, match="1 classes are left"):
        prepare(pictures, tmp_path / "out")
    assert "too few pictures are left of the class cats" in capsys.readouterr().out
    file.write_bytes(good)    # the same command goes on once it is repaired
    assert prepare(pictures, tmp_path / "out")["classes"] == 2


def test_folders_of_splits_and_equal_names_in_folders(tmp_path):
    for part in ("train", "val"):
        for kind in ("cats", "dogs"):
            (tmp_path / part / kind).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / kind / "1.png")
    with pytest.raises(InputError, match="parts of a set, not classes.*train"):
        miniature.list_pictures(tmp_path)
    assert {name: len(groups) for name, groups in miniature.list_pictures(tmp_path / "val").items()
            } == {"cats": 1, "dogs": 1}
    (tmp_path / "val").rename(tmp_path / "animals")
    (tmp_path / "train").rename(tmp_path / "more")
    assert {name: len(groups) for name, groups in miniature.list_pictures(tmp_path).items()
            } == {"animals": 2, "more": 2}    # 1.png of cats is not that of dogs


def test_an_interrupted_preparation_leaves_nothing_behind(pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(miniature.shutil, "copytree", lambda *_: exec("raise KeyboardInterrupt"))
        miniature.prepare(tmp_path / "out", pictures)
    (pictures / "few").rename(pictures / "other")
    miniature.prepare(tmp_path / "out", pictures)
    assert {name for name, _ in written(tmp_path / "out")["pictures/train"]} == {
        "cats", "dogs", "other"}


@pytest.mark.parametrize("name, same", [
    ("1f44b-1f3fb", "1f44b"), ("1F44B-FE0F", "1f44b"), ("1f9d1-1f3fb-200d-1f9d1-1f3ff",
                                                         "1f9d1-200d-1f9d1"),
    ("emoji_u1f44b_1f3fe", "emoji_u1f44b"), ("1f44b-tone3", "1f44b"),
    ("waving_hand_medium-light", "waving_hand"), ("wave_dark_skin_tone", "wave"),
    ("waving hand medium-light skin tone", "waving hand"), ("wave-skin-tone-6", "wave"),
    ("hand_default", "hand"), ("light", "light"), ("IMG_0012", "img_0012"),
    ("darkroom-2", "darkroom-2")])
def test_names_that_differ_in_skin_tone_are_one_picture(name, same):
    assert miniature.identity(f"{name}.png") == same


def test_what_a_study_wrote_is_no_picture(tmp_path):
    for name in ("cats/1.png", "out/data/pictures/train/cats/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert list(miniature.list_pictures(tmp_path, tmp_path / "out")) == ["cats"]


def test_emoji_are_told_apart_by_their_entry(tmp_path):
    folder = tmp_path / "img" / "vendor" / "64"
    folder.mkdir(parents=True)
    for name in ("a.png", "b-c.png", "d.png"):
        Image.new("RGB", (64, 64)).save(folder / name)
    entries = [{"category": "X & Y", "subcategory": "p/q", "image": "a.png",
                "skin_variations": {"1F3FB": {"image": "b-c.png"}, "1F3FC": {"image": "not.png"}}},
               {"category": "X & Y", "subcategory": "p/q", "image": "d.png"}]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    found = {name: [[f.name for f in group] for group in groups]
             for name, groups in miniature.list_pictures(tmp_path).items()}
    assert found == {"X & Y, p-q": [["a.png", "b-c.png"], ["d.png"]]}


def test_pictures_stand_whole_on_white(tmp_path):
    image = Image.new("RGBA", (128, 32), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))
    image.save(tmp_path / "a.png")
    pixels = np.array(miniature.on_white(tmp_path / "a.png"))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[32, 48:] == (255, 0, 0)).all()
    assert (pixels[32, :24] == 255).all() and (pixels[[0, 63]] == 255).all()
    Image.fromarray(np.full((32, 32), 30000, dtype=np.uint16)).save(tmp_path / "grey.png")
    Image.new("L", (28, 28), 7).save(tmp_path / "small.png")
    grey, small = (np.array(miniature.on_white(tmp_path / f"{n}.png")) for n in ("grey", "small"))
    assert abs(int(grey[32, 32, 0]) - 117) <= 1 and (small == 7).all()


@pytest.mark.parametrize("make", [lambda folder: folder / "nowhere", lambda folder: folder])
def test_a_folder_without_two_large_classes_is_one_sentence(tmp_path, make):
    for i in range(3):
        (tmp_path / "cats").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "cats" / f"{i}.png")
    with pytest.raises(InputError, match="CLASS/"):
        miniature.prepare(tmp_path / "out/data", make(tmp_path))


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
    assert rel_error(miniature.knn_scores(train, onehot, test, neighbours=4), votes) < 1e-5


def test_ridge_matches_its_primal_form():
    torch.manual_seed(0)
    train, test = torch.randn(12, 5).double(), torch.randn(7, 5).double()
    onehot = torch.nn.functional.one_hot(torch.arange(12) % 3).double()
    penalty = 0.3 * train.square().sum(1).mean()
    primal = torch.linalg.inv(train.T @ train + penalty * torch.eye(5).double()) @ train.T @ onehot
    scores = miniature.ridge_scores(train, onehot, test, strength=0.3)
    assert rel_error(scores, test @ primal) < 1e-9


LABELS = np.repeat([0, 1, 2, 3], [9, 12, 20, 30])    # unequal classes


@pytest.mark.parametrize("classifier", (miniature.knn_scores, miniature.ridge_scores))
def test_probe_accuracy(classifier):
    constant = torch.ones(71, 6) * 0.3
    assert miniature.probe_accuracy(constant, LABELS, classifier, 3, 5, 0) == pytest.approx([25] * 5)
    torch.manual_seed(0)
    noise = 0.01 * torch.randn(71, 4)
    separable = torch.nn.functional.one_hot(torch.from_numpy(LABELS)).float() + noise + 10
    assert miniature.probe_accuracy(separable, LABELS, classifier, 3, 5, 0) == [100] * 5


def test_shots_are_drawn_per_class_and_by_seed():
    train, test = miniature.draw_shots(LABELS, 3, [0, 3, 1])
    assert sorted([*train, *test]) == list(range(71))
    assert np.bincount(LABELS[train]).tolist() == [3] * 4
    assert (miniature.draw_shots(LABELS, 3, [0, 3, 1])[0] == train).all()
    assert (miniature.draw_shots(LABELS, 3, [0, 3, 2])[0] != train).any()


@pytest.fixture
def encoder(tmp_path):
    """A small encoder, and a folder of two classes: of the second, pictures are bright right."""
    torch.manual_seed(0)
    model = build_model("vit_pico", img_size=48, patch_size=8)
    torch.save(dict(model=model.state_dict(), arch=model.arch), tmp_path / "a.pt")
    rng = np.random.default_rng(0)
    for kind in range(2):
        for i in range(8):
            path = tmp_path / f"kinds/class{kind}/{i % 2}/{i}.png"    # the first folder counts
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 100, (60, 70, 3)).astype(np.uint8)
            pixels[:, 35:] += np.uint8(120 * kind)
            Image.fromarray(pixels).save(path)
    return tmp_path / "a.pt"


def test_probe_command(encoder, tmp_path):
    here(miniature, "probe", "random", f"A={encoder}", "hiera_tiny", "--data", tmp_path / "kinds",
         "--shots", 1, 3, "--image-size", 64, "--device", "cpu", "--out", tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "probe.csv", newline="")))
    assert len(rows) == 3 * 13 * 2 * 2
    assert {r["quantity"][:5] for r in rows} == {"5-NN ", "ridge"}
    easy = [float(r["value"]) for r in rows if r["layer"] == "1" and "3 per" in r["quantity"]]
    assert min(easy) > 90    # brightness is easy to see


def test_probe_needs_classes(encoder, tmp_path):
    options = ["--device", "cpu", "--out", tmp_path / "out"]
    kinds = tmp_path / "kinds"
    for argv, message in ((["--data", kinds / "class0/0"], "one folder per class"),
                          (["--data", kinds, "--shots", 8], "more images than --shots")):
        with pytest.raises(InputError, match=message):
            here(miniature, "probe", encoder, *argv, *options)
    (kinds / "class0").rename(kinds / "train")
    (kinds / "class1").rename(kinds / "val")
    with pytest.raises(InputError, match="parts of a set, not classes"):
        here(miniature, "probe", encoder, "--data", kinds, *options)
    with pytest.raises(SystemExit, match="2"):
        miniature.parse_args(["probe", "a", "--shots", "0"])


# ------------------------------------------------------------------------------------------ study
def launch_here(words, folder):
    """The same as `miniature.launch` without starting Python, which takes seconds."""
    script, *options = words
    with contextlib.chdir(folder):
        here(importlib.import_module(Path(script).stem), *options)


def test_a_small_study(pictures, tmp_path, monkeypatch, capsys):
    """Every command once, the table, the figures; the second time nothing is run again."""
    for name, value in dict(SEEN=60, STEPS={"10": 2}, SEEDS=(0,), RUNS=1, RATES=(1e-3,),
                            TAPS=(6, 8), KEPT=(0, 12), launch=launch_here).items():
        monkeypatch.setattr(miniature, name, value)
    monkeypatch.setattr(miniature, "DRAWS", 1)
    out = tmp_path / "out"
    args = miniature.parse_args(["--data", str(pictures), "--out", str(out)])
    miniature.main(args)
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    for words in ("| scratch | - |", "| D2-MAE | ", "- D2-MAE − MAE: ", " (1 run)", "| 6 | "):
        assert words in table, words
    for name in ("labels", "fig4", "probe_blocks", "cka", "attention"):
        assert Image.open(out / f"{name}.png").width > 300
    assert len(list(out.glob("finetune/*/*/*/log.jsonl"))) == 3 + 5 + 3 + 1
    assert not list((out / "finetune").rglob("*.pt"))    # checkpoints of two hundred runs
    assert len((out / "fig4.csv").read_text().splitlines()) == 1 + 3 * 2    # methods, blocks kept
    first = {name: read_log(out / name / "log.jsonl")[0]
             for name in ("teacher", "mae-0", "longer-0", "d2-mae-0", "tap6")}
    options = {name: line["args"] for name, line in first.items()}
    assert options["longer-0"]["epochs"] >= options["mae-0"]["epochs"] >= 1
    assert (options["d2-mae-0"]["decoder_tap"], options["tap6"]["decoder_tap"]) == (None, 6)
    assert first["teacher"]["arch"]["embed_dim"] == 192

    # the second time nothing is run again, though the folder has moved; other lengths are refused
    moved = out.rename(tmp_path / "moved")
    before = (moved / "results.json").read_text()
    args.out = moved
    miniature.main(args)
    assert (moved / "results.json").read_text() == before
    assert (moved / "table.md").read_text() == table
    args.minutes = 5
    with pytest.raises(InputError, match="another --out"):
        miniature.main(args)


def test_commands_run_in_processes_of_their_own_and_a_failure_is_named(pictures, tmp_path):
    prepare(pictures, tmp_path / "data")
    study = miniature.Study(tmp_path, share=1e-6)
    top1 = study.finetune("scratch", 0, "all", 1e-3)
    [values] = study.results.values()
    assert 0 <= top1 <= 100 and values["seconds"] > 0 and values["epoch"] == 1
    first = read_log(tmp_path / "finetune/labelled-all/scratch/12-0-0.001/log.jsonl")[0]
    assert first["args"]["shots"] is None and first["train_images"] == study.pictures("all") == 30
    assert study.pictures("10") == 20 and study.pictures("100") == 30

    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('words')\nsys.exit('error: ' + sys.argv[1])")
    with pytest.raises(InputError, match=r"script.py oops: error: oops \(exit status 1\)"):
        study.run(script, "oops")
    assert len(miniature.Study(tmp_path, share=1).results) == 1    # what failed is run again
    assert "words\nerror: oops\n" in (tmp_path / "commands.log").read_text()
