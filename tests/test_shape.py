"""The shape of the repository: what the scripts import, repeat, and how long they are."""
import ast
import importlib
import io
import sys
import tokenize

import pytest
from conftest import ROOT

TRAINING = ("pretrain_d2mae", "finetune", "segment", "track")
SCRIPTS = (*TRAINING, "analyze")
BANNER = "# Process group, sampler, log"


def text_of(name):
    return (ROOT / f"{name}.py").read_text()


def common_part(name):
    text = text_of(name)
    return text[text.index(BANNER):].split("\n# ----")[1]


def test_scripts_are_those_of_the_readme():
    assert {path.stem for path in ROOT.glob("*.py")} == {"models", *SCRIPTS}


@pytest.mark.parametrize("name", ("models", *SCRIPTS))
def test_a_script_imports_five_packages_and_models(name):
    allowed = {"torch", "torchvision", "numpy", "PIL", "tqdm"} | set(sys.stdlib_module_names)
    if name != "models":
        allowed |= {"models"}
    for node in ast.walk(ast.parse(text_of(name))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        assert {n.split(".")[0] for n in names} <= allowed, names


@pytest.mark.parametrize("word", [".cuda(", "weights_only=False", "register_forward_hook"])
def test_no_script_contains(word):
    assert not [name for name in ("models", *SCRIPTS) if word in text_of(name)]


def test_common_part_is_the_same_text_and_short():
    parts = {name: common_part(name) for name in TRAINING}
    assert len(set(parts.values())) == 1
    assert len(parts["track"].strip().splitlines()) <= 80


def test_schedule_is_the_same_text_where_it_is_used():
    schedules = [text_of(name).split("def lr_at(")[1].split("\n\n\n")[0]
                 for name in SCRIPTS if "def lr_at(" in text_of(name)]
    assert len(schedules) >= 2 and len(set(schedules)) == 1


@pytest.mark.parametrize("name", TRAINING)
def test_defaults_pass_their_own_checks(name):
    module = importlib.import_module(name)
    module.parse_args([])
    demo = module.parse_args(["--demo", "--out", "elsewhere"])
    assert demo.out == "elsewhere" and demo.demo


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_are_few(name):
    text = text_of(name)
    count = text.count('add("--')
    if "add_run_options(parser" in text:
        count += text_of("models").count('add("--')
    assert 0 < count <= 30


def test_six_scripts_read_in_one_sitting():
    """Size in tokens, without comments and docstrings, so that packing lines wins nothing."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER}
    total = 0
    for name in ("models", *SCRIPTS):
        text = text_of(name)
        docstrings = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                if ast.get_docstring(node):
                    docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, (name, node.name)
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        tokens = [token for token in tokens
                  if token.type not in silent and token.start[0] not in docstrings]
        assert len(tokens) / len({token.start[0] for token in tokens}) <= 12.0, name
        wide = [line for line in text.splitlines() if len(line) > 100]
        assert len(wide) <= 0.05 * len(text.splitlines()), name
        total += len(tokens)
    assert total <= 46_000
