"""The category of this package's warnings, so that they can be filtered as one."""


class AtFusedWarning(UserWarning):
    """Something works, but not as the user may expect."""
