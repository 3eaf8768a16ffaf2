"""Claims about the cache: filled once, by one process, and named by what it depends on."""
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from parts.cache import cache_dir, chunk_of, digest, fill_array, parallel_map


def row_once(indices, folder):
    """Rows i * 2; a chunk that is computed a second time is an error (its marker exists)."""
    (Path(folder) / f"made-{indices[0]}").open("x").close()
    time.sleep(0.01)
    return np.array([[i, i] for i in indices], np.float32) * 2


def fill(folder):
    rows = fill_array(Path(folder), "x", (200, 2), np.float32, row_once, 200, (folder,), chunk=10, workers=0)
    return float(rows.sum())


def test_two_processes_that_start_together_fill_a_cache_once(tmp_path):
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        sums = list(pool.map(fill, [str(tmp_path)] * 2))
    assert sums == [2 * 2 * sum(range(200))] * 2


def run_script(folder, code, **env):
    script = folder / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    return subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=100,
                          env={**os.environ, "STAGE_AUDIO_CACHE": str(folder / "cache"), **env})


RENDER = "from parts.soundworld import SoundWorld\nSoundWorld('val', 200, seconds=0.5).prepare(2)\n"


def test_a_script_without_a_guard_is_told_so_and_does_not_hang(tmp_path):
    done = run_script(tmp_path, RENDER)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    last = [line for line in done.stderr.splitlines() if line.startswith("parts.errors.UserError")]
    assert len(last) == 1 and "if __name__ == '__main__':" in last[0]
    guarded = "if __name__ == '__main__':\n    " + RENDER.replace("\n", "\n    ")
    assert run_script(tmp_path, guarded + "pass\n").returncode == 0


@pytest.mark.skipif(os.name != "posix", reason="HOME and user ids")
def test_the_cache_has_a_place_without_a_home_and_under_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STAGE_AUDIO_CACHE", "~/x")
    assert cache_dir() == tmp_path / "x"
    monkeypatch.delenv("STAGE_AUDIO_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for an unknown user
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache_dir() == tmp_path / f"stage-audio-{os.getuid()}"


def test_items_of_different_lengths_lie_one_after_the_other(tmp_path):
    lengths = [3, 0, 1, 2]
    where = np.concatenate([[0], np.cumsum(lengths)])

    def rows(indices):
        return np.concatenate([np.full(lengths[i], i) for i in indices])
    filled = fill_array(tmp_path, "x", (where[-1],), np.int64, rows, 4, chunk=2, workers=0, where=where)
    assert filled.tolist() == [0, 0, 0, 2, 3, 3]


def test_jobs_give_the_same_in_worker_processes_and_in_this_one():
    jobs = [1, 2, 3, 4, 5]
    here, there = (dict(parallel_map(divmod, jobs, (2,), workers)) for workers in (0, 2))
    assert here == there == {job: divmod(job, 2) for job in jobs}


def test_names_of_cache_entries_are_those_of_caches_that_exist():
    """If this fails, every cache is made again."""
    assert digest("a", 1, None, (2.5, "b")) == "1e03d434fc02f0bd"


def test_a_folder_whose_name_is_no_text_has_a_cache_entry_of_its_own():
    names = [os.fsdecode(name) for name in (b"caf\xe9", b"caf\xe8", "caf\u00e9".encode())]
    assert len({digest(name) for name in names}) == 3


def test_a_chunk_is_at_most_ten_minutes_of_sound_or_one_clip():
    assert [chunk_of([s * 16_000, 1]) for s in (1, 9, 60, 300, 599, 3_600)] == [64, 64, 10, 2, 1, 1]
