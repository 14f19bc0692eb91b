"""A Python in which one installed package is really absent."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import quantwire


def run_without(folder: Path, code: str, *prefixes: str) -> str:
    """Run code where no file of site-packages whose name begins with one of `prefixes` exists.

    `folder` gets a link to every other one and stands in for site-packages. Returns stdout; stderr shows on a failure.
    """
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().startswith(prefixes):
            (folder / entry.name).symlink_to(entry)
    (folder / "quantwire").symlink_to(Path(quantwire.__file__).parent)
    env = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
