"""Makes the entry points of the five packages visible where they are only on PYTHONPATH, not installed.

    PYTHONPATH=$(python benchmarks/entry_points.py DIR) python -m align_core ...

Writes one dist-info a package into DIR and prints the PYTHONPATH that holds DIR and the five source folders.
"""

import sys
from pathlib import Path

import tomllib

PACKAGES = Path(__file__).resolve().parent.parent / "packages"


def main(folder: Path) -> None:
    """Writes the dist-infos and prints the path."""
    sources = []
    for file in sorted(PACKAGES.glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        lines = []
        for group, points in project.get("entry-points", {}).items():
            lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        sources.append(str(file.parent / "src"))
    sys.stdout.write(":".join([str(folder.resolve()), *sources]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
