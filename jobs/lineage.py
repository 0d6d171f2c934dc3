"""`nexus-ray lineage` as a Ray job: `ray job submit --working-dir . -- python jobs/lineage.py ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nexus_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["lineage", *sys.argv[1:]]))
