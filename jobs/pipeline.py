"""Runs the whole pipeline as a Ray job; run again, it resumes from the store.

ray job submit --working-dir . -- python jobs/pipeline.py experiment.yaml
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the uploaded raytvb comes before an installed one

from raytvb.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
