"""What does the pack cost a host at start? Milliseconds of `import quantwire` and of its node list, with torch loaded.

    python benchmarks/import_time.py [--repeats 15] [--json FILE]

Each repeat is a fresh process in which torch is imported first. The peer, interleaved, is `import json.tool`:
the floor that a trivial import has on this machine at this moment.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

LIMIT_MS = 50
STEPS = {
    "import quantwire": "import quantwire",
    "with node classes": "import quantwire; quantwire.NODE_CLASS_MAPPINGS",
    "floor (json.tool)": "import json.tool",
}


def once_ms(statement: str) -> float:
    """Milliseconds that the statement takes in a fresh process after `import torch`."""
    code = f"import torch, time; t = time.perf_counter(); {statement}; print((time.perf_counter() - t) * 1e3)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], text=True, capture_output=True, check=True)
    return float(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(args.repeats):
        for name, statement in STEPS.items():
            times[name].append(once_ms(statement))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:20} median {medians[name]:6.1f} ms  min {min(values):6.1f}  max {max(values):6.1f}")
    import torch

    result = {
        "median_ms": medians,
        "limit_ms": LIMIT_MS,
        "repeats": args.repeats,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}",
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if medians["with node classes"] <= LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
