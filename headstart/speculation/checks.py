"""The check that every module of this folder makes of a user's value. Imports nothing."""


def require(is_met: bool, name: str, value: object, limit: str) -> None:
    """Raises ValueError, naming the value and its limit, unless `is_met`."""
    if not is_met:
        raise ValueError(f"{name} is {value}; it must be {limit}")
