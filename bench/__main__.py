"""``python -m bench compare [NAME] [BEFORE AFTER]``: what changed between two runs of a bench."""

from bench.results import main

main()
