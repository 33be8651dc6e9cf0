"""Attention transfer inside other people's frameworks; each module needs its framework installed.

Nothing here is imported by ``import at_fused``.
"""
