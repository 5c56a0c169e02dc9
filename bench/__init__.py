"""Measurements, each a script (``python -m bench.observe``); ``python -m bench compare`` says what changed between runs."""
