"""Measurements against peers; see README.md beside this file."""
