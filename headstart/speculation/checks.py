"""The check of a user's setting, with one wording of the error for all settings. Imports nothing."""


def require(is_met: bool, name: str, value: object, limit: str) -> None:
    """Check one setting: unless `is_met`, raises ValueError with the name, the value and the limit, as in `at least 1`."""
    if not is_met:
        raise ValueError(f"{name} is {value}; it must be {limit}")
