"""What a run makes of its machine: memory, the home folder, processors, outputs and fonts."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from analysis.figures import save_figure
from engine import runtime
from processes import ROOT
from tools import cli

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Takes and frees 64 MB three times; counts the page faults of the last two, and the MB in huge pages.
PROGRAM = """
import ctypes, json, os, resource
from engine.runtime import configure_malloc
if "limit" in os.environ:
    resource.setrlimit(resource.RLIMIT_AS, (int(os.environ["limit"]),) * 2)
settings = configure_malloc()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def touch():
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch(), touch()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
huge = sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
print(json.dumps([settings, faults, huge / 1024]))
"""


def run(**environment: str) -> tuple[dict[str, str], int, float]:
    """Return the settings taken, the page faults and the MB in huge pages."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env={**given, **environment}, check=True,
                          capture_output=True, text=True, timeout=60)
    return tuple(json.loads(done.stdout))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library")
def test_freed_pages_are_used_again() -> None:
    settings, faults, _ = run()
    assert settings.items() >= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}.items()
    _, from_environment, _ = run(**settings)
    assert max(faults, from_environment) < 100


@pytest.mark.skipif(not HUGE_PAGES.is_file() or "[madvise]" not in HUGE_PAGES.read_text(),
                    reason="huge pages on request")
def test_memory_comes_in_huge_pages() -> None:
    settings, _, huge = run()
    assert settings["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1" and huge > 32
    assert run(**settings)[2] > 32
    settings, _, huge = run(limit="8000000000")
    assert "GLIBC_TUNABLES" not in settings and huge < 32, "addresses are scarce under a limit"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library")
@pytest.mark.parametrize("chosen", [{"MALLOC_MMAP_MAX_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}])
def test_what_the_user_has_chosen_stays(chosen: dict[str, str]) -> None:
    settings, faults, _ = run(**chosen)
    assert settings == {}
    assert faults > 1000 or "MALLOC_MMAP_MAX_" not in chosen  # pages of 4 KB, unless the kernel gives bigger ones


@pytest.mark.parametrize("home", ["/nonexistent/home", "/dev/null", None])
def test_an_unusable_home_is_replaced_by_a_private_folder(home: str | None, tmp_path: Path, capsys,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", home or "")
    if home is None:  # nor an entry in passwd
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    settings = runtime.ensure_home()
    folder = Path(settings["HOME"])
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700 and os.environ["HOME"] == str(folder)
    assert str(folder) in capsys.readouterr().err
    monkeypatch.setenv("HOME", home or "/nonexistent/home")
    folder.chmod(0o755)  # perhaps somebody else's
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/nonexistent/home")
    assert runtime.ensure_home()["HOME"] != str(folder)
    assert runtime.ensure_home() == {}, "the home is usable now"


@pytest.mark.parametrize(("own", "files", "quota"), [
    ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
    ("0::/a/b\n", {"cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),
    ("4:cpu,cpuacct:/docker/x\n2:memory:/y\n", {"cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                                                "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 0.5),
    ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
     float("inf")),
    ("nonsense", {"cpu.max": "nonsense"}, float("inf")),
])
def test_the_quota_of_a_control_group_is_found(own: str, files: dict[str, str], quota: float, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert runtime.cpu_quota(tmp_path / "fs", tmp_path / "own") == quota


def test_outputs_of_any_encoding_and_closed_ones_take_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    cli._open_outputs()
    print("Δ 猫", flush=True)
    print("nobody reads this", file=sys.stderr, flush=True)
    assert written.getvalue() == b"? ?\n"


def test_characters_without_a_glyph_take_another_font_or_are_reported(tmp_path: Path, caplog, recwarn) -> None:
    figure = Figure()
    text = figure.text(0.5, 0.5, "a 猫 \U000e0fff")  # the last one is in no font
    with caplog.at_level(logging.WARNING, "suite"):
        save_figure(figure, tmp_path / "a.png")
    assert text.get_fontfamily()[0] == "DejaVu Sans" and not [w for w in recwarn if "Glyph" in str(w.message)]
    figure = Figure()
    text = figure.text(0.5, 0.5, "狗")
    save_figure(figure, tmp_path / "b.png")
    assert len(text.get_fontfamily()) == 2 or "no font on this machine has all of 狗" in caplog.text
