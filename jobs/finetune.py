"""Fine-tunes one task vector per task as a Ray job.

ray job submit --working-dir . -- python jobs/finetune.py experiment.yaml
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the uploaded raytvb comes before an installed one

from raytvb.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
