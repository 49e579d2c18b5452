"""Runs an experiment, or one stage of it, as a Ray job; run again, it goes on from the store.

ray job submit --working-dir . -- python jobs/raytvb_job.py run experiment.yaml

The first argument is `run` or a stage: finetune, basis, search, evaluate or report.
"""

import sys
from pathlib import Path

# The raytvb that was uploaded with this file comes before an installed one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raytvb.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
