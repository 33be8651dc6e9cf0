"""Refuses Python's subinterpreters before torch is imported, which hangs or crashes there."""

import ctypes

_current, _main = ctypes.pythonapi.PyInterpreterState_Get, ctypes.pythonapi.PyInterpreterState_Main
_current.restype = _main.restype = ctypes.c_void_p
if _current() != _main():
    raise ImportError("at_fused does not run in a subinterpreter: torch does not; use a process")
