"""New cases for as long as told, one file a subject: ``python -m fuzz.maps --minutes 5``; ``python -m fuzz`` for all."""

SUBJECTS = ["maps", "calls", "interrupts", "threads", "files"]
