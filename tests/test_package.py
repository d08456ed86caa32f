"""The wheel, the command and the doctor, as somebody meets them who has just installed it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from spcompile import cli, doctor
from spcompile.doctor import Finding

HOME = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked. It is built of a copy: setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOME / name, source)
    shutil.copytree(HOME / "spcompile", source / "spcompile", ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
    ]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_types_and_a_model(wheel: Path) -> None:
    assert (wheel / "spcompile" / "py.typed").exists() and (wheel / "spcompile" / "example.py").exists()
    assert sorted(p.name for p in wheel.iterdir() if not p.name.endswith(".dist-info")) == ["spcompile"]
    assert {p.relative_to(wheel) for p in wheel.rglob("*.py")} == {
        p.relative_to(HOME) for p in (HOME / "spcompile").rglob("*.py")
    }


@pytest.mark.timeout(300)
def test_the_example_of_the_help_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    command, *words = shlex.split(cli._EXAMPLE)
    assert command == "spcompile" and cli._EXAMPLE in (HOME / "README.md").read_text()
    # The pattern again, shorter: the last one counts.
    run = [sys.executable, "-m", "spcompile", *words, "pattern=L", "--device-memory", "80GB"]
    done = subprocess.run(
        run,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "1,048,576 tokens, 16,384 per rank" in done.stdout
    assert "device memory 74.5 GiB: fits" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "--typo"], "required: model"),
        (["explain", "a:b", "--typo"], "no such option"),
        (["explain", "a:b", "--ranks", "none"], "must be a number, at least 1"),
        (["explain", "a:b", "--option", "sofmax=1"], "did you mean 'softmax'"),
        (["explain", "a:b", "--option", "sequence_dims=1"], "must be a dict"),
        (["explain", "a:b", "--device-memory", "much"], "80GB"),
        (["explain", "a:b", "--optimizer", "lion"], "adamw"),
        (["explain", "no_such_module:tiny"], "no module 'no_such_module'"),
        (["explain", "module"], "module:factory"),
        (["doctor", "--quick"], "--no-self-test"),
        (["variant"], "invalid choice"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_arguments_are_checked_before_torch_loads(words: list[str], message: str) -> None:
    program = (
        "import sys\nsys.modules['torch'] = None  # an import of it fails\n"
        f"from spcompile.cli import main\nraise SystemExit(main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------------- doctor


def states(found: list[Finding]) -> set[str]:
    return {f.state for f in found}


def test_nothing_fails_here() -> None:
    found = doctor.examine()
    assert "fail" not in states(found), found
    assert all(f.remedy for f in found if f.state != "ok")
    assert any("torch 2." in f.text and "supported" in f.text for f in found)


def test_versions_of_torch() -> None:
    wanted = "torch<2.15,>=2.11"
    for version, state in {"2.11.0": "ok", "2.14.1+cu130": "ok", "2.10.1": "fail", "2.15.0": "fail"}.items():
        assert doctor._in_range(version, wanted).state == state
    assert doctor._in_range(None, wanted).state == "fail"


def test_a_compiler_that_is_not_there_or_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (missing,) = doctor._compiler()
    monkeypatch.setenv("CXX", "false")
    (broken,) = doctor._compiler()
    assert missing.state == broken.state == "fail" and "CXX" in missing.remedy and "CXX" in broken.remedy


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONHASHSEED", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = list(doctor._environment())
    assert [f.state for f in found] == ["fail", "note", "note"] and "torchrun" in found[0].remedy
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONHASHSEED", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    assert states(list(doctor._environment())) == {"ok"}


def test_the_self_tests_judgement(tmp_path: Path) -> None:
    files = [tmp_path / "rank0.json", tmp_path / "rank1.json"]
    files[0].write_text(json.dumps({"error": 1e-16}))
    silent = doctor._judged(files, ["", "Traceback: no such thing"])
    assert silent.state == "fail" and "rank1 failed" in silent.text and "no such thing" in silent.text
    for error, state in ((1e-12, "ok"), (1e-3, "fail"), (float("nan"), "fail")):
        files[1].write_text(json.dumps({"error": error}))
        assert doctor._judged(files, ["", ""]).state == state


def test_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for found, status in ((Finding("note", "a", "b"), 0), (Finding("fail", "broken", "mend it"), 1)):
        monkeypatch.setattr(doctor, "_checks", lambda self_test, found=found: [("it", lambda: [found])])
        assert cli.main(["doctor", "--no-self-test"]) == status
    text = capsys.readouterr().out
    assert "broken" in text and "Remedy: mend it" in text and "1 of the checks failed" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_train() -> None:
    (found,) = doctor._self_test(timeout=580)
    assert found.state == "ok", found.text
