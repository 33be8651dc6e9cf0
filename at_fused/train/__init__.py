"""`at-fused-train`: attention transfer on a small real task, start to finish."""
