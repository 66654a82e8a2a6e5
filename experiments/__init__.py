"""Launchers that measure what stowax claims; run them with ``python -m stowax.experiments.<name>``."""
