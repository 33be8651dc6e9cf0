"""``at-fused-train``: one teacher, students by several methods and seeds, and their comparison.

Without options it trains on scikit-learn's digits, in about five minutes, and leaves a report with
its figures, metrics and weights in a folder. docs/training.md says what the methods minimise, what
data is expected where, and how fast steps are. ``python -m at_fused.train`` is the same program.
"""
