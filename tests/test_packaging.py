"""The source distribution is complete; an editable installation works beside a clone, whatever that is called."""

import configparser
import email
import re
import subprocess
import sys
import sysconfig
import tarfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from clip_prompt_peft.installing import how_to_install


ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_in_new_environment(tmp_path):
    """Returns a function that runs a Python of an environment which has this one's packages, but not this package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    site_packages = Path(sysconfig.get_path("purelib", vars=paths))
    (site_packages / "other_packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def run(*arguments, cwd):
        command = [tmp_path / "venv" / "bin" / "python", *arguments]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
        assert not done.returncode, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_prompt_peft", "a clone, renamed"])
def test_a_script_beside_an_editable_clone_imports_the_package(name, tmp_path, run_in_new_environment):
    clone = tmp_path / name
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    (clone / "setup.cfg").write_text((ROOT / "setup.cfg").read_text())  # what is tested may not be committed yet
    run_in_new_environment(
        "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", clone, cwd=tmp_path
    )

    # No import: torch takes seconds, and does not matter here.
    (tmp_path / "script.py").write_text(
        "from importlib.util import find_spec\nprint(find_spec('clip_prompt_peft').origin)\n"
    )

    found = run_in_new_environment("script.py", cwd=tmp_path)
    assert Path(found.strip()) == clone / "clip_prompt_peft" / "__init__.py"


@pytest.mark.slow
def test_the_source_distribution_holds_what_the_clone_holds(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    (clone / "MANIFEST.in").write_text((ROOT / "MANIFEST.in").read_text())  # what is tested may not be committed yet
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)

    (archive,) = (clone / "dist").iterdir()
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=clone, check=True, capture_output=True, text=True).stdout
    expected = {name for name in tracked.splitlines() if not name.startswith(".")}
    assert expected - packed == set()


@pytest.mark.slow
@pytest.mark.parametrize("address", ["", "https://example.org/me/clip_prompt_peft"])
def test_the_metadata_follow_the_address_of_the_repository(address, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    for name in ("setup.py", "setup.cfg", "README.md", "docs/hooks.py", "clip_prompt_peft/installing.py"):
        (clone / name).write_text((ROOT / name).read_text())  # what is tested may not be committed yet
    installing = clone / "clip_prompt_peft" / "installing.py"
    installing.write_text(
        re.sub(r'^REPOSITORY = ".*"$', f'REPOSITORY = "{address}"', installing.read_text(), flags=re.M)
    )
    build = "from setuptools.build_meta import prepare_metadata_for_build_wheel as prepare; prepare('metadata')"
    (clone / "metadata").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)

    (written,) = (clone / "metadata").glob("*.dist-info/METADATA")
    metadata = email.message_from_string(written.read_text())
    urls = metadata.get_all("Project-URL") or []
    assert urls == [] if not address else f"Source, {address}" in urls
    assert "](docs/" not in metadata.get_payload() and 'src="docs/' not in metadata.get_payload()
    assert (f"{address}/raw/main/docs/report.png" in metadata.get_payload()) == bool(address)
    assert metadata["Author"] == "The clip_prompt_peft contributors"
    assert len(metadata.get_all("License-File")) == 2  # with that of the embedded model and pictures


def test_only_one_place_says_how_to_install_the_package():
    saying = {file.name for file in (ROOT / "clip_prompt_peft").rglob("*.py") if "pip install" in file.read_text()}
    assert saying == {"installing.py", "prompt_classification_pipeline.py"}  # the second is copied beside classifiers
    assert how_to_install().endswith('pip install -e "."')


def test_packages_of_an_extra_are_named_one_by_one_wherever_this_one_came_from(monkeypatch):
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    for extra in ("report", "serve", "export", "demo"):
        packages = declared["options.extras_require"][extra].split()
        assert how_to_install(extra) == "pip install " + " ".join(f'"{package}"' for package in packages)

    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("clip_prompt_peft.installing.requires", not_installed)
    assert how_to_install("report").endswith('in a clone of clip_prompt_peft: pip install -e ".[report]"')
    monkeypatch.setattr("clip_prompt_peft.installing.REPOSITORY", "https://hub.example/me/it")
    assert how_to_install("report") == 'pip install "clip_prompt_peft[report] @ git+https://hub.example/me/it"'
