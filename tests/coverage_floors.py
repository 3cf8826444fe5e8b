"""How much of each package the tests reach, and whether it is enough: `make coverage`.

A floor is raised when more is reached; where a change falls below it, it lacks a test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FLOORS = {  # per cent of the branches
    "fastgda_core": 90,
    "storage_schemas": 90,
    "tasks": 85,
    "tasks/execution": 90,
    "flows": 5,  # its tests start commands: see `make coverage` of all tests
}


def main(report: Path) -> int:
    """Print the table of a report by `coverage json`; 1 where a floor is missed."""
    files = json.loads(report.read_text())["files"]
    missed = 0
    print(f"{'':18}{'lines':>8}{'branches':>10}{'floor':>7}")
    for folder, floor in FLOORS.items():
        of_folder = [found["summary"] for name, found in files.items() if name.startswith(f"{folder}/")]
        lines, branches = (
            100 * sum(each[covered] for each in of_folder) / max(1, sum(each[of] for each in of_folder))
            for covered, of in (("covered_lines", "num_statements"), ("covered_branches", "num_branches"))
        )
        print(f"{folder:18}{lines:7.1f}%{branches:9.1f}%{floor:6}%{' <- too few' if branches < floor else ''}")
        missed += branches < floor
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
