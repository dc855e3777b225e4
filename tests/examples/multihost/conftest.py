"""Keeps pytest, which imports every file for its doctests, from importing the worker."""

collect_ignore = ["worker.py"]  # it needs examples/ on its path, which launch.py sees to
