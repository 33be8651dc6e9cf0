"""``at-fused-train``: train a teacher and students by several methods and seeds, and compare them.

Without options it trains on scikit-learn's digits, in about five minutes, and writes a report with
figures, metrics and weights to a folder. docs/training.md describes the methods, the data and the
speed of steps. ``python -m at_fused.train`` is the same program.
"""
