"""A check for Python subinterpreters, in which torch hangs or crashes."""

import ctypes


def refuse_subinterpreters() -> None:
    """Raise an ImportError in a subinterpreter. Call it before importing torch."""
    current, main = (
        ctypes.pythonapi.PyInterpreterState_Get,
        ctypes.pythonapi.PyInterpreterState_Main,
    )
    current.restype = main.restype = ctypes.c_void_p
    if current() != main():
        raise ImportError(
            "at_fused cannot run in a subinterpreter, because torch cannot; use a process instead"
        )
