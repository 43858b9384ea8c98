"""`ray job submit --working-dir . -- python jobs/duplicates.py --config demo`: one stage of a run."""

import sys

from unime_ray.cli import main

if __name__ == "__main__":
    main(["duplicates", *sys.argv[1:]])
