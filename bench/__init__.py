"""Benchmarks: ratios against a baseline of the same run, and JSON. Never a timed test."""
