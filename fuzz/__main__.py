"""``python -m fuzz --minutes 5``: every subject for so long, one after another; exits with 1 where one found something."""

import argparse
import subprocess
import sys

from fuzz import SUBJECTS

parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
parser.add_argument("--minutes", type=float, default=1.0, help="for each subject")
parser.add_argument("--only", nargs="*", choices=SUBJECTS, default=SUBJECTS)
given = parser.parse_args()
# Each in a process of its own: one that dies takes no other with it.
found = [
    name
    for name in given.only
    if subprocess.run([sys.executable, "-m", f"fuzz.{name}", "--minutes", str(given.minutes)], check=False).returncode
]
print(f"something was found by: {', '.join(found)}" if found else "nothing was found")
sys.exit(bool(found))
