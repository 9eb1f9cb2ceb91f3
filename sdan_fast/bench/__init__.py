"""Measuring: a machine's own limits, and times of several functions side by side."""
