"""`ray job submit --working-dir . -- python jobs/select_negatives.py --config demo`: one stage of a run.

Not called select.py: a script's folder comes first on the path, and that name would hide Python's own module.
"""

import sys

from unime_ray.cli import main

if __name__ == "__main__":
    main(["select", *sys.argv[1:]])
