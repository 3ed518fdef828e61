"""tests/tools/export.py: networks in ONNX Runtime, OpenVINO, timm, transformers and ncnn."""
import argparse
import importlib
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, here, rel_error, run, seed_weights
from toy import class_folder, write_images, write_segmentation, write_videos

import export
import models
import segment
import track
from models import Hiera, InputError, RelativeVisionTransformer, VisionTransformer, normalize, save

VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
CLASSES = 16    # of the toy data


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    sizes = {key: VIT[key] for key in ("embed_dim", "depth", "num_heads")}
    monkeypatch.setitem(models.MODELS, "small", sizes)
    monkeypatch.setitem(models.MODELS, "hiera_small", dict(embed_dim=16, stages=[1, 1, 1, 1]))


def needs(*packages):
    """Skip without the packages."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


ONNX = needs("onnx", "onnxscript", "onnxruntime")


def vit(kind=VisionTransformer, **options):
    return kind(**{**VIT, **options}, mean=MEAN, std=STD)


def hiera(**options):
    return Hiera(img_size=64, embed_dim=16, stages=(1, 1, 1, 1), mean=MEAN, std=STD, **options)


def segmenter():
    encoder = vit(RelativeVisionTransformer, block=segment.ScaledBlock)
    return segment.SemanticFPN(encoder, CLASSES + 1)


def tracker():
    return track.Tracker(vit(), template_size=16, search_size=64, head_channels=16,
                         eliminate_blocks=(1, 2), keep_rate=0.5)


KINDS = {
    "encoder": vit,
    "classifier": lambda: vit(num_classes=CLASSES),
    "rpe": lambda: vit(RelativeVisionTransformer, num_classes=CLASSES),
    "hiera": lambda: hiera(num_classes=CLASSES),
    "hiera_encoder": hiera,
    "segmenter": segmenter,
    "tracker": tracker,
}


def write(folder, name):
    """Write the model with seeded weights as a script would -> path, model."""
    model = seed_weights(KINDS[name]())
    data, options = {}, {}
    if name == "segmenter":
        data = dict(classes=[f"class {k}" for k in range(CLASSES + 1)])
        options = dict(num_classes=CLASSES + 1, zero_is_class=True)
    elif name == "tracker":
        for p in model.head.parameters():    # else the maps are nearly constant
            p.data *= 4 if p.dim() > 1 else 1
    elif "head.weight" in model.state_dict():
        data = dict(classes=sorted(map(class_folder, range(CLASSES))))
    save(argparse.Namespace(out=str(folder), **options), 0, f"{name}.pt", model, **data)
    return folder / f"{name}.pt", model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """--data of each kind that has a score."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "images", train=16, val=32)
    write_segmentation(folder / "labels", train=1, val=2)
    write_videos(folder / "videos", train=1, test=1)
    return {"classifier": folder / "images", "segmenter": folder / "labels",
            "tracker": f"lasot={folder / 'videos'}"}


def in_onnx_runtime(path, inputs):
    """-> names of the inputs and outputs, outputs."""
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    names = [[x.name for x in nodes] for nodes in (session.get_inputs(), session.get_outputs())]
    outputs = session.run(None, {name: x.numpy() for name, x in zip(names[0], inputs)})
    return names, [torch.from_numpy(y) for y in outputs]


@ONNX
@pytest.mark.parametrize("name, options, keep_rate", (
    ("encoder", "", None), ("classifier", "--uint8 --int8", None), ("rpe", "", None),
    ("hiera", "", None), ("segmenter", "--uint8", None), ("tracker", "--int8", 1),
    ("tracker", "--uint8 --keep-rate 0.5", 0.5)))
def test_a_network_in_onnx_runtime_is_that_of_the_file(name, options, keep_rate, data, tmp_path,
                                                       capsys):
    """For any batch, in float32 and of pixels, and its score on data, too."""
    file, model = write(tmp_path, name)
    scored = ["--data", data[name]] if name in data and keep_rate != 0.5 else []
    here(export, file, tmp_path / name, "--rounds", 1, *options.split(), *scored)
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.startswith("PyTorch  ")]
    others = [line.split() for line in said.splitlines() if line.startswith("ONNX Runtime  ")]
    assert len(rows) == len(others) == 1 + bool(scored)
    if scored:    # the score of both is the same
        assert rows[1][1:3] == others[1][2:4], said
    sides = {"tracker": (16, 64), "hiera": (64,)}.get(name, (32,))
    for batch in (1, 2, 5):
        pixels = [torch.randint(256, (batch, 3, side, side), dtype=torch.uint8) for side in sides]
        images = [normalize(x, MEAN, STD) for x in pixels]
        names, outputs = in_onnx_runtime(tmp_path / f"{name}.onnx",
                                         pixels if "--uint8" in options else images)
        with torch.no_grad():
            truth = model(*images, *[keep_rate] * (name == "tracker"))
        truth = truth if isinstance(truth, tuple) else [truth]
        assert len(outputs) == len(truth)
        bound = 1e-4 if name == "tracker" else 1e-5    # five convolutions of large weights
        assert all(rel_error(a, b) < bound for a, b in zip(outputs, truth))
    if "--int8" in options:
        _, small = in_onnx_runtime(tmp_path / f"{name}.int8.onnx",
                                   pixels if "--uint8" in options else images)
        assert 1e-5 < rel_error(small[0], truth[0]) < 0.3
    inputs = ["template", "search"] if name == "tracker" else ["images"]
    kind = "classifier" if name in ("rpe", "hiera") else name
    assert names == [inputs, export.OUTPUTS[kind]]


@pytest.mark.parametrize("name", ("encoder", "classifier", "rpe", "hiera", "hiera_encoder"))
@pytest.mark.parametrize("library", ("timm", "transformers"))
def test_the_printed_line_reads_the_model_in_its_library(library, name, tmp_path, capsys):
    module = pytest.importorskip(library)
    file, model = write(tmp_path, name)
    if library == "transformers" and "hiera" in name:
        with pytest.raises(InputError, match="takes a ViT: for Hiera give --to timm"):
            here(export, file, tmp_path / "out", "--to", library)
        return
    here(export, file, tmp_path / "out", "--to", library)
    line, text = capsys.readouterr().out.splitlines()[-2:]
    assert line.startswith(f"{library}.") and text.startswith("largest difference ")
    peer = eval(line, {library: module}).eval()
    images = torch.randn(2, 3, *model.img_size)
    with torch.no_grad():
        truth = model(images)
        if "encoder" in name:
            found = peer.forward_features(images) if library == "timm" else peer(images)[0]
        else:
            found = peer(images) if library == "timm" else peer(images)["logits"]
    assert rel_error(found.reshape(truth.shape), truth) < 1e-5

    if library == "timm":
        pixels = module.data.resolve_model_data_config(peer)
        assert (tuple(pixels["mean"]), tuple(pixels["std"])) == (MEAN, STD)
        assert pixels["input_size"] == (3, *model.img_size) and pixels["crop_pct"] == 0.875
    else:
        processor = module.AutoImageProcessor.from_pretrained(tmp_path / "out")
        assert (tuple(processor.image_mean), tuple(processor.image_std)) == (MEAN, STD)
        image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
        assert processor(image, return_tensors="pt")["pixel_values"].shape[2:] == model.img_size
        if name == "classifier":
            assert peer.config.id2label[3] == sorted(map(class_folder, range(CLASSES)))[3]


@pytest.mark.parametrize("name", ("encoder", "classifier", "rpe", "segmenter"))
def test_pnnx_and_ncnn_read_the_file(name, tmp_path, capsys):
    """What pnnx cannot convert it leaves out with a line, and ncnn then does not load it."""
    pnnx = pytest.importorskip("pnnx")
    ncnn = pytest.importorskip("ncnn")
    file, model = write(tmp_path, name)
    here(export, file, tmp_path / "out", "--to", "ncnn")
    line = capsys.readouterr().out.splitlines()[-2]
    _, *words = line.split()
    subprocess.run([pnnx.EXEC_PATH, *words, "fp16=0"], check=True, cwd=tmp_path)
    net = ncnn.Net()
    net.load_param(str(tmp_path / "out.ncnn.param"))
    net.load_model(str(tmp_path / "out.ncnn.bin"))
    image = torch.randn(1, 3, 32, 32)
    with net.create_extractor() as extractor, torch.no_grad():
        extractor.input("in0", ncnn.Mat(image[0].numpy()).clone())
        found = torch.from_numpy(np.array(extractor.extract("out0")[1]))
        assert rel_error(found, model(image)[0]) < 1e-3


@ONNX
@needs("openvino")
def test_openvino_reads_the_network(tmp_path):
    """In a process of its own: in this one, a later test crashed after it (Python 3.11.7)."""
    file, _ = write(tmp_path, "rpe")
    code = "import sys; sys.path[:0] = ['.', 'tests/tools']; import export, models; " \
           f"models.MODELS['small'] = {models.MODELS['small']}; " \
           "export.main(export.parse_args(sys.argv[1:]))"
    done = run("-c", code, file, tmp_path / "out", "--openvino", "--rounds", 1)
    rows = [line for line in done.stdout.splitlines() if line.startswith("OpenVINO")]
    assert "f32" in rows[0] and float(rows[0].split()[3]) < 1e-5


def test_wrong_input_ends_in_one_sentence(tmp_path, monkeypatch):
    encoder, _ = write(tmp_path, "encoder")
    classifier, _ = write(tmp_path, "classifier")
    segmenter, _ = write(tmp_path, "segmenter")
    tracker, _ = write(tmp_path, "tracker")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("sys"))
    for options, message in (
            ([tmp_path / "none.pt"], "does not exist"),
            ([encoder, "--data", "x"], "is an encoder, which has no score: leave out --data"),
            ([encoder, "--keep-rate", 0.7], "is no tracker: leave out --keep-rate"),
            ([segmenter, "--mean", 0.5, 0.5, 0.5], "is a segmenter and stores its sizes"),
            ([tracker, "--image-size", 64], "is a tracker and stores .* --image-size"),
            ([segmenter, "--to", "timm"], "takes an encoder or a classifier: .* is a segmenter"),
            ([tracker, "--to", "ncnn"], "neither the tracker nor Hiera converts")):
        with pytest.raises(InputError, match=message):
            here(export, options[0], tmp_path / "out", *options[1:])
    for out, options, message in (("encoder", ["--to", "ncnn"], "would overwrite .*encoder.pt"),
                                  ("encoder.pt", ["--to", "timm"], "is a file: give a folder")):
        with pytest.raises(InputError, match=message):
            here(export, encoder, tmp_path / out, *options)
    with pytest.raises(SystemExit):
        here(export, classifier, tmp_path / "out", "--to", "timm", "--int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for to, packages in (("onnx", "onnx onnxscript onnxruntime"), ("timm", "timm safetensors"),
                         ("transformers", "transformers safetensors")):
        with pytest.raises(InputError, match=f"needs more packages: pip install {packages}$"):
            here(export, classifier, tmp_path / "out", "--to", to)


def test_help_needs_no_package():
    """The packages are imported where they are used."""
    block = "import sys; sys.modules.update(dict.fromkeys({}, None)); import runpy; " \
            "sys.argv = ['export.py', *{}]; runpy.run_path('tests/tools/export.py', " \
            "run_name='__main__')"
    packages = ["onnx", "onnxscript", "onnxruntime", "openvino", "timm", "transformers",
                "safetensors"]
    done = subprocess.run([sys.executable, "-c", block.format(packages, ["--help"])], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "--int8" in done.stdout, done.stderr
