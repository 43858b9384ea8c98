"""`ray job submit --working-dir . -- python jobs/pipeline.py --config demo`: the whole recipe."""

import sys

from unime_ray.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
