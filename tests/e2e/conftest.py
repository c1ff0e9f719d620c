"""Projects that were run once, for tests to run again, change or break."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from .projects import QUICKSTART, Project, write_classifier_project, write_decoder_project, write_embedder_project


@dataclass(frozen=True)
class Finished:
    """A project and what its first run said."""

    project: Project
    first: subprocess.CompletedProcess[str]

    @property
    def digest(self) -> str:
        """Return the identity the first run printed."""
        return digest_in(self.first.stdout)


def digest_in(out: str) -> str:
    """Return the identity that a run printed."""
    return next(line.split()[1] for line in out.splitlines() if line.startswith("digest "))


def finished(recipe: Path, folder: Path) -> Finished:
    project = Project(recipe, folder / "store", folder / "out")
    return Finished(project, project.run())


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(QUICKSTART, tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="session")
def decoder_source(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("decoder")
    write_decoder_project(folder / "project")
    return Project(folder / "project" / "recipe.yaml", folder / "store", folder / "out")


@pytest.fixture(scope="session")
def decoder(decoder_source: Project) -> Finished:
    return Finished(decoder_source, decoder_source.run())


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("classifier")
    write_classifier_project(folder / "project")
    return finished(folder / "project" / "recipe.yaml", folder)


@pytest.fixture(scope="session")
def embedder_source(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("embedder")
    write_embedder_project(folder / "project")
    return Project(folder / "project" / "recipe.yaml", folder / "store", folder / "out")


@pytest.fixture(scope="session")
def embedder(embedder_source: Project) -> Finished:
    return Finished(embedder_source, embedder_source.run())
