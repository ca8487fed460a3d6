"""The wheel: what is installed is the package with its configuration and its embedded model, and nothing else.

pytest tests/test_wheel.py
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    [built] = folder.glob("*.whl")
    return built


def sources(folder: Path) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }


def test_the_wheel_holds_the_package_and_the_whole_configuration(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        configuration = {f"lorafit/{name}" for name in sources(ROOT / "conf")}
        assert files == sources(ROOT / "lorafit") | configuration
        assert {"lorafit/conf/train.yaml", "lorafit/embedded/model/model.safetensors"} <= files
        for name in files:
            source = ROOT / (name.removeprefix("lorafit/") if name.startswith("lorafit/conf/") else name)
            assert archive.read(name) == source.read_bytes()


def test_the_wheel_names_its_program_its_licence_and_the_floor_under_lightning(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(info["METADATA"]).decode()
        assert "lorafit = lorafit.__main__:main" in archive.read(info["entry_points.txt"]).decode()
    assert any(name.endswith("LICENSE") for name in info)
    # 2.6.2 and 2.6.3 were malware, and before 2.6.6 a checkpoint could run code
    assert "Requires-Dist: lightning<2.7,>=2.6.6" in metadata


def test_commands_of_the_wheel_work_in_any_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
    code += "import lorafit.config as c; print(c.CONF); print(c.compose(['rank=8', 'quant=nf4']).alpha)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "site" / "lorafit" / "conf"), "16"], done.stderr
