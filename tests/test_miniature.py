"""tests/miniature.py: no test picture reaches training; a small study from end to end."""
import json

import numpy as np
import pytest
from PIL import Image

import miniature
from models import InputError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes: 20 and 24 pictures, some with variants in skin tone, and one of 3."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, count in (("cats", 20), ("dogs", 24), ("few", 3)):
        (folder / name).mkdir()
        for i in range(count):
            for tone in ("", "-1f3fb", "-1F3FF") if i % 3 == 0 else ("",):
                pixels = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / f"1f{i:03x}{tone}-200d-2642.png")
    return folder


def test_test_identities_are_kept_out_of_all_training(pictures, tmp_path):
    count = miniature.prepare(pictures, tmp_path)
    found = {part: list(tmp_path.glob(f"{part}/*/*.png"))
             for part in ("pictures/train", "pictures/val", "labelled/train", "labelled/val")}
    names = {part: {(f.parent.name, miniature.identity(f)) for f in files}
             for part, files in found.items()}
    assert len(names["labelled/val"]) == 20 // 3 + 24 // 3 == count["labelled/val"]
    assert len(names["labelled/train"]) == 44 - 14 == count["labelled/train"]
    assert names["pictures/val"] == names["labelled/val"]
    assert not names["labelled/val"] & (names["labelled/train"] | names["pictures/train"])
    assert names["labelled/train"] < names["pictures/train"]
    assert {name for name, _ in names["pictures/train"]} == {"cats", "dogs", "few"}
    assert {name for name, _ in names["labelled/train"]} == {"cats", "dogs"}
    # variants serve pre-training, but one picture of an identity is labelled or tested
    assert len(found["labelled/train"]) == len(names["labelled/train"])
    assert len(found["labelled/val"]) == len(names["labelled/val"])
    variants = sum(miniature.identity(f) == miniature.identity(g) and f.parent == g.parent
                   for f in found["pictures/train"] for g in found["pictures/train"])
    assert variants > len(found["pictures/train"])    # some have more than themselves


def test_pictures_stand_whole_on_white(tmp_path):
    image = Image.new("RGBA", (128, 32), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))
    image.save(tmp_path / "a.png")
    pixels = np.array(miniature.on_white(tmp_path / "a.png"))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[32, 48:] == (255, 0, 0)).all()
    assert (pixels[32, :24] == 255).all() and (pixels[[0, 63]] == 255).all()


@pytest.mark.parametrize("make", [lambda folder: folder / "nowhere", lambda folder: folder])
def test_a_folder_without_two_large_classes_is_one_sentence(tmp_path, make):
    with pytest.raises(InputError, match="CLASS/"):
        miniature.prepare(make(tmp_path), tmp_path / "out")


def test_a_small_study(pictures, tmp_path, monkeypatch, capsys):
    """Every command once, the table, the figures; the second time nothing is run again."""
    for name, value in dict(SEEN=60, SHOTS={"10": 40, "all": 40}, SEEDS=(0,), RUNS=1,
                            RATES=(1e-3,), TAPS=(6, 8), KEPT=(0, 12)).items():
        monkeypatch.setattr(miniature, name, value)
    args = miniature.parse_args(["--data", str(pictures), "--out", str(tmp_path)])
    miniature.main(args)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    for words in ("| scratch | - |", "| D2-MAE | ", "- D2-MAE − MAE: ", ", 1 runs)", "| 6 | "):
        assert words in table, words
    for name in ("labels", "fig4", "taps", "probe_blocks", "cka", "attention"):
        assert Image.open(tmp_path / f"{name}.png").width > 300
    results = json.loads((tmp_path / "results.json").read_text())
    longer = [v["epochs"] for k, v in results.items() if "longer-0 " in f"{k} " and "epochs" in v]
    assert longer and min(longer) >= 1
    assert not list((tmp_path / "finetune").iterdir())    # checkpoints of hundreds of runs

    before = (tmp_path / "results.json").stat().st_mtime_ns
    miniature.main(args)
    assert (tmp_path / "results.json").stat().st_mtime_ns == before
    assert (tmp_path / "table.md").read_text() == table
    with pytest.raises(InputError, match="another --out"):
        args = miniature.parse_args(["--data", str(pictures), "--out", str(tmp_path), "--minutes",
                                     "5"])
        miniature.main(args)
