"""Claims about the shape of the project: which files there are, how long they are, who imports whom.

    lab  ->  train, evaluate  ->  regime, guidance, sampler, structure_reg, model, data  ->  parts

Imports are read from the source (ast), also those inside functions. The rules are checked on made-up trees
too: a rule that never refuses anything would say nothing.
"""
import ast
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

MECHANISMS = {"regime", "guidance", "sampler", "structure_reg"}
CONCEPTS = MECHANISMS | {"model", "data"}
TOP = CONCEPTS | {"train", "evaluate"}
FOLDERS = ("parts", "lab")

# Modules without a test file of their own name: the file that tests them, and why it is another one.
TESTED_IN = {
    "parts.commands": ("test_evaluate", "a command line is tested by its commands"),
    "parts.components": ("test_pretrained", "each pretrained part is opened through it"),
    "parts.previews": ("test_evaluate", "previews need a model"),
}
# Worker processes import these: torch would cost each of them seconds.
WITHOUT_TORCH = ("parts.synths", "parts.soundworld", "parts.cache", "parts.audio", "parts.errors",
                 "parts.files", "parts.audio_files", "parts.arguments")


# --- reading imports ------------------------------------------------------------------------------------

def modules_of(root: Path) -> dict[str, Path]:
    """{dotted name: file} of the top level and the folders."""
    found = {path.stem: path for path in root.glob("*.py")}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def names_imported(node: ast.AST, package: str) -> list[str]:
    """Dotted names that an import statement may mean: `from a import b` is a.b or a name in a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = [package] if node.level else []
    base += [node.module] if node.module else []
    return [".".join([*base, alias.name]) for alias in node.names]


def imports_of(path: Path, package: str = "", top_level: bool = False) -> set[str]:
    """Dotted names that a file imports; top_level: without those inside functions."""
    found, left = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        found.update(names_imported(node, package))
        if not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            left += ast.iter_child_nodes(node)
    return found


def graph_of(root: Path, top_level: bool = False) -> dict[str, set[str]]:
    """{module: modules of the project that it imports}."""
    modules, graph = modules_of(root), {}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = imports_of(path, package, top_level)
        # The name itself, or what it is a name in.
        meant = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (meant & set(modules)) - {module}
    return graph


def layer(module: str) -> int:
    """0: parts; 1: the six concept files; 2: train and evaluate; 3: lab."""
    if module.partition(".")[0] in FOLDERS:
        return 3 * (module.partition(".")[0] == "lab")
    return 1 if module in CONCEPTS else 2


def arrows_upwards(graph: dict[str, set[str]]) -> list[str]:
    return sorted(f"{module} -> {other}" for module, others in graph.items() for other in others
                  if layer(other) > layer(module))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other round; [] where none do."""
    left = dict(graph)
    while True:
        free = [module for module, others in left.items() if not others & set(left)]
        if not free:
            return sorted(left)
        for module in free:
            del left[module]


def reachable(graph: dict[str, set[str]], module: str) -> set[str]:
    """The module and all that importing it imports."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {other for known in new for other in graph[known]} - found
    return found


# --- who imports whom -----------------------------------------------------------------------------------

def test_the_top_level_holds_the_eight_modules_of_the_paper_and_nothing_else():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP


def test_arrows_go_down_and_never_round():
    graph = graph_of(ROOT)
    assert arrows_upwards(graph) == []
    assert circle(graph) == []
    assert not any(other.startswith("lab") for module, others in graph.items() for other in others
                   if not module.startswith("lab"))


def test_concept_modules_import_no_other_concept():
    """The four mechanism files import no project file; model.py knows neither data nor training."""
    graph = graph_of(ROOT)
    assert all(graph[module] == set() for module in MECHANISMS)
    for module in ("model", "data"):
        assert all(other.startswith("parts") for other in graph[module]), module
    assert {"train", "evaluate"} <= graph["lab.bench"] and "data" in graph["train"], "they are read at all"


def test_workers_start_without_torch_and_the_default_path_without_libraries_that_it_does_not_need():
    graph, modules = graph_of(ROOT, top_level=True), modules_of(ROOT)

    def libraries(module):
        files = [modules[name] for name in reachable(graph, module)]
        return {name.partition(".")[0] for path in files for name in imports_of(path, top_level=True)}

    for module in WITHOUT_TORCH:
        assert not libraries(module) & {"torch", "torchaudio", "einops", "transformers"}, module
    needed = libraries("train") | libraries("evaluate")
    assert "torch" in needed and not needed & {"soundfile", "transformers", "matplotlib", "safetensors"}


def write_tree(root: Path, **changed: str) -> Path:
    """A project in small whose arrows are right, but for what is changed (file name, without .py: source)."""
    sources = {"parts/__init__": "", "lab/__init__": "", "parts/errors": "", "parts/audio": "import torch",
               "parts/codec": "from .errors import UserError\nfrom parts import audio",
               "model": "import parts.codec\nfrom parts.errors import x", "regime": "import numpy as np",
               "train": "import model\nimport evaluate", "evaluate": "from model import DiT",
               "lab/bench": "import train\nfrom lab import tables", "lab/tables": ""}
    for name, source in {**sources, **changed}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text(source + "\n")
    return root


@pytest.mark.parametrize("changed, upwards, round_trip", [
    ({}, [], []),
    ({"parts/audio": "import model"}, ["parts.audio -> model"], ["model", "parts.audio", "parts.codec"]),
    ({"model": "def f():\n    from evaluate import Run"}, ["model -> evaluate"], ["evaluate", "model"]),
    ({"evaluate": "def f():\n    from lab.tables import x"}, ["evaluate -> lab.tables"], []),
    ({"evaluate": "from lab import tables"}, ["evaluate -> lab.tables"], []),
    ({"parts/errors": "class A:\n    def f(self):\n        import train"}, ["parts.errors -> train"],
     ["evaluate", "model", "parts.codec", "parts.errors", "train"]),
    ({"lab/tables": "from . import bench"}, [], ["lab.bench", "lab.tables"]),
    ({"evaluate": "if True:\n    import train"}, [], ["evaluate", "train"]),
])
def test_negative_control_an_arrow_upwards_and_a_circle_are_found(tmp_path, changed, upwards, round_trip):
    graph = graph_of(write_tree(tmp_path, **changed))
    assert arrows_upwards(graph) == upwards
    assert set(circle(graph)) >= set(round_trip) and bool(circle(graph)) == bool(round_trip)


def test_imports_inside_functions_are_told_from_those_of_the_module(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("try:\n    import a\nexcept ImportError:\n    from b import c\nclass D:\n    import d\n"
                    "    def f(self):\n        import e\n")
    assert imports_of(file, top_level=True) == {"a", "b.c", "d"}
    assert imports_of(file) == {"a", "b.c", "d", "e"}


# --- sizes and style ------------------------------------------------------------------------------------

def too_long(files, lines: int = 650, columns: int = 110) -> list[str]:
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8").splitlines()
        found += [f"{path}: {len(text)} lines"] * (len(text) > lines)
        found += [f"{path}:{k}" for k, line in enumerate(text, 1) if len(line) > columns]
    return found


def test_no_file_and_no_line_is_too_long(tmp_path):
    assert too_long([*modules_of(ROOT).values(), *(ROOT / "tests").glob("*.py")]) == []
    file = tmp_path / "x.py"
    file.write_text("x" * 111 + "\n" + "\n" * 650)
    assert too_long([file]) == [f"{file}: 651 lines", f"{file}:1"], "negative control"


def test_what_the_paper_is_about_is_read_in_an_afternoon():
    """Some two thousand lines at the top level."""
    lengths = {module: len((ROOT / f"{module}.py").read_text().splitlines()) for module in TOP}
    assert sum(lengths.values()) <= 2_200, lengths


def test_every_module_begins_with_what_it_is_for():
    for module, path in modules_of(ROOT).items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if path.name != "__init__.py":
            assert len(docstring.split()) >= 8 and not docstring.startswith("TODO"), module


def test_ruff_finds_nothing():
    ruff = shutil.which("ruff")
    if ruff is None or subprocess.run([ruff, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("ruff is not installed")
    command = [ruff, "check", "--no-cache", "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- tests ----------------------------------------------------------------------------------------------

def test_every_module_has_its_tests():
    """A file of its name, or one that TESTED_IN names with a reason."""
    modules = {module for module, path in modules_of(ROOT).items() if path.name != "__init__.py"}
    files = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    own = {module for module in modules if f"test_{module.rpartition('.')[2]}" in files}
    assert modules - own - set(TESTED_IN) == set(), "not tested"
    assert set(TESTED_IN) <= modules - own, "gone, or tested by name meanwhile"
    assert {file for file, _ in TESTED_IN.values()} <= files
    assert len({module.rpartition(".")[2] for module in modules}) == len(modules), "two of one name"
