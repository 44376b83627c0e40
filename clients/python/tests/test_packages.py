"""The archives that would be published: their files, licences and types."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]
LICENSES = ("LICENSE-MIT", "LICENSE-APACHE")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=PACKAGE, check=True)
    return folder


def test_wheel_has_licenses_types_and_scripts(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = opened.read(f"{info}/METADATA").decode()
        for license_file in LICENSES:
            assert opened.read(f"{info}/licenses/{license_file}") == (PACKAGE / license_file).read_bytes()
    scripts = {f"wsproxy/scripts/{name}.lua" for name in ("publish", "read", "room_leave", "stream")}
    assert {"wsproxy/__init__.py", "wsproxy/py.typed"} | scripts <= names
    assert "License-Expression: MIT OR Apache-2.0" in metadata
    assert not [name for name in names if name.startswith("tests/")]


def test_source_archive_has_licenses_and_tests(archives: Path) -> None:
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames()}
    assert {*LICENSES, "README.md", "pyproject.toml", "src/wsproxy/py.typed", "tests/test_packages.py"} <= names


def test_licenses_are_those_of_the_repository() -> None:
    if not (PACKAGE.parents[1] / "Cargo.toml").exists():
        pytest.skip("not in a checkout")
    for license_file in LICENSES:
        assert (PACKAGE / license_file).read_bytes() == (PACKAGE.parents[1] / license_file).read_bytes()
