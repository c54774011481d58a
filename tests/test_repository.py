"""What a hosting service and a citation tool read: workflow, templates, CITATION.cff."""

from __future__ import annotations

import os
from typing import Any

import pytest
import yaml

from tests import ROOT

GITHUB = ROOT / ".github"


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


@pytest.mark.parametrize("form", sorted(GITHUB.glob("ISSUE_TEMPLATE/*.yml")), ids=lambda p: p.stem)
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
