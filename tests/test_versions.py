"""The oldest versions that the README names, in an environment of their own: python -m pytest -m slow
tests/test_versions.py

Downloads several GB (PyPI has torch 2.11.0 with CUDA only), unless $OLDEST_PYTHON is an interpreter that has
them.
"""

import os
import subprocess
import sys

import pytest

from runs import ENVIRONMENT, ROOT

OLDEST = {"torch": "2.11.0", "transformers": "5.17.0"}
FILES = ("flow", "loader", "grpo", "nft", "opd", "sharding", "rewards", "rollout", "bench")


def test_readme_names_the_oldest_versions():
    readme = (ROOT / "README.md").read_text()
    assert all(f"{name} ({version.removesuffix('.0')} or newer" in readme for name, version in OLDEST.items())


@pytest.mark.slow
def test_the_oldest_versions_pass(tmp_path):
    python = os.environ.get("OLDEST_PYTHON")
    if not python:
        python = str(tmp_path / "bin" / "python")
        pinned = [line.split("==") for line in (ROOT / "requirements.txt").read_text().split()]
        subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q",
                        *(f"{name}=={OLDEST.get(name, version)}" for name, version in pinned)], check=True)
    code = "import torch, transformers; print(torch.__version__.split('+')[0], transformers.__version__)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == list(OLDEST.values())
    done = subprocess.run([python, "-m", "pytest", "-q", *(f"tests/test_{name}.py" for name in FILES)],
                          cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
