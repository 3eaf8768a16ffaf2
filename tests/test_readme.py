"""The README and the pages of docs/ do what they say: their commands run (with few steps), their snippets
work as they stand, and the results, files, functions and pages that they name exist."""
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, in_process

from lab import experiments
from parts.audio import write_wav
from parts.band_limit import band_limit
from parts.config import Config
from parts.soundworld import SoundWorld

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXT = "\n".join(PAGES.values())


def code_blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each."""
    return re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL)


BLOCKS = [block for page in PAGES.values() for block in code_blocks(page)]
SHELL = [line for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = list(dict.fromkeys(part.split("#")[0].strip() for line in SHELL for part in line.split("&&")))
CONCEPTS = ("regime", "guidance", "sampler", "structure_reg", "model", "data", "train", "evaluate")
# What a command is too long, or too far from this machine, to run here -> what runs it in small.
ELSEWHERE = {
    "pip install": ".ci/run",
    "pytest": ".ci/run",
    "torchrun": "test_two_processes_with_half_the_batch_each_are_one_process_with_all_of_it",
    "lab.score_codec models/": "test_the_round_trip_of_a_latent_space_is_scored_before_anything_is_trained",
    "models/": "test_pretrained_parts_in_every_slot_train_score_and_are_used_from_their_run_folder",
    "lab.bench --out": "test_the_benchmark_runs_and_says_what_it_measured",
    "lab.check_device": "test_the_check_of_a_device_passes_on_this_one",
    "lab.report": "test_a_report_is_one_page_that_asks_nobody_and_cannot_be_written_into",
}


def flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def flags(settings: dict) -> list[str]:
    """Settings of train.py as they are typed."""
    return [text for name, value in settings.items() for text in (flag(name), str(value))]


# --- commands

@pytest.fixture
def workplace(tmp_path, t2a_run, sr_run):
    """A folder with what the commands of the pages take for granted: two runs, a muffled file,
    recordings."""
    for name, run in (("t2a", t2a_run), ("sr", sr_run)):
        shutil.copytree(run, tmp_path / "runs" / name)
    rng = np.random.default_rng(0)
    write_wav(tmp_path / "muffled.wav", band_limit(SoundWorld("val", 1).wave(0), 2_000))
    for folder in ("my_folder", "audiocaps", "clotho"):
        (tmp_path / folder).mkdir()
        rows = ["file_name,caption,fold"]
        for i in range(20):
            noise = 0.1 * rng.standard_normal(16_000).astype(np.float32)
            write_wav(tmp_path / folder / f"{i}.wav", noise)
            rows.append(f"{i}.wav,a hiss number {i},{1 + i % 5}")
        (tmp_path / folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    return tmp_path


def in_small(module: str, argv: list[str], where: Path) -> list[str]:
    """The command with few steps and clips, writing where tests may write."""
    if module == "train":
        argv = ["14" if before == "--steps" else word for before, word in zip(["", *argv], argv)]
        few = {"workers": 0} if "--resume" in argv else {**TINY, "steps": 3, "eval_every": 3}
        acts = {"variants": "sr" in argv, "clips": "--data" not in argv or "soundworld" in " ".join(argv)}
        few = {name: value for name, value in few.items() if acts.get(name, True)}
        return argv + flags({name: value for name, value in few.items() if flag(name) not in argv})
    if module == "lab.figures":
        return ["mechanism", "density", "--out", str(where)]
    if module == "lab.experiments" and argv[0] == "run":
        return [*argv, "--dry-run"]
    if module == "evaluate" and argv[0] == "score":
        return [*argv, "--clips", "8"]
    if module == "evaluate" and argv[0] == "export":
        return [*argv[:2], str(where / "exported")]
    return argv


def module_and_arguments(command: str) -> tuple[str, list[str]]:
    """`python FILE.py ARGV` or `python -m lab.NAME ARGV` -> the module's name, ARGV."""
    python, *words = shlex.split(command)
    assert python == "python"
    if words[0] == "-m":
        assert words[1].startswith("lab.")
        return words[1], words[2:]
    assert (ROOT / words[0]).is_file()
    return Path(words[0]).stem, words[1:]


@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(word in c for word in ELSEWHERE)])
def test_every_command_runs(command, workplace, request, monkeypatch):
    """With few steps, in a folder that holds what the pages take for granted."""
    name, argv = module_and_arguments(command)
    if name == "train":  # what a run ends with has tests of its own
        request.getfixturevalue("bare")
        monkeypatch.setattr(torch, "compile", lambda net, **options: net)
    if name == "lab.experiments":  # test_a_dry_run_tells_arms_and_hours_and_leaves_nothing measures them
        monkeypatch.setattr(experiments, "estimate_hours", lambda options: float(len(options)))
    done = in_process(importlib.import_module(name), *in_small(name, argv, workplace), cwd=workplace)
    assert done.returncode == 0, done.stderr[-500:]


def commands_of(script: str) -> list[str]:
    """The python commands of a shell script, with its settings filled in."""
    settings = dict(re.findall(r'^(\w+)="(.*)"$', script, re.MULTILINE))
    commands = [line for line in script.replace("\\\n", "").splitlines() if line.startswith("python")]
    for name, text in settings.items():
        commands = [line.replace(f"${name} ", text + " ") for line in commands]
    return commands


def test_the_script_at_full_length_asks_for_the_arms_and_settings_of_the_recorded_results(monkeypatch):
    """Of seeds and arms some may be left to run."""
    asked = {}
    monkeypatch.setattr(experiments, "cmd_run", lambda args: asked.update({args.out: experiments.plan(args)}))
    for line in commands_of((ROOT / "results/full.sh").read_text()):
        python, _, module, *argv = shlex.split(line)
        assert (python, module) == ("python", "lab.experiments")
        monkeypatch.setattr(sys, "argv", [module, *argv])
        experiments.main()
    assert len(asked) == 9
    for out, (arms, _, seeds, reference) in asked.items():
        recorded = json.loads((ROOT / out / "experiment.json").read_text())
        assert recorded["reference"] == reference and set(recorded["seeds"]) <= set(seeds), out
        for arm, options in recorded["arms"].items():
            assert options.items() >= arms[arm].items(), (out, arm)


def test_the_script_behind_the_tables_asks_for_what_the_recorded_results_hold():
    """Its commands are those of an earlier commit, which it names; folders, seeds and steps are those of
    experiment.json."""
    script = (ROOT / "results/tables.sh").read_text()
    assert re.search(r"git checkout [0-9a-f]{7}", script)
    commands = commands_of(script)
    for line in commands:
        asked = {name: int(value) for name, value in re.findall(r"--(seeds|first-seed|steps) (\d+)", line)}
        recorded = json.loads((ROOT / line.split("--out ")[1] / "experiment.json").read_text())
        first = asked.get("first-seed", 0)
        assert recorded["seeds"] == list(range(first, first + asked["seeds"])), line
        assert {arm["steps"] for arm in recorded["arms"].values()} == {asked["steps"]}, line
    assert len(commands) == 8


def known_flags(module: str) -> set[str]:
    """The flags that a command takes."""
    if module == "train":
        return {flag(f.name) for f in dataclasses.fields(Config)} | {"--resume", "--help"}
    file = "parts/commands.py" if module == "evaluate" else module.replace(".", "/") + ".py"
    found = set(re.findall(r'add_argument\("(--[a-z0-9-]+)"', (ROOT / file).read_text()))
    if module == "lab.experiments":
        found |= {flag(name) for name in experiments.COMMON}
    return found


def test_commands_that_do_not_run_here_are_few_and_their_flags_exist():
    """Every flag in every command of the pages is known; what is not run above is run in small by the test
    that ELSEWHERE names."""
    commands = re.findall(r"(?:python -m|python|torchrun \S+) (lab\.[a-z_]+|[a-z_]+\.py)([^\n`#]*)", TEXT)
    commands = [(name.removesuffix(".py"), rest) for name, rest in commands]
    labs = ("experiments", "report", "train_judges", "figures", "score_codec", "bench", "estimate",
            "pretrain_teacher", "probe_teacher", "regime_choice", "block_work", "score_cutoff",
            "check_device", "train_decoder", "score_decoder", "result_tables")
    assert len(commands) > 30
    assert {name for name, _ in commands} == {"train", "evaluate", *(f"lab.{name}" for name in labs)}
    for name, rest in commands:
        typed = set(re.findall(r"(?<!\S)--[a-z0-9-]+", rest))
        assert typed <= known_flags(name), (name, rest)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py") if path != Path(__file__))
    for name in ELSEWHERE.values():
        assert f"def {name}(" in tests or (ROOT / name).exists(), name
    assert sum(any(word in command for word in ELSEWHERE) for command in COMMANDS) <= 14


# --- snippets

def test_the_ten_lines_about_the_regime_run_as_they_stand():
    """The snippet of docs/method.md, in a trainer whose network learns until step 64."""
    code = re.search(r"```python\n(from regime import .*?)```", TEXT, re.DOTALL).group(1)
    assert len(code.splitlines()) <= 10
    x0, eps, other = torch.randn(8, 4, 6), torch.randn(8, 4, 6), torch.randn(8, 4, 6)
    seen = []

    def predict(x_t, t):
        """x0_hat = eps - v: from `other` to x0 while log2 k goes from 0 to 6."""
        share = min(1.0, np.log2(max(1, len(seen))) / 6)
        return eps - (share * x0 + (1 - share) * other)

    def train_step(weight_of_my_auxiliary_loss):
        seen.append(weight_of_my_auxiliary_loss)
    exec(code, {"K": 1_024, "predict": predict, "extract": lambda z: z, "x0": x0, "eps": eps, "mean": None,
                "train_step": train_step})
    assert len(seen) == 1_024 and seen[0] == 1.0 and seen[-1] < 0.1


# --- what the pages name

def test_the_table_of_files_counts_their_lines():
    """So that it says what a reader will meet; a twentieth of slack, or it would be wrong after every
    commit."""
    rows = re.findall(r"^\| `(\w+\.py)` \|[^|]*\| (\d+) \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == [f"{name}.py" for name in CONCEPTS]
    assert {path.name for path in ROOT.glob("*.py")} == {name for name, _ in rows}
    for name, said in rows:
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(int(said) - lines) <= 0.05 * lines, (name, said, lines)
    assert len(README.splitlines()) < 110


def test_the_readme_is_read_in_four_minutes():
    """At most 900 words, with the answer in the first paragraph and one picture before the first command."""
    assert len(README.split()) <= 900
    paragraphs = README.split("\n\n")
    assert "honest answer" in paragraphs[1] and "was no better than" in paragraphs[1]
    assert README.index("assets/mechanism.png") < README.index("```")


def test_every_module_is_named_and_every_name_exists():
    """Modules of parts/ and lab/, each in docs/files.md, and functions of the eight files, by their full
    names."""
    named = set(re.findall(r"`((?:parts|lab)/\w+\.py)`", PAGES[ROOT / "docs/files.md"]))
    there = {f"{folder}/{path.name}" for folder in ("parts", "lab") for path in (ROOT / folder).glob("*.py")
             if path.name != "__init__.py"}
    assert named == there
    example = {"parts/dropping.py"}                        # of docs/teaching.md
    assert set(re.findall(r"(?:parts|lab)/\w+\.py", TEXT)) == there | example
    functions = re.findall(rf"`({'|'.join(CONCEPTS)})\.(\w+)`", TEXT)
    functions = [(module, name) for module, name in functions if name != "py"]
    assert len(functions) >= 10
    for module, name in functions:
        assert hasattr(importlib.import_module(module), name), (module, name)
    lines = re.findall(r"\[`(\w+)\.(\w+)`\]\(\.\./(\w+)\.py#L(\d+)\)", TEXT)
    assert len(lines) >= 12
    for module, name, file, line in lines:
        _, defined = inspect.getsourcelines(getattr(importlib.import_module(module), name))
        assert module == file and int(line) == defined, (module, name, line, defined)


def test_results_behind_the_readme_exist():
    """Recorded files can be read; every path in results/ or assets/ that the text names leads somewhere."""
    for name in re.findall(r"results/[\w./-]+\.jsonl?", TEXT):
        text = (ROOT / name).read_text()
        documents = text.splitlines() if name.endswith("l") else [text]
        assert all(json.loads(document) for document in documents), name
    named = re.findall(r"`((?:results|assets)/[\w./*-]+)`", TEXT)
    assert len(named) > 30
    for name in named:
        assert list(ROOT.glob(name.rstrip("/"))), name


def anchors(page: str) -> set[str]:
    """What a link may name behind #: the page's headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_lead_to_what_exists(page):
    """Relative ones: to a file of the project and, behind #, to one of its headings."""
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert links
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists() and target.is_relative_to(ROOT), (page.name, link)
        if anchor and target in PAGES:
            assert anchor in anchors(PAGES[target]), (page.name, link)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_picture_has_a_caption_that_readers_see(page):
    """In the paragraph after it, in italics, with the command that draws it."""
    paragraphs = PAGES[page].split("\n\n")
    for picture, after in zip(paragraphs, [*paragraphs[1:], ""]):
        if picture.strip().startswith("!["):
            assert re.fullmatch(r"\*[^*].*`python .+`.*\*", after.strip(), re.DOTALL), (page.name, picture)


def test_the_readme_leads_to_every_page_and_to_how_a_mechanism_is_added():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert set(PAGES) - {ROOT / "README.md"} <= linked
    assert re.search(r"^\| [^|]*add a mechanism[^|]*\| [^|]*\(docs/teaching\.md", README, re.MULTILINE)


def test_the_short_result_is_that_of_the_page_of_results():
    """Each number with its interval in README's four rows stands in docs/results.md as well."""
    short = re.search(r"^## Results\n(.*?)^## ", README, re.DOTALL | re.MULTILINE).group(1)
    assert len(re.findall(r"^\| ", short, re.MULTILINE)) == 5, "a head and four rows"
    numbers = re.findall(r"[-+]?[\d.]+ \[[^\]]+\](?!\()", short)
    assert len(numbers) == 6
    for number in numbers:
        assert number in PAGES[ROOT / "docs/results.md"], number


def test_the_bands_of_a_normal_run_are_those_of_the_recorded_check():
    """D, r and progress of docs/normal.md, step by step."""
    page = PAGES[ROOT / "docs/normal.md"]
    for task, file, heading in (("t2a", "check-6000", "| captions:"), ("sr", "check", "| super-resolution:")):
        check = json.loads((ROOT / f"results/regime/{file}.json").read_text())
        head, _, *rows = page[page.index(heading):].split("\n\n")[0].splitlines()
        steps = [cell.strip().replace(",", "").removeprefix("step ") for cell in head.split("|")[2:-1]]
        bands = check[task]["ranges"]
        assert list(bands) == steps and len(rows) == 3
        for row, name in zip(rows, ("D", "r", "progress")):
            said = [cell.strip() for cell in row.split("|")[2:-1]]
            assert said == ["{:.2f} to {:.2f}".format(*bands[step][name]) for step in steps], (task, name)


# A stranger's question, as README's table words it -> what the first screen behind its link has to say.
QUESTIONS = {
    "Does it pay": "No gain was found",
    "How is it judged": "speed-up",
    "Is my run normal": "the least and the most of several default runs",
    "What does the method say, where": "regime.py#L",
    "what is assumed": "ASSUMED",
    "use r in my own trainer": "from regime import",
    "train on my recordings": "--data my_folder",
    "publish a model": "evaluate.py export",
    "teach with it": "STEPS",
    "add a mechanism": "git apply",
    "run my own comparison": "lab.experiments run",
    "resume": "--resume runs/t2a",
    "word mean": "symbol",
    "goes wrong": "Out of memory",
}
SCREEN = 4_500  # characters


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_strangers_question_is_answered_on_the_first_screen_of_a_page(question):
    row = next(line for line in README.splitlines() if line.startswith("|") and question in line)
    screens = ""
    for link in re.findall(r"\]\(([^)\s]+)\)", row):
        file, _, anchor = link.partition("#")
        text = (ROOT / file).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ .+$", text, re.MULTILINE)
        start = next(text.index(line) for line in headings if anchor in anchors(line)) if anchor else 0
        screens += text[start : start + SCREEN]
    assert QUESTIONS[question] in screens
