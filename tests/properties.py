"""Property-based tests have no deadline: how long an example takes depends on the machine."""

from __future__ import annotations

from contextlib import suppress

with suppress(ModuleNotFoundError):  # virtual machines have pytest only
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "datadist", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("datadist")
