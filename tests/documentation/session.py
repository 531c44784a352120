"""Does what a page's blocks say, one after the other: `session.py BLOCKS.json`.

Shell blocks run in bash; Python blocks share their names, as if typed into one session.
"""

import json
import subprocess
import sys
import time
from pathlib import Path


start = time.monotonic()
names = {"__name__": "__main__"}
for place, language, text in json.loads(Path(sys.argv[1]).read_text()):
    print(f"\n--- {place}, {time.monotonic() - start:.0f} s\n{text}", flush=True)
    if language == "python":
        exec(compile(text, place, "exec"), names)
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
