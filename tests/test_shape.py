"""The shape of the repository: what the scripts import, repeat, and how long they are."""
import ast
import importlib
import io
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

TRAINING = ("pretrain_d2mae", "finetune", "segment", "track")
SCRIPTS = (*TRAINING, "analyze")
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}


def text_of(name):
    return (ROOT / f"{name}.py").read_text()


def tree_of(name):
    return ast.parse(text_of(name))


def code_tokens(name):
    """Tokens without comments and docstrings, so that packing lines wins nothing."""
    docstrings = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node):
                docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text_of(name)).readline)
    return [token for token in tokens
            if token.type not in SILENT and token.start[0] not in docstrings]


def test_top_level_is_that_of_the_readme():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    top = {name.split("/")[0] for name in done.stdout.splitlines()}
    assert top <= {"models.py", *(f"{name}.py" for name in SCRIPTS), "tests", "README.md",
                   "requirements.txt", "LICENSE", ".gitignore", ".ci"}
    assert {path.stem for path in ROOT.glob("*.py")} == {"models", *SCRIPTS}


@pytest.mark.parametrize("name", ("models", *SCRIPTS))
def test_a_script_imports_five_packages_and_twenty_names_of_models(name):
    allowed = {"torch", "torchvision", "numpy", "PIL", "tqdm"} | set(sys.stdlib_module_names)
    if name != "models":
        allowed |= {"models"}
    shared = 0
    for node in ast.walk(tree_of(name)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            shared += len(node.names) * (node.module == "models")
        assert {n.split(".")[0] for n in names} <= allowed, names
    assert shared <= 20


@pytest.mark.parametrize("word", [".cuda(", "weights_only=False", "register_forward_hook",
                                  "SIGTERM", "(default: None)"])
def test_no_script_contains(word):
    assert not [name for name in ("models", *SCRIPTS) if word in text_of(name)]


@pytest.mark.parametrize("name", TRAINING)
def test_the_loop_is_the_one_that_every_reader_knows(name):
    [train] = [node for node in tree_of(name).body if getattr(node, "name", "") == "train"]
    assert train.end_lineno - train.lineno < 60
    loops = [node for node in ast.walk(train) if isinstance(node, ast.For)]
    batches = next(loop for loop in loops if "enumerate(bar)" in ast.unparse(loop.iter))
    assert batches.end_lineno - batches.body[0].lineno < 35
    text = ast.unparse(train)
    order = ["init_distributed(args", "train_loader(", "resume(args", "for epoch in range(",
             "set_epoch(epoch)", ".train()", "enumerate(bar)", "torch.autocast(", ".backward()",
             "scaler.unscale_(", "clip_grad_norm_(", "scaler.step(", "zero_grad(", "log(args",
             "save(args"]
    places = [text.find(part) for part in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_nothing_and_shows_no_missing_default(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "default: None" not in text and "usage:" in text


@pytest.mark.parametrize("name", TRAINING)
def test_options_are_few_and_those_of_all_scripts(name):
    parser_text = text_of(name)
    count = parser_text.count('add("--') + text_of("models").count('add("--')
    assert 0 < count <= 36
    args = importlib.import_module(name).parse_args([])
    shared = {"out", "no_resume", "accum_steps", "clip_grad", "workers", "device", "dtype", "seed",
              "log_every", "eval_every", "skip_corrupt", "batch_size", "data", "model"}
    assert shared <= vars(args).keys()


def test_six_scripts_read_in_one_sitting():
    total = lines = 0
    for name in ("models", *SCRIPTS):
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, (name, node.name)
        tokens = code_tokens(name)
        rows = len({token.start[0] for token in tokens})
        assert len(tokens) / rows <= 12.0, name
        wide = [line for line in text_of(name).splitlines() if len(line) > 100]
        assert not wide, (name, wide)
        total += len(tokens)
        lines += rows
    assert total <= 37_350 and lines <= 3_250, (total, lines)
