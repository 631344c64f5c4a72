"""The generated files are what the program says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.generate import __main__, prometheus
from deploy.generate.__main__ import OWN_FOLDERS, ROOT, files, generate, outdated


def test_every_generated_file_is_up_to_date() -> None:
    command = [sys.executable, "-m", "deploy.generate", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_whatever_differs_is_named_and_mended(tmp_path: Path) -> None:
    for path in files():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    changed, missing, *_ = files()
    left_over = f"{OWN_FOLDERS[0]}/of_yesterday.yml"
    (tmp_path / changed).write_text("by hand")
    (tmp_path / missing).unlink()
    (tmp_path / left_over).write_text("groups: []")

    assert outdated(tmp_path).keys() == {changed, missing, left_over}
    assert generate(tmp_path).keys() == {changed, missing, left_over}
    assert outdated(tmp_path) == {}
    assert not (tmp_path / left_over).exists()


def test_no_file_is_made_by_two_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "MODULES", (prometheus, prometheus))
    with pytest.raises(ValueError, match="is made twice"):
        files()
