"""`ray job submit --working-dir . -- python jobs/judge.py --config demo`: one stage of a run."""

import sys

from unime_ray.cli import main

if __name__ == "__main__":
    main(["judge", *sys.argv[1:]])
