"""What a hosting service and a citation tool read: workflow, templates, CITATION.cff."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT, project_files


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = read(".github/workflows/ci.yml")
    steps = workflow["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    # YAML reads the key `on` as true.
    assert "pull_request" in workflow[True]
    for job in workflow["jobs"].values():
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_the_workflow_makes_wheels_of_each_platform_and_one_for_any() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    runners = jobs["wheels"]["strategy"]["matrix"]["runner"]
    assert runners == ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-15"]
    assert {"MULKI_BUILD_CPP": "0"} in [step.get("env") for step in jobs["any"]["steps"]]
    assert jobs["packages"]["needs"] == ["any", "wheels"]
    names = [
        step["with"]["name"]
        for job in ("any", "wheels")
        for step in jobs[job]["steps"]
        if "upload" in step.get("uses", "")
    ]
    (merge,) = jobs["packages"]["steps"]
    assert [name.startswith("package-") for name in names] == [True, True]
    assert merge["with"]["pattern"] == "package-*"


@pytest.mark.parametrize(
    "form", project_files(".github/ISSUE_TEMPLATE/*.yml"), ids=lambda p: p.stem
)
def test_issue_forms_ask_for_the_doctor(form: Any) -> None:
    content = read(str(form.relative_to(ROOT)))
    assert content["name"] and content["description"]
    labels = [part["attributes"]["label"] for part in content["body"]]
    assert "mulki doctor" in labels


def test_the_citation_names_the_paper() -> None:
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["authors"]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2411.06764" and len(paper["authors"]) == 5


def recipe(*given: str) -> str:
    """What make would run for these arguments."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # A make that runs these tests hands its own arguments on.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKEOVERRIDES")}
    command = ["make", "--dry-run", *given]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("jobs", "processes"), [((), "2"), (("JOBS=1",), None), (("JOBS=4",), "4")]
)
def test_make_test_takes_as_many_processes_as_asked(
    jobs: tuple[str, ...], processes: str | None
) -> None:
    (line,) = re.findall(r"^\S+ -m pytest.*$", recipe("test", *jobs), re.MULTILINE)
    found = re.search(r" -n (\d+) --dist loadfile", line)
    assert (found[1] if found else None) == processes


def test_ci_tries_random_cases_of_a_fixed_seed_and_of_a_fresh_one() -> None:
    assert 'make fuzz PYTHON="$python"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    tries = re.findall(r"tests\.fuzz \$target --seconds \d+( --seed 0)? \|\|", recipe("fuzz"))
    assert tries == [" --seed 0", ""]
    assert "--seed 0" in recipe("fuzz", "FIXED=1")
    assert not re.search(r"--seconds \d+ \|\|", recipe("fuzz", "FIXED=1"))


def test_ci_runs_the_commands_of_the_readme_in_its_order_in_one_checkout() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = re.findall(r'^ +make (\S+).* PYTHON="\$python"$', ci, re.MULTILINE)
    assert targets[:2] == ["demo", "test"]


@pytest.mark.long
def test_what_runs_and_builds_leave_is_not_taken_for_the_project(tmp_path: Path) -> None:
    for file in project_files():
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for made in ("logs", "build", "site", ".venv"):
        for name, text in {
            "README.md": "[gone](gone.md) `mulki gone --gone` `docs/gone.md`",
            "gone.py": 'import os\nos.environ["GONE"]\ndef f(): ...',
            "gone.yml": "gone: [",
            "test_gone.py": "raise RuntimeError",
        }.items():
            for folder in (".", "docs", "mulki", "tests", "kernels", "csrc", "benchmarks"):
                path = tmp_path / made / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    looking = [
        "git",
        "grep",
        "--untracked",
        "-l",
        "project_files(",
        "--",
        ":(glob)tests/**/test_*.py",
    ]
    files = subprocess.run(looking, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "tests/test_readme.py" in files
    gpu = "tests/benchmarks/test_gpu.py"
    assert gpu in files
    files = files.replace(gpu, f"{gpu}::test_the_commands_ask_for_what_there_is")
    slow = "page_run or tutorial or block_of_python"
    done = subprocess.run(
        # What runs the commands of a page has found the page before.
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", f"not ({slow})"]
        + files.split(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
