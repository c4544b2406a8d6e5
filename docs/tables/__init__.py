"""Renders the tables of the documentation from the results of benchmarks."""
