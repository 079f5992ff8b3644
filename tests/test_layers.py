"""Imports point down only."""

import ast

import pytest

from tests.conftest import ROOT

# A module may import from its own package and from lower layers.
LAYERS = (
    {"evaluation"},
    {"preparation", "training", "inference"},
    {"datasets", "models"},
    {"conversation", "html_page"},
    {"tokenizer", "text", "hub", "audio", "devices", "worker_processes"},
    {"files", "console", "signals", "resources", "audio_decoding"},
)
FILES = sorted((ROOT / "fish_speech").rglob("*.py"))


def layer(part):
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT / "fish_speech")))
def test_imports_point_down(file):
    own = file.relative_to(ROOT / "fish_speech").with_suffix("").parts[0]
    if own == "__init__":
        return
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "fish_speech":
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else node.names
            for module in (getattr(name, "name", name) or "" for name in modules):
                if module.startswith("fish_speech."):
                    imported.add(module.split(".")[1])
    wrong = {part for part in imported if part != own and layer(part) <= layer(own)}
    assert not wrong, f"{own} reaches up or aside to {wrong}"


@pytest.mark.parametrize("script", ["prepare_dataset", "finetune_tts", "cli_tts"])
def test_scripts_hold_no_tensors_and_import_nothing_heavy_at_once(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    top = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not top & {"torch", "lightning", "hydra", "whisper", "av", "numpy"}
    everywhere = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    assert "torch" not in everywhere
