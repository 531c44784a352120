import os
import sys


# diffusers' common tests are in its repository only, not in its wheel.
collect_ignore = []
if "DIFFUSERS_CHECKOUT" in os.environ:
    sys.path.insert(0, os.environ["DIFFUSERS_CHECKOUT"])
else:
    collect_ignore.append("diffusers_common")
