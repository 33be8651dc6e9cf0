"""Attention transfer in other training frameworks.

Each module needs its framework and is imported by name: ``at_fused.integrations.torchdistill``.
"""
